"""The command line. Heavy imports happen only within the commands that need them, so ``cil --help`` is fast."""

from __future__ import annotations

import re
import sys
from typing import NoReturn

import typer

from cil.cli import benchmark, cache, data, growing, launched, learners, models, reuse, sweep, teach
from cil.cli.output import prepare_streams, say
from cil.errors import CilError, clipped

NO_MEMORY = "out of memory|allocate memory|Storage size calculation overflowed"
"""What torch says if a tensor is too large for the machine."""

app = typer.Typer(
    name="cil",
    help="Class-incremental learning on frozen pre-trained vision transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(benchmark.run)
app.command()(sweep.sweep)
app.command()(sweep.tune)
app.command()(sweep.rank_backbones)
app.command()(benchmark.compare)
app.command()(benchmark.tensorboard)
app.command()(data.prepare_data)
app.command("list")(learners.list_)
app.command()(learners.check_learner)
app.command()(learners.new_learner)
app.command()(models.merge)
app.command()(models.export)
app.command()(models.predict)
app.command()(reuse.join)
app.command()(reuse.find)
app.command()(growing.learn)
app.command()(growing.undo)
app.command()(growing.show)
app.command()(growing.forget)
app.command()(growing.rename)
app.command()(teach.teach)
app.add_typer(cache.app, name="cache")


def main() -> NoReturn:
    """Entry point. A user's mistake is reported as one line on stderr, with exit code 2.

    Of several processes (``accelerate launch``) the one that meets the fault first prints it, and all end.
    """
    prepare_streams()
    try:
        with launched.watched():
            app(standalone_mode=True)
    except CilError as error:
        _end(str(error))
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(NO_MEMORY, str(error))):
            reason = clipped(str(error).split("\n")[0], 200) or type(error).__name__
            _end(f"there is not enough memory ({reason}); a smaller batch size, width or number of images needs less")
        if launched.lost_another(error):
            _end("another process of this command has ended without a message; was it killed, or out of memory?")
        if launched.announce():
            raise
        _end("")
    sys.exit(0)


def _end(message: str) -> NoReturn:
    if launched.announce():
        for line in message.split("\n") if message else ():
            say(f"cil: {line}", err=True)
        sys.stderr.flush()
    launched.leave()
    sys.exit(launched.CODE)
