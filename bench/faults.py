"""What each fault costs, on a real Slurm cluster of three nodes on this machine (as root): real kills, signals and cut links.

    python bench/faults.py        # a quarter of an hour; needs demo/model (make demo-data) and Debian's slurm-wlm munge iproute2

Each row is a search of its own, of 22 trials on two worker nodes of two GPUs, hit in its middle. Run again: iterations that were
reported twice. Lost: trials that did not come to the rung that the plan has for them. Seconds to go on: from the fault to the
next report of a trial that it hit, or of any where it hit all; a job's waiting time in the queue is left out where Slurm
imposes one (two minutes after a requeue).
"""

import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import report
from bohb import rungs
from slurm_cluster import Project, SlurmCluster, sh

ARGUMENTS = ["--model", ROOT / "demo" / "model", "--dataset", ROOT / "demo" / "squad", "--max_t", 16, "--num_train_epochs", 0.5,
             "--max_eval_samples", 40, "--num_samples", 22, "--run_name", "x"]  # fmt: skip
HIT_AFTER = 20  # reports: the second rung is on its way


def planned() -> Counter:
    """How many trials end at each rung: of 22, all 16 of the first bracket and 6 of the second."""
    ends: Counter = Counter()
    for bracket in rungs(16, 4)[:2]:
        for (n, budget), (promoted, _) in zip(bracket, [*bracket[1:], (0, 0)]):
            ends[budget] += n - promoted
    return ends


class Run:
    def __init__(self, cluster: SlurmCluster, folder: Path):
        (folder / "tmp").mkdir(parents=True)
        self.cluster, self.project = cluster, Project(cluster, folder, folder / "tmp")
        self.rows = folder / "results" / "x" / "iterations.csv"
        self.job = self.submit()
        self.project.wait_for("the middle of the search", lambda: len(self.iterations()) >= HIT_AFTER)

    def submit(self, *more) -> str:
        return self.project.submit(*(more or ARGUMENTS), NUM_WORKERS="2")

    def iterations(self) -> list[dict]:
        return report.read_csv(self.rows) if self.rows.exists() else []

    def kill(self, node: str, pattern: str) -> None:
        """kill -9 of the processes of jobs on a node whose command line matches; RuntimeError where none does."""
        found = [pid for pid, command in self.cluster.processes(node).items() if re.search(pattern, command)]
        if not found:
            raise RuntimeError(f"no process {pattern} on {node}: {self.cluster.processes(node)}")
        for pid in found:
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                pass

    def resume(self) -> None:
        """What a user does after the job has gone."""
        self.project.wait_for("the end of the job", lambda: self.job not in self.cluster.queue())
        shutil.rmtree(self.project.temporary)  # of a killed head, on its own node
        self.project.temporary.mkdir()
        self.job = self.submit("--resume", "--run_name", "x")


def time_limit(run: Run) -> list[str]:
    run.cluster.run("node1", "scancel", "--batch", "--signal=USR1", run.job)
    run.project.wait_for("the requeue", lambda: run.cluster.job(run.job).get("Restarts") == "1")
    run.cluster.run("node1", "scontrol", "update", f"jobid={run.job}", "starttime=now")
    return []


def scancel(run: Run) -> list[str]:
    run.cluster.run("node1", "scancel", run.job)
    run.resume()
    return []


def driver(run: Run) -> list[str]:
    run.kill("node1", r"python raytune_bayesian.py")
    run.resume()
    return []


def head_node(run: Run) -> list[str]:
    run.kill("node1", r".")
    run.resume()
    return []


def raylet(run: Run) -> list[str]:
    run.kill("node2", r"/raylet/raylet ")
    return ["node2"]


def trial_process(run: Run) -> list[str]:
    run.kill("node2", r"ray::ImplicitFunc")
    return ["node2"]


def worker_job(run: Run) -> list[str]:
    worker = next(j for j in run.project.workers(run.job) if run.cluster.job(j)["NodeList"] == "node2")
    run.cluster.run("node1", "scancel", worker)
    return ["node2"]


def link(run: Run) -> list[str]:
    sh("ip link set veth-node2 down")
    time.sleep(60)
    sh("ip link set veth-node2 up")
    return ["node2"]


FAULTS = {
    "time limit, requeue": ("head job", time_limit),
    "scancel, --resume": ("head job", scancel),
    "kill -9, --resume": ("the script", driver),
    "kill -9 of all, --resume": ("head's node", head_node),
    "kill -9": ("raylet of a worker", raylet),
    "kill -9 ": ("processes of two trials", trial_process),
    "scancel": ("worker job", worker_job),
    "link down for 60 s": ("worker's node", link),
}


def main() -> None:
    plan = planned()
    print(f"{'fault':26} {'where':24} {'run again':>10} {'lost':>6} {'seconds to go on':>18}")
    lost_in_all = 0
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder, SlurmCluster(Path(folder)) as cluster:
        for i, (fault, (where, inject)) in enumerate(FAULTS.items()):
            run = Run(cluster, Path(folder) / str(i))
            before = run.iterations()
            hit_at = time.time()
            nodes = inject(run)
            last_node = {row["trial_id"]: row["node"] for row in before}
            hit = {t for t, node in last_node.items() if node in nodes} if nodes else None
            run.project.wait_for_end(run.job, 400)
            rows = run.iterations()
            ended = Counter(t["training_iteration"] for t in report.read_csv(run.rows.with_name("trials.csv")) if t["status"] != "failed")
            again = len(rows) - len({(r["trial_id"], r["training_iteration"]) for r in rows})
            lost = sum((plan - ended).values())
            later = [r["ended_at"] - hit_at for r in rows if r["ended_at"] > hit_at and (hit is None or r["trial_id"] in hit)]
            lost_in_all += lost
            print(f"{fault:26} {where:24} {again:10} {lost:6} {min(later, default=float('nan')):18.0f}", flush=True)
            project = run.project
            project.wait_for("nothing left", lambda: not cluster.queue(), 60)
            shutil.rmtree(project.folder)
    if lost_in_all:
        raise SystemExit(f"{lost_in_all} trials were lost")


if __name__ == "__main__":
    main()
