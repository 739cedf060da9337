#!/usr/bin/env python
"""Write the tables of README.md and results/README.md from the results they name; --check only compares.

A table stands between ``<!-- table: FOLDER -->`` and ``<!-- /table -->``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from cil import report, results

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "results" / "README.md")
MARK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def markdown(folder: Path) -> str:
    """The ranked table of the runs below ``folder``, as the terminal shows it."""
    [runs] = report.by_protocol(results.find([folder]))
    return ranked(runs)


def ranked(runs: Sequence[report.Run]) -> str:
    """The ranked table of runs of one protocol, in Markdown."""
    columns = ["learner", "runs", *[heading for _, heading, _, _ in report.COLUMNS[: report.NARROW]], "note"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, group in report.by_learner(runs).items():
        cells = [name, str(len(group)), *report.cells(group)[: report.NARROW], report.marks(group)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def render(page: Path) -> str:
    """The page with its tables made anew."""
    return MARK.sub(lambda found: found[1] + markdown(ROOT / found[2]) + found[3], page.read_text(encoding="utf-8"))


def main() -> int:
    stale = [page for page in PAGES if render(page) != page.read_text(encoding="utf-8")]
    if "--check" in sys.argv:
        for page in stale:
            print(f"{page.relative_to(ROOT)}: its tables are not what results/ says; run scripts/tables.py")
        return 1 if stale else 0
    for page in stale:
        page.write_text(render(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
