"""What `harness.testing.check_method` looks at, check by check: first what is declared, then three
students and what making them did.

A check raises `AssertionError` with what was seen and what was declared, or `Skipped` where this
machine cannot make the student.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.checking.trespass import written_outside
from harness.contract import Budget, Checkpoint, Job, Task
from harness.errors import HarnessError, Skipped, in_one_line
from harness.registry import Registry, admit_method, construct, settings_with_defaults
from harness.traits import complete_method, refuse_values

TOKENS, ROWS = 1_500, 24  # seen by a training, and the training items: seconds on two cores
SEEDS = {"first": 1, "again": 1, "other": 2}


@dataclass(frozen=True, kw_only=True)
class TrialStudent:
    """One student, and what making it did."""

    checkpoint: Checkpoint
    cost: Mapping[str, Any]  # cost.json; empty where there is none
    read: frozenset[str]  # splits of the task that were asked for
    traces: int  # files of written answers in the cache
    outside: tuple[str, ...]  # files written neither in its folder nor in the cache


class RecordingTask:
    """A task that notes which splits are read of it."""

    def __init__(self, task: Task, read: set[str]) -> None:
        self._task, self._read = task, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def examples(self, split: Any, source: Any) -> Any:
        """Yield the task's own items."""
        self._read.add(split)
        return self._task.examples(split, source)


@dataclass(kw_only=True)
class Trial:
    """A method on trial: its class, and the students that it made so far."""

    name: str
    found: Any  # None: the registry has it by its name
    registry: Registry
    settings: Mapping[str, object]
    folder: Path
    fresh: bool
    students: dict[str, TrialStudent] = field(default_factory=dict)
    missing: str = ""  # why this machine cannot make a student

    @cached_property
    def method(self) -> Any:
        """The method with its settings."""
        if self.found is None:
            return self.registry.build(self.name, self.settings)
        method = construct(self.name, self.loaded, self.settings)
        refuse_values(self.name, method)
        return method

    @cached_property
    def loaded(self) -> Any:
        """The class, its traits looked at, and its module's imports; a module of tests may import
        what it tests.
        """
        if self.found is None:
            return self.registry.load(self.name)
        tests = self.found.__module__.rpartition(".")[2].startswith(
            ("test_", "conftest", "__main__")
        )
        return (complete_method if tests else admit_method)(
            self.name, self.found, frozenset(self.registry.table)
        )

    @cached_property
    def teachers(self) -> tuple[Checkpoint, ...]:
        """Copies of the embedded teachers: one, or two where several are needed."""
        from harness.models.checkpoint import describe
        from harness.models.resolve import EMBEDDED

        names = ("tiny", "tiny-math") if self.method.needs_several_teachers else ("tiny",)
        for name in names:
            shutil.copytree(EMBEDDED / name, self.folder / "inputs" / name, dirs_exist_ok=True)
        return tuple(describe(self.folder / "inputs" / name, name=name) for name in names)

    @cached_property
    def start(self) -> Checkpoint:
        """What the method starts from: the teacher, or half the blocks of another model."""
        import torch

        from harness.models.checkpoint import describe
        from harness.models.resolve import EMBEDDED
        from harness.models.shaping import save_student, student_of

        if self.method.starts_from == "teacher":
            return self.teachers[0]
        base = describe(EMBEDDED / "tiny-math", name="tiny-math")
        half = student_of("depth:0.5", base, seed=1, device="cpu", dtype="float32")
        return save_student(
            half, self.folder / "inputs" / "half", name="half", dtype=torch.bfloat16, parents=()
        )

    @property
    def first(self) -> TrialStudent:
        """The first student. Raises `Skipped` where this machine cannot make it."""
        return self.student("first")

    def student(self, which: str) -> TrialStudent:
        """Return a student: of the first seed, of the same again, of another. Makes each once."""
        if self.missing:
            raise Skipped(self.missing)
        if which not in self.students:
            try:
                self.students[which] = self._make(which)
            except Skipped as reason:
                self.missing = str(reason)
                raise
        return self.students[which]

    def _make(self, which: str) -> TrialStudent:
        from harness import catalog
        from harness.data.source import LocalOrHubData

        workdir, cache, read = self.folder / which, self.folder / "cache", set[str]()
        workdir.mkdir(parents=True)
        cache.mkdir(exist_ok=True)
        task: Any = RecordingTask(catalog.load_task("gsm8k-mini"), read)
        job = Job(
            teachers=self.teachers,
            student=str(self.start.path),
            student_base=self.start,
            tasks={task.name: task},
            source=LocalOrHubData(),
            budget=Budget(seen_tokens=TOKENS, rows=ROWS),
            seed=SEEDS[which],
            workdir=workdir,
            cache=cache,
        )
        with written_outside([workdir, cache]) as outside:
            checkpoint = self.method.compress(job)
        assert isinstance(checkpoint, Checkpoint), (
            f"compress returned {checkpoint!r}; it must return a Checkpoint"
        )
        traces = len(list((cache / "traces").glob("*.json")))
        return TrialStudent(
            checkpoint=checkpoint,
            cost=_cost(workdir),
            read=frozenset(read),
            traces=traces,
            outside=tuple(outside),
        )


