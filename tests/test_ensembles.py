"""Several backbones as one: members' own features and cache, scales and weights of the first task, and what a run of
them leaves, resumes and predicts."""

from __future__ import annotations

import hashlib
import json
import shutil
from itertools import product

import numpy as np
import pytest
import torch
from marks import on_any_backbone, slow_beyond
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from test_cli import cil, write  # noqa: F401 (a fixture)
from test_config_faults import refused
from test_export import run_the_card
from test_runner import TINY, settings, stable

from cil import Context, build_learner
from cil.backbone import Backbone, Backbones, load_backbone, load_backbones
from cil.classifiers import LDA, NCM, Ridge
from cil.classifiers.calibration import mean_logits, mean_probabilities
from cil.classifiers.joined import Joined, boosting_weights, stacking_weights
from cil.classifiers.leave_one_out import left_out_predictions, mean_log_evidence, thin_svd
from cil.config import BackboneConfig, CombineConfig, Config, TransformConfig
from cil.config.code import with_paths
from cil.config.parsing import to_yaml
from cil.config.reading import validated
from cil.data.images import ImageSet
from cil.data.packed import PackedTransforms, make_transforms
from cil.data.reading import read_image
from cil.data.sources import from_arrays
from cil.data.transforms import Transforms
from cil.errors import BackboneError, DataError, RunError
from cil.export import export, load
from cil.features import FeatureCache
from cil.learner import Learner
from cil.learners import registry
from cil.learners.bases.heads import held_out
from cil.prediction import find_images, open_run, predict
from cil.results import read_run
from cil.reuse.finding import by_space
from cil.reuse.joining import join
from cil.runner import run, run_stages
from cil.runner.benchmark import Inputs, make_stream
from cil.runner.checkpoint import RunFolder
from cil.runner.identity import identity_settings
from cil.runner.plan import dump, plans
from cil.selection.together import choose_together
from cil.selection.transferability import ridge_leave_one_out
from cil.stream import ClassIncremental, Stream
from cil.testing.setting import accelerator

LARGER = {**TINY, "options": {**TINY["options"], "img_size": 24, "depth": 2, "embed_dim": 16}}
ON_FROZEN = {"ncm", "linear_probe", "ranpac", "acil", "air", "ds_al", "gkeal", "loranpac", "fecam", "slda"}
QUICK = {
    "ranpac": {"projection": None, "strength": "gcv"},
    "acil": {"projection": 40},
    "air": {"projection": 40},
    "ds_al": {"projection": 40},
    "gkeal": {"centres": 40},
    "loranpac": {"projection": 40},
    "linear_probe": {"epochs": 1},
}
WIDTHS = (3, 5, 2)


def pair(**combine) -> Backbones:
    """Two random backbones that differ in image size, width and normalisation."""
    members = [load_backbone(BackboneConfig(**section)) for section in (TINY, LARGER)]
    members[1].data_config = {**members[1].data_config, "mean": (0.1, 0.2, 0.3), "crop_pct": 1.0}
    return Backbones(members, CombineConfig(**combine))


def copies(count: int, **combine) -> Backbones:
    return Backbones([load_backbone(BackboneConfig(**TINY)) for _ in range(count)], CombineConfig(**combine))


def easy(classes: int, each: int, seed: int = 0):
    """Images [classes · each, 30, 40, 3] of classes with a colour of their own, and labels."""
    rng = np.random.RandomState(seed)
    colours = np.random.RandomState(5).randint(40, 216, (classes, 1, 1, 3))
    labels = np.arange(classes).repeat(each)
    return np.clip(colours[labels] + rng.normal(0, 40, (len(labels), 30, 40, 3)), 0, 255).astype(np.uint8), labels


def images_for(backbone, classes=6, each=8, seed=0, transform=None) -> ImageSet:
    pixels, labels = easy(classes, each, seed)
    names = [f"class{c}" for c in range(classes)]
    return ImageSet(from_arrays(pixels, labels, names), make_transforms(backbone.data_config, transform))


def stream_for(backbone, increment=2) -> Stream:
    return Stream(images_for(backbone), images_for(backbone, each=4, seed=1), ClassIncremental(3, increment=increment))


def batch(images: ImageSet, **options) -> torch.Tensor:
    every = np.arange(len(images))
    return next(iter(images.batches(every, every, len(images), **options)))[0]


# --- packed images, views and the cache -------------------------------------------------------------------------------


