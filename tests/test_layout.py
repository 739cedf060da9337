"""The layout that CONTRIBUTING.md states: each part imports only the parts above it that its row names.

``python tests/test_layout.py`` prints the table as it would be now, and what then points upwards. Names resolved from
strings are not seen: the registry names the learners of ``cil/avalanche/`` so.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIGHT = (
    "cil",
    "cil.config",
    "cil.finished",
    "cil.stream",
    "cil.report",
    "cil.results",
    "cil.history",
    "cil.growing.summary",
    "cil.app",
    "cil.cli",
    "cil.store",
    "cil.prediction",
    "cil.sweep.grid",
    "cil.learners.registry",
)
"""What `cil --help`, a mistake in a configuration and `cil compare` import: they do not wait for torch."""


def part_of(module: str) -> str | None:
    """The part of the package that a dotted name belongs to, as the table writes it; None for the package itself."""
    top = module.split(".")[1] if "." in module else ""
    if (ROOT / "cil" / top / "__init__.py").exists() and top:
        return f"cil/{top}/"
    return f"cil/{top}.py" if top and (ROOT / "cil" / f"{top}.py").exists() else None


def parts() -> list[str]:
    """Every folder and module of the package; its own two faces, ``__init__`` and ``__main__``, are no part."""
    places = (ROOT / "cil").iterdir()
    found = {part_of(f"cil.{place.stem}") for place in places if not place.name.startswith("__")}
    return sorted(part for part in found if part)


def python_files(part: str) -> list[Path]:
    place = ROOT / part
    return sorted(place.rglob("*.py")) if place.is_dir() else [place]


def imported(text: str) -> Iterator[str]:
    """Dotted names of this package that a file imports, at its top or inside functions.

    What stands under ``if TYPE_CHECKING`` does not count: it is not executed.
    """
    todo: list[ast.AST] = [ast.parse(text)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "cil")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports inside the package are written with their whole name"
            if node.module == "cil":
                yield from (f"cil.{alias.name}" for alias in node.names)
            elif (node.module or "").startswith("cil."):
                yield str(node.module)
        else:
            todo += ast.iter_child_nodes(node)


@cache
def measured() -> dict[str, set[str]]:
    """Part → the other parts that its files import."""
    found: dict[str, set[str]] = {}
    for part in parts():
        names = [name for file in python_files(part) for name in imported(file.read_text(encoding="utf-8"))]
        through_the_face = [name for name in names if part_of(name) is None]
        assert not through_the_face, f"{part} imports {through_the_face} from cil itself; name the module"
        found[part] = {str(part_of(name)) for name in names} - {part}
    return found


def upwards(imports: dict[str, set[str]], order: list[str]) -> list[str]:
    """Imports that do not lead to an earlier place of ``order``."""
    place = {part: i for i, part in enumerate(order)}
    return [f"{a} imports {b}" for a in order for b in sorted(imports[a]) if place.get(b, len(order)) >= place[a]]


def rows() -> list[list[str]]:
    """The cells of the table in CONTRIBUTING.md: part, what it is, what it may import."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = text.split("| may import |", 1)[1].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `cil/")]


def stated() -> dict[str, set[str]]:
    """Part → what its row lets it import, in the table's order."""
    return {part.strip("`"): set(re.findall(r"`([^`]+)`", allowed)) for part, _, allowed in rows()}


def table() -> str:
    """The table's rows, in their order, with the last cells as measured; a part without a row comes at the end."""
    imports, what = measured(), {part.strip("`"): text for part, text, _ in rows()}
    order = [*(part for part in what if part in imports), *(part for part in imports if part not in what)]
    lines = []
    for part in order:
        allowed = ", ".join(f"`{name}`" for name in sorted(imports[part], key=order.index)) or "nothing"
        lines.append(f"| `{part}` | {what.get(part, '')} | {allowed} |")
    return "\n".join([*lines, "", *upwards(imports, order)])


def test_the_table_has_a_row_for_every_part():
    assert sorted(stated()) == parts()


def test_no_row_names_a_later_row_or_itself():
    assert upwards(stated(), list(stated())) == []


@pytest.mark.parametrize("part", parts())
def test_a_part_imports_what_its_row_names_and_all_of_it(part):
    found, allowed = measured()[part], stated()[part]
    assert not found - allowed, f"{part} imports {sorted(found - allowed)}, which its row in CONTRIBUTING.md omits"
    assert not allowed - found, f"{part} imports no {sorted(allowed - found)}; take it out of the row"


def test_imports_are_found_wherever_they_are_executed():
    text = """
import cil.store
from cil import metrics
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from cil.runner import run
else:
    import cil.errors as wrong
class A:
    def f(self):
        from cil.stream.protocol import Row
"""
    assert sorted(imported(text)) == ["cil.errors", "cil.metrics", "cil.store", "cil.stream.protocol"]
    assert part_of("cil.stream.protocol") == "cil/stream/" and part_of("cil.metrics") == "cil/metrics.py"
    assert part_of("cil") is part_of("cil.Learner") is None
    circle = {"a": {"b"}, "b": {"a"}}
    assert upwards(circle, ["a", "b"]) == ["a imports b"] and upwards({"a": set(), "b": {"a"}}, ["a", "b"]) == []


def test_the_light_modules_do_not_import_torch():
    code = f"import sys, importlib\nfor name in {LIGHT}:\n    importlib.import_module(name)\n    "
    code += "assert not {'torch', 'starlette', 'uvicorn'} & sys.modules.keys(), name"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert found.returncode == 0, found.stderr


if __name__ == "__main__":
    print(table())
