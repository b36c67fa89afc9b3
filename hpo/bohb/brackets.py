"""Brackets and rungs of Hyperband. Standard library only."""

import math
from dataclasses import dataclass, field


def rungs(max_t: int, reduction_factor: float) -> list[list[tuple[int, int]]]:
    """The brackets of one band, and their rungs.

    The budgets are max_t / reduction_factor**k, rounded down. So all brackets share them, and each bracket ends at
    max_t. (Ray rounds the first budget and then multiplies it: 3, 12, 48 for max_t 50 and reduction_factor 4.)

    The sizes are those of Li et al., "Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization", JMLR
    2018. As in Ray, the number of brackets is rounded to the nearest integer.

    Args:
        max_t: the budget of a full training.
        reduction_factor: one of so many trials is promoted at a rung.

    Returns:
        A list of brackets, the one with most trials first. Each is a list of rungs (number of trials, budget).
    """
    s_max = round(math.log(max_t) / math.log(reduction_factor))
    budgets = [int(max_t / reduction_factor**k + 1e-9) for k in range(s_max + 1)]
    band = []
    for s in range(s_max, -1, -1):
        if budgets[s] < 1:  # a trial cannot train for less than one iteration
            continue
        n = math.ceil((s_max + 1) / (s + 1) * reduction_factor**s - 1e-9)
        band.append([(math.ceil(n / reduction_factor**i - 1e-9), budgets[s - i]) for i in range(s + 1)])
    return band


def band_size(max_t: int, reduction_factor: float) -> int:
    """The number of trials in one band, which fills each of its brackets once."""
    return sum(bracket[0][0] for bracket in rungs(max_t, reduction_factor))


@dataclass
class Bracket:
    """One run of successive halving. It has the ids of trials, not the trials, so its state is plain data."""

    rungs: list[tuple[int, int]]  # (number of trials, budget) of each rung
    rung: int = 0  # the index of the current rung
    added: int = 0  # trials that were ever added, failed ones included
    members: list[str] = field(default_factory=list)  # trials that are still in the bracket, the oldest first
    scores: dict[str, float] = field(default_factory=dict)  # results at the current rung, higher is better
    promoted: set[str] = field(default_factory=set)  # members that were promoted and wait to be resumed
    closed: bool = False  # whether it takes no more trials, although it has room

    @property
    def budget(self) -> int:
        """The budget of the current rung."""
        return self.rungs[self.rung][1]

    @property
    def last_rung(self) -> bool:
        """Whether the current rung is the last one."""
        return self.rung == len(self.rungs) - 1

    @property
    def open(self) -> bool:
        """Whether the bracket takes further trials: it has room, and its first rung is not decided."""
        return not self.closed and self.rung == 0 and self.added < self.rungs[0][0]

    def budgets(self) -> list[int]:
        """The budgets of all rungs."""
        return [budget for _, budget in self.rungs]

    def drop(self, trial_id: str) -> None:
        """Removes a trial."""
        if trial_id in self.members:
            self.members.remove(trial_id)
        self.promoted.discard(trial_id)
