"""The bank of all updates: what it keeps, and what is read from it, against batch forms in numpy of all at once."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merging import LINEAR, SHAPES, D, difference, draw, low_rank, model, nearest_orthonormal, run, stream, update

from cil.config.renamed import current_learner_keys
from cil.errors import BackboneError, ConfigError, DataError
from cil.merging import (
    EMR,
    TALL,
    TIES,
    TSVC,
    Average,
    Consensus,
    ExpertBank,
    IsoC,
    IsoCTS,
    Own,
    RegMean,
    TaskArithmetic,
    Twin,
)
from cil.merging.on_disk import merge_files

FC1 = "blocks.0.mlp.fc1.weight"


def taus_of(base, tasks, name):
    return [(task[name].double() - base[name].double()).numpy() for task in tasks]


def blocks_of(name, matrices):
    """The row blocks of a weight, each for all tasks."""
    return list(zip(*(np.split(each, 3 if "qkv" in name else 1) for each in matrices), strict=True))


def truncated(matrix, k):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :k] * s[:k] @ vt[:k]


def isotropic_cts(updates, fraction):
    """The published algorithm, with full SVDs in numpy."""
    q, count = min(updates[0].shape), len(updates)
    specific = round((q - int(fraction * q)) / count)
    common = q - specific * count
    u, s, vt = np.linalg.svd(sum(updates), full_matrices=False)
    us, ss, vs = [], [], []
    for delta in updates:
        rest = delta - u[:, :common] @ u[:, :common].T @ delta
        a, b, c = np.linalg.svd(rest, full_matrices=False)
        us.append(a[:, :specific])
        ss.append(b[:specific])
        vs.append(c[:specific].T)
    us, vs = np.concatenate([*us, u[:, :common]], 1), np.concatenate([*vs, vt[:common].T], 1)
    return np.concatenate([*ss, s[:common]]).mean() * nearest_orthonormal(us) @ nearest_orthonormal(vs).T


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_every_update_comes_back_and_takes_the_space_of_its_rank():
    """Rank 2 of [24, 6]: 2 · 30 numbers; rank 6: the whole, 144; no change: nothing. Sizes add up over the tasks."""
    base = model()
    bank = ExpertBank().start(base)
    low, full, bias = low_rank(3, 2), draw(*SHAPES[FC1], seed=9), "blocks.1.mlp.fc2.bias"
    sizes = []
    updates = [low[0], {FC1: full}, {bias: draw(D)}, low[1] | {bias: draw(D, seed=1)}]
    for each in updates:
        bank.add_update(each)
        sizes.append(bank.bytes)
    assert np.diff([0, *sizes]).tolist() == [8 * 60, 8 * 144, 8 * D, 8 * (60 + D)]
    assert bank.bytes == sum(v.numel() * 8 for k, v in bank.state_dict().items() if ":" in k)
    for task, each in enumerate(updates):
        vector = bank.vector(task)
        assert set(vector) == set(base)
        for name, value in vector.items():
            torch.testing.assert_close(value, each.get(name, torch.zeros_like(value)), rtol=0, atol=1e-14)
    (entry,) = [entry for entry in bank.layout.entries if entry.name == FC1]
    for task, rank in enumerate((2, 6, 0, 2)):
        left, right = bank.factors(entry, task)
        assert left.shape == (24, rank) and right.shape == (rank, 6)
        torch.testing.assert_close(left @ right, bank.vector(task)[FC1], rtol=0, atol=1e-14)
    with pytest.raises(ConfigError, match="there is no task 4; the bank has 4, from 0"):
        bank.vector(4)


def test_a_smaller_dtype_and_a_smaller_rank():
    base, (low,) = model(dtype=torch.float32), low_rank(1, 2, torch.float32)
    settings = ((2, None), (2, "bfloat16"), (1, None))
    exact, half, one = (ExpertBank(*each).start(base).add_update(low) for each in settings)
    assert (half.bytes, one.bytes) == (exact.bytes / 2, exact.bytes / 2)
    state = exact.state_dict()
    left, right = (state[f"{side}_0:blocks/0/mlp/fc1/weight"].double() for side in ("left", "right"))
    bound = (2 * 2**-8 + 2**-16) * left.abs() @ right.abs()
    error = (half.vector(0)[FC1].double() - left @ right).abs()
    assert bool((error <= bound + 1e-6).all()) and float(error.max()) > 1e-4
    assert np.abs(one.vector(0)[FC1].numpy() - truncated(low[FC1].double().numpy(), 1)).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rounding_of_merged_weights_is_no_direction(dtype):
    """θ_0 + Δ, rounded, differs from θ_0 by a matrix of full rank; in float64 too, where nothing else would show it."""
    name, size = "blocks.0.mlp.fc1.weight", (96, 64)
    theta = draw(*size).to(dtype)
    strength = {torch.float32: 1e-3, torch.bfloat16: 0.3}[dtype]
    delta = strength * draw(size[0], 2, seed=1) @ draw(2, size[1], seed=2)
    rounded = (theta.double() + delta).to(dtype)
    wide = {"other.bias": torch.zeros(2, dtype=torch.float64)}
    bank = ExpertBank().start({name: theta} | wide).add({name: rounded} | wide)
    assert bank.state_dict()["left_0:blocks/0/mlp/fc1/weight"].shape == (96, 2)
    assert float((bank.vector(0)[name] - delta).norm() / (rounded.double() - theta.double() - delta).norm()) < 0.5
    exact = ExpertBank().start({name: theta} | wide).add_update({name: rounded.double() - theta.double()})
    torch.testing.assert_close(exact.vector(0)[name], rounded.double() - theta.double(), rtol=0, atol=1e-15)


def test_a_file_holds_what_buffers_hold_and_tasks_are_added_to_it(tmp_path):
    base, tasks, _ = stream(4, torch.float32)
    places = [tmp_path / f"{i}.safetensors" for i in range(5)]
    for state, place in zip((base, *tasks), places, strict=True):
        save_file(state, place)
    state = tmp_path / "state.safetensors"
    merge_files("iso_cts", places[0], places[1:3], tmp_path / "two.safetensors", state=state)
    merge_files("iso_cts", places[0], places[3:], tmp_path / "four.safetensors", state=state)
    whole = run(IsoCTS(), base, tasks)
    assert difference(load_file(tmp_path / "four.safetensors"), whole.merged()) == 0
    assert {k: v.shape for k, v in load_file(state).items()} == {k: v.shape for k, v in whole.state_dict().items()}
    bank = ExpertBank().start(base)  # a bank's state is the same for every rule
    bank.load_state_dict(load_file(state))
    assert all(torch.equal(bank.vector(3)[key], value) for key, value in whole.vector(3).items())
    earlier = run(ExpertBank(), base, tasks[:1]).state_dict()  # a state of fewer tasks replaces one of more
    bank.load_state_dict(earlier)
    assert bank.state_dict().keys() == earlier.keys() and int(bank.count) == 1


# --- what is read from it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.5), (3, 0.8), (3, 0.0), (5, 0.4)])
def test_iso_cts_equals_the_batch_form_in_any_order_and_after_a_resume(count, fraction):
    base, tasks, _ = stream(count)
    first = run(IsoCTS(1.3, fraction), base, tasks[:1])
    resumed = IsoCTS(1.3, fraction).start(base)
    resumed.load_state_dict(first.state_dict())
    for task in tasks[1:]:
        resumed.add(task)
    merged = [run(IsoCTS(1.3, fraction), base, tasks[::-1]).merged(), resumed.merged()]
    for name in base:
        taus = taus_of(base, tasks, name)
        expected = np.mean(taus, 0)
        if name in LINEAR:
            expected = np.concatenate([1.3 * isotropic_cts(block, fraction) for block in blocks_of(name, taus)])
        for one in merged:
            assert np.abs(update(one, base)[name].numpy() - expected).max() < 1e-12, name


def test_iso_cts_without_specific_directions_is_iso_c():
    base, tasks, _ = stream(4)  # 6 − ⌊0.8 · 6⌋ = 2 directions of 4 tasks: round(0.5) = 0 each
    assert difference(run(IsoCTS(1.2), base, tasks).merged(), run(IsoC(1.2), base, tasks).merged()) < 1e-12


def test_iso_cts_takes_no_directions_that_updates_lack():
    """Three tasks of rank one, of which the common directions are all: in both precisions all singular values of the
    merged update are the mean of those of the sum."""
    base, deltas = model(), low_rank(3, 1)
    total = sum(delta[FC1] for delta in deltas).numpy()
    u, s, vt = np.linalg.svd(total, full_matrices=False)
    expected = s[:3].mean() * u[:, :3] @ vt[:3]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        rule = IsoCTS(fraction=0.5).start({key: value.to(dtype) for key, value in base.items()})
        for delta in deltas:
            rule.add_update({FC1: delta[FC1].to(dtype)})
        got = {entry.name: delta for entry, delta in rule.deltas()}[FC1]
        assert np.abs(got.double().numpy() - expected).max() < tolerance * np.abs(expected).max()
    opposite = ExpertBank().start(base).add_update(deltas[0]).add_update({FC1: -deltas[0][FC1]})
    assert not bool(opposite.given_to(IsoCTS()).merged()[FC1].sub(base[FC1]).any())  # a sum of zero has no direction


@pytest.mark.parametrize(("masks", "threshold"), [(2, 0.4), (3, 0.2)])
def test_consensus_and_tall_equal_their_batch_forms(masks, threshold):
    base, tasks, _ = stream(4)
    rule = run(Consensus(0.5, threshold, masks), base, tasks)
    merged, bank = update(rule.merged(), base), run(ExpertBank(), base, tasks[::-1])
    expert = TALL(threshold).read(bank, 0)  # the last task
    for name in base:
        taus = np.stack(taus_of(base, tasks, name))
        belong = np.abs(taus) > threshold * np.abs(taus.sum(0) - taus)
        expected = 0.5 * taus.sum(0) * (belong.sum(0) >= masks)
        assert np.abs(merged[name].numpy() - expected).max() < 1e-12
        assert np.abs(expert[name].numpy() - taus.sum(0) * belong[3]).max() < 1e-12
    alone = update(run(Consensus(0.5, threshold, masks), base, tasks[:1]).merged(), base)
    assert all(float((alone[n] - 0.5 * (tasks[0][n] - base[n])).abs().max()) < 1e-12 for n in base)


def test_tall_recovers_tasks_that_change_different_weights():
    base, mask = model(), {name: draw(*shape, seed=7) > 0 for name, shape in SHAPES.items()}
    deltas = [{n: v * mask[n] for n, v in model(1).items()}, {n: v * ~mask[n] for n, v in model(2).items()}]
    bank = ExpertBank().start(base).add_update(deltas[0]).add_update(deltas[1])
    for task, delta in enumerate(deltas):
        assert difference(TALL(0.6).read(bank, task), delta) < 1e-12


@pytest.mark.parametrize("pooling", ["tensors", "entries"])
def test_emr_equals_its_batch_form(pooling):
    base, tasks, _ = stream(3)
    bank = run(ExpertBank(), base, tasks)
    for task in range(3):
        masked, own = {}, {}
        for name in base:
            taus = np.stack(taus_of(base, tasks, name))
            sign = np.where(taus.sum(0) > 0, 1, -1)
            unified = sign * np.where(np.sign(taus) == sign, np.abs(taus), 0).max(0)
            masked[name], own[name] = unified * (taus[task] * unified > 0), taus[task]
        pool = np.mean if pooling == "tensors" else np.sum
        sizes = [sum(pool(np.abs(each)) for each in values.values()) for values in (own, masked)]
        got = EMR(pooling).read(bank, task)
        for name in base:
            assert np.abs(got[name].numpy() - sizes[0] / sizes[1] * masked[name]).max() < 1e-12
    ties = update(run(TIES(1.0, "max", 1.0), base, tasks).merged(), base)  # the unified vector
    for entry in bank.layout.entries:
        kept = EMR(pooling).masked(bank.vectors(entry), 0)
        assert float((kept - ties[entry.name] * (kept != 0)).abs().max()) < 1e-12 and bool(kept.any())
    one = run(ExpertBank(), base, tasks[:1])
    assert difference(EMR(pooling).read(one, 0), update(tasks[0], base)) < 1e-12  # alone, r = 1


def test_tsv_c_and_twin_keep_leading_directions():
    base, tasks, _ = stream(3)
    bank = run(ExpertBank(), base, tasks)
    cut, twin, own = TSVC().read(bank, 1), Twin(TaskArithmetic(0.3), 0.3).read(bank, 1), Own().read(bank, 1)
    for name in base:
        taus = taus_of(base, tasks, name)
        shared, delta = 0.3 * sum(taus), taus[1]
        expected = (delta, delta)
        if name in LINEAR:
            parts = [truncated(block[1], 2) for block in blocks_of(name, taus)]
            expected = np.concatenate(parts), shared + truncated(delta - shared, 2)  # ⌊6/3⌋ and ⌈0.3 · 6⌉
        for got, wanted in zip((cut, twin, own), (*expected, delta), strict=True):
            assert np.abs(got[name].numpy() - wanted).max() < 1e-12, name
    many = run(ExpertBank(), base, [tasks[0]] * (D + 1))
    with pytest.raises(BackboneError, match="has 6 singular directions, so 6 tasks can share them; there are 7"):
        TSVC().read(many, 0)


def test_other_rules_merge_what_is_in_the_bank():
    base, tasks, _ = stream(3)
    bank = run(ExpertBank(), base, tasks)
    for make in (Average, lambda: TIES(0.5), lambda: IsoCTS(fraction=0.5), Consensus):
        assert difference(bank.merged_by(make()), run(make(), base, tasks).merged()) < 1e-12
    assert difference(bank.merged(), run(Average(), base, tasks).merged()) < 1e-12
    few = run(ExpertBank(), base, tasks, names=LINEAR[:2])
    assert difference(few.merged_by(Average()), run(Average(), base, tasks, names=LINEAR[:2]).merged()) < 1e-12
    with pytest.raises(DataError, match="RegMean needs grams of every task"):
        bank.merged_by(RegMean())


def test_orders_of_the_tasks_do_not_matter():
    base, deltas = model(), low_rank(3, 2)
    rules = [lambda: IsoCTS(fraction=0.5), Consensus]
    for rule in rules:
        merged = []
        for order in itertools.permutations(range(3)):
            bank = rule().start(base)
            for task in order:
                bank.add_update(deltas[task])
            merged.append(bank.merged())
        assert max(difference(merged[0], other) for other in merged) < 1e-12


def test_a_stored_iso_c_of_an_older_version_scales_the_mean():
    """Before there was a key, and when ``mean`` was its default; a configuration stored now states it."""
    older = {"name": "merge", "rule": {"name": "iso_c", "scale": 1.2}}
    assert current_learner_keys(older)["rule"] == {"name": "iso_c", "scale": 1.2, "of": "mean"}
    assert older["rule"] == {"name": "iso_c", "scale": 1.2}
    for of in ("mean", "sum"):
        assert current_learner_keys({"name": "merge", "rule": {"name": "iso_c", "of": of}})["rule"]["of"] == of
    assert current_learner_keys({"name": "merge", "rule": {"name": "average"}})["rule"] == {"name": "average"}
    assert math.isclose(IsoC().scale, 1.0) and IsoC().of == "sum"
