"""Commands for many settings of one benchmark: run all of them, or select one."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cil.cli.benchmark import Redo, Results, is_main_process, show_results
from cil.cli.output import say

if TYPE_CHECKING:
    from cil.sweep.pool import Result

Source = Annotated[
    str, typer.Argument(help="A YAML file, or the name of a shipped configuration (see: cil list configs).")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value for all runs, as for cil run")]
Grid = Annotated[
    list[str] | None,
    typer.Option(help="KEY=VALUE,VALUE, e.g. learner.lr=0.1,0.01 or learners.ncm.metric=…; repeatable, for a product."),
]


def sweep(
    config: Source,
    overrides: Overrides = None,
    grid: Grid = None,
    orders: Annotated[str | None, typer.Option(help="Class orders, e.g. 1993,1,natural; short for orders=[…].")] = None,
    seeds: Annotated[str | None, typer.Option(help="Training seeds, e.g. 0,1; short for seeds=[…].")] = None,
    results: Results = Path("results"),
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Simultaneous runs; default: one per GPU, without GPUs one per core."),
    ] = None,
    cpus_per_run: Annotated[
        int | None, typer.Option(min=1, help="CPUs and threads per run; default: an equal share; on a cluster 1.")
    ] = None,
    gpus_per_run: Annotated[
        float | None, typer.Option(min=0, help="GPUs per run, may be a fraction; default: 1 if there are any.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster: auto, HOST:PORT or ray://HOST:PORT; default: this machine.")
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="Further attempts of a run whose process died.")] = 1,
    redo: Redo = False,
    print_: Annotated[
        bool, typer.Option("--print", help="Run nothing; print the cil run command of each run, one per line.")
    ] = False,
) -> None:
    """Run a benchmark at every point of a grid, several at a time, on Ray. Run the same command again to resume.

    Each point is a separate learner in the results, e.g. ranpac_strength=10. Finished runs are skipped. If a run fails,
    the others still run, and the exit code is 1.
    """
    from rich.console import Console

    from cil.sweep.grid import trials

    lists = [f"{key}=[{text}]" for key, text in (("orders", orders), ("seeds", seeds)) if text is not None]
    console = Console(stderr=print_)
    with console.status("checking every setting …"):
        todo = trials(config, [*(overrides or []), *lists], grid or [])
    if print_:
        for trial in todo:
            say(trial.line(results))
        return
    from cil.sweep.pool import Resources
    from cil.sweep.pool import sweep as run_all

    resources = Resources(jobs, cpus_per_run, gpus_per_run, address, retries)
    try:
        ended = run_all(todo, results, resources, redo=redo, say=say)
    except KeyboardInterrupt:
        say("\nstopped. Finished stages are kept; run the same command to resume.")
        raise typer.Exit(130) from None
    failed = [result for result in ended if result.outcome.state == "failed"]
    _summary(ended)
    if len(failed) < len(ended):
        show_results(results / todo[0].plan.config.name)
    if failed:
        raise typer.Exit(1)


def _summary(ended: Sequence[Result]) -> None:
    """Print the outcome of each run, with the reason and the log of a failure, and the totals."""
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "outcome", "attempts", "reason", box=None, pad_edge=False)
    for result in ended:
        reason = f"{result.outcome.reason}; {result.outcome.log}" if result.outcome.state == "failed" else ""
        table.add_row(result.trial.title, result.outcome.state, str(result.attempts), reason)
    states = [result.outcome.state for result in ended]
    counted = ", ".join(f"{states.count(state)} {state}" for state in ("ran", "finished", "failed"))
    console = Console()
    Console(width=console.width if console.is_terminal else 10_000, markup=False).print("", table, "", sep="\n")
    say(f"{len(ended)} runs: {counted} {'already' if 'finished' in states else ''}".rstrip())


def tune(
    config: Source,
    overrides: Overrides = None,
    grid: Grid = None,
    first_tasks: Annotated[int, typer.Option(min=1, help="Tasks to learn before the test on held-out images.")] = 1,
    results: Results = Path("results"),
) -> None:
    """Select hyper-parameters on the first task's training images, a part of which is held out for the test.

    The held-out fraction is stream.validation, by default a fifth. Neither test images nor images of later tasks are
    opened. Writes RESULTS/<name>/tuned.yaml for cil run, and tuned.json with the record of all settings.
    """
    from rich.console import Console
    from rich.table import Table

    from cil.sweep.grid import expand_grid

    expand_grid(config, overrides or [], grid or [])  # a misspelt name or key is found before torch is imported
    console = Console(quiet=not is_main_process())
    with console.status("loading torch, data and backbone …"):
        from cil.runner.display import Display
        from cil.selection.tune import tune as select
    tuned = select(
        config, overrides or [], grid or [], first_tasks=first_tasks, results=results, display=Display(console)
    )
    for choice in tuned.choices:
        table = Table("rank", choice.learner, "held out %", "seconds", box=None, pad_edge=False)
        for rank, one in enumerate(choice.ranked, 1):
            shown = one.reason or f"{100 * one.accuracy:.2f}"
            table.add_row(str(rank), one.title, shown, f"{one.seconds:.1f}")
        wide = Console(width=None if console.is_terminal else 10_000, quiet=console.quiet)
        wide.print("", table, sep="\n", markup=False)
        for key in choice.undecided:
            console.print(
                f"{key}: all values give the same accuracies here, so the first is used; a parameter that acts between "
                "tasks needs a larger --first-tasks",
                markup=False,
                soft_wrap=True,
            )
    console.print(f"\nrecord:    {tuned.record}\nnext:      cil run {tuned.config}", markup=False, highlight=False)


class By(str, Enum):
    """A score to rank by; higher is better for all of them."""

    NCM = "ncm"
    RIDGE = "ridge"
    LOGME = "logme"
    LEEP = "leep"


def rank_backbones(
    config: Source,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for cil run")] = None,
    backbone: Annotated[
        list[str] | None,
        typer.Option(help="A name as in backbone.name, or a section, e.g. '{name: …, weights: FILE}'; repeatable."),
    ] = None,
    by: Annotated[By, typer.Option(help="Score to rank by.")] = By.NCM,
    together: Annotated[
        int | None,
        typer.Option(metavar="N", help="Also choose up to N of them to be used together, as the key backbones."),
    ] = None,
    results: Results = Path("results"),
) -> None:
    """Rank backbones on the first task's training images, without training: leave-one-out accuracies, LogME.

    Neither test images nor images of later tasks are opened. Writes RESULTS/<name>/backbones.json.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cil.config.reading import load_config

    settings = load_config(config, overrides or [])
    console = Console(quiet=not is_main_process())
    with console.status("loading torch, data and backbones …"):
        from cil.runner.display import Display
        from cil.selection.backbones import rank_backbones as rank
    ranking = rank(settings, backbone or [], results, by=by.value, together=together, display=Display(console))
    several = [] if all(one.scores.leep is None for one in ranking.ranked) else ["LEEP"]
    head = ("NCM %", "ridge %", "LogME", *several, "effective rank", "λ", "width", "seconds")
    table = Table("rank", "backbone", box=None, pad_edge=False)
    for heading in head:
        table.add_column(heading, justify="right", no_wrap=True)
    for rank_, one in enumerate(ranking.ranked, 1):
        s = one.scores
        accuracies = f"{100 * s.ncm:.2f}", f"{100 * s.ridge:.2f}"
        own = ["" if s.leep is None else f"{s.leep:.4f}" for _ in several]
        others = f"{s.logme:.4f}", *own, f"{s.effective_rank:.1f}", f"{s.ridge_strength:g}", str(one.feature_dim)
        table.add_row(str(rank_), Text(one.title), *accuracies, *others, f"{sum(one.seconds):.1f}")
    wide = Console(width=None if console.is_terminal else 10_000, quiet=console.quiet)
    wide.print("", table, sep="\n")
    pairs = [("ncm", "ridge"), ("ncm", "logme"), ("ridge", "logme")]
    taus = [(one, other, ranking.agreement[one][other]) for one, other in pairs]
    text = ", ".join(f"{one} and {other} {tau:.2f}" for one, other, tau in taus if tau is not None)
    if text:
        console.print(f"\nKendall's τ: {text}", markup=False, highlight=False)
    if ranking.together is not None:
        steps = Table("together", "backbone", box=None, pad_edge=False)
        for heading in ("ridge %", "passes per image"):
            steps.add_column(heading, justify="right", no_wrap=True)
        for passes, (one, accuracy) in enumerate(ranking.together, 1):
            steps.add_row("+" if passes > 1 else "", Text(one.title), f"{100 * accuracy:.2f}", str(passes))
        wide.print("", steps, sep="\n")
    console.print(f"\nrecord:    {ranking.record}", markup=False, highlight=False, soft_wrap=True)
