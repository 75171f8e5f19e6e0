"""What chains and planned cells will take: models and tasks are looked up, then priced by formula
(`estimate`). No torch, no weights.
"""

import contextlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from pydantic import JsonValue

from harness import catalog
from harness.contract import Method
from harness.data.sizes import ITEMS_BY_TASK
from harness.errors import HarnessError
from harness.estimating.estimate import (
    Estimate,
    StageEstimate,
    estimate,
    scoring_stage,
    student_stages,
)
from harness.estimating.hardware import Hardware, parse_hardware, this_machine
from harness.estimating.workload import (
    EstimateRequest,
    cut_parameters,
    is_size,
    parse_model,
    training_bytes,
    workload_of,
)
from harness.measuring.scenario import GRIDS
from harness.models.artefacts import default_cache
from harness.models.resolve import configuration_folder, is_embedded
from harness.models.shape import Shape
from harness.models.shaping import parse_student_cut
from harness.planning.cells import Plan, PlannedCell
from harness.planning.chain import check_chain, split_chain
from harness.planning.config import EMBEDDED_BUDGET, OUTSIDE_BUDGET
from harness.planning.spec import limit_for, parse_method
from harness.records.record import TEACHER, RunRecord
from harness.records.store import read_records

_DEFAULT_ITEMS = 1_000  # of a task whose size nobody knows
_NO_LIMIT = 10**9


def item_count(name: str, include_path: Path | None) -> int:
    """Return how many items a task has: as published, or as its data files have lines; 1,000 where
    neither is known.
    """
    if name in ITEMS_BY_TASK or not name.startswith(catalog.OUTSIDE):
        return ITEMS_BY_TASK.get(name, _DEFAULT_ITEMS)
    counted: int | None = catalog.count_items(name, include_path=include_path)
    return _DEFAULT_ITEMS if counted is None else counted


def _are_generated(tasks: Sequence[str]) -> bool:
    """Tell whether all tasks are the generated ones, whose rows are short."""
    return all(task.endswith("-mini") for task in tasks)


@dataclass(frozen=True, kw_only=True)
class ChainsRequest:
    """What chains are estimated under: models by name or by size (70B), the hardware, and how much
    is trained and scored.
    """

    teacher: str
    student: str
    hardware: str
    suite: Sequence[str]
    budget: int | None  # seen tokens of a trained row; None: as a run has them
    rows: int
    limit: int | None  # items scored of each task
    records: Sequence[RunRecord]  # of this machine, for its rates
    cache: Path | None


def estimates_of(methods: Sequence[str], request: ChainsRequest) -> list[Estimate]:
    """Estimate each chain of `methods`. Raises `HarnessError` for one that a run would refuse."""
    if not methods:
        raise HarnessError("no method is asked for; write for example --methods cot,response+int4")
    if request.budget is not None and request.budget < 100:
        raise HarnessError(f"--budget {request.budget}: give 100 seen tokens or more")
    place = parse_hardware(request.hardware, request.records)
    common = _common_request(request, place)
    estimates: list[Estimate] = []
    for spec in methods:
        chain = _Chain.of(spec)
        asked = replace(
            common,
            chain=chain.names,
            micro_batch_size=chain.number("micro_batch_size", 16),
            samples=chain.number("samples", 1),
        )
        work = {
            name: workload_of(method)
            for name, method in zip(chain.names, chain.methods, strict=True)
        }
        estimates.append(estimate(asked, work, place, request.records, teacher_row=not estimates))
    return estimates


def _common_request(request: ChainsRequest, place: Hardware) -> EstimateRequest:
    """Return what all chains of a request have in common."""
    teacher, student = _shapes(request)
    embedded = is_embedded(request.teacher)
    suites = catalog.resolve_suites(list(request.suite), embedded=embedded)
    tasks = [*dict.fromkeys(task for suite in suites.values() for task in suite.tasks)]
    return EstimateRequest(
        teacher=teacher,
        student=student,
        chain=(),
        items={task: min(item_count(task, None), request.limit or _NO_LIMIT) for task in tasks},
        rows=request.rows,
        mini=_are_generated(tasks),
        budget=request.budget or (EMBEDDED_BUDGET if embedded else OUTSIDE_BUDGET),
        grid=GRIDS[place.kind],
    )


def _shapes(request: ChainsRequest) -> tuple[Shape, Shape]:
    """Return the shapes of teacher and student, read from configurations or taken from a size."""

    def folder(name: str) -> Path:
        return configuration_folder(name, cache=request.cache or default_cache())

    teacher = parse_model(request.teacher, folder)
    recipe = parse_student_cut(request.student)
    student = recipe.shape_of(teacher) if recipe else parse_model(request.student, folder)
    # public shapes of two families: taken as of one, with one vocabulary
    if is_size(request.teacher) and is_size(request.student):
        student = replace(student, vocabulary=teacher.vocabulary)
    return teacher, student


@dataclass(frozen=True)
class _Chain:
    """A chain as it was typed: its methods by their own names, built, and the settings that were
    typed.
    """

    names: tuple[str, ...]
    methods: tuple[Method, ...]
    settings: Mapping[str, JsonValue]

    @classmethod
    def of(cls, spec: str) -> Self:
        """Build a chain's methods. Raises `HarnessError` for what a method or its place in the
        chain refuses.
        """
        registry = catalog.methods()
        stages = [
            (registry.canonical(name), settings)
            for name, settings in map(parse_method, split_chain(spec))
        ]
        methods = tuple(registry.build(name, settings) for name, settings in stages)
        names = tuple(name for name, _ in stages)
        if len(names) > 1:
            check_chain(names, methods)
        typed = (registry.current(name, settings) for name, settings in stages)
        return cls(
            names, methods, {key: value for settings in typed for key, value in settings.items()}
        )

    def number(self, setting: str, default: int) -> int:
        """Return a whole number that was typed for any of the methods."""
        return int(str(self.settings.get(setting, default)))


