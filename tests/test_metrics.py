"""Metrics against a case worked by hand, Avalanche, scikit-learn, and what other toolboxes print."""

from __future__ import annotations

import numpy as np
import pytest

from cil import metrics

NAN = np.nan
R = np.array([[0.9, NAN, NAN], [0.5, 0.8, NAN], [0.6, 0.9, 0.7]])
TOTAL = np.array([10, 20, 10])


def test_by_hand():
    np.testing.assert_allclose(metrics.seen_accuracy(R, TOTAL), [0.9, (5 + 16) / 30, (6 + 18 + 7) / 40])
    np.testing.assert_allclose(metrics.task_mean_accuracy(R), [0.9, 0.65, 2.2 / 3])
    assert metrics.average_accuracy(np.array([0.9, 0.7, 0.775])) == pytest.approx(2.375 / 3)
    np.testing.assert_allclose(metrics.new_accuracy(R), [0.9, 0.8, 0.7])
    np.testing.assert_allclose(metrics.old_accuracy(R, TOTAL), [NAN, 0.5, (6 + 18) / 30])
    # task 0: best earlier stage 0.9, now 0.6; task 1: best *earlier* 0.8, now 0.9 → −0.1
    np.testing.assert_allclose(metrics.forgetting_by_task(R), [0.3, -0.1])
    assert metrics.forgetting(R) == pytest.approx(0.1)
    assert metrics.forgetting_clipped(R) == pytest.approx(0.15)
    assert metrics.backward_transfer(R) == pytest.approx((-0.3 + 0.1) / 2)
    assert metrics.learning_accuracy(R) == pytest.approx(0.8)


def test_undefined_is_nan_and_nothing_is_mutated():
    before = R.copy()
    assert np.isnan(metrics.forgetting(R, 0)) and np.isnan(metrics.backward_transfer(R, 0))
    assert np.isnan(metrics.forgetting_clipped(R, 0))
    metrics.summary(R, R, TOTAL)
    np.testing.assert_array_equal(R, before)


def test_identity_of_last_mean_learning_accuracy_and_transfer():
    r = np.tril(np.random.RandomState(0).rand(6, 6)) + np.triu(np.full((6, 6), NAN), 1)
    expected = metrics.learning_accuracy(r) + 5 / 6 * metrics.backward_transfer(r)
    assert metrics.task_mean_accuracy(r)[-1] == pytest.approx(expected)


def test_matrix_from_counts():
    correct = np.array([[9, 0], [5, 16]])
    np.testing.assert_allclose(metrics.accuracy_matrix(correct, np.array([10, 20])), [[0.9, NAN], [0.5, 0.8]])


def test_confusion_and_class_mean_against_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix

    rng = np.random.RandomState(0)
    labels, predicted = rng.randint(0, 6, 300), rng.randint(0, 6, 300)
    ours = metrics.confusion_matrix(labels, predicted, 6)
    np.testing.assert_array_equal(ours, confusion_matrix(labels, predicted, labels=range(6)))
    assert metrics.class_mean_accuracy(ours) == pytest.approx(balanced_accuracy_score(labels, predicted))


def _zero_padded(r):
    return np.nan_to_num(r, nan=0.0)


# What each toolbox's code computes, restated on the same matrix (r[i, j]: task j after stage i).
TOOLBOXES = {
    # PyCIL / LAMDA-PILOT trainer: table transposed and zero-padded, max over all stages, mean over tasks but the last
    "lamda_pilot": lambda r: float(
        np.mean((np.max(_zero_padded(r).T, axis=1) - _zero_padded(r).T[:, -1])[: len(r) - 1])
    ),
    # Mammoth metrics.forgetting: zero-padded rows, max over stages, the last included
    "mammoth": lambda r: float(np.mean([_zero_padded(r).max(0)[i] - r[-1, i] for i in range(len(r) - 1)])),
    # L2P and DualPrompt: the same expression as PyCIL's
    "l2p": lambda r: float(np.mean((np.max(_zero_padded(r).T, axis=1) - _zero_padded(r).T[:, -1])[: len(r) - 1])),
    # FACIL: maximum over earlier stages (zero where a task was not there yet), mean over earlier tasks
    "facil": lambda r: float(np.mean([_zero_padded(r)[: len(r) - 1, u].max() - r[-1, u] for u in range(len(r) - 1)])),
}
OURS = {
    "lamda_pilot": "forgetting_clipped",
    "mammoth": "forgetting_clipped",
    "l2p": "forgetting_clipped",
    "facil": "forgetting",
}


@pytest.mark.parametrize("toolbox", TOOLBOXES)
@pytest.mark.parametrize("seed", range(3))
def test_named_definitions_reproduce_other_toolboxes(toolbox, seed):
    r = np.random.RandomState(seed).rand(5, 5)
    r[np.triu_indices(5, 1)] = NAN
    for matrix in (R, r):
        assert getattr(metrics, OURS[toolbox])(matrix) == pytest.approx(TOOLBOXES[toolbox](matrix))


def test_the_definitions_really_differ():
    values = {
        round(getattr(metrics, name)(R), 6) for name in ("forgetting", "forgetting_clipped", "forgetting_from_first")
    }
    assert len(values) == 2  # 0.1 twice on this matrix, since the best earlier stage was the first
    better_later = R.copy()
    better_later[1, 0] = 0.95
    assert metrics.forgetting(better_later) != pytest.approx(metrics.forgetting_from_first(better_later))


def test_against_avalanche():
    """The same predictions through Avalanche's own accuracy, forgetting and backward-transfer metrics."""
    import torch
    from avalanche.evaluation.metrics import BWT, Accuracy, Forgetting

    rng = np.random.RandomState(0)
    stages, per_task = 4, 25
    labels = [rng.randint(2 * j, 2 * j + 2, per_task) for j in range(stages)]
    correct = np.zeros((stages, stages), dtype=int)
    forgetting, transfer = Forgetting(), BWT()
    for i in range(stages):
        everything = Accuracy()
        for j in range(i + 1):
            predicted = np.where(
                rng.rand(per_task) < 0.9 - 0.15 * (i - j), labels[j], rng.randint(0, 2 * i + 2, per_task)
            )
            correct[i, j] = (predicted == labels[j]).sum()
            one = Accuracy()
            for metric in (one, everything):
                metric.update(torch.from_numpy(predicted), torch.from_numpy(labels[j]))
            assert one.result() == pytest.approx(correct[i, j] / per_task)
            forgetting.update(j, one.result(), initial=i == j)
            transfer.update(j, one.result(), initial=i == j)
        r = metrics.accuracy_matrix(correct[: i + 1, : i + 1], np.full(i + 1, per_task))
        assert metrics.seen_accuracy(r, np.full(i + 1, per_task))[-1] == pytest.approx(everything.result())
    older = [forgetting.result()[j] for j in range(stages - 1)]
    assert metrics.forgetting_from_first(r) == pytest.approx(np.mean(older))
    assert metrics.backward_transfer(r) == pytest.approx(np.mean([transfer.result()[j] for j in range(stages - 1)]))
