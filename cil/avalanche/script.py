"""Our learners as strategies in Avalanche scripts: ``train(experience)``, ``eval(stream)``, metrics and loggers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn

from cil.backbone import EMBEDDED, Backbone, load_backbone
from cil.data.images import ImageSet
from cil.errors import StreamError
from cil.features import FeatureCache
from cil.learner import Context, Learner
from cil.learners import registry
from cil.stream import Task, TaskData
from cil.utils import hardware
from cil.utils.randomness import isolated


def as_strategy(
    learner: Learner | str | Mapping[str, Any],
    *,
    backbone: Backbone | str = EMBEDDED,
    seed: int = 0,
    device: str = "cpu",
    eval_mb_size: int = 128,
    plugins: Sequence[Any] | None = None,
    evaluator: Any = default_evaluator,
    eval_every: int = -1,
    log: Callable[[str, float], None] | None = None,
) -> LearnerStrategy:
    """Wrap a learner as an Avalanche strategy.

    Each experience is one task. The learner trains on it by its own recipe, including epochs and batch size.
    Avalanche's callbacks before and after an experience are called, those within one are not. Evaluation is Avalanche's
    own loop, without task labels. Labels may be any integers from 0 in any order: the learner receives them numbered in
    order of appearance, and Avalanche's metrics receive the original ones. A label that the learner has not been
    trained on scores −∞.

    Args:
        learner: A registered name, a configuration entry (``{"name": "ranpac", "projection": 1000}``, or with
            ``"class"`` as in a YAML file), or a learner.
        backbone: A frozen backbone or its name; ignored if ``learner`` is a learner, which has its own.
        seed: Training seed; all randomness in an experience depends on (seed, number of the experience).
        device: Name of the device, as ``hardware.device``.
        eval_mb_size: Images per forward pass.
        plugins: Avalanche's plugins.
        evaluator: Avalanche's ``EvaluationPlugin``, or a function that makes one.
        eval_every: −1: evaluate only on request; 0: also before the first and after every experience.
        log: Function that is called with the name and value of everything the learner logs in training.

    Raises:
        CilError: The learner or a hyper-parameter is unknown, or the backbone does not fit.
    """
    if not isinstance(learner, Learner):
        frozen = load_backbone(backbone) if isinstance(backbone, str) else backbone
        with isolated(0):
            learner = registry.build_learner(learner if isinstance(learner, str) else dict(learner), frozen)
    return LearnerStrategy(
        learner=learner,
        seed=seed,
        device=device,
        eval_mb_size=eval_mb_size,
        plugins=plugins,
        evaluator=evaluator,
        eval_every=eval_every,
        log=log,
    )


class LearnerStrategy(SupervisedTemplate):
    """The strategy that :func:`as_strategy` returns.

    Attributes:
        learner: The learner.
        labels: Avalanche's label of each column of the learner's logits, in order of appearance.
    """

    def __init__(
        self,
        *,
        learner: Learner,
        seed: int,
        device: str,
        eval_mb_size: int,
        plugins: Sequence[Any] | None,
        evaluator: Any,
        eval_every: int,
        log: Callable[[str, float], None] | None,
    ) -> None:
        self.accelerator = hardware.accelerator(device)
        super().__init__(
            model=_Scores(learner),
            optimizer=None,
            eval_mb_size=eval_mb_size,
            device=self.accelerator.device,
            plugins=plugins,
            evaluator=evaluator,
            eval_every=eval_every,
        )
        learner.backbone.to(self.accelerator.device)
        self.learner, self.seed, self.labels = learner, seed, [] if learner.seen == 0 else list(range(learner.seen))
        self._log = log
        self._images = _ExperienceImages(learner.backbone.data_config["input_size"])

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Do nothing: the learner grows by itself, and builds its own optimiser if it needs one."""

    def model_adaptation(self, model: nn.Module | None = None) -> nn.Module:
        """Do nothing: evaluation must not change the learner."""
        return self.model

    def make_train_dataloader(self, **kwargs: Any) -> None:
        """Do nothing: the learner iterates over the data itself."""

    def _train_exp(self, experience: Any, eval_streams: Any = None, **kwargs: Any) -> None:
        learner, index = self.learner, self.learner.stages
        targets = _targets(self.adapted_dataset, index)
        shown = sorted(set(targets))
        self.labels += [label for label in shown if label not in self.labels]
        column = {label: i for i, label in enumerate(self.labels)}
        classes = tuple(sorted(column[label] for label in shown))
        if learner.needs_new_classes and classes[0] < learner.seen:
            raise StreamError(
                f"{learner.name or type(learner).__name__} is defined for tasks of new classes only; experience "
                f"{index} shows label {self.labels[classes[0]]} again"
            )
        added = self._images.add(self.adapted_dataset)
        data = TaskData(self._images, added, np.array([column[label] for label in targets]))
        seen = tuple(range(len(self.labels)))
        task = Task(index, classes, seen, tuple(map(str, self.labels)), data)
        # every task gets a new cache: old images must not be used again, and the set of images has grown
        cache = FeatureCache(self.accelerator, self.eval_mb_size)
        ctx = Context(self.accelerator, cache, seed=self.seed, stage=index, log=self._log)
        learner.begin(task, ctx)
        learner.to(self.accelerator.device)
        learner.train()
        learner.learn(task, ctx)
        learner.eval()
        if not learner.stores_images:
            task.close()

    def forward(self) -> Tensor:
        """Compute scores [B, 1 + largest label known or in the batch] by Avalanche's labels; −∞ for unknown labels."""
        width = 1 + max([*self.labels, *self.mb_y.tolist()])
        if not self.labels:  # before the first task the prediction is not a label, so that the accuracy is 0
            blank = torch.zeros(len(self.mb_x), width + 1, device=self.device)
            blank[:, width] = 1
            return blank
        ours = self.model(self.mb_x)
        scores = ours.new_full((len(ours), width), float("-inf"))
        scores[:, self.labels] = ours
        return scores


