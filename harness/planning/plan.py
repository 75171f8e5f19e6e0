"""From a configuration to cells: which rows, at which seeds, and a key for each by content. No
torch.

A key holds everything that can change what it stands for, and nothing else: each part is put
together here, under its name.
"""

import os
from collections.abc import Iterator, Mapping

from harness.contract import Method, Prompting
from harness.errors import HarnessError
from harness.machine.gpu import device_label, gpu_of
from harness.machine.processor import processor_label
from harness.measuring.scenario import parse_grid
from harness.planning.cells import Plan, PlannedCell, PlannedStage
from harness.planning.config import RunConfig
from harness.planning.keys import (
    CodeDigests,
    KeyBuilder,
    lm_eval_parts,
    lm_eval_version,
    reads_items,
)
from harness.planning.rows import PlannedRow, build_rows, label_of
from harness.planning.setup import (
    ResolvedNames,
    RunModels,
    Setup,
    check_start,
    check_teachers,
    check_vocabularies,
)
from harness.records.record import TEACHER
from harness.registry import settings_with_defaults


def make_plan(config: RunConfig, resolved: ResolvedNames) -> Plan:
    """Plan models, rows, controls and seeds; refuse here what cannot work, before anything is
    computed.
    """
    if not config.methods:
        raise HarnessError(
            "no method is asked for; write for example --methods cot,response (harness list "
            "methods shows them)"
        )
    rows = build_rows(config, resolved.methods)
    check_teachers(rows, resolved.teachers)
    models = RunModels.of(config, resolved.teachers)
    check_vocabularies(rows, models)
    check_start(rows, models)
    setup = Setup.of(config, resolved, models)
    book = KeyBuilder(_user_request(setup))
    planner = _Planner(setup, CodeDigests(resolved.tasks), book)
    return Plan(
        config=config,
        conditions=setup.conditions(),
        suites=resolved.suites,
        teachers=models.teachers,
        student_base=models.base,
        grid=setup.grid,
        cells=(*planner.teacher_cells(), *(cell for row in rows for cell in planner.cells_of(row))),
        threads=setup.threads,
        parts=book.parts,
    )


def _user_request(setup: Setup) -> dict[str, object]:
    """Return what the user asked for, by name: a cell that differs in it is another cell, not an
    old one.
    """
    config = setup.config
    return {
        "tasks": tuple(setup.versions),
        "teachers": [teacher.name for teacher in setup.models.teachers],
        "student": setup.models.student,
        "budget": setup.budget,
        "rows": config.rows,
        "device": setup.resolved.device,
        "dtype": setup.resolved.dtype,
        "prompting": _prompt_parts(setup),
        "limit": config.limit,
        "noise": config.noise,
        "grid": [setup.grid, config.rounds],
        "weights": config.teacher_weights,
        "tune": config.tune,
        "backend": config.backend,
    }


def _prompt_parts(setup: Setup) -> list[bool | str | None]:
    return [setup.prompting.chat, setup.prompting.system]


def _student_parts(setup: Setup) -> dict[str, object]:
    """Return what the keys of all students hold; what is at its default is left out, so that older
    keys stand.
    """
    config, resolved, models = setup.config, setup.resolved, setup.models
    held: dict[str, object] = {
        "teachers": [teacher.digest for teacher in models.teachers],
        "base": models.base.digest,
        "recipe": config.student if models.recipe else "whole",
        "device": device_label(resolved.device),
        "dtype": resolved.dtype,
        "rows": config.rows,
        "train": setup.versions,
    }
    if resolved.device == "cpu":
        held["threads"] = setup.threads  # they decide the order of sums
    if resolved.data:
        held["data"] = resolved.data
    if config.teacher_weights:
        held["weights"] = list(config.teacher_weights)
    if config.tune:
        held["tune"] = True
    if setup.prompting != Prompting():
        held["prompting"] = _prompt_parts(setup)
    return held


def _score_parts(setup: Setup, code: CodeDigests) -> dict[str, object]:
    """Return what the keys of all cells hold beside their students."""
    config = setup.config
    held: dict[str, object] = {
        "tasks": setup.versions,
        "code": code.for_scores(
            backend=config.backend, measured=bool(setup.grid) and setup.measures
        ),
        "lm-eval": lm_eval_version(),
        **lm_eval_parts(setup.resolved.tasks),
        "measure": setup.measures,
        "grid": [[str(scenario) for scenario in parse_grid(setup.grid)], config.rounds]
        if setup.grid
        else "none",
        "machine": _machine_parts(setup),
    }
    if config.limit:  # none, or of no task: everything is scored
        held["limit"] = config.limit
    held["noise"] = config.noise
    if config.backend != "transformers":
        held["backend"] = config.backend
    return held


