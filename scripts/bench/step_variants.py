"""What could make a training step faster on this machine, each against the step as it is; writes JSON.

The step is that of ``fit``: forward through the shipped backbone with a tuner, backward, optimiser. Both sides of a
pair alternate in one process. Reported are processor seconds of the variant over those of the step as it is (below 1:
faster), the median and both ends of the pairs, the largest difference between the trained weights, and the elapsed
seconds of the variant's first step.

- ``same``: the same step, which shows the noise.
- ``fused``: the optimiser's fused kernel.
- ``compiled``: ``torch.compile`` of the backbone.
- ``micro``: the step in micro-batches of a quarter.
- ``no_graph``: the blocks below the first tuned one explicitly without a graph of gradients.
- ``prefix``: their tokens computed once and kept, as is possible without augmentation.
- ``training``: the same in the whole first task of ``ssiat`` on the digits without augmentation, over its default
  number of epochs, with everything that training needs; the usual side computes the tokens again.

Variants that are not asked for stay in the file.

    python -m scripts.bench.step_variants --pairs 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cil import load_config
from cil.backbone import Backbone, load_backbone
from cil.classifiers import CosineHead
from cil.config import BackboneConfig
from cil.data.images import LoadedSplit
from cil.data.transforms import Transforms
from cil.features import FeatureCache
from cil.learner import Context
from cil.learners.ssiat import SSIAT
from cil.runner import make_stream
from cil.runner.checkpoint import to_json
from cil.runner.provenance import versions
from cil.tuning import build_tuner
from cil.utils import hardware
from scripts import ROOT

TUNERS: dict[str, Any] = {
    "adapter": {"name": "adapter", "dropout": 0},
    "late_adapter": {"name": "adapter", "dropout": 0, "blocks": [4, 5]},
    "full": "full",
}
CLASSES = 10
VARIANTS = ["same", "fused", "micro", "no_graph", "prefix", "training", "compiled"]
Found = dict[str, Any]


class Trained:
    """A tuner and a head on the backbone, and its training step on one batch.

    Args:
        backbone: The frozen backbone.
        tuner: Configuration of the tuner.
        fused: Whether the optimiser is the fused one.
    """

    def __init__(self, backbone: Backbone, tuner: Any, fused: bool = False) -> None:
        self.backbone, self.tuner = backbone, build_tuner(tuner, backbone)
        self.head = CosineHead(backbone.feature_dim)
        self.head.grow(CLASSES, torch.Generator().manual_seed(0))
        self.parameters = [*self.tuner.parameters(), *self.head.parameters()]
        for p in self.parameters:
            p.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.parameters, 1e-4, fused=fused or None)
        self.see: Callable[[Tensor], Tensor] = lambda images: self.backbone(images, self.tuner)

    def step(self, images: Tensor, labels: Tensor, parts: int = 1) -> None:
        for some, own in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            loss = F.cross_entropy(self.head(self.see(some)), own) * (len(own) / len(labels))
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def split_at(self, block: int, graph: bool) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The forward pass in two: images to tokens before a block, and these to features.

        Args:
            block: Number of the block.
            graph: Whether the first part may have a graph of gradients.
        """
        vit: Any = self.backbone.model

        def below(images: Tensor) -> Tensor:
            with nullcontext() if graph else torch.no_grad():
                tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
                for one in vit.blocks[:block]:
                    tokens = one(tokens)
            return tokens

        def above(tokens: Tensor) -> Tensor:
            for i in range(block, len(vit.blocks)):
                tokens = self.tuner.block(i, vit.blocks[i], tokens)
            return self.tuner.pool(vit, vit.norm(tokens))

        return below, above


class Stage:
    """The first task of the digits for ``ssiat``, without augmentation.

    Args:
        backbone: The frozen backbone.
        tuner: Configuration of the tuner.
        per_class: Training images per class, for two classes.
    """

    def __init__(self, backbone: Backbone, tuner: Any, per_class: int) -> None:
        self.backbone, self.learner_config = backbone, SSIAT.Config.model_validate({"tuner": tuner})
        config = load_config("quickstart", [f"data.per_class={per_class}", "transform.augment=none"])
        transforms = Transforms(backbone.data_config, config.transform)
        train, test = (
            LoadedSplit(config.data, split, config.hardware).images(transforms) for split in ("train", "test")
        )
        self.task = make_stream(config, train, test).tasks[0]
        self.learner: SSIAT

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.learner.parameters())

    def learn(self) -> None:
        """Learn the task from the start."""
        accelerator = hardware.accelerator("cpu")
        self.learner, ctx = SSIAT(self.learner_config, self.backbone), Context(accelerator, FeatureCache(accelerator))
        self.learner.begin(self.task, ctx)
        self.learner.learn(self.task, ctx)

    def learn_again(self) -> None:
        """The same, with all tokens computed in every epoch."""
        with mock.patch.object(Backbone, "keeping_tokens", lambda *_: nullcontext()):
            self.learn()


