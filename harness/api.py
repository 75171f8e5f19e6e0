"""The Python door: `harness.run(...)` does what the command does.

`harness.load_records(...)` returns records as a pandas frame.
"""

import importlib.util
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.contract import Progress, Suite, Task
from harness.errors import HarnessError, unknown
from harness.files.closure import code_digest
from harness.machine.gpu import choose_device, default_dtype, refuse_missing_bf16
from harness.planning.cells import Plan
from harness.planning.config import RunConfig, build_config
from harness.planning.plan import make_plan
from harness.planning.setup import ResolvedNames
from harness.planning.spec import parse_method
from harness.records.record import CHECKPOINT, TEACHER, RunRecord
from harness.renames.modules import by_old_name
from harness.running.runner import CellResult, RunCallbacks, run_plan

if TYPE_CHECKING:
    import pandas

    from harness.analysis.decision import Decision
    from harness.contract import Checkpoint
    from harness.data.source import LocalOrHubData
    from harness.data.subsets import Subset
    from harness.data.training_sets import TrainingSet
    from harness.deploying.hub import HubExport
    from harness.deploying.student import Export
    from harness.estimating.estimate import Estimate
    from harness.estimating.expect import CellEstimate
    from harness.measuring.measure import MeasurementResult, TimedModel, TimingSettings
    from harness.registry import Registry


@dataclass(frozen=True)
class Run:
    """How a run ended: one entry a cell, its records, and the file that lists them."""

    plan: Plan
    cells: tuple[CellResult, ...]
    path: Path  # the run's own file: what `harness report` takes

    @property
    def records(self) -> tuple[RunRecord, ...]:
        """The records of this run's cells."""
        return tuple(cell.record for cell in self.cells if cell.record is not None)

    @property
    def succeeded(self) -> bool:
        """Tell whether every cell has a record that says success."""
        return all(
            cell.record is not None and cell.record.status == "success" for cell in self.cells
        )

    def markdown(self) -> str:
        """Return this run's tables."""
        from harness.reporting.report import markdown

        return markdown(self.records)

    def frame(self) -> "pandas.DataFrame":
        """Return this run's records, one row a cell and metric."""
        from harness.reporting.frame import frame_of

        return frame_of(self.records)


def plan_run(
    config: RunConfig,
    *,
    say: Callable[[str], None] = warnings.warn,
    scored: "Sequence[Checkpoint]" = (),
) -> Plan:
    """Plan a run: resolve names, models, controls and seeds. Computes nothing.

    `scored` are models to score without a teacher: the first stands in its place. Raises
    `HarnessError` for what cannot work. `say` receives what a user should know about the device
    that `auto` chose.
    """
    from harness import catalog
    from harness.data.source import LocalOrHubData
    from harness.estimating.recipes import RecipesThatFit
    from harness.models.resolve import resolve

    if not scored:
        _refuse_no_rows(config)
    _refuse_missing_packages(config)
    registry = catalog.methods()
    source = LocalOrHubData.from_environment(str(config.data_dir) if config.data_dir else None)
    teachers = list(scored) or [
        resolve(name, cache=config.cache_folder) for name in config.teacher_names
    ]
    include_path = catalog.include_path_of(list(config.suite), config.include_path)
    _refuse_task_code(include_path, allowed=config.allow_task_code)
    suites = _suites_of(config)
    config = config.model_copy(update={"include_path": include_path})
    tasks = _load_tasks(config, suites, source)
    training_sets = _training_sets(config, tasks, source)
    needs_items = not training_sets or any(_needs_prompts(data) for data in training_sets)
    untrained = _untrained_tasks(tasks, source) if needs_items else {}
    _refuse_training_on_nothing(config.methods, registry, tasks, untrained)
    device = choose_device(config.device, say=say)
    refuse_missing_bf16(device, config.dtype)
    resolved = ResolvedNames(
        teachers=teachers,
        checkpoints=_checkpoints_of(config, None if scored else teachers[0]),
        methods=registry,
        suites=suites,
        tasks=tasks,
        data=_data_digest(tasks, source),
        device=device,
        dtype=config.dtype if config.dtype != "auto" else default_dtype(device, say=say),
        training_sets=training_sets,
        subset=_subset_of(config, tasks, source),
        writing_code=code_digest(catalog.WRITER),
        calibration=_calibration_set(config, tasks, source),
        text=_text_digest(source),
    )
    plan = make_plan(config, resolved, RecipesThatFit.of)
    return replace(
        plan,
        hub_data=any(_needs_hub(task, source) for task in tasks.values()),
        untrained_tasks=untrained,
    )


