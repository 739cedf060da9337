"""Commands about whole benchmarks: run them, compare what came out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cil.report import Column, Comparison

Results = Annotated[Path, typer.Option("--results", help="Folder that holds all results.")]


def is_main_process() -> bool:
    """False in all but one of the processes that accelerate or torchrun launched; asked before torch is imported."""
    return os.environ.get("RANK", "0") == "0"


def run(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a shipped configuration (see: cil list configs).")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. stream.increment=10 learner.lr=0.01")
    ] = None,
    results: Results = Path("results"),
) -> None:
    """Run a benchmark. Finished runs are skipped; the same command goes on with an interrupted one."""
    from rich.console import Console

    from cil.configfile import load

    settings = load(config, overrides or [])
    console = Console(quiet=not is_main_process())
    with console.status("loading torch, data and backbone …"):
        from cil.console import Display
        from cil.runner import run as run_benchmark
    try:
        run_benchmark(settings, results, display=Display(console))
    except KeyboardInterrupt:
        console.print("\nstopped. Finished stages are kept; give the same command to go on.")
        raise typer.Exit(130) from None
    if not is_main_process():
        return
    show_results(results / settings.name)


def show_results(folder: Path) -> None:
    """What there is of a benchmark: its table, its files, and where its curves are."""
    from cil import report

    compared = report.load([folder])
    _show(compared, report.COLUMNS)
    _written(report.write_overview(compared, folder))
    typer.echo(f"curves:    cil tensorboard {folder}")


Runs = Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold some.")]
Several = list[str] | None


def compare(
    runs: Runs,
    learner: Annotated[Several, typer.Option(help="Only these learners, e.g. 'ranpac*'; repeatable.")] = None,
    order: Annotated[Several, typer.Option(help="Only these class orders, e.g. 1993 or natural; repeatable.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only these training seeds; repeatable.")] = None,
    complete: Annotated[bool, typer.Option("--complete", help="Only finished runs.")] = False,
    protocol: Annotated[
        int | None, typer.Option(help="Only the protocol of this number, where there are several tables.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Learner to subtract on identical class orders and seeds, or none; "
            "default: the best that keeps no old images."
        ),
    ] = None,
    columns: Annotated[
        Several, typer.Option(help="Columns by their names in metrics.json, with commas between, e.g. accuracy_last.")
    ] = None,
    sort: Annotated[str, typer.Option(help="Column to rank by, best first.")] = "accuracy_last",
    export: Annotated[
        list[Path] | None,
        typer.Option(help="Write the table: .md or .tex as ranked, .csv unrounded with a row a run; repeatable."),
    ] = None,
    figure: Annotated[
        list[Path] | None, typer.Option(help="Write the curves for a paper: .pdf, .svg or .png; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for compare.png and compare.html; default: the first given.")
    ] = None,
) -> None:
    """Compare runs: a ranked table, a figure, and a page that opens from disk.

    Runs of different streams, data or backbones are never ranked together: each protocol has a table of its own.
    """
    from cil import report

    report.check_suffixes("--export", export or [], list(report.TABLES))
    report.check_suffixes("--figure", figure or [], report.FIGURES)
    ranked_by = report.named(sort, "--sort")
    picked = report.chosen(columns or [], ranked_by)
    filters = report.Filters(learner or (), order or (), seed or (), complete, protocol)
    compared = report.load(runs, filters, baseline, ranked_by)
    _show(compared, picked, whole=bool(columns))
    for path in export or []:
        _written([report.write_table(report.only(compared, f"--export {path}"), path, picked)])
    for path in figure or []:
        _written([report.write_figure(report.only(compared, f"--figure {path}"), path)])
    _written(report.write_overview(compared, out or runs[0], picked))


def _show(compared: Sequence[Comparison], columns: Sequence[Column], *, whole: bool = False) -> None:
    """Tables as wide as the terminal; what is not a terminal has no width to keep to."""
    from rich.console import Console

    from cil.report import table

    console = Console()
    width = console.width if (console.is_terminal or "COLUMNS" in os.environ) and not whole else None
    for i, one in enumerate(compared):
        wide = Console(width=width or 10_000)
        wide.print(*([""] if i else []), table(one, columns, width, numbered=len(compared) > 1), sep="\n")


def _written(paths: Sequence[Path]) -> None:
    kinds = {".html": "page", ".csv": "table", ".md": "table", ".tex": "table"}
    for path in paths:
        typer.echo(f"{kinds.get(path.suffix, 'picture') + ':':10} {path}")


def tensorboard(
    results: Runs,
    port: Annotated[int, typer.Option(help="Port; 0: any that is free.", min=0, max=65535)] = 6006,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: every one this machine has.")] = "localhost",
) -> None:
    """Start TensorBoard on runs, every one on one page, the step being the stage. Ctrl-C stops it."""
    import signal
    import threading

    from cil.board import serving

    with serving(results, host, port) as url:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does, links cleared away
        typer.echo(f"{url}#custom_scalars   (Ctrl-C stops)")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            typer.echo("stopped")
