"""The command `harness recommend`: which row to take. No torch."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.options import refuse_duplicates
from harness.files.places import check_file


class Taken(StrEnum):
    """Which of the rows that hold is taken."""

    smallest = "smallest"
    fastest = "fastest"


def recommend(
    place: Annotated[
        Path, typer.Argument(help="A run file, a store, a study or a folder of records.")
    ] = Path("results/runs"),
    keep: Annotated[
        str,
        typer.Option(
            help="Share of the teacher's score that must be kept on every task: 0.98 (of choices: "
            "of what it has above chance); or what may be lost: 2points."
        ),
    ] = "0.95",
    memory: Annotated[
        str | None, typer.Option(help="Bytes that using it may take at the peak: 8GiB, 500MiB.")
    ] = None,
    faster: Annotated[
        float | None,
        typer.Option(help="Decode speed over the teacher's that must be reached, by its bound."),
    ] = None,
    smaller: Annotated[
        float | None,
        typer.Option(help="How many times smaller than the teacher it must be on disk."),
    ] = None,
    on: Annotated[
        list[str] | None,
        typer.Option(help="Only these tasks, separated by commas. [default: every task]"),
    ] = None,
    take: Annotated[
        Taken, typer.Option(help="Which of the rows that hold: the smallest or the fastest.")
    ] = Taken.smallest,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these rows, separated by commas: fewer rows need fewer items. [default: "
            "every row that is no control]"
        ),
    ] = None,
    alpha: Annotated[
        float,
        typer.Option(help="Of naming a row that does not keep it, one-sided; Holm over the rows."),
    ] = 0.05,
    json_to: Annotated[
        Path | None, typer.Option("--json", help="Write the decision as JSON.")
    ] = None,
) -> int:
    """Name the smallest or fastest row that is shown to keep what was asked, or say that none is.

    Exit code 0 a row is named, 1 no row can, 3 cannot tell, 2 a mistake in what was typed.
    """
    from harness.api import recommend as recommended
    from harness.files.writing import write_atomically
    from harness.planning.spec import joined_lists
    from harness.renames.labels import current_labels
    from harness.reporting.recommendation import decision_json, decision_text

    if json_to is not None:
        check_file(json_to, "--json")
    tasks, labels = joined_lists(on) or [], current_labels(joined_lists(rows), typed_in="--rows")
    refuse_duplicates("--on", tasks)
    refuse_duplicates("--rows", labels)
    decision = recommended(
        place,
        keep=keep,
        memory=memory,
        faster=faster,
        smaller=smaller,
        on=tasks,
        take=take.value,
        rows=labels,
        alpha=alpha,
    )
    typer.echo(decision_text(decision))
    if json_to is not None:
        write_atomically(json_to, decision_json(decision))
    return decision.exit_code
