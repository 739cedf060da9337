"""The fit loop: exactly the given parameters, the schedule's closed form, a loss that is not finite."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from cil.backbone import Backbone
from cil.backbone.kept_tokens import KeptTokens
from cil.config import Augmentation, TransformConfig
from cil.data.images import ImageSet
from cil.data.sources import from_arrays
from cil.data.transforms import Transforms
from cil.errors import ConfigError, TrainingError
from cil.learner import Learner, LearnerConfig
from cil.learners.registry import build_learner
from cil.runner import run_stages
from cil.stream import Stream
from cil.stream.protocol import ClassIncremental
from cil.testing.setting import NAMES, SIZES, backbone, context, draw_images, stream
from cil.training import ParamGroup, Recipe, cosface, fit, rate_factor
from cil.training.batches import TensorData, WithRows
from cil.utils.hardware import accelerator


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 5, generator=g)
    return x, (x[:, 0] > 0).long()


def make(weight):
    def loss(inputs, labels):
        logits = inputs @ weight.T
        return nn.functional.cross_entropy(logits, labels), logits

    return loss


def test_only_the_given_parameters_change_and_nothing_is_left_behind(problem):
    weight, other = nn.Parameter(torch.zeros(2, 5)), nn.Parameter(torch.ones(3))
    fit(make(weight), [ParamGroup([weight])], TensorData(*problem), Recipe(epochs=3, lr=0.5), context())
    assert not torch.equal(weight, torch.zeros(2, 5)) and torch.equal(other, torch.ones(3))
    assert weight.grad is None and not weight.requires_grad
    logits = problem[0] @ weight.T
    assert (logits.argmax(1) == problem[1]).float().mean() > 0.9


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_equals_a_plain_torch_loop(problem, optimizer):
    recipe = Recipe(
        epochs=2, train_batch_size=64, lr=0.1, optimizer=optimizer, weight_decay=0.01, clip=0.5, schedule="constant"
    )
    ours, theirs = nn.Parameter(torch.zeros(2, 5)), nn.Parameter(torch.zeros(2, 5))
    fit(make(ours), [ParamGroup([ours])], TensorData(*problem), recipe, context())
    kinds = {
        "sgd": lambda: torch.optim.SGD([theirs], 0.1, momentum=0.9, weight_decay=0.01),
        "adam": lambda: torch.optim.Adam([theirs], 0.1, weight_decay=0.01),
        "adamw": lambda: torch.optim.AdamW([theirs], 0.1, weight_decay=0.01),
    }
    plain = kinds[optimizer]()
    for _ in range(2):
        plain.zero_grad()
        make(theirs)(*problem)[0].backward()
        nn.utils.clip_grad_norm_([theirs], 0.5)
        plain.step()
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=1e-5)


def test_schedule_by_its_formula():
    factor = rate_factor(Recipe(warmup=0.2, epochs=5), 10)
    assert factor(0) == pytest.approx(0.1) and factor(9) == pytest.approx(1.0)
    assert factor(30) == pytest.approx(0.5 * (1 + math.cos(math.pi * 20 / 40)))
    assert factor(50) == pytest.approx(0.0)
    assert rate_factor(Recipe(schedule="constant"), 10)(49) == 1.0


@pytest.mark.parametrize(
    ("recipe", "torchs"),
    [
        (
            Recipe(epochs=6, schedule_per="epoch"),
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
        ),
        (
            Recipe(epochs=6, schedule="multistep", milestones=[2, 5]),
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5], 0.1),
        ),
    ],
    ids=["cosine", "multistep"],
)
def test_epochwise_schedules_are_torchs(recipe, torchs):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    reference, factor, per_epoch = torchs(optimizer), rate_factor(recipe, 4), 4
    for epoch in range(6):
        rates = {round(factor(epoch * per_epoch + step), 9) for step in range(per_epoch)}
        assert rates == {round(reference.get_last_lr()[0], 9)}
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("epochs", [1, 20])
def test_quarter_cosine_is_coda_prompts(epochs):
    """The authors' cos(99 π e / (200 (E − 1))) for epoch e of E, which they do not define for a single epoch."""
    factor = rate_factor(Recipe(epochs=epochs, schedule="quarter_cosine", schedule_per="epoch"), 4)
    for epoch in range(epochs):
        expected = math.cos(99 * math.pi * epoch / (200 * max(1, epochs - 1)))
        assert [factor(4 * epoch + step) for step in range(4)] == pytest.approx([expected] * 4)
    assert 0 < factor(4 * epochs) <= 1  # what is logged after the last step
    by_step = rate_factor(Recipe(epochs=2, schedule="quarter_cosine"), 50)
    assert by_step(99) == pytest.approx(math.cos(0.99 * math.pi / 2)) and by_step(1) < by_step(0) == 1


