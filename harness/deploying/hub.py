"""A folder for the Hub: a row's student, a card with what was measured, the records; its upload.

The card's YAML has the scores as `model-index`; `.eval_results/` has them in the Hub's own form for
those tasks whose items are a data set of the Hub. A licence is the user's to choose: none is
written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import catalog
from harness.analysis.single import score_interval
from harness.contract import Progress, Task
from harness.deploying.row import StoredRow
from harness.deploying.student import Export, ExportOptions, export_student
from harness.errors import CellFailed, HarnessError, in_one_line
from harness.escape import markdown_cell, markdown_text
from harness.files.writing import write_atomically
from harness.records import columns
from harness.records.export import record_file_name
from harness.records.model_card import card_text, starting_model
from harness.records.record import TEACHER, RunRecord, write_record
from harness.records.store import read_records
from harness.statistics.intervals import Interval

RESULTS = Path(".eval_results") / "compression-harness.yaml"
SOURCE = "https://github.com/compression-harness/compression-harness"
_RELATION = {"quantization": "quantized"}  # of a family's students to their base; else finetune


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Where a student goes on the Hub."""

    to: str  # ORG/NAME
    base: str = ""  # the Hub id of the base model, where the row's own name of it is none
    private: bool = False
    dry_run: bool = False  # write the folder and upload nothing


@dataclass(frozen=True)
class HubExport:
    """A folder for the Hub, and where it was uploaded to; "" where it was not."""

    folder: Path
    export: Export
    notes: tuple[str, ...]
    url: str

    def lines(self) -> list[str]:
        """Return what was written and where it went, a line each."""
        lines = [*self.export.lines(), *(f"- {note}" for note in self.notes)]
        if self.url:
            return [*lines, f"uploaded: {self.url}"]
        reason = "" if self.export.passed else ": the export did not pass its check"
        return [*lines, f"not uploaded{reason}; the folder is {self.folder}"]


def export_hub(
    row: StoredRow,
    out: Path,
    options: ExportOptions,
    hub: HubOptions,
    *,
    progress: Callable[[Progress], None] = lambda _: None,
) -> HubExport:
    """Write a folder for the Hub into the new folder `out` and upload it.

    An export that does not pass its check is not uploaded. Raises `HarnessError` for a name that is
    no repository's, for what the form cannot express, and for what the Hub refuses.
    """
    _refuse_name(hub.to)
    if hub.base:
        _refuse_name(hub.base, option="--base")
    export = export_student(row, out, options, progress=progress)
    base = hub.base or _hub_id(starting_model(row.record).name)
    tasks = _tasks_of(row)
    text = hub_card(row.record, hub.to, base=base, datasets=tasks, export=export, options=options)
    write_atomically(out / "README.md", text)
    _write_records(row, out / "records")
    _write_results(row.record, out / RESULTS, tasks)
    finished = HubExport(out, export, tuple(_notes(row.record, base)), "")
    if hub.dry_run or not export.passed:
        return finished
    return replace(finished, url=_upload(out, hub))


def _refuse_name(name: str, *, option: str = "--to") -> None:
    """Raise `HarnessError` for a text that is no ORG/NAME of the Hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as problem:
        raise HarnessError(f"{option} {name}: {problem}; give ORG/NAME") from problem
    if name.count("/") != 1:
        raise HarnessError(f"{option} {name}: give ORG/NAME, a repository of yours on the Hub")


def _hub_id(name: str) -> str:
    """Return a model's name where it is a Hub id; "" for a path, a file and an embedded model."""
    from harness.models.resolve import is_hub_id

    plain = name.partition("@")[0]
    is_path = name.startswith(("/", "~", ".")) or Path(name).exists()
    return plain if "/" in plain and not is_path and is_hub_id(name) else ""


def _tasks_of(row: StoredRow) -> dict[str, str]:
    """Return the Hub data set of each task of a row that has one, by the task's name."""
    datasets = {}
    for score in row.record.scores:
        try:
            task: Task = catalog.load_task(score.task)
        except (HarnessError, CellFailed):  # a task of the user's own, by files that are not here
            continue
        named = tuple(getattr(task, "hub_datasets", ()))
        if len(named) == 1:
            datasets[score.task] = str(named[0])
    return datasets


def hub_card(
    record: RunRecord,
    name: str,
    *,
    base: str,
    datasets: Mapping[str, str],
    export: Export,
    options: ExportOptions,
) -> str:
    """Return the card of a student on the Hub: YAML in front, then the same for people."""
    metadata: dict[str, Any] = {"base_model": [base] if base else None}
    if base:
        metadata["base_model_relation"] = _RELATION.get(record.family, "finetune")
    if options.form == "gguf":
        metadata["library_name"] = "gguf"
    tags = [options.form] if options.form != "gguf" else []
    sections = (
        _intervals(record),
        _measured(record),
        _export(export, options),
        _serving(name, options),
    )
    return card_text(
        record,
        name=name.partition("/")[2],
        tags=tags,
        metadata=metadata,
        datasets=datasets,
        sections=sections,
    )


