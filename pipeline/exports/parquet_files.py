"""Write tables as Parquet. Only this module imports pyarrow."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from pipeline.exports.folder import Written, counted, needs
from pipeline.exports.tables import Table

BATCH = 50_000  # rows in memory at once


def write(tables: Iterable[Table], folder: Path) -> list[Written]:
    """Write `items.parquet`, `arms.parquet` and `decisions.parquet` into a folder.

    Raises NotFound without pyarrow, OSError as writing does.
    """
    with needs("parquet", "pyarrow"):
        import pyarrow
        import pyarrow.parquet as parquet
    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    written = []
    for table in tables:
        schema = pyarrow.schema([(name, kinds[kind]) for name, kind in table.columns.items()])
        path, count, rows = folder / f"{table.name}.parquet", 0, table.rows()
        with parquet.ParquetWriter(path, schema) as writer:
            while batch := list(itertools.islice(rows, BATCH)):
                writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
                count += len(batch)
        written.append(Written(path.name, counted(count, "row")))
    return written
