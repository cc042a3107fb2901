from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from qtrain.data.base import Document
from qtrain.data.files import Files, decoded, unreadable
from qtrain.errors import UserError


class Text(Files):
    """One file is one document, in UTF-8."""

    source: Literal["text"]

    def read(self, path: Path) -> Iterator[Document]:
        try:
            raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)  # a mark of the encoding, no text
        except OSError as error:
            raise unreadable(path, error) from None
        if (offset := raw.find(b"\0")) >= 0:
            raise UserError(f"{path} looks binary (a zero byte at offset {offset}); data.source=text needs UTF-8 text")
        yield Document(str(path), decoded(path, raw, 0))
