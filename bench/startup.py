"""How long the script takes to refuse bad input, from the command line.

    make demo-data && .venv/bin/python bench/startup.py        # a minute and a half

Wrong flags are told before anything slow is imported, wrong files before the slowest imports. A wrong search space is
told when the script has imported all that it needs to define one. Seconds are those of the CPU, user and system, which
other work on the machine disturbs less than seconds of a clock. All cases take turns; the table has medians of the
turns.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from faulty import write_script

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "raytune_bayesian.py"
TURNS = 5
FLAGS, FILES = 1.0, 5.0  # limits, CPU seconds
WRONG_SPACE = """
from ray import tune

experiment.SEARCH_SPACE["train_loop_config"]["lr"] = tune.loguniform(2e-4, 5e-6)
train = experiment.train
"""


def cases(folder: Path) -> dict[str, tuple[float, str | None, list]]:
    """By name: the limit, what the only line says where it is refused, and the command line.

    Args:
        folder: for the wrong files.
    """
    model, squad = ["--model", ROOT / "demo" / "model"], ROOT / "demo" / "squad"
    good = [*model, "--dataset", squad, "--output_dir", folder / "results"]
    broken = folder / "squad"
    broken.mkdir()
    for file in squad.glob("*.json"):
        content = json.loads(file.read_text())
        content["data"][-1]["paragraphs"][-1]["qas"][-1]["answers"][0]["answer_start"] += 1
        (broken / file.name).write_text(json.dumps(content))
    my_search = write_script(folder / "my_search.py", WRONG_SPACE)
    return {
        "--help": (FLAGS, None, [SCRIPT, "--help"]),
        "--max_t 0": (FLAGS, "--max_t", [SCRIPT, "--max_t", 0]),
        "--deepspeed, no such file": (FILES, "none.json", [SCRIPT, *good, "--deepspeed", folder / "none.json"]),
        "a data set with a wrong answer": (FILES, "--drop_bad_answers", [SCRIPT, *good, "--dataset", broken]),
        "a wrong search space": (FILES, "search space: lr", [my_search, *good]),
    }


def cpu_seconds(command: list, refusal: str | None) -> float:
    """CPU seconds of a command, which must succeed, or end with exit code 2 and one line that has this text."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    expected = (0, 0) if refusal is None else (2, 1)
    if (done.returncode, done.stderr.count("\n")) != expected or (refusal or "") not in done.stderr:
        raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        all_cases = cases(Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in all_cases}
        for _ in range(TURNS):
            for name, (_, refusal, command) in all_cases.items():
                seconds[name].append(cpu_seconds(command, refusal))
    print(f"{'CPU seconds':<32}{'median':>8}{'least':>8}{'most':>8}{'limit':>8}")
    for name, values in seconds.items():
        numbers = f"{statistics.median(values):8.2f}{min(values):8.2f}{max(values):8.2f}"
        print(f"{name:<32}{numbers}{all_cases[name][0]:8.0f}")
    worst = max(statistics.median(seconds[name]) for name, (limit, *_) in all_cases.items() if limit == FILES)
    print(f"\nratio: {FILES / worst:.2f}")


if __name__ == "__main__":
    main()