def test_a_packed_image_holds_each_members_own_and_features_are_the_members_own():
    both = pair()
    packed = images_for(both)
    assert packed.transforms.shape == (3, 16**2 + 24**2) and both.data_config["input_size"] == (3, 1, 832)
    seen = batch(packed)
    assert seen.shape == (48, 3, 832)
    parts = []
    for k, member in enumerate(both.members):
        own = ImageSet(packed.source, Transforms(member.data_config))
        assert torch.equal(both.cut(seen, k), batch(own))
        parts.append(member(batch(own)))
        assert packed.through(k).identity == own.identity and packed.through(k) is packed.through(k)
    before = both.passes
    assert torch.equal(both(seen), torch.cat(parts, dim=1)) and both.passes == before + 2 * 48
    assert both.widths == (24, 16) and both.feature_dim == 40


def test_facts_of_several():
    both = pair()
    one, two = both.members
    assert both.name == f"{one.name} + {two.name}"
    assert both.fingerprint == hashlib.sha256(f"{one.fingerprint}\n{two.fingerprint}".encode()).hexdigest()
    assert not any(p.requires_grad for p in both.parameters()) and not both.train().training


def test_augmentation_crops_and_flips_all_members_alike():
    config = TransformConfig.model_validate({"augment": {"scale": [0.2, 0.6], "flip": 0.5}})
    draw = {"augment": True}
    twins = copies(2)
    seen = batch(images_for(twins, transform=config), generator=torch.Generator().manual_seed(3), **draw)
    assert torch.equal(twins.cut(seen, 0), twins.cut(seen, 1))
    alone = ImageSet(images_for(twins).source, Transforms(twins.members[0].data_config, config))
    assert torch.equal(twins.cut(seen, 0), batch(alone, generator=torch.Generator().manual_seed(3), **draw))
    # of other sizes: a ramp of grey says where the box was, and its direction whether it was flipped
    both = pair()
    ramp = np.broadcast_to(np.linspace(0, 255, 40)[None, None, :, None], (20, 30, 40, 3)).astype(np.uint8)
    source = from_arrays(ramp, np.zeros(20, np.int64), ["ramp"])
    packed = ImageSet(source, PackedTransforms(both.data_config, config))
    [raw] = list(packed.load([[(i, 100 + i) for i in range(20)]], gpu=False))
    small, large = both.cut(raw, 0).float(), both.cut(raw, 1).float()
    for part in (0, -1):  # grey at the left and right edge
        np.testing.assert_allclose(small[:, 0, 8, part], large[:, 0, 12, part], atol=6)
    assert len({bool(image[0, 8, 0] < image[0, 8, -1]) for image in small}) == 2


def test_the_cache_asks_each_member_once_and_gives_its_own_bits():
    both = pair()
    images, cache = images_for(both), FeatureCache(accelerator(), 16)
    indices = np.arange(0, 48, 3)
    found = cache.get(both, images, indices)
    assert both.passes + cache.passes_saved == 2 * len(indices)
    cache.get(both, images, indices[:5])
    assert both.passes + cache.passes_saved == 2 * len(indices)
    alone = []
    for member in both.members:
        own = ImageSet(images.source, Transforms(member.data_config))
        alone.append(FeatureCache(accelerator(), 16).get(member, own, indices))
    assert torch.equal(found, torch.cat(alone, dim=1))


def test_after_the_members_runs_an_ensemble_makes_no_forward_pass(tmp_path, monkeypatch):
    """Counted in timm's models themselves, through the real runner and the feature store."""
    parts = {"data": {"per_class": 8}, "stream": {"increment": 5}, "learners": ["ncm"]}
    alone = [run(settings(name=f"m{k}", backbone=one, **parts), tmp_path) for k, one in enumerate((TINY, LARGER))]
    calls = []
    forward = Backbone._features
    monkeypatch.setattr(Backbone, "_features", lambda self, *args: calls.append(1) or forward(self, *args))
    folders = run(several(**parts), tmp_path)
    assert not calls
    for j, folder in enumerate(folders):
        costs, own = read_run(folder)["stages"], [read_run(members[j])["stages"] for members in alone]
        for stage, row in enumerate(costs):
            members = [rows[stage]["costs"] for rows in own]
            for kind in ("train_passes", "test_passes"):
                assert row["costs"][kind] == sum(one[kind] for one in members) == 2 * members[0][kind] > 0
            assert row["costs"]["features_from_store"] > 0
    run(several(**{**parts, "learners": ["slda"], "inference_batch_size": 5}), tmp_path)
    assert calls  # another batch size is another key: the counter counts


def several(**changes) -> Config:
    plain = {key: value for key, value in settings().model_dump(mode="json").items() if key != "backbone"}
    return Config.model_validate({**plain, "learners": ["ncm"], "backbones": [TINY, LARGER], **changes})


# --- scales and weights -----------------------------------------------------------------------------------------------


