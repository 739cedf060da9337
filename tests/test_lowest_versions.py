"""The versions that ``scripts.ci.lowest_versions`` installs, from a project written here."""

from __future__ import annotations

import pytest

pytest.importorskip("tomllib")  # in the standard library from Python 3.11 on

from scripts.ci.lowest_versions import pins

PROJECT = """
[project]
name = "thing"
dependencies = ["Some_Package>=1.9,<3", "plain", "old>=2; python_version < '3'"]

[project.optional-dependencies]
test = ["thing[more]", "some-package[fast]>=1.10", "tool~=4.1"]
more = ["other[a,b]>=0.6.1"]
docs = ["unused>=1"]
"""


def test_every_lower_bound_is_a_version_and_of_two_the_higher_one(tmp_path):
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    found = pins(tmp_path / "pyproject.toml")
    old = 'old==2; python_version < "3"'
    assert found == ["Some_Package[fast]==1.10", "plain", old, "tool~=4.1", "other[a,b]==0.6.1"]
