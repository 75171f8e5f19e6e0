"""The commands `harness export`: records for other programs, students for servers. No torch."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.options import HELP_FLAGS, Command, CommandGroup
from harness.cli.show import Place, Row, Seed
from harness.errors import HarnessError
from harness.files.places import check_folder
from harness.gate.inputs import records_of

if TYPE_CHECKING:
    from harness.records.record import RunRecord

export_app = typer.Typer(
    name="export",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    cls=CommandGroup,
    context_settings=HELP_FLAGS,
    help="Export a row's student for servers, or records as lm-eval's result JSON, as a datasets "
    "folder, or as runs of a tracker.",
)

Records = Annotated[
    Path, typer.Argument(help="A run file, a store, a study or a folder of records.")
]
Out = Annotated[Path, typer.Option(help="Where files are written.")]
Project = Annotated[str, typer.Option(help="Project or experiment of the tracker.")]
_RECORDS, _OUT, _PROJECT = Path("results/runs"), Path("results/exported"), "compression-harness"


class StudentForm(StrEnum):
    """What a student can be exported as."""

    safetensors = "safetensors"
    compressed_tensors = "compressed-tensors"
    gguf = "gguf"


Form = Annotated[
    StudentForm,
    typer.Option(
        help="safetensors: plain floats; compressed-tensors: int8 and int4 as vLLM and SGLang read "
        "them; gguf: for llama.cpp and Ollama (Llama architecture)."
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Type of floats: auto (none changes), float32, bfloat16, float16 (rounded; it is said "
        "by how much)."
    ),
]
Kind = Annotated[
    str,
    typer.Option(
        help="Of a GGUF file's matrices: auto (the student's own codes), f32, f16, bf16, q8_0, "
        "q4_0, q4_1."
    ),
]
Check = Annotated[
    str,
    typer.Option(help="Open the export again and score it on so many items of the row, all, none."),
]
Tolerance = Annotated[
    float,
    typer.Option(help="Share of these items that may be graded otherwise than in the record."),
]


@export_app.command("student", cls=Command)
def student(
    row: Row,
    place: Place = _RECORDS,
    form: Form = StudentForm.safetensors,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the student.", show_default=False)
    ] = None,
    dtype: Dtype = "auto",
    kind: Kind = "auto",
    check: Check = "50",
    tolerance: Tolerance = 0.04,
    seed: Seed = None,
) -> int:
    """Export a row's student in a form that others serve; it is opened and scored again.

    Exit code 1: the export does not answer as the row did, or does not hold its weights.
    """
    from harness.api import export_student
    from harness.cli.console import Console

    if out is None:
        raise HarnessError("--out is missing; name a new folder for the student: --out DIR")
    with Console() as console:
        export = export_student(
            row,
            place,
            form=form.value,
            out=out,
            dtype=dtype,
            kind=kind,
            check=check,
            tolerance=tolerance,
            seed=seed,
            progress=console.progress,
        )
    for line in export.lines():
        typer.echo(line)
    return 0 if export.passed else 1


@export_app.command("hub", cls=Command)
def hub(
    row: Row,
    place: Place = _RECORDS,
    to: Annotated[
        str, typer.Option(help="The repository on the Hub: ORG/NAME.", show_default=False)
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            help="A new folder for what is uploaded. [default: results/exported/ORG--NAME]",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str, typer.Option(help="The base model's Hub id, where the row has a path.")
    ] = "",
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the folder; upload nothing.")
    ] = False,
    form: Form = StudentForm.safetensors,
    dtype: Dtype = "auto",
    kind: Kind = "auto",
    check: Check = "50",
    tolerance: Tolerance = 0.04,
    seed: Seed = None,
) -> int:
    """Upload a row's student to the Hub with a card, evaluation metadata and the row's records.

    Exit code 1: the export did not pass its check, and was not uploaded.
    """
    from harness.api import export_hub
    from harness.cli.console import Console

    if not to:
        raise HarnessError("--to is missing; name a repository of yours on the Hub: --to ORG/NAME")
    with Console() as console:
        result = export_hub(
            row,
            place,
            to=to,
            out=out or _OUT / to.replace("/", "--"),
            base=base,
            private=private,
            dry_run=dry_run,
            form=form.value,
            dtype=dtype,
            kind=kind,
            check=check,
            tolerance=tolerance,
            seed=seed,
            progress=console.progress,
        )
    for line in result.lines():
        typer.echo(line)
    return 0 if result.export.passed else 1


def _successful(place: Path, out: Path) -> "list[RunRecord]":
    """Return the records of a place that succeeded; refuse a folder that cannot be written."""
    check_folder(out, "--out")
    records = [record for record in records_of(place) if record.status == "success"]
    if not records:
        raise HarnessError(f"{place}: no record that succeeded; type: harness run")
    return records


def _say(written: list[str]) -> int:
    typer.echo(f"written: {', '.join(written)}")
    return 0


@export_app.command("lm-eval", cls=Command)
def lm_eval(place: Records = _RECORDS, out: Out = _OUT) -> int:
    """Write each record as lm-eval's result JSON."""
    from harness.records.export import to_lm_eval

    return _say(list(map(str, to_lm_eval(_successful(place, out), out))))


@export_app.command("datasets", cls=Command)
def datasets(place: Records = _RECORDS, out: Out = _OUT) -> int:
    """Write the items of records as a datasets folder, a split for each record."""
    from harness.records.export import to_datasets
    from harness.records.samples import evidence_of

    records = _successful(place, out)
    return _say(list(map(str, to_datasets(records, evidence_of(place, records), out))))


def _to_tracker(name: str, place: Path, project: str) -> int:
    from harness.records.export import to_tracker

    return _say(to_tracker(name, _successful(place, Path()), project=project))


@export_app.command("mlflow", cls=Command)
def mlflow(place: Records = _RECORDS, project: Project = _PROJECT) -> int:
    """Write each record as a run of MLflow (MLFLOW_TRACKING_URI says where)."""
    return _to_tracker("mlflow", place, project)


@export_app.command("wandb", cls=Command)
def wandb(place: Records = _RECORDS, project: Project = _PROJECT) -> int:
    """Write each record as a run of W&B (WANDB_MODE says where)."""
    return _to_tracker("wandb", place, project)


@export_app.command("trackio", cls=Command)
def trackio(place: Records = _RECORDS, project: Project = _PROJECT) -> int:
    """Write each record as a run of trackio."""
    return _to_tracker("trackio", place, project)
