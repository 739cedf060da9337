"""Serves TensorBoard on selected runs. Every event file contains the layout that draws the runs side by side."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tensorboard.program import TensorBoard, TensorBoardServerException

from cil.errors import RunError

EVENTS = "events.out.tfevents.*"


def log_folder(paths: Sequence[Path], place: Path) -> Path:
    """One folder with the runs of all ``paths``: the path itself if it is one, else ``place`` with a link to each.

    TensorBoard recommends links rather than ``--logdir_spec``, which splits paths at commas and reads more slowly.

    Raises:
        RunError: A path does not exist, or has no event file.
    """
    for path in paths:
        if not path.exists():
            raise RunError(f"{path}: no such folder")
        if next(path.rglob(EVENTS), None) is None:
            raise RunError(f"{path}: no event file there; give folders that `cil run` wrote, or use cil compare")
    resolved = list(dict.fromkeys(path.resolve() for path in paths))
    outermost = [one for one in resolved if not any(one != other and one.is_relative_to(other) for other in resolved)]
    if len(outermost) == 1:
        return outermost[0]
    common = os.path.commonpath(outermost)
    for one in outermost:
        link = place / one.relative_to(common)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(one, target_is_directory=True)
    return place


@contextmanager
def serving(paths: Sequence[Path], host: str = "localhost", port: int = 6006) -> Iterator[str]:
    """Serves TensorBoard on the runs below ``paths`` during the block; yields its URL.

    Args:
        paths: Run folders, or folders that contain some.
        host: Address to listen on.
        port: Port; 0 for any free one.

    Raises:
        RunError: There are no event files, or the address cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="cil-tensorboard-") as place:
        folder = log_folder(paths, Path(place))
        board = TensorBoard()
        board.configure(logdir=str(folder), host=host, port=port, load_fast="false")
        try:
            url = board.launch()
        except (TensorBoardServerException, OSError) as error:
            reason = " ".join(str(getattr(error, "msg", error)).split())
            raise RunError(f"tensorboard: cannot serve at {host}:{port}: {reason}; try --port 0") from None
        yield url