@dataclass(frozen=True, kw_only=True)
class CellEstimate:
    """What a planned cell will take on this machine, by formula."""

    seconds: float
    # bytes that its training holds whatever the batches; 0 where nothing trains
    training_bytes: float = 0.0
    memory: float = 0.0  # bytes of the device
    verdict: str = ""  # whether its training fits, batches included


def estimate_cells(plan: Plan, finished: Container[str]) -> list[CellEstimate]:
    """Estimate every cell of a plan, given the keys of those that are finished; what cells share
    counts in the first that makes it.
    """
    estimator = _CellEstimator.of(plan)
    return [estimator.expected(cell, is_finished=cell.key in finished) for cell in plan.cells]


@dataclass
class _StudentEstimate:
    """What making a cell's student takes, added up stage by stage."""

    shape: Shape  # of what the last stage gave
    seconds: float = 0.0
    training_bytes: float = 0.0
    trainings: list[StageEstimate] = field(default_factory=list)


@dataclass(frozen=True)
class _CellEstimator:
    """Prices the cells of a plan, one after the other."""

    plan: Plan
    place: Hardware
    records: Sequence[RunRecord]
    teachers: tuple[Shape, ...]
    asked: EstimateRequest
    # stages, and what stages share, that an earlier cell makes
    counted: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """Look up what all cells have in common: shapes, items, and this machine's rates from its
        records.
        """
        records = _stored_records(plan.config.out)
        teachers = tuple(Shape.of_folder(model.path, name=model.name) for model in plan.teachers)
        place = this_machine(plan.conditions.device, records)
        return cls(plan, place, records, teachers, _request_of_plan(plan, teachers[0]))

    def expected(self, cell: PlannedCell, *, is_finished: bool) -> CellEstimate:
        """Return what a cell takes: making its student, and scoring and timing it beside the
        teacher.
        """
        made = self._making(cell)
        beside = made.shape if cell.method == TEACHER else self.teachers[0]
        asked = replace(self.asked, grid="") if cell.simulated else self.asked
        scored = scoring_stage(
            cell.label, made.shape, asked, self.place, self.records, beside=beside
        )
        return CellEstimate(
            seconds=0.0 if is_finished else made.seconds + scored.seconds,
            training_bytes=made.training_bytes,
            memory=self.place.memory,
            verdict=self._verdict(made),
        )

    def _making(self, cell: PlannedCell) -> _StudentEstimate:
        made, folder = (
            _StudentEstimate(self.teachers[cell.teacher]),
            self.plan.teachers[cell.teacher].path,
        )
        teachers = [teacher.path for teacher in self.plan.teachers]
        for at, (key, name, method) in enumerate(self._methods_of(cell)):
            work = workload_of(method)
            if at == 0 and not work.starts_from_teacher:
                folder, made.shape = self.plan.student_base.path, self.asked.student
            asked = replace(
                self.asked, micro_batch_size=method.rows_at_once, samples=method.answers_per_row
            )
            stages = student_stages(name, work, made.shape, asked, self.place)
            made.seconds += self._not_counted_before(key, stages)
            if work.trains:
                parameters = cut_parameters(folder, made.shape)
                made.training_bytes = max(
                    made.training_bytes,
                    training_bytes(work, parameters, teachers, self.plan.conditions.dtype),
                )
                made.trainings.append(stages[-1])
            made.shape = work.student_shape(made.shape)
        return made

    def _methods_of(self, cell: PlannedCell) -> Iterator[tuple[str, str, Any]]:
        registry = catalog.methods()
        return (
            (stage.key, stage.method, registry.build(stage.method, stage.settings))
            for stage in cell.stages
        )

    def _not_counted_before(self, key: str, stages: Sequence[StageEstimate]) -> float:
        seconds = 0.0
        for stage in stages:
            name = stage.name if stage.shared else key
            seconds += 0.0 if name in self.counted else stage.seconds
            self.counted.add(name)
        return seconds

    def _verdict(self, made: _StudentEstimate) -> str:
        how = " ".join(dict.fromkeys(stage.note for stage in made.trainings if stage.note))
        if made.training_bytes <= self.place.memory and all(stage.fits for stage in made.trainings):
            return f"fits{how and f' with {how}'}"
        return "DOES NOT FIT, give a smaller student or a larger device"


def _stored_records(out: Path) -> list[RunRecord]:
    with contextlib.suppress(HarnessError):  # no record yet
        return read_records(out)[0]
    return []


def _request_of_plan(plan: Plan, teacher: Shape) -> EstimateRequest:
    """Return what all cells of a plan are asked, given the teacher's shape."""
    under, config = plan.conditions, plan.config
    recipe, base = (
        parse_student_cut(config.student),
        Shape.of_folder(plan.student_base.path, name=plan.student_base.name),
    )
    names = under.task_names
    return EstimateRequest(
        teacher=teacher,
        student=recipe.shape_of(base) if recipe else base,
        chain=(),
        budget=under.budget_tokens,
        rows=under.budget_rows,
        mini=_are_generated(names),
        rounds=config.rounds,
        items={
            name: min(
                item_count(name, config.include_path), limit_for(under.limit, name) or _NO_LIMIT
            )
            for name in names
        },
        grid=plan.grid if any(suite.measure for suite in plan.suites.values()) else "",
    )
