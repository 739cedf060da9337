"""L2P, DualPrompt and CODA-Prompt: cases worked by hand, plain references, and what must stay as it was."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from marks import slow_beyond
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_runner import settings

from cil import run
from cil.errors import BackboneError
from cil.learners.coda_prompt import CODAPrompt, joined, orthogonal_rows
from cil.learners.dualprompt import DualPrompt
from cil.learners.l2p import L2P
from cil.results import read_run
from cil.stream import Stream
from cil.testing import CHECKS, Case, parametrize_learner
from cil.testing.setting import backbone, context, probe_images, stream
from cil.tuning import ExternalPrefix, PooledPrompts

SMALL_L2P = {"pool": 5, "top": 2, "lr": 0.005, "init": 0.05, "epochs": 10}
SMALL_DUAL = {"expert_blocks": [2], "lr": 0.01}
SMALL_CODA = {"blocks": [0, 2], "components": 3, "length": 4, "lr": 0.01, "epochs": 5}
SMALL = {"l2p": (L2P, SMALL_L2P), "dualprompt": (DualPrompt, SMALL_DUAL), "coda_prompt": (CODAPrompt, SMALL_CODA)}
all_three = pytest.mark.parametrize("name", SMALL)


@parametrize_learner(
    [
        ("l2p", SMALL_L2P),
        ("dualprompt", SMALL_DUAL),
        ("coda_prompt", SMALL_CODA),
    ]
)
def test_common_checks(case, check):
    check(case)


@pytest.mark.slow
@parametrize_learner(
    [
        ("l2p", {**SMALL_L2P, "vote": True, "query": "clean"}),
        ("dualprompt", {**SMALL_DUAL, "query": "clean"}),
        ("coda_prompt", {**SMALL_CODA, "orthogonality": 0.1, "query": "clean"}),
    ]
)
def test_common_checks_of_variants(case, check):
    check(case)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learner(name: str, **parameters):
    cls, small = SMALL[name]
    return Case(cls, {**small, **parameters}).learner()


# --- L2P


def hand_l2p(**parameters) -> L2P:
    """Keys (1, 0), (0, 1), (−1, 0), (3, 4) in the first two of 48 directions."""
    l2p = learner("l2p", pool=4, **parameters)
    l2p.keys.data = F.pad(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [3.0, 4.0]]), (0, 46))
    return l2p


QUERIES = F.pad(torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, 5.0]]), (0, 46))
"""Cosines with the four keys: (1, 0, −1, .6), (−.7, .7, .7, .14), (0, 1, 0, .8)."""


def test_l2p_takes_the_nearest_keys_and_pulls_them():
    l2p = hand_l2p(pull=0.5)
    chosen = l2p.choose(QUERIES)
    assert [set(row) for row in chosen.tolist()] == [{0, 3}, {1, 2}, {1, 3}]
    _, regulariser = l2p.training_tuner(QUERIES)
    by_hand = -0.5 * ((1 + 0.6) + (math.sqrt(0.5) + math.sqrt(0.5)) + (1 + 0.8)) / 3
    assert regulariser.item() == pytest.approx(by_hand, rel=1e-6)
    l2p.keys.requires_grad_(True)
    _, regulariser = l2p.training_tuner(QUERIES[:1])
    (gradient,) = torch.autograd.grad(regulariser, l2p.keys)
    assert not gradient[1:3].any() and gradient[3].any()  # key 0 is parallel to the query, 1 and 2 were not chosen
    assert l2p.usage(QUERIES).tolist() == [[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]]


def test_l2p_votes_in_training_only():
    l2p = hand_l2p(vote=True)
    prompts = l2p.prompts
    tuner, regulariser = l2p.training_tuner(QUERIES)  # chosen: 0 once, 1 twice, 2 once, 3 twice
    for row in tuner.prompts:
        torch.testing.assert_close(row, (prompts[[1, 3]].flatten(0, 1) + l2p_position(l2p))[0])
    by_hand = -0.1 * (0.6 + 0 + (math.sqrt(0.5) + math.sqrt(0.02)) + (1 + 0.8)) / 3
    assert regulariser.item() == pytest.approx(by_hand, rel=1e-6)
    assert l2p.vote(torch.tensor([[3, 2], [2, 0]])).tolist() == [[2, 0]] * 2  # 0 and 3 tie: the lower
    at_test = l2p.tuner(QUERIES).prompts
    assert not torch.allclose(at_test[0], at_test[1])


class Leaky(L2P):
    """As published: the test batch votes."""

    def tuner(self, query):
        return PooledPrompts(self.backbone, self.prompts[self.vote(self.choose(query))].flatten(1, 2))


@pytest.mark.slow
def test_the_common_checks_catch_a_vote_at_test():
    spread = {**SMALL_L2P, "lr": 0.05, "epochs": 5}
    with pytest.raises(AssertionError, match="scores depend on the rest of the batch"):
        CHECKS["batch_independence"](Case(Leaky, spread))
    CHECKS["batch_independence"](Case(L2P, spread))


def l2p_position(l2p: L2P) -> torch.Tensor:
    return l2p.backbone.model.pos_embed[:, :1]


def test_l2p_sequence_and_feature_equal_timm_called_by_hand():
    vit = backbone()
    images, prompts = probe_images()[:3], draw(3, 4, 48)
    model = vit.model
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(images))
        tokens = torch.cat([tokens[:, :1], prompts + model.pos_embed[:, :1], tokens[:, 1:]], dim=1)
        for block in model.blocks:
            tokens = block(tokens)
        expected = model.norm(tokens)[:, 1:5].mean(1)
        torch.testing.assert_close(vit(images, PooledPrompts(vit, prompts)), expected, atol=1e-6, rtol=1e-5)


def test_l2p_parameters_on_vit_b():
    """46,080 and the head, as the specification counts them for the published setting."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0, depth=5)
    published = L2P(L2P.Config(), FakeSize(model))
    assert sum(p.numel() for p in published.trained()) == 46_080
    dual = DualPrompt(DualPrompt.Config(), FakeSize(model))
    dual.begin(stream(backbone()).tasks[0], context())
    assert [p.numel() for p in dual.trained()] == [15_360, 23_040, 768]
    coda = CODAPrompt(CODAPrompt.Config(), FakeSize(model))
    coda.begin(stream(backbone()).tasks[0], context())
    assert 10 * sum(p.numel() for p in coda.trained()) == 5 * 768_000


