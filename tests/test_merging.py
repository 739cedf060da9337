"""Merging rules against straightforward batch forms in numpy, PEFT's own functions, closed forms and hand cases."""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cil.errors import BackboneError, ConfigError, DataError
from cil.merging import (
    DARE,
    EMA,
    EMR,
    NUFILT,
    OPCM,
    TALL,
    TIES,
    TSVM,
    WUDI,
    Average,
    Consensus,
    ContinualTIES,
    DareTIES,
    ExpertBank,
    Fisher,
    GramMerge,
    IsoC,
    IsoCTS,
    LiNeS,
    MagMax,
    NormMatching,
    RegMean,
    TaskArithmetic,
    Twin,
    WiseFT,
    build_rule,
    layout,
)
from cil.merging.configs import RULES
from cil.merging.numerics import kth_largest_magnitude, rank, thin_svd
from cil.merging.opcm import project, split
from cil.merging.statistics import Statistics
from cil.utils.randomness import derived_seed, isolated

D = 6
SHAPES = {
    "cls_token": (1, 1, D),
    "pos_embed": (1, 5, D),
    "patch_embed.proj.weight": (D, 3, 2, 2),
    "blocks.0.norm1.weight": (D,),
    "blocks.0.attn.qkv.weight": (3 * D, D),
    "blocks.0.attn.qkv.bias": (3 * D,),
    "blocks.0.mlp.fc1.weight": (4 * D, D),
    "blocks.1.mlp.fc2.weight": (D, 4 * D),
    "blocks.1.mlp.fc2.bias": (D,),
    "norm.weight": (D,),
}
LINEAR = [name for name, shape in SHAPES.items() if len(shape) == 2]
DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
BOTH = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def model(seed=0, dtype=torch.float64, scale=1.0):
    shapes = SHAPES.items()
    return {name: scale * draw(*shape, seed=1000 * seed + i, dtype=dtype) for i, (name, shape) in enumerate(shapes)}


def stream(count=4, dtype=torch.float64, first=1):
    """A pre-trained state dict and tasks fine-tuned from it, with statistics."""
    base, tasks, stats = model(0, dtype), [], []
    for t in range(first, first + count):
        change = model(t, dtype, 0.1)
        tasks.append({name: value + change[name] for name, value in base.items()})
        inputs = {name: draw(50, SHAPES[name][1], seed=77 * t + i) for i, name in enumerate(LINEAR)}
        fisher = {name: v.square() * 10.0 ** (2 * t - 6) for name, v in model(100 + t).items()}
        stats.append(Statistics(fisher, {name: x.T @ x / len(x) for name, x in inputs.items()}))
    return base, tasks, stats


def run(rule, base, tasks, stats=None, **start):
    rule.start(base, **start)
    for task, known in zip(tasks, stats or [None] * len(tasks), strict=True):
        rule.add(task, known)
    return rule


def flat(state):
    return np.concatenate([v.double().numpy().ravel() for v in state.values()])


def difference(state, other):
    return max(float((state[k].double() - other[k].double()).abs().max()) for k in other)


def update(state, base):
    return {k: state[k].double() - base[k].double() for k in base}


def total_norm(tensors):
    return math.sqrt(sum(float(v.double().square().sum()) for v in tensors.values()))


# --- OPCM ------------------------------------------------------------------------------------------------------------


def full_projection(delta, accumulated, alpha, variant):
    """The formulas with full bases, in numpy: the reference codes' rotations, and the paper's double sum."""
    u, s, vt = np.linalg.svd(accumulated, full_matrices=True)
    c = u.T @ delta @ vt.T
    share = np.cumsum(s) / s.sum()
    if variant == "paper":
        first = int(np.argmax(share >= alpha))
        kept = np.zeros_like(c)
        for i in range(first, c.shape[0]):
            for j in range(first, c.shape[1]):
                kept[i, j] = 0 if i == j else c[i, j]
        return u @ kept @ vt
    first = int(np.argmax(share > alpha))
    if variant == "diag_zeroed":
        np.fill_diagonal(c, 0)
    c[:first, :first] = 0
    return u @ c @ vt


VARIANTS = ("diag_zeroed", "diag_kept", "paper")


@BOTH
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4), (12, 3)])
def test_thin_projection_equals_the_one_with_full_bases(shape, variant, dtype):
    for seed, alpha in itertools.product(range(5), (0.0, 0.2, 0.5, 0.8, 0.99)):
        delta, accumulated = draw(*shape, seed=seed), draw(*shape, seed=100 + seed)
        expected = full_projection(delta.numpy(), accumulated.numpy(), alpha, variant)
        got = project(delta.to(dtype), accumulated.to(dtype), alpha, variant)
        assert got.dtype == dtype
        assert np.abs(got.double().numpy() - expected).max() < TOLERANCE[dtype]


def opcm_by_the_book(base, tasks, alpha, variant, split_qkv):
    """Algorithm as published: θ^(t−1) and λ_{t−1} are kept, the whole model is rescaled after every task."""
    base = {k: v.numpy() for k, v in base.items()}
    theta = {k: v.numpy() for k, v in tasks[0].items()}
    norms = [math.sqrt(sum(((theta[k] - base[k]) ** 2).sum() for k in base))]
    lam = 1.0
    for task in tasks[1:]:
        task = {k: v.numpy() for k, v in task.items()}
        norms.append(math.sqrt(sum(((task[k] - base[k]) ** 2).sum() for k in base)))
        s = {}
        for k in base:
            merged, delta = theta[k] - base[k], task[k] - base[k]
            if k in LINEAR:
                parts = 3 if split_qkv and "qkv" in k else 1
                pairs = zip(np.split(delta, parts), np.split(merged, parts), strict=True)
                delta = np.concatenate([full_projection(d, m, alpha, variant) for d, m in pairs])
            s[k] = lam * merged + delta
        size = math.sqrt(sum((v**2).sum() for v in s.values()))
        lam = size / np.mean(norms)
        theta = {k: base[k] + s[k] / lam for k in base}
    return {k: torch.from_numpy(v) for k, v in theta.items()}


