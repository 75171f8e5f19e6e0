"""The command `harness score`: models side by side, without a teacher. No torch."""

from typing import Annotated

import typer

from harness.cli.options import ConfigCommand

# settings of rows that are made; no model is made here
_OF_METHODS = frozenset(
    {
        "methods",
        "checkpoint",
        "teacher",
        "student",
        "seeds",
        "budget",
        "rows",
        "tune",
        "set",
        "controls",
        "train_data",
        "calibration",
        "overlap",
        "noise",
        "track",
    }
)


class ScoreCommand(ConfigCommand):
    """A command that takes the settings of a run but those of methods."""

    left_out = _OF_METHODS


def score(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            help="Models, as --checkpoint takes them: folders, FILE.gguf, llama-cpp:FILE.gguf, "
            "Hub ids, adapters. Those after the first are compared with it, item by item.",
            show_default=False,
        ),
    ],
) -> int:
    """Score models and measure speed and size; the others are paired with the first.

    A model is opened as it is. What was scored before is not scored again.
    """
    from harness.api import plan_scores
    from harness.cli.console import Console
    from harness.running.runner import failure_lines, run_plan

    plan = plan_scores(models, context.obj, say=lambda line: typer.echo(line, err=True))
    with Console() as console:
        results, path = run_plan(plan, callbacks=console.callbacks())
    records = [result.record for result in results if result.record is not None]
    if len(records) == len(models):
        from harness.reporting.scores import scores_table

        typer.echo("\n" + scores_table(models, records))
    typer.echo(f"records: {path} (all tables: harness report {path})")
    lines = failure_lines(results)
    for line in lines:
        typer.echo(line, err=True)
    is_scored = (result.record and result.record.status != "failed" for result in results)
    return 0 if all(is_scored) else 1
