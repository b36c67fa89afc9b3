"""Keeps the tables of a run up to date while it runs, and prints what happens."""

import math
import os
import shutil
import time
from pathlib import Path

from ray.tune import Callback

from hpo.files import columns, write_csv
from hpo.results.tables import COLUMNS, ENDED, ITERATION_FIELDS, METRICS, TRAINING, TRIAL_FIELDS, _show, badness, rank

USUAL = {"grad_norm": (1e-4, 1e3), "loss_scale": (16, 2**32)}  # of a fine-tuning; a trial outside is warned about


class Record(Callback):
    """Keeps trials.csv and iterations.csv up to date, prints a line a rung, deletes checkpoints nobody will need.

    Args:
        run_dir: the run's folder.
        searcher: its `suggested` tells which configurations came from the model.
        metric, num_samples, gpus_per_trial: as in the arguments of the run.
        first_rung: when the first so many trials have all failed, the search is given up.
        save_state: called with the record's own state and the live trials, see `write`, whenever something has changed.
    """

    def __init__(self, run_dir: Path, searcher, metric, num_samples, gpus_per_trial, first_rung=10**9, save_state=lambda **state: None):
        self.run_dir, self.searcher, self.metric, self.save_state = run_dir, searcher, metric, save_state
        self.num_samples, self.gpus_per_trial, self.first_rung = num_samples, gpus_per_trial, first_rung
        self.started: set[str] = set()
        self.reached: dict[str, int] = {}  # last iteration that a trial reported
        self.trials: dict[str, dict] = {}  # rows of trials.csv
        self.iterations: list[dict] = []  # rows of iterations.csv
        self.configs: dict[str, dict] = {}  # train_loop_config of each trial
        self.best: str | None = None  # the trial with the best result so far, its checkpoint is kept
        self.doomed: set[str] = set()  # ended trials whose checkpoints go with the next save
        self.referenced: dict[str, str] = {}  # checkpoints that the last saved state needs
        self.started_at = self.written_at = time.time()
        self.changed = False
        self.give_up: Exception | None = None  # why the search ends
        self.warned: set[str] = set()  # trials with unusual gradients
        self.pace = 0.0  # seconds between two saves, at least

    def get_state(self) -> dict:
        kept = {name: getattr(self, name) for name in ("trials", "iterations", "configs", "best", "referenced")}
        return kept | {"seconds": time.time() - self.started_at}

    def set_state(self, state: dict, live: set[str]) -> None:
        """Goes on from a state: what it shows as running has been interrupted, and its time goes on. What is not live and not ended was
        saved between the report that ended it and Tune's word of its end."""
        state = dict(state)
        self.started_at = time.time() - state.pop("seconds")
        for name, value in state.items():
            setattr(self, name, value)
        self.started = set(self.trials)
        for trial_id, row in self.trials.items():
            if row["status"] not in ENDED and trial_id not in live:
                row["status"] = "stopped"
            elif row["status"] == "running":
                row["status"] = "paused"

    # -- what Tune calls ----------------------------------------------------------------------------------------------

    def on_trial_start(self, iteration, trials, trial, **info):
        row = self.row(trial)
        row["resumes"] += trial.trial_id in self.started
        self.started.add(trial.trial_id)
        self._becomes(row, "running")

    def row(self, trial) -> dict:
        """The trial's row of trials.csv. Metrics and training_iteration are those of the last rung that it came to."""
        if trial.trial_id not in self.trials:
            searched = self.configs[trial.trial_id] = trial.config["train_loop_config"]
            self.trials[trial.trial_id] = {
                "trial_id": trial.trial_id,
                **{COLUMNS.get(name, name): value for name, value in searched.items()},
                **dict.fromkeys(METRICS),
                "training_iteration": 0,
                "status": "pending",
                "model_based": self.searcher.suggested[trial.trial_id]["model_based"],
                "resumes": 0,
                "gpu_minutes": 0.0,
            }
        return self.trials[trial.trial_id]

    def on_trial_result(self, iteration, trials, trial, result, **info):
        row, done = self.row(trial), result["training_iteration"]
        metrics = {name: result.get(name) for name in METRICS}
        self.changed = True
        if result.get("failed"):
            self._failed(row, result["failed"])
            return
        if result.get("storage"):
            self.give_up = OSError(result["storage"])
            return
        if result.get("setup"):
            self.give_up = RuntimeError(result["setup"])
            return
        row["gpu_minutes"] += (result["ended_at"] - result["started_at"]) / 60 * self.gpus_per_trial
        if result.get("partial"):  # saved on the way, before a planned stop
            row["status"] = "paused"
            return
        self.reached[trial.trial_id] = done
        more = {key: result.get(key) for key in ("started_at", "ended_at", "node", *TRAINING)}
        self.iterations.append({"trial_id": trial.trial_id, "training_iteration": done, **metrics, **more})
        unusual = unusual_gradients(result)
        if unusual and trial.trial_id not in self.warned:
            self.warned.add(trial.trial_id)
            print(f"WARNING: trial {trial.trial_id}, iteration {done}: {unusual}", flush=True)
        rungs = trial.config["rungs"]
        if done in rungs:
            row.update(metrics, training_iteration=done, status="paused" if done < rungs[-1] else "completed")
            if self.best is None or rank(row, self.metric) < rank(self.trials[self.best], self.metric):
                if math.isfinite(badness(row, self.metric)):
                    if self.best and self.trials[self.best]["status"] in ENDED:
                        self.doomed.add(self.best)
                    self.best = trial.trial_id
            if row["status"] == "completed" and self.best != trial.trial_id:
                self.doomed.add(trial.trial_id)
            self.say(f"{self._describe(row)} at {done}/{rungs[-1]}")

    def on_checkpoint(self, **info):  # after its result: before, a state has the checkpoint before it
        self.changed = True

    def on_trial_complete(self, iteration, trials, trial, **info):
        self._becomes(self.row(trial), "stopped")
        self._end(trial)

    def on_trial_recover(self, iteration, trials, trial, **info):
        row = self.row(trial)
        self._becomes(row, "pending")
        reason = last_line(Path(trial.error_file)) if trial.error_file else "its process has ended"
        self.say(f"{self._describe(row)} goes on from iteration {row['training_iteration']}: {reason}")

    def on_trial_error(self, iteration, trials, trial, **info):
        file = trial.error_file and Path(trial.error_file)
        self._failed(self.row(trial), f"{last_line(file)} ({file})" if file and file.exists() else "its process could not be started")
        self._end(trial)

    def _becomes(self, row: dict, status: str) -> bool:
        """Sets the status, and says whether it has: a trial that its own report has ended stays so, whatever becomes of its process."""
        self.changed = True
        if row["status"] in ("completed", "failed"):
            return False
        row["status"] = status
        return True

    def _failed(self, row: dict, reason: str):
        if self._becomes(row, "failed"):
            self.say(f"{self._describe(row)} failed after {self.reached.get(row['trial_id'], 0)} iterations: {reason}")
        first = list(self.trials.values())[: self.first_rung]
        if len(first) == self.first_rung and all(r["status"] == "failed" for r in first):
            self.give_up = RuntimeError(f"all {len(first)} trials of the first rung failed, the last one: {reason}")

    def _end(self, trial):
        if trial.trial_id != self.best:
            self.doomed.add(trial.trial_id)
        self.changed = True

    def on_step_end(self, iteration, trials, **info):  # several times a second, between two events
        if self.give_up:  # raised in answer to an event it would come out of Tune as text in an exception of Tune's own
            self.write(trials)
            raise self.give_up
        if self.changed and time.time() - self.written_at > self.pace:
            self.write(trials)

    # -----------------------------------------------------------------------------------------------------------------

    def write(self, trials: list) -> None:
        """Saves the state of the search, then removes the checkpoints of trials that have ended, and those that a running trial needs
        neither by this state nor by the one before, then writes both tables.
        """
        begun = time.time()
        live = [
            {
                "trial_id": trial.trial_id,
                "config": trial.config,
                "status": trial.status,
                "checkpoint": os.path.relpath(trial.checkpoint.path, self.run_dir) if trial.checkpoint else None,
                "training_iteration": (trial.last_result or {}).get("training_iteration", 0),
            }
            for trial in trials
            if not trial.is_finished()
        ]
        before, self.referenced = self.referenced, {t["trial_id"]: t["checkpoint"] for t in live if t["checkpoint"]}
        doomed, self.doomed = self.doomed, set()
        self.save_state(record=self.get_state(), live=live)
        for trial_id in doomed - {self.best}:
            for folder in [*self.checkpoints(trial_id), *(self.run_dir / "ray" / trial_id).glob("saving-*")]:
                shutil.rmtree(folder, ignore_errors=True)
        for trial_id, path in self.referenced.items():
            for folder in self.checkpoints(trial_id):
                if folder.name < Path(path).name and str(folder.relative_to(self.run_dir)) != before.get(trial_id):
                    shutil.rmtree(folder, ignore_errors=True)
        self.write_tables()
        self.changed, self.written_at = False, time.time()
        self.pace = 4 * (self.written_at - begun)  # a search of thousands of trials must not spend its time on it

    def checkpoints(self, trial_id: str) -> list[Path]:
        """The checkpoints of a trial on disk, oldest first."""
        return sorted((self.run_dir / "ray" / trial_id).glob("checkpoint_*"))

    def tidy(self, needed: list[str | None]) -> None:
        """Removes all checkpoints but those needed (paths in the run's folder) and, before best_model is there, the best trial's."""
        for folder in self.run_dir.glob("ray/*/saving-*"):  # of a process that was lost
            shutil.rmtree(folder, ignore_errors=True)
        for folder in self.run_dir.glob("ray/*/checkpoint_*"):
            best = folder.parent.name == self.best and not (self.run_dir / "best_model").exists()
            if not best and str(folder.relative_to(self.run_dir)) not in needed:
                shutil.rmtree(folder, ignore_errors=True)

    def write_tables(self) -> None:
        write_csv(self.run_dir / "trials.csv", TRIAL_FIELDS, list(self.trials.values()))
        write_csv(self.run_dir / "iterations.csv", ITERATION_FIELDS, self.iterations)

    def unfinished(self) -> bool:
        """Whether trials are missing or not at their end, as after an interruption."""
        ended = sum(row["status"] in ENDED for row in self.trials.values())
        return ended < self.num_samples

    def facts(self) -> dict:
        """How long the search took, parts of an interrupted one added up, and where it ran."""
        return {"seconds": time.time() - self.started_at, "nodes": sorted({row["node"] for row in self.iterations})}

    def say(self, what: str) -> None:
        counts = dict.fromkeys(("pending", "running", "paused", *ENDED), 0)
        for row in self.trials.values():
            counts[row["status"]] += 1
        counted = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        print(f"[{time.time() - self.started_at:6.0f} s] {what} | {counted} of {self.num_samples}", flush=True)

    def _describe(self, row: dict) -> str:
        source = "model" if row["model_based"] else "random"
        names = [key for key in row if key not in TRIAL_FIELDS or key in COLUMNS.values()]
        config = " ".join(f"{key} {_show(key, row[key])}" for key in names)
        scores = " ".join(f"{key} {_show(key, row[key])}" for key in METRICS if row[key] is not None)
        return f"trial {row['trial_id']} ({config}, {source}) {scores}"