@BOTH
@pytest.mark.parametrize("split_qkv", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_opcm_equals_the_published_recursion(variant, split_qkv, dtype):
    base, tasks, _ = stream(5, first=20)  # a stream without nearly equal singular values, where bases are arbitrary
    expected = opcm_by_the_book(base, tasks, 0.4, variant, split_qkv)
    cast = [{k: v.to(dtype) for k, v in s.items()} for s in (base, *tasks)]
    rule = run(OPCM(0.4, variant, split_qkv), cast[0], cast[1:])
    assert difference(rule.merged(), expected) < TOLERANCE[dtype]
    assert abs(total_norm(update(rule.merged(), cast[0])) / rule.mean_norm - 1) < 1e-5


def test_the_three_operators_differ():
    base, tasks, _ = stream(3)
    merged = [run(OPCM(0.5, variant), base, tasks).merged() for variant in VARIANTS]
    for a, b in itertools.combinations(merged, 2):
        assert difference(a, b) > 1e-3


@BOTH
def test_opcm_returns_the_first_task_and_merges_what_sits_beside_submodules(dtype):
    base, tasks, _ = stream(2, dtype)
    rule = run(OPCM(), base, tasks[:1])
    assert difference(rule.merged(), tasks[0]) <= 4 * torch.finfo(dtype).eps
    rule.add(tasks[1])
    both = {k: 2 * update(run(Average(), base, tasks).merged(), base)[k] for k in base}
    scale = rule.mean_norm / total_norm({k: v.double() for k, v in rule.named_buffers() if k.startswith("sum:")})
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.bias", "norm.weight"):
        got = update(rule.merged(), base)[name]
        assert float((got - scale * both[name]).abs().max()) < TOLERANCE[dtype], name  # P is the identity there


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_projection_is_orthogonal_to_the_accumulated_update_iff_the_diagonal_goes(shape):
    delta, accumulated = draw(*shape, seed=3), draw(*shape, seed=4)
    inner = {v: float((project(delta, accumulated, 0.5, v) * accumulated).sum()) for v in VARIANTS}
    assert abs(inner["diag_zeroed"]) < 1e-12 and abs(inner["paper"]) < 1e-12
    assert abs(inner["diag_kept"]) > 1e-2


def test_the_same_task_twice():
    base, (task, *_), _ = stream(1)
    for variant in VARIANTS:
        once, twice = run(OPCM(0.5, variant), base, [task]), run(OPCM(0.5, variant), base, [task, task])
        changed = {
            name: float((twice.get_buffer(name) - once.get_buffer(name)).abs().max())
            for name, _ in once.named_buffers()
            if name.startswith("sum:") and name.removeprefix("sum:").replace("/", ".") in LINEAR
        }
        assert len(changed) == len(LINEAR)
        for value in changed.values():
            assert (value > 1e-3) if variant == "diag_kept" else (value < 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_accumulated_projects_nothing(variant):
    delta = draw(4, 6)
    assert torch.equal(project(delta, torch.zeros(4, 6, dtype=delta.dtype), 0.5, variant), delta)


@pytest.mark.parametrize("variant", VARIANTS)
def test_projection_of_a_low_rank_update_is_the_same_in_both_precisions(variant):
    for seed in range(10):
        accumulated = draw(20, 2, seed=seed) @ draw(2, 12, seed=50 + seed)
        delta = draw(20, 12, seed=90 + seed)
        wide = project(delta, accumulated, 0.5, variant)
        narrow = project(delta.float(), accumulated.float(), 0.5, variant)
        assert float((wide - narrow).abs().max()) < 1e-4


@pytest.mark.parametrize("shape", [(90, 24), (24, 90), (30, 24)])
def test_singular_vectors_in_float32_are_those_of_float64(shape):
    q = min(shape)
    u, v = (torch.linalg.qr(draw(side, q, seed=side)).Q for side in shape)
    matrix = u * torch.logspace(0, -2.5, q, dtype=torch.float64) @ v.T
    got_u, sigma, got_v = thin_svd(matrix.float())
    assert got_u.dtype == sigma.dtype == got_v.dtype == torch.float32
    assert rank(sigma, shape) == q
    assert torch.allclose(sigma.double(), torch.logspace(0, -2.5, q, dtype=torch.float64), rtol=1e-4)
    for mine, exact in ((got_u, u), (got_v, v)):
        assert float(((mine.double().T @ exact).abs() - torch.eye(q)).abs().max()) < 1e-3
    assert float(((got_u * sigma) @ got_v.T - matrix).abs().max()) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_projection_does_not_see_the_scale_of_the_accumulated_update(variant):
    delta, accumulated = draw(7, 5), draw(7, 5, seed=1)
    assert torch.allclose(project(delta, accumulated, 0.5, variant), project(delta, 1e-4 * accumulated, 0.5, variant))


def test_alpha_at_its_ends_and_on_a_share():
    delta, accumulated = draw(6, 4), draw(6, 4, seed=1)
    assert torch.allclose(project(delta, accumulated, 0.0, "diag_kept"), delta)
    for variant in VARIANTS:  # everything is protected: no part of the accumulated update itself is left
        left = project(accumulated, accumulated, 1.0, variant)
        assert float(left.abs().max()) < 1e-12
        again = project(delta.float(), accumulated.float(), 1.0, variant)
        assert float((project(delta, accumulated, 1.0, variant) - again).abs().max()) < 1e-5
    for dtype in DTYPES:  # shares 0.4, 0.7, 0.9, 1: the code crosses 0.7 after it, the paper at it
        sigma = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=dtype) / 3
        assert [split(sigma, alpha, inclusive=False) for alpha in (0, 0.3, 0.7, 0.95, 1)] == [0, 0, 2, 3, 4]
        assert [split(sigma, alpha, inclusive=True) for alpha in (0, 0.3, 0.7, 0.95, 1)] == [0, 0, 1, 3, 4]


# --- closed forms ----------------------------------------------------------------------------------------------------


@BOTH
def test_linear_rules_are_their_formulas(dtype):
    base, tasks, _ = stream(4, dtype)
    theta0, taus = flat(base), [flat(task) - flat(base) for task in tasks]
    ema = np.zeros_like(theta0)
    for tau in taus:
        ema = 0.7 * ema + 0.3 * tau
    first = taus[0]
    for tau in taus[1:]:
        first = 0.7 * first + 0.3 * tau
    best = np.stack(taus)[np.abs(np.stack(taus)).argmax(0), np.arange(len(theta0))]
    expected = {
        "average": (Average(), theta0 + np.mean(taus, 0)),
        "wise_ft": (WiseFT(0.3), theta0 + ema),
        "ema": (EMA(0.3), theta0 + first),
        "newest": (EMA(1.0), theta0 + taus[-1]),
        "oldest": (EMA(0.0), theta0 + taus[0]),
        "sum": (TaskArithmetic(0.4), theta0 + 0.4 * np.sum(taus, 0)),
        "c/T": (TaskArithmetic(0.4, "tasks"), theta0 + 0.1 * np.sum(taus, 0)),
        "magmax": (MagMax(0.5), theta0 + 0.5 * best),
    }
    for name, (rule, vector) in expected.items():
        assert np.abs(flat(run(rule, base, tasks).merged()) - vector).max() < TOLERANCE[dtype], name


def test_of_equal_magnitudes_magmax_takes_the_later():
    base = {"a.weight": torch.zeros(2)}
    rule = run(MagMax(1.0), base, [{"a.weight": torch.tensor([1.0, -2.0])}, {"a.weight": torch.tensor([-1.0, 1.0])}])
    assert rule.merged()["a.weight"].tolist() == [-1.0, -2.0]


@BOTH
def test_isotropic_merging(dtype):
    base, tasks, _ = stream(3, dtype)
    merged = update(run(IsoC(1.5), base, tasks).merged(), base)
    mean = update(run(Average(), base, tasks).merged(), base)
    for name in base:
        expected = mean[name].numpy()
        if name in LINEAR:
            blocks = []
            for part in np.split(3 * expected, 3 if "qkv" in name else 1):
                u, s, vt = np.linalg.svd(part, full_matrices=False)
                blocks.append(1.5 * s.mean() * u @ vt)
            expected = np.concatenate(blocks)
        assert np.abs(merged[name].numpy() - expected).max() < 10 * TOLERANCE[dtype], name
    low = {k: torch.zeros_like(base[k]) for k in LINEAR} | {
        "blocks.0.mlp.fc1.weight": torch.ones(4 * D, D, dtype=dtype)
    }
    rule = IsoC().start(base).add_update(low)
    got = update(rule.merged(), base)["blocks.0.mlp.fc1.weight"]  # rank one is isotropic as it is
    assert float((got - 1).abs().max()) < TOLERANCE[dtype]


def test_the_published_scale_of_isotropic_merging_is_that_of_the_sum():
    base, tasks, _ = stream(3)
    mean, total = (update(run(IsoC(1.5, of=of), base, tasks).merged(), base) for of in ("mean", "sum"))
    for name in base:
        factor = 3 if name in LINEAR else 1
        assert float((total[name] - factor * mean[name]).abs().max()) < 1e-12, name


# --- TSV-M -----------------------------------------------------------------------------------------------------------


def nearest_orthonormal(matrix):
    p, _, q = np.linalg.svd(matrix, full_matrices=False)
    return p @ q


@BOTH
@pytest.mark.parametrize("count", [2, 3, 5])
def test_tsv_m_equals_the_batch_form_in_any_order(count, dtype):
    """Two SVDs of all updates at once, in numpy, in float64 to 1e-12; 5 tasks do not divide 6 directions."""
    base, tasks, _ = stream(count, dtype)
    orders = [range(count), range(count)[::-1]]
    merged = [update(run(TSVM(0.7), base, [tasks[i] for i in order]).merged(), base) for order in orders]
    for name in base:
        taus = [(t[name].double() - base[name].double()).numpy() for t in tasks]
        expected = np.mean(taus, 0)
        if name in LINEAR:
            rows = []
            for parts in zip(*(np.split(tau, 3 if "qkv" in name else 1) for tau in taus), strict=True):
                k = min(parts[0].shape) // count
                svds = [np.linalg.svd(part, full_matrices=False) for part in parts]
                u, v = (np.concatenate(x, 1) for x in ([a[:, :k] for a, _, _ in svds], [c[:k].T for _, _, c in svds]))
                s = np.concatenate([b[:k] for _, b, _ in svds])
                rows.append(0.7 * nearest_orthonormal(u) * s @ nearest_orthonormal(v).T)
            expected = np.concatenate(rows)
        for one in merged:
            error = np.abs(one[name].numpy() - expected).max()
            assert error < (1e-12 if dtype == torch.float64 else 1e-3), name


def low_rank(count, r, dtype=torch.float64, name="blocks.0.mlp.fc1.weight"):
    m, n = SHAPES[name]
    return [{name: (draw(m, r, seed=t) @ draw(r, n, seed=50 + t)).to(dtype)} for t in range(count)]


def test_tsv_m_takes_no_directions_that_an_update_lacks():
    """Three tasks of rank one have three directions and not six: as in the space that they span; in both precisions."""
    base, name = model(), "blocks.0.mlp.fc1.weight"
    deltas = low_rank(3, 1)
    svds = [np.linalg.svd(delta[name].numpy()) for delta in deltas]
    u, v = np.stack([a[:, 0] for a, _, _ in svds], 1), np.stack([c[0] for _, _, c in svds], 1)
    expected = nearest_orthonormal(u) * [b[0] for _, b, _ in svds] @ nearest_orthonormal(v).T
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        rule = TSVM().start({key: value.to(dtype) for key, value in base.items()})
        for delta in deltas:
            rule.add_update({name: delta[name].to(dtype)})
        got = {entry.name: delta for entry, delta in rule.deltas()}[name]
        assert np.abs(got.double().numpy() - expected).max() < tolerance
    twice = TSVM().start(base).add_update(deltas[0]).add_update(deltas[0])  # two equal directions are one
    got = {entry.name: delta for entry, delta in twice.deltas()}[name]
    assert float((got - deltas[0][name]).abs().max()) < 1e-12


def test_tsv_m_refuses_more_tasks_than_directions_and_changes_nothing():
    base, tasks, _ = stream(D + 1)
    rule = run(TSVM(), base, tasks[:D])
    before = copy.deepcopy(rule.state_dict())
    with pytest.raises(BackboneError, match="has 6 singular directions, so 6 tasks can be merged"):
        rule.add(tasks[D])
    assert all(torch.equal(value, before[key]) for key, value in rule.state_dict().items())


# --- WUDI ------------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("anchor", ["zero", "mean", "sum"])
def test_wudi_equals_the_batch_form_in_any_order(anchor, dtype):
    base, tasks, _ = stream(4, dtype)
    orders = [(0, 1, 2, 3), (3, 1, 0, 2)]
    merged = [update(run(WUDI(0.2, anchor), base, [tasks[i] for i in order]).merged(), base) for order in orders]
    for name in base:
        taus = [(t[name].double() - base[name].double()).numpy() for t in tasks]
        expected = np.mean(taus, 0)
        if name in LINEAR:
            grams = [tau.T @ tau / (tau**2).sum() for tau in taus]
            c, b = sum(grams), sum(tau @ gram for tau, gram in zip(taus, grams, strict=True))
            a = {"zero": 0, "mean": 1 / 4, "sum": 1}[anchor] * sum(taus)
            expected = a + (b - a @ c) @ np.linalg.inv(c + 0.2 * np.diag(c).mean() * np.eye(len(c)))
        for one in merged:
            error = np.abs(one[name].numpy() - expected).max()
            assert error < (1e-12 if dtype == torch.float64 else TOLERANCE[dtype]), name


def test_wudis_steps_are_adam_on_the_published_objective():
    """torch's own gradient of Σ ‖(M − Δ_t) Δ_tᵀ‖² / ‖Δ_t‖², from the sum of the updates."""
    base, tasks, _ = stream(3)
    merged = update(run(WUDI(steps=25, lr=1e-2), base, tasks).merged(), base)
    for name in LINEAR:
        deltas = [task[name] - base[name] for task in tasks]
        weight = nn.Parameter(torch.stack(deltas).sum(0))
        optimizer = torch.optim.Adam([weight], lr=1e-2)
        for _ in range(25):
            optimizer.zero_grad()
            loss = sum(((weight - d) @ d.T).square().sum() / d.square().sum() for d in deltas)
            loss.backward()
            optimizer.step()
        assert float((merged[name] - weight.detach()).abs().max()) < 1e-9, name


def test_wudi_changes_no_tasks_outputs_if_row_spaces_are_independent():
    base, name = model(), "blocks.0.mlp.fc1.weight"
    deltas = low_rank(3, 2)  # 3 · 2 directions fill the 6 inputs
    rule = WUDI(ridge=0.0).start(base)
    for delta in deltas:
        rule.add_update(delta)
    merged = {entry.name: delta for entry, delta in rule.deltas()}[name]
    for delta in deltas:
        inputs = delta[name].T @ draw(len(delta[name]), 7, seed=9)  # in its row space
        assert float((merged @ inputs - delta[name] @ inputs).abs().max()) < 1e-10
    assert float((merged - sum(delta[name] for delta in deltas)).abs().max()) > 1e-2  # which the sum does not do
    unchanged = {key: value.clone() for key, value in rule.state_dict().items() if key.startswith("gram")}
    rule.add_update({})  # a task that changed nothing does not count
    assert all(torch.equal(rule.state_dict()[key], value) for key, value in unchanged.items())


def test_wudis_wide_gram_matrices_in_blocks():
    base, tasks, _ = stream(2)
    name = "blocks.1.mlp.fc2.weight"  # 24 inputs
    cut = run(WUDI(block=10), base, tasks)
    assert cut.get_buffer("gram:blocks/1/mlp/fc2/weight").shape == (3, 8, 8)
    got = update(cut.merged(), base)[name].numpy()
    taus = [(task[name] - base[name]).numpy() for task in tasks]
    c = sum(tau.T @ tau / (tau**2).sum() for tau in taus) * np.kron(np.eye(3), np.ones((8, 8)))
    b = sum(tau @ (tau.T @ tau / (tau**2).sum() * np.kron(np.eye(3), np.ones((8, 8)))) for tau in taus)
    assert np.abs(got - b @ np.linalg.inv(c + 0.1 * np.diag(c).mean() * np.eye(24))).max() < 1e-12


# --- NUFILT ----------------------------------------------------------------------------------------------------------


def filtered(tau, c, protected):
    """(τP, P) with numpy's SVD."""
    _, s, vt = np.linalg.svd(c, full_matrices=False)
    v = vt[s > 1e-10 * s[0]].T[:, :protected] if c.any() else np.zeros((c.shape[1], 0))
    p = np.eye(c.shape[1]) - v @ v.T
    return tau @ p, p


@BOTH
@pytest.mark.parametrize("protected", [2, 4, 100])
def test_the_null_space_filter_in_closed_form(dtype, protected):
    base, tasks, _ = stream(3, dtype)
    merged = update(run(NUFILT(protected, steps=0), base, tasks).merged(), base)
    taus = [{k: v.numpy() for k, v in update(task, base).items()} for task in tasks]
    for name in base:
        expected = np.mean([tau[name] for tau in taus], 0)
        if name in LINEAR:
            blocks = []
            for parts in zip(*(np.split(tau[name], 3 if "qkv" in name else 1) for tau in taus), strict=True):
                c = parts[0]
                for tau in parts[1:]:
                    c = c + filtered(tau, c, protected)[0]
                blocks.append(c)
            expected = np.concatenate(blocks)
        assert np.abs(merged[name].numpy() - expected).max() < 20 * TOLERANCE[dtype], name


def test_filtered_updates_do_not_answer_old_inputs():
    low = draw(9, 2) @ draw(2, D, seed=1)  # of rank two: whatever ``protected``, nothing else is protected
    base = {"a.weight": draw(9, D, seed=2)}
    rule = NUFILT(steps=0).start(base).add_update({"a.weight": low})
    old, other = torch.linalg.svd(low).Vh[:2], torch.linalg.svd(low).Vh[2:]
    tau = draw(9, D, seed=3)
    new = update(rule.add_update({"a.weight": tau}).merged(), base)["a.weight"] - low
    assert float((new @ old.T).abs().max()) < 1e-12
    torch.testing.assert_close(new @ other.T, tau @ other.T)


def test_the_correction_minimises_what_it_says():
    """Against the loss written with whole models, and torch's own optimum of it."""
    base, first, tau = {"a.weight": draw(9, D, seed=4)}, draw(9, D, seed=5), draw(9, D, seed=6)
    theta = base["a.weight"]

    def loss(c):
        v_c, v_t = torch.linalg.svd(first).Vh[:3].T, torch.linalg.svd(tau).Vh[:3].T
        target = torch.cat([(theta + first) @ v_c, (theta + tau) @ v_t], 1)
        return float((target - (theta + c) @ torch.cat([v_c, v_t], 1)).square().sum())

    def merge(**options):
        rule = NUFILT(4, directions=3, rank=D, **options).start(base)
        for delta in (first, tau):
            rule.add_update({"a.weight": delta})
        return update(rule.merged(), base)["a.weight"]

    losses = [loss(merge(steps=steps, lr=0.02)) for steps in (0, 1, 10, 100, 1500)]
    assert losses == sorted(losses, reverse=True)
    v = torch.cat([torch.linalg.svd(first).Vh[:3].T, torch.linalg.svd(tau).Vh[:3].T], 1)
    start = merge(steps=0)
    wanted = torch.cat([(theta + first) @ v[:, :3], (theta + tau) @ v[:, 3:]], 1) - (theta + start) @ v
    best = (tau @ torch.linalg.lstsq(tau, wanted @ torch.linalg.pinv(v)).solution @ v - wanted).square().sum()
    assert losses[-1] == pytest.approx(float(best), abs=1e-3 * losses[0])
    assert torch.equal(merge(seed=1), merge(seed=1)) and not torch.equal(merge(seed=1), merge(seed=2))


# --- TIES ------------------------------------------------------------------------------------------------------------


def batch_ties(taus, density, merge, count=None):
    """Trim, elect, merge as in the authors' code on [T, P], but for keeping exactly int(density · P) entries."""
    taus = np.array(taus)
    keep = int(density * taus.shape[1]) if count is None else count
    for tau in taus:
        tau[np.abs(tau) < np.sort(np.abs(tau))[-keep]] = 0
    sign = np.sign(taus.sum(0))
    sign[sign == 0] = np.sign(sign.sum())
    chosen = taus * np.where(sign > 0, taus > 0, taus < 0)
    if merge == "max":
        return np.abs(chosen).max(0) * sign
    return chosen.sum(0) / (np.maximum((chosen != 0).sum(0), 1) if merge == "mean" else 1)


@BOTH
@pytest.mark.parametrize("merge", ["sum", "mean", "max"])
def test_ties_in_constant_memory_equals_the_batch_form_in_any_order(merge, dtype):
    base, tasks, _ = stream(4, dtype)
    expected = flat(base) + 0.7 * batch_ties([flat(t) - flat(base) for t in tasks], 0.2, merge)
    for order in itertools.permutations(range(4)):
        got = flat(run(TIES(0.2, merge, 0.7), base, [tasks[i] for i in order]).merged())
        assert np.abs(got - expected).max() < TOLERANCE[dtype]


@pytest.mark.parametrize("merge", ["sum", "mean", "max"])
@pytest.mark.parametrize("majority", [1.0, -1.0])
def test_where_updates_cancel_ties_elects_the_sign_of_all_signs(merge, majority):
    first, second = np.array([[3.0, 2.0, 5.0], [-3.0, -2.0, 5.0]]) * majority
    rule = run(TIES(1.0, merge, 1.0), {"a": torch.zeros(3)}, [{"a": torch.tensor(first)}, {"a": torch.tensor(second)}])
    assert np.allclose(rule.merged()["a"].numpy(), batch_ties([first, second], 1, merge, 3))
    assert rule.merged()["a"][0] == 3 * majority


def test_continual_ties_is_the_published_recursion():
    base, tasks, _ = stream(4)
    for merge in ("sum", "mean", "max"):
        taus = [flat(t) - flat(base) for t in tasks]
        merged = 0.3 * taus[0]
        for tau in taus[1:]:
            merged = merged + 0.3 * batch_ties([merged, tau], 0.2, merge)
        got = run(ContinualTIES(0.2, merge, 0.3), base, tasks).merged()
        assert np.abs(flat(got) - flat(base) - merged).max() < 1e-12


@BOTH
def test_the_selected_threshold_is_the_sorted_one(dtype):
    awkward = torch.tensor([0.0, -0.0, 1e-40, -1e-38, 3e38, -1.0, 1.0, 1.0, 0.5], dtype=dtype)
    parts = [awkward, draw(1000, dtype=dtype), (draw(50, 7, seed=1, dtype=dtype) * 1e-6).T, torch.ones(30, dtype=dtype)]
    everything = torch.cat([p.flatten() for p in parts]).abs().sort(descending=True).values
    for k in (1, 2, 3, 17, 500, 1030, len(everything) - 3, len(everything)):
        assert kth_largest_magnitude(lambda: parts, k, dtype) == float(everything[k - 1])
    assert kth_largest_magnitude(lambda: parts, 0, dtype) == math.inf


# --- against PEFT ----------------------------------------------------------------------------------------------------


@BOTH
def test_peft_computes_the_same(dtype):
    from peft.utils import merge_utils as peft

    base, tasks, _ = stream(3, dtype)
    ones = torch.ones(3, dtype=dtype)
    for name in base:
        taus = [task[name] - base[name] for task in tasks]
        cases = {
            "arithmetic": (TaskArithmetic(0.3), peft.task_arithmetic(taus, 0.3 * ones)),
            "ties": (TIES(0.3, "mean", 1.0, trim="tensor"), peft.ties(taus, ones, 0.3)),
            "average of pruned": (
                TIES(1.0, "mean", 1.0, trim="tensor"),
                peft.disjoint_merge(torch.stack(taus), peft.calculate_majority_sign_mask(torch.stack(taus))),
            ),
        }
        for title, (rule, expected) in cases.items():
            got = run(rule, base, tasks).merged()[name] - base[name]
            assert float((got - expected).abs().max()) < TOLERANCE[dtype], (title, name)


@BOTH
def test_dare_is_pefts_with_masks_of_its_own(dtype):
    import zlib

    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, random_pruning

    base, tasks, _ = stream(3, dtype)
    linear, elected = run(DARE(0.4, 1.0, seed=5), base, tasks).merged(), run(DareTIES(0.4, "mean", 1.0, 5), base, tasks)
    for name in base:
        dropped = []
        for t, task in enumerate(tasks):
            with isolated():
                torch.manual_seed(derived_seed(5, t, zlib.crc32(name.encode())))
                dropped.append(random_pruning(task[name] - base[name], 0.6, rescale=True))
        stacked = torch.stack(dropped)
        assert float((linear[name] - base[name] - stacked.sum(0)).abs().max()) < TOLERANCE[dtype]
        expected = disjoint_merge(stacked, calculate_majority_sign_mask(stacked))
        assert float((elected.merged()[name] - base[name] - expected).abs().max()) < TOLERANCE[dtype]


def test_dare_is_unbiased_seeded_and_leaves_global_randomness_alone():
    base = {"a": torch.zeros(20000)}
    task = {"a": torch.ones(20000)}
    before = torch.get_rng_state()
    merged = run(DARE(0.75, 1.0), base, [task]).merged()["a"]
    assert torch.equal(torch.get_rng_state(), before)
    assert set(merged.unique().tolist()) == {0.0, 4.0} and abs(float(merged.mean()) - 1) < 0.05
    again = run(DARE(0.75, 1.0), base, [task]).merged()["a"]
    other = run(DARE(0.75, 1.0, seed=torch.Generator().manual_seed(1)), base, [task]).merged()["a"]
    assert torch.equal(merged, again) and not torch.equal(merged, other)
    two = run(DARE(0.75, 1.0), base, [task, task]).merged()["a"]
    assert 8.0 in two and 4.0 in two  # every task has a mask of its own


# --- Fisher and RegMean ----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("normalize", [True, False])
def test_fisher_equals_the_batch_form_in_any_order(normalize, dtype):
    base, tasks, stats = stream(4, dtype)
    f = np.stack([flat(s.fisher) for s in stats])
    f[:, 7] = 0  # no information at all: the plain mean, weighted as the tasks are
    for s, row in zip(stats, f, strict=True):
        s.fisher["pos_embed"].view(-1)[7 - D] = row[7]
    weight = 1 / (np.linalg.norm(f, axis=1, keepdims=True) + 1e-6) if normalize else np.ones((4, 1))
    theta = np.stack([flat(t) for t in tasks])
    expected = (weight * (f + 1e-6) * theta).sum(0) / (weight * (f + 1e-6)).sum(0)
    assert abs(expected[7] - (weight[:, 0] * theta[:, 7]).sum() / weight.sum()) < 1e-12
    for order in itertools.permutations(range(4)):
        rule = run(Fisher(normalize=normalize), base, [tasks[i] for i in order], [stats[i] for i in order])
        assert np.abs(flat(rule.merged()) - expected).max() < TOLERANCE[dtype]


@BOTH
@pytest.mark.parametrize("rho", [1.0, 0.9, 0.0])
def test_regmean_equals_the_batch_form_in_any_order(rho, dtype):
    base, tasks, stats = stream(4, dtype)
    orders = list(itertools.permutations(range(4)))
    merged = [
        run(RegMean(rho, 1e-2), base, [tasks[i] for i in order], [stats[i] for i in order]).merged() for order in orders
    ]
    for name in base:
        taus = [(t[name].double() - base[name].double()).numpy() for t in tasks]
        expected = np.mean(taus, 0)
        if name in LINEAR:
            grams = [s.grams[name].numpy() for s in stats]
            grams = [rho * g + (1 - rho) * np.diag(np.diag(g)) for g in grams]
            whole = sum(grams)
            ridge = 1e-2 * np.diag(whole).mean() * np.eye(len(whole))
            expected = sum(d @ g for d, g in zip(taus, grams, strict=True)) @ np.linalg.inv(whole + ridge)
        for one in merged:
            assert np.abs((one[name].double() - base[name].double()).numpy() - expected).max() < TOLERANCE[dtype]


def test_regmean_is_the_recursion_and_fits_the_tasks_outputs():
    base, tasks, stats = stream(3)
    name = LINEAR[1]
    final = sum(s.grams[name] for s in stats)
    gamma = 0.05 * float(final.diagonal().mean())
    h, delta = gamma * torch.eye(D, dtype=torch.float64), torch.zeros_like(base[name])
    for task, s in zip(tasks, stats, strict=True):
        h = h + s.grams[name]
        delta = delta + (task[name] - base[name] - delta) @ s.grams[name] @ torch.linalg.inv(h)
    merged = run(RegMean(1.0, 0.05), base, tasks, stats).merged()
    assert float((merged[name] - base[name] - delta).abs().max()) < 1e-12
    # without a ridge to speak of it is the least squares fit: no other weight has a smaller error
    best = run(RegMean(1.0, 1e-9), base, tasks, stats).merged()[name]

    def error(weight):
        return sum(
            float(((weight - t[name]) @ s.grams[name]).mul(weight - t[name]).sum())
            for t, s in zip(tasks, stats, strict=True)
        )

    assert all(error(best) < error(best + 1e-3 * draw(*best.shape, seed=i)) for i in range(10))


def test_wide_gram_matrices_in_blocks():
    base, tasks, stats = stream(2)
    name = "blocks.1.mlp.fc2.weight"  # 24 inputs
    masked = [
        Statistics(
            grams={**s.grams, name: torch.block_diag(*[s.grams[name][i : i + 8, i : i + 8] for i in (0, 8, 16)])}
        )
        for s in stats
    ]
    whole = run(RegMean(), base, tasks, masked).merged()
    cut = run(RegMean(block=10), base, tasks, stats)
    assert cut.get_buffer("gram:blocks/1/mlp/fc2/weight").shape == (3, 8, 8)
    assert difference(cut.merged(), whole) < 1e-12
    given = [
        Statistics(grams={**s.grams, name: torch.stack([s.grams[name][i : i + 8, i : i + 8] for i in (0, 8, 16)])})
        for s in stats
    ]
    assert difference(run(RegMean(block=10), base, tasks, given).merged(), whole) < 1e-12
    with pytest.raises(DataError, match="comes in 3 blocks; expected 1"):
        run(RegMean(), base, tasks, given)


def test_a_ridge_below_resolution_still_solves():
    base, (task,), _ = stream(1)
    one = draw(1, D)
    grams = {name: torch.zeros(SHAPES[name][1], SHAPES[name][1], dtype=torch.float64) for name in LINEAR}
    grams[LINEAR[1]] = one.T @ one  # one direction excited
    merged = update(run(RegMean(1.0, 1e-30), base, [task], [Statistics(grams=grams)]).merged(), base)
    tau = task[LINEAR[1]] - base[LINEAR[1]]
    assert torch.allclose(merged[LINEAR[1]] @ one.T, tau @ one.T, atol=1e-6)  # its outputs are kept
    assert float(merged[LINEAR[0]].abs().max()) == 0  # nothing excited: nothing moves


def test_gram_merge_is_regmean_with_slope_and_cap():
    base, tasks, stats = stream(3)
    expected = run(RegMean(finalisers=[LiNeS(0.5), NormMatching(cap=True)]), base, tasks, stats).merged()
    assert difference(run(GramMerge(block=None), base, tasks, stats).merged(), expected) < 1e-15
    plain = run(RegMean(), base, tasks, stats).merged()
    assert difference(run(GramMerge(slope=1.0, cap=False, block=None), base, tasks, stats).merged(), plain) < 1e-15


def test_statistics_that_do_not_fit_are_refused_and_change_nothing():
    base, tasks, stats = stream(2)
    name = LINEAR[0]
    wrong = {
        "needs grams": (RegMean(), None),
        "have no Gram matrix of": (RegMean(), Statistics(grams={LINEAR[1]: stats[0].grams[LINEAR[1]]})),
        "has shape": (RegMean(), Statistics(grams={**stats[0].grams, name: torch.eye(D + 1)})),
        "Gram matrix of .* NaN": (RegMean(), Statistics(grams={**stats[0].grams, name: torch.full((D, D), math.nan)})),
        "needs fisher": (Fisher(), Statistics(grams=stats[0].grams)),
        "no Fisher information of norm.weight": (
            Fisher(),
            Statistics({k: v for k, v in stats[0].fisher.items() if k != "norm.weight"}),
        ),
        "information of norm.weight has shape": (
            Fisher(),
            Statistics({**stats[0].fisher, "norm.weight": torch.ones(2)}),
        ),
        "negative": (Fisher(), Statistics({**stats[0].fisher, "norm.weight": -torch.ones(D)})),
    }
    for message, (rule, bad) in wrong.items():
        rule.start(base).add(tasks[0], stats[0])
        before = copy.deepcopy(rule.state_dict())
        with pytest.raises(DataError, match=message):
            rule.add(tasks[1], bad)
        assert all(torch.equal(value, before[key]) for key, value in rule.state_dict().items())


# --- every rule ------------------------------------------------------------------------------------------------------

ALL = pytest.mark.parametrize("name", RULES)


@ALL
def test_state_goes_through_a_file_in_the_middle_and_does_not_grow(name, tmp_path):
    base, tasks, stats = stream(4, torch.float32)
    whole = run(build_rule(name), base, tasks, stats)
    first = run(build_rule(name), base, tasks[:2], stats[:2])
    state = first.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    save_file(state, tmp_path / "state.safetensors")
    second = build_rule(name).start(base)
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for task, known in zip(tasks[2:], stats[2:], strict=True):
        second.add(task, known)
    shapes = {k: v.shape for k, v in whole.state_dict().items()}
    assert (shapes == {k: v.shape for k, v in state.items()}) != RULES[name].grows
    assert all(torch.equal(value, second.merged()[key]) for key, value in whole.merged().items())
    assert int(second.count) == 4


@ALL
def test_order_matters_only_where_a_rule_says_so(name):
    base, tasks, stats = stream(3)
    orders = list(itertools.permutations(range(3)))
    merged = [run(build_rule(name), base, [tasks[i] for i in o], [stats[i] for i in o]).merged() for o in orders]
    spread = max(difference(merged[0], other) for other in merged)
    assert (spread < 1e-11) if RULES[name].order_free else (spread > 1e-3)


@ALL
def test_what_no_task_changed_stays_to_the_bit(name):
    base, tasks, stats = stream(3, torch.float32)
    base["norm.weight"][0] = -0.0
    frozen = ["norm.weight", "blocks.0.mlp.fc1.weight", "cls_token"]
    tasks = [{**task, **{k: base[k].clone() for k in frozen}} for task in tasks]
    merged = run(build_rule(name), base, tasks, stats).merged()
    for key in frozen:
        assert torch.equal(merged[key].view(torch.int32), base[key].view(torch.int32))
    assert all(not torch.equal(merged[key], base[key]) for key in base if key not in frozen)


@ALL
def test_before_the_first_task_the_model_is_the_pre_trained_one(name):
    base, *_ = stream(1)
    merged = build_rule(name).start(base).merged([NormMatching()])
    assert list(merged) == list(base) and all(torch.equal(merged[k], base[k]) for k in base)


@ALL
def test_half_precision_is_computed_in_float32(name):
    base, tasks, stats = stream(3)
    half = [{k: v.bfloat16() for k, v in s.items()} for s in (base, *tasks)]
    wide = [{k: v.float() for k, v in s.items()} for s in half]
    got = run(build_rule(name), half[0], half[1:], stats).merged()
    expected = run(build_rule(name), wide[0], wide[1:], stats).merged()
    assert all(v.dtype == torch.bfloat16 and torch.equal(v, expected[k].bfloat16()) for k, v in got.items())


@ALL
def test_the_callers_modes_change_nothing(name):
    base, tasks, stats = stream(2, torch.float32)
    expected = run(build_rule(name), base, tasks, stats).merged()
    trained = [{k: nn.Parameter(v.clone()) for k, v in task.items()} for task in tasks]
    with torch.autocast("cpu", torch.bfloat16):
        got = run(build_rule(name), base, trained, stats).merged()
    with torch.inference_mode():
        inside = run(build_rule(name), base, [{k: v * 1 for k, v in task.items()} for task in tasks], stats)
    assert all(torch.equal(got[k], v) and not got[k].requires_grad for k, v in expected.items())
    inside.add(tasks[0], stats[0])  # what was written in inference mode can be gone on with outside


@ALL
def test_updates_are_as_good_as_models(name):
    base, tasks, stats = stream(2)
    partly = [{k: (v if k in LINEAR else base[k]) for k, v in task.items()} for task in tasks]
    expected = run(build_rule(name), base, partly, stats).merged()
    rule = build_rule(name).start(base)
    for task, known in zip(partly, stats, strict=True):
        rule.add_update({k: task[k] - base[k] for k in LINEAR}, known)
    assert difference(rule.merged(), expected) < 1e-12


@ALL
def test_a_learner_saves_its_rule_with_itself(name):
    base, tasks, stats = stream(2, torch.float32)
    learner = nn.ModuleDict({"rule": run(build_rule(name), base, tasks, stats)})
    fresh = nn.ModuleDict({"rule": build_rule(name).start(base)})
    fresh.load_state_dict(learner.state_dict())
    assert all(torch.equal(fresh["rule"].merged()[k], v) for k, v in learner["rule"].merged().items())
    assert not any(torch.equal(v, base[k]) for k, v in fresh["rule"].merged().items() if k in LINEAR)


@ALL
def test_a_bad_task_changes_nothing(name):
    base, tasks, stats = stream(2)
    rule = run(build_rule(name), base, tasks[:1], stats[:1])
    before = copy.deepcopy(rule.state_dict())
    bad = {**tasks[1], "norm.weight": torch.full((D,), math.inf)}  # the last tensor
    with pytest.raises(BackboneError, match=r"the fine-tuned model: norm.weight holds NaN or infinite"):
        rule.add(bad, stats[1])
    assert all(torch.equal(value, before[key]) for key, value in rule.state_dict().items())


# --- what a rule sees ------------------------------------------------------------------------------------------------


def test_what_is_merged_and_what_is_not():
    base = model() | {
        "head.weight": draw(3, D),
        "bn.running_mean": draw(4),
        "bn.num_batches_tracked": torch.tensor(7),
        "blocks.0.attn.relative_position_index": torch.arange(4),
    }
    task = {k: v + 1 for k, v in base.items()} | {"head.weight": draw(9, D)}  # another number of classes
    rule = run(TaskArithmetic(1.0), base, [task])
    assert [entry.name for entry in rule.layout.entries] == list(SHAPES)
    merged = rule.merged()
    assert list(merged) == list(base)
    for name in set(base) - set(SHAPES):
        assert torch.equal(merged[name], base[name]), name
    assert abs(rule.mean_norm - math.sqrt(sum(math.prod(s) for s in SHAPES.values()))) < 1e-9  # and no norm counts it
    own = {k: v for k, v in task.items() if k in SHAPES} | {"fc.bias": draw(2)}  # a head only the task has
    assert difference(run(TaskArithmetic(1.0), base, [own]).merged(), merged) == 0
    few = run(TaskArithmetic(1.0), base, [task], names=["cls_token"]).merged()
    assert [k for k in base if not torch.equal(few[k], base[k])] == ["cls_token"]
    none = run(TaskArithmetic(1.0), base, [task], exclude=["^blocks", "^head"]).merged()
    assert torch.equal(none["blocks.0.norm1.weight"], base["blocks.0.norm1.weight"])


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224",
        "vit_base_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
        "beit_base_patch16_224",
        "eva02_base_patch14_224",
        "swin_tiny_patch4_window7_224",
        "cait_xxs24_224",
        "mixer_b16_224",
    ],
)
def test_linear_weights_are_found_by_name(name):
    with torch.device("meta"):
        timm_model = timm.create_model(name)
    plan = layout(timm_model.state_dict())
    modules = {f"{n}.weight": m for n, m in timm_model.named_modules() if isinstance(m, nn.Linear)}
    expected = {n for n in modules if not n.startswith("head.")}
    assert {entry.name for entry in plan.entries if entry.linear} == expected
    assert {e.name for e in plan.entries if e.fused} == {n for n in expected if n.endswith("qkv.weight")}


