"""Digests that identify a feature extractor (a view's backbone and tuner), used as keys of the feature store.

Weights alone are not enough: two models may share them and differ in an activation, a pooling or a scale. A digest
therefore covers code, structure, plain attributes and tensors. If it cannot be determined, the features are not stored.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from cil.backbone import Backbone, views
from cil.backbone.vit import Tuner, feature_width
from cil.tuning.frozen import Frozen
from cil.tuning.layers import Collector

KNOWN = ("cil", "timm", "torch")
"""Packages whose modules are identified by class, attributes and tensors; a user's own code may change unnoticed."""
INTERNAL = frozenset(vars(nn.Module())) | {"training", "_is_full_backward_hook", "_compiled_call_impl"}


class _Unknown(Exception):
    """A value for which there is no digest."""


def seen_through(view: Callable[[Tensor], Tensor]) -> tuple[Backbone, Tuner | None] | None:
    """The backbone and tuner of a view that consists of these alone: the backbone itself, or
    ``partial(backbone, tuner=…)``. None for any other function."""
    seen: Any = view
    tuner = None
    if isinstance(seen, partial) and not seen.args and seen.keywords.keys() == {"tuner"}:
        seen, tuner = seen.func, seen.keywords["tuner"]
    if type(seen) is not Backbone or seen._compiled_call_impl is not None:  # compiled code rounds differently
        return None
    return seen, tuner


def is_frozen(tuner: Tuner | None) -> bool:
    """Whether the features with this tuner are those of the frozen backbone, of one or several of its blocks."""
    return tuner is None or (isinstance(tuner, Collector) and tuner.frozen)


def about_tuner(tuner: Tuner | None, backbone: Backbone) -> dict[str, Any]:
    """Width of the features and name of the tuner, for human readers."""
    if not isinstance(tuner, Collector):
        names = [] if tuner is None else [type(tuner).__name__]
    else:
        names = [f"layers {', '.join(map(str, tuner.blocks))}"] + ([] if tuner.frozen else [type(tuner.inner).__name__])
    return {"feature_dim": feature_width(backbone, tuner), "tuner_name": "; ".join(names)}


def backbone_digest(backbone: Backbone) -> str | None:
    """Hex digest of a frozen backbone as a function; None for a model that is not timm's."""
    code = " ".join(_code(module) for module in (Backbone.__module__, Tuner.__module__, views.__name__))
    digest = hashlib.sha256(f"{backbone.fingerprint} {code}".encode())
    try:
        _structure(digest, backbone.tuned_forward, backbone, strict=False)
    except _Unknown:
        return None
    return digest.hexdigest()


def tuner_digest(tuner: Tuner | None, backbone: Backbone) -> str | None:
    """Hex digest of a tuner in its current state, "" for no tuner; None if it holds a value without a digest."""
    if tuner is None:
        return ""
    digest = hashlib.sha256()
    try:
        _structure(digest, tuner, backbone, strict=True)
    except _Unknown:
        return None
    for name, tensor in (*tuner.named_parameters(), *tuner.named_buffers()):
        digest.update(f"{name} {_tensor(tensor)}\n".encode())
    return digest.hexdigest()


def _structure(digest: Any, module: nn.Module, backbone: Backbone, *, strict: bool) -> None:
    """Add class, code and plain attributes of every submodule.

    Args:
        strict: Refuse attributes of unknown kinds; if false, only their type enters the digest.
    """
    for name, part in module.named_modules():
        cls = type(part)
        if cls.__module__.split(".")[0] not in KNOWN:
            raise _Unknown
        digest.update(f"{name} {cls.__module__}.{cls.__qualname__} {_code(cls.__module__)}\n".encode())
        for key, value in sorted(vars(part).items()):
            if key in INTERNAL:
                continue
            try:
                text = _text(value, backbone)
            except _Unknown:
                if strict:
                    raise
                text = type(value).__qualname__
            digest.update(f"  {key} {text}\n".encode())


def _text(value: Any, backbone: Backbone) -> str:
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(item, backbone) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{_text(k, backbone)}: {_text(v, backbone)}' for k, v in value.items()))}}}"
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, BaseModel) and type(value).__module__.startswith("cil."):
        return f"{type(value).__qualname__} {_text(value.model_dump(mode='json'), backbone)}"
    if isinstance(value, Frozen) and value.model is backbone.model:
        return "the backbone"
    named = isinstance(value, (FunctionType, BuiltinFunctionType)) and "<" not in value.__qualname__
    if named and (value.__module__ or "").split(".")[0] in KNOWN:
        return f"{value.__module__}.{value.__qualname__}"
    raise _Unknown


def _tensor(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous()
    content = hashlib.sha256(plain.flatten().view(torch.uint8).numpy()).hexdigest()
    return f"{plain.dtype} {tuple(plain.shape)} {content}"


@lru_cache
def _code(module: str) -> str:
    """Digest of a file of this package; the code of other packages is identified by their versions."""
    if not module.startswith("cil."):
        return ""
    file = sys.modules[module].__file__
    return hashlib.sha256(Path(str(file)).read_bytes()).hexdigest()
