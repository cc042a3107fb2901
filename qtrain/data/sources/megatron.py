from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from qtrain.data.files import TokenFile, TokenFiles, unreadable
from qtrain.errors import UserError

if TYPE_CHECKING:
    import numpy as np

MAGIC, VERSION = b"MMIDIDX\0\0", 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, document borders
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class Megatron(TokenFiles):
    """Token files of Megatron-LM's IndexedDataset: x.bin with the ids, and x.idx, all little-endian: the header; int32
    tokens and int64 byte offset of each sequence; int64 borders of documents among the sequences, the first 0 and the
    last their number. Source: Megatron-LM, core/datasets/indexed_dataset.py."""

    USUAL: ClassVar[str] = "*.bin"
    source: Literal["megatron"]

    def token_file(self, path: Path) -> TokenFile:
        import numpy as np

        if path.suffix != ".bin":
            raise UserError(f"{path} is no .bin; name the token files in data.files, each with its .idx beside it")
        index = path.with_suffix(".idx")
        try:
            n_bytes, index_bytes = path.stat().st_size, index.stat().st_size
            with index.open("rb") as file:
                header = file.read(HEADER.size)
        except FileNotFoundError:
            raise UserError(f"{path} has no {index.name} beside it, which says where its documents end") from None
        except OSError as error:
            raise unreadable(path, error) from None
        dtype, n_sequences, n_borders = _header(index, header)
        expected = HEADER.size + 12 * n_sequences + 8 * n_borders
        if index_bytes != expected:
            modes = index_bytes == expected + n_sequences
            why = "it has modes of images, which are not read" if modes else "it is cut or damaged: copy it anew"
            raise UserError(f"{index} has {index_bytes} bytes, and its header counts {expected}; {why}")
        raw = np.memmap(index, mode="r")
        lengths_end = HEADER.size + 4 * n_sequences
        lengths = raw[HEADER.size : lengths_end].view("<i4")
        offsets = raw[lengths_end : lengths_end + 8 * n_sequences].view("<i8")
        borders = raw[lengths_end + 8 * n_sequences :].view("<i8")
        item = np.dtype(dtype).itemsize
        n_tokens = n_bytes // item
        if n_sequences == 0 or n_borders < 2 or n_tokens * item != n_bytes:
            raise UserError(f"{path} and its index hold no whole sequence of tokens; copy both anew")
        if int(offsets[-1]) + int(lengths[-1]) * item != n_bytes:
            raise UserError(
                f"{path} has {n_bytes} bytes, and its index ends at {int(offsets[-1]) + int(lengths[-1]) * item}; one "
                "of them is cut or of another file: copy both anew"
            )
        if int(borders[0]) != 0 or int(borders[-1]) != n_sequences:
            raise UserError(f"{index}: its documents do not hold its {n_sequences} sequences; copy it anew")

        def ends(first: int, last: int) -> np.ndarray:
            """The end of a document is where the sequence after it begins, as long as they lie side by side."""
            after = np.asarray(borders[first + 1 : last + 1])
            if (after < 1).any() or (after > n_sequences).any():
                raise UserError(f"{index}: a document ends at a sequence that it has not; copy it anew")
            return offsets[after - 1] // item + lengths[after - 1]

        def check() -> None:
            for first in range(0, n_sequences, 1 << 20):
                begins, counts = offsets[first : first + (1 << 20)], lengths[first : first + (1 << 20)].astype("<i8")
                start = int(offsets[first - 1]) + int(lengths[first - 1]) * item if first else 0
                expected = start + item * np.concatenate([[0], np.cumsum(counts)[:-1]])
                if (counts < 0).any() or not np.array_equal(begins, expected):
                    raise UserError(
                        f"{index}: its sequences do not lie one after the other in {path.name}; write it anew"
                    )

        return TokenFile(path, index, dtype, n_tokens, n_borders - 1, ends, check)


def _header(index: Path, header: bytes) -> tuple[str, int, int]:
    if header[: len(MAGIC)] != MAGIC:
        raise UserError(f"{index} does not begin with {MAGIC!r}; it is no index of Megatron's IndexedDataset")
    if len(header) < HEADER.size:
        raise UserError(f"{index} ends in its header; copy it anew")
    _, version, code, n_sequences, n_borders = HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"{index} has version {version}, and {VERSION} is read")
    if code not in DTYPES:
        raise UserError(f"{index} says that tokens have the type of code {code}; whole numbers are {sorted(DTYPES)}")
    return DTYPES[code], n_sequences, n_borders
