"""Commands that make new models of stored runs: join several, and find those that fit some images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cil.cli.models import Code, Weights
from cil.cli.output import expanded, say


def join(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, two or more: results/<name>/<learner>/order…", callback=expanded)
    ],
    out: Annotated[Path, typer.Option(help="The run folder to write", callback=expanded)],
    route: Annotated[
        bool,
        typer.Option("--route", help="Route between runs that cannot be added, by the density of an image's features"),
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(help="Test images of the joined classes: a folder of class folders, or a tar", callback=expanded),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps")] = "cpu",
    weights: Weights = None,
    code: Code = None,
) -> None:
    """Join runs into one that knows all their classes.

    Sums of runs of the same learner and settings are added, without any image: the result is what one run over all
    their images would have learned. Any others, on the same backbone, can be joined by --route.
    """
    from rich.console import Console

    with Console(stderr=True).status("joining …"):
        from cil.reuse.joining import join as join_runs

        joint = join_runs(runs, out, route=route, images=images, device=device, weights=weights, code=code or ())
    several = f", {joint.shared} of them in several" if joint.shared else ""
    tested = "" if joint.accuracy is None else f"; accuracy {100 * joint.accuracy:.2f} %"
    say(
        f"{joint.folder}: {joint.classes} classes of {joint.runs} runs{several}; {joint.images} training images{tested}"
    )


def find(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold some", callback=expanded)],
    images: Annotated[
        Path | None,
        typer.Option(help="A folder of images or of class folders, or a tar of class folders", callback=expanded),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Runs shown per space")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps")] = "cpu",
    weights: Weights = None,
    code: Code = None,
) -> None:
    """Find the stored runs that fit some images: distance, mixture weights, and with labels accuracy.

    Without --images, only the specifications of the runs are made, where they are missing.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cil.data.folder import as_text

    console = Console(stderr=True)
    with console.status("loading torch …"):
        from cil.reuse.finding import describe
        from cil.reuse.finding import find as find_runs
        from cil.runner.display import Display
    with Display(console) as display:
        if images is None:
            for folder, one in describe(runs, device=device, weights=weights, code=code or (), track=display.track):
                say(f"{folder}: specification of {len(one.names)} classes, {one.images} images")
            return
        found = find_runs(runs, images, top=top, device=device, weights=weights, code=code or (), track=display.track)
    several = len({match.space for match in found.matches}) > 1
    table = Table(box=None, pad_edge=False)
    for heading in (*(("NCM %", "common") if found.labelled else ()), *(("space",) if several else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("MMD²", "weight", "classes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("learner", "run"):
        table.add_column(heading)
    for match in found.matches:
        accuracy = "–" if match.accuracy is None else f"{100 * match.accuracy:.2f}"
        cells = [accuracy, str(match.common)] if found.labelled else []
        cells += [str(match.space)] if several else []
        cells += [f"{match.mmd2:.5f}", f"{match.weight:.2f}", str(match.classes)]
        table.add_row(*cells, Text(match.learner), Text(as_text(match.folder)))
    out = Console()
    Console(width=None if out.is_terminal else 10_000).print(table)
    for number, ratio in found.ratios.items():
        where = f" in space {number}" if several else ""
        say(f"MMD² of the second run is {ratio:.2f} times that of the first{where}")
    if several:
        say("MMD² and weights compare runs of one space (backbone, transform, precision) only")
