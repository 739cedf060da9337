"""What works with each family of timm: features, tuners, one training, exports; on small random models.

There is at least one model of each of timm's modules, made small by options where its constructor has them. A cell is
``works``, ``refused`` (with the one line of the CilError) or ``fails`` (anything else, a fault). A tuner works if one
step of an optimiser had a finite loss and a gradient of every trainable tensor; a tensor without one is refused, as
``cil run`` refuses it after the first task. Exports are those of an ``ncm`` run.

    python -m scripts.studies.families --out results/bench/families.json
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import model_entrypoint
from torch import nn

import cil
from cil.backbone import Backbone, load_backbone
from cil.config import BackboneConfig, Config
from cil.data.sources import ImageSource, from_arrays
from cil.errors import BackboneError, CilError, TrainingError
from cil.export import export
from cil.runner import provenance
from cil.runner.checkpoint import to_json
from cil.tuning import build_tuner
from cil.utils.files import write
from cil.utils.gradients import watched_gradients
from scripts.studies.small_models import LARGE, SMALL, options_of

Cell = dict[str, str]
WEIGHTS = ("full", "partial", "bitfit", "layernorm")
PEFT = ("lora", "dora", "ia3", "oft", "osf")
TOKENS = ("adapter", "vpt_shallow", "vpt_deep", "prefix", "ssf", "lora_kv")
TUNERS = (*WEIGHTS, *PEFT, *TOKENS)
FORMATS = ("safetensors", "torch.export")
NAMED = "lora, targets named"
"""The cell of LoRA on layers that a user names: all linear ones, else all ungrouped convolutions."""


def images(split: str) -> ImageSource:
    """Two classes of three images of 64 × 64 pixels."""
    pixels = np.random.RandomState(split == "test").randint(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    return from_arrays(pixels, np.arange(6) % 2, ["one", "two"])


def attempt(action: Callable[[], Any]) -> Cell:
    """The outcome of an action, and the reason if it does not work."""
    try:
        action()
    except CilError as error:
        several = "\n" in str(error)
        return {"outcome": "fails" if several else "refused", "why": str(error)}
    except Exception as error:  # a fault that no one has foreseen: the table is there to find it
        return {"outcome": "fails", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {"outcome": "works"}


def require_features(backbone: Backbone) -> None:
    """Compute features of two images.

    Raises:
        BackboneError: They are not finite or have another shape than the backbone says.
    """
    with torch.inference_mode():
        found = backbone(batch(backbone))
    if found.shape != (2, backbone.feature_dim) or not found.isfinite().all():
        raise BackboneError(f"features of shape {tuple(found.shape)}, or not finite")


def batch(backbone: Backbone) -> torch.Tensor:
    return torch.randn(2, *backbone.input_size, generator=torch.Generator().manual_seed(0))


def train(backbone: Backbone, config: Any) -> None:
    """Build a tuner and take one step with it.

    Raises:
        CilError: It does not fit, a tensor had no gradient, or the loss is not finite.
    """
    tuner = build_tuner(config, backbone)
    head = nn.Linear(backbone.feature_dim, 2)
    trained = [p for p in tuner.parameters() if p.requires_grad]
    if not trained:
        raise AssertionError("the tuner trains nothing")
    optimizer = torch.optim.SGD([*trained, *head.parameters()], 1e-4)
    with watched_gradients() as gradients:
        loss = nn.functional.cross_entropy(head(backbone(batch(backbone), tuner)), torch.tensor([0, 1]))
        loss.backward()
        optimizer.step()
    if never := gradients.never(tuner):
        raise TrainingError(f"no gradient of {len(never)} tensors, the first is {never[0]}")
    if not loss.isfinite():
        raise TrainingError("the loss is not finite")


def targets_of(backbone: Backbone) -> str:
    """What a user would give as ``targets`` of LoRA: all linear layers, else the ungrouped convolutions by name."""
    modules = dict(backbone.model.named_modules())
    if any(isinstance(module, nn.Linear) for module in modules.values()):
        return "all-linear"
    ungrouped = (name for name, module in modules.items() if isinstance(module, nn.Conv2d) and module.groups == 1)
    return "|".join(map(re.escape, ungrouped))


def config_of(name: str, options: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "name": "families",
            "data": {"dataset": f"{Path(__file__).resolve()}:images"},
            "backbone": {"name": name, "weights": "random", "options": options},
            "stream": {"sizes": [2]},
            "orders": ["natural"],
            "learners": ["ncm"],
            "hardware": {"device": "cpu", "feature_store": "off"},
        }
    )


def measure(name: str, options: dict[str, Any], *, exports: bool = True) -> dict[str, Any]:
    """All cells of one architecture, or those without a run and its exports; for large models features alone."""
    found: list[Backbone] = []

    def load() -> None:
        found.append(load_backbone(BackboneConfig(name=name, weights="random", options=options)))
        require_features(found[-1])

    cells = {"features": attempt(load)}
    row = {"module": module_of(name), "architecture": name, "options": options, "cells": cells}
    if not found:
        return row
    backbone = found[-1]
    targets = targets_of(backbone)
    row |= {
        "class": type(backbone.model).__name__,
        "parameters": sum(p.numel() for p in backbone.model.parameters()),
        "pixels": backbone.input_size[-1],
        "feature_dim": backbone.feature_dim,
        "targets": "linear layers" if targets == "all-linear" else "convolutions",
    }
    if name in LARGE:
        return {**row, "untried": f"no small model, {row['parameters'] / 1e6:.0f} M weights"}
    for kind in TUNERS:
        cells[kind] = attempt(lambda kind=kind: train(backbone, kind))
    cells[NAMED] = attempt(lambda: train(backbone, {"name": "lora", "targets": targets}))
    if exports:
        cells |= exported(name, options)
    return row


def exported(name: str, options: dict[str, Any]) -> dict[str, Cell]:
    """The outcomes of an ``ncm`` run with frozen features and of its exports."""
    with tempfile.TemporaryDirectory() as root:
        folders: list[Path] = []
        cells = {"run": attempt(lambda: folders.extend(cil.run(config_of(name, options), Path(root))))}
        for kind in FORMATS if folders else ():
            cells[kind] = attempt(lambda kind=kind: export(folders[0], Path(root, kind), kind))
    return cells


def module_of(name: str) -> str:
    """The timm module of an architecture, e.g. ``swin_transformer``."""
    return str(model_entrypoint(name).__module__).rsplit(".", 1)[-1]


def untried() -> Iterator[str]:
    """timm's modules that have no model in the table."""
    yield from sorted({module_of(name) for name in timm.list_models()} - {module_of(name) for name in SMALL})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="glob of the architectures to measure, even if --out holds them")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; what it already holds is not run again")
    args = parser.parse_args()
    old = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"families": []}
    known = {row["architecture"]: row for row in old["families"]}
    for name in SMALL:
        if fnmatch.fnmatch(name, args.only) and (name not in known or args.only != "*"):
            started = time.perf_counter()
            known[name] = measure(name, options_of(name))
            outcomes = {key: cell for key, cell in known[name]["cells"].items() if cell["outcome"] == "fails"}
            print(name, round(time.perf_counter() - started, 1), outcomes or "", flush=True)
        rows = [known[key] for key in SMALL if key in known]
        rows.sort(key=lambda row: (row["module"], row["architecture"]))
        found = {"versions": provenance.versions(), "untried": list(untried()), "families": rows}
        write(args.out, to_json(found))


if __name__ == "__main__":
    main()
