"""The command line. Heavy imports happen only within the commands that need them, so ``cil --help`` is fast."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from cil.cli import benchmark, cache, data, launched, learners, models, sweep
from cil.errors import CilError

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
app.add_typer(cache.app, name="cache")


def main() -> NoReturn:
    """Entry point. A user's mistake is reported as one line on stderr, with exit code 2.

    Of several processes (``accelerate launch``) the one that meets the fault first prints it, and all end.
    """
    try:
        with launched.watched():
            app(standalone_mode=True)
    except CilError as error:
        _end(str(error))
    except Exception as error:
        if launched.lost_another(error):
            _end("another process of this command has ended without a message; was it killed, or out of memory?")
        if launched.announce():
            raise
        _end("")
    sys.exit(0)


def _end(message: str) -> NoReturn:
    if launched.announce():
        for line in message.splitlines():
            print(f"cil: {line}", file=sys.stderr, flush=True)
    launched.leave()
    sys.exit(launched.CODE)
