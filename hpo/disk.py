"""How much a user may still write to a folder: what is free on its file system, and what a quota leaves."""

import contextlib
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

NO_LIMIT = 2**53


class Room(NamedTuple):
    """What may still be written."""

    bytes: int
    files: int  # inodes
    by: str  # what sets the limit of bytes: "the file system", or the command that tells the quota


def room(folder: Path) -> Room:
    """The room in a folder, or in the nearest parent that exists. Raises OSError where that cannot be read.

    The quotas of `quota` and of Lustre's `lfs quota` count where these commands are installed and answer in time.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    system = os.statvfs(existing)
    # A file system without a fixed number of inodes says 0.
    files = system.f_favail if system.f_files else NO_LIMIT
    rooms = [Room(system.f_bavail * system.f_frsize, files, "the file system")]
    mount = next(path for path in (existing, *existing.parents) if os.path.ismount(path))
    user = str(os.getuid())
    commands = ["quota", "-u", "-w", "-p", "-f", str(mount)], ["lfs", "quota", "-q", "-u", user, str(existing)]
    for command in commands:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
            rooms += left_of_quota(done.stdout, command[0])
    return Room(min(r.bytes for r in rooms), min(r.files for r in rooms), min(rooms).by)


def used(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def left_of_quota(text: str, command: str) -> list[Room]:
    """The space left under a quota. Empty if the output names no quota.

    Both commands end in used, soft limit, hard limit and grace time, of blocks of 1024 bytes and then of files; 0 is no
    limit, and a * after a number says that a limit is passed.
    """
    numbers = [word.rstrip("*") for word in text.split()[-8:]]
    limits = numbers[0:3] + numbers[4:7]
    if len(numbers) < 8 or not all(re.fullmatch(r"\d+", number) for number in limits):
        return []

    def left(used: int, soft: int, hard: int) -> int:
        limit = hard or soft
        return max(0, limit - used) if limit else NO_LIMIT

    numbers = [int(number) for number in limits]
    return [Room(1024 * left(*numbers[:3]), left(*numbers[3:]), f"{command}'s limit")]
