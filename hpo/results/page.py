"""The page report.html. It holds all that it needs, and opens without a network."""

import html

import plotly.graph_objects as go
import plotly.offline

# Content Security Policy: the browser loads nothing for this page. Plotly needs unsafe-eval for parallel coordinates.
POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"
STYLE = (
    "body{font-family:sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;font-size:90%}"
    "td,th{border-bottom:1px solid #ddd;padding:.25em .7em;text-align:left}dt{font-weight:bold}"
)


def table(rows: list[list[str]]) -> str:
    """Rows as an HTML table. The first row is the header."""
    lines = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def page(
    title: str,
    facts: dict[str, str],
    results: list[list[str]],
    figures: dict[str, go.Figure],
    refresh: int | None = None,
    claims: list[str] = (),
    correlations: list[list[str]] = (),
) -> str:
    """The text of the page.

    Args:
        title: the heading.
        facts: shown at the top, by their names.
        results: the table of results; the first row is the header.
        figures: by their titles.
        refresh: seconds after which the browser loads the page again; None: never.
        claims: what the search may claim, in sentences.
        correlations: the table of rank correlations; the first row is the header.
    """
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">',
        f'<meta http-equiv="refresh" content="{refresh}">' if refresh else "",
        f"<style>{STYLE}</style>",
        f"<script>{plotly.offline.get_plotlyjs()}</script></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        "<dl>",
        *(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items()),
        "</dl>",
    ]
    for i, (name, figure) in enumerate(figures.items()):
        parts.append(f"<h2>{html.escape(name)}</h2>")
        options = {"full_html": False, "include_plotlyjs": False, "config": {"displaylogo": False}}
        parts.append(figure.to_html(div_id=f"figure-{i}", **options))
    if claims or correlations:
        parts += ["<h2>What the search may claim</h2>", "<ul>"]
        parts += [f"<li>{html.escape(claim)}</li>" for claim in claims] + ["</ul>"]
        parts += [table(correlations)] if correlations else []
    parts += ["<h2>Results</h2>", table(results), "</body></html>"]
    return "\n".join(parts) + "\n"
