"""Chain-of-thought distillation: train on the teacher's worked answers that are right.

This is sequence-level distillation. For each training problem the teacher writes `samples` answers.
Those that end by themselves and whose extracted answer equals the gold one are kept (rejection
sampling); repeats are dropped. A right answer in another form than the scorer's (an instruct
teacher was shown none) gets the task's own ending. Traces are cached by teacher, problems and
sampling. The record has the counts of kept and dropped traces.

Form `traces` trains the worked answer. Form `step-by-step` (Hsieh et al., 2023) trains two texts
per problem: the bare answer after the scorer's own prompt, and the worked answer after the same
prompt with a line before it; each loss is divided by its own tokens. The student then answers
without steps, and so in few tokens.

Cost: the teacher's writing, once per cache. The student of form `traces` also writes longer answers
at inference. Fails when the teacher solves too little (*no trace survived*), or when the student is
too small to learn long traces.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from harness.contract import Checkpoint, Example, Family, Job, Task
from harness.errors import CellFailed
from methods.base import settings
from methods.training.base import Trained, TrainOptions, answer_only_pairs

EXPLAIN = "Explain the answer.\n"  # before the prompt of a rationale, in the form step-by-step


@settings
class ChainOfThought(Trained):
    """Train on worked answers that the teacher wrote and got right (rejection-sampled traces)."""

    controls: ClassVar[tuple[str, ...]] = ("answer-only", "untouched")
    _rejects: ClassVar[bool] = True

    form: Literal["traces", "step-by-step"] = "traces"
    # alpha, of step-by-step: the bare answers' weight against the rationales'
    answer_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    samples: Annotated[int, Field(ge=1, le=64)] = 1  # answers the teacher writes per problem
    # 0: the likeliest token, always
    sampling_temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    # new tokens of a trace at most; longer ones are dropped, not cut
    longest: Annotated[int, Field(ge=1)] = 256
    # tokens of a trace at least; an answer without its steps teaches none
    shortest: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.samples > 1 and self.sampling_temperature == 0:
            raise ValueError(
                "samples above 1 need sampling_temperature above 0: greedy answers are all the same"
            )
        if self.shortest >= self.longest:
            raise ValueError(f"shortest={self.shortest} must be below longest={self.longest}")
        return self

    @property
    def writes_traces(self) -> bool:
        """Return True: the teacher writes traces before the training."""
        return True

    @property
    def needs_answers(self) -> bool:
        """Tell whether wrong answers are left out, or bare ones are trained."""
        return self._rejects or self.form == "step-by-step"

    @property
    def answers_per_row(self) -> int:
        """Return how many answers the teacher writes for each problem."""
        return self.samples

    def compress(self, job: Job) -> Checkpoint:
        """Get the teacher's traces, written now or cached, and train on the right ones."""
        from harness.data.examples import examples_of, training_examples
        from harness.models.language_model import student_tokenizer
        from harness.models.rendering import prompt_for
        from methods.training.terms import Term, hard_labels
        from methods.training.trace_filter import filter_traces
        from methods.training.traces import teacher_traces

        examples = training_examples(job.tasks, job.source, rows=job.budget.rows)
        self._refuse_ungraded(examples, job.tasks)
        self.refuse_recipe(job)
        traces = teacher_traces(
            job,
            examples,
            samples=self.samples,
            temperature=self.sampling_temperature,
            longest=self.longest,
        )
        traces_kept, counts = filter_traces(
            examples, traces.texts, job, shortest=self.shortest, reject_wrong=self._rejects
        )
        pairs: list[tuple[Any, ...]] = [(example.prompt, text) for example, text in traces_kept]
        terms: list[Term] = [hard_labels()]
        validation = None
        if self.form == "step-by-step":
            answers = {example.prompt: example.answer for example, _ in traces_kept}
            pairs = [(prompt, answer, 0) for prompt, answer in answers.items()]
            tokenizer = student_tokenizer(job.student_base)
            pairs += [
                (prompt_for(job.source, tokenizer, example, before=EXPLAIN), text, 1)
                for example, text in traces_kept
            ]
            terms = [
                hard_labels(self.answer_share, tag=0),
                hard_labels(1 - self.answer_share, tag=1),
            ]
            validation = answer_only_pairs(
                examples_of(job.tasks, "validation", job.source, rows=self.validation_rows)
            )
        options = TrainOptions(validation=validation)
        return self.train(
            job, pairs, terms=terms, notes=counts, shared=[traces.cost()], options=options
        )

    def _refuse_ungraded(self, examples: Sequence[Example], tasks: Mapping[str, Task]) -> None:
        """Raise `CellFailed`, before the teacher writes, for examples without a gold answer."""
        ungraded = {name for name, task in tasks.items() if not getattr(task, "has_grader", True)}
        if self.form == "step-by-step":
            ungraded = {example.task for example in examples if not example.answer}
        without = next((example.task for example in examples if example.task in ungraded), "")
        if without and self.needs_answers:
            raise CellFailed(
                f"{without} has no gold answers, which this row needs; use cot-unfiltered, or sft"
            )


@settings
class UnfilteredChainOfThought(ChainOfThought):
    """Train on as many of the teacher's answers, right or wrong (control of `cot`)."""

    family: ClassVar[Family] = "control"
    controls: ClassVar[tuple[str, ...]] = ("untouched",)
    is_control: ClassVar[bool] = True
    _rejects: ClassVar[bool] = False
