"""Response (logit) distillation: match the teacher's softened next-token distribution (Hinton et al., 2015).

Loss per trained token: `lambda * tau^2 * D(p^tau, q^tau) + (1 - lambda) * CE(label, q)`, summed and divided once by
the trained tokens of the whole step. D is the forward KL unless another divergence is set. Rows are the training
split's worked answers.

Cost: one teacher forward per distinct row, kept for every seed and setting; per seen token where the cache is off. Of a
large vocabulary the k likeliest tokens are kept and the rest as one (a tail bucket), which only the forward KL can use.
Needs the teacher's tokenizer. Fails when the teacher is not better than the labels on this data: where every next token
is determined, logits hold little that the text does not.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

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
    divergence: Literal["forward-kl", "reverse-kl", "jsd", "skew-kl"] = "forward-kl"
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of jsd: the teacher's share of the mixture
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of skew-kl: the same
    teacher_share: Annotated[float, Field(ge=0, le=1)] = 0.5  # lambda: weight of the teacher's term against the labels'

    cache: Literal["auto", "on", "off"] = "auto"  # keep what the teacher thinks; auto: where the budget reads every row once and more
    top_k: Annotated[int, Field(ge=1, le=4096)] = 64  # tokens kept of a distribution, where the vocabulary is too large to keep whole

    def compress(self, job: Job) -> Checkpoint:
        """Train against the teacher's distributions: from their cache, or with the teacher beside the student."""
        from harness.data import training_examples
        from harness.model import student_tokenizer
        from harness.vocabulary import common_vocabulary
        from methods._base import Distil
        from methods._losses import forward_kl, jensen_shannon, reverse_kl, skew_kl, top_k_kl
        from methods._training import Positions, Term, hard_labels

        student, teacher = student_tokenizer(job.student_base), student_tokenizer(job.teacher)
        vocabulary = common_vocabulary(student.get_vocab(), teacher.get_vocab())
        examples = training_examples(job.tasks, job.source, rows=job.budget.rows)
        tau = self.temperature
        divergence = {
            "forward-kl": lambda q, p: forward_kl(q, p, temperature=tau),
            "reverse-kl": lambda q, p: reverse_kl(q, p, temperature=tau),
            "jsd": lambda q, p: jensen_shannon(q, p, beta=self.beta, temperature=tau),
            "skew-kl": lambda q, p: skew_kl(q, p, alpha=self.alpha, temperature=tau),
        }[self.divergence]

        def value(at: Positions) -> "Tensor":
            if at.top is not None:
                return top_k_kl(at.student_NV, at.top.ids_NK, at.top.log_p_NK, temperature=tau)
            assert at.teacher_NV is not None
            return divergence(at.student_NV, at.teacher_NV)

        name = "kl" if self.divergence == "forward-kl" else self.divergence
        terms = [Term(name, self.teacher_share, value, needs_teacher=True), hard_labels(1 - self.teacher_share)]
        distil = Distil(job.teacher, self.top_k, self.cache, whole=self.divergence != "forward-kl")
        return self.train(job, worked(examples), terms=terms, distil=distil, vocabulary=vocabulary)
