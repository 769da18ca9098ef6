"""Tables that come with archives: CSV files as texts."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from hallulib import UserError


def read_table(file: Path, columns: Sequence[str], separator: str = ",") -> pd.DataFrame:
    """A CSV as stripped texts, its columns in small letters, with spaces for underscores.

    Args:
        file: the CSV.
        columns: what is needed of it; nothing else is kept.
        separator: between columns.

    Returns:
        One row per record that is not blank; index = its number, from 1.

    Raises:
        UserError: it cannot be read, lacks a column or has no row.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; the archive's table is needed there")
    try:
        with warnings.catch_warnings():
            # a row longer than the names would lose or shift columns
            warnings.simplefilter("error", pd.errors.ParserWarning)
            form = {"sep": separator, "index_col": False, "encoding": "utf-8-sig"}
            table = pd.read_csv(file, dtype=str, keep_default_na=False, **form)
    except (OSError, ValueError, pd.errors.ParserWarning) as error:
        told = type(error).__name__  # its text may quote the table
        raise UserError(
            f"{file}: not a readable CSV ({told}); columns as in its first line, with"
            f" {separator!r} between them, are needed"
        ) from None
    table.columns = [str(name).strip().lower().replace("_", " ") for name in table.columns]
    names = list(table.columns)
    missing = [name for name in columns if names.count(name) != 1]
    if missing:
        raise UserError(
            f"{file}: no column {missing[0]!r}, or two of them, among {names}; one is needed"
        )
    table = table[list(columns)].apply(lambda column: column.str.strip())
    table.index += 1
    table = table[(table != "").any(axis=1)]
    if table.empty:
        raise UserError(f"{file}: has no row; at least one is needed")
    return table
