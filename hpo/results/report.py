"""The folder of a run: written while it runs, read back as a table.

    .venv/bin/python -m hpo.results results/<run_name>        # at any time, also while the run goes on: the table, and report.html
    .venv/bin/python -m hpo.results results/<run_name> --png  # and the figures as PNGs

trials.csv has a row a trial, iterations.csv a row a report, run.json what was run on what, best_result.json the result.
"""

import json
import sys
from pathlib import Path

from hpo import errors
from hpo.files import read_csv, write_whole
from hpo.results.tables import COLUMNS, METRICS, TRIAL_FIELDS, _show, ranked, result_rows, table


def write_page(run_dir: Path) -> dict:
    """Draws report.html from what is in the run's folder, during a run or after it; its figures. The state file is not read."""
    from hpo.results import slot_time
    from hpo.results import figures  # slow

    run = json.loads((run_dir / "run.json").read_text())
    trials, iterations = (read_csv(run_dir / name) if (run_dir / name).exists() else [] for name in ("trials.csv", "iterations.csv"))
    metric = run["arguments"]["metric"]
    hyperparameters = [key for key in (trials[0] if trials else {}) if key not in TRIAL_FIELDS or key in COLUMNS.values()]
    drawn = figures.draw(trials, iterations, hyperparameters, metric)
    counts = [f"{sum(row['status'] == status for row in trials)} {status}" for status in dict.fromkeys(row["status"] for row in trials)]
    facts = [("Status", run["status"]), ("Trials", ", ".join(counts) + f" of {run['arguments']['num_samples']}")]
    facts += [("Model-based suggestions", f"{sum(bool(row['model_based']) for row in trials)} of {len(trials)}")]
    if trials:
        best = ranked(trials, metric)[0]
        facts.append(("Best trial so far", f"{best['trial_id']}: " + ", ".join(f"{name} {_show(name, best[name])}" for name in (*COLUMNS.values(), *METRICS))))
    if "test" in run:
        tested = ", ".join(f"{name} {run['test'][name]:.4f}" for name in METRICS)
        facts.append((f"Test of the best model, on {run['test']['questions']} questions that no choice has looked at", tested))
    if "bill" in run:
        spent = slot_time.text(run["bill"], len(iterations), run["arguments"]["max_t"], run["arguments"]["num_samples"], run["grid"])
        facts += [("Bill", spent.replace("bill: ", "").replace("\ncost:", "; cost:"))]
    facts.append(("Started with", " ".join(f"--{key} {value}" for key, value in run["arguments"].items() if value is not None)))
    write_whole(run_dir / "report.html", figures.page(f"Search {run_dir.name}", facts, result_rows(trials, metric), drawn))
    return drawn


def main(argv: list[str]) -> int:
    folders = [Path(argument) for argument in argv if argument != "--png"]
    if len(folders) != 1 or not (folders[0] / "run.json").exists():
        print("usage: .venv/bin/python -m hpo.results results/<run_name> [--png]   (a folder with a run.json)", file=sys.stderr)
        return 2
    (folder,) = folders
    drawn = write_page(folder)
    if "--png" in argv:
        from hpo.results import figures

        try:
            figures.save_pngs(drawn, folder)
        except Exception as error:
            print(f"hpo.results: no PNGs, which need kaleido and Chrome or Chromium: {errors.one_line(error, 200)}", file=sys.stderr)
            return 1
    if (folder / "trials.csv").exists():
        print(table(read_csv(folder / "trials.csv"), json.loads((folder / "run.json").read_text())["arguments"]["metric"]))
    return 0
