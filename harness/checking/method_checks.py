"""The checks of `harness.testing.check_method`: of what a method declares, and of three students.

A check raises `AssertionError` with what was seen and what was declared, or `Skipped` if this
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

TOKENS, ROWS = 1_500, 24  # the budget of a training: it takes seconds on two cores
SEEDS = {"first": 1, "again": 1, "other": 2}  # student -> seed


@dataclass(frozen=True, kw_only=True)
class TrialStudent:
    """One student, and what making it did."""

    checkpoint: Checkpoint
    cost: Mapping[str, Any]  # the content of cost.json, empty without one
    splits_read: frozenset[str]  # of the task
    trace_files: int  # number of files of written answers in the cache
    files_outside: tuple[str, ...]  # written neither in its folder nor in the cache


class RecordingTask:
    """A task that records which of its splits are read."""

    def __init__(self, task: Task, splits_read: set[str]) -> None:
        self._task, self._splits_read = task, splits_read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def examples(self, split: Any, source: Any) -> Any:
        """Return the task's own items."""
        self._splits_read.add(split)
        return self._task.examples(split, source)


@dataclass(kw_only=True)
class Trial:
    """A method that is checked, and the students that it has made."""

    name: str
    method_class: Any  # None: the registry loads it by its name
    registry: Registry
    settings: Mapping[str, object]
    folder: Path
    fresh: bool
    students: dict[str, TrialStudent] = field(default_factory=dict)
    skip_reason: str = ""  # why this machine cannot make a student

    @cached_property
    def method(self) -> Any:
        """The method with its settings."""
        if self.method_class is None:
            return self.registry.build(self.name, self.settings)
        method = construct(self.name, self.loaded, self.settings)
        refuse_values(self.name, method)
        return method

    @cached_property
    def loaded(self) -> Any:
        """The class, with its traits and the imports of its module checked.

        A class from a module of tests may import anything.
        """
        if self.method_class is None:
            return self.registry.load(self.name)
        module = self.method_class.__module__.rpartition(".")[2]
        is_test = module.startswith(("test_", "conftest", "__main__"))
        load = complete_method if is_test else admit_method
        return load(self.name, self.method_class, frozenset(self.registry.table))

    @cached_property
    def teachers(self) -> tuple[Checkpoint, ...]:
        """Copies of the embedded teachers: one, or two if the method needs several."""
        from harness.models.checkpoint import describe
        from harness.models.resolve import EMBEDDED

        names = ("tiny", "tiny-math") if self.method.needs_several_teachers else ("tiny",)
        for name in names:
            shutil.copytree(EMBEDDED / name, self.folder / "inputs" / name, dirs_exist_ok=True)
        return tuple(describe(self.folder / "inputs" / name, name=name) for name in names)

    @cached_property
    def start(self) -> Checkpoint:
        """The model from which the method starts: the teacher, or half of another one's blocks."""
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
        """The first student. Raises `Skipped` if this machine cannot make it."""
        return self.student("first")

    def student(self, which: str) -> TrialStudent:
        """Return a student: "first", "again" (the same seed) or "other". Makes each once."""
        if self.skip_reason:
            raise Skipped(self.skip_reason)
        if which not in self.students:
            try:
                self.students[which] = self._make(which)
            except Skipped as reason:
                self.skip_reason = str(reason)
                raise
        return self.students[which]

    def _make(self, which: str) -> TrialStudent:
        from harness import catalog
        from harness.data.source import LocalOrHubData

        workdir, cache, splits_read = self.folder / which, self.folder / "cache", set[str]()
        workdir.mkdir(parents=True)
        cache.mkdir(exist_ok=True)
        task: Any = RecordingTask(catalog.load_task("gsm8k-mini"), splits_read)
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
        with written_outside([workdir, cache]) as files_outside:
            checkpoint = self.method.compress(job)
        assert isinstance(checkpoint, Checkpoint), (
            f"compress returned {checkpoint!r}; it must return a Checkpoint"
        )
        return TrialStudent(
            checkpoint=checkpoint,
            cost=_read_cost(workdir),
            splits_read=frozenset(splits_read),
            trace_files=len(list((cache / "traces").glob("*.json"))),
            files_outside=tuple(files_outside),
        )


def _read_cost(workdir: Path) -> Mapping[str, Any]:
    """Return the content of cost.json, {} without one."""
    path = workdir / "cost.json"
    cost = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    assert isinstance(cost, dict), f"cost.json holds {cost!r}; it must hold an object"
    return cost


