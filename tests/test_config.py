"""Configurations: what is written back, what is inherited, and how a mistake is worded."""

from __future__ import annotations

import doctest

import pytest
import yaml

import cil.config.reading
from cil.config import Config
from cil.config.reading import find, load_config, override, shipped
from cil.config.renamed import current_keys
from cil.errors import ConfigError, PluginError
from cil.learners import registry
from cil.runner.plan import dump, plans


def test_doctests():
    assert doctest.testmod(cil.config.reading).failed == 0


def write(tmp_path, text, name="c.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learner: ncm\nstream: {incremnt: 2}", r"config: unknown key stream\.incremnt \(did you mean 'increment'\?\)"),
        ("learner: ncm\nstreem: {}", r"unknown key streem \(did you mean 'stream'\?\)"),
        (
            "learner: ncm\ntransform: {augment: {flipp: 1}}",
            r"unknown key transform\.augment.*flipp \(did you mean 'flip'\?\)",
        ),
        ("learner: ncm\nstream: {increment: two}", r"stream\.increment: should be a valid integer.*got 'two'"),
        ("learner: ncm\nstream: {increment: 0}", r"stream\.increment: should be greater than 0, got 0"),
        ("learner: ncm\nstream: {validation: 1.5}", r"stream\.validation: should be less than 1, got 1\.5"),
        ("name: x", "learners is missing"),
        ("learner: ncm\nlearners: [ncm]", "give learner or learners, not both"),
        ("learners: [ncm, ncm]", "two learners are called 'ncm'.*give each a label"),
        ("learners: [{metric: cosine}]", "give a learner either a name or a class"),
        ("- a\n- b", "expected keys and values, got list"),
        ("a: [", "not valid YAML"),
        ("learner: ncm\nprecision: fp8", "precision: should be 'fp32', 'bf16', 'fp16' or 'auto', got 'fp8'"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_all_mistakes_are_reported_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, "learner: ncm\nstream: {incremnt: 2, initial_classes: -1}\nseeds: []"))
    assert len(str(error.value).splitlines()) == 3


RENAMED = {
    "batch_size=64": "the key batch_size is now called inference_batch_size",
    "stream.base=4": "the key stream.base is now called stream.initial_classes",
    "learners.slca.backbone_lr=0.1": "learner slca: the key backbone_lr is now called backbone_lr_factor",
    "learners.mos.head_lr=2": "learner mos: the key head_lr is now called head_lr_factor",
    "learners.merge.sigma=2": "learner merge: the key sigma is now called head_scale",
    "learners.ssiat.sigma=2": "learner ssiat: the key sigma is now called drift_bandwidth",
    "learners.rsiat.projector_lr=2": "learner rsiat: the key projector_lr is now called projector_lr_factor",
}


@pytest.mark.parametrize("assignment", RENAMED)
def test_a_renamed_key_is_an_error_that_names_the_new_one(tmp_path, assignment):
    learners = "[slca, mos, merge, ssiat, rsiat]"
    with pytest.raises(ConfigError) as error:
        file = write(tmp_path, f"learners: {learners}\nstream: {{increment: 2}}")
        list(plans(load_config(file, [assignment])))
    assert str(error.value).removeprefix("config: ") == RENAMED[assignment]


def test_a_renamed_base_names_its_new_key(tmp_path):
    with pytest.raises(ConfigError, match=r"c\.yaml: the key base is now called extends; write extends: below\.yaml"):
        load_config(write(tmp_path, "base: below.yaml"))


def test_a_stored_configuration_is_read_with_todays_keys(tmp_path):
    """What was stored before the keys were renamed validates, and with the same values."""
    old = {
        "learners": [{"name": "merge", "head_lr": 3.0, "sigma": 2.0}],
        "stream": {"base": 4, "increment": 2},
        "batch_size": 64,
    }
    [plan] = plans(Config.model_validate(current_keys(old)))
    assert plan.config.stream.initial_classes == 4 and plan.config.inference_batch_size == 64
    assert (plan.parameters.head_lr_factor, plan.parameters.head_scale) == (3.0, 2.0)
    assert current_keys(current_keys(old)) == current_keys(old)


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        ("{name: nmc}", PluginError, "unknown learner 'nmc' .did you mean 'ncm'"),
        ("{name: ncm, metrik: cosine}", ConfigError, r"learner ncm: unknown key metrik \(did you mean 'metric'"),
        ("{name: finetune, lr: -1}", ConfigError, "learner finetune: lr: should be greater than 0, got -1"),
        ("{class: 'no.such.module:X'}", PluginError, "importing no.such.module failed with ModuleNotFoundError"),
        ("{class: 'nowhere.py:X'}", PluginError, "no such file nowhere.py"),
        ("{class: 'cil.stream:Stream'}", PluginError, "must be a subclass of cil.Learner"),
        ("{class: 'cil.learners.ncm:NCMLerner'}", PluginError, "did you mean 'NCMLearner'"),
    ],
)
def test_wrong_learners_are_named_before_anything_runs(tmp_path, entry, kind, message):
    config = load_config(write(tmp_path, f"learners: [{entry}]\nstream: {{increment: 2}}"))
    with pytest.raises(kind, match=message):
        list(plans(config))


def test_a_class_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from cil.learners.ncm import NCMLearner\nclass Mine(NCMLearner):\n    pass\n")
    cls = registry.resolve(f"{file}:Mine")
    assert cls.__name__ == "Mine"
    with pytest.raises(PluginError, match=r"has no 'Mein' .did you mean 'Mine'"):
        registry.resolve(f"{file}:Mein")
    file.write_text("raise RuntimeError('boom')")
    with pytest.raises(PluginError, match="RuntimeError: boom"):
        registry.resolve(f"{file}:Mine")


