"""The pictures of a run, as one page that needs nothing else: report.html. Called by report.py, during a run or after it.

Drawn by Optuna's own visualisations, on studies built from the run's tables, and by plotly. A study is one rung: results after
different numbers of iterations are not compared with each other.
"""

import html
import itertools
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import optuna
import plotly.colors
import plotly.graph_objects as go
import plotly.offline
import plotly.subplots
import scipy.stats
from optuna.distributions import CategoricalDistribution, FloatDistribution

GOOD = 0.15  # the share of results that BOHB takes for good ones, hpbandster's top_n_percent
NARROWEST = 0.03  # kernel, in parts of the range: kde.MIN_BANDWIDTH
NAMES = {"eval_loss": "eval_loss", "exact_match": "EM", "f1": "F1"}
# A browser keeps the page to this: nothing is asked of a network. Plotly makes functions for its parallel coordinates.
POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"
LAYOUT = {"template": "plotly_white", "height": 480, "margin": {"l": 70, "r": 30, "t": 60, "b": 60}}


# ---------------------------------------------------------------------------------------------------------------------
# the run as studies


def distribution(values: list) -> FloatDistribution | CategoricalDistribution:
    """What a hyperparameter was drawn from, as far as its values tell: more than ten make it a range."""
    distinct = sorted(set(values), key=lambda value: (str(type(value)), value))
    if len(distinct) <= 10 or not all(isinstance(v, (int, float)) for v in distinct):
        return CategoricalDistribution(distinct)
    return FloatDistribution(distinct[0], distinct[-1], log=distinct[0] > 0 and distinct[-1] / distinct[0] > 10)


