"""Control of chain-of-thought: the same problems, trained to answer without the steps.

`equal="examples"` shows each problem as often as training with the steps would, in fewer tokens.
`equal="tokens"` spends the whole budget of tokens, and so shows the problems more often. Together
they rule out that more tokens, or more passes, made the difference.
"""

from typing import ClassVar, Literal

from harness.contract import Checkpoint, Family, Job
from harness.errors import Skipped
from methods.base import settings
from methods.training.base import Trained, TrainOptions, answer_only_pairs, full_solution_pairs


@settings
class AnswerOnly(Trained):
    """Fine-tune on the bare answers, without the steps (control of `cot`)."""

    family: ClassVar[Family] = "control"
    controls: ClassVar[tuple[str, ...]] = ("untouched",)
    is_control: ClassVar[bool] = True

    equal: Literal["examples", "tokens"] = "examples"

    @property
    def needs_answers(self) -> bool:
        """Return True: nothing else is trained."""
        return True

    def compress(self, job: Job) -> Checkpoint:
        """Train with cross-entropy on the bare answers."""
        from harness.data.examples import examples_of, training_examples
        from harness.models.language_model import student_tokenizer
        from methods.training.rows import encode
        from methods.training.terms import hard_labels

        examples = training_examples(job.tasks, job.source, rows=job.budget.rows)
        if without := next((example.task for example in examples if not example.answer), ""):
            raise Skipped(
                f"answer-only trains on answers without the steps, and {without} has none; add the "
                "field answer to every line"
            )
        budget = None  # of tokens seen; None: the whole budget
        if self.equal == "examples":
            tokenizer = student_tokenizer(job.student_base)
            answer_tokens, solution_tokens = (
                sum(len(row.ids) for row in encode(tokenizer, pairs, longest=2**31)[0])
                for pairs in (answer_only_pairs(examples), full_solution_pairs(examples))
            )
            budget = round(job.budget.seen_tokens * answer_tokens / solution_tokens)
        validation = answer_only_pairs(
            examples_of(job.tasks, "validation", job.source, rows=self.validation_rows)
        )
        options = TrainOptions(seen_tokens=budget, validation=validation)
        return self.train(job, answer_only_pairs(examples), terms=[hard_labels()], options=options)
