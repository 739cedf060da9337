"""Heads trained by gradient descent; they grow with the classes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cil.classifiers.base import Array, Classifier
from cil.errors import ConfigError, TrainingError
from cil.precision import exact, without_autocast

H = TypeVar("H", bound="Head")


class Head(Classifier):
    """One trainable row a class; rows are added as classes appear and old rows keep their values.

    Parameters grow by replacement: optimisers must be made after growing.
    """

    weight: nn.Parameter
    _row_names: tuple[str, ...] = ("weight",)
    """Parameters with one row a class."""
    _penalised = "weight"
    """What ``partial_fit`` keeps small."""

    def __init__(self, feature_dim: int) -> None:
        super().__init__(feature_dim)
        self.weight = nn.Parameter(torch.zeros(0, feature_dim))

    @property
    def num_classes(self) -> int:
        return len(self.weight)

    @property
    def rows(self) -> list[nn.Parameter]:
        """The parameters with one row a class; not the σ of a cosine head."""
        return [getattr(self, name) for name in self._row_names]

    def grow(self, classes: int, generator: torch.Generator | None = None) -> None:
        """Make room for labels 0…classes−1, drawing the new rows from ``generator`` (None: from a fixed one)."""
        new = classes - self.num_classes
        if new > 0:
            generator = generator or torch.Generator().manual_seed(self.num_classes)
            self._append(self._new_rows(new, generator))

    def extend(self: H, other: H) -> H:
        """Append the rows of ``other``, for instance those of a task trained by themselves; ``other`` keeps its own.

        Raises:
            ConfigError: Another kind of head, or another feature width.
        """
        if type(other) is not type(self) or other.feature_dim != self.feature_dim:
            raise ConfigError(
                f"a {type(self).__name__} of width {self.feature_dim} cannot be extended by a {type(other).__name__} "
                f"of width {other.feature_dim}"
            )
        self._append({name: getattr(other, name).detach() for name in self._row_names})
        return self

    def forward(self, features: Tensor, classes: Sequence[int] | Tensor | None = None) -> Tensor:
        """Features [B, F] → logits [B, C], in the precision autocast asks for.

        Args:
            features: Features of a batch.
            classes: The classes in the softmax (None: all). The others' logits are −∞ and their rows get a gradient
                of zero. With label smoothing cross-entropy would be infinite then.
        """
        logits = self._scores(features)
        if classes is None:
            return logits
        out = torch.ones(self.num_classes, dtype=torch.bool, device=logits.device)
        out[torch.as_tensor(classes, device=logits.device)] = False
        return logits.masked_fill(out, float("-inf"))

    @without_autocast()
    def logits(self, features: Array) -> Tensor:
        """Scores [B, C] of features [B, F] in full precision."""
        return self._scores(self.checked(features))

    @exact()
    def partial_fit(self: H, features: Array, labels: Array, l2: float = 1.0, iterations: int = 1000) -> H:
        """Softmax regression from the current rows: argmin Σ_i CE(logits_i, y_i) + l2/2 · ‖penalised‖², by L-BFGS.

        All C classes are in the softmax, and only this call's samples in the sum: rows of classes that are not among
        them see negatives only. Deterministic. For a linear head on one batch (C > 2) this is scikit-learn's
        ``LogisticRegression(C=1/l2)``.

        Args:
            features: Features [N, F], floating and finite.
            labels: Labels [N], integers ≥ 0; the head grows to the largest.
            l2: Strength of the penalty: on the weights (not the bias) of a linear head, on σ of a cosine head.
            iterations: Largest number of L-BFGS iterations.

        Raises:
            DataError: Shapes, types or values are wrong.
            ConfigError: ``l2`` is negative.
            TrainingError: The loss is not finite.
        """
        if not l2 >= 0:
            raise ConfigError(f"{type(self).__name__}.partial_fit: l2 is {l2}; it must not be negative")
        features, labels = self.taken(features, labels)
        rows = {name: p.detach().double().requires_grad_() for name, p in self.named_parameters()}
        optimizer = torch.optim.LBFGS(
            rows.values(),
            max_iter=iterations,
            max_eval=2 * iterations,
            tolerance_grad=1e-9,
            tolerance_change=1e-14,
            history_size=100,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            optimizer.zero_grad()
            penalty = l2 / 2 * rows[self._penalised].square().sum() / len(labels)
            loss = F.cross_entropy(functional_call(self, rows, (features,)), labels) + penalty
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(objective)
            final = objective()
        if not bool(torch.isfinite(final)):
            raise TrainingError(f"{type(self).__name__}.partial_fit: the loss is {final.item()}; give a larger l2")
        for name, p in self.named_parameters():
            p.copy_(rows[name])
        return self

    @abstractmethod
    def _new_rows(self, new: int, generator: torch.Generator) -> dict[str, Tensor]: ...

    @abstractmethod
    def _scores(self, features: Tensor) -> Tensor: ...

    @exact()
    def _append(self, rows: dict[str, Tensor]) -> None:
        for name, new in rows.items():
            old = getattr(self, name)
            setattr(self, name, nn.Parameter(torch.cat([old, new.to(old)])))


class LinearHead(Head):
    """logits = f Wᵀ + b.

    Args:
        feature_dim: Feature width F.
        std: New rows are drawn from a truncated normal with this deviation, biases start at 0 (timm's head).

    Parameters:
        weight: [C, F]; bias: [C].
    """

    _row_names = ("weight", "bias")

    def __init__(self, feature_dim: int, std: float = 0.02) -> None:
        super().__init__(feature_dim)
        self.std = std
        self.bias = nn.Parameter(torch.zeros(0))

    def _new_rows(self, new: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.empty(new, self.feature_dim)
        nn.init.trunc_normal_(rows, std=self.std, a=-2 * self.std, b=2 * self.std, generator=generator)
        return {"weight": rows, "bias": torch.zeros(new)}

    def _scores(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight.to(features.dtype), self.bias.to(features.dtype))


class CosineHead(Head):
    """logits = σ · ⟨f/‖f‖, W_c/‖W_c‖⟩ with one learnable σ (Hou et al., CVPR 2019; APER).

    New rows are drawn from U(−1/√F, 1/√F). Extending by another head keeps one's own σ.

    Args:
        feature_dim: Feature width F.
        sigma: σ at the start, > 0: 1 in the published code. As the logits lie in ±σ, a σ that has little time to grow
            keeps the softmax flat.

    Parameters:
        weight: [C, F]; sigma: scalar.
    """

    _penalised = "sigma"  # the length of a row of W has no effect

    def __init__(self, feature_dim: int, sigma: float = 1.0) -> None:
        super().__init__(feature_dim)
        self.sigma = nn.Parameter(torch.tensor(float(sigma)))

    def _new_rows(self, new: int, generator: torch.Generator) -> dict[str, Tensor]:
        bound = self.feature_dim**-0.5
        return {"weight": torch.empty(new, self.feature_dim).uniform_(-bound, bound, generator=generator)}

    def _scores(self, features: Tensor) -> Tensor:
        weight = self.weight.to(features.dtype)
        return self.sigma.to(features.dtype) * F.linear(F.normalize(features, dim=1), F.normalize(weight, dim=1))
