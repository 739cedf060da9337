"""What `cil learn` records of a model beside a run's stages: lessons and changes, and which classes it still predicts.

A lesson is one call of ``cil learn``, and the stage of the same number. A change concerns one class and belongs behind
a stage. Together they are the events that ``cil undo`` takes back, the last one first. All of them are in the header of
the model's ``metrics.json``: an event happens when this one file is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cil.rows import Change

VERSION = 1
"""Version of ``lessons`` and ``changes`` in the headers that this code writes and reads."""


def changed_state(header: Mapping[str, Any], stages: int) -> Change | None:
    """The last change after the first ``stages`` stages that has a state of its own; None if the stage's is valid."""
    found = [change for change in header.get("changes", ()) if change["stages"] == stages and change["folder"]]
    return found[-1] if found else None


def absent(header: Mapping[str, Any], kind: str | None = None) -> list[int]:
    """Labels of the classes that were forgotten or hidden, and not taught again since.

    Args:
        header: The header of a run or model.
        kind: ``forgotten`` or ``hidden``, for these alone.
    """
    gone: dict[int, str] = {}
    changes = [change for change in header.get("changes", ()) if change["kind"] != "renamed"]
    for stage, task in enumerate(header["tasks"] if changes else ()):
        for label in task:
            gone.pop(label, None)
        gone |= {change["label"]: change["kind"] for change in changes if change["stages"] == stage + 1}
    return sorted(label for label, why in gone.items() if kind in (None, why))


def predicted(header: Mapping[str, Any]) -> list[int]:
    """Labels of the classes that the model predicts, among those of its tasks."""
    gone = set(absent(header))
    seen = max((label + 1 for task in header["tasks"] for label in task), default=0)
    return [label for label in range(seen) if label not in gone]
