"""Every learner passes the common checks; every check can fail; each method equals its closed form or floor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from sklearn.neighbors import NearestCentroid

from cil.backbone import FROZEN
from cil.classifiers import NCM
from cil.errors import CilError, PluginError
from cil.learner import Learner, LearnerConfig
from cil.learners.ncm import NCMLearner
from cil.testing import CHECKS, Case, check_learner, parametrize_learner
from cil.testing.setting import accelerator, backbone, context, draw_images, probe_images, stream

OTHER_TUNERS = ("ssf", "vpt_shallow", "vpt_deep", "lora", "full")


@parametrize_learner(
    [
        ("ncm", {}),
        ("ncm", {"metric": "euclidean"}),
        ("linear_probe", {}),
        ("finetune", {}),
        ("joint", {}),
        ("aper", {"tuner": "adapter", "epochs": 3, "lr": 0.1}),
        ("ranpac", {"projection": 100}),
        ("ranpac", {"projection": 100, "tuner": "adapter", "epochs": 3, "lr": 0.1, "strength": "loo"}),
        ("ranpac", {"projection": None, "decision": "cosine"}),
        ("loranpac", {"projection": 100, "rank": 5, "tuner": "ssf", "epochs": 3, "lr": 0.1}),
        ("fecam", {}),
        ("slda", {}),
        ("layer_lda", {}),
        ("zero_shot", {}),
        ("ease", {"epochs": 3, "lr": 0.1, "bottleneck": 8, "init_ptm": True, "beta": 0.5}),
        ("slca", {"epochs": 5, "milestones": [4], "samples": 16, "fresh_norm": False}),
    ]
)
def test_common_checks(case, check):
    check(case)


@pytest.mark.slow
@parametrize_learner(
    [
        *[("aper", {"tuner": tuner, "epochs": 3, "lr": 0.1}) for tuner in OTHER_TUNERS],
        ("amalgamate", {"epochs": 3, "lr": 0.1}),
        ("linear_probe", {"loss": "local", "optimizer": "adam", "lr": 0.01}),
        ("joint", {"trains": "head", "lr": 0.05, "epochs": 10}),
        ("ranpac", {"projection": 100, "strength": "gcv"}),
        ("slda", {"shrinkage": "gcv"}),
        ("slda", {"text": {}}),
        ("ranpac", {"projection": 100, "text": {"space": "joint", "prior": 4, "weight": "first_task"}}),
        ("loranpac", {"projection": 100, "block": 7}),
        ("clip_gda", {}),
        ("tip_adapter", {}),
        ("tip_adapter", {"keys": "images", "shots": None}),
        ("rapf", {"epochs": 3, "milestones": [2], "lr": 0.01, "threshold": 1.3}),
        ("rapf", {"epochs": 2, "milestones": [1], "init": "identity", "shrink": True, "bias": 0.2}),
        ("proof", {"epochs": 10, "lr": 0.003, "train_batch_size": 16, "memory": 16}),
        ("engine", {"epochs": 3, "noise": 0.5, "train_batch_size": 8}),
        ("clip_gda", {"space": "joint", "text_prior": 4, "weight": "first_task", "published": True}),
        ("fecam", {"shrinkage": [10, 10], "tuner": "vpt_deep", "epochs": 3, "lr": 0.1, "covariance_rank": 3}),
        ("ease", {"epochs": 3, "lr": 0.1, "bottleneck": 8}),
    ]
)
def test_common_checks_of_variants(case, check):
    check(case)


# --- each check can fail --------------------------------------------------------------------------------------------


class Good(NCMLearner):
    """A nearest class mean for the broken ones below to break."""

    paper = "test"


class NoDocstring(Good):
    __doc__ = None


class AcceptsAnything(Good):
    """Takes unknown keys."""

    class Config(LearnerConfig):
        model_config = ConfigDict(extra="allow")
        metric: str = "cosine"


class Irreproducible(Good):
    """Draws from a generator nobody seeded."""

    def learn(self, task, ctx):
        super().learn(task, ctx)
        generator = torch.Generator()
        generator.seed()
        self.classifier.sums += torch.rand(self.classifier.sums.shape, generator=generator)


class ForgetsOnResume(Good):
    """Keeps what it needs in a plain attribute."""

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.hidden = NCM(backbone.feature_dim)
        del self._modules["hidden"]
        object.__setattr__(self, "hidden", NCM(backbone.feature_dim))

    def learn(self, task, ctx):
        self.hidden.partial_fit(*ctx.features(self, task.train))

    def logits(self, features):
        self.hidden.grow(self.seen)
        return self.hidden.logits(features).nan_to_num(neginf=-9.0)


class BatchNormalised(Good):
    """Centres every test batch."""

    def views(self):
        return {"centred": lambda images: self.backbone(images) - self.backbone(images).mean(0)}


class LearnsAtTest(Good):
    """Adapts while predicting."""

    def logits(self, features):
        with torch.inference_mode(False):
            self.classifier.sums[0] += features.sum(0).double().clone()
        return super().logits(features)


class OneColumnTooMany(Good):
    """Knows of a class nobody has shown it."""

    def logits(self, features):
        scores = super().logits(features)
        return torch.cat([scores, scores[:, :1] - 1], dim=1)


class EditsBackbone(Good):
    """Trains the shared weights in place."""

    def learn(self, task, ctx):
        super().learn(task, ctx)
        with torch.no_grad():
            self.backbone.model.norm.bias[0] += 1e-3


class GlobalNoise(Good):
    """Draws from the global generator."""

    def learn(self, task, ctx):
        super().learn(task, ctx)
        torch.rand(1)


class ReadsNames(Good):
    """Lets a class's name decide."""

    def learn(self, task, ctx):
        super().learn(task, ctx)
        for c, name in enumerate(task.names):
            if name < "d":
                self.classifier.sums[c] *= -1


