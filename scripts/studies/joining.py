"""Joins ten runs of ten classes each, and finds each of them by test images of its classes.

Every run is LDA on the first training images of its classes of Split-Tiny-ImageNet-100, class order 1993. Measured are
the joined run, one run over all images, the routed run, and the runs without a router (the class of the highest
probability of all runs), on the same test images; and how often ``cil find`` names the run of a task first, for all of
its test images, labelled or not, and for a few of them.

    python -m scripts.studies.joining --data ../shared/data --work WORK --out results/bench/joining.json
"""

from __future__ import annotations

import argparse
import json
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cil.backbone import load_backbone
from cil.config import BackboneConfig, Config, HardwareConfig
from cil.data.images import load_images
from cil.data.sources import folder as class_folders
from cil.features import FeatureCache
from cil.prediction import open_run
from cil.results import read_run
from cil.reuse.finding import describe, find
from cil.reuse.joining import join
from cil.runner import run
from cil.runner.provenance import versions
from cil.store import open_store
from cil.stream.protocol import class_order
from cil.utils import hardware
from cil.utils.files import write

FEW = (5, 20, 50)
"""Numbers of test images with which a run is looked for."""


def extract(tar: Path, place: Path, per_class: int) -> list[str]:
    """Write the first images of each class of a tar into class folders; returns the names of the classes in order."""
    counts: dict[str, int] = defaultdict(int)
    with tarfile.open(tar) as archive:
        for member in archive:
            name = Path(member.name).parent.name
            if member.isfile() and counts[name] < per_class:
                counts[name] += 1
                file = place / name / Path(member.name).name
                file.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                file.write_bytes(content.read())
    return sorted(counts)


def made(root: Path, work: Path, name: str) -> Path:
    """The run of LDA over all classes in a folder, in one task."""
    config = {
        "name": name,
        "data": {"dataset": "folder", "root": str(root)},
        "stream": {"increment": len(list((root / "train").iterdir()))},
        "learners": [{"name": "slda", "shrinkage": 0.1}],
        "orders": ["natural"],
        "hardware": {"device": "cpu"},
    }
    [folder] = run(Config.model_validate(config), work / "runs")
    return folder


def parts(root: Path, names: list[str], tasks: int) -> list[Path]:
    """A folder per task with links to its classes, in class order 1993."""
    order = class_order(names, 1993)
    places = []
    for task, members in enumerate(np.array_split(order, tasks)):
        place = root.parent / f"task{task}"
        for split in ("train", "val"):
            (place / split).mkdir(parents=True, exist_ok=True)
            for c in members:
                link = place / split / names[c]
                if not link.is_symlink():
                    link.symlink_to((root / split / names[c]).resolve())
        places.append(place)
    return places


def without_density(folders: list[Path], tests: Path) -> float:
    """Accuracy of the class of the highest probability of all runs, each over its own classes."""
    models = [open_run(folder) for folder in folders]
    backbone, source = load_backbone(BackboneConfig()), class_folders(tests)
    images = load_images(source, "test", backbone)
    cache = FeatureCache(hardware.accelerator(), store=open_store(HardwareConfig()))
    features = cache.get(backbone, images, np.arange(len(source)))
    with torch.inference_mode():
        best = torch.cat([model.learner.logits(features).double().softmax(1) for model in models], 1).argmax(1)
    names = [name for model in models for name in model.names]
    return float(
        np.mean([names[b] == source.class_names[c] for b, c in zip(best.tolist(), source.labels, strict=True)])
    )


def finds(folders: list[Path], places: list[Path], work: Path, draws: int) -> dict[str, Any]:
    """How often the run of a task is the first one, by number of unlabelled test images; ``all``: labelled ones."""
    found: dict[str, Any] = {"all": 0, "all_by_accuracy": 0, "smallest_ratio": np.inf, "few": {}}
    for place, folder in zip(places, folders, strict=True):
        labelled = find(folders, place / "val")
        found["all"] += min(labelled.matches, key=lambda match: match.mmd2).folder == folder
        found["all_by_accuracy"] += labelled.matches[0].folder == folder
        found["smallest_ratio"] = min(found["smallest_ratio"], labelled.ratios[1])
    for count in FEW:
        hits = 0
        for task, (place, folder) in enumerate(zip(places, folders, strict=True)):
            files = sorted(path for c in sorted((place / "val").iterdir()) for path in c.iterdir())
            for draw in range(draws):
                chosen = np.random.RandomState([task, draw, count]).permutation(len(files))[:count]
                some = work / "few" / f"{task}-{draw}-{count}"
                some.mkdir(parents=True, exist_ok=True)
                for i in chosen:
                    (some / f"{files[i].parent.name}-{files[i].name}").write_bytes(files[i].read_bytes())
                hits += find(folders, some, top=1).matches[0].folder == folder
        found["few"][str(count)] = hits / (draws * len(places))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the tar files of the stream")
    parser.add_argument("--work", type=Path, required=True, help="folder for images and runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--per-class", type=int, default=60, help="training images per class")
    parser.add_argument("--tests", type=int, default=20, help="test images per class")
    parser.add_argument("--tasks", type=int, default=10, help="number of runs")
    parser.add_argument("--draws", type=int, default=3, help="draws of few images per task and number")
    options = parser.parse_args()
    root = options.work / "all"
    names = extract(options.data / "tiny_imagenet_stream_train.tar", root / "train", options.per_class)
    extract(options.data / "tiny_imagenet_stream_val.tar", root / "val", options.tests)
    places = parts(root, names, options.tasks)
    whole = made(root, options.work, "all")
    folders = [made(place, options.work, place.name) for place in places]
    describe(folders)
    joined = join(folders, options.work / "joined", images=root / "val")
    routed = join(folders, options.work / "routed", route=True, images=root / "val")
    facts = {
        "tasks": options.tasks,
        "per_class": options.per_class,
        "test_images": read_run(whole)["stages"][-1]["total"][0],
        "within_task": float(np.mean([read_run(folder)["summary"]["accuracy_last"] for folder in folders])),
        "one_run": read_run(whole)["summary"]["accuracy_last"],
        "joined": joined.accuracy,
        "routed": routed.accuracy,
        "no_density": without_density(folders, root / "val"),
        "found": finds(folders, places, options.work, options.draws),
        "largest_difference": difference(whole, joined.folder),
        "versions": versions(),
    }
    write(options.out, json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


def difference(one: Path, two: Path) -> float:
    """The largest difference of two runs' logits on random features, relative to the largest logit."""
    models = open_run(one), open_run(two)
    features = torch.randn(
        64, models[0].backbone.feature_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    order = [models[1].names.index(name) for name in models[0].names]
    with torch.inference_mode():
        a, b = (model.learner.logits(features) for model in models)
    return float((a - b[:, order]).abs().max() / a.abs().max())


if __name__ == "__main__":
    main()
