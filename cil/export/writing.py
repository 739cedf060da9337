"""Writes a run as a verified artifact, atomically."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from cil import results
from cil.backbone import Backbone, Backbones, without_source
from cil.errors import ExportError, nearest
from cil.export import program
from cil.export.artifact import FACTS, FORMATS, LEARNER, SCHEMA, Facts, is_artifact, load, prefixes
from cil.export.card import card, licence, licence_of_all
from cil.prediction import Model, Trained, open_run
from cil.runner.checkpoint import RunFolder, split_state, write_json
from cil.runner.provenance import versions
from cil.utils.files import flush, fresh, remove, remove_leftovers, reporting
from cil.utils.paths import expand
from cil.utils.stored import file_digest, sealed

BATCHES = (1, 5)
TOLERANCE = {"of_largest": 1e-4, "of_spread": 1e-2}
"""Allowed differences, from float32 rounding. Relative to the spread more is allowed, because logits such as those of
LDA share a large offset and differ only in their last digits."""


def export(
    run: str | Path,
    out: str | Path | None = None,
    format: str = "safetensors",
    *,
    force: bool = False,
    weights: Path | None = None,
    code: Sequence[Path] = (),
) -> Path:
    """Write the learner of a run, after its last finished stage, as one artifact.

    The artifact is loaded again, and its logits and features for batches of 1 and 5 images must equal those of the
    learner up to :data:`TOLERANCE`. ``model.json`` records the differences.

    Args:
        run: A run folder.
        out: The folder to write; ``<run>/export-<format>`` by default.
        format: ``safetensors``, ``torch.export`` or ``onnx``.
        force: Replace an existing exported model; any other folder is never replaced.
        weights: New place of the backbone's weights, if they were moved.
        code: New places of the files of custom classes, if they were moved.

    Returns:
        The folder of the artifact.

    Raises:
        ExportError: The format is unknown, the target exists, the format cannot express the learner, logits differ, or
            the disk is full. Nothing is left behind in these cases.
        RunError: The run cannot be loaded.
        PluginError: The file of a custom class is not there.
    """
    if format not in FORMATS:
        raise ExportError(f"format {format!r} is unknown{nearest(format, FORMATS)}; known: {', '.join(FORMATS)}")
    if format == "onnx":
        program.require_onnx()
    run = expand(run)
    out = expand(out) if out is not None else run / f"export-{format}"
    require_free(out, force)
    model = open_run(run, weights=weights, code=code)
    header, rows = results.read_header(run), RunFolder(run).rows()
    run_facts = results.assemble(cast(results.Header, header), rows, len(header["tasks"]))
    temporary = fresh(out)
    try:
        with reporting(out, "What was there stays", error=ExportError):
            out.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(out)
            temporary.mkdir()
            expected = answers(model)
            facts = make_facts(model, run_facts, format, features=expected[0][1].shape[1])
            facts |= write_model(model, facts, temporary)
            facts["files"] = {
                file.name: {"sha256": file_digest(file), "bytes": file.stat().st_size}
                for file in sorted(temporary.iterdir())
            }
            write_json(temporary / FACTS, sealed(facts))
            written = answers(load(temporary, code=code))
            facts["check"] = compare(expected, written, f"learner {header['learner']} as {format}")
            write_json(temporary / FACTS, sealed(facts))
            (temporary / "README.md").write_text(card(facts), encoding="utf-8")
            mode = (temporary / "README.md").stat().st_mode
            for file in temporary.iterdir():
                file.chmod(mode)  # safetensors writes files that only the owner can read
                flush(file)
            put(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # it still exists only after an error
    return out


def require_free(out: Path, force: bool) -> None:
    """Check the target folder before any work is done.

    Raises:
        ExportError: It exists and may not be replaced.
    """
    if not out.exists():
        return
    if not is_artifact(out):
        raise ExportError(f"{out}: exists and is not an exported model; give another --out, or delete it")
    if not force:
        raise ExportError(f"{out}: exists already; give another --out, or --force to replace it")


def put(temporary: Path, out: Path) -> None:
    """Rename ``temporary`` to ``out``; an existing ``out`` is deleted only after that."""
    old = fresh(out)
    if not out.exists():
        temporary.rename(out)
        return
    out.rename(old)
    try:
        temporary.rename(out)
    except OSError:
        old.rename(out)
        raise
    with suppress(OSError):  # the new one is there; what is left of the old one has a hidden name
        remove(old)


def make_facts(model: Trained, run: dict[str, Any], format: str, features: int) -> Facts:
    """The content of ``model.json`` without the keys ``files`` and ``check``.

    Args:
        model: The model.
        run: The content of the run's ``metrics.json``.
        format: A key of :data:`FORMATS`.
        features: Width F of the features.
    """
    config, backbone, learner = run["config"], model.backbone, model.learner
    stages, packages = run["stages"], program.ONNX_PACKAGES if format == "onnx" else ()
    parents = [{key: one[key] for key in ("learner", "class_names", "images")} for one in run.get("joined", ())]
    return {
        **({"joined": parents} if parents else {}),
        "schema": SCHEMA,
        "format": format,
        "classes": list(model.names),
        "input": {"name": program.INPUT, "dtype": "float32", "shape": ["batch", *model.transforms.shape]},
        "outputs": {"logits": ["batch", len(model.names)], "features": ["batch", features]},
        "preprocessing": {key: value for key, value in model.transforms.card.items() if key != "augment"},
        "learner": {
            "title": run["learner"],
            "paper": run["paper"],
            "parameters": learner.config.model_dump(mode="json"),
            "stores_images": run["stores_images"],
            "trains_backbone": run["trains_backbone"],
            "entry": config["learners"][0],
            "code": run.get("code", {}),
            "state": split_state(learner.state_dict())[1],
        },
        "backbone": backbone_of(backbone, config),
        "protocol": {
            "benchmark": config["name"],
            "dataset": config["data"]["dataset"],
            "data": {split: {k: run["data"][split][k] for k in ("sha256", "images")} for split in ("train", "test")},
            "stream": config["stream"],
            "order": config["orders"][0],
            "seed": config["seeds"][0],
            "precision": config["precision"],
            "tested_on": run["tested_on"],
            "chosen_by": run["chosen_by"],
        },
        "tasks": run["tasks"][: learner.stages],
        **({} if model.columns is None else {"labels": list(model.columns)}),
        "stages": {"finished": len(stages), "planned": len(run["tasks"])},
        "summary": run["summary"],
        "curves": run["curves"],
        "versions": {"trained": run["versions"], "exported": versions() | {name: version(name) for name in packages}},
    }


def backbone_of(backbone: Backbone, config: dict[str, Any]) -> dict[str, Any]:
    """What ``model.json`` says about the backbone; of several, about all together and about each.

    Args:
        backbone: The backbone.
        config: The configuration of the run.
    """
    if isinstance(backbone, Backbones):
        members = [
            backbone_of(member, {"backbone": section})
            for member, section in zip(backbone.members, config["backbones"], strict=True)
        ]
        together = {"members": members, "combine": config["combine"], "licence": licence_of_all(members)}
        return {"name": backbone.name, "sha256": backbone.fingerprint, **together}
    return {
        "name": backbone.name,
        "sha256": backbone.fingerprint,
        "config": without_source(config["backbone"], backbone),
        "licence": licence(backbone, config["backbone"]["weights"]),
    }


def write_model(model: Trained, facts: Facts, folder: Path) -> Facts:
    """Write the model in its format; returns further facts for ``model.json``.

    Raises:
        ExportError: The format cannot express the learner.
    """
    file = folder / FORMATS[facts["format"]]
    title = f"learner {facts['learner']['title']}"
    if facts["format"] == "safetensors":
        parts = model.backbone.members if isinstance(model.backbone, Backbones) else [model.backbone]
        tensors = {
            prefix + key: value
            for prefix, part in zip(prefixes(len(parts)), parts, strict=True)
            for key, value in split_state(part.model.state_dict())[0].items()
        }
        tensors |= {LEARNER + key: value for key, value in split_state(model.learner.state_dict())[0].items()}
        save_file(tensors, file, metadata={"format": "pt"})
        return {}
    graph = program.trace(model, title)
    if facts["format"] == "torch.export":
        return program.save_program(graph, file)
    return program.save_onnx(graph, file, program.example(model), title)


def answers(model: Model) -> list[tuple[Tensor, Tensor]]:
    """(logits, features) of the same random images, for every batch size of :data:`BATCHES`."""
    generator, parts = torch.Generator().manual_seed(0), []
    for size in model.transforms.sides:
        coarse, fine = (torch.randn(max(BATCHES), 3, side, side, generator=generator) for side in (4, size))
        # patches of colour with noise, because similar images would all choose the same prompts
        parts.append((F.interpolate(coarse, size=(size, size)) + 0.1 * fine).flatten(2))
    images = torch.cat(parts, dim=2).view(-1, *model.transforms.shape)
    with torch.no_grad():
        return [model(images[:count]) for count in BATCHES]


def compare(expected: list[tuple[Tensor, Tensor]], found: list[tuple[Tensor, Tensor]], what: str) -> Facts:
    """The largest differences between two models: absolute, relative to the largest value, and relative to the spread.

    The spread is the largest distance of a value from the mean over its image.

    Args:
        expected: What :func:`answers` returns for the learner.
        found: What it returns for the written model.
        what: Name of the written model, for messages.

    Raises:
        ExportError: A difference exceeds its tolerance, or a shape or an infinite value differs.
    """
    report: Facts = {"batch_sizes": list(BATCHES), "tolerance": TOLERANCE}
    for i, name in enumerate(program.OUTPUTS):
        mine, theirs = (torch.cat([pair[i] for pair in side]) for side in (expected, found))
        finite = mine.isfinite()
        if mine.shape != theirs.shape or not torch.equal(mine[~finite], theirs[~finite]):
            raise ExportError(f"{what} gives {name} of another shape than the learner, or other infinite values")
        absolute = max((mine - theirs)[finite].abs().tolist(), default=0.0)
        known = mine.double().masked_fill(~finite, torch.nan)
        away = known - known.nanmean(1, keepdim=True)  # an offset of all scores of an image decides nothing
        largest, spread = (float(x.abs().nan_to_num().max()) for x in (known, away))
        relative = {"of_largest": absolute / (largest or 1.0), "of_spread": absolute / (spread or largest or 1.0)}
        if not all(relative[key] <= TOLERANCE[key] for key in TOLERANCE):
            raise ExportError(
                f"{what} gives other {name} than the learner: they differ by {relative['of_largest']:.1e} of the "
                f"largest and {relative['of_spread']:.1e} of their spread (allowed: {TOLERANCE['of_largest']:.0e} and "
                f"{TOLERANCE['of_spread']:.0e}); nothing was written. Does it draw random numbers when it predicts?"
            )
        report[name] = {"max_difference": absolute, **relative}
    return report
