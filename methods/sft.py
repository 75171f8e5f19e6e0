"""Hard-label fine-tuning on the training split's own worked answers: no teacher takes part.

The control of every method that adds a teacher: same rows, same budget, same loop, cross-entropy
only. Fails when the training split has no worked answers, or few of them.
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
