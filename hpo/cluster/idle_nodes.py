"""Gives worker jobs back to Slurm at the end of a search, when fewer trials than slots are left."""

import time
from collections import Counter
from pathlib import Path

import ray
from ray.tune import Callback
from ray.tune.experiment import Trial

from hpo.cluster.watchdogs import workers
from hpo.results.slot_time import SlotTime
from hpo.results.slots import slots_of


class IdleNodeRelease(Callback):
    """Ends worker jobs whose node has been idle for a while, once all trials were suggested.

    Asks a worker by a file in the rendezvous folder. A node that runs a trial stays. At least as many slots stay as
    there are live trials (paused ones too), and as trainings follow the search.

    Args:
        slot_time: gets the slots that were given back; its log and resources are used.
        minutes: how long a node must be idle; 0: nothing is given back.
        folder: the rendezvous folder of head and workers; None without head_node.slurm.
        following: the number of trainings that follow the search, side by side.
    """

    EVERY = 5.0  # seconds between two looks

    def __init__(self, slot_time: SlotTime, minutes: float, folder: Path | None, following: int = 0):
        self.slot_time, self.minutes, self.folder, self.following = slot_time, minutes, folder, following
        self.idle_since: dict[str, float] = {}  # by job
        self.given_back: dict[str, int] = {}  # slots, by job
        self.node_of: dict[str, str | None] = {}  # by trial: the node's address; None until it reports after a start
        self.looked_at = time.time()

    def on_trial_start(self, iteration, trials, trial, **info):
        """Forgets where the trial was."""
        self.node_of[trial.trial_id] = None

    def on_trial_result(self, iteration, trials, trial, result, **info):
        """Notes where the trial is."""
        self.node_of[trial.trial_id] = result["node_ip"]

    def on_step_end(self, iteration, trials, **info):
        """Looks for idle nodes."""
        since = time.time() - self.looked_at
        if not self.minutes or self.folder is None or since < self.EVERY:
            return
        self.looked_at = time.time()
        self.slot_time.spent["given back"] += since * sum(self.given_back.values())
        live = [trial for trial in trials if not trial.is_finished()]
        starting = any(trial.status == Trial.PENDING for trial in live)
        busy = {self.node_of[trial.trial_id] for trial in live if trial.status == Trial.RUNNING}
        if len(self.slot_time.log.trials) < self.slot_time.log.num_samples or starting or None in busy:
            self.idle_since.clear()
            return
        jobs, slots = workers("job"), Counter()
        leaving = {address for address, job in jobs.items() if job in self.given_back}
        for node in ray.nodes():  # a head job that takes part has two at its address
            if node["Alive"] and node["NodeManagerAddress"] not in leaving:
                slots[node["NodeManagerAddress"]] += slots_of(node["Resources"], self.slot_time.resources)
        for address, job in sorted(jobs.items(), key=lambda pair: pair[1]):
            if address in leaving:
                continue
            if address in busy:
                self.idle_since.pop(job, None)
                continue
            idle = self.looked_at - self.idle_since.setdefault(job, self.looked_at)
            rest = slots.total() - slots[address]
            if idle >= 60 * self.minutes and rest >= max(len(live), self.following):
                (self.folder / f"release-{job}").touch()
                self.given_back[job] = slots.pop(address)
                left = f"{len(live)} trials are left, and {rest} slots without it"
                print(f"worker job {job} is given back: {left}", flush=True)