def studies(trials: list[dict], iterations: list[dict], hyperparameters: list[str], metric: str) -> dict[int, optuna.Study]:
    """A study a rung, {iteration: study}; rungs are where EM was computed by more than one trial or the training ended."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {name: distribution([t[name] for t in trials]) for name in hyperparameters}
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for row in iterations:
        if row[metric] is not None:
            curves[row["trial_id"]][row["training_iteration"]] = row[metric]
    stops = {t["training_iteration"] for t in trials} - {0}  # each rung is where some trial ends, or is paused
    made = {}
    for rung in sorted(stops):
        study = optuna.create_study(direction="minimize" if metric == "eval_loss" else "maximize", study_name=f"iteration {rung}")
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


# ---------------------------------------------------------------------------------------------------------------------
# figures


def history(by_rung: dict[int, optuna.Study], metric: str) -> go.Figure:
    """Results in the order of the trials, and the best so far, a colour a rung."""
    return optuna.visualization.plot_optimization_history(list(by_rung.values()), target_name=metric)


def learning_curves(trials: list[dict], iterations: list[dict], by_rung: dict[int, optuna.Study], metric: str) -> go.Figure:
    """The metric over the iterations of each trial, model-based ones in another colour; rungs as lines."""
    figure = go.Figure()
    shown = set()
    for trial in trials:
        rows = sorted((r for r in iterations if r["trial_id"] == trial["trial_id"] and r[metric] is not None), key=lambda r: r["training_iteration"])
        if rows:
            source = "model-based" if trial["model_based"] else "random"
            figure.add_scatter(
                x=[r["training_iteration"] for r in rows], y=[r[metric] for r in rows], mode="lines+markers", marker_size=4,
                line={"width": 1.5, "color": "#d62728" if trial["model_based"] else "#7f7f7f"}, name=source, legendgroup=source,
                showlegend=source not in shown, hovertext=trial["trial_id"],
            )  # fmt: skip
            shown.add(source)
    for rung in by_rung:
        figure.add_vline(rung, line_dash="dot", line_color="#aaaaaa", annotation_text=f"rung {rung}")
    figure.update_layout(xaxis_title="iteration", yaxis_title=NAMES[metric])
    return figure


def gradients(trials: list[dict], iterations: list[dict]) -> go.Figure | None:
    """Norm of the gradients, loss scale and tokens a second over the iterations of each trial; None for a run that did not record them."""
    shown = {"grad_norm": "gradient norm", "loss_scale": "loss scale", "tokens_per_second": "tokens/s"}
    found = [name for name in shown if any(row.get(name) is not None for row in iterations)]
    if not found:
        return None
    figure = plotly.subplots.make_subplots(rows=len(found), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for number, name in enumerate(found, 1):
        for trial in trials:
            rows = [row for row in iterations if row["trial_id"] == trial["trial_id"] and row.get(name) is not None]
            figure.add_scatter(
                x=[row["training_iteration"] for row in rows], y=[row[name] for row in rows], mode="lines+markers", marker_size=4,
                line_width=1.5, showlegend=False, hovertext=trial["trial_id"], row=number, col=1,
            )  # fmt: skip
        figure.update_yaxes(title_text=shown[name], type="linear" if name == "tokens_per_second" else "log", row=number, col=1)
    figure.update_xaxes(title_text="iteration", row=len(found), col=1)
    figure.update_layout(height=120 + 200 * len(found))
    return figure


def lanes(iterations: list[dict]) -> list[tuple[str, dict]]:
    """Puts each iteration on a slot of its node, as few as were used: [(node and slot, row)], in the order of their starts."""
    free: dict[str, list[float]] = defaultdict(list)  # when each slot of a node has been free since
    last: dict[str, tuple[str, int]] = {}  # where a trial was
    placed = []
    for row in sorted(iterations, key=lambda r: r["started_at"]):
        slots = free[row["node"]]
        node, mine = last.get(row["trial_id"], (None, -1))
        fits = [i for i, until in enumerate(slots) if until <= row["started_at"] + 1e-3]
        slot = mine if node == row["node"] and mine in fits else max(fits, key=lambda i: slots[i], default=len(slots))
        if slot == len(slots):
            slots.append(0.0)
        slots[slot], last[row["trial_id"]] = row["ended_at"], (row["node"], slot)
        placed.append((f"{row['node']} #{slot + 1}", row))
    return placed


def timeline(iterations: list[dict]) -> go.Figure:
    """What each slot did when: a colour a trial; what is white was idle."""
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
    figure.update_layout(xaxis_title="minutes since the first iteration began", yaxis={"categoryorder": "array", "categoryarray": names})
    figure.update_layout(barmode="overlay", height=max(240, 60 + 40 * len(names)))
    return figure


def view_of_lr(study: optuna.Study) -> go.Figure:
    """Densities of the learning rates of good and of bad results at one rung: BOHB draws where their ratio is high."""
    best_first = sorted(study.trials, key=lambda t: t.value, reverse=study.direction.name == "MAXIMIZE")
    number = max(2, math.ceil(GOOD * len(best_first)))
    figure = go.Figure()
    logs = np.log10([t.params["learning_rate"] for t in best_first])
    grid = np.linspace(logs.min(), logs.max(), 400)
    for name, values, colour in (("good", logs[:number], "#2ca02c"), ("bad", logs[number:], "#7f7f7f")):
        width = max(NARROWEST * np.ptp(logs), 1.06 * values.std() * len(values) ** -0.2)  # statsmodels' rule of thumb
        density = scipy.stats.norm.pdf(grid[:, None], values, width).mean(axis=1)
        figure.add_scatter(x=10**grid, y=density, name=f"{name}: {len(values)} results", line_color=colour)
        figure.add_scatter(x=10**values, y=np.zeros(len(values)), mode="markers", marker_color=colour, showlegend=False)
    figure.update_layout(xaxis={"type": "log", "title": "learning rate"}, yaxis_title="density")
    return figure


def draw(trials: list[dict], iterations: list[dict], hyperparameters: list[str], metric: str) -> dict[str, go.Figure]:
    """All figures that a run has enough results for: {title: figure}."""
    if not iterations:
        return {}
    by_rung = studies(trials, iterations, hyperparameters, metric)
    figures = {"Results in the order of the trials, by rung": history(by_rung, NAMES[metric])} if by_rung else {}
    figures |= {
        "Learning curves": learning_curves(trials, iterations, by_rung, metric),
        "Trials on the slots; white is idle": timeline(iterations),
    }
    widest = max(by_rung, key=lambda rung: (len(by_rung[rung].trials), rung), default=None)  # the rung with the most results
    study = by_rung.get(widest)
    if study and len(study.trials) >= 4:
        figures[f"Hyperparameters and {NAMES[metric]} at iteration {widest}"] = optuna.visualization.plot_parallel_coordinate(
            study, target_name=NAMES[metric]
        )
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        figures[f"Importance of the hyperparameters at iteration {widest}"] = optuna.visualization.plot_param_importances(study, evaluator=evaluator)
        if all(t.params.get("learning_rate", 0) > 0 for t in study.trials):
            figures[f"What the model sees of the learning rate, at iteration {widest}"] = view_of_lr(study)
    training = gradients(trials, iterations)
    if training:
        figures["Gradients, loss scale and speed of each trial"] = training
    for figure in figures.values():
        figure.update_layout(title=None, **{k: v for k, v in LAYOUT.items() if k != "height" or figure.layout.height is None})
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# the page


def table(rows: list[list[str]]) -> str:
    """Rows as an HTML table, the first one its head."""
    lines = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def page(title: str, facts: list[tuple[str, str]], results: list[list[str]], figures: dict[str, go.Figure]) -> str:
    """One self-contained HTML page: facts, figures, the table of results. It asks no network for anything."""
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">',
        "<style>body{font-family:sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}table{border-collapse:collapse;font-size:90%}"
        "td,th{border-bottom:1px solid #ddd;padding:.25em .7em;text-align:left}dt{font-weight:bold}</style>",
        f"<script>{plotly.offline.get_plotlyjs()}</script></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        "<dl>" + "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts) + "</dl>",
    ]
    for i, (name, figure) in enumerate(figures.items()):
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts.append(figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure-{i}", config={"displaylogo": False}))
    parts += ["<h2>Results</h2>", table(results), "</body></html>"]
    return "\n".join(parts) + "\n"


def save_pngs(figures: dict[str, go.Figure], folder: Path) -> list[Path]:
    """Writes each figure as a PNG, for a paper. Needs Chrome or Chromium; raises RuntimeError where there is none."""
    paths = []
    for name, figure in figures.items():
        path = folder / ("report-" + "-".join(name.split(",")[0].split(";")[0].lower().split()) + ".png")
        figure.write_image(path, width=1000, height=figure.layout.height, scale=2)
        paths.append(path)
    return paths