def _refuse_no_rows(config: RunConfig) -> None:
    if not config.methods and not config.checkpoint:
        raise HarnessError(
            "no method is given; write for example --methods cot,response (harness list methods "
            "shows all)"
        )


def _load_tasks(
    config: RunConfig, suites: Mapping[str, Suite], source: "LocalOrHubData"
) -> dict[str, Task]:
    """Return the tasks of some suites by name."""
    from harness import catalog

    names = dict.fromkeys(task for suite in suites.values() for task in suite.tasks)
    if not names:
        raise HarnessError(
            f"--suite {','.join(config.suite)} has no task for {config.teacher_names[0]}; type for "
            "example --suite mini"
        )
    return {
        name: catalog.load_task(
            name,
            include_path=config.include_path,
            data_folder=source.folder,
            num_fewshot=config.num_fewshot,
        )
        for name in names
    }


def _checkpoints_of(config: RunConfig, base: "Checkpoint | None") -> "dict[str, Checkpoint]":
    """Return the checkpoints of a configuration; adapters lie on `base`, or on what they name."""
    from harness.models.outside import resolve_outside

    return {
        name: resolve_outside(model, cache=config.cache_folder, base=base)
        for name, model in config.checkpoint_models.items()
    }


def plan_scores(
    models: Sequence[str],
    settings: Mapping[str, Any],
    *,
    say: Callable[[str], None] = warnings.warn,
) -> Plan:
    """Plan to score models side by side: the first in the teacher's place, the others as rows.

    `settings` are those of `RunConfig` but for methods, by name. Raises `HarnessError` for a model
    that is named twice or cannot be opened.
    """
    from harness.models.outside import resolve_outside

    if repeated := next((name for name in models if models.count(name) > 1), ""):
        raise HarnessError(f"{repeated} is named twice; name each model once")
    config = build_config(
        {
            "noise": 0,
            **settings,
            "methods": (),
            "teacher": (models[0],),
            "checkpoint": _row_names(models[1:]),
        }
    )
    check_places(config, say=say)
    first = resolve_outside(models[0], cache=config.cache_folder)
    return plan_run(config, say=say, scored=(first,))


def _row_names(models: Sequence[str]) -> dict[str, str]:
    """Return a name for the row of each model: its last part, with a number where that is taken."""
    from harness import catalog

    reserved = {TEACHER, CHECKPOINT, *catalog.methods().table}
    rows: dict[str, str] = {}
    for model in models:
        last = Path(model.partition("@")[0]).name.removesuffix(".gguf")
        plain = re.sub(r"[^A-Za-z0-9.-]+", "-", last).strip("-.") or "model"
        if plain in reserved:
            plain = f"model-{plain}"
        name, number = plain, 2
        while name in rows:
            name, number = f"{plain}-{number}", number + 1
        rows[name] = model
    return rows


def _refuse_missing_packages(config: RunConfig) -> None:
    """Refuse a backend or a tracker whose package is not installed."""
    if config.backend == "vllm":
        from harness.scoring.vllm_backend import require_vllm

        require_vllm()
    if config.track and importlib.util.find_spec(config.track) is None:
        raise HarnessError(
            f"--track {config.track}: that package is not installed; type: pip install "
            f"{config.track}"
        )


