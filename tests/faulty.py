"""Test scripts: the experiment with another `train`, run from the command line as raytune_bayesian.py is."""

from pathlib import Path

BEGIN = """
from hpo import checks

if __name__ == "__main__":
    ARGS = checks.arguments_of_program("a test")

import contextlib
import dataclasses
import os
import signal
import socket
import time
import unittest.mock
from pathlib import Path

import torch

import {experiment} as experiment
from hpo.squad.data import TokenizedSquad

"""
END = """

if __name__ == "__main__":
    from hpo.cluster.exits import exit_codes

    with exit_codes(ARGS):
        experiment.main(ARGS, train)
"""


def write_script(path: Path, body: str, experiment: str = "raytune_bayesian") -> Path:
    """Writes a test script.

    Args:
        path: of the script.
        body: Python that defines `train(config, setup, trial)`; it may call experiment.train.
        experiment: the module of the honest script.
    """
    path.write_text(BEGIN.format(experiment=experiment) + body + END)
    return path


SLOW = """
def train(config, setup, trial):
    slow_down(trial)
    experiment.train(config, setup, trial)


def slow_down(trial):
    # Each optimizer step waits, as for a GPU: a long training would take the processor from what is tested.
    must_stop = trial.must_stop
    trial.must_stop = lambda: time.sleep(0.05) or must_stop()
"""


def reporting(names: str, slow: bool = False, hold: Path | None = None) -> str:
    """A `train` whose reports have other names of nodes.

    Args:
        names: an expression for the name; `trial` is the context of the trial.
        slow: each optimizer step waits, see SLOW.
        hold: no trial reports its second iteration before this file is there: a search that cannot end before it.
    """
    return (
        SLOW.replace("def train(", "def slow_train(")
        + f"""

def train(config, setup, trial):
    report = trial.report

    def report_with_name(metrics, checkpoint=None):
        while {bool(hold)} and metrics["training_iteration"] == 2 and not os.path.exists("{hold}"):
            time.sleep(0.2)
        report(metrics | {{"node": {names}}}, checkpoint)

    trial.report = report_with_name
    {"slow_train" if slow else "experiment.train"}(config, setup, trial)
"""
    )
