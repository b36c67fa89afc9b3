"""BOHB in Ray Tune: TuneBOHB, a searcher, and HyperBandForBOHB, a scheduler. They replace Ray's classes.

Falkner, Klein & Hutter, "BOHB: Robust and Efficient Hyperparameter Optimization at Scale", ICML 2018. Hyperband
decides how long a trial may train. Two kernel densities, of the good and of the bad results at the largest budget that
has enough of them, decide what to try next.

    from hpo.bohb.scheduler import HyperBandForBOHB
    from hpo.bohb.searcher import TuneBOHB

    scheduler = HyperBandForBOHB(time_attr="training_iteration", max_t=50, reduction_factor=4, stop_last_trials=False)
    searcher = TuneBOHB(metric="eval_loss", mode="min", seed=0)

Use them together: the scheduler hands each result that a trial earned at a rung to the searcher. Their state is plain
data, so it can be written as JSON. Ray's own classes lose results on the way to the model, draw from the global random
state, and fall back to random search without a word. tests/test_bohb.py shows each difference.

brackets.py has the sizes of brackets and rungs, kde.py the model. Nothing of torch, SQuAD or files is in this package.
"""
