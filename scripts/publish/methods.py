"""Write the tables of learners, tuners, rules and finalisers in README.md and docs/, as the code has them, and
``cil/config/methods.json``, which holds the same names and the keys of all for commands that do not import torch.

A table stands between ``<!-- methods -->`` and ``<!-- /methods -->``. In place of ``methods`` there may be ``tuners``,
``rules`` or ``finalisers``. What a table says are attributes of classes (``summary``, ``trains``, ``order_free`` …), so
a new method needs no edit of a page. Run from the top folder of the checkout: ``python -m scripts.publish.methods``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from cil.config import Section
from cil.config.explaining import is_model, kinds_of
from cil.config.methods import FILE
from cil.learners import registry
from cil.merging.base import Rule
from cil.merging.configs import FINALISERS, RULES, FinaliserSection, RuleSection
from cil.merging.finalisers import Finaliser
from cil.tuning.configs import TunerSection
from scripts import ROOT
from scripts.publish.markdown import table

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
OPENING = re.compile(r"^<!-- (methods|tuners|rules|finalisers) -->$", re.MULTILINE)
MARK = re.compile(rf"({OPENING.pattern}\n)(.*?)(^<!-- /\2 -->$)", re.MULTILINE | re.DOTALL)
NEEDS = {None: "", "fisher": "Fisher information", "grams": "Gram matrices"}


def methods(page: Path) -> str:
    """Built-in learners, each linked to its page; in the README, which is short, a row per what they train."""
    rows, by_trained = [], defaultdict[str, list[str]](list)
    for name in registry.BUILTIN:
        link = os.path.relpath(ROOT / "docs" / "learners" / f"{name}.md", page.parent)
        cls = registry.resolve(name)
        rows.append([f"[`{name}`]({Path(link).as_posix()})", cls.summary, cls.trains])
        by_trained[cls.trains].append(rows[-1][0])
    if page == ROOT / "README.md":
        return table(["learners", "what they train"], [[", ".join(names), what] for what, names in by_trained.items()])
    return table(["learner", "what it does", "trains"], rows)


def tuners(page: Path) -> str:
    sections = {name_of(section): section for section in get_args(TunerSection)}
    return table(["tuner", "what it trains"], [[f"`{name}`", each.summary] for name, each in sections.items()])


def rules(page: Path) -> str:
    rows = [
        [f"`{name}`", described(rule), "no" if rule.order_free else "yes", rule.state_size, NEEDS[rule.needs]]
        for name, rule in RULES.items()
    ]
    return table(["rule", "what it does", "order matters", "state", "needs"], rows)


def finalisers(page: Path) -> str:
    return table(["finaliser", "what it does"], [[f"`{name}`", described(each)] for name, each in FINALISERS.items()])


TABLES: dict[str, Callable[[Path], str]] = {
    "methods": methods,
    "tuners": tuners,
    "rules": rules,
    "finalisers": finalisers,
}


def described(cls: type[Rule] | type[Finaliser]) -> str:
    """A summary with its source."""
    return f"{cls.summary} ({cls.paper})" if cls.paper else cls.summary


def index() -> str:
    """The text of ``methods.json``, from the classes: one line per learner, tuner, rule, finaliser and section."""
    sections: dict[str, dict[str, Any]] = {}
    learners = {}
    for name in registry.BUILTIN:
        cls = registry.resolve(name)
        facts = {"summary": cls.summary, "trains": cls.trains, "stores_images": cls.stores_images}
        learners[name] = {**facts, "keys": section_of(cls.Config, sections)}
    tuners = {name_of(one): part(one.summary, one) for one in get_args(TunerSection)}
    classes = {**RULES, **FINALISERS}
    configs = (*get_args(RuleSection), *get_args(FinaliserSection))
    rules = {name_of(one): part(classes[name_of(one)].summary, one) for one in configs}
    parts = {"learners": learners, "tuners": tuners, "rules": rules, "sections": dict(sorted(sections.items()))}
    blocks = []
    for kind, rows in parts.items():
        lines = (f"  {json.dumps(name)}: {json.dumps(row, ensure_ascii=False)}" for name, row in rows.items())
        blocks.append(f" {json.dumps(kind)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def name_of(section: type[Section]) -> str:
    """The name by which a configuration selects a section."""
    return str(section.model_fields["name"].default)


def part(summary: str, section: type[Section]) -> dict[str, str]:
    """What lists say of a tuner, rule or finaliser."""
    defaults = {key: field.get_default() for key, field in section.model_fields.items()}
    shown = (f"{key}: {value}" for key, value in defaults.items() if key not in ("name", "finalisers"))
    return {"summary": summary, "hyper_parameters": ", ".join(shown)}


def section_of(model: type[BaseModel], sections: dict[str, dict[str, Any]]) -> str:
    """The name of a class of keys in ``sections``, which it and all that it contains join."""
    name = f"{model.__module__.removeprefix('cil.')}.{model.__qualname__}"
    if name not in sections:
        sections[name] = {}
        for key, field in model.model_fields.items():
            sections[name][field.alias or key] = held(field.annotation, sections)
    return name


def held(annotation: Any, sections: dict[str, dict[str, Any]]) -> str | dict[str, str] | None:
    """What a key holds: the name of a section, a table of several by their own names, or None where keys are free."""
    kinds = kinds_of(annotation)
    models = [kind for kind in kinds if is_model(kind) and kind.model_config.get("extra") == "forbid"]
    if not models or not all(is_model(kind) for kind in kinds):
        return None
    if len(kinds) == 1:
        return section_of(models[0], sections)
    return {name_of(model): section_of(model, sections) for model in models}


def render(text: str, page: Path) -> str:
    """The text of a page with every table as the code has it.

    Raises:
        ValueError: A table that does not end.
    """
    found, marked = OPENING.findall(text), [match[2] for match in MARK.finditer(text)]
    if found != marked:
        raise ValueError(f"{page}: each of {', '.join(found)} needs a closing mark, <!-- /{found[0]} -->")
    return MARK.sub(lambda match: match[1] + TABLES[match[2]](page) + match[4], text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    check = parser.parse_args(arguments).check
    stale = []
    found = {page: render(page.read_text(encoding="utf-8"), page) for page in PAGES}
    for page, new in {**found, Path(str(FILE)): index()}.items():
        if not page.exists() or new != page.read_text(encoding="utf-8"):
            stale.append(page)
            if not check:
                page.write_text(new, encoding="utf-8")
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'out of date' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