class FakeSize:
    """A backbone's sizes without its weights."""

    def __init__(self, model):
        self.model, self.feature_dim, self.device = model, 768, torch.device("cpu")


def test_l2p_wants_no_more_prompts_than_the_pool_has():
    with pytest.raises(ValidationError, match="top: 5 prompts per image, but pool has 4; lower top or raise pool"):
        L2P.Config(pool=4)


# --- DualPrompt


def test_dualprompt_slots_are_made_per_task_copied_and_left_alone():
    one, two, three = (Case(DualPrompt, SMALL_DUAL).after(n).learner for n in (1, 2, 3))
    assert [len(d.experts) for d in (one, two, three)] == [1, 2, 3] == [len(d.keys) for d in (one, two, three)]
    assert torch.equal(three.experts[0], one.experts[0]) and torch.equal(three.keys[0], one.keys[0])
    assert torch.equal(three.keys[1], two.keys[1]) and not torch.equal(three.general, one.general)
    two.begin(stream(backbone()).tasks[2], context(2))
    assert torch.equal(two.experts[2], two.experts[1]) and not torch.equal(two.keys[2], two.keys[1])


def test_dualprompt_trains_its_own_slot_and_tests_by_key():
    dual = Case(DualPrompt, SMALL_DUAL).after(3).learner
    for i, key in enumerate([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]):
        dual.keys[i].data = F.pad(torch.tensor(key), (0, 46))
        dual.experts[i].data = draw(1, 2, 5, 48, seed=i)
    assert dual.match(QUERIES).tolist() == [0, 1, 1]  # the second is as near to 1 as to 2
    tuner, regulariser = dual.training_tuner(QUERIES)
    assert regulariser.item() == pytest.approx(-(-1 + math.sqrt(0.5) + 0) / 3, rel=1e-6)
    for half in (0, 1):
        torch.testing.assert_close(tuner.prefix(2)[half], dual.experts[2][0, half])
        chosen = torch.stack([dual.experts[k][0, half] for k in (0, 1, 1)])
        torch.testing.assert_close(dual.tuner(QUERIES).prefix(2)[half], chosen)
    # two images that take different slots: each is seen as it is alone with that slot
    vit, images = dual.backbone, probe_images()[:2]
    together = vit(images, dual.tuner(QUERIES[:2]))
    for b, slot in enumerate((0, 1)):
        own = {i: (g[0], g[1]) for i, g in enumerate(dual.general)}
        own[2] = dual.experts[slot][0, 0], dual.experts[slot][0, 1]
        torch.testing.assert_close(together[b], vit(images[b : b + 1], ExternalPrefix(own))[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"expert_blocks": [3]}, "got 3, this backbone has 3 blocks"),
        ({"general_blocks": [0, 0]}, "0 is listed twice"),
        ({"general_blocks": [0, 2]}, r"both name \[2\]"),
    ],
)
def test_dualprompt_names_blocks_that_do_not_fit(wrong, says):
    with pytest.raises(BackboneError, match=says):
        learner("dualprompt", **wrong)


