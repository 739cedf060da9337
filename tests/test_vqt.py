"""VQT: queries that read the tokens and change none, and features of another width than the backbone's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from marks import slow_beyond
from test_views import ALL, BEIT, EVA, GROUPED, PLAIN, images, make

from cil.errors import BackboneError
from cil.features.digest import about_tuner
from cil.learners import registry
from cil.testing import Case
from cil.testing.setting import probe_images
from cil.tuning import VisualQueries, build_tuner
from cil.tuning.layers import Collector

ROTATED = ["DINOv3 Plus (SwiGLU)", "EVA-02 base (separate)", "Perception Encoder", "Sapiens2"]


def walked(backbone, pixels):
    """Inputs and outputs of timm's own blocks, [B, N, D] each, and the tokens after the last one."""
    pairs = []
    handles = [
        block.register_forward_hook(lambda module, args, out: pairs.append((args[0], out)))
        for block in backbone.model.blocks
    ]
    with torch.inference_mode():
        backbone.model.forward_features(pixels)
    for handle in handles:
        handle.remove()
    return [x for x, _ in pairs], [out for _, out in pairs]


class Watched(VisualQueries):
    """Keeps the tokens that come out of the last block."""

    def finish(self, vit, tokens):
        self.seen = tokens
        return super().finish(vit, tokens)


@pytest.mark.parametrize("name", slow_beyond([*PLAIN, *ROTATED, *BEIT], ALL))
@pytest.mark.parametrize("blocks", [None, [1]])
def test_tokens_are_those_of_the_frozen_backbone(name, blocks):
    backbone = make(name)
    tuner = Watched(backbone, 3, blocks=blocks).eval()
    _, outputs = walked(backbone, images())
    with torch.inference_mode():
        features, frozen = backbone(images(), tuner), backbone(images())
    assert torch.equal(tuner.seen[:, : outputs[-1].shape[1]], outputs[-1])
    assert torch.equal(features[:, : backbone.feature_dim], F.normalize(frozen, dim=1))
    answers = features[:, backbone.feature_dim :].unflatten(1, (len(tuner.rows), -1))
    assert features.shape[1] == tuner.width == backbone.feature_dim + len(tuner.rows) * 3 * 48
    torch.testing.assert_close(answers.norm(dim=2), torch.ones(3, len(tuner.rows)))


@pytest.mark.parametrize("name", slow_beyond([*PLAIN, *ROTATED], [*PLAIN, *EVA, *GROUPED]))
def test_a_copy_of_a_token_as_query_comes_out_as_that_token(name):
    """The query identity: timm's own blocks give the outputs. Only prefix tokens do not turn in rotary attention."""
    backbone = make(name, torch.float64)
    own = backbone.model.num_prefix_tokens
    places = [0, 5, 16] if name in PLAIN else [*range(own)][:2]
    if not places:
        pytest.skip("this model has no prefix tokens")
    pixels = images(torch.float64, 1)
    inputs, outputs = walked(backbone, pixels)
    tuner = VisualQueries(backbone, len(places)).double().eval()
    with torch.inference_mode():
        tuner.queries.copy_(torch.cat([x[:, places] for x in inputs]))
        answers = backbone(pixels, tuner)[0, backbone.feature_dim :].unflatten(0, (len(outputs), -1))
    expected = torch.stack([F.normalize(out[0, places].flatten(), dim=0) for out in outputs])
    torch.testing.assert_close(answers, expected, atol=1e-12, rtol=1e-9)


