"""Signals that announce the end of the job: SIGUSR1 before a time limit, SIGTERM when the job is cancelled."""

import signal
from pathlib import Path

from ray.tune import Callback
from ray.tune.experiment import Trial


class Preempted(Exception):
    """All trials are saved and paused, before a planned stop of the job."""


class Terminated(SystemExit):
    """After SIGTERM. Exits with code 143 if nothing catches it."""

    def __init__(self):
        super().__init__(143)


def stop_on_signals() -> None:
    """From here on SIGUSR1 raises Preempted and SIGTERM raises Terminated: no trial runs that could be saved."""

    def stop(*_):
        raise Preempted

    def terminate(*_):
        raise Terminated

    signal.signal(signal.SIGUSR1, stop)
    signal.signal(signal.SIGTERM, terminate)


received = set()  # signals since mark_signals


def mark_signals() -> None:
    """From here on SIGUSR1 and SIGTERM raise nothing: time_is_up tells of them.

    An exception that a handler raises while Ray waits in C code can be swallowed there.
    """
    received.clear()
    for each in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(each, lambda number, _: received.add(number))


def time_is_up() -> bool:
    """Whether SIGUSR1 has come since mark_signals. Raises Terminated if SIGTERM has come."""
    if signal.SIGTERM in received:
        raise Terminated
    return signal.SIGUSR1 in received


class PauseOnSignal(Callback):
    """On SIGUSR1 starts no new trials; the running ones save at their next step and are paused; raises Preempted.

    On SIGTERM ends the search after the current step of Tune. The handlers only set a mark: an exception raised in
    a handler can come up in a finalizer or a C callback, where it is swallowed, and the search would go on.

    Args:
        scheduler: its `pause_all` is set.
        search_alg: its `pause_all` is set.
        stop_file: is made, to ask the trials on all nodes to save. See hpo/squad/setup.py.
        save: called with Tune's trials when all are saved.
    """

    def __init__(self, scheduler, search_alg, stop_file: Path, save):
        self.scheduler, self.search_alg, self.stop_file, self.save = scheduler, search_alg, stop_file, save
        self.preempted = self.terminated = False

    def setup(self, **info):
        """Takes the signals over from Tune, whose handler would lose the running trials' work."""
        signal.signal(signal.SIGUSR1, self._on_preemption)
        signal.signal(signal.SIGTERM, self._on_termination)

    def _on_preemption(self, *_):
        self.preempted = True

    def _on_termination(self, *_):
        self.terminated = True

    def on_step_end(self, iteration, trials, **info):
        """Acts on the signals that have come."""
        if self.terminated:
            raise Terminated
        if self.preempted and not self.scheduler.pause_all:
            print("the time is nearly up: saving all running trials", flush=True)
            self.scheduler.pause_all = self.search_alg.pause_all = True
            self.stop_file.touch()
        if self.scheduler.pause_all and not any(t.status == Trial.RUNNING for t in trials):
            self.save(trials)
            raise Preempted
