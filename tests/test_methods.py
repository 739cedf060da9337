"""Every built-in learner, tuner, rule and finaliser says what it does in one phrase, which lists and tables show."""

from __future__ import annotations

import doctest
from collections import Counter
from typing import get_args

import pytest
import torch

from cil import Learner
from cil.cli import listing
from cil.config import LearnerEntry
from cil.config import methods as config_methods
from cil.config.methods import FILE
from cil.errors import ConfigError
from cil.learners import registry
from cil.merging.configs import FINALISERS, RULES
from cil.tuning.configs import TunerSection
from scripts import ROOT
from scripts.publish import methods

KINDS = {
    "learners": {name: registry.resolve(name) for name in registry.BUILTIN},
    "tuners": {methods.name_of(section): section for section in get_args(TunerSection)},
    "rules": RULES,
    "finalisers": FINALISERS,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_built_in_has_a_summary_of_its_own(kind):
    found = {name: vars(cls).get("summary", "") for name, cls in KINDS[kind].items()}
    missing = [name for name, summary in found.items() if not summary]
    assert not missing, f"no summary in the class itself: {missing}"
    repeated = [summary for summary, times in Counter(found.values()).items() if times > 1]
    assert not repeated
    for name, summary in found.items():
        assert len(summary) <= 90 and not summary.endswith(".") and "|" not in summary, name


def test_every_built_in_learner_says_what_it_trains():
    assert not [name for name, cls in KINDS["learners"].items() if not cls.trains]


@pytest.mark.parametrize("rule", RULES)
def test_the_state_of_a_rule_is_as_large_as_it_says(rule):
    """At its defaults, on one linear weight and its bias; that of a rule that grows is empty before the first task."""
    made = RULES[rule]().start(
        {"blocks.0.weight": torch.zeros(6, 4), "blocks.0.bias": torch.zeros(6)}, linear=["blocks.0.weight"]
    )
    spec = [slot for entry in made.layout.entries for slot in made.state_spec(entry).values()]
    assert bool(spec) != made.grows == made.state_size.startswith("every update")
    if made.grows:
        return
    numbers = sum(torch.Size(shape).numel() for shape, _ in spec)
    grams = 16 if "Gram" in made.state_size else 0
    of_linear = {"tsv_m": 4 * (6 + 4 + 2) + 6, "wudi": 30 + 24 + grams}  # [6, 4] has 4 directions; the bias is summed
    assert numbers == of_linear.get(rule, grams + (60 if made.state_size.startswith("2 P") else 30))
    doubles = sum(torch.Size(shape).numel() for shape, dtype in spec if dtype == torch.float64)
    assert doubles == (grams + 24 if grams else 0)


class Custom(Learner):
    """A learner without a summary.

    More about it.
    """

    def learn(self, task, ctx):
        raise NotImplementedError

    def logits(self, features):
        raise NotImplementedError


class Further(registry.resolve("ranpac")):
    """RanPAC, but different."""


def test_a_custom_learner_is_listed_by_its_docstring():
    assert (listing.summary_of(Custom), listing.trained_by(Custom)) == ("A learner without a summary.", "–")
    assert listing.summary_of(Further) == "RanPAC, but different."  # not what its base class says
    assert listing.trained_by(Further) == Further.trains != ""


def test_the_readme_has_the_table_of_methods():
    assert "methods" in methods.OPENING.findall((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", methods.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_say_what_the_code_says(page):
    """If not: ``python -m scripts.publish.methods``."""
    text = page.read_text(encoding="utf-8")
    assert methods.render(text, page) == text


def test_the_index_that_needs_no_torch_says_what_the_classes_say():
    """If not: ``python -m scripts.publish.methods``."""
    assert FILE.read_text(encoding="utf-8") == methods.index()


@pytest.mark.parametrize(
    ("learner", "given"),
    [
        ("ranpac", {"projectin": 5}),
        ("ranpac", {"projection": 5, "zzz": 1}),
        ("ease", {"tuner": {"name": "adapter", "botleneck": 3}, "lr": 0.1}),
        ("merge", {"rule": {"name": "opcm", "alph": 0.5}, "batch_size": 4}),
        ("tuna", {"head_lr": 0.1}),
        ("avalanche", {"strategy": {"name": "LwF", "alfa": 2}}),
    ],
)
def test_a_misspelt_key_reads_the_same_before_and_after_the_learner_is_imported(learner, given):
    entry = LearnerEntry.model_validate({"name": learner, "label": "mine", **given})
    with pytest.raises(ConfigError) as early:
        registry.require_keys(entry)
    with pytest.raises(ConfigError) as late:
        registry.configure(entry)
    assert str(early.value) == str(late.value) != ""


def test_every_default_and_what_only_a_learner_can_judge_pass_the_early_check():
    for name, cls in KINDS["learners"].items():
        required = {key: {"rule": "opcm"}[key] for key, field in cls.Config.model_fields.items() if field.is_required()}
        entry = LearnerEntry.model_validate({"name": name, **cls.Config(**required).model_dump(by_alias=True)})
        registry.require_keys(entry)
    own = {"class": "mine.py:Mine", "anything": 1}
    for parameters in ({"tuner": own}, {"tuner": "adaptr"}, {"lr": "much"}, {"tuner": {"name": "adaptr", "width": 1}}):
        registry.require_keys(LearnerEntry.model_validate({"name": "aper", **parameters}))
    registry.require_keys(LearnerEntry.model_validate(own))


@pytest.mark.parametrize("kind", methods.TABLES)
def test_a_table_is_replaced_between_its_marks(kind):
    page = ROOT / "docs" / "learners" / "index.md"
    text = f"before\n<!-- {kind} -->\nold\n<!-- /{kind} -->\nafter\n"
    before, opening, head, _, *rows, closing, after = methods.render(text, page).splitlines()
    assert (before, opening, closing, after) == ("before", f"<!-- {kind} -->", f"<!-- /{kind} -->", "after")
    names = [row.split("`")[1] for row in rows]
    assert names == list(KINDS.get(kind, KINDS["learners"])) and "what it" in head
    assert "(ncm.md)" in rows[0] if kind == "methods" else True
    with pytest.raises(ValueError, match="closing mark"):
        methods.render(text.replace(f"/{kind}", "/other"), page)


def test_examples_in_docstrings():
    for module in (listing, config_methods):
        assert doctest.testmod(module).failed == 0 < doctest.testmod(module).attempted
