"""Brackets and rungs of Hyperband."""

import math
from dataclasses import dataclass, field


def rungs(max_t: int, reduction_factor: float) -> list[list[tuple[int, int]]]:
    """The brackets of one band, most aggressive first; each a list of rungs (number of trials, budget).

    Budgets are max_t / reduction_factor**k, rounded down, so that all brackets share them and every bracket ends at
    max_t itself. Ray multiplies a rounded first budget instead: 3, 12, 48 for max_t 50 and reduction_factor 4.
    Number of brackets and of trials as in Ray (Li et al., "Hyperband", JMLR 2018, with rounding to nearest).
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
    """Number of trials that fill every bracket once."""
    return sum(bracket[0][0] for bracket in rungs(max_t, reduction_factor))


@dataclass
class Bracket:
    """One run of successive halving. Trials are known by their ids."""

    rungs: list[tuple[int, int]]  # (number of trials, budget) of each rung
    rung: int = 0  # the one being worked on
    added: int = 0  # trials that ever came in, failed ones included
    members: list[str] = field(default_factory=list)  # still in the race, in the order they came
    scores: dict[str, float] = field(default_factory=dict)  # results at this rung, higher is better
    promoted: set[str] = field(default_factory=set)  # wait to be resumed

    @property
    def budget(self) -> int:
        return self.rungs[self.rung][1]

    @property
    def last_rung(self) -> bool:
        return self.rung == len(self.rungs) - 1

    @property
    def full(self) -> bool:
        return self.added >= self.rungs[0][0]

    def budgets(self) -> list[int]:
        return [budget for _, budget in self.rungs]

    def drop(self, trial_id: str) -> None:
        if trial_id in self.members:
            self.members.remove(trial_id)
        self.promoted.discard(trial_id)
