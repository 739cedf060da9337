"""Linear and cosine heads, trained by gradient descent. They grow with the classes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cil.classifiers.base import Array, Classifier
from cil.errors import ConfigError, TrainingError
from cil.utils.precision import exact, without_autocast

H = TypeVar("H", bound="Head")
HeadStart = Literal["normal", "uniform"]
"""Distribution of a linear head's new rows."""


class Head(Classifier):
    """A head with one trainable row per class. New classes append rows, and old rows keep their values.

    Growing replaces the parameters by larger ones, so optimisers must be built after growing.
    """

    weight: nn.Parameter
    _row_names: tuple[str, ...] = ("weight",)
    """Names of the parameters with one row per class."""
    _penalised = "weight"
    """Name of the parameter that the penalty of ``partial_fit`` keeps small."""

    def __init__(self, feature_dim: int) -> None:
        super().__init__(feature_dim)
        self.weight = nn.Parameter(torch.zeros(0, feature_dim))

    @property
    def num_classes(self) -> int:
        return len(self.weight)

    @property
    def rows(self) -> list[nn.Parameter]:
        """The parameters with one row per class; the σ of a cosine head is not among them."""
        return [getattr(self, name) for name in self._row_names]

    def grow(self, classes: int, generator: torch.Generator | None = None) -> None:
        """Make room for labels 0…classes−1 with new rows drawn from ``generator`` (None: from a fixed one)."""
        new = classes - self.num_classes
        if new > 0:
            generator = generator or torch.Generator().manual_seed(self.num_classes)
            self._append(self._new_rows(new, generator))

    def extend(self: H, other: H) -> H:
        """Append the rows of ``other``, for instance a head trained on one task alone; ``other`` does not change.

        Raises:
            ConfigError: ``other`` is another kind of head or has another feature width.
        """
        if type(other) is not type(self) or other.feature_dim != self.feature_dim:
            raise ConfigError(
                f"a {type(self).__name__} of width {self.feature_dim} cannot be extended by a {type(other).__name__} "
                f"of width {other.feature_dim}"
            )
        self._append({name: getattr(other, name).detach() for name in self._row_names})
        return self

    def forward(self, features: Tensor, classes: Sequence[int] | Tensor | None = None) -> Tensor:
        """Compute logits [B, C] of features [B, F], in the precision that autocast sets.

        Args:
            features: Features of a batch, [B, F].
            classes: Classes in the softmax (None: all). The other classes get logits of −∞, and their rows a gradient
                of zero. Cross-entropy with label smoothing is infinite for such logits.
        """
        logits = self._scores(features)
        if classes is None:
            return logits
        excluded = torch.ones(self.num_classes, dtype=torch.bool, device=logits.device)
        excluded[torch.as_tensor(classes, device=logits.device)] = False
        return logits.masked_fill(excluded, float("-inf"))

    @without_autocast()
    def logits(self, features: Array) -> Tensor:
        """Compute scores [B, C] of features [B, F] in full precision."""
        return self._scores(self.checked(features))

    @exact()
    def partial_fit(self: H, features: Array, labels: Array, l2: float = 1.0, iterations: int = 1000) -> H:
        """Fit a softmax regression, argmin Σ_i CE(logits_i, y_i) + l2/2 · ‖penalised‖², by L-BFGS.

        It starts at the current rows. The softmax is over all C classes, the sum over this call's samples: the rows of
        classes that are absent from the call get only negative samples. The result is deterministic. For a linear head
        and a single call (C > 2) it is that of scikit-learn's ``LogisticRegression(C=1/l2)``.

        Args:
            features: Features [N, F], floating point and finite.
            labels: Labels [N], integers ≥ 0; the head grows to the largest.
            l2: Strength ≥ 0 of the penalty on the weights (not the bias) of a linear head, or on σ of a cosine head.
            iterations: Largest number of L-BFGS iterations.

        Raises:
            DataError: A shape, type or value is wrong.
            ConfigError: ``l2`` is negative.
            TrainingError: The loss is not finite.
        """
        if not l2 >= 0:
            raise ConfigError(f"{type(self).__name__}.partial_fit: l2 is {l2}; it must not be negative")
        features, labels = self.prepare_fit(features, labels)
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
        std: Standard deviation of new rows, drawn from a normal distribution truncated at ±2 std; biases start at 0
            (as in timm's head).
        start: ``uniform`` draws new rows and biases from U(−1/√F, 1/√F) instead, as torch does for a linear layer.

    Parameters:
        weight: [C, F]; bias: [C].
    """

    _row_names = ("weight", "bias")

    def __init__(self, feature_dim: int, std: float = 0.02, start: HeadStart = "normal") -> None:
        super().__init__(feature_dim)
        self.std, self.start = std, start
        self.bias = nn.Parameter(torch.zeros(0))

    def _new_rows(self, new: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.empty(new, self.feature_dim)
        if self.start == "uniform":
            bound = self.feature_dim**-0.5
            weight, bias = (part.uniform_(-1, 1, generator=generator) for part in (rows, torch.empty(new)))
            return {"weight": bound * weight, "bias": bound * bias}
        nn.init.trunc_normal_(rows, std=self.std, a=-2 * self.std, b=2 * self.std, generator=generator)
        return {"weight": rows, "bias": torch.zeros(new)}

    def _scores(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight.to(features.dtype), self.bias.to(features.dtype))


class CosineHead(Head):
    """logits = σ · ⟨f/‖f‖, W_c/‖W_c‖⟩ with one learnable σ (Hou et al., CVPR 2019; APER).

    New rows are drawn from U(−1/√F, 1/√F). ``extend`` does not change σ.

    Args:
        feature_dim: Feature width F.
        sigma: Initial σ > 0; 1 in the published code. Logits are between −σ and σ, so a σ that has little time to grow
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
