"""Finalisers: scalings of the merged update whenever it is read. They never change a rule's state.

A finaliser multiplies each tensor of the update by one number. So finalisers can be combined with each other and with
every rule, and reading needs at most one additional pass, over norms.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from cil.errors import ConfigError

BLOCK = re.compile(r"^(.*?)\b(blocks|layers?|resblocks|h)\.(\d+)\.")
"""The start of the names of a block's tensors: the tower's name, the list's, and the block's number."""


class Finaliser(ABC):
    """Computes one factor per tensor of a merged update."""

    summary: ClassVar[str] = ""
    """What the finaliser does, in a phrase for lists."""
    paper: ClassVar[str] = ""
    """Where the finaliser comes from."""

    @abstractmethod
    def factors(self, norms: Mapping[str, float], mean_norm: float, count: int) -> dict[str, float]:
        """Return a factor for each name.

        Args:
            norms: ‖Δ‖_F of every tensor of the update, after the finalisers before this one.
            mean_norm: n̄, the mean of ‖τ_t‖₂ over the tasks.
            count: Number of tasks T.
        """


class NormMatching(Finaliser):
    """Scale the whole update to the tasks' mean norm: Δ ← Δ · scale · n̄ / ‖Δ‖₂, the norm rule of OPCM (2501.09522).

    Norms are over exactly the merged tensors. Without norm matching, the norm of an average of T orthogonal updates of
    equal norm falls as 1/√T.

    Args:
        scale: Norm of the result in units of n̄, > 0.
        cap: Whether only larger updates are scaled: an update below that norm does not change.

    Raises:
        ConfigError: ``scale`` is not positive.
    """

    summary = "scales the merged update to the tasks' mean norm"
    paper = "arXiv 2501.09522"

    def __init__(self, scale: float = 1.0, cap: bool = False) -> None:
        if not 0 < scale < math.inf:
            raise ConfigError(f"norm matching: scale is {scale}; it must be positive and finite")
        self.scale, self.cap = scale, cap

    def factors(self, norms: Mapping[str, float], mean_norm: float, count: int) -> dict[str, float]:
        norm = math.sqrt(math.fsum(n * n for n in norms.values()))
        factor = self.scale * mean_norm / norm if norm else 1.0
        return dict.fromkeys(norms, min(1.0, factor) if self.cap else factor)


class LiNeS(Finaliser):
    """Scale updates linearly with depth: block l of L by α + β l/(L−1), all other tensors by α (LiNeS, 2410.17146).

    Early blocks have general features and stay closer to the pre-trained ones. Blocks are recognised by name:
    ``blocks.<l>.`` in timm, ``layer(s).<l>.``, ``h.<l>.`` and ``resblocks.<l>.`` elsewhere. Each tower of a model has
    its own numbering. If a tower has one block, it counts as the last one and is scaled by α + β.

    Args:
        alpha: Scale of the first block, ≥ 0. ``"1/T"`` divides by the number of tasks. It equals the authors' choice
            (‖Σ τ‖ / ‖Δ‖)/T if the update Δ is the sum of the tasks' updates; for other updates pass a number.
        beta: Additional scale of the last block, ≥ 0. The default is 1 − α, which the authors use for a single model;
            after merging they choose it on validation data.

    Raises:
        ConfigError: A number is out of range or, when the update is read, the model has no numbered blocks.
    """

    summary = "scales the merged update linearly with depth"
    paper = "arXiv 2410.17146"

    def __init__(self, alpha: float | Literal["1/T"] = 0.5, beta: float | None = None) -> None:
        for name, value in (("alpha", alpha), ("beta", beta)):
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise ConfigError(f"LiNeS: {name} is {value}; it must be at least 0 and finite")
        if isinstance(alpha, str) and alpha != "1/T":
            raise ConfigError(f"LiNeS: alpha is {alpha!r}; it must be a number or '1/T'")
        if not isinstance(alpha, str) and beta is None and alpha > 1:
            raise ConfigError(f"LiNeS: alpha is {alpha}, so beta = 1 − alpha would be negative; give beta")
        self.alpha, self.beta = alpha, beta

    def factors(self, norms: Mapping[str, float], mean_norm: float, count: int) -> dict[str, float]:
        alpha = 1 / max(1, count) if isinstance(self.alpha, str) else self.alpha
        beta = 1 - alpha if self.beta is None else self.beta
        matches = {name: match for name in norms if (match := BLOCK.match(name))}
        if not matches:
            raise ConfigError("LiNeS: no tensor belongs to a numbered block (blocks.<l>., layers.<l>., …); drop LiNeS")
        last: dict[str, int] = {}
        for match in matches.values():
            tower = match[1] + match[2]
            last[tower] = max(last.get(tower, 0), int(match[3]))
        factors = dict.fromkeys(norms, alpha)
        for name, match in matches.items():
            depth = last[match[1] + match[2]]
            factors[name] = alpha + beta * (int(match[3]) / depth if depth else 1.0)
        return factors
