"""From a configuration to cells: which rows, which controls beside them, which seeds, and a key for each by content."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from harness.contract import Checkpoint, Method, Prompting, Suite, Task
from harness.errors import HarnessError, unknown
from harness.files.untrusted import MODEL, Unreadable, read_object
from harness.machine.gpu import device_label, gpu_of
from harness.machine.load import threads_for
from harness.machine.processor import processor, threads_asked
from harness.measuring.scenario import GRIDS, parse_grid
from harness.models.resolve import is_embedded, quantized_by, resolve
from harness.models.shape import parameters_on_disk
from harness.models.shaping import parse_recipe
from harness.models.vocabulary import common_vocabulary, token_map
from harness.planning.cells import Plan, PlannedCell, PlannedModel, PlannedStage
from harness.planning.chain import bare, check, parts_of, related
from harness.planning.config import EMBEDDED_BUDGET, OUTSIDE_BUDGET, RowSettings, RunConfig
from harness.planning.keys import Code, KeyBook, lm_eval_version, of_items, reads_items
from harness.planning.spec import parse_method
from harness.records.conditions import Conditions
from harness.records.record import TEACHER
from harness.registry import Registry, expanded
from harness.renames.settings import current_settings, settings_of_class


@dataclass(frozen=True)
class _Row:
    """One row: its methods in order, one for most rows, several for a chain."""

    label: str
    names: tuple[str, ...]
    methods: tuple[Any, ...]
    controls: tuple[str, ...]

    @property
    def name(self) -> str:
        """The row's method: the chain without settings."""
        return "+".join(self.names)

    @property
    def last(self) -> Any:
        """The method of the last stage."""
        return self.methods[-1]

    @property
    def settings(self) -> dict[str, JsonValue]:
        """Settings with defaults expanded; a chain's by method."""
        if len(self.methods) == 1:
            return expanded(self.last)
        return {name: expanded(method) for name, method in zip(self.names, self.methods, strict=True)}

    @property
    def trains(self) -> bool:
        """Tell whether a stage spends the token budget."""
        return any(method.trains for method in self.methods)


