"""report.html: drawn from a run folder, opened in a real browser."""

import html
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import optuna
import pytest

import raytune_bayesian
from hpo import files
from hpo.bohb.scheduler import HyperBandForBOHB
from hpo.bohb.searcher import TuneBOHB
from hpo.results import figures, page, tables
from simulation import Simulation

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The folder of a search of one band with max_t 16 on two slots, simulated."""
    return make_run(tmp_path_factory.mktemp("results") / "simulated", 25, 10**9)


def make_run(folder, num_samples, max_reports, max_t=16):
    folder.mkdir()
    searcher = TuneBOHB(seed=0)
    searcher.set_search_properties("loss", "min", raytune_bayesian.SEARCH_SPACE)
    scheduler = HyperBandForBOHB(
        time_attr="training_iteration", metric="loss", mode="min", max_t=max_t, reduction_factor=4
    )

    def train(config, t):
        return math.log10(config["train_loop_config"]["lr"] / 8e-5) ** 2 + 3 / t

    simulation = Simulation(searcher, scheduler, num_samples, train, slots=2, max_t=max_t)
    simulation.run(max_reports)
    iterations, trials = [], {}
    for start, end, trial_id, t, loss in simulation.reports:
        hyperparameters = searcher.suggested[trial_id]["config"]["train_loop_config"]
        at_rung = t in scheduler.bracket_of(trial_id).budgets()
        metrics = {"eval_loss": loss} | dict.fromkeys(("exact_match", "f1"), 1 / (1 + loss) if at_rung else None)
        times = {"started_at": 1e9 + 60 * start, "ended_at": 1e9 + 60 * end, "node": "node<2>"}
        training = {"grad_norm": 1 + loss, "loss_scale": 2.0**16, "skipped_steps": 0, "tokens_per_second": 1000 + t}
        iterations.append({"trial_id": trial_id, "training_iteration": t, **metrics, **times, **training})
        row = trials.setdefault(
            trial_id,
            {
                "trial_id": trial_id,
                **{tables.COLUMNS[name]: value for name, value in hyperparameters.items()},
                **dict.fromkeys(tables.METRICS),
                "training_iteration": 0,
                "status": "stopped",
                "model_based": searcher.suggested[trial_id]["model_based"],
                "resumes": 0,
                "gpu_minutes": t,
            },
        )
        if at_rung:  # as in TrialLog
            row.update(metrics, training_iteration=t)
    files.write_csv(folder / "trials.csv", tables.TRIAL_FIELDS, list(trials.values()))
    files.write_csv(folder / "iterations.csv", tables.ITERATION_FIELDS, iterations)
    arguments = {"metric": "eval_loss", "num_samples": num_samples}
    run = {"status": "running", "arguments": arguments, "densities": searcher.densities()}
    files.write_json(folder / "run.json", run)
    return folder


def draw(folder, *options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hpo.results", folder, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def browse(url, tmp_path) -> tuple[str, list[str]]:
    """Opens a page in headless Chromium. Returns the document after its scripts have run, and the console's lines."""
    if CHROMIUM is None:
        assert not os.environ.get("CI"), "the page must be opened here, but there is no Chromium"
        pytest.skip("no Chromium (Debian package chromium)")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--enable-logging=stderr",
        "--window-size=1200,4000", "--virtual-time-budget=20000", "--dump-dom", url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_every_figure_is_drawn(run_dir, tmp_path):
    """Each figure has its drawing, nothing is loaded from a network, and the console is silent."""
    done = draw(run_dir)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("| Trial ID |") and [line[0] == "|" for line in lines[: 2 + 25]] == [True] * (2 + 25)
    claims = lines[2 + 25 :]  # of a simulated search, whose lr alone has an effect
    assert any("No effect of batch size could be measured at iteration 1" in line for line in claims), claims
    assert not any("No effect of learning rate" in line for line in claims), claims
    text, console = browse((run_dir / "report.html").as_uri(), tmp_path)
    assert console == []
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert len(titles) == 9 and titles[-2:] == ["What the search may claim", "Results"], titles
    assert all(f"<li>{html.escape(claim, quote=False)}</li>" in text for claim in claims)
    for i, title in enumerate(titles[:-2]):
        figure = text[text.index(f'id="figure-{i}"') :].split("<h2>")[0]
        assert figure.count('class="main-svg"') >= 1, title
        assert len(re.findall("<path|<rect", figure)) > 20, title
    assert text.split("<h2>Results</h2>")[1].count("<tr>") == 1 + 25


