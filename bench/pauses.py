"""Two hundred pauses of a trial of two ranks: nothing leaks, of placement groups, processes, memory, open files and checkpoints.

    make demo-data && .venv/bin/python bench/pauses.py        # on the CPU, real Ray and DeepSpeed

Two trials take turns in the same processes; each is paused after every iteration and resumed from its checkpoint.
"""

import os
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], f"{ROOT}/tests/no_gpu"])  # for the processes of trials, which have no GPU

import raytune_bayesian  # first: sets up Ray's environment

# isort: split
import psutil
import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.util.placement_group import placement_group_table

from hpo import checks

PAUSES = 200
RANKS = 2
# more at the end than after ten pauses
LIMITS = {"placement groups": 0, "processes": 0, "open files": 20, "MB": 60, "open files, search": 20, "MB, search": 60, "checkpoints": 2}


class PauseAlways(FIFOScheduler):
    """Pauses a trial at each report, and takes the one that has waited longest."""

    def __init__(self):
        super().__init__()
        self.rows: list[dict] = []
        self.paused_at: dict[str, int] = {}

    def on_trial_result(self, tune_controller, trial, result):
        self.rows.append(look(Path(trial.storage.experiment_fs_path)))
        self.paused_at[trial.trial_id] = len(self.rows)
        if len(self.rows) % 20 == 10:
            print(f"{len(self.rows):4d} pauses: " + ", ".join(f"{value:.0f} {name}" for name, value in self.rows[-1].items()), flush=True)
        return TrialScheduler.PAUSE

    def choose_trial_to_run(self, tune_controller):
        trials = [t for t in tune_controller.get_trials() if t.status in (t.PAUSED, t.PENDING)]
        return min(trials, key=lambda t: self.paused_at.get(t.trial_id, 0), default=None)


def look(folder: Path) -> dict[str, float]:
    """What the trials' processes, the search's own, Ray and the results hold now."""
    ours = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::")]
    working = [p for p in ours if "ImplicitFunc" in p.name() or "Rank" in p.name()]
    groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    return {
        "placement groups": len(groups),
        "processes": len(working),
        "open files": sum(p.num_fds() for p in working),
        "MB": sum(p.memory_full_info().uss for p in working) / 2**20,
        "open files, search": psutil.Process().num_fds(),
        "MB, search": psutil.Process().memory_full_info().uss / 2**20,
        "checkpoints": len([*folder.glob("*/checkpoint_*"), *folder.glob("*/saving-*")]),
    }


def trial(config, run):
    import raytune_bayesian

    raytune_bayesian.train({"train_loop_config": {"lr": 1e-4, "per_device_bs": 1, "wd": 0.0}, "rungs": list(range(1, 10**4))}, run)


def main() -> None:
    arguments = ["--model", f"{ROOT}/demo/model", "--dataset", f"{ROOT}/demo/squad", "--max_t", str(PAUSES // 2 + 1), "--max_train_samples",
                 str(2 * (PAUSES // 2 + 1)), "--num_train_epochs", "1", "--max_eval_samples", "2"]  # fmt: skip
    args = raytune_bayesian.parse_arguments(arguments)
    ds_config, examples = checks.check(args, raytune_bayesian.SEARCH_SPACE)
    run = raytune_bayesian.prepare(args, examples, checks.model_folder(args.model), ds_config) | {"run_dir": "/nonexistent", "gpus_per_trial": RANKS}
    run.pop("test")
    scheduler, began = PauseAlways(), time.time()
    with tempfile.TemporaryDirectory(prefix="bohb-") as temp_dir, tempfile.TemporaryDirectory() as trials_dir:
        raytune_bayesian.start_ray(types.SimpleNamespace(gpus_per_trial=0), temp_dir, trials_dir)
        bundles = tune.PlacementGroupFactory([{"CPU": 1}] * RANKS, strategy="STRICT_PACK")  # two CPUs: one trial at a time
        results = tune.Tuner(
            tune.with_resources(tune.with_parameters(trial, run=run), bundles),
            param_space={"i": tune.grid_search([0, 1])},
            tune_config=tune.TuneConfig(scheduler=scheduler, reuse_actors=True),
            run_config=tune.RunConfig(
                name="ray", storage_path=str(Path(trials_dir) / "results"), verbose=0, checkpoint_config=tune.CheckpointConfig(num_to_keep=1)
            ),
        ).fit()
        ray.shutdown()
    for error in results.errors:
        raise error
    first, last = scheduler.rows[9], scheduler.rows[-1]
    print(f"\n{len(scheduler.rows)} pauses of 2 trials of {RANKS} ranks in {time.time() - began:.0f} s, {(time.time() - began) / len(scheduler.rows):.2f} s each")
    print(f"{'':18s}after 10  at the end  limit of the difference")
    for name, limit in LIMITS.items():
        print(f"{name:18s}{first[name]:8.0f}  {last[name]:10.0f}  {limit}")
    if any(last[name] - first[name] > limit for name, limit in LIMITS.items()):
        sys.exit("something leaks")


if __name__ == "__main__":
    main()
