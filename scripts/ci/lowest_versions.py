"""Run the fast tests with the lowest versions of the dependencies that ``pyproject.toml`` declares.

Makes a virtual environment in which every requirement with a lower bound ``>=`` has exactly that version (those of the
package and of its extra ``test``), installs the package without dependencies, and runs the fast tests there. What these
packages require themselves is chosen by the installer: uv if there is one on the path, otherwise pip, which takes
longer. Use the lowest Python that the package supports: old versions have no wheels for newer ones.

    python -m scripts.ci.lowest_versions --python python3.10
    python -m scripts.ci.lowest_versions --python python3.10 --place ~/lowest tests/test_runner.py
    python -m scripts.ci.lowest_versions --list

Arguments that the script does not know go to pytest. It needs Python 3.11 or newer, and packaging. The installer reads
its own environment variables, e.g. for another index.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from scripts import ROOT

TESTS = ["-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-m", "not slow"]


def declared(project: dict, extras: set[str]) -> list[Requirement]:
    """The requirements of a ``[project]`` table and of some of its extras, with the extras that these name."""
    found, todo, done = [], list(project["dependencies"]), set[str]()
    for extra in sorted(extras):
        todo += project["optional-dependencies"][extra]
    done |= extras
    while todo:
        requirement = Requirement(todo.pop(0))
        if requirement.name != project["name"]:
            found.append(requirement)
            continue
        for extra in sorted(requirement.extras - done):
            todo += project["optional-dependencies"][extra]
        done |= requirement.extras
    return found


def lowest(requirement: Requirement) -> str:
    """``name==version`` at the lower bound, the highest if there are several; a requirement without one as it is."""
    bounds = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
    if not bounds:
        return str(requirement)
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    marker = f"; {requirement.marker}" if requirement.marker else ""
    return f"{requirement.name}{extras}=={max(bounds)}{marker}"


def pins(file: Path = ROOT / "pyproject.toml", extras: tuple[str, ...] = ("test",)) -> list[str]:
    """All requirements at their lower bounds; where two name one package, at the higher bound."""
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    merged: dict[str, Requirement] = {}
    for requirement in declared(project, set(extras)):
        known = merged.setdefault(canonicalize_name(requirement.name), requirement)
        if known is not requirement:
            known.specifier &= requirement.specifier
            known.extras |= requirement.extras
    return [lowest(requirement) for requirement in merged.values()]


def run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    ended = subprocess.run([str(part) for part in command], cwd=ROOT)
    if ended.returncode:
        sys.exit(ended.returncode)


def make(place: Path, python: str) -> Path:
    """Make a virtual environment with the lowest versions and the package in ``place``; returns its interpreter."""
    made, uv = place / "bin" / "python", shutil.which("uv")
    if uv:
        run(uv, "venv", "-q", "--clear", "--seed", "--python", python, place)
        install: list[str | Path] = [uv, "pip", "install", "-q", "--prerelease", "disallow", "--python", made]
    else:
        run(python, "-m", "venv", "--clear", place)
        install = [made, "-m", "pip", "install", "-q"]
    run(*install, *pins())
    run(*install, "--no-deps", ".")
    run(made, "-m", "pip", "check")
    return made


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run the fast tests with the lowest declared versions.")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment (default: this one)")
    parser.add_argument("--place", type=Path, help="folder of the environment; kept (default: a temporary one)")
    parser.add_argument("--list", action="store_true", help="print the versions and do nothing")
    given, tests = parser.parse_known_args(arguments)  # what is left goes to pytest
    if given.list:
        print("\n".join(pins()))
        return
    with tempfile.TemporaryDirectory() as temporary:
        place = given.place or Path(temporary) / "venv"
        python = make(place.absolute(), given.python)
        run(python, *TESTS, *tests)


if __name__ == "__main__":
    main()
