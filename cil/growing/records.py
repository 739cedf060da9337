"""What a lesson keeps of its images, in the folder of its stage: digests of their contents, and features.

No image is kept. The digests tell which images a class has learned already, and which ones `cil forget` must get.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cil.errors import RunError
from cil.results import AGAIN, read_stage, stage_folder
from cil.utils.stored import check_file

IMAGES, HOLDOUT, TRAIN = "images.safetensors", "holdout.safetensors", "train.safetensors"


@dataclass(frozen=True)
class Contents:
    """The images of a lesson.

    Attributes:
        content: Digest of each image's content, 16 bytes.
        label: Its class, int64 [N].
        held_out: Whether it is held out, bool [N].
    """

    content: list[bytes]
    label: np.ndarray
    held_out: np.ndarray

    def tensors(self) -> dict[str, Tensor]:
        content = np.frombuffer(b"".join(self.content), dtype=np.uint8).reshape(len(self.content), -1)
        return {
            "content": torch.from_numpy(content.copy()),
            "label": torch.from_numpy(self.label),
            "held_out": torch.from_numpy(self.held_out),
        }


@dataclass(frozen=True)
class Kept:
    """Features of images of a lesson, float32 [N, F_v] by version of the view, and labels int64 [N]."""

    label: np.ndarray
    features: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {"label": torch.from_numpy(self.label), **{f"view {key}": x for key, x in self.features.items()}}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Kept:
        """What :meth:`tensors` gave."""
        features = {view.removeprefix("view "): x for view, x in tensors.items() if view != "label"}
        return cls(tensors["label"].numpy(), features)


def key(version: Hashable) -> str:
    """A view's version as a text that is the same in every process."""
    return repr(version)


def read_contents(folder: Path, stages: int) -> list[Contents]:
    """The images of the first ``stages`` lessons.

    Raises:
        RunError: A file is missing or damaged.
    """
    found = []
    for stage in range(stages):
        stored = _read(folder, stage, IMAGES)
        content = [row.tobytes() for row in stored["content"].numpy()]
        found.append(Contents(content, stored["label"].numpy(), stored["held_out"].numpy()))
    return found


def read_kept(folder: Path, stages: int) -> list[Kept]:
    """The held-out features of the first ``stages`` lessons; errors as in :func:`read_contents`."""
    return [_read_kept(folder, stage, HOLDOUT) for stage in range(stages)]


def read_taught(folder: Path, header: Mapping[str, Any], label: int, views: Sequence[Hashable]) -> Tensor | None:
    """The features that a class was trained with, [N, F] with the views side by side; None if they are not all kept.

    Raises:
        RunError: A file is missing or damaged.
    """
    parts = []
    for stage in range(since(header, label), len(header["tasks"])):
        if str(label) not in header["lessons"][stage]["train"]:
            continue
        if TRAIN not in read_stage(folder, stage).files:
            return None
        one = _read_kept(folder, stage, TRAIN)
        if not {key(version) for version in views} <= one.features.keys():
            return None
        rows = torch.from_numpy(np.flatnonzero(one.label == label))
        parts.append(torch.cat([one.features[key(version)][rows] for version in views], dim=1))
    return torch.cat(parts) if parts else None


def since(header: Mapping[str, Any], label: int) -> int:
    """The first lesson of which the state can hold something of a class: the one after it was forgotten."""
    forgotten = [change["stages"] for change in header["changes"] if change["label"] == label and change["folder"]]
    return max(forgotten, default=0)


def learned(contents: Sequence[Contents], header: Mapping[str, Any], label: int) -> list[tuple[bytes, bool]]:
    """The images that the state holds of a class, and whether each is held out; none from before it was forgotten."""
    images: list[tuple[bytes, bool]] = []
    for one in contents[since(header, label) :]:
        images += [(one.content[i], bool(one.held_out[i])) for i in np.flatnonzero(one.label == label).tolist()]
    return images


def _read_kept(folder: Path, stage: int, name: str) -> Kept:
    return Kept.of(_read(folder, stage, name))


def _read(folder: Path, stage: int, name: str) -> dict[str, Tensor]:
    return read_tensors(stage_folder(folder, stage) / name, read_stage(folder, stage).files)


def read_tensors(file: Path, checksums: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of one file of a stage.

    Args:
        file: The file.
        checksums: Those of the stage's files, by name.

    Raises:
        RunError: The file is missing or damaged.
    """
    try:
        check_file(file, checksums.get(file.name), advice=AGAIN)
        return load_file(file)
    except FileNotFoundError:
        raise RunError(f"{file}: not there; restore it") from None
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file}: damaged ({' '.join(str(error).split())}); restore it") from None
