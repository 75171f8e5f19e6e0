"""A cell's job in its process: with tasks loaded, a data source, and progress. No torch."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from harness import catalog
from harness.contract import Checkpoint, Progress, Task
from harness.data.examples import examples_digest, examples_of
from harness.data.source import LocalOrHubData
from harness.data.training_sets import TrainingSet
from harness.errors import CellFailed
from harness.models.rendering import rendering_of
from harness.running.job import CellJob


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
        return cls(job, tasks, _training_tasks(job, tasks), source, progress)

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
        held out, and how many were dropped because they hold an evaluation item.
        """
        sets = {
            name: data
            for name, data in self.training_tasks.items()
            if isinstance(data, TrainingSet)
        }
        if not sets:
            return {}
        examples = examples_of(
            self.training_tasks, "train", self.source, rows=self.job.conditions.budget_rows
        )
        used = Counter(example.task for example in examples)
        return {
            name: {**data.counts(self.source), "used": used[name]} for name, data in sets.items()
        }


def _training_tasks(job: CellJob, tasks: dict[str, Task]) -> dict[str, Task]:
    """Return the user's own data by name, checked against the tasks' items; else the tasks."""
    sets = [
        TrainingSet(place, data.weight, evaluated=tasks, overlap=job.overlap)
        for place, data in zip(job.train_data_locations, job.conditions.train_data, strict=True)
    ]
    for training_set, data in zip(sets, job.conditions.train_data, strict=True):
        if training_set.digest != data.digest:
            raise CellFailed(f"{training_set.place} has changed since the run began; run again")
    held_out = frozenset().union(*(training_set.held_out_texts for training_set in sets))
    return {
        data.name: replace(training_set, held_out_elsewhere=held_out - training_set.held_out_texts)
        for training_set, data in zip(sets, job.conditions.train_data, strict=True)
    } or tasks
