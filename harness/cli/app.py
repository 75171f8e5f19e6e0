"""The command `harness`: options in, exit code out.

Exit codes: 0 done, 1 a cell failed, 2 a user's mistake, 130 stopped.
"""

import logging
import sys
import traceback
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.check import baseline_app, check, verify
from harness.cli.compare import compare
from harness.cli.data import data_app
from harness.cli.ending import catch_signals, exit_code_of, flush_output, guard_streams
from harness.cli.export import export_app
from harness.cli.options import HELP_FLAGS, Command, CommandGroup, ConfigCommand, refuse_duplicates
from harness.cli.recommend import recommend
from harness.cli.score import ScoreCommand, score
from harness.cli.show import show
from harness.errors import CellFailed, HarnessError, OldName, unknown

if TYPE_CHECKING:
    from harness.api import Run
    from harness.records.record import RunRecord

app = typer.Typer(
    name="harness",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    cls=CommandGroup,
    context_settings=HELP_FLAGS,
    help="Compress language models in many ways, score every student in one way, and write the "
    "tables.",
)


app.command(cls=ScoreCommand)(score)
app.command(cls=Command)(check)
app.command(cls=Command)(compare)
app.command(cls=Command)(recommend)
app.command(cls=Command)(show)
app.add_typer(baseline_app)
app.add_typer(data_app)
app.add_typer(export_app)
app.command(cls=Command)(verify)


class ListedKind(StrEnum):
    """What can be listed."""

    methods = "methods"
    suites = "suites"
    tasks = "tasks"
    models = "models"


class CacheAction(StrEnum):
    """What can be done with the cache."""

    ls = "ls"
    verify = "verify"
    prune = "prune"


@app.command(cls=ConfigCommand)
def run(
    context: typer.Context,
    file: Annotated[
        Path | None,
        typer.Argument(
            help="A TOML file with the options below as keys; options typed here win.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and an estimate; compute nothing.")
    ] = False,
) -> int:
    """Make students, score and measure them beside their teacher, and write the tables.

    Cells that are finished are skipped.
    """
    from harness.api import Run, check_places, plan_run
    from harness.cli.console import Console
    from harness.cli.dry_run import plan_lines, subset_lines
    from harness.planning.config import build_config, merge_values, read_run_file
    from harness.running.runner import failure_lines, run_plan

    config = build_config(
        merge_values(read_run_file(file) if file else {}, context.obj),
        where=str(file) if file else "",
    )

    def say(line: str) -> None:
        typer.echo(line, err=True)

    if not dry_run:
        check_places(config, say=say)
    plan = plan_run(config, say=say)
    if dry_run:
        for line in plan_lines(plan):
            typer.echo(line)
        return 0
    for line in subset_lines(plan):
        say(line)
    with Console() as console:
        results, path = run_plan(plan, callbacks=console.callbacks())
    _show_results(Run(plan, tuple(results), path))
    failed_lines = failure_lines(results)
    for line in failed_lines:
        typer.echo(line, err=True)
    return (
        0
        if all(result.record is not None and result.record.status != "failed" for result in results)
        else 1
    )


def _show_results(run: "Run") -> None:
    """Print a run's tables, write them and the page beside its file."""
    from harness.records.samples import evidence_of
    from harness.reporting.formats import as_markdown, write_sections
    from harness.reporting.html_page import write_page
    from harness.reporting.report import build_sections

    path, records = run.path, list(run.records)
    sections, folder = build_sections(records), path.with_suffix("")
    typer.echo("\n" + as_markdown(sections))
    write_sections(sections, folder)
    [page, *_] = write_page(sections, folder, evidence=evidence_of(path, records))
    typer.echo(f"tables: {folder}  page: {page}  records: {path} (again: harness report {path})")


