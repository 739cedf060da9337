"""Commands about what a configuration can name: list it, check a learner of one's own."""

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