def _suites_of(config: RunConfig) -> dict[str, Suite]:
    """Return the suites of a configuration, by name."""
    from harness import catalog
    from harness.models.resolve import is_embedded

    return catalog.resolve_suites(
        list(config.suite),
        embedded=all(is_embedded(name) for name in config.teacher_names),
        include_path=config.include_path,
    )


def _subset_of(
    config: RunConfig, tasks: "Mapping[str, Task]", source: "LocalOrHubData"
) -> "Subset | None":
    """Return the subset of `--subset`; None without one.

    Raises `HarnessError` for a file that lists items which the tasks' data does not hold.
    """
    from harness.data.subsets import parse_subset, require_items

    if config.subset is None:
        return None
    if config.limit:
        raise HarnessError(
            f"--subset {config.subset} and --limit {config.limit}: a subset is scored as a whole; "
            "drop --limit, or name a smaller subset"
        )
    subset = parse_subset(config.subset)
    require_items(subset, tasks.values())
    if subset.count is None:
        _refuse_other_items(subset, tasks, source)
    return subset


def _refuse_other_items(
    subset: "Subset", tasks: "Mapping[str, Task]", source: "LocalOrHubData"
) -> None:
    """Raise `HarnessError` where a subset file lists items that the tasks' data does not hold."""
    from harness.scoring.sampling import subset_items

    for task in tasks.values():
        subset_items(subset, task, source)


def frozen_subset(
    spec: str,
    suite: Sequence[str],
    *,
    include_path: Path | None = None,
    data_dir: Path | None = None,
) -> "tuple[Subset, dict[str, tuple[int, int]]]":
    """Return a subset with its items listed, and how many each task has of it and in all.

    `spec` is what `--subset` takes. It is that of real tasks, also where a suite has generated ones
    for the embedded pair.
    """
    from harness import catalog
    from harness.data.source import LocalOrHubData
    from harness.data.subsets import items_name, parse_subset, require_items
    from harness.scoring.sampling import subset_items

    subset = parse_subset(spec)
    source = LocalOrHubData.from_environment(str(data_dir) if data_dir else None)
    folder = catalog.include_path_of(list(suite), include_path)
    suites = catalog.resolve_suites(list(suite), embedded=False, include_path=folder)
    names = dict.fromkeys(task for part in suites.values() for task in part.tasks)
    tasks = {
        name: catalog.load_task(name, include_path=folder, data_folder=source.folder)
        for name in names
    }
    require_items(subset, tasks.values())
    items, sizes = dict[str, tuple[str, ...]](), dict[str, tuple[int, int]]()
    for name, task in tasks.items():
        listed, task_size = subset_items(subset, task, source)
        items[items_name(task)], sizes[name] = tuple(listed), (len(listed), task_size)
    return subset.model_copy(update={"count": None, "items": items}), sizes


def _training_sets(
    config: RunConfig, tasks: "Mapping[str, Task]", source: "LocalOrHubData"
) -> "tuple[TrainingSet, ...]":
    """Return the data of `--train-data`.

    Raises `HarnessError` where it holds evaluation items that are to be refused. Where they are
    dropped, each cell says how many. What a teacher writes is looked at when it is written.
    """
    from harness.data.teacher_sets import TeacherSet
    from harness.data.typed_sets import parse_training_sets

    training_sets = parse_training_sets(config.train_data)
    if config.overlap == "refuse":
        for training_set in training_sets:
            if not isinstance(training_set, TeacherSet):
                replace(training_set, evaluated=tasks, overlap="refuse").counts(source)
    return training_sets


def _needs_prompts(data: "TrainingSet") -> bool:
    """Tell whether a teacher answers the tasks' train prompts for this set."""
    from harness.data.teacher_sets import TeacherSet

    return isinstance(data, TeacherSet) and not data.recipe.free


