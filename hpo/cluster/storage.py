"""Waiting for a file system that is full or gone."""

import os
import tempfile
import time
from pathlib import Path

from hpo import disk


def wait_for_storage(run_dir: Path, needed: int, patience: float) -> bool:
    """Waits until the file system of a run takes files again, and has room for what the run still needs.

    Args:
        run_dir: the run folder.
        needed: bytes of the whole run at its peak.
        patience: seconds.

    Returns:
        Whether it happened in time.
    """
    deadline = time.time() + patience
    while time.time() < deadline:
        try:
            with tempfile.TemporaryFile(dir=run_dir) as file:
                file.write(b"x" * 4096)
                file.flush()
                os.fsync(file.fileno())
            if disk.room(run_dir).bytes >= needed - disk.used(run_dir):
                return True
        except OSError:
            pass
        time.sleep(min(5, patience / 10))
    return False