def _machine_parts(setup: Setup) -> list[str | int | None]:
    """Return what of this machine a cell's key holds, for its speeds: the processor; on a GPU also
    card, driver and CUDA.
    """
    gpu = gpu_of(setup.resolved.device)
    return [processor_label(), os.cpu_count(), setup.threads, *([str(gpu)] if gpu else [])]


class _Planner:
    """Makes the cells of a plan: keys follow from what it holds, and from nothing else."""

    def __init__(self, setup: Setup, code: CodeDigests, book: KeyBuilder) -> None:
        self.setup, self.code, self.key_builder = setup, code, book
        self.student_parts: Mapping[str, object] = _student_parts(setup)
        self.score_parts: Mapping[str, object] = _score_parts(setup, code)

    def teacher_cells(self) -> Iterator[PlannedCell]:
        """Yield the rows of the first teacher and of each other one beside it."""
        models = {name: self.student_parts[name] for name in ("teachers", "device", "dtype")}
        given = {"data": self.setup.resolved.data, "prompting": _prompt_parts(self.setup)}
        for index, teacher in enumerate(self.setup.models.teachers):
            label = TEACHER if index == 0 else f"{TEACHER} {teacher.name}"
            yield PlannedCell(
                key=self.key_builder.make_key(
                    "cell", label, None, {**models, **self.score_parts, **given, "teacher": index}
                ),
                student_key="",
                label=label,
                method=TEACHER,
                settings={},
                family="teacher",
                is_control=False,
                controls=(),
                trains=False,
                seed=None,
                teacher=index,
            )

    def cells_of(self, row: PlannedRow) -> Iterator[PlannedCell]:
        """Yield a row's cells: one for each seed where a stage draws, else one."""
        for seed in (
            range(1, self.setup.config.seeds + 1) if any(map(self._draws, row.methods)) else (None,)
        ):
            stages = self._stages(row, seed)
            students = tuple(stage.key for stage in stages)
            yield PlannedCell(
                key=self.key_builder.make_key(
                    "cell", row.label, seed, self.score_parts, students=students
                ),
                student_key=students[-1],
                label=row.label,
                method=row.name,
                settings=row.settings,
                stages=stages,
                family=row.family,
                is_control=any(method.is_control for method in row.methods),
                controls=row.controls,
                handed_on=row.inherited_by_controls,
                trains=row.trains,
                simulated=any(method.simulated for method in row.methods),
                seed=seed,
            )

    def _draws(self, method: Method, at: int = 0) -> bool:
        """Tell whether the student that a method makes as a chain's stage of this number depends on
        the seed.
        """
        from_nothing = (
            at == 0 and self.setup.models.draws_weights and method.starts_from == "student"
        )
        return method.trains or method.draws_random_numbers or from_nothing

    def _stages(self, row: PlannedRow, seed: int | None) -> tuple[PlannedStage, ...]:
        """Plan a row's stages. A stage's key holds its parent's: chains that begin alike share what
        they begin with.
        """
        planned: list[PlannedStage] = []
        for at, (name, method) in enumerate(zip(row.names, row.methods, strict=True)):
            drawn = seed if self._draws(method, at) else None
            label = "+".join(map(label_of, row.names[: at + 1], row.methods[: at + 1]))
            held = self._held(name, method, seed=drawn, parent=planned[-1].key if at else "")
            planned.append(
                _planned_stage(
                    self.key_builder.make_key("student", label, drawn, held), label, name, method
                )
            )
        return tuple(planned)

    def _held(
        self, name: str, method: Method, *, seed: int | None, parent: str
    ) -> dict[str, object]:
        """Return what the key of a student holds: `seed` is None where nothing is drawn, `parent`
        "" in a chain's first stage.
        """
        return {
            **self.student_parts,
            "method": name,
            "settings": settings_with_defaults(method),
            "budget": 0 if seed is None else self.setup.budget,
            "seed": seed,
            "text": self.setup.resolved.text if method.calibrates else "",
            "parent": parent,
            "code": self.code.for_student(method),
            **(lm_eval_parts(self.code.tasks) if reads_items(method) else {}),
        }


def _planned_stage(key: str, label: str, name: str, method: Method) -> PlannedStage:
    return PlannedStage(
        key=key,
        label=label,
        method=name,
        settings=settings_with_defaults(method),
        family=method.family,
        trains=method.trains,
        starts_from=method.starts_from,
        simulated=method.simulated,
    )