def _intervals(record: RunRecord) -> str:
    """Return the scores with their intervals, and what they were measured with."""
    lines = ["## Scores with 95 % intervals", "", "| task | score | items |", "|:--|--:|--:|"]
    for score in record.scores:
        interval = score_interval(score)
        ends = ""
        if interval.low is not None and interval.high is not None:
            low, high = (score.format_value(end) for end in (interval.low, interval.high))
            ends = f" [{low.removesuffix(' %')}, {high.removesuffix(' %')}]"
        value = f"{score.format_value(score.value)}{ends}"
        lines.append(
            f"| {markdown_cell(f'{score.task}@{score.version}')} | {value} | {score.n:,} |"
        )
    environment, conditions = record.environment, record.conditions
    place = f"{conditions.device}, {conditions.dtype}"
    if environment is not None:
        place += f", {environment.gpu or environment.machine}"
    lines += ["", f"Measured on {markdown_text(place)}, {record.created}."]
    return "\n".join(lines)


def _measured(record: RunRecord) -> str:
    """Return what was timed and weighed, with intervals; "" for a row without."""
    by_key = {quantity.key: quantity for quantity in columns.QUANTITIES}
    lines = []
    for part in record.measurements:
        quantity = by_key.get(part.name)
        if quantity is None or quantity.words or part.remark:
            continue
        value, low, high = map(quantity.scaled, (part.value, part.low, part.high))
        text = quantity.with_interval(Interval(value, low, high))
        condition = f" ({part.condition})" if part.condition else ""
        lines.append(f"| {markdown_cell(quantity.header + condition)} | {text} |")
    if not lines:
        return ""
    return "\n".join(["## Speed and size of the row", "", "| what | value |", "|:--|--:|", *lines])


def _export(export: Export, options: ExportOptions) -> str:
    lines = [f"## These files: {options.form}", ""]
    lines += [f"- {markdown_text(line.removeprefix('- '))}" for line in export.lines()[1:]]
    lines.append("- the records of the row and of its teacher: `records/`")
    return "\n".join(lines)


def _serving(name: str, options: ExportOptions) -> str:
    """Return the commands that serve the student."""
    commands = {
        "gguf": (f"llama-server -hf {name}", f"ollama run hf.co/{name}"),
        "compressed-tensors": (
            f"vllm serve {name} --dtype bfloat16",
            f"python -m sglang.launch_server --model-path {name}",
        ),
        "safetensors": (f"vllm serve {name}", f"transformers chat {name}"),
    }
    return "\n".join(("## Serving", "", "```", *commands[options.form], "```"))


def _write_records(row: StoredRow, folder: Path) -> None:
    """Write the row's record, and the teacher's that it was compared with."""
    for record in (row.record, *_teacher_records(row)):
        write_record(folder / f"{record_file_name(record)}.json", record)


def _teacher_records(row: StoredRow) -> Iterator[RunRecord]:
    own = row.record
    for record in read_records(row.place).records:
        is_same = record.conditions.teachers == own.conditions.teachers
        if record.label == TEACHER != own.label and record.status == "success" and is_same:
            yield record
            return


def _write_results(record: RunRecord, path: Path, datasets: Mapping[str, str]) -> None:
    """Write the scores as the Hub reads them, of tasks that are a data set of the Hub.

    Scores on a sample of the items are left out: they are no result of the benchmark.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from yaml import safe_dump

    if not record.conditions.has_all_items:
        return
    entries = [
        EvalResultEntry(
            dataset_id=datasets[score.task],
            task_id=score.task,
            value=round(score.value, 6),
            date=record.created or None,
            source_url=SOURCE,
            source_name="compression-harness",
            notes=f"{score.task}@{score.version}, n = {score.n}, {score.primary or score.kind}",
        )
        for score in record.scores
        if score.task in datasets
    ]
    if entries:
        write_atomically(path, safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))


def _notes(record: RunRecord, base: str) -> Iterator[str]:
    """Yield what the user may want to add before others see the folder."""
    yield "no licence is named in README.md: add the one that the base model and its data allow"
    if not base:
        name = starting_model(record).name
        yield f"no base model is named: {name} is no Hub id; name it with --base ORG/NAME"
    paths = [name for name in _names(record) if name.startswith(("/", "~", "."))]
    if paths:
        yield f"records name models as they were typed: {paths[0]}"


def _names(record: RunRecord) -> Sequence[str]:
    teachers = [teacher.name for teacher in record.conditions.teachers]
    return [*teachers, record.conditions.student_base.name]


def _upload(folder: Path, hub: HubOptions) -> str:
    """Upload a folder as one commit of a repository, which is made where it is missing."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(hub.to, private=hub.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=hub.to, folder_path=folder, commit_message="Upload by compression-harness"
        )
    except OfflineModeIsEnabled as problem:
        raise HarnessError(
            f"the Hub is switched off here (HF_HUB_OFFLINE); the folder is {folder}: type hf "
            f"upload {hub.to} {folder}"
        ) from problem
    except (LocalTokenNotFoundError, HfHubHTTPError, OSError) as problem:
        raise HarnessError(
            f"the Hub did not take {hub.to} ({in_one_line(problem)}); type hf auth login, then: hf "
            f"upload {hub.to} {folder}"
        ) from problem
    return str(commit.repo_url)
