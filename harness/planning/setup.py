"""What all rows of a plan share: models, tasks, prompts, budget and threads. No torch.

Combinations of models and rows that cannot work are refused here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from harness.contract import Checkpoint, Prompting, Suite, Task
from harness.data.examples import shares_of
from harness.data.subsets import Subset
from harness.data.teacher_sets import TeacherSet
from harness.data.training_sets import TrainingSet
from harness.errors import HarnessError, unknown
from harness.files.untrusted import MODEL_LIMITS, Unreadable, read_object
from harness.machine.gpu import device_label
from harness.machine.load import threads_for
from harness.machine.processor import thread_count
from harness.measuring.rounds import rounds_on
from harness.measuring.scenario import GRIDS
from harness.models.checkpoint import OWN_FORMAT
from harness.models.resolve import is_embedded, packing_library, quantized_by, resolve
from harness.models.shape import parameters_on_disk
from harness.models.shaping import StudentCut, parse_student_cut
from harness.models.vocabulary import common_vocabulary, token_map
from harness.planning.cells import PlannedModel
from harness.planning.chain import split_chain
from harness.planning.config import EMBEDDED_BUDGET, OUTSIDE_BUDGET, RunConfig
from harness.planning.rows import PlannedRow
from harness.planning.spec import parse_method
from harness.records.conditions import Conditions, DataReference
from harness.records.record import CHECKPOINT, TEACHER
from harness.registry import Registry


@dataclass(frozen=True, kw_only=True)
class ResolvedNames:
    """The objects that the names of a configuration stand for."""

    teachers: Sequence[Checkpoint]
    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)  # rows from outside
    methods: Registry
    suites: Mapping[str, Suite]
    tasks: Mapping[str, Task]  # of all suites, by name
    device: str
    dtype: str
    data: str  # digest of the files that the tasks read; "" if they read none
    text: str = ""  # digest of free text for calibration
    training_sets: Sequence[TrainingSet] = ()  # the user's own, instead of the tasks' train splits
    calibration: TrainingSet | None = None
    subset: Subset | None = None  # of the tasks' items; None: all
    writing_code: str = ""  # digest of the code that lets a teacher write training data


@dataclass(frozen=True)
class RunModels:
    """The teachers of a run, and the model that its students start from."""

    teachers: tuple[PlannedModel, ...]
    base: PlannedModel
    recipe: (
        StudentCut | None
    )  # how students are cut from the base; None if they start from all of it
    # the recipe as it was typed, or the base's name: records show it, so it is never a path
    student: str
    checkpoints: Mapping[str, PlannedModel] = field(default_factory=dict)  # rows from outside

    @classmethod
    def of(
        cls,
        config: RunConfig,
        teachers: Sequence[Checkpoint],
        checkpoints: Mapping[str, Checkpoint] | None = None,
    ) -> "RunModels":
        """Resolve the model that students start from: the first teacher, or `--student`."""
        planned = tuple(map(PlannedModel.of, teachers))
        outside = {name: PlannedModel.of(model) for name, model in (checkpoints or {}).items()}
        if recipe := parse_student_cut(config.student):
            return cls(planned, planned[0], recipe, config.student, outside)
        base = PlannedModel.of(resolve(config.student, cache=config.cache_folder))
        return cls(planned, base, None, base.name, outside)

    @property
    def draws_weights(self) -> bool:
        """Tell whether students start from new random weights."""
        return self.recipe is not None and self.recipe.draws_weights


def check_teachers(rows: Sequence[PlannedRow], teachers: Sequence[Checkpoint]) -> None:
    """Refuse equal teachers, and a single teacher if a method needs several."""
    names = [teacher.name for teacher in teachers]
    digests = {teacher.digest for teacher in teachers}
    if len(set(names)) < len(names) or len(digests) < len(teachers):
        raise HarnessError(
            f"--teacher: {', '.join(names)}: two teachers have the same name or the same weights; "
            "rename a folder, or drop one"
        )
    several = [
        row.name for row in rows if any(method.needs_several_teachers for method in row.methods)
    ]
    if several and len(teachers) < 2:
        raise HarnessError(
            f"{several[0]} needs two teachers or more; type for example --teacher tiny,tiny-math"
        )


def check_checkpoint_names(
    names: Iterable[str], rows: Sequence[PlannedRow], methods: Registry
) -> None:
    """Refuse a checkpoint with the name of a method or of another row: tables go by names."""
    reserved = {TEACHER, CHECKPOINT, *(row.label for row in rows)}
    for name in names:
        if name in methods or name in reserved:
            raise HarnessError(
                f"--checkpoint {name}=...: {name} is the name of a method or of a row; give the "
                f"checkpoint another name, such as my-{name}"
            )


def check_vocabularies(rows: Sequence[PlannedRow], models: RunModels) -> None:
    """Refuse teachers with another vocabulary than the student's, if a method compares both."""
    if not any(method.needs_same_vocabulary for row in rows for method in row.methods):
        return
    base = models.base
    for teacher in models.teachers:
        if teacher.digest == base.digest:
            continue
        student_tokens, teacher_tokens = token_map(base.path), token_map(teacher.path)
        if student_tokens is not None and teacher_tokens is not None:
            names = (f"student {base.name}", f"teacher {teacher.name}")
            common_vocabulary(student_tokens, teacher_tokens, names=names)


