"""--report_to: trials go to Ray Tune's logger callbacks, and no tracker can harm a search. MLflow itself: test_run.py."""

import types

import trackers


class Logger:
    def __init__(self, fails_at=None):
        self.heard, self.fails_at = [], fails_at

    def __getattr__(self, what):
        def hear(**info):
            if what == self.fails_at:
                raise ConnectionError("no server")
            self.heard.append((what, info["trial"].trial_id if "trial" in info else None))

        return hear


def trial(trial_id):
    return types.SimpleNamespace(trial_id=trial_id)


def test_a_tracker_that_fails_is_told_once_and_heard_no_more(capsys):
    logger = Logger(fails_at="on_trial_result")
    tracker = trackers.Tracker("mlflow", logger)
    tracker.setup()
    tracker.on_trial_start(iteration=0, trials=[], trial=trial("a"))
    for _ in range(3):
        tracker.on_trial_result(iteration=0, trials=[], trial=trial("a"), result={})
    tracker.on_trial_complete(iteration=0, trials=[], trial=trial("a"))
    assert logger.heard == [("setup", None), ("on_trial_start", "a")]
    assert capsys.readouterr().out == "WARNING: --report_to mlflow goes on no longer: ConnectionError no server\n"


def test_a_trial_that_ends_without_having_started_here():
    """Ray's loggers look up what they made at its start."""
    logger = Logger()
    tracker = trackers.Tracker("mlflow", logger)
    tracker.on_trial_complete(iteration=0, trials=[], trial=trial("a"))
    assert logger.heard == [("on_trial_start", "a"), ("on_trial_complete", "a")]
