"""--check: whether a search will run on the nodes that it gets. It takes minutes, not GPU-hours.

On each node: do the GPUs compute, are the versions those of the head, is the results folder shared, is there room on
the disks? Then as many small trials as the node has slots run there at the same time, see small_trial.py. The table
has a row for each node. The plan of the search follows from the pace of the small trials, and is for the slots of the
nodes that are ok.
"""

import math
import os
import shlex
import shutil
import socket
import statistics
import time
from collections import Counter
from pathlib import Path

import ray
from ray.exceptions import RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from hpo import arguments, errors, machines, ranges
from hpo.cluster import launch, preemption, small_trial
from hpo.cluster.node_state import SHARED_SECONDS, appears, in_words, look
from hpo.cluster.run import make_folder
from hpo.cluster.trial import bundles
from hpo.disk import NO_LIMIT
from hpo.errors import BadInput
from hpo.files import columns, write_json
from hpo.plan import pace, plan
from hpo.results.provenance import git_commit, versions
from hpo.results.slots import bytes_of_gpu, gpus_without_cpus, slots_of, slots_that_passed, trials_per_gpu
from hpo.squad import loading

JOIN_SECONDS = 600  # that nodes may take to join once the first one has; and the first, where WORKER_TIMEOUT is not set
LOOK_SECONDS = 600  # that a node may take for its GPUs and disks: the first import of torch can take minutes
TRIAL_SECONDS = 3600  # that the small trials of a node may take, where --trial_timeout does not say
NOT_DONE = "not done before the time limit"


def check(args, space: dict, setup, largest: dict, train) -> None:
    """Checks all nodes, prints the table and the plan, and writes check.json.

    SIGUSR1, which Slurm sends before the time limit, ends the wait for nodes and trials. The table has what is done.

    Args:
        args: the arguments of the program.
        space: the search space.
        setup: what all trials share.
        largest: see search_space.largest_trial.
        train: what each trial runs.

    Raises:
        BadInput: a node is not ok. The table says why.
    """
    setting = {name: getattr(args, name) for name in ("num_samples", "max_t", "reduction_factor")}
    forecast = plan.band_forecast(args, space, setting | {"slots": machines.slots(args)})
    adapters = plan.count_adapters(args, largest["lora_r"], setup.model)
    disk_bytes = loading.disk_bytes(setup.model, adapters)
    shared = make_folders(args, setup.run_dir)
    batches = small_trial.batch_sizes(space, setup, largest)
    setups = [(config, small_trial.small_setup(setup, size, shared)) for config, size in batches]
    print("\n".join([*ranges.changes(space, args.ranges), f"check: results in {setup.run_dir}"]), flush=True)
    with launch.ray_folders() as folders:
        try:
            launch.start_ray(setup.gpus_per_trial, *folders)
            preemption.mark_signals()
            rows = rows_of_nodes(args, shared, setups, train, forecast.disk(*disk_bytes))
        finally:
            ray.shutdown()
            shutil.rmtree(shared, ignore_errors=True)
    of_head = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"\nversions of the head: {of_head}\n\n{table(rows, bool(setup.gpus_per_trial))}\n", flush=True)
    measured = pace_of(rows, [size for _, size in batches], setup, setups[0][1])
    facts = {
        "ok": not any(row["problems"] for row in rows),
        "job": machines.slurm_job(),
        "arguments": arguments.kept(args),
        "environment": args.ranges,
        "model_folder": str(setup.model.absolute()),
        "largest": largest,
        "questions": {"train": len(setup.train), "selection": len(setup.selection)},
        "ds_config": setup.ds_config,
        "pace": measured,
        "nodes": rows,
        "versions": versions(),
        "git_commit": git_commit(arguments.ROOT),
    }
    setting["slots"] = slots_that_passed(rows, args.max_concurrent_trials)
    if setting["slots"]:
        forecast = plan.band_forecast(args, space, setting)
        questions = len(setup.train) * args.num_train_epochs
        facts["seconds_per_iteration"] = pace.seconds_per_iteration(
            measured, forecast, args.max_t, questions, len(setup.selection)
        )
    write_json(setup.run_dir / "check.json", facts)
    print_outlook(args, space, setting, forecast, facts, disk_bytes)


