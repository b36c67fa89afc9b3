"""The memory limits of control groups, for example of a Slurm job, and the kills at them.

Imports the standard library only.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path


def memory_groups(root: Path) -> Iterator[Path]:
    """The folders of this process's control group, for example of a Slurm job, and of those that it is in."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):  # of version 2, or 1
            folder = root / "sys/fs/cgroup" / ("memory" if controllers else "") / group.lstrip("/")
            yield from (folder, *folder.parents)


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes of this one's control group the kernel has killed for memory."""
    for folder in memory_groups(root):
        for file in (folder / "memory.events", folder / "memory.oom_control"):  # of version 2, of version 1
            if file.exists():
                return sum(map(int, re.findall(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)))
    return 0


def free_in_groups(root: Path = Path("/")) -> float:
    """Bytes that the limits of this process's control groups leave it; math.inf without a limit."""
    free = math.inf
    for folder in memory_groups(root):
        for limit, used in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):  # of version 2, of version 1
            try:
                room = int((folder / f"memory.{limit}").read_text()) - int((folder / f"memory.{used}").read_text())
                statistics = (folder / "memory.stat").read_text()
            except (OSError, ValueError):  # no such group, or its limit is "max": none
                continue
            # Files that were read count as used, and the kernel gives up those that are inactive.
            files = re.findall(r"^(?:total_)?inactive_file (\d+)$", statistics, re.MULTILINE)
            free = min(free, room + max(map(int, files), default=0))
    return free
