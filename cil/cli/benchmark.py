"""Commands about whole benchmarks: run them, compare what came out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

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
    _compare([results / settings.name], None)
    typer.echo(f"curves:     tensorboard --logdir {results / settings.name}")


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold some.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for compare.png and compare.html; default: the first given.")
    ] = None,
) -> None:
    """Compare runs: a ranked table, a figure, and a page that opens from disk."""
    _compare(runs, out)


def _compare(paths: list[Path], out: Path | None) -> None:
    from rich.console import Console

    from cil.report import compare as compare_runs

    console = Console()
    tables, written = compare_runs(paths, out, console.width)
    for table in tables:
        console.print(table)
    for file in written:
        typer.echo(f"{'picture:' if file.suffix == '.png' else 'page:':10} {file}")