def members_features(n=60, classes=3, seed=0):
    """Two informative members and noise, of unlike scales, float32 [n, 10], and labels."""
    rng = np.random.RandomState(seed)
    y = np.concatenate([np.arange(classes), rng.randint(classes, size=n - classes)])
    parts = [
        (rng.randn(classes, w) * signal)[y] + rng.randn(n, w) for w, signal in zip(WIDTHS, (1.5, 1.0, 0), strict=True)
    ]
    x = np.concatenate([part * size for part, size in zip(parts, (30, 1, 0.01), strict=True)], axis=1)
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y)


def left_out(x, y):
    return left_out_predictions(*thin_svd(x.double()), y)[0]


def test_stacking_is_the_minimum_on_the_simplex():
    """Against a general solver, and the conditions of Karush, Kuhn and Tucker by hand."""
    found = []
    for seed in range(6):
        x, y = members_features(seed=seed)
        p = [left_out(part, y) for part in x.split(WIDTHS, dim=1)]
        p.append(p[0].roll(1, dims=1))  # wrong wherever the first is right
        targets = torch.eye(3).double()[y]
        w = stacking_weights(p, y).numpy()

        def loss(w, p=p, targets=targets):
            return float((targets - sum(wk * pk for wk, pk in zip(w, p, strict=True))).square().sum())

        sums = {"type": "eq", "fun": lambda w: w.sum() - 1}
        other = minimize(loss, np.full(4, 1 / 4), bounds=[(0, 1)] * 4, constraints=sums, tol=1e-12)
        assert loss(w) <= other.fun + 1e-9 and abs(w.sum() - 1) < 1e-12 and w.min() >= 0
        np.testing.assert_allclose(w, other.x, atol=1e-3)
        mixed = sum(wk * pk for wk, pk in zip(w, p, strict=True))
        gradient = np.array([float(((mixed - targets) * pk).sum()) for pk in p])
        multiplier = gradient[w > 0]
        np.testing.assert_allclose(multiplier, multiplier[0], rtol=1e-7)
        assert (gradient[w == 0] >= multiplier[0] - 1e-7).all()
        found.append(w)
    assert any(w.min() == 0 for w in found) and any((w > 0).sum() > 1 for w in found)


def test_stacking_two_is_the_clipped_closed_form_and_copies_share():
    x, y = members_features()
    one, two = left_out(x[:, :3], y), left_out(x[:, 3:8], y)
    targets = torch.eye(3).double()[y]
    best = float(((targets - two) * (one - two)).sum() / (one - two).square().sum())
    np.testing.assert_allclose(stacking_weights([one, two], y), np.clip([best, 1 - best], 0, 1), rtol=1e-9)
    np.testing.assert_allclose(stacking_weights([one] * 4, y), [0.25] * 4, rtol=1e-6)


def test_weights_by_accuracy_and_by_evidence():
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    right = torch.eye(3).double()[y]
    half, wrong = right.clone(), right.roll(1, dims=1)
    half[:3] = half[:3].roll(1, dims=1)
    ln2 = np.log(2)
    raw = np.array([np.log(11) + ln2, ln2, 0.0])  # 5.5 of 6 right, 3 of 6, none
    np.testing.assert_allclose(boosting_weights([right, half, wrong], y), raw / raw.sum(), rtol=1e-12)
    np.testing.assert_allclose(boosting_weights([wrong, wrong], y), [0.5, 0.5])
    x, y = members_features()
    joined = Joined(WIDTHS, weights="logme").fit(x, y)
    scaled = Joined(WIDTHS).fit(x, y).scales.fit(x)(x).double().split(WIDTHS, dim=1)
    evidence = np.array([mean_log_evidence(*thin_svd(part), part.shape[1], y) for part in scaled])
    expected = np.exp(evidence / 0.1)
    np.testing.assert_allclose(joined.weights, expected / expected.sum(), rtol=1e-9)
    assert joined.weights[0] > joined.weights[2]


@pytest.mark.parametrize("weights", ["equal", "logme", "loo", "stack", [3, 1, 0]])
def test_joined_features_are_scaled_by_roots_of_weights_and_rms(weights):
    x, y = members_features()
    joined = Joined(WIDTHS, weights=weights).fit(x, y)
    assert float(joined.weights.sum()) == pytest.approx(1) and float(joined.weights.min()) >= 0
    if not isinstance(weights, str):
        np.testing.assert_allclose(joined.weights, [0.75, 0.25, 0])
    if weights in ("loo", "stack"):
        assert joined.weights[2] < 0.2  # noise
    rms = [float(part.double().square().mean().sqrt()) for part in x.split(WIDTHS, dim=1)]
    expected = x.double().numpy() * np.repeat(np.sqrt(joined.weights.numpy()) / rms, WIDTHS)
    np.testing.assert_allclose(joined(x), expected, rtol=1e-5)