def _calibration_set(
    config: RunConfig, tasks: "Mapping[str, Task]", source: "LocalOrHubData"
) -> "TrainingSet | None":
    """Return the data of `--calibration`, refused as those of `--train-data` are."""
    from harness.data.typed_sets import parse_training_sets

    if config.calibration is None:
        return None
    [calibration] = parse_training_sets([str(config.calibration)], option="--calibration")
    if config.overlap == "refuse":
        replace(calibration, evaluated=tasks, overlap="refuse").counts(source)
    return calibration


def check_places(config: RunConfig, *, say: Callable[[str], None] = warnings.warn) -> None:
    """Refuse folders that a run could not write to. Makes no folder.

    `say` receives a line where little space is free.
    """
    from harness.files.places import check_folder

    check_folder(config.out, "--out", say=say)
    check_folder(config.cache_folder, "--cache", say=say)


def _refuse_task_code(folder: Path | None, *, allowed: bool) -> None:
    """Refuse task files that nobody has allowed to run: their templates and functions are code."""
    if folder is not None and not allowed:
        raise HarnessError(
            f"the task files in {folder} are programs (templates, !function): read them, then type "
            "--allow-task-code (docs/security.md)"
        )


def _needs_hub(task: Task, source: "LocalOrHubData") -> bool:
    """Tell whether a task's items come from the Hub: its own files are not here."""
    return bool(
        getattr(task, "needs_hub", bool(getattr(task, "files", ())) and source.folder is None)
    )


def _data_digest(tasks: Mapping[str, Task], source: "LocalOrHubData") -> str:
    """Return the digest of the data that tasks read: local files, and revisions of the Hub.

    "" where they make their items themselves, or name neither. It is new for every plan where a
    task may read something that nobody knows beforehand.
    """
    from harness.data.hub_revisions import dataset_revision
    from harness.files.digests import digest_of

    files = {file for task in tasks.values() for file in getattr(task, "files", ())}
    digest = source.fingerprint(sorted(files)) if source.folder and files else ""
    on_hub = {
        name
        for task in tasks.values()
        if _needs_hub(task, source)
        for name in getattr(task, "hub_datasets", ())
    }
    revisions = [(name, dataset_revision(name)) for name in sorted(on_hub)]
    if any(revision for _, revision in revisions):
        digest = digest_of(digest, revisions)
    if any(getattr(task, "unknown_inputs", "") for task in tasks.values()):
        return f"unknown beforehand {os.urandom(16).hex()}"
    return digest


def _text_digest(source: "LocalOrHubData") -> str:
    """Return the digest of the plain text for calibration; "" where the folder has none."""
    from harness.data.source import C4

    if source.folder is None:
        return ""
    # the file may be compressed or not
    has_text = any((source.folder / name).is_file() for name in (C4, C4[:-3]))
    return source.fingerprint([C4]) if has_text else ""


