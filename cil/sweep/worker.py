"""A worker of a sweep: executes one ordinary run after the other and keeps data and backbone in memory."""

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
"""Seconds to wait for a locked folder: the workers of a killed sweep may briefly outlive their driver."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        state: ``ran`` (to its end, in this attempt), ``finished`` (by an earlier command), or ``failed``.
        reason: Reason of a failure, one line.
        log: Traceback of a failure; once that is written, the path of its file.
        retry: Whether a second attempt may succeed; False after a :class:`CilError`.
    """

    state: Literal["ran", "finished", "failed"]
    reason: str = ""
    log: str = ""
    retry: bool = False


def attempt(config: dict[str, Any], results: str, directory: str, threads: int, redo: bool = False) -> Outcome:
    """Run one plan as ``cil run`` does, in the same folder; resumes where an earlier attempt stopped.

    Args:
        config: A resolved configuration of one learner, order and seed.
        results: The results folder.
        directory: Folder that relative paths start from.
        threads: Number of torch threads.
        redo: As for :func:`cil.runner.run`.
    """
    try:
        os.chdir(directory)
    except OSError as error:
        reason = f"{directory}: {error.strerror} on {platform.node()}; the nodes of a cluster must share it"
        return Outcome("failed", reason)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # in a new worker, before torch is imported
    import torch

    from cil.config import Config
    from cil.runner import run
    from cil.runner.checkpoint import RunFolder
    from cil.runner.plan import plans

    torch.set_num_threads(threads)
    try:
        [plan] = plans(Config.model_validate(config))
        folder = Path(results) / plan.place
        _wait(folder)
        finished = RunFolder(folder).complete()
        run(plan.config, results, load=cached_inputs, redo=redo)
    except CilError as error:
        return Outcome("failed", " ".join(str(error).split()), traceback.format_exc())
    except Exception as error:  # a fault of a learner or the library; the other runs continue
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Outcome("failed", reason, traceback.format_exc(), retry=True)
    return Outcome("finished" if finished else "ran")


last: tuple[str, Inputs] | None = None
"""What the last run was on, with its key."""


def cached_inputs(config: Config, device: torch.device) -> Inputs:
    """Data and backbone, loaded once for all consecutive runs that have the same ones."""
    global last
    parts = {"data", "backbone", "backbones", "combine", "transform", "hardware"}
    key = f"{device} {config.model_dump_json(include=parts)}"
    if last is None or last[0] != key:
        from cil.runner import Inputs

        last = None  # released first, because two of them may not fit into memory
        last = key, Inputs(config, device)
    return last[1]


def _wait(folder: Path) -> None:
    """Wait until the folder of a run is not locked, for :data:`PATIENCE` at most; after that the run itself raises."""
    from filelock import FileLock, Timeout

    if not (folder / "run.lock").exists():
        return
    try:
        with FileLock(folder / "run.lock", timeout=PATIENCE):
            pass
    except Timeout:
        return
