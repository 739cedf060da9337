"""Compare rules, banks and routers on the same trained tasks: accuracies, what is kept, and what an oracle would gain.

Per class order each task is trained once from the pre-trained weights, by the recipe of a learner ``merge``. Then the
learners ``merge`` (by several rules), ``smile`` and ``routed`` (by every router and kind of scores) learn the stream
with these updates instead of training. The numbers are after the last task: accuracy over all classes, bytes of what
is kept of the updates, and forward passes per test image; for routers also the share of images whose task is found,
and the accuracy if all were; for LDA on the frozen features the accuracy among the classes of the true task. What is
finished is kept, so the command can be repeated until all is done.

    python -m scripts.studies.banks data.root=../shared/data --out results/bench/banks
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cil import load_backbone, load_config
from cil.backbone import FROZEN, Backbone
from cil.classifiers import LDA, CosineHead
from cil.config import Config
from cil.data.images import LoadedSplit
from cil.data.transforms import Transforms
from cil.features import FeatureCache
from cil.learner import Context
from cil.learners.bases.routers import Gates
from cil.learners.bases.soup import tuner_with
from cil.learners.merge import Merge
from cil.learners.routed import Routed
from cil.learners.smile import Smile
from cil.runner import make_stream, provenance
from cil.runner.checkpoint import to_json
from cil.stream import Stream, Task
from cil.tuning import Tuner
from cil.utils import hardware

RULES: dict[str, dict[str, Any]] = {
    "opcm": {"name": "opcm"},
    "nufilt": {"name": "nufilt"},
    "wudi": {"name": "wudi"},
    "tsv_m": {"name": "tsv_m"},
    "iso_cts": {"name": "iso_cts"},
    "sum": {"name": "task_arithmetic", "scale": 1.0},
}
ROUTERS, SCORES = ("frozen_lda", "entropy", "smile", "gates"), ("all", "task", "sum")


class Order:
    """One class order with the updates of its tasks, trained once and kept in a folder."""

    def __init__(self, config: Config, recipe: dict[str, Any], number: int, work: Path, images: int | None) -> None:
        self.accelerator = hardware.accelerator(config.hardware.device, config.precision)
        self.backbone: Backbone = load_backbone(config.backbone, self.accelerator.device)
        transforms = Transforms(self.backbone.data_config, config.transform)
        splits = [LoadedSplit(config.data, split, config.hardware).images(transforms) for split in ("train", "test")]
        self.stream: Stream = make_stream(config.model_copy(update={"orders": [number]}), *splits)
        self.recipe, self.cache = recipe, FeatureCache(self.accelerator)
        with self.stream.open_test() as test:
            chosen = np.concatenate(test.members)
            labels = test.labels[chosen]
            first = np.array([(labels[:i] == label).sum() for i, label in enumerate(labels)]) < (images or len(labels))
            self.test, self.labels = (test.images, chosen[first]), torch.from_numpy(labels[first])
        self.task_of_class = torch.tensor([task.index for task in self.stream.tasks for _ in task.classes])
        self.task_of = self.task_of_class[self.labels]
        self.updates = self.trained(work)

    def trained(self, work: Path) -> list[dict[str, Tensor]]:
        """The updates of all tasks; each is trained unless its file is there."""
        trainer, found = Merge(Merge.Config.model_validate({**self.recipe, "rule": "average"}), self.backbone), []
        for task in self.stream.tasks:
            ctx, file = Context(self.accelerator, self.cache, stage=task.index), work / f"task{task.index}.safetensors"
            trainer.begin(task, ctx)
            if not file.exists():
                tuner, _ = trainer.train_task(task, ctx)
                partial = file.with_suffix(".partial")
                save_file({name: value.contiguous() for name, value in trainer.update(tuner).items()}, partial)
                partial.rename(file)
            found.append(load_file(file))
        return found

    def learned(self, cls: type[Merge] | type[Routed], **settings: Any) -> tuple[Any, Tensor, int]:
        """A learner after the stream, its features of all test images, and passes per test image for them."""
        learner: Any = cls(cls.Config.model_validate({**self.recipe, **settings}), self.backbone)
        head = CosineHead(self.backbone.feature_dim)

        def given(task: Task, ctx: Context) -> Tuner | tuple[Tuner, nn.Module]:
            tuner = tuner_with(learner.models, self.updates[task.index])
            return tuner if isinstance(learner, Routed) else (tuner, head)

        learner.train_task = given
        cache = FeatureCache(self.accelerator)
        for source in (*(task.train.source for task in self.stream.tasks), self.test):
            cache.put(learner, FROZEN, *source, self.cache.get(self.backbone, *source))
        for task in self.stream.tasks:
            ctx = Context(self.accelerator, cache, stage=task.index)
            learner.begin(task, ctx)
            learner.learn(task, ctx)
        learner.eval()
        return learner, cache.get(learner, *self.test), len(learner.views())

    def accuracy(self, logits: Tensor) -> float:
        return 100 * float((logits.argmax(1) == self.labels).double().mean())

    def merged(self, cls: type[Merge], settings: dict[str, Any]) -> dict[str, Any]:
        learner, features, passes = self.learned(cls, **settings)
        kept = sum(value.nbytes for name, value in learner.rule.state_dict().items() if ":" in name)
        return {"a_last": self.accuracy(learner.logits(features)), "mb": kept / 1e6, "passes": passes}

    def routed(self) -> dict[str, dict[str, Any]]:
        """Every router and kind of scores, on the features of one learner."""
        learner, features, passes = self.learned(Routed, router="smile")
        tasks, width = len(self.updates), self.backbone.feature_dim
        gates, view = Gates(width, learner.config.directions), self.backbone
        for task in self.stream.tasks:
            gates.fit(self.cache.get(view, *task.train.source))
        own, plain, found = learner.own_scale, features[:, : width * (tasks + 1)], {}
        for router, scores in product(ROUTERS, SCORES):
            learner.own_scale, learner.gates = (
                (own if router == "smile" else None),
                (gates if router == "gates" else None),
            )
            learner.config = learner.config.model_copy(update={"router": router, "scores": scores})
            x = features if router == "smile" else plain
            chosen = learner.route(x)
            found[f"routed {router} {scores}"] = {
                "a_last": self.accuracy(learner.routed_logits(x, chosen)),
                "oracle": self.accuracy(learner.routed_logits(x, self.task_of)),
                "router": 100 * float((chosen == self.task_of).double().mean()),
                "mb": learner.bank.bytes / 1e6,
                "passes": passes - (router != "smile"),
            }
        return found

    def frozen(self) -> dict[str, Any]:
        classifier = LDA(self.backbone.feature_dim, 0.01, priors="uniform")
        classifier.grow(len(self.stream.tasks[-1].seen))
        for task in self.stream.tasks:
            labels = torch.from_numpy(task.train.labels)
            classifier.partial_fit(self.cache.get(self.backbone, *task.train.source), labels)
        logits = classifier.logits(self.cache.get(self.backbone, *self.test))
        told = logits.where(self.task_of_class == self.task_of[:, None], float("-inf"))
        return {"a_last": self.accuracy(logits), "oracle": self.accuracy(told), "mb": 0.0, "passes": 1.0}


def measure(order: Order, result: dict[str, Any], file: Path) -> None:
    """Add to ``result`` what it lacks, and write it after every learner."""
    todo: dict[str, Any] = {"frozen lda": order.frozen, "routed frozen_lda all": order.routed}
    todo |= {name: lambda rule=rule: order.merged(Merge, {"rule": rule}) for name, rule in RULES.items()}
    todo |= {"smile": lambda: order.merged(Smile, {})}
    for name, compute in todo.items():
        if name in result["found"]:
            continue
        started, found = time.monotonic(), compute()
        result["found"] |= found if name.startswith("routed") else {name: found}
        print(f"{name}: {time.monotonic() - started:.0f} s, {found}", flush=True)
        file.write_text(to_json(result), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value, as for cil run")
    parser.add_argument("--config", default="split_tiny_imagenet100/merging", help="data, stream, backbone, recipe")
    parser.add_argument("--learner", default="merge", help="label of the learner whose recipe is used")
    parser.add_argument("--orders", nargs="+", type=int, default=[1993, 1994, 1995])
    parser.add_argument("--images", type=int, help="test images per class, the first ones; default: all")
    parser.add_argument("--work", type=Path, default=Path("banks-work"), help="folder for the trained updates")
    parser.add_argument("--out", type=Path, required=True, help="folder for one JSON file per order")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    entry = next(e for e in config.learners if e.title == args.learner)
    recipe = {k: v for k, v in entry.parameters.items() if k not in ("rule", "prototypes", "anchor", "head")}
    args.out.mkdir(parents=True, exist_ok=True)
    for number in args.orders:
        stem = f"{args.learner}-order{number}"
        file = args.out / f"{stem}.json"
        work = args.work / stem
        work.mkdir(parents=True, exist_ok=True)
        order = Order(config, recipe, number, work, args.images)
        result = {
            "config": config.model_dump(mode="json"),
            "recipe": recipe,
            "order": number,
            "test_images": len(order.labels),
            "backbone": {"name": order.backbone.name, "sha256": order.backbone.fingerprint},
            "versions": provenance.versions(),
            "machine": hardware.facts(order.accelerator),
            "found": {},
        }
        if file.exists():
            result["found"] = json.loads(file.read_text(encoding="utf-8"))["found"]
        measure(order, result, file)


if __name__ == "__main__":
    main()
