"""Configurations that are wrong in ways no sane one is: values that choke a reader, numbers, names and paths."""

from __future__ import annotations

import doctest
import math
import time
import unicodedata

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

import cil.config.names
import cil.errors
from cil.config import Config, Section
from cil.config.names import MOST_BYTES, check_name, fitting
from cil.config.parsing import MOST_BYTES as LONGEST_TEXT
from cil.config.parsing import parse, to_yaml
from cil.config.reading import load_config, override, validated
from cil.errors import CilError, ConfigError, printable, shortened
from cil.runner.plan import plans
from cil.sweep.grid import LONGEST, flow, label_of
from cil.utils.paths import expand

FEW = settings(derandomize=True, deadline=None, max_examples=60)


@pytest.mark.parametrize("module", [cil.errors, cil.config.names])
def test_doctests(module):
    tried = doctest.testmod(module)
    assert tried.attempted and not tried.failed


def refused(action, *parts):
    """The one short line that an action is refused with, which has all of the parts."""
    with pytest.raises(CilError) as error:
        action()
    text = str(error.value)
    assert "\n" not in text and len(text) <= 500 and text.isprintable(), text
    for part in parts:
        assert part in text, text
    return text


# ---- YAML

TEN = ", ".join(["x"] * 10)
CHOKES = {
    "a twice-given key": ("a: 1\nb: {c: 1}\na: 3", "the key 'a' is given twice, in lines 1 and 3"),
    "one in a section": ("a:\n  b: 1\n  'b': 2", "the key 'b' is given twice, in lines 2 and 3"),
    "one in one line": ("{a: 1, a: 2}", "the key 'a' is given twice, in line 1"),
    "an integer of nothing": ("a: !!int ''", "line 1, column 4: '' is no integer"),
    "a number of letters": ("a: !!float x", "'x' is no number"),
    "a bool of digits": ("\n\na: !!bool 2", "line 3, column 4: '2' is no true or false"),
    "5,000 digits": ("a: " + "9" * 5000, "an integer of 5000 digits"),
    "5,000 hexadecimal ones": ("a: 0x" + "f" * 5000, "an integer of 5002 digits"),
    "depth 500": ("a: " + "[" * 500 + "]" * 500, "nested more than 50 levels deep"),
    "depth without an end": ("{a: " * 30_000, "nested more than 50 levels deep"),
    "a list in itself": ("a: &a [*a]", "the alias 'a' contains itself"),
    "a mapping merged into itself": ("a: &a {<<: *a}", "the alias 'a' contains itself"),
    "an alias bomb": (
        f"a0: &a0 [{TEN}]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
        "more than 100000 values, with all aliases expanded",
    ),
    "aliases as deep as a bomb is wide": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 400)),
        "nested more than 50 levels deep",
    ),
    "an alias of nothing": ("a: *" + "b" * 3000, "found undefined alias 'bbb"),
    "code": ("a: !!python/object/apply:os.system [x]", "the tag tag:yaml.org,2002:python/object/apply:os.system"),
    "bytes": ("a: !!binary 'x'", "the tag tag:yaml.org,2002:binary is unknown"),
    "a list as a key": ("? [1]\n: 2", "a key is a single value"),
    "a tab": ("a:\n\tb: 1", "line 2, column 1: found character '\\t' that cannot start any token; indent with spaces"),
    "a null character": ("a: 1\nb: \0", "line 2: the character '\\x00' is not allowed"),
    "half a surrogate pair": ("a: \ud800", "the character '\\ud800' is not allowed"),
    "two documents": ("--- 1\n--- 2", "another document"),
    "too long a text": ("a" * (LONGEST_TEXT + 1), "longer than"),
}


@pytest.mark.parametrize("what", CHOKES)
def test_what_chokes_a_yaml_reader_is_one_line_and_quickly(what):
    text, message = CHOKES[what]
    start = time.process_time()
    refused(lambda: parse(text, "c.yaml"), "c.yaml: ", message)
    assert time.process_time() - start < 2