def test_queries_of_beit_have_no_relative_bias():
    """Without a bias table, a copy of the class token comes out as the class token; the table changes the token."""
    backbone = make("BEiT, token", torch.float64)
    pixels = images(torch.float64, 1)
    tuner = VisualQueries(backbone, 1).double().eval()
    tables = [p for n, p in backbone.model.named_parameters() if n.endswith("relative_position_bias_table")]
    kept = [table.clone() for table in tables]
    found = []
    with torch.inference_mode():
        for factor in (0, 1):
            for table, value in zip(tables, kept, strict=True):
                table.copy_(factor * value)
            inputs, outputs = walked(backbone, pixels)
            tuner.queries.copy_(torch.cat([x[:, :1] for x in inputs]))
            answer = backbone(pixels, tuner)[0, backbone.feature_dim :][:48]
            found.append((answer - F.normalize(outputs[0][0, 0], dim=0)).abs().max())
    assert found[0] < 1e-12 and found[1] > 1e-4


def test_queries_start_uniform_as_in_vpt_and_are_dropped_in_training_alone():
    backbone = make("ViT")
    tuner = VisualQueries(backbone, 50, dropout=0.5)
    bound = (6 / (3 * 8 * 8 + 48)) ** 0.5
    assert tuner.queries.abs().max() <= bound and tuner.queries.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    with torch.inference_mode(), torch.random.fork_rng():
        assert not torch.equal(backbone(images(), tuner.train()), backbone(images(), tuner))
        assert torch.equal(backbone(images(), tuner.eval()), backbone(images(), tuner))


def test_one_query_is_the_published_size():
    """ViT-B/16: 9,216 parameters and 9,984 features, from the widths alone."""
    backbone = make("ViT")
    tuner = build_tuner("vqt", backbone)
    assert tuner.queries.shape == (2, 1, 48) and tuner.width == 48 + 2 * 48
    assert (12 * 768, 768 + 12 * 768) == (9216, 9984)
    with pytest.raises(BackboneError, match="length must be at least 1, got 0"):
        VisualQueries(backbone, 0)


def test_a_collector_and_the_store_know_the_width():
    backbone = make("ViT")
    tuner = build_tuner({"name": "vqt", "length": 2}, backbone).eval()
    both = Collector(backbone, "all", ["class", "mean"], tuner=tuner)
    alone = Collector(backbone, "all", ["class", "mean"])
    with torch.inference_mode():
        features = backbone(images(), both)
        assert torch.equal(features[:, : -tuner.width], backbone(images(), alone)[:, :-48])
        assert torch.equal(features[:, -tuner.width :], backbone(images(), tuner))
    assert both.widths == (48,) * 4 + (tuner.width,) and features.shape[1] == both.width
    assert about_tuner(tuner, backbone)["feature_dim"] == tuner.width
    assert about_tuner(both, backbone)["feature_dim"] == both.width
    assert about_tuner(None, backbone) == {"feature_dim": 48, "tuner_name": ""}


WIDE = {"tuner": {"name": "vqt", "length": 2}, "epochs": 1}
OWN = 48 + 3 * 2 * 48  # of the checks' backbone, which has three blocks
LEARNERS = [
    ("ranpac", {"projection": 50}, [OWN]),
    ("aper", {"layers": "last"}, [3 * 48, 2 * 48 + OWN]),
    ("lae", {"frozen_epochs": 0}, [OWN, OWN]),
    ("moal", {"projection": None}, [OWN]),
    ("rsiat", {"first_epochs": 1, "alignment_epochs": 1}, [OWN]),
    ("merge", {"rule": "average"}, [48, OWN]),
    ("merge_lca", {"rule": "average", "alignment_epochs": 1}, [OWN]),
    ("avalanche", {"strategy": "Naive"}, [OWN]),
]


@pytest.mark.parametrize(("name", "more", "widths"), slow_beyond(LEARNERS[:1], LEARNERS))
def test_learners_ask_the_tuner_for_the_width(name, more, widths):
    learner = Case(registry.resolve(name), {**WIDE, **more}).run(stop_after=2).learner
    with torch.inference_mode():
        images = probe_images()
        assert [view(images).shape[1] for view in learner.views().values()] == widths
        scores = learner.logits(learner.features(images).float())
    assert scores.shape == (48, 5) and bool(scores.isfinite().all()) and len(scores.unique(dim=0)) > 1
