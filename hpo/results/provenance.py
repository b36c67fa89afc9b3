"""What run.json says about the software, the files and the machines of a run. Imports the standard library only."""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

from hpo import code_copy, errors
from hpo.files import sha256

PACKAGES = (  # those that a result depends on
    "ray", "torch", "transformers", "tokenizers", "datasets", "deepspeed", "accelerate", "peft", "evaluate",
    "hpbandster", "ConfigSpace", "statsmodels", "scipy", "numpy",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def other_versions(then: dict[str, str]) -> list[str]:
    """What is installed in another version than in a run, in words: one line for each package."""
    now = versions()
    pairs = [(name, version, now.get(name, version)) for name, version in then.items()]
    return [f"{name} {version} in the run, {here} here" for name, version, here in pairs if version != here]


def git_commit(folder: Path) -> str | None:
    """The commit of the code, with "-dirty" if files differ from it. None outside a repository.

    A copy of the code has the commit of its run: it may lie in a checkout of another commit.
    """
    if folder.name == code_copy.NAME and (folder.parent / "run.json").exists():
        return json.loads((folder.parent / "run.json").read_text()).get("git_commit")
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def hashes(folder: Path, files: list[Path]) -> dict:
    """{"folder": its path, "sha256": {name: SHA-256}} of files in a folder."""
    names = sorted(file.relative_to(folder).as_posix() for file in files)
    return {"folder": str(folder.absolute()), "sha256": {name: sha256(folder / name) for name in names}}


def changed_files(sha256s: dict[str, str], folder: Path) -> list[str]:
    """The files of `sha256s` that are missing from a folder, or differ."""
    return [name for name, before in sha256s.items() if hash_or_none(folder / name) != before]


def hash_or_none(file: Path) -> str | None:
    """The SHA-256 of a file; None where it cannot be read."""
    try:
        return sha256(file)
    except OSError:
        return None


def folder_hash(folder: Path) -> str:
    r"""One SHA-256 for all files below a folder, without Python's compiled ones.

    It is that of the lines which sha256sum prints for the files, sorted by name. In the folder:
    find * -type f ! -name '*.pyc' | LC_ALL=C sort | xargs -d '\n' sha256sum | sha256sum
    """
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    lines = "".join(f"{sha256(folder / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def nvidia_smi() -> list[tuple[str, str]]:
    """Name and driver's version of each GPU of this node. Empty without nvidia-smi; RuntimeError if it fails."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        raise RuntimeError("CUDA driver error: nvidia-smi has not answered within 120 s") from None
    if done.returncode != 0:
        raise RuntimeError(f"CUDA driver error: nvidia-smi: {errors.one_line(done.stdout + done.stderr)}")
    return [line.rpartition(", ")[::2] for line in done.stdout.splitlines()]


@functools.cache
def hardware() -> dict:
    """The node of this process: {"cpu": its model, "cpus": number, "gpus": names, "driver": version or None}.

    The GPUs are those that nvidia-smi lists, the CPUs those that this process may use.
    """
    try:
        gpus = nvidia_smi()
    except (OSError, RuntimeError):  # a trial finds out itself whether its GPU works
        gpus = []
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = lines[0].partition(":")[2].strip() if lines else platform.machine()  # ARM has no name there
    of_gpus = {"gpus": [name for name, _ in gpus], "driver": gpus[0][1] if gpus else None}
    return {"cpu": cpu, "cpus": len(os.sched_getaffinity(0)), **of_gpus}