def make_plan(
    config: RunConfig,
    *,
    teachers: Sequence[Checkpoint],
    methods: Registry,
    suites: Mapping[str, Suite],
    built: Mapping[str, Task],
    data: str,
    device: str,
    dtype: str,
    text: str = "",
) -> Plan:
    """Resolve models, methods, controls and seeds; refuse here what cannot work, before anything is computed.

    `built` are the suites' tasks by name: their code and versions are in the keys.
    `data` is the digest of the files that the tasks read, "" where they read none; `text` that of free text for calibration.
    """
    if not config.methods:
        raise HarnessError("no method is asked for; write for example --methods cot,response (harness list methods shows them)")
    rows = _rows(config, methods)
    names = [one.name for one in teachers]
    if len(set(names)) < len(names) or len({one.digest for one in teachers}) < len(teachers):
        raise HarnessError(f"--teacher: {', '.join(names)}: two teachers have one name or the same weights; rename a folder, or drop one")
    several = [row.name for row in rows if any(one.needs_several_teachers for one in row.methods)]
    lonely = several if len(teachers) < 2 else []
    if lonely:
        raise HarnessError(f"{lonely[0]} needs two teachers or more; type for example --teacher tiny,tiny-math")
    planned = tuple(PlannedModel.of(one) for one in teachers)
    recipe = parse_recipe(config.student)
    base = planned[0] if recipe else PlannedModel.of(resolve(config.student, cache=config.cache_folder))
    named = config.student if recipe else base.name  # never a path: it stands in records and tables
    for one in planned:
        _check_vocabularies(rows, one, base)
    starting = next((row.label for row in rows if row.methods[0].trains or (recipe and row.methods[0].starts_from == "student")), "")
    if starting and (packed := quantized_by(base.path)) not in ("", "float"):
        raise HarnessError(
            f"{starting} starts from {base.name}, which is quantized ({packed}) and can be neither cut nor trained; "
            "type --student with a model in floats"
        )
    budget = config.budget or (EMBEDDED_BUDGET if is_embedded(config.teacher_names[0]) else OUTSIDE_BUDGET)
    prompting = Prompting(chat=_chat(config, planned[0], base), system=config.system)
    tasks = tuple(dict.fromkeys(task for suite in suites.values() for task in suite.tasks))
    task_versions = {name: built[name].version for name in tasks}
    for name in config.limit if isinstance(config.limit, dict) else ():
        if name not in tasks:
            raise unknown("task in --limit", name, tasks)
    shared = {
        "teachers": [one.digest for one in planned], "base": base.digest, "recipe": config.student if recipe else "whole",
        "device": device_label(device), "dtype": dtype, "rows": config.rows, "train": {task: task_versions[task] for task in tasks},
    }  # fmt: skip
    threads = _threads(planned, base, device)
    if device == "cpu":
        shared["threads"] = threads  # they decide the order of sums
    if data:
        shared["data"] = data
    if config.teacher_weights:
        shared["weights"] = list(config.teacher_weights)
    if config.tune:
        shared["tune"] = True
    if prompting != Prompting():
        shared["prompting"] = [prompting.chat, prompting.system]
    grid = "" if config.grid == "none" else config.grid or GRIDS[device.partition(":")[0]]
    measure = any(suite.measure for suite in suites.values())
    code = Code(built)
    scored: dict[str, object] = {
        "tasks": {task: task_versions[task] for task in tasks},
        "code": code.of_scores(backend=config.backend, measured=bool(grid) and measure),
        "lm-eval": lm_eval_version(),
        **of_items(built),
        "measure": measure,
        "grid": [[str(one) for one in parse_grid(grid)], config.rounds] if grid else "none",
        "machine": _machine(device, threads),  # speeds belong to a machine
    }
    if config.limit:  # none, or of no task: everything is scored
        scored["limit"] = config.limit
    scored["noise"] = config.noise
    if config.backend != "transformers":
        scored["backend"] = config.backend
    seen = {**scored, "data": data, "prompting": [prompting.chat, prompting.system]}
    book = KeyBook(
        {"tasks": tasks, "teachers": names, "student": named, "budget": budget, "rows": config.rows, "device": device, "dtype": dtype,
         "prompting": [prompting.chat, prompting.system], "limit": config.limit, "noise": config.noise, "grid": [grid, config.rounds],
         "weights": config.teacher_weights, "tune": config.tune, "backend": config.backend}
    )  # fmt: skip
    cells = [_teacher_cell(shared, seen, planned, index, book) for index in range(len(planned))]
    making = _Making(shared, budget, recipe is not None and recipe.draws_weights, code, text, book)
    for row in rows:
        for seed in range(1, config.seeds + 1) if any(map(making.draws, row.methods)) else (None,):
            stages = making.stages(row, seed)
            made = tuple(stage.key for stage in stages)
            cells.append(
                PlannedCell(
                    key=book.key("cell", row.label, seed, scored, students=made), student_key=made[-1], label=row.label, method=row.name,
                    settings=row.settings, stages=stages, family=row.last.family if len(row.methods) == 1 else "chain",
                    is_control=any(one.is_control for one in row.methods), controls=row.controls, handed_on=_handed_on(row.last),
                    trains=row.trains, simulated=any(one.simulated for one in row.methods), seed=seed,
                )
            )  # fmt: skip
    conditions = Conditions(
        suites=tuple(suites), teachers=tuple(one.reference() for one in planned),
        tasks=tuple(f"{task}@{task_versions[task]}" for task in tasks), device=device, dtype=dtype, limit=config.limit or None,
        chat=prompting.chat, system=prompting.system, student_recipe=named, student_base=base.reference(), budget_tokens=budget,
        budget_rows=config.rows, tuned=config.tune, teacher_weights=config.teacher_weights,
    )  # fmt: skip
    return Plan(
        config=config, conditions=conditions, suites=suites, teachers=planned, student_base=base, grid=grid, cells=tuple(cells),
        threads=threads, parts=book.parts,
    )  # fmt: skip


