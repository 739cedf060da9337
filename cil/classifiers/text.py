"""Class prototypes made of texts, compared with images by cosine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cil.classifiers.base import match_saved_shapes
from cil.utils.precision import without_autocast


class TextClassifier(nn.Module):
    """z_c(x) = s · cos(p(f), t_c) + b, with p(f) = f P + o: the logits of CLIP (Radford et al., arXiv 2103.00020).

    t_c is the prototype of class c in the joint space, and is taken as it is: a prototype that is shorter than 1 lowers
    its class. All state is in buffers, so that a stored classifier needs no text tower.

    Args:
        width: Width d of the joint space.
        scale: The factor s.
        bias: The offset b of all logits.
        projection: P, float32 [F, d]; None if features are in the joint space.
        offset: o, float32 [d]; None for none.

    Buffers:
        prototypes: float32 [C, d], NaN for a class without text, which scores −∞; projection and offset are empty where
        there is none.
    """

    prototypes: Tensor
    projection: Tensor
    offset: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(
        self,
        width: int,
        scale: float = 1.0,
        bias: float = 0.0,
        projection: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("prototypes", torch.zeros(0, width))
        self.register_buffer("projection", torch.zeros(0, 0) if projection is None else projection.clone())
        self.register_buffer("offset", torch.zeros(0) if offset is None else offset.clone())
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("bias", torch.tensor(bias))

    @property
    def width(self) -> int:
        """Width d of the joint space."""
        return self.prototypes.shape[1]

    @property
    def known(self) -> Tensor:
        """Whether each class has a text, bool [C]."""
        return self.prototypes.isfinite().all(1)

    def grow(self, classes: int) -> None:
        """Make room for labels 0…classes−1."""
        new = classes - len(self.prototypes)
        if new > 0:
            rows = self.prototypes.new_full((new, self.prototypes.shape[1]), torch.nan)
            self.prototypes = torch.cat([self.prototypes, rows])

    def set(self, label: int, prototype: Tensor) -> None:
        """Store the prototype [d] of a class."""
        self.prototypes[label] = prototype.to(self.prototypes)

    @without_autocast()
    def project(self, features: Tensor) -> Tensor:
        """Features [B, F] → [B, d] in the joint space, not normalised, in the features' precision."""
        features = features if features.dtype == torch.float64 else features.float()
        joint = features @ self.projection.to(features.dtype) if self.projection.numel() else features
        return joint + self.offset.to(features.dtype) if self.offset.numel() else joint

    @without_autocast()
    def logits(self, features: Tensor) -> Tensor:
        """Scores [B, C] of features [B, F]."""
        joint = F.normalize(self.project(features), dim=1)
        scores = self.scale.to(joint.dtype) * joint @ self.prototypes.T.to(joint.dtype) + self.bias.to(joint.dtype)
        return scores.masked_fill(~self.known, float("-inf"))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        match_saved_shapes(self, state_dict, prefix, rows_only=False)
        super()._load_from_state_dict(state_dict, prefix, *args)
