"""One sbatch on a real Slurm cluster of three nodes (tests/slurm_cluster.py).

Trials run on the CPU behind fake GPUs.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray

import slurm_cluster
from conftest import ROOT
from faulty import SLOW, reporting
from hpo import arguments, errors, files, machines
from hpo.cluster import idle_nodes
from slurm_cluster import BOTH_GPUS, NODES, OWN, TWO_NODES, Project, SlurmCluster, sh, wait_for
from test_run import closing_block

LONG = ["--max_t", 50, "--num_train_epochs", 10, "--max_eval_samples", 20]  # slowed down, goes on until it is cancelled
SHORT = ["--max_t", 4, "--num_train_epochs", 0.2, "--max_eval_samples", 10, "--num_samples", 6]


@pytest.fixture(scope="module")
def cluster():
    reason = slurm_cluster.missing()
    if reason:
        assert not os.environ.get("CI"), f"the Slurm tests must run here, but {reason}"
        pytest.skip(f"no Slurm cluster: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with SlurmCluster(folder) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture()
def project(cluster, tmp_path):
    # with the scripts' own folder in it, the longest name that Ray's sockets have room for
    temporary = Path(tempfile.mkdtemp(prefix="t-".ljust(13, "x"), dir="/tmp"))
    project = Project(cluster, tmp_path, temporary)
    yield project
    cluster.run("node1", "scancel", "--user", "root", check=False)
    for node in NODES:
        cluster.run("node1", "scontrol", "update", f"node={node}", "state=resume", check=False)
    try:
        wait_for("nothing left of the jobs", lambda: not project.left_over(), 400)
    except RuntimeError as error:
        raise RuntimeError(f"{error}: {project.left_over()}") from None
    finally:
        shutil.rmtree(temporary)


@pytest.fixture(scope="module")
def tiny(tiny_model, tiny_squad):
    return ["--model", tiny_model, "--dataset", tiny_squad]


# -- 1. the whole -----------------------------------------------------------------------------------------------------


def test_search_on_two_nodes(project, tiny):
    """Four trials at a time on two nodes of two GPUs, never two on one, in one process each; the log ends with the
    result; nothing is left. It is submitted from an interactive step that has a GPU.
    """
    with_gpu = 'socket.gethostname() + " GPU " + os.environ["CUDA_VISIBLE_DEVICES"] + " " + str(os.getpid())'
    project.hand(reporting(with_gpu, slow=True))
    job = project.submit(
        *tiny, "--max_t", 16, "--num_train_epochs", 0.4, "--max_eval_samples", 20, "--run_name", "whole",
        NUM_WORKERS="2", SLURM_STEP_GPUS="0", **BOTH_GPUS,
    )  # fmt: skip
    assert project.wait_for_end(job) == ("COMPLETED", "0:0"), project.log(job)
    assert project.left_over() == {}
    log = project.log(job)
    assert "trials run in worker jobs, as NUM_WORKERS is 2; worker jobs" in log
    result, rows = closing_block(log)
    assert len(rows) == 2 + 25 and len(log.splitlines()) < 400
    folder = project.folder / "results" / "whole"
    assert json.loads((folder / "best_result.json").read_text()) == result
    iterations = files.read_csv(folder / "iterations.csv")
    gpus = {i["node"] for i in iterations}  # one process on each, from the start to the end
    assert sorted(gpu.rsplit(" ", 1)[0] for gpu in gpus) == [f"{n} GPU {g}" for n in ("node2", "node3") for g in (0, 1)]
    most = {gpu: most_at_a_time([i for i in iterations if i["node"] == gpu]) for gpu in gpus}
    assert set(most.values()) == {1}, most
    assert most_at_a_time(iterations) == 4
    run = json.loads((folder / "run.json").read_text())
    elapsed = [project.cluster.job(worker)["RunTime"].split(":") for worker in project.workers(job)]
    paid = sum(2 * (60 * int(h) + int(m) + int(s) / 60) for h, m, s in elapsed)  # GPU-minutes
    print(
        f"GPU-minutes: {paid:.2f} by Slurm's elapsed times, {run['gpu_minutes']['allocated']:.2f} while the search ran"
    )
    in_use = 0  # from a node's first trial to its last: the bill has that and more, and never more than Slurm
    for node in ("node2", "node3"):
        times = [(i["started_at"], i["ended_at"]) for i in iterations if i["node"].startswith(node)]
        in_use += 2 * (max(t for _, t in times) - min(t for t, _ in times)) / 60
    assert in_use < run["gpu_minutes"]["allocated"] < paid
    for worker in project.workers(job):
        assert (
            project.cluster.job(worker)["ExitCode"] == "0:0" and project.cluster.job(worker)["JobState"] == "COMPLETED"
        )
        text = (project.folder / "logs" / f"ray_worker_bloom_bohb-{worker}.out").read_text()
        assert re.search(r"joined 10.77.0.1:\d+: node[23], 2 CPUs, 2 GPUs \(0,1\), 3072 MB\n", text), text
        assert re.search(r"the head says that it is over\n.*left after \d+ s, exit code 0\n$", text), text


def most_at_a_time(iterations: list[dict]) -> int:
    """Most iterations under way at one time."""
    events = sorted([(i["started_at"], 1) for i in iterations] + [(i["ended_at"], -1) for i in iterations])
    now = most = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most


@pytest.fixture
def reservation(project):
    """A reservation of node1 and node2."""
    run = project.cluster.run
    run("node1", "scontrol", "create", "reservation", "ReservationName=class", "StartTime=now", "Duration=60",
        "Users=root", "Nodes=node1,node2")  # fmt: skip
    yield "class"
    run("node1", "scancel", "--user", "root")  # of a test that has failed
    wait_for("the end of the jobs", lambda: not project.cluster.queue(), 400)
    run("node1", "scontrol", "delete", "ReservationName=class")


def test_what_the_head_was_given_goes_to_its_workers(project, tiny, reservation):
    """And the log says why a worker waits, in Slurm's word and in plain words."""
    run = project.cluster.run
    with open(project.folder / "cluster.env", "a") as file:
        file.write("WORKER_OPTIONS=(--comment='of cluster.env' --nice=7)\nexport SBATCH_JOB_NAME=mine\n")
    run("node1", "scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=test")
    try:
        job = project.submit(
            *tiny, "--max_t", 1, "--num_samples", 2, "--max_eval_samples", 9, "--num_train_epochs", 0.1,
            options=[
                f"--reservation={reservation}", "--constraint=fast", "--licenses=squad:1", "--time=50", "-x", "node3",
            ],
            GPUS_PER_NODE="v100:1",
        )  # fmt: skip
        reasons = "ReqNodeNotAvail, UnavailableNodes:node2: nodes that it could use|Reservation: its|Resources: no"
        waits = rf"waiting in the queue: (\d+) \(({reasons}) "
        project.wait_for("the reason", lambda: re.search(waits, project.log(job)), 120)
    finally:
        run("node1", "scontrol", "update", "NodeName=node2", "State=RESUME")
    assert project.wait_for_end(job) == ("COMPLETED", "0:0"), project.log(job)
    (worker,) = project.workers(job)
    assert re.search(waits, project.log(job)).group(1) == worker
    found = project.cluster.job(worker)
    assert found["Reservation"] == reservation and found["Features"] == "fast" and found["Licenses"] == "squad:1"
    assert found["TimeLimit"] == "00:50:00" and found["Nice"] == "7" and found["NodeList"] == "node2"
    assert found["JobName"] == "ray_worker_bloom_bohb" and found["MinMemoryNode"] in ("3G", "3072M")
    assert found["TresPerNode"].endswith("gpu:v100:1") and found["ExcNodeList"] == "node[1,3]"
    assert project.left_over() == {}


OTHERS = {"WORKER_ACCOUNT": "lab", "WORKER_PARTITION": "main", "WORKER_CONSTRAINT": "fast", "WORKER_TIME": "45"}


@pytest.mark.parametrize(
    "settings, asked",
    [
        ({"GPU_REQUEST": "--gres=gpu:a100:2", **OTHERS}, "gpu:a100:2"),
        ({"GPUS_PER_NODE": "0", "SQUEUE_PARTITION": "closed"}, "0"),
    ],
)
def test_request_of_the_workers(project, tiny, settings, asked):
    """On node3, which has the a100. Variables of cluster.env are not those of the scripts."""
    exclusive = asked != "0"  # a whole node, its GPUs too
    options = "--exclude=node2 --qos=normal " + ("--exclusive" if exclusive else "--mem-per-cpu=1G")
    with open(project.folder / "cluster.env", "a") as file:
        file.write(f"WORKER_OPTIONS=({options})\nscratch=/nowhere workers=(77)\n")
    settings = BOTH_GPUS | settings | ({"MEM_PER_NODE": ""} if exclusive else {})
    job = project.submit(*tiny, "--max_t", 1, "--num_samples", 1, "--num_train_epochs", 0.1, **settings)
    project.wait_for("the worker", lambda: " joined " in project.log(job))
    (worker,) = project.workers(job)
    found = project.cluster.job(worker)
    assert found.get("TresPerNode", "0").endswith(asked) and found["NodeList"] == "node3"
    assert (found["QOS"], found["OverSubscribe"]) == ("normal", "NO" if exclusive else "OK")
    assert found["MinMemoryCPU"] == ("1000M" if exclusive else "1G")  # the cluster's default, where none is asked for
    if "WORKER_TIME" in settings:
        assert (found["Account"], found["Features"], found["TimeLimit"]) == ("lab", "fast", "00:45:00")
    assert f"{asked[-1]} GPUs" in project.log(job)
    project.cluster.run("node1", "scancel", job)
    project.wait_for_end(job)
    assert project.left_over() == {}