@pytest.mark.parametrize(
    ("name", "shape", "linear", "fused"),
    [
        ("encoder.layer.0.attention.attention.query.weight", (6, 6), True, False),
        ("text_model.embeddings.position_embedding.weight", (9, 6), False, False),
        ("shared.weight", (9, 6), False, False),
        ("block.0.layer.0.SelfAttention.relative_attention_bias.weight", (8, 2), False, False),
        ("transformer.resblocks.0.attn.in_proj_weight", (18, 6), True, True),
        ("blocks.0.attn.relative_position_bias_table", (9, 3), False, False),
        ("text_projection", (6, 6), False, False),
        ("layers.0.attn.qkv.weight", (16, 6), True, False),
    ],
)
def test_names_of_other_libraries(name, shape, linear, fused):
    (entry,) = layout({name: torch.zeros(shape)}).entries
    assert (entry.linear, entry.fused) == (linear, fused)


def test_linear_weights_can_be_named():
    base = {"text_projection": draw(4, 4), "a.weight": draw(4, 4)}
    assert [e.linear for e in layout(base, linear=["text_projection"]).entries] == [True, False]
    with pytest.raises(ConfigError, match=r"linear: a has shape \[3\]"):
        layout({"a": torch.zeros(3)}, linear=["a"])
    with pytest.raises(
        ConfigError, match=r"names: 'b.weight' is not in the pre-trained model .did you mean 'a.weight'"
    ):
        layout(base, names=["b.weight"])
    with pytest.raises(ConfigError, match="is not a regular expression"):
        layout(base, exclude=["("])
    with pytest.raises(BackboneError, match="no floating point tensor"):
        layout({"head.weight": draw(2)})


