"""The network that is pre-trained, and the initialisation of its weights."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from scripts.pretraining.images import normalise


def model_kwargs(args: Namespace) -> dict[str, Any]:
    """Exact keyword arguments for :func:`timm.create_model`."""
    return {
        "model_name": "vit_tiny_patch16_224",
        "img_size": args.img_size,
        "patch_size": args.patch_size,
        "embed_dim": args.dim,
        "depth": args.depth,
        "num_heads": args.dim // 64,
        "num_classes": 0,
    }


class Net(torch.nn.Module):
    """Backbone plus a class-token head and an auxiliary averaged-patch-token head."""

    def __init__(self, args: Namespace, classes: int) -> None:
        super().__init__()
        self.backbone = timm.create_model(**model_kwargs(args), dynamic_img_size=True)
        self.head = torch.nn.Linear(args.dim, classes)
        self.aux = torch.nn.Linear(args.dim, classes)
        for lin in (self.head, self.aux):
            torch.nn.init.trunc_normal_(lin.weight, std=0.02)
            torch.nn.init.zeros_(lin.bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of both heads [B, classes] for x [B, 3, H, W]; the sides may differ from ``img_size``."""
        t = self.backbone.forward_features(x)
        return self.head(t[:, 0]), self.aux(t[:, 1:].mean(1))


def sincos_2d(grid: int, dim: int) -> torch.Tensor:
    """Position embedding [grid², dim]; the first half of the channels encodes the row, the second the column."""
    omega = 1.0 / 100 ** (torch.arange(dim // 4) / (dim // 4))
    pos = torch.arange(grid).float()
    ang = pos[:, None] * omega[None]
    one = torch.cat([ang.sin(), ang.cos()], 1)  # [grid, dim / 2]
    yy = one[:, None].expand(grid, grid, -1)
    xx = one[None].expand(grid, grid, -1)
    return torch.cat([yy, xx], -1).reshape(grid * grid, dim)


@torch.no_grad()
def mimetic_init(
    model: VisionTransformer, a_qk: float = 0.7, b_qk: float = 0.7, a_vo: float = 0.4, b_vo: float = 0.4
) -> None:
    """W_q W_kᵀ ≈ a Z + b I per head and W_v W_o ≈ a Z − b I, Z normal (Trockman & Kolter, 2023, arXiv 2305.09828)."""
    for blk in model.blocks:
        attn = blk.attn
        d, heads = attn.qkv.in_features, attn.num_heads
        k = d // heads
        qs, ks = [], []
        for _ in range(heads):
            u, s, vh = torch.linalg.svd(a_qk * torch.randn(d, d) / d**0.5 + b_qk * torch.eye(d))
            qs.append((u[:, :k] * s[:k].sqrt()).T)
            ks.append((vh[:k].T * s[:k].sqrt()).T)
        u, s, vh = torch.linalg.svd(a_vo * torch.randn(d, d) / d**0.5 - b_vo * torch.eye(d))
        # y = W_o W_v x must equal (u s vh) x
        attn.qkv.weight.copy_(torch.cat([torch.cat(qs), torch.cat(ks), s.sqrt()[:, None] * vh]))
        attn.proj.weight.copy_(u * s.sqrt())
        attn.qkv.bias.zero_()
        attn.proj.bias.zero_()


@torch.no_grad()
def whitening_init(model: VisionTransformer, images: torch.Tensor, scale: float = 0.7, eps: float = 0.05) -> None:
    """Set the patch embedding to a randomly rotated PCA whitening of the patches of images [N, 3, H, W], uint8."""
    proj = model.patch_embed.proj
    d, p = proj.out_channels, proj.kernel_size[0]
    x = F.interpolate(normalise(images), size=48, mode="bilinear", align_corners=False)
    cols = F.unfold(x, p, stride=p).transpose(1, 2).reshape(-1, 3 * p * p)
    mu = cols.mean(0)
    lam, vec = torch.linalg.eigh((cols - mu).T @ (cols - mu) / len(cols))
    lam, vec = lam.flip(0)[:d], vec.flip(1)[:, :d]
    rot = torch.linalg.qr(torch.randn(d, len(lam)) if d >= len(lam) else torch.randn(d, d))[0]
    weight = scale * rot @ ((lam + eps).rsqrt()[:, None] * vec.T)
    proj.weight.copy_(weight.view_as(proj.weight))
    proj.bias.copy_(-weight @ mu)


@torch.no_grad()
def initialise(model: VisionTransformer, images: torch.Tensor) -> None:
    """Initialise the whole network from the global random state."""
    model.pos_embed.zero_()
    model.pos_embed[0, 1:] = sincos_2d(model.patch_embed.grid_size[0], model.embed_dim)
    mimetic_init(model)
    whitening_init(model, images)
