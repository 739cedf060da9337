"""Finds the tensors of a state dict that are merged, and those of them that are the weights of linear maps.

A rule works on state dicts, never on modules: a loop over the modules without children misses parameters of modules
with children (class token, position embedding, a fused ``in_proj_weight``), and every later rescaling is then wrong for
these.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cil.errors import BackboneError, ConfigError, nearest

HEADS = (r"^(head|head_dist|fc|classifier)\.",)
"""Classifier heads as timm and Transformers name them. Tasks have different classes, so heads are never merged."""

_RUNNING = re.compile(r"(^|\.)running_(mean|var)$")
_TABLE = re.compile(r"embed|relative_.*bias|bias_table|^(wte|wpe|shared)$")
_FUSED = ("qkv", "Wqkv")
_LORA = re.compile(r"lora_(A|B|embedding|magnitude)|(^|\.)base_layer\.|^base_model\.model\.")


@dataclass(frozen=True)
class Entry:
    """One merged tensor.

    Attributes:
        name: Name in the state dict.
        shape, dtype: Shape and dtype of the pre-trained tensor.
        linear: Whether the tensor is the weight [out, in] of a linear map.
        fused: Whether its rows are query, key and value of an attention, one after the other.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    linear: bool
    fused: bool


@dataclass(frozen=True)
class Layout:
    """The merged entries of a pre-trained state dict, in its order.

    Attributes:
        entries: Merged tensors.
        tied: Other names of merged tensors, name → name of the entry. The tensor is merged and counted once.
        excluded: Patterns of the names that are not merged; tasks may have such tensors that the base does not have.
        dtype: Dtype of the computation: float64 if any entry is float64, else float32.
    """

    entries: tuple[Entry, ...]
    tied: Mapping[str, str]
    excluded: tuple[str, ...]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if any(e.dtype == torch.float64 for e in self.entries) else torch.float32

    def held(self, entry: Entry, tensors: Mapping[str, Tensor]) -> str | None:
        """Return the name under which ``tensors`` has an entry, or None: some formats save a tied tensor only once."""
        if entry.name in tensors:
            return entry.name
        return next((alias for alias, name in self.tied.items() if name == entry.name and alias in tensors), None)


def layout(
    pretrained: Mapping[str, Tensor],
    *,
    exclude: Sequence[str] = HEADS,
    names: Iterable[str] | None = None,
    linear: Iterable[str] | None = None,
) -> Layout:
    """Find the tensors of ``pretrained`` that are merged.

    Every floating point tensor is merged, except for excluded ones and BatchNorm's running statistics (sums of updates
    could make a variance negative). All other tensors keep their pre-trained values. A tensor that has several names is
    merged once.

    Args:
        pretrained: The pre-trained state dict.
        exclude: Regular expressions; a name that contains a match of one is not merged.
        names: Names of the only tensors to merge, for instance of the trained parameters; norms and shares then count
            only these. None: all.
        linear: Names of the weights [out, in] of linear maps. None: every two-dimensional ``….weight`` or ``…_weight``
            that is not an embedding or a table of relative positions.

    Raises:
        ConfigError: A pattern is not a regular expression, or a name does not exist.
        BackboneError: No tensor is left to merge.
    """
    try:
        patterns = [re.compile(p) for p in exclude]
    except re.error as error:
        raise ConfigError(f"exclude: {error.pattern!r} is not a regular expression ({error})") from None
    wanted = None if names is None else set(_known(names, pretrained, "names"))
    linear_names = None if linear is None else set(_known(linear, pretrained, "linear"))
    entries: list[Entry] = []
    tied: dict[str, str] = {}
    first_names: dict[tuple[object, ...], str] = {}
    for name in pretrained:
        shape, dtype = shape_and_dtype(pretrained, name)
        if not dtype.is_floating_point or (wanted is not None and name not in wanted):
            continue
        if any(p.search(name) for p in patterns) or _RUNNING.search(name):
            continue
        address = _address(pretrained, name)
        if address is not None and first_names.setdefault(address, name) != name:
            tied[name] = first_names[address]
            continue
        is_linear = name in linear_names if linear_names is not None else _looks_linear(name, shape)
        if is_linear and len(shape) != 2:
            raise ConfigError(f"linear: {name} has shape {list(shape)}; the weight of a linear map is [out, in]")
        entries.append(Entry(name, shape, dtype, is_linear, is_linear and _looks_fused(name, shape)))
    if not entries:
        raise BackboneError("the pre-trained model has no floating point tensor to merge, apart from excluded ones")
    return Layout(tuple(entries), tied, tuple(exclude))


