"""BOHB that is really BOHB: Ray Tune's TuneBOHB and HyperBandForBOHB, corrected.

Falkner, Klein & Hutter, "BOHB: Robust and Efficient Hyperparameter Optimization at Scale", ICML 2018.
Hyperband decides how long a trial may train; two kernel densities, one over good and one over bad results
at the largest budget that has enough of them, decide what to try next. As they ship, Ray's two classes lose
results on the way to the model, draw from the global random state and fall back to random search without a
word. What differs here, and the test that shows each difference, is listed in tests/test_bohb.py.

    scheduler = HyperBandForBOHB(time_attr="training_iteration", max_t=50, reduction_factor=4, stop_last_trials=False)
    searcher = TuneBOHB(metric="eval_loss", mode="min", seed=0)

The two must be used together: the scheduler hands each result that a trial earned at a rung to the searcher.
Their state is plain data (lists, dictionaries, numbers, strings), so that it can be written as JSON and read back by another version.
"""
