from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from qtrain.data.files import TokenFile, TokenFiles, unreadable
from qtrain.errors import UserError


class Datatrove(TokenFiles):
    """Token files of datatrove, as nanotron reads them: x.ds with the ids, little-endian uint16 or uint32, and
    x.ds.index with the end of each document in tokens, little-endian uint64. Source: datatrove, pipeline/tokens."""

    USUAL: ClassVar[str] = "*.ds"
    source: Literal["datatrove"]

    def token_file(self, path: Path) -> TokenFile:
        import numpy as np

        index = path.with_name(f"{path.name}.index")
        if path.suffix == ".index":
            raise UserError(f"{path} is an index; name the token files in data.files: '*.ds'")
        try:
            n_bytes, index_bytes = path.stat().st_size, index.stat().st_size
            if index_bytes == 0 or index_bytes % 8:
                raise UserError(f"{index} has {index_bytes} bytes, no whole number of document ends; copy it anew")
            ends = np.memmap(index, dtype="<u8", mode="r")
        except FileNotFoundError:
            raise UserError(f"{path} has no {index.name} beside it, which says where its documents end") from None
        except OSError as error:
            raise unreadable(path, error) from None
        n_tokens = int(ends[-1])
        dtype = {2: "<u2", 4: "<u4"}.get(n_bytes // n_tokens) if n_tokens and n_bytes % n_tokens == 0 else None
        if dtype is None:
            raise UserError(
                f"{path} has {n_bytes} bytes, and its index {n_tokens} tokens, which are 2 or 4 bytes each; one of "
                "them is cut or of another file: copy both anew"
            )
        return TokenFile(path, index, dtype, n_tokens, len(ends), lambda first, last: ends[first:last])