def check_start(rows: Sequence[PlannedRow], models: RunModels) -> None:
    """Refuse a base with packed weights if a row cuts it, or trains more than adapters beside it.

    Adapters are trained beside weights that are packed in our own format alone.
    """
    if (packed := quantized_by(models.base.path)) in ("", "float"):
        return
    cuts = models.recipe is not None
    is_ours = packing_library(models.base.path) == OWN_FORMAT
    for row in rows:
        first = row.methods[0]
        cut = cuts and first.starts_from == "student"
        if cut or (first.trains and not (first.trains_adapters and is_ours)):
            advice = ""
            if first.trains and is_ours and not cuts:
                advice = f", or type --set {row.names[0]}.recipe=lora"
            raise HarnessError(
                f"{row.label} starts from {models.base.name}, which is quantized ({packed}) and "
                "can neither be cut nor trained; give --student a model whose weights are floats"
                f"{advice}"
            )


def check_training_data(
    rows: Sequence[PlannedRow], sets: Sequence[TrainingSet], typed: Sequence[str]
) -> None:
    """Refuse a run for which a teacher would write texts that no row of `typed` can train on.

    Rows that need answers beside the texts cannot; beside rows that can they are skipped by name.
    """
    written = [data.name for data in sets if isinstance(data, TeacherSet)]
    chains = {tuple(parse_method(part)[0] for part in split_chain(chain)) for chain in typed}
    # controls that nobody typed are no reason to write
    trained = [row for row in rows if row.trains and row.names in chains]
    if not (written and trained) or not all(map(_needs_answers, trained)):
        return
    raise HarnessError(
        f"{trained[0].label} needs to know the right answers, and of the texts that a teacher "
        f"writes for --train-data {written[0]} nobody does; type cot-unfiltered, sft or "
        "response in its place, or run it without --train-data: cot has the teacher "
        "answer the tasks' train prompts, and keeps what is right"
    )


