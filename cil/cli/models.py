"""Commands for trained models: merge checkpoints, export a run, classify images."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cil.cli.output import expanded, say
from cil.config.schema import MAX_PIXELS
from cil.rows import GROWING_BY, REJECT_BY, SCORES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cil.prediction import Model, Ranked

Weights = Annotated[
    Path | None,
    typer.Option(help="Place of the backbone's weights, if they were moved since the run; a file", callback=expanded),
]
Code = Annotated[
    list[Path] | None,
    typer.Option(
        help="Place of the FILE.py of a custom class, if it was moved since the run; repeatable", callback=expanded
    ),
]


def merge(
    tasks: Annotated[
        list[Path],
        typer.Argument(
            help="Checkpoints fine-tuned from the base, in order: safetensors, or folders with LoRA adapters of PEFT.",
            callback=expanded,
        ),
    ],
    base: Annotated[
        Path,
        typer.Option(help="The pre-trained checkpoint: a file, an index, or a folder with either.", callback=expanded),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Merged checkpoint to write: FILE.safetensors, or a folder like the base."),
    ],
    rule: Annotated[str, typer.Option(help="Merging rule (see: cil list rules), or file.py:Class.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value hyper-parameter, e.g. --set alpha=0.3; repeatable.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="FILE.safetensors of the merge's state: resumed if it exists, and written.")
    ] = None,
    stats: Annotated[
        list[Path] | None, typer.Option(help="Statistics files of the tasks, in order, for rules that need them.")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Regular expression of tensors to keep as in the base; default: classifier heads; repeatable."
        ),
    ] = None,
) -> None:
    """Merge fine-tuned checkpoints into one, tensor by tensor, so models need not fit into memory."""
    from rich.console import Console

    from cil.config import as_section
    from cil.config.reading import override

    console = Console(stderr=True)
    with console.status("loading torch …"):
        from cil.merging import HEADS, ExpertBank
        from cil.merging.on_disk import merge_files
        from cil.runner.display import Display
    with Display(console) as display:
        merged = merge_files(
            override(as_section(rule), settings or []),
            base,
            tasks,
            out,
            state=state,
            stats=stats or (),
            exclude=exclude or HEADS,
            track=display.track,
        )
    kept = f", all updates in {merged.bytes / 1e6:.3g} MB" if isinstance(merged, ExpertBank) else ""
    say(f"{out}: {int(merged.count)} tasks, mean norm of an update {merged.mean_norm:.4g}{kept}")


def export(
    run: Annotated[Path, typer.Argument(help="A run folder: results/<name>/<learner>/order…-seed…", callback=expanded)],
    kind: Annotated[str, typer.Option("--format", help="safetensors, torch.export or onnx")] = "safetensors",
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; default: RUN/export-FORMAT", callback=expanded)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an exported model that is already there")] = False,
    weights: Weights = None,
    code: Code = None,
) -> None:
    """Write a run's last stage as one model with a model card, and check that its logits are the same."""
    from rich.console import Console

    with Console(stderr=True).status("exporting …"):
        from cil.export import export as write
        from cil.export.artifact import read_facts

        folder = write(run, out, kind, force=force, weights=weights, code=code or ())
    facts = read_facts(folder)
    stages, difference = facts["stages"], facts["check"]["logits"]["of_largest"]
    say(
        f"{folder}: {facts['learner']['title']} after stage {stages['finished']} of {stages['planned']} as {kind}, "
        f"{len(facts['classes'])} classes; its logits differ from the learner's by {difference:.1e} of the largest"
    )


class OnError(str, Enum):
    """What to do with a file that is not a readable image."""

    RAISE = "raise"
    SKIP = "skip"


