"""All reported metrics, as pure functions of the accuracy matrix.

R [T, T]: R[i, j] is the accuracy on task j's test images after stage i, with the argmax over all classes seen up to i;
NaN above the diagonal. R_task is the same with the argmax restricted to task j's classes: a control without label-space
growth. All values are fractions in [0, 1] (differences in [−1, 1]), stages and tasks count from 0, and no function
changes its arguments. The docstring of a definition that other toolboxes print names them.

A benchmark tests every task after every later stage. A model that `cil learn` teaches may have tasks of which no image
is held out, or of which no image can be tested any more: n_ij = 0, and R[i, j] is NaN. All means leave them out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import coo_array

Array = np.ndarray


def accuracy_matrix(correct: Array, total: Array) -> Array:
    """The accuracy matrix R[i, j] = correct[i, j] / n_ij for j ≤ i, else NaN; float [T, T].

    Args:
        correct: Number of images of task j classified correctly after stage i, int [T, T].
        total: Number n_j of test images of each task, int [T], or n_ij of each stage and task, int [T, T].
    """
    stages = correct.shape[0]
    total = np.broadcast_to(np.asarray(total), correct.shape)
    known = np.tril(np.ones((stages, stages), dtype=bool)) & (total > 0)
    return np.where(known, correct / np.maximum(total, 1), np.nan)


def seen_accuracy(r: Array, total: Array) -> Array:
    """A_i per image (micro), the headline: Σ_{j≤i} n_j R[i, j] / Σ_{j≤i} n_j. Shape [T]."""
    return np.array([seen_accuracy_at(r, total, i) for i in range(len(r))])


def seen_accuracy_at(r: Array, total: Array, stage: int = -1) -> float:
    """A_i of one stage i; see :func:`seen_accuracy`."""
    i = range(len(r))[stage]
    return _average(r[i, : i + 1], _tested(total, i)[: i + 1])


def _tested(total: Array, stage: int) -> Array:
    """Number of test images of each task at a stage, [T], given n_j [T] or n_ij [T, T]."""
    return np.asarray(total)[stage] if np.ndim(total) == 2 else np.asarray(total)


def _average(values: Array, images: Array) -> float:
    """The mean of accuracies, weighted by their numbers of images; NaN if there are no images."""
    known = images > 0
    return float(np.average(values[known], weights=images[known].astype(float))) if known.any() else float("nan")


def _mean(values: Array) -> float:
    """The mean without NaN; NaN if nothing else is there."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def task_mean_accuracy(r: Array) -> Array:
    """A_i as the mean over tasks: (1/(i+1)) Σ_{j≤i} R[i, j] (L2P, DualPrompt, RanPAC). Shape [T]."""
    return np.array([task_mean_accuracy_at(r, i) for i in range(len(r))])


def task_mean_accuracy_at(r: Array, stage: int = -1) -> float:
    """A_i of one stage i; see :func:`task_mean_accuracy`."""
    i = range(len(r))[stage]
    return _mean(r[i, : i + 1])


def class_mean_accuracy(confusion: Array | coo_array) -> float:
    """Mean over classes of the recall: (1/C) Σ_c confusion[c, c] / Σ_d confusion[c, d].

    Args:
        confusion: Counts [C, C], dense or sparse; rows are true classes, columns predictions; classes without images
            are left out.
    """
    images = confusion.sum(1)
    tested = images > 0
    return float(np.mean(confusion.diagonal()[tested] / images[tested])) if tested.any() else float("nan")


def average_accuracy(accuracy: Array) -> float:
    """A_avg, average incremental accuracy: the mean of A_i over stages."""
    return _mean(accuracy)


def last_accuracy(accuracy: Array) -> float:
    """A_last: A after the last stage."""
    return float(accuracy[-1])


def new_accuracy(r: Array) -> Array:
    """Accuracy on the newest task, R[i, i]. Shape [T]."""
    return np.diag(r).copy()


def old_accuracy(r: Array, total: Array) -> Array:
    """Accuracy per image on all tasks before stage i; NaN for the first stage. Shape [T]."""
    return np.array([old_accuracy_at(r, total, i) for i in range(len(r))])


def old_accuracy_at(r: Array, total: Array, stage: int = -1) -> float:
    """The accuracy on old tasks at one stage i; see :func:`old_accuracy`."""
    i = range(len(r))[stage]
    return _average(r[i, :i], _tested(total, i)[:i]) if i else float("nan")


def base_accuracy_at(r: Array, stage: int = -1) -> float:
    """Accuracy on the classes of the first task, the base classes, at one stage i: R[i, 0]."""
    return float(r[stage, 0])


def novel_accuracy_at(r: Array, total: Array, stage: int = -1) -> float:
    """Accuracy per image on the classes of all later tasks, the novel classes, at one stage i; NaN at the first."""
    i = range(len(r))[stage]
    return _average(r[i, 1 : i + 1], _tested(total, i)[1 : i + 1])