def test_numbers_are_those_of_yaml_1_2_and_dates_are_texts():
    found = parse("[1e-5, 1E5, -.5e+3, 1.5e3, 12e03, 1.0e-2, 1, 0x10, 2024-13-45, 2024-01-31, =, 1e5x, e5, .e3]", "x")
    assert found == [1e-5, 1e5, -500, 1500, 12000, 0.01, 1, 16, "2024-13-45", "2024-01-31", "=", "1e5x", "e5", ".e3"]
    assert parse("a: &a {x: 1}\nb: {<<: *a, y: 2}", "x") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(["1e-5", "1E5", "=", "~"])
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


@FEW
@given(PLAIN)
def test_what_is_written_is_read_as_the_same(value):
    for text in (to_yaml(value), flow(value)):
        found = parse(text, "x")
        assert found == value and repr(found) == repr(value)


@FEW
@given(PLAIN)
def test_a_plain_value_is_what_pyyaml_reads(value):
    """Except where an exponent makes a number of what PyYAML takes for text."""
    text = yaml.safe_dump(value)
    if not any(sign in text for sign in ("e", "E")):
        assert parse(text, "x") == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: caf\xe9", "not UTF-8 text (byte 10 is 0xe9); save it as UTF-8"),
        ("learner: ncm".encode("utf-16"), "not UTF-8 text (byte 1 is 0xff)"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not UTF-8 text (byte 1 is 0x89)"),
        (b"", "expected keys and values, got nothing"),
        (b"learner: ncm\nextends: [1]", "extends: expected the name of a file, got [1]"),
        (b"learner: ncm\nextends: .", "is no file"),
        (b"learner: ncm\nextends: /dev/zero", "/dev/zero: is no file"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, message):
    (tmp_path / "c.yaml").write_bytes(content)
    refused(lambda: load_config(str(tmp_path / "c.yaml")), message)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfname: a\nlearner: ncm\n")
    assert load_config(str(tmp_path / "c.yaml")).name == "a"


def test_a_folder_is_no_configuration(tmp_path):
    refused(lambda: load_config(str(tmp_path)), "is a folder; give a YAML file in it")
    refused(lambda: load_config("x" * 3000), "255 per name")


# ---- overrides


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("orders.0={a: 1}", "orders is a list; give all of it: orders=[…]"),
        ("orders.0.x=1", "orders is a list"),
        ("stream.sizes.0=1", "stream.sizes is a list"),
        ("stream.increment.x=1", "stream.increment is a value, not a section"),
        ("a..b=1", "a..b is no key"),
        (".a=1", ".a is no key"),
        ("a.=1", "a. is no key"),
        ("=1", "an override is key=value"),
        (".".join("a" * 60) + "=1", "is no key"),
        ("learners.5.lr=1", "no learner '5'"),
        ("learners.ncm=1", "write learners.ncm.<key>=value"),
        ("stream.increment={a: 1, a: 2}", "given twice, in line 1"),
        ("stream.increment=" + "9" * 5000, "an integer of 5000 digits"),
        ("stream.increment=!!int ''", "'' is no integer"),
        ("x\n\x1b[31m=[", "not valid YAML"),
        ("x" * 5000, "an override is key=value"),
    ],
)
def test_wrong_paths_and_values_of_overrides(assignment, message):
    raw = {"orders": [1], "stream": {"increment": 2, "sizes": [1]}, "learners": ["ncm"]}
    refused(lambda: override(raw, [assignment]), message)


def test_a_long_name_among_many_learners_is_one_short_line():
    raw = {"learners": [{"name": "merge", "label": f"adapter_of_task_{i:04d}"} for i in range(99)]}
    with pytest.raises(CilError, match="no learner 'xxx") as refusal:
        override(raw, ["learners." + "x" * 500 + ".lr=1"])
    assert len(str(refusal.value)) <= 500