# --- CODA-Prompt


def test_coda_weights_prompt_and_penalty_equal_plain_loops():
    coda = Case(CODAPrompt, SMALL_CODA).after(2).learner  # 2 blocks × 6 components
    query = draw(4, 48)
    keys, attention, prompts = (joined(p).double().numpy() for p in (coda.keys, coda.attention, coda.prompts))
    q, blocks = query.double().numpy(), range(2)
    alpha = np.zeros((2, 4, 6))
    for block in blocks:
        for b in range(4):
            for j in range(6):
                attended = q[b] * attention[block, j]
                key = keys[block, j]
                alpha[block, b, j] = attended @ key / (np.linalg.norm(attended) * np.linalg.norm(key))
    np.testing.assert_allclose(coda.weights(query), alpha, atol=1e-5)
    tuner = coda.tuner(query)
    for block, number in zip(blocks, coda.config.blocks, strict=True):
        mixed = sum(alpha[block, :, j, None] * prompts[block, j] for j in range(6)).reshape(4, 4, 48)
        np.testing.assert_allclose(tuner.prefix(number)[0], mixed[:, :2], atol=1e-5)
        np.testing.assert_allclose(tuner.prefix(number)[1], mixed[:, 2:], atol=1e-5)
    assert tuner.prefix(1) is None
    penalty = sum(
        np.mean((part[block] @ part[block].T - np.eye(6)) ** 2)
        for part in (keys, attention, prompts)
        for block in blocks
    )
    assert coda.orthogonality().item() == pytest.approx(penalty, rel=1e-5)
    np.testing.assert_allclose(coda.usage(query), np.abs(alpha).mean(0), atol=1e-5)


@torch.no_grad()
def test_coda_by_hand():
    """Two components in two dimensions; the query (1, 1) seen through A = (1, 0) is (1, 0)."""
    coda = learner("coda_prompt", blocks=[0], components=2, length=2)
    coda.attention.append(F.pad(torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]), (0, 46)))
    coda.keys.append(F.pad(torch.tensor([[[2.0, 0.0], [0.0, -3.0]]]), (0, 46)))
    coda.prompts.append(torch.stack([torch.full((96,), 1.0), torch.full((96,), 10.0)])[None])
    query = F.pad(torch.tensor([[1.0, 1.0]]), (0, 46))
    np.testing.assert_allclose(coda.weights(query)[0, 0], [1, -math.sqrt(0.5)], rtol=1e-6)
    keys, values = coda.tuner(query).prefix(0)
    np.testing.assert_allclose(keys, np.full((1, 1, 48), 1 - 10 * math.sqrt(0.5)), rtol=1e-5)
    assert torch.equal(keys, values)
    # KKᵀ − I = diag(3, 8); AAᵀ − I = (0, 1; 1, 1); PPᵀ − I = (95, 960; 960, 9599)
    by_hand = (9 + 64) / 4 + 3 / 4 + (95**2 + 2 * 960**2 + 9599**2) / 4
    assert coda.orthogonality().item() == pytest.approx(by_hand, rel=1e-5)


