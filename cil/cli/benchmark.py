"""Commands that run benchmarks and compare their results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cil.cli.output import expanded, say
from cil.errors import clipped, printable
from cil.utils.paths import expand

if TYPE_CHECKING:
    from cil.config import Config
    from cil.report import Column, Comparison

Results = Annotated[Path, typer.Option("--results", help="Folder that holds all results.", callback=expand)]
Redo = Annotated[
    bool,
    typer.Option(
        "--redo",
        help="Delete finished stages that depend on settings, data or code that changed since, and compute them again.",
    ),
]


def is_main_process() -> bool:
    """Whether this is the main process under accelerate or torchrun, from the environment and without torch."""
    return os.environ.get("RANK", "0") == "0"


def run(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a shipped configuration (see: cil list configs).")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. stream.increment=10 learner.lr=0.01")
    ] = None,
    results: Results = Path("results"),
    redo: Redo = False,
) -> None:
    """Run a benchmark. Finished runs are skipped; run the same command again to resume an interrupted one."""
    from rich.console import Console

    from cil import finished
    from cil.cli.launched import processes
    from cil.config.reading import load_config
    from cil.learners.registry import require_keys

    settings = load_config(config, overrides or [])
    for entry in settings.learners:  # a misspelt name or key is found before torch is imported
        require_keys(entry)
    console = Console(quiet=not is_main_process())
    console.print(announcement(settings, results), markup=False, highlight=False, soft_wrap=True)
    if processes() == 1 and (found := finished.unchanged(settings, results)) is not None:
        for folder in found.runs:
            say(f"{folder.parent.name} {folder.name}  finished already: {folder}")
        show_results(results / settings.name, found.overview)
        return
    inputs = finished.inputs(settings)
    with console.status("loading torch, data and backbone …"):
        from cil.runner import run as run_benchmark
        from cil.runner.display import Display
    try:
        folders = run_benchmark(settings, results, display=Display(console), redo=redo)
    except KeyboardInterrupt:
        console.print("\nstopped. Finished stages are kept; run the same command to resume.")
        raise typer.Exit(130) from None
    if not is_main_process():
        return
    finished.note(settings, results, inputs, folders, show_results(results / settings.name))


def announcement(settings: Config, results: Path) -> str:
    """The first line of a run, known before torch is imported: what will run, on what, and where it goes."""
    runs = sum(len(entry.orders or settings.orders) * len(entry.seeds or settings.seeds) for entry in settings.learners)
    learners = ", ".join(entry.title for entry in settings.learners)
    number = "1 run" if runs == 1 else f"{runs} runs"
    what = printable(clipped(learners, 200))
    return f"{number} of {what} on {printable(settings.data.dataset)}, to {printable(str(results / settings.name))}"


def show_results(folder: Path, overview: Sequence[Path] = ()) -> Sequence[Path]:
    """Print a benchmark's table, the files about it, and the command that shows its curves.

    Args:
        folder: The benchmark's folder.
        overview: The figures and the page about it, if they are up to date; by default they are written.

    Returns:
        The figures and the page.
    """
    from cil import report

    compared = report.compare_runs([folder])
    _show(compared, report.COLUMNS)
    overview = overview or report.write_overview(compared, folder)
    _list_files(overview)
    say(f"curves:    cil tensorboard {folder}")
    return overview


Runs = Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold some.", callback=expanded)]
Several = list[str] | None


def compare(
    runs: Runs,
    learner: Annotated[Several, typer.Option(help="Only these learners, e.g. 'ranpac*'; repeatable.")] = None,
    order: Annotated[Several, typer.Option(help="Only these class orders, e.g. 1993 or natural; repeatable.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only these training seeds; repeatable.")] = None,
    complete: Annotated[bool, typer.Option("--complete", help="Only finished runs.")] = False,
    protocol: Annotated[
        int | None, typer.Option(help="Only the protocol with this number, if there are several tables.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Learner to subtract on identical class orders and seeds, or none; "
            "default: the best one that stores no images."
        ),
    ] = None,
    columns: Annotated[
        Several, typer.Option(help="Columns by their names in metrics.json, separated by commas, e.g. accuracy_last.")
    ] = None,
    sort: Annotated[str, typer.Option(help="Column to rank by, best first.")] = "accuracy_last",
    export: Annotated[
        list[Path] | None,
        typer.Option(
            help="Write the table: .md or .tex as ranked, .csv unrounded with one row per run; repeatable.",
            callback=expanded,
        ),
    ] = None,
    figure: Annotated[
        list[Path] | None,
        typer.Option(help="Write the curves for a paper: .pdf, .svg or .png; repeatable.", callback=expanded),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for compare.png and compare.html; default: the first of RUNS.", callback=expanded),
    ] = None,
) -> None:
    """Compare runs: a ranked table, a figure, and a web page that opens from disk.

    Runs of different streams, data or backbones are never ranked together: each protocol has its own table.
    """
    from cil import report

    report.check_suffixes("--export", export or [], list(report.TABLES))
    report.check_suffixes("--figure", figure or [], report.FIGURES)
    ranked_by = report.find_column(sort, "--sort")
    picked = report.select_columns(columns or [], ranked_by)
    filters = report.Filters(learner or (), order or (), seed or (), complete, protocol)
    compared = report.compare_runs(runs, filters, baseline, ranked_by)
    _show(compared, picked, whole=bool(columns))
    for path in export or []:
        _list_files([report.write_table(report.only(compared, f"--export {path}"), path, picked)])
    for path in figure or []:
        _list_files([report.write_figure(report.only(compared, f"--figure {path}"), path)])
    _list_files(report.write_overview(compared, out or runs[0], picked))


def _show(compared: Sequence[Comparison], columns: Sequence[Column], *, whole: bool = False) -> None:
    """Print tables with the width of the terminal, or of unlimited width if the output is not a terminal."""
    from rich.console import Console

    from cil.report import table

    console = Console()
    width = console.width if (console.is_terminal or "COLUMNS" in os.environ) and not whole else None
    for i, one in enumerate(compared):
        wide = Console(width=width or 10_000)
        wide.print(*([""] if i else []), table(one, columns, width, numbered=len(compared) > 1), sep="\n")


def _list_files(paths: Sequence[Path]) -> None:
    kinds = {".html": "page", ".csv": "table", ".md": "table", ".tex": "table"}
    for path in paths:
        say(f"{kinds.get(path.suffix, 'figure') + ':':10} {path}")


def tensorboard(
    results: Runs,
    port: Annotated[int, typer.Option(help="Port; 0: any free port.", min=0, max=65535)] = 6006,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all of this machine's.")] = "localhost",
) -> None:
    """Start TensorBoard with all runs on one page, over stages. Ctrl-C stops it."""
    import signal
    import sys
    import threading

    from cil.report.tensorboard import serving

    with serving(results, host, port) as url:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as with Ctrl-C, and delete the links
        say(f"{url}#custom_scalars   (Ctrl-C stops)")
        sys.stdout.flush()  # also to a pipe or a file, in which it would stay unseen until the end
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            say("stopped")
