"""Going on with a search: its state in one file, and a search algorithm that hands out its unfinished trials again.

Ray Tune's own restore knows neither the scheduler's brackets nor the losers of a rung, and hangs (ray#39900). Here the state
of searcher, scheduler and record is saved as one piece, between two events, so that its parts always agree; on resume Tune
starts anew and gets the live trials back as paused ones, each with its id, hyperparameters and last checkpoint.
"""

import copy
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import ray
import ray._private.state
import ray.train._internal.storage
import ray.tune.execution.tune_controller
import ray.tune.tune
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.train._internal.session import _TrainingResult
from ray import tune
from ray.tune import Callback, Checkpoint
from ray.tune.experiment import Trial
from ray.tune.experiment.config_parser import _create_trial_from_spec
from ray.tune.search import SearchGenerator
from ray.tune.utils import flatten_dict, merge_dicts
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import errors

FILE = "state.jsonl"
VERSION = 1  # of what is in it


def save_state(run_dir: Path, state: dict) -> None:
    """Writes the state as two lines of JSON, version and checksum first; the state before it stays beside it as state.jsonl.1."""
    body = json.dumps(state, default=_plain).encode()
    temporary, path = run_dir / f".{FILE}.tmp", run_dir / FILE
    with open(temporary, "wb") as file:
        file.write(json.dumps({"version": VERSION, "sha256": hashlib.sha256(body).hexdigest()}).encode() + b"\n" + body)
    sync(temporary)
    if path.exists():
        os.replace(path, run_dir / f"{FILE}.1")
    os.replace(temporary, path)


def _plain(value):
    """A number of numpy as one of Python; json.dumps asks for what it does not know."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} cannot be saved as JSON")


def load_state(run_dir: Path) -> dict | None:
    """The newest whole state of a run; None where none was ever saved. Reads data only: no code of the file is run.

    Raises:
        OSError: a file is there and cannot be read.
        RuntimeError: there are files, and none is whole, or they are of another version of this program.
    """
    found = [run_dir / name for name in (FILE, f"{FILE}.1") if (run_dir / name).exists()]
    for path in found:
        head, _, body = path.read_bytes().partition(b"\n")
        try:
            head = json.loads(head)
            version, checksum = head["version"], head["sha256"]
        except (ValueError, TypeError, KeyError):
            version = checksum = None
        if checksum == hashlib.sha256(body).hexdigest():
            if version != VERSION:
                raise RuntimeError(f"{path} has version {version!r}, and this program reads {VERSION}: go on with the commit in run.json")
            return json.loads(body)
        print(f"{path} is damaged; using the state before it", flush=True)
    if not found and (run_dir / "state.pkl").exists():
        raise RuntimeError(f"{run_dir / 'state.pkl'} is of an older version of this program: go on with the commit in run.json")
    if found:
        raise RuntimeError(f"no whole state of the search in {run_dir}; its tables and checkpoints are untouched")
    return None


def delete_state(run_dir: Path) -> None:
    """Of a search that is done: there is nothing to go on with."""
    for name in (FILE, f"{FILE}.1"):
        (run_dir / name).unlink(missing_ok=True)


def wait_for_storage(run_dir: Path, needed: int, patience: float) -> bool:
    """Waits until the file system of a run takes files again and has room for what the run still lacks of `needed` bytes.

    Returns whether it has come to that within `patience` seconds.
    """
    deadline = time.time() + patience
    while time.time() < deadline:
        try:
            with tempfile.TemporaryFile(dir=run_dir) as file:
                file.write(b"x" * 4096)
                file.flush()
                os.fsync(file.fileno())
            used = sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file())
            if shutil.disk_usage(run_dir).free >= needed - used:
                return True
        except OSError:
            pass
        time.sleep(min(5, patience / 10))
    return False


class ResumableSearch(SearchGenerator):
    """Tune's SearchGenerator around a searcher, which first hands out the live trials of an earlier run.

    One that was running or paused comes back paused: the scheduler resumes it. One that waited for a slot waits again, so
    that no suggestion is drawn earlier than it would have been.

    Args:
        searcher: with its state restored.
        run_dir: the run's folder; it may have been moved.
        live: their {"trial_id", "config", "status", "checkpoint" (path in run_dir, or None), "training_iteration"}, oldest first.
        created: how many trials the earlier run had made.
    """

    def __init__(self, searcher, run_dir: Path, live: list[dict] = (), created: int = 0):
        super().__init__(searcher)
        self.run_dir = run_dir
        # Tune takes one at a time of those that wait for a slot: the others first.
        self.live, self.draining = sorted(live, key=lambda trial: trial["status"] == Trial.PENDING), False
        self._counter = created

    def is_finished(self) -> bool:
        return not self.live and super().is_finished()

    def next_trial(self) -> Trial | None:
        if self.live:
            return self._again(**self.live.pop(0))
        return None if self.draining else super().next_trial()

    def _again(self, trial_id: str, config: dict, status: str, checkpoint: str | None, training_iteration: int) -> Trial:
        spec = copy.deepcopy(self._experiment.spec)
        spec["config"] = merge_dicts(spec["config"], config)
        trial = _create_trial_from_spec(
            spec, self._parser, evaluated_params=flatten_dict(config), experiment_tag=trial_id, trial_id=trial_id
        )
        trial.init_local_path()  # a loser is stopped without ever being started here
        if checkpoint and not (self.run_dir / checkpoint).exists():
            print(f"trial {trial_id} starts from zero: {self.run_dir / checkpoint} is missing", flush=True)
        elif checkpoint:
            metrics = {"training_iteration": training_iteration}
            trial.on_checkpoint(_TrainingResult(Checkpoint(self.run_dir / checkpoint), metrics))
            trial.storage.current_checkpoint_index = int(checkpoint.rsplit("_", 1)[1])
            trial.run_metadata.last_result = {**metrics, "config": trial.config}
        trial.set_status(Trial.PENDING if status == Trial.PENDING else Trial.PAUSED)
        return trial


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def saving_folder() -> tempfile.TemporaryDirectory:
    """Where a running trial writes its checkpoints: beside those that it has reported, so that they become one of them by a change of name.

    What an earlier process of the trial was writing when it was lost goes.
    """
    folder = Path(tune.get_context().get_storage().trial_fs_path)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("saving-*"):
        shutil.rmtree(left, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix="saving-", dir=folder, ignore_cleanup_errors=True)


def sync(*paths: Path) -> None:
    """Returns when files, and the names in folders, are on the disk: a loss of power does not take them any more."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not path.is_dir():  # not every file system can do it for folders
                raise
        finally:
            os.close(descriptor)


