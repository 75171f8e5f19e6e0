"""A cell's job in its process: with tasks loaded, a data source, and progress. No torch."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from harness import catalog
from harness.contract import Budget, Checkpoint, Job, Progress, Task
from harness.data.examples import examples_digest, examples_of
from harness.data.source import LocalOrHubData
from harness.data.teacher_sets import TeacherSet, WrittenText, parse_teacher_set
from harness.data.training_sets import TrainingSet
from harness.errors import CellFailed
from harness.models.rendering import rendering_of
from harness.records.conditions import DataReference
from harness.running.job import CellJob
from harness.running.teacher_data import write_training_data


@dataclass(frozen=True)
class LoadedJob:
    """What all parts of a cell's process use: the job, its tasks by name, and their items."""

    job: CellJob
    tasks: dict[str, Task]
    # with the training examples; without own data, the tasks themselves
    training_tasks: dict[str, Task]
    source: LocalOrHubData
    progress: Callable[[Progress], None]

    @classmethod
    def of(cls, job: CellJob, progress: Callable[[Progress], None]) -> "LoadedJob":
        """Load a job's tasks.

        The data source renders training items for the student as the scorer renders prompts.
        """
        tasks = {
            name: catalog.load_task(
                name,
                include_path=job.include_path,
                data_folder=job.data_dir,
                num_fewshot=job.num_fewshot,
            )
            for name in job.conditions.task_names
        }
        render, show = rendering_of(job.conditions.prompting, job.student_base.checkpoint())
        source = LocalOrHubData(folder=job.data_dir, render=render, show=show)
        loaded = cls(job, tasks, tasks, source, progress)
        return replace(loaded, training_tasks=_training_tasks(loaded))

    @property
    def teachers(self) -> tuple[Checkpoint, ...]:
        """The checkpoints of all teachers; rows are compared with the first."""
        return tuple(teacher.checkpoint() for teacher in self.job.teachers)

    def data_digest(self) -> str:
        """Return the digest of the items that a student of this job may be trained on."""
        return examples_digest(
            examples_of(
                self.training_tasks, "train", self.source, rows=self.job.conditions.budget_rows
            )
        )

    def calibration_set(self) -> TrainingSet | None:
        """Return the user's own data to calibrate on; None if there is none."""
        job = self.job
        if not job.calibration_location:
            return None
        data = TrainingSet(job.calibration_location, evaluated=self.tasks, overlap=job.overlap)
        expected = job.conditions.calibration_data
        if expected is not None and data.digest != expected.digest:
            raise CellFailed(f"{data.place} has changed since the run began; run again")
        return data

    def own_data_notes(self) -> dict[str, Any]:
        """Return what the record says of own data, by name.

        How many examples there are to train on, how many of them rows were made of, how many are
        held out, and how many were dropped because they hold an evaluation item. Of what a teacher
        wrote, what became of its texts, what writing took, and the digest of the result.
        """
        sets = self._sets()
        if not sets:
            return {}
        examples = examples_of(
            self.training_tasks, "train", self.source, rows=self.job.conditions.budget_rows
        )
        used = Counter(example.task for example in examples)
        return {
            name: {**data.counts(self.source), "used": used[name], **_writing_notes(data)}
            for name, data in sets.items()
        }

    def writing_costs(self) -> tuple[dict[str, Any], ...]:
        """Return what the texts that a teacher wrote took, with the fields of `SharedCost`."""
        teachers = (data for data in self._sets().values() if isinstance(data, TeacherSet))
        return tuple(cost for data in teachers for cost in data.written.costs)

    def _sets(self) -> dict[str, TrainingSet]:
        return {
            name: data
            for name, data in self.training_tasks.items()
            if isinstance(data, TrainingSet)
        }

    def _write(self, data: TeacherSet) -> WrittenText:
        """Let the teacher write a set, or read what it wrote."""
        job, conditions = self.job, self.job.conditions
        writing_job = Job(
            teachers=self.teachers,
            student=conditions.student_recipe,
            student_base=job.student_base.checkpoint(),
            tasks=self.tasks,
            source=self.source,
            budget=Budget(seen_tokens=conditions.budget_tokens, rows=conditions.budget_rows),
            seed=0,
            workdir=job.cell_folder,
            cache=job.cache,
            device=conditions.device,
            dtype=conditions.dtype,
            progress=self.progress,
        )
        return write_training_data(
            writing_job, data, chat=conditions.chat, system=conditions.system
        )


def _writing_notes(data: TrainingSet) -> dict[str, Any]:
    if not isinstance(data, TeacherSet):
        return {}
    return {**data.written.counts, "sha256": data.content_digest}


def _training_tasks(loaded: LoadedJob) -> dict[str, Task]:
    """Return the user's own data by name, checked against the tasks' items; else the tasks."""
    job = loaded.job
    sets = [
        _set_at(place, data, loaded)
        for place, data in zip(job.train_data_locations, job.conditions.train_data, strict=True)
    ]
    for training_set, data in zip(sets, job.conditions.train_data, strict=True):
        if training_set.digest != data.digest:
            raise CellFailed(f"{training_set.place} has changed since the run began; run again")
    return {
        data.name: replace(training_set, held_out_elsewhere=_HeldOutElsewhere(training_set, sets))
        for training_set, data in zip(sets, job.conditions.train_data, strict=True)
    } or loaded.tasks


def _set_at(place: str, data: DataReference, loaded: LoadedJob) -> TrainingSet:
    """Return a data set of the conditions: a file, one of the Hub, or one that a teacher writes."""
    overlap = loaded.job.overlap
    if typed := parse_teacher_set(place):
        return replace(
            typed.data,
            weight=data.weight,
            evaluated=loaded.tasks,
            overlap=overlap,
            asked=data.examples,
            recipe_digest=data.digest,
            write=loaded._write,
        )
    return TrainingSet(place, data.weight, evaluated=loaded.tasks, overlap=overlap)


class _HeldOutElsewhere:
    """The texts that other sets hold out; they are looked up when a row is trained, not before."""

    def __init__(self, own: TrainingSet, sets: Sequence[TrainingSet]) -> None:
        self.own, self.others = own, [other for other in sets if other is not own]

    @cached_property
    def _texts(self) -> frozenset[str]:
        texts = frozenset[str]().union(*(other.held_out_texts for other in self.others))
        return texts - self.own.held_out_texts if texts else texts

    def __contains__(self, text: object) -> bool:
        """Tell whether another set holds a text out, and this one does not."""
        return text in self._texts
