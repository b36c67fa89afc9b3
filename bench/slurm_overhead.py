"""The time that the scripts add to a search, on a real Slurm cluster of three nodes on this machine (as root).

    .venv/bin/python bench/slurm_overhead.py        # some minutes

It needs demo/model (make demo-data) and Debian's packages slurm-wlm, slurmdbd, mariadb-server, munge and iproute2.
Three further searches of each run, one for each way to use nodes, are cancelled while BUSY other processes want the
processor. The baseline is the sleeps of the textbook scripts, before they start anything: 10 s for the head and 30 s
for the workers.
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

from hpo import files
from slurm_cluster import BOTH_GPUS, Project, SlurmCluster

DEMO = Path(__file__).parent.parent / "demo"
RUNS = 3
TEXTBOOK_SLEEPS = 40  # seconds
BUSY = 8
OWN = ["--gpus-per-node=2", "--cpus-per-task=3", "--mem=6G"]
WAYS = {  # how the head job is submitted
    "worker jobs": {"NUM_WORKERS": "2", **BOTH_GPUS},
    "one job on one node": {"NUM_WORKERS": "0", "options": OWN},
    "one job on three nodes": {"node": "node[1-3]", "options": ["--nodes=3", *OWN]},
}
LIMITS = {"job start to first trial running": 45, "last trial's end to an empty queue": 10}
LIMITS |= {f"cancel to nothing left: {way}": 5 for way in WAYS}


def cancel(cluster: SlurmCluster, project: Project, way: dict) -> float:
    """Seconds from scancel of a running search until no process, port, job or folder of it is left.

    Args:
        cluster: the cluster.
        project: its folder.
        way: one of WAYS.
    """
    job = project.submit(
        "--model", DEMO / "model", "--dataset", DEMO / "squad", "--max_t", 50, "--num_train_epochs", 2,
        "--max_eval_samples", 40, **way,
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
                "--max_eval_samples", 40, "--run_name", "x", NUM_WORKERS="2", **BOTH_GPUS,
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
            for way, submission in WAYS.items():
                seconds[f"cancel to nothing left: {way}"].append(cancel(cluster, project, submission))
            shutil.rmtree(place)
    print(f"{'':46} {'median':>8} {'worst':>8} {'limit':>8}   seconds, {RUNS} runs of 2 workers with 2 GPUs")
    for name, values in seconds.items():
        print(f"{name:46} {statistics.median(values):8.1f} {max(values):8.1f} {LIMITS[name]:8}")
    print(f"{'sleeps of the textbook scripts alone':46} {TEXTBOOK_SLEEPS:8.1f}")
    print(f"ratio: {TEXTBOOK_SLEEPS / statistics.median(seconds['job start to first trial running']):.2f}")


if __name__ == "__main__":
    main()
