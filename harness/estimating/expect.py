"""Estimates chains and planned cells: looks up their models and tasks. No torch, no weights."""

import contextlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from pydantic import JsonValue

from harness import catalog
from harness.contract import Method
from harness.data.teacher_sets import parse_teacher_set
from harness.errors import HarnessError
from harness.estimating.estimate import (
    Estimate,
    StageEstimate,
    WrittenTexts,
    estimate,
    scoring_stage,
    student_stages,
    writing_stage,
)
from harness.estimating.hardware import Hardware, parse_hardware, this_machine
from harness.estimating.memory import Peak, model_bytes
from harness.estimating.recipes import RecipesThatFit
from harness.estimating.requests import are_generated, items_of, request_of_run
from harness.estimating.workload import (
    EstimateRequest,
    Packed,
    cut_parameters,
    is_size,
    packed_as,
    parameter_factor,
    parse_model,
    training_bytes,
    workload_of,
)
from harness.measuring.rounds import RoundsRule, rounds_on
from harness.measuring.scenario import GRIDS
from harness.models.artefacts import default_cache
from harness.models.resolve import configuration_folder, is_embedded
from harness.models.shape import Shape
from harness.models.shaping import parse_student_cut
from harness.planning.cells import Plan, PlannedCell
from harness.planning.chain import check_chain, split_chain
from harness.planning.config import EMBEDDED_BUDGET, OUTSIDE_BUDGET
from harness.planning.recipes import RecipeChooser, first_recipes
from harness.planning.spec import parse_method
from harness.records.record import TEACHER, RunRecord
from harness.records.store import read_records


@dataclass(frozen=True, kw_only=True)
class ChainsRequest:
    """The models (by name or by size: 70B), hardware and amounts that chains are estimated for."""

    teacher: str
    student: str
    hardware: str
    suite: Sequence[str]
    budget: int | None  # tokens seen by a trained row; None: the default of a run
    rows: int
    limit: int | None  # items of each task that are scored; None: all
    records: Sequence[RunRecord]  # of this machine, to take its rates from
    cache: Path | None


def estimates_of(methods: Sequence[str], request: ChainsRequest) -> list[Estimate]:
    """Estimate each chain of `methods`. Raises `HarnessError` for chains that a run refuses."""
    if not methods:
        raise HarnessError("no method is given; write for example --methods cot,response+int4")
    if request.budget is not None and request.budget < 100:
        raise HarnessError(f"--budget {request.budget}: give 100 tokens or more")
    hardware = parse_hardware(request.hardware, request.records)
    common = _common_request(request, hardware)
    estimates: list[Estimate] = []
    for spec in methods:
        chain = _Chain.of(spec).settled(RecipesThatFit(common, hardware))
        chain_request = replace(
            common,
            chain=chain.names,
            micro_batch_size=chain.number("micro_batch_size", 16),
            samples=chain.number("samples", 1),
        )
        workloads = dict(zip(chain.names, map(workload_of, chain.methods), strict=True))
        chain_estimate = estimate(
            chain_request, workloads, hardware, request.records, with_teacher=not estimates
        )
        advice = (*chain.recipe_lines, *chain_estimate.advice)
        estimates.append(replace(chain_estimate, advice=advice))
    return estimates


def _common_request(request: ChainsRequest, hardware: Hardware) -> EstimateRequest:
    """Return what all chains of a request share."""
    teacher, student = _shapes(request)
    embedded = is_embedded(request.teacher)
    suites = catalog.resolve_suites(list(request.suite), embedded=embedded)
    tasks = [*dict.fromkeys(task for suite in suites.values() for task in suite.tasks)]
    return EstimateRequest(
        teacher=teacher,
        student=student,
        chain=(),
        items=items_of(tasks, None, request.limit),
        rows=request.rows,
        mini=are_generated(tasks),
        budget=request.budget or (EMBEDDED_BUDGET if embedded else OUTSIDE_BUDGET),
        grid=GRIDS[hardware.kind],
        rounds=RoundsRule.parse(rounds_on(hardware.kind, None)).expected,
    )


def _shapes(request: ChainsRequest) -> tuple[Shape, Shape]:
    """Return the shapes of teacher and student: by their sizes, or from their configurations."""

    def folder(name: str) -> Path:
        return configuration_folder(name, cache=request.cache or default_cache())

    teacher = parse_model(request.teacher, folder)
    recipe = parse_student_cut(request.student)
    student = recipe.shape_of(teacher) if recipe else parse_model(request.student, folder)
    # the public shapes of two sizes may be of two families: assume one vocabulary
    if is_size(request.teacher) and is_size(request.student):
        student = replace(student, vocabulary=teacher.vocabulary)
    return teacher, student


