"""``python -m cil`` is the command line."""

from cil.cli import main

main()
