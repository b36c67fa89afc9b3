"""The copy of the code in a run folder. Imports the standard library only.

A search reads its code again and again: in each worker process, and with --resume. There it reads this copy, so that
the checkout can be edited while a search runs.
"""

import datetime
import os
import shutil
import sys
from pathlib import Path

from hpo.errors import BadInput

ROOT = Path(__file__).parent.parent
NAME = "code"  # of the folder in the run folder
DS_CONFIG = "ds_config.json"  # its name in the copy
RESTARTED = "HPO_CODE_COPY"  # environment variable: the script with which this program was restarted


def files_of(root: Path) -> dict[str, bytes]:
    """The code below a folder by its path there: all of hpo/, and the Python files beside it."""
    paths = [path for path in (root / "hpo").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {str(path.relative_to(root)): path.read_bytes() for path in [*root.glob("*.py"), *paths]}


def keep(run_dir: Path, ds_config: str) -> None:
    """Copies the code of this process. An earlier copy keeps its files, in a folder with the date in its name.

    Args:
        run_dir: the run folder.
        ds_config: path of the DeepSpeed configuration.
    """
    copy, script = run_dir / NAME, Path(sys.argv[0])
    files = files_of(ROOT) | {DS_CONFIG: Path(ds_config).read_bytes()}
    if script.suffix == ".py":  # a script of the user, which may be elsewhere
        files[script.name] = script.read_bytes()
    new = run_dir / f".{NAME}.new"
    shutil.rmtree(new, ignore_errors=True)  # left by an interruption
    for name, content in files.items():
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).write_bytes(content)
    if copy.exists():
        copy.rename(run_dir / f"{NAME}-until-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    new.rename(copy)


def changed(run_dir: Path) -> list[str]:
    """The files of the copy that are missing from this process's code, or differ. None in runs without a copy."""
    script, now, then = Path(sys.argv[0]), files_of(ROOT), files_of(run_dir / NAME)
    if script.name in then:
        now[script.name] = script.read_bytes()
    return [name for name in then if now.get(name) != then[name]]


def go_on_with_copy(run_dir: Path) -> None:
    """If the code of this process is not that of the run, replaces this process by one with the run's code.

    Args:
        run_dir: the run folder.

    Raises:
        BadInput: the copy does not have the script of this process.
    """
    script = run_dir / NAME / Path(sys.argv[0]).name
    differ = changed(run_dir)
    if not differ or os.environ.get(RESTARTED) == str(script):
        return
    if not script.exists():
        raise BadInput(f"--resume: the run has another script than {script.name}: start that one, or add --new_code")
    shown = ", ".join(differ[:3]) + f" and {len(differ) - 3} more" * (len(differ) > 3)
    print(
        f"going on with the code of the run, {script.parent}; changed since: {shown} (--new_code takes it)", flush=True
    )
    os.execve(sys.executable, [sys.executable, str(script), *sys.argv[1:]], os.environ | {RESTARTED: str(script)})


def ds_config(run_dir: Path, given: str) -> Path:
    """The DeepSpeed configuration of a run: the copy, or the given one where there is no copy. Tells if they differ."""
    copy, file = run_dir / NAME / DS_CONFIG, Path(given)
    if not copy.exists():
        return file
    if file.exists() and file.read_bytes() != copy.read_bytes():
        print(f"--deepspeed {given} has changed since: the run uses its copy (--new_code takes it)", flush=True)
    return copy
