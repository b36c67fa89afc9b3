"""From the scheduler's choice of a trial to its first optimizer step: in a fresh process, in a warm one, and resumed from a checkpoint.

    make demo-data && .venv/bin/python bench/turnaround.py           # the demo's model, two minutes on two cores
    .venv/bin/python bench/turnaround.py --full                      # and a random BLOOM-560M: 20 minutes, 20 GB of memory, 30 GB of disk
    .venv/bin/python bench/turnaround.py --starts                    # only how soon all slots of a search are at work, seven minutes

One trial at a time on real Ray with the real DeepSpeed engine. Fresh: Tune's default, a process for each trial. Warm: reuse_actors, as
raytune_bayesian.py has it. Resumed: in a warm process, after a pause. Until the first step is done, and until it begins: on a CPU it takes
a big model seconds. Each trial has two iterations of two optimizer steps, and writes a checkpoint after each.

--starts: until the trials in all slots of a search have imported what they train with, with Tune's own control loop, which starts one process after
the other, and with ray_private.TuneController, which starts them side by side. Searcher and scheduler are those of a search; a trial waits until all have
come so far, as one that trains for minutes. The imports come in the trial, as in a search; before it a process starts as fast as it does here,
or some seconds later, as where Ray's own files come over a network.
"""

import os
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # for the processes of trials

import raytune_bayesian  # first: sets up Ray's environment

# isort: split
import ray
import ray.tune.tune
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from hpo import checks
from hpo.bohb.scheduler import HyperBandForBOHB
from hpo.bohb.searcher import TuneBOHB
from hpo.cluster import ray_private

TRIALS = 6  # the first of the warm ones is cold and does not count
LIMIT = 10  # a warm process at least so many times faster than a fresh one
SLOTS, STARTS, LATER = 8, 3, 5  # of --starts; seconds
CONTROLLERS = {"Tune's own": ray_private.TuneController.__mro__[1], "ours": ray_private.TuneController}


class Choices(FIFOScheduler):
    """Notes when each trial was chosen, and pauses it at its first report where told to."""

    def __init__(self, pause: bool):
        super().__init__()
        self.pause, self.chosen_at, self.seconds = pause, {}, {"started": [], "resumed": []}

    def choose_trial_to_run(self, tune_controller):
        trials = [t for t in tune_controller.get_trials() if t.status in (t.PENDING, t.PAUSED)]
        trial = min(trials, key=lambda t: (t.status == t.PAUSED, t.trial_id), default=None)
        if trial and not any(t.status == t.RUNNING for t in tune_controller.get_trials()):  # else it has to wait for that one
            self.chosen_at.setdefault(trial.trial_id, time.time())  # Tune asks again until its process is there
        return trial

    def on_trial_result(self, tune_controller, trial, result):
        at = self.chosen_at.pop(trial.trial_id, None)
        if at:
            seconds = result["first_step_at"] - at, result["first_step_began"] - at
            self.seconds["started" if result["training_iteration"] == 1 else "resumed"].append(seconds)
        if result["training_iteration"] == 1:  # the last one is a model only
            self.bytes, self.saving = result["checkpoint_bytes"], result["checkpoints_seconds"]
        return TrialScheduler.PAUSE if self.pause and result["training_iteration"] == 1 else TrialScheduler.CONTINUE


def trial(config, run):
    """A trial that also reports when its first step began and was done, and the size of its checkpoint."""
    import time

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
            size = sum(file.stat().st_size for file in Path(checkpoint.path).rglob("*") if file.is_file())
            self.metrics |= {"first_step_at": self.first_step_at, "first_step_began": self.first_step_began, "checkpoint_bytes": size}
            super().report(checkpoint)

    original, raytune_bayesian.Iterations = raytune_bayesian.Iterations, Iterations
    try:
        raytune_bayesian.train({"train_loop_config": {"lr": 1e-4, "per_device_bs": 1, "wd": 0.0}, "rungs": [1, 2]}, run)
    finally:
        raytune_bayesian.Iterations = original


def measure(run: dict, folder: Path, trials: int, reuse: bool, pause: bool) -> Choices:
    scheduler = Choices(pause)
    results = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, run=run), {"cpu": len(os.sched_getaffinity(0)), "gpu": run["gpus_per_trial"]}),
        param_space={"i": tune.grid_search(list(range(trials)))},
        tune_config=tune.TuneConfig(scheduler=scheduler, reuse_actors=reuse),
        run_config=tune.RunConfig(name="ray", storage_path=str(folder), verbose=0, checkpoint_config=tune.CheckpointConfig(num_to_keep=1)),
    ).fit()
    for error in results.errors:
        raise error
    return scheduler


