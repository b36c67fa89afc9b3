"""Ends what hangs, and gives up nodes whose GPU fails."""

import math
import re
import time
from collections import Counter
from pathlib import Path

import ray
from ray.tune import Callback
from ray.tune.experiment import Trial

from hpo import errors


class Watchdog(Callback):
    """Ends the process of a trial that has not reported for too long, or not let go of the trial before it: Tune then starts the
    trial again elsewhere.

    Too long is `timeout` seconds; by default 10 times the slowest iteration so far, at least 10 minutes, and before the first
    iteration 2 hours.
    """

    def __init__(self, timeout: float | None, say):
        self.timeout, self.say = timeout, say
        self.heard: dict[str, float] = {}  # when each trial started or reported last
        self.changing: dict[str, float] = {}  # since when a process has been changing over to a trial
        self.slowest: float | None = None  # iteration so far, seconds
        self.looked_at = time.time()

    def on_trial_start(self, iteration, trials, trial, **info):
        self.heard[trial.trial_id] = time.time()

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.heard[trial.trial_id] = time.time()
        if "ended_at" in result:
            self.slowest = max(self.slowest or 0, result["ended_at"] - result["started_at"])

    def on_step_end(self, iteration, trials, **info):
        gap, self.looked_at = time.time() - self.looked_at, time.time()
        if gap > 10:  # the search itself stood still, as when its file system is gone for a while, and so may the trials
            for times in (self.heard, self.changing):
                times.update({trial_id: at + gap for trial_id, at in times.items()})
        limit = self.timeout or (7200 if self.slowest is None else max(600, 10 * self.slowest))
        for trial in trials:
            if trial.status == Trial.RUNNING:
                self.changing.pop(trial.trial_id, None)
                silent = time.time() - self.heard.get(trial.trial_id, math.inf)
            elif trial.status == Trial.PENDING and trial.temporary_state.ray_actor:
                silent = time.time() - self.changing.setdefault(trial.trial_id, time.time())
            else:
                self.changing.pop(trial.trial_id, None)
                continue
            if silent > limit:
                self.say(f"trial {trial.trial_id} has not reported for {silent:.0f} s: its process is ended")
                self.heard[trial.trial_id] = self.changing[trial.trial_id] = time.time()
                ray.kill(trial.temporary_state.ray_actor)


class BadNodes(Callback):
    """Gives back the worker job of a node where a GPU fails: a trial that fails at once frees its slot for the next, so that one such
    GPU would go through all trials.

    A node counts as bad after `MOST` CUDA errors that errors.py puts down to the node, if it had more of them than all others together,
    and others are there. Told by a file where the workers meet the head, which has Slurm keep off that node for the job that replaces it.
    """

    MOST = 2

    def __init__(self, folder: Path | None, say):
        self.folder, self.say = folder, say
        self.errors: Counter = Counter()  # by address of the node

    def on_trial_recover(self, iteration, trials, trial, **info):
        text = Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""
        last = text[text.rfind("Failure #") :]
        found, reasons = re.search(r"\bip=([\d.]+)", last), re.findall(r"CUDA error.*", last)
        if not found or not reasons or errors.kind_of(reasons[-1]) is not errors.Kind.NODE:
            return
        address = found.group(1)
        self.errors[address] += 1
        if self.folder is None or self.errors[address] < self.MOST or 2 * self.errors[address] <= self.errors.total():
            return
        jobs = {}  # of workers, by address
        for node in ray.nodes():
            job = next((name.removeprefix("slurm_job_") for name in node["Resources"] if name.startswith("slurm_job_")), None)
            if node["Alive"] and job:
                jobs[node["NodeManagerAddress"]] = job
        if address in jobs and len(jobs) > 1:
            (self.folder / f"bad-{jobs[address]}").write_text(f"a GPU fails here, {self.errors[address]} times so far: {reasons[-1]}\n")
            self.say(f"worker job {jobs[address]} is given up: a GPU of its node fails")

    on_trial_error = on_trial_recover
