"""On-policy distillation: the student answers by itself, the teacher scores what it wrote.

After Agarwal et al. (2024, GKD) and Gu et al. (2024, MiniLLM).

In a share of the steps the completions are samples of the student's at that moment, drawn plainly
(no top-k, no top-p); in the others they are the training split's. At every completion token the
divergence between student and teacher is trained, no gradient through the sampling, no labels. N
counts the tokens that the student wrote.

Cost: the student's writing, which dominates, and the teacher beside it at every step: what it will
be asked is not known beforehand. Fails when the student writes such nonsense that the teacher has
no useful opinion of it: train it a little first.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from harness.contract import Checkpoint, Job
from methods.base import settings
from methods.training.base import Trained, TrainOptions, full_solution_pairs
from methods.training.sources import Teachers, common_context, shared_vocabulary


@settings
class OnPolicyDistillation(Trained):
    """Let the student write and the teacher score every token of it (beta-JSD or reverse KL)."""

    controls: ClassVar[tuple[str, ...]] = ("response", "sft", "untouched")
    needs_same_vocabulary: ClassVar[bool] = True

    # of the steps; the others train on the gold answers
    on_policy_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    sampling_temperature: Annotated[float, Field(gt=0, le=10)] = 1.0  # of what the student writes
    # new tokens of an answer; one that is cut has no end to learn
    longest: Annotated[int, Field(ge=1)] = 128
    divergence: Literal["jsd", "reverse-kl", "forward-kl"] = "jsd"
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of jsd: the teacher's share of the mixture
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0  # of the loss, not of the sampling

    @property
    def reads_teacher_live(self) -> bool:
        """Tell that the teacher is asked about texts that no cache can know."""
        return True

    def compress(self, job: Job) -> Checkpoint:
        """Train beside the live teacher on the student's own answers."""
        from harness.data.examples import training_examples
        from methods.training.distilled import divergence_of
        from methods.training.rollout import Rollout
        from methods.training.terms import Term

        examples = training_examples(job.tasks, job.source, rows=job.budget.rows)
        teachers = Teachers(
            models=(job.teacher,), vocabulary=shared_vocabulary(job, [job.teacher]), cache="off"
        )

        def rollout() -> Rollout:
            return Rollout(
                self.on_policy_share,
                self.sampling_temperature,
                self.longest,
                job.seed,
                common_context(teachers),
            )

        return self.train(
            job,
            full_solution_pairs(examples),
            terms=[Term(self.divergence, 1.0, divergence_of(self, self.divergence))],
            teachers=teachers,
            options=TrainOptions(rollout=rollout),
        )