def print_outlook(
    args, space: dict, setting: dict, forecast: plan.Forecast, facts: dict, disk_bytes: tuple[int, int]
) -> None:
    """Prints the plan of the search on the nodes that are ok, and the memory that the small trials have taken.

    Args:
        args: the arguments of the program.
        space: the search space.
        setting: {"num_samples", "max_t", "reduction_factor", "slots"}, slots of the nodes that are ok.
        forecast: for this setting; of one band where only a budget ends the search.
        facts: the content of check.json.
        disk_bytes: see loading.disk_bytes.

    Raises:
        BadInput: a node is not ok.
    """
    nodes, bad = len(facts["nodes"]), sum(bool(row["problems"]) for row in facts["nodes"])
    if setting["slots"]:
        seconds = facts["seconds_per_iteration"]
        if arguments.has_budget(args):
            forecast = plan.within_budget(args, space, setting, seconds)
            setting = setting | {"num_samples": forecast.trials}
        print(f"plan for {setting['slots']} slots, on the nodes that are ok ({nodes - bad} of {nodes}):\n")
        limit = machines.time_limit()
        print(plan.plan(space, [setting], [forecast], [seconds], disk_bytes, limit, args.gpus_per_trial))
    if facts["pace"]:
        print(memory_in_words(args.gpus_per_trial, facts["pace"]))
        print(f"for other settings: --plan --from_check {shlex.quote(f'{args.output_dir}/{args.run_name}')}")
    if bad:
        raise BadInput(f"--check: {bad} of {nodes} nodes are not ok, see the table above")


def make_folders(args, run_dir: Path) -> Path:
    """Makes the run folder, or empties that of this job from before it was requeued. Returns its folder "shared".

    Its check.json names the job from now on.

    Raises:
        BadInput: the run folder exists already, and is not of this job's check.
    """
    if not arguments.starts_check_again(args):
        make_folder(run_dir)
    write_json(run_dir / "check.json", {"job": machines.slurm_job()})
    shutil.rmtree(run_dir / "shared", ignore_errors=True)
    (run_dir / "shared").mkdir(exist_ok=True)
    return run_dir / "shared"


def rows_of_nodes(args, shared: Path, setups: list, train, needed: int) -> list[dict]:
    """Waits for all nodes and checks them at the same time.

    Args:
        args: the arguments of the program.
        shared: a folder in the results folder.
        setups: see small_trial.run.
        train: what each trial runs.
        needed: bytes that the search needs in the results folder.

    Returns:
        A row of the table for each node: {"node", "problems": one line each, "cpus", "number_of_gpus", "slots",
        "trials": what small_trial.run returns}, and what `look` returns. What is not known is missing.
    """
    expected = int(os.environ.get("HPO_NODES", machines.nodes(args)[0]))
    patience = float(os.environ.get("WORKER_TIMEOUT", JOIN_SECONDS))
    nodes, others = wait_for_nodes(expected, patience, Path(os.environ.get("RENDEZVOUS_DIR", shared)) / "refused")
    rows = rows_with_slots(nodes, args)
    look_at_nodes(rows, shared, args.gpus_per_trial > 0, needed)
    add_differences(list(rows.values()), versions())
    run_trials({node_id: row for node_id, row in rows.items() if row.get("can_run")}, setups, train, args.trial_timeout)
    return [*rows.values(), *({"node": node, "problems": [reason], "trials": []} for node, reason in others)]


