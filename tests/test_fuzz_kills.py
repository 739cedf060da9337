"""Killed calls of `cil learn`, `undo`, `forget` and `rename`; ``python -m scripts.fuzz.kills`` kills at random."""

from __future__ import annotations

import pytest

from cil.growing.events import read
from cil.growing.folder import ModelFolder
from scripts.fuzz import kills as fuzz


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    return fuzz.Kills(tmp_path_factory.mktemp("kills"))


@pytest.mark.slow
def test_a_call_killed_at_any_point_leaves_the_model_before_or_after_it(kills):
    points = list(kills.at_points())
    assert not kills.findings
    known = {"new", "learned", "saved", "commit", "committed", "changed", "named", "clean"}
    assert {point for _, point in points} == known and len(points) > 25
    assert {was for _, was in kills.counts} == {"before", "after"}


@pytest.mark.slow
def test_a_model_between_two_is_a_finding(kills, monkeypatch):
    """A commit in two steps, of which the first one forgets the lessons."""
    commit = ModelFolder.commit

    def in_two_steps(self, header):
        if (self.path / "metrics.json").exists():
            old = read(self.path)
            commit(self, {**old, "class_names": ["x", *old["class_names"][1:]]})
        commit(self, header)

    monkeypatch.setattr(ModelFolder, "commit", in_two_steps)
    number = kills.known["second lesson"][3].index("committed")
    kills.kill("second lesson", lambda folder: fuzz._die_at(folder, number), None)
    assert kills.findings
