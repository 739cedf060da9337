"""Compare merging rules and treatments of old class statistics: every combination on the same trained tasks.

Per class order each task is trained once from the pre-trained weights, by the learner ``merge``. Then every rule merges
these updates in sequence, and every treatment classifies with the result; the numbers are A_last, the accuracy over all
classes after the last task. The rules are compared with the frozen backbone, the first task's update alone, and the
plain sum scaled to the mean norm, which is OPCM without its projection.

    python -m scripts.studies.ablate_merging data.root=../shared/data --out results/bench/merging
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from cil import load_backbone, load_config
from cil.backbone import FROZEN, Backbone
from cil.config import Config
from cil.data.images import LoadedSplit
from cil.data.transforms import Transforms
from cil.features import FeatureCache, View
from cil.learner import Context
from cil.learners.merge import Merge
from cil.learners.merge_oracle import MergeOracle
from cil.merging.statistics import Statistics
from cil.runner import make_stream, provenance
from cil.runner.checkpoint import to_json
from cil.stream import Stream
from cil.utils import hardware
from scripts.publish.tables import ablation

SUM = {"name": "task_arithmetic", "scale": 1.0, "finalisers": ["norm_matching"]}
RULES: dict[str, dict[str, Any]] = {
    "average": {"name": "average"},
    "sum at the mean norm": SUM,
    "opcm": {"name": "opcm"},
    "opcm diag_kept": {"name": "opcm", "variant": "diag_kept"},
    "opcm paper": {"name": "opcm", "variant": "paper"},
    "ties": {"name": "ties"},
    "regmean": {"name": "regmean"},
    "gram_merge": {"name": "gram_merge"},
}
FROZEN_BACKBONE, FIRST_TASK = "frozen backbone", "first task's update alone"
HEADS = ("lda", "ncm")
TREATMENTS = ("stale", "translate", "linear", "oracle")
SHOWN = [("lda", t, False) for t in TREATMENTS] + [("lda", "linear", True), ("lda", "oracle", True)]
Choice = tuple[str, str, bool]
"""(head, treatment, with the frozen anchor)."""


@dataclass(eq=False)
class NamedView:
    """One view with a version chosen by the caller, for the feature cache."""

    version: Hashable
    view: View
    training: bool = False

    def views(self) -> Mapping[Hashable, View]:
        return {self.version: self.view}

    def train(self, mode: bool = True) -> None:
        """There is nothing to train."""


class Order:
    """One class order: its tasks' updates, the statistics that rules need, and the features of the frozen backbone."""

    def __init__(
        self, stream: Stream, backbone: Backbone, recipe: dict[str, Any], tasks: int, accelerator: Accelerator
    ) -> None:
        self.tasks, self.backbone, self.recipe = stream.tasks[:tasks], backbone, recipe
        self.cache = FeatureCache(accelerator)
        with stream.open_test() as test:
            self.test = test.images, np.concatenate(test.members[:tasks])
            self.labels = torch.from_numpy(test.labels[self.test[1]])
        self.frozen = NamedView(FROZEN, backbone)
        self.updates: list[dict[str, Tensor]] = []
        self.statistics: list[Statistics | None] = []
        trainer = self.learner(rule={"name": "regmean"})  # a rule that needs Gram matrices
        for task in self.tasks:
            ctx = Context(accelerator, self.cache, stage=task.index)
            trainer.begin(task, ctx)
            tuner, head = trainer.train_task(task, ctx)
            self.updates.append(trainer.update(tuner))
            self.statistics.append(trainer.measure(self.updates[-1], head, task, ctx))

    def learner(self, cls: type[Merge] = Merge, **settings: Any) -> Merge:
        return cls(cls.Config.model_validate({**self.recipe, **settings}), self.backbone)

    def train_features(self, view: NamedView, task: int) -> Tensor:
        return self.cache.get(view, *self.tasks[task].train.source)

    def features_under(self, rule: str) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """Features of each task's images before and after its merge and after the last, and of the test images."""
        everything = range(len(self.tasks))
        if rule == FROZEN_BACKBONE:
            same = [self.train_features(self.frozen, t) for t in everything]
            return same, same, same, self.cache.get(self.frozen, *self.test)
        merging = self.learner(rule=RULES.get(rule, RULES["average"]))
        view = NamedView((rule, 0), merging.merged)
        before, after = [], []
        for t in everything:
            before.append(self.train_features(view, t) if t else torch.empty(0))
            if rule != FIRST_TASK or t == 0:
                merging.fold(self.updates[t], self.statistics[t])
                view.version = (rule, t + 1)
            after.append(self.train_features(view, t))
        return before, after, [self.train_features(view, t) for t in everything], self.cache.get(view, *self.test)

    def accuracies(self, rule: str) -> dict[Choice, float]:
        """A_last in per cent by choice."""
        before, after, last, test = self.features_under(rule)
        found = {}
        for head, treatment, anchor in product(HEADS, TREATMENTS, (False, True)):
            oracle = treatment == "oracle"
            learner = self.learner(MergeOracle if oracle else Merge, head=head, prototypes=treatment, anchor=anchor)
            learner.classifier.grow(len(self.tasks[-1].seen))
            for t, task in enumerate(self.tasks):
                if t and treatment in ("translate", "linear"):
                    learner.correct_drift(*[self.beside(anchor, task.train.source, x[t]) for x in (before, after)])
                x = self.beside(anchor, task.train.source, last[t] if oracle else after[t])
                learner.classifier.partial_fit(x, torch.from_numpy(task.train.labels))
            hits = learner.logits(self.beside(anchor, self.test, test)).argmax(1) == self.labels
            found[head, treatment, anchor] = 100 * float(hits.double().mean())
        return found

    def beside(self, anchor: bool, source: tuple[Any, np.ndarray], features: Tensor) -> Tensor:
        return torch.cat([self.cache.get(self.frozen, *source), features], dim=1) if anchor else features


