"""``cil merge`` on safetensors files: equal to merging in memory, resumable, whole or not at all, mistakes named."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from marks import slow_beyond
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import cil  # noqa: F401 - a fixture
from waiting import until

from cil.errors import CilError
from cil.merging import HEADS, build_rule
from cil.merging.configs import RULES
from cil.merging.files import Checkpoint, TensorWriter
from cil.merging.on_disk import merge_files
from cil.merging.statistics import Statistics
from cil.utils.randomness import isolated

TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3}


def change(state, seed, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    return {k: v + scale * torch.randn(v.shape, generator=generator).to(v) for k, v in state.items()}


@pytest.fixture(scope="module")
def states():
    """A pre-trained timm model and four fine-tuned ones; heads differ, as tasks' heads do."""
    with isolated(0):
        base = timm.create_model("vit_tiny_patch16_224", **TINY).state_dict()
    tasks = [change(base, seed) for seed in range(1, 5)]
    tasks[1] |= {"head.weight": torch.zeros(7, 12), "head.bias": torch.zeros(7)}
    return base, tasks


@pytest.fixture
def place(tmp_path, states):
    base, tasks = states
    save_file(base, tmp_path / "base.safetensors")
    for t, task in enumerate(tasks):
        save_file(task, tmp_path / f"t{t}.safetensors")
    return tmp_path


def arguments(place, out, tasks=(0, 1, 2, 3), **options):
    flags = [part for key, value in options.items() for part in (f"--{key}", value)]
    return [
        "merge",
        "--base",
        place / "base.safetensors",
        "--out",
        out,
        *flags,
        *[place / f"t{t}.safetensors" for t in tasks],
    ]


def in_memory(rule, states, tasks=(0, 1, 2, 3), stats=None):
    merger = build_rule(rule).start(states[0])
    for t in tasks:
        merger.add(states[1][t], stats[t] if stats else None)
    return merger.merged()


