"""Anchors, distillation and spectral shrinkage: closed forms, limits, invariances, and equal steps in any parts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from marks import slow_beyond
from torch import nn

from cil.config import LearnerEntry
from cil.errors import ConfigError
from cil.learners import registry
from cil.learners.bases.anchor import Anchor, Anchored, AnchoredSteps
from cil.learners.finetune import Finetune
from cil.learners.l2_sp import L2SP
from cil.learners.ssiat import SSIAT
from cil.runner.stages import learn_task
from cil.testing import Case, parametrize_learner
from cil.testing.setting import backbone, context, probe_images, stream
from cil.training import ParamGroup, Recipe, fit
from cil.training.batches import TensorData
from cil.training.distillation import (
    feature_distance,
    relation_distance,
    score_distance,
    spectral_shrinkage,
    token_distance,
)
from cil.tuning import Adapter, PooledPrompts, Tuner, VisualPrompts, WeightTuner
from cil.tuning.block_tokens import BlockTokens

SGD = {"optimizer": "sgd", "lr": 0.02, "warmup": 0, "epochs": 2, "train_batch_size": 8}
ADAMW = {"optimizer": "adamw", "lr": 1e-3, "epochs": 1}
SMALL = {"tuner": {"name": "adapter", "bottleneck": 8}, "first_epochs": 6, "epochs": 6, "samples": 16, "lr": 0.001}
MAPPED = {"anchor": "l2", "distill": {"what": "features", "map": "linear"}}
PREVIOUS = {"anchor": {"norm": "mars", "bound": 1, "to": "previous"}}


@pytest.mark.slow
@parametrize_learner(
    [
        ("finetune", {"anchor": "fisher", "distill": {"what": "relations"}, "bss": 1e-3, "co_tuning": 2.3}),
        ("ssiat", {**SMALL, **MAPPED, "first_epochs": 3, "epochs": 3, "alignment_epochs": 2}),
        ("slca", {**PREVIOUS, "distill": "blocks", "epochs": 2, "alignment_epochs": 1, "samples": 16}),
    ]
)
def test_common_checks(case, check):
    check(case)


HELD = [("logits", 20), ("features", 5), ("blocks", 1500)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the anchor on least squares


def solved(anchor: Anchor, importance: torch.Tensor | None = None, **recipe) -> tuple[torch.Tensor, ...]:
    """θ after gradient descent on ½ ‖Xθ − t‖² / N from θ = 0, and H = XᵀX/N, Xᵀt/N and θ_0."""
    x, t, start = draw(40, 5, seed=1), draw(40, seed=2), draw(5, seed=3)
    recipe = Recipe(train_batch_size=40, schedule="constant", **{"epochs": 150, "lr": 0.3, "momentum": 0, **recipe})
    theta = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    steps = AnchoredSteps(anchor, [Anchored(theta, start, importance, 1.0)], [], recipe, per_epoch=1)

    def loss(inputs, labels):
        value, penalty = (inputs @ theta - t[labels]).square().sum() / 80, steps.penalty()
        return value if penalty is None else value + penalty, inputs

    fit(loss, [ParamGroup([theta])], TensorData(x, torch.arange(40)), recipe, context(), steps.after_step)
    return theta.detach(), x.T @ x / 40, x.T @ t / 40, start


@pytest.mark.parametrize("norm", slow_beyond(["fisher"], ["l2", "fisher"]))
def test_squared_anchors_reach_their_closed_form(norm):
    f = draw(5, seed=4).abs() if norm == "fisher" else torch.ones(5, dtype=torch.float64)
    theta, h, b, start = solved(Anchor(norm=norm, alpha=0.7), f if norm == "fisher" else None)
    expected = torch.linalg.solve(h + 0.7 * torch.diag(f), b + 0.7 * f * start)
    torch.testing.assert_close(theta, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("momentum", slow_beyond([0], [0, 0.8]))
def test_l1_satisfies_its_optimality_conditions(momentum):
    theta, h, b, start = solved(Anchor(norm="l1", alpha=0.8), momentum=momentum, lr=0.1, epochs=250)
    gradient, moved = h @ theta - b, theta != start
    assert 0 < int(moved.sum()) < 5
    torch.testing.assert_close(gradient[moved], -0.8 * (theta - start)[moved].sign(), atol=1e-10, rtol=0)
    assert bool((gradient[~moved].abs() <= 0.8).all())


def test_mars_is_a_projection_of_every_matrix():
    recipe, start = Recipe(lr=0.1), draw(2, 3, 4)
    for shape, rows in (((3, 4), lambda d: d), ((5, 2, 2, 2), lambda d: d.reshape(5, 8)), ((6,), lambda d: d[:, None])):
        start = draw(*shape)
        weight = nn.Parameter(start + draw(*shape, seed=1))
        before = weight.detach().clone()
        AnchoredSteps(Anchor(norm="mars", bound=0.5), [Anchored(weight, start, None, 1.0)], [], recipe, 1).after_step()
        norm = np.linalg.norm(rows((before - start).numpy()), ord=np.inf)
        assert norm > 0.5
        torch.testing.assert_close(weight.detach(), start + (before - start) * (0.5 / norm))
        again = weight.detach().clone()
        AnchoredSteps(Anchor(norm="mars", bound=2), [Anchored(weight, start, None, 1.0)], [], recipe, 1).after_step()
        assert torch.equal(weight, again)  # inside of the bound nothing moves


def test_under_adamw_the_pull_is_decoupled_and_stops_at_the_start():
    start, importance = draw(4), torch.tensor([1.0, 2.0, 0.0, 1e9], dtype=torch.float64)
    weight, row = nn.Parameter(draw(4, seed=1)), nn.Parameter(torch.ones(2))
    before = weight.detach().clone()
    recipe = Recipe(optimizer="adamw", lr=0.1, schedule="constant")
    steps = AnchoredSteps(
        Anchor(norm="fisher", alpha=0.5, beta=0.2), [Anchored(weight, start, importance, 2.0)], [(row, 1.0)], recipe, 1
    )
    assert steps.penalty() is None
    steps.after_step()
    kept = torch.tensor([1 - 0.1 * 2 * 0.5, 1 - 0.1 * 2 * 0.5 * 2, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(weight.detach(), start + kept * (before - start))
    torch.testing.assert_close(row.detach(), torch.full((2,), 0.98))


# --- the anchor of a learner


def trained(parameters: dict, cls=Finetune, stages: int = 2, change=None, seen=None):
    """A learner after two tasks of the checks' stream; ``seen`` is called with it after each."""
    learner = Case(cls, {**SGD, **parameters}).learner(backbone())
    if change is not None:
        change(learner)
    for task in stream(learner.backbone).tasks[:stages]:
        learn_task(learner, task, context(task.index))
        if seen is not None:
            seen(learner)
    return learner


