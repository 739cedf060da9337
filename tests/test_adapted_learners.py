"""APER, RanPAC, FeCAM, EASE, SLCA: each against its closed form, and what each costs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge as SklearnRidge

from cil.backbone import Backbone
from cil.config import BackboneConfig
from cil.errors import BackboneError, StreamError
from cil.learners.aper import APER
from cil.learners.ease import EASE
from cil.learners.fecam import FeCAM
from cil.learners.layer_lda import LayerLDA
from cil.learners.ncm import NCMLearner
from cil.learners.ranpac import RanPAC
from cil.learners.slca import SLCA
from cil.learners.slda import SLDA
from cil.runner import require_supported, run_stages
from cil.testing import Case
from cil.testing.setting import SIZES, accelerator, backbone, context, draw_images, probe_images, stream

TRAIN = np.bincount(draw_images("train")[1])
QUICK = {"epochs": 2, "lr": 0.1}


def per_task(counts) -> list[int]:
    return [int(part.sum()) for part in np.split(np.asarray(counts), np.cumsum(SIZES)[:-1])]


def all_features(vit, see):
    """Features and labels of all training images of the checks' stream, in task order."""
    with torch.inference_mode():
        parts = [next(task.train.batches(999)) for task in stream(vit).tasks]
        return torch.cat([see(images) for images, _ in parts]), torch.cat([labels for _, labels in parts])


# --- first-task-only learners: what a later task costs


@pytest.mark.parametrize(
    ("cls", "parameters", "branches"),
    [
        (RanPAC, {"projection": 50}, 1),
        (RanPAC, {"projection": 50, "tuner": "adapter", **QUICK}, 1),
        (FeCAM, {}, 1),
        (APER, QUICK, 2),
    ],
)
def test_a_later_task_is_one_pass_over_its_images_and_no_training(cls, parameters, branches):
    rows = Case(cls, parameters).finished.rows
    images, tests = per_task(TRAIN), [6 * size for size in SIZES]
    trained = QUICK["epochs"] * images[0] if "lr" in parameters else 0
    assert [r["costs"]["train_passes"] for r in rows] == [
        trained + branches * images[0],
        *(branches * n for n in images[1:]),
    ]
    # after the adaptation is frozen every test image passes once through each branch, over the whole stream
    assert [r["costs"]["test_passes"] for r in rows] == [branches * n for n in tests]
    assert [r["costs"]["trainable_parameters"] > 0 for r in rows] == [trained > 0, False, False]
    logged = [{name for name, _ in r["log"]} - {"ridge_strength"} for r in rows]  # λ is chosen, not trained
    assert [names != set() for names in logged] == [trained > 0, False, False]
    assert all(("ridge_strength" in {name for name, _ in r["log"]}) == (cls is RanPAC) for r in rows)


@pytest.mark.parametrize("cls", [APER, RanPAC, FeCAM])
def test_the_tuner_moves_on_the_first_task_only(cls):
    parameters = {**QUICK, "tuner": "adapter"} | ({"projection": 50} if cls is RanPAC else {})
    one, all_ = (Case(cls, parameters).run(stop_after=n).learner for n in (1, 3))
    fresh = Case(cls, parameters).learner()
    assert any(not torch.equal(a, b) for a, b in zip(one.tuner.parameters(), fresh.tuner.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.tuner.parameters(), all_.tuner.parameters(), strict=True))


# --- APER, RanPAC, FeCAM against closed forms


def test_aper_is_a_cosine_ncm_on_both_branches_side_by_side():
    vit = backbone()
    learner = Case(APER, {**QUICK, "lr": 1.0}).run(vit=vit).learner
    features, labels = all_features(vit, lambda x: torch.cat([vit(x), vit(x, learner.tuner)], 1))
    assert not torch.allclose(features[:, : vit.feature_dim], features[:, vit.feature_dim :])
    means = torch.stack([features[labels == c].double().mean(0) for c in range(8)]).float()
    with torch.inference_mode():
        queries = torch.cat([vit(probe_images()), vit(probe_images(), learner.tuner)], 1)
        scores = learner.logits(learner.features(probe_images()))
    torch.testing.assert_close(scores, F.cosine_similarity(queries[:, None], means[None], dim=2), atol=1e-5, rtol=1e-5)