def _untrained_tasks(tasks: Mapping[str, Task], source: "LocalOrHubData") -> dict[str, str]:
    """Return the tasks without a training item and why, as far as their definitions tell."""
    reasons = {
        name: str(getattr(task, "no_training", lambda _: "")(source))
        for name, task in tasks.items()
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _refuse_training_on_nothing(
    methods: Sequence[str],
    registry: "Registry",
    tasks: Mapping[str, Task],
    untrained: Mapping[str, str],
) -> None:
    """Refuse rows that train where no task has a training item."""
    from harness.planning.chain import split_chain

    names = [
        registry.canonical(parse_method(part)[0]) for spec in methods for part in split_chain(spec)
    ]
    trains = next((name for name in names if registry.load(name).trains), "")
    if trains and len(untrained) == len(tasks):
        explanation = "; ".join(f"{name}: {reason}" for name, reason in untrained.items())
        raise HarnessError(
            f"{trains} has nothing to train on ({explanation}); add a suite with a train split, "
            "for example --suite math"
        )


_DEFAULTS = RunConfig()


def run(
    methods: str | Sequence[str] = _DEFAULTS.methods,
    suite: str | Sequence[str] = _DEFAULTS.suite,
    *,
    teacher: str | Sequence[str] = _DEFAULTS.teacher,
    student: str = _DEFAULTS.student,
    seeds: int = _DEFAULTS.seeds,
    budget: int | None = _DEFAULTS.budget,
    watcher: RunCallbacks | None = None,
    **settings: Any,
) -> Run:
    """Run methods on a suite and return how it ended; finished cells are read, not computed again.

    Takes what `harness run` takes, by the same names with underscores (the fields of
    `harness.planning.config.RunConfig`): `rows`, `controls`, `set` (`{"response": {"temperature":
    4}}`), `device`, `dtype`, `batch_size`, `out`, `cache`, `data_dir`, `force`, `wait`. A cell that
    fails is a failed record, not an exception; a mistake in the arguments raises `HarnessError`.
    """
    named = {
        # left to their default, methods do not run beside checkpoints
        **({} if methods is _DEFAULTS.methods else {"methods": methods}),
        "suite": suite,
        "teacher": teacher,
        "student": student,
        "seeds": seeds,
        "budget": budget,
    }
    config = build_config({**named, **settings})
    check_places(config)
    plan = plan_run(config)
    ended, path = run_plan(plan, callbacks=watcher or RunCallbacks())
    return Run(plan, tuple(ended), path)


def estimate_plans(
    methods: Sequence[str],
    *,
    teacher: str = "tiny",
    student: str = "depth:0.5",
    hardware: str = "cpu",
    suite: Sequence[str] = ("math",),
    budget: int | None = None,
    rows: int = 2_000,
    limit: int | None = None,
    records: Sequence[RunRecord] = (),
    cache: Path | None = None,
) -> list["Estimate"]:
    """Estimate the cost of each chain of `methods` on some hardware. Computes nothing.

    Models are given by name, or by size (70B); no weights are opened.
    """
    from harness.estimating.expect import ChainsRequest, estimates_of

    request = ChainsRequest(
        teacher=teacher,
        student=student,
        hardware=hardware,
        suite=suite,
        budget=budget,
        rows=rows,
        limit=limit,
        records=records,
        cache=cache,
    )
    return estimates_of(methods, request)


def estimate_cells(plan: Plan, finished: Container[str]) -> list["CellEstimate"]:
    """Estimate every cell of a plan; `finished` holds the keys of cells that are done.

    What several cells share counts in the first one that makes it.
    """
    from harness.estimating.expect import estimate_cells as expected

    return expected(plan, finished)


@dataclass(frozen=True)
class MeasuredModel:
    """One model of `measure_models`; its speeds are ratios to the first model of the call."""

    name: str
    measured: "MeasurementResult"

    @property
    def found(self) -> "MeasurementResult":
        """The older name of `measured`."""
        return self.measured


def measure_models(
    models: Sequence[str],
    *,
    grid: str | None = None,
    rounds: int | str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    cache: Path | None = None,
    out: Path = Path("results/runs/measured"),
    progress: Callable[[Progress], None] = lambda _: None,
    say: Callable[[str], None] = warnings.warn,
) -> tuple[list[MeasuredModel], Path]:
    """Time and weigh models; those after the first are timed by turns with the first.

    Returns what was measured, and the path of the file with every raw time stamp.
    """
    from harness.machine.processor import thread_count
    from harness.measuring.measure import ROUNDS, TimedModel, TimingSettings
    from harness.measuring.rounds import AUTO
    from harness.measuring.scenario import GRIDS, parse_grid
    from harness.models.artefacts import default_cache
    from harness.models.resolve import resolve

    if not models:
        raise HarnessError(
            "no model is named; write for example: harness measure tiny ./my-student"
        )
    place = choose_device(device, say=say)
    settings = TimingSettings(
        grid=parse_grid(grid or GRIDS[place]),
        rounds=(ROUNDS if place == "cpu" else AUTO) if rounds is None else rounds,
        device=place,
        dtype=dtype if dtype != "auto" else default_dtype(place, say=say),
        threads=threads or thread_count(),
    )
    subjects = [TimedModel(resolve(name, cache=cache or default_cache())) for name in models]
    weighed = _measure_each(list(zip(models, subjects, strict=True)), settings, progress)
    return weighed, _write_stamps(out, weighed, subjects, settings)


def _measure_each(
    models: "Sequence[tuple[str, TimedModel]]",
    settings: "TimingSettings",
    progress: Callable[[Progress], None],
) -> list[MeasuredModel]:
    """Measure each model; those after the first are timed by turns with it.

    A model may be named twice, to be compared with itself.
    """
    import tempfile

    from harness.measuring.measure import measure

    _, first = models[0]
    with tempfile.TemporaryDirectory() as folder:
        return [
            MeasuredModel(
                name,
                measure(
                    subject,
                    first if number else None,
                    settings,
                    folder=Path(folder),
                    progress=progress,
                ),
            )
            for number, (name, subject) in enumerate(models)
        ]


def _write_stamps(
    out: Path,
    weighed: Sequence[MeasuredModel],
    subjects: "Sequence[TimedModel]",
    settings: "TimingSettings",
) -> Path:
    """Write a file with every raw stamp of measured models and return where it is."""
    from harness.files.writing import write_atomically
    from harness.records.environment import current_environment

    path = out / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}.json"
    place = current_environment(
        device=settings.device, dtype=settings.dtype, threads=settings.threads
    )
    models = [
        {
            "name": model.name,
            "digest": subject.checkpoint.digest,
            "skipped": model.measured.skipped,
            "raw": model.measured.raw,
            "measurements": [
                measurement.model_dump(mode="json") for measurement in model.measured.measurements
            ],
        }
        for model, subject in zip(weighed, subjects, strict=True)
    ]
    write_atomically(
        path, json.dumps({"environment": place.model_dump(mode="json"), "models": models})
    )
    return path


