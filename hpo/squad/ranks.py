"""A trial on several GPUs: one process, called a rank, for each. Nothing of Ray Tune in here.

Rank 0 is the trial's own worker process, the only one that Ray Tune knows. It starts the other ranks once, in the
placement group that Tune has made for the trial, so they end when Tune removes that group. They stay for the next
trials and end with rank 0. (A TorchTrainer inside a Tune function would keep its resources while the trial is paused.)
"""

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable

import ray
import torch
from ray.exceptions import RayTaskError
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hpo import errors, host_memory
from hpo.errors import Kind
from hpo.squad import group as groups
from hpo.squad.group import Group

Body = Callable[[dict, Group], None]  # what each rank does of a trial, with the trial's config


class TrialPaused(Exception):
    """Raised in a rank other than 0: Ray Tune has paused or ended the trial."""


@ray.remote(max_restarts=0)
class Rank:
    """The process of a rank other than 0. Arguments as for `Ranks`."""

    def __init__(self, body: Body, rank: int, size: int, folder: str):
        self.body, self.group = body, groups.join(rank, size, folder)

    def run(self, config: dict) -> None:
        """This rank's part of a trial."""
        with contextlib.suppress(TrialPaused):
            self.body(config, self.group)


class Ranks:
    """All ranks of the trials of one worker process, which is rank 0.

    Args:
        body: what each rank does of a trial.
        size: number of ranks. Several are started in the bundles of this process's placement group; the first
            bundle is this process's own.

    Raises:
        ConnectionError: they have not met in time. It is an OSError, so Tune tries the trial in another process.
    """

    def __init__(self, body: Body, size: int):
        self.body, self.others = body, []
        if size == 1:
            self.group = groups.join()
            return
        here = ray.util.get_current_placement_group()
        bundles = placement_group_table(here)["bundles"]
        folder, body = tempfile.mkdtemp(), ray.put(body)  # TMPDIR is removed after the search
        for rank in range(1, size):
            strategy = PlacementGroupSchedulingStrategy(here, placement_group_bundle_index=rank)
            resources = {"num_cpus": bundles[rank].get("CPU", 0), "num_gpus": bundles[rank].get("GPU", 0)}
            actor = Rank.options(scheduling_strategy=strategy, **resources)
            self.others.append(actor.remote(body, rank, size, folder))
        try:
            self.group = groups.join(0, size, folder)
        except Exception as error:
            reason = errors.one_line(error, 200)
            raise ConnectionError(f"the ranks have not met within {groups.START} s: {reason}") from error

    def run(self, config: dict) -> None:
        """Runs a trial in all ranks.

        Raises:
            errors.TrialFailed: one rank has failed, and would fail again.
            OSError: storage is full or gone, or the process of another rank is lost.
            Exception: of one rank, where no trial can run with this installation.
        """
        if not self.others:
            self.body(config, self.group)
            return
        kills_before = host_memory.oom_kills()
        futures = [actor.run.remote(config) for actor in self.others]
        ended, lost = threading.Event(), []
        watch = threading.Thread(target=self._watch, args=(futures, ended, lost), daemon=True)
        watch.start()
        try:
            self.body(config, self.group)
            ray.get(futures)
        except FloatingPointError:  # all ranks see the same numbers, so each ends its part by itself
            ended.set()
            _, at_work = ray.wait(futures, num_returns=len(futures), timeout=groups.START)
            if at_work:
                raise ConnectionError("a rank does not end its part of a trial") from None
            raise
        except Exception as error:
            ended.set()
            watch.join()
            finished, _ = ray.wait(futures, num_returns=len(futures), timeout=5)
            for future in finished:
                try:
                    ray.get(future)
                except Exception as of_rank:
                    lost.append(of_rank)
            for actor in self.others:
                ray.kill(actor)
            cause = cause_of([error, *lost], host_memory.oom_kills() > kills_before)
            if cause is error:
                raise
            raise cause from (lost[0] if lost else error)
        finally:
            ended.set()
            watch.join()

    def _watch(self, futures: list, ended: threading.Event, lost: list) -> None:
        """Frees rank 0 from a collective operation that cannot complete, because another rank has ended early."""
        pending = list(futures)
        while pending and not ended.is_set():
            done, pending = ray.wait(pending, timeout=1)
            try:
                ray.get(done)
            except Exception as error:
                if ended.wait(5):  # rank 0 fails by itself, for example on the same numbers
                    return
                lost.append(error)
                for actor in self.others:  # breaks the connections of gloo
                    ray.kill(actor)
                if torch.cuda.is_available():  # NCCL's must be aborted, those of DeepSpeed's own groups too
                    with contextlib.suppress(Exception):
                        torch.distributed.distributed_c10d._abort_process_group()
                if not ended.wait(60):
                    os._exit(1)  # Tune starts the trial again from its checkpoint, in another process
                return


def cause_of(raised: list[Exception], killed: bool) -> Exception:
    """The error that explains the errors of several ranks: most of them have only lost the connection to one rank.

    Args:
        raised: the errors of the ranks.
        killed: whether the kernel has killed a process for its memory meanwhile.
    """
    raised = [error.cause if isinstance(error, RayTaskError) else error for error in raised]
    kinds = [(errors.kind_of(error), error) for error in raised]
    for first in (Kind.STORAGE, Kind.SETUP):
        for kind, error in kinds:
            if kind is first:
                return error
    for kind, error in kinds:
        if kind is not Kind.NODE:
            return errors.TrialFailed(errors.one_line(f"{type(error).__name__} {error}"))
    if killed:
        return errors.TrialFailed("out of memory: the kernel has killed a rank at the memory limit of job or node")
    return ConnectionError("a rank is lost: " + " | ".join(errors.one_line(error, 200) for error in raised))


_of_this_process: list[Ranks] = []


def of_this_process(body: Body, size: int) -> Ranks:
    """The ranks of this worker process: started by its first trial, kept for the next ones."""
    if not _of_this_process:
        _of_this_process.append(Ranks(body, size))
    return _of_this_process[0]
