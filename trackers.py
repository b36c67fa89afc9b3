"""Experiment trackers that people already use: --report_to hands the trials to Ray Tune's own logger callbacks.

    mlflow        a run a trial, in MLFLOW_TRACKING_URI, by default the file mlflow.db in the run's folder: mlflow ui --backend-store-uri …;
                  a trial that goes on after --resume has a second run there
    wandb         a run a trial, in the project WANDB_PROJECT or bloom_bohb; WANDB_MODE=offline on nodes without a network
    tensorboard   needs no flag: Tune writes its logs anyway: tensorboard --logdir results/<run_name>/ray
"""

import os
from pathlib import Path

from ray.tune import Callback


class Tracker(Callback):
    """Passes on what happens to trials; when that fails it is said once, and the search goes on without the tracker."""

    def __init__(self, name: str, logger: Callback):
        self.name, self.logger, self.broken, self.known = name, logger, False, set()

    def _pass_on(self, what: str, **info) -> None:
        if not self.broken:
            try:
                getattr(self.logger, what)(**info)
            except Exception as error:
                self.broken = True
                print(f"WARNING: --report_to {self.name} goes on no longer: {type(error).__name__} {' '.join(str(error).split())[:200]}", flush=True)

    def setup(self, **info):
        self._pass_on("setup", **info)

    def on_trial_start(self, trial, **info):
        self.known.add(trial.trial_id)
        self._pass_on("on_trial_start", trial=trial, **info)

    def on_trial_result(self, **info):
        self._pass_on("on_trial_result", **info)

    def on_trial_complete(self, trial, **info):
        if trial.trial_id not in self.known:  # lost at its rung, after a --resume: it was never started here
            self.on_trial_start(trial=trial, **info)
        self._pass_on("on_trial_complete", trial=trial, **info)

    def on_trial_error(self, trial, **info):
        if trial.trial_id not in self.known:
            self.on_trial_start(trial=trial, **info)
        self._pass_on("on_trial_error", trial=trial, **info)

    def on_experiment_end(self, **info):
        self._pass_on("on_experiment_end", **info)


def trackers(name: str | None, run_dir: Path) -> list[Callback]:
    """The callbacks for a value of --report_to."""
    if name == "mlflow":
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run_dir}/mlflow.db")
        return [Tracker(name, MLflowLoggerCallback(tracking_uri=uri, experiment_name=run_dir.name))]
    if name == "wandb":
        from ray.air.integrations.wandb import WandbLoggerCallback

        return [Tracker(name, WandbLoggerCallback(project=os.environ.get("WANDB_PROJECT", "bloom_bohb"), group=run_dir.name, resume="allow"))]
    return []
