"""Weights from local files: reading them, and one line with the reason where a file is no weights of the model.

Reading is safe: torch files are loaded with ``weights_only``, numpy archives without pickles.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cil.errors import BackboneError

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "module", "encoder")
"""Entries of training checkpoints that hold the weights, in order of preference: averages first, as in timm."""
PREFIXES = ("_orig_mod.", "module.", "model.", "backbone.")
"""Prefixes that ``torch.compile``, data parallelism, Lightning and DINO put before the names of weights."""
NUMPY = (".npz", ".npy")
"""Suffixes of the original JAX weights, which timm's models read themselves."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors file, or from a torch file that contains only tensors and plain values.

    Wrappers of training checkpoints (:data:`WRAPPERS`, :data:`PREFIXES`) are taken off, and entries that are no tensors
    are left out.

    Raises:
        BackboneError: The file does not exist, is damaged, is a pickle that would have to run code, or has no tensors.
    """
    content = _read(path)
    while True:
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise BackboneError(
            f"backbone.weights: {path} does not contain a dictionary of tensors; save the model's state_dict()"
        )
    while prefix := next((p for p in PREFIXES if any(key.startswith(p) for key in state)), None):
        bare = {key.removeprefix(prefix): value for key, value in state.items()}
        if len(bare) < len(state):  # two models in one file: the names stay, and the error names them
            break
        state = bare
    return state


def require_file(path: Path) -> None:
    """Refuse a path at which there is no file.

    Raises:
        BackboneError: Nothing or a folder is there.
    """
    if not path.is_file():
        what = "a folder; give a file in it, or set backbone.name=local-dir:FOLDER" if path.is_dir() else "no such file"
        raise BackboneError(f"backbone.weights: {path}: {what}")


def _read(path: Path) -> Mapping[Any, Any]:
    """The content of a weights file; a file of anything but a mapping is an empty one."""
    require_file(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        # timm's training checkpoints hold their arguments as a Namespace, which is harmless
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors errors share no base class
        raise BackboneError(f"backbone.weights: {path} {_unreadable(path, error)}") from None
    return content if isinstance(content, Mapping) else {}


def _unreadable(path: Path, error: Exception) -> str:
    """Why a file cannot be read: it needs code to run, or is no file of weights."""
    if path.suffix == ".safetensors":
        return (
            f"is not a safetensors file, or is damaged ({type(error).__name__}: {one_line(error)}); a torch file has "
            "another suffix, and pickles are never loaded"
        )
    try:
        code = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # whatever the file is, it is not one whose objects torch can list
        code = []
    if code:
        return (
            f"holds objects that would have to run code ({', '.join(sorted(code)[:3])}); pickles are never loaded: if "
            "you trust the file, load it yourself and save its state_dict as safetensors"
        )
    return (
        f"is damaged, or is neither a safetensors file nor a torch file of tensors ({type(error).__name__}); pickles "
        "are never loaded"
    )


def without_classifier(state: Mapping[str, Tensor], classifier: Any) -> dict[str, Tensor]:
    """The weights without those of the classifier, whose names timm knows for every family."""
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    heads = tuple(f"{name}." for name in (*names, "head_dist")) if names else ()
    return {key: value for key, value in state.items() if not key.startswith(heads)}


def misfit(source: str, error: Exception) -> BackboneError:
    """The error for weights that do not fit, from what torch says when it loads them strictly."""
    lines = [line.strip() for line in str(error).split("\n\t")]
    missing, unknown = (
        [name for line in lines if line.startswith(f"{what} key(s)") for name in re.findall(r'"([^"]+)"', line)]
        for what in ("Missing", "Unexpected")
    )
    shape = r"torch\.Size\(\[(.*?)\]\)"
    sizes = [
        match.groups()
        for line in lines
        if (
            match := re.match(rf"size mismatch for (.+?): copying a param with shape {shape} .* model is {shape}", line)
        )
    ]
    if not (missing or unknown or sizes):
        return BackboneError(
            f"backbone.weights: {source} fits another architecture ({type(error).__name__}: {one_line(error)})"
        )
    first = (
        "{} is ({}), expected ({})".format(*sizes[0])
        if sizes
        else f"{missing[0]} is missing"
        if missing
        else f"{unknown[0]} is not in the model"
    )
    return BackboneError(
        f"backbone.weights: {source} fits another architecture: {len(missing)} weights missing, "
        f"{len(unknown)} unknown, {len(sizes)} of another shape; first: {first}"
    )


class Copied(TorchFunctionMode):
    """Notes the tensors that are copied into while it is active, which is how torch loads weights.

    timm loads pre-trained weights leniently, because of the classifier: weights that its file lacks stay random.
    """

    def __init__(self) -> None:
        super().__init__()
        self._into: dict[int, Tensor] = {}  # keeps the tensors alive, so that no id is used twice

    def __torch_function__(self, func: Any, types: Collection[Any], args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_:
            self._into[id(args[0])] = args[0]
        return func(*args, **(kwargs or {}))

    def still_random(self, model: nn.Module) -> list[str]:
        """Names of the model's weights that were drawn and not loaded; constants, e.g. of a new norm, are not named."""
        if not self._into:  # torch loads in another way than by copying: nothing is known
            return []
        drawn = [name for name, p in model.named_parameters() if id(p) not in self._into and p.numel() > 1]
        return [name for name in drawn if bool((p := model.get_parameter(name)).ne(p.flatten()[0]).any())]


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has no text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
