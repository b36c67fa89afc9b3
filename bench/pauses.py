"""Two hundred pauses of trials of two ranks: nothing leaks.

    make demo-data && .venv/bin/python bench/pauses.py        # on the CPU, with real Ray and DeepSpeed

Two trials take turns in the same worker processes. Each is paused after every iteration and resumed from its
checkpoint. Counted are placement groups, processes, memory, open files and checkpoints.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

import common
import psutil
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.util.placement_group import placement_group_table

import raytune_bayesian

os.environ["PYTHONPATH"] = str(common.ROOT / "tests" / "no_gpu")  # the worker processes have no GPU

PAUSES = 200
RANKS = 2
# At the end there may be so many more than after ten pauses.
LIMITS = {
    "placement groups": 0,
    "processes": 0,
    "open files": 20,
    "MB": 60,
    "open files, search": 20,
    "MB, search": 60,
    "checkpoints": 2,
}


class PauseAlways(FIFOScheduler):
    """Pauses a trial at each report, and resumes the one that has waited longest."""

    def __init__(self):
        super().__init__()
        self.rows: list[dict] = []
        self.paused_at: dict[str, int] = {}

    def on_trial_result(self, tune_controller, trial, result):
        """Counts, and pauses the trial."""
        self.rows.append(count(Path(trial.storage.experiment_fs_path)))
        self.paused_at[trial.trial_id] = len(self.rows)
        if len(self.rows) % 20 == 10:
            counts = ", ".join(f"{value:.0f} {name}" for name, value in self.rows[-1].items())
            print(f"{len(self.rows):4d} pauses: {counts}", flush=True)
        return TrialScheduler.PAUSE

    def choose_trial_to_run(self, tune_controller):
        """The trial that was paused first, or that has not started."""
        trials = [t for t in tune_controller.get_trials() if t.status in (t.PAUSED, t.PENDING)]
        return min(trials, key=lambda t: self.paused_at.get(t.trial_id, 0), default=None)


def count(folder: Path) -> dict[str, float]:
    """What the worker processes, this process, Ray and the results hold now."""
    workers = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::")]
    workers = [p for p in workers if "ImplicitFunc" in p.name() or "Rank" in p.name()]
    groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    return {
        "placement groups": len(groups),
        "processes": len(workers),
        "open files": sum(p.num_fds() for p in workers),
        "MB": sum(p.memory_full_info().uss for p in workers) / 2**20,
        "open files, search": psutil.Process().num_fds(),
        "MB, search": psutil.Process().memory_full_info().uss / 2**20,
        "checkpoints": len([*folder.glob("*/checkpoint_*"), *folder.glob("*/saving-*")]),
    }


def main() -> None:
    """Runs the two trials, and prints the counts after ten pauses and at the end."""
    max_t = PAUSES // 2 + 1
    setup = common.setup_of_search(
        "--model", common.DEMO / "model", "--dataset", common.DEMO / "squad", "--max_t", max_t,
        "--max_train_samples", 2 * max_t, "--num_train_epochs", 1, "--max_eval_samples", 2,
    )  # fmt: skip
    config = {
        "train_loop_config": common.HYPERPARAMETERS | {"per_device_bs": 1},
        "rungs": list(range(1, max_t + 1)),
    }
    scheduler, began = PauseAlways(), time.time()
    with common.ray_session() as folder:
        setup = dataclasses.replace(setup, run_dir=folder / "results", gpus_per_trial=RANKS)
        bundles = tune.PlacementGroupFactory([{"CPU": 1}] * RANKS, strategy="STRICT_PACK")  # two CPUs: one at a time
        common.run_trials(2, raytune_bayesian.train, config, setup, bundles, scheduler)
    first, last, pauses, seconds = scheduler.rows[9], scheduler.rows[-1], len(scheduler.rows), time.time() - began
    print(f"\n{pauses} pauses of 2 trials of {RANKS} ranks in {seconds:.0f} s, {seconds / pauses:.2f} s each")
    print(f"{'':18s}after 10  at the end  limit of the difference")
    for name, limit in LIMITS.items():
        print(f"{name:18s}{first[name]:8.0f}  {last[name]:10.0f}  {limit}")
    if any(last[name] - first[name] > limit for name, limit in LIMITS.items()):
        sys.exit("something leaks")


if __name__ == "__main__":
    main()
