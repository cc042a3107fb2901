"""Conversations as tokens: how messages are written as text, and which of that text a loss counts.

A conversation is an object of one of two forms, TRL's names:
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"prompt": text, "completion": text}

A prompt and its completion are written as they stand, one after the other. Messages are written by the chat template of
the tokenizer. Where the tokenizer has none, each message is a line "role: content".

The loss counts the completion, or what the assistant says, and the token that ends the conversation after it. What the
assistant says begins where the template stops when it is asked for an answer (add_generation_prompt), and ends with
what the template writes after it. Each part is tokenised alone, as a prompt is when a model answers it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from qtrain.data.counted import DTYPE
from qtrain.data.tokenizer import FileTokenizer, Tokenizer
from qtrain.errors import UserError, first_line

Message = Mapping[str, Any]


class Part(NamedTuple):
    """A piece of a conversation's text. counted: by the loss. rendered: by a template, so that it spells special
    tokens."""

    text: str
    counted: bool
    rendered: bool = False


def plain_text(document: str) -> str:
    """A conversation's text without a template: what a tokenizer is trained on."""
    return "".join(part.text for part in Dialogue(_NO_TOKENIZER).parts(document))


class Dialogue:
    """Encodes conversations with a tokenizer and its chat template. `encode` is that of `qtrain.data.encode.Text`."""

    dtype = np.dtype(DTYPE)

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.template = getattr(tokenizer, "chat_template", None)

    @property
    def hash(self) -> str:
        """Hex digits; equal hashes encode equally."""
        return hashlib.sha256(f"{self.tokenizer.hash} dialogue {self.template}".encode()).hexdigest()

    def encode(self, document: str) -> tuple[np.ndarray, int]:
        """(tokens (n,) int32, the UTF-8 bytes of the counted text). document: of
        `qtrain.data.sources.chat.checked`. UserError for a template that fails on it."""
        pieces, n_bytes, counted = [], 0, False
        for part in self.parts(document):
            ids = self._ids(part).astype(self.dtype)
            pieces.append(ids if part.counted else ~ids)
            n_bytes += len(part.text.encode()) if part.counted else 0
            counted = part.counted if len(ids) else counted
        end = np.array([self.tokenizer.eos_id], self.dtype)
        return np.concatenate([*pieces, end if counted else ~end]), n_bytes

    def parts(self, document: str) -> Iterator[Part]:
        found = json.loads(document)
        if "completion" in found:
            yield Part(found["prompt"], counted=False)
            yield Part(found["completion"], counted=True)
        elif self.template is None:
            for message in found["messages"]:
                said = message["role"] == "assistant"
                yield Part(f"{message['role']}: ", counted=False)
                yield Part(f"{message['content']}\n", counted=said)
        else:
            yield from self._rendered(found["messages"])

    def _ids(self, part: Part) -> np.ndarray:
        if part.rendered:
            assert isinstance(self.tokenizer, FileTokenizer)
            return self.tokenizer.encode_rendered(part.text)
        return self.tokenizer.encode(part.text)

    def _rendered(self, messages: Sequence[Message]) -> Iterator[Part]:
        """The text of the template, cut where the assistant begins and ends to speak."""
        self._check_forged(messages)
        whole, done = self._render(messages), 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._render(messages[:number], add_generation_prompt=True)
            answered = whole if number + 1 == len(messages) else self._render(messages[: number + 1])
            if not (whole.startswith(answered) and answered.startswith(asked) and done <= len(asked) < len(answered)):
                raise UserError(
                    f"the chat template of the tokenizer writes the conversation {_short(messages)} otherwise when it "
                    "is cut before or after an answer of the assistant, so that the answer cannot be told from the "
                    "rest; give another template (chat_template.jinja), or prompt and completion"
                )
            yield Part(whole[done : len(asked)], counted=False, rendered=True)
            yield Part(whole[len(asked) : len(answered)], counted=True, rendered=True)
            done = len(answered)
        yield Part(whole[done:], counted=False, rendered=True)

    def _check_forged(self, messages: Sequence[Message]) -> None:
        """UserError for a message that spells a special token, which in a rendered text would end a turn."""
        assert isinstance(self.tokenizer, FileTokenizer)
        for message in messages:
            for token in self.tokenizer.special_tokens:
                if token in message["content"]:
                    raise UserError(
                        f"a message of the conversation {_short(messages)} spells the special token {token!r}; remove "
                        "it, or give prompt and completion, whose text is encoded as plain text"
                    )

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        import jinja2

        assert isinstance(self.tokenizer, FileTokenizer)
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self.tokenizer.named_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise UserError(
                f"the chat template of the tokenizer fails on the conversation {_short(messages)}: {first_line(error)}"
            ) from None

    @cached_property
    def _template(self) -> Any:
        """As transformers compiles it: in a sandbox, with the same options and functions."""
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = refuse
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            return environment.from_string(str(self.template))
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template of the tokenizer cannot be read: {first_line(error)}") from None

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled template, which each process makes for itself."""
        return {key: value for key, value in self.__dict__.items() if key != "_template"}


class _NoTokenizer:
    chat_template = None


_NO_TOKENIZER: Any = _NoTokenizer()


def _short(messages: Sequence[Message]) -> str:
    text = json.dumps(list(messages), ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."