def shape_and_dtype(tensors: Mapping[str, Tensor], name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Return a tensor's shape and dtype, from the file's header if the mapping is a file (``shape_and_dtype``)."""
    if hasattr(tensors, "shape_and_dtype"):
        return tensors.shape_and_dtype(name)
    return tuple(tensors[name].shape), tensors[name].dtype


def source(tensors: Mapping[str, Tensor], default: str) -> str:
    """The name of a state dict in error messages: its file if it has one, else ``default``."""
    return str(getattr(tensors, "path", default))


def base_names(finetuned: Iterable[str], pretrained: Iterable[str], plan: Layout) -> dict[str, str]:
    """Map a fine-tuned model's names to the base's, where they differ in leading parts alone.

    Transformers names a model's tensors ``vit.…`` inside a model with a head, and ``…`` in the model by itself, as base
    checkpoints are often saved.

    Returns:
        The names that change. It is empty if a merged tensor has its own name, or if no leading parts fit.
    """
    names, entries, known = set(finetuned), [entry.name for entry in plan.entries], set(pretrained)
    if names & set(entries):
        return {}
    first = entries[0]
    added = {name.removesuffix(first) for name in names if name.endswith(f".{first}")}
    dropped = {first[:i] for i, letter in enumerate(first, start=1) if letter == "." and first[i:] in names}
    changes = [{n: n.removeprefix(part) for n in names if n.startswith(part)} for part in added]
    changes += [{n: part + n for n in names if part + n in known} for part in dropped]
    return max(changes, key=lambda change: len(set(change.values()) & set(entries)), default={})


def check_names(finetuned: Mapping[str, Tensor], pretrained: Mapping[str, Tensor], plan: Layout) -> None:
    """Refuse a fine-tuned state dict whose names or shapes are not those of the pre-trained one.

    Raises:
        BackboneError: A name, shape or dtype does not fit; the message names the tensor and the file.
    """
    task, base = source(finetuned, "the fine-tuned model"), source(pretrained, "the pre-trained model")
    lora = next((name for name in finetuned if _LORA.search(name)), None)
    if lora is not None:
        raise BackboneError(
            f"{task}: {lora} belongs to a LoRA adapter, not to a full model; merge the adapter into its model first "
            "(merge_and_unload() in PEFT) and save that, or pass the updates ΔW themselves (add_update)"
        )
    missing = [entry.name for entry in plan.entries if plan.held(entry, finetuned) is None]
    if missing:
        raise BackboneError(
            f"{task}: {missing[0]} is missing ({len(missing)} of {len(plan.entries)} tensors are)"
            f"{nearest(missing[0], finetuned)}; tasks must be fine-tuned from {base}; leave tensors out with exclude"
        )
    patterns = [re.compile(p) for p in plan.excluded]
    extra = [n for n in finetuned if n not in pretrained and not any(p.search(n) for p in patterns)]
    if extra:
        raise BackboneError(
            f"{task}: {extra[0]} is not in {base} ({len(extra)} such tensors){nearest(extra[0], pretrained)}; "
            "tasks must have the same architecture; leave tensors out with exclude"
        )
    for entry in plan.entries:
        shape, dtype = shape_and_dtype(finetuned, plan.held(entry, finetuned) or entry.name)
        if shape != entry.shape:
            raise BackboneError(
                f"{task}: {entry.name} has shape {list(shape)}, but {list(entry.shape)} in {base}; "
                "tasks must have the same architecture; leave tensors out with exclude"
            )
        if not dtype.is_floating_point:
            raise BackboneError(
                f"{task}: {entry.name} holds {str(dtype).removeprefix('torch.')}; expected floating point weights "
                "(quantised models cannot be merged: dequantise them first)"
            )


def _looks_linear(name: str, shape: tuple[int, ...]) -> bool:
    module, parameter = _ends(name)
    return len(shape) == 2 and (parameter == "weight" or parameter.endswith("_weight")) and not _TABLE.search(module)


def _looks_fused(name: str, shape: tuple[int, ...]) -> bool:
    module, parameter = _ends(name)
    return shape[0] % 3 == 0 and (parameter == "in_proj_weight" or (parameter == "weight" and module in _FUSED))


def _ends(name: str) -> tuple[str, str]:
    """The names of the last module and of the parameter: blocks.0.attn.qkv.weight → qkv, weight."""
    path, _, parameter = name.rpartition(".")
    return path.rpartition(".")[2], parameter


def _known(names: Iterable[str], pretrained: Mapping[str, Tensor], what: str) -> Iterable[str]:
    for name in names:
        if name not in pretrained:
            raise ConfigError(f"{what}: {name!r} is not in the pre-trained model{nearest(name, pretrained)}")
        yield name


def _address(tensors: Mapping[str, Tensor], name: str) -> tuple[object, ...] | None:
    """The memory that a tensor occupies, to find names that share it; None for a file, which has every tensor once."""
    if hasattr(tensors, "shape_and_dtype"):
        return None
    tensor = tensors[name]
    if tensor.device.type == "meta" or not tensor.numel():
        return None
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