def test_an_installed_packages_learner_is_found(tmp_path, monkeypatch):
    (tmp_path / "lab.py").write_text("from cil.learners.ncm import NCMLearner\nclass Mine(NCMLearner):\n    pass\n")
    info = tmp_path / "lab-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[cil.learners]\nlab_means = lab:Mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert registry.resolve("lab_means").__name__ == "Mine"
    with pytest.raises(PluginError, match="did you mean 'lab_means'"):
        registry.resolve("lab_maens")


def test_overrides_reach_everything():
    raw = {"learners": ["ncm", {"name": "finetune", "label": "slow"}], "stream": {"increment": 2}}
    found = override(
        raw, ["learners.ncm.metric=euclidean", "learners.slow.lr=1e-3", "stream.sizes=[1, 9]", "hardware.workers=0"]
    )
    assert found["learners"] == [
        {"name": "ncm", "metric": "euclidean"},
        {"name": "finetune", "label": "slow", "lr": 1e-3},
    ]
    assert found["stream"]["sizes"] == [1, 9] and found["hardware"] == {"workers": 0}
    assert raw["learners"][0] == "ncm"  # the argument is left alone
    assert override({"learner": "ncm"}, ["learner.metric=cosine"]) == {"learner": {"name": "ncm", "metric": "cosine"}}
    assert override({"learners": ["ncm"]}, ["learner.metric=cosine"])["learners"] == [
        {"name": "ncm", "metric": "cosine"}
    ]
    assert override({"learners": ["ncm"]}, ["learner=joint"]) == {"learner": "joint"}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stream.increment", "an override is key=value"),
        ("name.x=1", "name is a value, not a section"),
        ("learner.lr=1", "2 learners; write learners.<name>.lr"),
        ("learners.nmc.lr=1", "no learner 'nmc' .did you mean 'ncm'"),
        ("stream.sizes=[", "not valid YAML"),
        ("learners.ncm=1", r"write learners\.ncm\.<key>=value"),
    ],
)
def test_wrong_overrides_are_named(assignment, message):
    with pytest.raises(ConfigError, match=message):
        override({"name": "x", "learners": ["ncm", "finetune"], "stream": {}}, [assignment])


def test_extends_is_one_level(tmp_path):
    write(tmp_path, "learner: ncm\nstream: {increment: 2, initial_classes: 4}\nseeds: [1]", "below.yaml")
    config = load_config(write(tmp_path, "extends: below.yaml\nstream: {increment: 5}\nlearners: [joint]"))
    assert config.stream.increment == 5 and config.stream.initial_classes == 4 and config.seeds == [1]
    assert [e.name for e in config.learners] == ["joint"] and config.name == "c"
    write(tmp_path, "extends: below.yaml", "middle.yaml")
    with pytest.raises(ConfigError, match="one level"):
        load_config(write(tmp_path, "extends: middle.yaml"))
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_config(write(tmp_path, "extends: none.yaml"))


def test_scientific_notation_is_a_number(tmp_path):
    config = load_config(write(tmp_path, "learner: {name: finetune, lr: 1e-3}"))
    assert next(plans(config)).parameters.lr == 0.001


def test_resolved_config_runs_again_to_the_same(tmp_path):
    config = load_config(
        write(
            tmp_path,
            "learners: [ncm, {name: finetune, label: slow, lr: 0.001}]\norders: [1993, natural]\nseeds: [0, 1]",
        )
    )
    todo = list(plans(config))
    assert len(todo) == 8
    assert str(todo[0].place) == "c/ncm/order1993-seed0" and str(todo[-1].place) == "c/slow/ordernatural-seed1"
    for plan in todo:
        text = yaml.safe_dump(dump(plan.config))
        again = load_config(write(tmp_path, text, "again.yaml"))
        assert dump(next(plans(again)).config) == dump(plan.config)


def test_learners_may_have_orders_of_their_own(tmp_path):
    config = load_config(write(tmp_path, "learners: [ncm, {name: joint, orders: [1], seeds: [5]}]\norders: [1, 2, 3]"))
    assert [p.place.as_posix() for p in plans(config)] == [
        "c/ncm/order1-seed0", "c/ncm/order2-seed0", "c/ncm/order3-seed0", "c/joint/order1-seed5",
    ]  # fmt: skip


def test_learners_may_say_how_their_own_settings_were_chosen(tmp_path):
    text = "learners: [ncm, {name: joint, chosen_by: paper}, {name: slda, chosen_by: default}]\nchosen_by: first_task"
    found = list(plans(load_config(write(tmp_path, text))))
    assert [plan.config.chosen_by for plan in found] == ["first_task", "paper", "default"]
    assert all("chosen_by" not in dump(plan.config)["learners"][0] for plan in found)  # said once


def test_explicit_orders_have_a_folder_of_their_own(tmp_path):
    config = load_config(write(tmp_path, "learner: ncm\norders: [[2, 0, 1], [0, 1, 2]]"))
    names = [p.place.name for p in plans(config)]
    assert len(set(names)) == 2 and all(n.startswith("orderlist") for n in names)


@pytest.mark.parametrize("name", shipped())
def test_shipped_configs_are_valid(name):
    config = load_config(name)
    assert isinstance(config, Config) and list(plans(config))
    assert find(f"configs/{name}.yaml").samefile(find(name))


def test_unknown_config_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        load_config("quickstrat")
