"""Traces a model into a program of torch.export, and converts that to ONNX."""

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
    """The model as a program for any batch size ≥ 1, with only the tensors that it computes with.

    The solution of a classifier becomes a constant of the program, so the model must have been called once before.

    Raises:
        ExportError: An operation of the learner cannot be traced; the message names its line.
    """
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(
                model, example(model), dynamic_shapes={INPUT: {0: Dim("batch", min=1)}}, strict=False
            )
    # torch.export raises RuntimeErrors and ValueErrors; a call that needs the values of a tensor raises a TypeError.
    # The model has just run, so each of them is caused by tracing
    except (RuntimeError, ValueError, TypeError) as error:
        raise ExportError(
            f"{title} cannot be traced by torch.export: {where(error)} ({type(error).__name__}: {first_line(error)}); "
            "--format safetensors works for every learner"
        ) from None
    return lean(program)


def example(model: Model) -> tuple[Tensor]:
    """Arguments for tracing: two images of zeros, because torch treats a size of one as a constant."""
    return (torch.zeros(2, *model.transforms.shape),)


def lean(program: ExportedProgram) -> ExportedProgram:
    """Remove, in place, everything prediction does not need: unused weights and statistics, copies, stack traces."""
    graph, signature, state = program.graph, program.graph_signature, program.state_dict
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    known: dict[Any, Any] = {}  # a tensor with two names (PEFT's model shares the backbone's) is stored once
    tensors = {**state, **program.constants}
    for spec in signature.input_specs:
        tensor = tensors.get(spec.target or "")
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
        if isinstance(value, Tensor):  # a view would be saved with its whole base tensor
            program.constants[name] = value.clone(memory_format=torch.contiguous_format)
    for node in graph.nodes:
        for entry in ("stack_trace", "from_node"):  # they contain paths of this machine
            node.meta.pop(entry, None)
    program.graph_module.recompile()
    program.example_inputs = None
    return program


def save_program(program: ExportedProgram, file: Path) -> dict[str, Any]:
    """Write ``file`` for ``torch.export.load``; returns further facts for ``model.json``, none here.

    Raises:
        OSError: The disk is full or not writable.
    """
    try:
        with quiet():
            torch.export.save(program, file)
    except RuntimeError as error:  # this is how torch's zip writer reports a full disk
        raise OSError(first_line(error)) from None
    return {}


def save_onnx(program: ExportedProgram, file: Path, images: tuple[Tensor], title: str) -> dict[str, Any]:
    """Write ``file`` as ONNX, above 2 GB with ``<file>.data`` beside it; returns further facts for ``model.json``.

    Raises:
        ExportError: An operation cannot be translated; the message names it.
        OSError: The disk is full or not writable.
    """
    try:
        with torch.no_grad(), quiet():
            exported: Any = torch.onnx.export(
                program, images, dynamo=True, input_names=[INPUT], output_names=list(OUTPUTS), verbose=False
            )
    except torch.onnx.OnnxExporterError as error:
        inner: BaseException = error
        while inner.__cause__ is not None:
            inner = inner.__cause__
        raise ExportError(
            f"{title} cannot be written as ONNX: {first_line(inner)}; --format torch.export and safetensors work"
        ) from None
    exported.rename_axes({exported.model.graph.inputs[0].shape[0]: "batch"})
    exported.save(file)
    return {"opset": exported.model.opset_imports[""]}


def require_onnx() -> None:
    """Check for the packages of ONNX, before any work is done.

    Raises:
        ExportError: A package is missing; the message says how to install it.
    """
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs {', '.join(missing)}: pip install 'cil[export]'")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the prints, warnings and logs by which torch reports progress and, after a failure, the whole graph."""
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
    """The innermost line outside torch in the traceback of ``error``."""
    torch_itself = str(Path(torch.__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((torch_itself, "<"))]
    frame = frames[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}, `{frame.line}`"


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "without a message")
