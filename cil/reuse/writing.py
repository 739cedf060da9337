"""Writes a joined learner as a run folder: its stage, its header with the runs of which it was made, and its test."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from cil import results
from cil.config import DataConfig, HardwareConfig, LearnerEntry
from cil.config.parsing import to_yaml
from cil.data.images import LoadedSplit
from cil.errors import RunError
from cil.features import FeatureCache
from cil.learner import Learner
from cil.results import Costs, Header, StageRow
from cil.reuse.describing import stored_specification
from cil.reuse.parents import Parent
from cil.reuse.specification import Specification
from cil.runner.checkpoint import RunFolder, state_bytes, to_json
from cil.runner.evaluation import count_correct, evaluate
from cil.runner.provenance import NO_IMAGES, versions
from cil.runner.stages import prediction_tensors
from cil.store import open_store
from cil.stream import ClassIncremental, Stream
from cil.utils import hardware
from cil.utils.files import fresh, remove, reporting
from cil.utils.paths import expand
from cil.utils.stored import digest


@dataclass(frozen=True)
class Joint:
    """A joined run.

    Attributes:
        folder: Its folder.
        runs: Number of runs of which it was made.
        classes: Number of classes that it knows.
        shared: Number of these that several runs knew.
        images: Number of training images that the runs had learned.
        accuracy: Fraction of the test images that it classifies correctly; None without test images.
    """

    folder: Path
    runs: int
    classes: int
    shared: int
    images: int
    accuracy: float | None


def write(
    parents: Sequence[Parent],
    names: Sequence[str],
    learner: Learner,
    entry: Mapping[str, Any],
    out: Path,
    accelerator: Accelerator,
    images: Path | str | None,
    started: float,
) -> Joint:
    """Write a joined learner as a run of one stage, which appears when it is complete.

    Args:
        parents: The runs of which it was made.
        names: Its classes.
        learner: The learner, on the device of ``accelerator``.
        entry: The learner's section of the configuration.
        out: The folder to write; nothing is there.
        accelerator: Device and precision.
        images: Test images, or None.
        started: Time at which the work began, as ``time.perf_counter`` tells it.

    Raises:
        RunError: The folder cannot be written; nothing is left behind then.
        StreamError: The test images have other classes.
    """
    learner.eval()
    learned = time.perf_counter()
    header = _header(parents, names, learner, entry, accelerator)
    if images is None:
        counts, predictions, passes = _untested(), dict[str, Tensor](), 0
    else:
        split = _test_split(expand(images))
        stream = _test_stream(split, parents[0], names)
        found = evaluate(learner, stream, 0, FeatureCache(accelerator, store=open_store(HardwareConfig())))
        counts, predictions, passes = count_correct(found, stream, 0), prediction_tensors(found), found.passes
        header["tested_on"], header["data"]["test"] = "test", split.facts
    costs = [row["costs"] for parent in parents for row in parent.rows]
    row: StageRow = {
        **counts,
        "unchanged_since": [0] * len(learner.views()),
        "costs": _costs(costs, learner, passes, learned - started, time.perf_counter() - learned),
        "log": [],
        "histograms": {},
    }
    temporary = fresh(out)
    try:
        with reporting(out, "Nothing was written"):
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            folder = RunFolder(temporary)
            folder.save_stage(0, learner, row, predictions)
            folder.write("config.yaml", to_yaml(header["config"]))
            checksum = results.read_stage(temporary, 0).checksum
            known = [stored_specification(parent.folder) for parent in parents]
            if all(known):
                Specification.joined(names, [one for one in known if one]).save(temporary, checksum)
            folder.write("metrics.json", to_json(results.run_file(header, [row], [checksum], 1)))
            temporary.rename(out)
    finally:
        remove(temporary)  # it still exists only after an error
    times = Counter(name for parent in parents for name in parent.names)
    accuracy = results.summarise([row]).get("accuracy_last")
    shared = sum(count > 1 for count in times.values())
    return Joint(out, len(parents), len(names), shared, sum(parent.images for parent in parents), accuracy)


def _header(
    parents: Sequence[Parent],
    names: Sequence[str],
    learner: Learner,
    entry: Mapping[str, Any],
    accelerator: Accelerator,
) -> Header:
    first = parents[0].header
    taught = [found for parent in parents for found, _ in parent.taught]
    whole = digest("\n".join(sorted(taught)).encode())
    train = {"sha256": whole, "images": sum(parent.images for parent in parents), "skipped": [], "tasks": [whole[:32]]}
    header: Header = {
        "learner": LearnerEntry.model_validate(entry).title,
        "paper": learner.paper,
        "stores_images": any(parent.header["stores_images"] for parent in parents),
        "trains_backbone": any(parent.header["trains_backbone"] for parent in parents),
        "chosen_by": first["chosen_by"],
        "tested_on": "nothing",
        "config": {**first["config"], "learners": [dict(entry)]},
        "class_names": list(names),
        "class_order": list(range(len(names))),
        "tasks": [list(range(len(names)))],
        "backbone": first["backbone"],
        "transform": first["transform"],
        "data": {"train": train, "test": dict(NO_IMAGES)},
        "versions": versions(),
        "machine": hardware.facts(accelerator),
        "joined": [parent.record() for parent in parents],
    }
    if "code" in first and entry.get("class") == first["config"]["learners"][0].get("class"):
        header["code"] = first["code"]
    return header


def _untested() -> results.Counts:
    return {
        "correct": [0],
        "correct_within_task": [0],
        "total": [0],
        "top5_accuracy": None,
        "class_mean_accuracy": None,
        "task_id_accuracy": None,
    }


def _test_split(place: Path) -> LoadedSplit:
    config = DataConfig(dataset="folder", root=place.parent, test=place.name)
    return LoadedSplit(config, "test", HardwareConfig())


def _test_stream(split: LoadedSplit, first: Parent, names: Sequence[str]) -> Stream:
    """One task of all classes; its training images are the test images, which nobody reads as such."""
    images = split.images(first.transforms)
    if extra := sorted(set(images.class_names) ^ set(names)):
        side = "does not know" if extra[0] in images.class_names else "knows, and the test images lack,"
        raise RunError(
            f"--images {split.title}: the joined run {side} the class {extra[0]!r}; give test images of exactly its "
            f"{len(names)} classes, or leave --images out"
        )
    return Stream(images, images, ClassIncremental(list(names), sizes=[len(names)]))


def _costs(parts: Sequence[Costs], learner: Learner, test_passes: int, learn: float, test: float) -> Costs:
    """What the runs cost together, and what the joined learner keeps."""
    return {
        "trainable_parameters": max(part["trainable_parameters"] for part in parts),
        **state_bytes(learner),
        "train_images": sum(part["train_images"] for part in parts),
        "train_passes": sum(part["train_passes"] for part in parts),
        "test_passes": test_passes,
        "seconds_learn": learn,
        "seconds_test": test,
        "peak_memory_bytes": hardware.peak_memory_bytes(learner.backbone.device),
    }
