"""The command that serves the page of a model that keeps learning."""

from __future__ import annotations

from typing import Annotated

import typer

from cil.app import REJECT
from cil.cli.growing import Device, Folder
from cil.cli.models import Code, Weights
from cil.cli.output import say
from cil.config.schema import MAX_PIXELS
from cil.growing import HOLDOUT


def teach(
    model: Folder,
    port: Annotated[int, typer.Option(help="Port; 0: any free port.", min=0, max=65535)] = 8017,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser of this machine.")] = True,
    holdout: Annotated[float, typer.Option(min=0, max=0.99, help="Share of a lesson's images held out")] = HOLDOUT,
    reject: Annotated[
        float, typer.Option(help="Fraction of the images of known classes that may be called unknown")
    ] = REJECT,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels above which an image is not decoded")] = MAX_PIXELS,
    device: Device = "auto",
    weights: Weights = None,
    code: Code = None,
) -> None:
    """Open a page to try a model on images, teach it, and undo. Only this machine can reach it. Ctrl-C stops it."""
    import os
    import signal
    import sys
    import webbrowser

    from rich.console import Console

    from cil.errors import RunError

    with Console(stderr=True).status("loading torch …"):
        try:
            from cil.app.server import serve
        except ModuleNotFoundError as error:
            if (error.name or "cil").split(".")[0] == "cil":
                raise
            raise RunError(f"cil teach needs {error.name}: pip install 'cil[app]'") from None
        from cil.app.teaching import Teacher

        teacher = Teacher(
            model,
            device=device,
            holdout=holdout,
            reject=reject,
            max_pixels=max_pixels,
            weights=weights,
            code=code or (),
        )

    def started(url: str) -> None:
        say(f"{url}   (Ctrl-C stops)")
        sys.stdout.flush()  # also to a pipe or a file, in which it would stay unseen until the end
        # a browser for terminals would take this one
        if browser and (sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            webbrowser.open(url)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as with Ctrl-C
    try:
        serve(
            teacher,
            port,
            started,
            lambda: say("stopping after the lesson, if there is one now; once more to stop at once", err=True),
        )
    except KeyboardInterrupt:
        say("stopped")
