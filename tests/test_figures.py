"""report.html: drawn from a run's folder, opened in a real browser."""

import math
import os
import re
import shutil
import subprocess
import sys

import pytest

import raytune_bayesian
from hpo import files
from hpo.bohb.scheduler import HyperBandForBOHB
from hpo.bohb.searcher import TuneBOHB
from hpo.plan.simulator import Simulation
from hpo.results import figures, tables

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The folder of a search of one band with max_t 16 on two slots, simulated."""
    return make_run(tmp_path_factory.mktemp("results") / "simulated", 25, 10**9)


def make_run(folder, num_samples, max_reports, max_t=16):
    folder.mkdir()
    searcher = TuneBOHB(seed=0)
    searcher.set_search_properties("loss", "min", raytune_bayesian.SEARCH_SPACE)
    scheduler = HyperBandForBOHB(time_attr="training_iteration", metric="loss", mode="min", max_t=max_t, reduction_factor=4)

    def train(config, t):
        return math.log10(config["train_loop_config"]["lr"] / 8e-5) ** 2 + 3 / t

    simulation = Simulation(searcher, scheduler, num_samples, train, slots=2, max_t=max_t)
    simulation.run(max_reports)
    iterations, trials = [], {}
    for start, end, trial_id, t, loss in simulation.reports:
        searched = searcher.suggested[trial_id]["config"]["train_loop_config"]
        em = 1 / (1 + loss) if t in scheduler.bracket_of(trial_id).budgets() else None
        iterations.append({"trial_id": trial_id, "training_iteration": t, "eval_loss": loss, "exact_match": em, "f1": em,
                           "started_at": 1e9 + 60 * start, "ended_at": 1e9 + 60 * end, "node": "node<2>",
                           "grad_norm": 1 + loss, "loss_scale": 2.0**16, "skipped_steps": 0, "tokens_per_second": 1000 + t})  # fmt: skip
        row = trials.setdefault(trial_id, {
            "trial_id": trial_id, **{tables.COLUMNS[k]: v for k, v in searched.items()}, "eval_loss": None, "exact_match": None, "f1": None,
            "training_iteration": 0, "status": "stopped", "model_based": searcher.suggested[trial_id]["model_based"], "resumes": 0, "gpu_minutes": t,
        })  # fmt: skip
        if t in scheduler.bracket_of(trial_id).budgets():  # as in Record
            row.update(eval_loss=loss, exact_match=em, f1=em, training_iteration=t)
    files.write_csv(folder / "trials.csv", tables.TRIAL_FIELDS, list(trials.values()))
    files.write_csv(folder / "iterations.csv", tables.ITERATION_FIELDS, iterations)
    files.write_json(folder / "run.json", {"status": "running", "arguments": {"metric": "eval_loss", "num_samples": num_samples}})
    return folder


def draw(folder, *options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "hpo.results", folder, *options], capture_output=True, text=True, timeout=300)


def browse(path, tmp_path) -> tuple[str, list[str]]:
    """Opens a page in headless Chromium: the document after its scripts ran, and what the console said."""
    if CHROMIUM is None:
        assert not os.environ.get("CI"), "the page must be opened here, but there is no Chromium"
        pytest.skip("no Chromium (Debian package chromium)")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr", "--window-size=1200,4000", "--virtual-time-budget=20000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_every_figure_is_drawn(run_dir, tmp_path):
    """In a real browser: each figure has its drawing, nothing is asked of a network, the console is silent."""
    done = draw(run_dir)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| Trial ID |") and len(done.stdout.splitlines()) == 2 + 25
    page, console = browse(run_dir / "report.html", tmp_path)
    assert console == []
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert len(titles) == 8 and titles[-1] == "Results", titles
    for i, title in enumerate(titles[:-1]):
        figure = page[page.index(f'id="figure-{i}"') :].split("<h2>")[0]
        assert figure.count('class="main-svg"') >= 1, title
        assert len(re.findall("<path|<rect", figure)) > 20, title
    assert page.count("<tr>") == 1 + 25


def test_the_browser_would_tell(tmp_path):
    """What the test above relies on: the page's policy lets no request out, and each try is told."""
    policy = f'<meta http-equiv="Content-Security-Policy" content="{figures.POLICY}">'
    asks = '<script>console.error("broken"); fetch("https://example.org/y")</script><script src="https://example.org/x.js"></script>'
    (tmp_path / "page.html").write_text(policy + asks)
    _, console = browse(tmp_path / "page.html", tmp_path)
    assert all(any(word in line for line in console) for word in ("broken", "example.org/x.js", "example.org/y")), console


def test_pngs_for_a_paper(run_dir):
    done = draw(run_dir, "--png")
    if CHROMIUM is None:
        assert done.returncode == 1 and "no PNGs, which need" in done.stderr and len(done.stderr.splitlines()) == 1
        pytest.skip("no Chromium (Debian package chromium)")
    assert done.returncode == 0, done.stderr
    pictures = sorted(run_dir.glob("*.png"))
    assert len(pictures) == 7
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000, picture


@pytest.mark.parametrize("reports, max_t", [(0, 16), (1, 16), (2, 50), (5, 16), (30, 50)])
def test_at_any_time(tmp_path, reports, max_t):
    """Also when little has happened yet: with max_t 50 nothing has come to a rung after two reports."""
    folder = make_run(tmp_path / "x", 25, reports, max_t)
    done = draw(folder)
    assert done.returncode == 0, done.stderr
    assert "</html>" in (folder / "report.html").read_text()


def test_what_is_no_run(tmp_path):
    done = draw(tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "usage" in done.stderr


def test_lanes_hold_one_trial_at_a_time(run_dir):
    placed = figures.lanes(files.read_csv(run_dir / "iterations.csv"))
    assert {lane for lane, _ in placed} == {"node<2> #1", "node<2> #2"}
    for lane in {lane for lane, _ in placed}:
        rows = [row for name, row in placed if name == lane]
        assert all(a["ended_at"] <= b["started_at"] for a, b in zip(rows, rows[1:]))


def test_hyperparameters_of_any_kind():
    for values in ([None, 1], ["auto", 1, 2], [True, False], [0.5] * 3, list(range(20))):
        assert figures.distribution(values) is not None
