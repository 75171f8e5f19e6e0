"""The commands that judge: `harness check`, `baseline`, `verify`. No torch.

Exit codes of `check`: 0 passed, 1 regressed or missed, 3 cannot tell, 4 not comparable; 2 is a
user's mistake, as everywhere.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.options import HELP_FLAGS, Command, CommandGroup, refuse_duplicates
from harness.errors import HarnessError
from harness.escape import clean
from harness.files.places import check_file
from harness.gate.inputs import (
    parse_decide,
    parse_margin,
    parse_task_weights,
    percent_of,
    records_of,
)

if TYPE_CHECKING:
    from harness.gate.rules import CheckResult
    from harness.records.record import Measurement

baseline_app = typer.Typer(
    name="baseline",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    cls=CommandGroup,
    context_settings=HELP_FLAGS,
    help="Freeze accepted rows item by item, show what is frozen, and what changed.",
)

Records = Annotated[
    Path, typer.Argument(help="A run file, a store, a study or a folder of records.")
]
Margin = Annotated[
    str | None,
    typer.Option(
        help="Share of the teacher's score that must be kept: 0.95 (of choices: of what the "
        "teacher has above chance); "
        "or what may be lost: 2points.",
        show_default=False,
    ),
]
Rows = Annotated[
    list[str] | None,
    typer.Option(
        help="Only these rows, separated by commas. [default: every row that is no control]"
    ),
]


def check(
    place: Records = Path("results/runs"),
    baseline: Annotated[
        Path | None,
        typer.Option(help="The frozen rows to compare with (harness baseline update)."),
    ] = None,
    margin: Margin = None,
    rows: Rows = None,
    decide: Annotated[
        str,
        typer.Option(
            help="tasks: each must pass; pooled: a row's pooled items, where they pass, settle "
            "what a single task cannot."
        ),
    ] = "tasks",
    task_weights: Annotated[
        str,
        typer.Option(
            help="Of the pooled decision: items (each counts alike), tasks (each counts alike), or "
            "mmlu=2,gsm8k=1."
        ),
    ] = "items",
    alpha: Annotated[
        float,
        typer.Option(
            help="Of the claim against the teacher, one-sided; Holm over rows, tasks and pools."
        ),
    ] = 0.05,
    frozen_alpha: Annotated[
        float,
        typer.Option(
            help="Of the comparison with the frozen items, one-sided; Holm over rows, tasks and "
            "pools."
        ),
    ] = 0.01,
    tolerance: Annotated[
        float,
        typer.Option(help="Points: a smaller drop against the frozen score is a warning at most."),
    ] = 2.0,
    detect: Annotated[
        float,
        typer.Option(help="Points: a drop that the items must be able to show, else: cannot tell."),
    ] = 5.0,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Any flipped item is a regression, on the frozen machine and versions."
        ),
    ] = False,
    faster: Annotated[
        float | None,
        typer.Option(help="Decode speed over the teacher's, by turns, that must be reached."),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            help="File of `harness measure OLD NEW`: NEW may not be slower by more than --slower."
        ),
    ] = None,
    slower: Annotated[float, typer.Option(help="Slowdown that is tolerated.")] = 1.05,
    json_to: Annotated[
        Path | None, typer.Option("--json", help="Write the verdict as JSON.")
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
    """Judge rows: exit code 0 passed, 1 regressed or missed, 3 cannot tell, 4 not comparable.

    Exit code 2 is a mistake in what was typed.
    """
    from harness.gate import check as gate_check
    from harness.gate.rules import rules_with_margin
    from harness.planning.spec import joined_lists
    from harness.records.baseline import read_baseline
    from harness.renames.labels import current_labels

    for name, value in (("alpha", alpha), ("frozen-alpha", frozen_alpha)):
        if not 0 < value < 0.5:
            raise HarnessError(f"--{name} {value:g}: give a share between 0 and 0.5, such as 0.05")
    _refuse_thresholds(faster, slower)
    outputs = Outputs.of(json_to, junit, markdown, annotate=annotate)
    named = current_labels(joined_lists(rows), typed_in="--rows")
    refuse_duplicates("--rows", named)
    share, points = parse_margin(margin)
    rules = gate_check.Rules(
        margin=share,
        points=points,
        alpha=alpha,
        frozen_alpha=frozen_alpha,
        tolerance=percent_of("tolerance", tolerance),
        detect=percent_of("detect", detect),
        faster=faster,
        slower=slower,
        exact=exact,
        rows=tuple(named),
        task_weights=parse_task_weights(task_weights),
        decide=parse_decide(decide),
    )
    frozen = read_baseline(baseline) if baseline else None
    rules = rules_with_margin(frozen, rules)
    checked = gate_check.check(
        records_of(place), rules, frozen, measured=_read_measured(measured) if measured else ()
    )
    outputs.write(checked)
    return checked.exit_code


@dataclass(frozen=True)
class Outputs:
    """Where a verdict goes beside the terminal."""

    json: Path | None
    junit: Path | None
    markdown: Path | None
    annotates: bool  # for GitHub's log

    @classmethod
    def of(
        cls, json: Path | None, junit: Path | None, markdown: Path | None, *, annotate: bool | None
    ) -> "Outputs":
        """Fill in what GitHub's actions set where nothing was typed.

        Raises `HarnessError` for a file that cannot be written.
        """
        summary = markdown or (
            Path(name) if (name := os.environ.get("GITHUB_STEP_SUMMARY")) else None
        )
        for flag, path in (("--json", json), ("--junit", junit), ("--markdown", summary)):
            if path is not None:
                check_file(path, flag)
        annotates = os.environ.get("GITHUB_ACTIONS") == "true" if annotate is None else annotate
        return cls(json, junit, summary, annotates)

    def write(self, checked: "CheckResult") -> None:
        """Print a verdict and write its files."""
        from harness.gate import output

        typer.echo(output.terminal_text(checked))
        for path, form, mode in (
            (self.json, output.as_json, "w"),
            (self.junit, output.junit, "w"),
            (self.markdown, output.markdown, "a"),
        ):
            if path:
                _write(path, form(checked), mode)
        for line in output.annotations(checked) if self.annotates else ():
            typer.echo(line)


def _refuse_thresholds(faster: float | None, slower: float) -> None:
    """Refuse speeds that no measurement could reach or miss."""
    if faster is not None and faster <= 0:
        raise HarnessError(f"--faster {faster:g}: give a ratio of speeds above 0, such as 1.5")
    if slower < 1:
        raise HarnessError(
            f"--slower {slower:g}: give what is tolerated, 1 or more (1.05: five per cent slower)"
        )


def _write(path: Path, text: str, mode: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8", newline="\n") as stream:
            stream.write(text)
    except OSError as problem:
        raise HarnessError(
            f"cannot write {path} ({problem.strerror}); give another file"
        ) from problem


def _read_measured(path: Path) -> "list[tuple[str, Sequence[Measurement]]]":
    """Read the file of `harness measure`: the models after the first, by name."""
    from pydantic import ValidationError

    from harness.files.untrusted import read_object
    from harness.records.consistency import READING_CONTEXT, first_problem
    from harness.records.record import Measurement

    try:
        models = read_object(path)["models"]
        measured = [
            (
                str(model["name"]),
                [
                    Measurement.model_validate(measurement, context=READING_CONTEXT)
                    for measurement in model["measurements"]
                ],
            )
            for model in models[1:]
        ]
    except ValidationError as problem:
        raise HarnessError(
            f"--measured {path}: {first_problem(problem)}; type: harness measure OLD NEW"
        ) from problem
    except (ValueError, LookupError, TypeError, AttributeError) as problem:
        raise HarnessError(
            f"--measured {path}: not a file of harness measure ({problem}); type: harness measure "
            "OLD NEW"
        ) from problem
    if not measured:
        raise HarnessError(
            f"--measured {path}: no model stands beside the first; type: harness measure OLD NEW"
        )
    return [*measured]


@baseline_app.command("update", cls=Command)
def baseline_update(
    place: Records = Path("results/runs"),
    baseline: Annotated[Path, typer.Option(help="The file that is written.")] = Path(
        "results/baselines/baseline.json"
    ),
    reason: Annotated[
        str, typer.Option(help="Why it moves, in a few words; kept in the file.")
    ] = "",
    rows: Annotated[
        list[str] | None,
        typer.Option(
            help="Move only these rows (and the teacher's). [default: all of the records]"
        ),
    ] = None,
    margin: Margin = None,
    accept: Annotated[
        bool, typer.Option("--accept-regression", help="Make a regression the new standard.")
    ] = False,
    drop: Annotated[
        bool, typer.Option("--drop", help="Drop frozen rows that these records lack.")
    ] = False,
    own_margin: Annotated[
        bool,
        typer.Option(
            "--own-margin", help="Freeze rows that do not keep the margin with what they keep."
        ),
    ] = False,
) -> int:
    """Freeze rows that were accepted.

    Refuses failed, limited and dirty runs, regressions (also in small steps), and margins not met.
    """
    from harness.gate.baseline_tables import (
        change_lines,
        detectable_drop_lines,
        detectable_drops,
        holm_family_size,
    )
    from harness.gate.rules import Rules
    from harness.gate.update import update_baseline
    from harness.planning.spec import joined_lists
    from harness.renames.labels import current_labels

    check_file(baseline, "--baseline")
    named = current_labels(joined_lists(rows), typed_in="--rows")
    refuse_duplicates("--rows", named)
    share, points = parse_margin(margin)
    rules, records = Rules(margin=share, points=points), records_of(place)
    change = update_baseline(
        baseline,
        records,
        reason=reason,
        rules=rules,
        rows=named,
        accept=accept,
        drop=drop,
        own_margin=own_margin,
    )
    _echo_table(change_lines(change.previous, change.baseline))
    drops = detectable_drops(change.baseline, change.previous, records, rules)
    if drop_lines := detectable_drop_lines(drops):
        tests = f"Holm over {holm_family_size(change.baseline)} tests"
        typer.echo(
            f"\nWhat a check can see with these items (power .8, alpha {rules.frozen_alpha:g}, "
            f"{tests}):"
        )
        _echo_table(drop_lines)
    for note in change.notes:
        typer.echo(f"note: {note}")
    if change.baseline.history[-1].commit is None:
        typer.echo(
            "note: these records name no commit (an installed package); the file cannot say which "
            "code it is of"
        )
    typer.echo(
        f"{baseline}: {len(change.baseline.rows)} rows frozen, {baseline.stat().st_size:,} bytes; "
        "commit it"
    )
    return 0


@baseline_app.command("show", cls=Command)
def baseline_show(baseline: Annotated[Path, typer.Argument(help="A baseline.")]) -> int:
    """Show what is frozen, and when and why it changed."""
    from harness.gate.baseline_tables import baseline_lines, margin_text
    from harness.records.baseline import read_baseline

    frozen = read_baseline(baseline)
    _echo_table(baseline_lines(frozen))
    typer.echo(f"margin: {'none' if frozen.margin is None else margin_text(frozen)}")
    for change in frozen.history:
        accepted = f"; accepted: {', '.join(change.accepted)}" if change.accepted else ""
        anew = f"; started anew: {', '.join(change.anew)}" if change.anew else ""
        typer.echo(
            clean(
                f"{change.date} {(change.commit or '-')[:12]}: {change.reason} "
                f"({', '.join(change.rows)}){accepted}{anew}"
            )
        )
    return 0


@baseline_app.command("diff", cls=Command)
def baseline_diff(
    baseline: Annotated[Path, typer.Argument(help="A baseline.")],
    other: Annotated[Path, typer.Argument(help="Another baseline, or records.")],
) -> int:
    """Show what changed from a baseline to another one, or to records.

    Compares scores, items lost and won, and bytes.
    """
    from harness.files.untrusted import read_text_file
    from harness.gate.baseline_tables import change_lines
    from harness.records.baseline import Baseline, freeze_record, read_baseline

    old = read_baseline(baseline)
    if other.is_file() and '"baseline"' in read_text_file(other)[:400]:
        new = read_baseline(other)
    else:
        records = [record for record in records_of(other) if record.status == "success"]
        new = Baseline(history=(), rows=tuple(freeze_record(record) for record in records))
    _echo_table(change_lines(old, new))
    return 0


def _echo_table(lines: Sequence[dict[str, str]]) -> None:
    from tabulate import tabulate

    rows = [[clean(cell) for cell in line.values()] for line in lines]
    typer.echo(
        tabulate(
            rows, headers=list(lines[0]) if lines else [], tablefmt="plain", disable_numparse=True
        )
    )


def verify(
    place: Annotated[
        Path,
        typer.Argument(
            help="A record, a cell's folder, or what report takes: each record is checked."
        ),
    ],
    score: Annotated[
        bool, typer.Option("--score", help="Ask the model every question again, on this machine.")
    ] = False,
) -> int:
    """Check records against the files beside them: digests, items, weights.

    Prints the first difference of each record; exit code 1 where one differs.
    """
    from harness.records.store import record_files
    from harness.running.verify import verify as checked

    record_file = place / "record.json"
    paths, problems = ([record_file], []) if record_file.is_file() else record_files(place)
    results = [checked(path, score=score) for path in paths]
    for result in results:
        typer.echo(str(result))
    for line in problems:
        typer.echo(line, err=True)
    differing = sum(bool(result.difference) for result in results)
    typer.echo(f"{len(results)} records, {differing} differ")
    return 1 if differing or problems else 0
