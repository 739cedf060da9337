"""Degenerate data: no closed-form classifier does worse than the nearest mean in float64, and none gives NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow_beyond

from cil.classifiers import LDA, NCM, Gaussians, LinearHead, Mahalanobis, Ridge, TruncatedSVD
from cil.classifiers.base import Classifier
from cil.data.images import ImageSet
from cil.data.sources import from_arrays
from cil.data.transforms import Transforms
from cil.errors import TrainingError
from cil.learner import Context
from cil.learners.bases.alignment import AlignedRecipe, SampledFeatures, align, softmax_of
from cil.learners.registry import build_learner
from cil.results import curves
from cil.runner import run_stages
from cil.stream import ClassIncremental, Stream
from cil.training import ParamGroup
from cil.utils.hardware import accelerator
from cil.utils.linalg import shifted_cholesky, symmetric_inverse
from cil.utils.randomness import generator

Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Training features and labels, test features and labels."""

CLASSIFIERS = {
    "ncm": lambda f: NCM(f),
    "ncm euclidean": lambda f: NCM(f, "euclidean"),
    "slda": lambda f: LDA(f, priors="uniform"),
    "lda": lambda f: LDA(f),
    "lda, no shrinkage": lambda f: LDA(f, 0.0),
    "lda, two blocks": lambda f: LDA(f, blocks=2),
    "lda gcv": lambda f: LDA(f, "gcv"),
    "fecam": lambda f: Mahalanobis(f),
    "fecam, strongly shrunk": lambda f: Mahalanobis(f, (10, 10)),
    "fecam, tukey": lambda f: Mahalanobis(f, tukey=0.5),
    "fecam, no correlation": lambda f: Mahalanobis(f, normalize=False, correlation=False),
    "ridge": lambda f: Ridge(f, strength=1.0),
    "ridge loo": lambda f: Ridge(f, strength="loo"),
    "ranpac": lambda f: Ridge(f, 200),
    "ranpac loo": lambda f: Ridge(f, 200, "loo"),
    "ranpac gcv": lambda f: Ridge(f, 200, "gcv"),
    "ranpac cosine": lambda f: Ridge(f, 200, decision="cosine"),
    "loranpac": lambda f: TruncatedSVD(f, 200, rank=100),
}


def clusters(per_class=30, classes=6, width=12, without=()) -> Data:
    """Well separated classes whose features have different variances, float64; 20 test samples per class."""
    rng = np.random.RandomState(0)
    means, deviations = rng.randn(classes, width) * 1.5 + 0.3, 0.3 * np.exp(rng.randn(width) / 2)
    parts = []
    for count in (per_class, 20):
        labels = np.repeat([c for c in range(classes) if c not in without], count)
        parts += [means[labels] + rng.randn(len(labels), width) * deviations, labels]
    x, y, queries, answers = (torch.from_numpy(part) for part in parts)
    return x, y, queries, answers


def first(data: Data, count: int, classes=None) -> Data:
    """Only the first ``count`` samples of ``classes`` (None: of all)."""
    x, y, queries, answers = data
    chosen = [(y == c).nonzero().flatten() for c in y.unique().tolist()]
    kept = torch.cat([rows[: count if classes is None or int(y[rows[0]]) in classes else None] for rows in chosen])
    return x[kept], y[kept], queries, answers


def equal_images(data: Data, classes) -> Data:
    x, y, *test = data
    for c in classes:
        x[y == c] = x[y == c][0].clone()
    return x, y, *test


def mapped(data: Data, change) -> Data:
    x, y, queries, answers = data
    return change(x), y, change(queries), answers


def constant(x, value):
    x = x.clone()
    x[:, 3:7] = value
    return x


def informative_without_variance() -> Data:
    """Half of the features are the same for all images of a class and tell classes apart; the others are noise."""
    x, y, queries, answers = clusters()
    rng = np.random.RandomState(5)
    means = torch.from_numpy(rng.randn(6, 6) * 1.5)
    return (
        torch.cat([means[y], torch.from_numpy(rng.randn(len(x), 6))], 1),
        y,
        torch.cat([means[answers], torch.from_numpy(rng.randn(len(queries), 6))], 1),
        answers,
    )