def test_aper_that_learned_nothing_predicts_as_simplecil():
    """The adapter starts at zero: both halves are the same feature, and concatenation changes no cosine."""
    aper = Case(APER, {"epochs": 1, "lr": 1e-12}).run().learner
    ncm = Case(NCMLearner).run().learner
    assert torch.equal(aper.predict(probe_images()), ncm.predict(probe_images()))


@pytest.mark.parametrize("sizes", [(8,), (4, 1, 3), (1,) * 8])
def test_ranpac_is_ridge_regression_on_all_data(sizes):
    vit = backbone()
    learner = RanPAC(RanPAC.Config(projection=40, strength=0.5), vit)
    run_stages(learner, stream(vit, sizes=sizes), accelerator=accelerator(), batch_size=16)
    projection = learner.classifier.projection.double()
    features, labels = all_features(vit, vit)
    reference = SklearnRidge(0.5, fit_intercept=False, solver="cholesky")
    reference.fit((features.double() @ projection).relu().numpy(), F.one_hot(labels, 8).numpy())
    with torch.inference_mode():
        queries = vit(probe_images()).double()
        ours = learner.logits(queries)
    np.testing.assert_allclose(ours, reference.predict((queries @ projection).relu().numpy()), atol=1e-6)


def test_ranpac_keeps_its_projection_and_the_cosine_rule_is_another_one():
    linear, cosine = (Case(RanPAC, {"projection": 40, "decision": d}).run().learner for d in ("linear", "cosine"))
    assert torch.equal(linear.classifier.projection, cosine.classifier.projection)
    assert "classifier.projection" in linear.state_dict()
    with torch.inference_mode():
        a, b = (x.logits(x.features(probe_images())) for x in (linear, cosine))
    norms = linear.classifier.weights.norm(dim=0).float()
    torch.testing.assert_close((a / norms).argmax(1), b.argmax(1))
    assert not torch.allclose(a, b)


def test_fecam_by_numpy():
    vit = backbone()
    learner = Case(FeCAM, {"shrinkage": [1.0, 0.5]}).run(vit=vit).learner
    features, labels = (x.double().numpy() for x in all_features(vit, vit))
    u = features / np.linalg.norm(features, axis=1, keepdims=True)
    with torch.inference_mode():
        queries = learner.features(probe_images())
        ours = -learner.logits(queries).double().numpy()
    q = queries.double().numpy() / np.linalg.norm(queries.double().numpy(), axis=1, keepdims=True)
    for c in [c for c in range(8) if TRAIN[c] > 1]:
        cov = np.cov(u[labels == c].T)
        off = cov[~np.eye(len(cov), dtype=bool)]
        cov = cov + np.diag(cov).mean() * np.eye(len(cov)) + 0.5 * off.mean() * (1 - np.eye(len(cov)))
        cov /= np.sqrt(np.outer(np.diag(cov), np.diag(cov)))
        d = q - u[labels == c].mean(0)
        np.testing.assert_allclose(ours[:, c], np.einsum("nd,de,ne->n", d, np.linalg.pinv(cov), d), rtol=1e-3)


def test_slda_by_scikit_learn():
    vit = backbone()
    learner = Case(SLDA, {"shrinkage": 0.1, "priors": "counts"}).run(vit=vit).learner
    features, labels = (x.double().numpy() for x in all_features(vit, vit))
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(features, labels)
    with torch.inference_mode():
        queries = learner.features(probe_images())
        ours = learner.logits(queries).double().numpy()
    theirs = reference.decision_function(queries.double().numpy())
    np.testing.assert_allclose(ours - ours[:, :1], theirs - theirs[:, :1], rtol=1e-3, atol=1e-3)


