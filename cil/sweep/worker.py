"""What a worker of a sweep does: one ordinary run after the other, data and backbone staying in memory between them."""

from __future__ import annotations

import os
import platform
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cil.errors import CilError

if TYPE_CHECKING:
    import torch

    from cil.config import Config
    from cil.runner import Inputs

PATIENCE = 30.0
"""Seconds to wait for a folder: the workers of a sweep that was killed may live a moment longer than their driver."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        state: ``ran`` (to its end, now), ``finished`` already, or ``failed``.
        reason: Of a failure, one line.
        log: Its traceback, or once that is written the file that holds it.
        again: A second attempt may end otherwise; never so after a :class:`CilError`.
    """

    state: Literal["ran", "finished", "failed"]
    reason: str = ""
    log: str = ""
    again: bool = False


def attempt(config: dict[str, Any], results: str, directory: str, threads: int) -> Outcome:
    """Run one plan as ``cil run`` would, in its ordinary folder, going on where an earlier attempt stopped.

    Args:
        config: A resolved configuration of one learner, order and seed.
        results: The results folder.
        directory: Where relative paths start from.
        threads: Of torch.
    """
    try:
        os.chdir(directory)
    except OSError as error:
        reason = f"{directory}: {error.strerror} on {platform.node()}; the nodes of a cluster must share it"
        return Outcome("failed", reason)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported, in a new worker
    import torch

    from cil.config import Config
    from cil.plan import plans
    from cil.results import load
    from cil.runner import run

    torch.set_num_threads(threads)
    try:
        [plan] = plans(Config.model_validate(config))
        folder = Path(results) / plan.place
        _wait(folder)
        finished = (folder / "metrics.json").exists() and load(folder)["complete"]
        run(plan.config, results, load=kept)
    except CilError as error:
        return Outcome("failed", " ".join(str(error).split()), traceback.format_exc())
    except Exception as error:  # a fault of a learner or the library: the other runs go on
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Outcome("failed", reason, traceback.format_exc(), again=True)
    return Outcome("finished" if finished else "ran")


_last: tuple[str, Inputs] | None = None


def kept(config: Config, device: torch.device) -> Inputs:
    """Data and backbone, loaded once for all runs in a row that want the same."""
    global _last
    key = f"{device} {config.model_dump_json(include={'data', 'backbone', 'transform', 'hardware'})}"
    if _last is None or _last[0] != key:
        from cil.runner import Inputs

        _last = None  # two of them need not fit into memory
        _last = key, Inputs(config, device)
    return _last[1]


def _wait(folder: Path) -> None:
    """Until nobody holds a run's folder, or patience is over; then the run itself says that somebody does."""
    from filelock import FileLock, Timeout

    if not (folder / "run.lock").exists():
        return
    try:
        with FileLock(folder / "run.lock", timeout=PATIENCE):
            pass
    except Timeout:
        return