def test_browser_reports_requests_and_errors(tmp_path):
    """The test above relies on this: the page's policy blocks all requests, and the console reports each of them."""
    policy = f'<meta http-equiv="Content-Security-Policy" content="{page.POLICY}">'
    fetch = '<script>console.error("broken"); fetch("https://example.org/y")</script>'
    load = '<script src="https://example.org/x.js"></script>'
    (tmp_path / "page.html").write_text(policy + fetch + load)
    _, console = browse((tmp_path / "page.html").as_uri(), tmp_path)
    words = ("broken", "example.org/x.js", "example.org/y")
    assert all(any(word in line for line in console) for word in words), console


@pytest.mark.slow
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
    assert (run_dir / "report-what-the-model-sees-of-the-learning-rate.png").exists()


@pytest.mark.parametrize("reports, max_t", [(0, 16), (1, 16), (2, 50), (5, 16), (30, 50)])
def test_report_can_be_drawn_at_any_time(tmp_path, reports, max_t):
    """Also at the start: with max_t 50 no trial has reached a rung after two reports."""
    folder = make_run(tmp_path / "x", 25, reports, max_t)
    done = draw(folder)
    assert done.returncode == 0, done.stderr
    assert "</html>" in (folder / "report.html").read_text()


def test_wrong_input_is_refused(run_dir, tmp_path):
    file = tmp_path / "journal.log"
    file.touch()
    for arguments, says in [
        ([tmp_path], f"{tmp_path} is not a run folder: it has no run.json"),
        ([run_dir, "--optuna", file], f"--optuna {file}: exists already"),
        ([run_dir, "--optuna", tmp_path / "no" / "file"], "its folder does not exist"),
    ]:
        done = draw(*arguments)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and says in done.stderr, done.stderr
    assert file.read_bytes() == b""


@pytest.mark.slow
def test_live_report_in_a_browser(run_dir, tmp_path):
    """It is drawn again when the search has gone on, nobody without the token sees it, and the run is not changed."""
    folder = tmp_path / "live"
    shutil.copytree(run_dir, folder)
    run = json.loads((folder / "run.json").read_text())
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    command = [sys.executable, "-m", "hpo.results", folder, "--live"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        url = re.match(r"http://127\.0\.0\.1:(\d+)/\S{20,}", process.stdout.readline())
        port = url.group(1)
        assert f"ssh -N -L {port}:127.0.0.1:{port} " in process.stdout.readline()
        text, console = browse(url.group(), tmp_path)
        assert console == [] and '<meta http-equiv="refresh"' in text
        assert text.split("<h2>Results</h2>")[1].count("<tr>") == 1 + 25
        assert text.count('class="main-svg"') > 7
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        rows = (folder / "trials.csv").read_text().splitlines()
        (folder / "trials.csv").write_text("\n".join(rows[:-1]) + "\n")
        (folder / "run.json").write_text(json.dumps(run | {"status": "done"}))
        with urllib.request.urlopen(url.group(), timeout=60) as answer:
            text = answer.read().decode()
        assert text.split("<h2>Results</h2>")[1].count("<tr>") == 1 + 24 and '<meta http-equiv="refresh"' not in text
        for other in ("", "/", "/x" * 11):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"http://127.0.0.1:{port}{other}", timeout=60)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_journal_of_optuna(run_dir, tmp_path):
    """It has a study for each rung, with the trials, their hyperparameters and their losses up to there."""
    file = tmp_path / "journal.log"
    done = draw(run_dir, "--optuna", file)
    assert done.returncode == 0 and f"optuna-dashboard {file}" in done.stdout, done.stderr
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
    studies = {study.study_name: study for study in optuna.get_all_study_summaries(storage)}
    rows, metric = files.read_csv(run_dir / "iterations.csv"), "eval_loss"
    for name in studies:
        rung = int(name.removeprefix("iteration "))
        expected = {r["trial_id"]: r[metric] for r in rows if r["training_iteration"] == rung}
        found = optuna.load_study(study_name=name, storage=storage).trials
        assert {t.user_attrs["trial_id"]: t.value for t in found} == expected
        assert all(set(t.params) == {"learning_rate", "batch_size", "weight_decay"} for t in found)
    assert len(studies) == 3


