"""What each fault costs, on a real Slurm cluster of three nodes on this machine (as root).

    .venv/bin/python bench/faults.py            # 20 minutes
    .venv/bin/python bench/faults.py link hung  # these rows only

It needs demo/model (make demo-data) and Debian's packages slurm-wlm, munge and iproute2. Processes are killed, jobs get
signals and network links are cut for real.

Each row is a search of its own, of 22 trials on two worker nodes of two GPUs, hit in its middle.

    run again         iterations that were reported twice
    lost              trials that did not come to the rung that the plan has for them
    seconds to go on  from the fault to the next report of a trial that it hit, or of any trial if it hit all

Slurm holds a requeued job for a while, and that is part of the last column: 15 s here, 2 minutes by default.
"""

import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from hpo import files
from hpo.bohb.brackets import rungs
from slurm_cluster import BOTH_GPUS, Project, SlurmCluster, sh

DEMO = Path(__file__).parent.parent / "demo"
ARGUMENTS = [
    "--model", DEMO / "model", "--dataset", DEMO / "squad", "--max_t", 16, "--num_train_epochs", 0.5,
    "--max_eval_samples", 40, "--num_samples", 22,
]  # fmt: skip
HIT_AFTER = 20  # reports: some trials are on their way to the second rung
BROKEN_GPU = """
def train(config, setup, trial):
    if (setup.run_dir / f"broken-{socket.gethostname()}").exists():
        raise RuntimeError("CUDA error: unknown")
    experiment.train(config, setup, trial)
"""


def planned() -> Counter:
    """How many trials end at each rung: of 22, all 16 of the first bracket and 6 of the second."""
    ends: Counter = Counter()
    for bracket in rungs(16, 4)[:2]:
        for (n, budget), (promoted, _) in zip(bracket, [*bracket[1:], (0, 0)], strict=True):
            ends[budget] += n - promoted
    return ends


def allowed(before: list[dict], hit: set[str]) -> int:
    """How many iterations may run again.

    Those since the last rung of the trials that were hit, and one a slot, which may have ended before the fault.

    Args:
        before: the iterations before the fault.
        hit: trials.
    """
    reached = {row["trial_id"]: row["training_iteration"] for row in before}
    since = [reached[trial] - max((r for r in (1, 4, 16) if r <= reached[trial]), default=0) for trial in hit]
    return sum(since) + 4 * bool(hit)


class Run:
    """A search on the cluster, once it is in its middle.

    Args:
        cluster: where it runs.
        folder: for a copy of the project.
        output: for the results.
        *more: arguments of the search.
    """

    def __init__(self, cluster: SlurmCluster, folder: Path, output: Path, *more):
        (folder / "tmp").mkdir(parents=True)
        self.cluster, self.project, self.output = cluster, Project(cluster, folder, folder / "tmp"), output
        self.rows = output / "x" / "iterations.csv"
        self.project.hand(BROKEN_GPU)
        self.job = self.submit(*ARGUMENTS, *more)
        self.project.wait_for("the middle of the search", lambda: len(self.iterations()) >= HIT_AFTER, 240)
        self.hit_at = self.gone_at = time.time()

    def submit(self, *arguments) -> str:
        """Submits the head job; its id."""
        where = ["--run_name", "x", "--output_dir", self.output]
        return self.project.submit(*arguments, *where, NUM_WORKERS="2", **BOTH_GPUS)

    def iterations(self) -> list[dict]:
        """The rows of iterations.csv."""
        return files.read_csv(self.rows) if self.rows.exists() else []

    def kill(self, node: str, pattern: str, how=signal.SIGKILL) -> None:
        """Sends a signal to the processes of jobs on a node whose command line matches.

        Raises:
            RuntimeError: no command line matches.
        """
        found = [pid for pid, command in self.cluster.processes(node).items() if re.search(pattern, command)]
        if not found:
            raise RuntimeError(f"no process {pattern} on {node}: {self.cluster.processes(node)}")
        for pid in found:
            try:
                os.kill(pid, how)
            except ProcessLookupError:
                pass

    def resume(self) -> None:
        """What a user does after the job has gone."""
        self.project.wait_for("the end of the job", lambda: self.job not in self.cluster.queue())
        shutil.rmtree(self.project.temporary)  # of a killed head, on its own node
        self.project.temporary.mkdir()
        self.job = self.submit("--resume")


def time_limit(run: Run) -> list[str]:
    """USR1, as Slurm sends it before the time limit. The job saves and is requeued."""
    run.project.wait_for("half a minute of the job", lambda: run.cluster.job(run.job)["RunTime"] > "00:00:31")
    run.hit_at = time.time()
    run.cluster.run("node1", "scancel", "--batch", "--signal=USR1", run.job)
    run.project.wait_for("the requeue", lambda: run.cluster.job(run.job).get("Restarts") == "1")
    run.gone_at = time.time()  # trials report until they have saved
    return []


def scancel(run: Run) -> list[str]:
    """The user cancels the head job, and resumes."""
    run.cluster.run("node1", "scancel", run.job)
    run.resume()
    return []


def driver(run: Run) -> list[str]:
    """The script is killed, and the user resumes."""
    run.kill("node1", r"python raytune_bayesian.py")
    run.resume()
    return []


def head_node(run: Run) -> list[str]:
    """All processes of the head's node are killed, Slurm's daemon too. Slurm sees that and requeues the job."""
    run.cluster.stop("node1", signal.SIGKILL)
    run.kill("node1", r".")
    # Otherwise Slurm waits SlurmdTimeout.
    run.cluster.run("node2", "scontrol", "update", "node=node1", "state=down", "reason=died")
    for path in run.project.temporary.iterdir():  # on the node's own disk
        shutil.rmtree(path)
    run.cluster.start_node("node1")
    run.project.wait_for("the node's return", lambda: set(run.cluster.states()) == {"idle"})
    return []