def test_tied_tensors_are_merged_once_and_stay_tied():
    shared = draw(6, 4)
    base = {"embed.weight": shared, "decoder.weight": shared, "a.weight": draw(4, 4, seed=1)}
    moved = draw(6, 4, seed=2)
    task = {"embed.weight": moved, "decoder.weight": moved, "a.weight": base["a.weight"]}
    rule = run(TaskArithmetic(1.0), base, [task])
    assert dict(rule.layout.tied) == {"decoder.weight": "embed.weight"}
    merged = rule.merged()
    assert merged["embed.weight"] is merged["decoder.weight"]
    assert abs(rule.mean_norm - float((moved - shared).norm())) < 1e-12  # counted once
    for left in ("embed.weight", "decoder.weight"):  # Transformers saves one name only
        rest = {k: v for k, v in task.items() if k != left}
        assert difference(run(TaskArithmetic(1.0), base, [rest]).merged(), merged) == 0
    with pytest.raises(BackboneError, match=r"decoder.weight and embed.weight are one tensor"):
        rule.add({**task, "decoder.weight": shared})


def test_tasks_that_do_not_fit_are_named():
    base, (task,), _ = stream(1)
    rule = Average().start(base)
    without = {k: v for k, v in task.items() if k != "blocks.0.attn.qkv.bias"}
    lora = {"base_model.model.blocks.0.attn.qkv.lora_A.weight": draw(2, D)}
    wrong = {
        r"blocks.0.attn.qkv.bias is missing \(1 of 10": without,
        r"blocks.0.attn.q.bias is not in .* \(1 such": {**task, "blocks.0.attn.q.bias": draw(2)},
        r"norm.weight has shape \[7\], but \[6\] in": {**task, "norm.weight": draw(7)},
        "norm.weight holds int8.*quantised": {**task, "norm.weight": torch.ones(D, dtype=torch.int8)},
        "lora_A.weight belongs to a LoRA adapter": lora,
    }
    for message, bad in wrong.items():
        with pytest.raises(BackboneError, match=message) as error:
            rule.add(bad)
        assert "\n" not in str(error.value)
    with pytest.raises(BackboneError, match=r"the pre-trained model: norm.weight holds NaN"):
        Average().start({**base, "norm.weight": torch.full((D,), math.nan)}).add(task)
    with pytest.raises(BackboneError, match=r"update: norm.weigh is not among the merged .*mean 'norm.weight'"):
        rule.add_update({"norm.weigh": draw(D)})
    with pytest.raises(BackboneError, match=r"update: norm.weight is float64 \[2\]; expected"):
        rule.add_update({"norm.weight": draw(2)})
    with pytest.raises(ConfigError, match=r"call start\(pretrained\) first"):
        Average().add(task)
    assert int(rule.count) == 0


