"""What a run has learned from, in sums over unit-length frozen features: its specification, without any image.

It answers two questions about a stored run: how likely an image is under the run's images (class Gaussians), and how
far a set of images is from the run's (kernel mean). Both are sums: they add up over tasks and over joined runs. The
specification is a file of its own, ``specification.safetensors`` in the run folder. A run does not write it, so runs
take as long as before; ``cil find`` and ``cil join --route`` make it when they need it, without a forward pass if the
features of the run's images are in the feature store.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cil.classifiers.tied import TiedGaussians
from cil.errors import RunError
from cil.utils.files import remove_leftovers, replacing, reporting
from cil.utils.precision import exact

FILE = "specification.safetensors"
SCHEMA = 1
WIDTH, GAMMA, SEED = 4096, 0.5, 0
"""Number m of random features, γ of the kernel, and the seed of the features; all stored kernel means have these."""
BLOCK = 1024


@exact()
def unit_length(features: Tensor) -> Tensor:
    """Features [N, F] at length 1, float64."""
    return F.normalize(features.double(), dim=1)


@lru_cache(maxsize=2)
def _frequencies(feature_dim: int) -> tuple[Tensor, Tensor]:
    random = np.random.RandomState(SEED)  # whose numbers stay the same in every version of numpy
    frequencies = random.standard_normal((WIDTH, feature_dim)) * np.sqrt(2 * GAMMA)
    return torch.from_numpy(frequencies), torch.from_numpy(random.uniform(0, 2 * np.pi, WIDTH))


@exact()
def random_features(u: Tensor) -> Tensor:
    """φ(u) = √(2/m) cos(Wu + b), W ~ N(0, 2γ), b ~ U(0, 2π): float64 [N, F] → [N, m].

    ⟨φ(u), φ(v)⟩ ≈ exp(−γ ‖u − v‖²) (Rahimi and Recht, NeurIPS 2007), with an error of order 1/√m.
    """
    frequencies, phases = _frequencies(u.shape[1])
    return (u @ frequencies.T + phases).cos_().mul_((2 / WIDTH) ** 0.5)


class Specification:
    """Sums over the unit-length frozen features u = f/‖f‖ of a run's training images.

    Args:
        names: Class names, in order of appearance.
        feature_dim: Width F of the frozen features.

    Attributes:
        names: Class names.
        gaussians: Counts, Σ u per class and Σ u uᵀ of all: class Gaussians with one covariance, shrunk by 0.5.
        kernel: Σ φ(u), float64 [m].
    """

    def __init__(self, names: Sequence[str], feature_dim: int) -> None:
        self.names = tuple(names)
        self.gaussians = TiedGaussians(feature_dim)
        self.gaussians.grow(len(self.names))
        self.kernel = torch.zeros(WIDTH, dtype=torch.float64)

    @property
    def images(self) -> int:
        """Number of training images n."""
        return int(self.gaussians.counts.sum())

    @property
    def kernel_mean(self) -> Tensor:
        """Mean of φ(u), float64 [m]; the squared distance of two such means estimates MMD²."""
        return self.kernel / max(1, self.images)

    def add(self, features: Tensor, labels: Tensor | np.ndarray) -> Specification:
        """Add frozen features [N, F], as the backbone gives them, with labels [N] in order of appearance.

        Raises:
            DataError: A shape, type or value is wrong.
        """
        u = unit_length(torch.as_tensor(features).cpu())
        self.gaussians.partial_fit(u, torch.as_tensor(labels).cpu())
        for block in u.split(BLOCK):
            self.kernel += random_features(block).sum(0)
        return self

    @classmethod
    def joined(cls, names: Sequence[str], parts: Sequence[Specification]) -> Specification:
        """The specification of all images of several runs.

        Args:
            names: Names of all their classes.
            parts: Their specifications; the samples of a class that several know add up.
        """
        whole = cls(names, parts[0].gaussians.feature_dim)
        place = {name: row for row, name in enumerate(names)}
        whole.gaussians.add([(part.gaussians, [place[name] for name in part.names]) for part in parts])
        whole.kernel = torch.stack([part.kernel for part in parts]).sum(0)
        return whole

    def save(self, folder: Path, stage: str) -> None:
        """Write the file into a run folder.

        Args:
            folder: The run folder.
            stage: Checksum of the stage up to which the images are counted.

        Raises:
            RunError: It cannot be written; what was there stays.
        """
        file = folder / FILE
        facts = {"schema": SCHEMA, "stage": stage, "class_names": self.names, "kernel": [WIDTH, GAMMA, SEED]}
        tensors = {**self.gaussians.state_dict(), "kernel": self.kernel}
        with reporting(file, "What was there stays"):
            remove_leftovers(file)
            with replacing(file) as half:
                save_file({k: v.contiguous() for k, v in tensors.items()}, half, {"facts": json.dumps(facts)})

    @classmethod
    def load(cls, folder: Path, stage: str) -> Specification | None:
        """The specification in a run folder; None if there is none, or one of another stage or version.

        Args:
            folder: The run folder.
            stage: Checksum of the run's last finished stage.

        Raises:
            RunError: The file is damaged.
        """
        file = folder / FILE
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as stored:
                facts: dict[str, Any] = json.loads((stored.metadata() or {})["facts"])
                if facts.get("schema") != SCHEMA or facts["stage"] != stage or facts["kernel"] != [WIDTH, GAMMA, SEED]:
                    return None
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - no dictionary
            specification = cls(facts["class_names"], tensors["sums"].shape[1])
            specification.kernel = tensors.pop("kernel")
            specification.gaussians.load_state_dict(tensors)
        except (SafetensorError, OSError, RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{file}: damaged ({reason}); delete it, and it is made again") from None
        return specification
