"""The checks, one function each. The message of a failure says what is wrong and how to repair it."""

from __future__ import annotations

import inspect
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from cil.errors import CilError, TrainingError
from cil.learner import Learner
from cil.runner.checkpoint import RunFolder
from cil.testing.isolation import (
    check_backbone_untouched,
    check_global_randomness_untouched,
    check_leaves_no_trace,
    check_old_images_are_gone,
    check_test_data_unreachable,
)
from cil.testing.setting import NAMES, SIZES, Case, Finished, context, probe_images, require

Check = Callable[[Case], None]
TOLERANCE = 1e-4
"""Largest accepted difference, relative to their range, of scores that differ only by the order of float32 sums."""


def check_config(case: Case) -> None:
    """The default config is valid, unknown keys are refused, and a round trip through JSON values changes nothing."""
    case.cls.Config()
    try:
        case.cls.Config.model_validate({"no_such_key": 1})
    except ValidationError:
        pass
    else:
        raise AssertionError("Config accepts an unknown key; derive it from cil.LearnerConfig, which forbids extras")
    reread = case.cls.Config.model_validate(case.config.model_dump(mode="json"))
    require(reread == case.config, f"Config changes on a round trip through JSON values: {case.config} became {reread}")


def check_same_seed_same_result(case: Case) -> None:
    """Two runs with the same seed give the same matrix and bit-identical states.

    A run with other class names, which another check needs too, is a second run if it ends the same, bit for bit.
    """
    one = case.finished
    if not _reads_names(case) and _alike(one, case.renamed):
        return
    two = case.run()
    require(
        one.counts() == two.counts(),
        f"same seed, different matrices: {one.counts()} and {two.counts()}; draw from ctx.generator",
    )
    _same_state(one.state(), two.state(), "two runs with the same seed")


def check_resume(case: Case) -> None:
    """A run that is interrupted after any stage and resumed has the same matrix and state as an uninterrupted one.

    The run with other class names was interrupted before the last stage; if it ends alike, that need not be repeated.
    """
    full = case.finished
    shown = not _reads_names(case) and _alike(full, case.renamed)
    for stop in range(1, len(SIZES) - shown):
        with tempfile.TemporaryDirectory() as place:
            resumed = case.run(folder=Path(shutil.copytree(case.folder(stop), place, dirs_exist_ok=True)))
        require(
            resumed.counts() == full.counts(),
            f"interrupted after stage {stop} the matrix differs; the state that a stage needs of earlier ones "
            "must be parameters, buffers or extra state",
        )
        _same_state(resumed.state(), full.state(), f"the run resumed after stage {stop}")


def check_batch_independence(case: Case) -> None:
    """An image's scores are the same alone, in batches of any size or order, and with copies of another image."""
    learner = case.finished.learner
    images = probe_images()
    with torch.inference_mode():
        whole = _scores(learner, images)
        scale = whole.abs().max().clamp(min=1e-6)
        order = torch.from_numpy(np.random.RandomState(3).permutation(len(images)))
        arrangements = {
            "alone": torch.cat([_scores(learner, image[None]) for image in images]),
            "in batches of 7": torch.cat([_scores(learner, part) for part in images.split(7)]),
            "shuffled": _scores(learner, images[order])[order.argsort()],
            "beside copies of one image": torch.cat(
                [_scores(learner, torch.cat([image[None], images[:1].expand(5, -1, -1, -1)]))[:1] for image in images]
            ),
        }
    for arrangement, scores in arrangements.items():
        off = (scores - whole).abs().max() / scale
        require(
            bool(off < TOLERANCE),
            f"scores depend on the rest of the batch: {arrangement} they differ by {off:.1e} of their range",
        )


def check_predicting_changes_nothing(case: Case) -> None:
    """Predicting does not change the state."""
    done = case.finished
    before = done.state()
    done.learner.predict(probe_images())
    _same_state(done.state(), before, "the learner after predicting")


def check_columns(case: Case) -> None:
    """After every stage, logits have one column per class seen, and are finite."""
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


def check_names_do_not_matter(case: Case) -> None:
    """Other class names do not change the results; for a learner that reads names, other names of later classes
    do not."""
    if _reads_names(case):
        for stop in range(1, len(SIZES)):
            seen = sum(SIZES[:stop])
            renamed = case.run(names=(*NAMES[:seen], *reversed(NAMES[seen:])), stop_after=stop)
            done = case.after(stop)
            require(renamed.counts() == done.counts(), f"names of classes after stage {stop - 1} change its results")
            _same_state(renamed.state(), done.state(), f"stage {stop - 1} with other names of later classes")
        return
    if case.renamed.counts() != case.finished.counts():  # because of the names, or of the interruption
        renamed = case.run(names=tuple(reversed(NAMES)))
        require(renamed.counts() == case.finished.counts(), "other class names give other results")


