"""The classifier that a backbone comes with: kept beside unchanged features, and used by Co-Tuning and by LEEP."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from test_cli import cil, write  # noqa: F401 (a fixture)
from torch import nn

from cil.backbone import EMBEDDED, load_backbone, source_head
from cil.config import BackboneConfig, Config
from cil.errors import BackboneError, RunError
from cil.export import export, load
from cil.learners.bases.co_tuning import CoTuning, relation
from cil.learners.finetune import Finetune
from cil.prediction import open_run
from cil.runner import run
from cil.runner.stages import learn_task
from cil.selection.transferability import leep
from cil.testing import Case
from cil.testing.setting import backbone, context, stream

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
STEPS = {"optimizer": "sgd", "lr": 0.02, "warmup": 0, "epochs": 2, "train_batch_size": 8, "loss": "local"}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small ViT with seven classes of its own, and the file of its weights."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **SMALL).eval()
    nn.init.normal_(model.head.weight)
    place = tmp_path_factory.mktemp("weights") / "own.safetensors"
    save_file(model.state_dict(), place)
    return model, place


def section(place, **changes):
    return {"name": "vit_tiny_patch16_224", "weights": str(place), "options": SMALL, **changes}


def headed(place):
    return section(place, source_head=True, options={**SMALL, "num_classes": 7})


def test_features_are_those_without_it_and_its_scores_are_timms(file):
    model, place = file
    plain, kept = (load_backbone(BackboneConfig(**made(place))) for made in (section, headed))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(plain(images), kept(images))
        torch.testing.assert_close(source_head(kept)(kept(images)), model(images))
    assert plain.fingerprint == kept.fingerprint and plain.facts == {} and kept.facts["source_head"]["classes"] == 7
    assert (
        not any("head" in name for name in kept.state_dict()) and plain.state_dict().keys() == kept.state_dict().keys()
    )


def test_weights_without_a_classifier_are_refused_by_name(file, tmp_path):
    model, place = file
    bare = tmp_path / "bare.safetensors"
    save_file({k: v for k, v in model.state_dict().items() if not k.startswith("head.")}, bare)
    for config, message in (
        ({**headed(place), "weights": str(bare)}, f"backbone.source_head: {bare} holds no classifier"),
        ({"name": EMBEDDED, "source_head": True}, "holds no classifier; use weights that come with one"),
        (headed(place) | {"options": SMALL}, r"head.weight is \(7, 48\), expected \(1000, 48\)"),
        (headed(place) | {"options": {**SMALL, "num_classes": 0}, "weights": "random"}, "has no classifier of its own"),
        (
            {"name": "deit_tiny_distilled_patch16_224", "weights": "random", "options": SMALL},
            "no linear layer but tuple",
        ),
        ({"name": "open_clip/ViT-B-16.laion400m_e32"}, "has texts in place of a classifier"),
        (
            section(place, options={**SMALL, "num_classes": 7}, source_head=False),
            "the classifier belongs to the learner",
        ),
    ):
        with pytest.raises(BackboneError, match=message) as caught:
            load_backbone(BackboneConfig(**{"source_head": True, **config}))
        assert "\n" not in str(caught.value)
    with pytest.raises(BackboneError, match=r"set backbone.source_head: true"):
        source_head(load_backbone(BackboneConfig(**section(place))))


def test_leep_is_its_definition_sample_by_sample():
    rng = np.random.RandomState(0)
    p, y = rng.dirichlet(np.ones(4), size=30), rng.randint(3, size=30)
    total = 0.0
    for i in range(30):
        likelihood = 0.0
        for z in range(4):
            given = sum(p[j, z] for j in range(30) if y[j] == y[i]) / p[:, z].sum()
            likelihood += given * p[i, z]
        total += np.log(likelihood)
    assert leep(p, y) == pytest.approx(total / 30)
    assert leep(np.eye(3)[y], y) == pytest.approx(0)  # its classes are the backbone's
    assert leep(np.full((30, 4), 0.25), y) == pytest.approx(np.log(np.bincount(y) / 30)[y].mean())  # it knows nothing


def test_backbones_are_ranked_by_it(file, cil, tmp_path):  # noqa: F811
    _, place = file
    data = {"dataset": "digits", "per_class": 6}
    config = write(tmp_path / "c.yaml", backbone={}, data=data)
    made = [json.dumps(headed(place)), json.dumps({**headed(place), "weights": "random"})]
    options = [part for one in made for part in ("--backbone", one)]
    found = cil("rank-backbones", config, *options, "--by", "leep", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    record = json.loads((tmp_path / "results/t/backbones.json").read_text())
    first, second = (row["leep"] for row in record["ranked"])
    assert second <= first < 0 and "LEEP" in found.stdout and f"{first:.4f}" in found.stdout
    plain = cil("rank-backbones", config, "--backbone", json.dumps(section(place)), "--by", "leep", cwd=tmp_path)
    assert plain.returncode == 2 and "is used without its classifier; give it source_head: true" in plain.stderr
    plain = cil("rank-backbones", config, "--backbone", json.dumps(section(place)), cwd=tmp_path)
    assert plain.returncode == 0 and "LEEP" not in plain.stdout
    assert "leep" not in json.loads((tmp_path / "results/t/backbones.json").read_text())["ranked"][0]


# --- Co-Tuning


def test_the_relation_and_the_term_by_numpy():
    vit = backbone()
    task, ctx = stream(vit).tasks[0], context()
    related = CoTuning(1.5, vit, task, ctx)
    images, labels = next(task.train.batches(99))
    with torch.no_grad():
        scores = source_head(vit)(vit(images)).numpy()
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    r = np.stack([p[labels.numpy() == c].mean(0) for c in task.classes])
    np.testing.assert_allclose(related.relation.numpy(), r, rtol=1e-4)
    expected = -1.5 * (r[labels.numpy()] * np.log(p)).sum(1).mean()
    with torch.no_grad():
        assert float(related.term(vit(images), labels)) == pytest.approx(expected, rel=1e-4)
    later = relation(torch.randn(4, 3), torch.tensor([2, 2, 3, 3]))  # classes of earlier tasks have no image
    assert torch.equal(later[:2], torch.zeros(2, 3)) and later[2:].sum(1).allclose(torch.ones(2))


def entropy(learner, vit) -> float:
    """The cross-entropy of the frozen classifier on tuned features with the relation of the first task's classes."""
    task = stream(vit).tasks[0]
    related = CoTuning(1.0, vit, task, context())
    images, labels = next(task.train.batches(99))
    with torch.no_grad():
        return float(related.term(learner.tuned(images), labels))


