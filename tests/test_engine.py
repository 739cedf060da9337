"""ENGINE: its scores, losses and descriptors, each against loops in numpy, on synthetic text vectors."""

from __future__ import annotations

import json
import math
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cil.classifiers import LDA
from cil.classifiers.averaged import AveragedPrecision
from cil.errors import ConfigError, DataError
from cil.learners.bases.old_vectors import WithMeans
from cil.learners.engine import Engine
from cil.learners.registry import build_learner
from cil.prompts import Descriptors
from cil.runner import run_stages
from cil.testing.setting import NAMES, accelerator, backbone, context, probe_images, stream

FEW = {"name": "engine", "epochs": 2, "train_batch_size": 8, "lr": 0.01, "image_noise_views": 0}


def learned(stages=3, sizes=(4, 1, 3), **parameters):
    """A learner after the checks' stream."""
    learner = build_learner({**FEW, **parameters}, backbone())
    tasks = stream(learner.backbone, sizes=sizes)
    run_stages(learner, tasks, accelerator=accelerator(), batch_size=16, stop_after=stages)
    return learner


def written(path, names=NAMES):
    """A file with two texts for each pair of classes, and for each class with itself, as the authors' files have."""
    pairs = [*permutations(names, 2), *((name, name) for name in names)]
    content = {name: {} for name in names}
    for name, other in pairs:
        content[name][other] = [f"Larger legs than a {other}", f"no {other} stripes"]
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    return learned(descriptors=written(tmp_path_factory.mktemp("texts") / "pairs.json"))


@pytest.fixture(scope="module")
def probe():
    with torch.inference_mode():
        return backbone()(probe_images())


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_share_of_gaussians_alone_is_lda(probe):
    learner = learned(gaussians=1)
    parts = [context().features(learner.backbone, task.train) for task in stream(learner.backbone).tasks]
    features, labels = (torch.cat(both) for both in zip(*parts, strict=True))
    reference = LDA(48, "samples", "uniform").partial_fit(F.normalize(features, dim=1), labels)
    theirs = reference.logits(F.normalize(probe, dim=1))
    assert torch.equal(learner.logits(probe).argmax(1), theirs.argmax(1))
    assert (learner.logits(probe) - F.normalize(theirs, dim=1)).abs().max() < 1e-5


def test_identities_are_zero_shot(probe):
    learner = learned(stages=1, gaussians=0, rerank=0)
    for linear in (learner.image_map, learner.text_map):
        linear.weight.data.copy_(torch.eye(48))
        linear.bias.data.zero_()
    expected = learner.text.logits(probe) / learner.text.scale
    assert (learner.logits(probe) - expected).abs().max() < 1e-5


def test_scores_are_those_of_the_paper_and_of_each_image_alone(described, probe):
    learner = described
    f = learner.text.project(probe).numpy()
    (a, a0), (b, b0) = (
        (m.weight.detach().numpy(), m.bias.detach().numpy()) for m in (learner.image_map, learner.text_map)
    )
    z = unit(f @ a.T + a0) @ unit(learner.raw.numpy() @ b.T + b0).T
    side = learner.backbone.text
    expected = np.zeros_like(z)
    for i, row in enumerate(z):
        best = np.argsort(-row)[:5]
        for c in best:
            told = []
            for other in best:
                if other != c:
                    texts = [
                        f"{NAMES[c]} with larger legs than a {NAMES[other]}",
                        f"{NAMES[c]} with no {NAMES[other]} stripes",
                    ]
                    told.append(unit(side.encode(texts).numpy()).mean(0))
            expected[i, c] = unit(f[i]) @ unit(np.mean(told, axis=0))
    joint = learner.text.project(probe)
    assert np.abs(learner.reranked(joint, torch.from_numpy(z)).numpy() - expected).max() < 1e-5
    g = F.normalize(learner.classifier.logits(F.normalize(probe, dim=1)), dim=1).numpy()
    whole = learner.logits(probe).detach()
    assert np.abs(whole.numpy() - (0.8 * g + 0.2 * (0.5 * expected + 0.5 * z))).max() < 1e-4
    alone = torch.cat([learner.logits(row[None]) for row in probe])
    assert (whole - alone).abs().max() < 1e-5