def of_lengths(data: Data) -> Data:
    """Classes whose features have very different lengths."""
    x, y, queries, answers = data
    lengths = torch.tensor([1.0, 1, 3, 3, 8, 8], dtype=torch.float64)
    return x * lengths[y, None], y, queries * lengths[answers, None], answers


def zero_class(data: Data, c: int) -> Data:
    x, y, queries, answers = data
    return x * (y != c)[:, None], y, queries * (answers != c)[:, None], answers


SITUATIONS = {
    "one image per class": lambda: first(clusters(), 1),
    "one image per class, more dimensions": lambda: first(clusters(width=64), 1),
    "one image per class, lengths differ": lambda: of_lengths(first(clusters(), 1)),
    "one image of one class": lambda: first(clusters(), 1, [2]),
    "two images of some classes": lambda: first(clusters(), 2, [2, 3]),
    "two images per class": lambda: first(clusters(), 2),
    "fewer images than dimensions": lambda: first(clusters(width=64), 2),
    "identical images in all classes": lambda: equal_images(clusters(), range(6)),
    "identical images in one class": lambda: equal_images(clusters(), [2]),
    "an image and its copy": lambda: equal_images(first(clusters(), 2, [2]), [2]),
    "a class vanishes": lambda: clusters(without=(2,)),
    "first and last class vanish": lambda: clusters(without=(0, 5)),
    "one class only": lambda: clusters(classes=1),
    "constant features": lambda: mapped(clusters(), lambda x: constant(x, 5.1)),
    "features that are zero": lambda: mapped(clusters(), lambda x: constant(x, 0)),
    "informative features without variance": informative_without_variance,
    "duplicated features": lambda: mapped(clusters(), lambda x: torch.cat([x, x], 1)),
    "all features are zero": lambda: mapped(clusters(), torch.zeros_like),
    "one class has zero features": lambda: zero_class(clusters(), 2),
    "large half precision": lambda: mapped(clusters(), lambda x: (x * 1e4).half()),
}


def nearest_mean(data: Data, cosine: bool) -> float:
    """Accuracy of the nearest class mean in float64, by numpy."""
    x, y, queries, answers = (part.double().numpy() for part in data)
    classes = np.unique(y)
    means = np.stack([x[y == c].mean(0) for c in classes])
    if cosine:
        unit = [rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300) for rows in (queries, means)]
        scores = unit[0] @ unit[1].T
    else:
        scores = -np.linalg.norm(queries[:, None] - means, axis=2)
    return float((classes[scores.argmax(1)] == answers).mean())


def fit(make, data: Data, by_task: bool) -> Classifier:
    x, y = data[:2]
    classifier = make(x.shape[1])
    if isinstance(classifier, Ridge | TruncatedSVD):
        classifier.draw(generator(7))
    for t in range(0, int(y.max()) + 1, 2) if by_task else [0]:
        mine = (y >= t) & (y < t + 2) if by_task else torch.ones_like(y, dtype=torch.bool)
        classifier.grow(t + 2 if by_task else int(y.max()) + 1)
        if mine.any():
            classifier.partial_fit(x[mine], y[mine])
    return classifier


def is_no_worse(make, data: Data, by_task: bool, slack: float = 0.03) -> None:
    scores = fit(make, data, by_task).logits(data[2])
    assert scores[:, data[1].unique()].isfinite().all()
    accuracy = float((scores.argmax(1) == data[3]).double().mean())
    # a score without intercept knows directions only, a distance lengths as well: none has to know both
    assert accuracy >= min(nearest_mean(data, cosine=True), nearest_mean(data, cosine=False)) - slack


@pytest.mark.parametrize("make", CLASSIFIERS.values(), ids=CLASSIFIERS)
@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_no_worse_than_the_nearest_mean(make, situation):
    # strong shrinkage is towards one correlation between all features, which two images do not estimate
    slack = 0.1 if make is CLASSIFIERS["fecam, strongly shrunk"] else 0.05
    x, y, queries, answers = situation()
    is_no_worse(make, (x, y, queries, answers), by_task=True, slack=slack)
    is_no_worse(make, (x.float(), y, queries.float(), answers), by_task=False, slack=slack)


