from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from qtrain.data.base import Document
from qtrain.data.files import Files, lines_of
from qtrain.errors import UserError

ROLES = ("system", "user", "assistant", "tool")


class Chat(Files):
    """One line of a file is one conversation (`qtrain.data.dialogue`): messages, or prompt and completion. The loss
    counts the completions alone."""

    source: Literal["chat"]
    conversations: ClassVar[bool] = True

    def read(self, path: Path) -> Iterator[Document]:
        for where, line in lines_of(path):
            try:
                row = json.loads(line)
            except (RecursionError, ValueError) as error:
                raise UserError(f"{where}: not valid JSON ({error}); mend or drop the line") from None
            yield Document(where, checked(where, row))


def checked(where: str, row: Any) -> str:
    """A conversation as canonical JSON, which is its document's text. UserError, beginning with `where`, for what is
    none, and for one without a completion."""
    if not isinstance(row, dict) or not ("messages" in row or {"prompt", "completion"} <= set(row)):
        found = f"the fields {', '.join(sorted(row))}" if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where}: expected an object with messages, or with prompt and completion; found {found}")
    kept = {"messages": row["messages"]} if "messages" in row else {key: row[key] for key in ("prompt", "completion")}
    if "messages" in kept:
        _check_messages(where, kept["messages"])
        kept["messages"] = [{key: message[key] for key in ("role", "content")} for message in kept["messages"]]
    elif not all(isinstance(text, str) for text in kept.values()):
        raise UserError(f"{where}: prompt and completion must be text; give conversations as messages")
    elif not kept["completion"]:
        raise UserError(f"{where}: the completion is empty, so that there is nothing to learn; drop the line")
    text = json.dumps(kept, ensure_ascii=False, sort_keys=True)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: a text holds half a surrogate pair; mend or drop the line") from None
    return text


def _check_messages(where: str, messages: Any) -> None:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where}: messages must be a list of objects with role and content")
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"{where}: message {number} has the role {role!r}; roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"{where}: the content of message {number} is {type(content).__name__}, not text")
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise UserError(f"{where}: no message is the assistant's, so that there is nothing to learn; drop the line")
