"""Estimates of the memory of classifiers, against what the process really took, and the refusal of what cannot fit."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cil.classifiers import LDA, NCM, Gaussians, Mahalanobis, PartsLDA, Ridge, TruncatedSVD, memory
from cil.config import Config
from cil.data.sources import ImageSource
from cil.errors import ConfigError
from cil.runner import run

STATUS = Path("/proc/self/status")
GIB = 2**30
ROOT = Path(__file__).parents[1]


def now(key):
    return int(re.search(rf"{key}:\s+(\d+)", STATUS.read_text())[1]) * 1024


def peak_of(work):
    """What ``work`` takes beyond what was in use, in bytes; its result is alive at the end."""
    ctypes.CDLL(None).mallopt(-3, 2**20)  # a matrix that is freed goes back to the system at once
    work()  # libraries allocate their own buffers once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark so far is forgotten
    before = now("VmRSS")
    kept = work()
    return now("VmHWM") - before, kept


MAKE = {
    "lda": lambda: LDA(1000),
    "lda gcv": lambda: LDA(1000, "gcv"),
    "ridge": lambda: Ridge(1000, strength=1.0),
    "ridge gcv": lambda: Ridge(1000, strength="gcv"),
    "mahalanobis": lambda: Mahalanobis(400),
    "gaussians": lambda: Gaussians(400),
    "parts": lambda: PartsLDA(1000, [range(500), range(500, 1000)]),
    "svd": lambda: TruncatedSVD(1000, rank=300, block=200),
}


def measure(make):
    """(bytes that a classifier took, its estimate)."""
    width, classes = make().feature_dim, 20
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % classes
    features = torch.randn(400, width, generator=generator) + torch.randn(classes, width, generator=generator)[labels]

    def work():
        classifier = make()
        for first in range(0, classes, 5):
            task = (labels >= first) & (labels < first + 5)
            classifier.partial_fit(features[task], labels[task]).logits(features[:10])
        return classifier

    taken, classifier = peak_of(work)
    return taken, classifier.peak_bytes(classes, classifier.width)


@pytest.fixture(scope="module")
def measured():
    """All of :data:`MAKE` in a process of its own: what other tests left running takes memory meanwhile."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs Linux and its allocator")
@pytest.mark.parametrize("name", MAKE)
def test_an_estimate_is_what_a_run_takes(measured, name):
    taken, estimate = measured[name]
    least = 0.4 if name == "mahalanobis" else 0.5  # its classes have few images here, whose inverses are of low rank
    assert least * estimate < taken < 1.1 * estimate


WIDE = {
    "LDA": lambda width: LDA(width),
    "LDA, gcv": lambda width: LDA(width, "gcv"),
    "Ridge": lambda width: Ridge(64, projection=width),
    "Ridge without projection": lambda width: Ridge(width),
    "Mahalanobis": lambda width: Mahalanobis(width),
    "Gaussians": lambda width: Gaussians(width),
    "TruncatedSVD": lambda width: TruncatedSVD(64, width),
    "PartsLDA": lambda width: PartsLDA(width, [range(width // 2), range(width // 2, width)]),
}


@pytest.mark.parametrize("name", WIDE)
def test_what_cannot_fit_is_refused_with_the_width_that_can(name, monkeypatch):
    monkeypatch.setattr(memory, "memory_bytes", lambda device: GIB / 4)
    with pytest.raises(ConfigError, match=r"take about [\d,.]+ GiB .* this machine has 0\.2 GiB") as error:
        WIDE[name](60_000)
    fits = int(re.search(r"(?:width|to) (\d+) or less", str(error.value))[1])
    assert ("`projection`" in str(error.value).split(" or less")[0]) == (name in ("Ridge", "TruncatedSVD"))
    if name != "PartsLDA":  # its first part is refused alone
        WIDE[name](fits)
        with pytest.raises(ConfigError):
            WIDE[name](fits + 1)


def test_every_class_counts(monkeypatch):
    """A matrix per class: one class fits, a hundred do not, and means alone do."""
    monkeypatch.setattr(memory, "memory_bytes", lambda device: GIB / 4)
    fecam = Mahalanobis(768)
    with pytest.raises(ConfigError, match=r"Mahalanobis: statistics of width 768 .* features of width 4"):
        fecam.require_memory(100)
    NCM(768).require_memory(100)


def test_a_run_is_refused_before_the_first_image(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "memory_bytes", lambda device: GIB / 256)
    monkeypatch.setattr(ImageSource, "read", lambda self, index: pytest.fail("an image was read"))
    learners = [{"name": "ncm"}, {"name": "fecam", "label": "wide"}]
    config = Config(data={"dataset": "digits"}, stream={"increment": 5}, learners=learners)
    with pytest.raises(ConfigError, match=r"learner wide: Mahalanobis: statistics of width 192 take about 0\.0"):
        run(config, tmp_path)
    assert not np.any([path.is_file() for path in tmp_path.rglob("*")])


if __name__ == "__main__":
    print(json.dumps({name: measure(make) for name, make in MAKE.items()}))
