"""Response (logit) distillation: match the teacher's softened next-token distribution (Hinton et al., 2015).

Loss per trained token: `lambda * tau^2 * KL(p^tau || q^tau) + (1 - lambda) * CE(label, q)`, summed and divided once by
the trained tokens of the whole step. Rows are the training split's worked answers.

Cost: one teacher forward per seen token. Needs the teacher's tokenizer. Fails when the teacher is not better than
the labels on this data: where every next token is determined, logits hold little that the text does not.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from harness.contract import Checkpoint, Job
from methods._base import Trained, settings, worked

if TYPE_CHECKING:
    from torch import Tensor


@settings
class ResponseDistillation(Trained):
    """Match the teacher's softened next-token distribution on the gold answers."""

    controls: ClassVar[tuple[str, ...]] = ("sft", "untouched")
    same_vocabulary: ClassVar[bool] = True

    temperature: Annotated[float, Field(gt=0, le=100)] = 2.0  # above 1 the teacher's ranking of wrong tokens becomes visible
    teacher_share: Annotated[float, Field(ge=0, le=1)] = 0.5  # lambda: weight of the teacher's term against the labels'

    def compress(self, job: Job) -> Checkpoint:
        """Train with the teacher beside the student."""
        from harness.data import training_examples
        from harness.model import open_model, student_tokenizer
        from harness.vocabulary import common_vocabulary
        from methods._losses import forward_kl
        from methods._training import Positions, Term, hard_labels

        teacher = open_model(job.teacher, device=job.device, dtype=job.dtype)
        vocabulary = common_vocabulary(student_tokenizer(job.student_base).get_vocab(), teacher.tokenizer.get_vocab())
        examples = training_examples(job.tasks, job.source, rows=job.budget.rows)

        def value(at: Positions) -> "Tensor":
            return forward_kl(at.student_NV, at.teacher_NV, temperature=self.temperature)

        terms = [Term("kl", self.teacher_share, value, needs_teacher=True), hard_labels(1 - self.teacher_share)]
        return self.train(job, worked(examples), terms=terms, teacher=teacher, vocabulary=vocabulary)
