"""``cil.run`` over 300 tasks of one class each on the shipped backbone, to the end; writes JSON and a PNG.

The classes are the 100 of Split-Tiny-ImageNet-100 in three views each: upright, turned by 90 degrees, as negatives.

    python -m scripts.bench.long --train IMAGES.tar --test IMAGES.tar
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

import cil
from cil import results
from cil.config import Config
from cil.data import sources
from cil.data.sources import ImageSource
from cil.report.figures import CYCLE, new_figure
from cil.runner.checkpoint import to_json
from cil.runner.provenance import versions
from cil.utils import hardware
from scripts import ROOT

MIB = 2**20
Found = dict[str, Any]

VIEWS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "upright": lambda image: image,
    "turned": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "negative": ImageOps.invert,
}


def three_views(split: str, train: str, test: str, per_class: int, tested: int, classes: int = 100) -> ImageSource:
    """Every class as three classes: upright, turned by 90 degrees, as negatives; 100 classes of a tar become 300."""
    whole = sources.folder(Path(train if split == "train" else test))
    first = sources.rank_in_class(whole.labels) < (per_class if split == "train" else tested)
    keep = np.flatnonzero(first & (whole.labels < classes))
    views = list(VIEWS.values())
    return ImageSource(
        lambda i: views[i // len(keep)](whole.read(int(keep[i % len(keep)]))),
        np.concatenate([whole.labels[keep] + v * classes for v in range(len(views))]),
        [f"{name} {view}" for view in VIEWS for name in whole.class_names[:classes]],
        describe=lambda i: whole.describe(int(keep[i % len(keep)])),
        fingerprint=f"{whole.fingerprint} {per_class} {tested} {classes} three views",
    )


def long(arguments: argparse.Namespace, learners: list[Found]) -> Found:
    """Per learner: seconds of every stage in parts, elapsed seconds from one stage's end to the next, and memory."""
    per_class, tested, classes = arguments.per_class, arguments.tested, arguments.classes
    options = {"per_class": per_class, "tested": tested, "classes": classes}
    options |= {split: str(getattr(arguments, split).resolve()) for split in ("train", "test")}
    found: Found = {"images_a_task": per_class, "test_images_a_task": tested, "learners": {}}
    for learner in learners:
        config = Config.model_validate(
            {
                "name": "long",
                "data": {"dataset": f"{Path(__file__).resolve()}:three_views", "options": options},
                "stream": {"increment": 1},
                "learners": [learner],
                "orders": [1993],
                "hardware": {"checkpoints": "last", "device": "cpu"},
            }
        )
        with tempfile.TemporaryDirectory() as root:
            [folder] = cil.run(config, root)
            run = results.read_run(folder)
            ends = [file.stat().st_mtime for file in sorted(folder.glob("stage-*/stage.json"), key=_number)]
        costs = [stage["costs"] for stage in run["stages"]]
        found["learners"][learner["name"]] = {
            "tasks": len(costs),
            "accuracy_last": run["summary"]["accuracy_last"],
            **{key: [cost[key] for cost in costs] for key in ("seconds_learn", "seconds_test", "peak_memory_bytes")},
            "seconds_between": np.diff(ends).tolist(),
        }
    return found


def _number(file: Path) -> int:
    return int(file.parent.name.split("-")[1])


def draw_long(result: Found, path: Path) -> None:
    figure = new_figure(12, 3.6)
    panels = figure.subplots(1, 3)
    for colour, (name, run) in zip(CYCLE, result["learners"].items(), strict=False):
        learned = [a + b for a, b in zip(run["seconds_learn"], run["seconds_test"], strict=True)]
        panels[0].plot(range(1, len(learned) + 1), learned, color=colour, label=name, lw=0.8)
        panels[1].plot(range(2, len(learned) + 1), run["seconds_between"], color=colour, lw=0.8)
        panels[2].plot(range(1, len(learned) + 1), np.array(run["peak_memory_bytes"]) / MIB, color=colour)
    for axes, label in zip(
        panels, ("seconds to learn and test", "seconds from stage to stage, in total", "peak memory, MiB"), strict=True
    ):
        axes.set(xlabel="task", ylabel=label, ylim=(0, None))
    panels[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="folder or tar of class folders")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--classes", type=int, default=100, help="classes of the data, a third of the tasks")
    parser.add_argument("--per-class", type=int, default=10, help="training images per task")
    parser.add_argument("--tested", type=int, default=3, help="test images per task")
    parser.add_argument("--projection", type=int, default=1000, help="width M of ranpac's random projection")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    learners: list[Found] = [{"name": "ncm"}, {"name": "ranpac", "projection": arguments.projection}]
    arguments.out.mkdir(parents=True, exist_ok=True)
    result: Found = {"machine": hardware.facts(hardware.accelerator("cpu")), "versions": versions(), "learners": {}}
    for learner in learners:
        found = long(arguments, [learner])
        result = {**found, **result, "learners": result["learners"] | found["learners"]}
        # after every learner, so that an interrupted run has some results
        (arguments.out / "long.json").write_text(to_json(result), encoding="utf-8")
        draw_long(result, arguments.out / "long.png")
        run = found["learners"][learner["name"]]
        seconds = np.add(run["seconds_learn"], run["seconds_test"])
        print(
            f"{learner['name']}: {run['tasks']} tasks, {seconds.sum():.0f} s, accuracy {run['accuracy_last']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
