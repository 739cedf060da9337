"""Learners on DINOv3, Perception Encoder, EVA-02 and BEiT: two tasks, interrupted and resumed, and exported."""

from __future__ import annotations

import pytest
import torch
from marks import slow_beyond

from cil import results
from cil.config import Config
from cil.errors import TrainingError
from cil.export import export, load
from cil.prediction import open_run
from cil.runner import run, stages

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
MODELS = {
    "DINOv3": ("vit_small_patch16_dinov3", {}),
    "Perception Encoder": ("vit_pe_core_base_patch16_224", {"attn_pool_num_heads": 2}),
    "EVA-02": ("eva02_tiny_patch14_224", {}),
    "BEiT": ("beit_base_patch16_224", {}),
}
QUICK = {"epochs": 1, "train_batch_size": 8, "lr": 0.05}
LEARNERS = {
    "adapter": {"name": "aper", "tuner": {"name": "adapter", "bottleneck": 4}, **QUICK},
    "ssf": {"name": "aper", "tuner": "ssf", **QUICK},
    "vpt_deep": {"name": "aper", "tuner": "vpt_deep", **QUICK},
    "l2p": {"name": "l2p", "pool": 4, "top": 2, **QUICK},
    "prefix": {"name": "lae", "tuner": "prefix", "frozen_epochs": 0, **QUICK},
    "lora": {"name": "merge", "tuner": "lora", **QUICK},
    "merged ssf": {"name": "merge", "tuner": "ssf", **QUICK},
    "lora_kv": {"name": "lae", "tuner": {"name": "lora_kv", "blocks": [0, 1]}, "frozen_epochs": 0, **QUICK},
}
ALL = [(model, learner) for i, model in enumerate(MODELS) for j, learner in enumerate(LEARNERS) if (i + j) % 2 == 0]
"""Every learner on two models. test_views.py has each token-level tuner on all of them."""
FAST = [("DINOv3", "vpt_deep")]
FORMATS = {
    (model, learner): ("torch.export", "safetensors")[(i // 2 + j // 2) % 2]
    for i, model in enumerate(MODELS)
    for j, learner in enumerate(LEARNERS)
}
"""Every learner is exported as itself on one of its models and as a program on the other, and every model as both."""


def config_for(model, learner):
    name, options = MODELS[model]
    return Config.model_validate(
        {
            "name": "t",
            "data": {"dataset": "digits", "per_class": 6},
            "stream": {"sizes": [4, 6]},
            "backbone": {"name": name, "weights": "random", "options": SMALL | options},
            "orders": ["natural"],
            "learners": [learner],
            "hardware": {"device": "cpu", "feature_store": "off"},
        }
    )


@pytest.mark.parametrize(("model", "learner"), slow_beyond(FAST, ALL))
def test_two_tasks_resumed_and_exported(model, learner, tmp_path, monkeypatch):
    config = config_for(model, LEARNERS[learner])
    [whole] = run(config, tmp_path / "whole")
    original = stages.run_stage

    def interrupted(session, task):
        if task.index == 1:
            raise KeyboardInterrupt
        return original(session, task)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "run_stage", interrupted)
        run(config, tmp_path / "parts")
    [parts] = run(config, tmp_path / "parts")
    one, two = (results.read_run(folder) for folder in (whole, parts))
    assert [row["correct"] for row in one["stages"]] == [row["correct"] for row in two["stages"]]
    mine = open_run(parts)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = mine.learner.logits(mine.learner.features(images).float())
        exported = load(export(parts, tmp_path / "exported", format=FORMATS[model, learner]))
        torch.testing.assert_close(exported(images)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", slow_beyond(["BEiT"], ["BEiT", "EVA-02"]))
def test_lora_trains_where_it_once_trained_nothing(model, tmp_path):
    [folder] = run(config_for(model, {"name": "ranpac", "projection": 20, "tuner": "lora", **QUICK}), tmp_path)
    trained = open_run(folder).learner.state_dict()
    ups = [value for key, value in trained.items() if "lora_B" in key]
    assert len(ups) == 2 and all(value.abs().sum() > 0 for value in ups)


def test_a_tuner_that_trains_nothing_ends_the_run(tmp_path, monkeypatch):
    """What the first check does not know of is found after the first task."""
    monkeypatch.setattr("cil.tuning.peft.uncalled", lambda *args: [])
    with pytest.raises(TrainingError, match=r"ranpac, stage 0: no step .* had a gradient of tuner\.layers.*lora_A"):
        run(config_for("BEiT", {"name": "ranpac", "projection": 20, "tuner": "lora", **QUICK}), tmp_path)
