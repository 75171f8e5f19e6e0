"""Turns a configuration into a plan: which rows, at which seeds, with a key for each. No torch.

A key contains everything that can change the student or cell that it names, and nothing else. The
parts of all keys are put together here, each under its name.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from harness.contract import Method, Prompting
from harness.machine.gpu import device_label, gpu_of, has_bf16
from harness.machine.processor import processor_label
from harness.measuring.scenario import parse_grid
from harness.models.resolve import quantized_by
from harness.planning.cells import Plan, PlannedCell, PlannedStage
from harness.planning.config import RunConfig
from harness.planning.keys import (
    CodeDigests,
    KeyBuilder,
    lm_eval_parts,
    lm_eval_version,
    reads_items,
)
from harness.planning.recipes import NamedMethod, RecipeChooser, TrainingFits
from harness.planning.rows import PlannedRow, build_rows, label_of
from harness.planning.setup import (
    ResolvedNames,
    RunModels,
    Setup,
    check_checkpoint_names,
    check_start,
    check_teachers,
    check_training_data,
    check_vocabularies,
)
from harness.records.record import CHECKPOINT, TEACHER
from harness.records.store import Store
from harness.registry import settings_with_defaults


def make_plan(
    config: RunConfig,
    resolved: ResolvedNames,
    fits_of: Callable[[Setup], TrainingFits | None] = lambda setup: None,
) -> Plan:
    """Plan models, rows, controls and seeds.

    `fits_of` returns what tells whether a training fits; where nothing does, rows that name no
    recipe get the first one. Raises `HarnessError` for everything that cannot work, before anything
    is computed.
    """
    rows = build_rows(config, resolved.methods)
    check_teachers(rows, resolved.teachers)
    check_checkpoint_names(resolved.checkpoints, rows, resolved.methods)
    models = RunModels.of(config, resolved.teachers, resolved.checkpoints)
    check_vocabularies(rows, models)
    check_start(rows, models)
    check_training_data(rows, resolved.training_sets, config.methods)
    setup = Setup.of(config, resolved, models)
    code = CodeDigests(resolved.tasks)
    if any(row.trains for row in rows) and (fits := fits_of(setup)) is not None:
        chooser = _recipe_chooser(setup, code, fits)
        rows = build_rows(config, resolved.methods, chooser.settle, chooser.settle_control)
    key_builder = KeyBuilder(_user_request(setup))
    planner = _Planner(setup, code, key_builder)
    return Plan(
        config=config,
        conditions=setup.conditions(),
        suites=resolved.suites,
        teachers=models.teachers,
        student_base=models.base,
        grid=setup.grid,
        rounds=setup.rounds,
        cells=(
            *planner.teacher_cells(),
            *planner.checkpoint_cells(),
            *(cell for row in rows for cell in planner.cells_of(row)),
        ),
        threads=setup.threads,
        parts=key_builder.parts,
        request=key_builder.request,
        subset=resolved.subset,
    )


def _recipe_chooser(setup: Setup, code: CodeDigests, fits: TrainingFits) -> RecipeChooser:
    """Return what chooses the recipes of rows, by what fits and what is stored."""
    planner = _Planner(setup, code, KeyBuilder({}))
    store = Store(setup.config.out)

    def is_stored(stages: Sequence[NamedMethod]) -> bool:
        if setup.config.force:
            return False
        keys = planner.student_keys(stages)
        return any((store.student(key) / "done.json").exists() for key in keys)

    gpu = gpu_of(setup.resolved.device)
    lacks_bf16 = gpu.name if gpu is not None and not has_bf16(gpu) else ""
    models = setup.models
    return RecipeChooser(
        fits,
        lacks_bf16,
        draws_weights=models.draws_weights,
        starts_packed=quantized_by(models.base.path) not in ("", "float"),
        is_stored=is_stored,
    )


def _user_request(setup: Setup) -> dict[str, object]:
    """Return what the user asked for, by name: the part of a cell's identity that all rows share.

    A cell with another request is a different cell, not an older version of the same one.
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
        **({"subset": setup.resolved.subset.label} if setup.resolved.subset else {}),
        "noise": config.noise,
        "grid": [setup.grid, setup.rounds],
        "weights": config.teacher_weights,
        "tune": config.tune,
        "backend": config.backend,
        **({"train data": config.train_data} if config.train_data else {}),
        **({"calibration": str(config.calibration)} if config.calibration else {}),
    }