def test_multistep_needs_milestones_and_only_it():
    for wrong in ({"schedule": "multistep"}, {"milestones": [3]}):
        with pytest.raises(ValueError, match="go together"):
            Recipe(**wrong)


@pytest.mark.parametrize("micro", [1, 5, 64, 1000])
def test_micro_batches_take_the_same_steps(problem, micro):
    whole, parts = nn.Parameter(torch.zeros(2, 5)), nn.Parameter(torch.zeros(2, 5))
    seen = []

    def watched(inputs, labels):
        seen.append(len(labels))
        return make(parts)(inputs, labels)

    recipe = {"epochs": 2, "train_batch_size": 24, "lr": 0.5}  # 64 = 24 + 24 + 16
    fit(make(whole), [ParamGroup([whole])], TensorData(*problem), Recipe(**recipe), context())
    fit(watched, [ParamGroup([parts])], TensorData(*problem), Recipe(**recipe, micro_batch_size=micro), context())
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)
    assert max(seen) <= micro and sum(seen) == 128


def test_a_loss_that_compares_images_refuses_micro_batches(problem):
    """Before any step: what it learns must not depend on how much is in memory at once."""
    weight = nn.Parameter(torch.zeros(2, 5))
    with pytest.raises(ConfigError, match=r"micro_batch_size is 8.*train_batch_size"):
        fit(
            make(weight),
            [ParamGroup([weight])],
            TensorData(*problem),
            Recipe(micro_batch_size=8),
            context(),
            batch_loss=True,
        )
    assert not weight.any()


def test_groups_have_rates_of_their_own(problem):
    """Plain SGD: an update is the gradient times the group's rate."""
    recipe = Recipe(epochs=1, train_batch_size=64, lr=0.1, momentum=0, schedule="constant")
    fast, slow = nn.Parameter(torch.zeros(2, 5)), nn.Parameter(torch.zeros(2, 5))
    fit(make(fast), [ParamGroup([fast])], TensorData(*problem), recipe, context())
    fit(make(slow), [ParamGroup([slow], lr_factor=0.01)], TensorData(*problem), recipe, context())
    torch.testing.assert_close(slow * 100, fast.detach())


def test_a_group_that_starts_later_is_frozen_until_then(problem):
    """Adam, which moves whatever has a gradient: two epochs of head alone, then exactly a fresh start of the other."""
    inputs, labels = problem
    head, late = nn.Parameter(torch.zeros(2, 5)), nn.Parameter(torch.ones(5))
    seen = []

    def loss(x, y):
        seen.append((late.requires_grad, late.detach().clone()))
        logits = (x * late) @ head.T
        return nn.functional.cross_entropy(logits, y), logits

    recipe = Recipe(epochs=3, train_batch_size=64, lr=0.1, optimizer="adam", schedule="constant")
    fit(loss, [ParamGroup([head]), ParamGroup([late], start=2)], TensorData(inputs, labels), recipe, context())
    assert [grad for grad, _ in seen] == [False, False, True]
    assert all(torch.equal(value, torch.ones(5)) for _, value in seen)
    torch.testing.assert_close((late - 1).abs(), torch.full((5,), 0.1), rtol=1e-4, atol=0)  # Adam's first step is lr
    assert not late.requires_grad and late.grad is None


def test_after_step_comes_after_every_step(problem):
    weight, after = nn.Parameter(torch.zeros(2, 5)), []
    recipe = Recipe(epochs=2, train_batch_size=24)  # 64 = 24 + 24 + 16
    data = TensorData(*problem)
    fit(
        make(weight),
        [ParamGroup([weight])],
        data,
        recipe,
        context(),
        after_step=lambda: after.append(weight.detach().clone()),
    )
    assert len(after) == 6 and torch.equal(after[-1], weight)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise([torch.zeros(2, 5), *after]))


def test_rows_follow_their_images():
    """Shuffled, augmented, in any share of a batch: the row beside an image is its own."""
    task = stream(backbone()).tasks[0]
    clean, _ = next(task.train.batches(100))
    labels = torch.from_numpy(task.train.labels)
    rows = torch.stack([clean.mean(dim=(1, 2, 3)), labels.float()], dim=1)
    data = WithRows(task.train, rows)
    for part in ((0, 1), (1, 2)):
        plain, ours = (
            list(d.batches(7, generator=torch.Generator().manual_seed(3), augment=True, device="cpu", part=part))
            for d in (task.train, data)
        )
        for (images, expected), (same, beside, found) in zip(plain, ours, strict=True):
            assert torch.equal(images, same) and torch.equal(expected, found)
            assert torch.equal(beside[:, 1].long(), found)
    for images, beside, _ in data.batches(7, generator=torch.Generator().manual_seed(3)):
        torch.testing.assert_close(images.mean(dim=(1, 2, 3)), beside[:, 0])