def test_coda_starts_orthogonal_and_stays_with_its_old_components():
    fresh = learner("coda_prompt", components=5)
    fresh.begin(stream(backbone()).tasks[0], context())
    for part in (fresh.keys, fresh.attention, fresh.prompts):
        for rows in joined(part):
            torch.testing.assert_close(rows @ rows.T, torch.eye(5), atol=1e-5, rtol=0)
    one, three = (Case(CODAPrompt, SMALL_CODA).after(n).learner for n in (1, 3))
    for before, after in zip(one.trained(), (three.keys, three.attention, three.prompts), strict=True):
        assert torch.equal(before, after[0]) and len(after) == 3


def test_orthogonal_rows_subtract_single_projections():
    old = draw(3, 7, seed=4)
    new = orthogonal_rows(old, 2, torch.Generator().manual_seed(1))
    generator, rows = torch.Generator().manual_seed(1), [row.double() for row in old]
    for _ in range(2):
        v = torch.randn(7, generator=generator, dtype=torch.float64)
        rows.append(v - sum((v @ u) / (u @ u) * u for u in rows))
    torch.testing.assert_close(new, torch.stack([r / r.norm() for r in rows[3:]]).float())
    more = orthogonal_rows(torch.eye(4), 2, torch.Generator().manual_seed(0))  # no direction is left
    torch.testing.assert_close(more.norm(dim=1), torch.ones(2))


def test_coda_refuses_odd_lengths():
    with pytest.raises(ValidationError, match="length: 3; it must be even"):
        CODAPrompt.Config(length=3)


@all_three
def test_settings_the_recipe_refuses_are_refused_by_every_learner(name):
    cls, small = SMALL[name]
    for key in ("schedule", "schedule_per", "optimizer", "query"):
        with pytest.raises(ValidationError, match=key):
            cls.Config(**{**small, key: "no such"})


# --- all three


def prefix_by_hand(block, tokens, keys, values):
    """The attention half of a block with softmax written out, image by image and head by head."""
    attention, out = block.attn, []
    heads, width = attention.num_heads, attention.head_dim
    for b in range(len(tokens)):
        q, k, v = attention.qkv(block.norm1(tokens[b])).chunk(3, dim=1)
        k, v = torch.cat([keys[b], k]), torch.cat([values[b], v])
        mixed = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = (q[:, part] @ k[:, part].T / math.sqrt(width)).exp()
            mixed.append(scores / scores.sum(1, keepdim=True) @ v[:, part])
        out.append(attention.proj(torch.cat(mixed, dim=1)))
    return tokens + torch.stack(out)


@pytest.mark.parametrize("name", ["dualprompt", "coda_prompt"])
def test_prefixes_enter_attention_as_in_a_plain_softmax(name):
    cls, small = SMALL[name]
    done = Case(cls, small).after(2).learner
    vit, images = done.backbone.model, probe_images()[::10]
    with torch.no_grad():
        tuner = done.tuner(done.query(images))
        tokens = vit._pos_embed(vit.patch_embed(images))
        for i, block in enumerate(vit.blocks):
            prefix = tuner.prefix(i)
            if prefix is None:
                tokens = block(tokens)
            else:
                keys, values = (p.expand(len(images), -1, -1) for p in prefix)
                tokens = prefix_by_hand(block, tokens, keys, values)
                tokens = tokens + block.mlp(block.norm2(tokens))
        torch.testing.assert_close(done.features(images), vit.norm(tokens)[:, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "none"),
    [
        ("l2p", {"length": 0}),
        ("dualprompt", {"general_length": 0, "expert_length": 0}),
        ("coda_prompt", {"length": 0}),
    ],
)
def test_a_prompt_of_length_0_is_the_frozen_backbone(name, none):
    cls, small = SMALL[name]
    done = Case(cls, {**small, **none, "epochs": 1}).after(2).learner
    images = probe_images()
    with torch.no_grad():
        torch.testing.assert_close(done.features(images), done.backbone(images), atol=1e-6, rtol=1e-6)


