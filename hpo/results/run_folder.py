"""What a run folder says about the run itself."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    packages = ["ray", "torch", "transformers", "datasets", "deepspeed", "accelerate", "evaluate", "hpbandster", "ConfigSpace"]
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def git_commit(folder: Path) -> str | None:
    """Commit of the code, with "-dirty" where files differ from it; None outside a repository."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
