"""Tables as text: CSV files as spreadsheets write them, and Parquet files."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from fedcompo.data.sources.labels import MULTI_LABEL
from fedcompo.errors import DataError
from fedcompo.report.twins import few

CSV, PARQUET = (".csv", ".tsv", ".txt"), (".parquet", ".pq")
SEPARATORS = ",;\t"

Table = dict[str, list[str]]
"""Cells by column; what is missing is an empty text."""
Where = Callable[[int], str]
"""Names a row by its index, for messages."""


def read_table(path: Path) -> tuple[Table, Where]:
    """Read a table; return it and what names its rows.

    Raises:
        DataError: If the file is missing, damaged or of another kind, or holds no rows.
    """
    ending = path.suffix.lower()
    if ending not in (*CSV, *PARQUET):
        raise DataError(
            f"{path} must be a table that ends in {', '.join((*CSV, *PARQUET))}, got "
            f"{ending or 'no ending'!r}."
        )
    if ending in CSV:
        table, lines = _of_csv(path)
    else:
        table = _of_parquet(path)
        lines = [*range(1, 1 + len(next(iter(table.values()), [])))]
    if not lines:
        columns = few([*map(repr, table)]) or "none"
        raise DataError(f"{path} holds no rows; columns found: {columns}.")
    word = "line" if ending in CSV else "row"
    return table, lambda index: f"{word} {lines[index]}"


def _of_csv(path: Path) -> tuple[Table, list[int]]:
    """Read a CSV file and the line of each row; the separator is the most frequent in the header.

    Rows without any cell are left out, as spreadsheets add them at the end.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            rows = csv.reader(file, delimiter=max(SEPARATORS, key=header.count), strict=True)
            numbered = [(rows.line_num, row) for row in rows if any(map(str.strip, row))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path.absolute()} cannot be read as a table in UTF-8 ({error}). Check the path, or "
            "save it again as CSV in UTF-8."
        ) from error
    names = [name.strip() for name in numbered[0][1]] if numbered else []
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path} has the column {twice[0]!r} twice. Rename or remove one.")
    for line, row in numbered[1:]:
        if len(row) != len(names):
            raise DataError(
                f"{path}, line {line}, has {len(row)} cells, expected {len(names)} as in the "
                'header. Put cells that hold the separator in quotes ("...").'
            )
    cells = zip(*(row for _, row in numbered[1:]), strict=True)
    table = {name: [*column] for name, column in zip(names, cells, strict=False)}
    return {name: table.get(name, []) for name in names}, [line for line, _ in numbered[1:]]


def _of_parquet(path: Path) -> Table:
    """Read a Parquet file, without columns that hold more than one value a row."""
    try:
        from pyarrow import parquet, types
    except ImportError as error:
        raise DataError(
            f"{path} is a Parquet file, which needs pyarrow: pip install "
            '"fedcompo[datasets]". Or save it as CSV.'
        ) from error
    try:
        read = parquet.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        raise DataError(
            f"{path.absolute()} cannot be read as a Parquet file ({error}). Check the path, or "
            "write it again."
        ) from error
    nested = {field.name for field in read.schema if types.is_nested(field.type)}
    if any(types.is_struct(read.schema.field(name).type) for name in nested):
        raise DataError(
            f"{path} holds images themselves ({', '.join(sorted(nested))}), not their paths. Put "
            "it into a folder and set `data` to hf:<folder>."
        )
    if nested:
        raise DataError(
            f"{path} lists values in a cell ({', '.join(sorted(nested))}). {MULTI_LABEL}"
        )
    return {
        name: ["" if value is None else str(value) for value in read[name].to_pylist()]
        for name in read.column_names
    }