def _threads(teachers: Sequence[PlannedModel], base: PlannedModel, device: str) -> int:
    """Return the threads of a run's cells, one number for all rows of a table: by its largest model; on a GPU as they were."""
    if device != "cpu":
        return threads_asked()
    return threads_for(max(parameters_on_disk(one.path) for one in (*teachers, base)))


def _machine(device: str, threads: int) -> list[str | int | None]:
    """Return what of this machine a cell's key holds: the processor and, on a GPU, the card, its driver and torch's CUDA."""
    gpu = gpu_of(device)
    return [processor(), os.cpu_count(), threads, *([str(gpu)] if gpu else [])]


def _teacher_cell(
    shared: Mapping[str, object], scored: Mapping[str, object], teachers: Sequence[PlannedModel], index: int, book: KeyBook
) -> PlannedCell:
    """Plan the row of the first teacher, or of another one beside it."""
    label = TEACHER if index == 0 else f"{TEACHER} {teachers[index].name}"
    held = {**{name: shared[name] for name in ("teachers", "device", "dtype")}, **scored, "teacher": index}
    return PlannedCell(
        key=book.key("cell", label, None, held), student_key="", label=label, method=TEACHER, settings={},
        family="teacher", is_control=False, controls=(), trains=False, seed=None, teacher=index,
    )  # fmt: skip


@dataclass(frozen=True)
class _Making:
    """What students are made from: their keys follow from it, and from nothing else."""

    shared: Mapping[str, object]
    budget: int
    scratch: bool  # the student's shape starts from random weights
    code: Code
    text: str
    book: KeyBook

    def draws(self, method: Method, at: int = 0) -> bool:
        """Tell whether the student that a method makes as a chain's stage of this number depends on the seed."""
        from_nothing = at == 0 and self.scratch and method.starts_from == "student"
        return method.trains or method.draws_random_numbers or from_nothing

    def stages(self, row: _Row, seed: int | None) -> tuple[PlannedStage, ...]:
        """Plan a row's stages. A stage's key holds its parent's: chains that begin alike share what they begin with."""
        planned: list[PlannedStage] = []
        for at, (name, method) in enumerate(zip(row.names, row.methods, strict=True)):
            drawn = self.draws(method, at)
            label = "+".join(map(_label, row.names[: at + 1], row.methods[: at + 1]))
            held = {
                **self.shared, "method": name, "settings": expanded(method), "budget": self.budget if drawn else 0,
                "seed": seed if drawn else None, "text": self.text if method.calibrates else "",
                "parent": planned[-1].key if at else "", "code": self.code.of_student(method),
                **(of_items(self.code.tasks) if reads_items(method) else {}),
            }  # fmt: skip
            key = self.book.key("student", label, seed if drawn else None, held)
            planned.append(
                PlannedStage(
                    key=key, label=label, method=name, settings=expanded(method), family=method.family, trains=method.trains,
                    starts_from=method.starts_from, simulated=method.simulated,
                )
            )  # fmt: skip
        return tuple(planned)


