"""Token-level tuners on Eva and Beit: equal to timm without a tuner, and every inserted token where it belongs.

Layer scales and relative position tables start near zero, where they would hide every error: all weights are drawn.
"""

from __future__ import annotations

import copy
import functools

import pytest
import timm
import torch
from torch.func import functional_call
from torch.nn import functional

from cil.backbone import Backbone, fits, loading
from cil.backbone.views import require_views
from cil.errors import BackboneError
from cil.tuning import Adapter, ExternalPrefix, KeyValueLora, PooledPrompts, Prefix, Tuner, VisualPrompts, build_tuner
from cil.utils.randomness import isolated

D = 48
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": 2, "num_heads": 3, "num_classes": 0}
EVA = {
    "DINOv3": ("vit_small_patch16_dinov3", {}),
    "DINOv3 with biases": ("vit_small_patch16_dinov3_qkvb", {}),
    "DINOv3 Plus (SwiGLU)": ("vit_small_plus_patch16_dinov3", {}),
    "EVA-02 tiny (fused)": ("eva02_tiny_patch14_224", {}),
    "EVA-02 base (separate)": ("eva02_base_patch14_224", {}),
    "EVA giant": ("eva_giant_patch14_224", {}),
    "Perception Encoder": ("vit_pe_core_base_patch16_224", {"attn_pool_num_heads": 3}),
    "RoPE-ViT": ("vit_small_patch16_rope_224", {}),
    "RoPE-ViT, mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "RoPE-ViT, mixed and absolute": ("vit_small_patch16_rope_mixed_ape_224", {}),
    "registers, average": ("vit_medium_patch16_rope_reg1_gap_256", {}),
}
GROUPED = {
    "Sapiens2": ("vit_small_patch16_dinov3", {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1}),
}
BEIT = {
    "BEiT": ("beit_base_patch16_224", {}),
    "BEiT v2": ("beitv2_base_patch16_224", {"use_abs_pos_emb": True}),
    "BEiT, shared bias": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "BEiT, token": ("beit_base_patch16_224", {"global_pool": "token", "use_shared_rel_pos_bias": True}),
}
PLAIN = {"ViT": ("vit_tiny_patch16_224", {"init_values": 1.0})}
NEW = EVA | GROUPED | BEIT
ALL = NEW | PLAIN
every_new = pytest.mark.parametrize("name", NEW)
every = pytest.mark.parametrize("name", ALL)


@functools.cache
def make(name, dtype=torch.float32) -> Backbone:
    architecture, options = ALL[name]
    with isolated(0):
        model = timm.create_model(architecture, **TINY | options)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
    backbone = Backbone(model, name, timm.data.resolve_data_config({"img_size": 32}, model=model))
    return backbone.to(dtype)


def images(dtype=torch.float32, count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)


