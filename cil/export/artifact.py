"""Loads an exported model: reads its facts, verifies the hashes of its files, and rebuilds the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from cil.backbone import Backbone, Backbones, end_in_projection, load_backbone
from cil.config import BackboneConfig, CombineConfig, LearnerEntry
from cil.config import code as custom
from cil.config.renamed import current_learner_keys
from cil.data.packed import make_transforms
from cil.errors import ExportError
from cil.export.program import INPUT, OUTPUTS, quiet, require_onnx
from cil.features import FeatureCache
from cil.learner import Context
from cil.learners import registry
from cil.prediction import Model, Trained
from cil.runner.checkpoint import restore_learner
from cil.stream import past_tasks
from cil.utils import hardware
from cil.utils.stored import check_file, first_error, read_json

FACTS = "model.json"
SCHEMA = 1
FORMATS = {"safetensors": "model.safetensors", "torch.export": "model.pt2", "onnx": "model.onnx"}
"""Format → file name of the model."""
BACKBONE, LEARNER = "backbone.", "learner."
"""Prefixes of the tensors' names in ``model.safetensors``."""

AGAIN = "restore it, or export the run again"

Facts = dict[str, Any]


class _File(TypedDict):
    sha256: str


class _Learner(TypedDict):
    title: str
    entry: dict[str, Any]
    state: dict[str, Any]
    code: NotRequired[dict[str, str]]


class _Backbone(TypedDict):
    name: str
    sha256: str
    config: dict[str, Any]


class _Backbones(TypedDict):
    """Several backbones together."""

    name: str
    sha256: str
    members: Annotated[list[_Backbone], Field(min_length=2)]
    combine: dict[str, Any]


class _Preprocessing(TypedDict):
    input_size: Annotated[int, Field(ge=1, le=2**16)]
    interpolation: str
    crop_pct: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    mean: list[float]
    std: list[float]


class _PackedPreprocessing(TypedDict):
    """The preprocessing of each backbone."""

    members: list[_Preprocessing]


class _Model(TypedDict):
    """The keys of ``model.json`` that reading a model needs."""

    schema: int
    format: str
    classes: list[str]
    tasks: list[list[int]]
    labels: NotRequired[list[int]]  # the learner's label of each class; those of all labels where it is left out
    preprocessing: _Preprocessing | _PackedPreprocessing
    learner: _Learner
    backbone: _Backbone | _Backbones
    files: dict[str, _File]


MODEL = TypeAdapter(_Model)


class Program(Model):
    """A program of torch.export or ONNX, without a learner; runs on the CPU."""

    def __init__(self, answer: Callable[[Tensor], tuple[Tensor, Tensor]], facts: Facts) -> None:
        super().__init__(facts["classes"], make_transforms(data_config(facts["preprocessing"])), torch.device("cpu"))
        self._answer = [answer]  # in a list, because a program of torch would become a submodule, which refuses eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = self._answer[0](images)
        return logits, features


def is_artifact(folder: Path) -> bool:
    """Whether a folder holds an exported model."""
    return (folder / FACTS).is_file()


def load(folder: str | Path, device: str = "cpu", *, code: Sequence[Path] = ()) -> Model:
    """An exported model of any format: images → (logits, features), with class names and transforms.

    The format safetensors gives a :class:`cil.prediction.Trained`, whose ``learner`` can continue to learn; the other
    formats run on the CPU. Neither the run folder nor the backbone's original weights are needed.

    Args:
        folder: A folder that :func:`cil.export.export` wrote.
        device: As ``hardware.device``; for the other formats only ``cpu`` and ``auto``.
        code: Places of the files of custom classes, if they were moved; see :func:`cil.config.code.found`.

    Raises:
        ExportError: The folder has no exported model or a damaged one, a program is to run on another device than the
            CPU, or a package is missing.
        PluginError: The model has a custom learner whose code cannot be found here.
    """
    folder = Path(folder)
    facts = read_facts(folder)
    for name in {FORMATS[facts["format"]]: None, **facts["files"]}:
        file = folder / name
        if Path(name).name != name or name not in facts["files"]:
            raise ExportError(f"{folder / FACTS}: lists {', '.join(facts['files'])} as its files; {AGAIN}")
        try:
            check_file(file, facts["files"][name]["sha256"], advice=AGAIN, error=ExportError)
        except FileNotFoundError:
            raise ExportError(f"{file}: is missing; {AGAIN}") from None
    if facts["format"] == "safetensors":
        return _trained(folder, facts, device, code)
    if device not in ("cpu", "auto"):
        raise ExportError(f"{folder}: {facts['format']} runs on the CPU here, not on {device}; export safetensors")
    return _onnx(folder, facts) if facts["format"] == "onnx" else _program(folder, facts)