class KeepsOptimizer(Good):
    """Keeps an optimiser between tasks."""

    def learn(self, task, ctx):
        super().learn(task, ctx)
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)


class SilentlyMoves(Good):
    """Changes its features under the same version."""

    def views(self):
        return {FROZEN: lambda images: self.backbone(images) * (1 + self.seen)}


class CriesWolf(Good):
    """Changes the version of its view, whose features stay the same."""

    def views(self):
        return {self.seen: self.backbone}


class StaleView(Good):
    """Has a second view that changes without a new version."""

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.classifier = NCM(2 * backbone.feature_dim)

    def views(self):
        return {FROZEN: self.backbone, "moving": lambda images: self.backbone(images) * (1 + self.seen)}


class HoardsImages(Good):
    """Keeps training images in a buffer without declaring it."""

    def learn(self, task, ctx):
        super().learn(task, ctx)
        self.register_buffer("kept", next(task.train.batches(2))[0])


class HoardsTasks(Good):
    """Goes back to old tasks."""

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.old = []

    def learn(self, task, ctx):
        self.old.append(task.train)
        for data in self.old:
            self.classifier.partial_fit(*ctx.features(self, data))


class Peeks(Good):
    """Finds the test split through the garbage collector."""

    def learn(self, task, ctx):
        import gc

        from cil.stream import TestData

        super().learn(task, ctx)
        for found in [o for o in gc.get_objects() if isinstance(o, TestData)]:
            try:
                found.labels
            except ValueError:
                continue


class Overflows(Good):
    """Breaks in half precision."""

    def views(self):
        return {
            "overflowing": lambda images: self.backbone(images) * (torch.inf if torch.is_autocast_enabled("cpu") else 1)
        }


class TrainsNothing(Good):
    """Gives an optimiser a parameter that its loss does not use."""

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.used, self.unused = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))

    def learn(self, task, ctx):
        super().learn(task, ctx)
        optimizer = torch.optim.SGD([self.used, self.unused], 0.1)
        self.used.square().sum().backward()
        optimizer.step()


class Guesses(Good):
    """Always answers the last class."""

    def logits(self, features):
        scores = torch.zeros(len(features), self.seen)
        scores[:, -1] = 1
        return scores


