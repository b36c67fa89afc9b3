"""The figures of a run, drawn from its tables by Optuna's visualisations and by plotly.

Each rung is an Optuna study of its own, because results after different numbers of iterations cannot be compared.
"""

import itertools
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import optuna
import plotly.colors
import plotly.graph_objects as go
import plotly.subplots
import scipy.stats
from optuna.distributions import CategoricalDistribution, FloatDistribution

from hpo.results.tables import COLUMNS, KNOWN_SETTING, MODES, origin

NAMES = {"eval_loss": "eval_loss", "exact_match": "EM", "f1": "F1"}  # of the metrics, on axes and in titles
MIN_RESULTS = 4  # at a rung, for the figures that compare hyperparameters
COLOURS = {"model": "#d62728", "random": "#7f7f7f", KNOWN_SETTING: "#1f77b4"}  # of trials, by their origin
LAYOUT = {"template": "plotly_white", "height": 480, "margin": {"l": 70, "r": 30, "t": 60, "b": 60}}


# ---------------------------------------------------------------------------------------------------------------------
# the run as studies


def distribution(values: list) -> FloatDistribution | CategoricalDistribution:
    """The distribution of a hyperparameter, guessed from its values: a range if there are more than ten different ones.

    The range is a logarithmic one if the largest value is more than ten times the smallest.
    """
    distinct = sorted(set(values), key=lambda value: (str(type(value)), value))
    if len(distinct) <= 10 or not all(isinstance(v, (int, float)) for v in distinct):
        return CategoricalDistribution(distinct)
    return FloatDistribution(distinct[0], distinct[-1], log=distinct[0] > 0 and distinct[-1] / distinct[0] > 10)


def studies(
    trials: list[dict], iterations: list[dict], hyperparameters: list[str], metric: str, storage=None
) -> dict[int, optuna.Study]:
    """A study for each rung, by its iteration. Rungs are the iterations at which a trial was paused or has ended.

    `storage` is one of Optuna; by default the studies are in memory.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {name: distribution([t[name] for t in trials]) for name in hyperparameters}
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for row in iterations:
        if row[metric] is not None:
            curves[row["trial_id"]][row["training_iteration"]] = row[metric]
    stops = {t["training_iteration"] for t in trials} - {0}
    made = {}
    for rung in sorted(stops):
        name, direction = f"iteration {rung}", f"{MODES[metric]}imize"
        study = optuna.create_study(direction=direction, study_name=name, storage=storage)
        for trial in trials:
            curve = curves[trial["trial_id"]]
            if rung in curve and math.isfinite(curve[rung]):
                params = {name: trial[name] for name in hyperparameters}
                until = {t: value for t, value in sorted(curve.items()) if t <= rung}
                study.add_trial(
                    optuna.create_trial(
                        params=params, distributions=distributions, value=curve[rung], intermediate_values=until,
                        user_attrs={"trial_id": trial["trial_id"]},
                    )
                )  # fmt: skip
        if study.trials:
            made[rung] = study
    return made


def export(trials: list[dict], iterations: list[dict], hyperparameters: list[str], metric: str, path: Path) -> None:
    """Writes the studies to a journal file of Optuna. The other arguments are those of `studies`."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    studies(trials, iterations, hyperparameters, metric, storage)


# ---------------------------------------------------------------------------------------------------------------------
# figures


def history(by_rung: dict[int, optuna.Study], metric: str) -> go.Figure:
    """Results in the order of the trials, and the best so far, with a colour for each rung."""
    return optuna.visualization.plot_optimization_history(list(by_rung.values()), target_name=metric)


def learning_curves(
    trials: list[dict], iterations: list[dict], by_rung: dict[int, optuna.Study], metric: str
) -> go.Figure:
    """The metric over the iterations of each trial. Colours tell their origins apart; rungs are vertical lines."""
    figure = go.Figure()
    shown = set()
    for trial in trials:
        rows = [r for r in iterations if r["trial_id"] == trial["trial_id"] and r[metric] is not None]
        rows.sort(key=lambda r: r["training_iteration"])
        if rows:
            source = {"model": "model-based"}.get(origin(trial), origin(trial))
            figure.add_scatter(
                x=[r["training_iteration"] for r in rows], y=[r[metric] for r in rows], mode="lines+markers",
                marker_size=4, line={"width": 1.5, "color": COLOURS[origin(trial)]},
                name=source, legendgroup=source, showlegend=source not in shown, hovertext=trial["trial_id"],
            )  # fmt: skip
            shown.add(source)
    for rung in by_rung:
        figure.add_vline(rung, line_dash="dot", line_color="#aaaaaa", annotation_text=f"rung {rung}")
    figure.update_layout(xaxis_title="iteration", yaxis_title=NAMES[metric])
    return figure


