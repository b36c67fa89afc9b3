"""--check: the small trial, the table of nodes, the pace, and whole checks through the command line."""

import dataclasses
import errno
import json
import re
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import raytune_bayesian
from conftest import run_here, run_script
from faulty import write_script
from hpo import arguments, checks, disk, errors, machines, ranges, search_space
from hpo.cluster import check_nodes, exits, launch, messages, node_state, preemption, ray_private, small_trial
from hpo.plan import pace, plan
from hpo.plan.plan import settings_to_compare
from hpo.results import provenance
from hpo.results.slots import slots_that_passed
from hpo.squad.group import Group
from hpo.squad.setup import prepare

SMALL = ["--max_t", 16, "--num_train_epochs", 1, "--max_eval_samples", 20]
SPACE = raytune_bayesian.SEARCH_SPACE


@pytest.fixture(scope="module")
def checked(tmp_path_factory, tiny_model, tiny_squad):
    """A whole check of this machine: (output folder, run folder, process)."""
    output_dir = tmp_path_factory.mktemp("results")
    where = ["--model", tiny_model, "--dataset", tiny_squad, "--output_dir", output_dir]
    process = run_script("--check", *where, *SMALL, "--run_name", "checked")
    return output_dir, output_dir / "checked", process


def rows_of(output: str) -> list[list[str]]:
    """The cells of the table of nodes."""
    lines = output.partition("\nversions of the head: ")[2].split("\n\n")[1].splitlines()
    return [re.split("  +", line.strip()) for line in lines]


def test_check_of_this_machine(checked):
    """Exit code 0, a table with one row, the plan; check.json, and nothing else is left in the run folder."""
    _, folder, process = checked
    assert process.returncode == 0 and process.stderr == "", process.stdout + process.stderr
    head, *rows = rows_of(process.stdout)
    check = json.loads((folder / "check.json").read_text())
    (row,) = check["nodes"]
    assert len(rows) == 1 and rows[0][0] == row["node"] and rows[0][-1] == "ok" and len(rows[0]) == len(head) + 1
    assert check["ok"] and len(row["trials"]) == row["slots"] > 0
    for trial in row["trials"]:
        assert trial["steps"] == 3 * small_trial.STEPS and 0 <= trial["exact_match"] <= trial["f1"] <= 1
    assert check["questions"] == {"train": 380, "selection": 20}
    hours = re.search(r"^at (\S+) s an iteration: (\S+) hours", process.stdout, re.MULTILINE)
    assert float(hours.group(1)) == pytest.approx(check["seconds_per_iteration"], rel=0.01)
    assert " slot-hours, " in process.stdout and "memory peak of a trial: " in process.stdout
    assert [path.name for path in folder.iterdir()] == ["check.json"]


def test_plan_takes_the_pace_of_a_check(checked):
    """The same hours without other arguments. With twice the epochs, an iteration has twice the optimizer steps."""
    _, folder, process = checked
    check = json.loads((folder / "check.json").read_text())
    plan_of = ["--plan", "--from_check", folder]
    at = re.compile(r"^at \S+ s an iteration: .*$", re.MULTILINE)
    same = run_here(*plan_of)
    assert same.returncode == 0, same.stderr
    assert at.search(same.stdout).group() == at.search(process.stdout).group()
    longer = run_here(*plan_of, "--num_train_epochs", 2)
    steps = check["pace"]["step_seconds"]
    more = sum(380 / int(size) * seconds / 16 for size, seconds in steps.items()) / len(steps)
    seconds = float(re.search(r"^at (\S+) s", longer.stdout, re.MULTILINE).group(1))
    assert seconds == pytest.approx(check["seconds_per_iteration"] + more, rel=0.02)


def test_a_check_never_overwrites(checked, tiny_model, tiny_squad):
    output_dir, folder, _ = checked
    before = (folder / "check.json").read_bytes()
    where = ["--model", tiny_model, "--dataset", tiny_squad, "--output_dir", output_dir]
    process = run_here("--check", *where, *SMALL, "--run_name", "checked")
    assert process.returncode == 2 and "exists already" in process.stderr and len(process.stderr.splitlines()) == 1
    assert (folder / "check.json").read_bytes() == before


