"""What a configuration may say: the models of a run, each key with its type, range and meaning.

Plain pydantic, no torch: importing this is cheap. Reading YAML, overriding keys and wording the errors is
:mod:`cil.configfile`; a learner's own hyper-parameters are validated by its ``Config`` once it is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

Unit = tuple[float, float, float]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]


def named(raw: Any) -> Any:
    """A bare name as the section that has only that name: ``adapter`` is ``{name: adapter}``, and ``mine.py:Mine`` is
    ``{class: mine.py:Mine}``."""
    return {"class" if ":" in raw else "name": raw} if isinstance(raw, str) else raw


class Section(BaseModel):
    """A frozen model that forbids unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Normalization(Section):
    """Channel statistics in [0, 1] pixel units: (pixel / 255 − mean) / std."""

    mean: Unit
    std: Unit


class Augmentation(Section):
    """The training transform: random resized crop, flip and colour jitter (timm's, without random erasing)."""

    scale: tuple[float, float] = Field((0.08, 1.0), description="area of the random crop as a fraction of the image")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="aspect ratio of the random crop")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    color_jitter: Annotated[float, Field(ge=0)] | Unit | None = Field(
        None, description="strength of brightness, contrast and saturation jitter: one for all, or one each"
    )
    interpolation: Interpolation | None = Field(None, description="resampling filter; default: the test transform's")


class TransformConfig(Section):
    """Overrides of the backbone's own data configuration; every default means 'as the backbone was trained'."""

    normalize: Literal["backbone", "none"] | Normalization = Field(
        "backbone", description="pixel statistics: the backbone's, none ([0, 1] pixels), or {mean: …, std: …}"
    )
    resize: PositiveInt | None = Field(None, description="resize to this many pixels, then crop to the input size")
    crop: Literal["center", "squash", "border"] | None = Field(
        None, description="center: shorter side, then crop; squash: both sides, no crop; border: as timm"
    )
    interpolation: Interpolation | None = Field(None, description="resampling filter")
    augment: Augmentation | Literal["none"] = Field(
        Augmentation(), description="training transform; none trains on the test transform"
    )


class DataConfig(Section):
    """A dataset by name and where its splits lie."""

    dataset: str = Field(
        "digits",
        description="digits, folder (class folders or tars), torch/<set>, hfds/<org>/<set>, or a function of your own: "
        "pkg.module:function or path/file.py:function",
    )
    root: Path | None = Field(None, description="folder that holds the splits; where downloads go")
    train: str | None = Field(None, description="training split: a path below root, or a split name for hfds")
    test: str | None = Field(None, description="test split, as train")
    domains: list[str] | None = Field(None, description="folders below root, one a domain, each with train and test")
    download: bool = Field(True, description="fetch torchvision sets that are not in root")
    image_key: str | None = Field(None, description="hfds: column of the images (default image)")
    label_key: str | None = Field(None, description="hfds: column of the labels (default label)")
    on_error: Literal["raise", "skip"] = Field("raise", description="what to do with a file that is no readable image")
    per_class: PositiveInt | None = Field(None, description="use only the first so many training images of each class")
    options: dict[str, Any] = Field({}, description="further arguments of a function of your own")


class StreamConfig(Section):
    """How classes or domains become tasks. The class order is a separate axis: the key ``orders``."""

    type: Literal["class_incremental", "domain_incremental"] = "class_incremental"
    base: int = Field(0, ge=0, description="classes of the first task (B-m Inc-n); 0: as many as increment")
    increment: PositiveInt | None = Field(None, description="classes of every later task; the last may be smaller")
    sizes: list[PositiveInt] | None = Field(None, description="the task sizes themselves")
    validation: float = Field(0.0, ge=0, lt=1, description="fraction of each class's training images held out")
    test_on: Literal["test", "validation"] = Field(
        "test", description="validation: evaluate on the held-out training images"
    )


class BackboneConfig(Section):
    """A pre-trained vision transformer."""

    name: str = Field(
        "vit_tiny_patch8_64.tinyimagenet100", description="a timm name with its tag, or the embedded default"
    )
    weights: Path | Literal["random"] | None = Field(
        None, description="local safetensors or torch file; random: untrained, from seed 0; default: pretrained"
    )
    options: dict[str, Any] = Field({}, description="further arguments of timm.create_model, e.g. img_size")
    attention: Literal["timm", "explicit"] = Field(
        "timm",
        description="timm's choice, torch's fused attention where there is one, or an explicit softmax, which trains "
        "up to twice as fast on a CPU in bf16",
    )


class HardwareConfig(Section):
    """The machine, not the experiment: nothing here makes a run another run."""

    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    workers: int = Field(2, ge=0, description="processes or threads that decode images")
    memory_gib: float = Field(
        4.0, ge=0, description="of each split: keep decoded images, and transformed ones, in memory if each fit in this"
    )
    checkpoints: Literal["all", "last"] = Field("all", description="stages whose weights are kept on disk")
    feature_store: Literal["off"] | Path | None = Field(
        None,
        description="folder of computed features that all runs share, or off; default: features in $CIL_CACHE, else "
        "in cil's folder of the user's cache",
    )
    feature_store_gib: float = Field(
        20.0, gt=0, description="size of that folder; above it what was used longest ago is removed"
    )

    @field_validator("feature_store", mode="before")
    @classmethod
    def _off(cls, raw: Any) -> Any:
        return "off" if raw is False else raw  # YAML reads off as false


class LearnerEntry(BaseModel):
    """One learner: ``name`` or ``class``, its hyper-parameters beside them, and what it has of its own of the
    configuration's orders, seeds and ``chosen_by``."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)
    name: str | None = Field(None, description="a registered learner")
    cls: str | None = Field(None, alias="class", description="pkg.module:Class or path/file.py:Class")
    label: str | None = Field(None, description="name in results; tells settings of one learner apart")
    orders: list[int | str | list[int] | list[str]] | None = None
    seeds: list[int] | None = None
    chosen_by: str | None = None

    @model_validator(mode="after")
    def _one(self) -> LearnerEntry:
        if (self.name is None) == (self.cls is None):
            raise ValueError("give a learner either a name or a class")
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
    """A benchmark: one stream and backbone, and the learners, class orders and seeds to run on them."""

    name: str = Field("benchmark", pattern=r"^[\w.\-]+$", description="folder below the results folder")
    data: DataConfig = DataConfig()
    stream: StreamConfig = StreamConfig()
    backbone: BackboneConfig = BackboneConfig()
    transform: TransformConfig = TransformConfig()
    learners: list[LearnerEntry] = Field(min_length=1)
    orders: list[int | str | list[int] | list[str]] = Field(
        [1993], min_length=1, description="class orders: seeds, natural, lists"
    )
    seeds: list[int] = Field([0], min_length=1, description="training seeds")
    batch_size: PositiveInt = Field(128, description="images a forward pass outside training")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="mixed precision of the backbone")
    chosen_by: str = Field(
        "default",
        description="how hyper-parameters were chosen: default, first_task, proxy, paper; recorded with results",
    )
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

    @field_validator("learners", mode="before")
    @classmethod
    def _names(cls, raw: Any) -> Any:
        return [named(item) for item in raw] if isinstance(raw, list) else raw

    @model_validator(mode="after")
    def _distinct(self) -> Config:
        titles = [entry.title for entry in self.learners]
        twice = sorted({t for t in titles if titles.count(t) > 1})
        if twice:
            raise ValueError(
                f"two learners are called {twice[0]!r} and would share a results folder; give each a label"
            )
        return self
