"""RanPAC: ridge regression of one-hot labels on random features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.classifiers.base import Array
from cil.classifiers.drift import AffineMap
from cil.classifiers.memory import DOUBLE
from cil.classifiers.random_features import RandomFeatures
from cil.classifiers.selection import Score, Selection, SelectsFeatures, variance_ratios
from cil.errors import ConfigError
from cil.utils.linalg import BLOCK, add_gram_, eigh_, generalised_errors, ridge_solve
from cil.utils.packed import add_packed_gram_, diagonals, pack, packed_ridge_solve, packed_size, unpack
from cil.utils.precision import exact, without_autocast

Decision = Literal["linear", "cosine"]
Choice = Literal["holdout", "loo", "gcv"]
Strength = float | Choice

STRENGTHS = tuple(10.0**exponent for exponent in range(-8, 9))
"""Candidates for λ."""
RESOLVED = 1e-8
"""A leave-one-out denominator 1 − h_ii below this is mostly rounding error."""
UNSCALED = (1e-6, 1e10)
"""Mean squares of the random features for which the candidates are taken as they are."""


class Ridge(SelectsFeatures, RandomFeatures):
    """Ridge regression of one-hot labels Y on random features H = ReLU(X R), R ~ N(0, 1): RanPAC (arXiv 2307.02251).

    G = Σ HᵀH and Q = Σ HᵀY are sums, so W = (G + λI)⁻¹Q equals joint ridge regression on all samples seen: for a given
    R and λ the result does not depend on the order of the samples or on their split over calls. Every call chooses λ
    again:

    * ``holdout`` (RanPAC): A random 80 % of this call's samples fit W for every λ in 10^-8…10^8; the λ with the
      smallest mean squared error on the other 20 % is chosen. One eigendecomposition serves all candidates.
    * ``loo``: The criterion is the exact leave-one-out error (PRESS) of this call's samples under the model of *all*
      samples so far, e_i = (y_i − ŷ_i) / (1 − h_ii). It needs one eigendecomposition of G [M, M] per call. A λ so small
      that the model interpolates a sample up to rounding (1 − h_ii < 10^-8) is not a candidate.
    * ``gcv``: The criterion is generalised cross-validation (Golub, Heath, Wahba 1979) on *all* samples so far,
      n · RSS / (n − tr S)² with S = H (G + λI)⁻¹ Hᵀ. It is determined by G, Q and the counts, so λ, too, is that of
      joint training, whatever the split over calls. It needs one eigendecomposition of G per call. A λ that leaves no
      direction free is not a candidate.

    λ keeps its value (1 at the start) if there is nothing to choose by: fewer than two samples, or no class with two,
    in the call, or for ``gcv`` in all calls. The only sample of a class does not count, since no λ can predict it. The
    candidates are meant for random features whose mean square m is between 10^-6 and 10^10; otherwise they, and the
    initial λ, are multiplied by m. As long as no class has two samples, W is the nearest mean by cosine.

    G is kept as its lower triangle. Peak memory, in units of G (800 MB for M = 10,000), is 1 while W is solved, 1.5 on
    a GPU; about as much for ``holdout`` on n < M/2 samples, where the kernel HHᵀ [n, n] is decomposed; 3.5 for ``loo``,
    for ``gcv``, and for ``holdout`` on more than M samples.

    Args:
        feature_dim: Feature width F.
        projection: Width M of the random features; None: no projection, H = X and M = F.
        strength: Fixed λ > 0, or the method that chooses it.
        decision: ``linear`` predicts argmax h·W_c; ``cosine`` divides every W_c by its norm first, as the PILOT toolbox
            does; the paper does not.
        balance: Whether a sample of class c weighs 1/n_c in G, Q and the criteria for λ, as if every class had one
            sample: classes with few samples are then predicted as often as others. All samples of a class must come in
            one call. A fixed λ is relative to these weights.
        select: Columns of H that are used; W is that of these columns, with the λ of all. A column's score ``ridge`` is
            ‖W_j‖² of the solution on all columns, times the mean square of the column. None: all.

    Buffers:
        triangle: float64 [M (M + 1) / 2], the lower triangle of G, row by row. targets: float64 [C, M], Qᵀ. counts:
        int64 [C]. strength\\_: float64 scalar, λ in use. projection: float32 [F, M], R; zero until drawn. A
        stored state of before, whose ``gram`` [M, M] is all of G, can be loaded, too.

    Raises:
        ConfigError: An argument is out of range.
    """

    strength: Strength
    removed_with = "samples"
    over_classes = ("triangle",)
    derived = ("strength_",)
    triangle: Tensor
    strength_: Tensor

    def __init__(
        self,
        feature_dim: int,
        projection: int | None = None,
        strength: Strength = "holdout",
        decision: Decision = "linear",
        balance: bool = False,
        select: Selection | None = None,
    ) -> None:
        super().__init__(feature_dim, projection, strength=strength, select=select)
        if isinstance(strength, str) and strength not in get_args(Choice):
            raise ConfigError(f"Ridge: strength is {strength!r}; it must be 'holdout', 'loo', 'gcv' or a number")
        if not isinstance(strength, str) and not 0 < strength < math.inf:
            raise ConfigError(f"Ridge: strength is {strength}; it must be positive and finite")
        if decision not in ("linear", "cosine"):
            raise ConfigError(f"Ridge: decision is {decision!r}; it must be 'linear' or 'cosine'")
        self.decision, self.balance = decision, balance
        self.register_buffer("triangle", torch.zeros(packed_size(self.width), dtype=torch.float64))
        initial = 1.0 if isinstance(strength, str) else strength
        self.register_buffer("strength_", torch.tensor(initial, dtype=torch.float64))

    def kept_bytes(self, classes: int, width: int) -> float:
        return super().kept_bytes(classes, width) + DOUBLE * packed_size(width)

    def peak_bytes(self, classes: int, width: int) -> float:
        rows = 3 * super().kept_bytes(classes, width) + 3 * DOUBLE * BLOCK * width
        matrices = 3.5 if isinstance(self.strength, str) else 1.5  # on a GPU; a solution on a CPU takes 1
        if self.select is not None:  # G beside what is selected of it
            matrices = max(matrices, 1.5 + self.select.fraction**2)
        return rows + matrices * DOUBLE * width**2

    @property
    def gram(self) -> Tensor:
        """G, float64 [M, M]; a new tensor."""
        return unpack(self.triangle, self.width)

    @exact()
    def transport(self, drift: AffineMap) -> Ridge:
        """Apply ``drift`` to G and Q, as if every sample had been mapped.

        Raises:
            ConfigError: There is a random projection: a linear map cannot be applied to features after the ReLU.
        """
        if self.projection is not None:
            raise ConfigError("Ridge: statistics of random features cannot be transported; use projection None")
        pack(drift.outer(self.gram, self.targets.sum(0), self.totals.sum()), out=self.triangle)
        self.targets = drift.sums(self.targets, self.totals)
        self._forget()
        return self

    @exact()
    def partial_fit(
        self,
        features: Array,
        labels: Array,
        generator: torch.Generator | None = None,
        explained: Tensor | None = None,
    ) -> Ridge:
        """Add features [N, F] with labels [N], and choose λ.

        ``generator`` (None: a fixed one) draws the projection if that has not been done yet, then splits the samples
        for ``holdout``. ``explained`` [N, C] are scores that another model gives the samples: the targets are then Y
        less these, with a fixed λ (DS-AL).

        Raises:
            DataError: A shape, type or value is wrong; nothing is learned then.
        """
        features, labels = self.prepare_fit(features, labels)
        roots = self.roots(labels)
        if roots is not None:
            features = features * roots  # and so H: a ReLU keeps positive factors
        generator = generator or torch.Generator().manual_seed(0)
        self.ensure_drawn(generator)
        parts = zip(features.split(BLOCK), labels.split(BLOCK), strict=True)
        for i, (x, y) in enumerate(parts):  # H has 8 · M bytes per row
            h = self.expand(x)
            add_packed_gram_(self.triangle, h)
            self.targets.index_add_(0, y, h if roots is None else h * roots[i * BLOCK : (i + 1) * BLOCK])
            if explained is not None:
                self.targets.addmm_(explained[i * BLOCK : (i + 1) * BLOCK].double().T, h, alpha=-1)
        self.counts += torch.bincount(labels, minlength=self.num_classes)
        scored = int(self.counts.sum()) if self.strength == "gcv" else len(labels)
        if isinstance(self.strength, str) and scored > 1:
            self._choose(self._errors(features, labels, generator, roots))
        self._use_unit()
        return self

    @exact()
    def add(self, others: Sequence[tuple[Ridge, Sequence[int]]]) -> Ridge:
        """Add the sums of other classifiers; see :meth:`StatisticsClassifier.add`.

        With ``gcv``, λ is chosen again from the joint sums, as joint training chooses it. ``holdout`` and ``loo`` need
        samples; λ is then that of the classifier with the most samples, and of the first one of equals.
        """
        largest = max((self, *(other for other, _ in others)), key=lambda one: int(one.counts.sum()))
        strength = float(largest.strength_)
        super().add(others)
        self.strength_.fill_(strength)
        if self.strength == "gcv":
            self._choose(self.generalised_errors())
        self._use_unit()
        return self

    def _choose(self, errors: list[float]) -> None:
        if math.isfinite(min(errors)):
            self.strength_.fill_(self.candidates[errors.index(min(errors))])

    def _use_unit(self) -> None:
        if isinstance(self.strength, str) and float(self.strength_) == 1:  # not chosen yet, or 1 was chosen in unit 1
            self.strength_.fill_(self._unit())

    def _subtract(self, features: Tensor) -> None:
        taken = torch.zeros_like(self.triangle)
        for x in features.split(BLOCK):
            add_packed_gram_(taken, self.expand(x))
        self.triangle -= taken

    def _removed(self) -> None:
        if self.strength == "gcv":  # the other criteria need the samples of a call, and λ stays as it is
            self._choose(self.generalised_errors())

    @property
    def candidates(self) -> list[float]:
        """The candidates for λ."""
        unit = self._unit()
        return [unit * strength for strength in STRENGTHS]

    def _unit(self) -> float:
        square = float(diagonals(self.triangle, self.width).mean()) / max(1, int(self.totals.sum()))
        return square if square > 0 and not UNSCALED[0] <= square <= UNSCALED[1] else 1.0

    @without_autocast()
    def logits(self, features: Array) -> Tensor:
        features, columns = self.checked(features), self.selected
        if columns is None:
            return self.only_seen(self.expand(features) @ self.weights.to(features.dtype))
        weights, projection = self.cached("used", lambda: (self.weights[columns], self._projection_of(columns)))
        h = features[:, columns] if projection is None else (features @ projection.to(features.dtype)).relu_()
        return self.only_seen(h @ weights.to(features.dtype))

    def _projection_of(self, columns: Tensor) -> Tensor | None:
        return None if self.projection is None else self.projection[:, columns]

    @property
    def weights(self) -> Tensor:
        """W, float64 [M, C], with columns of norm 1 for the decision ``cosine``; 0 for what is not selected."""
        return self.cached("weights", self._solve)

    def feature_scores(self, score: Score) -> Tensor | None:
        if not bool((self.counts > 1).any()):
            return None
        squares = diagonals(self.triangle, self.width)
        if score == "f":
            return variance_ratios(squares, self.targets / self.totals.clamp(min=1)[:, None], self.totals)
        return squares * self._solution(None).square().sum(1)

    def solved_triangle(self) -> Tensor:
        """G of the regression, as ``triangle``; a subclass may know more than the samples."""
        return self.triangle

    def solved_targets(self) -> Tensor:
        """Qᵀ of the regression; as :meth:`solved_triangle`."""
        return self.targets

    def _solution(self, columns: Tensor | None) -> Tensor:
        """(G + λI)⁻¹Q of some columns of H, [k, C]; None: of all."""
        triangle, targets, strength = self.solved_triangle(), self.solved_targets(), float(self.strength_)
        if columns is None:
            return packed_ridge_solve(triangle, targets, strength).T

        def gram() -> Tensor:  # a function, so that no copy is kept beside the factor
            return unpack(triangle, self.width)[columns[:, None], columns]

        return ridge_solve(gram, targets[:, columns].T, strength)

    def _solve(self) -> Tensor:
        if not bool((self.counts > 1).any()):
            return self.nearest_mean(self.solved_targets())
        weights = self._solution(columns := self.selected)
        if columns is not None:
            weights = weights.new_zeros(self.width, self.num_classes).index_copy_(0, columns, weights)
        return F.normalize(weights, dim=0) if self.decision == "cosine" else weights

    def _errors(
        self, features: Tensor, labels: Tensor, generator: torch.Generator, roots: Tensor | None
    ) -> list[float]:
        """The error of every candidate for λ by the method ``strength``, given the samples of the current call."""
        if self.strength == "gcv":
            return self.generalised_errors()
        one_hot = F.one_hot(labels, self.num_classes).double()
        if roots is not None:
            one_hot *= roots
        if self.strength == "loo":
            return self.leave_one_out_errors(features, one_hot)
        order = torch.randperm(len(labels), generator=generator, device=generator.device).to(labels.device)
        return self.holdout_errors(features[order], one_hot[order])

    def holdout_errors(self, x: Tensor, y: Tensor) -> list[float]:
        """Mean squared error of every candidate on the last 20 % of (x, y), when fitted to the first 80 %.

        Both branches write the prediction as left · (s + λ)⁻¹ · right: with the kernel HₐHₐᵀ = U diag(s) Uᵀ it is
        (H_b Hₐᵀ U)(s + λ)⁻¹(Uᵀ Yₐ), with the Gram matrix HₐᵀHₐ = V diag(s) Vᵀ it is (H_b V)(s + λ)⁻¹(Vᵀ HₐᵀYₐ).
        """
        n = len(x) * 4 // 5
        if n < self.width:
            kernel = x.new_zeros(len(x), n)
            for columns in torch.arange(self.width, device=x.device).split(BLOCK):  # H is never held as a whole
                h = x[:, columns] if self.projection is None else (x @ self.projection[:, columns].to(x)).relu_()
                kernel.addmm_(h, h[:n].T)
            s, u = eigh_(kernel[:n].clone())
            left, right = kernel[n:] @ u, u.T @ y[:n]
        else:
            gram, targets = x.new_zeros(self.width, self.width), torch.zeros_like(self.targets)
            for rows in torch.arange(n, device=x.device).split(BLOCK):
                h = self.expand(x[rows])
                add_gram_(gram, h)
                targets.addmm_(y[rows].T, h)
            s, v = eigh_(gram)
            left, right = self.expand(x[n:]) @ v, v.T @ targets.T
        known = y[:n].any(0)[y[n:].argmax(1)]  # samples of a class that was fitted
        if not bool(known.all()):
            left, y = left[known], torch.cat([y[:n], y[n:][known]])
        if len(y) == n:
            return [math.inf] * len(STRENGTHS)
        return [((left / (s + strength)) @ right - y[n:]).square().mean().item() for strength in self.candidates]

    def leave_one_out_errors(self, x: Tensor, y: Tensor) -> list[float]:
        """Mean squared PRESS residual of every candidate on (x, y), which G and Q already contain."""
        repeated = self.counts[y.argmax(1)] > 1
        if not bool(repeated.all()):
            x, y = x[repeated], y[repeated]
        if not len(y):
            return [math.inf] * len(STRENGTHS)
        s, v = eigh_(self.gram)
        inverse = 1 / (s[:, None] + x.new_tensor(self.candidates))  # [M, 17]
        right = v.T @ self.targets.T
        errors = [0.0] * len(STRENGTHS)
        for part, expected in zip(x.split(BLOCK), y.split(BLOCK), strict=True):
            left = self.expand(part) @ v
            rest = 1 - left.square() @ inverse  # 1 − h_ii, [n, 17]
            for k in range(len(STRENGTHS)):
                residual = (expected - (left * inverse[:, k]) @ right) / rest[:, k, None]
                errors[k] += residual.square().sum().item() if bool(rest[:, k].min() >= RESOLVED) else math.inf
        return [error / y.numel() for error in errors]

    def generalised_errors(self) -> list[float]:
        """The error of every candidate on all samples so far.

        The squares of all one-hot labels sum up to the number of samples, or with ``balance`` of classes.
        """
        if not bool((self.counts > 1).any()):
            return [math.inf] * len(STRENGTHS)
        s, v = eigh_(self.gram)
        n = int(self.counts.sum())
        return generalised_errors(s, (self.targets @ v).square().sum(0), int(self.totals.sum()), n, self.candidates)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        gram = state_dict.pop(f"{prefix}gram", None)
        if gram is not None:
            state_dict[f"{prefix}triangle"] = pack(gram)
        super()._load_from_state_dict(state_dict, prefix, *args)
