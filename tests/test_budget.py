"""Searches that end by a budget of GPU-hours or hours: on simulated time, and through the command line."""

import io
import json
import math
import random
import signal
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import tune
from rich.console import Console

from conftest import run_here, run_script
from hpo import arguments, files
from hpo.bohb.scheduler import HyperBandForBOHB
from hpo.bohb.searcher import TuneBOHB
from hpo.plan.budget import Budget, MeasuredPace
from hpo.plan.plan import forecast
from hpo.results import terminal
from hpo.results.progress import ProgressPrinter
from simulation import Simulation
from test_run import cut

MAX_T, REDUCTION_FACTOR = 50, 4
SPACE = {"lr": tune.loguniform(5e-6, 2e-4)}
PLAN = ["--plan", "--seconds_per_iteration", 60, "--max_concurrent_trials", 4]


class Searched:
    """A simulated search with a budget. Its trials differ in speed, and so do the iterations of a trial."""

    def __init__(self, seed: int, slots: int, budget: float, spread: float, crash: bool = False):
        self.rng, self.slots, self.budget, self.spread = random.Random(seed), slots, budget, spread
        self.speeds, self.simulation, self._iterations = {}, None, []
        searcher, scheduler = self.parts()
        crashes = (lambda *_: "crash" if self.rng.random() < 0.02 else None) if crash else (lambda *_: None)
        self.simulation = Simulation(
            searcher, scheduler, math.inf, lambda *_: self.rng.random(), slots, MAX_T, self.seconds, fault=crashes
        )

    @property
    def iterations(self) -> list[dict]:
        """As those of a TrialLog."""
        names = ("started_at", "ended_at", "trial_id", "training_iteration", "loss")
        for report in self.simulation.reports[len(self._iterations) :]:
            self._iterations.append(dict(zip(names, report, strict=True)))
        return self._iterations

    def parts(self):
        searcher = TuneBOHB(seed=self.rng.randrange(10**6))
        searcher.set_search_properties("loss", "min", SPACE)
        searcher.slots = self.slots
        scheduler = HyperBandForBOHB(metric="loss", mode="min", max_t=MAX_T, reduction_factor=REDUCTION_FACTOR)
        pace, left = MeasuredPace(self, scheduler), lambda: self.budget - self.simulation.now
        searcher.allows_trial = Budget(scheduler, lambda: self.slots, left, pace).allows_trial
        return searcher, scheduler

    def seconds(self, config: dict, t: int) -> float:
        speed = self.speeds.setdefault(config["lr"], self.rng.uniform(1 - self.spread, 1 + self.spread))
        return speed * self.rng.uniform(0.9, 1.1) * (2 if t in (3, 12, 50) else 1)  # EM and F1 at rungs

    def check(self) -> None:
        """Each trial ended at a rung of its bracket; one of each bracket was trained to the end; the time is right."""
        last, scheduler = {}, self.simulation.scheduler
        for _, _, trial_id, iteration, _ in self.simulation.reports:
            last[trial_id] = iteration
        assert len(last) == self.simulation.search_alg.created
        for bracket in scheduler.brackets:
            members = [trial_id for trial_id in last if scheduler.bracket_of(trial_id) is bracket]
            assert {last[trial_id] for trial_id in members} <= set(bracket.budgets())
            assert max(last[trial_id] for trial_id in members) == MAX_T
            sizes = [sum(last[t] >= budget for t in members) for budget in bracket.budgets()]
            n = bracket.added
            assert sizes == [math.ceil(n / REDUCTION_FACTOR**i - 1e-9) for i in range(len(sizes))]
        assert self.simulation.now <= 1.05 * self.budget


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6), slots=st.integers(1, 8), full=st.floats(2.5, 6), spread=st.sampled_from([0, 0.2, 0.4])
)
def test_a_search_ends_within_its_budget_and_abandons_no_trial(seed, slots, full, spread):
    """The budget is `full` times the duration of a full training; a trial can be up to 2.3 times as slow as another."""
    one = MAX_T + 3  # seconds of a full training: its three rungs take twice as long
    search = Searched(seed, slots, full * one, spread)
    search.simulation.run()
    search.check()
    # What is left is no room for a full training, with what trials may differ by.
    assert search.budget - search.simulation.now < one * (1 + spread) * 1.1 + 3


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), slots=st.integers(1, 6), reports=st.integers(1, 150), saved=st.booleans())
def test_a_budget_survives_an_interruption(seed, slots, reports, saved):
    """Also a kill, after which the work since the last rungs is done again within the budget."""
    search = Searched(seed, slots, 300, 0.2)
    search.simulation.run(max_reports=reports)
    search.simulation = search.simulation.restart(*search.parts(), saved=saved)
    search.simulation.run()
    search.check()


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), slots=st.integers(1, 6))
def test_a_budget_with_trials_that_fail(seed, slots):
    search = Searched(seed, slots, 300, 0.2, crash=True)
    search.simulation.run()
    assert search.simulation.now <= 1.05 * search.budget