@pytest.mark.parametrize("make", CLASSIFIERS.values(), ids=CLASSIFIERS)
@pytest.mark.parametrize("scale", slow_beyond([1e-8, 1e8], [1e-8, 1e-6, 1e-4, 1e4, 1e6, 1e8]))
def test_features_of_any_length(make, scale):
    for data in (clusters(), first(clusters(), 1), first(clusters(width=40), 3)):
        x, y, queries, answers = mapped(data, lambda x: x * scale)
        is_no_worse(make, (x.float(), y, queries.float(), answers), by_task=True, slack=0.1)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    name=st.sampled_from(sorted(CLASSIFIERS)),
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any),
    width=st.integers(1, 10).map(lambda half: 2 * half),
    distinct=st.integers(1, 3),
    power=st.integers(-8, 8),
    zeros=st.booleans(),
)
def test_scores_are_numbers_whatever_the_counts_and_copies(name, counts, width, distinct, power, zeros):
    """Few images, copies of them and absent classes in any mixture: each seen class has a score."""
    rng = np.random.RandomState(len(counts) + width)
    labels = np.repeat(np.arange(len(counts)), counts)
    rows = rng.randn(len(counts), distinct, width)[labels, rng.randint(0, distinct, len(labels))] * 10.0**power
    if zeros:
        rows[:, : width // 2] = 0
    x, y = torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(labels)
    scores = fit(CLASSIFIERS[name], (x, y, x, y), by_task=False).logits(x)
    seen = y.unique()
    assert scores[:, seen].isfinite().all()
    assert set(scores.argmax(1).tolist()) <= set(seen.tolist())


# --- Gaussians and the heads trained on them ------------------------------------------------------------------------


def aligned_accuracy(data: Data, log=None) -> float:
    x, y, queries, answers = data
    gaussians = Gaussians(x.shape[1])
    gaussians.grow(int(y.max()) + 1)
    gaussians.partial_fit(x, y)
    length = float(x.norm(dim=1).mean())
    head = LinearHead(x.shape[1])
    head.grow(gaussians.num_classes, generator(1))
    recipe = AlignedRecipe(alignment_epochs=3, samples=64, alignment_lr=0.5)
    loss = softmax_of(lambda z: head(z / max(length, 1e-30) * 4))
    align(loss, ParamGroup(head.parameters()), gaussians, None, recipe, Context(log=log))
    return float((head(queries.float() / max(length, 1e-30) * 4).argmax(1) == answers).double().mean())


@pytest.mark.parametrize(
    "name",
    [
        "one image per class",
        "one image of one class",
        "two images of some classes",
        "identical images in all classes",
        "an image and its copy",
        "first and last class vanish",
        "constant features",
        "duplicated features",
    ],
)
@pytest.mark.parametrize("scale", slow_beyond([1.0], [1e-8, 1.0, 1e8]))
def test_a_head_aligned_on_degenerate_gaussians(name, scale):
    data = mapped(SITUATIONS[name](), lambda x: x * scale)
    assert aligned_accuracy(data) >= nearest_mean(data, cosine=True) - 0.05


def test_an_ordinary_factor_is_torchs_bit_for_bit():
    x, y, *_ = clusters()
    gaussians = Gaussians(12).partial_fit(x, y)
    for c in range(6):
        covariance = gaussians.covariance(c)
        covariance.diagonal().add_(1e-4)
        assert torch.equal(gaussians.factor(c), torch.linalg.cholesky(covariance))
    assert gaussians.raised == 1


@pytest.mark.parametrize("scale", [1e6, 1e8, 1e12])
def test_large_features_raise_the_ridge_and_say_so(scale, caplog):
    x, y, queries, answers = mapped(first(clusters(width=40), 5), lambda x: x * scale)
    logged = {}
    assert aligned_accuracy((x, y, queries, answers), lambda name, value: logged.update({name: value})) > 0.9
    assert logged["alignment_ridge_raised"] >= 10
    (line,) = [record.getMessage() for record in caplog.records]
    assert "ridge" in line and "scale the features down" in line and "\n" not in line


def test_a_class_of_equal_images_borrows_the_others_covariance():
    x, y, *_ = equal_images(clusters(), [2])
    gaussians = Gaussians(12).partial_fit(x, y)
    others = [np.cov(x[y == c].numpy().T) for c in (0, 1, 3, 4, 5)]
    expected = np.mean(others, 0) + 1e-4 * np.eye(12)
    factor = gaussians.factor(2).numpy()
    np.testing.assert_allclose(factor @ factor.T, expected, rtol=1e-9, atol=1e-12)


def test_a_class_without_images_is_not_sampled():
    x, y, *_ = clusters(without=(2,))
    gaussians = Gaussians(12).partial_fit(x, y)
    data = SampledFeatures(gaussians, per_class=4)
    labels = torch.cat([batch[1] for batch in data.batches(8, generator=generator(0), augment=False, device="cpu")])
    assert len(data) == 20 and labels.bincount().tolist() == [4, 4, 0, 4, 4, 4]


# --- linear algebra -------------------------------------------------------------------------------------------------


def test_a_singular_covariance_keeps_the_directions_without_variance():
    basis = torch.linalg.qr(torch.randn(5, 5, generator=generator(0), dtype=torch.float64)).Q
    matrix = basis @ torch.diag(torch.tensor([4.0, 1.0, 1e-14, 0, 0], dtype=torch.float64)) @ basis.T
    for missing, expected in ((None, 1.0), (0.5, 0.5)):
        variances = torch.tensor([4.0, 1.0, expected, expected, expected], dtype=torch.float64)
        torch.testing.assert_close(symmetric_inverse(matrix, missing), basis @ torch.diag(1 / variances) @ basis.T)
    assert torch.equal(symmetric_inverse(matrix * 0), torch.eye(5, dtype=torch.float64))


def test_a_matrix_that_is_not_finite_is_refused():
    with pytest.raises(TrainingError, match="too large"):
        shifted_cholesky(torch.full((3, 3), math.nan, dtype=torch.float64), 1.0)


def test_strengths_follow_the_features():
    """λ has the unit of G: scaling the features by s scales λ by s², and the predictions stay."""
    x, y, queries, _ = clusters()
    plain = Ridge(12, 50, strength="gcv").partial_fit(x, y)
    for scale in (1e-6, 1e7):
        scaled = Ridge(12, 50, strength="gcv").partial_fit(x * scale, y)
        assert torch.equal(scaled.logits(queries * scale).argmax(1), plain.logits(queries).argmax(1))


def test_one_sample_per_class_is_the_nearest_mean_by_cosine():
    x, y, queries, _ = of_lengths(first(clusters(), 1))
    expected = (F.normalize(queries, dim=1) @ F.normalize(x, dim=1).T).argmax(1)
    for make in (lambda: Ridge(12), lambda: TruncatedSVD(12)):
        assert torch.equal(make().partial_fit(x, y).logits(queries).argmax(1), expected)


# --- learners -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_class", [1, 3])
@pytest.mark.parametrize(
    "entry",
    [
        {"name": "ncm"},
        {"name": "slda"},
        {"name": "slda", "shrinkage": 0},
        {"name": "fecam"},
        {"name": "ranpac", "projection": 100},
        {"name": "ranpac", "projection": 100, "strength": "gcv"},
        {"name": "loranpac", "projection": 100},
    ],
    ids=str,
)
def test_learners_recognise_the_only_image_of_a_class(backbone, entry, per_class):
    pixels = np.random.RandomState(0).randint(0, 256, (6, 32, 32, 3)).astype(np.uint8)
    names = [f"class{c}" for c in range(6)]
    train, test = (
        ImageSet(
            from_arrays(np.repeat(pixels, copies, 0), np.repeat(np.arange(6), copies), names),
            Transforms(backbone.data_config),
        )
        for copies in (per_class, 1)
    )
    stream = Stream(train, test, ClassIncremental(order="natural", increment=2))
    rows = run_stages(build_learner(entry, backbone), stream, accelerator=accelerator("cpu"))
    assert curves(rows)["accuracy/seen"][-1] == 1
    assert all(math.isfinite(value) for row in rows for _, value in row["log"])
