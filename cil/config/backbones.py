"""The sections of a configuration that name the backbone, or several and how their features are combined."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat

from cil.config.section import Section
from cil.utils.paths import expand

Place = Annotated[Path, AfterValidator(expand)]
"""A path, with ``~`` and environment variables expanded."""


class BackboneConfig(Section):
    """A pre-trained vision transformer."""

    name: str = Field(
        "vit_tiny_patch8_64.tinyimagenet100",
        description="timm name with its tag, hf-hub:<org>/<model>, local-dir:<folder> or "
        "open_clip/<architecture>.<tag>; default: the model that ships with cil",
    )
    weights: Place | Literal["random"] | None = Field(
        None,
        description="local file that timm reads: safetensors, torch, or npz for JAX; for open_clip/ also a folder; "
        "random: untrained, from seed 0; default: pre-trained",
    )
    options: dict[str, Any] = Field(
        {},
        description="further arguments of timm.create_model, e.g. img_size; for open_clip/ keys of its architecture",
    )
    features: Literal["pooled", "joint"] = Field(
        "pooled",
        description="features of a vision-language model; pooled: of its image tower; joint: after the projection to "
        "the space that images share with texts, which is narrower",
    )
    source_head: bool = Field(
        False,
        description="whether the classifier that the weights come with is kept, for co_tuning and for the score LEEP "
        "of cil rank-backbones; options.num_classes is the number of its classes, by default the architecture's",
    )
    attention: Literal["timm", "explicit"] = Field(
        "timm",
        description="implementation of attention; timm: as timm chooses, usually torch's fused attention; explicit: an "
        "explicit softmax, which trains up to twice as fast on a CPU in bf16",
    )


MOST_STACKED = 12
"""Largest number of backbones that ``combine.weights: stack`` takes."""


class CombineConfig(Section):
    """How the features of several backbones become those of one: x = [√w₁ x₁/r₁, …, √w_K x_K/r_K]. Scales r and
    weights w are computed on the training images of the first task and never changed."""

    scale: Literal["rms", "unit", "none"] = Field(
        "rms",
        description="scale r of a backbone's features; rms: the root mean square of their entries on the first task; "
        "unit: the length of each image's features; none: 1",
    )
    weights: Literal["equal", "logme", "loo", "stack"] | list[NonNegativeFloat] = Field(
        "equal",
        description="weights w of the backbones, with sum 1: equal, by LogME, by leave-one-out accuracy, by stacking "
        "leave-one-out predictions, or one number ≥ 0 for each backbone",
    )
    heads: Literal["joint", "logit", "probability"] = Field(
        "joint",
        description="classifier; joint: one on the joined features; logit, probability: one on each backbone's "
        "features, whose calibrated scores or probabilities are averaged by the weights",
    )


def as_backbone(raw: Any) -> Any:
    """Expand a bare name to a section: ``vit_base_patch16_224`` to ``{name: vit_base_patch16_224}``."""
    return {"name": raw} if isinstance(raw, str) else raw


def fault_of_several(backbones: list[BackboneConfig] | None, combine: CombineConfig | None, also_one: bool) -> str:
    """What is wrong with the keys ``backbones`` and ``combine``; an empty string if nothing is.

    Args:
        backbones: The section ``backbones``.
        combine: The section ``combine``.
        also_one: Whether ``backbone`` is given, too.
    """
    if backbones is None:
        return "" if combine is None else "combine: it joins the features of several backbones; give backbones: […]"
    if also_one:
        return "give backbone or backbones, not both"
    if len(backbones) < 2:
        return f"backbones: got {len(backbones)}, expected two or more; for a single one use backbone"
    weights = combine.weights if combine is not None else "equal"
    if not isinstance(weights, str) and len(weights) != len(backbones):
        return f"combine.weights: got {len(weights)} numbers for {len(backbones)} backbones; give one for each"
    if weights == "stack" and len(backbones) > MOST_STACKED:
        return (
            f"combine.weights: stack tries every subset of the backbones and takes {MOST_STACKED} at most, got "
            f"{len(backbones)}; leave some out, or set loo"
        )
    if not isinstance(weights, str) and not any(weights):
        return "combine.weights: all are 0; at least one must be positive"
    return ""
