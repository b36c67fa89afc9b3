"""Experiment trackers that a search can report to: TensorBoard, MLflow, Weights & Biases.

Each trial is one run of the tracker, also if it was paused or the search was resumed. All trackers are written to from
the process of the search. They have the same four methods:

    start(trial_id, config)             a trial starts, or goes on after a pause or a resume
    log(trial_id, iteration, metrics)   the metrics of an iteration
    end(trial_id, failed)               a trial has ended
    close()                             the search has ended, or was interrupted

After a resume `end` can come without `start`: a trial that was paused when the search was interrupted may lose at its
rung without running again.
"""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from ray.tune import Callback

from hpo import errors
from hpo.results.tables import METRICS, TRAINING, V2_METRICS

PATIENCE = 20  # seconds that the search waits for the server of a tracker
SHARE = 0.1  # of the search's time that a tracker may take, beyond PATIENCE: the search waits meanwhile
MLFLOW = {  # defaults for MLflow's environment variables; the user's own values are used first
    "MLFLOW_ALLOW_FILE_STORE": "true",  # MLflow 3.17 asks for it before it writes to a folder
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(PATIENCE),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # by default MLflow tries a lost server again for many minutes
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class TensorBoard:
    """Event files in <run folder>/ray/<trial id>/, where Ray's own logger puts them."""

    def __init__(self, run_dir: Path):
        from tensorboardX import SummaryWriter

        self.run_dir, self.make_writer = run_dir, SummaryWriter
        self.writers: dict[str, SummaryWriter] = {}  # by trial
        self.hyperparameters: dict[str, dict] = {}
        self.last_metrics: dict[str, dict] = {}

    def start(self, trial_id: str, config: dict) -> None:
        """Opens an event file, unless the trial has one already."""
        if trial_id not in self.writers:
            self.writers[trial_id] = self.make_writer(str(self.run_dir / "ray" / trial_id), flush_secs=30)
            self.hyperparameters[trial_id] = flatten(config)

    def log(self, trial_id: str, iteration: int, metrics: dict[str, float]) -> None:
        """Writes each metric under the tag that Ray's own logger gives it."""
        self.last_metrics[trial_id] = {f"ray/tune/{name}": value for name, value in metrics.items()}
        for tag, value in self.last_metrics[trial_id].items():
            self.writers[trial_id].add_scalar(tag, value, global_step=iteration)
        self.writers[trial_id].flush()

    def end(self, trial_id: str, failed: bool) -> None:
        """Adds the hyperparameters and the last metrics for the tab HPARAMS, and closes the event file."""
        from tensorboardX.summary import hparams

        if trial_id not in self.writers:
            return
        writer, metrics = self.writers.pop(trial_id), self.last_metrics.pop(trial_id, None)
        values = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in self.hyperparameters.pop(trial_id).items()
        }
        if metrics:
            # SummaryWriter.add_hparams would write to a new folder, which TensorBoard shows as another run.
            for summary in hparams(hparam_dict=values, metric_dict=metrics):
                writer.file_writer.add_summary(summary)
        writer.close()

    def close(self) -> None:
        """Closes all event files."""
        for writer in self.writers.values():
            writer.close()


class MLflow:
    """Runs in the experiment that has the name of the run folder, at MLFLOW_TRACKING_URI or in <run folder>/mlruns."""

    def __init__(self, run_dir: Path):
        for name, value in MLFLOW.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", (run_dir / "mlruns").as_uri()))
        found = self.client.get_experiment_by_name(run_dir.name)
        self.experiment_id = found.experiment_id if found else self.client.create_experiment(run_dir.name)
        self.runs: dict[str, str] = {}  # by trial: the id of its run

    def start(self, trial_id: str, config: dict) -> None:
        """Creates the run of a trial. After a resume, finds the one that the trial has already."""
        if trial_id in self.runs:
            return
        name = f"trial_{trial_id}"
        run_id = self.find(trial_id)
        if run_id is None:
            run = self.client.create_run(self.experiment_id, run_name=name, tags={"trial_name": name})
            run_id = run.info.run_id
        self.runs[trial_id] = run_id
        for key, value in flatten(config).items():
            self.client.log_param(run_id, key, value)

    def find(self, trial_id: str) -> str | None:
        """The id of the run of a trial, if MLflow has one."""
        runs = self.client.search_runs([self.experiment_id], f"tags.trial_name = 'trial_{trial_id}'")
        return runs[0].info.run_id if runs else None

    def log(self, trial_id: str, iteration: int, metrics: dict[str, float]) -> None:
        """Sends the metrics in one request, because the search waits for the answer."""
        from mlflow.entities import Metric

        now, values = int(1000 * time.time()), {"training_iteration": iteration, **metrics}
        batch = [Metric(name, float(value), now, iteration) for name, value in values.items()]
        self.client.log_batch(self.runs[trial_id], metrics=batch)

    def end(self, trial_id: str, failed: bool) -> None:
        """Sets the status of the run."""
        run_id = self.runs.pop(trial_id, None) or self.find(trial_id)
        if run_id:
            self.client.set_terminated(run_id, "FAILED" if failed else "FINISHED")

    def close(self) -> None:
        """Does nothing. The runs of trials that have not ended stay open for a resume."""


