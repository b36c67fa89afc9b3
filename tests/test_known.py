"""Searches with known good settings and a baseline, through the command line."""

import json
import re
import signal
import sys

import pytest

from conftest import run_here, run_script
from faulty import write_script
from hpo import files
from hpo.results import tables
from test_run import closing_block

# One bracket of 4 trials with rungs at 1 and 4, then one of 2 trials with a rung at 4.
SMALL = ["--max_t", 4, "--reduction_factor", 4, "--num_train_epochs", 0.2, "--max_eval_samples", 10]
ONE_AT_A_TIME = ["--max_concurrent_trials", 1, "--report_to", "none"]
GOOD, BAD = {"lr": 2e-4, "per_device_bs": 2, "wd": 0.01}, {"lr": 5e-6, "per_device_bs": 1, "wd": 0.0}
# The losses do not depend on what little a trial learns here: the lowest lr is the worst. The search can be killed in
# the third iteration of the trial with the lowest lr, which is after its bracket has dropped it.
SCRIPT = f"""
experiment.KNOWN = [{BAD}]
SEARCH, WHEN = os.getpid(), os.environ.get("KILL")


def train(config, setup, trial):
    lr, report = config["train_loop_config"]["lr"], trial.report

    def reported(metrics, checkpoint=None):
        if lr == 5e-6 and str(metrics["training_iteration"]) == WHEN:
            os.kill(SEARCH, signal.SIGKILL)
            time.sleep(60)
        changed = {{"eval_loss": metrics["eval_loss"] - 1000 * lr}}
        report(metrics | changed, checkpoint)

    trial.report = reported
    experiment.train(config, setup, trial)
"""
# Runs the command behind it in a terminal of its own, and prints what that shows.
SHOW = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
IN_TERMINAL = [sys.executable, "-c", SHOW]
TRIES = ["--try", "wd=0.01,lr=2e-4, per_device_bs=2", "--try", "lr=5e-6,per_device_bs=1,wd=0"]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    return write_script(tmp_path_factory.mktemp("script") / "my_search.py", SCRIPT)