def column(choice: Choice) -> str:
    head, treatment, anchor = choice
    return f"{head} {treatment}{' + anchor' if anchor else ''}"


def measure(config: Config, recipe: dict[str, Any], number: int, tasks: int | None, rules: list[str]) -> dict[str, Any]:
    """Settings and results of one class order, ready for JSON."""
    accelerator = hardware.accelerator(config.hardware.device, config.precision)
    backbone = load_backbone(config.backbone, accelerator.device)
    transforms = Transforms(backbone.data_config, config.transform)
    splits = [LoadedSplit(config.data, split, config.hardware).images(transforms) for split in ("train", "test")]
    stream = make_stream(config.model_copy(update={"orders": [number]}), *splits)
    started = time.monotonic()
    order = Order(stream, backbone, recipe, tasks or len(stream), accelerator)
    norms = [float(torch.stack([v.norm() for v in u.values()]).norm()) for u in order.updates]
    print(f"order {number}: trained in {time.monotonic() - started:.0f} s, norms {[round(n, 2) for n in norms]}")
    found = {}
    for rule in rules:
        found[rule] = {column(choice): accuracy for choice, accuracy in order.accuracies(rule).items()}
        print(rule, {column(c): round(found[rule][column(c)], 1) for c in SHOWN}, flush=True)
    return {
        "config": config.model_dump(mode="json"),
        "recipe": recipe,
        "order": number,
        "task_vector_norms": norms,
        "backbone": {"name": backbone.name, "sha256": backbone.fingerprint},
        "versions": provenance.versions(),
        "machine": hardware.facts(accelerator),
        "a_last": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value, as for cil run")
    parser.add_argument("--config", default="split_tiny_imagenet100/merging", help="data, stream, backbone, recipe")
    parser.add_argument("--learner", default="merge", help="label of the learner whose recipe is used")
    parser.add_argument("--orders", nargs="+", type=int, default=[1993, 1994, 1995])
    parser.add_argument("--tasks", type=int, help="number of tasks; default: all")
    parser.add_argument("--rules", nargs="+", default=[FROZEN_BACKBONE, FIRST_TASK, *RULES])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for one JSON file per order; keeps existing ones"
    )
    args = parser.parse_intermixed_args()

    config = load_config(args.config, args.overrides)
    entry = next(e for e in config.learners if e.title == args.learner)
    recipe = {k: v for k, v in entry.parameters.items() if k not in ("rule", "prototypes", "anchor", "head")}
    args.out.mkdir(parents=True, exist_ok=True)
    for number in args.orders:
        file = args.out / f"{args.learner}-order{number}.json"
        if not file.exists():
            file.write_text(to_json(measure(config, recipe, number, args.tasks, args.rules)), encoding="utf-8")
    Console().print(Markdown(ablation(args.out / args.learner)))


if __name__ == "__main__":
    main()
