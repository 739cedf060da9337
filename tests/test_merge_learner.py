"""The learner that merges: its tasks, its merged backbone and its classifier, each against what it should come to."""

from __future__ import annotations

import pytest
import torch
from marks import slow_beyond
from pydantic import ValidationError

from cil.classifiers import LDA, CosineHead
from cil.classifiers.drift import ridge_map, translation
from cil.errors import BackboneError, ConfigError
from cil.learners.bases.merged_space import Parameters, mergeable
from cil.learners.merge import Merge
from cil.learners.merge_lca import MergeLCA
from cil.learners.merge_oracle import MergeOracle
from cil.testing import Case, parametrize_learner
from cil.testing.setting import backbone, context, probe_images, stream
from cil.training import ParamGroup, fit, local_cross_entropy
from cil.tuning import ExternalWeights, build_tuner

LORA = {"name": "lora", "rank": 4, "targets": ["qkv", "fc1"]}
ADAPTER = {"name": "adapter", "bottleneck": 4}
NEWEST = {"name": "ema", "alpha": 1.0}
QUICK = {"tuner": LORA, "epochs": 3, "lr": 0.01}


@parametrize_learner(
    [
        ("merge", {"tuner": "full", "rule": "regmean", "head": "ridge", "prototypes": "translate", "lr": 0.003}),
        ("merge_lca", {**QUICK, "alignment_epochs": 2, "samples": 16, "prototypes": "linear"}),
        ("merge_oracle", {**QUICK, "rule": "average", "head": "ncm"}),
    ]
)
def test_common_checks(case, check):
    check(case)


@pytest.mark.slow
@parametrize_learner(
    [
        ("merge", QUICK),
        ("merge", {**QUICK, "rule": "ties", "head": "concat", "prototypes": "stale", "anchor": False}),
        ("merge", {**QUICK, "tuner": ADAPTER, "rule": "ema", "start": "merged", "head": "ncm", "anchor": False}),
        ("merge", {**QUICK, "trained": "first", "head": "ridge", "projection": 40, "prototypes": "stale"}),
    ]
)
def test_common_checks_of_variants(case, check):
    check(case)


class Followed(Merge):
    """Keeps every task vector; what a merging learner must not do."""

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        object.__setattr__(self, "vectors", [])

    def add(self, tuner, head, task, ctx):
        self.vectors.append({k: v.clone() for k, v in self.update(tuner).items()})
        super().add(tuner, head, task, ctx)


def merged_update(learner) -> dict[str, torch.Tensor]:
    start = learner.models.initial
    return {k: v - start[k] for k, v in learner.rule.merged().items() if k in learner.vectors[0]}