def same(one, two) -> bool:
    """Whether two learners have equal parameters, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("norm", slow_beyond(["l1"], ["l2", "l1"]))
def test_without_weight_an_anchor_is_plain(norm):
    free = trained({"anchor": {"norm": norm, "alpha": 0, "beta": 0}, "epochs": 1}, stages=1)
    assert same(free, trained({"epochs": 1}, stages=1))


@pytest.mark.parametrize("optimizer", slow_beyond(["sgd"], ["sgd", "adam"]))
def test_l2_sp_is_a_preset(optimizer):
    common, weights = {"optimizer": optimizer, "epochs": 1}, {"alpha": 0.3, "beta": 0.2}
    theirs = trained({**weights, **common}, L2SP, stages=1)
    assert same(trained({"anchor": {"norm": "l2", **weights}, **common}, stages=1), theirs)
    assert not same(trained({"anchor": {"norm": "l2", "alpha": 0.3, "beta": 0}, **common}, stages=1), theirs)


@pytest.mark.parametrize(
    ("norm", "more"),
    slow_beyond([("l2", ADAMW)], [("l2", ADAMW), ("l1", {"epochs": 1})]),
    ids=["l2", "l1"],
)
def test_an_infinite_weight_is_the_linear_probe(norm, more):
    def freeze(learner):
        learner.tuner = WeightTuner(learner.backbone, lambda name: False)

    held = trained({"anchor": {"norm": norm, "alpha": 1e9, "beta": 0}, **more})
    probe = trained(more, change=freeze)
    originals = dict(held.backbone.model.named_parameters())
    assert all(torch.equal(w, originals[name]) for name, w in held.tuner.weights().items())
    torch.testing.assert_close(held.head.weight, probe.head.weight, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_the_anchor_of_an_adapter_is_its_own_start_or_the_previous_task():
    pulled = {"norm": "l2", "alpha": 1e9, "beta": 0}
    common = {**SMALL, "optimizer": "adamw", "alignment_epochs": 0, "train_batch_size": 8}
    first, both = trained({**common, "anchor": pulled}, SSIAT, 1), trained({**common, "anchor": pulled}, SSIAT)
    starts = [b for name, b in both.anchoring.named_buffers() if name.startswith("start_")]
    assert all(torch.equal(p, q) for p, q in zip(both.tuner.parameters(), starts, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(both.tuner.parameters(), first.tuner.parameters(), strict=True))
    previous = {**common, "anchor": {**pulled, "to": "previous"}}
    one, two = trained(previous, SSIAT, 1), trained(previous, SSIAT, 2)
    assert not [*two.anchoring.named_buffers()]
    assert all(torch.equal(p, q) for p, q in zip(one.tuner.parameters(), two.tuner.parameters(), strict=True))


def test_l1_logs_the_share_of_weights_that_stay():
    logged, learner = {}, Case(Finetune, {**SGD, "anchor": {"norm": "l1", "alpha": 1e-3}}).learner()
    task, ctx = stream(learner.backbone).tasks[0], context()
    ctx._log = logged.__setitem__
    learner.begin(task, ctx)
    learner.learn(task, ctx)
    same = [w == v for w, v in zip(learner.tuner.parameters(), learner.backbone.model.parameters(), strict=True)]
    share = sum(int(part.sum()) for part in same) / sum(part.numel() for part in same)
    assert logged["unmoved_share"] == pytest.approx(share) and 0.05 < share < 0.95


# --- distances to a teacher


def rkd(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Relative distances and cosines of angles, image by image."""
    n = len(x)
    d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
    cosines = np.zeros((n, n, n))
    for j, i, k in np.ndindex(n, n, n):
        if i != j != k:
            cosines[j, i, k] = (x[i] - x[j]) @ (x[k] - x[j]) / (d[i, j] * d[k, j])
    return d / d[d > 0].mean(), cosines


