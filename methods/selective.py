"""Selective distillation: train only on the tokens, or rows, that teach the student most.

Tokens: the share of each row with the highest divergence from the student (`kl`), entropy of the
teacher (`entropy`) or excess loss (`excess`; Lin et al., 2024, Rho-1). Rows: the share with the
lowest teacher loss (`confidence`), those that the teacher solves before those that it does not
(`correct`), or the shortest or longest. Rows are chosen within each task, so that the mixture of
tasks stays. The loss is that of `response`; its denominator counts chosen tokens only.

Cost: that of `response`, and the teacher's own answers for `correct`. The control is a random
choice of the same size: without it, the gain might come from the smaller number of tokens. Fails
when the student needed the tokens that were not chosen.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from harness.contract import Checkpoint, Example, Family, Job
from methods.base import settings
from methods.training.base import full_solution_pairs
from methods.training.distilled import Distilled
from methods.training.sources import sources_of

if TYPE_CHECKING:
    from methods.training.rows import TokenRow

_TOKEN_CRITERIA = ("kl", "entropy", "excess")


class RankedRows(NamedTuple):
    """Examples in the order in which they are chosen, and what ranking them took."""

    examples: list[Example]
    rows: "Sequence[TokenRow]"  # all rows, for the teacher's cache
    notes: dict[str, Any]
    shared_costs: list[dict[str, Any]]


class SolvedProblems(NamedTuple):
    """Which problems the teacher solves, and the costs of its answers."""

    solved: list[bool]
    shared_costs: list[dict[str, Any]]


@settings
class SelectiveDistillation(Distilled):
    """Train on the tokens (or rows) that teach the student most."""

    controls: ClassVar[tuple[str, ...]] = ("selective-random", "untouched")

    by: Literal["kl", "entropy", "excess", "correct", "confidence", "short", "long"] = "kl"
    share: Annotated[float, Field(gt=0, le=1)] = 0.5  # rho: of each row's tokens, or of the rows

    @property
    def writes_traces(self) -> bool:
        """Tell whether the teacher answers every problem first, to find those that it solves."""
        return self.by == "correct"

    @property
    def logits_in_parts(self) -> bool:
        """Tell whether rows are chosen: tokens are chosen among all logits of a batch."""
        return super().logits_in_parts and self.by not in _TOKEN_CRITERIA

    def control_settings(self) -> dict[str, object]:
        """Return what the control takes over: as many tokens or rows, and the same loss."""
        inner_terms = [
            name for name in vars(self) if name.startswith(("feature_", "attention_", "relation_"))
        ]
        size = {"share": self.share, "unit": "tokens" if self.by in _TOKEN_CRITERIA else "rows"}
        loss = self.changed("terms", "top_k", *inner_terms)
        return {**super().control_settings(), **loss, **size}

    def compress(self, job: Job) -> Checkpoint:
        """Train on tokens chosen at every step, or on rows chosen before the training."""
        from methods.training.selection import Selection

        examples = self._examples(job)
        if self.by in _TOKEN_CRITERIA:
            selection = Selection(self.share, self.by, job.seed)  # type: ignore[arg-type]
            return self.distil(job, examples, selection=selection, over=())
        ranked = self._rank(job, examples)
        chosen = leading_share_of_each_task(ranked.examples, self.share)
        counts = {"rows_chosen": len(chosen), "rows_ranked": len(ranked.examples)}
        return self.distil(
            job,
            chosen,
            over=ranked.rows,
            notes={**ranked.notes, **counts},
            shared=ranked.shared_costs,
        )

    def _rank(self, job: Job, examples: Sequence[Example]) -> RankedRows:
        """Rank the examples that student and teacher can read whole, best first."""
        self.refuse_recipe(job)
        examples, encoded = readable_examples(self, job, examples)
        if self.by in ("short", "long"):
            order = sorted(
                range(len(examples)),
                key=lambda index: encoded[index].trained_tokens,
                reverse=self.by == "long",
            )
            return RankedRows([examples[index] for index in order], encoded, {}, [])
        losses = self._teacher_losses(job, encoded)
        solved = [True] * len(examples)
        costs: list[dict[str, Any]] = []
        notes: dict[str, Any] = {}
        if self.by == "correct":
            solved, costs = self._solved_problems(job, examples)
            notes = {"teacher_solves": sum(solved)}
        order = sorted(range(len(examples)), key=lambda index: (not solved[index], losses[index]))
        return RankedRows([examples[index] for index in order], encoded, notes, costs)

    def _teacher_losses(self, job: Job, rows: "Sequence[TokenRow]") -> list[float]:
        """Return the teacher's mean cross-entropy on each row's trained tokens."""
        from methods.training.divergences import label_loss
        from methods.training.rows import batch_of

        teachers = self.teachers(job, over=rows)
        assert teachers is not None
        [source], _ = sources_of(teachers, job, rows, budget=2**62)
        reader = source()
        mean_losses: dict[int, float] = {}  # by the row's index
        by_length = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
        for start in range(0, len(by_length), 32):
            indices = by_length[start : start + 32]
            batch = batch_of([rows[index] for index in indices], 0, job.device)
            losses = label_loss(reader.read(batch, teachers.vocabulary), batch.labels_N)
            row_losses = losses.split([rows[index].trained_tokens for index in indices])
            for index, losses_of_row in zip(indices, row_losses, strict=True):
                mean_losses[index] = float(losses_of_row.mean())
        return [mean_losses[index] for index in range(len(rows))]

    def _solved_problems(self, job: Job, examples: Sequence[Example]) -> SolvedProblems:
        """Let the teacher answer every problem once, and grade the answers."""
        from methods.training.traces import teacher_traces

        traces = teacher_traces(
            job, examples, teacher=self.chosen_teacher(job), samples=1, temperature=0.0, longest=256
        )
        solved = [
            job.tasks[example.task].grade(example.gold, answers[0].text)[0].correct
            for example, answers in zip(examples, traces.texts, strict=True)
        ]
        return SolvedProblems(solved, [traces.cost()])


def readable_examples(
    method: Distilled, job: Job, examples: Sequence[Example]
) -> "tuple[list[Example], list[TokenRow]]":
    """Return the examples that student and teacher can read whole, and the row of each."""
    from harness.models.language_model import student_tokenizer
    from methods.training.rows import encode

    tokenizer, longest = student_tokenizer(job.student_base), method.longest_row(job)
    encoded = [
        encode(tokenizer, [pair], longest=longest)[0] for pair in full_solution_pairs(examples)
    ]  # one row for each example, or none where it is too long
    readable = [example for example, rows in zip(examples, encoded, strict=True) if rows]
    return readable, [row for rows in encoded for row in rows]


def leading_share_of_each_task(ranked: Sequence[Example], share: float) -> list[Example]:
    """Return the first share of each task's examples, at least one of each, in their order."""
    counts = Counter(example.task for example in ranked)
    remaining = {task: max(1, round(share * count)) for task, count in counts.items()}
    chosen = []
    for example in ranked:
        if remaining[example.task]:
            remaining[example.task] -= 1
            chosen.append(example)
    return chosen


@settings
class RandomSelection(Distilled):
    """Train on random tokens (or rows) of the same number (control of `selective`)."""

    family: ClassVar[Family] = "control"
    controls: ClassVar[tuple[str, ...]] = ("untouched",)
    is_control: ClassVar[bool] = True

    unit: Literal["tokens", "rows"] = "tokens"
    share: Annotated[float, Field(gt=0, le=1)] = 0.5

    @property
    def logits_in_parts(self) -> bool:
        """Tell whether rows are chosen: tokens are chosen among all logits of a batch."""
        return super().logits_in_parts and self.unit == "rows"

    def compress(self, job: Job) -> Checkpoint:
        """Train on tokens or rows that the seed chooses."""
        import random

        from methods.training.selection import Selection

        if self.unit == "tokens":
            return self.distil(
                job, self._examples(job), selection=Selection(self.share, "random", job.seed)
            )
        examples, rows = readable_examples(self, job, self._examples(job))
        shuffled = random.Random(job.seed).sample(examples, len(examples))
        return self.distil(job, leading_share_of_each_task(shuffled, self.share), over=rows)
