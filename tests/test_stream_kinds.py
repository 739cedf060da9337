"""Kinds of streams by hand cases, without images: shots, long tails, wrong labels, blurred borders and repetition."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

import cil.stream.returning
from cil.config import Config
from cil.data.index_lists import read_sessions
from cil.data.source import ImageSource
from cil.errors import ConfigError, DataError, StreamError
from cil.learners import build_learner, registry
from cil.runner import make_stream
from cil.runner.identity import identity_settings
from cil.runner.plan import dump, plans
from cil.runner.stages import run_stages
from cil.runner.supported import require_supported
from cil.stream import Blurry, ClassDomainIncremental, ClassIncremental, Repetition, Sampling, Stream
from cil.stream.returning import by_first_appearance, cuts
from cil.stream.sampling import CHOICE, few_shots, long_tail, wrong_labels

LABELS = np.arange(6).repeat(20)
OF_CLASS = [np.flatnonzero(c == LABELS) for c in range(6)]
NAMES = [f"c{i}" for i in range(6)]
RETURNING = [
    Blurry(1993, 3, 50, 30, seed=1),
    Blurry(1993, 3, 50, 30, stochastic=True, seed=1),
    Repetition(ClassIncremental(1993, increment=2), 0.6, seed=1),
]


def config(**stream):
    return Config.model_validate({"stream": {"increment": 2, **stream}, "learner": "ncm"})


def test_doctests():
    assert doctest.testmod(cil.stream.returning).failed == 0


def test_shots_by_hand():
    kept = few_shots(LABELS, [4, 1], 5)
    assert np.bincount(LABELS[kept]).tolist() == [20, 5, 20, 20, 5, 20]
    expected = [20 + i for i in np.random.RandomState([0, 1, CHOICE]).permutation(20)[:5]]
    assert sorted(expected) == kept[LABELS[kept] == 1].tolist()  # whatever the other classes are
    assert set(kept[LABELS[kept] == 1]) == set(few_shots(LABELS[:40], [1], 5)) - set(range(20))
    with pytest.raises(StreamError, match=r"class 'c4' has 20 training images, fewer than 21"):
        few_shots(LABELS, [4], 21, names=NAMES)


def test_long_tail_by_hand():
    labels = np.arange(3).repeat([100, 100, 4])
    kept = long_tail(labels, [1, 0, 2], 0.01)  # 100, 100·0.1 and 100·0.01
    assert np.bincount(labels[kept]).tolist() == [10, 100, 1]
    assert np.bincount(labels[long_tail(labels, [2, 0, 1], 0.01)]).tolist() == [10, 1, 4]  # no more than there are
    assert np.bincount(LABELS[long_tail(LABELS, range(6), 0.001)]).min() == 1  # the field's floor would lose classes
    shuffled = np.bincount(LABELS[long_tail(LABELS, range(6), 0.1, "shuffled", seed=3)])
    ordered = np.bincount(LABELS[long_tail(LABELS, range(6), 0.1)])
    assert sorted(shuffled) == sorted(ordered) and shuffled.tolist() != ordered.tolist()
    # LT-CIL's numbers for CIFAR-100 with ratio 0.01: the first, the 50th and the last class
    cifar = np.bincount(np.arange(100).repeat(500)[long_tail(np.arange(100).repeat(500), range(100), 0.01)])
    assert [cifar[0], cifar[49], cifar[99], cifar.sum()] == [500, 51, 5, 10847]


def test_wrong_labels_by_hand():
    members = [np.flatnonzero(np.isin(LABELS, [0, 1, 2])), np.flatnonzero(np.isin(LABELS, [3, 4, 5]))]
    pair = wrong_labels(LABELS, members, 0.33, "pair")
    for c, following in enumerate([1, 2, 0, 4, 5, 3]):
        changed = pair[[i for i in OF_CLASS[c] if pair[i] != c]]
        assert len(changed) == round(0.33 * 20) and set(changed.tolist()) == {following}
    symmetric = wrong_labels(LABELS, members, 0.5)
    assert [(symmetric[OF_CLASS[c]] != c).sum() for c in range(6)] == [10] * 6
    assert set(symmetric[:60].tolist()) == {0, 1, 2}  # never a class of another task
    swapped = wrong_labels(LABELS, members[::-1], 0.5)
    assert (swapped == symmetric).all()  # the order of tasks decides nothing
    assert (wrong_labels(LABELS, members, 0.0) == LABELS).all()
    with pytest.raises(StreamError, match="task 1 has one class only"):
        wrong_labels(LABELS, [np.arange(40), np.arange(40, 60)], 0.5)


@pytest.mark.parametrize("tasks", RETURNING, ids=["blurry", "stochastic", "repetition"])
def test_returning_classes_lose_nothing(tasks):
    split = tasks.split(NAMES, LABELS, None)
    assert sorted(np.concatenate(split.members).tolist()) == list(range(120))
    assert sorted(split.order) == list(range(6)) and len(split.members) == 3
    assert [label for group in split.groups for label in group] == list(range(6))  # in order of appearance
    label_of = np.argsort(split.order)
    for task, own in enumerate(split.members):
        labels = label_of[LABELS[own]]
        assert set(labels.tolist()) == set(split.classes[task])
        assert set(split.groups[task]) == set(split.classes[task]) - {c for t in range(task) for c in split.classes[t]}
    again = tasks.split(NAMES, LABELS, None)
    assert all((a == b).all() for a, b in zip(split.members, again.members, strict=True))


def test_blurry_by_hand():
    split = Blurry("natural", 3, 50, 30).split(NAMES, LABELS, None)
    counts = np.stack([np.bincount(LABELS[own], minlength=6) for own in split.members])
    assert counts[:, :3].tolist() == [[20, 0, 0], [0, 20, 0], [0, 0, 20]]  # classes 0, 1 and 2 are disjoint
    assert counts[:, 3:].tolist() == [[14, 3, 3], [3, 14, 3], [3, 3, 14]]  # 30 % of 20 images, dealt to two tasks
    assert split.order == [0, 3, 4, 5, 1, 2] and split.groups == [(0, 1, 2, 3), (4,), (5,)]
    none = Blurry("natural", 3, 50, 0).split(NAMES, LABELS, None)
    assert [len(task) for task in none.classes] == [2, 2, 2]
    assert cuts(7, 3, None) == [3, 2, 2] and sum(cuts(7, 3, np.random.RandomState(0))) == 7


def test_repetition_by_hand():
    once = ClassIncremental("natural", increment=2)
    always = Repetition(once, 1.0).split(NAMES, LABELS, None)
    assert [np.bincount(LABELS[own], minlength=6).tolist() for own in always.members] == [
        [7, 7, 0, 0, 0, 0],
        [7, 7, 10, 10, 0, 0],
        [6, 6, 10, 10, 20, 20],
    ]
    assert always.groups == [(0, 1), (2, 3), (4, 5)]
    never = Repetition(once, 0.0).split(NAMES, LABELS, None)
    plain = once.split(NAMES, LABELS, None)
    assert never.order == plain.order and never.classes == plain.classes
    assert all((a == b).all() for a, b in zip(never.members, plain.members, strict=True))
    single = Repetition(once, 1.0).split(NAMES, np.arange(6), None)  # one image cannot come twice
    assert [own.tolist() for own in single.members] == [[0, 1], [2, 3], [4, 5]]
    assert by_first_appearance([2, 0], np.array([0, 2]), [np.array([0]), np.array([1])]).order == [0, 2]


@pytest.mark.parametrize("tasks", RETURNING[1:], ids=["stochastic", "repetition"])
@pytest.mark.parametrize("learner", ["ncm", {"name": "slda"}, {"name": "ranpac", "projection": 40, "strength": "gcv"}])
def test_sums_end_where_the_disjoint_stream_ends(tasks, learner, backbone, image_set):
    train, test = image_set(LABELS[::2]), image_set(np.arange(6).repeat(5), seed=1)
    right = []
    for kind in (ClassIncremental(1993, increment=2), tasks):
        rows = run_stages(build_learner(learner, backbone), Stream(train, test, kind))
        assert sum(rows[-1]["total"]) == 30  # the test set stays whole
        right.append(sum(rows[-1]["correct"]))
    assert right[0] == right[1]


def test_learners_that_are_not_defined_on_returning_classes(image_set):
    stream = Stream(image_set(LABELS), image_set(np.arange(6)), RETURNING[2])
    refused = {"ease": "tasks of new classes only", "ranpac": "with balance needs all images of a class in one task"}
    for name, message in refused.items():
        raw = {"name": name, **({"balance": True} if name == "ranpac" else {})}
        [plan] = plans(Config.model_validate({"learner": raw}))
        with pytest.raises(StreamError, match=message):
            require_supported(plan.cls, stream, plan.parameters)
        require_supported(plan.cls, Stream(image_set(LABELS), image_set(np.arange(6)), ClassIncremental(3, 0, 2)), None)


def test_stream_with_all_of_it(image_set):
    train, test = image_set(LABELS), image_set(np.arange(6).repeat(2))
    sampling = Sampling(shots=5, noise=(0.4, "symmetric"), seed=2)
    stream = Stream(train, test, ClassIncremental("natural", increment=2), validation=0.2, sampling=sampling)
    assert [len(task.train) for task in stream.tasks] == [32, 8, 8]  # a fifth of those that are shown is held out
    positions, true = stream.relabelled
    assert (true == LABELS[positions]).all() and len(positions) == 2 * round(0.4 * 16) + 4 * round(0.4 * 4)
    for task in stream.tasks:
        own = task.train.source[1]
        assert sorted(own[task.train.labels != LABELS[own]]) == sorted(set(own) & set(positions))
        assert (task.validation.labels == LABELS[task.validation.source[1]]).all()
    with stream.open_test() as opened:
        assert [len(opened.task(j)[0]) for j in range(3)] == [4, 4, 4]


def test_uses_of_chance_are_independent(image_set):
    """The wrong labels and the held-out images of a class that returns are not all in its first task."""
    train, test = image_set(np.arange(4).repeat(60)), image_set(np.arange(4))
    stream = Stream(
        train,
        test,
        Repetition(ClassIncremental("natural", increment=2), 1.0),
        validation=0.5,
        sampling=Sampling(noise=(0.5, "pair")),
    )
    first, second = stream.tasks
    for c in (0, 1):  # 30 images in each task: 15 of them held out, and about half of the others with a wrong label
        for task in (first, second):
            own = task.train.source[1]
            assert 8 <= (train.labels[own] == c).sum() <= 22
            assert 3 <= ((train.labels[own] == c) & (task.train.labels != c)).sum() <= 12
    tail = Sampling(imbalance=(0.5, "ordered"))
    tasks = Stream(train, test, Repetition(ClassIncremental("natural", increment=2), 1.0), sampling=tail).tasks
    assert len(tasks[0].train) > 30 and len(tasks[1].train) > 60


OFFICIAL = """29774 33344 4815 6772 48317 29918 33262 5138 7342 47874 28864 32471 4316
6436 47498 29802 33159 3730 5093 47740 30548 34549 2845 4996 47866"""
"""data/index_list/cifar100/session_2.txt of github.com/xyutao/fscil: five images each of the classes 60 to 64."""


def source(labels, names=None, describe=str):
    names = names or [f"c{i}" for i in range(int(labels.max()) + 1)]
    return ImageSource(lambda i: np.zeros((2, 2), np.uint8), labels, names, describe=describe, fingerprint="0")


def test_official_index_files(tmp_path, image_set):
    """The second session of CIFAR-100 is the one of the file, image for image, with its 25 images of five classes."""
    labels = np.arange(50_000) % 60
    positions = [int(entry) for entry in OFFICIAL.split()]
    labels[positions] = np.arange(60, 65).repeat(5)
    names = [f"c{i}" for i in range(65)]
    (tmp_path / "session_1.txt").write_text("never read\n")
    (tmp_path / "session_2.txt").write_text("\n".join(OFFICIAL.split()) + "\n")
    sessions = read_sessions(tmp_path, source(labels))
    kept = Sampling(sessions=sessions).kept(labels, range(65), [tuple(range(60)), tuple(range(60, 65))], names)
    assert kept[labels[kept] >= 60].tolist() == sorted(positions)
    assert (labels[kept] < 60).sum() == 50_000 - 25  # the first session has all images of its classes
    with pytest.raises(StreamError, match=r"other classes than the task, e\.g\. 'c59'"):
        Sampling(sessions=sessions).kept(
            labels, [*range(59), 60, 59, *range(61, 65)], [range(60), range(60, 65)], names
        )
    with pytest.raises(StreamError, match="index files of 1 tasks after the first, and the stream has 2"):
        Sampling(sessions=sessions).kept(labels, range(65), [range(55), range(55, 60), range(60, 65)], names)


MINI = {
    "n03544143": "0811 0906 0122 0185 1258",
    "n03584254": "0818 0891 0145 0186 1254",
    "n03676483": "0772 0864 0108 0164 1236",
    "n03770439": "0738 0835 0111 0154 1238",
    "n03773504": "0781 0880 0132 0177 1237",
}
"""data/index_list/mini_imagenet/session_2.txt of the same repository: five images each of the classes 60 to 64."""


def test_official_index_files_of_paths(tmp_path):
    """The second session of miniImageNet, among folders with these images and others."""
    names = [f"n0{i:07d}" for i in range(60)] + list(MINI)
    paths = [f"/data/mini/train/{name}/{name}0000{i}.jpg" for name in names for i in ("0001", "0002")]
    official = [(name, f"{name}0000{i}.jpg") for name, numbers in MINI.items() for i in numbers.split()]
    paths += [f"/data/mini/train/{name}/{file}" for name, file in reversed(official)]
    labels = np.array([names.index(path.split("/")[-2]) for path in paths])
    text = "\n".join(f"MINI-ImageNet/train/{name}/{file}" for name, file in official)
    (tmp_path / "session_2.txt").write_text(text + "\n")
    [session] = read_sessions(tmp_path, source(labels, names, paths.__getitem__))
    assert [paths[i].split("/")[-2:] for i in session] == [list(one) for one in official]
    kept = Sampling(sessions=(session,)).kept(labels, range(65), [range(60), range(60, 65)], names)
    assert kept[labels[kept] >= 60].tolist() == sorted(session.tolist()) and (labels[kept] < 60).sum() == 120


def test_index_files_with_paths_and_faults(tmp_path):
    described = [f"/data/cub/train/{name}/{i}.jpg" for i, name in enumerate(["a", "a", "b", "b"])]
    images = source(np.array([0, 0, 1, 1]), ["a", "b"], described.__getitem__)
    (tmp_path / "session_2.txt").write_text("CUB_200_2011/images/b/3.jpg\n\nCUB_200_2011/images/b/2.jpg\n")
    assert [own.tolist() for own in read_sessions(tmp_path, images)] == [[3, 2]]
    for text, message in [
        ("7", "line 1: '7' is not one of the 4"),
        ("x/9.jpg", "'x/9.jpg' is not one"),
        ("1\n1", "twice"),
    ]:
        (tmp_path / "session_2.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            read_sessions(tmp_path, images)
    (tmp_path / "session_2.txt").rename(tmp_path / "session_4.txt")
    with pytest.raises(DataError, match=r"has \['session_4.txt'\]; give the folder"):
        read_sessions(tmp_path, images)


def test_defaults_leave_stored_settings_as_they_are():
    stored = {"type", "initial_classes", "increment", "sizes", "validation", "test_on"}
    [plan] = plans(config())
    assert set(dump(plan.config)["stream"]) == stored
    [plan] = plans(config(shots=5))
    assert set(dump(plan.config)["stream"]) == stored | {"shots"}
    assert identity_settings(dump(plan.config))["stream.shots"] == 5
    blurry = Config.model_validate({"stream": {"type": "blurry", "tasks": 3, "seed": 2}, "learner": "ncm"})
    assert Config.model_validate(blurry.model_dump(mode="json", by_alias=True)).stream == blurry.stream
    assert "stream.shots" not in identity_settings(dump(next(plans(config(shots=None, seed=0))).config))


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({"shots": 5, "imbalance": {}}, "shots and imbalance both choose training images"),
        ({"type": "blurry"}, "type blurry needs tasks"),
        ({"type": "blurry", "tasks": 3}, "increment has no meaning for type blurry"),
        ({"disjoint": 30}, "disjoint is a key of type blurry, and the type is class_incremental"),
        ({"type": "repetition", "shots": 5}, "shots needs new classes in every task, and the type is repetition"),
        ({"type": "domain_incremental", "imbalance": {}}, "imbalance needs new classes in every task"),
        ({"noise": {"rate": 2}}, "less than or equal to 1"),
    ],
)
def test_streams_that_are_refused(stream, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        config(**stream)


def test_streams_of_configurations(image_set):
    train, test = image_set(LABELS), image_set(np.arange(6))
    made = {
        "blurry": Config.model_validate({"stream": {"type": "blurry", "tasks": 3, "blurry": 30}, "learner": "ncm"}),
        "repetition": config(type="repetition", repetition=1.0),
        "shots": config(shots=3),
        "tail": config(imbalance={"ratio": 0.1, "order": "shuffled"}),
        "noise": config(noise={"rate": 0.5, "kind": "pair"}),
    }
    streams = {name: make_stream(one, train, test) for name, one in made.items()}
    assert [len(task.train) for task in streams["shots"].tasks] == [40, 6, 6]
    assert streams["blurry"].shows_again and len(streams["repetition"].tasks[2].classes) == 6
    assert sum(len(task.train) for task in streams["tail"].tasks) < 60 and len(streams["noise"].relabelled[0]) == 60
    assert all(stream.altered for stream in streams.values()) and not make_stream(config(), train, test).altered


def test_classes_and_domains_by_hand(image_set):
    labels, domains = np.tile(np.arange(4), 6), np.arange(2).repeat(12)
    names = NAMES[:4]
    once = ClassIncremental([2, 0, 3, 1], increment=2)
    classes = ClassDomainIncremental(once, "classes").split(names, labels, domains)
    assert classes.order == [2, 0, 3, 1] and classes.classes == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [(set(labels[own].tolist()), set(domains[own].tolist())) for own in classes.members] == [
        ({0, 2}, {0}),
        ({0, 2}, {1}),
        ({1, 3}, {0}),
        ({1, 3}, {1}),
    ]
    by_domain = ClassDomainIncremental(once, "domains").split(names, labels, domains)
    assert by_domain.classes == [(0, 1), (2, 3), (0, 1), (2, 3)]
    for seed in range(4):
        mixed = ClassDomainIncremental(once, seed=seed).split(names, labels, domains)
        assert np.sort(np.concatenate(mixed.members)).tolist() == list(range(24))
        assert mixed.order in ([2, 0, 3, 1], [3, 1, 2, 0]) and mixed.classes[0] == (0, 1)  # in order of appearance
        for own, labels_of in zip(mixed.members, mixed.classes, strict=True):
            assert set(labels[own].tolist()) == {mixed.order[label] for label in labels_of}
            assert len(set(domains[own].tolist())) == 1
    with pytest.raises(StreamError, match=r"class_domain_incremental needs data\.domains"):
        ClassDomainIncremental(once).split(names, labels, None)


def test_sums_end_on_classes_and_domains_where_joint_sums_end(backbone, image_set):
    """Every pair has the test images of its own, and all of them together are the whole test set."""
    sets = []
    for labels, seed in ((np.tile(np.arange(4), 6), 0), (np.tile(np.arange(4), 4), 1)):
        images = image_set(labels, seed=seed)
        images.domains = np.arange(2).repeat(len(labels) // 2)
        sets.append(images)
    right = []
    for tasks in (ClassDomainIncremental(ClassIncremental(1, increment=2)), ClassIncremental(1, sizes=[4])):
        stream = Stream(*sets, tasks)
        rows = run_stages(build_learner("ncm", backbone), stream)
        assert sum(rows[-1]["total"]) == 16
        right.append(sum(rows[-1]["correct"]))
    assert right[0] == right[1]
    stream = Stream(*sets, ClassDomainIncremental(ClassIncremental(1, increment=2)))
    assert stream.shows_again and len(stream) == 4
    with pytest.raises(StreamError, match="is defined for tasks of new classes only"):
        require_supported(registry.resolve("ease"), stream)
    made = Config.model_validate(
        {"stream": {"type": "class_domain_incremental", "increment": 2, "pairs": "classes"}, "learner": "ncm"}
    )
    assert [task.classes for task in make_stream(made, *sets).tasks] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    with pytest.raises(ValueError, match="pairs is a key of type class_domain_incremental"):
        config(pairs="classes")
