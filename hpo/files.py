"""Files that a reader never sees incomplete, and tables as text. Imports the standard library only."""

import csv
import ctypes
import hashlib
import io
import json
import math
import os
import shutil
from pathlib import Path


def sync(*paths: Path) -> None:
    """Waits until files, and the names in folders, are on the disk. A power failure does not lose them after that."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not path.is_dir():  # some file systems cannot do it for folders
                raise
        finally:
            os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file. A reader sees the old content or the new content, never a part.

    The content is written to a temporary file in the same folder, which is renamed when it is complete.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def replace_folder(new: Path, path: Path) -> None:
    """Renames a folder, and deletes the one that was at `path`, if any. A reader sees the old one or the new one.

    Linux exchanges the two folders. On a file system that cannot (NFS), there is none at `path` for an instant.
    """
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # left by an interruption
    if not path.exists() or not _exchange(new, path):
        if path.exists():
            path.rename(old)
        new.rename(path)
    sync(path.parent)
    for folder in (old, new):
        shutil.rmtree(folder, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders. Returns whether the C library and the file system can do it."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", lambda *_: -1)
    at_cwd, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    return renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal, as the command sha256sum prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(content: dict) -> str:
    """JSON text. NaN and infinity become null, because JSON does not have them."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(content), indent=2, allow_nan=False)


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file atomically, with the content as `to_json` has it."""
    write_atomically(path, to_json(content) + "\n")


def write_csv(path: Path, fields: list[str], rows: list[dict]) -> None:
    """Writes a CSV file atomically.

    Args:
        path: the file.
        fields: the columns. A cell stays empty where a row does not have the field.
        rows: the rows. Keys of a row that are not in `fields` become columns at the end.
    """
    fields = list(dict.fromkeys([*fields, *(key for row in rows for key in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def read_csv(path: Path) -> list[dict]:
    """Reads a CSV file. Numbers, True and False become values of Python, and an empty cell becomes None."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: _value(key, text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(key: str, text: str):
    if key in ("trial_id", "repeat_of", "status", "node"):  # text, although an id may look like a number: 12e45678
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
    """Rows as text in columns that are aligned to the right. The first row is the header."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(str(cell).rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