def test_weights_that_a_first_task_cannot_give_are_one_line():
    x, y = members_features()
    refused(lambda: Joined(WIDTHS, weights="stack").fit(x, torch.zeros_like(y)), "combine.weights: stack", "equal")
    with pytest.raises(DataError, match="at least two classes"):
        Joined(WIDTHS, weights="loo").fit(x, torch.zeros_like(y))
    assert Joined(WIDTHS).fit(x, torch.zeros_like(y)).weights[0] == 1 / 3


def test_scales_and_weights_are_the_first_tasks_only():
    """The same stream cut short gives them; later tasks do not move them."""
    found = []
    for stop in (1, 3):
        both = pair(weights="stack")
        learner = build_learner("slda", both)
        run_stages(learner, stream_for(both), accelerator=accelerator(), stop_after=stop)
        found.append((learner.joined.weights, learner.joined.scales.factors))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][1].ne(1).all()


# --- classifiers on blocks --------------------------------------------------------------------------------------------


def test_ncm_by_blocks_is_the_weighted_sum_of_cosines():
    x, y = members_features()
    ncm = NCM(10, blocks=WIDTHS).partial_fit(x, y)
    ncm.block_weights = torch.tensor([0.5, 0.4, 0.1], dtype=torch.float64)
    expected = 0
    for w, part in zip((0.5, 0.4, 0.1), np.split(x.double().numpy(), np.cumsum(WIDTHS)[:-1], axis=1), strict=True):
        means = np.stack([part[y.numpy() == c].mean(0) for c in range(3)])
        norms = np.linalg.norm(part, axis=1)[:, None] * np.linalg.norm(means, axis=1)
        expected = expected + w * part @ means.T / norms
    np.testing.assert_allclose(ncm.logits(x.double()), expected, rtol=1e-9)
    assert torch.equal(NCM(10).partial_fit(x, y).logits(x), NCM(10, blocks=[10]).partial_fit(x, y).logits(x))
    refused(lambda: NCM(10, blocks=[3, 5]), "NCM: blocks are [3, 5]", "sum 10")


def test_lda_of_unequal_blocks_is_a_sum_over_them():
    x, y = members_features()
    whole = LDA(10, 0.1, "uniform", blocks=WIDTHS).partial_fit(x.double(), y).logits(x.double())
    parts = [
        LDA(w, 0.1, "uniform").partial_fit(p.double(), y).logits(p.double())
        for w, p in zip(WIDTHS, x.split(WIDTHS, 1), strict=True)
    ]
    np.testing.assert_allclose(whole, sum(parts) + 2 * np.log(3), rtol=1e-8)  # each has the prior once
    assert torch.equal(
        LDA(10, blocks=2).partial_fit(x, y).logits(x), LDA(10, blocks=[5, 5]).partial_fit(x, y).logits(x)
    )
    refused(lambda: LDA(10, blocks=[3, 8]), "LDA: blocks are [3, 8]", "sum 10")


# --- calibrated heads -------------------------------------------------------------------------------------------------


def noisy_scores(n=200, classes=5, seed=0):
    rng = np.random.RandomState(seed)
    y = rng.randint(classes, size=n)
    return torch.from_numpy(rng.randn(n, classes) + 1.5 * np.eye(classes)[y]), torch.from_numpy(y)


@pytest.mark.parametrize("mean", [mean_logits, mean_probabilities])
def test_means_of_heads(mean):
    z = noisy_scores(8)[0]
    other, beta = noisy_scores(8, seed=1)[0], torch.tensor([0.7, 0.7], dtype=torch.float64)
    half = torch.tensor([0.5, 0.5]).double()
    single = torch.log_softmax(z / 0.7, dim=1)
    torch.testing.assert_close(mean([z, z], beta, half), single)  # copies of one head are that head
    torch.testing.assert_close(mean([z, other], beta, torch.tensor([1.0, 0.0]).double()), single)
    w, betas = torch.tensor([[0.3, 0.7], [2.0, 0.5]], dtype=torch.float64)
    p = [np.exp(s.numpy() / float(b)) for b, s in zip(betas, (z, other), strict=True)]
    p = [part / part.sum(1, keepdims=True) for part in p]
    expected = p[0] ** 0.3 * p[1] ** 0.7 if mean is mean_logits else 0.3 * p[0] + 0.7 * p[1]
    np.testing.assert_allclose(mean([z, other], betas, w).exp(), expected / expected.sum(1, keepdims=True), rtol=1e-9)