def persist_current_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
    """Instead of Tune's own, which copies: written once, and there as a whole or not at all."""
    self._check_validation_file()
    shutil.rmtree(self.checkpoint_fs_path, ignore_errors=True)  # of a process that was lost before Tune had heard of it
    os.rename(checkpoint.path, self.checkpoint_fs_path)
    sync(Path(self.checkpoint_fs_path).parent)
    return Checkpoint(self.checkpoint_fs_path, self.storage_filesystem)


ray.train._internal.storage.StorageContext.persist_current_checkpoint = persist_current_checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# while it runs


class NodeOutOfMemory(RayActorError):
    """Ray or the kernel has ended a process because its node, or the job's part of it, ran out of memory."""


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes the kernel has killed for their memory in the control group of this one, as at the memory limit of a job."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            folder, name = root / "sys/fs/cgroup" / group.lstrip("/"), "memory.events"
        elif "memory" in controllers.split(","):
            folder, name = root / "sys/fs/cgroup/memory" / group.lstrip("/"), "memory.oom_control"
        else:
            continue
        for file in (parent / name for parent in (folder, *folder.parents)):
            if file.exists():
                return sum(map(int, re.findall(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)))
    return 0


class TuneController(ray.tune.execution.tune_controller.TuneController):
    """Tune's own, corrected where a process is lost, and with each slot's process kept. docs/upstream.md has this for Ray.

    Tune's own ends the search when Ray ends a process for its memory, and retries one that the kernel has killed for it; here such a
    trial has failed, and is not tried again, as it would need as much again. A trial whose node has failed it too often has failed
    too, but the scheduler does not hear of it as a bad result. A process that is lost, or fails, while it changes over to its next trial costs that trial all its
    retries with Tune's own, or it is never started; here the trial is started again in another process.

    Tune's own starts one process after the other, and as soon as a warm one is free, which takes the trial over, ends the one that is
    starting: with rungs shorter than that start, slots stay empty. And while trials wait for the others of their rung it ends all idle
    processes but one, so that those that are promoted start in fresh ones. Here processes start side by side, as many as there are slots,
    and each stays as long as a trial may need it.
    """

    START = 120.0  # seconds that a process may take to start before a warm one takes its trial over
    HANGS = 1200.0  # and before it is ended, and the trial started again in another

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        task_failed = self._actor_manager._actor_task_failed
        self._oom_kills: dict[str, ray.ObjectRef] = {}  # by node, when it was first seen: control groups may be older than a search
        self._told_of: Counter = Counter()  # kills since then, by node
        self._looked_at = 0.0
        self._actor_cache._max_num_objects = defaultdict(lambda: math.inf)  # _cleanup_cached_actors has the limit

        def _actor_task_failed(tracked_actor_task, exception: Exception) -> None:
            if isinstance(exception, OutOfMemoryError):
                exception = NodeOutOfMemory(error_msg=f"out of memory: {str(exception).splitlines()[0]}")
            elif isinstance(exception, RayActorError):
                found = re.search(r"^\s*ip: (\S+)$", str(exception), re.MULTILINE)
                if found and self._killed_for_memory(found.group(1)):
                    exception = NodeOutOfMemory(error_msg="out of memory: the kernel has killed its process at the memory limit of job or node")
            task_failed(tracked_actor_task, exception)

        self._actor_manager._actor_task_failed = _actor_task_failed

    def step(self) -> None:
        since = time.time() - self._looked_at
        if since > 5:
            self._looked_at = time.time()
            for node in ray.nodes():
                if node["Alive"] and node["NodeID"] not in self._oom_kills:
                    self._oom_kills[node["NodeID"]] = self._ask_for_oom_kills(node["NodeID"])
            for trial in self._pending_trials:
                if not self._has_slot(trial) or trial in self._resetting_trials:
                    continue
                if since > 15:  # the search itself stood still: what has come up since then it has not heard yet
                    vars(self._trial_to_actor[trial]).pop("starting_since", None)
                elif self._starting_for(trial) > self.HANGS:
                    print(f"trial {trial.trial_id}: its process has not started for {self.HANGS:.0f} s and is ended", flush=True)
                    ray.kill(self._actor_manager._live_actors_to_ray_actors_resources[self._trial_to_actor[trial]][0])
        super().step()

    @staticmethod
    def _ask_for_oom_kills(node: str) -> ray.ObjectRef:
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        return ray.remote(oom_kills).options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote()

    def _killed_for_memory(self, address: str) -> bool:
        """Whether the kernel has killed more processes on a lost process's node than are accounted for; asks the node, at most 20 s."""
        node = next((n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeManagerAddress"] == address), None)
        if node not in self._oom_kills:
            return False
        try:
            before, now = ray.get([self._oom_kills[node], self._ask_for_oom_kills(node)], timeout=20)
        except RayError:  # the node is on its way out too
            return False
        more = now - before > self._told_of[node]
        self._told_of[node] += more
        return more

    def _maybe_cache_trial_actor(self, trial: Trial) -> bool:
        if not self._reuse_actors:
            return False
        actor = self._trial_to_actor[trial]
        if not self._actor_manager.is_actor_started(actor) or actor not in self._started_actors:
            return False
        self._actor_cache.cache_object(trial.placement_group_factory, actor)
        self._trial_to_actor.pop(trial)
        self._actor_to_trial.pop(actor)
        trial.set_ray_actor(None)
        return True

    def _cleanup_cached_actors(self, force_all: bool = False) -> None:
        waiting = len(self._paused_trials) + len(self._pending_trials)
        while self._search_alg.is_finished() and self._actor_cache.num_cached_objects > waiting:
            self._end_warm_process(self._trials[0].placement_group_factory)  # all trials ask for the same resources
        super()._cleanup_cached_actors(force_all)

    def _has_slot(self, trial: Trial) -> bool:
        return self._trial_to_actor.get(trial) in self._actor_manager._live_actors_to_ray_actors_resources

    def _is_starting(self, trial: Trial) -> bool:
        """Whether a process of its own is starting in a slot; not one that takes long, on a sick node perhaps, or is one too many."""
        if not self._has_slot(trial) or trial in self._resetting_trials:
            return False
        at_a_time = getattr(getattr(self._search_alg, "searcher", None), "_max_concurrent", 0)
        if 0 < at_a_time < self._actor_manager.num_live_actors:
            return False
        return self._starting_for(trial) < self.START

    def _starting_for(self, trial: Trial) -> float:
        """Seconds since the process of a trial was first seen to start."""
        return time.time() - vars(self._trial_to_actor[trial]).setdefault("starting_since", time.time())

    def _maybe_update_trial_queue(self) -> None:
        # One trial waits for a slot, so that none is suggested long before it starts; those that have one, where their process starts, do not count.
        none_waits = all(self._has_slot(trial) for trial in self._pending_trials)
        self.update_max_pending_trials(max(1, len(self._pending_trials) + none_waits))
        super()._maybe_update_trial_queue()
        self.update_max_pending_trials(1)  # elsewhere it says how many may ask for a slot at a time: the scheduler's choice comes first

    def _maybe_add_actors(self) -> None:
        if getattr(self._scheduler_alg, "draining", False):
            return
        super()._maybe_add_actors()
        for trial in self._pending_trials & self._staged_trials:  # where Tune has tried one that is starting
            self._maybe_reuse_cached_actor(trial)

    def _maybe_reuse_cached_actor(self, trial: Trial) -> bool:
        if self._is_starting(trial):
            return False
        bundles = trial.placement_group_factory
        while trial not in self._resetting_trials and self._actor_cache.has_cached_object(bundles):
            ray_actor, _ = self._actor_manager._live_actors_to_ray_actors_resources[self._actor_cache._cached_objects[bundles][0]]
            process = ray._private.state.actors(ray_actor._actor_id.hex())
            if process.get("State") == "ALIVE":
                break
            # Lost while it was idle, with its node perhaps: of that nobody tells Tune.
            self._killed_for_memory(process.get("Address", {}).get("IPAddress"))  # counts it, if so
            self._end_warm_process(bundles)
        return super()._maybe_reuse_cached_actor(trial)

    def _end_warm_process(self, bundles) -> None:
        actor = self._actor_cache.pop_cached_object(bundles)
        actor.set_on_stop(None)
        actor.set_on_error(None)
        self._remove_actor(tracked_actor=actor)

    def _actor_failed(self, tracked_actor, exception: Exception) -> None:
        self._resetting_trials.discard(self._actor_to_trial.get(tracked_actor))
        super()._actor_failed(tracked_actor, exception)

    def _trial_task_failure(self, trial: Trial, exception: Exception) -> None:
        if trial.status == Trial.PENDING and trial in self._trial_to_actor:  # as _actor_failed, where the process is still there
            self._resetting_trials.discard(trial)
            self._unstage_trial_with_resources(trial)
            self._set_trial_status(trial, Trial.RUNNING)
        if trial.status == Trial.RUNNING:  # else _actor_failed has dealt with it
            super()._trial_task_failure(trial, exception)

    def _on_trial_reset(self, trial: Trial, success: bool) -> None:
        if success:
            super()._on_trial_reset(trial, success)
        else:
            self._trial_task_failure(trial, RuntimeError("its process did not let go of the trial before it"))

    def _process_trial_failure(self, trial: Trial, exception: Exception) -> None:
        its_own = isinstance(exception, (NodeOutOfMemory, errors.TrialFailed))  # else the node's: most of what is its own the train function reports
        if its_own:
            trial.max_failures = 0
        self._scheduler_alg.node_fault = not its_own
        super()._process_trial_failure(trial, exception)
        self._scheduler_alg.node_fault = False


ray.tune.tune.TuneController = TuneController  # what Tuner.fit() makes


class Drained(Exception):
    """All trials are saved and paused, before a planned stop."""


def stop_at_once() -> None:
    """SIGUSR1 ends the program by Drained from here on, SIGTERM with exit code 143: no trial runs that could be saved."""

    def stop(*_):
        raise Drained

    signal.signal(signal.SIGUSR1, stop)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


class Drain(Callback):
    """On SIGUSR1: no new trials; the running ones save at their next step and are paused; then Drained is raised.

    SIGTERM ends the search after the step that Tune is in: an exception out of a signal handler may come where it is swallowed, as in a
    finalizer or in a callback from C, and the search would go on.

    Args:
        scheduler, algorithm: their `draining` is set.
        stop_file: made to ask the trials, on whatever node, to save.
        finish: called with Tune's trials when all is saved.
    """

    def __init__(self, scheduler, algorithm: ResumableSearch, stop_file: Path, finish):
        self.scheduler, self.algorithm, self.stop_file, self.finish = scheduler, algorithm, stop_file, finish
        self.asked = self.terminated = False

    def setup(self, **info):  # after Tune has set its own handler, which would drop what runs
        signal.signal(signal.SIGUSR1, self._ask)
        signal.signal(signal.SIGTERM, self._terminate)

    def _ask(self, *_):
        self.asked = True

    def _terminate(self, *_):
        self.terminated = True

    def on_step_end(self, iteration, trials, **info):
        if self.terminated:
            sys.exit(143)
        if self.asked and not self.scheduler.draining:
            print("the time is nearly up: saving all running trials", flush=True)
            self.scheduler.draining = self.algorithm.draining = True
            self.stop_file.touch()
        if self.scheduler.draining and not any(t.status == Trial.RUNNING for t in trials):
            self.finish(trials)
            raise Drained


class Watchdog(Callback):
    """Ends the process of a trial that has not reported for too long, or not let go of the trial before it: Tune then starts the
    trial again elsewhere.

    Too long is `timeout` seconds; by default 10 times the slowest iteration so far, at least 10 minutes, and before the first
    iteration 2 hours.
    """

    def __init__(self, timeout: float | None, say):
        self.timeout, self.say = timeout, say
        self.heard: dict[str, float] = {}  # when each trial started or reported last
        self.changing: dict[str, float] = {}  # since when a process has been changing over to a trial
        self.slowest: float | None = None  # iteration so far, seconds
        self.looked_at = time.time()

    def on_trial_start(self, iteration, trials, trial, **info):
        self.heard[trial.trial_id] = time.time()

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.heard[trial.trial_id] = time.time()
        if "ended_at" in result:
            self.slowest = max(self.slowest or 0, result["ended_at"] - result["started_at"])

    def on_step_end(self, iteration, trials, **info):
        gap, self.looked_at = time.time() - self.looked_at, time.time()
        if gap > 10:  # the search itself stood still, as when its file system is gone for a while, and so may the trials
            for times in (self.heard, self.changing):
                times.update({trial_id: at + gap for trial_id, at in times.items()})
        limit = self.timeout or (7200 if self.slowest is None else max(600, 10 * self.slowest))
        for trial in trials:
            if trial.status == Trial.RUNNING:
                self.changing.pop(trial.trial_id, None)
                silent = time.time() - self.heard.get(trial.trial_id, math.inf)
            elif trial.status == Trial.PENDING and trial.temporary_state.ray_actor:
                silent = time.time() - self.changing.setdefault(trial.trial_id, time.time())
            else:
                self.changing.pop(trial.trial_id, None)
                continue
            if silent > limit:
                self.say(f"trial {trial.trial_id} has not reported for {silent:.0f} s: its process is ended")
                self.heard[trial.trial_id] = self.changing[trial.trial_id] = time.time()
                ray.kill(trial.temporary_state.ray_actor)


class BadNodes(Callback):
    """Gives back the worker job of a node where a GPU fails: a trial that fails at once frees its slot for the next, so that one such
    GPU would go through all trials.

    A node counts as bad after `MOST` CUDA errors that errors.py puts down to the node, if it had more of them than all others together,
    and others are there. Told by a file where the workers meet the head, which has Slurm keep off that node for the job that replaces it.
    """

    MOST = 2

    def __init__(self, folder: Path | None, say):
        self.folder, self.say = folder, say
        self.errors: Counter = Counter()  # by address of the node

    def on_trial_recover(self, iteration, trials, trial, **info):
        text = Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""
        last = text[text.rfind("Failure #") :]
        found, reasons = re.search(r"\bip=([\d.]+)", last), re.findall(r"CUDA error.*", last)
        if not found or not reasons or errors.kind_of(reasons[-1]) is not errors.Kind.NODE:
            return
        address = found.group(1)
        self.errors[address] += 1
        if self.folder is None or self.errors[address] < self.MOST or 2 * self.errors[address] <= self.errors.total():
            return
        jobs = {}  # of workers, by address
        for node in ray.nodes():
            job = next((name.removeprefix("slurm_job_") for name in node["Resources"] if name.startswith("slurm_job_")), None)
            if node["Alive"] and job:
                jobs[node["NodeManagerAddress"]] = job
        if address in jobs and len(jobs) > 1:
            (self.folder / f"bad-{jobs[address]}").write_text(f"a GPU fails here, {self.errors[address]} times so far: {reasons[-1]}\n")
            self.say(f"worker job {jobs[address]} is given up: a GPU of its node fails")

    on_trial_error = on_trial_recover