@pytest.mark.slow
def test_it_holds_the_features_where_the_classifier_can_read_them():
    found = []
    for weight in (0.0, 20.0):
        vit = backbone()
        learner = Case(Finetune, {**STEPS, "co_tuning": weight}).learner(vit)
        learn_task(learner, stream(vit).tasks[0], context())
        found.append(entropy(learner, vit))
        assert "source" not in " ".join(learner.state_dict())
    assert found[1] < found[0] - 0.1


def config(learner, **backbone) -> Config:
    return Config.model_validate(
        {
            "name": "t",
            "data": {"dataset": "digits", "per_class": 4},
            "stream": {"increment": 5},
            "backbone": backbone,
            "learners": [{"name": "finetune", "epochs": 1, **learner}],
            "orders": [1],
            "hardware": {"device": "cpu", "feature_store": "off"},
        }
    )


def test_without_the_classifier_nothing_starts(file, tmp_path):
    with pytest.raises(BackboneError, match=r"learner finetune: .* set backbone.source_head: true"):
        run(config({"co_tuning": 2.3}, **section(file[1])), tmp_path)
    assert not (tmp_path / "t").exists()


@pytest.mark.slow
def test_a_run_depends_on_the_classifier_and_its_export_does_not(file, tmp_path):
    model, _ = file
    own = tmp_path / "own.safetensors"
    save_file(model.state_dict(), own)
    [folder] = run(config({"co_tuning": 2.3}, **headed(own)), tmp_path / "results")
    facts = json.loads((folder / "metrics.json").read_text())["backbone"]
    assert facts["source_head"]["classes"] == 7 and len(facts["source_head"]["sha256"]) == 64
    export(folder, tmp_path / "exported", "safetensors")
    images = torch.randn(2, 3, 32, 32)
    one, two = (opened.learner for opened in (open_run(folder), load(tmp_path / "exported")))
    with torch.inference_mode():
        assert torch.equal(one.logits(one.features(images)), two.logits(two.features(images)))
    save_file({**model.state_dict(), "head.bias": model.head.bias + 1}, own)
    with pytest.raises(RunError, match=r"classifier of the backbone \(sha256\)"):
        run(config({"co_tuning": 2.3}, **headed(own)), tmp_path / "results")
