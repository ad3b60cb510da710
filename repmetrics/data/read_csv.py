"""The one reader of CSV tables; no torch."""

from __future__ import annotations

import csv
from pathlib import Path


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows of a CSV with a header, in UTF-8 with or without a byte-order mark.

    A missing field is an empty string; fields beyond the header are dropped.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="", strict=True)
            columns = list(reader.fieldnames or ())
            return columns, [{name: row[name] for name in columns} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not CSV in UTF-8: {error}") from error