def test_trials_of_two_gpus(project, tiny):
    """Each trial has both GPUs of a node, a rank on each, and ZeRO 3 splits the model between them.

    The second rank of the first trial fails: so has the trial, once, and the search goes on.
    """
    zero3 = project.folder / "ds_config.json"
    each = '"+".join(trial.group.gather(socket.gethostname() + " GPU " + os.environ["CUDA_VISIBLE_DEVICES"]))'
    once = f"""
reporting_train = train


def train(config, setup, trial):
    def fail():
        raise ValueError("no second rank")

    if trial.group.rank == 1:
        with contextlib.suppress(FileExistsError):  # in one trial only
            Path("{project.folder}/failed").touch(exist_ok=False)
            trial.must_stop = fail  # at its first step
    reporting_train(config, setup, trial)
"""
    project.hand(reporting(each) + once)
    zero3.write_text(json.dumps(json.loads(zero3.read_text()) | {"zero_optimization": {"stage": 3}}))
    job = project.submit(*tiny, *SHORT[:-1], 3, "--gpus_per_trial", 2, "--run_name", "x", **BOTH_GPUS)
    assert project.wait_for_end(job) == ("COMPLETED", "0:0"), project.log(job)
    assert project.left_over() == {}
    iterations = files.read_csv(project.folder / "results" / "x" / "iterations.csv")
    where = [tuple(sorted(i["node"].split("+"))) for i in iterations]
    assert set(where) == {("node2 GPU 0", "node2 GPU 1")} and most_at_a_time(iterations) == 1
    trials = files.read_csv(project.folder / "results" / "x" / "trials.csv")
    assert sorted(t["training_iteration"] for t in trials) == [0, 1, 4], project.log(job)
    assert [t["status"] for t in trials if t["training_iteration"] == 0] == ["failed"]
    assert re.search("failed after 0 iterations: .*TrialFailed: ValueError no second rank", project.log(job)), (
        project.log(job)
    )
    assert "goes on from iteration" not in project.log(job)


# -- 2. three ways: worker jobs (above), one job on one node, one job on several nodes ---------------------------------


def gpus_used(project, name="x") -> list[str]:
    """Where iterations ran, as written by `reporting(WITH_GPU)`."""
    iterations = project.folder / "results" / name / "iterations.csv"
    return sorted({i["node"] for i in files.read_csv(iterations)}) if iterations.exists() else []


WITH_GPU = 'socket.gethostname() + " GPU " + os.environ["CUDA_VISIBLE_DEVICES"]'


def test_one_job_on_one_node(project, tiny):
    """On a node that may not submit jobs. Two trials share each GPU. The environment changes the search space, and the
    ds_config is of the kind that workshops hand out.
    """
    project.hand(reporting(WITH_GPU, slow=True))
    ds_config = {"fp16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}}
    ds_config |= {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"offload_param": {"device": "none"}}}
    (project.folder / "workshop.json").write_text(json.dumps(ds_config))
    job = project.submit(
        *tiny, *SHORT, "--run_name", "x", "--gpus_per_trial", 0.5, "--deepspeed", "workshop.json", node="node2",
        options=["--gpus-per-node=2", "--cpus-per-task=4", "--mem=6G"], NUM_WORKERS="0",
        LR_LOWER="1e-5", BS_CHOICES="2",
    )  # fmt: skip
    assert project.wait_for_end(job) == ("COMPLETED", "0:0"), project.log(job)
    log = project.log(job)
    way = "trials run in this job, on node2, as NUM_WORKERS is 0, with 2 GPUs and 4 CPUs a node"
    assert f"[head] job {job} on node2: {way}\n" in log
    assert "worker on node2 joined node2, 4 CPUs, 2 GPUs (0,1), 6144 MB" in log and "worker job" not in log
    assert len(closing_block(log)[1]) == 2 + 6 and "on 4 slots" in log
    assert "train_micro_batch_size_per_gpu 4 is replaced by each trial's per_device_bs" in log
    assert "LR_LOWER=1e-5 in the environment: lr is loguniform(1e-05, 0.0002)" in log
    assert gpus_used(project) == ["node2 GPU 0", "node2 GPU 1"]
    rows = files.read_csv(project.folder / "results" / "x" / "trials.csv")
    assert all(row["learning_rate"] >= 1e-5 and row["batch_size"] == 2 for row in rows)
    run = json.loads((project.folder / "results" / "x" / "run.json").read_text())
    assert run["environment"] == {"LR_LOWER": "1e-5", "BS_CHOICES": "2"}
    assert 0 < run["gpu_minutes"]["busy"] < run["gpu_minutes"]["allocated"]
    assert project.left_over() == {}


def test_without_gpus_in_a_container_and_with_ipv6(project, tiny):
    """One job on two nodes, on an interface that has an IPv6 address only. A command stands in for a container: it
    alone has a Python with the packages.
    """
    tools = project.folder / "tools"
    tools.mkdir()
    (tools / "container").write_text(f"""#!/usr/bin/env bash
echo "$2" >> "{tools}/ran-$(hostname)"
PATH={sys.prefix}/bin:$PATH exec "${{@:2}}"
""")
    for name in ("python", "ray"):
        (tools / name).write_text("#!/bin/sh\nexit 1\n")
    for path in tools.iterdir():
        path.chmod(0o755)
    job = project.submit(
        *tiny, *SHORT, options=["--nodes=2", "--cpus-per-task=1", "--mem=6G"], node="node[1-2]", VENV="/nowhere",
        CONTAINER=f"{tools}/container exec", PATH=f"{tools}:{os.environ['PATH']}", NETWORK_INTERFACE="six",
    )  # fmt: skip
    assert project.wait_for_end(job) == ("COMPLETED", "0:0"), project.log(job)
    log = project.log(job)
    assert "Ray is up at [fd77::1]:" in log and "no GPU: training in fp32 on the CPU" in log and "on 2 slots" in log
    # on node1 the head's checks, its Ray and the script, and on both nodes a worker's check and its Ray
    # (once more where Ray did not start at once)
    ran = [(tools / f"ran-{node}").read_text().split() for node in ("node1", "node2")]
    assert ran[0].count("python") == 4 and ran[0].count("ray") >= 2 and ran[1][:2] == ["python", "ray"]
    assert project.left_over() == {}


def test_one_job_on_several_nodes(project, tiny):
    """Ray ends on one of them, and is started again there. Another one is lost: its trials go on on the others."""
    go_on = project.folder / "go_on"
    project.hand(reporting(WITH_GPU, slow=True, hold=go_on))
    arguments = ["--max_t", 16, "--num_train_epochs", 0.6, "--max_eval_samples", 10, "--num_samples", 16]
    in_session = {"SLURM_GPUS": "2"}  # submitted from a session that has --gpus
    options = ["--nodes=3", *OWN]
    job = project.submit(*tiny, *arguments, "--run_name", "x", node="node[1-3]", options=options, **in_session)
    try:
        project.wait_for_search(job)
        project.wait_for("trials on all nodes", lambda: len(gpus_used(project)) == 3)
        (token,) = project.folder.glob("results/.ray-*/token")
        assert token.stat().st_mode & 0o777 == 0o600
        project.cluster.kill_raylet("node2")
        project.wait_for("the restart", lambda: project.log(job).count("worker on node2 joined") == 2)
        assert "the worker on node2 has ended\n[head] another one is started there (1 of" in project.log(job)
        project.cluster.stop("node3", signal.SIGKILL)
        for pid in project.cluster.processes("node3"):
            with contextlib.suppress(ProcessLookupError):  # it may end with one that was killed before
                os.kill(pid, signal.SIGKILL)
        project.cluster.run("node1", "scontrol", "update", "node=node3", "state=down", "reason=lost")
        project.wait_for("the loss", lambda: "the worker on node3 has ended" in project.log(job))
        go_on.touch()
        assert project.wait_for_end(job) == ("COMPLETED", "0:0"), project.log(job)
    finally:
        project.cluster.start_node("node3")
    log = project.log(job)
    assert "trials run in this job, on its 3 nodes, as it has several (--nodes)" in log and "worker job" not in log
    assert all(f"worker on node{i} joined node{i}, 2 CPUs, 1 GPUs" in log for i in (1, 2, 3))
    assert "on 3 slots" in log and "goes on from iteration" in log and log.count("another one is started") == 1
    trials = files.read_csv(project.folder / "results" / "x" / "trials.csv")
    assert sorted(t["training_iteration"] for t in trials) == [1] * 12 + [4] * 3 + [16]
    run = json.loads((project.folder / "results" / "x" / "run.json").read_text())
    assert 0 < run["gpu_minutes"]["busy"] < run["gpu_minutes"]["allocated"] < 3 * run["seconds"] / 60
    assert project.left_over().keys() <= {"temporary"} and len(list(project.temporary.iterdir())) <= 1
    for path in project.temporary.iterdir():  # of the lost node: its next job would remove it
        shutil.rmtree(path)


@pytest.mark.parametrize("flag", ["--plan", "--prefetch"])
def test_what_needs_no_ray_runs_in_the_head_job_alone(project, tiny, flag):
    """The plan is for the job's own GPUs."""
    job = project.submit(*tiny, *SHORT, flag, options=["--gpus-per-node=2", *OWN[1:]], NUM_WORKERS="0")
    assert project.wait_for_end(job) == ("COMPLETED", "0:0"), project.log(job)
    says = {"--plan": "the nodes for trials have 2 slots", "--prefetch": "trying the model"}
    assert says[flag] in project.log(job)
    assert "[head]" not in project.log(job) and project.left_over() == {}


