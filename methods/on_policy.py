"""On-policy distillation: the student writes answers, and the teacher scores their tokens.

After Agarwal et al. (2024, GKD) and Gu et al. (2024, MiniLLM).

In a share of the steps the completions are samples of the current student (no top-k, no top-p); in
the other steps they are those of the training split. The loss is the divergence between student and
teacher at every completion token, without labels and without a gradient through the sampling. The
budget counts the tokens that the student wrote.

Cost: the student's writing, which dominates, and the teacher beside it at every step: no cache can
hold texts that are not written yet. Fails when the student writes nonsense, on which the teacher's
probabilities teach nothing: train it a little first.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from harness.contract import Checkpoint, Job
from methods.base import settings
from methods.training.base import Trained, TrainOptions, full_solution_pairs
from methods.training.sources import Teachers, common_context, shared_vocabulary


@settings
class OnPolicyDistillation(Trained):
    """Let the student write, and match the teacher on every token (beta-JSD or reverse KL)."""

    controls: ClassVar[tuple[str, ...]] = ("response", "sft", "untouched")
    needs_same_vocabulary: ClassVar[bool] = True

    # share of the steps; the others train on the gold answers
    on_policy_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    sampling_temperature: Annotated[float, Field(gt=0, le=10)] = 1.0  # of what the student writes
    # most new tokens of an answer; one that is cut off has no end to learn
    longest: Annotated[int, Field(ge=1)] = 128
    divergence: Literal["jsd", "reverse-kl", "forward-kl"] = "jsd"
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of jsd: the teacher's share of the mixture
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0  # of the loss, not of the sampling

    @property
    def reads_teacher_live(self) -> bool:
        """Return True: no cache can hold texts that are not written yet."""
        return True

    def compress(self, job: Job) -> Checkpoint:
        """Train on the student's own answers, with the teacher beside it."""
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