@app.command("list", cls=Command)
def list_(what: Annotated[ListedKind, typer.Argument(help="What to list.")]) -> int:
    """List methods, suites, tasks or models with one line each."""
    from harness import catalog

    if what is ListedKind.suites:
        lines = {
            name: f"{suite.help} ({', '.join(suite.tasks)})"
            for name, suite in catalog.SUITES.items()
        }
    elif what is ListedKind.models:
        from harness.models.resolve import EMBEDDED_MODELS

        lines = dict.fromkeys(EMBEDDED_MODELS, "embedded teacher, about 1.7 million parameters")
        lines |= {
            "FOLDER": "a folder saved with save_pretrained",
            "FILE.gguf": "a GGUF file, unpacked to floats once",
            "ORG/NAME": "a model of the Hub",
        }
    else:
        registry = catalog.methods() if what is ListedKind.methods else catalog.tasks()
        lines = {name: registry.summary(name) for name in registry.table}
    width = max(map(len, lines))
    for name, text in lines.items():
        typer.echo(f"{name:{width}}  {text}")
    return 0


@app.command(cls=Command)
def report(
    place: Annotated[
        Path | None, typer.Argument(help="A run file, a store, a study or a folder of records.")
    ] = Path("results/runs"),
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where to write table.md and the CSV files. [default: tables/ beside the records]"
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Copy the records into this study's records/ and write its tables/ beside them."
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(help="Money per device-hour: adds what each training cost.", min=0),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows, separated by commas: adds a table of every row's difference from each of "
            "them."
        ),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            help="Order rows by a column, best first (-COLUMN: worst first); families stay "
            "together. [default: score]"
        ),
    ] = None,
    forms: Annotated[
        list[str] | None,
        typer.Option(
            help="Which files to write: md, csv, tex, json. [default: md,csv,tex,json]",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        bool,
        typer.Option(
            "--html", help="Write also page.html: one file with tables, pictures and answers."
        ),
    ] = False,
    plots: Annotated[
        bool, typer.Option("--plots", help="Write also each picture as PNG and SVG.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print what each column means and stop.")
    ] = False,
) -> int:
    """Write the tables of records: the same records give the same bytes. Needs no torch."""
    from harness.cli.tables import ReportFiles, forms_to_write, sections_of, tables_folder
    from harness.files.places import check_folder
    from harness.planning.spec import joined_lists
    from harness.records.store import copy_to_study, read_records
    from harness.renames.labels import current_labels
    from harness.reporting.formats import as_markdown
    from harness.reporting.glossary import glossary

    if explain:
        typer.echo(glossary())
        return 0
    assert place is not None
    for flag, folder in (("--out", out), ("--keep", keep)):
        if folder is not None:
            check_folder(folder, flag)
    references = current_labels(joined_lists(against), typed_in="--against")
    refuse_duplicates("--against", references)
    refuse_duplicates("--forms", joined_lists(forms) or [])
    records, problems = read_records(place)
    for line in problems:
        typer.echo(f"skipped {line}", err=True)
    if records:
        sections = sections_of(records, price=price, against=references, sort=sort)
        files = ReportFiles(
            folder=out or tables_folder(place, keep),
            forms=forms_to_write(joined_lists(forms)),
            page=html,
            pictures=plots,
        )
        if keep:
            copy_to_study(records, keep / "records")
        typer.echo(as_markdown(sections))
        written = files.write(sections, records, place)
        typer.echo(f"written: {', '.join(str(path) for path in written)}")
    return 1 if problems else 0


@app.command(cls=Command)
def measure(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Models; each after the first is timed by turns with it."),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="Prompt tokens x batch x new tokens, lists combined, or full. [default: "
            "128x1x32; GPU: 2048x1x32 128x32x64]"
        ),
    ] = None,
    rounds: Annotated[
        str | None,
        typer.Option(
            help="Rounds of base, model, model, base; auto:0.02:4-12 stops when intervals are "
            "within 2 %, after 4 to 12. [default: 10; GPU: auto]"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of each model. [default: the CPUs that may be used]", min=1),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where GGUF files are unpacked to. [default: as in run]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the file with every raw value.")] = Path(
        "results/runs/measured"
    ),
) -> int:
    """Time and weigh models; speeds are ratios to the first model.

    Measures the first token, later tokens, and the bytes of weights, cache and peak.
    """
    from harness.api import measure_models
    from harness.cli.console import Console
    from harness.files.places import check_folder
    from harness.reporting.measured import ModelTimings, measurement_tables

    if device not in ("auto", "cpu", "cuda") or dtype not in ("auto", "float32", "bfloat16"):
        raise HarnessError(
            f"--device {device} --dtype {dtype}: devices are auto, cpu, cuda; dtypes auto, "
            "float32, bfloat16"
        )
    check_folder(out, "--out")
    with Console() as console:
        measured, path = measure_models(
            models or [],
            grid=grid,
            rounds=rounds,
            device=device,
            dtype=dtype,
            threads=threads,
            cache=cache,
            out=out,
            progress=console.progress,
            say=console.say,
        )
    timed = [
        ModelTimings(model.name, model.measured.measurements, model.measured.skipped)
        for model in measured
    ]
    typer.echo(measurement_tables(timed))
    typer.echo(f"every raw value: {path}")
    return 0


