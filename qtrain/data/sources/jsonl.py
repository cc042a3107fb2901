from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from qtrain.data.base import Document
from qtrain.data.files import RowFiles, lines_of
from qtrain.errors import UserError


class Jsonl(RowFiles):
    """One line of a file is one document: the text in an object's field."""

    USUAL: ClassVar[str] = "*.jsonl"
    source: Literal["jsonl"]

    def read(self, path: Path) -> Iterator[Document]:
        for where, line in lines_of(path):
            yield Document(where, _text(where, line, self.text_field))


def _text(where: str, line: str, field: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); mend or drop the line"
        ) from None
    except (RecursionError, ValueError):
        raise UserError(f"{where}: nested too deep, or a number too long; mend or drop the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with a field {field!r}, found {type(row).__name__}")
    if field not in row:
        raise UserError(f"{where}: no field {field!r}; it has {', '.join(sorted(row))}; set data.text_field")
    text = row[field]
    if text is None:
        raise UserError(f"{where}: field {field!r} is null; give the line a text, or drop it")
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is not a string (found {type(text).__name__}); set data.text_field")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: field {field!r} holds half a surrogate pair at character {error.start}"
            ) from None
    return text