def test_dropout_is_seeded_by_the_stage_and_leaves_the_global_state_alone(problem):
    def trained(seed):
        weight = nn.Parameter(torch.zeros(2, 5))

        def loss(inputs, labels):
            logits = nn.functional.dropout(inputs, 0.5) @ weight.T
            return nn.functional.cross_entropy(logits, labels), logits

        fit(loss, [ParamGroup([weight])], TensorData(*problem), Recipe(epochs=1), context(seed=seed))
        return weight.detach()

    torch.rand(3)  # where the global state stands must not matter
    before = torch.get_rng_state()
    one = trained(0)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert torch.equal(one, trained(0)) and not torch.equal(one, trained(1))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_parts_are_the_whole_batch_whatever_their_number(problem, processes):
    """TensorData here; images are tested in test_data.py, whole runs on two processes in test_processes.py."""
    data = TensorData(torch.arange(10.0)[:, None], torch.arange(10))
    passes = [
        list(
            data.batches(4, generator=torch.Generator().manual_seed(5), augment=True, device="cpu", part=(r, processes))
        )
        for r in range(processes)
    ]
    assert [len(p) for p in passes] == [3] * processes
    whole = list(data.batches(4, generator=torch.Generator().manual_seed(5), augment=True, device="cpu"))
    for step, (_, labels) in enumerate(whole):
        shares = torch.cat([p[step][1] for p in passes])
        assert sorted(shares.tolist()) == sorted(labels.tolist())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops(problem, bad):
    weight = nn.Parameter(torch.zeros(2, 5))

    def loss(inputs, labels):
        logits = inputs @ weight.T
        return logits.sum() * 0 + bad, logits

    with pytest.raises(
        TrainingError, match=r"stage 3, epoch 0: the training loss is (nan|inf); lower the learner's lr \(0\.01\)"
    ):
        fit(loss, [ParamGroup([weight])], TensorData(*problem), Recipe(), context(stage=3))
    assert torch.isfinite(weight).all()


class OneTensor(Learner):
    """A learner that trains one tensor, by ``fit`` or by a loop of its own."""

    name = "one_tensor"

    def __init__(self, config, backbone, spoil=None):
        super().__init__(config, backbone)
        self.scale, self.spoil = nn.Parameter(torch.zeros(2, 5)), spoil

    def learn(self, task, ctx):
        with torch.no_grad():
            self.scale[1, 2] = self.spoil

    def logits(self, features):
        return features[:, :1].repeat(1, self.seen)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_parameters_that_the_last_step_spoils_end_the_stage(problem, clip):
    """No loss is computed with them, so none shows it."""
    lr = 3e38
    ctx = context(stage=2)
    learner = OneTensor(Recipe(lr=lr), backbone())
    learner.begin(stream(backbone()).tasks[0], ctx)
    x, y = problem[0] * 1e3, problem[1]
    recipe = Recipe(epochs=1, train_batch_size=64, lr=lr, clip=clip, weight_decay=1e3)
    with torch.no_grad():
        learner.scale.fill_(1.0)
    with pytest.raises(TrainingError) as caught:
        fit(make(learner.scale), [ParamGroup([learner.scale])], TensorData(x, y), recipe, ctx)
    message = str(caught.value)
    assert message.startswith("stage 2: one_tensor: scale [2, 5] has NaN or infinite entries after training")
    assert "lr (3e+38)" in message and "clip" in message and "\n" not in message
    assert not learner.scale.requires_grad and learner.scale.grad is None


def test_a_temporary_tensor_is_checked_too(problem):
    weight = nn.Parameter(torch.ones(2, 5))
    recipe = Recipe(epochs=1, train_batch_size=64, lr=3e38, weight_decay=1e3)
    with pytest.raises(TrainingError, match=r"stage 0: a temporary tensor \[2, 5\].*alignment_lr"):
        fit(make(weight), [ParamGroup([weight])], TensorData(*problem), recipe, context(), prefix="alignment_")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_learner_with_its_own_loop_is_checked_by_the_runner(value):
    learner = OneTensor(LearnerConfig(), backbone(), spoil=value)
    with pytest.raises(TrainingError, match=r"^stage 0: one_tensor: scale \[2, 5\] has NaN or infinite entries"):
        run_stages(learner, stream(backbone()), accelerator=accelerator("cpu"))
    fine = OneTensor(LearnerConfig(), backbone(), spoil=1.0)
    assert len(run_stages(fine, stream(backbone()), accelerator=accelerator("cpu"), stop_after=1)) == 1


