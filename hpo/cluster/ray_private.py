"""Private parts of Ray's classes, in one file. Another Ray than checks.TESTED_WITH may differ.

- StorageContext.persist_current_checkpoint copies a checkpoint. rename_checkpoints replaces it in a worker process.
  Tested in tests/test_trial.py::test_paused_trial_equals_one_that_ran_through.
- TuneController ends the search, or loses a trial, in some cases in which a worker process is lost, and it does not
  keep enough worker processes. It is replaced when this module is imported. Tested in tests/test_trial.py,
  tests/test_faults.py.
- SearchGenerator cannot hand out trials of an earlier search. Tested in tests/test_run.py, tests/test_faults.py.

docs/ray-bugs.md describes the faults for Ray's developers, and lists the names. It also lists what is used outside of
this file.
"""

import copy
import math
import os
import re
import shutil
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
from ray.tune import Checkpoint
from ray.tune.experiment import Trial
from ray.tune.experiment.config_parser import _create_trial_from_spec
from ray.tune.search import SearchGenerator
from ray.tune.utils import flatten_dict, merge_dicts
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hpo import errors, host_memory
from hpo.errors import Kind
from hpo.files import sync

# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def persist_current_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
    """Renames a checkpoint, where Tune's own method copies it. It is written once, and is never seen incomplete."""
    self._check_validation_file()
    # The folder can only be left of a process that was lost before Tune knew of its checkpoint.
    shutil.rmtree(self.checkpoint_fs_path, ignore_errors=True)
    Path(self.checkpoint_fs_path).parent.mkdir(parents=True, exist_ok=True)
    os.rename(checkpoint.path, self.checkpoint_fs_path)
    sync(Path(self.checkpoint_fs_path).parent)
    return Checkpoint(self.checkpoint_fs_path, self.storage_filesystem)


def rename_checkpoints() -> None:
    """From now on this process renames the checkpoints that it reports. Ray Tune has an option only to copy them."""
    ray.train._internal.storage.StorageContext.persist_current_checkpoint = persist_current_checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# trials of an earlier search


class ResumableSearch(SearchGenerator):
    """Tune's SearchGenerator, which first hands out the live trials of an earlier search.

    Tune's own restore knows neither the scheduler's brackets nor the losers of a rung, and hangs (ray#39900). Here
    Tune starts anew. It gets each live trial with its id, hyperparameters and last checkpoint. A trial that was
    running or paused is handed out as paused, and the scheduler resumes it. A trial that waited for a slot waits
    again, so no suggestion is drawn earlier than it would have been.

    Args:
        searcher: with its state restored.
        run_dir: the run folder; it may have been moved.
        live: the live trials, oldest first, each {"trial_id", "config", "status", "checkpoint" (path in run_dir, or
            None), "training_iteration"}.
        created: the number of trials that the earlier search had created.
    """

    def __init__(self, searcher, run_dir: Path, live: list[dict] = (), created: int = 0):
        super().__init__(searcher)
        self.run_dir = run_dir
        # Tune takes only one pending trial at a time, so the paused ones come first.
        self.live = sorted(live, key=lambda trial: trial["status"] == Trial.PENDING)
        self.pause_all = False  # set before a planned stop: no new trials
        self._counter = created

    def is_finished(self) -> bool:
        """Whether all trials were handed out."""
        return not self.live and super().is_finished()

    def next_trial(self) -> Trial | None:
        """The next trial; None where there is none now."""
        if self.live:
            return self._recreate(**self.live.pop(0))
        return None if self.pause_all else super().next_trial()

    def _recreate(
        self, trial_id: str, config: dict, status: str, checkpoint: str | None, training_iteration: int
    ) -> Trial:
        spec = copy.deepcopy(self._experiment.spec)
        spec["config"] = merge_dicts(spec["config"], config)
        params = flatten_dict(config)
        trial = _create_trial_from_spec(
            spec, self._parser, evaluated_params=params, experiment_tag=trial_id, trial_id=trial_id
        )
        trial.init_local_path()  # the scheduler may stop it before it is ever started here
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
# worker processes


class NodeOutOfMemory(RayActorError):
    """Ray or the kernel has killed a process, because its node or job ran out of memory. hpo/errors.py has its name."""