def _prompt_parts(setup: Setup) -> list[bool | str | None]:
    return [setup.prompting.chat, setup.prompting.system]


def _student_parts(setup: Setup) -> dict[str, object]:
    """Return what the keys of all students contain.

    Settings at their defaults are left out, so that keys of older versions stay valid.
    """
    config, resolved, models = setup.config, setup.resolved, setup.models
    parts: dict[str, object] = {
        "teachers": [teacher.digest for teacher in models.teachers],
        "base": models.base.digest,
        "recipe": config.student if models.recipe else "whole",
        "device": device_label(resolved.device),
        "dtype": resolved.dtype,
        "rows": config.rows,
        "train": setup.versions,
    }
    if resolved.device == "cpu":
        parts["threads"] = setup.threads  # decides the order of sums
    if resolved.data:
        parts["data"] = resolved.data
    if config.teacher_weights:
        parts["weights"] = list(config.teacher_weights)
    if config.tune:
        parts["tune"] = True
    if setup.prompting != Prompting():
        parts["prompting"] = _prompt_parts(setup)
    return parts


def _score_parts(setup: Setup, code: CodeDigests) -> dict[str, object]:
    """Return what the keys of all cells contain beside the keys of their students."""
    config = setup.config
    parts: dict[str, object] = {
        "tasks": setup.versions,
        "code": code.for_scores(
            backend=config.backend, measured=bool(setup.grid) and setup.measures
        ),
        "lm-eval": lm_eval_version(),
        **lm_eval_parts(setup.resolved.tasks),
        "measure": setup.measures,
        "grid": _grid_parts(setup),
        "machine": _machine_parts(setup),
    }
    if config.limit:  # without a limit, all items are scored
        parts["limit"] = config.limit
    if setup.resolved.subset:
        parts["subset"] = setup.resolved.subset.model_dump(mode="json")
    parts["noise"] = config.noise
    if config.backend != "transformers":
        parts["backend"] = config.backend
    return parts


def _grid_parts(setup: Setup) -> object:
    """Return the timing scenarios and rounds; "none" if nothing is timed."""
    if not setup.grid:
        return "none"
    return [[str(scenario) for scenario in parse_grid(setup.grid)], setup.rounds]


def _machine_parts(setup: Setup) -> list[str | int | None]:
    """Return what decides a cell's speeds: processor, threads, and the GPU with driver and CUDA."""
    gpu = gpu_of(setup.resolved.device)
    return [processor_label(), os.cpu_count(), setup.threads, *([str(gpu)] if gpu else [])]