def test_starting_again_forgets():
    base, tasks, _ = stream(2)
    rule = run(OPCM(), base, tasks)
    again = run(rule, base, tasks[1:])
    assert difference(again.merged(), run(OPCM(), base, tasks[1:]).merged()) == 0


# --- finalisers ------------------------------------------------------------------------------------------------------


def test_finalisers_act_at_read_out_only():
    base, tasks, _ = stream(3)
    plain, with_one = run(Average(), base, tasks[:2]), run(Average([NormMatching(0.5)]), base, tasks[:2])
    matched = update(with_one.merged(), base)
    assert abs(total_norm(matched) - 0.5 * with_one.mean_norm) < 1e-12
    assert difference(plain.merged([NormMatching(0.5)]), with_one.merged()) < 1e-15
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in with_one.state_dict().items())
    direction = update(plain.merged(), base)
    scale = total_norm(matched) / total_norm(direction)
    assert max(float((matched[k] - scale * direction[k]).abs().max()) for k in base) < 1e-12
    big, small = run(TaskArithmetic(5.0), base, tasks), run(TaskArithmetic(0.01), base, tasks)
    assert abs(total_norm(update(big.merged([NormMatching(cap=True)]), base)) - big.mean_norm) < 1e-10
    assert difference(small.merged([NormMatching(cap=True)]), small.merged()) == 0