def table(name: str, model: Path, trials: int) -> float:
    arguments = ["--model", str(model), "--dataset", f"{ROOT}/demo/squad", "--max_t", "2", "--max_train_samples", "4", "--num_train_epochs", "1",
                 "--max_eval_samples", "1"]  # fmt: skip
    args = raytune_bayesian.parse_arguments(arguments)
    ds_config, examples = checks.check(args, raytune_bayesian.SEARCH_SPACE)
    run = raytune_bayesian.prepare(args, examples, checks.model_folder(args.model), ds_config) | {"run_dir": "/nonexistent"}
    run.pop("test")
    with tempfile.TemporaryDirectory() as folder:
        fresh = measure(run, Path(folder) / "fresh", trials, reuse=False, pause=False)
        warm = measure(run, Path(folder) / "warm", trials, reuse=True, pause=False)
        paused = measure(run, Path(folder) / "paused", trials, reuse=True, pause=True)
    rows = {"fresh process": fresh.seconds["started"], "warm": warm.seconds["started"][1:], "resumed, warm": paused.seconds["resumed"]}
    print(f"\n{name}: {fresh.bytes / 1e9:.3g} GB a checkpoint, written in {statistics.median([fresh.saving, warm.saving, paused.saving]):.2f} s")
    print(f"{'seconds to the first step':28}{'median':>8}{'least':>8}{'most':>8}{'times':>8}{'to its begin':>14}{'times':>8}   limit of warm: {LIMIT}")
    medians = {row: [statistics.median(column) for column in zip(*seconds)] for row, seconds in rows.items()}
    for row, seconds in rows.items():
        at, began = medians[row]
        times, times_began = (fresh / own for fresh, own in zip(medians["fresh process"], medians[row]))
        done = [at for at, _ in seconds]
        print(f"{row:28}{at:8.2f}{min(done):8.2f}{max(done):8.2f}{times:8.1f}{began:14.2f}{times_began:8.1f}", flush=True)
    return medians["fresh process"][0] / medians["warm"][0]


class Later:
    """Takes its time where a process unpickles it, before it takes its first trial."""

    def __init__(self, seconds: float, searching: int):
        self.seconds, self.searching = seconds, searching
        if os.getpid() != searching:
            time.sleep(seconds)

    def __reduce__(self):
        return Later, (self.seconds, self.searching)


def start(seed: int, later: float) -> float:
    """Seconds until trials could train in all slots."""
    before = Later(later, os.getpid())

    def waiting(config, folder):
        before  # noqa: B018
        import raytune_bayesian  # noqa: F401

        (Path(folder) / f"{os.getpid()}").touch()
        begun, deadline = time.time(), time.time() + 300
        while len(list(Path(folder).iterdir())) < SLOTS and time.time() < deadline:
            time.sleep(0.1)
        tune.report({"loss": begun % 1, "training_iteration": 1, "begun": begun})

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as begun:
        started = time.time()
        results = tune.Tuner(
            tune.with_resources(tune.with_parameters(waiting, folder=begun), {"cpu": len(os.sched_getaffinity(0)) / SLOTS}),
            param_space=raytune_bayesian.SEARCH_SPACE,
            tune_config=tune.TuneConfig(
                metric="loss", mode="min", num_samples=SLOTS, search_alg=TuneBOHB(seed=seed), reuse_actors=True,
                scheduler=HyperBandForBOHB(time_attr="training_iteration", max_t=1, reduction_factor=4, stop_last_trials=False),
            ),
            run_config=tune.RunConfig(name="ray", storage_path=folder, verbose=0),
        ).fit()  # fmt: skip
        assert len(list(Path(begun).iterdir())) == SLOTS
    return max(result.metrics["begun"] for result in results) - started


def starts() -> None:
    print(f"\nseconds until trials have their imports in all of {SLOTS} slots; limit: ours is not slower")
    print(f"{'a process starts':28}{'control loop':14}{'median':>8}{'least':>8}{'most':>8}{'times':>8}")
    ratios = []
    for later in (0, LATER):
        seconds = {name: [] for name in CONTROLLERS}
        for seed in range(STARTS):
            for name, controller in CONTROLLERS.items():
                ray.tune.tune.TuneController = controller
                seconds[name].append(start(seed, later))
        medians = [statistics.median(row) for row in seconds.values()]
        for (name, row), median in zip(seconds.items(), medians):
            when = f"{later:g} s later" if later else "as it does here"
            print(f"{when:28}{name:14}{median:8.1f}{min(row):8.1f}{max(row):8.1f}{medians[0] / median:8.2f}", flush=True)
        ratios.append(medians[0] / medians[-1])
    print(f"\nratio: {ratios[0]:.2f}")  # of what was measured; what comes later is assumed


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bohb-") as temp_dir, tempfile.TemporaryDirectory() as trials_dir:
        raytune_bayesian.start_ray(types.SimpleNamespace(gpus_per_trial=checks.machines()[1]), temp_dir, trials_dir)
        if "--starts" in sys.argv:
            starts()
            ray.shutdown()
            return
        ratio = table("demo's model", ROOT / "demo" / "model", TRIALS)
        if "--full" in sys.argv:
            import full_size

            with tempfile.TemporaryDirectory() as folder:
                full_size.make_model(Path(folder) / "model")
                table("BLOOM-560M, random weights", Path(folder) / "model", 4)
        ray.shutdown()
    print(f"\nratio: {ratio:.2f}")


if __name__ == "__main__":
    main()
