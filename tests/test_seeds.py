"""--finish and --repeats: trainings that follow a search."""

import json
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import run_script
from faulty import write_script
from hpo import arguments, errors, files
from hpo.cluster.repeats import run as train_repeats
from hpo.results import seeds, tables
from test_run import cut


def row(trial_id="a", seed=None, of="a", **metrics) -> dict:
    found = {"trial_id": trial_id, "learning_rate": 1e-5, "batch_size": 1, "weight_decay": 0.0}
    found |= {"seed": seed, "repeat_of": of} if seed else {}
    found |= dict.fromkeys(tables.METRICS, 0.5) | {"training_iteration": 9, "status": "completed"}
    return found | {"model_based": False} | metrics


def said(folder, trials, repeats, metric="eval_loss", baseline=None) -> list[str]:
    """What log and report say of a run with these rows of trials.csv and repeats/trials.csv."""
    (folder / seeds.FOLDER).mkdir(exist_ok=True)
    files.write_csv(folder / seeds.FOLDER / "trials.csv", tables.TRIAL_FIELDS, repeats)
    return seeds.in_sentences(folder, trials, metric, baseline)


def test_one_more_training_is_in_95_of_100_intervals():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(1000):
        *values, another = rng.normal(0.8, 0.02, 4)
        low, high = seeds.next_training(values)
        inside += low <= another <= high
    assert 0.93 <= inside / 1000 <= 0.97


def test_what_is_said(tmp_path):
    """Also where the ids of trials look like numbers."""
    best_id, base_id = "7968e292", "12345678"
    trials = [row(best_id, eval_loss=0.5), row(base_id, eval_loss=0.9), row("stopped", training_iteration=3)]
    assert seeds.in_sentences(tmp_path, trials, "eval_loss", base_id) == []
    repeats = [row(f"r{i}", 43 + i, best_id, eval_loss=value) for i, value in enumerate([0.6, 0.8, 0.7])]
    best, curse = said(tmp_path, trials, [*repeats, row("r4", 99, best_id, status="running")], baseline=base_id)
    assert best.startswith(
        "Repeats of the best trial (7968e292) with seed 43, 44, 45: "
        "eval_loss 0.6000, 0.8000, 0.7000 (mean 0.7000, standard deviation 0.1000); exact_match 0.5000"
    )
    assert "0.5000, is the best of 3 trials (2 of them were trained as far). It is 0.2000 better than the mean" in curse
    half = 4.3027 * 0.1 * math.sqrt(4 / 3)  # of Student's t with 2 degrees of freedom
    inside = f"from {0.7 - half:.4f} to {0.7 + half:.4f} (95 % prediction interval): the best trial is inside, so no"
    assert inside in curse
    others = [row(str(i), 43 + i, base_id, eval_loss=value) for i, value in enumerate([0.9, 1.0, 1.1])]
    *_, base, curse, gain = said(tmp_path, trials, repeats + others, baseline=base_id)
    assert base.startswith("Repeats of the baseline (12345678) with seed 43, 44, 45: eval_loss 0.9000, 1.0000, 1.1000")
    half = 4.3027 * 0.1 / math.sqrt(3)  # of the differences -0.3, -0.2 and -0.4
    ends = f"[{-0.3 - half:.4f}, {-0.3 + half:.4f}]"
    assert f"the same seed: eval_loss -0.3000 {ends} on average (3 seeds, 95 % t interval of what other" in gain
    assert gain.endswith(" This favours the best trial, which was selected on these questions.")


def test_a_metric_where_more_is_better(tmp_path):
    """The interval of a share stays a share."""
    repeats = [row("r", 43, exact_match=0.75), row("s", 44, exact_match=0.77)]
    _, curse = said(tmp_path, [row(exact_match=0.8)], repeats, "exact_match")
    assert "It is 0.0400 better than the mean of its 2 repeats" in curse and "from 0.5399 to 0.9801" in curse
    _, curse = said(tmp_path, [row(exact_match=0.7)], repeats, "exact_match")
    assert "It is 0.0600 worse than" in curse
    repeats = [row("r", 43, exact_match=0.0), row("s", 44, exact_match=0.9)]
    assert "from 0.0000 to 1.0000" in said(tmp_path, [row()], repeats, "exact_match")[1]


def test_no_loss_is_expected_below_zero(tmp_path):
    repeats = [row("r", 43, eval_loss=0.3428), row("s", 44, eval_loss=0.3808)]
    _, curse = said(tmp_path, [row(eval_loss=0.9)], repeats)
    assert "from 0.0000 to 0.7799" in curse and curse.endswith(": the best trial is worse than that.")


