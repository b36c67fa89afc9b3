"""BOHB in Ray Tune: a searcher and a scheduler that replace Ray's TuneBOHB and HyperBandForBOHB.

Falkner, Klein & Hutter, "BOHB: Robust and Efficient Hyperparameter Optimization at Scale", ICML 2018. Hyperband
decides how long a trial may train. Two kernel densities, of the good and of the bad results at the largest budget that
has enough results, suggest what to try next.

    from hpo.bohb.scheduler import HyperBandForBOHB
    from hpo.bohb.searcher import TuneBOHB

    tune_config = tune.TuneConfig(
        metric="eval_loss",
        mode="min",
        num_samples=34,
        search_alg=TuneBOHB(seed=0),
        scheduler=HyperBandForBOHB(max_t=50, reduction_factor=4, stop_last_trials=False),
    )

Always use them together, because the scheduler passes each result at a rung to the searcher. The trainable must report
a checkpoint at each budget in config["rungs"].

    brackets.py     sizes of brackets and rungs; imports only the standard library, so `band_size` needs no Ray
    kde.py          the model: kernel densities, with hpbandster and statsmodels
    steps.py        quantized ranges of Tune
    searcher.py     suggests hyperparameters
    scheduler.py    pauses, promotes and stops trials

The state of both classes is plain data (get_state, set_state), so a search can be saved as JSON and resumed by new
objects. This package can be copied into another project, as hpo/bohb: it imports nothing else of hpo/, and it knows
neither torch nor files. docs/bohb.md explains the search and its differences to Ray's classes.
"""