@pytest.mark.parametrize(
    "tuner",
    slow_beyond([LORA, "full", ADAPTER], [LORA, "full", "bitfit", {"name": "lora_kv", "rank": 2}, ADAPTER, "prefix"]),
    ids=str,
)
def test_every_task_starts_from_the_same_point(tuner):
    """A task's update is the same whether other tasks were merged before or not."""
    learner = Case(Followed, {**QUICK, "tuner": tuner, "rule": "average"}).run().learner
    fresh = Case(Followed, {**QUICK, "tuner": tuner, "rule": "average"}).learner()
    task = stream(fresh.backbone).tasks[2]
    ctx = context(2)
    fresh.begin(task, ctx)
    if isinstance(learner.models, Parameters):  # drawn before the first task
        fresh.models.load_state_dict(learner.models.state_dict())
    fresh.train()
    fresh.learn(task, ctx)
    for name, value in fresh.vectors[0].items():
        torch.testing.assert_close(learner.vectors[2][name], value, msg=lambda m, n=name: f"{n}: {m}")
    mean = {k: sum(v[k] for v in learner.vectors) / 3 for k in learner.vectors[0]}
    for name, value in merged_update(learner).items():
        torch.testing.assert_close(value, mean[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_the_first_task_is_taken_as_it_is_and_seen_through():
    learner = Case(Followed, {**QUICK, "rule": "opcm"}).run(stop_after=1).learner
    frozen = dict(learner.backbone.model.named_parameters())
    own = ExternalWeights({k: frozen[k] + v for k, v in learner.vectors[0].items()})
    images = probe_images()
    with torch.no_grad():
        expected = torch.cat([learner.backbone(images), learner.backbone(images, own)], dim=1)
        torch.testing.assert_close(learner.features(images), expected, atol=1e-5, rtol=1e-4)


def test_with_nothing_merged_it_is_lda_on_frozen_features():
    learner = Case(Merge, {**QUICK, "rule": {"name": "task_arithmetic", "scale": 0.0}}).run().learner
    vit, images = learner.backbone, probe_images()
    lda = LDA(48, learner.config.shrinkage, priors="uniform")
    with torch.no_grad():
        for task in stream(vit).tasks:
            for x, y in task.train.batches(100):
                lda.partial_fit(vit(x), y)
        ours, theirs = learner.logits(learner.features(images)), lda.logits(vit(images))
    assert torch.equal(ours.argmax(1), theirs.argmax(1))
    spread = [scores - scores.mean(1, keepdim=True) for scores in (ours, 2 * theirs)]  # two equal halves
    torch.testing.assert_close(*spread, atol=1e-2, rtol=1e-3)


def test_statistics_under_the_pretrained_weights_stay_exact():
    """The anchor's half is never carried: it is the same with any treatment of the other half."""
    done = {p: Case(Merge, {**QUICK, "prototypes": p}).run().learner.classifier for p in ("stale", "linear")}
    torch.testing.assert_close(done["linear"].sums[:, :48], done["stale"].sums[:, :48], atol=1e-9, rtol=0)
    assert not torch.allclose(done["linear"].sums[:4, 48:], done["stale"].sums[:4, 48:])
    alone = Case(Merge, {**QUICK, "anchor": False}).run().learner
    assert alone.classifier.feature_dim == 48
    torch.testing.assert_close(alone.classifier.sums, done["linear"].sums[:, 48:], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("prototypes", "fit"), [("translate", translation), ("linear", ridge_map)])
def test_old_classes_are_carried_by_the_map_the_current_images_give(prototypes, fit):
    """Old statistics as the first stage left them, mapped with what the second stage's images saw before and after."""
    pairs = []

    class Recorded(Merge):
        def correct_drift(self, before, after):
            pairs.append((before, after))
            super().correct_drift(before, after)

    one, two = (Case(Recorded, {**QUICK, "prototypes": prototypes}).run(stop_after=n).learner for n in (1, 2))
    [(before, after)] = pairs
    assert torch.equal(before[:, :48], after[:, :48]) and not torch.allclose(before[:, 48:], after[:, 48:])
    expected = one.classifier.transport(fit(before[:, 48:], after[:, 48:]).beside(48))
    torch.testing.assert_close(two.classifier.means[:4], expected.means)
    with torch.no_grad():  # the pairs are what the learner sees under θ^(1) and θ^(2)
        images = torch.cat([x for x, _ in stream(one.backbone).tasks[1].train.batches(100)])
        torch.testing.assert_close(one.features(images), before, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(two.features(images), after, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(two.classifier.means[4], after.double().mean(0))  # its own class is measured


def test_the_oracle_trains_and_merges_alike_to_the_bit():
    plain, oracle = (Case(cls, QUICK).run().learner.rule.state_dict() for cls in (Merge, MergeOracle))
    assert plain.keys() == oracle.keys() and all(torch.equal(plain[k], oracle[k]) for k in plain)


def test_what_is_kept_does_not_grow_with_the_tasks():
    case = Case(Merge, QUICK)
    sizes = [sum(v.numel() for v in case.after(n).learner.rule.state_dict().values()) for n in (1, 2, 3)]
    assert len(set(sizes)) == 1
    assert not list(case.finished.learner.parameters())


@pytest.mark.parametrize("rule", ["fisher", "gram_merge", "regmean"])
def test_rules_that_need_statistics_get_them_from_the_tasks_images(rule):
    [row] = Case(Merge, {**QUICK, "rule": rule, "statistics": 10}).run(stop_after=1).rows
    plain, second = Case(Merge, QUICK).run(stop_after=2).rows
    assert row["costs"]["train_passes"] == plain["costs"]["train_passes"] + 10
    # under θ_0 and θ^(t), and from the second task on under θ^(t−1)
    assert plain["costs"]["train_passes"] == row["costs"]["train_images"] * (QUICK["epochs"] + 2)
    assert second["costs"]["train_passes"] == second["costs"]["train_images"] * (QUICK["epochs"] + 3)
    assert row["correct"][0] / row["total"][0] > 0.5


def test_statistics_are_those_of_the_finetuned_model():
    """The Gram matrix of the first block's qkv inputs, from a forward pass by hand under θ_t."""
    learner = Case(Merge, {**QUICK, "rule": "regmean", "tuner": "full"}).learner()  # LoRA would run a tree of its own
    task, ctx = stream(learner.backbone).tasks[0], context()
    tuner, head = learner.train_task(task, ctx)
    update = learner.update(tuner)
    images = torch.cat([x for x, _ in task.train.batches(100)])
    found = learner.measure(update, head, task, ctx).grams["blocks.1.attn.qkv.weight"]
    vit = learner.backbone.model
    with torch.no_grad():
        first = {}
        hook = vit.blocks[1].norm1.register_forward_hook(lambda m, a, out: first.update(x=out))
        learner.backbone(images, tuner)
        hook.remove()
    x = first["x"].flatten(0, 1).double()
    torch.testing.assert_close(found.squeeze(0), x.T @ x / len(x), atol=1e-5, rtol=1e-4)


# --- where tasks start, and which


def by_hand(tuner: str | dict, tasks: int) -> torch.nn.Module:
    """One tuner that is trained on task after task, without any merging."""
    config, vit = Case(Merge, {**QUICK, "tuner": tuner}).config, backbone()
    trained = build_tuner(config.tuner, vit)
    for task in stream(vit).tasks[:tasks]:
        ctx = context(task.index)
        if task.index == 0:
            trained.reset(ctx.generator)
        head = CosineHead(vit.feature_dim, config.head_scale)
        head.grow(len(task.classes), ctx.generator)
        loss = local_cross_entropy(lambda x, head=head: head(vit(x, trained)), config, task.classes[0])
        groups = [ParamGroup(trained.parameters()), ParamGroup(head.parameters(), lr_factor=config.head_lr_factor)]
        fit(loss, groups, task.train, config, ctx)
    return trained.eval()


@pytest.mark.parametrize("tuner", [ADAPTER, "full"], ids=str)
def test_keeping_the_newest_and_going_on_from_it_is_sequential_training(tuner):
    learner = Case(Merge, {**QUICK, "tuner": tuner, "rule": NEWEST, "start": "merged"}).run().learner
    trained, images = by_hand(tuner, 3), probe_images()
    with torch.no_grad():
        expected = learner.backbone(images, trained)
        moved = float((expected - seen_at_the_start(learner, images)).abs().max())
        off = float((learner.merged(images) - expected).abs().max())
    assert moved > 0.1 and off < 0.01 * moved  # θ_0 + (θ − θ_0) rounds, and training enlarges that


def seen_at_the_start(learner, images):
    return learner.backbone(images, learner.models.tuner_at(learner.models.initial))


@pytest.mark.parametrize(
    "tuner",
    slow_beyond(
        [LORA, "ssf", ADAPTER, "prefix"],
        [LORA, {"name": "lora_kv", "rank": 2}, "ssf", "bitfit", ADAPTER, "prefix", "vpt_deep"],
    ),
    ids=str,
)
def test_a_task_starts_where_merging_has_come_to(tuner):
    """What sees through θ^(t) sees what the trained tuner sees if nothing of it is averaged away."""
    learner = Case(Followed, {**QUICK, "tuner": tuner, "rule": NEWEST, "start": "merged", "epochs": 1}).learner()
    images = probe_images()
    for task in stream(learner.backbone).tasks[::2]:  # the one between has one class, and nothing to learn
        ctx = context(task.index)
        learner.begin(task, ctx)
        with torch.no_grad():
            before = learner.merged(images)
            start = learner.backbone(
                images, learner.models.tuner(learner.start(), context(task.index).generator).eval()
            )
        if tuner != "ssf":  # which starts near where the weights are, on purpose
            torch.testing.assert_close(start, before, atol=1e-4, rtol=1e-3)
        trained, head = learner.train_task(task, ctx)
        learner.add(trained, head, task, ctx)
        with torch.no_grad():
            after = learner.merged(images)
            torch.testing.assert_close(after, learner.backbone(images, trained.eval()), atol=1e-4, rtol=1e-3)
        assert float((after - before).abs().max()) > 1e-3
    first, second = learner.vectors
    if tuner is LORA:  # the second task's own part is of its rank, beside the first's
        for name in first:
            assert torch.linalg.matrix_rank(second[name] - first[name], rtol=1e-4) <= 4


def test_what_adapters_start_from_is_drawn_with_the_training_seed():
    drawn = [Case(Merge, {**QUICK, "tuner": ADAPTER}).run(seed=s, stop_after=1).learner.models.drawn for s in (0, 1)]
    one, two = (tuner.adapters[0].down.weight for tuner in drawn)
    assert not torch.equal(one, two) and not drawn[0].adapters[0].up.weight.any()


def test_the_first_task_alone():
    """Later tasks are one pass an image; and as nothing moves, statistics are what an oracle has."""
    settings = {**QUICK, "trained": "first", "anchor": False}
    one, all_ = (Case(Merge, settings).run(stop_after=n) for n in (1, 3))
    images = probe_images()
    with torch.no_grad():
        assert torch.equal(one.learner.features(images), all_.learner.features(images))
    assert [row["costs"]["train_passes"] / row["costs"]["train_images"] for row in all_.rows] == [4, 1, 1]
    oracle = Case(MergeOracle, settings).run().learner
    torch.testing.assert_close(all_.learner.classifier.sums, oracle.classifier.sums)
    torch.testing.assert_close(all_.learner.classifier.outer, oracle.classifier.outer)


def test_ridge_on_random_features_of_the_merged_backbone():
    settings = {**QUICK, "trained": "first", "head": "ridge", "projection": 40, "prototypes": "stale", "anchor": False}
    learner = Case(Merge, settings).run().learner
    projection = learner.classifier.projection
    assert projection.shape == (48, 40) and not torch.equal(
        projection, Case(Merge, settings).run(seed=1, stop_after=1).learner.classifier.projection
    )
    with torch.no_grad():
        seen = torch.cat([learner.features(x) for t in stream(learner.backbone).tasks for x, _ in t.train.batches(100)])
        hidden = (seen.double() @ projection.double()).relu()
    torch.testing.assert_close(learner.classifier.gram, hidden.T @ hidden, atol=1e-3, rtol=1e-4)


# --- errors


@pytest.mark.parametrize("rule", ["opcm", "iso_c", "nufilt", "regmean"])
@pytest.mark.parametrize("tuner", ["bitfit", "layernorm", "prefix", "vpt_deep"])
def test_rules_for_matrices_want_some(tuner, rule):
    with pytest.raises(ConfigError, match=f"tuner {tuner} trains none; choose another rule|needs statistics of the"):
        Merge(Merge.Config(tuner=tuner, rule=rule), backbone())
    Merge(Merge.Config(tuner=tuner, rule="average"), backbone())


@pytest.mark.parametrize("rule", ["fisher", "gram_merge"])
def test_statistics_are_of_the_backbones_own_weights(rule):
    with pytest.raises(ConfigError, match=r"adapter adds modules to the network, and .* needs statistics"):
        Merge(Merge.Config(tuner="adapter", rule=rule), backbone())


def test_dora_says_why_not():
    with pytest.raises(BackboneError, match="only lora and osf add a ΔW"):
        Merge(Merge.Config(tuner="dora"), backbone())


def test_concatenated_heads_have_nothing_to_carry():
    with pytest.raises(ValidationError, match="set prototypes: stale and anchor: false"):
        Merge.Config(head="concat")
    with pytest.raises(ValidationError, match="set trained: all"):
        Merge.Config(head="concat", prototypes="stale", anchor=False, trained="first")
    with pytest.raises(ValidationError, match="trained"):
        MergeLCA.Config(trained="first")


def test_random_features_are_ridges_and_cannot_be_carried():
    with pytest.raises(ValidationError, match="projection belongs to head: ridge, not lda"):
        Merge.Config(projection=50, prototypes="stale")
    with pytest.raises(ValidationError, match="set prototypes: stale"):
        Merge.Config(projection=50, head="ridge")


def test_lca_without_alignment_is_the_tasks_own_heads():
    rule = {"name": "magmax", "scale": 1.0}
    bare = Case(MergeLCA, {**QUICK, "alignment_epochs": 0}).run().learner
    own = Case(Merge, {**QUICK, "rule": rule, "head": "concat", "prototypes": "stale", "anchor": False}).run().learner
    images = probe_images()
    with torch.inference_mode():
        sigma = bare.config.head_scale  # a concatenated head has one of 1: the argmax is the same
        torch.testing.assert_close(bare.logits(bare.features(images)), sigma * own.logits(own.features(images)))


def test_lca_aligns_all_rows_on_gaussians_of_the_merged_features():
    """Rows are those of the tasks until the alignment; the Gaussians are of each task's images under its own θ^(t)."""
    learner = Case(MergeLCA, {**QUICK, "alignment_epochs": 3, "samples": 16}).learner()
    tasks = stream(learner.backbone).tasks
    for task in tasks[:2]:
        ctx = context(task.index)
        learner.begin(task, ctx)
        learner.train()
        rows = learner.classifier.weight.detach().clone()
        learner.learn(task, ctx)
        learner.eval()
        features, labels = context(task.index).features(learner, task.train)
        for c in task.classes:
            mine = features[labels == c].double()
            torch.testing.assert_close(learner.gaussians.means[c], mine.mean(0))
            if len(mine) > 1:
                torch.testing.assert_close(learner.gaussians.covariance(c), mine.T.cov(), atol=1e-9, rtol=1e-6)
    moved = (learner.classifier.weight[: len(rows)] - rows).abs().amax(1)
    assert learner.task_of.tolist() == [task.index for task in tasks[:2] for _ in task.classes] and bool(moved.all())


def test_update_names_are_timms():
    vit = backbone()
    models, weights = mergeable(Merge.Config(tuner=LORA).tuner, vit), dict(vit.model.named_parameters())
    update = models.update(build_tuner(LORA, vit), models.initial)
    assert set(update) == {f"blocks.{i}.{layer}.weight" for i in range(3) for layer in ("attn.qkv", "mlp.fc1")}
    assert all(delta.shape == weights[name].shape for name, delta in update.items())
