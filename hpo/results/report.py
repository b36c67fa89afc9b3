"""The report of a run: report.html and the table of results, at any time, also during the search.

    .venv/bin/python -m hpo.results results/<run_name>        # prints the table, draws report.html
    .venv/bin/python -m hpo.results results/<run_name> --png  # and the figures as PNGs
    .venv/bin/python -m hpo.results results/<run_name> --live # serves it to a browser while the search runs
    .venv/bin/python -m hpo.results results/<run_name> --repeat # prints the command that repeats the run

It reads trials.csv, iterations.csv and run.json, and does not disturb a search that is running.
"""

import argparse
import json
import sys
from pathlib import Path

from hpo import errors
from hpo.files import read_csv, write_atomically
from hpo.results import intervals, seeds, slot_time
from hpo.results.tables import (
    COLUMNS,
    METRICS,
    format_value,
    gain_in_words,
    hyperparameter_columns,
    leakage_in_words,
    looks_in_words,
    ranked,
    result_rows,
    table,
    tested_in_words,
)


def read_run(run_dir: Path) -> tuple[dict, list[dict], list[dict]]:
    """run.json, the rows of trials.csv and those of iterations.csv; no rows where the search has written none yet."""
    paths = [run_dir / name for name in ("trials.csv", "iterations.csv")]
    trials, iterations = (read_csv(path) if path.exists() else [] for path in paths)
    return json.loads((run_dir / "run.json").read_text()), trials, iterations


def draw_page(run_dir: Path, refresh: int | None = None) -> tuple[str, dict, list[str]]:
    """The report of a run as it is now: the HTML, the figures by their titles, and what the search may claim.

    Args:
        run_dir: the run folder.
        refresh: seconds after which a browser asks for the page again while the search runs. None: never.
    """
    from hpo.results import audit, figures, page  # slow: optuna, plotly and statsmodels

    run, trials, iterations = read_run(run_dir)
    metric = run["arguments"]["metric"]
    drawn = figures.draw(trials, iterations, hyperparameter_columns(trials), metric, run.get("densities"))
    facts = facts_of(run, trials, iterations)
    best = next((row for row in ranked(trials, metric) if row["status"] == "completed"), None)
    if best and intervals.load(run_dir, best):  # runs of older versions have no scores
        facts["Scores of the best trial, too good on average"] = intervals.best_in_words(run_dir, best)
    refresh = refresh if run["status"] == "running" else None
    versus = intervals.versus_best(run_dir, trials, metric)
    claims, correlations = audit.audit(run, trials, iterations)
    alone = run.get("alone", {"baseline": None, "finish": []})  # older runs have none
    stopped = intervals.stopped_in_doubt(run_dir, trials, metric, [alone["baseline"], *alone["finish"]])
    doubts = intervals.doubts_in_words(stopped, finished=len(alone["finish"]))
    repeats = seeds.in_sentences(run_dir, trials, metric, run.get("baseline", {}).get("trial_id"))
    claims = [*intervals.ties_in_words(trials, versus, metric), *doubts, *claims, *repeats]
    shown = facts, result_rows(trials, metric, versus), drawn, refresh, claims, correlations
    return page.page(f"Search {run_dir.name}", *shown), drawn, claims


def write_page(run_dir: Path) -> tuple[dict, list[str]]:
    """Writes report.html to a run folder. Returns the figures, by their titles, and what the search may claim."""
    text, drawn, claims = draw_page(run_dir)
    write_atomically(run_dir / "report.html", text)
    return drawn, claims