def test_what_is_logged(problem):
    logged = []
    ctx = context(log=lambda name, value: logged.append((name, value)))
    weight = nn.Parameter(torch.zeros(2, 5))
    fit(make(weight), [ParamGroup([weight])], TensorData(*problem), Recipe(epochs=2), ctx)
    names = [name for name, _ in logged]
    assert names == ["loss", "accuracy", "learning_rate", "images_per_second"] * 2
    assert ctx.trainable_parameters == 10
    losses = [v for n, v in logged if n == "loss"]
    assert losses[0] <= math.log(2) + 1e-6 and losses[1] < losses[0]


def test_cosface_by_hand():
    cosines = torch.tensor([[0.9, 0.5, -0.2, 0.1], [0.3, 0.2, 0.6, 0.4]])
    labels = torch.tensor([3, 2])
    value, logits = cosface(lambda x: x, Recipe(), first=1, scale=10.0, margin=0.25)(cosines, labels)
    rows = [[5.0, -2.0, 1.0 - 2.5], [2.0, 6.0 - 2.5, 4.0]]  # classes 1, 2, 3; the true one 0.25 lower
    expected = [math.log(sum(map(math.exp, row))) - row[y - 1] for row, y in zip(rows, [3, 2], strict=True)]
    assert value.item() == pytest.approx(sum(expected) / 2) and torch.equal(logits, 10 * cosines)


# --- tokens that are the same in every epoch --------------------------------------------------------------------------


def first_session(tuner, augment="none", **recipe):
    """The state of ``aper`` after one task of 48 images, and the images that the backbone embedded meanwhile."""
    vit, embedded = backbone(), []
    transforms = Transforms(vit.data_config, TransformConfig(augment=augment))
    train, test = (ImageSet(from_arrays(*draw_images(split), NAMES), transforms) for split in ("train", "test"))
    task = Stream(train, test, ClassIncremental("natural", sizes=SIZES)).tasks[0]
    learner = build_learner({"name": "aper", "tuner": tuner, "epochs": 3, "train_batch_size": 10, **recipe}, vit)
    ctx = context()
    hook = vit.model.patch_embed.register_forward_hook(lambda module, given, out: embedded.append(len(given[0])))
    learner.begin(task, ctx)
    learner.learn(task, ctx)
    hook.remove()
    return learner.state_dict(), sum(embedded)


LATE = {"name": "adapter", "blocks": [2]}
SPARED = {
    "adapter": (LATE, {}, 2 * 48 - (10 + 8) - 3 * 5),  # two epochs, less what is compared, and one image per step
    "micro-batches": (LATE, {"micro_batch_size": 6}, 2 * 48 - (6 + 4 + 2) - 3 * 10),
    "partial": ("partial", {}, 2 * 48 - (10 + 8) - 3 * 5),
    "one epoch": (LATE, {"epochs": 1}, 0),
    "augmented": (LATE, {"augment": Augmentation(flip=0.5)}, 0),
    "adapter in the first block": ({"name": "adapter", "blocks": [0, 2]}, {}, 0),
    "full": ("full", {}, 0),
    "prompts": ({"name": "vpt_deep", "length": 2}, {}, 0),
}


@pytest.mark.parametrize("case", SPARED)
def test_tokens_below_the_first_tuned_block_are_computed_once_and_change_nothing(case, monkeypatch):
    tuner, settings, spared = SPARED[case]
    state, embedded = first_session(tuner, **settings)
    monkeypatch.setattr(Backbone, "keeping_tokens", lambda self, most_bytes: nullcontext())
    usual, all_embedded = first_session(tuner, **settings)
    assert state.keys() == usual.keys() and all(torch.equal(state[name], usual[name]) for name in usual)
    assert all_embedded - embedded == spared


def test_kept_tokens_that_other_batches_would_round_otherwise_are_not_used():
    images, calls = torch.arange(12.0).view(4, 3, 1, 1), []

    def compute(some, error=0.0):
        calls.append(len(some))
        return some.flatten(1)[:, None] + error

    kept, small = KeptTokens(1e6), KeptTokens(3 * 4 * 3)  # the second has room for three images
    for one in (kept, small):
        for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 0, 3, 1]):
            assert torch.equal(one.before(1, images[order], compute), compute(images[order]))
    assert len(calls) == (2 + 3) + (3 + 3)  # of the first, the third is kept
    kept.before(2, images, lambda some: compute(some))
    assert torch.equal(kept.before(2, images, lambda some: compute(some, 1e-6)), compute(images, 1e-6))
    assert torch.equal(kept.before(1, images, lambda some: compute(some, 2.0)), compute(images, 2.0))  # nothing is left
