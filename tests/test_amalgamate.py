"""amalgamate: what teachers ask of a student, in closed form, and a student that is one backbone afterwards."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from test_ensembles import batch, copies, images_for, pair, several, stream_for
from test_runner import stable

from cil import Context, build_learner
from cil.classifiers.drift import read_out, ridge_map
from cil.classifiers.joined import Joined
from cil.classifiers.leave_one_out import fixed_point, thin_svd
from cil.config import TransformConfig
from cil.data.images import ImageSet
from cil.data.transforms import Transforms
from cil.errors import ConfigError, DataError
from cil.learners.bases.teachers import Teachers
from cil.prediction import open_run
from cil.results import read_run
from cil.runner import run, run_stages
from cil.stream import ClassIncremental, Stream
from cil.testing.setting import accelerator

QUICK = {"name": "amalgamate", "epochs": 2, "train_batch_size": 8, "lr": 0.05}


def taught(backbone, targets="features", **more):
    """A learner before its first task, its teachers, and images of the task as the backbones take them."""
    learner, stream = build_learner({**QUICK, "targets": targets, **more}, backbone), stream_for(backbone, 3)
    task, ctx = stream.tasks[0], Context(accelerator())
    learner.begin(task, ctx)
    learner.eval()
    images = next(iter(task.train.batches(99)))[0]
    return learner, Teachers(learner, learner.tuner, targets, 0.05, task, ctx), images


@pytest.mark.parametrize("targets", ["features", "relations", "logme"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(targets):
    learner, teachers, images = taught(copies(2), targets)
    [see] = learner.views().values()
    learner.tuner.requires_grad_(True)
    value = teachers.term(see(images), images)
    value.backward()
    assert float(value.detach()) < 1e-9
    assert max(float(p.grad.abs().max()) for p in learner.tuner.parameters()) < 1e-4
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in learner.tuner.parameters():
            p.normal_(generator=generator)
        assert float(teachers.term(see(images), images)) > 1e-3


def test_maps_scales_and_weights_are_those_of_the_images_of_the_task():
    """Three teachers, two of the student's width; by numpy and by the parts that ensembles use."""
    members = [*pair().members, *copies(1).members, *pair().members[1:]]
    backbone = type(pair())(members, pair(weights="loo").combine)
    learner, teachers, images = taught(backbone)
    task = stream_for(backbone, 3).tasks[0]
    images, labels = next(iter(task.train.batches(99)))
    with torch.inference_mode():
        raw = [member(backbone.cut(images, k)).double().numpy() for k, member in enumerate(members)]
    x, *z = [features / np.sqrt(np.mean(features**2)) for features in raw]
    ones = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    gram = ones.T @ ones
    gamma = 0.05 * np.trace(gram) / len(gram)
    for k, (found, target) in enumerate(zip(teachers.maps, z, strict=True)):
        same, shape = target.shape == x.shape, (target.shape[1], len(gram))
        start = np.eye(*shape) if same else np.zeros(shape)
        solved = np.linalg.solve(gram + gamma * np.eye(len(gram)), ones.T @ target + gamma * start.T).T
        np.testing.assert_allclose(found.matrix.numpy(), solved[:, :-1], atol=1e-5, err_msg=str(k))
        np.testing.assert_allclose(found.offset.numpy(), solved[:, -1], atol=1e-5)
    stacked = torch.from_numpy(np.concatenate(raw[1:], axis=1)).float()
    expected = Joined(backbone.widths[1:], "rms", "loo").fit(stacked, labels).weights
    torch.testing.assert_close(teachers.weights, expected)
    [see] = learner.views().values()
    with torch.inference_mode():
        value = float(teachers.term(see(images), images))
    distances = [
        np.mean((x @ one.matrix.numpy().T + one.offset.numpy() - target) ** 2)
        for one, target in zip(teachers.maps, z, strict=True)
    ]
    assert value == pytest.approx(float(expected.numpy() @ distances), rel=1e-4)


def test_scores_of_maps_with_most_evidence_are_mixed():
    """B-Tuning by numpy, given the ratios α/β of the fixed point that LogME's own tests check."""
    backbone = pair(weights="logme")
    _, teachers, images = taught(backbone, "logme")
    task = stream_for(backbone, 3).tasks[0]
    images, labels = next(iter(task.train.batches(99)))
    with torch.inference_mode():
        raw = [member(backbone.cut(images, k)).double().numpy() for k, member in enumerate(backbone.members)]
    scaled = [features / np.sqrt(np.mean(features**2)) for features in raw]
    targets, scores = np.eye(3)[labels], []
    for x, found in zip(scaled, teachers.maps, strict=True):
        alpha, beta = fixed_point(*thin_svd(torch.from_numpy(x)), torch.from_numpy(targets))
        pairs = zip((alpha / beta).tolist(), targets.T, strict=True)
        rows = [np.linalg.solve(x.T @ x + ratio * np.eye(x.shape[1]), x.T @ target) for ratio, target in pairs]
        np.testing.assert_allclose(found.matrix.numpy(), rows, atol=1e-5)
        scores.append(x @ np.array(rows).T)
    with torch.inference_mode():
        value = float(teachers.term(torch.from_numpy(raw[0]).float(), images))
    assert teachers.weights.tolist() == [1.0] and value == pytest.approx(
        np.mean((scores[0] - scores[1]) ** 2), rel=1e-3
    )


