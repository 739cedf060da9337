"""The base of all classifiers: it checks the input, grows with the classes, and computes solutions on demand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from cil.errors import ConfigError, DataError
from cil.utils.precision import exact

Array = Tensor | np.ndarray
T = TypeVar("T")
C = TypeVar("C", bound="Classifier")

LARGEST_LABEL = 2**20
"""A larger label is an identifier and not a class number; room for so many classes would exhaust the memory."""


def match_saved_shapes(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str = "", *, rows_only: bool = True
) -> None:
    """Give parameters and buffers their shapes in ``state_dict``, so that it can be loaded although classes were added.

    Parameters are replaced by new ones, as in growing: build optimisers afterwards.

    Args:
        module: Heads or statistics that grow with the classes.
        state_dict: Saved tensors by name.
        prefix: Prefix of the module's names in ``state_dict``.
        rows_only: Whether to adapt only the first dimension; ``load_state_dict`` then refuses any other difference.
    """
    for name, part in module.named_modules(prefix=prefix.removesuffix(".")):
        for kind in (part._parameters, part._buffers):
            for key, old in kind.items():
                saved = state_dict.get(f"{name}.{key}" if name else key)
                if old is None or saved is None or old.shape == saved.shape:
                    continue
                if not rows_only or (old.ndim and saved.ndim and old.shape[1:] == saved.shape[1:]):
                    fresh = torch.zeros(saved.shape, dtype=old.dtype, device=old.device)
                    kind[key] = nn.Parameter(fresh, old.requires_grad) if isinstance(old, nn.Parameter) else fresh


class Classifier(nn.Module, ABC):
    """Maps features [B, F] to logits [B, C]; it learns from features and labels in any number of calls.

    All state is in parameters and buffers, so ``state_dict()`` can be loaded into any classifier with the same
    arguments, even one that has not grown yet. Values derived from this state (weights, factors) are computed when
    logits need them, cached until the statistics change, and never saved.

    Features may be tensors or numpy arrays. Logits are float64 for float64 features and float32 for all others.

    Args:
        feature_dim: Feature width F.

    Raises:
        ConfigError: ``feature_dim`` is not positive.
    """

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        if not isinstance(feature_dim, int | np.integer) or feature_dim < 1:
            raise ConfigError(f"{type(self).__name__}: feature_dim is {feature_dim!r}; it must be an integer ≥ 1")
        self.feature_dim = int(feature_dim)
        self._solved: dict[Any, Any] = {}

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes C that the classifier has room for."""

    @abstractmethod
    def grow(self, classes: int) -> None:
        """Make room for labels 0…classes−1 without changing what was learned; a classifier never shrinks."""

    @abstractmethod
    def partial_fit(self: C, features: Array, labels: Array) -> C:
        """Learn from features [N, F] (floating point, finite) with labels [N] (integers ≥ 0); grow to the largest.

        Raises:
            DataError: A shape, type or value is wrong; nothing is learned then.
        """

    @abstractmethod
    def logits(self, features: Array) -> Tensor:
        """Compute scores [B, C] of features [B, F]; a class without samples scores −∞.

        Raises:
            DataError: A shape, type or value is wrong.
        """

    @property
    def device(self) -> torch.device:
        return next(iter(self.state_dict().values())).device

    def checked(self, features: Array) -> Tensor:
        """Check features [N, F] and return them as a float32 or float64 tensor on the classifier's device.

        Raises:
            DataError: The shape or type is wrong, or a value is not finite.
        """
        name = type(self).__name__
        x = features if isinstance(features, Tensor) else torch.from_numpy(_numeric(features, f"{name}: features"))
        if x.ndim != 2 or x.shape[1] != self.feature_dim:
            raise DataError(f"{name}: features have shape {list(x.shape)}; expected [N, {self.feature_dim}]")
        if not x.is_floating_point():
            raise DataError(f"{name}: features are {x.dtype}; expected floating point numbers")
        x = x.to(self.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
        # an exported program cannot branch on values
        if not torch.compiler.is_exporting() and not bool(torch.isfinite(x).all()):
            raise DataError(f"{name}: some features are NaN or infinite")
        return x

    def checked_labels(self, labels: Array, count: int) -> Tensor:
        """Check the labels of ``count`` samples and return them as int64 [count] on the classifier's device.

        Raises:
            DataError: The shape or type is wrong, or a label is negative or too large.
        """
        name = type(self).__name__
        y = labels if isinstance(labels, Tensor) else torch.from_numpy(_numeric(labels, f"{name}: labels"))
        if y.ndim != 1 or len(y) != count:
            raise DataError(
                f"{name}: labels have shape {list(y.shape)} for {count} features; expected [{count}], one class number "
                "per row"
            )
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise DataError(f"{name}: labels are {y.dtype}; expected integers")
        y = y.to(self.device, torch.int64)
        if count and int(y.min()) < 0:
            raise DataError(f"{name}: the smallest label is {int(y.min())}; labels count from 0")
        if count and int(y.max()) > LARGEST_LABEL:
            raise DataError(
                f"{name}: the largest label is {int(y.max())}; labels are class numbers up to {LARGEST_LABEL}, so "
                "number the classes from 0"
            )
        return y

    def prepare_fit(self, features: Array, labels: Array) -> tuple[Tensor, Tensor]:
        """Check training data, grow to the largest label, and drop the cached solutions that the data changes.

        Returns:
            Features, float64 [N, F], and labels, int64 [N].

        Raises:
            DataError: A shape, type or value is wrong.
        """
        name = type(self).__name__
        x = self.checked(features).double()
        if not len(x):
            raise DataError(f"{name}: there are no samples to learn from")
        y = self.checked_labels(labels, len(x))
        self.grow(int(y.max()) + 1)
        self._forget(y)
        return outside_inference(x), outside_inference(y)

    def cached(self, key: Hashable, solve: Callable[[], T]) -> T:
        """Return ``solve()`` for the current statistics; it is computed once and cached under ``key``."""
        if key not in self._solved:
            with exact():
                self._solved[key] = solve()
        solution: T = self._solved[key]
        return solution

    def _forget(self, labels: Tensor | None = None) -> None:
        """Drop the cached solutions after the statistics of ``labels`` (None: of all classes) have changed."""
        self._solved.clear()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._forget()  # called by .to(), .double(), …
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        self._forget()
        match_saved_shapes(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def outside_inference(x: Tensor) -> Tensor:
    """``x``, copied if it was made in inference mode, because autograd refuses such tensors."""
    return x.clone() if x.is_inference() else x


def _numeric(values: Any, what: str) -> np.ndarray:
    try:
        array = np.array(values)
    except ValueError as error:  # rows of different lengths
        raise DataError(f"{what} are not an array: {error}") from None
    if array.dtype.kind not in "fiu":
        raise DataError(f"{what} are of type {array.dtype}; expected numbers")
    # torch knows neither more than 64 bits nor the other byte order
    known = np.dtype(np.float64) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    return array.astype(known, copy=False)
