"""Commands about datasets."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class SplitWanted(str, Enum):
    auto = "auto"
    official = "official"
    seeded = "seeded"


def prepare_data(
    dataset: Annotated[
        str,
        typer.Argument(
            help="cifar100, imagenet_r, imagenet_a, cub, omnibenchmark, vtab, objectnet.", metavar="DATASET"
        ),
    ],
    source: Annotated[Path, typer.Argument(help="The original download, an archive or its folder.", metavar="SOURCE")],
    out: Annotated[Path, typer.Argument(help="Folder to make, for data.root.", metavar="OUT")],
    split: Annotated[
        SplitWanted,
        typer.Option(help="official: CUB's own; seeded: drawn; auto: what the source holds, drawn if it holds none."),
    ] = SplitWanted.auto,
    seed: Annotated[int, typer.Option(help="Of a drawn split.")] = 1993,
    train_list: Annotated[
        Path | None, typer.Option(help="File with a training picture a line, below SOURCE's folder of classes.")
    ] = None,
    test_list: Annotated[
        Path | None, typer.Option(help="The same for test pictures; default: what else the listed classes have.")
    ] = None,
    allow_counts: Annotated[
        bool, typer.Option("--allow-counts", help="Take other numbers of pictures than the published split's.")
    ] = False,
) -> None:
    """Class folders in train/ and test/ from a published benchmark's original download.

    A split.json beside them says which split it is: the download's own, an archive of the published re-split, lists of
    files, or a drawn one of the published sizes. The same command again goes on with what was interrupted.
    """
    from cil.data.prepare import prepare

    found = prepare(
        dataset,
        source,
        out,
        split=split.value,
        seed=seed,
        train_list=train_list,
        test_list=test_list,
        allow_counts=allow_counts,
    )
    sizes = f"{found['classes']} classes, {found['train']} training and {found['test']} test pictures"
    typer.echo(f"{out}: {sizes}; {found['what']}")