def export_student(
    row: str,
    place: Path | str = "results/runs",
    *,
    out: Path | str,
    form: str = "safetensors",
    dtype: str = "auto",
    kind: str = "auto",
    check: int | str = 50,
    tolerance: float = 0.04,
    seed: int | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> "Export":
    """Write a row's student into a new folder in a form that others serve, and check it.

    `check` items of the row are scored again ("all" of them, or "none"), of which the share
    `tolerance` may be graded otherwise than in the record. Raises `HarnessError` for what the form
    cannot express; `CellFailed` where the opened export does not hold the student's weights.
    """
    from harness.deploying.row import find_row
    from harness.deploying.student import export_options, export_student

    options = export_options(form=form, dtype=dtype, kind=kind, check=check, tolerance=tolerance)
    found_row = find_row(row, Path(place), seed=seed)
    return export_student(found_row, Path(out), options, progress=progress)


def export_hub(
    row: str,
    place: Path | str = "results/runs",
    *,
    to: str,
    out: Path | str,
    base: str = "",
    private: bool = False,
    dry_run: bool = False,
    seed: int | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    **options: Any,
) -> "HubExport":
    """Write a folder for the Hub (student, card, records) and upload it to `to`, ORG/NAME.

    `options` are those of `export_student`: form, dtype, kind, check and tolerance. Raises
    `HarnessError` for what the form cannot express and what the Hub refuses.
    """
    from harness.deploying.hub import HubOptions, export_hub
    from harness.deploying.row import find_row
    from harness.deploying.student import export_options

    hub = HubOptions(to=to, base=base, private=private, dry_run=dry_run)
    found_row = find_row(row, Path(place), seed=seed)
    return export_hub(found_row, Path(out), export_options(**options), hub, progress=progress)


def train_embedded(
    out: Path | None = None,
    *,
    only: str | None = None,
    budget: int | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Iterator[str]:
    """Train the embedded teachers from nothing, score them, and yield one line for each.

    Writes model folders with their training log and `scores.json`. A training that was interrupted
    goes on from its last state.
    """
    from harness import catalog
    from harness.data.source import LocalOrHubData
    from harness.models.language_model import open_model
    from harness.models.resolve import EMBEDDED, EMBEDDED_MODELS
    from harness.scoring.score import score_task

    if budget is not None and budget < 100:
        raise HarnessError(
            f"--budget {budget}: give 100 seen tokens or more, or leave it out for the recipe's own"
        )
    if only is not None and only not in EMBEDDED_MODELS:
        raise unknown("embedded model", only, EMBEDDED_MODELS)
    tasks = {name: catalog.load_task(name) for name in catalog.SUITES["mini"].tasks}
    source = LocalOrHubData()
    folder = out or EMBEDDED
    for recipe in catalog.embedded_recipes():
        if only in (None, recipe.name):
            teacher = catalog.train_teacher(
                recipe,
                tasks=tasks,
                source=source,
                folder=folder / recipe.name,
                budget=budget,
                progress=progress,
            )
            model = open_model(teacher)
            scores: dict[str, dict[str, Any]] = {}
            for task in tasks.values():
                score, _ = score_task(model, task, source, batch_size="auto", progress=progress)
                scores[task.name] = {
                    "version": task.version,
                    "n": score.n,
                    "value": score.value,
                    "stderr": score.stderr,
                    "groups": score.groups,
                }
            (teacher.path / "scores.json").write_text(
                json.dumps(scores, indent=1) + "\n", encoding="utf-8"
            )
            score_texts = ", ".join(
                f"{name} {100 * score['value']:.1f} %" for name, score in scores.items()
            )
            megabytes = teacher.bytes_on_disk / 1e6
            yield f"{recipe.name}: {score_texts}, {megabytes:.2f} MB in {teacher.path}"


def load_records(folder: str | Path) -> "pandas.DataFrame":
    """Read records (a run file, a store, a study, a folder) into a pandas frame.

    It has one row for each cell and metric; `harness.records.columns.FRAME` explains its columns. A
    file that is no record raises `HarnessError` with its name.
    """
    from harness.records.store import read_records
    from harness.reporting.frame import frame_of

    records, problems = read_records(Path(folder))
    if problems:
        raise HarnessError(problems[0])
    return frame_of(records)


def recommend(
    records: str | Path | Sequence[RunRecord],
    *,
    keep: float | str = 0.95,
    memory: float | str | None = None,
    faster: float | None = None,
    smaller: float | None = None,
    on: Sequence[str] = (),
    take: Literal["smallest", "fastest"] = "smallest",
    rows: Sequence[str] = (),
    alpha: float = 0.05,
) -> "Decision":
    """Return which row to take: the smallest or fastest that is shown to keep what was asked.

    `records` are a run's, or the place where they are. `keep` is the share of the teacher's score
    to keep on every task (of those in `on`), or points that may be lost ("2points"); `memory` is in
    bytes, or a text ("8GiB"); `faster` and `smaller` are ratios to the teacher. Only `rows` are
    looked at where some are named. Raises `HarnessError` for what these records cannot answer.
    """
    from harness.analysis.comparison import group_records
    from harness.analysis.decision import Question, decide
    from harness.gate.inputs import parse_bytes, parse_margin, records_of
    from harness.reporting.recommendation import refuse_question

    if isinstance(records, (str, Path)):
        records = records_of(Path(records))
    share, points = parse_margin(str(keep), option="--keep")
    assert share is not None
    question = Question(
        keep=share,
        points=points,
        memory=parse_bytes(memory) if isinstance(memory, str) else memory,
        faster=faster,
        smaller=smaller,
        tasks=tuple(on),
        take=take,
        rows=tuple(rows),
        alpha=alpha,
    )
    refuse_question(question, records)
    return decide(group_records(records), question)


__getattr__ = by_old_name(__name__)
