"""From the scheduler's choice of a trial to its first optimizer step: in a fresh process, a warm one, and resumed.

    make demo-data && .venv/bin/python bench/turnaround.py    # the demo's model, two minutes on two cores
    .venv/bin/python bench/turnaround.py --full               # and a random BLOOM-560M: 20 minutes, 20 GB of memory,
                                                              # 30 GB of disk
    .venv/bin/python bench/turnaround.py --starts             # only how soon all slots are at work, seven minutes
    .venv/bin/python bench/turnaround.py --keeping            # only what keeping worker processes gives, six minutes

One trial at a time, on real Ray with the real DeepSpeed engine. Fresh: a worker process for each trial, which is Tune's
default. Warm: reuse_actors, as in raytune_bayesian.py. Resumed: in a warm process, after a pause. Measured is the time
until the first step is done, and until it begins, because a step of a big model takes seconds on a CPU. Each trial has
two iterations of two optimizer steps, and writes a checkpoint after each.

--starts measures the time until the trials in all slots have imported what they train with. Tune's default is to start
one worker process after the other. A search has them start side by side: by TUNE_MAX_PENDING_TRIALS_PG, and a searcher
that suggests one trial more than there are slots. Searcher and scheduler are those of a search. A trial waits until all
trials have their imports, as one that trains for minutes. A process starts as fast as it does here, or some seconds
later, as where Ray's own files come over a network.

--keeping measures whole searches, of 16 trials with up to 16 iterations, with Tune's own handling of idle and starting
worker processes, and with that of ray_private.TuneController. All the rest is the same: reuse_actors, starts side by
side, searcher and scheduler. An iteration waits; a process has the imports of a trial.
"""

import dataclasses
import importlib
import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import common
import ray.tune.tune
import torch
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

import raytune_bayesian
from hpo.bohb.scheduler import HyperBandForBOHB
from hpo.bohb.searcher import TuneBOHB
from hpo.cluster import ray_private

TRIALS = 6  # the first of the warm ones is cold and does not count
LIMIT = 10  # a warm process at least so many times faster than a fresh one
SLOTS, STARTS, LATER = 8, 3, 5  # of --starts; seconds
KEEPING = [(2, 0.5), (4, 0.5)]  # of --keeping: slots, seconds of an iteration


class Choices(FIFOScheduler):
    """Notes when each trial was chosen, and pauses it at its first report where told to."""

    def __init__(self, pause: bool):
        super().__init__()
        self.pause, self.chosen_at, self.seconds = pause, {}, {"started": [], "resumed": []}

    def choose_trial_to_run(self, tune_controller):
        """The next new trial, then the next paused one."""
        trials = [t for t in tune_controller.get_trials() if t.status in (t.PENDING, t.PAUSED)]
        trial = min(trials, key=lambda t: (t.status == t.PAUSED, t.trial_id), default=None)
        if trial and not any(t.status == t.RUNNING for t in tune_controller.get_trials()):  # else it waits for that one
            self.chosen_at.setdefault(trial.trial_id, time.time())  # Tune asks again until a process is there
        return trial

    def on_trial_result(self, tune_controller, trial, result):
        """Notes how long the trial took to its first step."""
        at = self.chosen_at.pop(trial.trial_id, None)
        if at:
            seconds = result["first_step_at"] - at, result["first_step_began"] - at
            self.seconds["started" if result["training_iteration"] == 1 else "resumed"].append(seconds)
        if result["training_iteration"] == 1:  # the last one is a model only
            self.bytes, self.saving = result["checkpoint_bytes"], result["checkpoints_seconds"]
        return TrialScheduler.PAUSE if self.pause and result["training_iteration"] == 1 else TrialScheduler.CONTINUE


def train(config, setup, trial):
    """A trial that also reports when its first step began and was done, and the size of its checkpoint."""
    import raytune_bayesian

    class Iterations(raytune_bayesian.Iterations):
        def on_train_begin(self, *args, **kwargs):
            self.first_step_began = self.first_step_at = None
            super().on_train_begin(*args, **kwargs)

        def on_step_begin(self, *args, **kwargs):
            self.first_step_began = self.first_step_began or time.time()

        def on_step_end(self, *args, **kwargs):
            self.first_step_at = self.first_step_at or time.time()
            super().on_step_end(*args, **kwargs)

        def report(self, checkpoint=None):
            self.metrics["first_step_at"], self.metrics["first_step_began"] = self.first_step_at, self.first_step_began
            self.metrics["checkpoint_bytes"] = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file())
            super().report(checkpoint)

    with mock.patch.object(raytune_bayesian, "Iterations", Iterations):
        raytune_bayesian.train(config, setup, trial)


