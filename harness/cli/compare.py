"""The command `harness compare`: two models that were scored on the same items. No torch."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.check import Outputs
from harness.cli.options import refuse_duplicates
from harness.errors import HarnessError
from harness.gate.inputs import parse_task_weights, percent_of

_SIDES = (
    "A samples_*.jsonl of lm-eval, its folder or its results_*.json; or ours: a run, store or "
    "study with its row (results/runs#int8), a cell's folder, a samples.jsonl."
)


def compare(
    before: Annotated[str, typer.Argument(help=f"The model to compare with. {_SIDES}")],
    after: Annotated[str, typer.Argument(help="The model that is judged, in any of these forms.")],
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Only these tasks, separated by commas. [default: all that both have]"),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Of tasks with several: acc_norm. [default: the first of both logs]"),
    ] = None,
    filter_: Annotated[
        str | None,
        typer.Option(
            "--filter", help="Of tasks with several: flexible-extract. [default: the first]"
        ),
    ] = None,
    other_prompts: Annotated[
        bool,
        typer.Option(
            "--other-prompts",
            help="Compare the same documents in other prompts: other shots or templates.",
        ),
    ] = False,
    task_weights: Annotated[
        str,
        typer.Option(
            help="Of the pooled test: items (each counts alike), tasks (each counts alike), or "
            "mmlu=2,gsm8k=1."
        ),
    ] = "items",
    alpha: Annotated[
        float, typer.Option(help="One-sided, of a loss; Holm over tasks and their pool.")
    ] = 0.01,
    tolerance: Annotated[
        float, typer.Option(help="Points: a smaller drop is a warning at most.")
    ] = 2.0,
    detect: Annotated[
        float,
        typer.Option(help="Points: a drop that the items must be able to show, else: cannot tell."),
    ] = 5.0,
    json_to: Annotated[
        Path | None,
        typer.Option("--json", help="Write verdict and changed items as JSON."),
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the verdict as JUnit XML.")] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(help="Append Markdown here. [default: $GITHUB_STEP_SUMMARY where it is set]"),
    ] = None,
    annotate: Annotated[
        bool | None,
        typer.Option(
            "--annotate/--no-annotate",
            help="Print annotations for GitHub's log. [default: where GITHUB_ACTIONS is set]",
        ),
    ] = None,
) -> int:
    """Say whether the second of two scored models lost anything: lm-eval's logs, or rows of ours.

    Exit code 0 passed, 1 regressed, 3 cannot tell, 4 not comparable, 2 a mistake in what was typed.
    """
    from harness.gate.compare import FigureChoice, changed_text, compare_models
    from harness.gate.compare_inputs import read_logged_model
    from harness.gate.rules import Rules
    from harness.planning.spec import joined_lists

    if not 0 < alpha < 0.5:
        raise HarnessError(f"--alpha {alpha:g}: give a share between 0 and 0.5, such as 0.01")
    outputs = Outputs.of(json_to, junit, markdown, annotate=annotate)
    named = joined_lists(tasks) or []
    refuse_duplicates("--tasks", named)
    rules = Rules(
        frozen_alpha=alpha,
        tolerance=percent_of("tolerance", tolerance),
        detect=percent_of("detect", detect),
        task_weights=parse_task_weights(task_weights),
    )
    first, second = read_logged_model(before), read_logged_model(after)
    if first.name == second.name:  # two folders may have one name
        first, second = replace(first, name=before), replace(second, name=after)
    comparison = compare_models(
        first,
        second,
        rules,
        FigureChoice(metric=metric, filter=filter_),
        tasks=named,
        other_prompts=other_prompts,
    )
    if text := changed_text(comparison):
        typer.echo(text)
    outputs.write(comparison)
    return comparison.exit_code