def _needs_answers(row: PlannedRow) -> bool:
    return any(method.trains and method.needs_answers for method in row.methods)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all rows of a plan share, decided once."""

    config: RunConfig
    resolved: ResolvedNames
    models: RunModels
    budget: int  # tokens that each trained row sees
    prompting: Prompting
    threads: int
    grid: str  # scenarios of the timing; "" if nothing is timed
    rounds: int | str  # of the timing, as `RoundsRule.parse` reads them

    @classmethod
    def of(cls, config: RunConfig, resolved: ResolvedNames, models: RunModels) -> "Setup":
        """Decide what the configuration leaves open.

        Raises `HarnessError` for a chat template that a model lacks, and for a limit of an unknown
        task.
        """
        default_budget = EMBEDDED_BUDGET if is_embedded(config.teacher_names[0]) else OUTSIDE_BUDGET
        default_grid = GRIDS[resolved.device.partition(":")[0]]
        prompting = Prompting(chat=_uses_chat_template(config, models), system=config.system)
        sets = _with_recipes(config, resolved, prompting)
        setup = cls(
            config=config,
            resolved=replace(resolved, training_sets=sets),
            models=models,
            budget=config.budget or default_budget,
            prompting=prompting,
            threads=_shared_threads(models, resolved.device),
            grid="" if config.grid == "none" else config.grid or default_grid,
            rounds=rounds_on(resolved.device, config.rounds),
        )
        for name in config.limit if isinstance(config.limit, dict) else ():
            if name not in setup.versions:
                raise unknown("task in --limit", name, tuple(setup.versions))
        return setup

    @property
    def versions(self) -> dict[str, str]:
        """The version of each task by its name, in the order of the suites."""
        names = dict.fromkeys(
            task for suite in self.resolved.suites.values() for task in suite.tasks
        )
        return {name: self.resolved.tasks[name].version for name in names}

    @property
    def measures(self) -> bool:
        """Tell whether a suite asks for timing."""
        return any(suite.measure for suite in self.resolved.suites.values())

    def conditions(self) -> Conditions:
        """Return the conditions of all rows, as records contain them."""
        config, models = self.config, self.models
        return Conditions(
            suites=tuple(self.resolved.suites),
            teachers=tuple(teacher.reference() for teacher in models.teachers),
            tasks=tuple(f"{task}@{version}" for task, version in self.versions.items()),
            device=self.resolved.device,
            dtype=self.resolved.dtype,
            limit=config.limit or None,
            subset=self.resolved.subset.label if self.resolved.subset else "",
            chat=self.prompting.chat,
            system=self.prompting.system,
            student_recipe=models.student,
            student_base=models.base.reference(),
            budget_tokens=self.budget,
            budget_rows=config.rows,
            tuned=config.tune,
            teacher_weights=config.teacher_weights,
            train_data=tuple(map(_reference_of, self.resolved.training_sets)),
            calibration_data=_reference_of(self.resolved.calibration)
            if self.resolved.calibration
            else None,
        )


def _with_recipes(
    config: RunConfig, resolved: ResolvedNames, prompting: Prompting
) -> tuple[TrainingSet, ...]:
    """Return the training sets; those that a teacher writes say how much, and by which recipe.

    A recipe holds all that decides the texts: they are written later, by the first cell that reads
    them.
    """
    sets = resolved.training_sets
    shares = shares_of(config.rows, [data.weight for data in sets]) if sets else []
    template = [prompting.chat, prompting.system]
    versions = {name: task.version for name, task in resolved.tasks.items()}
    prompts = [versions, resolved.data, config.num_fewshot, *template]
    return tuple(
        data.planned(
            share,
            resolved.writing_code,
            resolved.teachers[0].digest,
            resolved.dtype,
            device_label(resolved.device),
            template if data.recipe.free else prompts,
        )
        if isinstance(data, TeacherSet)
        else data
        for data, share in zip(sets, shares, strict=True)
    )


def _reference_of(training_set: TrainingSet) -> DataReference:
    return DataReference(
        name=training_set.name,
        digest=training_set.digest,
        examples=len(training_set),
        weight=training_set.weight,
    )


def _shared_threads(models: RunModels, device: str) -> int:
    """Return how many threads each cell uses: on a CPU it follows from the largest model.

    It is the same for all rows, so that their times can be compared.
    """
    if device != "cpu":
        return thread_count()
    return threads_for(
        max(parameters_on_disk(model.path) for model in (*models.teachers, models.base))
    )


def _uses_chat_template(config: RunConfig, models: RunModels) -> bool:
    """Decide for all rows whether prompts are rendered with the chat template."""
    models_without = [
        model.name
        for model in (models.teachers[0], models.base, *models.checkpoints.values())
        if not has_chat_template(model.model_folder)
    ]
    if config.chat_template == "on" and models_without:
        raise HarnessError(
            f"--chat-template on: the tokenizer of {models_without[0]} has no chat template; type "
            "--chat-template off"
        )
    chat = config.chat_template == "on" or (
        config.chat_template == "auto"
        and not models_without
        and not is_embedded(config.teacher_names[0])
    )
    if config.system is not None and not chat:
        raise HarnessError(
            "--system needs a chat template, and this run uses none; drop --system, or type "
            "--chat-template on"
        )
    return chat


def has_chat_template(folder: Path) -> bool:
    """Tell whether the tokenizer in a model folder has a chat template, without opening it."""
    if (folder / "chat_template.jinja").exists():
        return True
    try:
        settings = read_object(folder / "tokenizer_config.json", MODEL_LIMITS)
    except Unreadable:
        return False
    return bool(settings.get("chat_template"))