@dataclass(frozen=True)
class _Chain:
    """A chain as it was typed: the names of its methods, the methods, and the typed settings."""

    names: tuple[str, ...]
    methods: tuple[Method, ...]
    settings: Mapping[str, JsonValue]  # of all its methods
    recipe_lines: tuple[str, ...] = ()  # how its stages train

    @classmethod
    def of(cls, spec: str) -> Self:
        """Build a chain's methods. Raises `HarnessError` for wrong settings or a wrong order."""
        registry = catalog.methods()
        stages = [
            (registry.canonical(name), settings)
            for name, settings in map(parse_method, split_chain(spec))
        ]
        methods = tuple(registry.build(name, settings) for name, settings in stages)
        names = tuple(name for name, _ in stages)
        if len(names) > 1:
            check_chain(names, methods)
        typed: dict[str, JsonValue] = {}
        for name, settings in stages:
            typed |= registry.current(name, settings)
        return cls(names, methods, typed)

    def settled(self, fits: RecipesThatFit) -> Self:
        """Return the chain with a recipe for each stage that trains.

        It is the first recipe where none fits: the estimate says so.
        """
        stages = [*zip(self.names, self.methods, strict=True)]
        # packages may be missing here and stand on the hardware that is planned for
        chooser = RecipeChooser(fits, lacks_bf16=fits.lacks_bf16, has_package=lambda package: True)
        try:
            chosen = chooser.settle(stages)
        except HarnessError as problem:
            chosen = first_recipes(stages)._replace(notes={"": str(problem)})
        methods = tuple(method for _, method in chosen.stages)
        lines = [
            f"{name} trains by {chosen.notes.get(name, f'recipe {method.recipe}')}."
            for name, method in chosen.stages
            if getattr(method, "recipe", "")
        ]
        unfit = [f"{reason}." for name, reason in chosen.notes.items() if not name]
        return replace(self, methods=methods, recipe_lines=(*lines, *unfit))

    def number(self, setting: str, default: int) -> int:
        """Return an integer that was typed for any of the methods."""
        return int(str(self.settings.get(setting, default)))


@dataclass(frozen=True, kw_only=True)
class CellEstimate:
    """What a planned cell needs on this machine, by formula."""

    seconds: float
    # bytes that its training needs whatever its batch size; 0 if nothing is trained
    training_bytes: float = 0.0
    verdict: str = ""  # whether its training fits, batches included
    hardware: Hardware
    recipes: tuple[str, ...] = ()  # of its trained stages
    peaks: tuple[Peak, ...] = ()  # of all that is done for it, in order
    # bytes of the processor's memory while a GPU trains and its state is written beside it
    state_copy: float = 0.0

    @property
    def memory(self) -> float:
        """The bytes of the device."""
        return self.hardware.memory

    @property
    def peak(self) -> Peak:
        """The largest of its peaks."""
        return max(self.peaks, key=lambda peak: peak.total)


def estimate_cells(plan: Plan, finished: Container[str]) -> list[CellEstimate]:
    """Estimate every cell of a plan; `finished` has the keys of finished cells.

    What several cells share is counted in the first of them.
    """
    estimator = _CellEstimator.of(plan)
    return [estimator.estimate(cell, is_finished=cell.key in finished) for cell in plan.cells]


def estimate_writing(plan: Plan) -> dict[str, StageEstimate]:
    """Return what it takes to write each data set that the teacher writes, by its name."""
    return _CellEstimator.of(plan).writing_stages()


@dataclass
class _StudentEstimate:
    """What making a cell's student needs, added up stage by stage."""

    shape: Shape  # of the student of the last stage
    seconds: float = 0.0
    training_bytes: float = 0.0
    packed: Packed | None = None
    recipes: list[str] = field(default_factory=list)
    trainings: list[StageEstimate] = field(default_factory=list)
    peaks: list[Peak] = field(default_factory=list)