def rows_with_slots(nodes: list[dict], args) -> dict[str, dict]:
    """A row for each node of Ray, by its id: see rows_of_nodes. Without slots, or with unused GPUs, it is not ok."""
    rows, of_trial = {}, {"cpu": args.cpus_per_trial, "gpu": args.gpus_per_trial}
    for node in nodes:
        have = node["Resources"]
        slots = slots_of(have, of_trial)
        rows[node["NodeID"]] = row = {"node": node["NodeManagerHostname"], "problems": [], "trials": []}
        row |= {"cpus": int(have["CPU"]), "number_of_gpus": int(have.get("GPU", 0))}
        row["slots"] = min(slots, args.max_concurrent_trials or slots)
        if not slots:
            has = f"it has {row['cpus']} CPUs and {row['number_of_gpus']} GPUs for trials"
            needs = f"a trial needs {args.cpus_per_trial} and {args.gpus_per_trial}"
            row["problems"].append(f"too small: {has}, {needs}: ask Slurm for more, or a smaller trial")
    total = sum(row["slots"] for row in rows.values())
    if not args.max_concurrent_trials or total < args.max_concurrent_trials:  # else no more slots are wanted
        for node in nodes:
            unused = gpus_without_cpus(node["Resources"], of_trial)
            rows[node["NodeID"]]["problems"] += [unused] * bool(unused)
    return rows


def wait_for_nodes(expected: int, patience: float, refused_file: Path) -> tuple[list[dict], list[tuple[str, str]]]:
    """Waits until all nodes have joined or refused to join.

    It waits at most `patience` seconds for the first node, and then at most JOIN_SECONDS for the others, because the
    GPUs of those that have joined are idle.

    Returns:
        The nodes of Ray that have CPUs for trials, and the others as (node, reason).
    """
    deadline, limit, told = time.time() + patience, f"within {patience:.0f} s (WORKER_TIMEOUT)", None
    first = True
    while True:
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        lines = refused_file.read_text().splitlines() if refused_file.exists() else []
        refused = [tuple(part.strip() for part in line.partition(":")[::2]) for line in lines if line.strip()]
        if nodes and first:
            first, until = False, time.time() + JOIN_SECONDS
            if until < deadline:
                deadline, limit = until, f"within {JOIN_SECONDS} s after the first node"
        cut, missing = preemption.time_is_up(), max(0, expected - len(nodes) - len(refused))
        if not missing or cut or time.time() > deadline:
            late = f"did not join {'before the time limit' if cut else limit}: see logs/ and squeue"
            others = refused + [("(not joined)", late)] * missing
            return sorted(nodes, key=lambda node: node["NodeManagerHostname"]), others
        if told != (len(nodes), len(refused)):
            told = len(nodes), len(refused)
            waits = f"at most {deadline - time.time():.0f} s more" + " for the first (WORKER_TIMEOUT)" * (not nodes)
            print(f"waiting for nodes: {told[0]} of {expected} have joined, {told[1]} refused; {waits}", flush=True)
        time.sleep(1)


def look_at_nodes(rows: dict[str, dict], shared: Path, gpus: bool, needed: int) -> None:
    """Adds to the rows, by the id of their node, what `look` returns there. The arguments are those of `look`."""
    print(f"looking at GPUs, versions and disks of each node: at most {LOOK_SECONDS} s", flush=True)
    (shared / "head").write_text(socket.gethostname())
    folders = {node["NodeID"]: Path(node["ObjectStoreSocketName"]).parent for node in ray.nodes()}
    looks, deadline = {}, time.time() + LOOK_SECONDS
    for node_id, row in rows.items():
        here = NodeAffinitySchedulingStrategy(node_id, soft=False)
        needs = {"num_cpus": 0, "num_gpus": row["number_of_gpus"] if gpus else 0}
        task = once(look).options(scheduling_strategy=here, **needs)
        looks[node_id] = task.remote(shared, node_id, gpus, needed, folders[node_id])
    for node_id, future in looks.items():
        row, found = rows[node_id], answer(future, node_id, deadline)
        if isinstance(found, str):
            row["problems"].append(found)
            continue
        row |= found | {"problems": row["problems"] + found["problems"]}
        if row["can_run"] and not appears(shared / node_id):
            what = f"a file of this node in {shared} is not seen on the head within {SHARED_SECONDS} s"
            row["problems"].append(f"results: {what}: take an --output_dir that all nodes share")
            row["can_run"] = False