def compare(usual: Callable[[], None], variant: Callable[[], None], pairs: int) -> Found:
    """Processor seconds of a variant over those of the step as it is, after a step of each."""
    started = time.perf_counter()
    variant()
    once = time.perf_counter() - started
    usual()
    shares, seconds = [], []
    for pair in range(pairs):
        took = {}
        for name, call in (("usual", usual), ("variant", variant))[:: 1 if pair % 2 else -1]:
            started = time.process_time()
            call()
            took[name] = time.process_time() - started
        shares.append(took["variant"] / took["usual"])
        seconds.append(took["usual"])
    found = {"ratio": statistics.median(shares), "lowest": min(shares), "highest": max(shares)}
    return {**found, "seconds_usual": statistics.median(seconds), "seconds_first": once}


def difference(one: Trained | Stage, two: Trained | Stage) -> float:
    """The largest difference between the weights of two that have trained alike; 0 if they are equal bit for bit."""
    return max((a - b).detach().abs().max().item() for a, b in zip(one.parameters, two.parameters, strict=True))


def measure(tuner: Any, images: Tensor, labels: Tensor, pairs: int, wanted: list[str]) -> Found:
    """Those of the variants that apply to a tuner."""
    backbone = load_backbone(BackboneConfig())
    found: Found = {}

    def against(name: str, other: Trained, parts: int = 1, inputs: Tensor = images) -> None:
        if name not in wanted:
            return
        usual = Trained(backbone, tuner)
        result = compare(lambda: usual.step(images, labels), lambda: other.step(inputs, labels, parts), pairs)
        found[name] = {**result, "difference": difference(usual, other)}

    against("same", Trained(backbone, tuner))
    against("fused", Trained(backbone, tuner, fused=True))
    against("micro", Trained(backbone, tuner), parts=4)
    first = min(tuner.get("blocks") or [0]) if isinstance(tuner, dict) else 0
    if first:
        apart = Trained(backbone, tuner)
        below, above = apart.split_at(first, graph=False)
        apart.see = lambda inputs: above(below(inputs))
        against("no_graph", apart)
        cached = Trained(backbone, tuner)
        _, cached.see = cached.split_at(first, graph=False)
        tokens = below(images)
        against("prefix", cached, inputs=tokens)
        if "prefix" in found:
            found["prefix"]["kept_bytes_per_image"] = tokens[0].numel() * tokens.element_size()
        if "training" in wanted:
            once, again = (Stage(backbone, tuner, len(images)) for _ in range(2))
            result = compare(again.learn_again, once.learn, pairs)
            found["training"] = {**result, "difference": difference(once, again), "images": len(once.task.train)}
    if "compiled" in wanted:
        quick = Trained(backbone, tuner)
        code: nn.Module = torch.compile(load_backbone(BackboneConfig()))  # type: ignore[assignment]
        quick.see = lambda inputs: code(inputs, quick.tuner)
        against("compiled", quick)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuners", nargs="+", choices=TUNERS, default=list(TUNERS))
    parser.add_argument("--images", type=int, default=32, help="images of the step, and per class in a training")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="compiled takes minutes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/step_variants.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    images = torch.randn(given.images, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(given.images) % CLASSES
    found: Found = {"machine": hardware.facts(hardware.accelerator("cpu")), "versions": versions()}
    known = json.loads(given.out.read_text(encoding="utf-8"))["tuners"] if given.out.exists() else {}
    found |= {"images": given.images, "pairs": given.pairs, "tuners": known}
    for name in given.tuners:
        measured = measure(TUNERS[name], images, labels, given.pairs, given.variants)
        known[name] = {**known.get(name, {}), **measured}
        for variant, result in measured.items():
            print(name, variant, {key: round(value, 4) for key, value in result.items()}, flush=True)
        given.out.write_text(to_json(found), encoding="utf-8")


if __name__ == "__main__":
    main()