def test_a_map_between_widths_is_ridge_regression_and_else_the_map_of_drift():
    rng = np.random.RandomState(0)
    x, y = torch.from_numpy(rng.randn(30, 4)), torch.from_numpy(rng.randn(30, 7))
    same, own = read_out(x, x + 0.1 * y[:, :4]), ridge_map(x, x + 0.1 * y[:, :4])
    assert torch.equal(same.matrix, own.matrix) and torch.equal(same.offset, own.offset)
    ones = np.concatenate([x.numpy(), np.ones((30, 1))], axis=1)
    gamma = 0.2 * np.trace(ones.T @ ones) / 5
    expected = np.linalg.solve(ones.T @ ones + gamma * np.eye(5), ones.T @ y.numpy()).T
    found = read_out(x, y, 0.2)
    np.testing.assert_allclose(np.c_[found.matrix.numpy(), found.offset.numpy()], expected, atol=1e-12)
    np.testing.assert_allclose(found(x).numpy(), ones @ expected.T, atol=1e-12)
    with pytest.raises(DataError, match="the same images before and after"):
        read_out(x, y[:20])


def test_without_weight_it_is_slda_with_a_tuner_on_the_first_backbone():
    both = pair()
    ours = build_learner({**QUICK, "gamma": 0, "tuner": "vqt"}, both)
    run_stages(ours, stream_for(both), accelerator=accelerator(), stop_after=2)
    member, more = both.members[0], {key: value for key, value in QUICK.items() if key != "name"}
    alone = build_learner({"name": "slda", "shrinkage": "gcv", "tuner": "vqt", **more}, member)
    sets = [
        ImageSet(images_for(both, each=each, seed=seed).source, Transforms(member.data_config))
        for each, seed in ((8, 0), (4, 1))
    ]
    run_stages(alone, Stream(*sets, ClassIncremental(3, increment=2)), accelerator=accelerator(), stop_after=2)
    assert ours.state_dict().keys() == alone.state_dict().keys()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[key], atol=1e-6, rtol=1e-5)
    images = batch(images_for(both, each=4, seed=1))
    assert torch.equal(ours.predict(images), alone.predict(both.cut(images, 0)))


@pytest.mark.parametrize("targets", ["features", "relations", "logme"])
def test_one_step_follows_the_gradient_of_the_term(targets):
    """SGD at a constant rate, one step of all images: γ adds −lr · γ · ∇ term, with the maps of the start."""
    more = {"tuner": "ssf", "epochs": 1, "train_batch_size": 99, "schedule": "constant", "targets": targets}
    plain, steps = TransformConfig(augment="none"), {}
    for gamma in (0.0, 1.0, 2.0):
        both = pair()
        stream = Stream(*(images_for(both, transform=plain) for _ in range(2)), ClassIncremental(3, increment=3))
        learner = build_learner({**QUICK, **more, "gamma": gamma}, both)
        run_stages(learner, stream, accelerator=accelerator(), stop_after=1)
        steps[gamma] = torch.cat([p.detach().flatten() for p in learner.tuner.parameters()])
    learner, teachers, images = taught(pair(), **{key: more[key] for key in ("tuner", "targets")})
    [see] = learner.views().values()
    learner.tuner.requires_grad_(True)
    parameters = list(learner.tuner.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(teachers.term(see(images), images), parameters)])
    assert gradient.abs().max() > 1e-3
    for gamma in (1.0, 2.0):
        torch.testing.assert_close(steps[gamma] - steps[0.0], -0.05 * gamma * gradient, atol=2e-6, rtol=2e-3)


def test_later_images_take_one_pass():
    both = pair()
    learner = build_learner({**QUICK, "epochs": 3, "head": "ridge"}, both)
    first, later = (row["costs"] for row in run_stages(learner, stream_for(both, 3), accelerator=accelerator()))
    assert later["train_passes"] == 24 and later["test_passes"] == 12  # 3 new classes of 8 training and 4 test images
    # student and teacher in 3 epochs, the student at the start and before each, the teacher once, the student's sums
    assert first["train_passes"] == 24 * (3 * 2 + 1 + 3 + 1 + 1)
    assert not [key for key in learner.state_dict() if "joined" in key or "teacher" in key]


@pytest.mark.slow
def test_micro_batches_take_the_same_steps():
    found = []
    for size in (None, 3):
        both = pair()
        learner = build_learner({**QUICK, "micro_batch_size": size, "tuner": "ssf"}, both)
        run_stages(learner, stream_for(both, 3), accelerator=accelerator(), stop_after=1)
        found.append([p.detach() for p in learner.tuner.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"micro_batch_size: 4; gamma compares all images of a step"):
        build_learner({**QUICK, "targets": "relations", "micro_batch_size": 4}, pair())
    with pytest.raises(ConfigError, match=r"combine\.weights: those of the backbones after the first"):
        taught(pair(weights=[1, 0]))


@pytest.mark.slow
def test_a_run_resumes_and_predicts_with_one_pass(tmp_path):
    config = several(data={"per_class": 8}, learners=[{**QUICK, "targets": "relations"}])
    [folder] = run(config, tmp_path)
    whole, state = stable(read_run(folder)), (folder / "stage-02/learner.safetensors").read_bytes()
    for stage in (2, 1):
        shutil.rmtree(folder / f"stage-0{stage}")
    run(config, tmp_path)
    assert stable(read_run(folder)) == whole and (folder / "stage-02/learner.safetensors").read_bytes() == state
    assert whole["summary"]["passes_per_test_image"] == 1
    model = open_run(folder)
    images = batch(images_for(model.backbone))
    assert [member.passes for member in model.backbone.members] == [0, 0]
    assert bool(model.learner.logits(model.learner.features(images)).isfinite().all())
    assert [member.passes for member in model.backbone.members] == [len(images), 0]