def test_a_fifth_of_each_class_is_held_out():
    y = torch.tensor([0] * 12 + [1] * 4 + [2] * 5)
    held = held_out(y, torch.Generator().manual_seed(0))
    assert y[held].bincount(minlength=3).tolist() == [2, 0, 1] and held.tolist() == sorted(set(held.tolist()))
    assert held_out(y, torch.Generator().manual_seed(1)).tolist() != held.tolist()


@pytest.mark.parametrize("name", slow_beyond(["slda", "ranpac", "linear_probe"], sorted(ON_FROZEN)))
def test_each_head_is_the_learners_own_run_on_its_backbone(name):
    """Scores bit for bit; with weight 1 for one head also the predictions. Ridge scores and cosines are calibrated."""
    both = pair(heads="probability", weights=[0, 1])
    entry = {"name": name, **QUICK.get(name, {})}
    learner = build_learner(entry, both)
    pixels = images_for(both, each=40)  # 24 are held out on each task
    stream = Stream(pixels, images_for(both, each=4, seed=1), ClassIncremental(3, increment=3))
    run_stages(learner, stream, accelerator=accelerator())
    test = images_for(both, each=6, seed=7)
    for k, member in enumerate(both.members):
        alone = build_learner(entry, member)
        own = [
            ImageSet(part.source, Transforms(member.data_config)) for part in (pixels, images_for(both, each=4, seed=1))
        ]
        run_stages(alone, Stream(*own, ClassIncremental(3, increment=3)), accelerator=accelerator())
        seen = batch(test.through(k))
        scores = alone.logits(alone.features(seen))
        assert torch.equal(scores, learner.heads[k].logits(learner.heads[k].features(seen)))
        if k == 1:
            assert torch.equal(learner.predict(batch(test)), scores.argmax(1))
    assert bool((learner.temperatures != 1).all()) and bool(learner.temperatures.isfinite().all())


def test_heads_resume_and_predict_as_they_did(tmp_path):
    config = several(data={"per_class": 30}, combine={"heads": "logit", "weights": "loo"}, learners=["slda"])
    [folder] = run(config, tmp_path)
    whole, state = stable(read_run(folder)), (folder / "stage-02/learner.safetensors").read_bytes()
    shutil.rmtree(folder / "stage-02")
    run(config, tmp_path)
    assert stable(read_run(folder)) == whole and (folder / "stage-02/learner.safetensors").read_bytes() == state
    assert whole["summary"]["passes_per_test_image"] == 2
    refused(
        lambda: run(several(combine={"heads": "logit"}, learners=["joint"]), tmp_path / "x"), "learner joint: several"
    )


# --- the choice of backbones to use together --------------------------------------------------------------------------


def test_the_greedy_chain_is_what_trying_all_gives_step_by_step():
    x, y = members_features(90, seed=2)
    parts = x.split(WIDTHS, dim=1)
    scaled = [part.double() / part.double().square().mean().sqrt() for part in parts]

    def accuracy(*members):
        return ridge_leave_one_out(torch.cat([scaled[j] for j in members], dim=1), y)[0]

    chain = choose_together(parts, y, 3)
    for step, (member, found) in enumerate(chain):
        before = [k for k, _ in chain[:step]]
        tried = {k: accuracy(*before, k) for k in range(3) if k not in before}
        assert found == tried[member] == max(tried.values())
        assert not step or found > chain[step - 1][1]
    rest = [k for k in range(3) if k not in [member for member, _ in chain]]
    assert all(accuracy(*[member for member, _ in chain], k) <= chain[-1][1] for k in rest)
    assert 2 not in [member for member, _ in chain[:2]]  # noise
    assert choose_together(parts, y, 1) == chain[:1]


def test_rank_backbones_chooses_some_to_be_used_together(cil, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "c.yaml", backbone={}, data={"dataset": "digits", "per_class": 12})
    options = [f"--backbone={to_yaml(one, default_flow_style=True, width=999).strip()}" for one in (TINY, LARGER)]
    found = cil("rank-backbones", file, *options, "--together", 2)
    assert found.returncode == 0, found.stderr
    record = json.loads((tmp_path / "results/t/backbones.json").read_text())["together"]["chosen"]
    assert [one["passes_per_image"] for one in record] == list(range(1, len(record) + 1))
    assert record[0]["candidate"] in (TINY, LARGER) and all(0 < one["ridge"] <= 1 for one in record)
    lines = found.stdout.split("together", 1)[1].splitlines()[1 : 1 + len(record)]
    assert [line.split()[-2:] for line in lines] == [
        [f"{100 * one['ridge']:.2f}", str(one["passes_per_image"])] for one in record
    ]
    for wrong in (1, 3):
        refused_ = cil("rank-backbones", file, *options, "--together", wrong)
        assert (
            refused_.returncode == 2
            and f"--together {wrong}: " in refused_.stderr
            and "allowed: 2 to 2" in refused_.stderr
        )


