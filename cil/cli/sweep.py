"""Commands about many settings of one benchmark: run them all, or choose among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cil.cli.benchmark import Results, show_results

if TYPE_CHECKING:
    from cil.sweep.pool import Result

Source = Annotated[
    str, typer.Argument(help="A YAML file, or the name of a shipped configuration (see: cil list configs).")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value for all runs, as for cil run")]
Grid = Annotated[
    list[str] | None,
    typer.Option(
        help="KEY=VALUE,VALUE, e.g. learner.lr=0.1,0.01 or learners.ranpac.strength=1,10; repeatable: product."
    ),
]


def sweep(
    config: Source,
    overrides: Overrides = None,
    grid: Grid = None,
    orders: Annotated[str | None, typer.Option(help="Class orders, e.g. 1993,1,natural; short for orders=[…].")] = None,
    seeds: Annotated[str | None, typer.Option(help="Training seeds, e.g. 0,1; short for seeds=[…].")] = None,
    results: Results = Path("results"),
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default: one a GPU, or one a CPU where there is none.")
    ] = None,
    cpus_per_run: Annotated[
        int | None, typer.Option(min=1, help="CPUs and threads of a run; default: an equal share; on a cluster 1.")
    ] = None,
    gpus_per_run: Annotated[
        float | None, typer.Option(min=0, help="GPUs of a run, may be a fraction; default: 1 where there are any.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster: auto, HOST:PORT or ray://HOST:PORT; default: this machine.")
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="Further attempts of a run whose process died.")] = 1,
    print_: Annotated[
        bool, typer.Option("--print", help="Run nothing; print each run's cil run command, one a line.")
    ] = False,
) -> None:
    """Run a benchmark at every point of a grid, several at a time, on Ray. The same command goes on after any death.

    Each point is a learner of its own in results, e.g. ranpac_strength=10; finished runs are skipped. Exit code 1 if a
    run failed; the others are run all the same.
    """
    from rich.console import Console

    from cil.sweep.grid import trials

    listed = [f"{key}=[{text}]" for key, text in (("orders", orders), ("seeds", seeds)) if text is not None]
    console = Console(stderr=print_)
    with console.status("checking every setting …"):
        todo = trials(config, [*(overrides or []), *listed], grid or [])
    if print_:
        for trial in todo:
            typer.echo(trial.line(results))
        return
    from cil.sweep.pool import Resources
    from cil.sweep.pool import sweep as run_all

    resources = Resources(jobs, cpus_per_run, gpus_per_run, address, retries)
    try:
        ended = run_all(todo, results, resources, say=lambda text: typer.echo(text))
    except KeyboardInterrupt:
        typer.echo("\nstopped. Finished stages are kept; give the same command to go on.")
        raise typer.Exit(130) from None
    failed = [result for result in ended if result.outcome.state == "failed"]
    _summary(ended)
    if len(failed) < len(ended):
        show_results(results / todo[0].plan.config.name)
    if failed:
        raise typer.Exit(1)


def _summary(ended: Sequence[Result]) -> None:
    """What ran, was finished already and failed; a failure with its reason and its log."""
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
    typer.echo(f"{len(ended)} runs: {counted} {'already' if 'finished' in states else ''}".rstrip())
