from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from qtrain.data.base import Document
from qtrain.data.files import RowFiles, cell_text
from qtrain.errors import UserError, first_line


class Parquet(RowFiles):
    """One row of a file is one document: the text in a column."""

    USUAL: ClassVar[str] = "*.parquet"
    source: Literal["parquet"]

    def read(self, path: Path) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet

        field, row = self.text_field, 0
        try:
            table = pyarrow.parquet.ParquetFile(path)
            columns = table.schema_arrow.names
            if field not in columns:
                raise UserError(f"{path}: no column {field!r}; it has {', '.join(columns)}; set data.text_field")
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield Document(f"{path}:{row}", cell_text(f"{path}, row {row}", field, text))
                    row += 1
        except UserError:
            raise
        except pyarrow.ArrowInvalid as error:
            what = "is not a Parquet file" if row == 0 else f"is damaged after row {row}"
            raise UserError(f"{path} {what} ({first_line(error)}); copy it anew, or leave it out") from None
        except Exception as error:  # damaged bytes raise whatever the code that meets them raises
            said = f"{path} is damaged after row {row} ({first_line(error)}); copy it anew, or leave it out"
            raise UserError(said) from None
