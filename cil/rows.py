"""The types and ranges of what a run's folder stores: ``metrics.json``, and one ``stage.json`` per stage.

``metrics.json`` holds what is known of a run as a whole and grows with its classes and stages alone; the row of each
stage is stored once, in the stage's folder. Published runs have their rows in ``metrics.json``, as runs of earlier
versions have.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter
from typing_extensions import NotRequired, Required, TypedDict

Fraction = Annotated[float, Field(ge=0, le=1 + 1e-9)]  # a mean of fractions may round to just above 1
Points = Annotated[float, Field(ge=-1 - 1e-9, le=1 + 1e-9)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Stages = Annotated[list[Count], BeforeValidator(lambda since: [since] if isinstance(since, int) else since)]  # or one
Named = Annotated[tuple[str, Finite], BeforeValidator(lambda pair: tuple(pair) if isinstance(pair, list) else pair)]


class StateBytes(TypedDict):
    """What a learner keeps between tasks, in bytes."""

    parameter_bytes: Count  # parameters, trained or not, without the backbone
    statistics_bytes: Count  # buffers, such as class means and covariances
    exemplar_bytes: Count  # images of old tasks


class Costs(StateBytes):
    """What one stage cost, and what the learner keeps after it."""

    trainable_parameters: Count  # the most that were trained at a time
    train_images: Count  # images of the task
    train_passes: Count  # images sent through the backbone to learn the task, epochs included
    test_passes: Count  # images sent through the backbone to test the stage
    features_from_store: NotRequired[Count]  # of all these, images whose features were read from the feature store
    seconds_learn: Seconds
    seconds_test: Seconds
    peak_memory_bytes: Count  # of the process, or of the device if it has memory of its own


class _Counts(TypedDict):
    correct: list[Count]  # by task j ≤ i: test images that are right among all classes seen
    correct_within_task: list[Count]  # by task j ≤ i: test images that are right among the task's own classes
    total: list[Count]  # by task j ≤ i: test images
    top5_accuracy: Fraction | None  # a fraction, as all accuracies are; None without test images, as the next
    class_mean_accuracy: Fraction | None  # mean over classes of the accuracy on the class's test images
    task_id_accuracy: Fraction | None  # the predicted class is one of the image's task; None if tasks share classes


class ByFrequency(TypedDict):
    """Test images of the classes with many, a medium number of, and few training images."""

    correct: list[Count]
    total: list[Count]


class Anytime(TypedDict):
    """Tests between the batches of a stage, without the one at its end."""

    images: list[Count]  # training images since the test before, one per test
    accuracy: list[Fraction]  # over all classes of which an image was learned


class OfStream(TypedDict, total=False):
    """What the rows of some kinds of streams have, and what gives these their further metrics."""

    few_shots: bool  # later classes have a few images each: base and novel classes, performance drop
    returning: bool  # classes return: accuracy at any time, forgetting by group of first appearance
    by_frequency: ByFrequency  # of a long tail
    online: Anytime  # learned in one pass: accuracy at any time


class Counts(_Counts, total=False):
    """What the predictions after stage i say, per task and overall."""

    stream: OfStream
    router_accuracy: Fraction  # the learner takes an image for one of its task; RoutedLearner alone
    oracle_router_accuracy: Fraction  # the accuracy if it always did; RoutedLearner alone


SCORES = ("max_probability", "energy", "mahalanobis", "relative_mahalanobis")
"""Names of the scores that tell images of known classes from others."""
REJECT_BY = "relative_mahalanobis"
"""The one that ``cil predict --reject`` uses by default."""
GROWING_BY = "max_probability"
"""The same for models of ``cil learn``, which know only the first two: the best one for their default learner."""


class ConfidenceRow(TypedDict):
    """How well a model with ``confidence: true`` knows what it does not know, after a stage.

    Models of ``cil learn`` test the held-out images of all lessons so far, and know no images of later lessons.
    """

    held_out_images: Count  # training images that it was calibrated on
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    calibration_error: Fraction | None  # of the calibrated probabilities, on the test images of the tasks so far
    calibration_error_uncalibrated: Fraction | None  # at temperature 1
    unknown_auroc: dict[str, Fraction | None]  # by score; test images of the tasks so far against those of later tasks
    unknown_fpr95: dict[str, Fraction | None]


class StageRow(Counts):
    """One stage of a run: ``stages[i]`` of a run as it is read, and the content of ``stage.json``."""

    unchanged_since: Stages  # for each view of the learner, the stage since which it has not changed
    costs: Costs
    log: list[Named]  # (name, value) of everything the learner logged, in order
    histograms: NotRequired[dict[str, list[Finite]]]  # by name, uses of each numbered thing (prompt, task)
    confidence: NotRequired[ConfidenceRow]  # of runs with confidence: true, and of cil learn


class Lesson(TypedDict):
    """One call of ``cil learn``, which is one stage: when, from what, and how many images."""

    when: str  # ISO 8601 with the time zone
    source: str  # the folder or file, or what else the images came from
    holdout: Fraction  # the wanted share of held-out images
    train: dict[str, Count]  # label → images that were trained on
    held_out: dict[str, Count]  # label → images that are held out
    train_sha256: str  # of the classes' names and the images' contents, as the next
    held_out_sha256: str
    unreadable: list[str]
    known: Count  # images left out because their class had learned them already


class Change(TypedDict):
    """What was done to classes after a stage: forgotten exactly, no longer predicted, or renamed."""

    when: str
    kind: Literal["forgotten", "hidden", "renamed"]
    label: Count
    stages: Count  # number of stages at that time
    name: str  # of the class, before it was renamed
    folder: str  # of the learner's state since then; empty if the state did not change
    files: dict[str, str]  # checksums of the files in it
    correct: NotRequired[list[Count]]  # by lesson: right ones among the held-out images that are still tested
    total: NotRequired[list[Count]]  # by lesson: held-out images that are still tested; 0 where features have changed


class EarlierVersions(TypedDict):
    """The versions with which the first stages of a resumed run were computed."""

    stages: Count  # number of stages, counted from the first, up to which they hold
    versions: dict[str, str]


class Joined(TypedDict):
    """A run that was joined with others, as it was then."""

    folder: str
    checksum: str  # of its metrics.json
    learner: str
    class_names: list[str]  # of all its labels, in order of appearance
    tasks: list[list[Count]]  # the labels of each task that it had learned
    images: Count  # training images that it had learned
    data: dict[str, Any]  # as in its header
    config: dict[str, Any]
    versions: dict[str, str]
    joined: NotRequired[list[dict[str, Any]]]  # the runs of which it was made itself


class Relabelled(TypedDict):
    """The training images with wrong labels, and their true labels."""

    positions: list[Count]  # in the training split
    labels: list[Count]


class StreamFacts(TypedDict):
    """What is known about a stream whose classes return, or whose training images are chosen or relabelled."""

    groups: list[list[Count]]  # labels whose test images belong to each task: those that appear there first
    images: list[list[Count]]  # training images of each class of each task, in the order of tasks
    relabelled: NotRequired[Relabelled]
    unlabelled: NotRequired[list[Count]]  # training images of each task that have no label, beside those in images


class Header(TypedDict):
    """What is known about a run before it starts: the configuration, and every fact that its numbers depend on."""

    learner: str  # its title: the label, the registered name or the class's name
    paper: str
    stores_images: bool  # whether it keeps old images or a feature of each, as replay and upper bounds do
    trains_backbone: bool
    chosen_by: str  # how its hyper-parameters were chosen
    tested_on: str  # test, or validation for images held out of the training split
    config: dict[str, Any]  # the resolved configuration of this run alone; `cil run` accepts it
    class_names: list[str]  # in order of appearance
    class_order: list[Count]  # position in the data set's own order, for each class in order of appearance
    tasks: list[list[Count]]  # labels of each task, in order of appearance
    stream: NotRequired[StreamFacts]  # where it is more than new classes or domains with all their images
    backbone: dict[str, Any]  # name, sha256 of the weights, feature_dim
    backbones: NotRequired[list[dict[str, Any]]]  # the same for each of several backbones, which backbone joins
    text: NotRequired[dict[str, Any]]  # the backbone's text side, of a learner that uses it
    transform: dict[str, Any]
    data: dict[str, Any]  # for each split: sha256, images, skipped, a digest of each task's images, and folders
    code: NotRequired[dict[str, str]]  # for each source file of custom code: its sha256
    versions: dict[str, str]  # of the packages, and the commit of a checkout
    earlier_versions: NotRequired[list[EarlierVersions]]  # of the first stages, where they differ from versions
    joined: NotRequired[list[Joined]]  # the runs of which this one was made, by `cil join`
    machine: dict[str, Any]
    growing: NotRequired[Count]  # version of the two below, of a model that `cil learn` teaches
    lessons: NotRequired[list[Lesson]]
    changes: NotRequired[list[Change]]


class _Named(TypedDict):
    name: str
    sha256: str


class _Split(TypedDict):
    images: Count
    sha256: str
    tasks: NotRequired[list[str]]


class _Data(TypedDict):
    train: _Split
    test: _Split


class _Versions(TypedDict):
    cil: str
    torch: str


class _Machine(TypedDict):
    device: str


class _Dataset(TypedDict):
    dataset: str


class _Config(TypedDict):
    """The keys of a stored configuration that reports read."""

    name: str
    data: _Dataset
    stream: dict[str, Any]
    learners: Annotated[list[dict[str, Any]], Field(min_length=1)]
    orders: Annotated[list[Any], Field(min_length=1)]
    seeds: Annotated[list[Count], Field(min_length=1)]


class _Summary(TypedDict, total=False):
    accuracy_last: Required[Fraction | None]
    accuracy_average: Fraction | None
    accuracy_last_task_mean: Fraction | None
    accuracy_average_task_mean: Fraction | None
    forgetting: Points | None
    forgetting_within_task: Points | None
    forgetting_clipped: Points | None
    backward_transfer: Points | None
    learning_accuracy: Fraction | None
    within_task_accuracy: Fraction | None
    task_id_accuracy: Fraction | None
    router_accuracy: Fraction | None
    oracle_router_accuracy: Fraction | None
    accuracy_base: Fraction | None  # on the first task's classes after the last stage
    accuracy_novel: Fraction | None  # on all others
    accuracy_harmonic: Fraction | None  # their harmonic mean
    performance_drop: Points | None  # accuracy after the first stage minus that after the last; with few shots
    accuracy_many: Fraction | None  # after the last stage on classes by frequency, as the next two; of a long tail
    accuracy_medium: Fraction | None
    accuracy_few: Fraction | None
    accuracy_anytime: (
        Fraction | None
    )  # area under the curve of accuracy over images; of returning classes, or in one pass
    forgetting_base: Points | None  # on the classes that appear first in the first task, and on all others
    forgetting_novel: Points | None
    calibration_temperature: Annotated[float, Field(gt=0)] | None  # this and what follows: with confidence: true
    calibration_error: Fraction | None  # after the last stage, as the next
    calibration_error_uncalibrated: Fraction | None
    unknown_auroc_max_probability: Fraction | None  # means over the stages, as what follows
    unknown_auroc_energy: Fraction | None
    unknown_auroc_mahalanobis: Fraction | None
    unknown_auroc_relative_mahalanobis: Fraction | None
    unknown_fpr95_max_probability: Fraction | None
    unknown_fpr95_energy: Fraction | None
    unknown_fpr95_mahalanobis: Fraction | None
    unknown_fpr95_relative_mahalanobis: Fraction | None
    trainable_parameters: Count
    kept_bytes: Count
    passes_per_train_image: Seconds
    passes_per_test_image: Seconds
    seconds: Seconds


class _RunFile(TypedDict):
    """What ``metrics.json`` has besides the keys of :class:`Header`, and more exactly."""

    config: _Config
    backbone: _Named
    data: _Data
    versions: _Versions
    machine: _Machine
    complete: bool
    summary: NotRequired[_Summary]
    stage_checksums: NotRequired[list[str]]
    stages: NotRequired[list[StageRow]]


class _StageFile(StageRow):
    files: NotRequired[dict[str, str]]


RUN_FILE, HEADER, STAGE_FILE = TypeAdapter(_RunFile), TypeAdapter(Header), TypeAdapter(_StageFile)
