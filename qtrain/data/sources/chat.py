from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from qtrain.data.base import Document
from qtrain.data.files import Files, lines_of
from qtrain.errors import UserError


class Chat(Files):
    """One line of a file is one conversation (`qtrain.data.dialogue`): messages, or prompt and completion. The loss
    counts the completions alone."""

    source: Literal["chat"]
    conversations: ClassVar[bool] = True

    def read(self, path: Path) -> Iterator[Document]:
        from qtrain.data.dialogue import checked

        for where, line in lines_of(path):
            try:
                row = json.loads(line)
            except (RecursionError, ValueError) as error:
                raise UserError(f"{where}: not valid JSON ({error}); mend or drop the line") from None
            yield Document(where, checked(where, row))
