"""What several benchmarks share: the setup of a search, a trial in this process, trials in Ray Tune.

A benchmark imports it first: it makes `hpo` and the script importable, and `hpo` sets Ray's environment.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hpo import arguments, checks, search_space
from hpo.cluster.trial import TrialContext, run_rank

# isort: split
import ray
from ray import tune

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo"
HYPERPARAMETERS = {"lr": 1e-4, "per_device_bs": 2, "wd": 0.01, "seed": 0}

# ---------------------------------------------------------------------------------------------------------------------
# what trials share


def ds_config(stage: int) -> dict:
    """The DeepSpeed configuration of the project at a ZeRO stage."""
    return json.loads((ROOT / "ds_config.json").read_text()) | {"zero_optimization": {"stage": stage}}


def setup_of_search(*arguments_of_search):
    """The Setup of a search with this command line, as the script prepares it.

    Its run_dir is in results/, and nothing is written there.
    """
    import raytune_bayesian
    from hpo.squad.setup import prepare

    args = checks.check(arguments.parse("", ["--report_to", "none", *map(str, arguments_of_search)]))
    largest = search_space.largest(raytune_bayesian.SEARCH_SPACE["train_loop_config"]["per_device_bs"])
    setup, _ = prepare(args, raytune_bayesian.MAX_LENGTH, raytune_bayesian.SELECTION_SIZE, largest)
    return setup


def setup_of_questions(train, selection, stage: int, precision: str, **more):
    """The Setup of trials on questions that are already tokens.

    Args:
        train: questions for training.
        selection: questions for evaluation.
        stage: ZeRO stage.
        precision: "fp16", "bf16" or "fp32".
        **more: other fields of Setup.
    """
    from hpo.squad.setup import Setup

    setup = Setup(
        run_dir=Path("/nonexistent"),
        model=Path("/nonexistent"),
        train=train,
        selection=selection,
        max_new_tokens=8,
        ds_config=ds_config(stage),
        held_out="articles",
        precision=precision,
        max_t=2,
        num_train_epochs=1.0,
        metric="eval_loss",
        metric_language="en",
        seed=0,
        gpus_per_trial=0,
        cpus_per_trial=1,
    )
    return dataclasses.replace(setup, **more)


# ---------------------------------------------------------------------------------------------------------------------
# a trial in this process


@functools.cache
def one_rank():
    """The Group of this process, which is the only rank of its trials."""
    from hpo.squad.group import join

    return join()


class TrialHere(TrialContext):
    """A trial without Ray Tune. It keeps its reports, and its last checkpoint.

    Args:
        folder: for its checkpoints.
        checkpoint: the checkpoint to go on from; None for a new trial.
        pause: the trial is paused after this iteration.
    """

    def __init__(self, folder: Path, checkpoint: Path | None = None, pause: int | None = None):
        files = folder / "stop", folder / "scores"
        super().__init__(one_rank(), str(folder), checkpoint and str(checkpoint), *files)
        self.pause, self.reports, self.last_checkpoint = pause, [], checkpoint

    def report(self, metrics: dict, checkpoint: Path | None = None) -> None:
        """Keeps the metrics and moves the checkpoint. Raises SystemExit to pause the trial, as Ray Tune does."""
        self.reports.append(metrics)
        if checkpoint:
            self.last_checkpoint = Path(self.folder) / f"after_{metrics['training_iteration']}"
            shutil.move(checkpoint, self.last_checkpoint)
        if metrics["training_iteration"] == self.pause:
            raise SystemExit
        self.start_iteration()

    def run(self, setup, rungs: list[int]) -> None:
        """Trains until the pause, or to the end of the full training."""
        import raytune_bayesian

        with contextlib.suppress(SystemExit):
            raytune_bayesian.train({"train_loop_config": HYPERPARAMETERS, "rungs": rungs}, setup, self)
        gc.collect()


# ---------------------------------------------------------------------------------------------------------------------
# trials in Ray Tune


@contextlib.contextmanager
def ray_session(gpus_per_trial: int = 0):
    """Ray on this machine, as a search starts it. Gives a temporary folder.

    Args:
        gpus_per_trial: 0 hides the GPUs.
    """
    from hpo.cluster.launch import start_ray

    path = [str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH")]  # of worker processes
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    with tempfile.TemporaryDirectory(prefix="bohb-") as temp_dir, tempfile.TemporaryDirectory() as trials_dir:
        start_ray(gpus_per_trial, temp_dir, trials_dir)
        try:
            yield Path(trials_dir)
        finally:
            ray.shutdown()


def run_trials(trials: int, train, config: dict, setup, resources, scheduler, reuse_actors: bool = True) -> None:
    """Runs trials that all have the same configuration. Raises the error of a trial that fails.

    Args:
        trials: number of trials.
        train: as raytune_bayesian.train.
        config: its first argument.
        setup: what the trials share; results are written to its run_dir.
        resources: of a trial, for tune.with_resources.
        scheduler: of Ray Tune.
        reuse_actors: whether a worker process stays for the next trial.
    """
    trainable = tune.with_parameters(in_ranks, train=train, config_of_all=config, setup=setup)
    results = tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space={"i": tune.grid_search(list(range(trials)))},
        tune_config=tune.TuneConfig(
            scheduler=scheduler, reuse_actors=reuse_actors, trial_dirname_creator=lambda trial: trial.trial_id
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(setup.run_dir),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
        ),
    ).fit()
    for error in results.errors:
        raise error


def in_ranks(config: dict, train, config_of_all: dict, setup) -> None:
    """As hpo.cluster.trial.run, but the error of a trial is raised and not reported."""
    from hpo.squad import ranks

    body = functools.partial(run_rank, train=train, setup=setup)
    ranks.of_this_process(body, max(1, setup.gpus_per_trial)).run(config_of_all)
