"""Commands about what a configuration can name: list it; start and check a learner of one's own."""

from __future__ import annotations

from typing import Annotated

import typer


def list_(
    what: Annotated[str, typer.Argument(help="learners, tuners, rules, datasets, backbones or configs")],
    pattern: Annotated[str, typer.Argument(help="Only names that match, e.g. 'vit_base*' (backbones).")] = "",
) -> None:
    """List what can be named in a configuration."""
    from rich.console import Console

    from cil import catalogue

    kinds = {
        "learners": catalogue.learners,
        "tuners": catalogue.tuners,
        "rules": catalogue.rules,
        "datasets": catalogue.datasets,
        "backbones": catalogue.backbones,
        "configs": catalogue.configs,
    }
    if what not in kinds:
        from cil.errors import ConfigError, nearest

        raise ConfigError(f"cil list {what}: unknown{nearest(what, kinds)}; allowed: {', '.join(kinds)}")
    Console().print(kinds[what](pattern))


def check_learner(
    learner: Annotated[str, typer.Argument(help="A name, pkg.module:Class or path/file.py:Class")],
    parameters: Annotated[list[str] | None, typer.Argument(help="key=value hyper-parameters")] = None,
) -> None:
    """Run the checks that every learner must pass; exits with 1 if one fails."""
    from rich.console import Console

    from cil.configfile import override
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
    name: Annotated[str, typer.Argument(help="What it is called, e.g. my_method: NAME.py with a class MyMethod.")],
) -> None:
    """Write NAME.py here: a learner to start from, which passes the checks."""
    import importlib.util
    import keyword
    from importlib.resources import files
    from pathlib import Path
    from string import Template

    from cil.errors import ConfigError

    path = Path(f"{name}.py")
    cls = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    if not (name.isidentifier() and cls.isidentifier()) or keyword.iskeyword(name):
        raise ConfigError(f"cil new-learner: {name!r} is no name for a module; use letters, digits and _, as my_method")
    if not path.exists() and importlib.util.find_spec(name) is not None:
        raise ConfigError(f"cil new-learner: {name} is a module of Python or of an installed package; choose another")
    text = (files("cil") / "templates" / "learner.py.txt").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(Template(text).substitute(Class=cls, name=name))
    except FileExistsError:
        raise ConfigError(f"cil new-learner: {path} exists already; choose another name, or remove it") from None
    except OSError as error:
        raise ConfigError(f"cil new-learner: {path} cannot be written ({error.strerror})") from None
    typer.echo(f"{path}: class {cls}")
    typer.echo(f"check it:  cil check-learner {path}:{cls}")
    typer.echo(f"run it:    cil run quickstart 'learners=[ncm, {{class: \"{path}:{cls}\"}}]'")
