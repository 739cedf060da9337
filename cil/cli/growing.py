"""Commands for a model that keeps learning: learn, undo, show, forget, rename."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cil.cli.models import Code, OnError, Weights
from cil.cli.output import expanded, say
from cil.config.schema import MAX_PIXELS
from cil.growing import HOLDOUT

if TYPE_CHECKING:
    from cil.growing.model import GrowingModel

Folder = Annotated[Path, typer.Argument(help="The model's folder.", metavar="MODEL", callback=expanded)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps")]
SHOWN = 20
"""Classes and lessons that `cil show` prints; --json and --all print more."""


def learn(
    model: Folder,
    images: Annotated[
        Path,
        typer.Option(help="Folder of class folders, tar file of them, or CSV file path,label.", callback=expanded),
    ],
    learner: Annotated[
        str | None, typer.Option(help="Learner of a new model (see: cil list learners), or file.py:Class.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the learner, e.g. --set projection=2000; repeatable")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Backbone of a new model (see: cil list backbones); default: the one of cil.")
    ] = None,
    holdout: Annotated[float, typer.Option(min=0, max=0.99, help="Share of each class that is held out")] = HOLDOUT,
    keep_features: Annotated[
        bool, typer.Option("--keep-features", help="Keep the features of all images, so that forget needs no images.")
    ] = False,
    on_error: Annotated[OnError, typer.Option(help="What to do with a file that is not an image")] = OnError.RAISE,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels above which an image is not decoded")] = MAX_PIXELS,
    device: Device = "auto",
    weights: Weights = None,
    code: Code = None,
) -> None:
    """Teach a model new classes, or more images of known ones; the first call makes the model."""
    from rich.console import Console

    from cil.config import as_section
    from cil.config.reading import override
    from cil.errors import ConfigError
    from cil.growing import DEFAULT_LEARNER
    from cil.growing.summary import facts

    if settings and learner is None:
        name = DEFAULT_LEARNER["name"]
        raise ConfigError(f"--set {settings[0]}: give the --learner, too; without it the default is {name}")
    entry = None if learner is None else override(as_section(learner), settings or [])
    console = Console(stderr=True)
    with console.status("loading torch …"):
        from cil.growing.model import GrowingModel
        from cil.runner.display import Display
    with Display(console) as display:
        growing = GrowingModel(model, entry, backbone, device=device, weights=weights, code=code or (), display=display)
        taught = growing.learn(
            images, holdout=holdout, keep_features=keep_features, on_error=on_error.value, max_pixels=max_pixels
        )
    for note in taught.notes:
        say(note, err=True)
    if taught.lesson is not None:
        known = facts(model)
        lesson = known["lessons"][-1]
        say(
            f"{model}: lesson {len(known['lessons'])} taught {_counted(len(lesson['classes']), 'class', 'classes')} "
            f"({_some(lesson['classes'], 5)}) with {_counted(lesson['train'], 'image')}, "
            f"{lesson['held_out']} held out; {_counted(len(known['classes']), 'class', 'classes')} now"
        )
        _print_accuracy(known, SHOWN)


def undo(model: Folder) -> None:
    """Take back the last call of learn, forget or rename."""
    event: Any = _open(model).undo()
    if "kind" in event:
        say(f"{model}: {event['name']} is no longer {event['kind']}")
    else:
        count = sum(event["train"].values()) + sum(event["held_out"].values())
        say(f"{model}: the lesson of {event['when']} with {_counted(count, 'image')} of {event['source']} is undone")


def forget(
    model: Folder,
    name: Annotated[str, typer.Option("--class", help="Name of the class.")],
    images: Annotated[
        Path | None,
        typer.Option(help="The images it was taught with, as for learn; some learners need them.", callback=expanded),
    ] = None,
    hide: Annotated[bool, typer.Option("--hide", help="No longer predict it, although its statistics remain.")] = False,
    device: Device = "auto",
    weights: Weights = None,
    code: Code = None,
) -> None:
    """Remove a class exactly, or refuse with the reason."""
    from cil.growing.summary import facts

    growing = _open(model, device=device, weights=weights, code=code or ())
    change = growing.forget(name, images, hide=hide)
    if change["kind"] == "hidden":
        say(f"{model}: {name} is no longer predicted; its statistics remain")
    else:
        say(f"{model}: {name} is forgotten; earlier stages keep its statistics, so that `cil undo` can restore it")
    _print_accuracy(facts(model), SHOWN)


def rename(
    model: Folder,
    old: Annotated[str, typer.Argument(help="Name of a class.", metavar="OLD")],
    new: Annotated[str, typer.Argument(help="Its new name.", metavar="NEW")],
) -> None:
    """Give a class another name."""
    _open(model).rename(old, new)
    say(f"{model}: {old} is now called {new}")


def show(
    model: Folder,
    every: Annotated[bool, typer.Option("--all", help=f"All classes and lessons, not the last {SHOWN}.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all as JSON.")] = False,
) -> None:
    """Show a model's classes, lessons, accuracy, learner, backbone and size; --json also has the settings."""
    import json

    from cil.cli.cache import amount
    from cil.growing.summary import facts

    known = facts(model)
    if as_json:
        say(json.dumps(known, indent=1, ensure_ascii=False))
        return
    say(f"learner:   {known['learner'].get('label') or known['learner'].get('name') or known['learner']['class']}")
    say(f"backbone:  {known['backbone']['name']} ({known['backbone']['feature_dim']} features)")
    say(f"size:      {amount(known['bytes'])}")
    shown = None if every else SHOWN
    classes = [
        f"{name} ({count['train']} + {count['held_out']})" for name, count in list(known["classes"].items())[:shown]
    ]
    more = ", …" if len(classes) < len(known["classes"]) else ""
    say(f"classes:   {len(known['classes'])}, with images taught + held out: {', '.join(classes)}{more}")
    for name, kind in known["not_predicted"].items():
        say(f"           {name} is {kind}")
    _print_accuracy(known, shown)


def _open(model: Path, **options: Any) -> GrowingModel:
    from rich.console import Console

    from cil.growing import events

    events.read(model)
    with Console(stderr=True).status("loading torch …"):
        from cil.growing.model import GrowingModel
    return GrowingModel(model, **options)


def _print_accuracy(known: dict[str, Any], shown: int | None) -> None:
    """The lessons and the accuracy on what each holds out, then and now."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cil.errors import printable

    if not known["lessons"]:
        return
    table = Table(box=None, pad_edge=False)
    for column in ("lesson", "when", "classes", "taught", "held out", "then %", "now %", "ECE %"):
        left = column in ("when", "classes")
        table.add_column(column, justify="left" if left else "right", overflow="fold" if left else "ellipsis")
    lessons = list(enumerate(known["lessons"], 1))
    for number, lesson in lessons if shown is None else lessons[-shown:]:
        shares = (_percent(lesson[key]) for key in ("accuracy_then", "accuracy_now", "calibration_error"))
        when, classes = lesson["when"][:16].replace("T", " "), _some(lesson["classes"], 4)
        cells = (number, when, classes, lesson["train"], lesson["held_out"], *shares)
        table.add_row(*(Text(printable(str(cell))) for cell in cells))
    Console().print(table)
    say(f"accuracy on all held-out images: {_percent(known['accuracy'])} %")
    if known["accuracy"] is None:
        say("probabilities are not calibrated: nothing is held out that the learner can be tested on")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _counted(count: int, one: str, several: str = "") -> str:
    return f"{count} {one if count == 1 else several or one + 's'}"


def _some(names: list[str], most: int) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
