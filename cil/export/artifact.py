"""Loads an exported model: reads its facts, verifies the hashes of its files, and rebuilds the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cil.backbone import Backbone, load_backbone
from cil.config import BackboneConfig, LearnerEntry
from cil.config.renamed import current_learner_keys
from cil.data.transforms import Transforms
from cil.errors import ExportError
from cil.export.program import INPUT, OUTPUTS, quiet, require_onnx
from cil.features import FeatureCache
from cil.learner import Context
from cil.learners import registry
from cil.prediction import Model, Trained
from cil.runner.checkpoint import restore_learner
from cil.stream import past_tasks
from cil.utils import hardware

FACTS = "model.json"
SCHEMA = 1
FORMATS = {"safetensors": "model.safetensors", "torch.export": "model.pt2", "onnx": "model.onnx"}
"""Format → file name of the model."""
BACKBONE, LEARNER = "backbone.", "learner."
"""Prefixes of the tensors' names in ``model.safetensors``."""

Facts = dict[str, Any]


class Program(Model):
    """A program of torch.export or ONNX, without a learner; runs on the CPU."""

    def __init__(self, answer: Callable[[Tensor], tuple[Tensor, Tensor]], facts: Facts) -> None:
        super().__init__(facts["classes"], Transforms(data_config(facts)), torch.device("cpu"))
        self._answer = [answer]  # in a list, because a program of torch would become a submodule, which refuses eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = self._answer[0](images)
        return logits, features


def is_artifact(folder: Path) -> bool:
    """Whether a folder holds an exported model."""
    return (folder / FACTS).is_file()


def load(folder: str | Path, device: str = "cpu") -> Model:
    """An exported model of any format: images → (logits, features), with class names and transforms.

    The format safetensors gives a :class:`cil.prediction.Trained`, whose ``learner`` can continue to learn; the other
    formats run on the CPU. Neither the run folder nor the backbone's original weights are needed.

    Args:
        folder: A folder that :func:`cil.export.export` wrote.
        device: As ``hardware.device``; for the other formats only ``cpu`` and ``auto``.

    Raises:
        ExportError: The folder has no exported model or a damaged one, a program is to run on another device than the
            CPU, or a package is missing.
        PluginError: The model has a custom learner whose code cannot be found here.
    """
    folder = Path(folder)
    facts = read_facts(folder)
    for name, known in facts["files"].items():
        file = folder / name
        if not file.is_file() or sha256(file) != known["sha256"]:
            what = "is not the file that was exported" if file.is_file() else "is missing"
            raise ExportError(f"{file}: {what}; export the run again")
    if facts["format"] == "safetensors":
        return _trained(folder, facts, device)
    if device not in ("cpu", "auto"):
        raise ExportError(f"{folder}: {facts['format']} runs on the CPU here, not on {device}; export safetensors")
    return _onnx(folder, facts) if facts["format"] == "onnx" else _program(folder, facts)


def read_facts(folder: Path) -> Facts:
    """The content of ``model.json``.

    Raises:
        ExportError: The file is missing, damaged, or written by a later version.
    """
    try:
        facts: Facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{folder}: no {FACTS} there; give a folder that `cil export` wrote") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder / FACTS}: damaged ({error}); export the run again") from None
    if facts.get("schema") != SCHEMA or facts.get("format") not in FORMATS:
        raise ExportError(
            f"{folder / FACTS}: has schema {facts.get('schema')} and format {facts.get('format')}; this version "
            f"reads schema {SCHEMA} with {', '.join(FORMATS)}"
        )
    return facts


def data_config(facts: Facts) -> dict[str, Any]:
    """The preprocessing of an exported model as a data configuration of timm."""
    steps = facts["preprocessing"]
    return {**steps, "input_size": (3, steps["input_size"], steps["input_size"])}


def sha256(file: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _trained(folder: Path, facts: Facts, device: str) -> Trained:
    accelerator = hardware.accelerator(device)
    recorded = facts["backbone"]
    cls, parameters = registry.configure(LearnerEntry.model_validate(current_learner_keys(facts["learner"]["entry"])))
    model = load_backbone(BackboneConfig(**recorded["config"], weights="random")).model
    tensors = load_file(folder / FORMATS["safetensors"])
    state = {key: value for key, value in tensors.items() if key.startswith(LEARNER)}
    try:
        model.load_state_dict({k.removeprefix(BACKBONE): v for k, v in tensors.items() if k not in state})
        backbone = Backbone(model, recorded["name"], data_config(facts)).to(accelerator.device)
        if backbone.fingerprint != recorded["sha256"]:
            raise ExportError(f"{folder}: its backbone is not the one the run used; export the run again")
        learner = registry.instantiate(cls, parameters, backbone).to(accelerator.device)
        cache = FeatureCache(accelerator)
        restore_learner(
            learner,
            past_tasks(facts["tasks"], facts["classes"]),
            lambda stage: Context(accelerator, cache, stage=stage),
            {k.removeprefix(LEARNER): v for k, v in state.items()} | facts["learner"]["state"],
        )
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ExportError(
            f"{folder}: does not fit this version of {facts['learner']['title']} or its backbone: "
            f"{' '.join(str(error).split())}"
        ) from None
    return Trained(learner, Transforms(backbone.data_config), facts["classes"])


def _program(folder: Path, facts: Facts) -> Program:
    with quiet():
        module = torch.export.load(folder / FORMATS["torch.export"]).module()
    return Program(module, facts)


def _onnx(folder: Path, facts: Facts) -> Program:
    require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / FORMATS["onnx"]), options, providers=["CPUExecutionProvider"])

    def answer(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = session.run(list(OUTPUTS), {INPUT: images.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(features)

    return Program(answer, facts)
