"""The folder of a growing model on disk: who may write, what is left over, and the one step that makes an event happen.

``metrics.json`` says which stages, classes and changes the model consists of, and is replaced in one step. What a
killed process has written beside it is no part of the model, and is deleted by the next command that writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from cil import results
from cil.errors import RunError
from cil.growing import events
from cil.learner import Learner
from cil.results import Header, StageRow
from cil.runner.checkpoint import RunFolder, to_json, write_state
from cil.runner.tensorboard import Tracker
from cil.utils.files import flush, fresh, remove

Point = Callable[[str], None]


class ModelFolder(RunFolder):
    """A run folder whose stream grows.

    Args:
        path: The folder.
        point: Called with a name at each point at which a killed process leaves something else on the disk; for tests.
    """

    def __init__(self, path: Path, point: Point = lambda name: None) -> None:
        super().__init__(path)
        self.point = point

    @contextmanager
    def opened(self) -> Iterator[events.Header | None]:
        """Lock the folder, delete what killed processes have left there, and yield the header; None without a model.

        Raises:
            RunError: Another process holds the folder, or it holds something else.
        """
        with self.locked():
            header = None
            if (self.path / "metrics.json").exists():
                header = events.read(self.path)
                self.clean(header)
            elif any(self.path.glob("stage-*")):
                raise RunError(f"{self.path}: holds stages but no metrics.json; {results.RESTORE}")
            yield header

    def clean(self, header: events.Header) -> None:
        """Delete the folders of stages and changes that are no part of the model."""
        listed = events.listed_folders(header)
        with self.reported():
            for pattern in ("stage-*", "change-*", ".change-*"):
                for place in sorted(self.path.glob(pattern), reverse=True):
                    if place.name not in listed:
                        self.point("clean")
                        remove(place)

    def commit(self, header: events.Header) -> None:
        """Replace ``metrics.json``: from here on, the model is what this header says."""
        stages = [results.read_stage(self.path, stage) for stage in range(len(header["tasks"]))]
        rows, checksums = [one.row for one in stages], [one.checksum for one in stages]
        known = {name: fact for name, fact in header.items() if name not in ("complete", "summary", "stage_checksums")}
        content = results.run_file(cast(Header, known), rows, checksums, len(stages))
        self.point("commit")
        self.write("metrics.json", to_json(content))
        self.point("committed")

    def save_change(self, header: events.Header, learner: Learner) -> tuple[str, dict[str, str]]:
        """Write a learner's state since a change to a folder of its own; returns its name and its files' checksums.

        Raises:
            RunError: The disk is full or not writable.
        """
        taken = [int(change["folder"].removeprefix("change-")) for change in header["changes"] if change["folder"]]
        name = f"change-{max(taken, default=-1) + 1:02d}"
        temporary = fresh(self.path / name)
        with self.reported():
            temporary.mkdir()
            files = write_state(learner, temporary)
            for file in temporary.iterdir():
                flush(file)
            self.point("changed")
            temporary.rename(self.path / name)
            flush(self.path)
        self.point("named")
        return name, files

    def draw(self, header: events.Header, rows: Sequence[StageRow]) -> None:
        """Draw all stages for TensorBoard again: they are few, and one of them may have been undone."""
        tracker = Tracker(self.path, cast(Header, header))
        if rows:
            tracker.replay(rows)
            tracker.finish(results.summarise(rows))
        tracker.close()