def measure(setup, folder: Path, trials: int, reuse_actors: bool, pause: bool) -> Choices:
    """Runs trials, one at a time; the scheduler, which has the seconds."""
    scheduler = Choices(pause)
    config = {"train_loop_config": common.HYPERPARAMETERS | {"per_device_bs": 1}, "rungs": [1, 2]}
    setup = dataclasses.replace(setup, run_dir=folder)
    resources = {"cpu": len(os.sched_getaffinity(0)), "gpu": setup.gpus_per_trial}
    common.run_trials(trials, train, config, setup, resources, scheduler, reuse_actors)
    return scheduler


def table(name: str, model: Path, trials: int) -> float:
    """Prints the table of a model; returns how many times faster a warm process is than a fresh one."""
    setup = common.setup_of_search(
        "--model", model, "--dataset", common.DEMO / "squad", "--max_t", 2, "--max_train_samples", 4,
        "--num_train_epochs", 1, "--max_eval_samples", 1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        fresh = measure(setup, Path(folder) / "fresh", trials, reuse_actors=False, pause=False)
        warm = measure(setup, Path(folder) / "warm", trials, reuse_actors=True, pause=False)
        paused = measure(setup, Path(folder) / "paused", trials, reuse_actors=True, pause=True)
    rows = {
        "fresh process": fresh.seconds["started"],
        "warm": warm.seconds["started"][1:],
        "resumed, warm": paused.seconds["resumed"],
    }
    saving = statistics.median([fresh.saving, warm.saving, paused.saving])
    print(f"\n{name}: {fresh.bytes / 1e9:.3g} GB a checkpoint, written in {saving:.2f} s")
    titles = f"{'median':>8}{'least':>8}{'most':>8}{'times':>8}{'to its begin':>14}{'times':>8}"
    print(f"{'seconds to the first step':28}{titles}   limit of warm: {LIMIT}")
    medians = {
        row: [statistics.median(column) for column in zip(*seconds, strict=True)] for row, seconds in rows.items()
    }
    for row, seconds in rows.items():
        at, began = medians[row]
        times, times_began = medians["fresh process"][0] / at, medians["fresh process"][1] / began
        done = [at for at, _ in seconds]
        to_its_end = f"{at:8.2f}{min(done):8.2f}{max(done):8.2f}{times:8.1f}"
        print(f"{row:28}{to_its_end}{began:14.2f}{times_began:8.1f}", flush=True)
    return medians["fresh process"][0] / medians["warm"][0]


class Later:
    """Waits where a worker process unpickles it, before the process takes its first trial.

    Args:
        seconds: to wait.
        searching: the process that does not wait.
    """

    def __init__(self, seconds: float, searching: int):
        self.seconds, self.searching = seconds, searching
        if os.getpid() != searching:
            time.sleep(seconds)

    def __reduce__(self):
        return Later, (self.seconds, self.searching)


def start(seed: int, later: float, side_by_side: bool) -> float:
    """Seconds until trials could train in all slots.

    Args:
        seed: of the search.
        later: seconds that a worker process waits before it can take a trial.
        side_by_side: whether processes start side by side, or one after another.
    """
    searcher = TuneBOHB(seed=seed)
    searcher.slots = SLOTS
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(SLOTS) if side_by_side else "auto"
    before, cores = Later(later, os.getpid()), len(os.sched_getaffinity(0))

    def waiting(config, folder, before=before):  # `before` waits where the function is unpickled
        importlib.import_module("raytune_bayesian")
        (Path(folder) / f"{os.getpid()}").touch()
        begun, deadline = time.time(), time.time() + 300
        while len(list(Path(folder).iterdir())) < SLOTS and time.time() < deadline:
            time.sleep(0.1)
        tune.report({"loss": begun % 1, "training_iteration": 1, "begun": begun})

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as begun:
        started = time.time()
        results = tune.Tuner(
            tune.with_resources(tune.with_parameters(waiting, folder=begun), {"cpu": cores / SLOTS}),
            param_space=raytune_bayesian.SEARCH_SPACE,
            tune_config=tune.TuneConfig(
                metric="loss",
                mode="min",
                num_samples=SLOTS,
                search_alg=searcher,
                reuse_actors=True,
                scheduler=HyperBandForBOHB(
                    time_attr="training_iteration", max_t=1, reduction_factor=4, stop_last_trials=False
                ),
            ),
            run_config=tune.RunConfig(name="ray", storage_path=folder, verbose=0),
        ).fit()
        assert len(list(Path(begun).iterdir())) == SLOTS
    return max(result.metrics["begun"] for result in results) - started


def starts() -> None:
    """Prints the table of --starts."""
    print(f"\nseconds until trials have their imports in all of {SLOTS} slots; limit: side by side is not slower")
    print(f"{'a process starts':28}{'processes':18}{'median':>8}{'least':>8}{'most':>8}{'times':>8}")
    ratios = []
    for later in (0, LATER):
        seconds = {"one after another": [], "side by side": []}
        for seed in range(STARTS):
            for name, row in seconds.items():
                row.append(start(seed, later, name == "side by side"))
        medians = [statistics.median(row) for row in seconds.values()]
        for (name, row), median in zip(seconds.items(), medians, strict=True):
            when = f"{later:g} s later" if later else "as it does here"
            numbers = f"{median:8.1f}{min(row):8.1f}{max(row):8.1f}{medians[0] / median:8.2f}"
            print(f"{when:28}{name:18}{numbers}", flush=True)
        ratios.append(medians[0] / medians[-1])
    print(f"\nratio: {ratios[0]:.2f}")  # of what was measured; what comes later is assumed


class TunesOwn(ray_private.TuneController):
    """The controller of a search, with Tune's own handling of idle and starting processes."""

    _tune = ray_private.TuneController.__base__
    _maybe_reuse_cached_actor = _tune._maybe_reuse_cached_actor
    _maybe_cache_trial_actor = _tune._maybe_cache_trial_actor
    _cleanup_cached_actors = _tune._cleanup_cached_actors
    _maybe_add_actors = _tune._maybe_add_actors

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._actor_cache._max_num_objects = Counter()


def keep(controller, slots: int, wait: float, seed: int) -> tuple[float, int]:
    """Runs a search. Returns its seconds, and the number of worker processes that ran trials.

    Args:
        controller: the class that Tuner.fit() uses.
        slots: trials at a time.
        wait: seconds of an iteration.
        seed: of the search.
    """
    searcher = TuneBOHB(seed=seed, max_concurrent=slots)
    searcher.slots = slots
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slots)

    def train(config):
        importlib.import_module("raytune_bayesian")
        checkpoint = tune.get_checkpoint()
        done = int((Path(checkpoint.path) / "done").read_text()) if checkpoint else 0
        for t in range(done + 1, 17):
            time.sleep(wait)
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "done").write_text(str(t))
                loss = abs(math.log(config["train_loop_config"]["lr"] / 5e-5)) + 1 / t
                report = {"loss": loss, "training_iteration": t, "process": os.getpid()}
                tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(ray.tune.tune, "TuneController", controller):
        started = time.time()
        scheduler = HyperBandForBOHB(time_attr="training_iteration", max_t=16, reduction_factor=4)
        results = tune.Tuner(
            tune.with_resources(train, {"cpu": len(os.sched_getaffinity(0)) / slots}),
            param_space=raytune_bayesian.SEARCH_SPACE,
            tune_config=tune.TuneConfig(
                metric="loss", mode="min", num_samples=16, search_alg=searcher, reuse_actors=True, scheduler=scheduler
            ),
            run_config=tune.RunConfig(name="ray", storage_path=folder, verbose=0),
        ).fit()
        seconds = time.time() - started
    assert not results.errors
    return seconds, len({pid for result in results for pid in result.metrics_dataframe["process"]})