def run_trials(rows: dict[str, dict], setups: list, train, timeout: float | None) -> None:
    """Runs small trials in all slots of all nodes, and adds the results to their rows.

    Args:
        rows: by the id of their node.
        setups: see small_trial.run.
        train: what each trial runs.
        timeout: seconds; None: TRIAL_SECONDS.
    """
    seconds, total = timeout or TRIAL_SECONDS, sum(row["slots"] for row in rows.values())
    print(f"running small trials, {total} at the same time: at most {seconds:.0f} s (--trial_timeout)", flush=True)
    of_trial, sharing = bundles(setups[0][1]), trials_per_gpu(setups[0][1].gpus_per_trial)
    train, setups = ray.put(train), ray.put(setups)
    started = []
    for node_id, row in rows.items():
        for _ in range(row["slots"]):
            on_node = [{"ray.io/node-id": node_id}] * len(of_trial)
            group = placement_group(of_trial, strategy="STRICT_PACK", bundle_label_selector=on_node)
            here = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
            needs = {"num_cpus": of_trial[0]["CPU"], "num_gpus": of_trial[0]["GPU"]}
            task = once(small_trial.run).options(scheduling_strategy=here, **needs)
            started.append((node_id, group, task.remote(train, setups)))
    deadline = time.time() + seconds
    for node_id, group, future in started:
        row, found = rows[node_id], answer(future, node_id, deadline)
        remove_placement_group(group)  # ends its processes
        if isinstance(found, str):
            row["problems"] = list(dict.fromkeys([*row["problems"], found]))  # once, if all slots say the same
            continue
        row["trials"].append(found)
        row["problems"] += [problem for problem in problems_of(found, sharing) if problem not in row["problems"]]


def problems_of(trial: dict, sharing: int) -> list[str]:
    """What is wrong with a small trial that has come to its end.

    Args:
        trial: what small_trial.run returns.
        sharing: trials that share a GPU.
    """
    problems = []
    if trial["last_skipped_steps"] > small_trial.STEPS // 2:
        skipped = f"fp16: {trial['last_skipped_steps']} of the last {small_trial.STEPS} optimizer steps were skipped"
        problems.append(f"{skipped}, because gradients overflow: take --precision bf16 or fp32")
    need = bytes_of_gpu(trial["peak_bytes"], sharing)
    if trial["gpu_bytes"] and sharing > 1 and need > trial["gpu_bytes"]:
        have = f"{sharing} trials need {need / 1e9:.3g} GB of a GPU of {trial['gpu_bytes'] / 1e9:.3g} GB"
        problems.append(f"{have}: take a larger --gpus_per_trial")
    return problems


def once(function):
    """A task that runs in a process of its own, which frees its GPU memory at its end, and is not tried again."""
    return ray.remote(max_calls=1, max_retries=0)(function)


def answer(future, node_id: str, deadline: float):
    """What a task on a node returns; or, as a text, why it does not."""
    while not ray.wait([future], timeout=0 if preemption.time_is_up() else 2)[0]:
        if not any(node["Alive"] and node["NodeID"] == node_id for node in ray.nodes()):
            return errors.LEFT
        if preemption.time_is_up():
            ray.cancel(future, force=True)
            return NOT_DONE
        if time.time() > deadline:
            ray.cancel(future, force=True)
            return "no answer in time: it hangs, or is too slow: leave the node out (sbatch --exclude), and report it"
    try:
        return ray.get(future)
    except Exception as error:  # whatever a trial raises, and a lost process or node
        return in_words(error.cause if isinstance(error, RayTaskError) else error)


