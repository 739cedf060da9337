"""What a run of many one-class tasks writes, and what writing and resuming cost; prints JSON.

300 tasks of one class each on an untrained backbone of one block, learned by ``ncm``. ``recording`` is the time of a
stage that is neither learning nor testing: the stage's folder, ``metrics.json`` and TensorBoard.

    python -m scripts.bench.records --tasks 300
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cil
from cil import report, results
from cil.config import Config
from cil.data.sources import ImageSource, from_arrays
from cil.runner.tensorboard import Tracker

Found = dict[str, Any]
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
    [folder] = cil.run(config, root)
    run = results.read_run(folder)
    ends = [(folder / f"stage-{i:02d}" / "stage.json").stat().st_mtime for i in range(tasks)]
    costs = [row["costs"] for row in run["stages"]]
    computing = [c["seconds_learn"] + c["seconds_test"] for c in costs]
    recording = np.diff(ends) - computing[1:]
    last = slice(-max(1, tasks // 10), None)
    found = {"tasks": tasks, "recording_last_tenth": float(recording[last].mean()), "recording": float(recording.sum())}
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
    parser.add_argument("--tasks", type=int, nargs="+", default=[100, 300])
    for tasks in parser.parse_args().tasks:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as root:
            print(json.dumps(measure(tasks, Path(root)), indent=1), flush=True)


if __name__ == "__main__":
    main()
