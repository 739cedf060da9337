"""What a lesson keeps of its images, in the folder of its stage: digests of their contents, and held-out features.

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

IMAGES, HOLDOUT = "images.safetensors", "holdout.safetensors"


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
    """Features of the images that a lesson holds out, float32 [N, F_v] by version of the view, and labels int64 [N]."""

    label: np.ndarray
    features: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {"label": torch.from_numpy(self.label), **{f"view {key}": x for key, x in self.features.items()}}


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
    found = []
    for stage in range(stages):
        stored = _read(folder, stage, HOLDOUT)
        label = stored.pop("label").numpy()
        found.append(Kept(label, {name.removeprefix("view "): features for name, features in stored.items()}))
    return found


def learned(contents: Sequence[Contents], header: Mapping[str, Any], label: int) -> list[tuple[bytes, bool]]:
    """The images that the state holds of a class, and whether each is held out; none from before it was forgotten."""
    forgotten = [change["stages"] for change in header["changes"] if change["label"] == label and change["folder"]]
    images: list[tuple[bytes, bool]] = []
    for one in contents[max(forgotten, default=0) :]:
        images += [(one.content[i], bool(one.held_out[i])) for i in np.flatnonzero(one.label == label).tolist()]
    return images


def _read(folder: Path, stage: int, name: str) -> dict[str, Tensor]:
    file = stage_folder(folder, stage) / name
    try:
        check_file(file, read_stage(folder, stage).files.get(name), advice=AGAIN)
        return load_file(file)
    except FileNotFoundError:
        raise RunError(f"{file}: not there; restore it") from None
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file}: damaged ({' '.join(str(error).split())}); restore it") from None
