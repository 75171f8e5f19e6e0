"""Selective distillation: train where the teacher has most to say, and nowhere else.

Tokens: the share of each row with the highest divergence from the student (`kl`), entropy of the
teacher (`entropy`) or excess loss (`excess`; Lin et al., 2024, Rho-1). Rows: the share that the
teacher is surest of (`confidence`), solves by itself first (`correct`), or the shortest or longest.
The loss is that of `response`; its denominator counts chosen tokens only.

Rows are chosen within each task, so that the mixture of tasks stays what it was.

Cost: that of `response`, and the teacher's own answers for `correct`. The control is a random
choice of the same size: without it a gain may be the smaller number of tokens. Fails when the
unchosen tokens are what the student lacked.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from harness.contract import Checkpoint, Example, Family, Job
from methods.base import settings
from methods.training.base import full_solution_pairs
from methods.training.distilled import Distilled
from methods.training.sources import sources_of

if TYPE_CHECKING:
    from methods.training.rows import TokenRow

_TOKEN_CRITERIA = ("kl", "entropy", "excess")


@settings
class SelectiveDistillation(Distilled):
    """Train on the tokens (or rows) where the teacher has most to say."""

    controls: ClassVar[tuple[str, ...]] = ("selective-random", "untouched")

    by: Literal["kl", "entropy", "excess", "correct", "confidence", "short", "long"] = "kl"
    share: Annotated[float, Field(gt=0, le=1)] = 0.5  # rho: of each row's tokens, or of the rows

    @property
    def writes_traces(self) -> bool:
        """Tell whether the teacher answers every problem first, so that those it solves are
        known.
        """
        return self.by == "correct"

    def control_settings(self) -> dict[str, object]:
        """Its control chooses as many, of the same kind, and is trained by the same loss."""
        inward = [
            name for name in vars(self) if name.startswith(("feature_", "attention_", "relation_"))
        ]
        size = {"share": self.share, "unit": "tokens" if self.by in _TOKEN_CRITERIA else "rows"}
        return {**super().control_settings(), **self.changed("terms", "top_k", *inward), **size}

    def compress(self, job: Job) -> Checkpoint:
        """Choose tokens at every step, or rows beforehand."""
        from methods.training.selection import Selection

        examples = self._examples(job)
        if self.by in _TOKEN_CRITERIA:
            selection = Selection(self.share, self.by, job.seed)  # type: ignore[arg-type]
            return self.distil(job, examples, selection=selection, over=())
        ranked, rows, told, shared = self._ranked(job, examples)
        kept = leading_share_of_each_task(ranked, self.share)
        return self.distil(
            job,
            kept,
            over=rows,
            notes={**told, "rows_chosen": len(kept), "rows_ranked": len(ranked)},
            shared=shared,
        )

    def _ranked(
        self, job: Job, examples: Sequence[Example]
    ) -> "tuple[list[Example], Sequence[TokenRow], dict[str, Any], list[dict[str, Any]]]":
        """Return examples best first, every row (for the teacher's cache), counts, and what the
        teacher wrote for it.
        """
        examples, encoded = readable_examples(self, job, examples)
        if self.by in ("short", "long"):
            order = sorted(
                range(len(examples)),
                key=lambda index: encoded[index].trained_tokens,
                reverse=self.by == "long",
            )
            return [examples[index] for index in order], encoded, {}, []
        losses = self._teacher_losses(job, encoded)
        solved, written = (
            self._solved(job, examples) if self.by == "correct" else ([True] * len(examples), [])
        )
        order = sorted(range(len(examples)), key=lambda index: (not solved[index], losses[index]))
        told = {"teacher_solves": sum(solved)} if self.by == "correct" else {}
        return [examples[index] for index in order], encoded, told, written

    def _teacher_losses(self, job: Job, rows: "Sequence[TokenRow]") -> list[float]:
        """Return the teacher's mean cross-entropy on each row's trained tokens."""
        from methods.training.divergences import label_loss
        from methods.training.rows import batch_of

        wanted = self.teachers(job, over=rows)
        assert wanted is not None
        [source], _ = sources_of(wanted, job, rows, budget=2**62)
        reader, found = source(), {}
        ordered = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
        for start in range(0, len(ordered), 32):
            part = ordered[start : start + 32]
            batch = batch_of([rows[index] for index in part], 0, job.device)
            losses = label_loss(reader.read(batch, wanted.vocabulary), batch.labels_N)
            each = losses.split([rows[index].trained_tokens for index in part])
            found.update({index: float(one.mean()) for index, one in zip(part, each, strict=True)})
        return [found[index] for index in range(len(rows))]

    def _solved(
        self, job: Job, examples: Sequence[Example]
    ) -> tuple[list[bool], list[dict[str, Any]]]:
        """Tell which problems the teacher answers right by itself, and what writing the answers
        took.
        """
        from methods.training.traces import teacher_traces

        written = teacher_traces(
            job, examples, teacher=self.chosen_teacher(job), samples=1, temperature=0.0, longest=256
        )
        answered = zip(examples, written.texts, strict=True)
        return [
            job.tasks[one.task].grade(one.gold, group[0].text)[0].correct for one, group in answered
        ], [written.cost()]


def readable_examples(
    method: Distilled, job: Job, examples: Sequence[Example]
) -> "tuple[list[Example], list[TokenRow]]":
    """Return the examples that student and teacher can read whole, and each one's row."""
    from harness.models.language_model import student_tokenizer
    from methods.training.rows import encode

    tokenizer, longest = student_tokenizer(job.student_base), method.longest_row(job)
    every = [
        encode(tokenizer, [pair], longest=longest)[0] for pair in full_solution_pairs(examples)
    ]
    return [example for example, rows in zip(examples, every, strict=True) if rows], [
        row for rows in every for row in rows
    ]


def leading_share_of_each_task(ranked: Sequence[Example], share: float) -> list[Example]:
    """Return the leading share of each task's examples, at least one, in the order that they have:
    the mixture of tasks stays.
    """
    counts = Counter(one.task for one in ranked)
    left = {task: max(1, round(share * count)) for task, count in counts.items()}
    kept = []
    for one in ranked:
        if left[one.task]:
            left[one.task] -= 1
            kept.append(one)
    return kept


@settings
class RandomSelection(Distilled):
    """Train on random tokens (or rows) of the same number (control of `selective`)."""

    family: ClassVar[Family] = "control"
    controls: ClassVar[tuple[str, ...]] = ("untouched",)
    is_control: ClassVar[bool] = True

    unit: Literal["tokens", "rows"] = "tokens"
    share: Annotated[float, Field(gt=0, le=1)] = 0.5

    def compress(self, job: Job) -> Checkpoint:
        """Choose at random, by the seed."""
        import random

        from methods.training.selection import Selection

        if self.unit == "tokens":
            return self.distil(
                job, self._examples(job), selection=Selection(self.share, "random", job.seed)
            )
        examples, rows = readable_examples(self, job, self._examples(job))
        return self.distil(
            job,
            leading_share_of_each_task(
                random.Random(job.seed).sample(examples, len(examples)), self.share
            ),
            over=rows,
        )
