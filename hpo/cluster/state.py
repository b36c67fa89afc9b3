"""The saved state of a search: searcher, scheduler, record and slot time in one file."""

import hashlib
import json
import os
from pathlib import Path

from hpo.files import sync

FILE = "state.jsonl"
VERSION = 1  # of what is in it


def save_state(run_dir: Path, state: dict) -> None:
    """Writes the state as two lines of JSON, version and checksum first; the state before it stays beside it as state.jsonl.1."""
    body = json.dumps(state, default=_plain).encode()
    temporary, path = run_dir / f".{FILE}.tmp", run_dir / FILE
    with open(temporary, "wb") as file:
        file.write(json.dumps({"version": VERSION, "sha256": hashlib.sha256(body).hexdigest()}).encode() + b"\n" + body)
    sync(temporary)
    if path.exists():
        os.replace(path, run_dir / f"{FILE}.1")
    os.replace(temporary, path)


def _plain(value):
    """A number of numpy as one of Python; json.dumps asks for what it does not know."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} cannot be saved as JSON")


def load_state(run_dir: Path) -> dict | None:
    """The newest whole state of a run; None where none was ever saved. Reads data only: no code of the file is run.

    Raises:
        OSError: a file is there and cannot be read.
        RuntimeError: there are files, and none is whole, or they are of another version of this program.
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
            if version != VERSION:
                raise RuntimeError(f"{path} has version {version!r}, and this program reads {VERSION}: go on with the commit in run.json")
            return json.loads(body)
        print(f"{path} is damaged; using the state before it", flush=True)
    if not found and (run_dir / "state.pkl").exists():
        raise RuntimeError(f"{run_dir / 'state.pkl'} is of an older version of this program: go on with the commit in run.json")
    if found:
        raise RuntimeError(f"no whole state of the search in {run_dir}; its tables and checkpoints are untouched")
    return None


def delete_state(run_dir: Path) -> None:
    """Of a search that is done: there is nothing to go on with."""
    for name in (FILE, f"{FILE}.1"):
        (run_dir / name).unlink(missing_ok=True)
