"""Training images in one tensor file, and their augmentation in batched tensor operations."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

MEAN = (0.4823, 0.4505, 0.3982)
STD = (0.2747, 0.2664, 0.2795)
"""Channel statistics of the pre-training images, in [0, 1] pixel units."""


def pack(args: Namespace) -> None:
    """Decode Tiny-ImageNet (and, if given, CIFAR-10 JPEG folders) into one tensor file.

    The 200 sorted class ids fall into even positions, which are trained on (``pre_train``, ``pre_val``), and odd ones,
    which the stream has (``str_train``, ``str_val``). Each is a pair: images uint8 [N, 3, H, W], labels int64 [N].
    """

    def natural(name: str) -> list[int | str]:
        return [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", name)]

    def load(items: list[tuple[Path, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        imgs = []
        for path, _ in items:
            img = Image.open(path).convert("RGB")
            if img.size != (args.img_size, args.img_size):
                img = img.resize((args.img_size, args.img_size), Image.BICUBIC)
            imgs.append(np.asarray(img))
        x = torch.from_numpy(np.stack(imgs)).permute(0, 3, 1, 2).contiguous()
        return x, torch.tensor([t for _, t in items])

    root = Path(args.tiny_imagenet)
    wnids = sorted((root / "wnids.txt").read_text().split())
    groups = {"pre": wnids[0::2], "str": wnids[1::2]}
    val_files = defaultdict(list)
    for line in (root / "val" / "val_annotations.txt").read_text().splitlines():
        name, wnid = line.split("\t")[:2]
        val_files[wnid].append(name)
    data = {}
    for key, ids in groups.items():
        keep = None if key == "pre" else 200
        train, val = [], []
        for i, wnid in enumerate(ids):
            folder = root / "train" / wnid / "images"
            train += [(folder / f, i) for f in sorted((f.name for f in folder.iterdir()), key=natural)[:keep]]
            val += [(root / "val" / "images" / f, i) for f in sorted(val_files[wnid], key=natural)]
        data[f"{key}_train"], data[f"{key}_val"] = load(train), load(val)
    if args.cifar10:
        for split, count in (("train", 500), ("test", 100)):
            items, base = [], Path(args.cifar10) / split
            for i, name in enumerate(sorted(d.name for d in base.iterdir())):
                files = sorted((f.name for f in (base / name).iterdir()), key=natural)[:count]
                items += [(base / name / f, i) for f in files]
            data[f"c10_{split}"] = load(items)
    torch.save(data, args.data)


def normalise(x: torch.Tensor) -> torch.Tensor:
    """The network's input from uint8 [B, 3, H, W]."""
    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    return (x.float() / 255 - mean) / std


def augment(x: torch.Tensor, size: int, args: Namespace, gen: torch.Generator) -> torch.Tensor:
    """Random resized crop, flip and colour jitter: uint8 [B, 3, H, W] in, normalised float [B, 3, size, size] out."""
    n = len(x)

    def rand(lo: float, hi: float) -> torch.Tensor:
        return torch.empty(n).uniform_(lo, hi, generator=gen)

    area, ratio = rand(args.min_scale, 1.0), torch.exp(rand(math.log(3 / 4), math.log(4 / 3)))
    w = (area * ratio).sqrt().clamp(max=1.0)
    h = (area / ratio).sqrt().clamp(max=1.0)
    theta = torch.zeros(n, 2, 3)
    flip = (torch.rand(n, generator=gen) < 0.5).float() * 2 - 1
    theta[:, 0, 0], theta[:, 1, 1] = w * flip, h
    theta[:, 0, 2] = (1 - w) * rand(-1, 1)
    theta[:, 1, 2] = (1 - h) * rand(-1, 1)
    grid = F.affine_grid(theta, (n, 3, size, size), align_corners=False)
    x = F.grid_sample(x.float() / 255, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    if j := args.jitter:
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * rand(1 - j, 1 + j).view(n, 1, 1, 1)  # saturation
        mu = x.mean((1, 2, 3), keepdim=True)
        x = mu + (x - mu) * rand(1 - j, 1 + j).view(n, 1, 1, 1)  # contrast
        x = (x * rand(1 - j, 1 + j).view(n, 1, 1, 1)).clamp(0, 1)  # brightness
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def cutmix(x: torch.Tensor, y: torch.Tensor, gen: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, float]:
    """One random box for the whole batch: mixed x, the partners' labels and the weight of the original ones."""
    size = x.shape[-1]
    side = int(size * math.sqrt(1 - torch.rand((), generator=gen).item()))
    top, left = (int(torch.randint(0, size - side + 1, (), generator=gen)) for _ in range(2))
    perm = torch.randperm(len(x), generator=gen)
    x = x.clone()
    x[:, :, top : top + side, left : left + side] = x[perm, :, top : top + side, left : left + side]
    return x, y[perm], 1 - side * side / (size * size)