def test_lines_scales_with_depth():
    names = [f"blocks.{i}.fc.weight" for i in range(5)] + ["pos_embed", "norm.weight"]
    norms = dict.fromkeys(names, 1.0)
    got = LiNeS(0.2).factors(norms, 1.0, 3)
    assert np.allclose([got[n] for n in names], [0.2, 0.4, 0.6, 0.8, 1.0, 0.2, 0.2])
    got = LiNeS("1/T", 0.5).factors(norms, 1.0, 4)
    assert np.allclose([got[n] for n in names], [0.25, 0.375, 0.5, 0.625, 0.75, 0.25, 0.25])
    towers = {
        "text_model.encoder.layers.0.a": 1.0,
        "text_model.encoder.layers.1.a": 1.0,
        "vision_model.encoder.layers.0.a": 1.0,
    }
    assert list(LiNeS(0.2).factors(towers, 1.0, 1).values()) == pytest.approx([0.2, 1.0, 1.0])
    with pytest.raises(ConfigError, match="no tensor belongs to a numbered block"):
        Average([LiNeS()]).start({"a": torch.zeros(2)})  # before any task is read


def test_finalisers_compose_in_order():
    base, tasks, _ = stream(2)
    rule = run(Average(), base, tasks)
    last = update(rule.merged([LiNeS(0.3), NormMatching()]), base)
    assert abs(total_norm(last) - rule.mean_norm) < 1e-12
    first = update(rule.merged([NormMatching(), LiNeS(0.3)]), base)
    assert total_norm(first) < 0.99 * rule.mean_norm
    ratio = float(last["blocks.1.mlp.fc2.bias"].norm() / last["blocks.0.attn.qkv.bias"].norm())
    plain = update(rule.merged(), base)
    before = float(plain["blocks.1.mlp.fc2.bias"].norm() / plain["blocks.0.attn.qkv.bias"].norm())
    assert abs(ratio / before - 1 / 0.3) < 1e-9


