"""The section ``stream`` of a configuration: how classes become tasks, and what is done to the training images."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from cil.config.backbones import Place
from cil.config.section import Section

Kind = Literal["class_incremental", "domain_incremental", "class_domain_incremental", "blurry", "repetition"]


class Imbalance(Section):
    """A long tail: numbers of training images that fall exponentially from class to class."""

    ratio: float = Field(0.01, gt=0, le=1, description="size of the smallest class divided by that of the largest")
    order: Literal["ordered", "shuffled"] = Field(
        "ordered", description="classes from large to small: in the class order, or in a random permutation"
    )


class Noise(Section):
    """Wrong training labels. A wrong label is another class of the same task."""

    rate: float = Field(ge=0, le=1, description="fraction of each class's training images with a wrong label")
    kind: Literal["symmetric", "pair"] = Field(
        "symmetric", description="wrong class: any other one of the task, or always the next one"
    )


class OnlineConfig(Section):
    """One pass over the stream: the learner gets a few images at a time, never a whole task."""

    batch: PositiveInt = Field(64, description="number of images that the learner gets at a time")
    evaluate_every: PositiveInt = Field(
        1000, description="number of training images after which the learner is tested, beside the end of every task"
    )


class StreamConfig(Section):
    """How classes or domains become tasks. The class order is a separate axis: the key ``orders``."""

    type: Kind = Field(
        "class_incremental",
        description="new classes in each task; domain_incremental: the same classes from a new domain in each task; "
        "class_domain_incremental: a group of classes from one domain in each task; blurry: a part of the classes has "
        "images in several tasks; repetition: classes return in later tasks",
    )
    initial_classes: int = Field(
        0, ge=0, description="number of classes in the first task (m of B-m Inc-n); 0: as many as increment"
    )
    increment: PositiveInt | None = Field(
        None, description="number of classes in each later task; the last task may be smaller"
    )
    sizes: list[PositiveInt] | None = Field(
        None, description="number of classes in each task, in place of initial_classes and increment"
    )
    validation: float = Field(0.0, ge=0, lt=1, description="fraction of each class's training images held out")
    test_on: Literal["test", "validation"] = Field(
        "test", description="split to evaluate on; validation: the held-out training images"
    )
    tasks: int | None = Field(None, ge=2, description="number of tasks of a blurry stream")
    disjoint: float = Field(
        50.0, ge=0, le=100, description="percentage of the classes of a blurry stream that belong to one task"
    )
    blurry: float = Field(
        10.0, ge=0, le=100, description="percentage of the images of each other class that come in other tasks"
    )
    stochastic: bool = Field(
        False, description="whether a blurry stream has random numbers of classes per task, as Si-Blurry has"
    )
    repetition: float = Field(
        0.2, ge=0, le=1, description="probability that a class returns in a later task, for repetition"
    )
    pairs: Literal["shuffled", "classes", "domains"] = Field(
        "shuffled",
        description="order of the pairs of a group of classes and a domain, for class_domain_incremental: random; all "
        "domains of a group before the next group; or all groups of a domain before the next domain",
    )
    shots: PositiveInt | None = Field(
        None, description="number of training images per class in all tasks but the first; null: all"
    )
    shots_files: Place | None = Field(
        None,
        description="folder with the index files session_2.txt, session_3.txt, … of few-shot streams, in place of "
        "shots: positions in the training split, or names of image files",
    )
    imbalance: Imbalance | None = Field(None, description="long tail of the classes' sizes; null: all images")
    noise: Noise | None = Field(None, description="wrong training labels; null: none")
    labelled: PositiveInt | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="number, or fraction in (0, 1), of the training images of each class of a task that have labels; "
        "null: all",
    )
    unlabelled_from: Literal["task", "seen", "all"] = Field(
        "task",
        description="classes of a task's unlabelled images: those of the task, also those of earlier tasks, or all",
    )
    online: OnlineConfig | None = Field(
        None, description="learning in one pass, batch after batch; null: each task as a whole"
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="seed of the choices above; the same for all orders and training seeds"
    )

    @model_validator(mode="after")
    def _fit_together(self) -> StreamConfig:
        given = [key for key in ("shots", "shots_files", "imbalance") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both choose training images; give one of them")
        for kind, keys in KEYS_OF.items():
            if self.type != kind and (other := sorted(self.model_fields_set & keys)):
                raise ValueError(f"{other[0]} is a key of type {kind}, and the type is {self.type}; remove it")
        if self.unlabelled_from != "task" and self.labelled is None:
            raise ValueError("unlabelled_from needs unlabelled images: set labelled, e.g. to 0.2")
        if self.type == "blurry":
            if self.tasks is None:
                raise ValueError("type blurry needs tasks, the number of tasks, e.g. 5")
            if sizes := [key for key in ("initial_classes", "increment", "sizes") if getattr(self, key)]:
                raise ValueError(
                    f"{sizes[0]} has no meaning for type blurry: remove it, or set it to null; tasks says how many"
                )
        allowed = {"class_incremental": given, "blurry": ["imbalance"], "repetition": ["imbalance"]}.get(self.type, [])
        if refused := [key for key in given if key not in allowed]:
            raise ValueError(f"{refused[0]} needs new classes in every task, and the type is {self.type}; remove one")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys that were added later are left out at their defaults, so that older runs are described as before."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        return {k: v for k, v in serialized(self).items() if k in ALWAYS or getattr(self, k) != defaults[k]}


KEYS_OF = {
    "blurry": {"tasks", "disjoint", "blurry", "stochastic"},
    "repetition": {"repetition"},
    "class_domain_incremental": {"pairs"},
}
"""Keys that only one type of stream has."""
ALWAYS = ("type", "initial_classes", "increment", "sizes", "validation", "test_on")
"""Keys that every stored configuration states."""