@pytest.mark.parametrize(
    "again, same",
    [
        ({"SLURM_RESTART_COUNT": "1"}, True),  # its node was lost
        ({}, False),
        ({"SLURM_RESTART_COUNT": "0"}, False),
        ({"SLURM_RESTART_COUNT": "1", "SLURM_JOB_ID": "8"}, False),
        ({"SLURM_RESTART_COUNT": "1", "SLURM_CLUSTER_NAME": "another"}, False),
    ],
)
def test_a_requeued_check_starts_again_in_its_own_folder(tmp_path, tiny_model, tiny_squad, monkeypatch, again, same):
    """And in no other: that of another job, or of a search, is as it was."""
    where = ["--model", str(tiny_model), "--dataset", str(tiny_squad), "--output_dir", str(tmp_path)]
    folder, argv = tmp_path / "c", ["--check", *where, "--run_name", "c"]
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "here"}.items():
        monkeypatch.setenv(name, value)
    shared = check_nodes.make_folders(checks.check(arguments.parse("", argv)), folder)
    (shared / "head").write_text("the lost node")
    for name, value in again.items():
        monkeypatch.setenv(name, value)
    if same:
        assert check_nodes.make_folders(checks.check(arguments.parse("", argv)), folder) == shared
        assert not list(shared.iterdir())
        (folder / "check.json").rename(folder / "run.json")
    args = arguments.parse("", argv)
    with pytest.raises(errors.BadInput, match="exists already"):
        checks.check(args)
    with pytest.raises(errors.BadInput, match="exists already"):
        check_nodes.make_folders(args, folder)
    assert same or (shared / "head").exists()


def test_a_train_that_fails(tmp_path, tiny_model, tiny_squad):
    """Exit code 2, and the row says why; no plan, as nothing was measured."""
    body = """
def train(config, setup, trial):
    if trial.checkpoint:
        raise ValueError("this model cannot go on")
    experiment.train(config, setup, trial)
"""
    script = write_script(tmp_path / "failing.py", body)
    where = ["--model", tiny_model, "--dataset", tiny_squad, "--output_dir", tmp_path / "results"]
    process = run_script("--check", *where, *SMALL, "--run_name", "c", script=script)
    assert process.returncode == 2, process.stdout + process.stderr
    assert process.stderr.splitlines()[-1].endswith("--check: 1 of 1 nodes are not ok, see the table above")
    (row,) = rows_of(process.stdout)[1:]
    assert row[-1] == "ValueError this model cannot go on: trials would fail like this, see docs/failures.md"
    check = json.loads((tmp_path / "results" / "c" / "check.json").read_text())
    assert not check["ok"] and check["pace"] is None and "hours" not in process.stdout
    assert [path.name for path in (tmp_path / "results" / "c").iterdir()] == ["check.json"]
    planned = run_here("--plan", "--from_check", tmp_path / "results" / "c")
    assert planned.returncode == 2 and "no node has run the small trial" in planned.stderr


def test_a_lost_process_is_a_row(tmp_path, tiny_model, tiny_squad):
    """The process of a small trial is killed. The check goes on."""
    script = write_script(
        tmp_path / "killed.py", "\ndef train(config, setup, trial):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    where = ["--model", tiny_model, "--dataset", tiny_squad, "--output_dir", tmp_path / "results"]
    process = run_script("--check", *where, *SMALL, "--max_concurrent_trials", 1, script=script)
    assert process.returncode == 2, process.stdout + process.stderr
    (row,) = rows_of(process.stdout)[1:]
    assert "often it was killed for its memory (MEM_PER_NODE), see logs/" in row[-1]
    (folder,) = (tmp_path / "results").iterdir()
    assert re.fullmatch(r"check-[\d-]+", folder.name)


def test_a_check_that_the_time_limit_ends(tmp_path, tiny_model, tiny_squad):
    """Exit code 2, and the table says that the trials of the node were not done."""
    body = f"""
STARTED = Path({str(tmp_path / "started")!r})


def train(config, setup, trial):
    STARTED.touch()
    time.sleep(3600)


if __name__ == "__main__":
    import threading

    def warn():  # as Slurm does
        while not STARTED.exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=warn, daemon=True).start()
"""
    where = ["--model", tiny_model, "--dataset", tiny_squad, "--output_dir", tmp_path / "results", "--run_name", "c"]
    script = write_script(tmp_path / "waiting.py", body)
    process = run_script("--check", *where, *SMALL, "--max_concurrent_trials", 1, script=script)
    assert process.returncode == 2, process.stdout + process.stderr
    assert process.stderr.splitlines()[-1].endswith("--check: 1 of 1 nodes are not ok, see the table above")
    (row,) = rows_of(process.stdout)[1:]
    assert row[-1] == check_nodes.NOT_DONE and row[4] == "same"  # the looks at GPUs, versions and disks were done
    assert not json.loads((tmp_path / "results" / "c" / "check.json").read_text())["ok"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--check", "--plan"], "--check: not with --plan"),
        (["--check", "--prefetch"], "--check: not with --prefetch"),
        (["--check", "--resume", "--run_name", "x"], "--check: not with --resume"),
        (["--check", "--seconds_per_iteration", "1"], "--seconds_per_iteration: only with --plan"),
        (["--from_check", "x"], "--from_check: only with --plan"),
        (["--plan", "--from_check", "x", "--seconds_per_iteration", "1"], "--from_check: not with --seconds_per_iter"),
    ],
)
def test_arguments_that_do_not_go_together(argv, message):
    with pytest.raises(errors.BadInput, match=message):
        arguments.parse("", argv)