# --- learners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learner", ["ncm", "ranpac"])
@pytest.mark.parametrize("count", [2, 3])
def test_an_ensemble_of_copies_is_one(learner, count):
    """At equal weights, and for ridge without scales, of which a strength in absolute numbers would take notice."""
    entry = {"name": learner, **QUICK.get(learner, {})}
    one = copies(1).members[0]
    alone, together = build_learner(entry, one), build_learner(entry, copies(count, scale="none", weights="stack"))
    for each in (alone, together):
        run_stages(each, stream_for(each.backbone), accelerator=accelerator())
    test = images_for(together.backbone, each=6, seed=7)
    single = batch(ImageSet(test.source, Transforms(one.data_config)))
    scores = alone.logits(alone.features(single).double()), together.logits(together.features(batch(test)).double())
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(alone.predict(single), together.predict(batch(test)))


def test_a_random_member_costs_ridge_little_and_scaled_alike_even_if_it_is_large():
    """Noise of thirty times the size: by the first task's scale it is as large as the informative member."""
    x, y = members_features(300, seed=1)
    x, noise = x[:, :8], 30 * torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) * x[:, :8].norm()
    half = torch.arange(300) < 150
    found = []
    for features, widths in ((x, (3, 5)), (torch.cat([x, noise], 1), (3, 5, 8))):
        joined = Joined(widths).fit(features[half], y[half])
        ridge = Ridge(sum(widths), None, "gcv").partial_fit(joined(features[half]), y[half])
        found.append(float((ridge.logits(joined(features[~half])).argmax(1) == y[~half]).double().mean()))
    assert found[0] > 0.6 and found[1] > found[0] - 0.05


@pytest.mark.parametrize("name", slow_beyond([n for n in on_any_backbone() if "avalanche" not in n], on_any_backbone()))
def test_learners_that_need_one_backbone_are_refused_by_name(name):
    both = pair()
    if name in ON_FROZEN:
        learner = build_learner({"name": name, **QUICK.get(name, {})}, both)
        rows = run_stages(learner, stream_for(both), accelerator=accelerator(), stop_after=2)
        assert rows[-1]["costs"]["test_passes"] == 2 * sum(rows[-1]["total"]) - 2 * sum(rows[0]["total"])
        scores = learner.logits(learner.features(batch(images_for(both))))
        assert scores.shape == (48, 4) and bool(scores.isfinite().all())
    elif registry.resolve(name).takes_teachers:
        assert [view.index for view in build_learner(name, both).views().values()] == [0]
        with pytest.raises(BackboneError, match=r"several backbones .* are used by their frozen features alone"):
            build_learner(name, pair(heads="logit"))
    else:
        with pytest.raises(BackboneError, match=r"several backbones .* are used by their frozen features alone"):
            build_learner(name, both)
    if name in ("ranpac", "slda"):
        with pytest.raises(BackboneError, match="give it tuner: null"):
            build_learner({"name": name, "tuner": "adapter"}, both)