def unusual_gradients(result: dict) -> str | None:
    """What is out of all proportion in a report's gradients, in words; None where nothing is."""
    for name, (least, most) in USUAL.items():
        value = result.get(name)
        if value is not None and not least <= value <= most:  # NaN too: all steps were skipped
            return f"{name} {value:.3g} is far from what fine-tuning has ({least:g} to {most:g}); look at lr, --precision and ds_config"
    return None


class Progress(Callback):
    """Prints where the search is, one table, whenever a bracket has come to its next rung, and every ten minutes.

    Args:
        record: its rows are shown.
        scheduler: its `brackets` and `bracket_of`.
        slots: trials that can run at a time.
        iterations: of the whole search, by the plan.
        length: of the whole search, by the plan, in iterations one after another.
    """

    EVERY = 600  # seconds

    def __init__(self, record: Record, scheduler, slots: int, iterations: int, length: float):
        self.record, self.scheduler, self.slots, self.planned = record, scheduler, slots, (iterations, length)
        self.rungs: list[int] = []
        self.told_at = time.time()

    def on_step_end(self, iteration, trials, **info):
        rungs = [bracket.rung for bracket in self.scheduler.brackets]
        moved = [rung for rung, before in zip(rungs, self.rungs) if rung != before]
        self.rungs = rungs
        if moved or time.time() - self.told_at > self.EVERY and self.record.iterations:
            print(self.text(), flush=True)
            self.told_at = time.time()

    def text(self) -> str:
        rows = [["bracket", "rung at", "running", "paused", "waiting", "done", "best so far"]]
        trials, metric = list(self.record.trials.values()), self.record.metric
        for number, bracket in enumerate(self.scheduler.brackets, 1):
            mine = [row for row in trials if self.scheduler.bracket_of(row["trial_id"]) is bracket]
            if all(row["status"] in ENDED for row in mine):
                continue
            count = {status: sum(row["status"] == status for row in mine) for status in ("running", "paused", "pending")}
            best = min((badness(row, metric) for row in mine if row["training_iteration"]), default=math.inf)
            shown = _show(metric, abs(best)) if math.isfinite(best) else ""
            done = sum(row["status"] in ENDED for row in mine)
            rows.append([number, bracket.budget, *count.values(), done, shown])
        lines = ["  " + line for line in columns(rows).splitlines()]
        running = sum(row["status"] == "running" for row in trials)
        from_model = sum(row["model_based"] for row in trials)
        done = len({(row["trial_id"], row["training_iteration"]) for row in self.record.iterations})
        iterations, length = self.planned
        each = sum(row["ended_at"] - row["started_at"] for row in self.record.iterations) / max(1, len(self.record.iterations))
        left = max(0, iterations - done) / iterations * length * each
        lines.append(
            f"  {running} of {self.slots} slots busy, {from_model} of {len(trials)} suggestions by the model, "
            f"{done} of {iterations} iterations, about {left / 60:.0f} min left by the plan"
        )
        return "\n".join(lines)


def last_line(path: Path) -> str:
    """The last line of a traceback that says something."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
