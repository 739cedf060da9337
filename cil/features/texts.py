"""Vectors of texts, each group computed once: kept in memory, and in the feature store beside features of images."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from cil.backbone import TextSide
from cil.store import FeatureStore, Key


def encoded(side: TextSide, texts: Sequence[str], accelerator: Accelerator, store: FeatureStore | None) -> Tensor:
    """Vectors of texts in the joint space, float32 [n, d] on the CPU, not normalised.

    A group is computed in one pass of its own, so its vectors do not depend on other groups.

    Args:
        side: The text side of the backbone; it keeps what was computed for all runs on the backbone.
        texts: The group, e.g. all sentences about one class.
        accelerator: Device and processes; only the main process writes to the store.
        store: Feature store; None for none.
    """
    group = tuple(texts)
    if group in side.known:
        return side.known[group]
    key = Key(
        {
            "text": side.fingerprint,
            "open_clip": side.tower.version,
            "device": accelerator.device.type,
            "matmul_precision": torch.get_float32_matmul_precision(),
            "torch": torch.__version__,
        },
        {"data_name": "texts", "weights": side.fingerprint, "feature_dim": side.width, "tuner_name": ""},
    )
    # half of a text's digest in place of the position of an image
    unit = [np.array([int.from_bytes(sha256(one.encode()).digest()[:8], "big") >> 1 for one in group])]
    found = None if store is None else store.read(key, unit)
    if found is None:
        found = side.encode(group, accelerator.device)
        if store is not None and accelerator.is_main_process:
            store.write(key, unit, found)
    side.known[group] = found.clone()
    return side.known[group]
