"""PROOF: its attention against one sequence per image, its scores, and the images that it keeps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cil.classifiers.attention import SharedAttention
from cil.learners.bases.exemplars import herding
from cil.learners.registry import build_learner
from cil.runner import run_stages
from cil.testing.setting import accelerator, backbone, context, probe_images, stream

FEW = {"name": "proof", "epochs": 2, "train_batch_size": 16, "memory": 16}


def learned(stages=3, **parameters):
    """A learner after the checks' stream."""
    learner = build_learner({**FEW, **parameters}, backbone())
    run_stages(learner, stream(learner.backbone), accelerator=accelerator(), batch_size=16, stop_after=stages)
    return learner


@pytest.fixture(scope="module")
def done():
    return learned()


@pytest.fixture(scope="module")
def probe():
    with torch.inference_mode():
        return backbone()(probe_images())


def block(width=8):
    made = SharedAttention(width).double()
    made.draw(torch.Generator().manual_seed(3))
    made.out.bias.data += 0.3
    return made


def dense(attention, images, shared):
    """Outputs of a sequence [image, shared tokens] per image, [B, 1 + M, d], from the definition."""
    tokens = torch.cat([images[:, None], shared.expand(len(images), -1, -1)], dim=1)
    q, k, v = (tokens @ w for w in (attention.query, attention.key, attention.value))
    mixed = (q @ k.transpose(1, 2) / math.sqrt(tokens.shape[2])).softmax(2) @ v
    return F.layer_norm(tokens + attention.out(mixed), tokens.shape[2:], attention.norm.weight, attention.norm.bias)


def test_attention_over_shared_tokens_is_one_sequence_per_image():
    attention, draw = block(), torch.Generator().manual_seed(0)
    images, shared = (3 * torch.randn(n, 8, generator=draw).double() for n in (5, 9))
    theirs = dense(attention, images, shared)
    image, others = attention(images, shared, 6)
    assert (image - theirs[:, 0]).abs().max() < 1e-12 and (others - theirs[:, 1:7]).abs().max() < 1e-12
    alone = attention(images[2:3], shared, 6)
    assert (alone[1][0] - others[2]).abs().max() < 1e-12  # an image's outputs depend on no other image
    assert attention(1e3 * images, 1e3 * shared, 6)[1].isfinite().all()  # no exponential overflows


def test_initial_weights_have_the_papers_variances():
    made = SharedAttention(200)
    made.draw(torch.Generator().manual_seed(0))
    for p in (made.query, made.value, made.out.weight):
        assert float(p.std() * math.sqrt(200)) == pytest.approx(1, abs=0.02)
    assert not bool(made.out.bias.any())


def test_scores_are_those_of_the_paper_and_of_each_image_alone(done, probe):
    f = done.text.project(probe)
    image = done.image_map(f)
    names = F.normalize(done.text_map(done.raw), dim=1)
    means = F.normalize(done.image_map(done.means), dim=1)
    outputs = dense(done.attention, F.normalize(image, dim=1), torch.cat([names, means, done.prompts]))
    by_text, by_mean = (torch.einsum("bd,bcd->bc", outputs[:, 0], outputs[:, a:b]) for a, b in ((1, 9), (9, 17)))
    expected = image @ names.T + by_text + by_mean
    found = done.logits(probe)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    alone = torch.cat([done.logits(row[None]) for row in probe])
    assert (alone - found).abs().max() < 1e-4 * expected.abs().max()


def test_class_means_are_of_normalised_features(done):
    task = stream(done.backbone).tasks[2]
    features, labels = context().features(done.backbone, task.train)
    rows = F.normalize(done.text.project(features), dim=1)
    for c in task.classes:
        assert (done.means[c] - rows[labels == c].mean(0)).abs().max() < 1e-6


def test_exemplars_are_herded_by_normalised_joint_features(done):
    task = stream(done.backbone).tasks[2]
    features, labels = context().features(done.backbone, task.train)
    rows = F.normalize(done.text.project(features), dim=1)
    for c in task.classes:
        own = (labels == c).nonzero().flatten()
        kept = done.exemplars[done.exemplars[:, 0] == c]
        assert kept[:, 2].tolist() == own[herding(rows[own], 2)].tolist() and kept[:, 1].unique().tolist() == [2]


def test_a_task_trains_on_its_images_and_the_exemplars(monkeypatch):
    seen = []

    def spy(loss, groups, data, *_, **__):
        seen.append(torch.bincount(data.labels, minlength=8).tolist())

    monkeypatch.setattr("cil.learners.proof.fit", spy)
    learned()
    assert seen == [[12, 12, 12, 12, 0, 0, 0, 0], [4, 4, 4, 4, 12, 0, 0, 0], [3, 3, 3, 3, 3, 1, 12, 12]]


def test_prompts_and_means_of_earlier_tasks_stay_bit_for_bit(done):
    one = learned(stages=1)
    assert torch.equal(done.prompts[:3], one.prompts) and len(done.prompts) == 9
    assert torch.equal(done.prototypes.sums[:4], one.prototypes.sums)
    assert not done.attention.query.equal(one.attention.query) and not done.log_scale.equal(one.log_scale)
    assert learned(stages=2, prompts=0).prompts.shape == (0, 48)
