"""Callbacks of Tune that end worker processes that hang, give up nodes whose GPU fails, and look at shared GPUs."""

import math
import re
import time
from collections import Counter
from pathlib import Path

import ray
from ray.tune import Callback
from ray.tune.experiment import Trial

from hpo import errors
from hpo.cluster.ray_private import process_of
from hpo.results.slots import CONTEXT, bytes_of_gpu


def workers(kinds: str = "job|step") -> dict[str, str]:
    """The name of each live worker, by its node's address: its Slurm job, or its node in the head's own job.

    Args:
        kinds: "job" for worker jobs alone. worker_node.slurm gives each worker a resource of such a name.
    """
    found = {}
    for node in ray.nodes():
        for resource in node["Resources"] if node["Alive"] else ():
            if match := re.fullmatch(f"slurm_({kinds})_(.+)", resource):
                found[node["NodeManagerAddress"]] = match.group(2)
    return found


class Watchdog(Callback):
    """Kills the worker process of a trial that has not reported for too long; Tune starts the trial again.

    A process that does not finish resetting from its previous trial is killed too.

    Args:
        timeout: seconds. None: 10 times the slowest iteration so far, at least 10 minutes; 2 hours before the first.
        log: called with a line for the log.
    """

    def __init__(self, timeout: float | None, log):
        self.timeout, self.log = timeout, log
        self.last_report: dict[str, float] = {}  # when each trial started or reported last
        self.reset_since: dict[str, float] = {}  # since when a process has been resetting for a trial
        self.slowest: float | None = None  # iteration so far, in seconds
        self.looked_at = time.time()

    def on_trial_start(self, iteration, trials, trial, **info):
        """Notes the time."""
        self.last_report[trial.trial_id] = time.time()

    def on_trial_result(self, iteration, trials, trial, result, **info):
        """Notes the time, and how long the iteration took."""
        self.last_report[trial.trial_id] = time.time()
        if "ended_at" in result:
            self.slowest = max(self.slowest or 0, result["ended_at"] - result["started_at"])

    def on_step_end(self, iteration, trials, **info):
        """Looks at all trials."""
        gap, self.looked_at = time.time() - self.looked_at, time.time()
        if gap > 10:  # the search stood still, for example because its file system was gone; so may the trials have
            for times in (self.last_report, self.reset_since):
                times.update({trial_id: at + gap for trial_id, at in times.items()})
        limit = self.timeout or (7200 if self.slowest is None else max(600, 10 * self.slowest))
        for trial in trials:
            if trial.status == Trial.RUNNING:
                self.reset_since.pop(trial.trial_id, None)
                silent = time.time() - self.last_report.get(trial.trial_id, math.inf)
            elif trial.status == Trial.PENDING and process_of(trial):
                silent = time.time() - self.reset_since.setdefault(trial.trial_id, time.time())
            else:
                self.reset_since.pop(trial.trial_id, None)
                continue
            if silent > limit:
                self.log(f"trial {trial.trial_id} has not reported for {silent:.0f} s: its process is ended")
                self.last_report[trial.trial_id] = self.reset_since[trial.trial_id] = time.time()
                ray.kill(process_of(trial))


class FaultyNodes(Callback):
    """Gives up the worker of a node where a GPU fails.

    A trial that fails at once frees its slot for the next one, so one broken GPU would fail all trials in turn. A
    node is given up after MOST CUDA errors that errors.py assigns to the node, if it had more of them than all other
    nodes together, and if other nodes are there. The worker is told by a file in the rendezvous folder. If it is a
    job of its own, Slurm keeps the job that replaces it off that node.

    Args:
        folder: the rendezvous folder of head and workers; None without head_node.slurm.
        log: called with a line for the log.
    """

    MOST = 2

    def __init__(self, folder: Path | None, log):
        self.folder, self.log = folder, log
        self.errors: Counter = Counter()  # by address of the node

    def on_trial_recover(self, iteration, trials, trial, **info):
        """Counts the error that has ended a trial's process."""
        text = Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""
        last = text[text.rfind("Failure #") :]
        found, fault = re.search(r"\bip=([\da-f.:]+)", last), errors.gpu_fault(last)
        if not found or not fault:
            return
        address = found.group(1)
        self.errors[address] += 1
        if self.folder is None or self.errors[address] < self.MOST or 2 * self.errors[address] <= self.errors.total():
            return
        found = workers()
        if address in found and len(found) > 1:
            reason = f"a GPU fails here, {self.errors[address]} times so far: {fault}\n"
            (self.folder / f"bad-{found[address]}").write_text(reason)
            self.log(f"worker {found[address]} is given up: a GPU of its node fails")

    on_trial_error = on_trial_recover


class SharedGpus(Callback):
    """Warns once where the trials that share a GPU need more of its memory than it has.

    Args:
        sharing: how many trials share a GPU.
        log: called with a line for the log.
    """

    def __init__(self, sharing: int, log):
        self.sharing, self.log, self.warned = sharing, log, False

    def on_trial_result(self, iteration, trials, trial, result, **info):
        """Compares what a trial has reserved, and CUDA's own part, with the GPU."""
        need = bytes_of_gpu(result.get("gpu_reserved_bytes", 0), self.sharing)
        if self.sharing > 1 and not self.warned and need > result.get("gpu_bytes", math.inf):
            self.warned = True
            peak, whole = result["gpu_reserved_bytes"] / 1e9, result["gpu_bytes"] / 1e9
            self.log(
                f"WARNING: trial {trial.trial_id} has reserved {peak:.3g} GB of its GPU, and CUDA takes about "
                f"{CONTEXT / 1e9:.1f} GB more: {self.sharing} such trials do not fit into its {whole:.3g} GB. Start a "
                "new run with a larger --gpus_per_trial, or with smaller batches"
            )
