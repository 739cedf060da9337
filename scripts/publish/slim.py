"""Rewrite published runs in the form in which they are committed: about a third of the bytes, with the same numbers.

    python -m scripts.publish.slim            # all finished runs below results/reference and results/tutorial
    python -m scripts.publish.slim --check    # only list those that are not in this form

This leaves out the matrices and curves, which ``cil.results.read_run`` rebuilds from the rows, all but the last value
that a stage logged under each name, and the list of wrong labels, which follow from ``stream.noise`` and
``stream.seed``. ``config.yaml`` repeats ``config`` of ``metrics.json`` and is not committed. Everything else stays:
configuration, class order, versions, hashes, summary, and each stage's counts, costs and histograms. Paths in the
configuration become relative to the checkout. ``reproduce`` calls this for every run that it publishes; unfinished runs
and other folders are not touched.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cil import results
from cil.config.code import with_paths
from cil.errors import CilError, RunError
from cil.utils.files import write
from scripts import ROOT

REFERENCE = ROOT / "results" / "reference"
TUTORIAL = ROOT / "results" / "tutorial"


def slim(run: dict[str, Any]) -> dict[str, Any]:
    """What is published of a finished run.

    Raises:
        RunError: A matrix or curve of the run does not follow from its rows, so that leaving it out would change it.
    """
    rows = [{**row, "log": list(last_logged(row["log"]).items())} for row in run["stages"]]
    derived = results.derived(rows)
    for key in results.DERIVED:
        if run.get(key, derived[key]) != derived[key]:
            raise RunError(f"{key} of {run['learner']} does not follow from the rows of its stages")
    config = with_paths(run["config"], _from_checkout)
    changed = {"stages": rows, "config": config}
    if "stream" in run:
        changed["stream"] = {key: value for key, value in run["stream"].items() if key != "relabelled"}
    return {key: changed.get(key, value) for key, value in run.items() if key not in results.DERIVED}


def _from_checkout(path: str) -> str:
    """A path in or beside the checkout, relative to it; others stay as they are."""
    return os.path.relpath(path, ROOT) if Path(path).is_absolute() and Path(path).is_relative_to(ROOT.parent) else path


def last_logged(log: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The last value under each name, in the order in which the names first appear."""
    return dict(log)


def text(run: dict[str, Any]) -> str:
    """A published run as JSON, for diffs: one line per key, and one per stage."""
    lines = []
    for key, value in run.items():
        if key == "stages":
            lines.append('"stages": [\n  ' + ",\n  ".join(map(_line, value)) + "\n ]")
        else:
            lines.append(f"{json.dumps(key)}: {_line(value)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _line(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def unpublished(folder: Path) -> Iterator[tuple[Path, str]]:
    """The files of finished runs below a folder that are not in the published form yet, and what they should hold.

    Raises:
        CilError: A file is damaged, or loses something in this form; names it.
    """
    for file in sorted(folder.rglob("metrics.json")):
        run = results.read_run(file.parent)
        if run["complete"]:
            try:
                new = text(slim(run))
            except RunError as error:
                raise RunError(f"{file}: {error}") from None
            if new != file.read_text(encoding="utf-8"):
                yield file, new


def publish(folder: Path) -> None:
    """Write the finished runs below a folder in the published form.

    Raises:
        CilError: A file is damaged, loses something in this form, or cannot be written.
    """
    for file, new in unpublished(folder):
        write(file, new)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a run would be rewritten")
    check = parser.parse_args(given).check
    try:
        if not check:
            for folder in (REFERENCE, TUTORIAL):
                publish(folder)
            return 0
        files = [file for folder in (REFERENCE, TUTORIAL) for file, _ in unpublished(folder)]
    except CilError as error:
        print(error, file=sys.stderr)
        return 2
    for file in files:
        print(f"{file.relative_to(ROOT)}: not in the published form; run python -m scripts.publish.slim")
    return 1 if files else 0


if __name__ == "__main__" and (code := main()):
    sys.exit(code)