def _cost(workdir: Path) -> Mapping[str, Any]:
    path = workdir / "cost.json"
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    assert isinstance(told, dict), f"cost.json holds {told!r}; it must hold an object"
    return told


def files_in(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder."""
    from harness.files.digests import file_digest

    return {
        str(path.relative_to(folder)): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def class_loads(trial: Trial) -> None:
    """The class is a dataclass whose traits are known and of their types."""
    try:
        _ = trial.method
    except HarnessError as problem:
        raise AssertionError(str(problem)) from problem


def settings_round_trip(trial: Trial) -> None:
    """Settings are read from what they are written as, unknown ones are refused, and none changes
    afterwards.
    """
    method, found = trial.method, trial.loaded
    again = construct(trial.name, found, json.loads(json.dumps(settings_with_defaults(method))))
    assert again == method, (
        f"built again from its own settings {settings_with_defaults(method)} it is another method"
    )
    try:
        construct(trial.name, found, {"no_such_setting": 1})
    except HarnessError:
        pass
    else:
        raise AssertionError(
            "an unknown setting was accepted; decorate the class with methods.base.settings"
        )
    name = next(iter(settings_with_defaults(method)), None)
    try:
        setattr(method, name or "no_such_setting", 1)
    except Exception:  # noqa: BLE001  a dataclass and pydantic raise their own
        return
    raise AssertionError(
        f"its setting {name} can be changed after it was built; settings are frozen"
    )


def makes_a_student(trial: Trial) -> None:
    """`compress` returns a checkpoint of a model folder in the job's own folder."""
    _ = trial.teachers, trial.start
    before = files_in(trial.folder / "inputs")
    try:
        made = trial.first.checkpoint
    except (Skipped, AssertionError):
        raise
    except Exception as problem:
        raise AssertionError(f"compress raised {in_one_line(problem)}") from problem
    inside = (
        made.path.resolve().parent == (trial.folder / "first").resolve()
        and (made.path / "config.json").is_file()
    )
    assert inside, f"its checkpoint lies in {made.path}; it must be a model folder in job.workdir"
    after = files_in(trial.folder / "inputs")
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    assert not changed, f"making the student changed its inputs: {', '.join(changed)}"


def writes_in_its_folders_only(trial: Trial) -> None:
    """Files are written in `job.workdir` and `job.cache` alone."""
    outside = trial.first.outside
    assert not outside, (
        f"it wrote {', '.join(outside[:3])}; it may write in job.workdir and job.cache alone"
    )


def cost_is_valid(trial: Trial) -> None:
    """`cost.json` is what a record holds of it, and a training writes one."""
    from pydantic import ValidationError

    from harness.records.consistency import READING_CONTEXT
    from harness.records.record import Cost

    made = trial.first
    assert made.cost or not trial.method.trains, (
        "it trains and wrote no cost.json (self.train writes one)"
    )
    try:
        Cost.model_validate(made.cost, context=READING_CONTEXT)
    except ValidationError as problem:
        first = problem.errors()[0]
        raise AssertionError(
            f"cost.json: {'.'.join(map(str, first['loc']))}: {first['msg']}, given "
            f"{first['input']!r}"
        ) from problem


def starts_from(trial: Trial) -> None:
    """The student is made of what the class says that it starts from."""
    parents, declared = trial.first.checkpoint.parents, trial.method.starts_from
    told = (
        f"declared starts_from = {declared!r}; its checkpoint's parents are "
        f"{[one[:12] for one in parents]}"
    )
    assert trial.start.digest in parents, (
        f"{told}, without job.student_base ({trial.start.digest[:12]})"
    )
    if declared == "student" and not trial.method.trains:
        assert trial.teachers[0].digest not in parents, (
            f"{told}, the teacher ({trial.teachers[0].digest[:12]}) among them"
        )


def changes_a_weight(trial: Trial) -> None:
    """What trains, cuts or packs gives other weights than it was given; a control that does not
    train may give the same.
    """
    from harness.models.checkpoint import same_weights

    made, method = trial.first.checkpoint, trial.method
    if method.trains or method.family != "control":
        same = same_weights(made.path, trial.start.path)
        assert not same, (
            f"declared family = {method.family!r}; the student's weights are, number by number, "
            "those that it started from"
        )


def trains(trial: Trial) -> None:
    """The token budget is spent by what trains, never exceeded, and by nothing else."""
    seen, declared = trial.first.cost.get("seen_tokens", 0), trial.method.trains
    assert (seen > 0) == declared, (
        f"declared trains = {declared}; cost.json says {seen:,} seen tokens"
    )
    assert seen <= TOKENS, f"it saw {seen:,} tokens of a budget of {TOKENS:,}"


def repeats_itself(trial: Trial) -> None:
    """The same seed gives the same bytes."""
    first, again = trial.first.checkpoint, trial.student("again").checkpoint
    assert first.digest == again.digest, (
        f"two students of one seed have the digests {first.digest[:12]} and {again.digest[:12]}; "
        "draw from job.seed alone"
    )


def draws_random_numbers(trial: Trial) -> None:
    """Without training, another seed gives another student exactly where the class says that it
    draws.

    What trains has a row for every seed anyway; so few steps may still see the same rows in both.
    """
    if trial.method.trains:
        return
    declared = trial.method.draws_random_numbers
    differ = trial.first.checkpoint.digest != trial.student("other").checkpoint.digest
    assert differ == declared, (
        f"declared draws_random_numbers = {declared}, trains = False; students of two seeds "
        f"{'differ' if differ else 'are the same'}"
    )


def calibrates(trial: Trial) -> None:
    """Training text is read, without training, exactly where the class says so."""
    if trial.method.trains:
        return
    read, declared = "train" in trial.first.read, trial.method.calibrates
    assert read == declared, (
        f"declared calibrates = {declared}; the task's train split was "
        f"{'read' if read else 'not read'}"
    )


def writes_traces(trial: Trial) -> None:
    """A teacher's written answers are in the cache exactly where the class says so."""
    traces, declared = trial.first.traces, trial.method.writes_traces
    assert bool(traces) == declared, (
        f"declared writes_traces = {declared}; the cache holds {traces} files of written answers"
    )


def reads_teacher_live(trial: Trial) -> None:
    """A teacher that ran beside the student is declared, and one that is declared ran."""
    read, method = trial.first.cost.get("teacher_tokens", 0), trial.method
    declared = (
        f"declared reads_teacher_live = {method.reads_teacher_live}, needs_same_vocabulary = "
        f"{method.needs_same_vocabulary}"
    )
    if method.reads_teacher_live:
        assert read > 0, f"{declared}; cost.json says that the teacher read nothing"
    # what compares logits reads a teacher live where the budget is small
    elif not method.needs_same_vocabulary:
        assert not read, f"{declared}; cost.json says that the teacher read {read:,} tokens"


def resulting_shape(trial: Trial) -> None:
    """The shape that is announced is that of the student's configuration."""
    from dataclasses import asdict

    from harness.models.shape import Shape

    announced = asdict(trial.method.resulting_shape(Shape.of_folder(trial.start.path)))
    is_there = asdict(Shape.of_folder(trial.first.checkpoint.path))
    unlike = {
        name: (announced[name], is_there[name])
        for name in is_there
        if name != "name" and announced[name] != is_there[name]
    }
    told = ", ".join(
        f"{name} {before} announced, {after} in config.json"
        for name, (before, after) in unlike.items()
    )
    assert not unlike, f"resulting_shape() and the student differ: {told}"


def bits_per_weight(trial: Trial) -> None:
    """The declared bits are those of the packed matrices in the student's file; floats have none
    declared.
    """
    from harness.models.packed_bits import bits_in_file

    declared, made = trial.method.bits_per_weight, trial.first.checkpoint
    found, tolerance = bits_in_file(trial.start.path, made.path)
    if trial.method.simulated:
        assert declared is None, (
            f"declared simulated = True and bits_per_weight = {declared:g}; floats that stand for "
            "others save none"
        )
    elif declared is None:
        assert found is None, (
            "declared bits_per_weight = None; the matrices of the student's blocks take "
            f"{found or 0:.2f} bits a weight"
        )
    else:
        assert found is not None and abs(found - declared) <= tolerance, (
            f"declared bits_per_weight = {declared:g}; the matrices of the student's blocks take "
            f"{'their full' if found is None else f'{found:.2f}'} bits a weight (may differ by "
            f"{tolerance:.2f})"
        )


def leaves_zeros(trial: Trial) -> None:
    """The share of zeros in the blocks is the declared one; where none are declared, no later stage
    would take them for a mask.
    """
    from harness.models.packed_bits import zeros_in_blocks

    share, method = zeros_in_blocks(trial.first.checkpoint.path), trial.method
    if share is None:
        return
    if method.leaves_zeros:
        # masks are rounded by unit; some weights were zero before
        near = method.zero_share - 0.01 <= share <= method.zero_share + 0.05
        assert near, (
            f"declared zero_share = {method.zero_share:g}; {share:.3f} of the blocks' weights are "
            "zero"
        )
    else:
        assert share < 0.4, (
            f"declared leaves_zeros = False; {share:.3f} of the blocks' weights are zero"
        )


def builds_without_torch(trial: Trial) -> None:
    """Importing and building the method imports no torch: listing and planning start at once."""
    from harness.checking.fresh import import_without_torch

    if trial.fresh:
        import_without_torch(trial.loaded)


def reopens(trial: Trial) -> None:
    """The student opens in plain transformers, a packed one behind `import methods.packed`, and
    says what it says here.
    """
    from harness.checking.fresh import reopen

    reopen(
        trial.first.checkpoint,
        fresh=trial.fresh,
        door=trial.method.bits_per_weight is not None or not trial.method.keeps_architecture,
    )


METHOD_CHECKS: Mapping[str, Callable[[Trial], None]] = {
    check.__name__: check
    for check in (
        class_loads,
        settings_round_trip,
        builds_without_torch,
        makes_a_student,
        writes_in_its_folders_only,
        cost_is_valid,
        starts_from,
        changes_a_weight,
        trains,
        calibrates,
        writes_traces,
        reads_teacher_live,
        resulting_shape,
        bits_per_weight,
        leaves_zeros,
        reopens,
        repeats_itself,
        draws_random_numbers,
    )
}