@dataclass(frozen=True)
class _CellEstimator:
    """Estimates the cells of a plan, one after the other."""

    plan: Plan
    hardware: Hardware
    records: Sequence[RunRecord]
    teachers: tuple[Shape, ...]
    request: EstimateRequest
    # keys of stages, and names of shared work, that an earlier cell counts
    counted: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """Look up what all cells share: shapes, items, and the rates of this machine."""
        records = _stored_records(plan.config.out)
        teachers = tuple(Shape.of_folder(model.path, name=model.name) for model in plan.teachers)
        conditions = plan.conditions
        hardware = this_machine(conditions.device, records, dtype=conditions.dtype)
        return cls(plan, hardware, records, teachers, _request_of_plan(plan, teachers[0]))

    def estimate(self, cell: PlannedCell, *, is_finished: bool) -> CellEstimate:
        """Estimate a cell: making its student, scoring it, and timing it beside the teacher."""
        student = self._student(cell)
        base = student.shape if cell.method == TEACHER else self.teachers[0]
        request = replace(self.request, grid="") if cell.simulated else self.request
        score = scoring_stage(
            cell.label,
            student.shape,
            request,
            self.hardware,
            self.records,
            timing_base=base,
            packed=student.packed,
        )
        return CellEstimate(
            seconds=0.0 if is_finished else student.seconds + score.seconds,
            training_bytes=student.training_bytes,
            verdict=self._verdict(student),
            hardware=self.hardware,
            recipes=tuple(student.recipes),
            peaks=(*student.peaks, *score.peaks),
            state_copy=max((stage.state_copy for stage in student.trainings), default=0.0),
        )

    def _student(self, cell: PlannedCell) -> _StudentEstimate:
        """Estimate the stages of a cell's student."""
        if cell.checkpoint is not None:
            folder = cell.checkpoint.model_folder
            return _StudentEstimate(Shape.of_folder(folder, name=cell.label))
        student = _StudentEstimate(self.teachers[cell.teacher])
        folder = self.plan.teachers[cell.teacher].path
        teachers = [teacher.path for teacher in self.plan.teachers]
        for position, (key, name, method) in enumerate(self._methods_of(cell)):
            workload = workload_of(method)
            if position == 0 and not workload.starts_from_teacher:
                folder, student.shape = self.plan.student_base.path, self.request.student
                student.packed = packed_as(folder)
            request = replace(
                self.request, micro_batch_size=method.rows_at_once, samples=method.answers_per_row
            )
            workload = replace(
                workload,
                parameter_factor=parameter_factor(folder),
                packed_start=student.packed,
            )
            stages = student_stages(name, workload, student.shape, request, self.hardware)
            if method.trains or method.calibrates:
                stages = [*self.writing_stages().values(), *stages]
            student.peaks += [peak for stage in stages for peak in stage.peaks]
            student.seconds += self._uncounted_seconds(key, stages)
            if workload.trains:
                parameters = cut_parameters(folder, student.shape)
                frozen = model_bytes(student.shape, 4, student.packed) if student.packed else None
                needed = training_bytes(
                    workload, parameters, teachers, self.plan.conditions.dtype, packed=frozen
                )
                student.training_bytes = max(student.training_bytes, needed)
                student.trainings.append(stages[-1])
                student.recipes += [workload.recipe] if workload.recipe else []
            student.packed = workload.packed or student.packed
            student.shape = workload.student_shape(student.shape)
        return student

    def writing_stages(self) -> dict[str, StageEstimate]:
        """Return what the data takes that the teacher writes, by the names of the sets.

        Each text is counted with all the tokens that it may have.
        """
        row = self.request.row_tokens
        stages: dict[str, StageEstimate] = {}
        for data in self.plan.conditions.train_data:
            typed = parse_teacher_set(data.name)
            if typed is None:
                continue
            recipe = typed.data.recipe
            # in a chat template a teacher writes a question first, and answers it then
            rounds = 2 if recipe.free and self.plan.conditions.chat else 1
            prompt = 1 if recipe.free else round(row.mean * (1 - row.trained_share))
            stages[data.name] = writing_stage(
                f"teacher writes {data.name} (once, cached)",
                self.teachers[0],
                self.hardware,
                texts=WrittenTexts(
                    rounds * data.examples, prompt, recipe.longest, prompt + recipe.longest
                ),
            )
        return stages

    def _methods_of(self, cell: PlannedCell) -> Iterator[tuple[str, str, Any]]:
        """Yield key, name and method of each stage of a cell."""
        registry = catalog.methods()
        return (
            (stage.key, stage.method, registry.build(stage.method, stage.settings))
            for stage in cell.stages
        )

    def _uncounted_seconds(self, key: str, stages: Sequence[StageEstimate]) -> float:
        """Return the seconds of the stages that no earlier cell has counted."""
        seconds = 0.0
        for stage in stages:
            name = stage.name if stage.shared else key
            seconds += 0.0 if name in self.counted else stage.seconds
            self.counted.add(name)
        return seconds

    def _verdict(self, student: _StudentEstimate) -> str:
        """Say whether a student's training fits, and with which settings."""
        settings = " ".join(dict.fromkeys(stage.note for stage in student.trainings if stage.note))
        fits = all(stage.fits for stage in student.trainings)
        if fits and student.training_bytes <= self.hardware.memory:
            return f"fits with {settings}" if settings else "fits"
        return "DOES NOT FIT, give a smaller student or a device with more memory"


def _stored_records(out: Path) -> list[RunRecord]:
    """Return the records of a store; an empty list if it has none."""
    with contextlib.suppress(HarnessError):
        return read_records(out)[0]
    return []


def _request_of_plan(plan: Plan, teacher: Shape) -> EstimateRequest:
    """Return what all cells of a plan share, given the teacher's shape."""
    has_timing = any(suite.measure for suite in plan.suites.values())
    return request_of_run(
        plan.config,
        teacher=teacher,
        base=Shape.of_folder(plan.student_base.path, name=plan.student_base.name),
        tasks=plan.conditions.task_names,
        budget=plan.conditions.budget_tokens,
        grid=plan.grid if has_timing else "",
        rounds=RoundsRule.parse(plan.rounds).expected,
    )