def facts_of(run: dict, trials: list[dict], iterations: list[dict]) -> dict[str, str]:
    """The facts at the top of the page, by their names.

    Args:
        run: the content of run.json.
        trials: the rows of trials.csv.
        iterations: the rows of iterations.csv.
    """
    arguments = run["arguments"]
    counts = [
        f"{sum(row['status'] == status for row in trials)} {status}"
        for status in dict.fromkeys(row["status"] for row in trials)
    ]
    facts = {
        "Status": run["status"],
        "Trials": ", ".join(counts) + (f" of {arguments['num_samples']}" if arguments["num_samples"] else ""),
        "Model-based suggestions": f"{sum(bool(row['model_based']) for row in trials)} of {len(trials)}",
    }
    if trials:
        best = ranked(trials, arguments["metric"])[0]
        values = ", ".join(f"{name} {format_value(name, best[name])}" for name in (*COLUMNS.values(), *METRICS))
        facts["Best trial so far"] = f"{best['trial_id']}: {values}"
    tests = run.get("tests", [])
    if tests or "test" in run:  # older runs have one test, without date and trial
        last = tests[-1] if tests else run["test"]
        model = "the best model" if run["status"] == "done" or not tests else f"trial {last['trial_id']}"
        unused = " that no decision has used" * (len(tests) < 2)
        facts[f"Test of {model}, on {last['questions']} questions{unused}"] = tested_in_words(last)
    if tests:
        facts["Looks at the test set"] = looks_in_words(tests)
    leaks = {part: counts for part, counts in run.get("leakage", {}).items() if counts["affected"]}
    if leaks:
        facts["Near-duplicates"] = "; ".join(leakage_in_words(leaks))
    if "baseline" in run:
        facts[f"Gain over the baseline (trial {run['baseline']['trial_id']})"] = gain_in_words(run["baseline"])
    if "slot_minutes" in run:  # written at the end of a search, and not by older versions
        size = arguments["max_t"], len(trials), run["grid"]
        spent = slot_time.summary(run["slot_minutes"], len(iterations), *size)
        facts["Slot time"] = spent.replace("slot time: ", "").replace("\ncost:", "; cost:")
    if run.get("repeats"):
        facts["Slot time of the repeats"] = slot_time.in_parts(run["repeats"]["slot_minutes"])
    given = [f"{name}={value}" for name, value in run.get("environment", {}).items()]  # older runs have none
    for key, value in arguments.items():  # --try has a list
        given += [f"--{key} {one}" for one in (value if isinstance(value, list) else [value]) if one is not None]
    return facts | {"Started with": " ".join(given)}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that tells a mistake in one line, and ends with exit code 2."""

    def error(self, message):
        """Ends the program."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def main(argv: list[str]) -> int:
    """The command. Returns its exit code: 2 if the input is wrong, 1 if PNGs cannot be drawn."""
    parser = Parser("python -m hpo.results", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="the run folder, results/<run_name>")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--png", action="store_true", help="also write the figures as PNGs")
    how.add_argument("--live", action="store_true", help="serve the report to a browser on this machine, drawn "
        "again while the search runs; nothing is written")  # fmt: skip
    how.add_argument("--optuna", type=Path, metavar="FILE", help="write a journal file for optuna-dashboard, with a "
        "study for each rung, and end")  # fmt: skip
    how.add_argument("--repeat", action="store_true", help="print the command that repeats the run, and as comments "
        "what must be the same and what differs on this machine")  # fmt: skip
    args = parser.parse_args(argv)
    folder = args.folder
    if not (folder / "run.json").exists():
        parser.error(f"{folder} is not a run folder: it has no run.json")
    if args.live:
        from hpo.results import live  # a search has no use for a server

        live.serve(lambda: draw_page(folder, live.REFRESH)[0])
        return 0
    if args.repeat:
        from hpo.results import repeat

        try:
            print("\n".join(repeat.lines(folder)))
        except errors.BadInput as error:
            parser.error(f"--repeat: {error}")
        return 0
    if args.optuna:
        return export(args.optuna, folder, parser)
    drawn, claims = write_page(folder)
    if args.png:
        from hpo.results import figures

        try:
            figures.save_pngs(drawn, folder)
        except Exception as error:
            reason = errors.one_line(error, 200)
            print(f"hpo.results: no PNGs, which need kaleido and Chrome or Chromium: {reason}", file=sys.stderr)
            return 1
    run, trials, _ = read_run(folder)
    if trials:
        metric = run["arguments"]["metric"]
        print(table(trials, metric, intervals.versus_best(folder, trials, metric)))
    for claim in claims:
        print(claim)
    return 0


def export(file: Path, folder: Path, parser: Parser) -> int:
    """Writes the journal file of --optuna. Returns the exit code."""
    try:
        if file.exists() or not file.absolute().parent.is_dir():
            parser.error(f"--optuna {file}: " + ("exists already" if file.exists() else "its folder does not exist"))
    except OSError as error:
        parser.error(f"--optuna {file}: {error.strerror}")
    run, trials, iterations = read_run(folder)
    if not any(row["training_iteration"] for row in trials):
        parser.error(f"--optuna {file}: no trial of {folder} has reached a rung")
    from hpo.results import figures  # slow: optuna

    try:
        figures.export(trials, iterations, hyperparameter_columns(trials), run["arguments"]["metric"], file)
    except OSError as error:
        parser.error(f"--optuna {file}: {error.strerror}")
    print(f"optuna-dashboard {file}   (pip install optuna-dashboard)")
    return 0
