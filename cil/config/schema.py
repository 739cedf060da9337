"""The keys of a configuration, each with its type, range and meaning.

This module needs pydantic but not torch, so importing it is cheap. Reading YAML, overriding keys and formatting error
messages is in :mod:`cil.config.reading`. A learner's own hyper-parameters are validated by its ``Config`` once the
learner is loaded.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from cil.config.backbones import BackboneConfig, CombineConfig, Place, as_backbone, fault_of_several
from cil.config.cleaning import NoiseFilter, Pseudo
from cil.config.names import alike, check_name, check_plain
from cil.config.numbers import check_order, mark_truth
from cil.config.section import Section, as_section
from cil.config.streams import StreamConfig
from cil.errors import shortened

LARGEST_IMAGE = 2**14  # pixels per side
Unit = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0)]
Deviation = Annotated[float, Field(ge=1e-6)]  # of pixels in [0, 1]
Name = Annotated[str, AfterValidator(check_name)]
"""A name that becomes a folder."""
Seed = Annotated[int, BeforeValidator(mark_truth), AfterValidator(check_order)]
ClassOrder = Annotated[int | str | list[int] | list[str], BeforeValidator(mark_truth), AfterValidator(check_order)]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]
MAX_PIXELS = 178_956_970
"""Pixels of the largest image that PIL reads by default."""


class Normalization(Section):
    """Channel statistics in [0, 1] pixel units: (pixel / 255 − mean) / std."""

    mean: Unit
    std: tuple[Deviation, Deviation, Deviation]


class Augmentation(Section):
    """The training transform: random resized crop, flip and colour jitter (timm's, without random erasing)."""

    scale: tuple[Positive, Positive] = Field(
        (0.08, 1.0), description="smallest and largest area of the random crop, as fractions of the image"
    )
    ratio: tuple[Positive, Positive] = Field(
        (3 / 4, 4 / 3), description="smallest and largest aspect ratio of the random crop"
    )
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    color_jitter: NonNegativeFloat | tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] | None = Field(
        None, description="strength of brightness, contrast and saturation jitter: one number for all three, or three"
    )
    interpolation: Interpolation | None = Field(
        None, description="resampling filter; default: that of the test transform"
    )


class TransformConfig(Section):
    """Overrides of the backbone's own data configuration; every default means 'as the backbone was trained'."""

    normalize: Literal["backbone", "none"] | Normalization = Field(
        "backbone", description="pixel statistics: those of the backbone, none ([0, 1] pixels), or {mean: …, std: …}"
    )
    resize: PositiveInt | None = Field(
        None,
        le=LARGEST_IMAGE,
        description="size in pixels to which images are resized, before they are cropped to the input size",
    )
    crop: Literal["center", "squash", "border"] | None = Field(
        None,
        description="way of resizing; center: shorter side, then a crop; squash: both sides, no crop; border: as timm",
    )
    interpolation: Interpolation | None = Field(None, description="resampling filter")
    augment: Augmentation | Literal["none"] = Field(
        Augmentation(), description="training transform; none: train under the test transform"
    )


class DataConfig(Section):
    """A dataset by name, and where its splits are stored."""

    dataset: str = Field(
        "digits",
        description="dataset: digits, folder (class folders, tars, CSV files), torch/<set>, hfds/<org>/<set>, or your "
        "own function, as pkg.module:function or path/file.py:function",
    )
    root: Place | None = Field(None, description="folder with the splits; downloads are stored there")
    train: str | None = Field(None, description="training split: a path below root, or the name of a split for hfds")
    test: str | None = Field(None, description="test split, in the same form as train")
    domains: list[str] | None = Field(
        None, description="folders below root, one per domain, each with a train and a test split"
    )
    download: bool = Field(True, description="whether to download torchvision datasets that are not in root")
    image_key: str | None = Field(None, description="column of the images, for hfds; default: image")
    label_key: str | None = Field(None, description="column of the labels, for hfds; default: label")
    class_names: Place | None = Field(
        None,
        description="YAML file with the words for each class (class folder: words), in place of the folders' names",
    )
    on_error: Literal["raise", "skip"] = Field("raise", description="treatment of a file that is no readable image")
    max_pixels: PositiveInt = Field(
        MAX_PIXELS,
        description="number of pixels (width × height) above which an image is not decoded but treated as unreadable; "
        "default: the limit of PIL, against small files that fill the memory",
    )
    per_class: PositiveInt | None = Field(
        None, description="number of training images per class; the first ones are used"
    )
    options: dict[str, Any] = Field({}, description="further arguments of your own function")