BROKEN = {
    "config": AcceptsAnything,
    "same_seed_same_result": Irreproducible,
    "resume": ForgetsOnResume,
    "batch_independence": BatchNormalised,
    "predicting_changes_nothing": LearnsAtTest,
    "columns": OneColumnTooMany,
    "backbone_untouched": EditsBackbone,
    "global_randomness_untouched": GlobalNoise,
    "names_do_not_matter": ReadsNames,
    "leaves_no_trace": KeepsOptimizer,
    "state_round_trip": ForgetsOnResume,
    "view_versions": SilentlyMoves,
    "views": StaleView,
    "old_images_are_gone": HoardsImages,
    "test_data_unreachable": Peeks,
    "bfloat16": Overflows,
    "trains_all_it_should": TrainsNothing,
    "learns": Guesses,
    "documented": NoDocstring,
}


def test_every_check_has_a_learner_that_breaks_it():
    assert BROKEN.keys() == CHECKS.keys()


@pytest.mark.parametrize("name", BROKEN)
def test_the_check_catches_it(name):
    cls = BROKEN[name]
    with pytest.raises((AssertionError, CilError), match=r"\w+"):
        if cls is EditsBackbone:
            _with_weights_restored(lambda: CHECKS[name](Case(cls)))
        else:
            CHECKS[name](Case(cls))


def test_what_is_not_trained_is_named():
    with pytest.raises(AssertionError, match="stage 0: no step of an optimiser had a gradient of unused;"):
        CHECKS["trains_all_it_should"](Case(TrainsNothing))


def _with_weights_restored(run):
    model = backbone().model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        run()
    finally:
        model.load_state_dict(before)


@pytest.mark.parametrize(("name", "cls"), [("view_versions", CriesWolf), ("old_images_are_gone", HoardsTasks)])
def test_the_check_catches_the_other_way_too(name, cls):
    with pytest.raises(AssertionError):
        CHECKS[name](Case(cls))


def test_the_good_one_passes_everything():
    results = list(check_learner(Good))
    assert [r.name for r in results] == list(CHECKS)
    assert [r.message for r in results if not r.passed] == []


def test_known_failures_are_strict():
    with pytest.raises(ValueError, match="known failures name no check"):
        parametrize_learner([("ncm", {}, {"no_such_check": "because"})])
    marked = parametrize_learner([(BatchNormalised, {}, {"batch_independence": "centres batches"})])
    marks = {p.id.split("-")[-1]: p.marks for p in marked.args[1]}
    assert marks["batch_independence"][0].kwargs["strict"] is True and not marks["columns"]


def test_a_learner_states_its_features_in_views_only():
    """Either name of the earlier contract would be ignored silently; the error says what to write instead."""
    with pytest.raises(PluginError, match=r"Old .*defines features, but .* override views\(\) instead"):
        type("Old", (Good,), {"features": lambda self, images: images})
    with pytest.raises(PluginError, match=r"Older .*defines feature_version"):
        type("Older", (Good,), {"feature_version": property(lambda self: self.stages)})
    mixin = type("Mixin", (), {"features": lambda self, images: images, "feature_version": 1})
    with pytest.raises(PluginError, match="features and feature_version"):
        type("Mixed", (mixin, Good), {})


def test_features_are_all_views_side_by_side():
    vit = backbone()
    learner, images = StaleView(StaleView.Config(), vit).eval(), probe_images()
    with torch.inference_mode():
        assert torch.equal(learner.features(images), torch.cat([vit(images), vit(images) * (1 + learner.seen)], dim=1))


# --- each method against an oracle ---------------------------------------------------------------------------------


class Moving(NCMLearner):
    """A learner whose view changes when a test sets another version."""

    version: int | str = FROZEN

    def views(self):
        return {self.version: self.backbone}


def test_learner_and_backbone_ask_one_cache_without_emptying_it():
    """A view that moves on is dropped, and it alone; the frozen one, whoever asks, is computed once."""
    vit = backbone()
    learner, data = Moving(NCMLearner.Config(), vit).eval(), stream(vit).tasks[0].train
    ctx = context()
    frozen, labels = ctx.features(vit, data)
    assert vit.passes == len(data) and torch.equal(labels, torch.from_numpy(data.labels))
    assert torch.equal(ctx.features(learner, data)[0], frozen) and vit.passes == len(data)
    for learner.version, passes in ((1, 2), (2, 3), (1, 4)):  # what the learner moved on from is dropped
        ctx.features(learner, data)
        ctx.features(learner, data)
        assert vit.passes == passes * len(data)
    ctx.features(vit, data)  # so is the frozen one, which the learner had seen through first
    ctx.features(learner, data)
    ctx.features(vit, data)
    assert vit.passes == 5 * len(data)


