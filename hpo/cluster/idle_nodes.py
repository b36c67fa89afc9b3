"""Gives back nodes that are idle at the end of a search."""

import time
from pathlib import Path

import ray
from ray.tune import Callback
from ray.tune.experiment import Trial

from hpo.results.slot_time import Bill, slots_of


class IdleRelease(Callback):
    """At the end of a search, when trials are fewer than slots for good, gives back worker jobs whose node has been idle a while.

    Asks the worker by a file in the folder where it meets the head. A node that runs a trial stays, and so do as many slots as there
    are trials that have not ended, paused ones included.

    Args:
        bill: hears of what was given back; its record and resources are used.
        minutes: how long a node has to be idle; 0: nothing is given back.
        folder: where the workers look, None without Slurm.
    """

    EVERY = 5.0  # seconds

    def __init__(self, bill: Bill, minutes: float, folder: Path | None):
        self.bill, self.minutes, self.folder = bill, minutes, folder
        self.idle_since: dict[str, float] = {}  # job: time
        self.given_back: dict[str, int] = {}  # job: slots
        self.where: dict[str, str | None] = {}  # address of each trial's node, None while it has not reported since its last start
        self.looked_at = time.time()

    def on_trial_start(self, iteration, trials, trial, **info):
        self.where[trial.trial_id] = None

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.where[trial.trial_id] = result["node_ip"]

    def on_step_end(self, iteration, trials, **info):
        since = time.time() - self.looked_at
        if not self.minutes or self.folder is None or since < self.EVERY:
            return
        self.looked_at = time.time()
        self.bill.spent["given back"] += since * sum(self.given_back.values())
        live = [trial for trial in trials if not trial.is_finished()]
        starting = any(trial.status == Trial.PENDING for trial in live)
        busy = {self.where[trial.trial_id] for trial in live if trial.status == Trial.RUNNING}
        if len(self.bill.record.trials) < self.bill.record.num_samples or starting or None in busy:
            self.idle_since.clear()
            return
        nodes = {}  # job: (address, slots)
        for node in ray.nodes():
            job = next((name.removeprefix("slurm_job_") for name in node["Resources"] if name.startswith("slurm_job_")), None)
            if node["Alive"] and job and job not in self.given_back:
                nodes[job] = node["NodeManagerAddress"], slots_of(node["Resources"], self.bill.resources)
        for job, (address, slots) in sorted(nodes.items()):
            if address in busy:
                self.idle_since.pop(job, None)
                continue
            idle = self.looked_at - self.idle_since.setdefault(job, self.looked_at)
            rest = sum(n for other, (_, n) in nodes.items() if other != job and other not in self.given_back)
            if idle >= 60 * self.minutes and rest >= len(live):
                (self.folder / f"release-{job}").touch()
                self.given_back[job] = slots
                print(f"worker job {job} is given back: {len(live)} trials are left, and {rest} slots without it", flush=True)
