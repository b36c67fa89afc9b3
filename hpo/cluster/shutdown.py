"""Signals: saving and pausing all trials before a planned stop."""

import signal
import sys
from pathlib import Path

from ray.tune import Callback
from ray.tune.experiment import Trial

from hpo.cluster.resume import ResumableSearch


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