def test_slots_have_one_trial_at_a_time(run_dir):
    placed = figures.lanes(files.read_csv(run_dir / "iterations.csv"))
    assert {lane for lane, _ in placed} == {"node<2> #1", "node<2> #2"}
    for lane in {lane for lane, _ in placed}:
        rows = [row for name, row in placed if name == lane]
        assert all(a["ended_at"] <= b["started_at"] for a, b in itertools.pairwise(rows))


def test_hyperparameters_can_have_any_type():
    for values in ([None, 1], ["auto", 1, 2], [True, False], [0.5] * 3, list(range(20))):
        assert figures.distribution(values) is not None


DENSITIES = {
    "budget": 4,
    "hyperparameters": {
        "bs": {"kind": "categorical", "categories": [1, 2]},
        "lr": {"kind": "continuous", "lower": 1e-6, "upper": 1e-4, "log": True},
        "dropout": {"kind": "continuous", "lower": 0.1, "upper": 0.5, "log": False},
    },
    "good": {"points": [[0, 0.5, 0.25], [1, 0.5, 0.25]], "bandwidths": [0.1, 0.1, 0.2]},
    "bad": {"points": [[0, 0.0, 0.0], [0, 0.5, 0.5], [1, 1.0, 1.0]], "bandwidths": [0.1, 0.1, 0.2]},
}


@pytest.mark.parametrize("name, centre, scale", [("lr", 1e-5, "log"), ("dropout", 0.2, "linear")])
def test_densities_are_those_of_the_model(name, centre, scale):
    """Two good results at the same point have the density of one kernel. The axis has values, not coordinates."""
    figure = figures.density(DENSITIES, name)
    good, points, bad, _ = figure.data
    lower, upper = (DENSITIES["hyperparameters"][name][end] for end in ("lower", "upper"))
    assert (good.x[0], good.x[-1]) == pytest.approx((lower, upper)) and list(points.x) == pytest.approx([centre] * 2)
    assert figure.layout.xaxis.type == scale and bad.name == "bad: 3 results"
    peak = max(zip(good.y, good.x, strict=True))
    width = {"lr": 0.1, "dropout": 0.2}[name]
    assert peak == pytest.approx((1 / (width * math.sqrt(2 * math.pi)), centre), rel=0.03)


def test_each_continuous_hyperparameter_has_a_density(run_dir):
    trials, iterations = (files.read_csv(run_dir / name) for name in ("trials.csv", "iterations.csv"))
    titles = list(figures.draw(trials, iterations, tables.hyperparameter_columns(trials), "eval_loss", DENSITIES))
    assert [title for title in titles if "model sees" in title] == [
        "What the model sees of the learning rate, at iteration 4",
        "What the model sees of the dropout, at iteration 4",
    ]


def test_run_of_an_older_version_is_drawn_without_densities(run_dir, tmp_path):
    """Its run.json has neither "densities" nor "slot_minutes"."""
    folder = shutil.copytree(run_dir, tmp_path / "old")
    run = json.loads((folder / "run.json").read_text()) | {"bill": {"allocated": 1.0, "given back": 0.0}}
    del run["densities"]
    files.write_json(folder / "run.json", run)
    done = draw(folder)
    assert done.returncode == 0, done.stderr
    text = (folder / "report.html").read_text()
    assert "model sees" not in text and "Importance of the hyperparameters" in text
