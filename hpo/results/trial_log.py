"""The tables of a run while it runs, its log lines, and when the state is saved and checkpoints are deleted."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from ray.tune import Callback

from hpo.files import write_csv
from hpo.results import checkpoints
from hpo.results.tables import (
    COLUMNS,
    ENDED,
    ITERATION_FIELDS,
    KNOWN_SETTING,
    METRICS,
    TRAINING,
    TRIAL_FIELDS,
    V2_METRICS,
    badness,
    format_value,
    hyperparameter_columns,
    origin,
    rank,
)

# Attributes of a TrialLog that a saved state has.
SAVED = ("trials", "iterations", "configs", "best", "saved_checkpoints", "hardware")
# The usual range of values in a fine-tuning. The log warns about values outside of it.
USUAL_RANGE = {"grad_norm": (1e-4, 1e3), "loss_scale": (16, 2**32)}


class TrialLog(Callback):
    """Keeps trials.csv and iterations.csv, and prints a line when a trial reaches a rung, fails or starts again.

    Between two events of Tune it saves the state, and then deletes the checkpoints that are not needed any more.

    Args:
        run_dir: the run folder.
        searcher: its `suggested` says which hyperparameters came from the model.
        metric: trials are compared by it.
        num_samples: the number of trials of the search; math.inf while it is not known.
        gpus_per_trial: for the column gpu_minutes.
        first_rung: the number of trials in the first rung. If all of them have failed, the search ends.
        save_state: called with the state of this log and the live trials, see `live_trial`. It saves both.
    """

    def __init__(
        self,
        run_dir: Path,
        searcher,
        metric: str,
        num_samples: float,
        gpus_per_trial: float,
        first_rung: int = 10**9,
        save_state: Callable[[dict, list[dict]], None] = lambda state, live: None,
    ):
        self.run_dir, self.searcher, self.metric, self.save_state = run_dir, searcher, metric, save_state
        self.num_samples, self.gpus_per_trial, self.first_rung = num_samples, gpus_per_trial, first_rung
        self.trials: dict[str, dict] = {}  # the rows of trials.csv
        self.iterations: list[dict] = []  # the rows of iterations.csv
        self.configs: dict[str, dict] = {}  # the hyperparameters of each trial
        self.best: str | None = None  # the best trial so far; its checkpoint is kept for best_model
        self.obsolete: set[str] = set()  # ended trials; the next save deletes their checkpoints
        self.saved_checkpoints: dict[str, str] = {}  # by trial: the checkpoint in the last saved state
        self.started: set[str] = set()  # trials that have started once, so that the next start is a resume
        self.hardware: dict[str, dict] = {}  # by node, see provenance.hardware
        self.last_iteration: dict[str, int] = {}  # by trial: the last one that was reported
        self.warned: set[str] = set()  # trials with unusual gradients
        self.fatal_error: Exception | None = None  # ends the search
        self.started_at = self.saved_at = time.time()
        self.changed = False  # since the last save
        self.save_interval = 0.0  # seconds between two saves, at least

    # -- state --------------------------------------------------------------------------------------------------------

    def get_state(self) -> dict:
        """The state as plain data."""
        return {name: getattr(self, name) for name in SAVED} | {"seconds": time.time() - self.started_at}

    def set_state(self, state: dict, live: set[str]) -> None:
        """Goes on from a saved state. Trials that were running were interrupted, so they are paused now.

        Args:
            state: see `get_state`.
            live: the ids of the live trials. A trial that is neither live nor ended was saved after its final report
                and before Tune removed it.
        """
        self.started_at = time.time() - state["seconds"]
        for name in SAVED:
            if name in state:  # older states lack some
                setattr(self, name, state[name])
        self.started = set(self.trials)
        for trial_id, row in self.trials.items():
            if row["status"] not in ENDED and trial_id not in live:
                row["status"] = "stopped"
            elif row["status"] == "running":
                row["status"] = "paused"

    # -- what Tune calls ----------------------------------------------------------------------------------------------

    def on_trial_start(self, iteration, trials, trial, **info):
        """A trial starts or goes on."""
        row = self.row(trial)
        row["resumes"] += trial.trial_id in self.started
        self.started.add(trial.trial_id)
        self.set_status(row, "running")

    def on_trial_result(self, iteration, trials, trial, result, **info):
        """A trial has reported."""
        row, self.changed = self.row(trial), True
        if result.get("failed"):
            self._fail(row, result["failed"])
        elif result.get("storage"):
            self.fatal_error = OSError(result["storage"])
        elif result.get("setup"):
            self.fatal_error = RuntimeError(result["setup"])
        else:
            row["gpu_minutes"] += (result["ended_at"] - result["started_at"]) / 60 * self.gpus_per_trial
            if result.get("partial"):  # saved amid an iteration, before a planned stop
                row["status"] = "paused"
            else:
                self._add_iteration(trial, row, result)

    def on_checkpoint(self, **info):
        """A checkpoint is complete. Tune calls this after on_trial_result: a state saved in between lacks it."""
        self.changed = True

    def on_trial_complete(self, iteration, trials, trial, **info):
        """A trial has ended, or lost at its rung."""
        self.set_status(self.row(trial), "stopped")
        self._end(trial)

    def on_trial_recover(self, iteration, trials, trial, **info):
        """The worker process of a trial is lost. Tune starts the trial again."""
        row = self.row(trial)
        self.set_status(row, "pending")
        reason = last_line(Path(trial.error_file)) if trial.error_file else "its worker process has ended"
        self.log(f"{self._describe(row)} goes on from iteration {row['training_iteration']}: {reason}")

    def on_trial_error(self, iteration, trials, trial, **info):
        """A trial has failed, and Tune does not start it again."""
        file = trial.error_file and Path(trial.error_file)
        reason = "its worker process could not be started"
        if file and file.exists():
            reason = f"{last_line(file)} ({file})"
        self._fail(self.row(trial), reason)
        self._end(trial)

    def on_step_end(self, iteration, trials, **info):
        """Saves if something has changed. Tune calls this several times a second, between two events.

        Raises:
            Exception: the error that ends the search. It is raised here and not in on_trial_result, because Tune
                would wrap it in a TuneError there and lose its type.
        """
        if self.fatal_error:
            self.save(trials)
            raise self.fatal_error
        if self.changed and time.time() - self.saved_at > self.save_interval:
            self.save(trials)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def row(self, trial) -> dict:
        """The row of a trial in trials.csv. Its metrics are those of the last rung that the trial has reached."""
        if trial.trial_id not in self.trials:
            searched = self.configs[trial.trial_id] = trial.config["train_loop_config"]
            suggestion = self.searcher.suggested[trial.trial_id]
            self.trials[trial.trial_id] = {
                "trial_id": trial.trial_id,
                **{COLUMNS.get(name, name): value for name, value in searched.items()},
                **dict.fromkeys(METRICS),
                "training_iteration": 0,
                "status": "pending",
                "model_based": suggestion["model_based"],
                "resumes": 0,
                "gpu_minutes": 0.0,
                **({KNOWN_SETTING: True} if suggestion.get("known") else {}),
            }
        return self.trials[trial.trial_id]

    def set_status(self, row: dict, status: str) -> bool:
        """Sets the status of a trial. A trial that has reported its own end keeps it: its process may fail later.

        Returns:
            Whether the status was set.
        """
        self.changed = True
        if row["status"] in ("completed", "failed"):
            return False
        row["status"] = status
        return True

    def _add_iteration(self, trial, row: dict, result: dict) -> None:
        """Adds a row to iterations.csv, and at a rung updates the row of trials.csv."""
        done, metrics = result["training_iteration"], {name: result.get(name) for name in METRICS}
        metrics |= {name: result[name] for name in V2_METRICS if name in result}
        self.last_iteration[trial.trial_id] = done
        more = {key: result.get(key) for key in ("started_at", "ended_at", "node", *TRAINING)}
        self.iterations.append({"trial_id": trial.trial_id, "training_iteration": done, **metrics, **more})
        self.hardware[result["node"]] = result.get("hardware")
        unusual = unusual_gradients(result)
        if unusual and trial.trial_id not in self.warned:
            self.warned.add(trial.trial_id)
            print(f"WARNING: trial {trial.trial_id}, iteration {done}: {unusual}", flush=True)
        rungs = trial.config["rungs"]
        if done in rungs:
            row.update(metrics, training_iteration=done, status="paused" if done < rungs[-1] else "completed")
            self._compare_with_best(row)
            self.log(f"{self._describe(row)} at {done}/{rungs[-1]}")

    def _compare_with_best(self, row: dict) -> None:
        """Updates the best trial. If the other one has ended, its checkpoints are obsolete.

        Of equal trials the older one is the best, as in the table of results.
        """
        best = self.trials.get(self.best)
        better = best is None or self._place(row) < self._place(best)
        if better and math.isfinite(badness(row, self.metric)):
            if best and best["status"] in ENDED:
                self.obsolete.add(self.best)
            self.best = row["trial_id"]
        if row["status"] == "completed" and self.best != row["trial_id"]:
            self.obsolete.add(row["trial_id"])

    def _place(self, row: dict) -> tuple:
        """A sort key: the place of a trial in the table of results."""
        return *rank(row, self.metric), list(self.trials).index(row["trial_id"])

    def _fail(self, row: dict, reason: str) -> None:
        """Notes that a trial has failed. If all trials of the first rung have, the search ends."""
        if self.set_status(row, "failed"):
            done = self.last_iteration.get(row["trial_id"], 0)
            self.log(f"{self._describe(row)} failed after {done} iterations: {reason}")
        first = list(self.trials.values())[: self.first_rung]
        if len(first) == self.first_rung and all(row["status"] == "failed" for row in first):
            text = f"all {len(first)} trials of the first rung failed, the last one: {reason}"
            self.fatal_error = RuntimeError(text)

    def _end(self, trial) -> None:
        """Notes that a trial has ended."""
        if trial.trial_id != self.best:
            self.obsolete.add(trial.trial_id)
        self.changed = True

    def unfinished(self) -> bool:
        """Whether a trial has not ended or was not suggested yet, for example after an interruption."""
        return sum(row["status"] in ENDED for row in self.trials.values()) < self.num_samples

    def best_trial(self) -> dict:
        """The row of the best trial. Raises RuntimeError if no trial has a result."""
        if self.best is None:
            raise RuntimeError("no trial has reached its first rung with a finite result; the reasons are above")
        return self.trials[self.best]

    def facts(self) -> dict:
        """For run.json: how long the search took, interrupted parts included, and the nodes that it ran on."""
        nodes = sorted({row["node"] for row in self.iterations})
        return {"seconds": time.time() - self.started_at, "nodes": nodes, "hardware": self.hardware}

    # -- log lines ----------------------------------------------------------------------------------------------------

    def log(self, what: str) -> None:
        """Prints a line with the time since the start and the number of trials in each status."""
        counts = dict.fromkeys(("pending", "running", "paused", *ENDED), 0)
        for row in self.trials.values():
            counts[row["status"]] += 1
        counted = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        of = f" of {self.num_samples}" if math.isfinite(self.num_samples) else ""
        print(f"[{time.time() - self.started_at:6.0f} s] {what} | {counted}{of}", flush=True)

    def _describe(self, row: dict) -> str:
        """A trial in words: id, hyperparameters, where they came from, and metrics."""
        config = " ".join(f"{key} {format_value(key, row[key])}" for key in hyperparameter_columns([row]))
        scores = " ".join(f"{key} {format_value(key, row[key])}" for key in METRICS if row[key] is not None)
        return f"trial {row['trial_id']} ({config}, {origin(row)}) {scores}"

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, trials: list) -> None:
        """Saves the state, then deletes checkpoints that the saved state does not need, then writes the tables.

        Args:
            trials: Tune's trials.
        """
        begun = time.time()
        live = [live_trial(trial, self.run_dir) for trial in trials if not trial.is_finished()]
        before = self.saved_checkpoints
        self.saved_checkpoints = {trial["trial_id"]: trial["checkpoint"] for trial in live if trial["checkpoint"]}
        self.save_state(self.get_state(), live)
        checkpoints.delete_all(self.run_dir, self.obsolete - {self.best})
        self.obsolete.clear()
        checkpoints.delete_older(self.run_dir, self.saved_checkpoints, before)
        self.write_tables()
        self.changed, self.saved_at = False, time.time()
        # At most a fifth of the time is spent on saving, also in a search of thousands of trials.
        self.save_interval = 4 * (self.saved_at - begun)

    def write_tables(self) -> None:
        """Writes trials.csv and iterations.csv."""
        write_csv(self.run_dir / "trials.csv", TRIAL_FIELDS, list(self.trials.values()))
        write_csv(self.run_dir / "iterations.csv", ITERATION_FIELDS, self.iterations)

    def best_checkpoint(self) -> Path:
        """The last checkpoint of the best trial. Raises OSError if there is none."""
        found = checkpoints.checkpoints_of(self.run_dir, self.best)
        if not found:
            raise OSError(f"the checkpoint of the best trial is gone from {self.run_dir / 'ray' / self.best}")
        return found[-1]


def live_trial(trial, run_dir: Path) -> dict:
    """What the saved state keeps of a trial that has not ended. The checkpoint is a path in the run folder."""
    return {
        "trial_id": trial.trial_id,
        "config": trial.config,
        "status": trial.status,
        "checkpoint": os.path.relpath(trial.checkpoint.path, run_dir) if trial.checkpoint else None,
        "training_iteration": (trial.last_result or {}).get("training_iteration", 0),
    }


def unusual_gradients(result: dict) -> str | None:
    """What is unusual in the gradients of a report, in words; None if nothing is."""
    for name, (least, most) in USUAL_RANGE.items():
        value = result.get(name)
        if value is not None and not least <= value <= most:  # also NaN: all steps were skipped
            usual = f"({least:g} to {most:g})"
            return f"{name} {value:.3g} is far from what fine-tuning has {usual}; look at lr, --precision and ds_config"
    return None


def last_line(path: Path) -> str:
    """The last line of a traceback that is not empty."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
