"""Streams: order, sizes, splits, and the doors that stay closed."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

import cil.errors
import cil.stream.protocol
from cil import avalanche
from cil.errors import StreamError
from cil.stream import Stream, TestData, concatenate
from cil.stream.protocol import ClassIncremental, DomainIncremental, class_order, task_sizes, validation_split


@pytest.mark.parametrize("module", [cil.stream.protocol, cil.errors])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


def test_the_fields_seed_is_the_fields_order():
    np.random.seed(1993)  # how PyCIL and LAMDA-PILOT draw it
    expected = np.random.permutation(100).tolist()
    assert class_order([str(i) for i in range(100)], 1993) == expected
    assert expected[:5] == [68, 56, 78, 8, 23]


@pytest.mark.parametrize("count", [1, 7, 10, 100, 101])
@pytest.mark.parametrize("initial", [0, 1, 5])
@pytest.mark.parametrize("increment", [1, 3, 10])
def test_sizes_drop_no_class(count, initial, increment):
    if max(initial or increment, 1) > count:
        with pytest.raises(StreamError, match=f"allowed: 1 to {count}"):
            task_sizes(count, initial_classes=initial, increment=increment)
        return
    sizes = task_sizes(count, initial_classes=initial, increment=increment)
    assert sum(sizes) == count and min(sizes) >= 1
    assert sizes[0] == (initial or increment)
    assert all(s == increment for s in sizes[1:-1])


def test_sizes_that_do_not_fit_say_what_would():
    with pytest.raises(StreamError, match=r"adds up to 9, the dataset has 10 classes; would fit: \[5, 4, 1\]"):
        task_sizes(10, sizes=[5, 4])
    with pytest.raises(StreamError, match="would fit"):
        task_sizes(10, sizes=[8, 8])
    with pytest.raises(StreamError, match="either sizes or"):
        task_sizes(10, sizes=[10], increment=2)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["a", "b"], "missing e.g. .'c'"),
        (["a", "b", "b"], "missing"),
        (["a", "b", "d"], "'d' is not in the dataset"),
        ("random", "allowed: natural"),
    ],
)
def test_wrong_orders_are_refused(order, message):
    with pytest.raises(StreamError, match=message):
        class_order(["a", "b", "c"], order)


def test_every_image_lands_in_exactly_one_task(image_set):
    labels = np.random.RandomState(0).randint(0, 7, 100)
    labels[:7] = range(7)
    train, test = image_set(labels), image_set(np.arange(7).repeat(3))
    stream = Stream(train, test, ClassIncremental(1993, initial_classes=2, increment=3))
    assert [len(t.classes) for t in stream.tasks] == [2, 3, 2]
    indices = np.concatenate([t.train.source[1] for t in stream.tasks])
    assert sorted(indices) == list(range(100))
    for task in stream.tasks:
        images, own = task.train.source
        assert set(task.train.labels) == set(task.classes)
        # label k is the k-th class the stream shows, and its name is that class's name
        raw = images.labels[own]
        assert [stream.class_names[k] for k in task.train.labels] == [images.class_names[r] for r in raw]
    assert stream.tasks[1].seen == (0, 1, 2, 3, 4)
    assert stream.tasks[1].names == stream.class_names[:5]


def test_test_set_may_list_classes_in_another_order(image_set):
    train = image_set([0, 1, 2, 0, 1, 2], names=["a", "b", "c"])
    test = image_set([0, 1, 2], names=["c", "a", "b"])
    stream = Stream(train, test, ClassIncremental(["b", "c", "a"], sizes=[1, 1, 1]))
    with stream.open_test() as opened:
        for j, raw in enumerate([2, 0, 1]):  # b, c, a among the test set's own positions
            indices, labels = opened.task(j)
            assert opened.images.labels[indices].tolist() == [raw]
            assert labels.tolist() == [j]


def test_different_classes_are_refused(image_set):
    with pytest.raises(StreamError, match=r"only in train: \['dog'\], only in test: \['cow'\]"):
        Stream(
            image_set([0, 1], ["cat", "dog"]),
            image_set([0, 1], ["cat", "cow"]),
            ClassIncremental("natural", increment=1),
        )


def test_test_split_opens_for_the_evaluator_only(image_set):
    stream = Stream(image_set([0, 1]), image_set([0, 1]), ClassIncremental("natural", increment=1))
    with stream.open_test() as opened:
        assert opened.labels.tolist() == [0, 1]
    never = TestData(image_set([0, 1]), np.array([0, 1]), [np.array([0]), np.array([1])])
    for data in (never, opened):
        for read in (lambda t: t.images, lambda t: t.labels, lambda t: t.task(0)):
            with pytest.raises(StreamError, match="evaluator only"):
                read(data)


def test_closed_tasks_give_nothing(image_set):
    stream = Stream(image_set([0, 1]), image_set([0, 1]), ClassIncremental("natural", increment=1))
    task = stream.tasks[0]
    task.close()
    for read in (
        lambda: task.train.labels,
        lambda: task.train.source,
        lambda: next(task.train.batches(2)),
        lambda: concatenate([task.train]),
    ):
        with pytest.raises(StreamError, match="task 0 is over"):
            read()


def test_validation_comes_from_training_and_is_stratified(image_set):
    labels = np.array([0] * 10 + [1] * 20 + [2])
    stream = Stream(image_set(labels), image_set([0, 1, 2]), ClassIncremental("natural", sizes=[2, 1]), validation=0.2)
    task = stream.tasks[0]
    kept, held = task.train.source[1], task.validation.source[1]
    assert not set(kept) & set(held) and sorted([*kept, *held]) == list(range(30))
    assert np.bincount(task.validation.labels).tolist() == [2, 4]
    assert stream.tasks[1].validation is None  # a class of one image keeps it for training
    other = Stream(image_set(labels), image_set([0, 1, 2]), ClassIncremental(5, sizes=[1, 2]), validation=0.2)
    every = np.concatenate([t.validation.source[1] for t in other.tasks if t.validation])
    assert sorted(every) == sorted(held)  # the split does not depend on the class order
    on_it = Stream(
        image_set(labels[:30]),
        image_set([0, 1]),
        ClassIncremental("natural", increment=1),
        validation=0.2,
        test_on="validation",
    )
    with on_it.open_test() as opened:
        assert opened.images.labels[opened.members[0]].tolist() == [0, 0]
    with pytest.raises(StreamError, match="validation > 0"):
        Stream(image_set([0, 1]), image_set([0, 1]), ClassIncremental("natural", increment=1), test_on="validation")


def test_validation_split_is_a_partition():
    labels = np.random.RandomState(1).randint(0, 5, 200)
    keep, held = validation_split(labels, 0.3)
    assert sorted([*keep, *held]) == list(range(200))
    assert abs(len(held) / 200 - 0.3) < 0.03


def test_domains_bring_the_same_classes_again(image_set):
    train, test = image_set([0, 1, 0, 1, 1]), image_set([0, 1, 0, 1])
    train.domains, test.domains = np.array([0, 0, 1, 1, 1]), np.array([0, 0, 1, 1])
    stream = Stream(train, test, DomainIncremental())
    assert [t.classes for t in stream.tasks] == [(0, 1), (0, 1)]
    assert [t.seen for t in stream.tasks] == [(0, 1), (0, 1)]
    assert [len(t.train) for t in stream.tasks] == [2, 3]
    with pytest.raises(StreamError, match=r"needs data\.domains"):
        Stream(image_set([0, 1]), image_set([0, 1]), DomainIncremental())


def test_avalanche_sees_the_same_tasks(image_set):
    labels = np.arange(5).repeat(4)
    stream = Stream(image_set(labels), image_set(np.arange(5).repeat(2), seed=1), ClassIncremental(1993, increment=2))
    benchmark = avalanche.benchmark(stream)
    assert len(benchmark.train_stream) == len(benchmark.test_stream) == 3
    for task, train, test in zip(stream.tasks, benchmark.train_stream, benchmark.test_stream, strict=True):
        assert set(train.classes_in_this_experience) == set(test.classes_in_this_experience) == set(task.classes)
        assert [int(train.dataset[i][1]) for i in range(len(train.dataset))] == task.train.labels.tolist()
        ours = next(task.train.batches(len(task.train)))[0]
        plain = train.dataset.eval()  # as it is, the data set augments
        assert all((plain[i][0] == ours[i]).all() for i in range(len(ours)))
    with stream.open_test() as opened:
        indices, expected = opened.task(2)
        last = benchmark.test_stream[2].dataset
        pixels, _ = next(opened.images.batches(indices, expected, len(indices)))
        assert [int(last[i][1]) for i in range(len(last))] == expected.tolist()
        assert (last[0][0] == pixels[0]).all()
