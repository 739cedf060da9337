"""Commands that list learners, tuners, rules, data, backbones and configurations, and create or check a learner."""

from __future__ import annotations

from typing import Annotated

import typer

from cil.cli.output import say


def list_(
    kind: Annotated[str, typer.Argument(help="learners, tuners, rules, datasets, backbones or configs")],
    pattern: Annotated[
        str,
        typer.Argument(
            help="Only names that match, in any case: a part of the name, as 'cifar', or with *, ? or [ a glob for the "
            "whole name, as 'vit_base*'."
        ),
    ] = "",
) -> None:
    """List the names that a configuration can use."""
    from rich.console import Console

    from cil.cli import listing

    Console().print(listing.table(kind, pattern))


def check_learner(
    learner: Annotated[str, typer.Argument(help="A name, pkg.module:Class or path/file.py:Class")],
    parameters: Annotated[list[str] | None, typer.Argument(help="key=value hyper-parameters")] = None,
) -> None:
    """Run the checks that every learner must pass; the exit code is 1 if one fails."""
    from rich.console import Console

    from cil.config.reading import override
    from cil.learners import registry

    cls = registry.resolve(learner)
    from cil.testing import check_learner as check

    console = Console()
    failed = 0
    for result in check(cls, override({}, parameters or [])):
        failed += not result.passed
        mark = "[green]ok[/]    " if result.passed else "[red]FAILED[/]"
        console.print(f"{mark} {result.name}", highlight=False)
        if not result.passed:
            console.print(f"       {result.message}", markup=False, highlight=False, soft_wrap=True)
    console.print("all checks passed" if not failed else f"{failed} checks failed")
    raise typer.Exit(1 if failed else 0)


def new_learner(
    name: Annotated[str, typer.Argument(help="Module name, e.g. my_method for my_method.py with class MyMethod.")],
) -> None:
    """Write NAME.py to this folder: a minimal learner that passes the checks."""
    import importlib.util
    import keyword
    from importlib.resources import files
    from pathlib import Path
    from string import Template

    from cil.errors import ConfigError

    path = Path(f"{name}.py")
    cls = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    if not (name.isidentifier() and cls.isidentifier()) or keyword.iskeyword(name):
        raise ConfigError(f"cil new-learner: {name!r} is not a valid module name; use letters, digits and _: my_method")
    if not path.exists() and importlib.util.find_spec(name) is not None:
        raise ConfigError(f"cil new-learner: {name} is a module of Python or of an installed package; choose another")
    text = (files("cil") / "templates" / "learner.py.txt").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(Template(text).substitute(Class=cls, name=name))
    except FileExistsError:
        raise ConfigError(f"cil new-learner: {path} exists already; choose another name or delete it") from None
    except OSError as error:
        raise ConfigError(f"cil new-learner: {path} cannot be written ({error.strerror})") from None
    say(f"{path}: class {cls}")
    say(f"check it:  cil check-learner {path}:{cls}")
    say(f"run it:    cil run quickstart 'learners=[ncm, {{class: \"{path}:{cls}\"}}]'")
