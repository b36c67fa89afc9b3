"""The time that the scripts add to a search, on a real Slurm cluster of three nodes on this machine (as root).

    .venv/bin/python bench/slurm_overhead.py        # some minutes

It needs demo/model (make demo-data) and Debian's packages slurm-wlm, slurmdbd, mariadb-server, munge and iproute2. A
second search of each run is cancelled while BUSY other processes want the processor. The baseline is the sleeps of
the textbook scripts, before they start anything: 10 s for the head and 30 s for the workers.
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from slurm_cluster import Project, SlurmCluster

from hpo import files

DEMO = Path(__file__).parent.parent / "demo"
RUNS = 3
TEXTBOOK_SLEEPS = 40  # seconds
BUSY = 8
LIMITS = {"job start to first trial running": 45, "last trial's end to an empty queue": 10, "cancel to nothing left": 5}


def cancel(cluster: SlurmCluster, project: Project) -> float:
    """Seconds from scancel of a running search until no process, port, job or folder of it is left."""
    job = project.submit(
        "--model", DEMO / "model", "--dataset", DEMO / "squad", "--max_t", 50, "--num_train_epochs", 10,
        "--max_eval_samples", 40, NUM_WORKERS="2",
    )  # fmt: skip
    project.wait_for_search(job)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
    try:
        started = time.time()
        cluster.run("node1", "scancel", job)
        project.wait_for("nothing left of the job", lambda: not project.left_over(), 300)
        return time.time() - started
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    """Runs the searches, and prints the table."""
    seconds: dict[str, list[float]] = {name: [] for name in LIMITS}
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder, SlurmCluster(Path(folder)) as cluster:
        for i in range(RUNS):
            place = Path(folder) / f"run{i}"
            (place / "tmp").mkdir(parents=True)
            project = Project(cluster, place, place / "tmp")
            job = project.submit(
                "--model", DEMO / "model", "--dataset", DEMO / "squad", "--max_t", 4, "--num_train_epochs", 0.2,
                "--max_eval_samples", 40, "--run_name", "x", NUM_WORKERS="2",
            )  # fmt: skip
            project.wait_for("an empty queue", lambda: not cluster.queue(), 300)
            ended = time.time()
            state = cluster.job(job)
            if state["JobState"] != "COMPLETED":
                raise RuntimeError(project.log(job))
            iterations = files.read_csv(place / "results" / "x" / "iterations.csv")
            started = datetime.fromisoformat(state["StartTime"]).timestamp()  # in whole seconds
            seconds["job start to first trial running"].append(min(i["started_at"] for i in iterations) - started)
            seconds["last trial's end to an empty queue"].append(ended - max(i["ended_at"] for i in iterations))
            seconds["cancel to nothing left"].append(cancel(cluster, project))
            shutil.rmtree(place)
    print(f"{'':36} {'median':>8} {'worst':>8} {'limit':>8}   seconds, {RUNS} runs of 2 workers with 2 GPUs")
    for name, values in seconds.items():
        print(f"{name:36} {statistics.median(values):8.1f} {max(values):8.1f} {LIMITS[name]:8}")
    print(f"{'sleeps of the textbook scripts alone':36} {TEXTBOOK_SLEEPS:8.1f}")
    print(f"ratio: {TEXTBOOK_SLEEPS / statistics.median(seconds['job start to first trial running']):.2f}")


if __name__ == "__main__":
    main()