def raylet(run: Run) -> list[str]:
    """Ray's daemon on a worker node is killed."""
    run.kill("node2", r"/raylet/raylet ")
    return ["node2"]


def trial_process(run: Run) -> list[str]:
    """The worker processes of two trials are killed."""
    run.kill("node2", r"ray::ImplicitFunc")
    return ["node2"]


def worker_job(run: Run) -> list[str]:
    """The user cancels a worker job."""
    worker = next(j for j in run.project.workers(run.job) if run.cluster.job(j)["NodeList"] == "node2")
    run.cluster.run("node1", "scancel", worker)
    return ["node2"]


def link(run: Run) -> list[str]:
    """The network link of a worker node is down for a minute."""
    sh("ip link set veth-node2 down")
    time.sleep(60)
    sh("ip link set veth-node2 up")
    return ["node2"]


def hung(run: Run) -> list[str]:
    """The worker processes of two trials are stopped. The watchdog ends them."""
    run.kill("node2", r"ray::ImplicitFunc", signal.SIGSTOP)
    return ["node2"]


def gpu(run: Run) -> list[str]:
    """Trials that start on a node raise what a broken GPU raises; no GPU is here."""
    (run.output / "x" / "broken-node2").touch()
    given_up = "is given up: a GPU of its node fails"
    run.project.wait_for("the node to be given up", lambda: given_up in run.project.log(run.job), 200)
    return ["node2"]


def storage(run: Run) -> list[str]:
    """A file server is gone for a minute: who reads or writes there waits."""
    sh(f"fsfreeze --freeze {run.output}")
    time.sleep(60)
    sh(f"fsfreeze --unfreeze {run.output}")
    return []


def disk(run: Run) -> list[str]:
    """The file system of the results is full, until the search waits."""
    filler = run.output / "filler"
    sh(f"cat /dev/zero > {filler}", check=False)
    run.project.wait_for("the search to wait", lambda: "\nwaiting for " in run.project.log(run.job), 200)
    filler.unlink()
    run.hit_at = time.time()  # what went before is the user's own time
    return []


FAULTS = {
    time_limit: ("time limit, requeue", "head job"),
    scancel: ("scancel, --resume", "head job"),
    driver: ("kill -9, --resume", "the script"),
    head_node: ("node dies, requeue", "head's node"),
    raylet: ("kill -9", "raylet of a worker"),
    trial_process: ("kill -9", "processes of two trials"),
    worker_job: ("scancel", "worker job"),
    link: ("link down for 60 s", "worker's node"),
    hung: ("SIGSTOP, 40 s timeout", "processes of two trials"),
    storage: ("gone for 60 s", "results"),
    disk: ("full", "results"),
    gpu: ("GPU fails (CUDA error)", "a worker's node"),
}


PLANNED = (time_limit, storage)  # nothing may run again


def main() -> None:
    """Runs a search for each fault, and prints the table."""
    chosen = [fault for fault in FAULTS if fault.__name__ in sys.argv[1:] or len(sys.argv) == 1]
    plan, lost_in_all = planned(), 0
    print(f"{'fault':26} {'where':24} {'run again':>10} {'lost':>6} {'seconds to go on':>18}")
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder, contextlib.ExitStack() as stack:
        small = Path(folder) / "small"  # a file system of its own, made before the nodes start: they must see it
        small.mkdir()
        sh(f"truncate -s 400M {small}.img && mkfs.ext4 -q {small}.img && mount -o loop {small}.img {small}")
        stack.callback(sh, f"fsfreeze --unfreeze {small}; umount {small}", check=False)
        cluster = stack.enter_context(SlurmCluster(Path(folder)))
        for inject in chosen:
            here = Path(folder) / inject.__name__
            more = ["--trial_timeout", 40] if inject is hung else []
            run = Run(cluster, here, small if inject in (disk, storage) else here / "results", *more)
            before = run.iterations()
            fault, where = FAULTS[inject]
            nodes = inject(run)
            last_node = {row["trial_id"]: row["node"] for row in before}
            hit = {trial for trial, node in last_node.items() if node in nodes or not nodes}
            state = run.project.wait_for_end(run.job, 400)
            if state != ("COMPLETED", "0:0"):
                raise RuntimeError(f"{state}\n{run.project.log(run.job)}")
            rows = run.iterations()
            trials = files.read_csv(run.rows.with_name("trials.csv"))
            ended = Counter(t["training_iteration"] for t in trials if t["status"] != "failed")
            again = len(rows) - len({(r["trial_id"], r["training_iteration"]) for r in rows})
            lost = sum((plan - ended).values())
            since = max(run.hit_at, run.gone_at)
            later = [r for r in rows if r["ended_at"] > since and (r["trial_id"] in hit or not nodes)]
            seconds = min((r["ended_at"] - run.hit_at for r in later), default=float("nan"))
            lost_in_all += lost
            if again > allowed(before, hit if inject not in PLANNED else set()):
                raise RuntimeError(f"{fault}: {again} iterations were run again, more than one rung of the trials hit")
            print(f"{fault:26} {where:24} {again:10} {lost:6} {seconds:18.0f}", flush=True)
            run.project.wait_for("nothing left", lambda: not cluster.queue(), 60)
            shutil.rmtree(here)
            shutil.rmtree(small / "x", ignore_errors=True)
    if lost_in_all:
        raise SystemExit(f"{lost_in_all} trials were lost")


if __name__ == "__main__":
    main()
