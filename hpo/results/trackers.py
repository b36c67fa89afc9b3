"""Experiment trackers that a search can report to: Ray Tune's own logger callbacks, kept from ending the search."""

import contextlib
import math
import os
import time
from pathlib import Path

from ray.tune import Callback
from ray.tune.logger import LoggerCallback, TBXLoggerCallback

from hpo.results.tables import METRICS, TRAINING

PATIENCE = 20  # seconds that the search waits for a tracker's server
SHARE = 0.1  # of the search's time that a tracker may take, above the first PATIENCE seconds: the search waits meanwhile
MLFLOW = {  # unless the user's environment says otherwise
    "MLFLOW_ALLOW_FILE_STORE": "true",  # a folder; MLflow 3.17 wants to be told
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(PATIENCE),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # by default a server that is gone holds the search for many minutes
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Guarded(Callback):
    """Hands a logger the metrics of each trial and how it ended. The first error of the logger is told, and it is left out from then on:
    Tune would end the search. So is one that is too slow.
    """

    def __init__(self, name: str, make):
        self.name, self.make, self.logger = name, make, None
        self.began, self.took = time.time(), 0.0

    @contextlib.contextmanager
    def guard(self):
        """Around each use of the logger."""
        called_at = time.time()
        try:
            yield
            self.took += time.time() - called_at
            if self.took > PATIENCE + SHARE * (time.time() - self.began):
                raise TimeoutError(f"it has taken {self.took:.0f} of {time.time() - self.began:.0f} s")
        except Exception as error:
            self.logger = None
            reason = " ".join([type(error).__name__, *str(error).split()])[:300]
            print(f"WARNING: nothing more goes to --report_to {self.name}: {reason}", flush=True)

    def call(self, method: str, *args, **kwargs) -> None:
        if self.logger:
            with self.guard():
                getattr(self.logger, method)(*args, **kwargs)

    def setup(self, **info):
        with self.guard():
            self.logger = self.make()
            self.logger.setup(**info)

    def on_trial_start(self, iteration, trials, trial, **info):
        self.call("log_trial_start", trial)

    def on_trial_result(self, iteration, trials, trial, result, **info):
        values = {name: result.get(name) for name in (*METRICS, *TRAINING)}
        metrics = {name: value for name, value in values.items() if value is not None and not math.isnan(value)}
        if metrics:  # else it failed, or was saved on the way
            self.call("log_trial_result", iteration, trial, {"training_iteration": result["training_iteration"], **metrics})

    def on_trial_complete(self, iteration, trials, trial, **info):
        self.call("log_trial_end", trial, failed="failed" in (trial.last_result or {}))

    def on_trial_error(self, iteration, trials, trial, **info):
        self.call("log_trial_end", trial, failed=True)

    def on_experiment_end(self, trials, **info):
        self.call("on_experiment_end", trials)


def tracker(report_to: str, run_dir: Path) -> list[Callback]:
    """Callbacks for Tune: one for a tracker, none for "none". The tracker's package must be there, see checks.check_tracker.

    A trial is one run in a tracker, also one that was paused or resumed. Where it goes is for the tracker's own environment variables to
    say; by default MLflow writes to <run_dir>/mlruns, and wandb to the project bloom_bohb, with its files in <run_dir>/wandb.
    """
    makers = {"tensorboard": tensorboard_logger, "mlflow": mlflow_logger, "wandb": wandb_logger}
    return [Guarded(report_to, lambda: makers[report_to](run_dir))] if report_to in makers else []


def tensorboard_logger(run_dir: Path) -> LoggerCallback:
    class Logger(TBXLoggerCallback):
        """Writes to the run's folder at once, where Ray's writes to another one, of which an interruption leaves no copy."""

        def log_trial_start(self, trial):
            if trial not in self._trial_writer:
                self._trial_writer[trial] = self._summary_writer_cls(trial.path, flush_secs=30)
            self._trial_result[trial] = {}

    return Logger()


def mlflow_logger(run_dir: Path) -> LoggerCallback:
    for name, value in MLFLOW.items():
        os.environ.setdefault(name, value)
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    class Logger(MLflowLoggerCallback):
        """Goes on with the run of a trial after a resume, where Ray's would begin another."""

        def log_trial_start(self, trial):
            if trial not in self._trial_runs:
                client = self.mlflow_util._get_client()
                for run in client.search_runs([self.mlflow_util.experiment_id], f"tags.trial_name = '{trial}'"):
                    self._trial_runs[trial] = run.info.run_id
            super().log_trial_start(trial)

        def log_trial_end(self, trial, failed=False):
            self.log_trial_start(trial)  # after a resume, the loser of a rung ends without ever being started
            super().log_trial_end(trial, failed)

    return Logger(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", (run_dir / "mlruns").as_uri()), experiment_name=run_dir.name)


def wandb_logger(run_dir: Path) -> LoggerCallback:
    import wandb
    from ray.air.integrations.wandb import WandbLoggerCallback

    class Logger(WandbLoggerCallback):
        """Holds all runs in this process. Ray's has four processes, 290 MB, for each trial that has not ended, those of a whole rung at a
        time, on the head; and when a search is interrupted it waits for trials that do not end.
        """

        def setup(self, **info):
            super().setup(**info)
            self.runs = {}

        def _start_logging_actor(self, trial, exclude_results, **what):
            if trial not in self.runs:
                self.runs[trial] = wandb.init(**what)

        def log_trial_result(self, iteration, trial, result):
            self.runs[trial].log(result, step=result["training_iteration"])

        def log_trial_end(self, trial, failed=False):
            if trial in self.runs:  # after a resume, the loser of a rung ends without ever being started
                self.runs.pop(trial).finish(exit_code=int(failed))

        def on_experiment_end(self, trials, **info):
            for run in self.runs.values():  # the search was interrupted
                run.finish()

    settings = wandb.Settings(
        silent=True, console="off", x_disable_stats=True, init_timeout=PATIENCE, finish_timeout=PATIENCE, finish_timeout_raises=True
    )
    return Logger(
        project=os.environ.get("WANDB_PROJECT", "bloom_bohb"), group=run_dir.name, dir=str(run_dir), settings=settings,
        reinit="create_new", resume="allow",  # a trial goes on with its run when the search is resumed
    )  # fmt: skip