def test_output_that_cannot_be_written(tmp_path, tiny_model, tiny_squad):
    (tmp_path / "file").write_text("x")
    where = ["--model", str(tiny_model), "--dataset", str(tiny_squad), "--output_dir", str(tmp_path / "file" / "r")]
    with pytest.raises(errors.BadInput, match="--output_dir .*file/r: cannot be written"):
        checks.check(arguments.parse("", ["--check", *where]))


def test_nodes_of_a_cluster(tmp_path, tiny_model, tiny_squad, ray_token, monkeypatch):
    """A head without CPUs and two nodes, as on Slurm; one node refuses to join, and one does not come."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(ray_token))
    (tmp_path / "refused").write_text("n7: ray is 2.9 here and 2.60.0 on the head\n")
    (tmp_path / "results").mkdir()
    where = ["--model", tiny_model, "--dataset", tiny_squad, "--output_dir", tmp_path / "results", "--run_name", "c"]
    with tempfile.TemporaryDirectory(prefix="bohb-") as short:  # the names of Ray's sockets have at most 107 bytes
        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": short}
        Path("/tmp/ray").mkdir(exist_ok=True)  # Cluster writes its address there, and does not make the folder
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            nodes = {cluster.add_node(num_cpus=1, temp_dir=short).node_id for _ in range(2)}
            environment = {"RAY_ADDRESS": cluster.address, "RENDEZVOUS_DIR": str(tmp_path), "NUM_WORKERS": "4"}
            environment |= {"HPO_NODES": "4", "WORKER_TIMEOUT": "10", "GPUS_PER_NODE": "0"}
            process = run_script("--check", *where, *SMALL, **environment)
        finally:
            cluster.shutdown()
    assert len(nodes) == 2 and process.returncode == 2, process.stdout + process.stderr
    assert "waiting for nodes: 2 of 4 have joined, 1 refused; at most " in process.stdout
    rows = rows_of(process.stdout)[1:]
    assert [row[-1] for row in rows[:2]] == ["ok", "ok"] and rows[2][0] == "n7" and rows[3][0] == "(not joined)"
    assert rows[2][-1] == "ray is 2.9 here and 2.60.0 on the head"
    assert rows[3][-1] == "did not join within 10 s (WORKER_TIMEOUT): see logs/ and squeue"
    assert process.stderr.splitlines()[-1].endswith("--check: 2 of 4 nodes are not ok, see the table above")
    check = json.loads((tmp_path / "results" / "c" / "check.json").read_text())
    assert [len(row["trials"]) for row in check["nodes"]] == [1, 1, 0, 0] and not check["ok"]
    assert "\nplan for 2 slots, on the nodes that are ok (2 of 4):\n" in process.stdout
    assert "; on 2 slots it has them after " in process.stdout  # and not on the 4 of cluster.env


# -- the small trial


def prepared(model, squad, *more):
    """(arguments, setup, largest trial) of a search."""
    argv = ["--model", str(model), "--dataset", str(squad), *map(str, [*SMALL, *more])]
    args = checks.check(arguments.parse("", argv))
    largest = search_space.largest_trial(SPACE, args)
    return args, prepare(args, 1024, 1000, largest["sequences"])[0], largest


def test_an_all_reduce_with_a_wrong_sum_is_told(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda numbers: numbers.add_(2))
    small_trial.check_all_reduce(Group(rank=0, size=2))  # 1 + 2
    with pytest.raises(RuntimeError, match="NCCL: an all-reduce .* wrong sum"):
        small_trial.check_all_reduce(Group(rank=0, size=3))


def test_a_file_of_a_node_that_the_head_does_not_see(tmp_path, monkeypatch):
    """Of two nodes that have written one. No trial runs on that node."""
    task = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: None))
    monkeypatch.setattr(check_nodes, "once", lambda look: task)
    monkeypatch.setattr(check_nodes, "answer", lambda *_: {"problems": []})
    monkeypatch.setattr(node_state, "SHARED_SECONDS", 0.1)
    nodes = unseen, seen = "a" * 56, "b" * 56  # ids of Ray
    rows = {node: {"number_of_gpus": 0, "can_run": True, "problems": []} for node in nodes}
    known = [{"NodeID": node, "ObjectStoreSocketName": "/tmp/x/plasma_store"} for node in nodes]
    monkeypatch.setattr(check_nodes.ray, "nodes", lambda: known)
    (tmp_path / seen).write_text("seen")
    check_nodes.look_at_nodes(rows, tmp_path, False, 0)
    assert [row["can_run"] for row in rows.values()] == [False, True] and rows[seen]["problems"] == []
    assert "is not seen on the head within" in rows[unseen]["problems"][0]


def test_small_trial_on_two_ranks_in_fp16(tmp_path, tiny_model, tiny_squad, ray_without_gpu):
    """Two ranks of half a CPU: an all-reduce, optimizer steps with a loss scale, a checkpoint, and on from it."""
    _, setup, largest = prepared(tiny_model, tiny_squad)
    setup = dataclasses.replace(setup, gpus_per_trial=2, precision="fp16")
    batches = small_trial.batch_sizes(SPACE, setup, largest)
    assert [(config["per_device_bs"], size) for config, size in batches] == [(2, 4), (1, 2)]
    setups = [(config, small_trial.small_setup(setup, size, tmp_path)) for config, size in batches]
    group = placement_group([{"CPU": 0.5}] * 2, strategy="STRICT_PACK")
    here = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    task = check_nodes.once(small_trial.run).options(scheduling_strategy=here, num_cpus=0.5)
    found = ray.get(task.remote(raytune_bayesian.train, setups), timeout=600)
    remove_placement_group(group)
    assert 0 <= found["skipped_steps"] < found["steps"] == 24 and found["eval_loss"] > 0
    assert len(found["step_seconds"]) == 2 and all(seconds > 0 for seconds in found["step_seconds"])
    assert found["scored_seconds"] > 0 and found["peak_bytes"] > 10**8
    assert not list(tmp_path.iterdir())


def test_small_setup_has_the_longest_question(tmp_path, tiny_model, tiny_squad):
    _, setup, _ = prepared(tiny_model, tiny_squad)
    small = small_trial.small_setup(setup, 2, tmp_path)
    assert len(small.train) == 2 * small_trial.STEPS and len(small.selection) == small_trial.QUESTIONS
    assert small.train.lengths.max() == setup.train.lengths.max()
    assert small.train.lengths.mean() == pytest.approx(setup.train.lengths.mean(), rel=0.02)
    longest = small.selection[int(small.selection.lengths.argmax())]
    reference = small.selection.references[int(small.selection.lengths.argmax())]
    of_all = {r["id"]: setup.selection[i] for i, r in enumerate(setup.selection.references)}
    assert (of_all[reference["id"]]["input_ids"] == longest["input_ids"]).all()


# -- rows


def row(**more):
    return {"node": "n1", "problems": [], "trials": [], "driver": None, "versions": {"torch": "2", "ray": "3"}} | more


def test_versions_that_differ():
    rows = [row(driver="580"), row(driver="580", versions={"torch": "1", "ray": "3"}), row(driver="550")]
    rows += [{"node": "lost", "problems": ["no answer"], "trials": []}]
    check_nodes.add_differences(rows, {"torch": "2", "ray": "3"})
    assert rows[0]["problems"] == [] and rows[0]["same"] == "same"
    (problem,) = rows[1]["problems"]
    assert problem.startswith("torch 1 (2 on the head): ") and rows[1]["same"] == "differ"
    assert rows[2]["problems"] == [] and rows[2]["same"] == "driver 550"  # it works, and is told
    assert rows[3]["problems"] == ["no answer"]


@pytest.mark.parametrize(
    "error, kind",
    [
        (ValueError("bad"), "TRIAL"),
        (torch.OutOfMemoryError(), "MEMORY"),
        (ray_private.NodeOutOfMemory(error_msg="killed"), "NODE_MEMORY"),
        (errors.TrialFailed("bad"), "PROCESS"),
        (RuntimeError("uncorrectable ECC error"), "NODE"),
        (OSError(errno.ENOSPC, "full"), "STORAGE"),
        (RuntimeError("no kernel image is available"), "SETUP"),
    ],
)
def test_what_to_do_about_each_kind_of_error(error, kind):
    kind = errors.Kind[kind]
    assert errors.kind_of(error) is kind
    assert errors.what_to_do(error) == (errors.what_to_install(error) or errors.WHAT_TO_DO[kind])
    out_of_memory = node_state.in_words(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert out_of_memory.endswith("a smaller batch, a larger --gpus_per_trial, or what --plan proposes")


@pytest.mark.parametrize(
    "error, says",
    [
        (ray.exceptions.OutOfMemoryError("Task was killed"), "a larger MEM_PER_NODE"),
        (ray.exceptions.WorkerCrashedError(), "often it was killed for its memory"),
        (ray.exceptions.ActorDiedError(), "often it was killed for its memory"),  # a rank
        (ray.exceptions.NodeDiedError("n1"), "the node has left the cluster"),
        (ray.exceptions.LocalRayletDiedError(), "the node has left the cluster"),
        (ray.exceptions.RuntimeEnvSetupError("no folder"), "Ray has failed"),
        (ray.exceptions.OutOfDiskError("full"), "make room on the disk of that node"),
    ],
)
def test_only_lost_processes_get_the_hint_at_memory(error, says):
    text = node_state.in_words(error)
    assert says in text and ("MEM_PER_NODE" in text) == ("memory" in says or "MEM" in says), text


@pytest.mark.parametrize(
    "skipped, sharing, says", [(4, 1, []), (5, 1, ["fp16: 5 of the last 8"]), (0, 2, ["2 trials need 13.2 GB of"])]
)
def test_what_is_wrong_with_a_small_trial(skipped, sharing, says):
    trial = {"last_skipped_steps": skipped, "peak_bytes": 6e9, "gpu_bytes": 12e9}
    problems = check_nodes.problems_of(trial, sharing)
    assert len(problems) == len(says) and all(p.startswith(s) for p, s in zip(problems, says, strict=True))


@pytest.mark.parametrize(
    "have, flags, problem",
    [
        ((4, 2), "", "only 2 of its 4 GPUs are used, because its CPUs are enough for 2 trials: a larger --cpus-"),
        ((4, 8), "--gpus_per_trial 0.25", "only 2 of its 4 GPUs are used, because its CPUs are enough for 8 trials: "),
        ((4, 3), "--gpus_per_trial 2 --cpus_per_trial 2", "only 2 of its 4 GPUs are used, because its CPUs are"),
        ((4, 2), "--max_concurrent_trials 4", None),  # of 2 nodes
        ((4, 2), "--max_concurrent_trials 5", "only 2 of its 4 GPUs are used"),
        ((4, 4), "", None),
        ((5, 2), "--gpus_per_trial 2", None),
        ((4, 2), "--gpus_per_trial 0", None),
        ((4, 0), "", "too small: "),
    ],
)
def test_gpus_that_no_trial_gets(have, flags, problem):
    """The CPUs of a node are too few for its GPUs: its row in the check says it, and a warning of the search."""
    args = arguments.parse("", ["--gpus_per_trial", "1", *flags.split()])
    has = {"GPU": float(have[0]), "CPU": float(have[1])}
    nodes = [{"NodeID": name, "NodeManagerHostname": name, "Resources": has} for name in "ab"]
    rows = check_nodes.rows_with_slots(nodes, args)
    for each in rows.values():
        assert len(each["problems"]) == (problem is not None) and all(p.startswith(problem) for p in each["problems"])
    args.cluster = {"NUM_WORKERS": 2, "GPUS_PER_NODE": have[0], "CPUS_PER_NODE": have[1]}
    if not problem or problem.startswith("only"):
        warnings = messages.cpu_warnings(args, machines.slots(args))
        assert warnings == [f"WARNING: on a node {text}" for text in rows["a"]["problems"]]


def test_slots_of_the_plan_are_those_of_the_nodes_that_passed():
    rows = [row(slots=4), row(slots=4, problems=["too slow"]), row(slots=2), {"node": "n4", "problems": ["lost"]}]
    assert [slots_that_passed(rows, at_a_time) for at_a_time in (0, 5, 9)] == [6, 5, 6]
    assert slots_that_passed(rows[1:2], 0) == 0


def test_table_of_nodes():
    trials = [{"step_seconds": [0.5, 0.25], "peak_bytes": 12e9}, {"step_seconds": [0.7, 0.25], "peak_bytes": 13e9}]
    full = row(cpus=8, number_of_gpus=2, gpus="A, A", slots=2, same="same", trials=trials)
    full["disks"] = {"TMPDIR": {"bytes": 5e9, "files": disk.NO_LIMIT}, "results": {"bytes": 7e12, "files": 2 * 10**6}}
    text = check_nodes.table([full, {"node": "n2", "problems": ["a: b", "c"], "trials": []}], gpus=True)
    head, first, second = (re.split("  +", line.strip()) for line in text.splitlines())
    assert head[-1] == "GB of a GPU, peak"
    assert first == ["n1", "8", "2 A", "2", "same", "5 GB", "7e+03 GB, 2 M files", "0.6", "13", "ok"]
    assert second == ["n2", *"????????", "a: b; c"]


def test_nodes_that_refuse_or_do_not_come(tmp_path, monkeypatch, capsys):
    """Waits no longer than it must: for nodes that have refused not at all."""
    up = {"Alive": True, "Resources": {"CPU": 4.0}, "NodeManagerHostname": "n1"}
    head = {"Alive": True, "Resources": {}, "NodeManagerHostname": "head"}
    lost = up | {"Alive": False}
    monkeypatch.setattr(check_nodes.ray, "nodes", lambda: [head, up, lost])
    (tmp_path / "refused").write_text("n2: ray is 2.9 here: wrong\n")
    nodes, refused = check_nodes.wait_for_nodes(2, 1000, tmp_path / "refused")
    assert nodes == [up] and refused == [("n2", "ray is 2.9 here: wrong")] and capsys.readouterr().out == ""
    nodes, others = check_nodes.wait_for_nodes(3, 0.1, tmp_path / "refused")
    late = ("(not joined)", "did not join within 0 s (WORKER_TIMEOUT): see logs/ and squeue")
    assert nodes == [up] and others == [*refused, late]
    assert "waiting for nodes: 1 of 3 have joined, 1 refused; at most 0 s more" in capsys.readouterr().out


def test_nodes_that_have_joined_do_not_wait_for_hours(tmp_path, monkeypatch, capsys):
    """The first node has WORKER_TIMEOUT to join; the others have JOIN_SECONDS more."""
    now, up = [0.0], {"Alive": True, "Resources": {"CPU": 4.0}, "NodeManagerHostname": "n1"}
    monkeypatch.setattr(
        check_nodes, "time", SimpleNamespace(time=lambda: now[0], sleep=lambda s: now.append(now.pop() + s))
    )
    monkeypatch.setattr(check_nodes.ray, "nodes", lambda: [up] * (now[0] >= 5000))
    late = "did not join within 600 s after the first node: see logs/ and squeue"
    assert check_nodes.wait_for_nodes(2, 21600, tmp_path / "refused") == ([up], [("(not joined)", late)])
    assert 5600 <= now[0] < 5610
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("at most 21600 s more for the first (WORKER_TIMEOUT)")
    assert told[1] == "waiting for nodes: 1 of 2 have joined, 0 refused; at most 600 s more"


@pytest.fixture
def handlers():
    """Puts the handlers of signals back after the test."""
    before = {how: signal.getsignal(how) for how in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    preemption.received.clear()
    for how, handler in before.items():
        signal.signal(how, handler)


def test_the_time_limit_ends_the_wait_for_nodes_and_trials(tmp_path, monkeypatch, handlers):
    """What is done is taken. After SIGTERM nothing is."""
    up = {"Alive": True, "Resources": {"CPU": 4.0}, "NodeManagerHostname": "n1", "NodeID": "n1"}
    cancelled = []
    monkeypatch.setattr(check_nodes.ray, "nodes", lambda: [up])
    monkeypatch.setattr(
        check_nodes.ray, "wait", lambda f, timeout: (f, []) if f == ["done"] and not timeout else ([], f)
    )
    monkeypatch.setattr(check_nodes.ray, "cancel", lambda future, force: cancelled.append(future))
    monkeypatch.setattr(check_nodes.ray, "get", lambda future: 7)
    preemption.mark_signals()
    signal.raise_signal(signal.SIGUSR1)
    late = "did not join before the time limit: see logs/ and squeue"
    assert check_nodes.wait_for_nodes(2, 1000, tmp_path / "refused") == ([up], [("(not joined)", late)])
    assert check_nodes.answer("f", "n1", deadline=1e12) == check_nodes.NOT_DONE and cancelled == ["f"]
    assert check_nodes.answer("done", "n1", deadline=1e12) == 7
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(preemption.Terminated):
        check_nodes.answer("f", "n1", deadline=1e12)


def test_the_time_limit_before_a_check_begins(capsys, handlers):
    """While the model and the data are loaded: exit code 2 and a line."""
    with pytest.raises(SystemExit) as ended, exits.exit_codes(arguments.parse("", ["--check"])):
        signal.raise_signal(signal.SIGUSR1)
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("error: --check: the time limit came before the check of the nodes began\n")


def test_node_that_is_lost_or_hangs(monkeypatch):
    cancelled = []
    monkeypatch.setattr(check_nodes.ray, "wait", lambda futures, timeout: ([], futures))
    monkeypatch.setattr(check_nodes.ray, "nodes", lambda: [{"Alive": True, "NodeID": "n1"}])
    monkeypatch.setattr(check_nodes.ray, "cancel", lambda future, force: cancelled.append(future))
    assert check_nodes.answer("f", "n2", deadline=1e12).startswith("the node has left the cluster: ")
    assert check_nodes.answer("f", "n1", deadline=0).startswith("no answer in time: ") and cancelled == ["f"]


def test_disks_and_the_results_folder(tmp_path, monkeypatch):
    """A folder that is not shared, a disk that is too small for the search, and one with few inodes left."""
    monkeypatch.setattr(node_state, "SHARED_SECONDS", 0.1)
    found = node_state.look(tmp_path, "node", gpus=False, needed=0, ray_folder=tmp_path)
    assert found["problems"][-1].startswith(f"results: a file of the head in {tmp_path} is not seen within 0.1 s")
    assert not found["can_run"]
    (tmp_path / "head").write_text("x")
    found = node_state.look(tmp_path, "node", gpus=False, needed=10**18, ray_folder=tmp_path)
    assert found["can_run"] and (tmp_path / "node").read_text()
    assert [p for p in found["problems"] if p.startswith("results")][0].endswith("make room, or take another folder")
    monkeypatch.setattr(disk, "room", lambda folder: disk.Room(10**12, 7, "the file system"))
    found = node_state.look(tmp_path, "node", gpus=False, needed=0, ray_folder=tmp_path)
    assert [p.partition("): ")[2] for p in found["problems"]] == ["room for 7 more files: remove some"] * 2
    found = node_state.look(tmp_path, "node", gpus=False, needed=0, ray_folder=Path("/proc"))  # another file system
    assert found["problems"][-1] == "Ray's folder (/proc): room for 7 more files: remove some"
    found = node_state.look(tmp_path / "none", "node", gpus=False, needed=0, ray_folder=tmp_path)
    assert not found["can_run"]


def test_gpus_that_do_not_answer(tmp_path, monkeypatch):
    """The word for an error of CUDA, and the exit code of nvidia-smi."""
    (tmp_path / "head").write_text("x")
    found = node_state.look(tmp_path, "node", gpus=True, needed=0, ray_folder=tmp_path)  # torch for the CPU
    assert not found["can_run"] and "CUDA" in found["problems"][0]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho Unable to determine the device handle; exit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(RuntimeError, match="nvidia-smi: Unable to determine"):
        provenance.nvidia_smi()


# -- pace


def test_pace_of_an_iteration():
    """34 trials of 50 iterations: 44 visits of a rung in 568 iterations."""
    setting = {"num_samples": 34, "max_t": 50, "reduction_factor": 4, "slots": 4}
    forecast = plan.forecast(SPACE, **setting)
    at_rungs = 22 + 6 + 2 + 8 + 2 + 4
    measured = {"step_seconds": {"4": 0.5, "2": 0.3}, "loss_seconds": 0.01, "scored_seconds": 0.03}
    seconds = pace.seconds_per_iteration(measured | {"checkpoint_seconds": 20}, forecast, 50, 1001, 100)
    steps = (251 * 0.5 + 501 * 0.3) / 2 / 50
    assert seconds == pytest.approx(steps + 100 * 0.01 + at_rungs / 568 * (100 * 0.02 + 20))


@pytest.mark.parametrize("gpus, says", [(0, None), (0.25, "0.25 GPUs: 10.00"), (1, "1 GPU: 40.00"), (2, "2 GPUs: 80.")])
def test_gpu_hours_stand_in_the_plan_once(gpus, says):
    """40 slot-hours: 4 slots for 10 hours. What the check adds has no hours."""
    setting = {"num_samples": 4, "max_t": 50, "reduction_factor": 4, "slots": 4}
    forecast = plan.forecast(SPACE, **setting)
    text = plan.plan(SPACE, [setting], [forecast], [36000 / forecast.time], None, None, gpus)
    assert "10.00 hours, 40.00 slot-hours" in text and text.count("GPU-hours") == (says is not None)
    assert says is None or f"\na slot takes {says}" in text
    assert "hours" not in check_nodes.memory_in_words(gpus, {"peak_bytes": 6e9, "gpu_bytes": 12e9})


def test_mean_pace_of_all_nodes(tmp_path, tiny_model, tiny_squad):
    """Evaluation is counted by token: the small selection has other lengths."""
    _, setup, _ = prepared(tiny_model, tiny_squad)
    small = small_trial.small_setup(setup, 2, tmp_path)
    times = {"loss_seconds": 2.0, "scored_seconds": 6.0, "checkpoint_seconds": 1.0, "gpu_bytes": None}
    trials = [times | {"step_seconds": [s, s / 2], "peak_bytes": s} for s in (1.0, 3.0)]
    rows = [{"trials": trials[:1]}, {"trials": []}, {"trials": trials[1:]}]
    measured = check_nodes.pace_of(rows, [4, 2], setup, small)
    assert measured["step_seconds"] == {"4": 2.0, "2": 1.0} and measured["peak_bytes"] == 3.0
    tokens = setup.selection.lengths.sum() / small.selection.lengths.sum()
    assert 20 * measured["loss_seconds"] == pytest.approx(2.0 * tokens)
    assert check_nodes.pace_of([{"trials": []}], [4, 2], setup, small) is None


def write_check(folder, args, rows: list[dict], **more):
    """Writes a check.json with these rows of nodes."""
    facts = {"arguments": arguments.kept(args), "nodes": rows, "pace": {}} | more
    (folder / "check.json").write_text(json.dumps(facts))


def test_a_plan_from_a_check_has_its_slots(tmp_path):
    """Those of its nodes that were ok. This machine may have no GPU, or too few for such a trial."""
    args = arguments.parse("", ["--check", "--gpus_per_trial", "2", "--cpus_per_trial", "999", "--precision", "bf16"])
    rows = [row(slots=4), row(slots=4), row(slots=4, problems=["too slow"]), {"node": "n4", "problems": ["lost"]}]
    write_check(tmp_path, args, rows)
    argv = ["--plan", "--from_check", str(tmp_path)]
    planned = checks.check(arguments.parse("", argv))
    assert planned.gpus_per_trial == 2 and [s["slots"] for s in settings_to_compare(planned)] == [8]
    given = arguments.parse("", [*argv, "--max_concurrent_trials", "0", "3"])
    assert [s["slots"] for s in settings_to_compare(given)] == [8, 3]
    write_check(tmp_path, args, rows[2:])
    with pytest.raises(errors.BadInput, match="no node was ok: give the slots, --max_concurrent_trials$"):
        arguments.parse("", argv)
    assert arguments.parse("", [*argv, "--max_concurrent_trials", "3"]).max_concurrent_trials == [3]
    write_check(tmp_path, args, rows, pace=None)
    with pytest.raises(errors.BadInput, match="no node has run the small trial, so there is no pace$"):
        arguments.parse("", argv)


def test_a_check_tells_and_keeps_the_search_space(tmp_path, tiny_model, tiny_squad, monkeypatch, capsys, handlers):
    """What the environment has changed. The plan from the check takes it, unless its own environment has another."""
    for name, value in {"LR_LOWER": "1e-5", "WD_CHOICES": "0, 0.1"}.items():
        monkeypatch.setenv(name, value)
    where = ["--output_dir", tmp_path, "--run_name", "c"]
    args, setup, largest = prepared(tiny_model, tiny_squad, "--check", *where)
    monkeypatch.setattr(launch, "start_ray", lambda *_: None)
    monkeypatch.setattr(check_nodes.ray, "shutdown", lambda: None)
    monkeypatch.setattr(check_nodes, "rows_of_nodes", lambda *_: [row(problems=["lost"], slots=1)])
    with pytest.raises(errors.BadInput, match="1 of 1 nodes are not ok"):
        check_nodes.check(args, ranges.changed(SPACE, args.ranges), setup, largest, None)
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("LR_LOWER=1e-5 in the environment: lr is ")
    assert told[1] == "WD_CHOICES=0,0.1 in the environment: wd is choice[0.0, 0.1]"
    kept = json.loads((tmp_path / "c" / "check.json").read_text())["environment"]
    assert kept == {"LR_LOWER": "1e-5", "WD_CHOICES": "0,0.1"}
    write_check(tmp_path, args, [row(slots=1)], environment=kept)
    monkeypatch.delenv("LR_LOWER")
    monkeypatch.setenv("WD_CHOICES", "0.2")
    planned = arguments.parse("", ["--plan", "--from_check", str(tmp_path)])
    assert planned.ranges == {"LR_LOWER": "1e-5", "WD_CHOICES": "0.2"}


def test_what_is_not_given_is_as_in_the_check(tmp_path):
    """So a plan from a check of few questions is for few questions, too, unless it is given another number."""
    args = arguments.parse("", ["--check", "--max_train_samples", "9", "--max_concurrent_trials", "2"])
    write_check(tmp_path, args, [row(slots=2), row(slots=2)])
    planned = arguments.parse("", ["--plan", "--from_check", str(tmp_path), "--max_eval_samples", "5"])
    assert (planned.max_train_samples, planned.max_eval_samples, planned.max_concurrent_trials) == (9, 5, [2])


@pytest.mark.parametrize(
    "flags, changes, message",
    [
        ({}, {}, None),
        ({"max_train_samples": 100}, {}, None),
        ({"model": "another/model"}, {}, "the check was of --model a/model"),
        ({"dataset": "other"}, {}, "the check was of --dataset d"),
        ({"lora_r": 4}, {}, "the check was of a largest trial with"),
        ({}, {"ds_config": {"zero_optimization": {"stage": 1}}}, "the check was of another ds_config"),
        ({"gpus_per_trial": 0.5}, {}, "the check was of --gpus_per_trial 0"),
        ({}, {"questions": 5}, "not the folder of a check"),
    ],
)
def test_check_that_does_not_fit_the_plan(flags, changes, message):
    args = arguments.parse("", ["--model", "a/model", "--dataset", "d", "--precision", "fp32", "--gpus_per_trial", "0"])
    check = {"arguments": arguments.kept(args), "model_folder": "/m", "questions": {"train": 400, "selection": 9}}
    check |= {"largest": search_space.largest_trial(SPACE, args), "ok": True, "ds_config": {}}
    check |= {"pace": {"step_seconds": {"2": 1.0}, "loss_seconds": 0, "scored_seconds": 0, "checkpoint_seconds": 0}}
    for name, value in changes.items():
        check[name] = check[name] | value if isinstance(value, dict) else value
    own = {"from_check": "results/check-7", "earlier_check": check, "ds_config": {}}
    args = SimpleNamespace(**vars(args) | own | flags)
    forecast = plan.forecast(SPACE, 4, 50, 4, 1)
    if message:
        with pytest.raises(errors.BadInput, match=message):
            pace.of_check(args, SPACE, [forecast])
    else:  # one second a step, two epochs, 50 iterations
        questions = flags.get("max_train_samples", 400)
        assert pace.of_check(args, SPACE, [forecast]) == [pytest.approx(questions * 2 / 2 / 50)]
