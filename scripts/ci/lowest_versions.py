"""Run the fast tests with the lowest versions of the dependencies that ``pyproject.toml`` declares.

Makes a virtual environment in which every requirement with a lower bound ``>=`` has exactly that version (those of the
package and of its extra ``test``), installs the package without dependencies, and runs the fast tests there. What these
packages require themselves is chosen by pip. Use the lowest Python that the package supports: old versions have no
wheels for newer ones.

    python -m scripts.ci.lowest_versions --python python3.10
    python -m scripts.ci.lowest_versions --list

Needs Python 3.11 or newer to run, and packaging. pip reads its own environment variables, e.g. for another index.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

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
    """``name==version`` at the lower bound; a requirement without one as it is."""
    bounds = [part.version for part in requirement.specifier if part.operator == ">="]
    if not bounds:
        return str(requirement)
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}=={bounds[0]}"


def pins(file: Path = ROOT / "pyproject.toml", extras: tuple[str, ...] = ("test",)) -> list[str]:
    """All requirements at their lower bounds; where two name one package, at the higher bound."""
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    merged: dict[str, Requirement] = {}
    for requirement in declared(project, set(extras)):
        known = merged.setdefault(requirement.name.lower(), requirement)
        if known is not requirement:
            known.specifier &= requirement.specifier
            known.extras |= requirement.extras
    return [lowest(requirement) for requirement in merged.values()]


def run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    ended = subprocess.run([str(part) for part in command], cwd=ROOT)
    if ended.returncode:
        sys.exit(ended.returncode)


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
        place = (given.place or Path(temporary) / "venv").absolute()
        run(given.python, "-m", "venv", "--clear", place)
        python = place / "bin" / "python"
        run(python, "-m", "pip", "install", "-q", *pins())
        run(python, "-m", "pip", "install", "-q", "--no-deps", ".")
        run(python, "-m", "pip", "check")
        run(python, *TESTS, *tests)


if __name__ == "__main__":
    main()