def check_state_round_trip(case: Case) -> None:
    """A learner saved as safetensors and JSON and loaded into a new one gives bit-identical scores."""
    done, reloaded = case.finished, case.learner()
    try:
        RunFolder(case.folder(len(SIZES))).load_learner(reloaded, done.stream.tasks, context)
    except CilError as error:
        raise AssertionError(f"the saved state does not load into a new learner: {error}") from None
    reloaded.eval()
    with torch.inference_mode():
        same = torch.equal(_scores(reloaded, probe_images()), _scores(done.learner, probe_images()))
    require(
        same, "a reloaded learner gives other scores; all state of logits() must be parameters, buffers or extra state"
    )


def check_view_versions(case: Case) -> None:
    """The versions of ``views`` change from one stage to the next exactly when the features do.

    They may also change in a stage of one class, where a loss over the task's own classes is 0 and trains nothing.
    """
    learners = [case.learner().eval()] + [case.after(n).learner for n in range(1, len(SIZES) + 1)]
    images = probe_images()
    with torch.inference_mode():
        features = [learner.features(images) for learner in learners]
    for stage in range(1, len(learners)):
        old, new = features[stage - 1], features[stage]
        moved = old.shape != new.shape or not torch.equal(old, new)
        before, after = (list(learners[i].views()) for i in (stage - 1, stage))
        idle = stage > 0 and SIZES[stage - 1] == 1 and not moved
        require(
            moved == (before != after) or idle,
            f"after stage {stage - 1} the features {'changed' if moved else 'did not change'} but the versions of "
            f"views() {'did not' if before == after else 'did'}: {before} → {after}; give a view a new version exactly "
            "when its features change",
        )


def check_views(case: Case) -> None:
    """A view that keeps its version keeps its features."""
    images = probe_images()
    before: dict[Any, Tensor] = {}
    for stop in range(len(SIZES) + 1):
        learner = case.after(stop).learner if stop else case.learner().eval()
        with torch.inference_mode():
            views = {version: view(images) for version, view in learner.views().items()}
        stale = [v for v in views.keys() & before.keys() if not torch.equal(views[v], before[v])]
        require(not stale, f"after {stop} stages the features of the view {stale} changed, but its version did not")
        before = views


def check_bfloat16(case: Case) -> None:
    """Under bf16 autocast, features are close to those in float32 and scores are finite."""
    learner = case.finished.learner
    images = probe_images()
    with torch.inference_mode():
        exact = learner.features(images).float()
        with torch.autocast("cpu", torch.bfloat16):
            rough = learner.features(images).float()
            scores = learner.logits(rough).float()
    closeness = nn.functional.cosine_similarity(exact, rough, dim=1).min()
    require(bool(closeness > 0.98), f"under bf16 features differ too much from float32 (cosine {closeness:.3f})")
    require(bool(torch.isfinite(scores).all()), "under bf16 some logits are not finite")


def check_learns(case: Case) -> None:
    """On easy images the first task is learned clearly better than chance, and the last one better than chance."""
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
        "the learner trains too little on a dozen images per class, pass hyper-parameters to the check that train more",
    )


def check_trains_all_it_should(case: Case) -> None:
    """Every tensor that an optimiser is given in the first task has a gradient in at least one step."""
    try:
        case.after(1)
    except TrainingError as error:
        raise AssertionError(str(error)) from None


def check_documented(case: Case) -> None:
    """The class has a docstring, names its source, and describes its own hyper-parameters."""
    require(bool((case.cls.__doc__ or "").strip()), "the class has no docstring")
    require(bool(case.cls.paper), "the class does not name the source of the method (paper = …)")
    own = inspect.get_annotations(case.cls.Config)
    bare = [name for name in own if not case.cls.Config.model_fields[name].description]
    require(not bare, f"Config fields without a description: {', '.join(bare)}")


CHECKS: dict[str, Check] = {
    function.__name__.removeprefix("check_"): function
    for function in (
        check_config,
        check_same_seed_same_result,
        check_resume,
        check_batch_independence,
        check_predicting_changes_nothing,
        check_columns,
        check_backbone_untouched,
        check_global_randomness_untouched,
        check_names_do_not_matter,
        check_leaves_no_trace,
        check_state_round_trip,
        check_view_versions,
        check_views,
        check_old_images_are_gone,
        check_test_data_unreachable,
        check_bfloat16,
        check_trains_all_it_should,
        check_learns,
        check_documented,
    )
}
"""Name → check, in the order in which they run."""


def _scores(learner: Learner, images: Tensor) -> Tensor:
    return learner.logits(learner.features(images).float()).float()


def _reads_names(case: Case) -> bool:
    return case.cls.reads_names or case.cls.uses_texts(case.config)


def _alike(one: Finished, two: Finished) -> bool:
    a, b = one.state(), two.state()
    return one.counts() == two.counts() and a.keys() == b.keys() and not _differing(a, b)


def _differing(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    return [k for k in one if one[k].shape != two[k].shape or not torch.equal(one[k], two[k])]


def _same_state(one: dict[str, Tensor], two: dict[str, Tensor], what: str) -> None:
    require(one.keys() == two.keys(), f"{what}: state entries differ: {sorted(one.keys() ^ two.keys())[:3]}")
    off = _differing(one, two)
    require(not off, f"{what}: {', '.join(off[:3])} differ")