def test_check(project, tiny):
    """--check on two nodes: one is ok, the GPU of the other fails."""
    with open(project.folder / "cluster.env", "a") as file:
        file.write("[[ $SLURMD_NODENAME != node3 ]] || export GPU_CHECK_SAYS='CUDA error: uncorrectable ECC error'\n")
    job = project.submit(*tiny, *SHORT, "--check", **TWO_NODES)
    assert project.wait_for_end(job) == ("FAILED", "2:0"), project.log(job)
    log = project.log(job)
    assert re.search(r"(?m)^node2 .* ok$", log), log
    assert re.search(r"(?m)^node3 .* CUDA error: uncorrectable ECC error", log), log
    assert "--check: 1 of 2 nodes are not ok, see the table above" in log and "GPU-hours" in log
    found = json.loads((project.folder / "results" / f"check-{job}" / "check.json").read_text())
    assert [len(node["trials"]) for node in found["nodes"]] == [1, 0] and not found["ok"]
    assert project.left_over() == {}


def test_check_in_one_job(project, tiny):
    """On one node, by --gres, and on two, whose GPUs Slurm does not count: each node has its row, there is a plan, and
    no other job is submitted.
    """
    one = project.submit(*tiny, *SHORT, "--check", options=["--gres=gpu:v100:1", *OWN[1:]], NUM_WORKERS="0")
    uncounted = {"GPU_REQUEST": "none", "GPUS_PER_NODE": "1", "SLURM_MEM_PER_CPU": "100"}  # as within another job
    two = project.submit(*tiny, *SHORT, "--check", node="node[2,3]", options=["--nodes=2", *OWN[1:]], **uncounted)
    for job, nodes in ((one, ["node1"]), (two, ["node2", "node3"])):
        assert project.wait_for_end(job) == ("COMPLETED", "0:0"), project.log(job)
        log = project.log(job)
        for node in nodes:
            assert re.search(rf"(?m)^{node} .* ok$", log), log
        assert f"on the nodes that are ok ({len(nodes)} of {len(nodes)})" in log and "worker job" not in log
        found = json.loads((project.folder / "results" / f"check-{job}" / "check.json").read_text())
        assert found["ok"] and [len(node["trials"]) for node in found["nodes"]] == [1] * len(nodes)
        assert all(f"worker on {node} joined {node}, 2 CPUs, 1 GPUs" in log for node in nodes)
    assert project.left_over() == {}


# -- side by side
# ----------------------------------------------------------------------------------------------------


def test_experiments_in_one_folder(project, tiny):
    """Two run side by side. One is cancelled, the other one goes on to its end."""
    project.hand(SLOW)
    cancelled, job = project.submit(*tiny, *LONG), project.submit(*tiny, *SHORT)
    for each in (cancelled, job):
        project.wait_for_search(each)
    project.cluster.run("node1", "scancel", cancelled)
    assert project.wait_for_end(cancelled)[0] == "CANCELLED"
    assert project.wait_for_end(job) == ("COMPLETED", "0:0"), project.log(job)
    result, rows = closing_block(project.log(job))
    folder = project.folder / "results" / f"bloom_bohb-{job}"
    assert json.loads((folder / "best_result.json").read_text()) == result and len(rows) == 2 + 6
    assert {row[0] for row in rows[2:]} == {t["trial_id"] for t in files.read_csv(folder / "trials.csv")}
    assert project.left_over() == {}


# -- 3. nobody else ---------------------------------------------------------------------------------------------------


def test_nobody_else_gets_in(project, tiny):
    """Another user on the head's node, a client on another node without the token, and a scan of the head's ports."""
    project.hand(SLOW)
    job = project.submit(*tiny, *LONG)
    project.wait_for_search(job)
    address = re.search(r"Ray is up at (\S+)", project.log(job)).group(1)
    dashboard = re.search(r"-L 8265:127.0.0.1:(\d+) ", project.log(job)).group(1)
    token = next(project.folder.glob("results/.ray-*/token"))
    assert token.stat().st_mode & 0o777 == 0o600 and token.parent.stat().st_mode & 0o777 == 0o700
    assert oct(next(project.temporary.iterdir()).stat().st_mode & 0o777) == "0o700"

    def connect(node, *before, **environment):
        init = f"ray.init('{address}', log_to_driver=False)"
        script = "\n".join(["import contextlib, os, ray", *before, init, "print('IN')"])
        command = project.cluster.command(node, sys.executable, "-c", script)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY")} | environment
        limited = ["timeout", "60", *command]  # a refused client may try for minutes
        return subprocess.run(limited, capture_output=True, text=True, timeout=200, env=environment)

    with_token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    assert "IN" in connect("node1", **with_token).stdout  # the owner can: the others fail for want of the token

    wrong = project.folder / "wrong"
    wrong.write_text("0" * 64)
    without, with_wrong = {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(wrong)}
    # Another user, who may not be able to read the packages here: a first attempt loads all of them, as root.
    another = [f"with contextlib.suppress(BaseException): ray.init('{address}')", "os.setgid(65534); os.setuid(65534)"]
    attempts = [("node1", with_wrong, []), ("node3", without, []), ("node1", without, another)]
    with ThreadPoolExecutor(3) as pool:
        for outcome in pool.map(lambda attempt: connect(attempt[0], *attempt[2], **attempt[1]), attempts):
            assert outcome.returncode != 0 and "IN" not in outcome.stdout
            assert re.search("(?i)unauthenticated|invalid.?auth.?token|authentication", outcome.stderr), outcome.stderr[
                -2000:
            ]

    # as another user: the token's folder and Ray's sockets are closed to him
    probe = (
        "import os, glob; os.setgid(65534); os.setuid(65534)\n"
        f"for path in ['{token}', '{token.parent}/head', *{[str(p) for p in project.temporary.iterdir()]!r}]:\n"
        "    try: (os.listdir if path.startswith('/tmp/t-') else open)(path); print('READ', path)\n"
        "    except PermissionError: print('closed', path)\n"
    )
    out = project.cluster.run("node1", sys.executable, "-c", probe)
    assert out.count("closed") >= 3 and "READ" not in out

    # jobs over the dashboard: on loopback only, and not without the token
    open_ports = {int(p) for p in re.findall(r":(\d+) ", sh("ip netns exec node1 ss -Hltn"))}
    listening = sh("ip netns exec node1 ss -Hltn").splitlines()
    assert [line.split()[3] for line in listening if line.split()[3].endswith(f":{dashboard}")] == [
        f"127.0.0.1:{dashboard}"
    ]
    post = "curl -s -m 5 -o /dev/null -w '%{http_code}' -X POST -H 'Content-Type: application/json'"
    post += ' -d \'{"entrypoint": "id"}\''
    other_user = "setpriv --reuid=65534 --regid=65534 --clear-groups"
    assert project.cluster.run("node1", "sh", "-c", f"{other_user} {post} http://127.0.0.1:{dashboard}/api/jobs/") in (
        "401",
        "403",
    )
    answers = {}
    for port in open_ports - {6818}:
        url = f"http://{project.cluster.address('node1')}:{port}/api/jobs/"
        answers[port] = project.cluster.run("node3", "sh", "-c", f"{post} {url} || true")
    assert not [port for port, code in answers.items() if code.startswith("2")], answers
    assert answers[int(dashboard)] == "000"  # no connection


# -- 4. cancelled, late, never
# ------------------------------------------------------------------------------------------


def drain(project, *nodes):
    for node in nodes:
        project.cluster.run("node1", "scontrol", "update", f"node={node}", "state=drain", "reason=test")


def cancel_and_resume(project, job, **how):
    """Cancels a job while it searches: nothing is left, and --resume goes on."""
    project.cluster.run("node1", "scancel", job)
    wait_for("nothing left of the jobs", lambda: not project.left_over(), 400)
    assert project.cluster.job(job)["JobState"] == "CANCELLED"
    assert "[head] ended after" in project.log(job) and "exit code 143" in project.log(job)
    job = project.submit("--resume", "--run_name", "x", **how)
    project.wait_for("the same search", lambda: "going on with a search" in project.log(job))
    project.cluster.run("node1", "scancel", job)
    wait_for("nothing left of the jobs", lambda: not project.left_over(), 400)


def test_a_worker_that_comes_late_joins_the_head_s_own_gpus(project, tiny):
    """It is of the same type as these. All of it is cancelled, and goes on."""
    project.hand(reporting(WITH_GPU, slow=True))
    drain(project, "node2")
    options = ["--gpus-per-node=v100:2", "--cpus-per-task=2"]
    job = project.submit(*tiny, *LONG, "--run_name", "x", options=options)
    project.wait_for_search(job)
    assert gpus_used(project) == ["node1 GPU 0", "node1 GPU 1"][: len(gpus_used(project))]
    project.cluster.run("node1", "scontrol", "update", "node=node2", "state=resume")
    project.wait_for("trials on all GPUs", lambda: len(gpus_used(project)) == 3)
    log = project.log(job)
    assert "as NUM_WORKERS is 1, and in this job, as it has GPUs; worker jobs" in log and "on 3 slots" in log
    assert "WARNING: trials on 2 GPUs have 8 GB of memory, the default of head_node.slurm: sbatch --mem" in log
    assert gpus_used(project) == ["node1 GPU 0", "node1 GPU 1", "node2 GPU 0"]
    assert project.cluster.job(project.workers(job)[0])["TresPerNode"].endswith("gpu:v100:1")
    cancel_and_resume(project, job, options=options)


@pytest.mark.parametrize(
    "how", [{"options": OWN, "NUM_WORKERS": "0"}, {"node": "node[1-2]", "options": ["--nodes=2", *OWN]}]
)
def test_scancel_of_one_job_is_clean(project, tiny, how):
    """On one node, and on two."""
    project.hand(SLOW)
    job = project.submit(*tiny, *LONG, "--run_name", "x", **how)
    project.wait_for_search(job)
    cancel_and_resume(project, job, **how)