def test_relations_are_rkds_and_do_not_notice_scale_rotation_and_shift():
    f, t = draw(6, 4), 3 * draw(6, 7, seed=1)

    def huber(a, b):
        gap = np.abs(a - b)
        return np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()

    (d, c), (e, g) = rkd(f.numpy()), rkd(t.numpy())
    value = float(relation_distance(f, t))
    assert value == pytest.approx(huber(d, e) + 2 * huber(c, g), rel=1e-12)
    turn = torch.linalg.qr(draw(7, 7, seed=2))[0]
    assert float(relation_distance(f, 5 * t @ turn + draw(7, seed=3))) == pytest.approx(value, rel=1e-12)
    assert float(relation_distance(t @ turn, t)) == pytest.approx(0, abs=1e-12)
    twice = torch.cat([f, f[:1]]).requires_grad_()  # two images with equal features
    relation_distance(twice, torch.cat([t, t[:1] + 1])).backward()
    assert bool(twice.grad.isfinite().all()) and float(twice.grad.abs().max()) < 100
    assert float(relation_distance(f[:1], t[:1])) == 0


@pytest.mark.parametrize(
    "distance",
    [score_distance, feature_distance, relation_distance, lambda f, t: token_distance([f[:, None]], [t[:, None]])],
    ids=["scores", "features", "relations", "tokens"],
)
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(distance):
    student = draw(5, 6).requires_grad_()
    value = distance(student, student.detach().clone())
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(student.grad, torch.zeros_like(student.grad), atol=1e-12, rtol=0)


