"""The table of one learner against the best other learner of every stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cil import report, results
from scripts.publish import stage_costs


def table(argument: Path) -> str:
    """``ROOT:LABEL:STREAM,…``: a row per stream; ``+`` joins folders of runs of one stream.

    The other learner is the one with the largest mean A_last among all settings that keep no old images and have every
    class order of the first. Differences are paired by class order. The standard error is that of one accuracy p on n
    test images, √(p(1 − p)/n); class orders share the test images, so it does not shrink with their number.
    """
    root, label, streams = str(argument).split(":")
    heads = ["stream", f"{label} A_last %", "best other", "its A_last %", "difference", "standard error"]
    heads += [f"{what}: {who}" for what in ("MiB kept", "passes per new image", "seconds") for who in (label, "other")]
    lines = [f"| {' | '.join(heads)} |"]
    lines.append("|" + "---|" * 12)
    for stream in streams.split(","):
        rows = [row for name in stream.split("+") for row in report.rows(results.find([Path(root) / name]))]
        ours, other = best(rows, label)
        found = 100 * np.array(ours.values("accuracy_last"))
        share, tested = found.mean() / 100, sum(ours.runs[0]["stages"][-1]["total"])
        lines.append(
            f"| {stream.split('+')[0]} | {report.spread(found)} | {other.title} "
            f"| {report.spread(100 * np.array(other.values('accuracy_last')))} "
            f"| {report.spread(100 * np.array(report.paired(ours, other)), '+.1f')} "
            f"| {100 * np.sqrt(share * (1 - share) / tested):.1f} | "
            + " | ".join(f"{np.mean(row.values('kept_bytes')) / 2**20:.1f}" for row in (ours, other))
            + " | "
            + " | ".join(f"{max(stage_costs.passes(run)[-1] for run in row.runs):.0f}" for row in (ours, other))
            + " | "
            + " | ".join(f"{np.mean(row.values('seconds')):.0f}" for row in (ours, other))
            + " |"
        )
    return "\n".join(lines) + "\n"


def best(rows: Sequence[report.SettingRow], label: str) -> tuple[report.SettingRow, report.SettingRow]:
    """The row of ``label`` and the best other one that can be paired with all of its runs."""
    ours = next(row for row in rows if row.learner == label)
    others = [
        row
        for row in rows
        if row.learner != label
        and row.finished
        and not row.runs[0]["stores_images"]
        and len(report.paired(ours, row)) == len(ours.runs)
    ]
    return ours, max(others, key=lambda row: float(np.mean(row.values("accuracy_last"))))
