"""Which tensors of a state dict are merged, and which of them are the weights of linear maps.

A rule sees state dicts, never modules: a walk over modules misses parameters that sit beside submodules (class token,
position embedding, a fused ``in_proj_weight``), and then divides what it missed by every later rescaling.
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
        name: Its name in the state dict.
        shape, dtype: Those of the pre-trained tensor.
        linear: Whether it is the weight [out, in] of a linear map.
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
        entries: What is merged.
        tied: Further names of merged tensors, name → name of the entry: the same tensor, merged and counted once.
        excluded: Patterns of the names that tasks may have of their own.
        dtype: What is computed in: float64 if any entry is float64, else float32.
    """

    entries: tuple[Entry, ...]
    tied: Mapping[str, str]
    excluded: tuple[str, ...]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if any(e.dtype == torch.float64 for e in self.entries) else torch.float32

    def held(self, entry: Entry, found: Mapping[str, Tensor]) -> str | None:
        """Under which of its names ``found`` holds an entry: some formats save a tied tensor once."""
        if entry.name in found:
            return entry.name
        return next((alias for alias, name in self.tied.items() if name == entry.name and alias in found), None)


def layout(
    pretrained: Mapping[str, Tensor],
    *,
    exclude: Sequence[str] = HEADS,
    names: Iterable[str] | None = None,
    linear: Iterable[str] | None = None,
) -> Layout:
    """Sort out the tensors of ``pretrained``.

    Merged is every floating point tensor but excluded ones and BatchNorm's running statistics (sums of updates could
    make a variance negative); integers, booleans and all the rest keep their pre-trained values. A tensor that stands
    there under several names is merged once.

    Args:
        pretrained: The pre-trained state dict.
        exclude: Regular expressions; a name in which one is found is not merged.
        names: Merge only these, for instance the parameters that were trained; then norms and shares count only them.
        linear: Which are weights [out, in] of linear maps. Default: by name, that is every two-dimensional
            ``….weight`` or ``…_weight`` that is no embedding and no table of relative positions.

    Raises:
        ConfigError: A pattern is no regular expression, or a name is not there.
        BackboneError: Nothing is left to merge.
    """
    try:
        patterns = [re.compile(p) for p in exclude]
    except re.error as error:
        raise ConfigError(f"exclude: {error.pattern!r} is not a regular expression ({error})") from None
    wanted = None if names is None else set(_known(names, pretrained, "names"))
    given = None if linear is None else set(_known(linear, pretrained, "linear"))
    entries: list[Entry] = []
    tied: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name in pretrained:
        shape, dtype = describe(pretrained, name)
        if not dtype.is_floating_point or (wanted is not None and name not in wanted):
            continue
        if any(p.search(name) for p in patterns) or _RUNNING.search(name):
            continue
        place = _place(pretrained, name)
        if place is not None and first.setdefault(place, name) != name:
            tied[name] = first[place]
            continue
        is_linear = name in given if given is not None else _looks_linear(name, shape)
        if is_linear and len(shape) != 2:
            raise ConfigError(f"linear: {name} has shape {list(shape)}; the weight of a linear map is [out, in]")
        entries.append(Entry(name, shape, dtype, is_linear, is_linear and _looks_fused(name, shape)))
    if not entries:
        raise BackboneError("the pre-trained model has no floating point tensor to merge beside what is excluded")
    return Layout(tuple(entries), tied, tuple(exclude))


def describe(tensors: Mapping[str, Tensor], name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype; from a file's header where the mapping offers ``describe`` itself."""
    if hasattr(tensors, "describe"):
        return tensors.describe(name)
    return tuple(tensors[name].shape), tensors[name].dtype


def source(tensors: Mapping[str, Tensor], default: str) -> str:
    """What to call a state dict in an error: its file, if it has one."""
    return str(getattr(tensors, "path", default))


def check_names(found: Mapping[str, Tensor], pretrained: Mapping[str, Tensor], plan: Layout) -> None:
    """Refuse a fine-tuned state dict whose names or shapes are not those of the pre-trained one.

    Raises:
        BackboneError: It names the tensor and the file.
    """
    task, base = source(found, "the fine-tuned model"), source(pretrained, "the pre-trained model")
    lora = next((name for name in found if _LORA.search(name)), None)
    if lora is not None:
        raise BackboneError(
            f"{task}: {lora} belongs to a LoRA adapter, not to a full model; merge the adapter into its model first "
            "(merge_and_unload() in PEFT) and save that, or hand over the updates ΔW themselves (add_update)"
        )
    missing = [entry.name for entry in plan.entries if plan.held(entry, found) is None]
    if missing:
        raise BackboneError(
            f"{task}: {missing[0]} is missing ({len(missing)} of {len(plan.entries)} tensors are)"
            f"{nearest(missing[0], found)}; tasks must be fine-tuned from {base}; leave tensors out with exclude"
        )
    patterns = [re.compile(p) for p in plan.excluded]
    extra = [n for n in found if n not in pretrained and not any(p.search(n) for p in patterns)]
    if extra:
        raise BackboneError(
            f"{task}: {extra[0]} is not in {base} ({len(extra)} such tensors){nearest(extra[0], pretrained)}; "
            "tasks must have the same architecture; leave tensors out with exclude"
        )
    for entry in plan.entries:
        shape, dtype = describe(found, plan.held(entry, found) or entry.name)
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
    module, own = _ends(name)
    return len(shape) == 2 and (own == "weight" or own.endswith("_weight")) and not _TABLE.search(module)


def _looks_fused(name: str, shape: tuple[int, ...]) -> bool:
    module, own = _ends(name)
    return shape[0] % 3 == 0 and (own == "in_proj_weight" or (own == "weight" and module in _FUSED))


def _ends(name: str) -> tuple[str, str]:
    """The last module and the parameter itself: blocks.0.attn.qkv.weight → qkv, weight."""
    path, _, own = name.rpartition(".")
    return path.rpartition(".")[2], own


def _known(names: Iterable[str], pretrained: Mapping[str, Tensor], what: str) -> Iterable[str]:
    for name in names:
        if name not in pretrained:
            raise ConfigError(f"{what}: {name!r} is not in the pre-trained model{nearest(name, pretrained)}")
        yield name


def _place(tensors: Mapping[str, Tensor], name: str) -> tuple[object, ...] | None:
    """Where a tensor lies in memory, to find names that share it; a file holds every tensor once."""
    if hasattr(tensors, "describe"):
        return None
    tensor = tensors[name]
    if tensor.device.type == "meta" or not tensor.numel():
        return None
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