@pytest.mark.parametrize("learners", ["ncm", 5, None, {"a": 1}, [5], [[1]], []])
def test_overrides_of_learners_that_are_none(learners):
    """Whatever the configuration has for learners, an override of them is refused or validation refuses the whole."""
    for assignment in ("learner.lr=1", "learners.ncm.lr=1", "learners.5.lr=1", "learners.x=1"):
        with pytest.raises(CilError):
            validated(Config, override({"learners": learners}, [assignment]))


# ---- numbers


@pytest.mark.parametrize("number", [-1, 2**32, 5_000_000_000, 10**100, True, math.nan, math.inf, 0.5])
@pytest.mark.parametrize("key", ["orders", "seeds"])
def test_seeds_are_those_of_numpy(key, number):
    refused(lambda: validated(Config, {"learners": ["ncm"], key: [number]}), f"{key}.0: ")
    refused(lambda: validated(Config, {"learners": [{"name": "ncm", key: [number]}]}), f"learners.0.{key}.0: ")
    assert validated(Config, {"learners": ["ncm"], key: [0, 2**32 - 1]})


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("../../x", "unknown class order; allowed: natural"),
        ("1993", "unknown class order"),
        ([], "is empty"),
        ([0, 1, 0], "has 0 twice"),
        (["a", "b", "b"], "has 'b' twice"),
        ([-1, 0], "counted from 0"),
        ([0, True], "orders.0"),
    ],
)
def test_class_orders_are_checked_when_they_are_read(order, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        validated(Config, {"learners": ["ncm"], "orders": [order]})


def numeric_fields():
    """(section, field) of every number in the schema, the tuners, the rules, the strategies and all learners."""
    from cil.config.numbers import is_number
    from cil.learners.registry import BUILTIN, resolve

    def inside(model):
        for kind in model.__subclasses__():
            yield kind
            yield from inside(kind)

    for name in BUILTIN:
        resolve(name)
    ours = {kind for kind in inside(Section) if kind.__module__.startswith("cil.")}
    fields = [(kind, key) for kind in ours for key, info in kind.model_fields.items() if is_number(info.annotation)]
    return sorted(fields, key=lambda one: (one[0].__module__, one[0].__qualname__, one[1]))


def test_no_number_of_any_section_takes_what_cannot_be_computed_with():
    """nan, truth values and numbers beyond all ranges; infinity only where it means without limit."""
    tried = numeric_fields()
    assert len(tried) > 300
    for kind, key in tried:
        for value in (math.nan, True, False, 10**40, -(10**40), -1e39, math.inf, -math.inf, [math.nan], [True, 1]):
            if (key, value) in (("memory_gib", math.inf), ("feature_store_gib", math.inf)):
                continue
            with pytest.raises(ConfigError) as error:
                validated(kind, {key: value})
            assert any(line.startswith((f"{key}: ", f"{key}.")) for line in str(error.value).splitlines()), (kind, key)


def test_every_number_has_a_least_value():
    """None takes a large negative one but those whose sign has a meaning."""
    signed = {"mean", "scale", "orders", "seeds"}
    for kind, key in numeric_fields():
        if key not in signed:
            with pytest.raises(ConfigError):
                validated(kind, {key: -1_000_000})


def test_truth_is_no_number_in_ones_own_classes():
    class Own(Section):
        width: int = Field(1, alias="w")
        flag: bool = False
        either: int | bool = 1

    refused(lambda: validated(Own, {"w": True}), "w: should be a valid integer, got True")
    found = validated(Own, {"w": 2, "flag": True, "either": True})
    assert (found.width, found.flag, found.either) == (2, True, True)


def test_many_mistakes_are_not_all_told():
    class Own(BaseModel):
        many: list[int]

    with pytest.raises(ConfigError) as error:
        validated(Own, {"many": ["x" * 1000] * 500})
    lines = str(error.value).splitlines()
    assert len(lines) == 11 and "more mistakes" in lines[-1] and all(len(line) < 300 for line in lines)


# ---- names

PATHS = [
    *("", ".", "..", "../x", "../../escaped", "a/b", "/abs", "\\", "a\\b", " a", "a ", ".a", "a.", "a\nb", "a\tb"),
    *("\x1b[31m", "a\0b", "\u202egnp", "a\u200bb", "\ud800", "compare.html", "compare.png", "compare-12.png"),
    *("Compare.HTML", "tuned.yaml", "tuned.json", "backbones.json", "x" * (MOST_BYTES + 1), "é" * MOST_BYTES),
]


@pytest.mark.parametrize("name", PATHS, ids=range(len(PATHS)))
def test_no_name_acts_as_a_path(name):
    with pytest.raises(ConfigError, match=r"learners\.0\.label: "):
        validated(Config, {"learners": [{"name": "ncm", "label": name}]})
    refused(lambda: validated(Config, {"learners": ["ncm"], "name": name}), "name: ")
    refused(lambda: validated(Config, {"learners": [{"class": f"x.py:{name}"}]}), "learners.0: " if name else "")


@pytest.mark.parametrize("other", ["NCM", "ncm", "Ncm"])
def test_labels_that_a_file_system_takes_for_one(other):
    text = refused(lambda: validated(Config, {"learners": ["ncm", {"name": "slda", "label": other}]}), "two learners")
    assert "'ncm'" in text and other in text
    composed = [{"name": "ncm", "label": unicodedata.normalize(form, "é")} for form in ("NFC", "NFD")]
    refused(lambda: validated(Config, {"learners": composed}), "two learners")


@FEW
@given(st.text(max_size=300))
def test_a_files_name_is_made_fit_and_a_fit_one_stays(text):
    name = fitting(text)
    assert check_name(name) == name and fitting(name) == name
    assert validated(Config, {"learners": ["ncm"], "name": name}).name == name


@FEW
@given(st.text(max_size=300), st.text(max_size=300))
def test_labels_of_sweeps_are_names(key, value):
    label = label_of("ncm", [f"{key}={value}"])
    assert check_name(label) == label and len(label) <= LONGEST + 9


def test_a_configuration_may_be_called_anything(tmp_path):
    for name, wanted in (("my exp (1)", "my-exp-1"), ("été", "été"), ("a.b-c_d", "a.b-c_d"), (".yaml", "yaml")):
        file = tmp_path / f"{name}.yaml"
        file.write_text("learner: ncm")
        assert load_config(str(file)).name == wanted


def test_runs_stay_below_the_results_folder(tmp_path):
    config = validated(Config, {"learners": [{"name": "ncm", "label": "a b:c"}], "orders": [1, "natural", [1, 0]]})
    for plan in plans(config):
        place = (tmp_path / plan.place).resolve()
        assert place.parent.parent.parent == tmp_path.resolve()


# ---- paths


def test_paths_are_expanded_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    assert expand("~/r") == tmp_path / "r" and str(expand("$SCRATCH/${SCRATCH}x")) == "/scratch/scratchx"
    assert str(expand("a/$5/~")) == "a/$5/~" and str(expand("caf\udce9")) == "caf\udce9"
    for wrong in ("$UNSET/x", "${UNSET}", "$EMPTY/x", "~nobody_here/x", "a\0b", "x" * 256, "a/" * 5000, "\ud800"):
        refused(lambda wrong=wrong: expand(wrong))
        for section, key in (("data", "root"), ("backbone", "weights"), ("hardware", "feature_store")):
            raw = {"learners": ["ncm"], section: {key: wrong}}
            refused(lambda raw=raw: validated(Config, raw), f"{section}.{key}: ")
    found = validated(
        Config, {"learners": ["ncm"], "data": {"root": "~/d"}, "hardware": {"feature_store": "$SCRATCH/f"}}
    )
    assert found.data.root == tmp_path / "d" and str(found.hardware.feature_store) == "/scratch/f"


# ---- values in messages


@FEW
@given(PLAIN | st.text())
def test_a_value_in_a_message_is_short_and_on_one_line(value):
    for text in (shortened(value), shortened([value] * 50), shortened({"a": value}), printable(str(value))):
        assert text.isprintable()
    assert len(shortened([value] * 50)) <= 100