def _targets(dataset: Any, index: int) -> list[int]:
    """The labels of an experience's images.

    Raises:
        StreamError: There are none, or they are not whole numbers from 0, which are columns of the scores.
    """
    found = [target.tolist() if hasattr(target, "tolist") else target for target in getattr(dataset, "targets", ())]
    if not found:
        raise StreamError(f"experience {index} has no images, or its data set has no attribute targets")
    wrong = [target for target in found if type(target) is not int or target < 0]
    if wrong:
        raise StreamError(
            f"experience {index}: targets must be whole numbers from 0, one per image; "
            f"{len(wrong)} of {len(found)} are not, e.g. {wrong[0]!r}"
        )
    return found


class _Scores(nn.Module):
    """A learner as a module: images [B, 3, H, W] → logits [B, C] in the learner's columns."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, images: Tensor) -> Tensor:
        return self.learner.logits(self.learner.features(images).float()).float()


class _ExperienceImages(ImageSet):
    """The images of all experiences so far, under the transforms of their own data sets."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self._items: list[tuple[Any, Any, int]] = []  # (data set for testing, for training, position in it)

    def __len__(self) -> int:
        return len(self._items)

    def add(self, dataset: Any) -> np.ndarray:
        """Append a data set and return the positions of its images in this set."""
        start = len(self)
        plain, augmented = dataset.eval(), dataset.train()
        self._items += [(plain, augmented, i) for i in range(len(dataset))]
        self._checked(plain[0][0])
        return np.arange(start, len(self))

    def batches(
        self,
        indices: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        device: torch.device | str = "cpu",
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches as ``TaskData.batches`` does; ``augment`` uses the training transform, seeded per image."""
        if augment and generator is None:
            raise ValueError("augmented batches need a generator: they may not draw from the global random state")
        order, seeds = np.arange(len(indices)), None
        if generator is not None:
            order = torch.randperm(len(indices), generator=generator).numpy()
            # drawn from a copy of the generator, as it is unknown here whether the training transform is random
            copied = generator.clone_state()
            seeds = torch.randint(2**62, (len(indices),), generator=copied).tolist() if augment else None
        rank, processes = part
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size][rank::processes]
            pixels = [self._read(int(indices[p]), None if seeds is None else seeds[p]) for p in chunk]
            whole = torch.stack(pixels) if pixels else torch.empty(0, *self.shape)
            yield whole.to(device), torch.as_tensor(labels[chunk]).to(device)

    def _read(self, position: int, seed: int | None) -> Tensor:
        plain, augmented, i = self._items[position]
        with isolated(seed):
            return self._checked((plain if seed is None else augmented)[i][0])

    def _checked(self, image: Any) -> Tensor:
        if not isinstance(image, Tensor) or not image.is_floating_point() or tuple(image.shape) != self.shape:
            got = f"a {type(image).__name__}"
            if isinstance(image, Tensor):
                got = f"{image.dtype} {list(image.shape)}"
            raise StreamError(
                f"experience: an image is {got}; the backbone needs float {list(self.shape)}. Give the data set a "
                "transform to that, e.g. timm.data.create_transform(**backbone.data_config)"
            )
        return image