@app.command(cls=Command)
def plan(
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Chains, separated by commas: cot,response+int4. [default: cot,response]",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        str, typer.Option(help="A model, or a size as the nearest public shape: 70B.")
    ] = "tiny",
    student: Annotated[
        str,
        typer.Option(help="depth:S, width:S or scratch:S of the teacher, a model, or a size: 7B."),
    ] = "depth:0.5",
    hardware: Annotated[
        str,
        typer.Option(help="cpu (this machine), cpu:CORESxMEMORYGB, 8xH100, or by memory: 8x80GB."),
    ] = "cpu",
    suite: Annotated[
        list[str] | None,
        typer.Option(help="Suites or tasks that are scored. [default: math]", show_default=False),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            help="Seen tokens of a trained row. [default: 250000 for the embedded pair, else "
            "1000000]",
            min=100,
        ),
    ] = None,
    rows: Annotated[int, typer.Option(help="Distinct training items.", min=1)] = 2_000,
    limit: Annotated[
        int | None, typer.Option(help="Items scored of each task. [default: all]", min=1)
    ] = None,
    price: Annotated[float | None, typer.Option(help="Money per device-hour.", min=0)] = None,
    records: Annotated[
        list[Path] | None,
        typer.Option(
            help="Records of this machine, for its rates; repeatable. [default: results/runs where "
            "it exists]"
        ),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where GGUF files are unpacked to. [default: as in run]")
    ] = None,
) -> int:
    """Estimate memory, time, tokens and money of chains on some hardware. Computes nothing."""
    from harness.api import estimate_plans
    from harness.estimating.estimate import estimate_text
    from harness.planning.spec import joined_lists

    refuse_duplicates("--methods", joined_lists(methods) or [])
    refuse_duplicates("--suite", joined_lists(suite) or [])
    estimates = estimate_plans(
        ["cot", "response"] if methods is None else joined_lists(methods) or [],
        teacher=teacher,
        student=student,
        hardware=hardware,
        suite=joined_lists(suite) or ["math"],
        budget=budget,
        rows=rows,
        limit=limit,
        records=_rate_records(records),
        cache=cache,
    )
    for estimate in estimates:
        typer.echo(estimate_text(estimate, price=price) + "\n")
    return 0 if all(stage.fits for estimate in estimates for stage in estimate.stages) else 1


def _rate_records(places: list[Path] | None) -> "list[RunRecord]":
    """Return the records that this machine's rates come from.

    They are those of the named places, else those of the usual place where it exists.
    """
    from harness.records.store import read_records

    records: list[RunRecord] = []
    for place in places or [usual for usual in (Path("results/runs"),) if usual.exists()]:
        records_of_place, problems = read_records(place)
        records += records_of_place
        for line in problems:
            typer.echo(f"skipped {line}", err=True)
    return records