def by_token(vit, images):
    """Class token, mean and standard deviation of every block from timm, each of length 1, blocks side by side."""
    outputs = vit.model.forward_intermediates(
        images, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    kinds = zip(*((prefix[:, 0], patches.mean(1), patches.std(1)) for patches, prefix in outputs), strict=True)
    return [torch.cat([F.normalize(block, dim=1) for block in blocks], 1).double().numpy() for blocks in kinds]


@pytest.mark.filterwarnings("ignore:Only one sample available")  # of a class; scikit-learn scales each class by itself
@pytest.mark.parametrize("sizes", [(4, 1, 3), (1,) * 8])
def test_layer_lda_by_timm_and_scikit_learn(sizes):
    vit = backbone()
    learner = LayerLDA(LayerLDA.Config(), vit)
    rows = run_stages(learner, stream(vit, sizes=sizes), accelerator=accelerator(), batch_size=16)
    with torch.inference_mode():
        images, labels = zip(*(next(task.train.batches(999)) for task in stream(vit).tasks), strict=True)
        train, test = by_token(vit, torch.cat(images)), by_token(vit, probe_images())
        ours = learner.logits(learner.features(probe_images())).double().numpy()
    theirs, shrinkages = 0, learner.classifier.shrinkages
    for x, queries, shrinkage in zip(train, test, shrinkages, strict=True):
        reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x, torch.cat(labels).numpy())
        theirs = theirs + (reference.decision_function(queries) - np.log(TRAIN / TRAIN.sum())) / 3
    np.testing.assert_allclose(ours - ours[:, :1], theirs - theirs[:, :1], rtol=1e-3, atol=1e-3)
    assert [value for name, value in rows[-1]["log"] if name == "shrinkage"] == shrinkages
    assert sum(row["costs"]["train_passes"] for row in rows) == TRAIN.sum()
    assert rows[-1]["costs"]["statistics_bytes"] >= 8 * 3 * 144**2


def test_layer_lda_with_the_final_feature_and_without_layers():
    vit = backbone()
    parts = LayerLDA(
        LayerLDA.Config(layers={"blocks": [0, 2], "tokens": ["mean", "class"], "final": True}), vit
    ).parts()
    assert parts == [[*range(48), *range(96, 144)], [*range(48, 96), *range(144, 192)], [*range(192, 240)]]
    plain = Case(LayerLDA, {"layers": None, "shrinkage": 0.1}).run().learner
    slda = Case(SLDA, {"shrinkage": 0.1}).run().learner
    with torch.inference_mode():
        assert torch.equal(plain.logits(plain.features(probe_images())), slda.logits(slda.features(probe_images())))


# --- EASE


def test_ease_stage_t_trains_adapter_t_only():
    learners = [Case(EASE, {**QUICK, "bottleneck": 4}).run(stop_after=n).learner for n in (1, 2, 3)]
    for later, learner in enumerate(learners[1:], start=1):
        assert len(learner.adapters) == later + 1
        for j in range(later):
            old = learners[j].adapters[j].state_dict()
            assert all(torch.equal(v, old[k]) for k, v in learner.adapters[j].state_dict().items())
        assert any(
            not torch.equal(a, b)
            for a, b in zip(learner.adapters[later].parameters(), learner.adapters[later - 1].parameters(), strict=True)
        )


def test_ease_sees_every_image_once_through_every_adapter_asked_for():
    rows = Case(EASE, {**QUICK, "bottleneck": 4}).finished.rows
    images, tests = per_task(TRAIN), np.array([6 * size for size in SIZES])
    for t, row in enumerate(rows):
        assert row["costs"]["train_passes"] == QUICK["epochs"] * images[t] + (t + 1) * images[t]
        # the new adapter sees all test images, the older ones only the new task's
        assert row["costs"]["test_passes"] == tests[: t + 1].sum() + t * tests[t]
    assert [row["unchanged_since"] for row in rows] == [[0], [0, 1], [0, 1, 2]]


def test_ease_no_view_is_computed_twice_for_an_image(monkeypatch):
    seen: Counter[tuple[int, bytes]] = Counter()
    original = Backbone.forward

    def counting(self, images, tuner=None):
        if tuner is not None and not tuner.training:
            seen.update((id(tuner), image.numpy().tobytes()) for image in images)
        return original(self, images, tuner)

    monkeypatch.setattr(Backbone, "forward", counting)
    learner = Case(EASE, {**QUICK, "bottleneck": 4}).run().learner
    assert set(seen.values()) == {1}
    tests = 6 * sum(SIZES)
    assert Counter(key for key, _ in seen) == {
        id(a): tests + n for a, n in zip(learner.adapters, np.cumsum(per_task(TRAIN)[::-1])[::-1], strict=True)
    }


