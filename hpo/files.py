"""Files that a reader sees whole or not at all, and tables as text."""

import csv
import io
import json
import math
import os
from pathlib import Path


def sync(*paths: Path) -> None:
    """Returns when files, and the names in folders, are on the disk: a loss of power does not take them any more."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not path.is_dir():  # not every file system can do it for folders
                raise
        finally:
            os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def to_json(content: dict) -> str:
    """JSON text; NaN and infinity, for which JSON has no word, become null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(content), indent=2, allow_nan=False)


def write_json(path: Path, content: dict) -> None:
    write_whole(path, to_json(content) + "\n")


def write_csv(path: Path, fields: list[str], rows: list[dict]) -> None:
    """Fields that a row lacks stay empty; keys that are in no field become columns at the end."""
    fields = fields + [key for key in (rows[0] if rows else {}) if key not in fields]
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def read_csv(path: Path) -> list[dict]:
    """Rows with numbers as numbers and empty cells as None."""
    with open(path, newline="") as file:
        return [{key: _value(key, text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(key: str, text: str):
    if key in ("trial_id", "status", "node"):
        return text
    if text in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[text]
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text


def columns(rows: list[list]) -> str:
    """Rows in columns, to the right, the first row their head."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(str(cell).rjust(width) for cell, width in zip(row, widths)) for row in rows)