@app.command(cls=Command)
def cache(
    what: Annotated[
        CacheAction,
        typer.Argument(
            help="ls: list; verify: check every digest; prune: delete what is damaged or old."
        ),
    ],
    folder: Annotated[
        Path | None, typer.Option("--cache", help="The cache folder. [default: as in run]")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Only answers, traces, teachers or gguf.")
    ] = None,
    older_than: Annotated[
        float | None,
        typer.Option(help="prune: delete also what was last written more days ago.", min=0),
    ] = None,
) -> int:
    """List, verify or prune what teachers computed; it is computed again when needed."""
    from harness.models.artefacts import (
        KINDS,
        cache_entries,
        default_cache,
        entry_damage,
        entry_note,
        remove_entry,
    )

    place = folder or default_cache()
    if kind is not None and kind not in KINDS:
        raise unknown("kind of artefact", kind, KINDS)
    if folder is not None and not folder.is_dir():
        raise HarnessError(f"no cache folder at {folder}; leave --cache out for {default_cache()}")
    artefacts = [artefact for artefact in cache_entries(place) if kind in (None, artefact.kind)]
    damaged = 0
    for artefact in artefacts:
        line = (
            f"{artefact.kind:8}  {artefact.path.stem[:32]:32}  {artefact.bytes / 2**20:10.2f} MiB  "
            f"{artefact.days:6.1f} days"
        )
        damage = "" if what is CacheAction.ls else entry_damage(artefact)
        damaged += bool(damage)
        if what is CacheAction.prune:
            if not damage and (older_than is None or artefact.days <= older_than):
                continue
            remove_entry(artefact)
            line += f"  deleted{f' ({damage})' if damage else ''}"
        elif what is CacheAction.verify:
            line += f"  DAMAGED: {damage}" if damage else "  whole"
        elif note := entry_note(artefact):
            line += f"  {note}"
        typer.echo(line)
    mebibytes = sum(artefact.bytes for artefact in artefacts) / 2**20
    typer.echo(f"{len(artefacts)} artefacts, {mebibytes:,.2f} MiB in {place}")
    return 1 if damaged and what is CacheAction.verify else 0


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def lm_eval_(context: typer.Context) -> int:
    """Run lm-eval's own command with our scorer: --model harness --model_args pretrained=NAME."""
    from lm_eval.__main__ import cli_evaluate

    import harness.scoring.lm_eval_model  # noqa: F401  importing it registers the model; lm-eval has no plug-in hook of its own

    sys.argv = ["lm_eval", *context.args]
    cli_evaluate()
    return 0


@app.command("train-tiny", cls=Command)
def train_tiny(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the models. [default: the package's own embedded/]"),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Train one of them: tiny or tiny-math.")] = None,
    budget: Annotated[
        int | None,
        typer.Option(help="Seen tokens, in place of the recipe's (for a trial).", min=100),
    ] = None,
) -> int:
    """Train the embedded teachers (tokenizer, tiny, tiny-math) and score them on test splits."""
    from harness.api import train_embedded
    from harness.cli.console import Console
    from harness.files.places import check_folder

    if out is not None:
        check_folder(out, "--out")
    with Console() as console:
        for line in train_embedded(out, only=only, budget=budget, progress=console.progress):
            console.say(line)
    return 0


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    guard_streams()
    catch_signals()
    sys.exit(flush_output(exit_code_of(_command)))


def _command() -> int:
    """Run the command that was typed and return its exit code."""
    _show_old_names_in_one_line()
    # where torchao is installed, its enums are announced at every start
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    try:
        code = app(standalone_mode=False) or 0
    except HarnessError as problem:
        print(f"harness: {problem}", file=sys.stderr)
        code = 2
    except CellFailed as problem:
        print(f"harness: {problem}", file=sys.stderr)
        code = 1
    except typer.Abort:
        raise KeyboardInterrupt from None
    except OSError:
        raise
    except Exception as problem:
        # a click usage error: unknown option, missing argument
        if not hasattr(problem, "format_message"):
            if sys.argv[1:2] not in (["check"], ["compare"], ["recommend"]):
                raise
            traceback.print_exc()  # a defect of ours: 1 would say that a model regressed
            return 2
        print(
            f"harness: {problem.format_message()} (type: {_typed_path(problem)} --help)",
            file=sys.stderr,
        )
        code = 2
    return code


def _typed_path(problem: Exception) -> str:
    """Return the command whose options a usage error is about, such as `harness report`."""
    context, names = getattr(problem, "ctx", None), []
    while context is not None and context.parent is not None:
        names.append(context.info_name)
        context = context.parent
    return " ".join(["harness", *reversed(names)])


def _show_old_names_in_one_line() -> None:
    """Print the use of an old name in one line, and other warnings as usual."""
    show_others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **named: Any) -> None:
        if issubclass(category, OldName):
            print(f"harness: {message}", file=sys.stderr)
        else:
            show_others(message, category, *place, **named)

    warnings.showwarning = show


if __name__ == "__main__":
    main()
