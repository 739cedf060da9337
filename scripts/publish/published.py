"""Published numbers beside ours, for tables.py: ``<!-- published: results/published.json/DATASET -->``.

``results/published.json`` holds the numbers of papers, transcribed, and for every row the configuration and overrides
that would run it here. Our numbers come from runs in ``results/reference/<name>/<learner>`` on the same checkpoint and
increment, if there are any, and are never typed.
"""

from __future__ import annotations

import json
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from cil import report, results
from cil.config import Config
from cil.config.reading import load_config
from cil.errors import RunError

NOT_RUN = "not run here"


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def ours(row: dict[str, Any], reference: Path) -> str:
    """A_avg / A_last of a row's finished runs below ``reference``; of several, mean ± standard deviation."""
    if not any(reference.glob(f"{row['dataset']}_*")):
        return NOT_RUN  # names of these runs start with the dataset's, so its configuration need not be read
    config = configuration(row["config"], tuple(row["overrides"]))
    try:
        runs = results.find([reference / config.name / row["learner"]])
    except RunError:  # no such folder, or nothing finished in it
        return NOT_RUN
    runs = [run for run in runs if run["complete"] and fits(row, config, run["config"])]
    if not runs:
        return NOT_RUN
    cells = []
    for key in ("accuracy_average", "accuracy_last"):
        values = 100 * np.array([run["summary"][key] for run in runs])
        cells.append(report.spread(values, ".2f"))
    return " / ".join(cells) + (f" ({len(runs)} runs)" if len(runs) > 1 else "")


@cache
def configuration(name: str, overrides: tuple[str, ...]) -> Config:
    return load_config(name, overrides)


def fits(row: dict[str, Any], config: Config, run: dict[str, Any]) -> bool:
    """Whether a run has the row's task sizes and checkpoint, and the same kind of class order (random or natural)."""
    return (
        run["stream"]["increment"] == row["increment"]
        and run["backbone"]["name"].partition(".")[2] == row["checkpoint"]
        and type(run["orders"][0]) is type(config.orders[0])
    )


def number(value: float | None, decimals: int) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def published(place: Path) -> str:
    """The table of ``published.json/DATASET``, or of its sources for ``published.json/sources``."""
    file, what = place.parent, place.name
    found = read(file)
    if what == "sources":
        return sources(found["sources"])
    lines = [
        "| setting | method | published A_avg / A_last | source | ours A_avg / A_last | to run it |",
        "|---|---|---|---|---|---|",
    ]
    for row in (row for row in found["rows"] if row["dataset"] == what):
        numbers = "<br>".join(pair(v, found["sources"][v["source"]]["decimals"]) for v in row["values"])
        origins = "<br>".join(v["source"] + second_hand(found["sources"][v["source"]]) for v in row["values"])
        # not in backticks: tests execute the commands in these, and these need a GPU and the datasets
        command = escape(" ".join(["cil run", row["config"], *map(quoted, row["overrides"])]), quote=False)
        setting = f"B0 Inc{row['increment']}, {row['checkpoint']}"
        note = f" ({row['note']})" if "note" in row else ""
        mine = ours(row, file.parent / "reference")
        cells = (setting, row["method"] + note, numbers, origins, mine, f"<code>{command}</code>: {row['learner']}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def pair(value: dict[str, Any], decimals: int) -> str:
    return f"{number(value['a_avg'], decimals)} / {number(value['a_last'], decimals)}"


def quoted(override: str) -> str:
    return f"'{override}'" if "[" in override else override


def second_hand(source: dict[str, Any]) -> str:
    return " (second-hand)" if source["tag"] == "S" else ""


def sources(found: dict[str, Any]) -> str:
    lines = ["| source | what | paper |", "|---|---|---|"]
    for name, source in found.items():
        paper = f"[arXiv {source['arxiv']}](https://arxiv.org/abs/{source['arxiv']})" if source["arxiv"] else "–"
        lines.append(f"| {name}{second_hand(source)} | {source['what']} | {paper} |")
    return "\n".join(lines) + "\n"
