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


def cases(folder: Path) -> dict[str, tuple[float, int, list]]:
    """By name: the limit, the exit code and the command line.

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
        "--help": (FLAGS, 0, [SCRIPT, "--help"]),
        "--max_t 0": (FLAGS, 2, [SCRIPT, "--max_t", 0]),
        "--deepspeed, no such file": (FILES, 2, [SCRIPT, *good, "--deepspeed", folder / "none.json"]),
        "a data set with a wrong answer": (FILES, 2, [SCRIPT, *good, "--dataset", broken]),
        "a wrong search space": (FILES, 2, [my_search, *good]),
    }


def cpu_seconds(command: list, exit_code: int) -> float:
    """CPU seconds of a command, which must end with this exit code, and with one line where it refuses something."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != exit_code or done.stderr.count("\n") != (exit_code != 0):
        raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        all_cases = cases(Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in all_cases}
        for _ in range(TURNS):
            for name, (_, exit_code, command) in all_cases.items():
                seconds[name].append(cpu_seconds(command, exit_code))
    print(f"{'CPU seconds':<32}{'median':>8}{'least':>8}{'most':>8}{'limit':>8}")
    for name, values in seconds.items():
        numbers = f"{statistics.median(values):8.2f}{min(values):8.2f}{max(values):8.2f}"
        print(f"{name:<32}{numbers}{all_cases[name][0]:8.0f}")
    worst = max(statistics.median(seconds[name]) for name, (limit, *_) in all_cases.items() if limit == FILES)
    print(f"\nratio: {FILES / worst:.2f}")


if __name__ == "__main__":
    main()