class TuneController(ray.tune.execution.tune_controller.TuneController):
    """Tune's controller, with three differences.

    Lost processes. When Ray kills a process for its memory, Tune ends the search; when the kernel does, Tune retries
    the trial. Here the trial has failed: with the same hyperparameters it would need as much again. When a process is
    lost or fails while it changes to its next trial, Tune charges that trial with all its retries, or never starts
    it. Here the trial is started again in another process. When a node has failed a trial too often, the trial fails
    but the scheduler does not count it as a bad result.

    Keeping processes. While trials wait at their rung, Tune ends all idle processes but one, and promoted trials
    start in new ones. Here a process stays as long as a trial may need it. When a warm process becomes free, Tune
    gives it the trial whose process is starting, and ends that process. Where rungs are shorter than a start, slots
    stay empty. Here a process that starts keeps its trial.
    """

    START = 120.0  # seconds that a process may take to start before a warm one takes its trial over
    HANGS = 1200.0  # seconds until a process that starts is ended; the trial's next one has twice as long

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._oom_kills: dict[str, ray.ObjectRef] = {}  # number on each node when it joined
        self._oom_kills_known: Counter = Counter()  # kills since then that were assigned to a lost process, by node
        self._looked_at = 0.0
        self._ended_starts: Counter = Counter()  # processes that did not start in time, by trial
        self._start_seen: dict[int, float] = {}  # when each process began to start, by the hash of its actor
        self._actor_cache._max_num_objects = defaultdict(lambda: math.inf)  # _cleanup_cached_actors has the limit
        task_failed = self._actor_manager._actor_task_failed

        def _actor_task_failed(tracked_actor_task, exception: Exception) -> None:
            task_failed(tracked_actor_task, self._with_cause(exception))

        self._actor_manager._actor_task_failed = _actor_task_failed

    # -- lost processes -----------------------------------------------------------------------------------------------

    def _with_cause(self, exception: Exception) -> Exception:
        """NodeOutOfMemory where a process was killed for its memory, else the exception itself."""
        if isinstance(exception, OutOfMemoryError):
            return NodeOutOfMemory(error_msg=f"out of memory: {str(exception).splitlines()[0]}")
        if isinstance(exception, RayActorError):
            address = re.search(r"^\s*ip: (\S+)$", str(exception), re.MULTILINE)
            if address and self._killed_for_memory(address.group(1)):
                text = "out of memory: the kernel has killed its process at the memory limit of job or node"
                return NodeOutOfMemory(error_msg=text)
        return exception

    def step(self) -> None:
        """Does one step of the search; looks every 5 s for new nodes and for processes that do not start."""
        since = time.time() - self._looked_at
        if since > 5:
            self._looked_at = time.time()
            for node in ray.nodes():
                if node["Alive"] and node["NodeID"] not in self._oom_kills:
                    self._oom_kills[node["NodeID"]] = self._ask_for_oom_kills(node["NodeID"])
            for trial in self._pending_trials:
                if not self._has_slot(trial) or trial in self._resetting_trials:
                    continue
                patience = self.HANGS * 2 ** self._ended_starts[trial.trial_id]
                if since > 15:  # the search itself stood still, so it does not know yet what has started meanwhile
                    self._start_seen.pop(hash(self._trial_to_actor[trial]), None)
                elif self._seconds_starting(trial) > patience:
                    text = f"trial {trial.trial_id}: its process has not started for {patience:.0f} s and is ended"
                    print(text, flush=True)
                    self._ended_starts[trial.trial_id] += 1
                    ray.kill(self._ray_actor(self._trial_to_actor[trial]))
        super().step()

    def _ray_actor(self, tracked_actor):
        ray_actor, _ = self._actor_manager._live_actors_to_ray_actors_resources[tracked_actor]
        return ray_actor

    @staticmethod
    def _ask_for_oom_kills(node: str) -> ray.ObjectRef:
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        task = ray.remote(host_memory.oom_kills).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
        return task.remote()

    def _killed_for_memory(self, address: str) -> bool:
        """Whether the kernel killed more processes on a node than are explained already. Waits at most 20 s."""
        alive = (n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeManagerAddress"] == address)
        node = next(alive, None)
        if node not in self._oom_kills:
            return False
        try:
            before, now = ray.get([self._oom_kills[node], self._ask_for_oom_kills(node)], timeout=20)
        except RayError:  # the node is being lost too
            return False
        more = now - before > self._oom_kills_known[node]
        self._oom_kills_known[node] += more
        return more

    def _actor_failed(self, tracked_actor, exception: Exception) -> None:
        self._resetting_trials.discard(self._actor_to_trial.get(tracked_actor))
        super()._actor_failed(tracked_actor, exception)

    def _trial_task_failure(self, trial: Trial, exception: Exception) -> None:
        if trial.status == Trial.PENDING and trial in self._trial_to_actor:  # it failed while it changed to this trial
            self._resetting_trials.discard(trial)
            self._unstage_trial_with_resources(trial)
            self._set_trial_status(trial, Trial.RUNNING)
        if trial.status == Trial.RUNNING:  # otherwise _actor_failed has dealt with it
            super()._trial_task_failure(trial, exception)

    def _on_trial_reset(self, trial: Trial, success: bool) -> None:
        if success:
            super()._on_trial_reset(trial, success)
        else:
            text = "the worker process did not finish resetting from its previous trial"
            self._trial_task_failure(trial, RuntimeError(text))

    def _process_trial_failure(self, trial: Trial, exception: Exception) -> None:
        # Most failures of the trial itself are reported as results, see trial.py. Failures that reach this method are
        # the node's fault, except these two.
        of_trial = errors.kind_of(exception) in (Kind.NODE_MEMORY, Kind.PROCESS)
        if of_trial:
            trial.max_failures = 0
        self._scheduler_alg.node_fault = not of_trial
        super()._process_trial_failure(trial, exception)
        self._scheduler_alg.node_fault = False

    # -- keeping processes --------------------------------------------------------------------------------------------

    def _has_slot(self, trial: Trial) -> bool:
        return self._trial_to_actor.get(trial) in self._actor_manager._live_actors_to_ray_actors_resources

    def _is_starting(self, trial: Trial) -> bool:
        """Whether a process is starting for a trial in a slot. False if it takes too long, or is more than allowed."""
        if not self._has_slot(trial) or trial in self._resetting_trials:
            return False
        at_a_time = getattr(getattr(self._search_alg, "searcher", None), "max_concurrent", 0)
        if 0 < at_a_time < self._actor_manager.num_live_actors:
            return False
        return self._seconds_starting(trial) < self.START

    def _seconds_starting(self, trial: Trial) -> float:
        return time.time() - self._start_seen.setdefault(hash(self._trial_to_actor[trial]), time.time())

    def _maybe_add_actors(self) -> None:
        if getattr(self._scheduler_alg, "pause_all", False):
            return
        super()._maybe_add_actors()
        for trial in self._pending_trials & self._staged_trials:  # Tune has tried to start these
            self._maybe_reuse_cached_actor(trial)

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
            self._end_warm_process(self._trials[0].placement_group_factory)  # all trials need the same resources
        super()._cleanup_cached_actors(force_all)

    def _maybe_reuse_cached_actor(self, trial: Trial) -> bool:
        if self._is_starting(trial):
            return False
        bundles = trial.placement_group_factory
        while trial not in self._resetting_trials and self._actor_cache.has_cached_object(bundles):
            ray_actor = self._ray_actor(self._actor_cache._cached_objects[bundles][0])
            process = ray._private.state.actors(ray_actor._actor_id.hex())
            if process.get("State") == "ALIVE":
                break
            # It was lost while it was idle, and Tune is not told.
            self._killed_for_memory(process.get("Address", {}).get("IPAddress"))  # counts the kill, if it was one
            self._end_warm_process(bundles)
        return super()._maybe_reuse_cached_actor(trial)

    def _end_warm_process(self, bundles) -> None:
        actor = self._actor_cache.pop_cached_object(bundles)
        actor.set_on_stop(None)
        actor.set_on_error(None)
        self._remove_actor(tracked_actor=actor)


ray.tune.tune.TuneController = TuneController  # Tuner.fit() makes it


def process_of(trial: Trial) -> ray.actor.ActorHandle | None:
    """The worker process of a trial; None where it has none."""
    return trial.temporary_state.ray_actor
