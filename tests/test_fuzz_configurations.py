"""A short round of the fuzzer of configurations; ``python -m scripts.fuzz.configurations`` makes 10,000."""

from __future__ import annotations

import pytest

from cil.errors import CilError
from scripts.fuzz import configurations
from scripts.fuzz.mutations import case, places


@pytest.fixture
def fuzzer(tmp_path):
    return configurations.Fuzzer(tmp_path, shipped_seeds=1)


def test_mutated_configurations_are_accepted_or_refused_in_one_line(fuzzer):
    for number in range(150):
        fuzzer.try_one(number, run_it=number % 50 == 0)
    fuzzer.check_nothing_escaped()
    assert not fuzzer.findings
    assert set(fuzzer.counts) >= {"accepted", "refused"} and fuzzer.counts["accepted"] > 10


def test_a_case_is_the_same_for_the_same_seed(fuzzer):
    cases = [case(number, 0, fuzzer.known) for number in range(20)]
    assert cases == [case(number, 0, fuzzer.known) for number in range(20)]
    assert len({one.text for one in cases}) > 10
    assert cases != [case(number, 1, fuzzer.known) for number in range(20)]
    assert places({"a": [1, {"b": 2}]}) == [("a",), ("a", 0), ("a", 1), ("a", 1, "b")]


@pytest.mark.parametrize(
    ("error", "finding"),
    [
        (KeyError("x"), "KeyError"),
        (CilError("x" * 501), "1 lines"),
        (CilError("a\n\nb"), "3 lines"),
        (CilError("a\x1b[31m"), "1 lines"),
        (CilError("\n".join("abcdefghijkl")), "12 lines"),
    ],
)
def test_what_no_configuration_may_do_is_a_finding(fuzzer, monkeypatch, error, finding):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(configurations, "load_config", fail)
    fuzzer.try_one(0)
    assert len(fuzzer.findings) == 1 and finding in fuzzer.findings[0]


def test_a_slow_one_and_a_file_elsewhere_are_findings(fuzzer, monkeypatch, tmp_path):
    monkeypatch.setattr(configurations, "MOST_SECONDS", -1.0)
    fuzzer.try_one(0)
    (tmp_path / "escaped").touch()
    fuzzer.check_nothing_escaped()
    assert ["took" in fuzzer.findings[0], "escaped" in fuzzer.findings[1]] == [True, True]