def test_ones_own_learner_on_frozen_features_gets_joined_ones():
    class Own(Learner):
        def __init__(self, config, backbone):
            super().__init__(config, backbone)
            self.classifier = Ridge(backbone.feature_dim, None, "gcv")

        def learn(self, task, ctx):
            self.classifier.partial_fit(*ctx.features(self, task.train))

        def logits(self, features):
            return self.classifier.logits(features)

    both = pair()
    mine, theirs = Own(Own.Config(), both), build_learner({"name": "ranpac", **QUICK["ranpac"]}, both)
    for learner in (mine, theirs):
        for task in stream_for(both).tasks:
            ctx = Context(accelerator(), stage=task.index)
            learner.begin(task, ctx)
            learner.learn(task, ctx)
    seen = batch(images_for(both, seed=9))
    assert torch.equal(mine.logits(mine.features(seen)), theirs.logits(theirs.features(seen)))


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two backbones and one of a single one."""
    root = tmp_path_factory.mktemp("runs")
    config = several(data={"per_class": 8}, combine={"weights": "stack"}, learners=["slda", "ncm"])
    return [*run(config, root), *run(settings(name="alone", data={"per_class": 8}), root)]


def test_the_header_names_all_members_and_a_single_backbones_header_is_as_before(finished):
    header, alone = read_run(finished[0]), read_run(finished[2])
    both = load_backbones(several())
    assert header["backbone"] == {"name": both.name, "sha256": both.fingerprint, "feature_dim": 40}
    assert [one["sha256"] for one in header["backbones"]] == [member.fingerprint for member in both.members]
    assert [one["feature_dim"] for one in header["backbones"]] == [24, 16]
    assert header["config"]["combine"] == {"scale": "rms", "weights": "stack", "heads": "joint"}
    assert "backbone" not in header["config"]
    assert header["summary"]["passes_per_train_image"] == header["summary"]["passes_per_test_image"] == 2
    assert not {"backbones", "combine"} & {*alone, *alone["config"]} and "backbone" in alone["config"]
    assert "joined.weights" not in (RunFolder(finished[2]).stage(2) / "learner.safetensors").read_bytes().decode(
        "latin1"
    )
    [plan] = plans(Config.model_validate(header["config"]))
    assert dump(plan.config) == header["config"]


def test_a_run_of_several_is_skipped_resumed_and_refused_like_any(tmp_path, finished):
    config = several(data={"per_class": 8}, combine={"weights": "stack"}, learners=["slda"])
    [folder] = run(config, tmp_path)
    whole = stable(read_run(folder))
    state = (folder / "stage-02/learner.safetensors").read_bytes()
    for stage in (2, 1):
        shutil.rmtree(folder / f"stage-0{stage}")
    run(config, tmp_path)
    assert stable(read_run(folder)) == whole and (folder / "stage-02/learner.safetensors").read_bytes() == state
    other = several(data={"per_class": 8}, combine={"weights": "equal"}, learners=["slda"])
    refused(lambda: run(other, tmp_path), "combine.weights", "--redo")


def test_prediction_from_a_run_folder_is_the_learners(tmp_path, finished):
    pixels, _ = easy(5, 2, seed=4)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    for folder in finished[:2]:
        model = open_run(folder)
        paths = find_images([tmp_path])
        found = dict(predict(folder, paths, top=1, batch_size=3))
        for path in paths:
            x = read_image(path, model.transforms)
            assert x.shape == (1, 3, 832)
            label = int(model.learner.predict(x))
            assert found[path][0][0] == model.names[label]
    stored = RunFolder(finished[0]).stage(2) / "predictions.safetensors"
    predictions, learner = load_file(stored), open_run(finished[0]).learner
    config = several(data={"per_class": 8})
    inputs = Inputs(config, torch.device("cpu"))
    with make_stream(config, *inputs.images).open_test() as test:
        index = predictions["index"].numpy()[:100]
        seen = next(iter(test.images.batches(index, index, 100)))[0]
    assert torch.equal(learner.predict(seen), predictions["predicted"][:100])


def answer_of(model) -> torch.Tensor:
    pictures = [Image.fromarray(one) for one in easy(6, 2, seed=9)[0]]
    pixels = torch.stack([torch.from_numpy(np.asarray(model.transforms.evaluate(one))) for one in pictures])
    with torch.no_grad():
        return model(model.transforms.normalize(pixels))[0]


@pytest.mark.parametrize(
    ("kind", "heads"),
    slow_beyond([("safetensors", None)], product(("safetensors", "torch.export", "onnx"), (None, "logit"))),
)
def test_an_exported_run_of_several_answers_as_the_run(kind, heads, finished, tmp_path, monkeypatch):
    """Every backbone with its own preprocessing and tensors; the card's code packs an image as the run did."""
    folder = finished[0]
    if heads:
        # ONNX computes the scores of LDA in float32, which leaves few digits where the heads' offsets cancel
        learner = "ncm" if kind == "onnx" else "slda"
        [folder] = run(several(data={"per_class": 8}, combine={"heads": heads}, learners=[learner]), tmp_path / "r")
    mine, theirs = open_run(folder), load(export(folder, tmp_path / "m", kind))
    torch.testing.assert_close(answer_of(theirs), answer_of(mine), rtol=1e-4, atol=1e-4)
    facts = json.loads((tmp_path / "m/model.json").read_text())
    assert [one["sha256"] for one in facts["backbone"]["members"]] == [
        one["sha256"] for one in read_run(folder)["backbones"]
    ]
    assert facts["input"]["shape"] == ["batch", 3, 16**2 + 24**2]
    printed = run_the_card(tmp_path / "m", [], monkeypatch)
    [(_, ranked)] = predict(folder, [tmp_path / "m/photo.png"])
    assert ranked[0][0] in printed.split("\n")[-1].replace("'", " ").split()