def drawn(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def fill(tuner):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in tuner.parameters():
            p.normal_(std=0.2, generator=generator)
    return tuner


UNCHANGING = {
    "no tuner": lambda b: None,
    "hooks alone": lambda b: Tuner(),
    "adapter": lambda b: Adapter(b, 4),
    "adapter, sequential": lambda b: Adapter(b, 4, form="sequential"),
    "adapter, attention": lambda b: Adapter(b, 4, form="attention"),
    "no prompts": lambda b: VisualPrompts(b, 0),
    "no shallow prompts": lambda b: VisualPrompts(b, 0, deep=False),
    "no pooled prompts": lambda b: PooledPrompts(b, torch.zeros(3, 0, D)),
    "no prefix": lambda b: Prefix(b, 0),
}


@every
def test_what_adds_nothing_gives_timms_features(name):
    backbone = make(name)
    with torch.inference_mode():
        expected = backbone.model(images())
        for kind, tuner in UNCHANGING.items():
            if kind == "no prefix" and name in PLAIN:
                continue  # timm's own kernel mixes two heads in another order
            assert torch.equal(backbone(images(), tuner(backbone)), expected), kind


class Inserted(Tuner):
    """The same foreign tokens in front or at the end, and the features without them."""

    def __init__(self, tokens, place, first):
        super().__init__()
        self.tokens, self.prompts_at, self.first = tokens, place, first

    def embed(self, tokens):
        at = self.first if self.prompts_at == "front" else tokens.shape[1]
        foreign = self.tokens.expand(len(tokens), -1, -1)
        return torch.cat([tokens[:, :at], foreign, tokens[:, at:]], dim=1)

    def pool(self, vit, tokens):
        at = self.first if self.prompts_at == "front" else tokens.shape[1] - self.tokens.shape[1]
        return super().pool(vit, torch.cat([tokens[:, :at], tokens[:, at + self.tokens.shape[1] :]], dim=1))


@every
def test_the_place_of_foreign_tokens_does_not_matter(name):
    backbone = make(name, torch.float64)
    foreign, first = drawn(1, 5, D), backbone.model.num_prefix_tokens
    with torch.inference_mode():
        front, end = (backbone(images(torch.float64), Inserted(foreign, place, first)) for place in ("front", "end"))
        torch.testing.assert_close(front, end, atol=1e-12, rtol=1e-10)
        assert (front - backbone(images(torch.float64))).abs().max() > 1e-3


@pytest.mark.parametrize("name", EVA | GROUPED)
def test_foreign_tokens_are_prefix_tokens_of_timms_own_blocks(name):
    """The model itself, with five more prefix tokens in its attention, is the reference."""
    backbone, count = make(name, torch.float64), 5
    foreign, model = drawn(1, count, D), copy.deepcopy(backbone.model)
    first = model.num_prefix_tokens
    with torch.inference_mode():
        tokens, rope = model._pos_embed(model.patch_embed(images(torch.float64)))
        tokens = model.norm_pre(tokens)
        tokens = torch.cat([tokens[:, :first], foreign.expand(3, -1, -1), tokens[:, first:]], dim=1)
        for i, block in enumerate(model.blocks):
            block.attn.num_prefix_tokens += count
            tokens = block(tokens, rope=rope[i] if model.rope_mixed else rope)
        tokens = torch.cat([tokens[:, :first], tokens[:, first + count :]], dim=1)
        expected = model.forward_head(model.norm(tokens), pre_logits=True)
        for place in ("front", "end"):
            features = backbone(images(torch.float64), Inserted(foreign, place, first))
            torch.testing.assert_close(features, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", BEIT)
def test_relative_bias_has_zero_rows_for_foreign_tokens(name):
    """The model itself, with a bias table that has a zero entry for foreign tokens, is the reference."""
    backbone, count = make(name, torch.float64), 2
    foreign, model = drawn(1, count, D), copy.deepcopy(backbone.model)
    with torch.inference_mode():
        tokens = model.patch_embed(images(torch.float64))
        tokens = torch.cat([model.cls_token.expand(3, -1, -1), tokens], dim=1)
        tokens = tokens if model.pos_embed is None else tokens + model.pos_embed
        own = tokens.shape[1]
        for tables in (model.rel_pos_bias, *(block.attn for block in model.blocks)):
            if getattr(tables, "relative_position_bias_table", None) is None:
                continue
            table, index = tables.relative_position_bias_table, tables.relative_position_index
            grown = torch.full((own + count,) * 2, len(table))
            grown[:own, :own] = index
            tables.relative_position_bias_table = torch.nn.Parameter(torch.cat([table, table[:1] * 0]))
            tables.relative_position_index, side = grown, own + count

            def bias(tables=tables, side=side):
                rows = tables.relative_position_bias_table[tables.relative_position_index.view(-1)]
                return rows.view(side, side, -1).permute(2, 0, 1)

            if tables is model.rel_pos_bias:
                tables.forward = bias
            else:
                tables._get_rel_pos_bias = lambda bias=bias: bias()[None]
        tokens = torch.cat([tokens, foreign.expand(3, -1, -1)], dim=1)
        shared = model.rel_pos_bias() if model.rel_pos_bias is not None else None
        for block in model.blocks:
            tokens = block(tokens, shared_rel_pos_bias=shared)
        expected = model.forward_head(model.norm(tokens[:, :own]), pre_logits=True)
        features = backbone(images(torch.float64), Inserted(foreign, "end", 1))
    torch.testing.assert_close(features, expected, atol=1e-12, rtol=1e-10)


@every
@pytest.mark.parametrize("compensate", [False, True])
def test_prefixes_are_an_explicit_softmax(name, compensate):
    """The heads' outputs, recomputed from timm's attention weights of the tokens alone, in float64."""
    backbone = make(name, torch.float64)
    width = backbone.model.blocks[0].attn.proj.in_features
    keys, values = drawn(2, 4, width)
    seen: dict[str, torch.Tensor] = {}

    def watched(q, k, v, attn_mask=None, dropout_p=0.0, **_):
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        scores = scores if attn_mask is None else scores + attn_mask
        heads = [x.unflatten(-1, (3, -1)).transpose(0, 1) for x in (keys, values)]  # [heads, P, d]
        own, foreign = scores.exp(), (q @ heads[0].transpose(-2, -1) / q.shape[-1] ** 0.5).exp()
        total = own.sum(-1, keepdim=True) + foreign.sum(-1, keepdim=True)
        seen["called"] = q
        share = foreign.sum(-1, keepdim=True) if compensate else total
        return own / total @ v + foreign / share @ heads[1]

    with torch.inference_mode():
        ours = backbone(images(torch.float64), ExternalPrefix({0: (keys, values), 1: (keys, values)}, compensate))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functional, "scaled_dot_product_attention", watched)
            expected = backbone.model.norm(_blocks(backbone.model, images(torch.float64)))
        expected = backbone.model.forward_head(expected, pre_logits=True)
    assert "called" in seen
    torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-9)


