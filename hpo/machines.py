"""The machines of a run: nodes, slots, disk, and what Slurm allows.

Imports the standard library only, but for one look at the GPUs of this machine.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from hpo import disk
from hpo.code_copy import ROOT
from hpo.errors import BadInput
from hpo.results.slots import slots_of, slots_that_passed

CLUSTER_ENV = ("NUM_WORKERS", "GPUS_PER_NODE", "CPUS_PER_NODE")  # names of cluster.env that a plan needs
FILES = 2000  # more than a run has at a time


def slurm_job() -> str | None:
    """The cluster and the id of this process's Slurm job, which it keeps when it is requeued; None outside of jobs."""
    job = os.environ.get("SLURM_JOB_ID")
    return job and f"{os.environ.get('SLURM_CLUSTER_NAME', '')} {job}"


def cluster_of_job() -> dict[str, int] | None:
    """What head_node.slurm has exported: the numbers of cluster.env, and what the head job has for trials.

    None if the trials run on this machine.
    """
    if "HPO_NODES" in os.environ or "RAY_ADDRESS" in os.environ:
        of_head = {name: int(os.environ.get(name, 0)) for name in ("HEAD_GPUS", "HEAD_CPUS", "HEAD_NODES")}
        of_head["HEAD_MEM"] = int(os.environ.get("SLURM_MEM_PER_NODE", 0))  # MB
        return {name: int(os.environ.get(name, 1)) for name in CLUSTER_ENV} | of_head
    return None


def nodes(args: argparse.Namespace) -> tuple[int, int, int]:
    """(nodes, GPUs a node, CPUs a node) for trials."""
    if args.cluster:
        return tuple(args.cluster[name] for name in CLUSTER_ENV)
    import torch  # slow, and only needed on a single machine

    return 1, torch.cuda.device_count(), node_cpus(args)


def node_cpus(args: argparse.Namespace) -> int:
    """CPUs of a node, for trials."""
    return args.cluster["CPUS_PER_NODE"] if args.cluster else len(os.sched_getaffinity(0))


def kinds_of_nodes(args: argparse.Namespace) -> list[tuple[int, dict[str, int]]]:
    """The nodes for trials, as (number of nodes, resources of each); the head job's own may be of another kind."""
    number, gpus, cpus = nodes(args)
    kinds = [(number, {"CPU": cpus, "GPU": gpus})]
    if args.cluster and "HEAD_GPUS" in args.cluster:
        kinds.append((1, {"CPU": args.cluster["HEAD_CPUS"], "GPU": args.cluster["HEAD_GPUS"]}))
    return kinds


def slots(args: argparse.Namespace, at_a_time: int | None = None) -> int:
    """How many trials can run at a time, once all workers have joined; with --from_check, on its nodes that were ok.

    Args:
        args: the arguments of the run.
        at_a_time: in place of --max_concurrent_trials; 0: as many as there is room for.
    """
    of_trial = {"cpu": args.cpus_per_trial, "gpu": args.gpus_per_trial}
    if args.from_check is not None:
        room = slots_that_passed(args.earlier_check["nodes"], 0)
    else:
        room = sum(number * slots_of(have, of_trial) for number, have in kinds_of_nodes(args))
    at_a_time = args.max_concurrent_trials if at_a_time is None else at_a_time
    return min(room, at_a_time or room)


def read_cluster_env() -> dict[str, int] | None:
    """The numbers of cluster.env, for a plan on a machine with Slurm. Raises BadInput where the file is wrong.

    A command that fails there is told on stderr, as in the log of a job.
    """
    in_job = "HPO_NODES" in os.environ  # head_node.slurm has read the file, and knows where trials run
    if in_job or not shutil.which("sbatch") or not (ROOT / "cluster.env").exists():
        return cluster_of_job()
    line = '$(sed -n "${LINENO}p" ./cluster.env)'  # as in slurm.sh
    says = f'echo "cluster.env: line $LINENO: {line} failed with exit code $failed" >&3'
    trap = f"trap 'failed=$?; [[ ${{BASH_SOURCE[0]}} != ./cluster.env ]] || {says}' ERR"
    read = f"{trap}; set -a; source ./cluster.env &> /dev/null; trap - ERR"
    read += '; source "$0/hpo/cluster/head.sh"; read_gpu_request; export GPUS_PER_NODE; env -0'
    script = f"bash -n ./cluster.env || exit; exec 3>&2; {read}"
    try:
        done = subprocess.run(["bash", "-c", script, str(ROOT)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise BadInput(f"{ROOT}/cluster.env: not done after 60 s") from None
    if done.stderr and not done.stdout:
        raise BadInput(done.stderr.splitlines()[0])
    print(done.stderr, end="", file=sys.stderr)
    found = dict(line.split("=", 1) for line in done.stdout.split("\0") if "=" in line)
    for name in CLUSTER_ENV:
        if not re.fullmatch(r"\d+", found.get(name, "")):
            raise BadInput(f"{ROOT}/cluster.env: {name} is {found.get(name, 'missing')}: not a number")
    cluster = {name: int(found[name]) for name in CLUSTER_ENV}
    return cluster | {"NUM_WORKERS": max(1, cluster["NUM_WORKERS"])}  # 0: one job, on a node like these


def seconds_of(limit: str) -> int | None:
    """Seconds of a Slurm time limit; None for "UNLIMITED" and the like.

    Slurm writes minutes, minutes:seconds, hours:minutes:seconds or days-hours[:minutes[:seconds]].
    """
    if not re.fullmatch(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})", limit):
        return None
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, seconds = (parts + [0, 0])[:3]
    else:
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def time_limit() -> int | None:
    """Seconds of the head job's time limit: SBATCH_TIMELIMIT, or #SBATCH --time. None where neither says."""
    script = ROOT / "head_node.slurm"
    text = script.read_text() if script.exists() else ""
    written = re.search(r"^#SBATCH (?:--time=|-t )(\S+)", text, re.MULTILINE)
    return seconds_of(os.environ.get("SBATCH_TIMELIMIT", written.group(1) if written else ""))


def check_disk(output_dir: Path, needed: int) -> None:
    """Raises BadInput unless the run may write as many bytes, and files, as it needs at its peak."""
    left = disk.room(output_dir)
    if left.bytes < needed:
        free = f"{left.bytes / 1e9:.3g} GB are free" + f" ({left.by})" * (left.by != "the file system")
        raise BadInput(f"--output_dir {output_dir}: the run needs up to {needed / 1e9:.3g} GB there, and {free}")
    if left.files < FILES:
        raise BadInput(f"--output_dir {output_dir}: the run needs up to {FILES} files there, and {left.files} are free")