def test_score_distance_by_numpy_and_its_limit():
    z, t = draw(5, 6), draw(5, 6, seed=1)
    p, q = (np.exp(a / 3) / np.exp(a / 3).sum(1, keepdims=True) for a in (t.numpy(), z.numpy()))
    assert float(score_distance(z, t, 3.0)) == pytest.approx(9 * (p * np.log(p / q)).sum(1).mean(), rel=1e-10)
    assert float(score_distance(z, t, 1e4)) == pytest.approx(float(score_distance(z, t, None)), rel=1e-3)
    moved = (z - t) - (z - t).mean(1, keepdim=True)
    assert float(score_distance(z, t, None)) == pytest.approx(float(moved.square().sum(1).mean() / 12))


def test_tokens_and_spectrum_by_hand():
    a, b = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    assert float(token_distance([a, b], [b, b])) == pytest.approx(float((a - b).square().sum() / (2 * 2 * 3 * 4)))
    x = draw(6, 9)
    squares = np.linalg.svd(x.numpy(), compute_uv=False)[::-1] ** 2
    assert float(spectral_shrinkage(x)) == pytest.approx(squares[0])
    assert float(spectral_shrinkage(x, 2)) == pytest.approx(squares[:2].sum())


@pytest.mark.parametrize("kind", ["none", "full", "adapter", "shallow", "deep", "front"])
def test_kept_tokens_are_the_outputs_of_the_blocks(kind):
    vit, images = backbone(), probe_images()[:3]
    tuner: Tuner | None = {
        "none": lambda: None,
        "full": lambda: WeightTuner(vit),
        "adapter": lambda: Adapter(vit, 4),
        "shallow": lambda: VisualPrompts(vit, 2, deep=False),
        "deep": lambda: VisualPrompts(vit, 2),
        "front": lambda: PooledPrompts(vit, torch.zeros(3, 2, 48)),
    }[kind]()
    for p in [] if tuner is None else tuner.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    keeper = BlockTokens(tuner, vit)
    outputs: list[torch.Tensor] = []
    hooks = [block.mlp.register_forward_hook(lambda _, args, out: outputs.append(out)) for block in vit.model.blocks]
    try:
        with torch.no_grad():
            plain = vit(images, None if tuner is None else tuner.eval())
            assert torch.equal(vit(images, keeper.eval()), plain)
    finally:
        for hook in hooks:
            hook.remove()
    assert [tokens.shape for tokens in keeper.tokens] == [(3, 17, 48)] * 3
    if kind in ("none", "full"):
        model = vit.model if tuner is None else copy.deepcopy(vit.model)
        if tuner is not None:
            model.load_state_dict(dict(tuner.weights()))
        with torch.no_grad():
            expected = model.forward_intermediates(
                images, norm=False, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
            )
        for tokens, (patches, prefix) in zip(keeper.tokens, expected, strict=True):
            assert torch.equal(tokens, torch.cat([prefix, patches], dim=1))


# --- the terms of a learner


def teachers_distance(what: str, more: dict) -> float:
    """How far a learner's second task takes it from its first, by the distance that ``what`` names."""
    images, found = probe_images(), []

    def keep(learner):
        keeper = BlockTokens(learner.tuner, learner.backbone)
        with torch.no_grad():
            features = learner.backbone(images, keeper)
            found.append((features, keeper.tokens, learner.head(features)[:, :4]))

    trained({"lr": 1e-3, **more}, seen=keep)
    (f, z, s), (g, y, t) = found
    return float(
        {"logits": lambda: score_distance(t, s), "blocks": lambda: token_distance(y, z)}.get(
            what, lambda: feature_distance(g, f)
        )()
    )


