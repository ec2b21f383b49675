"""Read the columns of a data set, and refuse rows that lack a value."""

from __future__ import annotations

from typing import Any


def column_of(data_set: str, rows: Any, wanted: tuple[str, ...]) -> str:
    """The first of the wanted columns that the rows have.

    Raises:
        ValueError: the rows have none of them.
    """
    found = next((name for name in wanted if name in rows.column_names), None)
    if found is None:
        raise ValueError(
            f"dataset={data_set!r} has no column {' or '.join(map(repr, wanted))}, only "
            f"{', '.join(rows.column_names)}: rename the right column."
        )
    return found


def texts_of(data_set: str, rows: Any, *wanted: str | tuple[str, ...]) -> list[tuple[str, ...]]:
    """The values of the wanted columns of each row, as texts.

    Args:
        wanted: for each column its name, or several names of which the rows must have one.

    Raises:
        ValueError: a column is missing, or a row has no value in it.
    """
    columns = [column_of(data_set, rows, (name,) if isinstance(name, str) else name) for name in wanted]
    found = []
    for index, row in enumerate(rows):
        texts = tuple("" if row[column] is None else str(row[column]) for column in columns)
        empty = [column for column, text in zip(columns, texts, strict=True) if not text.strip()]
        if empty:
            raise ValueError(f"dataset={data_set!r} has an empty {empty[0]!r} in row {index}: fill or drop the row.")
        found.append(texts)
    return found
