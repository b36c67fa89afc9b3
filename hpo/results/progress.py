"""The progress table in the log: what each bracket does, and how much of the search is left."""

import math
import time
from collections.abc import Callable

from ray.tune import Callback

from hpo.files import columns
from hpo.results import terminal
from hpo.results.tables import ENDED, badness, format_value
from hpo.results.trial_log import TrialLog


class ProgressPrinter(Callback):
    """Prints the progress table when a bracket has reached its next rung, and every ten minutes.

    On a terminal it is always shown below the log, and not printed.

    Args:
        log: its trials and iterations are shown.
        scheduler: a HyperBandForBOHB; its `brackets` and `bracket_of` are used.
        slots: the number of trials that can run at a time.
        iterations: the number of iterations of the whole search, by the plan.
        length: the duration of the whole search, by the plan, in iterations one after another.
        budget_left: called for the seconds that are left of a budget. None: the search has no budget.
    """

    EVERY = 600  # seconds

    def __init__(
        self,
        log: TrialLog,
        scheduler,
        slots: int,
        iterations: int,
        length: float,
        budget_left: Callable[[], float] | None = None,
    ):
        self.log, self.scheduler, self.slots, self.budget_left = log, scheduler, slots, budget_left
        self.iterations, self.length = iterations, length
        self.rungs: list[int] = []  # of each bracket, at the last call
        self.printed_at = time.time()

    def on_step_end(self, iteration, trials, **info):
        """Prints the table if it is due. Tune calls this several times a second."""
        if terminal.display:
            if time.time() > self.printed_at + 1:
                terminal.display.lines, terminal.display.done = f"{self.table()}\n{self.totals()}", self.share_done()
                self.printed_at = time.time()
            return
        rungs = [bracket.rung for bracket in self.scheduler.brackets]
        moved = any(rung != before for rung, before in zip(rungs, self.rungs, strict=False))
        self.rungs = rungs
        if moved or (time.time() - self.printed_at > self.EVERY and self.log.iterations):
            print(f"{self.table()}\n{self.totals()}", flush=True)
            self.printed_at = time.time()

    def on_experiment_end(self, trials, **info):
        """The search has ended."""
        if terminal.display:
            terminal.display.lines = ""

    def share_done(self) -> float:
        """The share of the search's iterations that are done, or of its budget."""
        if self.budget_left:
            left, spent = max(0.0, self.budget_left()), time.time() - self.log.started_at
            return spent / (spent + left)
        return min(1.0, len(self.log.iterations) / self.iterations)

    def table(self) -> str:
        """A row for each bracket that has trials left."""
        rows = [["bracket", "rung at", "running", "paused", "waiting", "done", "best so far"]]
        trials, metric = self.log.trials.values(), self.log.metric
        for number, bracket in enumerate(self.scheduler.brackets, 1):
            members = [row for row in trials if self.scheduler.bracket_of(row["trial_id"]) is bracket]
            done = sum(row["status"] in ENDED for row in members)
            if done == len(members):
                continue
            counts = [sum(row["status"] == status for row in members) for status in ("running", "paused", "pending")]
            best = min((badness(row, metric) for row in members if row["training_iteration"]), default=math.inf)
            shown = format_value(metric, abs(best)) if math.isfinite(best) else ""
            rows.append([number, bracket.budget, *counts, done, shown])
        return "\n".join("  " + line for line in columns(rows).splitlines())

    def totals(self) -> str:
        """A line with slots, suggestions of the model, iterations and the time that is left."""
        trials, reports = self.log.trials.values(), self.log.iterations
        running = sum(row["status"] == "running" for row in trials)
        from_model = sum(row["model_based"] for row in trials)
        done = len({(row["trial_id"], row["training_iteration"]) for row in reports})  # some are run again
        text = f"  {running} of {self.slots} slots busy, {from_model} of {len(trials)} suggestions by the model, {done}"
        if self.budget_left:
            return f"{text} iterations, {max(0, self.budget_left()) / 60:.0f} min of the budget left"
        seconds = sum(row["ended_at"] - row["started_at"] for row in reports) / max(1, len(reports))
        left = max(0, self.iterations - done) / self.iterations * self.length * seconds
        return f"{text} of {self.iterations} iterations, about {left / 60:.0f} min left by the plan"
