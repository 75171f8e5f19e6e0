"""A cell's job in its process: with tasks loaded, a data source, and progress. No torch."""

from collections.abc import Callable
from dataclasses import dataclass

from harness import catalog
from harness.contract import Checkpoint, Progress, Task
from harness.data.examples import examples_digest, examples_of
from harness.data.source import LocalOrHubData
from harness.models.rendering import rendering_of
from harness.running.job import CellJob


@dataclass(frozen=True)
class LoadedJob:
    """What all parts of a cell's process use: the job, its tasks by name, and their items."""

    job: CellJob
    tasks: dict[str, Task]
    source: LocalOrHubData
    progress: Callable[[Progress], None]

    @classmethod
    def of(cls, job: CellJob, progress: Callable[[Progress], None]) -> "LoadedJob":
        """Load a job's tasks.

        The data source renders training items for the student as the scorer renders prompts.
        """
        tasks = {
            name: catalog.load_task(name, include_path=job.include_path)
            for name in job.conditions.task_names
        }
        render, show = rendering_of(job.conditions.prompting, job.student_base.checkpoint())
        return cls(
            job, tasks, LocalOrHubData(folder=job.data_dir, render=render, show=show), progress
        )

    @property
    def teachers(self) -> tuple[Checkpoint, ...]:
        """The checkpoints of all teachers; rows are compared with the first."""
        return tuple(teacher.checkpoint() for teacher in self.job.teachers)

    def data_digest(self) -> str:
        """Return the digest of the items that a student of this job may be trained on."""
        return examples_digest(
            examples_of(self.tasks, "train", self.source, rows=self.job.conditions.budget_rows)
        )