@all_three
@torch.no_grad()
def test_the_choice_depends_on_the_image(name):
    """Where each key is the query of an image, that image is nearest to it: no key is chosen for every image."""
    made, vit = learner(name), backbone()
    for task in stream(vit).tasks:
        made.begin(task, context(task.index))
    count = made.usage(made.query(probe_images()[:1])).shape[1]  # 5 prompts, 3 tasks, or 9 components
    images = probe_images()[:: 48 // count][:count]
    queries = made.query(images)
    if name == "l2p":
        made.keys.copy_(queries)
    elif name == "dualprompt":
        for key, query in zip(made.keys, queries, strict=True):
            key.copy_(query)
    else:
        for keys, attention, own in zip(made.keys, made.attention, queries.split(3), strict=True):
            keys.copy_(own.expand_as(keys))
            attention.fill_(1)
    usage = made.usage(made.query(images)).float()
    assert torch.equal(usage.diagonal(), usage.amax(1)) and len(usage.unique(dim=0)) > 1
    if name != "l2p":  # which chooses two keys per image
        assert usage.argmax(1).tolist() == list(range(count))


@all_three
@pytest.mark.parametrize("query", ["augmented", "clean"])
def test_passes_through_the_one_backbone_are_counted(name, query):
    """Training: the query of every augmented image, or once that of the clean one; the prompted pass. Test: two."""
    cls, small = SMALL[name]
    [row] = Case(cls, {**small, "query": query, "epochs": 3}).after(1).rows
    images = row["costs"]["train_images"]
    assert row["costs"]["train_passes"] == images * (2 * 3 if query == "augmented" else 3 + 1)
    assert row["costs"]["test_passes"] == 2 * row["total"][0]


@all_three
def test_no_second_vit_is_kept(name):
    cls, small = SMALL[name]
    done = Case(cls, small).finished.learner
    own = sum(p.numel() for p in done.parameters())
    assert own < sum(p.numel() for p in done.backbone.model.parameters()) / 3
    assert not any(type(m).__name__ == "VisionTransformer" for m in done.modules())


@all_three
def test_domains_with_the_same_classes_train_all_of_them(name):
    """Where a task shows old classes again its softmax holds them all, from the first on."""
    cls, small = SMALL[name]
    vit = backbone()
    done, tasks = Case(cls, small).learner(vit), stream(vit)
    for index in (0, 1):
        task = type(tasks.tasks[0])(index, *again(tasks))
        before = done.head.weight.detach().clone()
        done.begin(task, context(index))
        done.learn(task, context(index))
    assert (done.head.weight != before).any(dim=1).all()


def again(tasks: Stream) -> tuple:
    first = tasks.tasks[0]
    return first.classes, first.seen, first.names, first.train


@pytest.mark.parametrize("name", slow_beyond(["l2p"], list(SMALL)))
def test_usage_sums_over_the_queries_of_the_last_epoch(name):
    """Where training changes next to nothing, these select what the clean images select under the final keys."""
    cls, small = SMALL[name]
    vit = backbone()
    done = Case(cls, {**small, "query": "clean", "epochs": 3, "lr": 1e-9, "micro_batch_size": 3}).learner(vit)
    [task, *_], ctx = stream(vit).tasks, context(0)
    done.begin(task, ctx)
    done.learn(task, ctx)
    expected = done.usage(ctx.features(vit, task.train)[0]).sum(0)
    np.testing.assert_allclose(ctx.histograms["prompts/usage"], expected.detach(), rtol=1e-4)


def test_usage_is_kept_with_the_stages_and_drawn(tmp_path):
    [folder] = run(
        settings(learners=[{"name": "l2p", "epochs": 1, "pool": 6, "top": 2, "length": 2}], orders=[1]), tmp_path
    )
    stages = read_run(folder)["stages"]
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0})
    events.Reload()
    drawn = events.Histograms("prompts/usage")
    assert [e.step for e in drawn] == list(range(1, len(stages) + 1))
    for row, event in zip(stages, drawn, strict=True):
        counts = row["histograms"]["prompts/usage"]
        assert len(counts) == 6 and sum(counts) == 2 * row["costs"]["train_images"]
        value = event.histogram_value
        assert value.num == sum(counts) and value.sum == sum(i * c for i, c in enumerate(counts))
        assert dict(zip(value.bucket_limit, value.bucket, strict=True)) == {i + 0.5: c for i, c in enumerate(counts)}