def _blocks(model, images):
    """Tokens after timm's own blocks, from its own ``forward_features`` without the last norm."""
    norm, model.norm = model.norm, torch.nn.Identity()
    try:
        return model.forward_features(images)
    finally:
        model.norm = norm


TUNERS = {
    "adapter": {"name": "adapter", "bottleneck": 4},
    "ssf": {"name": "ssf"},
    "vpt_shallow": {"name": "vpt_shallow", "length": 3},
    "vpt_deep": {"name": "vpt_deep", "length": 3},
    "prefix": {"name": "prefix", "length": 3},
    "lora_kv": {"name": "lora_kv", "rank": 2},
    "lora_kv in one block": {"name": "lora_kv", "rank": 2, "blocks": [1]},
}


@pytest.mark.parametrize("kind", TUNERS)
@every_new
def test_every_parameter_of_a_token_level_tuner_is_trained(kind, name):
    backbone = make(name)
    if kind.startswith("lora_kv") and name in GROUPED:
        with pytest.raises(BackboneError, match=r"lora_kv: heads share keys and values .*16 of 48 rows"):
            build_tuner(TUNERS[kind], backbone)
        return
    tuner = fill(build_tuner(TUNERS[kind], backbone))
    backbone(images(), tuner).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuner.parameters())
    tuner.eval()
    with torch.inference_mode():
        one = torch.cat([backbone(image[None], tuner) for image in images()])
        torch.testing.assert_close(backbone(images(), tuner), one, atol=1e-4, rtol=1e-4)


@every_new
def test_ssf_scales_and_shifts_every_layers_output(name):
    backbone = make(name, torch.float64)
    tuner = build_tuner("ssf", backbone).double()
    with torch.no_grad():
        for key in tuner.gamma:
            tuner.gamma[key].normal_(1, 0.2, generator=torch.Generator().manual_seed(3))
            tuner.beta[key].normal_(0, 0.2, generator=torch.Generator().manual_seed(4))
    model = copy.deepcopy(backbone.model)

    def changed(module, inputs, output, key):
        shape = (-1, 1, 1) if output.ndim == 4 and output.shape[1] == len(tuner.gamma[key]) else (-1,)
        return output * tuner.gamma[key].view(shape) + tuner.beta[key].view(shape)

    for key in tuner.gamma:
        layer = model.get_submodule(key.replace("/", "."))
        layer.register_forward_hook(functools.partial(changed, key=key))
    for block in model.blocks:  # read, not called: call it, on a layer with the whole bias
        attention = block.attn
        if attention.qkv is not None and getattr(attention, "q_bias", None) is not None:
            attention.qkv.bias = torch.nn.Parameter(
                torch.cat([attention.q_bias, attention.k_bias, attention.v_bias]), requires_grad=False
            )
            attention.q_bias = None
    with torch.inference_mode():
        torch.testing.assert_close(
            backbone(images(torch.float64), tuner), model(images(torch.float64)), atol=1e-10, rtol=1e-8
        )


