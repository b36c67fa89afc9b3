"""The table in the log that says where the search is."""

import math
import time

from ray.tune import Callback

from hpo.files import columns
from hpo.results.tables import ENDED, badness, format_value
from hpo.results.trial_log import TrialLog


class ProgressPrinter(Callback):
    """Prints a table when a bracket has reached its next rung, and every ten minutes.

    Args:
        log: its rows are shown.
        scheduler: has `brackets` and `bracket_of`.
        slots: trials that can run at a time.
        iterations: of the whole search, by the plan.
        length: of the whole search, by the plan, in iterations one after another.
    """

    EVERY = 600  # seconds

    def __init__(self, log: TrialLog, scheduler, slots: int, iterations: int, length: float):
        self.log, self.scheduler, self.slots, self.planned = log, scheduler, slots, (iterations, length)
        self.rungs: list[int] = []  # of each bracket, when the table was printed last
        self.printed_at = time.time()

    def on_step_end(self, iteration, trials, **info):
        """Prints the table if it is due."""
        rungs = [bracket.rung for bracket in self.scheduler.brackets]
        moved = any(rung != before for rung, before in zip(rungs, self.rungs, strict=False))
        self.rungs = rungs
        if moved or time.time() - self.printed_at > self.EVERY and self.log.iterations:
            print(self.text(), flush=True)
            self.printed_at = time.time()

    def text(self) -> str:
        """The table, and a line on slots, suggestions, iterations and time left."""
        rows = [["bracket", "rung at", "running", "paused", "waiting", "done", "best so far"]]
        trials, metric = list(self.log.trials.values()), self.log.metric
        for number, bracket in enumerate(self.scheduler.brackets, 1):
            members = [row for row in trials if self.scheduler.bracket_of(row["trial_id"]) is bracket]
            if all(row["status"] in ENDED for row in members):
                continue
            counts = [sum(row["status"] == status for row in members) for status in ("running", "paused", "pending")]
            best = min((badness(row, metric) for row in members if row["training_iteration"]), default=math.inf)
            shown = format_value(metric, abs(best)) if math.isfinite(best) else ""
            done = sum(row["status"] in ENDED for row in members)
            rows.append([number, bracket.budget, *counts, done, shown])
        lines = ["  " + line for line in columns(rows).splitlines()]
        running = sum(row["status"] == "running" for row in trials)
        from_model = sum(row["model_based"] for row in trials)
        done = len({(row["trial_id"], row["training_iteration"]) for row in self.log.iterations})
        iterations, length = self.planned
        seconds = sum(row["ended_at"] - row["started_at"] for row in self.log.iterations)
        each = seconds / max(1, len(self.log.iterations))
        left = max(0, iterations - done) / iterations * length * each
        lines.append(
            f"  {running} of {self.slots} slots busy, {from_model} of {len(trials)} suggestions by the model, "
            f"{done} of {iterations} iterations, about {left / 60:.0f} min left by the plan"
        )
        return "\n".join(lines)
