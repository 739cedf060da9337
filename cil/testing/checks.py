"""The checks, one function each. Every one says in its failure what broke and what to do about it."""

from __future__ import annotations

import inspect
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from cil.checkpoint import RunFolder
from cil.errors import CilError, StreamError
from cil.learner import Learner
from cil.stream import TaskData
from cil.testing.setting import NAMES, PIXELS, SIZES, Case, backbone, context, probe_images, stream

Check = Callable[[Case], None]
TOLERANCE = 1e-4
"""Largest accepted difference, relative to their range, of scores equal but for the order of float32 sums."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def check_config(case: Case) -> None:
    """Defaults build, unknown keys are refused, and the config survives a round trip through plain values."""
    case.cls.Config()
    try:
        case.cls.Config.model_validate({"no_such_key": 1})
    except ValidationError:
        pass
    else:
        raise AssertionError("Config accepts an unknown key; derive it from cil.LearnerConfig, which forbids extras")
    again = case.cls.Config.model_validate(case.config.model_dump(mode="json"))
    require(again == case.config, f"Config changes on a round trip through JSON values: {case.config} became {again}")


def check_same_seed_same_result(case: Case) -> None:
    """Two runs with one seed give the same matrix and the same state, to the bit."""
    one, two = case.finished, case.run()
    require(
        one.counts() == two.counts(),
        f"same seed, different matrices: {one.counts()} and {two.counts()}; draw from ctx.generator",
    )
    _same_state(one.state(), two.state(), "two runs with the same seed")


def check_resume(case: Case) -> None:
    """Interrupted after any stage and resumed, a run ends with the same matrix and state as if it had never stopped."""
    full = case.finished
    for stop in range(1, len(SIZES)):
        with tempfile.TemporaryDirectory() as place:
            case.run(folder=Path(place), stop_after=stop)
            resumed = case.run(folder=Path(place))
        require(
            resumed.counts() == full.counts(),
            f"interrupted after stage {stop} the matrix differs; what a stage needs of earlier ones must be a "
            "parameter, a buffer or extra state",
        )
        _same_state(resumed.state(), full.state(), f"the run resumed after stage {stop}")


def check_batch_independence(case: Case) -> None:
    """An image's scores are the same alone, in batches of any size or order, and beside copies of itself."""
    learner = case.finished.learner
    images = probe_images()
    with torch.inference_mode():
        whole = _scores(learner, images)
        scale = whole.abs().max().clamp(min=1e-6)
        order = torch.from_numpy(np.random.RandomState(3).permutation(len(images)))
        ways = {
            "alone": torch.cat([_scores(learner, image[None]) for image in images]),
            "in batches of 7": torch.cat([_scores(learner, part) for part in images.split(7)]),
            "shuffled": _scores(learner, images[order])[order.argsort()],
            "beside copies of one image": torch.cat(
                [_scores(learner, torch.cat([image[None], images[:1].expand(5, -1, -1, -1)]))[:1] for image in images]
            ),
        }
    for way, scores in ways.items():
        off = (scores - whole).abs().max() / scale
        require(
            bool(off < TOLERANCE),
            f"scores depend on the rest of the batch: {way} they differ by {off:.1e} of their range",
        )


def check_predicting_changes_nothing(case: Case) -> None:
    """Predicting leaves the state as it was."""
    done = case.finished
    before = done.state()
    done.learner.predict(probe_images())
    _same_state(done.state(), before, "the learner after predicting")


def check_columns(case: Case) -> None:
    """After every stage: one column a seen class, finite scores, no prediction of a class not seen."""
    for stop in range(1, len(SIZES) + 1):
        done = case.after(stop)
        seen = len(done.stream.tasks[stop - 1].seen)
        with torch.inference_mode():
            scores = _scores(done.learner, probe_images())
        require(
            tuple(scores.shape) == (len(probe_images()), seen),
            f"after stage {stop - 1}, with {seen} classes seen, logits have shape {tuple(scores.shape)}",
        )
        require(bool(torch.isfinite(scores).all()), f"after stage {stop - 1} some logits are not finite")


def check_backbone_untouched(case: Case) -> None:
    """The shared backbone is bit-identical after the stream, frozen and in eval mode; train copies instead."""
    vit = backbone()
    before = {k: v.clone() for k, v in vit.model.state_dict().items()}
    case.run(vit=vit)
    after = vit.model.state_dict()
    require(
        before.keys() == after.keys(), "the backbone's modules changed; ride along as a Tuner instead of editing it"
    )
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    require(
        not changed, f"the backbone's weights changed ({', '.join(changed[:3])}); train copies, e.g. with WeightTuner"
    )
    require(not any(p.requires_grad for p in vit.parameters()), "backbone weights were left with requires_grad=True")
    require(not any(m.training for m in vit.model.modules()), "the backbone was left in training mode")


