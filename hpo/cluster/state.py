"""The saved state of a search, in one file: searcher, scheduler, tables, slot time and live trials always agree."""

import hashlib
import json
import os
from pathlib import Path

from hpo.files import write_atomically

FILE = "state.jsonl"
VERSION = 3  # of the file's content
READABLE = (2, 3)  # in 2, at most one trial goes on alone


def save_state(run_dir: Path, state: dict) -> None:
    """Writes the state as two lines of JSON: version and checksum, then the state.

    The state before it is kept as state.jsonl.1.
    """
    body = json.dumps(state, default=_plain)
    head = json.dumps({"version": VERSION, "sha256": hashlib.sha256(body.encode()).hexdigest()})
    path, new = run_dir / FILE, run_dir / f".{FILE}.new"
    write_atomically(new, f"{head}\n{body}")
    if path.exists():
        os.replace(path, run_dir / f"{FILE}.1")
    os.replace(new, path)


def _plain(value):
    """Numbers of numpy as numbers of Python. json.dumps calls it for types that it does not know."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} cannot be saved as JSON")


def load_state(run_dir: Path) -> dict | None:
    """The newest complete state of a run; None where none was saved. Reads data only and runs no code of the file.

    Raises:
        OSError: a file cannot be read.
        RuntimeError: there are files, but none is complete, or another version of this program has written them.
    """
    found = [run_dir / name for name in (FILE, f"{FILE}.1") if (run_dir / name).exists()]
    for path in found:
        head, _, body = path.read_bytes().partition(b"\n")
        try:
            head = json.loads(head)
            version, checksum = head["version"], head["sha256"]
        except (ValueError, TypeError, KeyError):
            version = checksum = None
        if checksum == hashlib.sha256(body).hexdigest():
            if version not in READABLE:
                raise RuntimeError(
                    f"{path} has version {version!r}, and this program reads {' and '.join(map(str, READABLE))}: "
                    "go on with the commit in run.json"
                )
            return json.loads(body)
        print(f"{path} is damaged" + "; using the state before it" * (path is not found[-1]), flush=True)
    if not found and (run_dir / "state.pkl").exists():
        path = run_dir / "state.pkl"
        raise RuntimeError(f"{path} is of an older version of this program: go on with the commit in run.json")
    if found:
        raise RuntimeError(f"no whole state of the search in {run_dir}; its tables and checkpoints are untouched")
    return None


def keep_last_state(run_dir: Path) -> None:
    """Deletes the state before the last one: the checkpoints that it names are gone when the search is done."""
    (run_dir / f"{FILE}.1").unlink(missing_ok=True)