def test_repeats_of_an_earlier_best_trial_stay(tmp_path):
    repeats = [row("r", 43, "old", eval_loss=0.6), row("s", 43, "a", eval_loss=0.6)]
    best, old, _ = said(tmp_path, [row(), row("old", eval_loss=0.9)], repeats)
    assert best.startswith("Repeats of the best trial (a)") and old.startswith("Repeats of an earlier best trial (old)")


def test_a_best_trial_that_was_stopped_is_not_compared_with_its_repeats(tmp_path):
    """All that were trained to the end have failed."""
    failed = row("b", training_iteration=0, status="failed", eval_loss=None, exact_match=None, f1=None)
    trials = [row(training_iteration=3, status="stopped"), failed]
    (best,) = said(tmp_path, trials, [row("r", 43), row("s", 44)])
    assert best.startswith("Repeats of the best trial (a)")


def test_repeats_whose_state_cannot_be_read_are_refused(tmp_path):
    """The search and its test are done: the line says what to do, and nothing is lost."""
    (tmp_path / seeds.FOLDER).mkdir()
    (tmp_path / seeds.FOLDER / "state.jsonl").write_text("damaged")
    args = SimpleNamespace(repeats=1, baseline=False, seed=1)
    with pytest.raises(errors.BadInput, match=f"--repeats: no whole state .*; rename {tmp_path}/repeats to train"):
        train_repeats(SimpleNamespace(args=args, folder=tmp_path), SimpleNamespace(best="a"), None)


def test_few_and_failed_repeats(tmp_path):
    """One repeat has no spread; equal ones have no interval; a failed one is counted, not averaged."""
    best, curse = said(tmp_path, [row()], [row("r", 43, eval_loss=0.6)])
    assert "(mean 0.6000); exact" in best
    assert curse.endswith("It is 0.1000 better than its repeat. The spread is not known: it needs two repeats.")
    same = [row(f"r{i}", 43 + i, eval_loss=0.5) for i in range(3)]
    _, curse = said(tmp_path, [row()], same)
    assert "best of 1 trial (1 of them was trained as far). It is the same as the mean of its 3 repeats. All" in curse
    failed = row("r9", 99, status="failed", eval_loss=None, exact_match=None, f1=None)
    best, curse = said(tmp_path, [row()], [*same, failed])
    assert "with seed 43, 44, 45, 99, 1 failed: eval_loss 0.5000, 0.5000, 0.5000 (" in best
    assert "its 3 repeats" in curse
    assert said(tmp_path, [row()], [failed]) == ["Repeats of the best trial (a) with seed 99, 1 failed."]
    others = [row("s", 43, "base"), row("t", 44, "base"), row("u", 99, "base")]  # no interval without a spread
    gain = said(tmp_path, [row(), row("base")], same + others, baseline="base")[-1]
    assert "same seed: eval_loss +0.0000 on average (2 seeds, all with the same difference). This favours" in gain
    assert seeds.of_differences([(150 + i) / 200 - (149 + i) / 200 for i in range(3)]) is None  # EM of 200 questions


def test_the_baseline_that_is_the_best_trial_is_told_once(tmp_path):
    assert len(said(tmp_path, [row()], [row("r", 43), row("s", 44)], baseline="a")) == 2