@pytest.mark.parametrize("name", ["DINOv3 with biases", "EVA-02 base (separate)"])
def test_lora_kv_is_an_update_of_keys_and_values(name):
    backbone = make(name, torch.float64)
    tuner = fill(KeyValueLora(backbone, 2)).double()
    model = copy.deepcopy(backbone.model)
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            keys, values = (tuner.scales[i, j] * tuner.up[i, j] @ tuner.down[i, j] for j in (0, 1))
            if block.attn.qkv is None:
                block.attn.k_proj.weight += keys
                block.attn.v_proj.weight += values
            else:
                block.attn.qkv.weight[D:] += torch.cat([keys, values])
        torch.testing.assert_close(
            backbone(images(torch.float64), tuner), model(images(torch.float64)), atol=1e-10, rtol=1e-8
        )


SOME = ["DINOv3 with biases", "EVA-02 base (separate)", "Perception Encoder", "RoPE-ViT, mixed", "BEiT, token"]


@pytest.mark.parametrize("name", SOME)
def test_replaced_weights_act(name):
    backbone = make(name)
    with isolated(5):
        other = {key: torch.randn_like(p) * 0.2 for key, p in backbone.model.named_parameters()}
    with torch.inference_mode():
        expected = functional_call(backbone.model, other, (images(),))
        swapped = {f"model.{key}": value for key, value in other.items()}
        assert torch.equal(functional_call(backbone.tuned_forward, swapped, (images(), Tuner())), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_compiled_and_exported_programs_are_equal(name):
    torch._dynamo.reset()  # the other families count towards the limit of recompilations
    backbone = make(name)
    for tuner in (fill(VisualPrompts(backbone, 2)), fill(Prefix(backbone, 2))):
        with torch.no_grad():
            expected = backbone(images(), tuner)
            compiled = torch.compile(backbone.tuned_forward, backend="eager", fullgraph=True)
            assert torch.equal(compiled(images(), tuner), expected)
            program = torch.export.export(
                Whole(backbone, tuner), (images(),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
            ).module()
            torch.testing.assert_close(program(images(count=5))[:3], backbone(images(count=5), tuner)[:3])


class Whole(torch.nn.Module):
    def __init__(self, backbone, tuner):
        super().__init__()
        self.forward_pass, self.tuner = backbone.tuned_forward, tuner

    def forward(self, images):
        return self.forward_pass(images, self.tuner)


@every_new
def test_explicit_attention_is_the_same_function(name):
    backbone = make(name)
    explicit = copy.deepcopy(backbone)
    for block in explicit.model.blocks:
        block.attn.fused_attn = False
    for kind in (VisualPrompts, Prefix):
        tuner = fill(kind(backbone, 3))
        with torch.inference_mode():
            torch.testing.assert_close(explicit(images(), tuner), backbone(images(), tuner), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SOME)
def test_tuners_work_under_bf16_autocast(name):
    backbone = make(name)
    for kind in (VisualPrompts, Prefix):
        tuner = fill(kind(backbone, 3))
        with torch.inference_mode():
            exact = backbone(images(), tuner)
            with torch.autocast("cpu", torch.bfloat16):
                rough = backbone(images(), tuner).float()
        assert functional.cosine_similarity(exact, rough, dim=1).min() > 0.9


def test_post_norm_blocks_stay_refused():
    with isolated(0):
        model = timm.create_model("eva02_tiny_patch14_224", use_post_norm=True, **TINY)
    backbone = Backbone(model, "post", timm.data.resolve_data_config({"img_size": 32}, model=model))
    with pytest.raises(BackboneError, match="EvaBlockPostNorm"):
        Adapter(backbone)


def one_block(name: str) -> torch.nn.Module:
    """A timm model without data; of one block, which is like the others, where that is an option of its own."""
    with torch.device("meta"):
        try:
            return timm.create_model(name, num_classes=0, depth=1)
        except (TypeError, AssertionError):  # it has no depth, or a list with an entry per block
            return timm.create_model(name, num_classes=0)


@pytest.mark.slow
def test_the_list_says_what_fits_every_architecture():
    from timm.models import model_entrypoint

    modules = {f"timm.models.{module}" for module in loading.ENTERED}
    names = [name for name in timm.list_models() if model_entrypoint(name).__module__ in modules]
    assert len(names) > 200
    wrong = []
    for name in names:
        try:
            require_views(one_block(name))
            entered = True
        except BackboneError:
            entered = False
        if entered != ("token-level" in fits(name)):
            wrong.append(name)
    assert not wrong