class HardwareConfig(Section):
    """Settings of the machine. They are not part of a run's identity."""

    device: str = Field("auto", description="device: auto, cpu, cuda, cuda:1 or mps")
    workers: int = Field(2, ge=0, le=1024, description="number of processes or threads that decode images")
    memory_gib: float = Field(
        4.0,
        ge=0,
        allow_inf_nan=True,
        description="GiB per split: decoded and transformed images are kept in memory if each set fits, and so are "
        "tokens that are the same in every epoch",
    )
    checkpoints: Literal["auto", "all", "last"] = Field(
        "auto",
        description="stages whose weights stay on disk; auto: all, but above 256 MiB each only until the next stage is "
        "written",
    )
    feature_store: Literal["off"] | Place | None = Field(
        None,
        description="folder of computed features that all runs share, or off; default: features in $CIL_CACHE, or in "
        "cil's folder of the user's cache",
    )
    feature_store_gib: float = Field(
        20.0,
        gt=0,
        allow_inf_nan=True,
        description="GiB of that folder; above it the least recently used entries are removed",
    )

    @field_validator("feature_store", mode="before")
    @classmethod
    def _off(cls, raw: Any) -> Any:
        return "off" if raw is False else raw  # YAML reads off as false


class LearnerEntry(BaseModel):
    """One learner: its ``name`` or ``class``, its hyper-parameters, and ``orders``, ``seeds``, ``chosen_by``,
    ``noise_filter`` and ``pseudo`` where they differ from those of the configuration."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)
    name: str | None = Field(None, description="name of a registered learner")
    cls: str | None = Field(
        None, alias="class", description="your own learner, as pkg.module:Class or path/file.py:Class"
    )
    label: Name | None = Field(None, description="name in results; distinguishes settings of the same learner")
    orders: list[ClassOrder] | None = None
    seeds: list[Seed] | None = None
    chosen_by: str | None = None
    noise_filter: NoiseFilter | None = None
    pseudo: Pseudo | None = None

    @model_validator(mode="after")
    def _one(self) -> LearnerEntry:
        if (self.name is None) == (self.cls is None):
            raise ValueError("give a learner either a name or a class")
        check_name(self.title)
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """Hyper-parameters as written, not yet validated."""
        return dict(self.model_extra or {})

    @property
    def spec(self) -> str:
        """What the registry resolves."""
        return self.name or self.cls or ""

    @property
    def title(self) -> str:
        """Name in results: the label, the registered name, or the class's own name."""
        return self.label or self.name or (self.cls or "").rsplit(":", 1)[-1]