def test_joining_and_finding_runs_of_several_is_refused(finished, tmp_path):
    refused(lambda: join(finished[:2], tmp_path / "out"), "has 2 backbones", "give runs with the key backbone")
    refused(lambda: by_space(finished[:1]), "has 2 backbones")
    assert not list(tmp_path.iterdir())


def test_confidence_of_several(tmp_path):
    """Calibrated from joined features, and kept as it was after a resume."""
    config = several(
        data={"per_class": 12}, learners=["slda"], confidence=True, stream={"increment": 5, "validation": 0.25}
    )
    [folder] = run(config, tmp_path)
    whole = stable(read_run(folder))
    shutil.rmtree(folder / "stage-01")
    run(config, tmp_path)
    assert stable(read_run(folder)) == whole and whole["stages"][1]["confidence"]


def test_one_moved_file_of_weights_is_found_and_two_are_refused(tmp_path):
    files = []
    for k, section in enumerate((TINY, LARGER)):
        files.append(tmp_path / f"w{k}.safetensors")
        save_file(load_backbone(BackboneConfig(**section)).model.state_dict(), files[-1])
    sections = [{**one, "weights": str(file)} for one, file in zip((TINY, LARGER), files, strict=True)]
    [folder] = run(several(backbones=sections, data={"per_class": 4}), tmp_path / "r")
    assert open_run(folder).backbone.widths == (24, 16)
    files[1].rename(tmp_path / "moved.safetensors")
    refused(lambda: open_run(folder), "no file", "w1.safetensors", "--weights FILE")
    assert open_run(folder, weights=tmp_path / "moved.safetensors").backbone.widths == (24, 16)
    files[0].rename(tmp_path / "too.safetensors")
    with pytest.raises(RunError, match="2 backbones, and of 2 of them the weights are not"):
        open_run(folder, weights=tmp_path / "moved.safetensors")


def test_identity_has_the_members_without_their_places(finished):
    config = json.loads((finished[0] / "metrics.json").read_text())["config"]
    places = with_paths(
        {**config, "backbones": [{**one, "weights": "a.pt"} for one in config["backbones"]]}, lambda p: f"/x/{p}"
    )
    assert [one["weights"] for one in places["backbones"]] == ["/x/a.pt"] * 2
    known = identity_settings(config)
    assert known["combine.weights"] == "stack" and known["backbones.1.options.depth"] == 2
    assert known == identity_settings(places)


# --- configuration ----------------------------------------------------------------------------------------------------

WRONG = {
    "one": ({"backbones": ["x"]}, "got 1, expected two or more; for a single one use backbone"),
    "none": ({"backbones": []}, "got 0, expected two or more"),
    "both": ({"backbones": ["x", "y"], "backbone": {"name": "z"}}, "give backbone or backbones, not both"),
    "key": ({"backbones": ["x", {"nam": "y"}]}, "unknown key backbones.1.nam (did you mean 'name'?)"),
    "combine alone": ({"combine": {"scale": "unit"}}, "combine: it joins the features of several backbones"),
    "weights": ({"backbones": ["x", "y"], "combine": {"weights": [1]}}, "got 1 numbers for 2 backbones"),
    "zero": ({"backbones": ["x", "y"], "combine": {"weights": [0, 0]}}, "all are 0"),
    "kind": ({"backbones": ["x", "y"], "combine": {"weights": "stak"}}, "'equal', 'logme', 'loo' or 'stack'"),
    "too many": ({"backbones": ["x"] * 13, "combine": {"weights": "stack"}}, "takes 12 at most, got 13"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_configurations_are_one_line(case):
    change, said = WRONG[case]
    refused(lambda: validated(Config, {"learners": ["ncm"], **change}, "config: "), said)


def test_keys_that_say_nothing_are_not_written():
    one = Config.model_validate({"learners": ["ncm"]})
    two = Config.model_validate({"learners": ["ncm"], "backbones": ["x", {"name": "y"}], "backbone": None})
    assert not {"backbones", "combine"} & dump(one).keys() and "backbone" in dump(one)
    assert dump(two)["combine"] == {"scale": "rms", "weights": "equal", "heads": "joint"}
    assert "backbone" not in dump(two)
    assert Config.model_validate(dump(two)) == Config.model_validate({"learners": ["ncm"], "backbones": ["x", "y"]})


def test_a_misspelt_member_is_named_and_nothing_is_written(tmp_path):
    wrong = several(backbones=[TINY, {"name": "vit_tinny_patch16_224"}])
    refused(lambda: run(wrong, tmp_path), "backbones.1.name: timm knows no 'vit_tinny_patch16_224'", "did you mean")
    refused(lambda: run(several(learners=["ncm", "finetune"]), tmp_path), "learner finetune: several backbones")
    assert not list(tmp_path.iterdir())