def harmonic_accuracy_at(r: Array, total: Array, stage: int = -1) -> float:
    """2bn / (b + n) of base and novel accuracy at one stage (few-shot class-incremental learning, arXiv 2203.06953);
    0 if one of them is 0, NaN at the first stage. A model that drowns few-shot classes has a small one, while the
    accuracy over all classes hides it."""
    base, novel = base_accuracy_at(r, stage), novel_accuracy_at(r, total, stage)
    return 2 * base * novel / (base + novel) if base + novel != 0 else 0.0


def performance_drop(accuracy: Array) -> float:
    """PD = A_0 − A_last: what few-shot classes cost after the first task (Tao et al., CVPR 2020; CEC; FACT)."""
    return float(accuracy[0] - accuracy[-1])


FREQUENCIES = ("many", "medium", "few")
"""Groups of classes by their numbers of training images: more than 100, 20 to 100, fewer than 20."""


def frequency_group(images: Array) -> Array:
    """The group of each class, int64 [C], as a position in :data:`FREQUENCIES` (Liu et al., CVPR 2019, 1904.05160).

    Args:
        images: Number of training images of each class in the whole stream, int [C].
    """
    return np.select([np.asarray(images) > 100, np.asarray(images) >= 20], [0, 1], 2)


def anytime_accuracy(accuracy: Array, images: Array) -> float:
    """A_AUC, the area under the curve of accuracy over training images (Koh et al., ICLR 2022, arXiv 2110.10031).

    Σ_k Δ_k A_k / Σ_k Δ_k, where evaluation k comes Δ_k images after the one before; for equal distances the mean.

    Args:
        accuracy: Accuracy over all classes seen at each evaluation, float [K]; NaN ones are left out.
        images: Number of training images since the evaluation before, int [K].
    """
    return _average(accuracy[~np.isnan(accuracy)], images[~np.isnan(accuracy)])


def forgetting_by_task(r: Array, stage: int = -1) -> Array:
    """f_j = max_{l<i} R[l, j] − R[i, j] for j < i (Chaudhry et al. 2018, arXiv 1801.10112, eq. 3). Shape [i].

    The maximum runs over *earlier* stages only, so a task that still improves has a negative value, down to −1.
    """
    i = range(len(r))[stage]
    if not i:
        return np.zeros(0)
    best = np.where(np.isnan(r[:i, :i]), -np.inf, r[:i, :i]).max(axis=0)
    return np.where(np.isinf(best), np.nan, best) - r[i, :i]


def forgetting_matrix(r: Array) -> Array:
    """f_j after every stage i: the rows of :func:`forgetting_by_task`; NaN where j ≥ i. Shape [T, T]."""
    found = np.full(r.shape, np.nan)
    for i in range(len(r)):
        found[i, :i] = forgetting_by_task(r, i)
    return found


def forgetting(r: Array, stage: int = -1) -> float:
    """F_i: the mean of f_j over the i earlier tasks (Chaudhry et al. 2018); NaN at the first stage.

    On R_task this is forgetting without label-space growth: a classifier of frozen class prototypes has none there,
    while on R it "forgets" because every new class competes with the old ones.
    """
    return _mean(forgetting_by_task(r, stage))


def base_forgetting(r: Array, stage: int = -1) -> float:
    """f_0, the forgetting of the classes of the first task; NaN at the first stage."""
    by_task = forgetting_by_task(r, stage)
    return float(by_task[0]) if len(by_task) else float("nan")


def novel_forgetting(r: Array, stage: int = -1) -> float:
    """The mean of f_j over the later tasks j ≥ 1 that are over; NaN at the first two stages."""
    return _mean(forgetting_by_task(r, stage)[1:])


def forgetting_clipped(r: Array, stage: int = -1) -> float:
    """Forgetting as PyCIL, LAMDA-PILOT, Mammoth and the L2P and DualPrompt code print it. The maximum includes the
    current stage (and 0 for stages before the task), so no task counts below 0: mean_{j<i} (max_{l≤i} R[l, j] −
    R[i, j])."""
    i = range(len(r))[stage]
    filled = np.nan_to_num(r[: i + 1, : i + 1], nan=0.0)
    return _mean((filled.max(0) - filled[i])[:i][~np.isnan(r[i, :i])]) if i else float("nan")


def forgetting_from_first(r: Array, stage: int = -1) -> float:
    """Forgetting as Avalanche prints it: mean_{j<i} (R[j, j] − R[i, j]), which is −BWT."""
    return -backward_transfer(r, stage)


def backward_transfer(r: Array, stage: int = -1) -> float:
    """BWT = (1/i) Σ_{j<i} (R[i, j] − R[j, j]) (Lopez-Paz & Ranzato 2017, arXiv 1706.08840); NaN at the first stage."""
    i = range(len(r))[stage]
    return _mean(r[i, :i] - np.diag(r)[:i])