@pytest.fixture(scope="module")
def searched(tmp_path_factory, script, tiny_model, tiny_squad):
    """A search with a baseline that its bracket does not promote: (folder, output)."""
    output_dir = tmp_path_factory.mktemp("results")
    name = ["--output_dir", output_dir, "--run_name", "x"]
    done = run_script(
        "--model", tiny_model, "--dataset", tiny_squad, *SMALL, *ONE_AT_A_TIME, *name, *TRIES, "--baseline",
        script=script,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return output_dir / "x", done.stdout


def test_known_settings_come_first_and_are_marked(searched):
    folder, out = searched
    assert f"--try {TRIES[-1]}: this setting is given twice, and is tried once\n" in out
    assert "trial 1: lr 5e-06 per_device_bs 1 wd 0.0, baseline, which is trained to the end\n" in out
    assert "trial 2: lr 0.0002 per_device_bs 2 wd 0.01, known setting\n" in out
    trials = files.read_csv(folder / "trials.csv")
    assert list(trials[0]) == [*tables.TRIAL_FIELDS, "known"]
    columns = {"learning_rate": "lr", "batch_size": "per_device_bs", "weight_decay": "wd"}
    assert [{name: t[column] for column, name in columns.items()} for t in trials[:2]] == [BAD, GOOD]
    assert [t["known"] for t in trials] == [True, True, None, None, None, None]
    assert [t["model_based"] for t in trials] == [False] * 6
    assert out.count(" weight_decay 0.0, known) eval_loss ") == 2  # at 1 and 4
    _, rows = closing_block(out)
    assert rows[0][-2] == "Origin" and sorted(row[-2] for row in rows[2:]) == ["known"] * 2 + ["random"] * 4
    page = (folder / "report.html").read_text()
    assert "<td>known</td>" in page and '"name":"known"' in page  # the table and the learning curves
    assert json.loads((folder / "run.json").read_text())["known_settings"] == [BAD, GOOD]


def test_the_baseline_is_trained_to_the_end_beside_its_bracket(searched):
    folder, out = searched
    trials, iterations = (files.read_csv(folder / f"{name}.csv") for name in ("trials", "iterations"))
    first, best = trials[0], tables.ranked(trials, "eval_loss")[0]
    assert (first["training_iteration"], first["status"]) == (4, "completed")
    assert [t["training_iteration"] for t in trials[:4]].count(4) == 2  # the one that its bracket promotes, and it
    assert len(iterations) == (4 + 3) + 3 + 2 * 4 and "of 18 iterations" in out  # 3 are the baseline's, as planned
    gained = json.loads((folder / "run.json").read_text())["baseline"]
    assert gained["trial_id"] == first["trial_id"] and set(gained["intervals"]) == set(tables.METRICS)
    assert gained["gain"] == {k: best[k] - first[k] for k in tables.METRICS} and gained["gain"]["eval_loss"] < 0
    ends = r"\[\S+, \S+\]"
    gain = rf"eval_loss (\S+) {ends} \(lower is better\), exact_match \S+ {ends}, f1 \S+ {ends}; 99 % intervals"
    line = re.search(rf"\nGain over the baseline \(trial (\w+)\): {gain}\n", out)
    assert line.groups() == (first["trial_id"], f"{gained['gain']['eval_loss']:.4f}")
    assert f"<dt>Gain over the baseline (trial {first['trial_id']})</dt>" in (folder / "report.html").read_text()


def test_a_search_with_a_baseline_is_resumed(searched, tmp_path, script, tiny_model, tiny_squad):
    """Killed while the baseline trains alone. It goes on as one that ran through, whatever KNOWN is by then."""
    folder, _ = searched
    name = ["--output_dir", tmp_path, "--run_name", "x"]
    start = ["--model", tiny_model, "--dataset", tiny_squad, *SMALL, *ONE_AT_A_TIME, *name, *TRIES, "--baseline"]
    cut = run_script(*start, script=script, KILL="3")
    assert cut.returncode == -signal.SIGKILL, cut.stderr
    script = write_script(tmp_path / "later.py", SCRIPT.replace(f"KNOWN = [{BAD}]", "KNOWN = [{'lr': 1}]"))
    other = run_here(*name, "--resume", "--try", "lr=1e-4,per_device_bs=1,wd=0", script=script)
    assert other.returncode == 2 and "other arguments than the run's: --try" in other.stderr
    assert other.stderr.count("\n") == 1
    other = run_here(*name, "--resume", script=script)
    assert other.returncode == 2 and "the run has another script than later.py" in other.stderr
    done = run_script(*name, "--resume", "--new_code", script=script, before=IN_TERMINAL, TERM="xterm", COLUMNS="150")
    assert done.returncode == 0, done.stdout
    display = re.findall(r"\S* 0:0\d:\d\d", done.stdout)  # a spinner and a clock
    assert len(display) > 20 and "━" in done.stdout and "\x1b[2K" in done.stdout  # a bar; lines are erased
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout)
    assert "\nBest Trial Result:\n{\n" in text and "\n| Trial ID" in text and "[" not in text.splitlines()[-1]
    assert "going on with a search" in done.stdout and "Gain over the baseline (trial" in done.stdout
    columns = ["learning_rate", "batch_size", "weight_decay", "eval_loss", "training_iteration", "status", "known"]
    rows = [[[t[k] for k in columns] for t in files.read_csv(f / "trials.csv")] for f in (folder, tmp_path / "x")]
    assert rows[0] == rows[1]


def test_a_plan_counts_the_baseline(tmp_path, tiny_model):
    plans = [
        run_here("--plan", "--max_concurrent_trials", 4, "--model", tiny_model, *TRIES[:2], *more).stdout
        for more in ([], ["--baseline"])
    ]
    assert ["trial 1: lr 0.0002 per_device_bs 2 wd 0.01, known setting\n" in plan for plan in plans] == [True, False]
    assert "wd 0.01, baseline, which is trained to the end\n" in plans[1]
    assert "34 trials, 568 iterations" in plans[0] and "34 trials, 615 iterations" in plans[1]  # 50 - 3 more
