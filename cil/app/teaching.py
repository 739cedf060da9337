"""What the page of `cil teach` does with a growing model, as plain values, without a server.

Nothing is kept of an image: the page sends it again when it is taught. One call at a time of a process uses a model,
because loading, learning and the transforms of images use the global random states; a second caller waits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch

from cil.app import REJECT
from cil.config.schema import MAX_PIXELS
from cil.data.reading import read_image
from cil.data.source import ImageSource
from cil.errors import ConfigError, DataError, RunError, clipped, printable, shortened
from cil.growing import HOLDOUT, GrowingModel, events
from cil.growing.calibration import open_sure
from cil.growing.summary import facts
from cil.prediction.confident import Confident
from cil.prediction.model import Ranked, Trained, top_classes

BATCH = 32  # images per forward pass
LONGEST = 100
"""Characters of a class name."""
_ONE_AT_A_TIME = Lock()


class Upload(NamedTuple):
    """An image as a browser sends it: the name of its file, which is only shown, and the file's bytes."""

    name: str
    content: bytes


class Teacher:
    """Shows, predicts with, and teaches the model in a folder, which other processes may teach meanwhile.

    Args:
        folder: The model's folder; the first lesson makes it.
        device: As ``hardware.device``.
        holdout: Share of each class's images that a lesson holds out, in [0, 1).
        reject: Fraction of images of known classes that may be taken for unknown, in (0, 1).
        max_pixels: Maximum number of pixels of an image; larger ones are not decoded.
        weights: Place of the backbone's weights, if they were moved since the model was made.
        code: Places of the files of custom classes, if they were moved.

    Raises:
        ConfigError: ``reject`` is out of range.
        RunError: The folder holds something else, or a model of another version.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "auto",
        holdout: float = HOLDOUT,
        reject: float = REJECT,
        max_pixels: int = MAX_PIXELS,
        weights: Path | None = None,
        code: Sequence[Path] = (),
    ) -> None:
        if not 0 < reject < 1:
            raise ConfigError(f"reject: {reject:g}; allowed: above 0 and below 1, e.g. {REJECT}")
        self.folder, self.holdout, self.reject, self.max_pixels = folder, holdout, reject, max_pixels
        self._growing = GrowingModel(folder, device=device, weights=weights, code=code)
        self._places: dict[str, Any] = {"weights": weights, "code": code}
        self._device = device
        self._opened: tuple[str, Trained, str] | None = None
        self.state()

    def state(self) -> dict[str, Any]:
        """The model as the page shows it; it changes whenever ``version`` does.

        Returns:
            version, folder, classes (names), lessons as :func:`cil.growing.summary.facts` has them, accuracy, learner,
            backbone, and what would be undone, or None.

        Raises:
            RunError: The folder holds something else, or a model of another version, or a damaged one.
        """
        version, name = self._version(), printable(self.folder.absolute().name)
        if not version:
            return {"version": "", "folder": name, "classes": [], "lessons": [], "accuracy": None, "undo": None}
        try:
            known, header = facts(self.folder), events.read(self.folder)
        except RunError:
            if version == self._version():
                raise
            return self.state()  # stages were added or undone between the two readings
        learner = known["learner"]
        return {
            "version": version,
            "folder": name,
            "classes": list(known["classes"]),
            "lessons": known["lessons"],
            "accuracy": known["accuracy"],
            "learner": learner.get("label") or learner.get("name") or learner["class"],
            "backbone": known["backbone"]["name"],
            "undo": _last(header, self.folder),
        }

    def predict(self, uploads: Sequence[Upload], top: int = 3) -> dict[str, Any]:
        """The top classes of each image.

        Args:
            uploads: The images.
            top: Number of classes per image.

        Returns:
            ``images``, in their order: ``classes`` as (name, score) pairs, best first, and ``known``, whether it looks
            like a known class (None if that cannot be told); or ``error`` in one line, without the image's name.
            ``calibrated``: whether the scores are probabilities. ``note``: why not, or why it cannot be told what is
            unknown; may be empty.

        Raises:
            RunError: The model cannot be opened.
        """
        with _ONE_AT_A_TIME:
            model, note = self._model()
            images: list[dict[str, Any]] = []
            for start in range(0, len(uploads), BATCH):
                images += self._predicted(model, uploads[start : start + BATCH], top)
        return {"images": images, "calibrated": isinstance(model, Confident), "note": note}

    def teach(self, uploads: Sequence[Upload], name: str) -> dict[str, Any]:
        """Teach the images as one lesson of one class; files that are no readable images are left out.

        Returns:
            ``message``: what was learned, in one line. ``notes``: lines that a user should see.

        Raises:
            DataError: The name is refused, or none of the images can be read.
            CilError: As :meth:`cil.GrowingModel.learn` raises it; the model stays as it was.
        """
        name = checked_name(name)
        if not uploads:
            raise DataError("there is no image to teach; add some first")
        digest = hashlib.sha256(b"".join(hashlib.sha256(one.content).digest() for one in uploads))
        source = ImageSource(
            lambda i: uploads[i].content,
            np.zeros(len(uploads), dtype=np.int64),
            [name],
            describe=lambda i: uploads[i].name,
            fingerprint=digest.hexdigest(),
            max_pixels=self.max_pixels,
        )
        with _ONE_AT_A_TIME:
            taught = self._growing.learn(source, holdout=self.holdout, on_error="skip", max_pixels=self.max_pixels)
        if taught.lesson is None:
            return {"message": "Nothing new: the model has learned all of these images.", "notes": []}
        count, held_out = (sum(taught.lesson[part].values()) for part in ("train", "held_out"))
        message = f"Learned {printable(name)} from {count} {'image' if count == 1 else 'images'}; {held_out} held out."
        return {"message": message, "notes": [printable(note) for note in taught.notes]}

    def undo(self, version: str) -> dict[str, Any]:
        """Take back the last lesson or change.

        Args:
            version: That of :meth:`state` when the caller chose to undo.

        Returns:
            ``message``, in one line, and ``notes``, which are empty.

        Raises:
            RunError: The model is no longer the one of this version, or as :meth:`cil.GrowingModel.undo` raises it.
        """
        with _ONE_AT_A_TIME:
            if version != self._version():
                raise RunError("the model has changed meanwhile, so nothing was undone; look what is last now")
            last = _last(events.read(self.folder), self.folder)
            self._growing.undo()
        return {"message": f"Undone: {last}.", "notes": []}

    def _version(self) -> str:
        """A text that changes whenever ``metrics.json`` is replaced; empty if there is none."""
        try:
            there = (self.folder / "metrics.json").stat()
        except FileNotFoundError:
            return ""
        return f"{there.st_mtime_ns}-{there.st_ino}-{there.st_size}"

    def _model(self) -> tuple[Trained | None, str]:
        """The model as it is now, and what it cannot say; None before the first lesson."""
        version = self._version()
        if self._opened is None or self._opened[0] != version:
            self._opened = None  # also if it cannot be opened now
            if not version or not events.read(self.folder)["tasks"]:
                return None, "The model knows no class yet."
            self._opened = (version, *self._open())
        return self._opened[1:]

    def _open(self) -> tuple[Trained, str]:
        model, reason = open_sure(self.folder, self._device, reject=self.reject, **self._places)
        return _able(model) if isinstance(model, Confident) else (model, reason)

    def _predicted(self, model: Trained | None, uploads: Sequence[Upload], top: int) -> list[dict[str, Any]]:
        """The answers to a batch of images."""
        answers: list[dict[str, Any]] = [{"classes": [], "known": None} for _ in uploads]
        tensors, readable = [], []
        for answer, upload in zip(answers, uploads, strict=True):
            try:
                if model is not None:
                    tensors.append(read_image(upload.content, model.transforms, self.max_pixels, name=upload.name))
                    readable.append(answer)
            except DataError as error:
                answer["error"] = clipped(str(error).removeprefix(f"{upload.name}: "), 300)
        if model is not None and tensors:
            for answer, ranked in zip(readable, top_classes(model, torch.cat(tensors), top), strict=True):
                answer |= _shown(ranked)
        return answers


def checked_name(name: str) -> str:
    """A class name that a person has typed, without blanks around it.

    Raises:
        DataError: No folder of images for `cil learn` could have it: it is empty or longer than :data:`LONGEST`, begins
            with a dot, or has a slash, a backslash or a character that cannot be seen.
    """
    name = name.strip()
    reason = ""
    if not name:
        reason = "a class needs a name"
    elif len(name) > LONGEST:
        reason = f"a name has at most {LONGEST} characters, this one has {len(name)}"
    elif name.startswith(".") or "/" in name or "\\" in name:
        reason = "a name begins with no dot and has no / or \\"
    elif printable(name) != name:
        reason = "a name has no line breaks and no characters that cannot be seen"
    if reason:
        raise DataError(f"class name {shortened(name)}: {reason}; give another name")
    return name


def _shown(ranked: Ranked) -> dict[str, Any]:
    return {"classes": [(printable(name), score) for name, score in ranked], "known": ranked.known}


def _able(model: Confident) -> tuple[Confident, str]:
    """A model that rejects nothing if too few images are held out for it, and what it cannot say."""
    held_out, reject = model.confidence.known.shape[1], model.reject
    if reject is None or reject * (1 + held_out) >= 1:
        return model, ""
    model.reject = None
    needed = int(np.ceil(1 / reject)) - 1
    return model, f"Unknown images cannot be told yet: {held_out} images are held out, {needed} are needed."


def _last(header: events.Header, folder: Path) -> str | None:
    """What :meth:`Teacher.undo` would take back, for a person; None if there is nothing."""
    if not header["tasks"] and not header["changes"]:
        return None
    event: Any = events.undone(header, folder)[1]
    names = header["class_names"]
    if "kind" not in event:
        classes = [printable(names[label]) for label in header["tasks"][-1]]
        shown = ", ".join(classes[:3]) + (", …" if len(classes) > 3 else "")
        return f"lesson {len(header['tasks'])} ({shown})"
    if event["kind"] == "renamed":
        return f"renaming {printable(event['name'])} to {printable(names[event['label']])}"
    return f"{printable(event['name'])} being {event['kind']}"