def check_global_randomness_untouched(case: Case) -> None:
    """Learning and predicting leave Python's, numpy's and torch's global random states alone."""
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    done = case.run()
    done.learner.predict(probe_images())
    touched = [
        name
        for name, same in (
            ("Python's random", random.getstate() == states[0]),
            ("numpy's", np.random.get_state()[1].tolist() == states[1]),  # type: ignore[index]
            ("torch's", torch.equal(torch.get_rng_state(), states[2])),
        )
        if not same
    ]
    require(not touched, f"{' and '.join(touched)} global random state was used or set; draw from ctx.generator")


def check_names_do_not_matter(case: Case) -> None:
    """Other class names change no number."""
    renamed = case.run(names=tuple(reversed(NAMES)))
    require(renamed.counts() == case.finished.counts(), "other class names give other results")


def check_leaves_no_trace(case: Case) -> None:
    """After learning: nothing holds a gradient, and no optimiser is kept."""
    learner = case.finished.learner
    holding = [name for name, p in learner.named_parameters() if p.grad is not None]
    require(not holding, f"gradients were left on {', '.join(holding[:3])}")
    kept = [k for k, v in vars(learner).items() if isinstance(v, torch.optim.Optimizer)]
    require(not kept, f"an optimiser is kept in {', '.join(kept)}; make one per stage")


def check_state_round_trip(case: Case) -> None:
    """Saved as safetensors and JSON and loaded into a fresh learner, it gives the same scores, to the bit."""
    with tempfile.TemporaryDirectory() as place:
        done = case.run(folder=Path(place))
        fresh = case.learner()
        try:
            RunFolder(Path(place)).load_learner(fresh, done.stream.tasks, context)
        except CilError as error:
            raise AssertionError(f"the saved state does not load into a fresh learner: {error}") from None
    fresh.eval()
    with torch.inference_mode():
        same = torch.equal(_scores(fresh, probe_images()), _scores(done.learner, probe_images()))
    require(
        same, "a reloaded learner gives other scores; what logits need must be a parameter, a buffer or extra state"
    )


def check_feature_version(case: Case) -> None:
    """``feature_version`` changes from one stage to the next exactly when the features do.

    A stage of one class may change it for nothing: there a loss over the task's own classes is 0 and teaches nothing.
    """
    learners = [case.learner().eval()] + [case.after(n).learner for n in range(1, len(SIZES) + 1)]
    images = probe_images()
    with torch.inference_mode():
        features = [learner.features(images) for learner in learners]
    for stage in range(1, len(learners)):
        old, new = features[stage - 1], features[stage]
        moved = old.shape != new.shape or not torch.equal(old, new)
        changed = learners[stage].feature_version != learners[stage - 1].feature_version
        idle = stage > 0 and SIZES[stage - 1] == 1 and not moved
        require(
            moved == changed or idle,
            f"after stage {stage - 1} the features {'changed' if moved else 'did not change'} but feature_version "
            f"{'did' if changed else 'did not'}: {learners[stage - 1].feature_version!r} → "
            f"{learners[stage].feature_version!r}",
        )


def check_views(case: Case) -> None:
    """``features`` is its ``views`` side by side, and a view that keeps its version keeps its output."""
    images = probe_images()
    before: dict[Any, Tensor] = {}
    for stop in range(len(SIZES) + 1):
        learner = case.after(stop).learner if stop else case.learner().eval()
        with torch.inference_mode():
            views = {version: view(images) for version, view in learner.views().items()}
            whole = learner.features(images)
        joined = torch.cat(list(views.values()), dim=1)
        require(
            joined.shape == whole.shape and torch.equal(joined, whole),
            f"after {stop} stages features() is not what views() puts side by side",
        )
        stale = [v for v in views.keys() & before.keys() if not torch.equal(views[v], before[v])]
        require(not stale, f"after {stop} stages the view {stale} answers otherwise under the version it had before")
        before = views


def check_old_images_are_gone(case: Case) -> None:
    """A learner that does not declare ``stores_images`` keeps no image and no open way back to old ones."""
    if case.cls.stores_images:
        return
    try:
        done = case.finished
    except StreamError as error:
        raise AssertionError(f"reaches for old images ({error})") from None
    found = list(_images_in(done.learner))
    require(
        not found,
        f"keeps images or image batches in {', '.join(found[:3])}; declare stores_images = True if that is the method",
    )


