"""Opens the runs that are to be joined or searched, and says in what two of them differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cil import history, results
from cil.data.transforms import Transforms
from cil.errors import RunError, shortened
from cil.learner import Learner
from cil.prediction import restore
from cil.results import Joined, StageRow
from cil.runner.checkpoint import RunFolder
from cil.runner.identity import identity_settings, short
from cil.utils.stored import content_digest, read_json

NO_SETTINGS = ("label", "orders", "seeds", "chosen_by")
"""Keys of a learner's entry that change neither its features nor its classifier."""


@dataclass(frozen=True)
class Parent:
    """A run after its last finished stage.

    Attributes:
        folder: Its folder.
        header: The content of its ``metrics.json``.
        rows: The rows of its finished stages.
        learner: Its learner.
        transforms: From an image to the learner's input.
        labels: Labels of the classes that it predicts, in order of appearance.
        names: Their names.
    """

    folder: Path
    header: Mapping[str, Any]
    rows: Sequence[StageRow]
    learner: Learner
    transforms: Transforms
    labels: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def images(self) -> int:
        """Number of training images that it has learned."""
        return sum(row["costs"]["train_images"] for row in self.rows)

    @property
    def taught(self) -> list[tuple[str, frozenset[str]]]:
        """The digest of the training images of each task that it has learned, with the names of the task's classes; of
        a joined run those of the runs of which it was made."""
        return list(_taught(self.header, len(self.rows)))

    def record(self) -> Joined:
        """The run as the ``metrics.json`` of a joined one records it."""
        record: Joined = {
            "folder": str(self.folder.resolve()),
            "checksum": content_digest(read_json(self.folder / "metrics.json", advice=results.RESTORE)),
            "learner": self.header["learner"],
            "class_names": self.header["class_names"],
            "tasks": self.header["tasks"][: len(self.rows)],
            "images": self.images,
            "data": self.header["data"],
            "config": self.header["config"],
            "versions": self.header["versions"],
        }
        if "joined" in self.header:
            record["joined"] = self.header["joined"]
        return record


def _taught(header: Mapping[str, Any], stages: int) -> Iterator[tuple[str, frozenset[str]]]:
    """:attr:`Parent.taught` of the header of a run, or of its record in that of a joined one."""
    if "joined" in header:
        for one in header["joined"]:
            yield from _taught(one, len(one["tasks"]))
        return
    train, tasks = header["data"]["train"], header["tasks"][:stages]
    digests = train.get("tasks", [train["sha256"]] * len(tasks))  # earlier versions recorded that of the split alone
    for digest, task in zip(digests, tasks, strict=False):
        yield digest, frozenset(header["class_names"][c] for c in task)


def space(header: Mapping[str, Any]) -> dict[str, Any]:
    """What the frozen features of a run depend on, by name: the backbone, the test transform and the precision."""
    settings = identity_settings(dict(header["config"]))
    return {
        "backbone weights (sha256)": header["backbone"]["sha256"],
        **{k: v for k, v in settings.items() if k.startswith("backbone.") and k != "backbone.name"},
        **{f"transform.{k}": v for k, v in header["transform"].items() if k != "augment"},
        "precision": settings["precision"],
    }


def settings(header: Mapping[str, Any]) -> dict[str, Any]:
    """What the classifier of a run depends on besides its images and its :func:`space`, by name."""
    found = {
        k.removeprefix("learners.0."): v
        for k, v in identity_settings(dict(header["config"])).items()
        if k.startswith("learners.0.")
    }
    code = {f"code of {k} (sha256)": v for k, v in header.get("code", {}).items()}
    return {**{k: v for k, v in found.items() if k.split(".")[0] not in NO_SETTINGS}, **code}


def difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    """The first name under which two such descriptions differ, with both values; empty if they are equal."""
    for key in sorted(one.keys() | two.keys(), key=lambda key: (key not in ("name", "class"), key)):
        if one.get(key) != two.get(key):
            return f"{key} = {short(two.get(key))}, and {short(one.get(key))}"
    return ""


def require_one_backbone(folder: Path, header: Mapping[str, Any]) -> None:
    """Refuse a run with several backbones.

    Raises:
        RunError: The run has them.
    """
    if several := header.get("backbones"):
        raise RunError(
            f"{folder}: has {len(several)} backbones, and runs are joined and found by the features of one; give runs "
            "with the key backbone"
        )


def open_parents(
    folders: Sequence[Path], accelerator: Accelerator, *, weights: Path | None = None, code: Sequence[Path] = ()
) -> list[Parent]:
    """Open runs that share a backbone, which is loaded once.

    Args:
        folders: At least two run folders.
        accelerator: Device and precision.
        weights: New place of the backbone's weights, if they were moved.
        code: New places of the files of custom classes, if they were moved.

    Raises:
        RunError: There is one run only, one is given twice, cannot be loaded, or has another backbone, transform or
            precision; or two have learned the same images.
    """
    if len(folders) < 2:
        raise RunError("joining needs two runs or more; give their folders")
    parents: list[Parent] = []
    for folder in folders:
        header = results.read_header(folder)
        require_one_backbone(folder, header)
        if any(folder.samefile(other.folder) for other in parents):
            raise RunError(f"{folder}: given twice; its images would count twice")
        if parents and (found := difference(space(parents[0].header), space(header))):
            raise RunError(
                f"{folder}: {found} in {parents[0].folder}; runs can be joined only if their frozen features are the "
                "same: run one of them again with the settings of the other"
            )
        backbone = parents[0].learner.backbone if parents else None
        learner, transforms, names = restore(folder, accelerator, weights=weights, code=code, backbone=backbone)
        hidden = history.absent(header, "hidden")
        if hidden:
            raise RunError(
                f"{folder}: hides the class {names[hidden[0]]!r}, whose images are still in its sums; teach it again, "
                "or forget it with its images (cil forget), and join then"
            )
        labels = [label for label in history.predicted(header) if label < len(names)]
        rows = RunFolder(folder).rows()[: len(header["tasks"])]
        known = tuple(names[label] for label in labels)
        parent = Parent(folder, header, rows, learner, transforms, tuple(labels), known)
        for other in parents:
            _refuse_same_images(other, parent)
        parents.append(parent)
    return parents


def _refuse_same_images(one: Parent, two: Parent) -> None:
    known = dict(one.taught)
    for digest, names in two.taught:
        if digest in known and names & known[digest]:
            raise RunError(
                f"{two.folder}: has learned the same images of {shortened(sorted(names & known[digest])[0])} as "
                f"{one.folder}; they would count twice: join only one of the two"
            )
