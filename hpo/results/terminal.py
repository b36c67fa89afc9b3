"""What a terminal shows below the log: a clock, and during the search its progress. A file gets the log alone."""

import contextlib
import datetime
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.text import Text


class Display:
    """The lines at the bottom of a terminal. A thread of rich draws them four times a second.

    Attributes:
        lines: the progress of the search, as text. Empty before and after the search.
        done: the share of the search that is done, from 0 to 1.
    """

    def __init__(self):
        self.lines, self.done = "", 0.0
        self._spinner, self._begun = Spinner("dots"), time.monotonic()

    def __rich__(self) -> Group:
        """The lines as they are now."""
        self._spinner.text = str(datetime.timedelta(seconds=round(time.monotonic() - self._begun)))
        width = shutil.get_terminal_size().columns - 1  # a line that the terminal wraps would not be erased
        text = "\n".join(textwrap.fill(line, width) for line in self.lines.splitlines())
        progress = [Text(text), ProgressBar(1.0, self.done, width=min(60, width))]
        return Group(*(progress if self.lines else []), self._spinner)


display: Display | None = None  # None where the output is no terminal
_live: Live | None = None


@contextlib.contextmanager
def below_the_log() -> Iterator[None]:
    """Keeps the display at the bottom of the terminal, if the output is one. Printed lines appear above it."""
    global display, _live
    console = Console(soft_wrap=True, markup=False, highlight=False)  # printed lines stay as they are
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        yield
        return
    display = Display()
    _live = Live(display, console=console, transient=True)
    with _live:
        yield
    display = None


def leave() -> None:
    """Ends the display before another program takes the place of this one."""
    if _live:
        _live.stop()
