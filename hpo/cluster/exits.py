"""How the program ends: its exit code, and the last line of the log.

Imports little, so that a wrong search space is refused before the imports of a search.
"""

import argparse
import contextlib
import gc
import shlex
import sys
import traceback
from pathlib import Path

from hpo import arguments, errors
from hpo.cluster import preemption
from hpo.results import terminal


@contextlib.contextmanager
def exit_codes(args: argparse.Namespace):
    """Ends the program: with exit code 2 on bad input, 143 after SIGTERM, 1 on any other error. With --check: 0 or 2.

    If there is a run, tells how to resume it.
    """
    script, folder = Path(sys.argv[0]).name, arguments.run_dir(args)
    gc.freeze()  # no garbage collection looks at what was imported so far
    gc.enable()
    if args.check:
        preemption.stop_on_signals()  # while it loads model and data; later it calls mark_signals
    try:
        with errors.exit_on_bad_input(), terminal.below_the_log():
            try:
                yield
            except preemption.Preempted:
                if not args.check:
                    raise
                raise errors.BadInput("--check: the time limit came before the check of the nodes began") from None
    except (Exception, KeyboardInterrupt, preemption.Terminated) as error:
        storage = errors.is_storage(error)
        if storage:
            print(f"{script}: storage: {errors.one_line(error, -500)}", file=sys.stderr)
        elif isinstance(error, Exception) and not isinstance(error, preemption.Preempted):
            traceback.print_exc()
        if (storage and not args.check) or (folder / "run.json").exists():
            where = f"{args.output_dir}/{args.run_name}"
            how = shlex.join(["--resume", "--run_name", args.run_name, "--output_dir", str(args.output_dir)])
            print(f"{script}: the search ended early; what was saved is in {where}; go on with {how}", file=sys.stderr)
        other = 2 if args.check else 1
        sys.exit(error.code if isinstance(error, preemption.Terminated) else other)
