"""Scales of blocks of features, against numpy and under what a learner does with them."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cil.classifiers.scales import BlockScales
from cil.errors import ConfigError, DataError

WIDTHS = (3, 5, 2)


@pytest.fixture
def features():
    """Three blocks whose norms differ by factors of thousands, float32 [40, 10]."""
    sizes = np.repeat([30.0, 1.0, 0.01], WIDTHS)
    return torch.from_numpy((np.random.RandomState(0).randn(40, 10) * sizes).astype(np.float32))


def blocks(x):
    return np.split(np.asarray(x, dtype=np.float64), np.cumsum(WIDTHS)[:-1], axis=1)


def test_rms_is_the_first_tasks_and_stays(features):
    first, later = features[:25], features[25:] * 7
    scales = BlockScales(WIDTHS).fit(first)
    rms = [np.sqrt((block**2).sum(1).mean() / block.shape[1]) for block in blocks(first)]
    np.testing.assert_allclose(1 / scales.factors.numpy(), rms, rtol=1e-12)
    expected = np.concatenate([block / r for block, r in zip(blocks(later), rms, strict=True)], axis=1)
    np.testing.assert_allclose(scales(later), expected, rtol=1e-6)


def test_unit_is_each_images_own(features):
    scales = BlockScales(WIDTHS, "unit").fit(features[:5], weights=[4, 1, 0.25])
    lengths = np.stack([np.linalg.norm(block, axis=1) for block in blocks(scales(features))], axis=1)
    np.testing.assert_allclose(lengths, np.tile([2, 1, 0.5], (40, 1)), rtol=1e-6)


def test_none_changes_no_bit_and_weights_are_square_roots(features):
    assert torch.equal(BlockScales(WIDTHS, "none").fit(features)(features), features)
    weighted = BlockScales(WIDTHS, "none").fit(features, weights=torch.tensor([9.0, 0.0, 1.0]))
    np.testing.assert_allclose(weighted(features), np.asarray(features) * np.repeat([3, 0, 1], WIDTHS), rtol=1e-7)


@pytest.mark.parametrize("scale", ["rms", "unit", "none"])
def test_an_image_is_scaled_without_its_neighbours_and_in_its_dtype(features, scale):
    scales = BlockScales(WIDTHS, scale).fit(features)
    one_by_one = torch.cat([scales(row) for row in features.split(1)])
    assert torch.equal(scales(features), one_by_one)
    assert scales(features.double()).dtype == torch.float64
    torch.testing.assert_close(scales(features.double()).float(), one_by_one, rtol=1e-6, atol=1e-7)


def test_the_factors_are_the_state(features, tmp_path):
    fitted = BlockScales(WIDTHS).fit(features)
    save_file(fitted.state_dict(), tmp_path / "scales.safetensors")
    loaded = BlockScales(WIDTHS)
    loaded.load_state_dict(load_file(tmp_path / "scales.safetensors"))
    assert list(fitted.state_dict()) == ["factors"] and torch.equal(loaded(features), fitted(features))


def test_a_block_without_values_stays_zero(features):
    features[:, 3:8] = 0
    scaled = BlockScales(WIDTHS).fit(features)(features)
    assert bool(scaled.isfinite().all()) and not bool(scaled[:, 3:8].any())


def test_wrong_arguments_are_one_clear_line(features):
    with pytest.raises(ConfigError, match=r"widths are \[3, 0\]; give one or more widths ≥ 1"):
        BlockScales((3, 0))
    with pytest.raises(DataError, match="no features to take the scales from"):
        BlockScales(WIDTHS).fit(features[:0])
    for weights in ([1, 2], [1, -1, 1], [1, float("nan"), 1]):
        with pytest.raises(ConfigError, match="give 3 finite weights ≥ 0, one per block"):
            BlockScales(WIDTHS).fit(features, weights)
