from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from qtrain.data.base import Document, Source, TextSettings
from qtrain.data.files import File, cell_text, stat
from qtrain.errors import UserError, first_line


class HuggingFace(TextSettings):
    """A dataset of the Hugging Face hub, or a local folder of one.

    path: the dataset's name on the hub, or a local folder.
    subset: its configuration, where it has several.
    split: the split that is trained on.
    val_split: the split that is validated on; None holds a part of `split` out.
    text_field: the column that holds the text.
    """

    source: Literal["huggingface"]
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    val_split: str | None = None
    text_field: str = "text"

    @model_validator(mode="after")
    def _complete(self) -> HuggingFace:
        if not self.path:
            raise ValueError("data.source=huggingface needs data.path, the dataset's name or a local folder")
        return self

    def __str__(self) -> str:
        return f"{self.path} ({self.subset})" if self.subset else str(self.path)

    def open(self) -> tuple[Source, Source | None]:
        return self._split(self.split), self._split(self.val_split) if self.val_split else None

    def _split(self, split: str) -> Source:
        folder = Path(os.path.expanduser(self.path or ""))  # noqa: PTH111 (Path raises for a user that is not there)
        is_local = os.path.isdir(folder)  # noqa: PTH112 (Path raises for a name that is too long)
        path = str(folder) if is_local else str(self.path)
        identity = [folder.name if is_local else path, self.subset, split, self.text_field, self.streaming]
        if is_local:
            files = (file for file in sorted(folder.rglob("*")) if file.is_file())
            identity.append(stat([File(file.relative_to(folder).as_posix(), file) for file in files])[0])
        name = "-".join([Path(path).name, *([self.subset] if self.subset else [])])

        def documents(place: Any = None) -> Iterator[Document]:
            return (row for row in self._rows(path, split, place) if row.text)

        return Source(name, identity, None, documents)

    def _rows(self, path: str, split: str, place: Any) -> Iterator[Document]:
        """place: [number, state] of the last row that was read; the state of a stream, with which it opens the file of
        that row and none before it."""
        import datasets

        try:
            rows: Any = datasets.load_dataset(path, name=self.subset, split=split, streaming=self.streaming)
            first = 0
            if place is not None:
                first = place[0] + 1
                rows.load_state_dict(place[1]) if self.streaming else (rows := rows.skip(first))
            for number, row in enumerate(rows, first):
                document = self._document(f"{path} ({split}), row {number}", row)
                state = rows.state_dict if self.streaming else int
                yield document._replace(place=lambda number=number, state=state: [number, state()])
        except UserError:
            raise
        except Exception as error:  # whatever the network, the hub or a loading script raises, the user must hear of it
            raise UserError(
                f"dataset {path}{f' ({self.subset})' if self.subset else ''}, split {split}, could not be read: "
                f"{first_line(error)}\nWithout a network, prepare it elsewhere (qtrain data ...) "
                "and copy data.cache_dir, or point HF_HOME at a filled Hugging Face cache."
            ) from error

    def _document(self, where: str, row: Any) -> Document:
        field = self.text_field
        if field not in row:
            raise UserError(f"{where}: no column {field!r}; it has {', '.join(sorted(row))}; set data.text_field")
        return Document(where, cell_text(where, field, row[field]))