def files_in(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder, by its path."""
    from harness.files.digests import file_digest

    return {
        str(path.relative_to(folder)): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def class_loads(trial: Trial) -> None:
    """Check that the class is a dataclass with known traits of the right types."""
    try:
        _ = trial.method
    except HarnessError as problem:
        raise AssertionError(str(problem)) from problem


def settings_round_trip(trial: Trial) -> None:
    """Check that settings survive JSON, unknown ones are refused, and none can change."""
    method, method_class = trial.method, trial.loaded
    settings = settings_with_defaults(method)
    rebuilt = construct(trial.name, method_class, json.loads(json.dumps(settings)))
    assert rebuilt == method, f"built again from its own settings {settings} it is another method"
    try:
        construct(trial.name, method_class, {"no_such_setting": 1})
    except HarnessError:
        pass
    else:
        raise AssertionError(
            "an unknown setting was accepted; decorate the class with methods.base.settings"
        )
    name = next(iter(settings), None)
    try:
        setattr(method, name or "no_such_setting", 1)
    except Exception:  # noqa: BLE001  a dataclass and pydantic raise their own
        return
    raise AssertionError(
        f"its setting {name} can be changed after it was built; settings are frozen"
    )


def makes_a_student(trial: Trial) -> None:
    """Check that `compress` returns a model folder in `job.workdir` and changes no input."""
    _ = trial.teachers, trial.start
    before = files_in(trial.folder / "inputs")
    try:
        student = trial.first.checkpoint
    except (Skipped, AssertionError):
        raise
    except Exception as problem:
        raise AssertionError(f"compress raised {in_one_line(problem)}") from problem
    is_in_workdir = student.path.resolve().parent == (trial.folder / "first").resolve()
    assert is_in_workdir and (student.path / "config.json").is_file(), (
        f"its checkpoint lies in {student.path}; it must be a model folder in job.workdir"
    )
    after = files_in(trial.folder / "inputs")
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    assert not changed, f"making the student changed its inputs: {', '.join(changed)}"


def writes_in_its_folders_only(trial: Trial) -> None:
    """Check that files are written only in `job.workdir` and `job.cache`."""
    files = trial.first.files_outside
    assert not files, (
        f"it wrote {', '.join(files[:3])}; it may write in job.workdir and job.cache alone"
    )


def cost_is_valid(trial: Trial) -> None:
    """Check that `cost.json` fits a record, and that a training writes one."""
    from pydantic import ValidationError

    from harness.records.consistency import READING_CONTEXT
    from harness.records.record import Cost

    student = trial.first
    assert student.cost or not trial.method.trains, (
        "it trains and wrote no cost.json (self.train writes one)"
    )
    try:
        Cost.model_validate(student.cost, context=READING_CONTEXT)
    except ValidationError as problem:
        first = problem.errors()[0]
        raise AssertionError(
            f"cost.json: {'.'.join(map(str, first['loc']))}: {first['msg']}, given "
            f"{first['input']!r}"
        ) from problem


def starts_from(trial: Trial) -> None:
    """Check that the student was made from the model that the class declares."""
    parents, declared = trial.first.checkpoint.parents, trial.method.starts_from
    summary = (
        f"declared starts_from = {declared!r}; its checkpoint's parents are "
        f"{[digest[:12] for digest in parents]}"
    )
    assert trial.start.digest in parents, (
        f"{summary}, without job.student_base ({trial.start.digest[:12]})"
    )
    if declared == "student" and not trial.method.trains:
        assert trial.teachers[0].digest not in parents, (
            f"{summary}, the teacher ({trial.teachers[0].digest[:12]}) among them"
        )


def changes_a_weight(trial: Trial) -> None:
    """Check that the method changes the weights.

    A control that does not train may keep them. A method of the cache must, and states a format.
    """
    from harness.models.cache_format import stored_cache_format
    from harness.models.checkpoint import same_weights

    student, method = trial.first.checkpoint, trial.method
    if method.family == "cache":
        assert stored_cache_format(student.path) is not None, (
            "declared family = 'cache'; the student's config.json states no kv_cache_quantization"
        )
        assert same_weights(student.path, trial.start.path), (
            "declared family = 'cache'; the student's weights are others than those that it "
            "started from"
        )
    elif method.trains or method.family != "control":
        same = same_weights(student.path, trial.start.path)
        assert not same, (
            f"declared family = {method.family!r}; the student's weights are, number by number, "
            "those that it started from"
        )


def trains(trial: Trial) -> None:
    """Check that a method that trains spends the token budget, and no other one does."""
    tokens_seen, declared = trial.first.cost.get("seen_tokens", 0), trial.method.trains
    assert (tokens_seen > 0) == declared, (
        f"declared trains = {declared}; by cost.json it saw {tokens_seen:,} tokens"
    )
    assert tokens_seen <= TOKENS, f"it saw {tokens_seen:,} tokens of a budget of {TOKENS:,}"


def repeats_itself(trial: Trial) -> None:
    """Check that the same seed gives the same bytes."""
    first, again = trial.first.checkpoint, trial.student("again").checkpoint
    assert first.digest == again.digest, (
        f"two students of one seed have the digests {first.digest[:12]} and {again.digest[:12]}; "
        "draw from job.seed alone"
    )


def draws_random_numbers(trial: Trial) -> None:
    """Check that another seed gives another student if, and only if, the class declares it.

    A method that trains has a row for every seed anyway. It is not checked: in so few steps, both
    seeds may see the same rows.
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
    """Check that training text is read without training if, and only if, it is declared."""
    if trial.method.trains:
        return
    is_read, declared = "train" in trial.first.splits_read, trial.method.calibrates
    assert is_read == declared, (
        f"declared calibrates = {declared}; the task's train split was "
        f"{'read' if is_read else 'not read'}"
    )


def writes_traces(trial: Trial) -> None:
    """Check that a teacher wrote answers into the cache if, and only if, it is declared."""
    files, declared = trial.first.trace_files, trial.method.writes_traces
    assert bool(files) == declared, (
        f"declared writes_traces = {declared}; the cache holds {files} files of written answers"
    )


def reads_teacher_live(trial: Trial) -> None:
    """Check that a teacher ran beside the student if, and only if, it is declared."""
    tokens_read, method = trial.first.cost.get("teacher_tokens", 0), trial.method
    declared = (
        f"declared reads_teacher_live = {method.reads_teacher_live}, needs_same_vocabulary = "
        f"{method.needs_same_vocabulary}"
    )
    if method.reads_teacher_live:
        assert tokens_read > 0, f"{declared}; cost.json says that the teacher read nothing"
    # with a small budget, a method that compares logits may read a teacher that is not declared
    elif not method.needs_same_vocabulary:
        assert not tokens_read, (
            f"{declared}; cost.json says that the teacher read {tokens_read:,} tokens"
        )


def resulting_shape(trial: Trial) -> None:
    """Check that the student has the shape that the method announces."""
    from dataclasses import asdict

    from harness.models.shape import Shape

    announced = asdict(trial.method.resulting_shape(Shape.of_folder(trial.start.path)))
    shape = asdict(Shape.of_folder(trial.first.checkpoint.path))
    differences = ", ".join(
        f"{name} {announced[name]} announced, {value} in config.json"
        for name, value in shape.items()
        if name != "name" and announced[name] != value
    )
    assert not differences, f"resulting_shape() and the student differ: {differences}"


def bits_per_weight(trial: Trial) -> None:
    """Check that the student's packed matrices have the declared bits, and floats declare none."""
    from harness.models.packed_bits import bits_in_file

    declared = trial.method.bits_per_weight
    bits, tolerance = bits_in_file(trial.start.path, trial.first.checkpoint.path)
    if trial.method.simulated:
        assert declared is None, (
            f"declared simulated = True and bits_per_weight = {declared:g}; floats that stand for "
            "others save none"
        )
    elif declared is None:
        assert bits is None, (
            "declared bits_per_weight = None; the matrices of the student's blocks take "
            f"{bits or 0:.2f} bits a weight"
        )
    else:
        assert bits is not None and abs(bits - declared) <= tolerance, (
            f"declared bits_per_weight = {declared:g}; the matrices of the student's blocks take "
            f"{'their full' if bits is None else f'{bits:.2f}'} bits a weight (may differ by "
            f"{tolerance:.2f})"
        )


def leaves_zeros(trial: Trial) -> None:
    """Check that the share of zeros in the blocks is the declared one.

    If none is declared, it must be so small that no later stage takes the zeros for a mask.
    """
    from harness.models.packed_bits import zeros_in_blocks

    share, method = zeros_in_blocks(trial.first.checkpoint.path), trial.method
    if share is None:
        return
    if method.leaves_zeros:
        # below: masks are rounded to whole units; above: some weights were zero before
        is_near = method.zero_share - 0.01 <= share <= method.zero_share + 0.05
        assert is_near, (
            f"declared zero_share = {method.zero_share:g}; {share:.3f} of the blocks' weights are "
            "zero"
        )
    else:
        assert share < 0.4, (
            f"declared leaves_zeros = False; {share:.3f} of the blocks' weights are zero"
        )


def builds_without_torch(trial: Trial) -> None:
    """Check that importing and building it imports no torch: listing and planning stay quick."""
    from harness.checking.fresh import import_without_torch

    if trial.fresh:
        import_without_torch(trial.loaded)


def reopens(trial: Trial) -> None:
    """Check that the student opens with transformers and has the same logits there.

    A packed one opens after `import methods.packed`.
    """
    from harness.checking.fresh import reopen

    reopen(
        trial.first.checkpoint,
        fresh=trial.fresh,
        imports_packed=trial.method.bits_per_weight is not None
        or not trial.method.keeps_architecture,
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