def learning_accuracy(r: Array) -> float:
    """LA = (1/T) Σ_i R[i, i]: the accuracy on each task directly after learning it (Riemer et al. 2019). The mean over
    tasks at the end is LA + ((T−1)/T)·BWT."""
    return _mean(np.diag(r))


def task_id_accuracy(task_of_prediction: Array, task_of_label: Array) -> float:
    """TP: the fraction of images whose predicted class belongs to the right task. Both arguments are int [N]."""
    return float(np.mean(np.asarray(task_of_prediction) == np.asarray(task_of_label)))


def within_task_accuracy(r_task: Array, total: Array) -> Array:
    """WP_i: accuracy per image with the task id given, Σ_{j≤i} n_j R_task[i, j] / Σ_{j≤i} n_j. Shape [T]."""
    return seen_accuracy(r_task, total)


def confusion_matrix(labels: Array, predictions: Array, classes: int) -> Array:
    """Counts [C, C]; rows are true labels, columns predictions, both in 0…C−1 with C = ``classes``."""
    return confusion_counts(labels, predictions, classes).toarray()


def confusion_counts(labels: Array, predictions: Array, classes: int) -> coo_array:
    """The confusion matrix [C, C] as sparse counts: at most one entry per image, whatever the number of classes."""
    from scipy.sparse import coo_array

    pairs, counts = np.unique(np.asarray(labels, dtype=np.int64) * classes + predictions, return_counts=True)
    return coo_array((counts, np.divmod(pairs, classes)), shape=(classes, classes))


def calibration_error(confidence: Array, correct: Array, bins: int = 15) -> float:
    """ECE, expected calibration error: Σ_b (n_b/N) |accuracy_b − confidence_b| over bins of equal width (Guo et al.,
    ICML 2017; Naeini et al., AAAI 2015).

    Args:
        confidence: Probability of the predicted class, in (0, 1], float [N]; bin b of B holds (b/B, (b+1)/B].
        correct: Whether the prediction is right, bool [N].
        bins: Number of bins B.
    """
    bin_of = np.clip(np.ceil(np.asarray(confidence) * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(bin_of, np.asarray(correct, dtype=float) - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(bin_of))


def unknown_auroc(known: Array, unknown: Array) -> float:
    """AUROC: the probability that an image of a known class has a larger score than one of an unknown class, where
    equal scores count half (Hendrycks & Gimpel, ICLR 2017).

    Args:
        known: Scores of images of known classes, float [N].
        unknown: Scores of images of unknown classes, float [M].
    """
    from scipy.stats import rankdata

    n, m = len(known), len(unknown)
    ranks = rankdata(np.concatenate([known, unknown]))[:n]
    return float((ranks.sum() - n * (n + 1) / 2) / (n * m))


def unknown_fpr95(known: Array, unknown: Array) -> float:
    """FPR95: the fraction of unknown images that are taken for known at the largest threshold that takes at least 95 %
    of the known ones for known. Arguments as in :func:`unknown_auroc`.
    """
    threshold = np.sort(known)[::-1][int(np.ceil(0.95 * len(known))) - 1]
    return float(np.mean(np.asarray(unknown) >= threshold))


def rejected(scores: Array, held_out: Array, rate: float) -> Array:
    """Which images look like no known class, if a fraction ``rate`` of the known ones may be rejected; bool [N].

    An image is rejected if p = (1 + #{held-out scores ≤ its score}) / (1 + n) ≤ rate. A known image that could change
    places with the held-out ones has p ≤ rate with a probability of at most ``rate`` (conformal p-value, Vovk et al.
    2005). With n < 1/rate − 1 held-out images nothing is rejected.

    Args:
        scores: Scores of the images; larger ones look more like known classes, float [N].
        held_out: Scores of held-out images of known classes, float [n].
        rate: False-rejection rate in (0, 1).
    """
    at_most = np.searchsorted(np.sort(held_out), scores, side="right")
    return (1 + at_most) <= rate * (1 + len(held_out)) * (1 + 1e-12)  # 0.05 · 20 must not round to below 1


def summary(r: Array, r_task: Array, total: Array) -> dict[str, float]:
    """The metrics of one run by name, as ``metrics.json`` stores them; undefined ones are NaN."""
    seen = seen_accuracy(r, total)
    return {
        "accuracy_last": last_accuracy(seen),
        "accuracy_average": average_accuracy(seen),
        "accuracy_last_task_mean": float(task_mean_accuracy(r)[-1]),
        "accuracy_average_task_mean": average_accuracy(task_mean_accuracy(r)),
        "forgetting": forgetting(r),
        "forgetting_within_task": forgetting(r_task),
        "forgetting_clipped": forgetting_clipped(r),
        "backward_transfer": backward_transfer(r),
        "learning_accuracy": learning_accuracy(r),
        "within_task_accuracy": float(within_task_accuracy(r_task, total)[-1]),
    }