class Config(Section):
    """A benchmark: one stream and backbone (or several, as one), and the learners, class orders and seeds to run on
    them."""

    name: Annotated[str, AfterValidator(check_plain)] = Field(
        "benchmark",
        description="name of the folder below the results folder; default: that of the configuration's file",
    )
    data: DataConfig = DataConfig()
    stream: StreamConfig = StreamConfig()
    backbone: BackboneConfig = BackboneConfig()
    backbones: list[BackboneConfig] | None = Field(
        None, description="two or more backbones, in place of backbone, whose frozen features are used together"
    )
    combine: CombineConfig | None = Field(None, description="joining of the features of several backbones")
    transform: TransformConfig = TransformConfig()
    learners: list[LearnerEntry] = Field(min_length=1)
    orders: list[ClassOrder] = Field(
        [1993], min_length=1, description="class orders: seeds of permutations, natural, or lists of classes"
    )
    seeds: list[Seed] = Field([0], min_length=1, description="training seeds")
    inference_batch_size: PositiveInt = Field(128, description="images per forward pass outside training")
    precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        "fp32",
        description="mixed precision of the backbone; auto: bf16 if it takes at most nine tenths of fp32's time here, "
        "else fp32; timed for a second before the first run, recorded with it, and kept if it is resumed or repeated",
    )
    confidence: bool = Field(
        False,
        description="whether probabilities are calibrated on the held-out training images (stream.validation) after "
        "each stage, and images of unknown classes can be rejected; both are measured",
    )
    chosen_by: str = Field(
        "default",
        description="how hyper-parameters were chosen, e.g. default, first_task, proxy or paper; stored with results",
    )
    noise_filter: NoiseFilter | None = Field(
        None, description="filter of training images whose labels look wrong within their task; null: none"
    )
    pseudo: Pseudo | None = Field(None, description="labels for the unlabelled images of stream.labelled; null: none")
    hardware: HardwareConfig = HardwareConfig()

    @model_validator(mode="before")
    @classmethod
    def _singular(cls, raw: Any) -> Any:
        """``learner: ncm`` is short for ``learners: [{name: ncm}]``."""
        if isinstance(raw, dict) and "learner" in raw:
            if "learners" in raw:
                raise ValueError("give learner or learners, not both")
            raw = {**raw, "learners": [raw["learner"]]}
            del raw["learner"]
        return raw

    @model_validator(mode="before")
    @classmethod
    def _several(cls, raw: Any) -> Any:
        """Beside ``backbones``, ``backbone: null`` takes back that of an extended file; ``combine`` has defaults."""
        if not isinstance(raw, dict) or raw.get("backbones") is None:
            return raw
        raw = {key: value for key, value in raw.items() if key != "backbone" or value is not None}
        return {"combine": {}, **raw}

    @model_serializer(mode="wrap")
    def _one_or_several(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys that say nothing are left out: with one backbone those of several, and the other way round."""
        left_out = {"backbones", "combine"} if self.backbones is None else {"backbone"}
        # later keys: older runs are described as before
        left_out |= {key for key in ("noise_filter", "pseudo") if getattr(self, key) is None}
        return {key: value for key, value in serialized(self).items() if key not in left_out}

    @field_validator("backbones", mode="before")
    @classmethod
    def _backbone_names(cls, raw: Any) -> Any:
        return [as_backbone(item) for item in raw] if isinstance(raw, list) else raw

    @field_validator("learners", mode="before")
    @classmethod
    def _names(cls, raw: Any) -> Any:
        return [as_section(item) for item in raw] if isinstance(raw, list) else raw

    @model_validator(mode="after")
    def _fit_together(self) -> Config:
        if fault := fault_of_several(self.backbones, self.combine, "backbone" in self.model_fields_set):
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _unlabelled(self) -> Config:
        wanted = self.pseudo or next((entry.pseudo for entry in self.learners if entry.pseudo), None)
        if wanted is not None and self.stream.labelled is None:
            raise ValueError("pseudo needs images without labels; set stream.labelled, e.g. to 0.2")
        for key in ("noise_filter", "pseudo"):
            if self.stream.online is not None and any(getattr(one, key) for one in (self, *self.learners)):
                raise ValueError(
                    f"{key} needs all images of a task, and stream.online shows a few at a time; remove one"
                )
        return self

    @model_validator(mode="after")
    def _held_out(self) -> Config:
        if self.confidence and (not self.stream.validation or self.stream.test_on == "validation"):
            raise ValueError(
                "confidence: true needs held-out training images that are not tested on; set stream.validation, e.g. "
                "0.1, and stream.test_on: test"
            )
        return self

    @model_validator(mode="after")
    def _distinct(self) -> Config:
        found: dict[str, str] = {}
        for title in (entry.title for entry in self.learners):
            if alike(title) in found:
                both = " and ".join(dict.fromkeys(shortened(one) for one in (found[alike(title)], title)))
                raise ValueError(f"two learners are called {both} and would share a results folder; give each a label")
            found[alike(title)] = title
        return self
