"""Tables that come with archives: CSV files as texts."""

import codecs
import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from hallulib import UserError

SEPARATORS = ",;\t"


def read(file: Path, separator: str = ",") -> pd.DataFrame:
    """A CSV as stripped texts, under its own names, of which some may be alike.

    Args:
        file: the CSV, in UTF-8, or in UTF-16 if its first bytes say so.
        separator: between columns.

    Returns:
        One row per record, blank lines left out; index = the line where it begins, from 1.

    Raises:
        UserError: it cannot be read, or a record is longer than the names.
    """
    return _rows(file, _text(file), separator)


def read_sheet(file: Path, name: str) -> pd.DataFrame:
    """As `read`, of what a spreadsheet exports: with commas, semicolons or tabs.

    Args:
        file: the CSV. Code pages of one byte per letter all look alike, so none is guessed.
        name: of a column, which shows what is between columns.

    Returns:
        See `read`.

    Raises:
        UserError: see `read`.
    """
    text = _text(file)
    header = next((line for line in text.splitlines() if line.strip()), "")
    cells = {s: next(csv.reader([header], delimiter=s), []) for s in SEPARATORS}
    parts = [s for s in SEPARATORS if key(name) in map(key, cells[s])]
    return _rows(file, text, (parts or [","])[0])


def _text(file: Path) -> str:
    """What a file holds; UTF-16 begins with a mark."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; the archive's table is needed there")
    content = file.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file}: not a readable CSV (line {line} is not {'UTF-16' if wide else 'UTF-8'});"
            " Unicode is needed, in a spreadsheet: save as CSV UTF-8"
        ) from error


def _rows(file: Path, text: str, separator: str) -> pd.DataFrame:
    try:
        lines = io.StringIO(text, newline="")
        found = list(_records(csv.reader(lines, delimiter=separator, strict=True)))
    except (ValueError, csv.Error) as error:
        told = type(error).__name__  # its text may quote the table
    else:
        (_, names), *records = found or [(1, [])]
        width = len(names)
        longer = [(line, len(cells)) for line, cells in records if len(cells) > width]
        told = "".join(f"{n} cells in line {line} for {width} names" for line, n in longer[:1])
    if told:
        raise UserError(
            f"{file}: not a readable CSV ({told}); columns as in its first line, with"
            f" {separator!r} between them, are needed"
        )
    rows = [cells + [""] * (width - len(cells)) for _, cells in records]
    return pd.DataFrame(rows, [line for line, _ in records], names, dtype=str)


def choose(
    table: pd.DataFrame, file: Path, needed: Sequence[str], optional: Sequence[str] = ()
) -> pd.DataFrame:
    """Columns of a table, whatever the case of their names, with spaces or underscores.

    Args:
        table: see `read`.
        file: its CSV, for messages.
        needed: names of columns.
        optional: further ones, "" where there is none.

    Returns:
        The columns under the names asked for.

    Raises:
        UserError: a column is missing or there are several of its name.
    """
    names = [key(name) for name in table.columns]
    chosen = {}
    for name in (*needed, *optional):
        n = names.count(key(name))
        if n > 1 or (name in needed and not n):
            found = f"{n} columns" if n else "no column"
            raise UserError(f"{file}: {found} {name!r} among {list(table)}; one is needed")
        chosen[name] = table.iloc[:, names.index(key(name))] if n else ""
    return pd.DataFrame(chosen, table.index, dtype=str)


def key(name: str) -> str:
    """The name of a column as it is compared: stripped, in small letters, without underscores."""
    return name.strip().lower().replace("_", " ")


def read_table(file: Path, columns: Sequence[str], separator: str = ",") -> pd.DataFrame:
    """The columns that an archive needs of its table; see `read` and `choose`.

    Returns:
        One row per record that is not blank; index = its number, from 1.

    Raises:
        UserError: it cannot be read, lacks a column or has no row.
    """
    table = choose(read(file, separator), file, columns)
    table.index = range(1, len(table) + 1)
    table = table[(table != "").any(axis=1)]
    if table.empty:
        raise UserError(f"{file}: has no row; at least one is needed")
    return table


def _records(reader: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """The line where each record begins, and its cells; a line may be blank, a cell have many."""
    line = 1
    for record in reader:
        cells = [cell.strip() for cell in record]
        if len(cells) > 1 or any(cells):
            yield line, cells
        line = reader.line_num + 1
