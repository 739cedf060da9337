"""What is done to the accumulated update when it is read out. Never fed back into a rule's state.

A finaliser multiplies every tensor of the update by a number of its own, so any of them compose with any rule, and a
read-out needs one more pass over norms at most.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

from cil.errors import ConfigError

_BLOCK = re.compile(r"^(.*?)\b(blocks|layers?|resblocks|h)\.(\d+)\.")


class Finaliser(ABC):
    """Factors of the tensors of a merged update."""

    @abstractmethod
    def factors(self, norms: Mapping[str, float], mean_norm: float, count: int) -> dict[str, float]:
        """Name → factor.

        Args:
            norms: ‖Δ‖_F of every tensor of the update as it stands, finalisers before this one applied.
            mean_norm: n̄, the mean of ‖τ_t‖₂ over the tasks.
            count: Number of tasks T.
        """


class NormMatching(Finaliser):
    """Scale the whole update to the tasks' mean norm: Δ ← Δ · scale · n̄ / ‖Δ‖₂, the norm rule of OPCM (2501.09522).

    Norms count exactly the merged tensors. Without it the norm of an average of T orthogonal updates falls as 1/√T.

    Args:
        scale: > 0, share of the mean norm.
        cap: Only ever shrink: an update below that norm stays as it is.

    Raises:
        ConfigError: ``scale`` is not positive.
    """

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

    Early blocks carry general features and stay closer to the pre-trained ones. Blocks are found by name:
    ``blocks.<l>.`` in timm, ``layer(s).<l>.``, ``h.<l>.`` and ``resblocks.<l>.`` elsewhere, counted in every tower of a
    model by itself. A tower of one block counts as its own last one, so it is scaled by α + β.

    Args:
        alpha: ≥ 0, scale of the first block; ``"1/T"`` divides by the number of tasks, which is the authors' choice
            (‖Σ τ‖ / ‖Δ‖)/T for an update Δ that is the sum of the tasks' updates. Other sums: give the number.
        beta: ≥ 0, what the last block gets on top. Default 1 − α, as the authors take for a single model; they choose
            it on validation data after merging.

    Raises:
        ConfigError: A number out of range, or at read-out a model without numbered blocks.
    """

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
        places = {name: found for name in norms if (found := _BLOCK.match(name))}
        if not places:
            raise ConfigError("LiNeS: no tensor belongs to a numbered block (blocks.<l>., layers.<l>., …); drop it")
        last: dict[str, int] = {}
        for found in places.values():
            tower = found[1] + found[2]
            last[tower] = max(last.get(tower, 0), int(found[3]))
        factors = dict.fromkeys(norms, alpha)
        for name, found in places.items():
            depth = last[found[1] + found[2]]
            factors[name] = alpha + beta * (int(found[3]) / depth if depth else 1.0)
        return factors
