"""Damage stored files one at a time, and read them: every answer is the right one, or one line that names the file.

    python -m scripts.fuzz.files --count 2000 --seed 0

Files of two runs (one finished, one interrupted), of the feature store and of an exported model are damaged as
``scripts.fuzz.damage`` says. After each damage, ``compare``, ``predict``, resuming and the reading of the exported
model are called in this process. An answer must equal that of the undamaged files bit for bit. Files without checksums,
as earlier versions wrote them, may give another answer or one line about the value, but no traceback. Exit code 1 if
anything else happens.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cil
from cil import report, results
from cil.config import Config
from cil.errors import CilError
from cil.export import export, load
from cil.prediction import Model, open_run
from cil.runner.benchmark import Inputs
from cil.runner.checkpoint import to_json
from scripts.fuzz.damage import choose

BACKBONE = {
    "name": "vit_tiny_patch16_224",
    "options": {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "weights": "random",
}
AREAS = {"finished": 0.3, "interrupted": 0.35, "export": 0.25, "store": 0.1}
"""What is damaged, and how often."""


@dataclass
class Scene:
    """Undamaged files below ``pristine``, the copy that is damaged below ``tree``, and the answers of the former.

    Both runs are of one configuration and two class orders. ``inputs`` are the data and the backbone of all runs.
    """

    root: Path
    config: Config
    inputs: Inputs
    images: torch.Tensor

    @property
    def tree(self) -> Path:
        return self.root / "tree"

    def reset(self) -> None:
        shutil.rmtree(self.tree, ignore_errors=True)
        shutil.copytree(self.root / "pristine", self.tree)

    def only(self, order: int) -> Config:
        return self.config.model_copy(update={"orders": [order]})

    def folder(self, order: int) -> Path:
        return self.tree / "results" / "fuzz" / "ncm" / f"order{order}-seed0"

    def compare(self) -> Any:
        compared = report.compare_runs([self.tree / "results"])
        return report.page(compared), report.as_csv(compared[0])

    def predict(self, order: int) -> Any:
        return self.answer(open_run(self.folder(order)))

    def answer(self, model: Model) -> Any:
        with torch.inference_mode():
            return model.names, *(part.tolist() for part in model(self.images))

    def resume(self, order: int) -> Any:
        """What a call of ``cil run`` leaves behind, without what differs from time to time."""
        [folder] = cil.run(self.only(order), self.tree / "results", load=lambda *_: self.inputs)
        return stable(results.read_run(folder))

    def exported(self) -> Any:
        return self.answer(load(self.tree / "export"))

    def stored(self) -> Any:
        """A run whose features are read from the store, or computed again where these are damaged."""
        with tempfile.TemporaryDirectory() as place:
            [folder] = cil.run(self.only(1), place)
            return stable(results.read_run(folder))

    def readers(self, area: str) -> dict[str, Callable[[], Any]]:
        if area == "export":
            return {"export": self.exported}
        if area == "store":
            return {"store": self.stored}
        order = 1 if area == "finished" else 2
        return {
            "compare": self.compare,
            "predict": lambda: self.predict(order),
            "resume": lambda: self.resume(order),
        }

    def files(self, area: str) -> list[Path]:
        """The files of an area that are read; TensorBoard's, the lock and the copy of the configuration are not."""
        places = {"export": self.tree / "export", "store": self.tree / "cache"}
        place = places.get(area) or self.folder(1 if area == "finished" else 2)
        return [file for file in sorted(place.rglob("*")) if file.suffix in (".json", ".safetensors")]


def stable(run: dict[str, Any]) -> Any:
    rows = [{key: value for key, value in row.items() if key != "costs"} for row in run["stages"]]
    return run["complete"], rows, run["accuracy_matrix"], run["class_names"], run["summary"]["accuracy_last"]


def prepare(root: Path) -> Scene:
    """Two runs, an exported model and a feature store below ``root/pristine``."""
    config = Config.model_validate(
        {
            "name": "fuzz",
            "data": {"dataset": "digits", "per_class": 8},
            "backbone": BACKBONE,
            "stream": {"increment": 4},
            "learners": ["ncm"],
            "orders": [1, 2],
            "hardware": {"device": "cpu", "feature_store": str(root / "tree" / "cache")},
        }
    )
    inputs = Inputs(config, torch.device("cpu"))
    first, second = cil.run(config, root / "tree" / "results", load=lambda *_: inputs)
    export(first, root / "tree" / "export")
    size = inputs.transforms.size
    scene = Scene(root, config, inputs, torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0)))
    shutil.rmtree(second / "stage-02")
    header = results.read_header(second)
    kept = [results.read_stage(second, i) for i in range(2)]
    known: results.Header = {key: header[key] for key in results.Header.__annotations__ if key in header}  # type: ignore[assignment]
    content = results.run_file(known, [stage.row for stage in kept], [stage.checksum for stage in kept], 3)
    (second / "metrics.json").write_text(to_json(content), encoding="utf-8")
    shutil.copytree(root / "tree", root / "pristine")
    return scene


def judge(scene: Scene, reader: Callable[[], Any], right: Any, file: Path, noticed: bool) -> str:
    """``right``, ``named`` or ``other``; else a finding with what happened."""
    try:
        answer = reader()
    except CilError as error:
        text = str(error)
        if "\n" in text:
            return f"finding: an error of several lines: {text!r}"
        # the folder of a run or stage is named where its files contradict each other, and so is the other swapped file
        return "named" if str(scene.tree) in text or not noticed else f"finding: no file in: {text}"
    except Exception:
        return f"finding: {traceback.format_exc(limit=-3)}"
    if answer == right:
        return "right"
    return "finding: another answer, and no error" if noticed else "other"


def fuzz(count: int, seed: int, root: Path, say: Callable[[str], None] = print) -> Counter[str]:
    """Damage ``count`` files, one at a time; the number of readings by outcome, and of findings.

    Args:
        count: Number of damaged files.
        seed: Decides the files and their damages; case i depends on (seed, i) alone.
        root: An empty folder to work in.
        say: Receives every finding.
    """
    scene, outcomes = prepare(root), Counter[str]()
    right = {}
    for area in AREAS:
        for name, reader in scene.readers(area).items():
            scene.reset()
            right[area, name] = reader()
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        [area] = rng.choices(list(AREAS), list(AREAS.values()))
        scene.reset()
        file = rng.choice(scene.files(area))
        damage, noticed = choose(file, rng)
        damage(file, rng)
        outcomes["files"] += 1
        for name, reader in scene.readers(area).items():
            outcome = judge(scene, reader, right[area, name], file, noticed)
            outcomes[outcome.partition(":")[0]] += 1
            if outcome.startswith("finding"):
                say(f"case {i}: {damage.__name__} of {file.relative_to(scene.tree)}, {name}: {outcome}")
    return outcomes


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="damaged files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    logging.getLogger("cil").setLevel(logging.ERROR)  # the feature store warns of every damage
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        outcomes = fuzz(args.count, args.seed, Path(place))
    print(json.dumps({**outcomes, "seconds": round(time.perf_counter() - started, 1)}))
    return 1 if outcomes["finding"] else 0


if __name__ == "__main__":
    sys.exit(main())
