"""Finds the stored runs that fit given images: whose training images look like them, and which classes they share.

A run is described by the kernel mean of its training images (:mod:`cil.reuse.specification`), and the images by their
own. MMD² is the squared distance of the two means, near 0 for images of one distribution. The weights are those of the
mixture of the runs that comes closest to the images. Only runs with the same frozen features are comparable by either;
leave-one-out accuracy, which needs labels, compares all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from scipy.optimize import nnls
from torch import Tensor

from cil import results
from cil.backbone import Backbone
from cil.config import Config, HardwareConfig
from cil.data.folder import as_text, images_below
from cil.data.images import ImageSet
from cil.data.source import ImageSource
from cil.data.sources import folder as labelled_folder
from cil.data.transforms import Transforms
from cil.errors import DataError, RunError
from cil.features import FeatureCache, Track
from cil.prediction import restore
from cil.prediction.model import recorded_setting
from cil.reuse.describing import specification_of
from cil.reuse.parents import require_one_backbone, space
from cil.reuse.specification import Specification
from cil.selection.transferability import ncm_leave_one_out
from cil.store import open_store
from cil.utils import hardware
from cil.utils.paths import expand


@dataclass(frozen=True)
class Match:
    """A run and how well it fits the images.

    Attributes:
        folder: The run folder.
        learner: Its learner.
        classes: Number of classes that it knows.
        space: Number, from 1, of its frozen features (backbone, transform, precision): MMD² and weights compare runs
            of one space only.
        mmd2: Squared distance of the kernel means; 0 for equal distributions.
        weight: Its weight, in [0, 1], in the mixture of the runs of its space that fits best; weights add up to 1.
        common: Number of classes that it has in common with the images, by name; None without labels.
        accuracy: Leave-one-out accuracy, in [0, 1], of the nearest class mean on the images through the run's own
            features; None without labels, or if no class has two images.
    """

    folder: Path
    learner: str
    classes: int
    space: int
    mmd2: float
    weight: float
    common: int | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Found:
    """The runs, best first; with labels by accuracy, otherwise space by space and by MMD².

    Attributes:
        matches: The best runs of each space.
        ratios: For each space with several runs, the second smallest MMD² divided by the smallest one: a number near 1
            says that the order of the two is chance.
        images: Number of images.
        labelled: Whether class folders say of which class they are.
    """

    matches: tuple[Match, ...]
    ratios: Mapping[int, float]
    images: int
    labelled: bool


def find(
    runs: Sequence[Path | str],
    images: Path | str,
    *,
    top: int | None = None,
    device: str = "cpu",
    weights: Path | None = None,
    code: Sequence[Path] = (),
    track: Track | None = None,
) -> Found:
    """Compare images with the training images of stored runs.

    Args:
        runs: Run folders, and folders to search for them.
        images: A folder of images, or one of class folders or a tar file of these.
        top: Number of runs returned per space; all by default.
        device: As ``hardware.device``.
        weights: New place of the backbone's weights, if they were moved.
        code: New places of the files of custom classes, if they were moved.
        track: Progress bar, as in ``Context``.

    Raises:
        RunError: There is no run, one cannot be loaded, or one has no specification and its images cannot be read.
        DataError: An image cannot be read.
    """
    accelerator, source = hardware.accelerator(device), open_images(expand(images))
    labelled = source.class_names != (UNLABELLED,)
    cache = FeatureCache(accelerator, track=track, store=open_store(HardwareConfig()))
    found: list[Match] = []
    ratios = {}
    for number, folders in enumerate(by_space(folders_of(runs)), 1):
        header = results.read_header(folders[0])
        _, backbone = recorded_setting(folders[0], header, accelerator.device, weights=weights, code=code)
        shown = ImageSet(source, _transforms(header, backbone), title=as_text(expand(images)))
        features = cache.get(backbone, shown, np.arange(len(source)))
        mine = Specification(source.class_names, backbone.feature_dim).add(features, source.labels)
        theirs = [specification_of(folder, backbone, accelerator, track) for folder in folders]
        distances = [float((one.kernel_mean - mine.kernel_mean).square().sum()) for one in theirs]
        shares = mixture(torch.stack([one.kernel_mean for one in theirs]), mine.kernel_mean).tolist()
        matches = []
        for folder, one, distance, share in zip(folders, theirs, distances, shares, strict=True):
            learner = results.read_header(folder)["learner"]
            matches.append(Match(folder, learner, len(one.names), number, distance, share))
        matches.sort(key=lambda match: match.mmd2)
        if len(matches) > 1:
            first, second = matches[0].mmd2, matches[1].mmd2
            ratios[number] = second / first if first else math.inf
        if labelled:
            opened = _Opened(accelerator, backbone, shown, features, weights, code, track)
            names = {folder: one.names for folder, one in zip(folders, theirs, strict=True)}
            matches = [opened.judged(match, names[match.folder]) for match in matches]
            matches.sort(key=lambda match: -1 if match.accuracy is None else match.accuracy, reverse=True)
        found += matches[:top]
    if labelled:
        found.sort(key=lambda match: -1 if match.accuracy is None else match.accuracy, reverse=True)
    return Found(tuple(found), ratios, len(source), labelled)


def describe(
    runs: Sequence[Path | str],
    *,
    device: str = "cpu",
    weights: Path | None = None,
    code: Sequence[Path] = (),
    track: Track | None = None,
) -> list[tuple[Path, Specification]]:
    """Make sure that runs have specifications, so that their folders can be searched or routed elsewhere.

    Args:
        runs: Run folders, and folders to search for them.
        device: As ``hardware.device``.
        weights: New place of the backbone's weights, if they were moved.
        code: New places of the files of custom classes, if they were moved.
        track: Progress bar.

    Raises:
        RunError: As :func:`find`.
    """
    accelerator, made = hardware.accelerator(device), []
    for folders in by_space(folders_of(runs)):
        header = results.read_header(folders[0])
        _, backbone = recorded_setting(folders[0], header, accelerator.device, weights=weights, code=code)
        made += [(folder, specification_of(folder, backbone, accelerator, track)) for folder in folders]
    return made


def mixture(means: Tensor, target: Tensor) -> Tensor:
    """The point of the simplex w for which Σ_r w_r means_r is nearest to a target, float64 [K].

    It minimises ½ wᵀHw − cᵀw with H_rs = ⟨r, s⟩ and c_r = ⟨target, r⟩. As the weights add up to 1, the distance is
    ‖Σ w_r d_r‖ with d_r = means_r − target, and the least v ≥ 0 of ‖Σ v_r d_r‖² + (Σ v_r − 1)² is a multiple of w: a
    problem of non-negative least squares, which the active-set method of Lawson and Hanson solves exactly.

    Args:
        means: Kernel means of K runs, float64 [K, m].
        target: Kernel mean of the images, float64 [m].
    """
    distances = (means - target).T.numpy()
    rows = np.vstack([distances, np.ones((1, distances.shape[1]))])
    v, _ = nnls(rows, np.concatenate([np.zeros(len(distances)), [1.0]]))
    return torch.from_numpy(v / v.sum())


def folders_of(runs: Sequence[Path | str]) -> list[Path]:
    """The run folders at or below some places, each once.

    Raises:
        RunError: A place does not exist or holds no run.
    """
    folders: dict[Path, Path] = {}
    for place in map(expand, runs):
        if not place.exists():
            raise RunError(f"{place}: no such folder")
        inside = sorted(results.run_folders(place))
        if not inside:
            raise RunError(f"{place}: no run there; give run folders, or folders that hold some")
        folders |= {folder.resolve(): folder for folder in inside if folder.resolve() not in folders}
    return list(folders.values())


def by_space(folders: Sequence[Path]) -> list[list[Path]]:
    """Run folders grouped by their frozen features, in the order in which the first of each group comes.

    Raises:
        RunError: A run has several backbones.
    """
    groups: list[tuple[dict[str, Any], list[Path]]] = []
    for folder in folders:
        header = results.read_header(folder)
        require_one_backbone(folder, header)
        mine = space(header)
        for known, members in groups:
            if known == mine:
                members.append(folder)
                break
        else:
            groups.append((mine, [folder]))
    return [members for _, members in groups]


UNLABELLED = "images"
"""The only class of a folder of images that are not in class folders."""


def open_images(place: Path) -> ImageSource:
    """The images at a place: of the class folders in a folder or tar file, or of one class if a folder has none.

    Raises:
        DataError: There is no such place, or no image in it.
    """
    if not place.exists():
        raise DataError(f"{as_text(place)}: no such folder or tar file")
    if place.is_file():
        return labelled_folder(place)
    paths, _ = images_below(place)
    if all(path.parent != place for path in paths):
        return labelled_folder(place)
    names, stamp = hashlib.sha256(), hashlib.sha256()
    for path in paths:
        fact = path.stat()
        names.update(f"{as_text(path.relative_to(place))}\0{fact.st_size}\n".encode())
        stamp.update(f"{fact.st_mtime_ns}\n".encode())
    return ImageSource(
        lambda i: paths[i],
        np.zeros(len(paths), np.int64),
        [UNLABELLED],
        describe=lambda i: as_text(paths[i]),
        fingerprint=names.hexdigest(),
        stamp=stamp.hexdigest(),
    )


def _transforms(header: Mapping[str, Any], backbone: Backbone) -> Transforms:
    return Transforms(backbone.data_config, Config.model_validate(header["config"]).transform)


@dataclass
class _Opened:
    """What judging runs by labelled images needs, for all runs of one space."""

    accelerator: Accelerator
    backbone: Backbone
    images: ImageSet
    frozen: Tensor
    weights: Path | None
    code: Sequence[Path]
    track: Track | None

    def judged(self, match: Match, names: Sequence[str]) -> Match:
        """The match with classes in common, and accuracy through the features of the run's learner."""
        learner, _, _ = restore(
            match.folder, self.accelerator, weights=self.weights, code=self.code, backbone=self.backbone
        )
        common = len(set(names) & set(self.images.class_names))
        labels = self.images.labels
        if len(self.images.class_names) < 2 or np.bincount(labels).max() < 2:
            return replace(match, common=common)
        if list(learner.views().values()) == [self.backbone]:
            features = self.frozen
        else:  # a cache of its own, because other learners give their views the same names
            cache = FeatureCache(self.accelerator, track=self.track, store=open_store(HardwareConfig()))
            features = cache.get(learner, self.images, np.arange(len(labels)))
        return replace(match, common=common, accuracy=ncm_leave_one_out(features, labels))