def _rows(config: RowSettings, methods: Registry) -> list[_Row]:
    """Build every asked chain, then the controls that they need, each row once."""
    for name in config.set:
        if name not in methods:
            raise unknown("method", name, methods.table, hint="(in --set)")
    rows: dict[str, _Row] = {}

    def build(name: str, written: Mapping[str, JsonValue]) -> tuple[str, Any]:
        name = methods.canonical(name)
        return name, methods.build(name, {**methods.current(name, config.set.get(name, {})), **methods.current(name, written)})

    def add(stages: Sequence[tuple[str, Any]]) -> _Row | None:
        """Add a row; None where it stands already."""
        names, built = tuple(name for name, _ in stages), tuple(method for _, method in stages)
        parts = tuple(map(_label, names, built))
        if len(parts) > 1:
            check(names, built)
        chains = tuple("+".join(map(bare, one)) for one in related(parts, built, methods.load))
        beside = chains if len(parts) > 1 else built[-1].controls
        row = _Row("+".join(parts), names, built, beside)
        return None if rows.setdefault(row.label, row) is not row else row

    for spec in config.methods:
        add([build(*parse_method(part)) for part in parts_of(spec)])
    pending = list(rows.values()) if config.controls else []
    while pending:
        row = pending.pop(0)
        for stages in _beside(row, build, methods):
            added = add(stages)  # its own form: a variant that was asked for beside it is another row
            pending += [added] if added else []
    unused = sorted(set(config.set) - {name for row in rows.values() for name in row.names})
    if unused:
        raise HarnessError(f"--set names {unused[0]!r}, which no row of this run uses; add it to --methods or drop the setting")
    return sorted(rows.values(), key=lambda row: len(row.methods))  # what a chain begins with is scored before the chain


def _beside(
    row: _Row, build: Callable[[str, Mapping[str, JsonValue]], tuple[str, Any]], methods: Registry
) -> Iterator[list[tuple[str, Any]]]:
    """Yield the controls of a row, as stages that are built: settings that the row hands on are theirs too."""

    def control(name: str) -> tuple[str, Any]:
        known = {field.name for field in dataclasses.fields(methods.load(name))}
        return build(name, {key: value for key, value in methods.current(name, _handed_on(row.last)).items() if key in known})

    own = dict(zip(map(_label, row.names, row.methods), zip(row.names, row.methods, strict=True), strict=True))
    if len(row.methods) == 1:
        yield from ([control(name)] for name in row.controls)
    for parts in related(tuple(own), row.methods, methods.load):
        yield [own[part] if part in own else control(part) for part in parts]


def _handed_on(method: Any) -> dict[str, JsonValue]:
    """Return the settings that a row's controls take over."""
    handed_on = current_settings(type(method).__name__, method.control_settings(), settings_of_class(type(method)))
    return {key: list(value) if isinstance(value, tuple) else value for key, value in handed_on.items()}


def _label(name: str, method: Any) -> str:
    """Return the row's name: settings that differ from the defaults stand in brackets."""
    defaults = expanded(type(method)())
    differing = [f"{key}={_written(value)}" for key, value in expanded(method).items() if value != defaults[key]]
    return f"{name}[{','.join(differing)}]" if differing else name


def _written(value: object) -> str:
    """Return a setting's value as it stands in a row's name: a list's items joined by +, and no comma, which ends a row."""
    return "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value).replace(",", "+")


def _chat(config: RunConfig, teacher: PlannedModel, base: PlannedModel) -> bool:
    """Decide once for all rows whether prompts are shown in the chat template."""
    without = [one.name for one in (teacher, base) if not has_chat_template(one.path)]
    if config.chat_template == "on" and without:
        raise HarnessError(f"--chat-template on: the tokenizer of {without[0]} has no chat template; type --chat-template off")
    chat = config.chat_template == "on" or (config.chat_template == "auto" and not without and not is_embedded(config.teacher_names[0]))
    if config.system is not None and not chat:
        raise HarnessError("--system needs a chat template, and none is used here; drop it, or type --chat-template on")
    return chat


def has_chat_template(folder: Path) -> bool:
    """Tell from a model folder's files whether its tokenizer has a chat template."""
    if (folder / "chat_template.jinja").exists():
        return True
    try:
        told = read_object(folder / "tokenizer_config.json", MODEL)
    except Unreadable:
        return False
    return bool(told.get("chat_template"))


def _check_vocabularies(rows: Sequence[_Row], teacher: PlannedModel, base: PlannedModel) -> None:
    asking = [row for row in rows if any(one.needs_same_vocabulary for one in row.methods)]
    if not asking or teacher.digest == base.digest:
        return
    ours, theirs = token_map(base.path), token_map(teacher.path)
    if ours is not None and theirs is not None:
        common_vocabulary(ours, theirs, names=(f"student {base.name}", f"teacher {teacher.name}"))
