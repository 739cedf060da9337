"""LAE: how its two branches learn, accumulate and decide, each against its formula."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cil.errors import BackboneError
from cil.learners import lae
from cil.learners.lae import LAE
from cil.runner import run_stages
from cil.stream import Task
from cil.testing import Case, parametrize_learner
from cil.testing.setting import SIZES, backbone, context, probe_images, stream
from cil.tuning import build_tuner
from cil.utils.randomness import isolated

ADAPTER = {
    "name": "adapter",
    "form": "attention",
    "bottleneck": 5,
    "activation": "gelu",
    "scale": 1.0,
    "learned_scale": True,
    "dropout": 0.0,
    "blocks": [0, 1],
}
LORA = {"name": "lora_kv", "rank": 5, "blocks": [0, 1]}
PREFIX = {"name": "prefix", "init": "uniform", "learned_scale": True, "compensate": True, "blocks": [0, 1]}
QUICK = {"tuner": ADAPTER, "lr": 0.01, "epochs": 4, "frozen_epochs": 2, "decay": 0.9}


LEARNS = {**QUICK, "epochs": 8}


@parametrize_learner(
    [
        ("lae", {**LEARNS, "tuner": {**ADAPTER, "dropout": 0.2}}),
    ]
)
def test_common_checks(case, check):
    check(case)


@pytest.mark.slow
@parametrize_learner(
    [
        ("lae", {**LEARNS, "tuner": LORA}),
        ("lae", {**LEARNS, "tuner": PREFIX, "predict": "offline"}),
        ("lae", {**LEARNS, "tuner": {"name": "lora", "rank": 2}, "predict": "online"}),
    ]
)
def test_common_checks_of_variants(case, check):
    check(case)


# --- learning and accumulation


def vector(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


def follow(**parameters):
    """A run; for every stage the (online, offline, head) vectors at its start and after each of its steps."""
    stages: list[list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]] = []

    def snapshot(learner):
        offline = None if learner.offline is None else vector(learner.offline)
        stages[-1].append((vector(learner.online), offline, vector(learner.head)))

    class Followed(LAE):
        def learn(self, task, ctx):
            stages.append([])
            snapshot(self)
            super().learn(task, ctx)

        def accumulate(self):
            super().accumulate()
            snapshot(self)

    learner = Case(Followed, {**QUICK, **parameters}).run().learner
    return learner, stages


@pytest.mark.parametrize("tuner", [ADAPTER, LORA, PREFIX, {"name": "lora", "rank": 2}], ids=lambda t: t["name"])
def test_the_offline_tuner_is_the_moving_average_of_the_online_ones(tuner):
    beta = 0.9
    _, stages = follow(tuner=tuner, decay=beta)
    assert [offline for _, offline, _ in stages[0]] == [None] * len(stages[0])
    solution = stages[0][-1][0]
    assert not torch.equal(solution, stages[0][0][0])
    assert torch.equal(stages[1][0][1], solution), "it starts from what the first task ended with"
    assert torch.equal(stages[2][0][1], stages[1][-1][1]), "and goes on from task to task"
    for steps in stages[1:]:
        start = steps[0][1].double()
        for n, (_, offline, _) in enumerate(steps):
            weighted = [(1 - beta) * beta ** (n - k) * steps[k][0].double() for k in range(1, n + 1)]
            expected = beta**n * start + sum(weighted, torch.zeros_like(start))
            torch.testing.assert_close(offline.double(), expected, atol=1e-5, rtol=1e-4)


def test_in_the_first_epochs_of_later_tasks_the_head_learns_alone():
    _, stages = follow()
    per_epoch = [(len(steps) - 1) // QUICK["epochs"] for steps in stages]
    for stage, (steps, epoch) in enumerate(zip(stages, per_epoch, strict=True)):
        moved = [not torch.equal(a[0], b[0]) for a, b in pairwise(steps)]
        frozen = QUICK["frozen_epochs"] * epoch if stage else 0
        assert not any(moved[:frozen])
        if SIZES[stage] > 1:  # the softmax over one class has nothing to teach
            assert all(moved[frozen:])
            assert all(not torch.equal(a[2], b[2]) for a, b in pairwise(steps))
    # meanwhile the offline tuner closes in on the one that waits
    distance = [float((online - offline).norm()) for online, offline, _ in stages[2][: 2 * per_epoch[2] + 1]]
    start = stages[2][0]
    assert torch.equal(start[0], stages[1][-1][0])
    for n, left in enumerate(distance):
        assert left == pytest.approx(distance[0] * QUICK["decay"] ** n, rel=1e-3, abs=1e-6)


def test_while_the_tuner_waits_the_average_approaches_it_by_hand():
    learner = LAE(LAE.Config(**QUICK), backbone())
    task = stream(learner.backbone).tasks[0]
    learner.begin(task, context())
    learner.begin(stream(learner.backbone).tasks[1], context(1))  # as on resuming: nothing was trained yet
    assert not any(p.requires_grad for p in learner.offline.parameters())
    with torch.no_grad():
        for p in learner.online.parameters():
            p.fill_(1.0)
        for p in learner.offline.parameters():
            p.fill_(3.0)
    learner.accumulate()
    assert torch.allclose(vector(learner.offline), torch.tensor(0.9 * 3 + 0.1))
    learner.accumulate()
    assert torch.allclose(vector(learner.offline), torch.tensor(0.81 * 3 + 0.19))
    assert torch.equal(vector(learner.online), torch.ones_like(vector(learner.online)))


def test_rows_of_old_classes_stay():
    after = [Case(LAE, QUICK).run(stop_after=n).learner.head for n in (1, 3)]
    assert torch.equal(after[1].weight[: SIZES[0]], after[0].weight) and torch.equal(after[1].bias[:4], after[0].bias)
    assert after[1].bias[5:].abs().min() > 0


def test_the_loss_is_over_the_tasks_own_classes_and_over_all_where_domains_repeat_them(monkeypatch):
    asked = []
    original = lae.cross_entropy
    monkeypatch.setattr(lae, "cross_entropy", lambda *args, first: asked.append(first) or original(*args, first=first))
    learner = Case(LAE, QUICK).run().learner
    assert asked == [0, 4, 5]
    data = stream(learner.backbone).tasks[0]
    again = Task(3, data.classes, tuple(range(8)), tuple("abcdefgh"), data.train)
    learner.begin(again, context(3))
    learner.learn(again, context(3))
    assert asked[-1] == 0


def test_offline_is_never_trained_and_predicts_without_dropout():
    learner = Case(LAE, {**QUICK, "tuner": {**ADAPTER, "dropout": 0.5}}).run().learner
    assert not any(p.requires_grad for p in learner.offline.parameters())
    assert not any(module.training for module in learner.offline.modules())
    with isolated(0):
        before = torch.get_rng_state()
        learner.predict(probe_images())
        assert torch.equal(torch.get_rng_state(), before)


# --- ensemble


def test_the_larger_of_two_probabilities_by_numpy():
    vit = backbone()
    learner = Case(LAE, QUICK).run(vit=vit).learner
    images = probe_images()
    weight, bias = (p.detach().double().numpy() for p in (learner.head.weight, learner.head.bias))
    with torch.inference_mode():
        seen = [vit(images, tuner).double().numpy() for tuner in (learner.online, learner.offline)]
        scores = learner.logits(learner.features(images))
    exponentials = [np.exp(f @ weight.T + bias) for f in seen]
    on, off = (e / e.sum(1, keepdims=True) for e in exponentials)
    assert (on > off).any() and (off > on).any()
    np.testing.assert_allclose(scores.exp().numpy(), np.maximum(on, off), rtol=1e-3, atol=1e-6)
    assert (learner.predict(images).numpy() == np.maximum(on, off).argmax(1)).all()


def test_an_improbable_class_keeps_its_rank():
    learner = LAE(LAE.Config(**QUICK), backbone())
    learner.head.grow(3)
    with torch.no_grad():
        learner.head.weight.zero_()
        learner.head.weight[:, 0] = torch.tensor([0.0, 300.0, 150.0])
    features = torch.zeros(1, 2 * 48)
    features[0, 0], features[0, 48] = 1.0, 2.0
    scores = learner.logits(features)
    torch.testing.assert_close(scores, torch.tensor([[-300.0, 0.0, -150.0]]))  # exp of the first two is 0 in float32


def test_predict_changes_the_prediction_and_nothing_else():
    cases = {predict: Case(LAE, {**QUICK, "predict": predict}).run() for predict in ("ensemble", "online", "offline")}
    states = [done.state() for done in cases.values()]
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        assert all(torch.equal(other[key], states[0][key]) for key in other)
    losses = [[row["log"] for row in done.rows] for done in cases.values()]
    timeless = [[[e for e in log if "second" not in str(e)] for log in run] for run in losses]
    assert timeless[0] == timeless[1] == timeless[2]
    images = probe_images()
    with torch.inference_mode():
        one = {k: done.learner.logits(done.learner.features(images)) for k, done in cases.items()}
        torch.testing.assert_close(one["ensemble"], torch.maximum(one["online"], one["offline"]), atol=1e-5, rtol=1e-5)
        for branch in ("online", "offline"):
            learner = cases[branch].learner
            plain = learner.head(learner.backbone(images, getattr(learner, branch)))
            torch.testing.assert_close(one[branch], plain.log_softmax(1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(one["online"], one["offline"])


@pytest.mark.parametrize(("predict", "branches"), [("ensemble", [1, 2, 2]), ("online", [1] * 3), ("offline", [1] * 3)])
def test_an_image_passes_once_through_each_tuner_that_is_asked(predict, branches):
    rows = Case(LAE, {**QUICK, "predict": predict}).run().rows
    tests = 6 * np.cumsum(SIZES)
    assert [row["costs"]["test_passes"] for row in rows] == list(np.multiply(branches, tests))
    trained = [row["costs"]["train_passes"] for row in rows]
    assert trained == [QUICK["epochs"] * n for n in (48, 12, 25)]


@pytest.mark.parametrize("tuner", [ADAPTER, LORA, PREFIX, {"name": "lora", "rank": 2}], ids=lambda t: t["name"])
def test_two_branches_cost_two_tuners_and_no_second_backbone(tuner):
    vit = backbone()
    learner = Case(LAE, {**QUICK, "tuner": tuner}).run(vit=vit, stop_after=2).learner
    own = sum(p.numel() for p in build_tuner(tuner, vit).parameters())
    head = 5 * (48 + 1)
    assert sum(v.numel() for v in learner.state_dict().values()) == 2 * own + head
    assert sum(p.numel() for p in learner.parameters()) == 2 * own + head
    before = [learner.backbone(probe_images()[:2], t) for t in (learner.online, learner.offline)]
    try:
        with torch.no_grad():
            vit.model.patch_embed.proj.weight.mul_(1.5)  # weights of its own would not notice
        after = [learner.backbone(probe_images()[:2], t) for t in (learner.online, learner.offline)]
    finally:
        with torch.no_grad():
            vit.model.patch_embed.proj.weight.div_(1.5)
    assert all(not torch.allclose(a, b) for a, b in zip(before, after, strict=True))


# --- errors


def test_the_tuner_must_learn_in_some_epoch():
    with pytest.raises(ValidationError, match=r"frozen_epochs is 3 of 2 epochs.*give at most 1"):
        LAE.Config(epochs=2)
    assert LAE.Config(epochs=1, frozen_epochs=0).frozen_epochs == 0


def test_a_backbone_with_fewer_blocks_is_told_so():
    with pytest.raises(BackboneError, match="blocks: got 3, this backbone has 3 blocks; give some of 0 to 2"):
        LAE(LAE.Config(), backbone())


def test_it_runs_in_mixed_precision():
    from cil.utils import hardware

    vit = backbone()
    learner = LAE(LAE.Config.model_validate({**LEARNS, "train_batch_size": 4}), vit)
    rows = run_stages(learner, stream(vit), accelerator=hardware.accelerator("cpu", "bf16"), stop_after=2)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in learner.parameters())
    assert rows[0]["correct"][0] / rows[0]["total"][0] > 0.5
