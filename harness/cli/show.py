"""The command `harness show`: one row with all that made it. No torch."""

from pathlib import Path
from typing import Annotated

import typer

Row = Annotated[
    str, typer.Argument(help="A row's label, as tables show it: 'int4[group_size=32]'.")
]
Place = Annotated[
    Path,
    typer.Argument(
        metavar="[RUN]",
        help="The run file, store, study or folder of records that holds the row.",
    ),
]
Seed = Annotated[
    int | None, typer.Option(help="Which of the row's trainings. [default: the lowest seed]", min=0)
]


def show(row: Row, place: Place = Path("results/runs"), seed: Seed = None) -> int:
    """Show a row: settings, command, scores, stages, the student's files and their bytes, its log.

    A store is searched in its newest run first, then in all of its cells.
    """
    from harness.deploying.details import row_details
    from harness.deploying.row import find_row

    typer.echo(row_details(find_row(row, place, seed=seed)))
    return 0
