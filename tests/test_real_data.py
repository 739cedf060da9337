"""Real images on the shipped backbone, against ten lines of numpy over timm's own pipeline."""

from __future__ import annotations

import tarfile
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from timm.data import create_dataset, create_transform

from cil import results
from cil.backbone import embedded_card, load_backbone
from cil.config.reading import load_config
from cil.runner import run

PER_CLASS = 5
STORED = {"tiny_imagenet_stream_train.tar": 8, "tiny_imagenet_stream_val.tar": 10}
"""Images per class in the archives of :func:`few`: more training images than are used, and a fifth of the test."""


@pytest.fixture(scope="module")
def few(real_data, tmp_path_factory):
    """A folder with the first images of each class, in archives as the whole ones are."""
    place = tmp_path_factory.mktemp("few")
    for name, per_class in STORED.items():
        seen: Counter[str] = Counter()
        with tarfile.open(real_data / name) as whole, tarfile.open(place / name, "w") as part:
            for member in whole:
                folder = member.name.rsplit("/", 1)[0]
                if member.isfile() and seen[folder] < per_class:
                    part.addfile(member, whole.extractfile(member))
                seen[folder] += member.isfile()
    return place


@pytest.fixture(scope="module")
def reference(few):
    """Nearest class mean by numpy over timm's dataset, transform and model: its share of right test images."""
    card = embedded_card()["input"]
    transform = create_transform(
        input_size=tuple(card["size"]),
        mean=card["mean"],
        std=card["std"],
        interpolation=card["interpolation"],
        crop_pct=1.0,
        crop_mode="squash",
    )
    vit = load_backbone().model
    assert isinstance(vit, timm.models.vision_transformer.VisionTransformer)

    def features(name, keep):
        data = create_dataset("", root=str(few / name), transform=transform)
        labels = np.array(data.reader.targets)
        chosen = [i for c in range(100) for i in np.flatnonzero(labels == c)[:keep]]
        with torch.inference_mode():
            parts = [vit(torch.stack([data[i][0] for i in chosen[k : k + 250]])) for k in range(0, len(chosen), 250)]
        return torch.cat(parts).numpy().astype(np.float64), labels[chosen]

    train, train_labels = features("tiny_imagenet_stream_train.tar", PER_CLASS)
    test, test_labels = features("tiny_imagenet_stream_val.tar", STORED["tiny_imagenet_stream_val.tar"])
    assert len(train) == 100 * PER_CLASS and len(test) == 1000
    means = np.stack([train[train_labels == c].mean(0) for c in range(100)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    scores = test / np.linalg.norm(test, axis=1, keepdims=True) @ means.T
    return (scores.argmax(1) == test_labels).mean()


@pytest.mark.slow
def test_ncm_is_ten_lines_of_numpy_for_any_order_and_split(few, reference, tmp_path):
    lasts = []
    for order, split in ((1993, "increment=10"), ("natural", "sizes=[37, 1, 62]")):
        overrides = [
            f"data.root={few}",
            f"data.per_class={PER_CLASS}",
            f"orders=[{order}]",
            f"name=n{len(lasts)}",
        ]
        overrides += ["hardware.device=cpu", "stream.increment=null", f"stream.{split}"]
        [folder] = run(load_config("split_tiny_imagenet100/ncm", overrides), tmp_path)
        found = results.read_run(folder)
        assert found["summary"]["passes_per_train_image"] == found["summary"]["passes_per_test_image"] == 1.0
        lasts.append(found["summary"]["accuracy_last"])
    assert lasts == pytest.approx([reference] * 2, abs=1.5 / 1000)  # a near tie may fall the other way in float32


def test_cifar10_tars_run(real_data, tmp_path):
    config = load_config("cifar10/ncm", [f"data.root={real_data}", "data.per_class=50", "hardware.device=cpu"])
    found = results.read_run(run(config, tmp_path)[0])
    assert found["complete"] and 0.35 < found["summary"]["accuracy_last"] < 0.6
    assert found["class_names"][0] in (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
