"""The machinery of the search. The script raytune_bayesian.py is the experiment and imports from here.

    errors, files           what an error means; files that are never seen incomplete
    disk, host_memory       how much disk and main memory is free
    code_copy               the copy of the code in a run folder, which trials and --resume use
    bohb/                   the algorithm: brackets, kernel densities (kde), searcher, scheduler
    squad/                  data, evaluation, scores, models, lora, precision, ranks: what a trial trains with
    results/                the run folder: tables, log lines, slot time, trackers, figures, report
    machines                nodes, slots and disk, here or as Slurm gives them
    arguments, checks,      what the user hands in, and its checks
      ranges, known,
      search_space
    plan/                   what a search would run and need: simulator, plan, budget, memory, pace
    cluster/                Ray and Slurm: launch, exits, session, trial, saved state, watchdogs, ray_private

Imports go down only, from the script to errors and files; bohb, squad and results do not know each other.

The life of a trial: TuneBOHB suggests its hyperparameters (bohb/searcher), and HyperBandForBOHB puts it into a bracket
(bohb/scheduler). Tune starts it in a worker process (cluster/trial), which calls `train` of the script. After each
iteration the trial reports. At a rung it also reports EM and F1, with a checkpoint. The scheduler gives the result to
the searcher's model and pauses the trial. When all trials of the rung have reported, the best are promoted and go on
from their checkpoints, and the others end. All along, the search saves its state (cluster/session, cluster/state).
"""

import contextlib
import os
import sys

# Ray reads these when it is imported. Without a token anyone on the network could run code in its cluster. Its
# progress output cannot be silenced; ours is in results/.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"


@contextlib.contextmanager
def hidden(*packages: str):
    """Imports in this block do not find these packages, as if they were not installed.

    Libraries import others where they are installed, for features that are not used here: DeepSpeed and Ray import
    trackers; evaluate and transformers import scipy. It takes seconds in each process. A package that is imported
    already stays visible.
    """
    new = dict.fromkeys(set(packages) - set(sys.modules))
    sys.modules.update(new)  # None: Python's documentation of the import system
    try:
        yield
    finally:
        for name in new:
            sys.modules.pop(name, None)
