"""The command line. Nothing heavy is imported before a command needs it: ``cil --help`` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from cil.errors import CilError

app = typer.Typer(
    name="cil",
    help="Class-incremental learning on frozen pre-trained vision transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Results = Annotated[Path, typer.Option("--results", help="Folder that holds all results.")]


def _is_main_process() -> bool:
    """False in all but one of the processes that accelerate or torchrun launched; asked before torch is imported."""
    return os.environ.get("RANK", "0") == "0"


@app.command()
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
    console = Console(quiet=not _is_main_process())
    with console.status("loading torch, data and backbone …"):
        from cil.console import Display
        from cil.runner import run as run_benchmark
    try:
        run_benchmark(settings, results, display=Display(console))
    except KeyboardInterrupt:
        console.print("\nstopped. Finished stages are kept; give the same command to go on.")
        raise typer.Exit(130) from None
    if not _is_main_process():
        return
    _compare([results / settings.name], None)
    typer.echo(f"curves:     tensorboard --logdir {results / settings.name}")


@app.command()
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


@app.command("list")
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


@app.command("check-learner")
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


@app.command()
def merge(
    tasks: Annotated[list[Path], typer.Argument(help="Checkpoints fine-tuned from the base, in order (safetensors).")],
    base: Annotated[Path, typer.Option(help="The pre-trained checkpoint: a file, an index, or a folder with either.")],
    out: Annotated[Path, typer.Option(help="The merged checkpoint: one FILE.safetensors, or a folder like the base.")],
    rule: Annotated[str, typer.Option(help="Which rule (see: cil list rules).")],
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

    from cil.configfile import override

    console = Console(stderr=True)
    with console.status("loading torch …"):
        from cil.console import Display
        from cil.merging import HEADS
        from cil.merging.stream import merge_files
    with Display(console) as display:
        merged = merge_files(
            override({"name": rule}, settings or []),
            base,
            tasks,
            out,
            state=state,
            stats=stats or (),
            exclude=exclude or HEADS,
            track=display.track,
        )
    typer.echo(f"{out}: {int(merged.count)} tasks, mean norm of an update {merged.mean_norm:.4g}")


@app.command()
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


def main() -> NoReturn:
    """Entry point: a user's mistake is one line on stderr and exit code 2."""
    try:
        app(standalone_mode=True)
    except CilError as error:
        for line in str(error).splitlines() if _is_main_process() else ():
            print(f"cil: {line}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


if __name__ == "__main__":
    main()