# --- by name ---------------------------------------------------------------------------------------------------------


@ALL
def test_every_rule_has_a_name_and_its_defaults(name):
    built, direct = build_rule(name), RULES[name]()
    plain = {k: v for k, v in vars(direct).items() if isinstance(v, int | float | str | type(None))}
    assert plain and all(vars(built)[k] == v for k, v in plain.items() if not k.startswith("_"))
    assert [vars(f) for f in built.finalisers] == [vars(f) for f in direct.finalisers]


def test_configurations():
    rule = build_rule(
        {
            "name": "opcm",
            "alpha": 0.3,
            "variant": "paper",
            "finalisers": ["norm_matching", {"name": "lines", "alpha": "1/T"}],
        }
    )
    assert (rule.alpha, rule.variant) == (0.3, "paper")
    assert [type(f) for f in rule.finalisers] == [NormMatching, LiNeS]
    wrong = {
        "unknown 'opcmm' (did you mean 'opcm'?)": "opcmm",
        "unknown key rule.alhpa (did you mean 'alpha'?)": {"name": "opcm", "alhpa": 1},
        "rule.alpha: should be less than or equal to 1, got 2": {"name": "opcm", "alpha": 2},
        "rule.density: should be greater than 0": {"name": "ties", "density": 0},
        "unknown 'line' (did you mean 'lines'?)": {"name": "average", "finalisers": ["line"]},
        "alpha above 1 needs a beta": {"name": "average", "finalisers": [{"name": "lines", "alpha": 2}]},
    }
    for message, config in wrong.items():
        with pytest.raises(ConfigError) as error:
            build_rule(config)
        assert message in str(error.value), str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: OPCM(1.1),
        lambda: OPCM(variant="diag"),
        lambda: TIES(0.0),
        lambda: TIES(merge="median"),
        lambda: TIES(trim="layer"),
        lambda: ContinualTIES(scale=math.inf),
        lambda: WiseFT(-0.1),
        lambda: EMA(1.1),
        lambda: TaskArithmetic(math.nan),
        lambda: TaskArithmetic(divide="T"),
        lambda: MagMax(math.inf),
        lambda: DARE(1.0),
        lambda: DARE(seed=-1),
        lambda: Fisher(0.0),
        lambda: RegMean(rho=1.5),
        lambda: RegMean(ridge=0.0),
        lambda: RegMean(block=0),
        lambda: GramMerge(slope=2.0),
        lambda: IsoC(math.nan),
        lambda: IsoC(of="max"),
        lambda: IsoCTS(math.nan),
        lambda: IsoCTS(fraction=1.5),
        lambda: ExpertBank(max_rank=0),
        lambda: ExpertBank(dtype="float16"),
        lambda: Consensus(math.inf),
        lambda: Consensus(threshold=-1.0),
        lambda: Consensus(masks=0),
        lambda: TALL(math.inf),
        lambda: EMR("sum"),
        lambda: Twin(Average(), -0.1),
        lambda: TSVM(math.inf),
        lambda: WUDI(ridge=-1.0),
        lambda: WUDI(anchor="max"),
        lambda: WUDI(steps=-1),
        lambda: WUDI(lr=0.0),
        lambda: WUDI(block=0),
        lambda: NUFILT(protected=0),
        lambda: NUFILT(steps=-1),
        lambda: NUFILT(lr=0.0),
        lambda: NUFILT(seed=-1),
        lambda: NormMatching(0.0),
        lambda: LiNeS(-1.0),
        lambda: LiNeS(2.0),
        lambda: LiNeS("T"),
        lambda: LiNeS(0.5, -1.0),
    ],
)
def test_arguments_out_of_range(make):
    with pytest.raises(ConfigError):
        make()


def test_merging_needs_neither_backbones_nor_learners():
    code = (
        "import sys, cil.merging, cil.merging.on_disk, cil.merging.statistics\n"
        "print(sorted({n.split('.')[1] for n in sys.modules if n.startswith('cil.')}))\n"
        "print([n for n in ('timm', 'peft', 'avalanche', 'accelerate') if n in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert found.stdout.splitlines() == [
        "['config', 'errors', 'merging', 'utils']",
        "[]",
    ]
