"""Several frozen backbones as one: their features side by side, from one packed tensor of images."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from cil.backbone.backbone import FROZEN, Backbone
from cil.backbone.loading import load_backbone
from cil.backbone.vit import Tuner, feature_width
from cil.config import CombineConfig, Config
from cil.errors import BackboneError

ONE_ONLY = (
    "several backbones (the key backbones) are used by their frozen features alone, and this learner has a tuner, "
    "prompts, layers or weights to train, which belong to one; give it tuner: null if it has that key, use a learner "
    "on frozen features (ncm, slda, ranpac, …), or one backbone"
)


class Member:
    """The view of one backbone of several: packed images → its features.

    Args:
        backbones: The backbones.
        index: Place of the one.
        tuner: Tuner that is inserted into it; None: none.

    Attributes:
        backbone: The backbone.
        index: Its place among them.
        tuner: The tuner.
        view: The view of the backbone's own images: the backbone, or ``partial(backbone, tuner=…)``.
    """

    def __init__(self, backbones: Backbones, index: int, tuner: Tuner | None = None) -> None:
        self.backbone, self.index, self.tuner, self._cut = backbones.members[index], index, tuner, backbones.cut
        self.view = self.backbone if tuner is None else partial(self.backbone, tuner=tuner)

    @property
    def feature_dim(self) -> int:
        """Width of the features."""
        return feature_width(self.backbone, self.tuner)

    @property
    def model(self) -> NoReturn:
        """Refused, as for all members together: nothing may be inserted into one of them.

        Raises:
            BackboneError: Always.
        """
        raise BackboneError(ONE_ONLY)

    def __call__(self, images: Tensor) -> Tensor:
        return self.view(self._cut(images, self.index))


class Backbones(Backbone):
    """Two or more frozen backbones with the interface of one; features are those of all members, in order.

    The members differ in image size, cropping and normalisation, so an image is *packed*: slice k of the tensor
    [3, N], N = Σ S_k², is the image under member k's own transforms
    (:class:`~cil.data.packed.PackedTransforms`), and its features are those of member k's own run.

    Args:
        members: The backbones, two or more.
        combine: How their features become those of one.

    Attributes:
        widths: Width F_k of each member's features.
        feature_dim: Σ F_k.
        name: The members' names, joined by " + ".
        fingerprint: sha256 of the members' fingerprints, joined by newlines.
        data_config: ``members`` has theirs, ``input_size`` is that of a packed image, (3, 1, N).
    """

    members: Sequence[Backbone]

    def __init__(self, members: Sequence[Backbone], combine: CombineConfig | None = None) -> None:
        nn.Module.__init__(self)
        self.facts = {}
        self.members = nn.ModuleList(members)  # type: ignore[assignment]
        self.combine = combine or CombineConfig()
        self.sides = tuple(member.input_size[-1] for member in members)
        self.widths = tuple(member.feature_dim for member in members)
        self.feature_dim = sum(self.widths)
        self.name = " + ".join(member.name for member in members)
        self.fingerprint = hashlib.sha256("\n".join(member.fingerprint for member in members).encode()).hexdigest()
        pixels = sum(side**2 for side in self.sides)
        self.data_config = {"input_size": (3, 1, pixels), "members": [member.data_config for member in members]}

    @property
    def model(self) -> NoReturn:
        """There is no single timm model.

        Raises:
            BackboneError: Always.
        """
        raise BackboneError(ONE_ONLY)

    @property
    def passes(self) -> int:  # type: ignore[override]  # nothing sets it
        """Number of images sent through a member so far: an image that passes through all K counts K times."""
        return sum(member.passes for member in self.members)

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    def cut(self, images: Tensor, index: int) -> Tensor:
        """The images [B, 3, S, S] of member ``index`` in packed images [B, 3, N]."""
        start, side = sum(side**2 for side in self.sides[:index]), self.sides[index]
        # contiguous, as the member's own images are: kernels may round by alignment and strides
        return images[:, :, start : start + side**2].unflatten(2, (side, side)).contiguous()

    def forward(self, images: Tensor, tuner: Tuner | None = None) -> Tensor:
        """Compute features [B, ΣF_k] of packed normalised images, float [B, 3, N].

        Raises:
            BackboneError: There is a tuner.
        """
        if tuner is not None:
            raise BackboneError(ONE_ONLY)
        return torch.cat([view(images) for view in self.views().values()], dim=1)

    def views(self) -> dict[Hashable, Callable[[Tensor], Tensor]]:
        """One view for each member, which is cached and stored as the view of a run with that backbone alone."""
        return {(FROZEN, k): Member(self, k) for k in range(len(self.members))}

    def require_frozen(self, views: Iterable[Callable[[Tensor], Tensor]]) -> None:
        """Refuse a learner that sees images in another way than through the frozen features of the members.

        Args:
            views: The learner's views.

        Raises:
            BackboneError: A view is not that of a member.
        """
        if not all(isinstance(view, Member) and view.tuner is None for view in views):
            raise BackboneError(ONE_ONLY)

    def _apply(self, *args: Any, **kwargs: Any) -> Backbones:
        for member in self.members:
            member._apply(*args, **kwargs)
        return self


def load_backbones(config: Config, device: str | torch.device = "cpu") -> Backbone:
    """Load the frozen backbone of a configuration, or its several ones as one.

    Raises:
        BackboneError: As :func:`load_backbone`; of several, the message says which.
    """
    if config.backbones is None:
        return load_backbone(config.backbone, device)
    members = []
    for k, section in enumerate(config.backbones):
        try:
            members.append(load_backbone(section, device))
        except BackboneError as error:
            raise BackboneError(re.sub(r"\bbackbone\.(?=\w)", f"backbones.{k}.", str(error))) from None
    return Backbones(members, config.combine)


def backbone_facts(backbone: Backbone) -> dict[str, Any]:
    """What results record about a backbone: its name, the sha256 of its weights, the width of its features, and what
    else was needed to build it."""
    facts = {"name": backbone.name, "sha256": backbone.fingerprint, "feature_dim": backbone.feature_dim}
    return {**facts, **backbone.facts}