def read_facts(folder: Path) -> Facts:
    """The content of ``model.json``.

    Raises:
        ExportError: The file is missing, damaged, or written by a later version.
    """
    try:
        facts: Facts = read_json(folder / FACTS, advice=AGAIN, error=ExportError)
    except FileNotFoundError:
        raise ExportError(f"{folder}: no {FACTS} there; give a folder that `cil export` wrote") from None
    if facts.get("schema") != SCHEMA or facts.get("format") not in FORMATS:
        raise ExportError(
            f"{folder / FACTS}: has schema {facts.get('schema')} and format {facts.get('format')}; this version "
            f"reads schema {SCHEMA} with {', '.join(FORMATS)}"
        )
    try:
        MODEL.validate_python(facts, strict=True)
    except ValidationError as error:
        raise ExportError(f"{folder / FACTS}: damaged: {first_error(error)}; {AGAIN}") from None
    return facts


def data_config(steps: dict[str, Any]) -> dict[str, Any]:
    """The preprocessing of an exported model as a data configuration of timm; of several backbones, of each."""
    if "members" in steps:
        return {"members": [data_config(one) for one in steps["members"]]}
    return {**steps, "input_size": (3, steps["input_size"], steps["input_size"])}


def prefixes(backbones: int) -> list[str]:
    """The prefixes of the names of each backbone's tensors in ``model.safetensors``."""
    return [BACKBONE] if backbones == 1 else [f"{BACKBONE}{k}." for k in range(backbones)]


def _trained(folder: Path, facts: Facts, device: str, code: Sequence[Path]) -> Trained:
    accelerator = hardware.accelerator(device)
    recorded = facts["backbone"]
    entry = custom.found(current_learner_keys(facts["learner"]["entry"]), code)
    try:
        cls, parameters = registry.configure(LearnerEntry.model_validate(entry))
        custom.warn_if_changed(facts["learner"].get("code"), entry, cls, folder)
        tensors = load_file(folder / FORMATS["safetensors"])
        state = {key: value for key, value in tensors.items() if key.startswith(LEARNER)}
        backbone = _backbone(recorded, data_config(facts["preprocessing"]), tensors).to(accelerator.device)
        if backbone.fingerprint != recorded["sha256"]:
            raise ExportError(f"{folder}: its backbone is not the one the run used; export the run again")
        learner = registry.instantiate(cls, parameters, backbone).to(accelerator.device)
        cache = FeatureCache(accelerator)
        restore_learner(
            learner,
            past_tasks(facts["tasks"], _names_by_label(facts)),
            lambda stage: Context(accelerator, cache, stage=stage),
            {k.removeprefix(LEARNER): v for k, v in state.items()} | facts["learner"]["state"],
        )
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValidationError) as error:
        raise ExportError(
            f"{folder}: does not fit this version of {facts['learner']['title']} or its backbone: "
            f"{' '.join(str(error).split())}"
        ) from None
    return Trained(learner, make_transforms(backbone.data_config), facts["classes"], facts.get("labels"))


def _backbone(recorded: Facts, config: dict[str, Any], tensors: dict[str, Tensor]) -> Backbone:
    """The backbone of an exported model, or its several ones as one, from the tensors of ``model.safetensors``.

    Args:
        recorded: The entry ``backbone`` of ``model.json``.
        config: Its data configuration, see :func:`data_config`.
        tensors: All tensors of the file.
    """
    sections, configs, members = recorded.get("members", [recorded]), config.get("members", [config]), []
    for section, own, prefix in zip(sections, configs, prefixes(len(sections)), strict=True):
        model = load_backbone(BackboneConfig(**section["config"], weights="random")).model
        state = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
        joint = state.get("fc_norm.weight")
        if joint is not None and joint.ndim == 2:  # a norm has one dimension
            end_in_projection(model, joint, state.get("fc_norm.bias"))
        model.load_state_dict(state)
        members.append(Backbone(model, section["name"], own))
    return Backbones(members, CombineConfig(**recorded["combine"])) if "members" in recorded else members[0]


def _names_by_label(facts: Facts) -> list[str]:
    """A name for each label of the learner; empty for classes that the model does not predict."""
    labels = facts.get("labels") or range(len(facts["classes"]))
    names = dict(zip(labels, facts["classes"], strict=True))
    return [names.get(label, "") for label in range(max(names) + 1)]


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
