"""Chain-of-thought distillation: the teacher writes worked answers, the right ones are trained (sequence-level KD).

For each training problem the teacher writes `samples` answers; those that end by themselves and whose extracted
answer equals the gold one are kept (rejection sampling), repeats dropped. Traces are cached by content: teacher,
problems, sampling. Drop counts go into the record.

Cost: the teacher's writing, once per cache; the student then pays for longer answers at inference. Fails when
the teacher solves too little (*no trace survived*), or when the student is too small to learn long traces.
"""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from harness.contract import Checkpoint, Job
from methods._base import Trained, settings


@settings
class ChainOfThought(Trained):
    """Train on worked answers that the teacher wrote and got right (rejection-sampled traces)."""

    controls: ClassVar[tuple[str, ...]] = ("answer-only", "untouched")

    samples: Annotated[int, Field(ge=1, le=64)] = 1  # answers the teacher writes per problem
    sampling_temperature: Annotated[float, Field(ge=0, le=10)] = 0.0  # 0: the likeliest token, always
    longest: Annotated[int, Field(ge=1)] = 256  # new tokens of a trace at most; longer ones are dropped, not cut

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.samples > 1 and self.sampling_temperature == 0:
            raise ValueError("samples above 1 need sampling_temperature above 0: greedy answers are all the same")
        return self

    def compress(self, job: Job) -> Checkpoint:
        """Have the traces written (or read them from the cache), keep the right ones, train on them."""
        from harness.data import training_examples
        from methods._traces import surviving, teacher_traces
        from methods._training import hard_labels

        examples = training_examples(job.tasks, job.source, rows=job.budget.rows)
        written = teacher_traces(
            job, examples, samples=self.samples, temperature=self.sampling_temperature, longest=self.longest
        )  # fmt: skip
        pairs, counts = surviving(examples, written.texts, job.tasks)
        return self.train(job, pairs, terms=[hard_labels()], notes=counts, shared=[written.cost()])