def gradients(trials: list[dict], iterations: list[dict]) -> go.Figure | None:
    """Gradient norm, loss scale and speed over the iterations of each trial; None if the run has no such columns."""
    shown = {"grad_norm": "gradient norm", "loss_scale": "loss scale", "tokens_per_second": "tokens/s"}
    found = [name for name in shown if any(row.get(name) is not None for row in iterations)]
    if not found:
        return None
    figure = plotly.subplots.make_subplots(rows=len(found), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for number, name in enumerate(found, 1):
        for trial in trials:
            rows = [r for r in iterations if r["trial_id"] == trial["trial_id"] and r.get(name) is not None]
            figure.add_scatter(
                x=[row["training_iteration"] for row in rows], y=[row[name] for row in rows], mode="lines+markers",
                marker_size=4, line_width=1.5, showlegend=False, hovertext=trial["trial_id"], row=number, col=1,
            )  # fmt: skip
        kind = "linear" if name == "tokens_per_second" else "log"
        figure.update_yaxes(title_text=shown[name], type=kind, row=number, col=1)
    figure.update_xaxes(title_text="iteration", row=len(found), col=1)
    figure.update_layout(height=120 + 200 * len(found))
    return figure


def lanes(iterations: list[dict]) -> list[tuple[str, dict]]:
    """Assigns each iteration to a slot of its node: [(name of the slot, row)], in the order of their starts."""
    free: dict[str, list[float]] = defaultdict(list)  # when each slot of a node has been free since
    last: dict[str, tuple[str, int]] = {}  # where a trial was
    placed = []
    for row in sorted(iterations, key=lambda r: r["started_at"]):
        slots = free[row["node"]]
        node, before = last.get(row["trial_id"], (None, -1))
        fits = [i for i, until in enumerate(slots) if until <= row["started_at"] + 1e-3]
        same = node == row["node"] and before in fits
        slot = before if same else max(fits, key=lambda i: slots[i], default=len(slots))
        if slot == len(slots):
            slots.append(0.0)
        slots[slot], last[row["trial_id"]] = row["ended_at"], (row["node"], slot)
        placed.append((f"{row['node']} #{slot + 1}", row))
    return placed


def timeline(iterations: list[dict]) -> go.Figure:
    """What each slot did over time, with a colour for each trial. White is idle."""
    figure = go.Figure()
    start = min(r["started_at"] for r in iterations)
    colours = itertools.cycle(plotly.colors.qualitative.Dark24)
    colour_of = {trial_id: next(colours) for trial_id in dict.fromkeys(r["trial_id"] for r in iterations)}
    placed = lanes(iterations)
    figure.add_bar(
        orientation="h",
        base=[(r["started_at"] - start) / 60 for _, r in placed],
        x=[(r["ended_at"] - r["started_at"]) / 60 for _, r in placed],
        y=[lane for lane, _ in placed],
        marker={"color": [colour_of[r["trial_id"]] for _, r in placed], "line_width": 0},
        hovertext=[f"trial {r['trial_id']}, iteration {r['training_iteration']}" for _, r in placed],
    )
    names = sorted({lane for lane, _ in placed}, reverse=True)
    order = {"categoryorder": "array", "categoryarray": names}
    figure.update_layout(xaxis_title="minutes since the first iteration began", yaxis=order)
    figure.update_layout(barmode="overlay", height=max(240, 60 + 40 * len(names)))
    return figure


def comparisons(by_rung: dict[int, optuna.Study], metric: str) -> dict[str, go.Figure]:
    """Parallel coordinates and importance of the hyperparameters, at the rung with most results, by their titles."""
    rung = max(by_rung, key=lambda rung: (len(by_rung[rung].trials), rung), default=None)
    if rung is None or len(by_rung[rung].trials) < MIN_RESULTS:
        return {}
    study, evaluator = by_rung[rung], optuna.importance.PedAnovaImportanceEvaluator()
    coordinates = optuna.visualization.plot_parallel_coordinate(study, target_name=NAMES[metric])
    importances = optuna.visualization.plot_param_importances(study, evaluator=evaluator)
    return {
        f"Hyperparameters and {NAMES[metric]} at iteration {rung}": coordinates,
        f"Importance of the hyperparameters at iteration {rung}": importances,
    }


def density(densities: dict, name: str) -> go.Figure:
    """The two kernel densities of the searcher's model, for one continuous hyperparameter.

    BOHB suggests values where the density of the good results is high and that of the bad results is low. The points
    on the axis are the results.

    Args:
        densities: the model, from run.json. Its coordinates go from 0, the lower bound, to 1, the upper bound.
        name: of the hyperparameter.
    """
    index, domain = list(densities["hyperparameters"]).index(name), densities["hyperparameters"][name]
    bounds = np.array([domain["lower"], domain["upper"]])

    def values(coordinates: np.ndarray) -> np.ndarray:
        lower, upper = np.log(bounds) if domain["log"] else bounds
        scaled = lower + coordinates * (upper - lower)
        return np.exp(scaled) if domain["log"] else scaled

    figure, grid = go.Figure(), np.linspace(0, 1, 400)
    for kind, colour in (("good", "#2ca02c"), ("bad", "#7f7f7f")):
        points, bandwidth = np.array(densities[kind]["points"])[:, index], densities[kind]["bandwidths"][index]
        curve = scipy.stats.norm.pdf(grid[:, None], points, bandwidth).mean(axis=1)
        figure.add_scatter(x=values(grid), y=curve, name=f"{kind}: {len(points)} results", line_color=colour)
        figure.add_scatter(
            x=values(points), y=np.zeros(len(points)), mode="markers", marker_color=colour, showlegend=False
        )
    axis = {"type": "log" if domain["log"] else "linear", "title": label(name), "exponentformat": "e"}
    figure.update_layout(xaxis=axis, yaxis_title="density")
    return figure


def label(name: str) -> str:
    """A hyperparameter as it is written in titles and on axes: "learning rate" for lr."""
    return COLUMNS.get(name, name).replace("_", " ")


def draw(
    trials: list[dict],
    iterations: list[dict],
    hyperparameters: list[str],
    metric: str,
    densities: dict | None = None,
) -> dict[str, go.Figure]:
    """All figures for which a run has enough results, by their titles.

    Args:
        trials: the rows of trials.csv.
        iterations: the rows of iterations.csv.
        hyperparameters: their columns in trials.csv.
        metric: trials are compared by it.
        densities: the searcher's model, from run.json; None if there is no model yet, or the run is an older one.
    """
    if not iterations:
        return {}
    by_rung = studies(trials, iterations, hyperparameters, metric)
    figures = {"Results in the order of the trials, by rung": history(by_rung, NAMES[metric])} if by_rung else {}
    figures |= {
        "Learning curves": learning_curves(trials, iterations, by_rung, metric),
        "Trials on the slots; white is idle": timeline(iterations),
    }
    figures |= comparisons(by_rung, metric)
    for name, domain in (densities["hyperparameters"] if densities else {}).items():
        if domain["kind"] == "continuous":
            title = f"What the model sees of the {label(name)}, at iteration {densities['budget']}"
            figures[title] = density(densities, name)
    training = gradients(trials, iterations)
    if training:
        figures["Gradients, loss scale and speed of each trial"] = training
    for figure in figures.values():
        layout = {key: value for key, value in LAYOUT.items() if key != "height" or figure.layout.height is None}
        figure.update_layout(title=None, **layout)
    return figures


def save_pngs(figures: dict[str, go.Figure], folder: Path) -> list[Path]:
    """Writes each figure as a PNG, named after its title. Kaleido needs Chrome or Chromium for this.

    Raises:
        RuntimeError: there is no Chrome or Chromium.
    """
    paths = []
    for title, figure in figures.items():
        words = title.split(",")[0].split(";")[0].lower().split()
        path = folder / f"report-{'-'.join(words)}.png"
        figure.write_image(path, width=1000, height=figure.layout.height, scale=2)
        paths.append(path)
    return paths
