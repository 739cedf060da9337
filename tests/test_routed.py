"""Runs joined by density: the joint posterior of Gaussians where runs are Gaussians, and what any runs become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import cil  # noqa: F401 - a fixture
from test_join import part, random_images, trained

from cil.classifiers.tied import TiedGaussians
from cil.errors import RunError, TrainingError
from cil.export import export, load
from cil.learner import Learner
from cil.prediction import open_run
from cil.reuse.joining import join
from cil.reuse.specification import FILE, unit_length

A, B = ["three", "one", "four"], ["five", "one"]


class Gda(Learner):
    """Answers with the densities that the routing uses, so that the whole is one Gaussian discriminant analysis."""

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.gaussians = TiedGaussians(backbone.feature_dim)

    def begin(self, task, ctx):
        super().begin(task, ctx)
        self.gaussians.grow(len(task.seen))

    def learn(self, task, ctx):
        features, labels = ctx.features(self, task.train)
        self.gaussians.partial_fit(unit_length(features), labels)

    def logits(self, features):
        return self.gaussians.logits(unit_length(features))


@pytest.fixture(scope="module")
def gda(tmp_path_factory) -> list[Path]:
    place, learner = tmp_path_factory.mktemp("gda"), {"class": "test_routed:Gda"}
    return [trained(place, A, learner, 0), trained(place, B, learner, 1)]


def test_routed_gaussians_are_the_joint_posterior(gda, tmp_path):
    """All classes at once: log π_c N(x; μ_c, Σ_run) of both runs, by numpy from the images; runs that share a class
    add its densities."""
    joint = join(gda, tmp_path / "joint", route=True)
    model = open_run(joint.folder)
    assert model.names == ("three", "one", "four", "five") and joint.shared == 1
    with torch.no_grad():
        found = model.learner.logits(model.learner.features(random_images()).double())
        u = unit_length(model.backbone(random_images())).numpy()
    total = np.zeros((7, 4))
    all_counts = 0
    for names, half in ((A, 0), (B, 1)):
        source = part("train", names, half)
        with torch.no_grad():
            pixels = torch.cat([_pixels(source.read(i), model.transforms) for i in range(len(source))])
            x, y = unit_length(model.backbone(pixels)).numpy(), source.labels
        means = np.stack([x[y == c].mean(0) for c in range(len(names))])
        within = (x - means[y]).T @ (x - means[y]) / len(x)
        within = 0.5 * within + 0.5 * np.trace(within) / len(within) * np.eye(len(within))
        _, volume = np.linalg.slogdet(2 * np.pi * within)
        for c, name in enumerate(names):
            d = u - means[c]
            log = -0.5 * (d * np.linalg.solve(within, d.T).T).sum(1) - 0.5 * volume
            total[:, model.names.index(name)] += (y == c).sum() * np.exp(log - 400)
        all_counts += len(x)
    expected = np.log(total / total.sum(1, keepdims=True))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3 if found.dtype == torch.float32 else 2e-4)
    parts = model.learner
    exact = torch.full((7, 4), -torch.inf, dtype=torch.float64)
    for one, density in zip(parts.config.parts, parts.gaussians, strict=True):
        rows = density.logits(u) + np.log(int(density.counts.sum()) / all_counts)
        exact[:, one.classes] = torch.logaddexp(exact[:, one.classes], rows)
    torch.testing.assert_close(found, exact.log_softmax(1), rtol=0, atol=1e-10)


def _pixels(image, transforms):
    return transforms.normalize(torch.from_numpy(np.asarray(transforms.evaluate(image)))[None])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> list[Path]:
    """A head trained by gradient descent, one on frozen and adapted features, and sums on adapted features."""
    place = tmp_path_factory.mktemp("mixed")
    return [
        trained(place, ["zero", "one"], {"name": "linear_probe", "epochs": 1}),
        trained(place, ["two", "three"], {"name": "aper", "epochs": 1}),
        trained(place, ["four", "five"], {"name": "slda", "tuner": "ssf", "epochs": 1}),
    ]


def test_any_learners_are_routed_predicted_with_and_exported(mixed, tmp_path, cil):  # noqa: F811
    """Each run's own logits, alone, stand behind the routed scores; the file formats give the same."""
    out = tmp_path / "joint"
    ended = cil("join", *mixed, "--out", out, "--route")
    assert ended.returncode == 0, ended.stderr
    assert "6 classes of 3 runs" in ended.stdout
    model, source = open_run(out), part("test", ["zero", "one", "two"])
    images = torch.cat([_pixels(source.read(i), model.transforms) for i in range(0, 35, 5)])
    with torch.no_grad():
        scores = model(images)[0].double()
        torch.testing.assert_close(scores.exp().sum(1), torch.ones(7, dtype=torch.float64), rtol=1e-5, atol=0)
        for i, folder in enumerate(mixed):
            learner = open_run(folder).learner
            features = learner.features(images)
            alone = (
                learner.logits(features if learner.statistics is None else features.double()).double().log_softmax(1)
            )
            mine = scores[:, 2 * i : 2 * i + 2]
            torch.testing.assert_close(mine - mine[:, :1], alone - alone[:, :1], rtol=0, atol=2e-3)
        one = torch.cat([model(image[None])[0] for image in images])
        torch.testing.assert_close(one.double(), scores, rtol=1e-3, atol=1e-2)
    folder = export(out)
    torch.testing.assert_close(load(folder)(images)[0].double(), scores, rtol=1e-5, atol=1e-4)
    assert (out / FILE).exists()
    with pytest.raises(TrainingError, match="learns nothing more"):
        model.learner.learn(None, None)


@pytest.mark.slow
def test_a_program_of_a_routed_run_is_the_run(mixed, tmp_path):
    joint = join(mixed, tmp_path / "joint", route=True)
    program, images = load(export(joint.folder, tmp_path / "program", "torch.export")), random_images()
    torch.testing.assert_close(program(images)[0], open_run(joint.folder)(images)[0], rtol=1e-3, atol=1e-2)


def test_routing_finds_the_run_of_an_image(mixed, tmp_path):
    """On test images the right run has the most probability, far more often than by chance."""
    joint = join(mixed, tmp_path / "joint", route=True)
    model, source = open_run(joint.folder), part("test", ["zero", "one", "two", "three", "four", "five"])
    with torch.no_grad():
        pixels = torch.cat([_pixels(source.read(i), model.transforms) for i in range(len(source))])
        chosen = model(pixels)[0].exp().reshape(-1, 3, 2).sum(2).argmax(1).numpy()
    assert (chosen == source.labels // 2).mean() > 0.6


def test_a_run_without_specification_and_images_is_refused(mixed, tmp_path):
    import shutil

    folder = tmp_path / "moved"
    shutil.copytree(mixed[0], folder)
    (folder / FILE).unlink(missing_ok=True)
    text = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(text.replace("test_join:part", "nowhere:part").replace('"checksum"', '"old"'))
    with pytest.raises(RunError, match=r"has no specification, and its training images cannot be read here"):
        join([folder, mixed[1]], tmp_path / "joint", route=True)
    assert not (tmp_path / "joint").exists()