@given(st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_seeds_differ_from_each_other_and_from_that_of_the_search(seed, number):
    found = seeds.of_repeats(seed, number)
    assert len({seed, *found}) == number + 1 and all(0 <= one < 2**32 for one in found)
    assert seeds.of_repeats(seed, number + 1)[:number] == found


# ---------------------------------------------------------------------------------------------------------------------
# through the command line

SMALL = ["--max_t", 4, "--reduction_factor", 2, "--num_train_epochs", 0.5, "--max_eval_samples", 10, "--num_samples", 6]


def trained(folder) -> dict[str, list[int]]:
    """The iterations of each trial, in the order of their reports."""
    found = {}
    for iteration in files.read_csv(folder / "iterations.csv"):
        found.setdefault(iteration["trial_id"], []).append(iteration["training_iteration"])
    return found


@pytest.mark.slow
def test_trials_in_doubt_are_finished_and_the_best_is_repeated(tmp_path, tiny_model, tiny_squad):
    """Killed amid the repeats, and then with more of both. With exact match and ten questions all are in doubt."""
    search = ["--model", tiny_model, "--dataset", tiny_squad, *SMALL, "--metric", "exact_match"]
    name, folder = ["--output_dir", tmp_path, "--run_name", "x"], tmp_path / "x"
    # 10 lines of trials at their rungs, 2 of trials in doubt, and 1 of a repeat
    code, out = cut([*search, *name, "--finish", 2, "--repeats", 2], 13, signal.SIGKILL)
    assert code == -signal.SIGKILL and "2 of the best trial, with seed 1042, 2042" in out, out
    finished = out.partition("--finish 2: trained to the end now: ")[2].splitlines()[0].split(", ")
    tested, begun = json.loads((folder / "run.json").read_text())["tests"], trained(folder)
    assert len(finished) == 2 and len(tested) == 1
    assert all(begun[trial_id][-4:] == [1, 2, 3, 4] and len(begun[trial_id]) > 4 for trial_id in finished)

    process = run_script(*name, "--resume", "--finish", 3)
    assert process.returncode == 0, process.stderr
    run, rows = json.loads((folder / "run.json").read_text()), files.read_csv(folder / "trials.csv")
    third = process.stdout.partition("--finish 3: trained to the end now: ")[2].splitlines()[0]
    assert third not in finished and trained(folder)[third][-4:] == [1, 2, 3, 4]
    assert run["status"] == "done" and sorted(r["status"] for r in rows) == ["completed"] * 5 + ["stopped"]
    assert {trial_id: trained(folder)[trial_id] for trial_id in begun if trial_id != third} == {
        trial_id: iterations for trial_id, iterations in begun.items() if trial_id != third
    }
    assert run["tests"][0] == tested[0] and len(run["tests"]) <= 2
    best = tables.ranked(rows, "exact_match")[0]
    repeats = [r for r in files.read_csv(folder / "repeats" / "trials.csv") if r["repeat_of"] == best["trial_id"]]
    assert [(r["status"], r["training_iteration"]) for r in repeats] == [("completed", 4)] * 2
    assert {r["seed"] for r in repeats} == {1042, 2042}
    assert len({r["eval_loss"] for r in (best, *repeats)}) == 3  # the seed has an effect
    assert "Winner's curse: the exact_match of the best trial" in process.stdout
    assert "Repeats of the best trial" in (folder / "report.html").read_text()
    assert run["repeats"]["slot_minutes"]["training"] > 0 and "slot time of the repeats: " in process.stdout
    assert not list(folder.glob("ray/*/checkpoint_*")) and not list(folder.glob("repeats/ray/*/checkpoint_*"))
    resume = ["--resume", *map(str, name)]
    for more, nothing in (
        ([], True),
        (["--repeats", "1"], True),
        (["--repeats", "3"], False),
        (["--finish", "4"], False),
    ):
        assert arguments.nothing_to_do(arguments.parse("", [*resume, *more]), run) == nothing


FAILING = """
from ray import tune

experiment.SEARCH_SPACE["train_loop_config"]["pair"] = tune.choice([(1, 2), (2, 3)])


def train(config, setup, trial):
    hyperparameters = config["train_loop_config"]
    assert isinstance(hyperparameters["pair"], tuple)  # JSON, as in the saved state, has lists only
    if "repeat_of" in hyperparameters:
        raise FloatingPointError("another seed diverges")
    experiment.train(config, setup, trial)
"""


@pytest.mark.slow
def test_repeats_that_all_fail_are_a_result(tmp_path, tiny_model, tiny_squad):
    """The run is done. The search space has tuples, which the second phase, --finish, reads from JSON."""
    script = write_script(tmp_path / "failing.py", FAILING)
    search = ["--model", tiny_model, "--dataset", tiny_squad, *SMALL[:-2], "--num_samples", 4, "--report_to", "mlflow"]
    more = ["--metric", "exact_match", "--finish", 1, "--repeats", 2, "--output_dir", tmp_path, "--run_name", "x"]
    process = run_script(*search, *more, script=script)
    assert process.returncode == 0, process.stdout + process.stderr
    out, folder = process.stdout, tmp_path / "x"
    assert "with seed 1042, 2042, 2 failed.\n" in out and "Winner's curse" not in out and "WARNING: nothing" not in out
    rows = files.read_csv(folder / "trials.csv")
    assert {row["pair"] for row in rows} <= {"(1, 2)", "(2, 3)"} and "Best Trial Result:" in out
    assert sorted(row["status"] for row in rows) == ["completed"] * 2 + ["stopped"] * 2
    repeats = files.read_csv(folder / "repeats" / "trials.csv")
    assert [row["status"] for row in repeats] == ["failed"] * 2
    assert not list(folder.glob("ray/*/checkpoint_*")) and not list(folder.glob("repeats/ray/*/checkpoint_*"))
