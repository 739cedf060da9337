"""The folder of a run on disk: stages are written atomically, and nothing is pickled.

``stage-NN/`` holds the learner's tensors (safetensors) and extra state (JSON), per-image predictions and the stage's
row. It is written under a temporary name and renamed, so whatever happens, every folder called ``stage-NN`` is complete
and the stages before a crash stay usable. ``metrics.json`` is always rebuilt from the stages' rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cil.errors import RunError
from cil.learner import Context, Learner
from cil.results import StageRow, StateBytes
from cil.stream import Task
from cil.utils.files import flush, reporting


class RunFolder:
    """The folder of one run (one learner, class order and seed).

    Args:
        path: The folder.
        keep: Stages whose weights stay on disk, ``all`` or ``last``; rows and predictions always stay.
    """

    def __init__(self, path: Path, keep: str = "all") -> None:
        self.path, self.keep = path, keep

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process; the lock is released with the process, however it ends.

        Raises:
            RunError: Another process holds it, or the folder cannot be written.
        """
        with self.reported():
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / "run.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise RunError(
                    f"{self.path}: another process is running in this folder; wait for it or use another --results"
                ) from None
        try:
            for leftover in self.path.glob(".stage-*"):
                shutil.rmtree(leftover)
            yield
        finally:
            lock.release()

    @contextmanager
    def reported(self, *, only_full: bool = False) -> Iterator[None]:
        """Turn a failed write inside the block into one line for the user.

        Args:
            only_full: Translate only a full disk, and let every other OSError pass as it is.

        Raises:
            RunError: The disk is full, or the folder is not writable.
        """
        advice = "Finished stages are kept; make room and run the same command again"
        with reporting(self.path, advice, only_full=only_full):
            yield

    def stage(self, index: int) -> Path:
        return self.path / f"stage-{index:02d}"

    def finished(self) -> int:
        """Number of complete stages, counted from the first."""
        count = 0
        while self.stage(count).is_dir():
            count += 1
        return count

    def save_stage(self, index: int, learner: Learner, row: StageRow, predictions: dict[str, Tensor]) -> None:
        """Write a stage under a temporary name and make it valid by one rename.

        Raises:
            RunError: The disk is full or not writable; nothing that was there is lost.
        """
        tensors, extra = split_state(learner.state_dict())
        temporary = self.path / f".stage-{index:02d}"
        try:
            with self.reported():
                temporary.mkdir()
                save_file(tensors, temporary / "learner.safetensors")
                write_json(temporary / "learner.json", extra)
                save_file(predictions, temporary / "predictions.safetensors")
                write_json(temporary / "stage.json", row)
                for file in temporary.iterdir():
                    flush(file)
                temporary.rename(self.stage(index))
                flush(self.path)
        except RunError:
            shutil.rmtree(temporary, ignore_errors=True)  # the error above reaches the user
            raise
        if self.keep == "last" and index:
            (self.stage(index - 1) / "learner.safetensors").unlink(missing_ok=True)

    def rows(self) -> list[StageRow]:
        """The rows of all complete stages."""
        return [self.read_json(self.stage(i) / "stage.json") for i in range(self.finished())]

    def load_learner(self, learner: Learner, tasks: Sequence[Task], context: Callable[[int], Context]) -> None:
        """Give a fresh learner the state it had after the last of ``tasks``; see :func:`restore_learner`.

        Args:
            learner: A fresh learner.
            tasks: All tasks up to the stage to load; their images are not read.
            context: Stage → context.

        Raises:
            RunError: The weights are not there (``hardware.checkpoints: last``), damaged, or of another learner.
        """
        index = len(tasks) - 1
        file = self.stage(index) / "learner.safetensors"
        try:
            state: dict[str, Any] = dict(load_file(file))
            state |= self.read_json(self.stage(index) / "learner.json")
            restore_learner(learner, tasks, context, state)
        except FileNotFoundError:
            raise RunError(f"{file}: not there; stage {index}'s weights were not kept") from None
        except (SafetensorError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{file}: does not fit this learner or is damaged: {reason}") from None

    def read_json(self, file: Path) -> Any:
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(
                f"{file}: cannot be read ({error}); remove {file.parent.name} to run that stage again"
            ) from None

    def write(self, name: str, text: str) -> None:
        """Replace a file in one step; the temporary name is fixed, so that the next run overwrites a leftover file."""
        with self.reported():
            temporary = self.path / f".{name}"
            temporary.write_text(text, encoding="utf-8")
            flush(temporary)
            temporary.replace(self.path / name)


def restore_learner(
    learner: Learner, tasks: Sequence[Task], context: Callable[[int], Context], state: dict[str, Any]
) -> None:
    """Give a fresh learner a stored state: begin all tasks it had seen, which sets its shapes, then load.

    Args:
        learner: A fresh learner.
        tasks: All tasks up to the stage of the state; their images are not read.
        context: Stage → context.
        state: Tensors and extra state by name, as :func:`split_state` took them apart.

    Raises:
        RuntimeError: The state is of another learner.
    """
    for task in tasks:
        learner.begin(task, context(task.index))
    learner.load_state_dict(state)


def split_state(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a state dict into (tensors, JSON extra state); shared tensors are cloned, and all are on the CPU."""
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        else:
            extra[key] = value
    try:
        json.dumps(extra)
    except TypeError as error:
        raise RunError(
            f"the learner's extra state ({', '.join(extra)}) is not JSON ({error}); keep tensors in buffers"
        ) from None
    return tensors, extra


def to_json(value: Any) -> str:
    """Format the content of a run's JSON file; NaN is refused because JSON has none."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def write_json(file: Path, value: Any) -> None:
    file.write_text(to_json(value), encoding="utf-8")


def state_bytes(learner: Learner) -> StateBytes:
    """What a learner keeps between tasks, in bytes: trained parameters, statistics (buffers), exemplars."""
    return {
        "parameter_bytes": sum(p.numel() * p.element_size() for p in learner.parameters()),
        "statistics_bytes": sum(b.numel() * b.element_size() for b in learner.buffers()),
        "exemplar_bytes": learner.exemplar_bytes,
    }


def as_tensors(**arrays: Any) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array).contiguous() for name, array in arrays.items()}
