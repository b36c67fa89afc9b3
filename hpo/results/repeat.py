"""--repeat: the command that repeats a run from its start, what must be the same for it, and what differs here."""

import json
import shlex
import sys
from pathlib import Path

from hpo import code_copy
from hpo.errors import BadInput
from hpo.results.provenance import changed_files, folder_hash, other_versions

NEEDED = ("arguments", "environment", "cluster", "script", "code_sha256", "files", "versions", "cuda", "git_commit")


def lines(folder: Path) -> list[str]:
    """The lines of --repeat. They are a shell script: all but the first are comments.

    Args:
        folder: the run folder.

    Raises:
        BadInput: the folder has no run.json that can be read, an older version has written it, or code/ is gone.
    """
    folder = folder.absolute()
    try:
        run = json.loads((folder / "run.json").read_text())
        if missing := [name for name in NEEDED if name not in run]:
            commit = str(run.get("git_commit")).removesuffix("-dirty")
            how = f"git checkout {commit}, and start it with the flags that are there"
            raise BadInput(f"{folder}/run.json is of an older version, without {', '.join(missing)}: {how}")
        if not (folder / code_copy.NAME / run["script"]).exists():
            raise BadInput(f"{folder}/{code_copy.NAME} has no {run['script']}: the copy of the code is not complete")
        comments = [*conditions(run), *(f"WARNING: {text}" for text in differences(run, folder))]
        return [command(run, folder), *(f"# {text}" for text in comments)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{folder}/run.json cannot be read ({type(error).__name__}: {error})") from None


def command(run: dict, folder: Path) -> str:
    """The command, for a shell. All flags are given, since defaults can depend on the machine.

    The code is the copy in the run folder. A run on a cluster is repeated with head_node.slurm of this checkout.
    """
    code, files = folder / code_copy.NAME, run["files"]
    names = (f"{folder.name}-repeat{number}" for number in ("", *range(2, 1000)))
    own = {
        "run_name": next(name for name in names if not (folder.parent / name).exists()),
        "output_dir": folder.parent,
        "deepspeed": code / code_copy.DS_CONFIG,
        "warm_start": [files[f"warm_start {earlier}"]["folder"] for earlier in run["arguments"]["warm_start"]],
    }
    # Paths may be relative to another folder. A name of the hub stays: --dataset cannot read the folder of a snapshot.
    own |= {name: files[name]["folder"] for name in ("model", "dataset") if files[name]["revision"] is None}
    flags = [text for name, value in (run["arguments"] | own).items() for text in flag(name, value)]
    cluster, options = run["cluster"] or {}, []
    sizes = {name: value for name, value in cluster.items() if not name.startswith("HEAD_")}
    if cluster.get("HEAD_NODES"):  # all trials ran in the head job; older runs do not say so
        options = [f"--nodes={cluster['HEAD_NODES']}", f"--cpus-per-task={cluster['CPUS_PER_NODE']}"]
        options += [f"--gpus-per-node={cluster['GPUS_PER_NODE']}"] * (cluster["GPUS_PER_NODE"] > 0)
        memory = cluster.get("HEAD_MEM", 0)  # older runs do not have it
        options += [f"--mem={memory}M"] * (memory > 0)
        sizes = {"NUM_WORKERS": 0}
    variables = [f"{name}={value}" for name, value in (sizes | run["environment"]).items()]
    start = ["sbatch", *options, "head_node.slurm"] if cluster else [sys.executable, str(code / run["script"])]
    text = shlex.join([*["env"] * bool(variables), *variables, *start, *flags])
    return f"cd {shlex.quote(str(code_copy.ROOT))} && {text}" if cluster else text


def flag(name: str, value) -> list[str]:
    """A flag with its value, as words of a command line. None and False: it was not given."""
    if isinstance(value, list):
        return [f"--{name}={each}" for each in value]
    if value is None or value is False:
        return []
    return [f"--{name}"] if value is True else [f"--{name}={value}"]


def conditions(run: dict) -> list[str]:
    """What must be the same, in words: code, versions, files, machines."""
    packages = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    found = ["the same result needs the same code, versions, files and machines (docs/results.md):"]
    found += [f"commit {run['git_commit']}, code with SHA-256 {run['code_sha256']}"]
    found += [f"{packages}, CUDA {run['cuda'] or 'none'}"]
    for entry in run["files"].values():
        found += [f"{sha256}  {entry['folder']}/{name}" for name, sha256 in entry["sha256"].items()]
    for node, has in run.get("hardware", {}).items():  # of a run that has just begun there is none
        gpus = f"{', '.join(has['gpus'])}, driver {has['driver']}" if has["gpus"] else "no GPU"
        found.append(f"{node}: {has['cpus']} CPUs ({has['cpu']}), {gpus}")
    return found


def differences(run: dict, folder: Path) -> list[str]:
    """What is not as it was when the run began, in words: one line for each package and for each folder of files."""
    found = other_versions(run["versions"])
    for what, entry in run["files"].items():
        here = present_folder(entry)
        changed = changed_files(entry["sha256"], here)
        found += [f"{what} {here}: changed or not there: {', '.join(changed)}"] * bool(changed)
    if folder_hash(folder / code_copy.NAME) != run["code_sha256"]:
        found.append(f"{folder / code_copy.NAME} was edited")
    for then in run.get("earlier_versions", []):
        pairs = then["versions"].items() - run["versions"].items()
        other = [f"{name} {version}" for name, version in sorted(pairs)]
        other += [f"CUDA {then['cuda']}"] * (then["cuda"] != run["cuda"])
        found += [f"a part of the run used {', '.join(other)}"] * bool(other)
    found += [f"a part of the run used other code, {path}" for path in sorted(folder.glob(f"{code_copy.NAME}-until-*"))]
    if run["cluster"] and (other := code_copy.changed(folder)):
        how = f"copy {folder / code_copy.NAME}/ over a checkout of {run['git_commit']}, and start it there"
        found.append(f"{code_copy.ROOT} has other code than the run ({', '.join(other[:3])}): {how}")
    budgets = [f"--{name} {run['arguments'][name]}" for name in ("gpu_hours", "hours") if run["arguments"].get(name)]
    found += [f"{' '.join(budgets)}: the number of trials depends on the speed of the machine"] * bool(budgets)
    return found


def present_folder(entry: dict) -> Path:
    """The folder that a new run reads: for a name of the hub the newest snapshot in the cache."""
    folder = Path(entry["folder"])
    newest = folder.parent.parent / "refs" / "main"
    return folder.with_name(newest.read_text().strip()) if entry.get("revision") and newest.exists() else folder
