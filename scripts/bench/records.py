"""What a run of many one-class tasks writes, and what writing and resuming cost; writes JSON.

Tasks of one class each on an untrained backbone of one block, learned by ``ncm``, so that next to nothing is computed.
``recording`` is the time of a stage that is neither learning nor testing, ``parts`` the median of the calls in it: the
stage's folder, reading it again for its checksum, ``metrics.json``, and TensorBoard with its figures.

    python -m scripts.bench.records --tasks 5 20 100 300
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cil
from cil import report, results
from cil.config import Config
from cil.data.sources import ImageSource, from_arrays
from cil.runner.benchmark import _Recorder
from cil.runner.checkpoint import RunFolder, to_json
from cil.runner.provenance import versions
from cil.runner.tensorboard import Tracker
from cil.utils import hardware
from scripts import ROOT

Found = dict[str, Any]
PARTS = {
    "stage_folder": (RunFolder, "save_stage"),
    "checksum": (results, "read_stage"),
    "metrics": (_Recorder, "_write_metrics"),
    "tensorboard": (Tracker, "stage"),
}
BACKBONE = {
    "name": "vit_tiny_patch16_224",
    "options": {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "weights": "random",
}


def classes(split: str, count: int) -> ImageSource:
    """``count`` classes of one grey value each, with noise: 4 training and 4 test images of 16 × 16 pixels."""
    labels = np.arange(count).repeat(4)
    noise = np.random.RandomState(split == "test").randint(0, 8, (len(labels), 16, 16))
    images = (labels[:, None, None] * 240 // count + noise).astype(np.uint8)
    return from_arrays(images, labels, [f"class {i}" for i in range(count)])


def kept(folder: Path) -> Found:
    """Bytes of a run's files, by name."""
    sizes: dict[str, int] = {}
    for file in filter(Path.is_file, folder.rglob("*")):
        name = "events" if file.name.startswith("events.") else file.name
        sizes[name] = sizes.get(name, 0) + file.stat().st_size
    return {"bytes": sizes, "bytes_all": sum(sizes.values())}


@contextmanager
def timed(owner: Any, name: str) -> Iterator[list[float]]:
    """The seconds of every call of a function of a class or module during the block."""
    original, seconds = getattr(owner, name), list[float]()

    def call(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*arguments, **named)
        finally:
            seconds.append(time.perf_counter() - started)

    setattr(owner, name, call)
    try:
        yield seconds
    finally:
        setattr(owner, name, original)


def measure(tasks: int, root: Path) -> Found:
    """One run in parts of seconds and bytes, the replay that resumes it, and the page that compares it."""
    config = Config.model_validate(
        {
            "name": "records",
            "data": {"dataset": f"{Path(__file__).resolve()}:classes", "options": {"count": tasks}},
            "backbone": BACKBONE,
            "stream": {"increment": 1},
            "learners": ["ncm"],
            "hardware": {"device": "cpu", "feature_store": "off"},
        }
    )
    with ExitStack() as stack:
        parts = {title: stack.enter_context(timed(*function)) for title, function in PARTS.items()}
        [folder] = cil.run(config, root)
        seconds = {title: statistics.median(found) for title, found in parts.items()}
    run = results.read_run(folder)
    ends = [(folder / f"stage-{i:02d}" / "stage.json").stat().st_mtime for i in range(tasks)]
    costs = [row["costs"] for row in run["stages"]]
    computing = [c["seconds_learn"] + c["seconds_test"] for c in costs]
    recording = np.diff(ends) - computing[1:]
    tenth = max(1, tasks // 10)
    found: Found = {"tasks": tasks, "recording": float(recording.sum()), "computing": sum(computing), "parts": seconds}
    found["recording_stage"] = statistics.median(recording.tolist())
    found["recording_first_tenth"] = statistics.median(recording[:tenth].tolist())
    found["recording_last_tenth"] = statistics.median(recording[-tenth:].tolist())
    started = time.perf_counter()
    tracker = Tracker(root, {key: run[key] for key in results.Header.__annotations__ if key in run})  # type: ignore[arg-type]
    tracker.replay(run["stages"])
    tracker.close()
    found["seconds_replay"] = time.perf_counter() - started
    started = time.perf_counter()
    found["page_bytes"] = len(report.page(report.compare_runs([folder])).encode())
    return {**found, "seconds_compare": time.perf_counter() - started, **kept(folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[5, 20, 100, 300])
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/records.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    machine = hardware.facts(hardware.accelerator("cpu"))
    found: Found = {"machine": machine, "versions": versions(), "streams": {}}
    for tasks in given.tasks:
        with tempfile.TemporaryDirectory() as root:
            found["streams"][str(tasks)] = measure(tasks, Path(root))
        print(json.dumps(found["streams"][str(tasks)]), flush=True)
        given.out.write_text(to_json(found), encoding="utf-8")


if __name__ == "__main__":
    main()
