"""Shared fixtures: small image sets from arrays, a small backbone, and the real data where it lies."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # several at a time: one thread each, before torch counts the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

from cil.backbone import Backbone
from cil.data.images import ImageSet
from cil.data.sources import from_arrays
from cil.data.transforms import Transforms
from cil.testing import setting

LONGEST_FIRST = (
    *("docs", "sweep", "learners", "prompt_learners", "merge_learner", "avalanche", "export", "family_runs", "faults"),
    *("examples", "processes", "pretraining", "classifiers", "ssiat", "merging", "bank", "tuning", "reproduce"),
    *("real_data", "integrity", "readme", "launched", "memory", "store", "identity", "tune", "bench", "slim", "views"),
)
"""Files that take long, in the order in which they begin; the others follow and are short."""


def pytest_configure(config):
    """pytest-xdist would begin with the files of many tests, and end with one process in a file of few long ones."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory):
    """No test touches the user's feature store; fixtures of a module or session share one."""
    place = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIL_CACHE", str(place))
        yield place, itertools.count()


@pytest.fixture(autouse=True)
def _cache(_caches, monkeypatch):
    """Every test has a feature store of its own: what it counts does not depend on the tests before it."""
    place, number = _caches
    monkeypatch.setenv("CIL_CACHE", str(place / f"test{next(number)}"))


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return setting.backbone()


@pytest.fixture
def image_set(backbone: Backbone):
    """A factory: labels (and optionally names) → an ImageSet of random 32-pixel pictures."""

    def make(labels, names=None, seed=0) -> ImageSet:
        labels = np.asarray(labels)
        names = names or [f"class{c}" for c in range(labels.max() + 1)]
        pixels = np.random.RandomState(seed).randint(0, 256, (len(labels), 32, 32, 3)).astype(np.uint8)
        return ImageSet(from_arrays(pixels, labels, names), Transforms(backbone.data_config))

    return make


@pytest.fixture
def picture_folder(tmp_path: Path):
    """A factory: writes root/<split>/<class>/<i>.png and returns root."""

    def make(classes=("ant", "bee", "cat"), train=3, test=2, root: Path = tmp_path / "pictures") -> Path:
        rng = np.random.RandomState(0)
        for split, count in (("train", train), ("val", test)):
            for name in classes:
                place = root / split / name
                place.mkdir(parents=True)
                for i in range(count):
                    Image.fromarray(rng.randint(0, 256, (40, 50, 3)).astype(np.uint8)).save(place / f"{i}.png")
        return root

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real tars. Without it the test is skipped, unless CIL_REQUIRE_DATA says it must be there."""
    place = Path(os.environ.get("CIL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (place / "tiny_imagenet_stream_train.tar").exists():
        if os.environ.get("CIL_REQUIRE_DATA"):
            pytest.fail(f"{place} holds no data, and CIL_REQUIRE_DATA is set")
        pytest.skip(f"no real images in {place}; set CIL_DATA")
    return place