@pytest.mark.parametrize(("slots", "full"), [(1, 3), (4, 2), (16, 4)])
def test_the_plan_is_the_search_that_fits(slots, full):
    """As many trials as end within the budget; one more does not."""
    found = forecast({"train_loop_config": SPACE}, None, MAX_T, REDUCTION_FACTOR, slots, length=full * MAX_T)
    assert found.time <= full * MAX_T < found.time + MAX_T
    assert sum(iterations for *_, iterations in found.rungs) == found.iterations
    begun = {number: trials for number, _, trials, _ in reversed(found.rungs)}  # at the first rung of each bracket
    assert sum(begun.values()) == found.trials


def test_plan_of_a_budget():
    done = run_here(*PLAN, "--gpu_hours", 20)
    assert done.returncode == 0, done.stderr
    assert (
        "\nwithin 20 GPU-hours: 1 whole band of 34 trials and 32 trials of a band of 34; 14 trials are " in done.stdout
    )
    assert "\n66 trials, 1036 iterations: as many as 20.7 full trainings of 50\n" in done.stdout
    assert "\na slot takes 1 GPU: 18.53 GPU-hours\n" in done.stdout
    done = run_here(*PLAN, "--gpu_hours", 20, "--hours", 3, "--num_samples", 40)
    assert "\nwithin 20 GPU-hours and 3 hours: 1 whole band of 34 trials and " in done.stdout
    done = run_here(*PLAN, "--gpu_hours", 1e6)
    what = "1e+06 GPU-hours: on 4 slots more than 100,000 iterations, too many for a plan"
    assert (done.returncode, done.stderr) == (2, f"raytune_bayesian.py: error: {what}\n")
    done = run_here(*PLAN, "--hours", 0.5)
    assert done.returncode == 2 and done.stdout == ""
    what = "0.5 hours: on 4 slots no trial ends within it: a full training takes 0.833 hours"
    assert done.stderr == f"raytune_bayesian.py: error: {what}\n"


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--gpu_hours", 0], "--gpu_hours 0.0: must be above 0"),
        (["--hours", "nan"], "--hours nan: must be above 0"),
        (["--plan", "--gpu_hours", 1], "--plan: 1 GPU-hours: needs --seconds_per_iteration or --from_check"),
    ],
)
def test_bad_budgets(flags, what, monkeypatch):
    with pytest.raises(arguments.BadInput) as error:
        arguments.parse("", list(map(str, flags)))
    assert str(error.value) == what


def test_progress_of_a_budget(monkeypatch):
    row = {"trial_id": "a", "status": "running", "model_based": False, "training_iteration": 1, "eval_loss": 2.0}
    log = SimpleNamespace(trials={"a": row}, iterations=[row], metric="eval_loss", started_at=time.time() - 60)
    printer = ProgressPrinter(log, SimpleNamespace(brackets=[]), 2, 34, 10, budget_left=lambda: 180)
    assert printer.totals().endswith("0 of 1 suggestions by the model, 1 iterations, 3 min of the budget left")
    assert printer.share_done() == pytest.approx(0.25, abs=0.01)
    monkeypatch.setenv("COLUMNS", "80")
    display, console = terminal.Display(), Console(width=80, record=True, file=io.StringIO())
    display.lines = f"{printer.table()}\n{printer.totals()}"
    console.print(display)
    shown = console.export_text()
    assert "bracket" in shown and "budget left" in " ".join(shown.split()) and max(map(len, shown.splitlines())) < 80


@pytest.mark.slow
def test_a_search_with_a_budget_and_a_larger_one(tiny_model, tiny_squad, tmp_path):
    """Two seconds are too few for a trial, so each slot gets one. Twelve minutes are enough for all that are asked for.

    The search is interrupted in its only trial.
    """
    small = ["--max_t", 4, "--num_train_epochs", 0.2, "--max_eval_samples", 10, "--max_concurrent_trials", 1]
    folder, name = tmp_path / "x", ["--output_dir", tmp_path, "--run_name", "x"]
    data = ["--model", tiny_model, "--dataset", tiny_squad, "--report_to", "none"]
    code, out = cut([*data, *small, *name, "--hours", 0.0005], 1, signal.SIGUSR1)
    assert code == 1 and "search: as many trials as 0.0005 hours allow on 1 slots" in out, out
    done = run_script(*name, "--resume", "--repeats", 1)  # for which the used up budget does not count
    assert done.returncode == 0 and "Winner's curse" in done.stdout, done.stderr
    run, (trial,) = json.loads((folder / "run.json").read_text()), files.read_csv(folder / "trials.csv")
    assert run["status"] == "done" and run["arguments"]["num_samples"] is None
    assert trial["status"] == "completed" and trial["training_iteration"] == 4
    more = run_script(*name, "--resume", "--hours", 0.2, "--num_samples", 3)
    assert more.returncode == 0, more.stderr
    assert "search: 3 trials at most, and as many as 0.2 hours allow" in more.stdout
    assert "Best Trial Result:" in more.stdout
    rows = files.read_csv(folder / "trials.csv")
    assert len(rows) == 3 and {row["status"] for row in rows} <= {"completed", "stopped"}
    shown = ("trial_id", "learning_rate", "status", "training_iteration")
    assert [rows[0][key] for key in shown] == [trial[key] for key in shown]
