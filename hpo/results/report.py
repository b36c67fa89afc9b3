"""The report of a run: report.html and the table of results, at any time, also during the search.

    .venv/bin/python -m hpo.results results/<run_name>        # prints the table, draws report.html
    .venv/bin/python -m hpo.results results/<run_name> --png  # and the figures as PNGs

It reads trials.csv, iterations.csv and run.json, and does not disturb a search that is running.
"""

import json
import sys
from pathlib import Path

from hpo import errors
from hpo.files import read_csv, write_atomically
from hpo.results import slot_time
from hpo.results.tables import (
    COLUMNS,
    METRICS,
    format_value,
    gain_in_words,
    hyperparameter_columns,
    looks_in_words,
    ranked,
    result_rows,
    table,
    tested_in_words,
)

USAGE = "usage: .venv/bin/python -m hpo.results results/<run_name> [--png]   (a folder with a run.json)"


def write_page(run_dir: Path) -> dict:
    """Writes report.html to a run folder.

    Returns:
        The figures, by their titles.
    """
    from hpo.results import figures, page  # slow: optuna and plotly

    run = json.loads((run_dir / "run.json").read_text())
    paths = [run_dir / name for name in ("trials.csv", "iterations.csv")]
    trials, iterations = (read_csv(path) if path.exists() else [] for path in paths)
    metric = run["arguments"]["metric"]
    drawn = figures.draw(trials, iterations, hyperparameter_columns(trials), metric, run.get("densities"))
    facts = facts_of(run, trials, iterations)
    text = page.page(f"Search {run_dir.name}", facts, result_rows(trials, metric), drawn)
    write_atomically(run_dir / "report.html", text)
    return drawn


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
        "Trials": ", ".join(counts) + f" of {arguments['num_samples']}",
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
    if "baseline" in run:
        facts[f"Gain over the baseline (trial {run['baseline']['trial_id']})"] = gain_in_words(run["baseline"])
    if "slot_minutes" in run:  # written at the end of a search, and not by older versions
        size = arguments["max_t"], arguments["num_samples"], run["grid"]
        spent = slot_time.summary(run["slot_minutes"], len(iterations), *size)
        facts["Slot time"] = spent.replace("slot time: ", "").replace("\ncost:", "; cost:")
    given = [f"{name}={value}" for name, value in run.get("environment", {}).items()]  # older runs have none
    for key, value in arguments.items():  # --try has a list
        given += [f"--{key} {one}" for one in (value if isinstance(value, list) else [value]) if one is not None]
    return facts | {"Started with": " ".join(given)}


def main(argv: list[str]) -> int:
    """The command. Returns its exit code: 2 if the folder is no run folder, 1 if PNGs cannot be drawn."""
    folders = [Path(argument) for argument in argv if argument != "--png"]
    if len(folders) != 1 or not (folders[0] / "run.json").exists():
        print(USAGE, file=sys.stderr)
        return 2
    (folder,) = folders
    drawn = write_page(folder)
    if "--png" in argv:
        from hpo.results import figures

        try:
            figures.save_pngs(drawn, folder)
        except Exception as error:
            reason = errors.one_line(error, 200)
            print(f"hpo.results: no PNGs, which need kaleido and Chrome or Chromium: {reason}", file=sys.stderr)
            return 1
    if (folder / "trials.csv").exists():
        metric = json.loads((folder / "run.json").read_text())["arguments"]["metric"]
        print(table(read_csv(folder / "trials.csv"), metric))
    return 0