def test_ncm_is_the_nearest_class_mean_of_frozen_features():
    vit = backbone()
    done = Case(NCMLearner, {"metric": "euclidean"}).run(vit=vit)
    tasks = stream(vit)
    with torch.inference_mode():
        parts = [next(t.train.batches(999)) for t in tasks.tasks]
        features = torch.cat([vit(images) for images, _ in parts]).numpy()
        labels = torch.cat([labels for _, labels in parts]).numpy()
        expected = NearestCentroid().fit(features, labels).predict(vit(probe_images()).numpy())
    np.testing.assert_array_equal(done.learner.predict(probe_images()).numpy(), expected)


def test_ncm_does_not_depend_on_the_task_split():
    whole = _last_predictions((8,))
    for sizes in ((1,) * 8, (3, 5), (4, 1, 3)):
        np.testing.assert_array_equal(_last_predictions(sizes), whole)


def _last_predictions(sizes):
    from cil.runner import run_stages

    vit = backbone()
    learner = NCMLearner(NCMLearner.Config(), vit)
    run_stages(learner, stream(vit, sizes=sizes), accelerator=accelerator(), batch_size=16)
    return learner.predict(probe_images()).numpy()


def test_linear_probe_is_torchs_own_softmax_regression():
    """One full-batch step of plain SGD from a known head, worked with autograd on the features."""
    vit = backbone()
    case = Case(
        *_probe(epochs=1, train_batch_size=1000, lr=0.5, momentum=0.0, schedule="constant"),
    )
    learner, task = case.learner(vit), stream(vit).tasks[0]
    from cil.testing.setting import context

    ctx = context()
    learner.begin(task, ctx)
    weight, bias = (p.detach().clone().requires_grad_() for p in (learner.head.weight, learner.head.bias))
    with torch.inference_mode():
        features = vit(next(task.train.batches(999))[0])
    labels = torch.from_numpy(task.train.labels)
    F.cross_entropy(features.clone() @ weight.T + bias, labels).backward()
    learner.learn(task, ctx)
    torch.testing.assert_close(learner.head.weight, weight.detach() - 0.5 * weight.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(learner.head.bias, bias.detach() - 0.5 * bias.grad, atol=1e-6, rtol=1e-5)


def _probe(**parameters):
    from cil.learners.linear_probe import LinearProbe

    return LinearProbe, parameters


def test_local_loss_leaves_old_rows_alone():
    from cil.testing.setting import context

    vit = backbone()
    learner, tasks = Case(*_probe(loss="local")).learner(vit), stream(vit)
    for task in tasks.tasks[:2]:
        ctx = context(task.index)
        learner.begin(task, ctx)
        before = learner.head.weight.detach().clone()
        learner.learn(task, ctx)
        task.close()
    assert torch.equal(learner.head.weight[:4], before[:4])


def test_finetune_forgets_and_joint_and_ncm_do_not():
    from cil import results
    from cil.learners.finetune import Finetune
    from cil.learners.joint import Joint

    forgotten = {}
    for cls in (Finetune, Joint, NCMLearner):
        r, _, _ = results.matrices(Case(cls, {"epochs": 8} if cls is Joint else {}).finished.rows)
        forgotten[cls] = r[0, 0] - r[-1, 0]  # of the second task's single image, the last bits decide
    assert forgotten[Finetune] > 0.6
    assert forgotten[Joint] < 0.2 and forgotten[NCMLearner] < 0.2


def test_joint_sees_all_images_so_far_and_starts_from_the_pretrained_weights():
    from cil.learners.joint import Joint

    done = Case(Joint, {"epochs": 1}).finished
    images = np.bincount(draw_images("train")[1], minlength=8)
    assert [row["costs"]["train_passes"] for row in done.rows] == [images[:4].sum(), images[:5].sum(), images.sum()]
    assert done.rows[-1]["costs"]["exemplar_bytes"] == images.sum() * 3 * 32 * 32


def test_abstract_learner_cannot_be_built(backbone):
    with pytest.raises(TypeError, match="abstract"):
        Learner(LearnerConfig(), backbone)