def _open(
    run: Path,
    device: str,
    reject: float | None,
    by: str | None,
    probabilities: bool,
    weights: Path | None,
    code: Sequence[Path],
) -> Model:
    """What `cil predict` predicts with: an exported model, a run, or a growing model, as sure as it was asked to be."""
    from cil import results
    from cil.errors import ExportError
    from cil.export import is_artifact, load
    from cil.growing.calibration import open_sure, require_sure
    from cil.prediction import open_confident, open_run

    sure = reject is not None or probabilities
    if is_artifact(run):
        if weights is not None:
            raise ExportError(f"--weights {weights}: {run} is an exported model and has its weights; leave it out")
        if sure:
            raise ExportError(f"{run}: is an exported model, which has no held-out images; give the run's folder")
        return load(run, device, code=code)
    if "growing" in results.read_header(run):
        model, reason = open_sure(run, device, reject=reject, score=by, weights=weights, code=code)
        if sure:
            return require_sure(model, reason)
        if reason:
            say(reason, err=True)
        return model
    if sure:
        return open_confident(run, device, reject=reject, score=by or REJECT_BY, weights=weights, code=code)
    return open_run(run, device, weights=weights, code=code)


def predict(
    run: Annotated[
        Path, typer.Argument(help="A run folder, results/<name>/<learner>/order…-seed…, or an exported one")
    ],
    images: Annotated[list[Path], typer.Argument(help="Image files, and folders to search for them")],
    top: Annotated[int, typer.Option(min=1, help="Classes per image")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass")] = 32,
    out: Annotated[
        Path | None, typer.Option(help="FILE.json, .jsonl or .csv to write instead of printing", callback=expanded)
    ] = None,
    on_error: Annotated[OnError, typer.Option(help="What to do with a file that is not an image")] = OnError.RAISE,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels above which an image is not decoded")] = MAX_PIXELS,
    reject: Annotated[
        float | None,
        typer.Option(
            help="Say unknown of images that look like no known class, so that at most this fraction of known ones is "
            "refused, e.g. 0.05; for models of cil learn, and runs with confidence=true"
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help=f"Score by which --reject refuses images: {', '.join(SCORES)}; default: {REJECT_BY}, of models of cil "
            f"learn {GROWING_BY}"
        ),
    ] = None,
    probabilities: Annotated[
        bool,
        typer.Option(
            "--probabilities",
            help="Print calibrated probabilities, as models of cil learn always do; for runs with confidence=true",
        ),
    ] = False,
    weights: Weights = None,
    code: Code = None,
) -> None:
    """Print the top classes of images by name, from a run's last stage or an exported model."""
    import sys
    from contextlib import nullcontext

    from rich.console import Console

    from cil.data.folder import as_text
    from cil.errors import DataError, printable
    from cil.prediction.output import check_output, open_writer

    if out is not None:
        check_output(out)
    console, stdout = Console(stderr=True), sys.stdout
    with console.status("loading torch …"):
        from cil.prediction import find_images
        from cil.prediction import predict as predict_images
        from cil.runner.display import Display

        model = _open(run, device, reject, by, probabilities, weights, code or ())
        paths = find_images(images, lambda line: say(line, err=True))

    def tell(path: Path, ranked: Ranked) -> None:
        unknown = "unknown; " if ranked.known is False else ""
        classes = ", ".join(f"{printable(name)} ({score:.3f})" for name, score in ranked)
        say(f"{as_text(path)}: {unknown}{classes}", file=stdout)

    skipped = 0

    def skip(error: DataError) -> None:
        nonlocal skipped
        skipped += 1
        say(f"skipped {error}", err=True)

    # a progress bar would disturb lines that are printed to the same terminal
    bar = console if out is not None or not stdout.isatty() else None
    target = nullcontext(tell) if out is None else open_writer(out, min(top, len(model.names)), reject is not None)
    with Display(bar) as display, target as add:
        for path, ranked in predict_images(
            model,
            paths,
            top,
            batch_size=batch_size,
            max_pixels=max_pixels,
            on_broken=skip if on_error is OnError.SKIP else None,
            track=display.track,
        ):
            add(path, ranked)
            if getattr(stdout, "gone", False):  # nobody reads on
                return
        if skipped == len(paths):
            raise DataError(f"none of the {skipped} images can be read")
    if out is not None or skipped:
        count = f"{len(paths) - skipped} of {len(paths)} images" if skipped else f"{len(paths)} images"
        say(f"{out}: {count}" if out is not None else f"{count} could be read", err=out is None)