def test_descriptors_of_classes_to_come_change_nothing(tmp_path):
    whole = learned(stages=2, descriptors=written(tmp_path / "all.json"))
    seen = learned(stages=2, descriptors=written(tmp_path / "seen.json", NAMES[:5]))
    theirs = seen.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in whole.state_dict().items())
    with pytest.raises(ConfigError, match=r"seen.json has no entry for the class 'ant' against 'fox'; add a list"):
        learned(stages=3, descriptors=str(tmp_path / "seen.json"))
    (tmp_path / "lists.yaml").write_text("ant: [legs]\nbee: [wings]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="the class 'ant' against 'bee'"):
        Descriptors(file=tmp_path / "lists.yaml").contrasts([("ant", "bee")])


def test_a_single_class_has_no_rivals(tmp_path, probe):
    learner = learned(stages=1, sizes=(1, 7), gaussians=0, descriptors=written(tmp_path / "all.json"))
    joint = learner.text.project(probe)
    z = torch.ones(len(probe), 1)
    assert learner.reranked(joint, z) is z and bool(learner.logits(probe).isfinite().all())


def test_published_gaussians_are_the_authors_recursion():
    rng = np.random.RandomState(0)
    labels = np.repeat(np.arange(5), 9)
    x = unit(rng.normal(size=(5, 6))[labels] + 0.4 * rng.normal(size=(45, 6)) * np.linspace(0.2, 1, 6))
    made, precision, means = AveragedPrecision(6), None, np.zeros((0, 6))
    for known, total in ((0, 2), (2, 3), (3, 5)):
        own = (labels >= known) & (labels < total)
        made.partial_fit(x[own], labels[own])
        new = np.stack([x[labels == c].mean(0) for c in range(known, total)])
        rest = x[own] - new[labels[own] - known]
        covariance, count = np.cov(rest.T), own.sum()
        inverse = 6 * np.linalg.pinv((count - 1) * covariance + np.trace(covariance) * np.eye(6))
        if precision is None:
            precision = inverse
            lda = LDA(6, "samples", "uniform").partial_fit(x[own], labels[own])
            assert torch.equal(made.logits(x).argmax(1), lda.logits(x).argmax(1))  # one task alone is exact
        else:
            apart = (means.mean(0) - new.mean(0))[:, None]
            share, added = known / total, (total - known) / total
            precision = share * precision + added * inverse + share * added / total**2 * apart @ apart.T * total
        means = np.concatenate([means, new])
    expected = x @ precision @ means.T - np.einsum("cf,fg,cg->c", means, precision, means) / 2 - math.log(5)
    np.testing.assert_allclose(made.logits(x).numpy(), expected, atol=1e-8)
    with pytest.raises(DataError, match="class 1 has samples already"):
        made.partial_fit(x[labels == 1], labels[labels == 1])
    learner = learned(gaussians=1, published=True)
    assert isinstance(learner.classifier, AveragedPrecision) and learner.classifier.counts.tolist()[5] == 1


def test_weights_come_from_images_that_neither_maps_nor_gaussians_know(tmp_path, monkeypatch, probe):
    trained, scored = [], []
    train, parts = Engine._trained, Engine._parts

    def spy(self, joint, labels, *rest):
        trained.append(len(labels))
        return train(self, joint, labels, *rest)

    def listen(self, features, image_map, text_map, classifier):
        scored.append((len(features), int(classifier.counts.sum()), image_map is self.image_map))
        return parts(self, features, image_map, text_map, classifier)

    monkeypatch.setattr(Engine, "_trained", spy)
    monkeypatch.setattr(Engine, "_parts", listen)
    learner = learned(stages=2, weight="each_task", descriptors=written(tmp_path / "pairs.json"))
    first, second = trained[:6], trained[6:]
    assert first[-1] == 48 and sum(48 - n for n in first[:-1]) == 48 and len(first) == 6
    assert second[-1] == 12 and sum(12 - n for n in second[:-1]) == 12
    held_out = [each for each in scored if not each[2]]
    assert [n + known for n, known, _ in held_out] == [48] * 5 + [60] * 5  # statistics of the others, and of old tasks
    assert bool((learner.weights >= 0).all()) and bool(learner.weights.any())
    g, r, z = parts(learner, probe, learner.image_map, learner.text_map, learner.classifier)
    a, b, c = learner.weights.tolist()
    assert (learner.logits(probe) - (a * g + b * r + c * z)).abs().max() < 1e-5
    monkeypatch.undo()
    alone = learned(stages=1, sizes=(1, 7), weight="each_task")  # a single class has nothing to weigh
    assert alone.weights.tolist() == pytest.approx([0.8, 0.1, 0.1])


def test_the_loss_is_that_of_the_paper(described):
    rng = np.random.RandomState(0)
    image, names, texts, views = (unit(rng.normal(size=(5, 48))) for _ in range(4))
    views[3:] = np.nan  # two rows are means of old classes

    def entropy(scores):
        return np.mean([math.log(np.exp(row).sum()) - row[i] for i, row in enumerate(scores)])

    temperature = math.log(100)  # the logarithm of CLIP's scale, as in the authors' code
    pairs = temperature * image @ names.T
    expected = (entropy(pairs) + entropy(pairs.T)) / 2 + 2 * entropy(names @ texts.T)
    expected += 0.5 * entropy(image[:3] @ views[:3].T)
    found = described._loss(*(torch.from_numpy(one) for one in (image, names, texts, views)))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_steps_hold_one_noisy_mean_of_every_old_class():
    joint, labels = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 3, 2, 3, 2, 2, 3])
    means, views = torch.tensor([[9.0, 0, 0], [0, 9, 0]]), torch.stack([joint + 100, joint + 200])
    texts = [torch.full((n, 3), float(c)) + torch.arange(n)[:, None] / 10 for c, n in enumerate((1, 2, 3, 4))]
    data = WithMeans(joint, labels, means, 0.1, texts, views, size=4)
    draw = torch.Generator().manual_seed(1)
    steps = list(data.batches(99, generator=draw))
    assert [len(step[-1]) for step in steps] == [6, 5] and len(data) == 11
    for rows, sentences, seen, own in steps:
        assert own[-2:].tolist() == [0, 1] and (rows[-2:] - means).abs().max() < 0.5 and bool(seen[-2:].isnan().all())
        assert torch.equal(sentences[:, 0].floor().long(), own)
        away = (seen[:-2] - rows[:-2])[:, 0].round()
        assert set(away.tolist()) <= {100, 200}
    assert torch.cat([step[0][:-2] for step in steps]).sum().item() == pytest.approx(joint.sum().item(), abs=1e-5)
    halves = [list(data.batches(99, generator=torch.Generator().manual_seed(1), part=(r, 2))) for r in (0, 1)]
    for whole, one, two in zip(steps, *halves, strict=True):
        assert torch.equal(whole[0][::2], one[0]) and torch.equal(whole[0][1::2], two[0])


def test_a_task_adds_its_maps_to_earlier_ones(monkeypatch):
    """Without training the sum grows by a map in ±1/√d; so earlier maps are frozen, and none starts at zero."""
    monkeypatch.setattr("cil.learners.engine.fit", lambda *_, **__: None)
    one, two = learned(stages=1), learned(stages=2)
    added = two.image_map.weight - one.image_map.weight
    assert 0.9 / math.sqrt(48) < added.abs().max() < 1 / math.sqrt(48) + 1e-6
    assert one.image_map.weight.abs().max() <= 1 / math.sqrt(48) and not one.image_map.weight.equal(one.text_map.weight)


def test_noisy_views_are_cut_as_in_their_code():
    learner = build_learner({**FEW, "image_noise_views": 2}, backbone())
    task = stream(learner.backbone).tasks[0]
    views = learner._noisy_views(task, context())
    assert views.shape == (2, len(task.train), 48) and not torch.equal(views[0], views[1])
    draw = context().generator
    images, _ = next(task.train.batches(8))
    noisy = (images + 0.25 * torch.randn(images.shape, generator=draw)).clamp(0, 1)
    expected = learner.text.project(learner.backbone(noisy))
    assert (views[0, :8] - expected).abs().max() < 1e-5