def add_differences(rows: list[dict], of_head: dict[str, str]) -> None:
    """Adds a problem to the rows of nodes whose versions are not the head's. A driver may differ from most nodes'."""
    drivers = Counter(row["driver"] for row in rows if row.get("driver"))
    most = drivers.most_common(1)[0][0] if drivers else None
    for row in rows:
        if "versions" not in row:
            continue
        own = row["versions"]
        others = [f"{name} {own[name]} ({of_head[name]} on the head)" for name in of_head if own[name] != of_head[name]]
        if others:
            row["problems"].append(f"{', '.join(others)}: give all nodes one environment (VENV in cluster.env)")
        other_driver = f"driver {row['driver']}" if row["driver"] and row["driver"] != most else ""
        row["same"] = "differ" if others else other_driver or "same"


# ---------------------------------------------------------------------------------------------------------------------
# the result


def table(rows: list[dict], gpus: bool) -> str:
    """A line for each node. The last column is "ok", or what is wrong and what to do."""
    memory = "GB of a GPU, peak" if gpus else "GB of a trial, peak"
    lines = [["node", "CPUs", "GPUs", "slots", "versions", "TMPDIR free", "results free", "s a step", memory]]
    for row in rows:
        disks = [free_in_words(row.get("disks", {}).get(name)) for name in ("TMPDIR", "results")]
        steps = [trial["step_seconds"][0] for trial in row["trials"]]
        peaks = [trial["peak_bytes"] / 1e9 for trial in row["trials"]]
        names = Counter(filter(None, row.get("gpus", "").split(", ")))
        cards = ", ".join(f"{count} {name}" for name, count in names.items()) or row.get("number_of_gpus", "?")
        cells = [row["node"], row.get("cpus", "?"), cards, row.get("slots", "?"), row.get("same", "?"), *disks]
        cells.append(f"{statistics.fmean(steps):.3g}" if steps else "?")
        lines.append([*cells, f"{max(peaks):.3g}" if peaks else "?"])
    ends = ["", *("; ".join(row["problems"]) or "ok" for row in rows)]
    return "\n".join(f"{line}  {end}".rstrip() for line, end in zip(columns(lines).split("\n"), ends, strict=True))


def free_in_words(free: dict | None) -> str:
    """Free bytes and files of a disk."""
    if free is None:
        return "?"
    files = f", {free['files'] / 1e6:.3g} M files" if free["files"] < NO_LIMIT else ""
    return f"{free['bytes'] / 1e9:.3g} GB{files}"


def memory_in_words(gpus_per_trial: float, measured: dict) -> str:
    """The memory that a small trial took, see pace_of."""
    peak = f"{measured['peak_bytes'] / 1e9:.3g}"
    if not gpus_per_trial:
        return f"memory peak of a trial: {peak} GB"
    size, sharing = (measured["gpu_bytes"] or math.nan) / 1e9, trials_per_gpu(gpus_per_trial)
    of = "a GPU" if sharing == 1 else f"a trial, {sharing} of which share a GPU"
    return f"memory peak of {of}: {peak} of {size:.3g} GB, without what CUDA itself needs"


def pace_of(rows: list[dict], sizes: list[int], setup, small) -> dict | None:
    """The mean pace of all small trials, see pace.seconds_per_iteration; None where there was none.

    Args:
        rows: of the nodes.
        sizes: sequences of an optimizer step, for each of a trial's step_seconds.
        setup: what all trials share.
        small: the setup of the small trials. Its selection has other lengths: time is counted by token.
    """
    trials = [trial for row in rows for trial in row["trials"]]
    if not trials:
        return None
    by_question = setup.selection.lengths.mean() / small.selection.lengths.sum()
    mean = {name: statistics.fmean(t[name] for t in trials) for name in ("loss_seconds", "scored_seconds")}
    steps = zip(*(trial["step_seconds"] for trial in trials), strict=True)
    return {
        "step_seconds": {str(size): statistics.fmean(times) for size, times in zip(sizes, steps, strict=True)},
        **{name: float(seconds * by_question) for name, seconds in mean.items()},
        "checkpoint_seconds": statistics.fmean(trial["checkpoint_seconds"] for trial in trials),
        "peak_bytes": max(trial["peak_bytes"] for trial in trials),
        "gpu_bytes": min((trial["gpu_bytes"] for trial in trials), key=lambda size: size or 0),
    }
