"""Fine-tuning on the worked answers of the training split; no teacher takes part.

It is the control of every method that adds a teacher: the same rows, budget and loop, with
cross-entropy only. Fails when the training split has no worked answers, or few of them.
"""

from typing import ClassVar

from harness.contract import Checkpoint, Family, Job
from methods.base import settings
from methods.training.base import Trained, full_solution_pairs


@settings
class SupervisedFineTuning(Trained):
    """Fine-tune on the gold answers, no teacher involved (control of `response`)."""

    family: ClassVar[Family] = "control"
    controls: ClassVar[tuple[str, ...]] = ("untouched",)
    is_control: ClassVar[bool] = True

    def compress(self, job: Job) -> Checkpoint:
        """Train with cross-entropy on the gold rationales and answers."""
        from harness.data.examples import training_examples
        from methods.training.terms import hard_labels

        examples = training_examples(job.tasks, job.source, rows=job.budget.rows)
        return self.train(job, full_solution_pairs(examples), terms=[hard_labels()])