class WandB:
    """Runs of the project WANDB_PROJECT, or bloom_bohb, in the group that has the name of the run folder.

    All runs are held by the process of the search. Ray's own callback starts four processes, 290 MB, for each trial
    that has not ended.
    """

    def __init__(self, run_dir: Path):
        import wandb

        self.init, self.run_dir = wandb.init, run_dir
        self.runs: dict[str, wandb.Run] = {}  # by trial
        timeouts = {"init_timeout": PATIENCE, "finish_timeout": PATIENCE, "finish_timeout_raises": True}
        self.settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, **timeouts)
        mode = wandb.setup(self.settings).settings.mode
        # Without a key wandb.init would ask for one on the terminal, and the search would wait for the answer.
        if mode in ("online", "shared") and not wandb.login(prompt=False):
            raise RuntimeError("no API key: run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline")

    def start(self, trial_id: str, config: dict) -> None:
        """Starts the run of a trial. After a resume, wandb continues the run that has the same id."""
        if trial_id not in self.runs:
            self.runs[trial_id] = self.init(
                project=os.environ.get("WANDB_PROJECT", "bloom_bohb"),
                group=self.run_dir.name,
                id=trial_id,
                name=f"trial_{trial_id}",
                config=config,
                dir=str(self.run_dir),
                reinit="create_new",  # several runs at a time in one process
                resume="allow",
                allow_val_change=True,
                settings=self.settings,
            )

    def log(self, trial_id: str, iteration: int, metrics: dict[str, float]) -> None:
        """Sends the metrics."""
        self.runs[trial_id].log({"training_iteration": iteration, **metrics}, step=iteration)

    def end(self, trial_id: str, failed: bool) -> None:
        """Ends the run, with exit code 1 if the trial has failed."""
        if trial_id in self.runs:
            self.runs.pop(trial_id).finish(exit_code=int(failed))

    def close(self) -> None:
        """Ends all runs. A resumed search continues them by their ids."""
        for run in self.runs.values():
            run.finish()


def flatten(config: dict, prefix: str = "") -> dict:
    """A nested dict as a flat one, with keys such as train_loop_config/lr."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


TRACKERS = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


class TrackerCallback(Callback):
    """Sends the metrics of each trial to a tracker, and how the trial has ended.

    An error of the tracker must not end the search. After the first error, or if the tracker is too slow, the log has
    a warning, and the tracker gets nothing more.

    Args:
        name: the value of --report_to, for the warning.
        make: makes the tracker. It is called when the search starts.
    """

    def __init__(self, name: str, make: Callable):
        self.name, self.make, self.tracker = name, make, None
        self.began, self.took = time.time(), 0.0  # took: seconds that the search has waited for the tracker

    @contextlib.contextmanager
    def _guard(self):
        """Gives up the tracker if it raises an error or takes too much time."""
        called_at = time.time()
        try:
            yield
            self.took += time.time() - called_at
            since = time.time() - self.began
            if self.took > PATIENCE + SHARE * since:
                raise TimeoutError(f"it has taken {self.took:.0f} of {since:.0f} s")
        except Exception as error:
            self.tracker = None
            reason = errors.one_line(f"{type(error).__name__} {error}")
            print(f"WARNING: nothing more goes to --report_to {self.name}: {reason}", flush=True)

    def _call(self, method: str, *args) -> None:
        if self.tracker:
            with self._guard():
                getattr(self.tracker, method)(*args)

    def setup(self, **info):
        """Makes the tracker."""
        with self._guard():
            self.tracker = self.make()

    def on_trial_start(self, iteration, trials, trial, **info):
        """A trial starts or goes on."""
        config = trial.config["train_loop_config"]  # not the rungs, which change with --finish
        self._call("start", trial.trial_id, {"train_loop_config": config})

    def on_trial_result(self, iteration, trials, trial, result, **info):
        """A trial has reported. The report has no metrics if the trial has failed or was saved amid an iteration."""
        values = {name: result.get(name) for name in (*METRICS, *V2_METRICS, *TRAINING)}
        metrics = {name: value for name, value in values.items() if value is not None and not math.isnan(value)}
        if metrics:
            self._call("log", trial.trial_id, result["training_iteration"], metrics)

    def on_trial_complete(self, iteration, trials, trial, **info):
        """A trial has ended: it has reached its last rung, lost at a rung, or reported that it has failed."""
        self._call("end", trial.trial_id, "failed" in (trial.last_result or {}))

    def on_trial_error(self, iteration, trials, trial, **info):
        """A trial has failed, and Tune does not start it again."""
        self._call("end", trial.trial_id, True)

    def on_experiment_end(self, trials, **info):
        """The search has ended or was interrupted."""
        self._call("close")


def tracker(report_to: str, run_dir: Path) -> list[Callback]:
    """The callbacks for --report_to: one for a tracker, none for "none".

    Args:
        report_to: "tensorboard", "mlflow", "wandb" or "none". hpo/checks.py checks that its package is installed.
        run_dir: the run folder. Environment variables of the tracker may name another place.
    """
    if report_to not in TRACKERS:
        return []
    return [TrackerCallback(report_to, functools.partial(TRACKERS[report_to], run_dir))]
