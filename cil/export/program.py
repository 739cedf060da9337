"""A model as a graph of tensor operations, by torch.export, and from there as ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from cil.errors import ExportError
from cil.prediction import Model

INPUT, OUTPUTS = "images", ("logits", "features")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def trace(model: Model, title: str) -> ExportedProgram:
    """The model as a program of any batch size ≥ 1, holding the tensors it computes with and no others.

    What a classifier solves for is a constant of the program: call the model once before.

    Raises:
        ExportError: An operation of the learner cannot be traced; the message names it.
    """
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(
                model, example(model), dynamic_shapes={INPUT: {0: Dim("batch", min=1)}}, strict=False
            )
    # torch.export's own errors are RuntimeErrors and ValueErrors; a call that cannot stand a tensor without values is a
    # TypeError. The model has just run, so all of them are about tracing it
    except (RuntimeError, ValueError, TypeError) as error:
        raise ExportError(
            f"{title} cannot be traced by torch.export: {where(error)} ({type(error).__name__}: {first_line(error)}); "
            "--format safetensors works for every learner"
        ) from None
    return lean(program)


def example(model: Model) -> tuple[Tensor]:
    """Arguments to trace with; two images, since torch takes a size of one for a constant."""
    return (torch.zeros(2, 3, model.transforms.size, model.transforms.size),)


def lean(program: ExportedProgram) -> ExportedProgram:
    """Drop, in place, what predicting does not need: unused weights and statistics, second copies, stack traces."""
    graph, signature, state = program.graph, program.graph_signature, program.state_dict
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    known: dict[Any, Any] = {}  # a tensor that is reached in two ways (PEFT's tree shares the backbone's) is kept once
    held = {**state, **program.constants}
    for spec in signature.input_specs:
        tensor = held.get(spec.target or "")
        if isinstance(tensor, Tensor):
            key = tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
            node = inputs[spec.arg.name]
            if known.setdefault(key, node) is not node:
                node.replace_all_uses_with(known[key])
    for spec in list(signature.input_specs):
        node = inputs[spec.arg.name]
        if spec.kind is not InputKind.USER_INPUT and not node.users:
            graph.erase_node(node)
            signature.input_specs.remove(spec)
            state.pop(spec.target or "", None)
            program.constants.pop(spec.target or "", None)
    for name, value in program.constants.items():
        if isinstance(value, Tensor):  # a view would be saved with all it is a view of
            program.constants[name] = value.clone(memory_format=torch.contiguous_format)
    for node in graph.nodes:
        for traced in ("stack_trace", "from_node"):  # they hold paths of this machine
            node.meta.pop(traced, None)
    program.graph_module.recompile()
    program.example_inputs = None
    return program


def save_program(program: ExportedProgram, file: Path) -> dict[str, Any]:
    """Write ``file`` for ``torch.export.load``; what to record of it.

    Raises:
        OSError: The disk is full or not writable.
    """
    try:
        with quiet():
            torch.export.save(program, file)
    except RuntimeError as error:  # torch's zip writer speaks of a full disk this way
        raise OSError(first_line(error)) from None
    return {}


def save_onnx(program: ExportedProgram, file: Path, images: tuple[Tensor], title: str) -> dict[str, Any]:
    """Write ``file`` as ONNX (above 2 GB with ``<file>.data`` beside it); what to record of it.

    Raises:
        ExportError: An operation has no translation; the message names it.
    """
    try:
        with torch.no_grad(), quiet():
            found: Any = torch.onnx.export(
                program, images, dynamo=True, input_names=[INPUT], output_names=list(OUTPUTS), verbose=False
            )
    except torch.onnx.OnnxExporterError as error:
        inner: BaseException = error
        while inner.__cause__ is not None:
            inner = inner.__cause__
        raise ExportError(
            f"{title} has no form in ONNX: {first_line(inner)}; --format torch.export and --format safetensors work"
        ) from None
    found.rename_axes({found.model.graph.inputs[0].shape[0]: "batch"})
    found.save(file)
    return {"opset": found.model.opset_imports[""]}


def require_onnx() -> None:
    """Refuse before the work is done.

    Raises:
        ExportError: A package is missing.
    """
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs {', '.join(missing)}: pip install 'cil[export]'")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch reports its progress, and on failure the whole graph, by way of prints, warnings and logs."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def where(error: BaseException) -> str:
    """The innermost line outside torch that ``error`` passed through."""
    torch_itself = str(Path(torch.__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((torch_itself, "<"))]
    frame = frames[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}, `{frame.line}`"


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "without a message")