class _Planner:
    """Builds the cells of a plan. Their keys depend on its attributes and on nothing else."""

    def __init__(self, setup: Setup, code: CodeDigests, key_builder: KeyBuilder) -> None:
        self.setup, self.code, self.key_builder = setup, code, key_builder
        self.student_parts: Mapping[str, object] = _student_parts(setup)
        self.score_parts: Mapping[str, object] = _score_parts(setup, code)

    def teacher_cells(self) -> Iterator[PlannedCell]:
        """Yield one cell for each teacher, the first teacher's before the others."""
        for index, teacher in enumerate(self.setup.models.teachers):
            label = TEACHER if index == 0 else f"{TEACHER} {teacher.name}"
            contents = {**self._scored_as_it_is(), "teacher": index}
            yield PlannedCell(
                key=self.key_builder.make_key("cell", label, None, contents),
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

    def _scored_as_it_is(self) -> dict[str, object]:
        """Return what the key of a cell contains whose model nothing here makes."""
        models = {name: self.student_parts[name] for name in ("teachers", "device", "dtype")}
        inputs = {"data": self.setup.resolved.data, "prompting": _prompt_parts(self.setup)}
        return {**models, **self.score_parts, **inputs}

    def checkpoint_cells(self) -> Iterator[PlannedCell]:
        """Yield one cell for each checkpoint from outside."""
        for name, model in self.setup.models.checkpoints.items():
            # the name too: a record says it, and another name is another record
            contents = {**self._scored_as_it_is(), CHECKPOINT: [name, model.digest]}
            yield PlannedCell(
                key=self.key_builder.make_key("cell", name, None, contents),
                student_key="",
                label=name,
                method=CHECKPOINT,
                settings={},
                family=CHECKPOINT,
                is_control=False,
                controls=(),
                trains=False,
                seed=None,
                checkpoint=model,
            )

    def cells_of(self, row: PlannedRow) -> Iterator[PlannedCell]:
        """Yield a row's cells: one for each seed if a stage depends on the seed, else one."""
        is_random = any(map(self._is_random, row.methods))
        for seed in range(1, self.setup.config.seeds + 1) if is_random else (None,):
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
                inherited_settings=row.inherited_by_controls,
                trains=row.trains,
                recipe_notes=dict(row.recipe_notes),
                simulated=any(method.simulated for method in row.methods),
                seed=seed,
            )

    def student_keys(self, stages: Sequence[NamedMethod]) -> list[str]:
        """Return the keys of the students of some stages, one for each seed."""
        names, methods = tuple(zip(*stages, strict=True))
        row = PlannedRow("", names, methods, ())
        seeds = range(1, self.setup.config.seeds + 1)
        return [self._stages(row, seed)[-1].key for seed in seeds]

    def _is_random(self, method: Method, position: int = 0) -> bool:
        """Tell whether the student of a method depends on the seed.

        `position` is the method's place in its chain: only a first stage can start from new
        random weights.
        """
        new_weights = (
            position == 0 and self.setup.models.draws_weights and method.starts_from == "student"
        )
        return method.trains or method.draws_random_numbers or new_weights

    def _stages(self, row: PlannedRow, seed: int | None) -> tuple[PlannedStage, ...]:
        """Plan the stages of a row.

        A stage's key contains the key of the stage before it, so chains that begin with the same
        stages share the students of those stages.
        """
        stages: list[PlannedStage] = []
        for position, (name, method) in enumerate(zip(row.names, row.methods, strict=True)):
            stage_seed = seed if self._is_random(method, position) else None
            end = position + 1
            label = "+".join(map(label_of, row.names[:end], row.methods[:end]))
            parent = stages[-1].key if stages else ""
            contents = self._key_contents(name, method, seed=stage_seed, parent=parent)
            key = self.key_builder.make_key("student", label, stage_seed, contents)
            stages.append(_planned_stage(key, label, name, method))
        return tuple(stages)

    def _own_data(self, method: Method) -> dict[str, object]:
        """Return what the key of a student contains of the user's own data, if it has any."""
        sets, calibration = self.setup.resolved.training_sets, self.setup.resolved.calibration
        contents: dict[str, object] = {}
        if sets and reads_items(method):
            contents["train data"] = [[data.name, data.digest, data.weight] for data in sets]
        if calibration and method.calibrates:
            contents["calibration data"] = calibration.digest
        return contents

    def _key_contents(
        self, name: str, method: Method, *, seed: int | None, parent: str
    ) -> dict[str, object]:
        """Return what the key of a student contains.

        `seed` is None if the student does not depend on it; `parent` is "" for a first stage.
        """
        return {
            **self.student_parts,
            "method": name,
            "settings": settings_with_defaults(method),
            "budget": 0 if seed is None else self.setup.budget,
            "seed": seed,
            "text": self.setup.resolved.text if method.calibrates else "",
            **self._own_data(method),
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
        calibrates=method.calibrates,
    )