@pytest.mark.parametrize("phase", ["before workers", "waiting"])
def test_scancel_before_the_search_is_clean(project, tiny, phase):
    """A worker waits because the GPU of another node has failed: it is submitted again, and not to that node."""
    if phase == "waiting":
        drain(project, "node3")
        with open(project.folder / "cluster.env", "a") as file:
            file.write("export GPU_CHECK_SAYS='CUDA error: uncorrectable ECC error'\n")
    job = project.submit(*tiny, *LONG)
    if phase == "before workers":
        project.wait_for(
            "the preflight", lambda: any("import ray" in p for p in project.cluster.processes("node1").values())
        )
        assert "worker jobs" not in project.log(job)
    else:
        project.wait_for("the wait for workers", lambda: "waiting in the queue" in project.log(job))
        said = r"has a broken GPU on node2: CUDA error: .*\n(?:.*\n)*.*worker job (\d+) replaces it \(1 of at"
        project.wait_for("the replacement", lambda: re.search(said, project.log(job)))
        replaces = re.search(said, project.log(job))[1]
        assert project.cluster.job(replaces)["ExcNodeList"] == "node[1-2]", project.log(job)
    project.cluster.run("node1", "scancel", job)
    wait_for("nothing left of the jobs", lambda: not project.left_over(), 400)
    assert project.cluster.job(job)["JobState"] == "CANCELLED"
    assert "[head] ended after" in project.log(job) and "exit code 143" in project.log(job)