def ease_by_hand() -> EASE:
    """Three tasks of 1, 1 and 2 classes in subspaces of two dimensions; -1 marks what has to be filled in."""
    learner = EASE.__new__(EASE)
    torch.nn.Module.__init__(learner)
    learner.config = EASE.Config(alpha=0.4)
    learner.adapters = torch.nn.ModuleList([torch.nn.Identity() for _ in range(3)])
    learner.register_buffer("task_of", torch.tensor([0, 1, 2, 2]))
    hole = [-1.0, -1.0]
    learner.register_buffer(
        "prototypes",
        torch.tensor(
            [
                [[1.0, 0.0], hole, hole],
                [[0.0, 2.0], [3.0, 0.0], hole],
                [[5.0, 0.0], [0.0, 1.0], [1.0, 1.0]],
                [[0.0, 1.0], [2.0, 0.0], [0.0, 4.0]],
            ],
            dtype=torch.float64,
        ),
    )
    return learner


def test_ease_prototypes_of_old_classes_by_hand():
    learner = ease_by_hand()
    true = learner.prototypes.clone()
    learner.complement()
    p, e = learner.prototypes, np.e
    # class 0 in subspace 1: references are classes 1, 2, 3; cosines to class 0 in subspace 0 are 0, 1, 0
    w = np.array([1, e, 1]) / (2 + e)
    np.testing.assert_allclose(p[0, 1], w[0] * np.array([3, 0]) + w[1] * np.array([0, 1]) + w[2] * np.array([2, 0]))
    # class 0 in subspace 2: references 2, 3; cosines 1, 0
    w = np.array([e, 1]) / (1 + e)
    np.testing.assert_allclose(p[0, 2], w[0] * np.array([1, 1]) + w[1] * np.array([0, 4]))
    # class 1 in subspace 2: references 2, 3, compared in ITS subspace 1: cosines 0, 1
    w = np.array([1, e]) / (1 + e)
    np.testing.assert_allclose(p[1, 2], w[0] * np.array([1, 1]) + w[1] * np.array([0, 4]))
    kept = true >= 0
    assert torch.equal(p[kept], true[kept])


def test_ease_scores_by_hand():
    learner = ease_by_hand()
    learner.complement()
    f = torch.tensor([[[1.0, 0.0], [0.0, 3.0], [1.0, 1.0]]])
    scores = learner.logits(f.flatten(1))[0]
    cos = F.cosine_similarity(f.double()[0], learner.prototypes, dim=2)
    for c, own in enumerate([0, 1, 2, 2]):
        weights = [1.0 if j == own else 0.4 / 2 for j in range(3)]
        assert scores[c].item() == pytest.approx(
            sum(w * float(x) for w, x in zip(weights, cos[c], strict=True)), abs=1e-6
        )


# --- SLCA

SLOW = {"epochs": 2, "milestones": [1], "samples": 16}


def test_slca_predicts_with_aligned_rows_and_trains_from_the_others():
    one, two = (Case(SLCA, SLOW).run(stop_after=n).learner for n in (1, 2))
    assert torch.equal(one.aligned.weight, one.head.weight)  # nothing to align with a single task
    assert torch.equal(two.head.weight[:4], one.head.weight), "old rows are frozen, and alignment is thrown away"
    assert not torch.equal(two.aligned.weight[:4], two.head.weight[:4])
    with torch.inference_mode():
        features = two.features(probe_images())
        torch.testing.assert_close(two.logits(features), F.linear(features, two.aligned.weight, two.aligned.bias))
    without = Case(SLCA, {**SLOW, "alignment_epochs": 0}).run(stop_after=2).learner
    assert torch.equal(without.aligned.weight, without.head.weight)