def keeping() -> None:
    """Prints the table of --keeping."""
    print("\na search of 16 trials, one band's largest bracket; limit: ours at least 1.1 times as fast")
    titles = f"{'seconds':>10}{'least':>8}{'most':>8}{'used':>9}{'times':>8}"
    print(f"{'slots, an iteration':22}{'processes kept by':20}{titles}")
    ratios = []
    for slots, wait in KEEPING:
        found = {"Tune": [], "ours": []}
        for seed in range(STARTS):
            for name, controller in (("Tune", TunesOwn), ("ours", ray_private.TuneController)):
                found[name].append(keep(controller, slots, wait, seed))
        medians = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in found.items()}
        for name, runs in found.items():
            seconds, times = [run[0] for run in runs], medians["Tune"] / medians[name]
            used = statistics.median(run[1] for run in runs)
            numbers = f"{medians[name]:10.1f}{min(seconds):8.1f}{max(seconds):8.1f}{used:9g}{times:8.2f}"
            print(f"{f'{slots}, {wait:g} s':22}{name:20}{numbers}", flush=True)
        ratios.append(medians["Tune"] / medians["ours"])
    print(f"\nratio: {min(ratios):.2f}")


def main() -> None:
    """Prints the tables."""
    with common.ray_session(torch.cuda.device_count()):
        if "--starts" in sys.argv:
            return starts()
        if "--keeping" in sys.argv:
            return keeping()
        ratio = table("demo's model", common.DEMO / "model", TRIALS)
        if "--full" in sys.argv:
            import full_size

            with tempfile.TemporaryDirectory() as folder:
                full_size.make_model(Path(folder) / "model")
                table("BLOOM-560M, random weights", Path(folder) / "model", 4)
    print(f"\nratio: {ratio:.2f}")


if __name__ == "__main__":
    main()