def statistics(base, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = {k: torch.randn(30, v.shape[1], generator=generator) for k, v in base.items() if v.ndim == 2}
    fisher = {k: torch.rand(v.shape, generator=generator) for k, v in base.items()}
    return Statistics(fisher, {k: x.T @ x / 30 for k, x in rows.items()})


def leftovers(place):
    return [p.name for p in place.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("rule", slow_beyond(["average", "task_arithmetic", "ties", "opcm", "regmean", "dare"], RULES))
def test_files_give_what_memory_gives_at_once_or_in_parts(rule, place, states):
    needs = RULES[rule].needs
    stats = [statistics(states[0], t) for t in range(4)] if needs else None
    files = []
    for t, known in enumerate(stats or ()):
        known.save(place / f"stats{t}.safetensors")
        files.append(place / f"stats{t}.safetensors")
    tasks = [place / f"t{t}.safetensors" for t in range(4)]
    base, state = place / "base.safetensors", place / "state.safetensors"
    merge_files(rule, base, tasks, place / "once.safetensors", stats=files)
    expected = in_memory(rule, states, stats=stats)
    once = load_file(place / "once.safetensors")
    assert set(once) == set(expected) and all(torch.equal(once[k], v) for k, v in expected.items())
    for part in ([0], [1, 2], [3]):
        out = place / f"parts{part[-1]}.safetensors"
        merger = merge_files(
            rule, base, [tasks[t] for t in part], out, state=state, stats=[files[t] for t in part] if needs else ()
        )
    parts = load_file(out)
    assert max(float((parts[k] - v).abs().max()) for k, v in expected.items()) < 1e-5
    assert int(merger.count) == 4 and not leftovers(place)
    saved = build_rule(rule).start(states[0])  # a state file is a rule's state dict
    saved.load_state_dict(load_file(state))
    assert all(torch.equal(saved.merged()[k], v) for k, v in parts.items())


def test_command(cil, place, states):  # noqa: F811
    ended = cil(*arguments(place, place / "out.safetensors", rule="opcm", set="alpha=0.3"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"{place / 'out.safetensors'}: 4 tasks, mean norm of an update")
    merged = load_file(place / "out.safetensors")
    expected = in_memory({"name": "opcm", "alpha": 0.3}, states)
    assert all(torch.equal(merged[k], v) for k, v in expected.items())
    with isolated(0):
        timm.create_model("vit_tiny_patch16_224", **TINY).load_state_dict(merged)
    with safe_open(place / "out.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "cil_rule": "OPCM", "cil_tasks": "4"}


def test_finalisers_and_exclusions(cil, place, states):  # noqa: F811
    base = states[0]
    options = {"rule": "average", "set": "finalisers=[norm_matching]", "exclude": "^head|norm"}
    assert cil(*arguments(place, place / "out.safetensors", **options)).returncode == 0
    merged = load_file(place / "out.safetensors")
    kept = [k for k in base if torch.equal(merged[k], base[k])]
    assert set(kept) == {k for k in base if k.startswith("head") or "norm" in k}
    norms = [
        math.sqrt(sum(float((t[k] - base[k]).double().square().sum()) for k in base if k not in kept))
        for t in states[1]
    ]
    got = math.sqrt(sum(float((merged[k] - base[k]).double().square().sum()) for k in base))
    assert abs(got / (sum(norms) / 4) - 1) < 1e-5


def shard(state, folder, count=3):
    """As Transformers writes it: shards, an index, and a configuration."""
    folder.mkdir()
    names, where = list(state), {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file({k: state[k] for k in names[i::count]}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names[i::count], file)
    index = {"metadata": {"total_size": sum(v.nbytes for v in state.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "vit"}')
    (folder / "README.md").write_text("the base's model card")
    return folder


def test_sharded_checkpoints(place, states):
    base, tasks = (
        shard(states[0], place / "base"),
        [shard(t, place / f"task{i}", 2 + i) for i, t in enumerate(states[1][:2])],
    )
    merge_files("opcm", base, tasks, place / "merged")
    expected = in_memory("opcm", states, (0, 1))
    got = Checkpoint(place / "merged")
    assert set(got) == set(expected) and all(torch.equal(got[k], v) for k, v in expected.items())
    assert sorted(p.name for p in (place / "merged").iterdir()) == sorted(
        ["config.json", "model.safetensors.index.json", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))]
    )
    merge_files("opcm", base / "model.safetensors.index.json", tasks, place / "one.safetensors")  # or one file
    assert all(torch.equal(v, expected[k]) for k, v in load_file(place / "one.safetensors").items())
    (place / "merged" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CilError, match=r"model-00002-of-00003.safetensors: does not exist, though"):
        Checkpoint(place / "merged")
    (place / "merged" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CilError, match="not an index of safetensors files"):
        Checkpoint(place / "merged")


def test_a_transformers_model_goes_through(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=32,
        patch_size=16,
        num_labels=3,
    )
    with isolated(0):
        model = ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "base")
    base = {k: v.clone() for k, v in model.state_dict().items()}
    tasks = [change(base, seed) for seed in (1, 2)]
    for t, task in enumerate(tasks):
        model.load_state_dict(task)
        model.save_pretrained(tmp_path / f"t{t}")
    merge_files("opcm", tmp_path / "base", [tmp_path / "t0", tmp_path / "t1"], tmp_path / "merged")
    merged = ViTForImageClassification.from_pretrained(tmp_path / "merged").state_dict()
    rule = build_rule("opcm").start(base)
    for task in tasks:
        rule.add(task)
    assert all(torch.equal(merged[k], v) for k, v in rule.merged().items())
    assert torch.equal(merged["classifier.weight"], base["classifier.weight"])
    assert sum(entry.linear for entry in rule.layout.entries) == 12  # query, key, value, two dense and one more, twice


@pytest.mark.parametrize("headed", ["task", "base"])
def test_a_transformers_model_alone_and_inside_one_with_a_head(tmp_path, headed):
    """What is ``…`` in a ViTModel, as base checkpoints are saved, is ``vit.…`` in a ViTForImageClassification."""
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    config = ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=16
    )
    with isolated(0):
        alone, classifier = ViTModel(config, add_pooling_layer=headed == "task"), ViTForImageClassification(config)
    base, task = (alone, classifier) if headed == "task" else (classifier, alone)
    base.save_pretrained(tmp_path / "base")
    task.save_pretrained(tmp_path / "task")
    if headed == "task":  # it has no pooler
        with pytest.raises(CilError, match=r"pooler\.dense\.\w+ is missing .* leave tensors out with exclude"):
            merge_files("average", tmp_path / "base", [tmp_path / "task"], tmp_path / "merged")
    exclude = (*HEADS, r"^pooler\.")
    merge_files("average", tmp_path / "base", [tmp_path / "task"], tmp_path / "merged", exclude=exclude)
    merged, changed = type(base).from_pretrained(tmp_path / "merged").state_dict(), 0
    for name, value in base.state_dict().items():
        bare = name.removeprefix("vit.")
        theirs = task.state_dict().get(f"vit.{bare}" if headed == "task" else bare)
        torch.testing.assert_close(merged[name], value if theirs is None else theirs)
        changed += theirs is not None and not torch.equal(theirs, value)
    assert changed > 5


def test_bfloat16_and_other_dtypes_keep_theirs(tmp_path):
    base = {
        "a.weight": torch.randn(6, 4).bfloat16(),
        "b": torch.randn(3).half(),
        "n": torch.arange(5),
        "flag": torch.tensor(True),
    }
    task = {k: v + 1 if v.is_floating_point() else v for k, v in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(task, tmp_path / "t.safetensors")
    merge_files("average", tmp_path / "base.safetensors", [tmp_path / "t.safetensors"], tmp_path / "o.safetensors")
    merged = load_file(tmp_path / "o.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in merged.items()} == {k: (v.dtype, v.shape) for k, v in base.items()}
    assert torch.equal(merged["a.weight"], task["a.weight"]) and torch.equal(merged["n"], base["n"])


def broken(place, states, kind):
    """Spoil t1 in one way."""
    file, task = place / "t1.safetensors", dict(states[1][0])
    if kind == "missing":
        del task["norm.bias"]
    elif kind == "extra":
        task["blocks.0.ls1.gamma"] = torch.ones(12)
    elif kind == "shape":
        task["pos_embed"] = torch.zeros(1, 9, 12)
    elif kind == "nan":
        task["blocks.1.mlp.fc1.weight"] = task["blocks.1.mlp.fc1.weight"] * math.nan
    elif kind == "lora":
        task = {"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 12)}
    elif kind == "architecture":
        task = {"layer1.0.conv1.weight": torch.ones(3, 3)}
    elif kind == "quantised":
        task["pos_embed"] = task["pos_embed"].to(torch.int8)
    save_file(task, file)
    if kind == "damaged":
        file.write_bytes(file.read_bytes()[:-50])
    if kind == "gone":
        file.unlink()
    return file


BROKEN = {
    "missing": "norm.bias is missing (1 of",
    "extra": "blocks.0.ls1.gamma is not in",
    "shape": "pos_embed has shape [1, 9, 12], but [1, 5, 12] in",
    "nan": "blocks.1.mlp.fc1.weight holds NaN or infinite values",
    "lora": "lora_A.weight belongs to a LoRA adapter, not to a full model; merge the adapter into its model first",
    "architecture": "tensors are); tasks must be fine-tuned from",
    "quantised": "pos_embed holds int8",
    "damaged": "not a safetensors file, or a damaged one",
    "gone": "no such file or folder",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_task_is_one_line_and_leaves_nothing(cil, place, states, kind):  # noqa: F811
    state = place / "state.safetensors"
    assert cil(*arguments(place, place / "first.safetensors", [0], rule="ties", state=state)).returncode == 0
    before = state.read_bytes()
    file = broken(place, states, kind)
    ended = cil(*arguments(place, place / "out.safetensors", [2, 1], rule="ties", state=state))
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith(f"cil: {file}: ") and BROKEN[kind] in ended.stderr
    assert not (place / "out.safetensors").exists() and not leftovers(place)
    assert state.read_bytes() == before  # the task before the bad one is not in it either


def test_other_mistakes(cil, place, states):  # noqa: F811
    out, state = place / "out.safetensors", place / "state.safetensors"
    assert cil(*arguments(place, place / "first.safetensors", [0], rule="opcm", state=state)).returncode == 0
    (place / "lora").mkdir()
    save_file({"x": torch.ones(1)}, place / "lora" / "adapter_model.safetensors")
    torch.save(states[0], place / "base.pth")
    save_file(change(states[0], 9), place / "other.safetensors")
    (place / "not-a-state.safetensors").write_bytes(b"no")
    save_file({"a": torch.ones(2)}, place / "no-state.safetensors")
    t0 = place / "t0.safetensors"
    mistakes = {
        "unknown 'opcmm' (did you mean 'opcm'?)": arguments(place, out, rule="opcmm"),
        "unknown key rule.alhpa": arguments(place, out, rule="opcm", set="alhpa=1"),
        "regmean needs statistics of every task (--stats once per task, in order): 4 tasks, 0": arguments(
            place, out, rule="regmean"
        ),
        "average uses no statistics": arguments(place, out, rule="average", stats=t0),
        "exists already; remove it": arguments(place, place / "first.safetensors", rule="opcm"),
        "its rule differs": arguments(place, out, rule="opcm", set="alpha=0.1", state=state),
        "its exclude differs": arguments(place, out, rule="opcm", exclude="^head|norm", state=state),
        "not-a-state.safetensors: not a safetensors file": arguments(
            place, out, rule="opcm", state=place / "not-a-state.safetensors"
        ),
        "is the state of another merge: its format differs": arguments(
            place, out, rule="opcm", state=place / "no-state.safetensors"
        ),
        "must end in .safetensors": arguments(place, out, rule="opcm", state=place / "state"),
        "its base differs": [
            "merge",
            "--rule",
            "opcm",
            "--base",
            place / "other.safetensors",
            "--out",
            out,
            "--state",
            state,
            t0,
        ],
        "holds a LoRA adapter": ["merge", "--rule", "opcm", "--base", place / "lora", "--out", out, t0],
        "pickles are never loaded": ["merge", "--rule", "opcm", "--base", place / "base.pth", "--out", out, t0],
        "neither model.safetensors nor": ["merge", "--rule", "opcm", "--base", place, "--out", out, t0],
        "is not a regular expression": arguments(place, out, rule="opcm", exclude="("),
    }
    for message, command in mistakes.items():
        ended = cil(*command)
        assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1, (message, ended)
        assert message in ended.stderr, (message, ended.stderr)
        assert not out.exists() and not leftovers(place)


# --- LoRA adapters as tasks


@pytest.fixture
def adapters(place):
    """Two adapters in PEFT's folders, on the base, with a rank and an α of their own in one layer; and their models."""
    from peft import LoraConfig, get_peft_model

    folders, models = [], []
    for seed, rslora in ((1, False), (2, True)):
        with isolated(seed):
            base = timm.create_model("vit_tiny_patch16_224", **TINY)
            base.load_state_dict(load_file(place / "base.safetensors"))
            patterns = {"rank_pattern": {"blocks.1.mlp.fc1": 3}, "alpha_pattern": {"blocks.1.mlp.fc1": 5}}
            config = LoraConfig(
                r=2,
                lora_alpha=4,
                target_modules=["qkv", "fc1"],
                use_rslora=rslora,
                modules_to_save=["head"],
                **patterns,
            )
            tuned = get_peft_model(base, config)
            for name, value in tuned.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(value, std=0.1)
            folders.append(place / f"lora{seed}")
            tuned.save_pretrained(folders[-1])
            models.append(tuned.merge_and_unload().state_dict())
    return folders, models


def test_adapters_are_merged_as_the_models_that_peft_makes_of_them(place, adapters, states):
    folders, models = adapters
    state = place / "state.safetensors"
    for task, out in zip(folders, ("one", "two"), strict=True):
        merge_files("iso_cts", place / "base.safetensors", [task], place / f"{out}.safetensors", state=state)
    expected = build_rule("iso_cts").start(states[0]).add(models[0]).add(models[1])
    merged = load_file(place / "two.safetensors")
    for name, value in expected.merged().items():
        if not name.startswith("head"):
            torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-4)
    assert not torch.equal(merged["blocks.1.mlp.fc1.weight"], states[0]["blocks.1.mlp.fc1.weight"])
    kept = load_file(state)
    ranks = {len(value) for name, value in kept.items() if name.startswith("right_")}
    assert ranks == {2, 3} and not any(name.startswith("whole_") for name in kept)
    again = merge_files("iso_cts", place / "base.safetensors", folders[1:], place / "again.safetensors", state=state)
    assert int(again.count) == 2  # the adapter is known by its update
    mixed = merge_files(
        "average", place / "base.safetensors", [folders[0], place / "t1.safetensors"], place / "mixed.safetensors"
    )
    both = build_rule("average").start(states[0]).add(models[0] | {"head.weight": states[0]["head.weight"]})
    both.add(states[1][1])
    assert int(mixed.count) == 2
    got = load_file(place / "mixed.safetensors")
    assert all(torch.allclose(got[n], v, atol=1e-6) for n, v in both.merged().items() if not n.startswith("head"))


def test_adapters_in_a_model_of_another_class(place, adapters, states):
    """Transformers calls ``vit.…`` in a model with a head what is ``…`` in the model alone, and the other way round."""
    (folder, _), (model, _) = adapters
    for prefix in ("vit.", ""):
        save_file({f"{prefix}{n}": v for n, v in states[0].items()}, place / f"base{prefix or '.'}safetensors")
        factors = load_file(folder / "adapter_model.safetensors")
        other = "" if prefix else "inner."
        renamed = {
            n.replace("base_model.model.blocks", f"base_model.model.{other}blocks"): v for n, v in factors.items()
        }
        save_file(renamed, folder / "adapter_model.safetensors")
        out = place / f"out{prefix or '.'}safetensors"
        merge_files("average", place / f"base{prefix or '.'}safetensors", [folder], out)
        got, name = load_file(out), "blocks.0.attn.qkv.weight"
        torch.testing.assert_close(got[f"{prefix}{name}"], model[name])
        save_file(factors, folder / "adapter_model.safetensors")


def test_adapters_that_cannot_be_merged_as_they_are(place, adapters):
    (folder, _), _ = adapters
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    right, factors = json.loads(config.read_text()), load_file(weights)
    prefix = "base_model.model.blocks.0.attn.qkv"
    layer = {name: value for name, value in factors.items() if name.startswith(prefix)}
    bad = {
        "rescales weights (DoRA)": (right | {"use_dora": True}, factors),
        "is an adapter of kind IA3; only LORA": (right | {"peft_type": "IA3"}, factors),
        "trained biases (bias: all)": (right | {"bias": "all"}, factors),
        "cannot be read (KeyError": ({}, factors),
        "norm.weight is no factor of": (right, factors | {"base_model.model.norm.weight": torch.ones(12)}),
        "has one of its two factors": (right, {n: v for n, v in factors.items() if "lora_B" not in n}),
        "update are A [2, 12] and B [36, 1]; the base has blocks.0.attn.qkv.weight [36, 12]; only linear layers": (
            right,
            layer | {f"{prefix}.lora_B.weight": torch.ones(36, 1)},
        ),
        "update are A [2, 3, 4, 4] and B [12, 2, 1, 1]; the base has patch_embed.proj.weight": (
            right,
            {
                "base_model.model.patch_embed.proj.lora_A.weight": torch.ones(2, 3, 4, 4),
                "base_model.model.patch_embed.proj.lora_B.weight": torch.ones(12, 2, 1, 1),
            },
        ),
        "adapts blocks.7.attn.qkv, which is not among the merged weights": (
            right,
            {name.replace("blocks.0", "blocks.7"): value for name, value in layer.items()},
        ),
        "lora1: blocks.0.attn.qkv.weight holds NaN": (right, {name: value * math.nan for name, value in layer.items()}),
    }
    for message, (settings, tensors) in bad.items():
        config.write_text(json.dumps(settings))
        save_file(tensors, weights)
        with pytest.raises(CilError) as error:
            merge_files("average", place / "base.safetensors", [folder], place / "out.safetensors")
        assert message in str(error.value), (message, str(error.value))
        assert not (place / "out.safetensors").exists() and not leftovers(place)


def test_a_full_disk_is_one_line(cil, place, monkeypatch):  # noqa: F811
    def full(self, name, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorWriter, "write", full)
    ended = cil(*arguments(place, place / "out.safetensors", rule="average"))
    assert ended.returncode == 2 and "cannot write: the disk is full" in ended.stderr
    assert not (place / "out.safetensors").exists() and not leftovers(place)


@pytest.mark.parametrize("after", [0, 20, 45])
def test_interrupted_while_writing(place, states, monkeypatch, after):
    """Ctrl-C in a state or in the result: nothing has a final name, the old state is as it was, once more works."""
    state, tasks = place / "state.safetensors", [place / "t1.safetensors"]
    merge_files("average", place / "base.safetensors", [place / "t0.safetensors"], place / "a.safetensors", state=state)
    before, written, write = state.read_bytes(), [], TensorWriter.write

    def interrupted(self, name, tensor):
        written.append(name)
        if len(written) > after:
            raise KeyboardInterrupt
        write(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_files("average", place / "base.safetensors", tasks, place / "b.safetensors", state=state)
    assert state.read_bytes() == before and not (place / "b.safetensors").exists() and not leftovers(place)
    monkeypatch.setattr(TensorWriter, "write", write)
    merge_files("average", place / "base.safetensors", tasks, place / "b.safetensors", state=state)
    expected = in_memory("average", states, (0, 1))
    assert all(torch.equal(v, expected[k]) for k, v in load_file(place / "b.safetensors").items())


def test_killed_in_the_middle(place, states):
    """kill -9 leaves scratch folders, never a result; the same command clears them and succeeds."""
    code = (
        "import sys, time\n"
        "from cil.merging import files, on_disk\n"
        "write = files.TensorWriter.write\n"
        "def slow(self, name, tensor):\n"
        "    print(name, flush=True); write(self, name, tensor); time.sleep(60 if name == 'norm.bias' else 0)\n"
        "files.TensorWriter.write = slow\n"
        "base, out, *tasks = sys.argv[1:]\n"
        "on_disk.merge_files('average', base, tasks, out, state=out + '.state.safetensors')\n"
    )
    out = place / "out.safetensors"
    command = [sys.executable, "-c", code, place / "base.safetensors", out, place / "t0.safetensors"]
    said = place / "said"
    with said.open("w") as stdout, subprocess.Popen([*map(str, command)], stdout=stdout, env=os.environ) as process:
        try:
            until(lambda: "norm.bias" in said.read_text() or process.poll() is not None, 100, "no norm.bias is written")
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    state = place / "out.safetensors.state.safetensors"
    assert not out.exists() and not state.exists() and leftovers(place)
    merge_files("average", place / "base.safetensors", [place / "t0.safetensors"], out, state=state)
    assert not leftovers(place)
    assert all(torch.equal(v, in_memory("average", states, (0,))[k]) for k, v in load_file(out).items())


@pytest.mark.parametrize(
    "calls", [[(0,), (0,)], [(0, 1), (0, 1)], [(0,), (0, 1)], [(0, 1), (1, 2)], [(0,), (1,), (0,)]]
)
def test_a_repeated_call_merges_no_task_twice(place, states, caplog, calls):
    """The state knows its last tasks: what follows them is merged, and an earlier task that comes back is a new one."""
    state, merged = place / "state.safetensors", []
    for number, tasks in enumerate(calls):
        files = [place / f"t{t}.safetensors" for t in tasks]
        out = place / f"out{number}.safetensors"
        rule = merge_files("average", place / "base.safetensors", files, out, state=state)
        again = next(n for n in range(len(tasks), -1, -1) if n == 0 or merged[-n:] == list(tasks[:n]))
        merged += tasks[again:]
        assert int(rule.count) == len(merged) and caplog.text.count("is not merged again") == again
        expected = in_memory("average", states, merged)
        assert max(float((v - expected[k]).abs().max()) for k, v in load_file(out).items()) < 1e-6
        caplog.clear()


@pytest.mark.parametrize("moment", ["before the state", "between the state and the result"])
def test_a_crash_at_the_end_merges_no_task_twice(place, states, monkeypatch, moment):
    """Whatever is there after a crash, the same command ends with every task once, in the result and in the state."""
    state, out = place / "state.safetensors", place / "b.safetensors"
    merge_files("average", place / "base.safetensors", [place / "t0.safetensors"], place / "a.safetensors", state=state)
    method, original = ("replace", Path.replace) if moment == "before the state" else ("rename", Path.rename)

    def crash(self, target):
        if Path(target) in (state, out):
            raise KeyboardInterrupt
        return original(self, target)

    monkeypatch.setattr(Path, method, crash)
    with pytest.raises(KeyboardInterrupt):
        merge_files("average", place / "base.safetensors", [place / "t1.safetensors"], out, state=state)
    monkeypatch.setattr(Path, method, original)
    assert not out.exists()
    rule = merge_files("average", place / "base.safetensors", [place / "t1.safetensors"], out, state=state)
    assert int(rule.count) == 2 and int(load_file(state)["count"]) == 2
    expected = in_memory("average", states, (0, 1))
    assert all(torch.equal(v, expected[k]) for k, v in load_file(out).items())


def test_a_state_of_before_is_continued(place, states):
    """States of older versions record no tasks; their next task is merged, whatever it is."""
    state = place / "state.safetensors"
    merge_files("average", place / "base.safetensors", [place / "t0.safetensors"], place / "a.safetensors", state=state)
    with safe_open(state, "pt") as opened:
        metadata = {key: value for key, value in opened.metadata().items() if key != "tasks"}
    save_file(load_file(state), state, metadata)
    one = merge_files(
        "average", place / "base.safetensors", [place / "t0.safetensors"], place / "b.safetensors", state=state
    )
    two = merge_files(
        "average", place / "base.safetensors", [place / "t0.safetensors"], place / "c.safetensors", state=state
    )
    assert (int(one.count), int(two.count)) == (2, 2)


@pytest.mark.slow
def test_memory_is_that_of_a_tensor_not_of_a_model(tmp_path):
    """Peak memory beyond imports, of models of 8 and of 64 equal tensors."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from cil.merging import on_disk\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "place = Path(sys.argv[1]); start = peak()\n"
        "base, task, out = (place / f'{name}.safetensors' for name in ('base', 't', 'o'))\n"
        "on_disk.merge_files(sys.argv[2], base, [task] * 2, out)\n"
        "print(peak() - start)\n"
    )
    grown = {}
    for count in (8, 64):
        place = tmp_path / str(count)
        place.mkdir()
        shapes = {f"blocks.{i}.a.weight": ((512, 512), torch.float32) for i in range(count)}  # a MiB each
        for file in ("base", "t"):
            with TensorWriter(place / f"{file}.safetensors", shapes) as writer:
                for i, name in enumerate(shapes):
                    writer.write(name, torch.randn(512, 512, generator=torch.Generator().manual_seed(i + len(file))))
        command = [sys.executable, "-c", code, place, "ties"]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
        grown[count] = float(found.stdout)
        shutil.rmtree(place)
    assert grown[64] < grown[8] + 20, grown  # 56 MiB more of base, as much of task, twice as much of state
