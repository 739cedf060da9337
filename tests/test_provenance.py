"""Which code a run is of: the commit, marked where what computes differs from it and not where a page does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cil.runner.provenance import checkout


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    command = ["git", *identity, *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("cil/learners", "cil/runner", "results"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("cil/runner/benchmark.py", "cil/learners/ncm.py", "pyproject.toml", "results/README.md", ".gitignore"):
        (tmp_path / name).write_text("__pycache__/\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_a_clean_checkout_is_its_commit_whether_tagged_or_not(root: Path) -> None:
    commit = git(root, "rev-parse", "HEAD")
    assert len(commit) == 40 and checkout(root) == commit
    git(root, "tag", "-a", "v1", "-m", "one")
    assert checkout(root) == commit


@pytest.mark.parametrize("page", ["results/README.md", "results/figure.png", "notes.txt", "cil/__pycache__/runner.pyc"])
def test_pages_and_figures_do_not_mark_a_run(root: Path, page: str) -> None:
    (root / page).parent.mkdir(exist_ok=True)
    (root / page).write_text("rewritten between two runs")
    assert checkout(root) == git(root, "rev-parse", "HEAD")


@pytest.mark.parametrize(
    "source", ["cil/runner/benchmark.py", "cil/learners/ncm.py", "cil/learners/mine.py", "pyproject.toml"]
)
@pytest.mark.parametrize("staged", [False, True])
def test_code_in_no_commit_marks_a_run(root: Path, source: str, staged: bool) -> None:
    (root / source).write_text("other")
    if staged:
        git(root, "add", ".")
    assert checkout(root) == git(root, "rev-parse", "HEAD") + "-dirty"


def test_a_removed_module_marks_a_run(root: Path) -> None:
    (root / "cil" / "learners" / "ncm.py").unlink()
    assert checkout(root).endswith("-dirty")


def test_without_a_commit_or_git_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "--quiet")
    assert checkout(tmp_path) == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout(tmp_path) == "unknown"
