"""Features selected from sums: the classifier is that of the selected columns of all data, whatever came when."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_selection import f_classif
from sklearn.linear_model import Ridge as SklearnRidge

from cil.classifiers import LDA, Ridge
from cil.classifiers.selection import Selection
from cil.config.reading import validated
from cil.errors import ConfigError
from cil.learners import registry
from cil.testing import Case, parametrize_learner
from cil.utils.randomness import generator

WIDTH, CLASSES = 12, 6
TASKS = ([0, 3], [5, 1], [2, 4])


def drawn(n=300, seed=0):
    """Features of different scales and worth, one of them constant, and labels; float64."""
    rng = np.random.RandomState(seed)
    labels = np.concatenate([np.repeat(np.arange(CLASSES), 2), rng.randint(0, CLASSES, n - 2 * CLASSES)])
    worth, scale = rng.uniform(0, 2, WIDTH), 10.0 ** rng.uniform(-2, 2, WIDTH)
    x = ((rng.randn(CLASSES, WIDTH) * worth)[labels] + rng.randn(n, WIDTH) + 0.3) * scale
    x[:, 4] = 1.0
    return torch.from_numpy(x), torch.from_numpy(labels)


def in_tasks(make, x, y, tasks=TASKS):
    """The classifier after the tasks, with its solution asked for in between."""
    classifier = make()
    for task in tasks:
        rows = torch.isin(y, torch.tensor(task))
        classifier.partial_fit(x[rows], y[rows]).logits(x[:2])
    return classifier


def best(scores, count):
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def test_ridge_is_scikit_learns_on_the_columns_that_count():
    x, y = drawn()
    one_hot = np.eye(CLASSES)[y.numpy()]

    def fit(columns):
        return SklearnRidge(alpha=0.7, fit_intercept=False, solver="cholesky").fit(x.numpy()[:, columns], one_hot)

    scores = (x.numpy() ** 2).sum(0) * (fit(range(WIDTH)).coef_ ** 2).sum(0)
    columns = best(scores, 5)
    ours = in_tasks(lambda: Ridge(WIDTH, strength=0.7, select=Selection(0.4)), x, y)
    np.testing.assert_array_equal(ours.selected.numpy(), columns)
    expected = fit(columns)
    np.testing.assert_allclose(ours.logits(x).numpy(), expected.predict(x.numpy()[:, columns]), atol=1e-9)
    np.testing.assert_allclose(ours.weights.numpy()[columns], expected.coef_.T, atol=1e-9)
    assert ours.weights.any(dim=1).sum() == 5


@pytest.mark.filterwarnings("ignore:Features .4. are constant")
def test_the_f_score_is_scikit_learns():
    x, y = drawn()
    with np.errstate(all="ignore"):
        ranks = np.nan_to_num(f_classif(x.numpy(), y.numpy())[0])
    for make in (lambda s: Ridge(WIDTH, strength=0.7, select=s), lambda s: LDA(WIDTH, 0.1, select=s)):
        for count in (1, 4, 11):
            classifier = in_tasks(lambda: make(Selection(count / WIDTH, "f")), x, y)  # noqa: B023 - called at once
            np.testing.assert_array_equal(classifier.selected.numpy(), best(ranks, count))
    assert 4 not in best(ranks, 11)


@pytest.mark.parametrize("score", ["ridge", "f"])
def test_lda_is_scikit_learns_on_the_columns_that_count(score):
    x, y = drawn()
    ours = in_tasks(lambda: LDA(WIDTH, 0.2, select=Selection(0.5, score)), x, y)
    columns = ours.selected.numpy()
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2).fit(x.numpy()[:, columns], y.numpy())
    expected = theirs.decision_function(x.numpy()[:, columns])
    np.testing.assert_allclose(ours.logits(x).numpy(), expected, rtol=1e-7, atol=1e-7)
    if score == "ridge":
        whole = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2).fit(x.numpy(), y.numpy())
        within = sum(((x[y == c] - x[y == c].mean(0)) ** 2).sum(0) for c in range(CLASSES)).numpy() / len(x)
        weights = whole.coef_ - whole.coef_.mean(0)
        np.testing.assert_array_equal(columns, best(within * (weights**2).sum(0), 6))


MADE = {
    "projected": lambda: Ridge(WIDTH, 50, "gcv", select=Selection(0.3)).draw(generator(3)),
    "cosine": lambda: Ridge(WIDTH, 50, 2.0, "cosine", select=Selection(0.3, "f")).draw(generator(3)),
    "balanced": lambda: Ridge(WIDTH, strength="gcv", balance=True, select=Selection(0.5)),
    "gcv": lambda: LDA(WIDTH, "gcv", "uniform", select=Selection(0.5)),
    "parts": lambda: LDA(WIDTH, "gcv", blocks=[3, 1, 8], balance=True, select=Selection(0.5, "f")),
}


@pytest.mark.parametrize("kind", MADE)
def test_the_order_of_tasks_changes_nothing(kind):
    x, y = drawn()
    joint = in_tasks(MADE[kind], x, y, [range(CLASSES)])
    for tasks in (TASKS, TASKS[::-1], [[c] for c in (4, 2, 0, 1, 5, 3)]):
        other = in_tasks(MADE[kind], x, y, tasks)
        assert torch.equal(other.selected, joint.selected)
        torch.testing.assert_close(other.logits(x), joint.logits(x), atol=1e-8, rtol=1e-8)
    assert len(in_tasks(MADE[kind], x, y, TASKS[:1]).selected) == len(joint.selected)


@pytest.mark.parametrize("kind", MADE)
def test_it_is_the_classifier_of_the_selected_columns(kind):
    """A classifier without selection, on these columns of all data; a ridge keeps the λ of all columns."""
    x, y = drawn()
    ours = in_tasks(MADE[kind], x, y)
    columns = ours.selected
    if isinstance(ours, LDA):
        ends = np.searchsorted(columns.numpy(), [0, 3, 4, 12]) if kind == "parts" else [0, len(columns)]
        blocks = [int(width) for width in np.diff(ends) if width]
        plain = LDA(len(columns), "gcv", ours.priors, blocks, ours.balance)
        h = x[:, columns]
    else:
        plain = Ridge(len(columns), None, float(ours.strength_), ours.decision, ours.balance)
        h = (x if ours.projection is None else (x @ ours.projection.double()).relu())[:, columns]
    torch.testing.assert_close(plain.partial_fit(h, y).logits(h), ours.logits(x), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("make", [lambda s: Ridge(WIDTH, 50, select=s), lambda s: LDA(WIDTH, "gcv", select=s)])
def test_all_features_are_no_selection_bit_for_bit(make):
    x, y = drawn()
    whole, plain = (make(select).partial_fit(x, y) for select in (Selection(1.0), None))
    assert whole.selected is None and torch.equal(whole.logits(x), plain.logits(x))


def test_single_samples_and_equal_samples_choose_nothing():
    x, y = drawn()
    single = torch.stack([x[y == c][0] for c in range(CLASSES)])
    for classifier in (Ridge(WIDTH, select=Selection(0.3)), LDA(WIDTH, select=Selection(0.3, "f"))):
        classifier.partial_fit(single, torch.arange(CLASSES))
        assert classifier.selected is None
        assert torch.equal(classifier.logits(single).argmax(1), torch.arange(CLASSES))


def test_a_selection_out_of_range_is_refused():
    for values, message in (((0.0,), "fraction is 0.0; it must be above 0"), ((0.5, "t"), "score is 't'; it must be")):
        with pytest.raises(ConfigError, match=message):
            Selection(*values)
    with pytest.raises(ConfigError, match=r"select\.fraction.*less than or equal to 1"):
        validated(registry.resolve("slda").Config, {"select": 1.5})


def test_the_learners_pass_it_on():
    for name, more in (("ranpac", {"projection": 40}), ("ds_al", {"projection": 40}), ("slda", {})):
        learner = Case(registry.resolve(name), {"select": 0.25, **more}).learner()
        assert learner.classifier.select == Selection(0.25)


@pytest.mark.slow
@parametrize_learner(
    [("ranpac", {"projection": 60, "select": 0.25}), ("slda", {"select": {"fraction": 0.5, "score": "f"}})]
)
def test_common_checks(case, check):
    check(case)
