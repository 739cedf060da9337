"""Commands about finished models: merge checkpoints, predict with a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    tasks: Annotated[list[Path], typer.Argument(help="Checkpoints fine-tuned from the base, in order (safetensors).")],
    base: Annotated[Path, typer.Option(help="The pre-trained checkpoint: a file, an index, or a folder with either.")],
    out: Annotated[Path, typer.Option(help="The merged checkpoint: one FILE.safetensors, or a folder like the base.")],
    rule: Annotated[str, typer.Option(help="Which rule (see: cil list rules), or file.py:Class.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value hyper-parameter, e.g. --set alpha=0.3; repeatable.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="FILE.safetensors of the merge's state: gone on with if there, kept for later.")
    ] = None,
    stats: Annotated[
        list[Path] | None, typer.Option(help="Statistics of each task, in order, for rules that need them.")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Regular expression of tensors to keep as in the base, in place of the default, heads; repeatable."
        ),
    ] = None,
) -> None:
    """Merge fine-tuned checkpoints into one, a tensor at a time: models need not fit into memory."""
    from rich.console import Console

    from cil.config import named
    from cil.configfile import override

    console = Console(stderr=True)
    with console.status("loading torch …"):
        from cil.console import Display
        from cil.merging import HEADS
        from cil.merging.stream import merge_files
    with Display(console) as display:
        merged = merge_files(
            override(named(rule), settings or []),
            base,
            tasks,
            out,
            state=state,
            stats=stats or (),
            exclude=exclude or HEADS,
            track=display.track,
        )
    typer.echo(f"{out}: {int(merged.count)} tasks, mean norm of an update {merged.mean_norm:.4g}")


def predict(
    run: Annotated[Path, typer.Argument(help="A run folder: results/<name>/<learner>/order…-seed…")],
    images: Annotated[list[Path], typer.Argument(help="Image files")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to print")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps")] = "auto",
) -> None:
    """Load a run's last stage and print the top classes of images by name."""
    from cil.prediction import predict as predict_images

    for path, ranked in predict_images(run, images, top, device):
        typer.echo(f"{path}: " + ", ".join(f"{name} ({score:.3f})" for name, score in ranked))