def check_test_data_unreachable(case: Case) -> None:
    """Nothing a learner is handed leads to the test split or to later tasks."""
    vit = backbone()
    learner, tasks = case.learner(vit), stream(vit)
    task = tasks.tasks[0]
    require(len(task.seen) == SIZES[0], "the first task knows of later classes")
    reached: list[str] = []
    original = type(tasks._test)._check

    def caught(self: Any) -> None:
        reached.append("test")
        original(self)

    type(tasks._test)._check = caught  # type: ignore[method-assign]
    try:
        learner.begin(task, context())
        learner.learn(task, context())
    except StreamError as error:
        raise AssertionError(f"the learner reaches for closed data while learning: {error}") from None
    finally:
        type(tasks._test)._check = original  # type: ignore[method-assign]
    require(not reached, "the learner read the test split while learning")


def check_bfloat16(case: Case) -> None:
    """Under bf16 autocast features stay close and scores finite."""
    learner = case.finished.learner
    images = probe_images()
    with torch.inference_mode():
        exact = learner.features(images).float()
        with torch.autocast("cpu", torch.bfloat16):
            rough = learner.features(images).float()
            scores = learner.logits(rough).float()
    closeness = nn.functional.cosine_similarity(exact, rough, dim=1).min()
    require(bool(closeness > 0.98), f"under bf16 a feature turns away from its float32 value (cosine {closeness:.3f})")
    require(bool(torch.isfinite(scores).all()), "under bf16 some logits are not finite")


def check_learns(case: Case) -> None:
    """On easy images the newest task is learned: far better than chance among all classes seen."""
    rows = case.finished.rows
    hits = rows[0]["correct"][0] / rows[0]["total"][0]
    require(
        hits > 2 / SIZES[0],
        f"the first task of {SIZES[0]} easy classes ends at {100 * hits:.0f} % (chance {100 / SIZES[0]:.0f} %)",
    )
    last = rows[-1]["correct_within_task"][-1] / rows[-1]["total"][-1]
    require(
        last > 1 / SIZES[-1],
        f"the last task of {SIZES[-1]} easy classes is at chance even with the task given; if "
        "it only trains too little on a dozen images a class, give the check hyper-parameters that train more",
    )


def check_documented(case: Case) -> None:
    """The class has a docstring, names its source, and describes hyper-parameters of its own."""
    require(bool((case.cls.__doc__ or "").strip()), "the class has no docstring")
    require(bool(case.cls.paper), "the class does not say where the method comes from (paper = …)")
    own = inspect.get_annotations(case.cls.Config)
    bare = [name for name in own if not case.cls.Config.model_fields[name].description]
    require(not bare, f"Config fields without a description: {', '.join(bare)}")


CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): function for name, function in list(globals().items()) if name.startswith("check_")
}


def _scores(learner: Learner, images: Tensor) -> Tensor:
    return learner.logits(learner.features(images).float()).float()


def _same_state(one: dict[str, Tensor], two: dict[str, Tensor], what: str) -> None:
    require(one.keys() == two.keys(), f"{what}: state entries differ: {sorted(one.keys() ^ two.keys())[:3]}")
    off = [k for k in one if one[k].shape != two[k].shape or not torch.equal(one[k], two[k])]
    require(not off, f"{what}: {', '.join(off[:3])} differ")


def _images_in(value: Any, path: str = "learner", depth: int = 0) -> Any:
    """Paths of tensors and arrays shaped like images, and of open task data, below a learner."""
    if isinstance(value, (Tensor, np.ndarray)):
        shape = tuple(value.shape)
        if value.ndim >= 3 and (shape[-3:] == (3, PIXELS, PIXELS) or shape[-3:] == (PIXELS, PIXELS, 3)):
            yield path
    elif isinstance(value, TaskData):
        if not value._closed:
            yield path
    elif depth < 6:
        if isinstance(value, nn.Module):
            items: Any = [*value._parameters.items(), *value._buffers.items(), *value._modules.items()]
            items += [
                (k, v) for k, v in vars(value).items() if not k.startswith("_") and k not in ("backbone", "config")
            ]
        elif isinstance(value, dict):
            items = value.items()
        elif isinstance(value, (list, tuple, set)):
            items = enumerate(value)
        else:
            return
        for key, inner in items:
            yield from _images_in(inner, f"{path}.{key}", depth + 1)
