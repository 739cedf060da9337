"""The benchmarks that can be prepared: their original downloads, and the split sizes of published tables.

Sizes: LAMDA-PILOT's and RevisitingCIL's re-splits (arXiv 2303.07338), on which nearly all published numbers with
pre-trained ViTs were measured. For all but CIFAR-100 the lists of files behind them are not published, only archives
of the images; the md5 sums of these archives are the authors' (github.com/LAMDA-CL/RevisitingCIL, issue 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Layout = Literal["cifar", "classes", "cub", "objectnet", "subset"]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Args:
        classes: Number of classes.
        train: Training images.
        test: Test images.
        layout: Layout of the original download: CIFAR's binary files; one folder per class; CUB's text files;
            ObjectNet's ``images`` beside its ``mappings``; or a subset whose original has no such layout.
        original: Name of the original download, for messages.
        md5: md5 sum of the re-split's own archive, as hex digits.
    """

    classes: int
    train: int
    test: int
    layout: Layout
    original: str
    md5: str = ""


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "cifar100": Benchmark(100, 50_000, 10_000, "cifar", "cifar-100-binary.tar.gz"),
        "imagenet_r": Benchmark(200, 24_000, 6_000, "classes", "imagenet-r.tar", "730aa3fb9c7d2ec0b6381c6b23040681"),
        "imagenet_a": Benchmark(200, 5_981, 1_519, "classes", "imagenet-a.tar", "7f4aaf0b1532b7a0bd670822c152d3c5"),
        "cub": Benchmark(200, 9_430, 2_358, "cub", "CUB_200_2011.tgz", "85e342a2d5f941e740193602057df7a5"),
        "omnibenchmark": Benchmark(
            300, 89_697, 5_985, "subset", "OmniBenchmark's images by realm", "f1c30808a707f9197c6c811ea52e5cbb"
        ),
        "vtab": Benchmark(50, 1_796, 8_619, "subset", "VTAB's single sets", "a9c37bde6105a2516c900b0c33a437c1"),
        "objectnet": Benchmark(
            200, 26_509, 6_628, "objectnet", "objectnet-1.0.zip", "63ff7443a47bd682016a8ec59b8cc1bc"
        ),
    }
)

CUB_OFFICIAL = (5_994, 5_794)
"""(training images, test images) of CUB's ``train_test_split.txt``; the published tables use another split."""