def test_slca_backbone_learns_slower_by_the_factor():
    """One plain SGD step: the update of every weight is proportional to the group's rate."""
    moved = {}
    for factor in (0.01, 0.02):
        case = Case(
            SLCA,
            {
                **SLOW,
                "epochs": 1,
                "backbone_lr_factor": factor,
                "momentum": 0,
                "weight_decay": 0,
                "train_batch_size": 999,
            },
        )
        vit = backbone()
        learner = case.learner(vit)
        start = {k: v.detach().clone() for k, v in learner.tuner.weights().items()}
        ctx = context()
        task = stream(vit).tasks[0]
        learner.begin(task, ctx)
        learner.train_rows(task, ctx)
        moved[factor] = torch.cat([(v.detach() - start[k]).flatten() for k, v in learner.tuner.weights().items()])
    assert moved[0.01].norm() > 0
    torch.testing.assert_close(2 * moved[0.01], moved[0.02], atol=1e-6, rtol=1e-2)


def test_slca_gaussians_are_those_of_the_backbone_at_the_time():
    vit = backbone()
    one, two = (Case(SLCA, SLOW).run(vit=vit, stop_after=n).learner for n in (1, 2))
    features, labels = all_features(vit, one.features)
    torch.testing.assert_close(two.gaussians.means[0], features[labels == 0].double().mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(two.gaussians.sums[:4], one.gaussians.sums)


def test_slca_fresh_norm_starts_at_one_and_zero():
    fresh, kept = (Case(SLCA, {**SLOW, "fresh_norm": f}).learner().tuner.weights() for f in (True, False))
    assert torch.equal(fresh["norm.weight"], torch.ones(48)) and torch.equal(fresh["norm.bias"], torch.zeros(48))
    differ = {k for k in fresh if not torch.equal(fresh[k], kept[k])}
    assert differ <= {"norm.weight", "norm.bias"}


# --- what does not fit is said before training starts


@pytest.mark.parametrize("cls", [EASE, SLCA])
def test_learners_that_need_new_classes_refuse_domains(cls):
    repeated = stream(backbone())
    again = type(repeated.tasks[0])(1, (0, 1), (0, 1, 2, 3), repeated.tasks[0].names, repeated.tasks[0].train)
    repeated.tasks = (repeated.tasks[0], again, *repeated.tasks[1:])
    with pytest.raises(StreamError, match="tasks of new classes only"):
        require_supported(cls, repeated)
    require_supported(RanPAC, repeated)


@pytest.mark.parametrize(
    ("cls", "parameters"),
    [(EASE, {}), (APER, {}), (APER, {"tuner": "vpt_deep"}), (RanPAC, {"tuner": {"name": "prefix", "length": 3}})],
)
def test_token_level_tuners_refuse_other_backbones_when_built(cls, parameters):
    from cil.backbone import load_backbone

    swin = load_backbone(
        BackboneConfig(name="swin_tiny_patch4_window7_224", weights="random", options={"depths": [1, 1, 1, 1]})
    )
    with pytest.raises(BackboneError, match=r"SwinTransformer"):
        cls(cls.Config.model_validate(parameters), swin)


def test_a_misfit_is_named_before_any_learner_trains(tmp_path):
    from cil import load_config, run

    config = load_config(
        "quickstart",
        [
            "learners=[ncm, {name: aper, label: mine, tuner: {name: lora, targets: [query]}}]",
            "orders=[1993]",
            "data.per_class=2",
        ],
    )
    with pytest.raises(BackboneError, match=r"^learner mine: .*query"):
        run(config, tmp_path)
    assert not list(tmp_path.rglob("stage-*"))


@pytest.mark.parametrize("tuner", ["adapter", "ssf", "prefix", "bitfit", "lora", "dora", "ia3", "oft", "osf"])
def test_every_kind_of_tuner_trains_in_mixed_precision(tuner):
    """Autocast in the forward pass, float32 weights and gradients; the first task is learned as in float32."""
    from cil.utils import hardware

    vit = backbone()
    learner = APER(APER.Config(tuner=tuner, epochs=2, lr=0.1, train_batch_size=8), vit)
    fresh = [p.detach().clone() for p in learner.tuner.parameters()]
    rows = run_stages(learner, stream(vit), accelerator=hardware.accelerator("cpu", "bf16"), stop_after=1)
    after = list(learner.tuner.parameters())
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(after, fresh, strict=True))
    assert rows[0]["correct"][0] / rows[0]["total"][0] > 0.5
