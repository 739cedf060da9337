"""The folder of a run on disk: stages are written atomically, and nothing is pickled.

``stage-NN/`` holds the learner's tensors (safetensors) and extra state (JSON), per-image predictions, and the stage's
row with the checksums of these files. It is written under a temporary name and renamed, so whatever happens, every
folder called ``stage-NN`` is complete and the stages before a crash stay usable. No later stage writes there again;
``metrics.json`` is rebuilt after each stage from the rows of all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cil import history
from cil.errors import RunError
from cil.learner import Context, Learner
from cil.results import AGAIN, RESTORE, Stage, StageRow, StateBytes, read_header, read_stage, stage_folder
from cil.stream import Task
from cil.utils.files import flush, fresh, remove, replacing, reporting
from cil.utils.stored import check_file, file_digest, read_json, sealed

WEIGHTS = "learner.safetensors"
"""File of a learner's tensors, in the folder of a stage or of a change."""

LARGE = 256 * 2**20
"""With ``checkpoints: auto``, weights of a stage above so many bytes are kept only until the next stage is written."""


class RunFolder:
    """The folder of one run (one learner, class order and seed).

    Args:
        path: The folder.
        keep: Stages whose weights stay on disk: ``all``, ``last``, or ``auto``, which is all that are not large. Rows
            and predictions always stay.
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
            if (self.path / "run.lock").is_symlink():  # opening it would empty the file that it leads to
                raise RunError(f"{self.path / 'run.lock'}: is a link; delete it and run the same command again")
            lock = FileLock(self.path / "run.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise RunError(
                    f"{self.path}: another process is running in this folder; wait for it or use another folder"
                ) from None
        try:
            with self.reported():
                for name in ("stage-", "metrics.json", "config.yaml"):  # what killed processes were writing
                    for leftover in self.path.glob(f".{name}*"):
                        remove(leftover)
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
        return stage_folder(self.path, index)

    def finished(self) -> int:
        """Number of complete stages, counted from the first."""
        count = 0
        while (place := self.stage(count)).is_dir():
            if place.is_symlink() and not (place / "stage.json").exists():
                break  # a link that leads to no stage
            count += 1
        return count

    def keep_first(self, count: int) -> list[int]:
        """Delete the stages from ``count`` on, the last one first, also those after a gap; returns their numbers.

        Without any stage the folder holds no run, so its ``metrics.json`` is deleted, too.
        """
        numbers = [path.name.removeprefix("stage-") for path in self.path.glob("stage-*")]
        later = sorted(int(number) for number in numbers if number.isdigit() and int(number) >= count)
        for index in reversed(later):
            with self.reported():
                gone = self.stage(index).rename(fresh(self.stage(index)))  # half a folder must not look like a stage
                remove(gone)
        if not count:
            (self.path / "metrics.json").unlink(missing_ok=True)
        return later

    def save_stage(
        self,
        index: int,
        learner: Learner,
        row: StageRow,
        predictions: dict[str, Tensor],
        further: Mapping[str, dict[str, Tensor]] | None = None,
    ) -> None:
        """Write a stage under a temporary name and make it valid by one rename.

        Folders of this and of later stages, which an earlier attempt has left, are deleted: they are computed again.

        Args:
            index: Number of the stage, from 0.
            learner: The learner after the stage.
            row: Its row.
            predictions: Its predictions.
            further: Tensors by name for each further file of the stage.

        Raises:
            RunError: The disk is full or not writable; nothing that was there is lost.
        """
        temporary = fresh(self.stage(index))
        try:
            with self.reported():
                temporary.mkdir()
                for name, content in {"predictions.safetensors": predictions, **(further or {})}.items():
                    save_file(content, temporary / name)
                files = write_state(learner, temporary)
                write_json(temporary / "stage.json", sealed({**row, "files": files}))
                for file in temporary.iterdir():
                    flush(file)
                for old in sorted(self.path.glob("stage-*"), reverse=True):
                    if old.name.removeprefix("stage-").isdecimal() and int(old.name.removeprefix("stage-")) >= index:
                        remove(old)
                temporary.rename(self.stage(index))
                flush(self.path)
        except RunError:
            shutil.rmtree(temporary, ignore_errors=True)  # the error above reaches the user
            raise
        if index and self.keep != "all" and not self.stage(index - 1).is_symlink():
            weights = self.stage(index - 1) / WEIGHTS
            if weights.exists() and (self.keep == "last" or weights.stat().st_size > LARGE):
                weights.unlink()

    def stages(self) -> list[Stage]:
        """The rows of all complete stages, with the checksums of their files.

        Raises:
            RunError: A ``stage.json`` is missing or damaged, or is not of the run that ``metrics.json`` describes.
        """
        finished, recorded = self.finished(), self.recorded()
        self._require_listed(finished, recorded)
        if recorded is not None and "lessons" in read_header(self.path):
            finished = min(finished, len(recorded))  # a lesson counts once it is listed
        return [read_stage(self.path, index, recorded or ()) for index in range(finished)]

    def rows(self) -> list[StageRow]:
        """The rows of all complete stages; errors as in :meth:`stages`."""
        return [stage.row for stage in self.stages()]

    def recorded(self) -> list[str] | None:
        """The checksums of the stages in ``metrics.json``; None without one, or in one of an earlier version."""
        there = (self.path / "metrics.json").exists()
        return read_header(self.path).get("stage_checksums") if there else None

    def complete(self) -> bool:
        """Whether ``metrics.json`` says so, and no folder of a stage that may be computed again is missing."""
        if not (self.path / "metrics.json").exists():
            return False
        header, finished = read_header(self.path), self.finished()
        # published runs, and those of earlier versions that were tidied, have no stage folders
        tidied = "stages" in header and not finished
        return header["complete"] and (tidied or finished >= len(header["tasks"]))

    def _require_listed(self, finished: int, recorded: list[str] | None) -> None:
        if recorded is not None and finished > len(recorded) + 1:  # the last one is listed after it is written
            raise RunError(
                f"{self.path / 'metrics.json'}: lists {len(recorded)} stages, but {finished} are there; {RESTORE}"
            )

    def load_learner(self, learner: Learner, tasks: Sequence[Task], context: Callable[[int], Context]) -> None:
        """Give a fresh learner the state it had after the last of ``tasks``; see :func:`restore_learner`.

        Args:
            learner: A fresh learner.
            tasks: All tasks up to the stage to load; their images are not read.
            context: Stage → context.

        Raises:
            RunError: The weights were not kept (``hardware.checkpoints``), or are damaged or of another learner.
        """
        index = len(tasks) - 1
        recorded = self.recorded()
        self._require_listed(len(tasks), recorded)
        if recorded and index == len(recorded):  # not listed yet: the one before tells whether the list is of this run
            read_stage(self.path, index - 1, recorded)
        place, known = self.stage(index), read_stage(self.path, index, recorded or ()).files
        if recorded is not None and (change := history.changed_state(read_header(self.path), len(tasks))):
            place, known = self.path / change["folder"], change["files"]
        file, extra = place / WEIGHTS, place / "learner.json"
        try:
            for one in (file, extra):
                check_file(one, known.get(one.name), advice=AGAIN)
            state: dict[str, Any] = dict(load_file(file))
            state |= read_json(extra, advice=AGAIN)
            restore_learner(learner, tasks, context, state)
        except FileNotFoundError as error:
            raise RunError(
                f"{error.filename or file}: not there; stage {index}'s weights were not kept or were deleted; {RESTORE}"
            ) from None
        except (SafetensorError, OSError, RuntimeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{file}: does not fit this learner or is damaged: {reason}") from None

    def load_module(self, module: nn.Module, stage: int, name: str) -> None:
        """Give a module the tensors that a finished stage has in its file ``name``.

        Raises:
            RunError: The file is missing, damaged, or of another module.
        """
        file = self.stage(stage) / name
        known = read_stage(self.path, stage, self.recorded() or ()).files
        try:
            check_file(file, known.get(name), advice=AGAIN)
            module.load_state_dict(load_file(file))
        except FileNotFoundError:
            raise RunError(f"{file}: not there; {AGAIN}") from None
        except (SafetensorError, OSError, RuntimeError, KeyError) as error:
            raise RunError(f"{file}: damaged, or of another version: {' '.join(str(error).split())}") from None

    def write(self, name: str, text: str) -> None:
        """Replace a file in one step; the next run deletes what a killed process has left beside it."""
        with self.reported(), replacing(self.path / name) as half:
            half.write_text(text, encoding="utf-8")


def write_state(learner: Learner, folder: Path) -> dict[str, str]:
    """Write a learner's tensors and extra state to a folder, and return the checksums of all files there."""
    tensors, extra = split_state(learner.state_dict(), copy=False)
    save_file(tensors, folder / WEIGHTS)
    write_json(folder / "learner.json", extra)
    return {file.name: file_digest(file) for file in sorted(folder.iterdir())}


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


def split_state(state: dict[str, Any], *, copy: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a state dict into (tensors, JSON extra state); all tensors are on the CPU, and none shares its memory.

    Args:
        state: The state dict.
        copy: Whether every tensor is a copy, a snapshot; otherwise only those that could not be written as they are.
    """
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Any] = {}
    places: set[int] = set()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            extra[key] = value
            continue
        place = value.untyped_storage().data_ptr()
        tensors[key] = value.detach().to("cpu", copy=copy or place in places).contiguous()
        places.add(place)
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
    exemplars = {id(rows) for rows in learner.exemplars_kept}
    return {
        "parameter_bytes": sum(p.numel() * p.element_size() for p in learner.parameters()),
        "statistics_bytes": sum(b.numel() * b.element_size() for b in learner.buffers() if id(b) not in exemplars),
        "exemplar_bytes": learner.exemplar_bytes,
    }


def as_tensors(**arrays: Any) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array).contiguous() for name, array in arrays.items()}