@pytest.mark.parametrize(
    "script, says",
    [
        ("head_node.slurm", r"\[head\] ended after \d+ s, exit code 143"),
        ("worker_node.slurm", r"left after \d+ s, exit code 143"),
    ],
)
def test_a_cancel_while_a_job_ends_leaves_nothing_undone(tmp_path, script, says):
    """The signal comes in the first lines of what a job does at its end: here each job ends at once, without Slurm."""
    shutil.copy(ROOT / script, tmp_path)
    # Bash sources BASH_ENV before a script. The trap sends the signal before the third command of cleanup.
    (tmp_path / "hit.sh").write_text("""set -T
trap '[[ ${FUNCNAME[0]-} != cleanup ]] || { echo >> steps; [[ $(wc -l < steps) != 3 ]] || kill -TERM $$; }' DEBUG
""")
    rendezvous = tmp_path / "rendezvous"
    rendezvous.mkdir()
    (rendezvous / "head").write_text("down\n")
    (rendezvous / "version").write_text(ray.__version__ + "\n")
    shutil.copy(ROOT / "cluster.env", tmp_path)  # and no raytune_bayesian.py for the head
    copy_functions(tmp_path)
    environment = {
        **os.environ,
        "VENV": sys.prefix,
        "SLURMD_NODENAME": "node1",
        "SLURM_JOB_ID": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    environment["BASH_ENV"] = str(tmp_path / "hit.sh")
    process = subprocess.run(
        ["bash", script, str(rendezvous)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (tmp_path / "steps").read_text().count("\n") >= 3 and process.returncode == 143, process
    assert re.search(says, process.stdout), process


def run_functions(folder, command, *arguments):
    """Runs commands of bash with the functions of head_node.slurm, in a folder with an empty cluster.env."""
    (folder / "cluster.env").touch()
    begin = 'log() { echo "$*"; }; die() { echo "$2"; exit "$1"; }; set_traps() { trap - ERR; }\n'
    begin += "results=r checking=0 own_nodes=()"
    begin += "".join(f"\nsource {ROOT}/hpo/cluster/{name}" for name in ("slurm.sh", "head.sh"))
    command = ["bash", "-c", f"{begin}\n{command}", "-", *arguments]
    environment = {**os.environ, "VENV": "", "CONTAINER": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_a_time_limit_that_was_changed_counts_as_it_is_now(site):
    """An hour longer than at the job's start: there is time to save, and a cancel is no time limit.

    Of Slurm the answers alone.
    """
    (site / "cluster.env").write_text("NUM_WORKERS=1\n")
    done = run_beginning(
        site,
        "head_node.slurm",
        """
squeue() { echo 1:04:30; }; timeout() { shift; "$@"; }; cleanup() { :; }
sleep 60 &> /dev/null &
SECONDS=118 time_limit=120 time_is_up=0 script=$!
save_and_requeue; echo "$time_limit $time_is_up"; cancelled; echo "$time_is_up"
kill -KILL "$script" 2> /dev/null || true # it may have ended at SIGUSR1
""",
    )
    limit, *rest = done.stdout.split()
    assert 3988 <= int(limit) < 4000 and rest == ["1", "0"], done


@pytest.mark.parametrize(
    "request_, found",
    [
        ("--gpus-per-node=4", " 4"),
        ("--gpus-per-node=a100:4", "a100 4"),
        ("--gpus-per-node=3090:4", "3090 4"),
        ("--gres=gpu:3090:2", "3090 2"),
        ("--gres=gpu:2,license:3", " 2"),
        ("--gres=mps:100,gpu:a100:10", "a100 10"),
        ("--gres=gpu:a100", " 1"),
        ("--gres=gpu:3g.20gb", " 1"),
        ("--gres=gpu", " 1"),
        ("-G4", " 4"),
        ("-G a100:4", "a100 4"),
        ("--gres=shard:4", " 7"),  # as GPUS_PER_NODE says
    ],
)
def test_number_and_type_of_gpus(monkeypatch, tmp_path, request_, found):
    """In the head job, and in the plan on a login node."""
    command = "GPU_REQUEST=$1 GPUS_PER_NODE=7; read_gpu_request; echo \"$gpu_type $GPUS_PER_NODE $request\""
    done = run_functions(tmp_path, command, request_)
    assert done.stdout == f"{found} {request_}\n", done
    (tmp_path / "sbatch").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("GPU_REQUEST", request_)
    monkeypatch.setenv("GPUS_PER_NODE", "7")
    assert machines.read_cluster_env()["GPUS_PER_NODE"] == int(found.split(" ")[1])


@pytest.mark.parametrize("request_", ["--gres=gpu:a100:4", "none"])
def test_no_gpus_whatever_the_site_asks_for(monkeypatch, tmp_path, request_):
    """GPUS_PER_NODE=0 at submission: trials train on CPUs."""
    command = 'GPU_REQUEST=$1 GPUS_PER_NODE=0; read_gpu_request; echo "$GPUS_PER_NODE $GPU_REQUEST"'
    done = run_functions(tmp_path, command, request_)
    assert done.stdout == "0 \n", done
    (tmp_path / "sbatch").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("GPU_REQUEST", request_)
    monkeypatch.setenv("GPUS_PER_NODE", "0")
    assert machines.read_cluster_env()["GPUS_PER_NODE"] == 0


@pytest.mark.parametrize(
    "reason, words",
    [
        ("ReservationDeleted", "its reservation is gone"),
        ("Reservation weekly was deleted", "its reservation is gone"),
        ("Reservation", "its reservation has not begun, "),
        ("AssocGrpGRES", "a limit of the account or the user is reached; "),
        ("MaxGRESPerAccount", "a limit of the account or the user is reached; "),
        ("QOSMaxGRESPerUser", "a limit of its QOS is reached; "),
        ("QOSMaxCpuPerJobLimit", "one job may not ask for this"),
        ("MaxMemPerLimit", "it asks for more memory than the site allows"),
        ("PartitionTimeLimit", "it asks for more than the partition allows"),
        ("BeginTime", "it waits for the time or the job"),
        ("Priority", "other jobs come first"),
        ("InvalidAccount", "its QOS or account may not be used here"),
        ("PartitionDown", "its partition is down or inactive"),
        ("BadConstraints", "no node has what it asks for"),
        ("Licenses", "its licences are in use; "),
        ("JobHoldMaxRequeue", "it is held"),
        ("SomethingNew", 'see "job reason codes"'),
    ],
)
def test_reasons_of_slurm_in_plain_words(tmp_path, reason, words):
    done = run_functions(tmp_path, 'in_words "$1"', reason)
    assert done.stdout.startswith(words), done


def test_a_reason_is_told_again_when_it_changes(tmp_path):
    """Not when only the nodes behind it do. A job that runs is not waiting."""
    command = """
timeout() { echo "$says"; }
workers=(7 8)
for says in '7 PENDING ReqNodeNotAvail, UnavailableNodes:n1' '7 PENDING ReqNodeNotAvail, UnavailableNodes:n1,n2' \
	'7 PENDING ReqNodeNotAvail, Reserved for maintenance' '7 RUNNING node1' '8 RESV_DEL_HOLD ReservationDeleted' \
	'9 PENDING Resources'; do
	log_waiting
done"""
    done = run_functions(tmp_path, command)
    said = re.compile(r"waiting in the queue: (\d) \((.*): [^:]+\)")
    told = [said.fullmatch(line).groups() for line in done.stdout.splitlines()]
    assert told == [
        ("7", "ReqNodeNotAvail, UnavailableNodes:n1"),
        ("7", "ReqNodeNotAvail, Reserved for maintenance"),
        ("8", "ReservationDeleted"),
    ], done


@pytest.mark.parametrize("end", ["stop_sessions", "kill_sessions"])
def test_the_end_does_not_wait_for_init(tmp_path, end):
    """The dead processes of a session are there until their parent, on a node mostly init, takes notice."""
    calls = 'pkill() { echo "$1"; command pkill "$@"; }'
    processes = [subprocess.Popen(["sleep", "600"], start_new_session=True) for _ in range(2)]
    try:
        done = run_functions(tmp_path, f"{calls}\n{end} $1 $2", *(str(p.pid) for p in processes))
        dead = [psutil.Process(p.pid).status() for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert dead == [psutil.STATUS_ZOMBIE] * 2, done
    assert set(done.stdout.split()) <= {"-TERM", "-KILL"} and done.stdout.count("-") <= 3, done


def test_a_worker_job_that_slurm_does_not_take_is_submitted_again(tmp_path):
    """The last worker is lost while Slurm is busy: no reason to end the search, but for as long as a worker may take.

    Of Slurm the answers alone.
    """
    command = """
in_queue() { :; }; timeout() { :; }; no_worker_left() { echo over; }
add_worker() { answer=busy; ((SECONDS >= 10)) || return 1; workers+=(8); }
workers=(7) jobs=1 joined=1 rendezvous=$PWD MAX_WORKER_RESTARTS=2 WORKER_TIMEOUT=$1
for SECONDS in 0 5 9 12; do look_after_workers; done
echo "${workers[*]}" """
    outputs = []
    for patience in (60, 7):
        done = run_functions(tmp_path, command, str(patience))
        outputs.append(done.stdout.splitlines())
    begin = ["worker job 7 has ended", "no new worker job can be submitted now, will try again: busy"]
    replaced = "worker job 8 replaces it (1 of at most 2)"
    assert outputs == [[*begin, replaced, "8"], [*begin, "over", replaced, "8"]], outputs


def test_the_first_worker_jobs_are_submitted_again_while_slurm_is_busy(tmp_path):
    """Of Slurm the answers alone. Another error ends the job at once."""
    command = """
sleep() { echo sleep; }
slurm_says=$1 node=n calls=0
add_worker() { answer=$slurm_says; ((++calls % 3 == 0)); }
submit_workers 2
echo "$calls" """
    for answer, code, says in (
        ("Socket timed out on send/recv operation", 0, "sleep\n" * 4 + "6\n"),
        ("Invalid account", 2, "no worker job can be submitted from n: Invalid account. See WORKER_PARTITION and "),
    ):
        done = run_functions(tmp_path, command, answer)
        assert done.returncode == code and done.stdout.startswith(says), done


@pytest.mark.parametrize(
    "options", ["--exclude=bad,worse", "--exclude bad,worse", "-x bad,worse", "-xbad,worse", "--nice=7 -x bad,worse"]
)
def test_nodes_that_worker_options_exclude_are_added_to_the_heads(tmp_path, options):
    command = f'node=node1 excluded=node9 WORKER_OPTIONS=({options}); set_exclude; echo "$exclude"'
    done = run_functions(tmp_path, command)
    assert done.stdout == "node1,node9,bad,worse\n", done


def test_nodes_may_have_any_name(tmp_path):
    """A worker of the head's own job tells the head that it has joined, in a file with the name of its node."""
    (tmp_path / "worker-gpu-worker-3").write_text("joined gpu-worker-3, 2 CPUs\n")
    command = 'rendezvous=$PWD own_nodes=(gpu-worker-3); read_answers; echo "${!has_answered[*]}"'
    done = run_functions(tmp_path, command)
    assert done.stdout == "worker on gpu-worker-3 joined gpu-worker-3, 2 CPUs\ngpu-worker-3\n", done


def test_a_node_that_cannot_be_used_is_left_out(tmp_path):
    """One without a folder for temporary files, and one where the job ends before it can say why."""
    (tmp_path / "worker-7").write_text("unfit bad: /scratch on bad cannot be written\n")
    command = """
in_queue() { :; }; timeout() { printf '%s\n' 'JobState=FAILED ExitCode=0:53' 'ReqNodeList=(null)' ' NodeList=worse'; }
add_worker() { workers+=($next); echo "exclude $exclude"; next=$((next + 1)); }
workers=(7) jobs=1 rendezvous=$PWD MAX_WORKER_RESTARTS=3 exclude=head next=8
read_answers; replace_lost; replace_lost
echo "${workers[*]}" """
    done = run_functions(tmp_path, command)
    lines = [line for line in done.stdout.splitlines() if "replaces it" not in line]
    assert lines == [
        "worker job 7 cannot use bad: /scratch on bad cannot be written", "worker job 7 has ended", "exclude head,bad",
        "worker job 8 has ended", "exclude head,bad,worse", "9",
    ], done  # fmt: skip


def test_the_only_node_that_cannot_be_used_ends_the_search(tmp_path):
    """Not after WORKER_TIMEOUT: Slurm says at once that no other node is there."""
    command = """
in_queue() { :; }; timeout() { printf '%s\n' 'JobState=FAILED ExitCode=1:0' ' NodeList=gpu1'; }
add_worker() { answer='Requested node configuration is not available'; return 1; }
workers=(7) jobs=1 rendezvous=$PWD MAX_WORKER_RESTARTS=3 WORKER_TIMEOUT=9 exclude=head
look_after_workers; echo goes on"""
    done = run_functions(tmp_path, command)
    says = "all workers ended before they joined: see logs/ray_worker_bloom_bohb-*\n"
    assert done.returncode == 1 and done.stdout.endswith(says), done


def test_a_results_folder_is_not_shared_when_two_nodes_say_so(tmp_path):
    """The first may be a node without the file system: a worker is tried on another one. Its two jobs are one node."""
    two = """
in_queue() { :; }; timeout() { printf '%s\n' 'JobState=FAILED ExitCode=3:0' " NodeList=n1"; }
add_worker() { workers+=(9); }
workers=(7 8) jobs=1 rendezvous=$PWD MAX_WORKER_RESTARTS=3 WORKER_TIMEOUT=9 exclude=head
look_after_workers; echo "$unshared ${workers[*]}" """
    assert run_functions(tmp_path, two).stdout.endswith("\n1 9\n")
    command = """
in_queue() { :; }; timeout() { printf '%s\n' 'JobState=FAILED ExitCode=3:0' " NodeList=n${#calls}"; }
add_worker() { calls+=x; workers+=(8); echo "exclude $exclude"; }
workers=(7) jobs=1 rendezvous=$PWD MAX_WORKER_RESTARTS=3 WORKER_TIMEOUT=9 exclude=head calls=x
look_after_workers; look_after_workers"""
    done = run_functions(tmp_path, command)
    assert done.stdout.count("exclude ") == 1 and "exclude head,n1\n" in done.stdout, done
    assert done.returncode == 2 and done.stdout.endswith("is not shared: the node of that job does not see it\n"), done


@pytest.mark.parametrize(
    "printed, worker",
    [
        ("4711", "4711"),
        ("4711;cluster", "4711"),
        ("-- welcome --\n 99 jobs --\n4711 \r\n12 h are left", "4711"),
        ("welcome", None),
    ],
)
def test_the_id_of_a_worker_job(tmp_path, printed, worker):
    """Also where a site's sbatch prints more."""
    command = """
sbatch() { echo "$says"; }
says=$1 rendezvous=$PWD scratch=$PWD SLURM_JOB_PARTITION=p CPUS_PER_NODE=1 GPUS_PER_NODE=0 request='' licences=''
qos='' reservation='' exclude=head users_tmpdir='' WORKER_OPTIONS=() WORKER_PARTITION='' WORKER_CONSTRAINT=''
WORKER_TIME=''
add_worker || echo "failed: $answer"; echo "${workers[*]-}" """
    done = run_functions(tmp_path, command, printed)
    none = "sbatch has printed no job id; a job of yours may be left in the queue"
    assert (done.stdout, done.returncode) == (f"{worker or none}\n", 0 if worker else 1), done


def test_a_worker_job_that_slurm_has_taken_although_sbatch_failed_is_known(tmp_path):
    (tmp_path / "worker-9").write_text("joined node3, 2 CPUs\n")
    done = run_functions(tmp_path, 'rendezvous=$PWD workers=(7); read_answers; echo "${workers[*]}"')
    assert done.stdout == "worker job 9 joined node3, 2 CPUs\n7 9\n", done
    assert (tmp_path / "workers").read_text() == "7 9\n"


@pytest.mark.parametrize(
    "shown, kept",
    [("MinMemoryCPU=2G", "CPU"), ("MinMemoryNode=0 MemPerTres=gres:gpu:9", "GPU"), ("MinMemoryNode=9G", "NODE")],
)
def test_srun_gets_one_number_of_memory(tmp_path, shown, kept):
    """Others are left of a job in which sbatch was called."""
    (tmp_path / "srun").write_text("#!/bin/sh\nenv | grep -o '^SLURM_MEM_PER_[A-Z]*'\n")
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "logs").mkdir()
    command = """
export PATH=$PWD:$PATH SLURM_MEM_PER_CPU=1 SLURM_MEM_PER_GPU=2 SLURM_MEM_PER_NODE=3 SLURM_JOB_ID=1
this_job=$1 rendezvous=$PWD node=node1 gpus=0 users_tmpdir=''
start_local_worker node2
while kill -0 "${local_workers[node2]}" 2> /dev/null; do sleep 0.1; done
cat logs/*"""
    done = run_functions(tmp_path, command, shown)
    assert done.stdout == f"SLURM_MEM_PER_{kept}\n", done


def test_variables_of_the_job_in_which_sbatch_was_called(site, monkeypatch):
    """A task of an array, which was restarted and has a CDPATH, may submit a search. Slurm knows what the job is."""
    (site / "cluster.env").write_text("VENV=bin\n")  # as an older one, with few settings
    (site / "bin" / "bin").mkdir(parents=True)
    (site / "bin" / "bin" / "python").touch(mode=0o755)
    (site / "scontrol").write_text("#!/bin/sh\necho JobId=1 Restarts=0 $ARRAY\n")
    (site / "scontrol").chmod(0o755)
    for name, value in {"PATH": f"{site}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2",
                        "CDPATH": f".:{site}"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    show = 'echo "$restart $SLURM_RESTART_COUNT ${#WORKER_OPTIONS[@]} $WORKER_PARTITION"; command -v python'
    done = run_beginning(site, "head_node.slurm", show)
    assert done.stdout == f"0 0 0 \n{site}/bin/bin/python\n", done
    monkeypatch.setenv("ARRAY", "ArrayJobId=1 ArrayTaskId=3")
    done = run_beginning(site, "head_node.slurm", show)
    assert done.returncode == 2 and "error: this is a job array" in done.stdout, done


def test_the_script_gets_the_time_limit_and_the_rendezvous_folder(tmp_path):
    """For the plan of --check."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$RENDEZVOUS_DIR $SBATCH_TIMELIMIT $*"\n')
    (tmp_path / "python").chmod(0o755)
    job = 'limit=4:00:00 users_umask=022 rendezvous=/r container=() PATH=$PWD:$PATH'
    done = run_functions(tmp_path, f'{job}; start_script --check "a b"; wait "$script"')
    assert done.stdout == "/r 4:00:00 raytune_bayesian.py --check a b\n", done


@pytest.mark.parametrize("answers, tries", [("", 3), ("error: Socket timed out on send", 3), ("Access denied", 1)])
def test_a_requeue_is_tried_again_while_slurm_is_busy(tmp_path, answers, tries):
    """Until a minute before the time limit. Of Slurm the answers alone."""
    command = """
SLURM_JOB_ID=1 time_limit=80 how_to_resume=Resume. SECONDS=0 answers=$1
timeout() { echo "$answers"; return 1; }
sleep() { echo sleep; SECONDS=$((SECONDS + 10)); }
requeue"""
    done = run_functions(tmp_path, command, answers)
    said = f"Slurm has not requeued the job: {answers or 'no answer'}. Resume.\n"
    assert done.stdout == "sleep\n" * (tries - 1) + said, done


@pytest.mark.parametrize(
    "argument, code, says",
    [
        ("--run_name=x", 2, "error: --gpus may give nodes different numbers of GPUs: use --gpus-per-node\n"),
        ("-h", 0, "usage: raytune_bayesian.py "),
    ],
)
def test_a_job_on_two_nodes_with_gpus_for_both_together(tmp_path, argument, code, says):
    """It submits nothing, and starts nothing. In place of Slurm's commands there are some that fail."""
    for name in ("squeue", "sbatch", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "VENV": sys.prefix, "SLURM_JOB_ID": "7"}
    environment |= {"SLURMD_NODENAME": "node1", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS": "8"}
    environment |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_ON_NODE": "2"}
    command = ["bash", "head_node.slurm", argument]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (code, "") and says in done.stdout, done


CLUSTER_ENV = """declare -x KIND=activated
[ -z "$BASHRCSOURCED" ] && SOURCED=here
export LD="$LD_FOR_TARGET"
if false; then :; fi
false || true
works() { false; true; }
works
source ./activate.sh
[ -n "$BASHRCSOURCED" ]
source ./none.sh
true | false | true
(exit 3)
NUM_WORKERS=3 GPUS_PER_NODE=2 CPUS_PER_NODE=1
"""
FAILED = """cluster.env: line 9: [ -n "$BASHRCSOURCED" ] failed with exit code 1
cluster.env: line 10: source ./none.sh failed with exit code 1
cluster.env: line 12: (exit 3) failed with exit code 3
"""


@pytest.fixture
def site(tmp_path):
    """A folder with a cluster.env as the activation scripts of conda and of a system are written."""
    (tmp_path / "cluster.env").write_text(CLUSTER_ENV)
    (tmp_path / "activate.sh").write_text("false\nexport ACTIVE=$UNSET\n")
    (tmp_path / "logs").mkdir()
    (tmp_path / "raytune_bayesian.py").touch()
    (tmp_path / "rendezvous").mkdir()
    (tmp_path / "rendezvous" / "head").write_text("down\n")
    copy_functions(tmp_path)
    return tmp_path


def copy_functions(folder):
    (folder / "hpo" / "cluster").mkdir(parents=True)
    for name in ("slurm.sh", "head.sh"):
        shutil.copy(ROOT / "hpo/cluster" / name, folder / "hpo/cluster")


def run_beginning(site, script, commands):
    """Runs a script until it has read cluster.env, and then other commands, without Slurm.

    Bash sources BASH_ENV before a script. Its trap replaces the first function that the script calls then.
    """
    (site / "commands.sh").write_text(commands)
    function = FIRST_CALLS[script]
    (site / "replace.sh").write_text(f"""unset BASH_ENV
trap '[[ $BASH_COMMAND != {function}* ]] || {{ trap - DEBUG; {function}() {{ source ./commands.sh; exit; }}; }}' DEBUG
""")
    environment = {**os.environ, "SLURMD_NODENAME": "node1", "SLURM_JOB_ID": "1", "BASH_ENV": str(site / "replace.sh")}
    command = ["bash", str(ROOT / script), str(site / "rendezvous")]
    return subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, timeout=60)


FIRST_CALLS = {"head_node.slurm": "read_gpu_request", "worker_node.slurm": "ray_version"}


@pytest.mark.parametrize("script", FIRST_CALLS)
def test_cluster_env_runs_as_in_a_shell_and_the_script_does_not(site, script):
    """What fails there is told and does not end the job; after it, a failure and an unset variable do.

    Its traps and options end with it.
    """
    done = run_beginning(site, script, 'echo "$KIND $SOURCED $NUM_WORKERS $-"; set -o | grep pipefail\nfalse\n')
    lines = re.sub(r"(?m)^\[([\d:]+ node1|head)\] ", "", done.stdout)
    assert lines.startswith(FAILED + "activated here 3 ehuBE\npipefail       \ton\n"), done
    assert re.search(r"line \d+ failed: false\n", lines) and done.returncode == 1
    (site / "cluster.env").write_text(CLUSTER_ENV + "trap - ERR EXIT TERM\nIFS=,\nset -f\nset +e\n")
    traps = "trap | grep -vc \"'' SIG\""  # those of the script: ignored signals are of whoever has started this test
    same = run_beginning(site, script, f'{traps}; echo activ*; words="a b"; printf "%s;" $words\nfalse\n')
    assert re.search(r"\n[45]\nactivate.sh\na;b;.*line \d+ failed: false\n", same.stdout, re.DOTALL), same
    (site / "cluster.env").write_text(CLUSTER_ENV)
    unset = run_beginning(site, script, 'echo "$NO_SUCH_VARIABLE"\n')
    assert "NO_SUCH_VARIABLE: unbound variable" in unset.stderr and unset.returncode == 1


LMOD = Path("/usr/share/lmod/lmod/init/bash")  # Debian's package lmod


@pytest.mark.parametrize("script", FIRST_CALLS)
def test_modules_as_in_the_docs(site, script, monkeypatch):
    """With Lmod itself: the commands of docs/slurm.md replace the line of VENV. A missing module is told."""
    if not LMOD.exists():
        assert not os.environ.get("CI"), "Lmod must be here"
        pytest.skip("no Lmod (apt install lmod)")
    modules = site / "modules"
    (modules / "python").mkdir(parents=True)
    (modules / "python" / "3.11.lua").write_text(f'prepend_path("PATH", "{sys.prefix}/bin")\n')
    (modules / "cuda.lua").write_text('setenv("CUDA_HOME", "/opt/cuda")\n')
    commands = re.search(r"\n    (module load python.*)\n    (VENV=)\n", (ROOT / "docs" / "slurm.md").read_text())
    text = (ROOT / "cluster.env").read_text()
    assert text.count(': "${VENV=.venv}"\n') == 1
    (site / "cluster.env").write_text(text.replace(': "${VENV=.venv}"\n', "\n".join(commands.groups()) + "\n"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    # of the shell in which the user calls sbatch, which passes on the function `module` too
    shell = subprocess.run(["bash", "-c", f"source {LMOD} && module use {modules} && env -0"], capture_output=True)
    for variable in shell.stdout.decode().split("\0")[:-1]:
        monkeypatch.setenv(*variable.split("=", 1))
    done = run_beginning(site, script, 'ask python -c "import sys; print(sys.prefix)"\necho "$answer $CUDA_HOME"\n')
    assert done.stdout.splitlines()[0] == f"{sys.prefix} /opt/cuda", done
    (modules / "cuda.lua").unlink()
    done = run_beginning(site, script, 'command -v python || echo none\n')
    line = text[: text.index(': "${VENV=.venv}"')].count("\n") + 1
    said, python = done.stdout.splitlines()[:2]
    assert said.endswith(f"cluster.env: line {line}: module load python/3.11 cuda failed with exit code 1"), done
    assert not python.startswith(sys.prefix), done  # Lmod loads all modules or none


@pytest.mark.parametrize("script", FIRST_CALLS)
def test_a_cluster_env_that_is_not_bash_ends_the_job(site, script):
    (site / "cluster.env").write_text("NUM_WORKERS=1\nfi\nGPUS_PER_NODE=1\n")
    done = run_beginning(site, script, "echo reached\n")
    (said,) = (line for line in done.stdout.splitlines() if "cluster.env" in line)
    assert said.endswith("./cluster.env: line 2: syntax error near unexpected token `fi'")
    assert done.returncode == 2 and "reached" not in done.stdout and done.stderr == ""
    written = site / "rendezvous" / "worker-1"  # for the log of the head job
    assert script == "head_node.slurm" or written.read_text().startswith("refused node1: ./cluster.env: line 2")


def test_cluster_env_of_a_plan(site, monkeypatch, capsys):
    (site / "sbatch").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{site}:{os.environ['PATH']}")
    monkeypatch.setattr(machines, "ROOT", site)
    assert machines.nodes(arguments.parse("", ["--plan"])) == (3, 2, 1) and capsys.readouterr() == ("", FAILED)
    (site / "cluster.env").write_text("fi\n")
    with pytest.raises(errors.BadInput, match=r"^\./cluster\.env: line 1: syntax error near unexpected token `fi'$"):
        arguments.parse("", ["--plan"])


def test_no_worker_comes(project, tiny):
    """The workers have the head's QOS, which allows one job: the log says so, in Slurm's word and in plain words. Then
    one of them is held: the log has the new reason too.
    """
    options = ["--qos=single", "--account=lab"]
    job = project.submit(*tiny, *LONG, options=options, NUM_WORKERS="2", WORKER_TIMEOUT="60")
    project.wait_for("the workers", lambda: "worker jobs" in project.log(job))
    for worker in project.workers(job):
        found = project.cluster.job(worker)
        assert (found["QOS"], found["Account"]) == ("single", "lab")
    project.wait_for("the first reason", lambda: "waiting in the queue" in project.log(job))
    held = project.workers(job)[0]
    project.cluster.run("node1", "scontrol", "hold", held)
    assert project.wait_for_end(job) == ("FAILED", "1:0")
    assert project.left_over() == {}
    log = project.log(job)
    waits = r"waiting in the queue:( \d+){2} \(QOSMaxJobsPerUserLimit: a limit of its QOS is reached; "
    assert re.search(waits, log), log
    assert re.search(rf"waiting in the queue: {held} \(JobHeld(User|Admin): it is held\)\n", log), log
    assert "no worker joined within 60 s (WORKER_TIMEOUT)" in log
    for worker in project.workers(job):
        assert re.search(rf"^ +{worker} .* PD .*\(.*\)$", log, re.MULTILINE), log  # what squeue says, with the reason


def test_the_workers_leave_when_the_head_s_node_is_gone(project, tiny):
    """The head's processes are killed with no chance to say so. Slurm's own process goes on, and ends the job."""
    project.hand(SLOW)
    job = project.submit(*tiny, *LONG)
    project.wait_for_search(job)
    worker = project.workers(job)[0]
    for pid, command in project.cluster.processes("node1").items():
        if "slurmstepd" not in command:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    project.wait_for(
        "the worker's end", lambda: project.cluster.job(worker)["JobState"] not in ("RUNNING", "COMPLETING")
    )
    assert "the head at" in (project.folder / "logs" / f"ray_worker_bloom_bohb-{worker}.out").read_text()
    project.wait_for_end(job)
    # The next job on that node, and in that folder, removes what the head could not. Others' folders stay.
    left = [*project.folder.glob("results/.ray-*"), *project.temporary.iterdir()]
    assert len(left) == 2
    others = {"ray-abcdef": f"another_cluster {job}", "ray-ghijkl": None}
    for name, owner in others.items():
        (project.temporary / name).mkdir()
        if owner:
            (project.temporary / name / "job").write_text(f"{owner}\n")
    after = project.submit(*tiny, "--gpus_per_trial", 9)
    assert project.wait_for_end(after) == ("FAILED", "2:0")
    for path in left:
        assert re.search(rf"removed \S*{re.escape(path.name)}, which job {job} has left behind", project.log(after))
    assert {path.name for path in project.temporary.iterdir()} == set(others)
    for name in others:
        shutil.rmtree(project.temporary / name)


def test_the_head_s_node_is_lost_in_a_job_on_several_nodes(project, tiny):
    """Its network is gone. When Slurm takes it for lost, the other node has the job queued again."""
    project.hand(SLOW)
    job = project.submit(*tiny, *LONG, node="node[1-2]", options=["--nodes=2", *OWN])
    project.wait_for_search(job)
    show = ["scontrol", "show", "job", job]
    try:
        sh("ip link set veth-node1 down")
        project.wait_for("the end of Ray", lambda: "raylet" not in str(project.cluster.processes("node2")))
        project.cluster.stop("node1", signal.SIGKILL)
        for pid in project.cluster.processes("node1"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        project.cluster.run("node2", "scontrol", "update", "node=node1", "state=down", "reason=lost")
        project.wait_for("the requeue", lambda: "Restarts=1 " in project.cluster.run("node2", *show))
    finally:
        sh("ip link set veth-node1 up")
        project.cluster.start_node("node1")
        project.cluster.run("node2", "scontrol", "update", "node=node1", "state=resume")
    project.wait_for("the same search", lambda: "going on with a search" in project.log(job))
    assert "node1, where the head was, is lost: the job is queued again" in project.log(job)
    project.cluster.run("node1", "scancel", job)
    project.wait_for("nothing left", lambda: project.left_over().keys() <= {"temporary"})
    for path in project.temporary.iterdir():  # of the lost node: the next job there would remove it
        shutil.rmtree(path)


# -- what happens to clusters ------------------------------------------------------------------------------------------

KEYS = ["learning_rate", "batch_size", "weight_decay", "eval_loss", "training_iteration", "status"]


def test_time_limit_requeue_and_the_same_search(project, tiny):
    """Slurm's own signal before a real time limit: each job saves, queues again, and goes on with the same search.

    One has a worker job, the other runs on two nodes itself. They are cut at different points, and end alike.
    """
    project.hand(SLOW)
    slow = [*tiny, "--max_t", 4, "--num_train_epochs", 2, "--max_eval_samples", 10, "--num_samples", 6]
    slow += ["--max_concurrent_trials", 1]

    def rows(folder):
        return [[t[key] for key in KEYS] for t in files.read_csv(project.folder / "results" / folder / "trials.csv")]

    limited = ["--time=20", "--signal=B:USR1@70"]
    in_one = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=4G"]
    jobs = [project.submit(*slow, options=limited), project.submit(*slow, node="node[1,3]", options=limited + in_one)]
    for job in jobs:
        project.wait_for_search(job)
        hours, minutes, _ = map(int, project.cluster.job(job)["RunTime"].split(":"))
        limit = 60 * hours + minutes + 2  # a minute from now, or two; Slurm may warn a minute earlier than it was told
        project.cluster.run("node1", "scontrol", "update", f"jobid={job}", f"timelimit={limit}")
    for job in jobs:
        project.wait_for("the requeue", lambda job=job: project.cluster.job(job).get("Restarts") == "1")
        project.cluster.run("node1", "scontrol", "update", f"jobid={job}", "timelimit=20")
    for job in jobs:
        assert project.wait_for_end(job) == ("COMPLETED", "0:0"), project.log(job)
        log = project.log(job)
        assert "the time is nearly up: saving all running trials" in log
        assert "requeued, 1 of at most 10 times (MAX_REQUEUES)" in log
        assert "going on with a search" in log and log.count("Best Trial Result:") == 1
        iterations = files.read_csv(project.folder / "results" / f"bloom_bohb-{job}" / "iterations.csv")
        pairs = [(i["trial_id"], i["training_iteration"]) for i in iterations]
        assert len(pairs) == len(set(pairs))
    assert "trials run in this job, on its 2 nodes" in log
    both = [rows(f"bloom_bohb-{job}") for job in jobs]
    assert both[0] == both[1] and len(both[0]) == 6
    assert project.left_over() == {}


def test_a_lost_worker_is_replaced_and_its_trials_go_on(project, tiny):
    """kill -9 of all of Ray on a node: each trial is accounted for, and reaches the rung that it would have reached."""
    project.hand(SLOW)
    job = project.submit(
        *tiny, "--max_t", 16, "--num_train_epochs", 0.6, "--max_eval_samples", 10, "--num_samples", 16,
        "--run_name", "x", **TWO_NODES,
    )  # fmt: skip
    rows = project.folder / "results" / "x" / "iterations.csv"
    project.wait_for(
        "trials on both nodes",
        lambda: rows.exists() and {i["node"] for i in files.read_csv(rows)} == {"node2", "node3"},
    )
    for pid, command in project.cluster.processes("node2").items():
        if "ray" in command:
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                pass
    assert project.wait_for_end(job) == ("COMPLETED", "0:0"), project.log(job)
    log = project.log(job)
    assert re.search(r"worker job \d+ replaces it \(1 of at most 10\)", log), log
    trials = files.read_csv(rows.parent / "trials.csv")
    assert len(trials) == 16 and {t["status"] for t in trials} == {"stopped", "completed"}, log
    assert sorted(t["training_iteration"] for t in trials) == [1] * 12 + [4] * 3 + [16]
    assert "goes on from iteration" in log
    pairs = [(i["trial_id"], i["training_iteration"]) for i in files.read_csv(rows)]
    print(f"iterations run again: {len(pairs) - len(set(pairs))}")
    assert project.left_over() == {}


def test_a_node_whose_gpu_fails_is_given_up(project, tiny):
    """CUDA errors on one of two nodes: its job goes, Slurm keeps off the node, no trial is lost and none is told to the
    model as bad.
    """
    broken = project.folder / "broken"
    project.hand(
        SLOW
        + f"""

slow_train = train


def train(config, setup, trial):
    if socket.gethostname() == "node2" and os.path.exists("{broken}"):
        raise RuntimeError("CUDA error: unknown")
    slow_train(config, setup, trial)
"""
    )
    arguments = ["--max_t", 16, "--num_train_epochs", 0.8, "--max_eval_samples", 10, "--num_samples", 16]
    arguments += ["--run_name", "x"]
    job = project.submit(*tiny, *arguments, **TWO_NODES)
    rows = project.folder / "results" / "x" / "iterations.csv"
    both = {"node2", "node3"}
    project.wait_for(
        "trials on both nodes", lambda: rows.exists() and {i["node"] for i in files.read_csv(rows)} == both
    )
    bad = next(w for w in project.workers(job) if project.cluster.job(w)["NodeList"] == "node2")
    broken.touch()
    assert project.wait_for_end(job) == ("COMPLETED", "0:0"), project.log(job)
    log = project.log(job)
    assert f"worker {bad} is given up: a GPU of its node fails" in log, log
    others = [w for w in re.findall(r"worker job (\d+) replaces it", log)]
    assert others and all(project.cluster.job(w).get("NodeList") != "node2" for w in others), log
    trials = files.read_csv(rows.parent / "trials.csv")
    assert sorted(t["training_iteration"] for t in trials) == [1] * 12 + [4] * 3 + [16] and "failed" not in {
        t["status"] for t in trials
    }, log
    assert project.left_over() == {}


def test_idle_nodes_are_given_back(project, tiny):
    """One trial, two nodes: the one without it goes back to Slurm, is not replaced, and the bill says what that saves.

    The trial waits for that after its first iteration, however slow the second node is to join.
    """
    go_on = project.folder / "go_on"
    project.hand(reporting("socket.gethostname()", hold=go_on))
    arguments = ["--max_t", 4, "--num_train_epochs", 1, "--max_eval_samples", 10, "--num_samples", 1, "--run_name", "x"]
    job = project.submit(*tiny, *arguments, **TWO_NODES, IDLE_RELEASE_MINUTES="0.1")
    project.wait_for("a release", lambda: "is given back" in project.log(job))
    time.sleep(3 * idle_nodes.IdleNodeRelease.EVERY)  # to be on the bill
    go_on.touch()
    assert project.wait_for_end(job) == ("COMPLETED", "0:0"), project.log(job)
    log = project.log(job)
    released = re.findall(
        r"^worker job (\d+) is given back: 1 trials are left, and 1 slots without it$", log, re.MULTILINE
    )
    assert len(released) == 1 and "replaces it" not in log and "has ended" not in log, log
    logs = {w: (project.folder / "logs" / f"ray_worker_bloom_bohb-{w}.out").read_text() for w in project.workers(job)}
    assert {w for w, text in logs.items() if "given back: no trial needs this node any more" in text} == set(released)
    assert all(project.cluster.job(w)["ExitCode"] == "0:0" for w in logs)
    run = json.loads((project.folder / "results" / "x" / "run.json").read_text())
    assert run["slot_minutes"]["given back"] > 0 and "given back" in log
    (trial,) = files.read_csv(project.folder / "results" / "x" / "trials.csv")
    assert (trial["status"], trial["resumes"], trial["training_iteration"]) == ("completed", 0, 4)
    assert project.left_over() == {}


# -- 5. ports
# -----------------------------------------------------------------------------------------------------------


def test_a_port_taken_before_ray_binds_it(project, tiny):
    """Another program stands by to take every port that Ray's command line names, before Ray does; and Ray's first
    start on the head fails, and the first three on the worker, whose job is replaced.

    The scripts name no port: each process of Ray binds the port that the system gives it.
    """
    hijackers = [
        subprocess.Popen(
            project.cluster.command(node, sys.executable, "-uc", HIJACKER, process, times),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for node, process, times in (("node1", "gcs_server", 1), ("node2", "ray start", 3))
    ]
    drain(project, "node3")
    try:
        job = project.submit(*tiny, *SHORT)
        assert project.wait_for_end(job) == ("COMPLETED", "0:0"), project.log(job)
    finally:
        for hijacker in hijackers:
            hijacker.kill()
        taken = [hijacker.communicate()[0].split() for hijacker in hijackers]
    for on_node, starts in zip(taken, (2, 4), strict=True):  # each start was seen, and no port to take
        assert set(on_node) == {"start"} and len(on_node) >= starts, taken
    log = project.log(job)
    assert "Ray's head did not start (try 1)" in log
    (first,) = project.workers(job)
    tries = (project.folder / "logs" / f"ray_worker_bloom_bohb-{first}.out").read_text()
    assert all(f"Ray did not start (try {i})" in tries for i in (1, 2, 3)), tries
    assert f"worker job {first} failed node2: Ray did not start" in log
    assert re.search(r"worker job \d+ replaces it \(1 of at most 10\)", log), log
    closing_block(log)


HIJACKER = """
import glob, os, re, signal, socket, sys, time
process, times = sys.argv[1], int(sys.argv[2])
here, seen, held, killed = os.readlink("/proc/self/ns/net"), set(), [], set()
while True:
    for folder in glob.glob("/proc/[0-9]*"):
        try:
            command = open(folder + "/cmdline").read().split(chr(0))
            if os.readlink(folder + "/ns/net") != here:
                continue
        except OSError:  # has ended
            continue
        pid = int(folder.split("/")[2])
        if command[1:2] and command[1].endswith("/ray") and command[2] == "start" and pid not in seen:
            seen.add(pid)
            command[0] = "ray start"
            print("start")
            for port in re.findall("port=([1-9][0-9]*)", " ".join(command)):
                held.append(socket.create_server(("", int(port))))
                print(port)
        if command[0].endswith(process) and len(killed) < times and pid not in killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
    time.sleep(0.02)
"""


# -- 6. preflight
# -------------------------------------------------------------------------------------------------------


def other_ray(folder: Path, version: str | None) -> Path:
    """An environment with another version of ray, or none."""
    sh(f"{sys.executable} -m venv --without-pip {folder}")
    if version:
        package = next(folder.glob("lib/python*/site-packages")) / "ray"
        package.mkdir()
        (package / "__init__.py").write_text(f'__version__ = "{version}"\n')
    return folder


def test_preflight_environment_missing(project, tiny):
    refused(
        project,
        project.submit(*tiny, VENV="/nowhere"),
        "there is no /nowhere/bin/python: make the environment, or set VENV",
    )


def test_preflight_ray_not_importable(project, tiny):
    job = project.submit(*tiny, VENV=str(other_ray(project.folder / "bare", None)))
    refused(project, job, "bare/bin/python cannot import ray: install requirements.txt")


@pytest.mark.parametrize("version", ["2.0.0", None])
def test_preflight_ray_on_the_worker(project, tiny, version):
    other = other_ray(project.folder / "other", version)
    with open(project.folder / "cluster.env", "a") as file:
        file.write('[ -n "$BASHRCSOURCED" ]\nexport LD="$LD_FOR_TARGET"\n')  # as of conda: neither job ends there
        file.write(f"[[ $SLURM_JOB_NAME != ray_worker* ]] || VENV={other}\n")
    sentence = "ray is 2.0.0 here and 2.60.0 on the head" if version else "other/bin/python cannot import ray"
    refused(project, project.submit(*tiny), sentence)


def test_preflight_gpu_that_torch_cannot_use(project, tiny):
    job = project.submit(
        *tiny, GPU_CHECK_SAYS="CUDA error: no kernel image is available for execution on the device\nSearch for it"
    )
    refused(
        project,
        job,
        r"refused node\d: CUDA error: no kernel image is available for .*; a V100 \(sm_70\) needs a torch .* "
        "pip install torch==",
    )


def test_preflight_check_of_the_gpus_that_does_not_run(project, tiny):
    job = project.submit(*tiny, GPU_CHECK_EXITS="7")
    refused(project, job, r"refused node\d: the check of the GPUs has printed nothing, exit code 7")


def test_preflight_a_job_array(project, tiny):
    job = project.submit(*tiny, options=["--array=1"])
    project.wait_for("the end of its task", lambda: project.cluster.job(job)["JobState"] == "FAILED")
    refused(project, job, "this is a job array: submit each search by itself")


def test_preflight_sbatch_not_allowed(project, tiny):
    job = project.submit(*tiny, WORKER_PARTITION="closed")
    refused(project, job, "no worker job can be submitted from node1: sbatch: error: Batch job submission failed")


def test_preflight_results_not_shared(project, tiny):
    private = project.cluster.folder / "private" / "results"
    job = project.submit(*tiny, "--output_dir", private)
    refused(project, job, f"{private} is not shared: the node of that job does not see it")


def test_preflight_logs_missing(project, tiny):
    (project.folder / "logs").rmdir()
    job = project.submit(*tiny, options=["--output=%x-%j.out"])
    assert project.wait_for_end(job) == ("FAILED", "2:0")
    assert "logs is missing" in (project.folder / f"ray_head_bloom_bohb-{job}.out").read_text()
    (project.folder / "logs").mkdir()


def test_preflight_wrong_folder(project, tiny):
    (project.folder / "cluster.env").unlink()
    refused(project, project.submit(*tiny), "submit from the folder that has it")


def test_wrong_arguments(project, tiny):
    refused(project, project.submit(*tiny, "--max_t", 0), "raytune_bayesian.py: error: --max_t 0: must be at least 1")
    refused(
        project,
        project.submit(*tiny, "--gpus_per_trial", 9),
        r"--gpus_per_trial 9: a node for trials \(see cluster.env, or the options of sbatch\) has 1",
    )


def refused(project, job, sentence):
    """The job ends with exit code 2, the sentence in its log, and leaves nothing."""
    assert project.wait_for_end(job) == ("FAILED", "2:0"), project.log(job)
    assert re.search(sentence, project.log(job)), project.log(job)
    assert project.left_over() == {}
    assert not (project.folder / "results").exists()
    assert re.search(r"ended after \d+ s, exit code 2", project.log(job))


def test_cluster_env_that_exits(site):
    (site / "cluster.env").write_text("exit 3\n")
    done = run_beginning(site, "head_node.slurm", "")
    said = "cluster.env has ended the job, exit code 3: it must not call exit\n"
    assert done.returncode == 3 and said in done.stdout, done