@pytest.mark.parametrize(("what", "weight"), slow_beyond(HELD[1:2], HELD))
def test_a_term_holds_what_it_names(what, weight):
    free, held = (teachers_distance(what, more) for more in ({}, {"distill": {"what": what, "weight": weight}}))
    assert held < 0.6 * free


@pytest.mark.slow
@pytest.mark.parametrize("what", ["logits", "features", "blocks"])
def test_micro_batches_take_the_same_steps(what):
    parameters = {"distill": what, "anchor": {"norm": "l1", "alpha": 1e-3}, "lr": 1e-3}
    whole, parts = (trained({**parameters, **more}) for more in ({}, {"micro_batch_size": 3}))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_linear_map_lets_features_turn():
    """The distance to the teacher is that after the best affine map of the student's features on clean images."""
    from cil.classifiers.drift import ridge_map
    from cil.learners.bases.distilling import Distill, Distillation

    vit = backbone()
    task, ctx, student = stream(vit).tasks[0], context(), WeightTuner(vit)
    for p in student.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    distill = Distill(what="features", teacher="pretrained", map="linear", weight=2.0)
    term = Distillation(distill, vit, student, nn.Identity(), 0, task, ctx)
    term.begin_epoch()
    images = next(task.train.batches(99))[0]
    with torch.no_grad():
        features, target = vit(images, student), vit(images)
        expected = 2 * (ridge_map(features, target)(features) - target).square().mean()
        assert float(term.term(images, features)) == pytest.approx(float(expected), rel=1e-5)
        assert float(expected) < 0.5 * float(2 * (features - target).square().mean())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"anchor": {"norm": "l1"}}, "anchor: l1 takes proximal steps at the rate of SGD, and optimizer is adamw"),
        ({"anchor": "mars"}, "anchor: norm: mars takes bound and no alpha"),
        ({"anchor": {"norm": "l2", "bound": 1}}, "anchor: norm: l2 takes alpha and no bound"),
        ({"anchor": {"norm": "fisher", "to": "previous"}}, "is online EWC, which is learner avalanche"),
        ({"anchor": "l3"}, "anchor.norm: should be 'l2', 'l1', 'fisher' or 'mars', got 'l3'"),
        ({"distill": {"what": "logits", "map": "linear"}}, "map: linear is a map of features"),
        ({"distill": {"what": "logits", "teacher": "pretrained"}}, "the frozen backbone has not"),
        (
            {"distill": "relations", "micro_batch_size": 2},
            "2; distill compares.*set distill: null",
        ),
        ({"bss": 1, "micro_batch_size": 2}, "micro_batch_size: 2; bss compares"),
        ({"name": "l2_sp", "anchor": "l2"}, "alpha and beta are the anchor of l2_sp"),
        ({"name": "rsiat", "distill": "features"}, "distill: rsiat has its own terms"),
        ({"name": "cds", "bss": 1}, "bss: cds has its own term"),
        ({"name": "joint", "anchor": "l2"}, "anchor: joint starts from the pre-trained weights"),
    ],
)
def test_wrong_configurations_are_named_in_one_line(entry, message):
    with pytest.raises(ConfigError, match=message) as caught:
        registry.configure(LearnerEntry.model_validate({"name": "finetune", **entry}))
    assert "\n" not in str(caught.value)


def test_spectral_shrinkage_refuses_more_images_than_features():
    learner = Case(Finetune, {"bss": 1e-3, "train_batch_size": 64}).learner()
    learner.backbone.feature_dim = 20
    task, ctx = stream(learner.backbone).tasks[0], context()
    learner.begin(task, ctx)
    with pytest.raises(ConfigError, match=r"train_batch_size: 64; bss needs steps of at most 20 images"):
        learner.learn(task, ctx)
