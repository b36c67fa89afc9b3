"""What run.json says about the software of a run."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = (  # those that a result depends on
    "ray", "torch", "transformers", "datasets", "deepspeed", "accelerate", "evaluate", "hpbandster", "ConfigSpace",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def git_commit(folder: Path) -> str | None:
    """The commit of the code, with "-dirty" if files differ from it. None outside a repository."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
