"""Universal logit distillation: a teacher with another tokenizer (Boizard et al., 2024, ULD).

Loss: the labels' cross-entropy plus `w * sum_i |sort(q)_i - sort(p)_i|` wherever both tokenizers
have a boundary at the same place of the text: there both models have read the same and are about to
go on. The sorted form compares how sure the two are, not of what.

Cost: the teacher beside the student, on its own tokens. Its controls are `sft` and `cot`
(sequence-level distillation), which works across tokenizers too and is the safer choice; fails
where the boundaries seldom meet (the share of aligned positions stands in the record).
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from harness.contract import Checkpoint, Job
from methods.base import Weight, settings
from methods.training.base import Trained, TrainOptions, full_solution_pairs
from methods.training.sources import Teachers

if TYPE_CHECKING:
    from methods.training.rows import TokenRow


@settings
class UniversalLogitDistillation(Trained):
    """Match the shape of the distributions of a teacher with another tokenizer, where token
    boundaries meet.
    """

    controls: ClassVar[tuple[str, ...]] = ("cot", "sft", "untouched")
    uld_weight: Weight = 1.5

    @property
    def reads_teacher_live(self) -> bool:
        """Tell that the teacher reads beside the student, in its own tokens."""
        return True

    def compress(self, job: Job) -> Checkpoint:
        """Align every training text in both tokenizers, then train beside the teacher."""
        import torch

        from harness.data.examples import training_examples
        from harness.errors import CellFailed
        from harness.models.language_model import student_tokenizer
        from harness.models.shape import Shape
        from methods.training.losses import universal_logit
        from methods.training.positions import Positions
        from methods.training.terms import Term, hard_labels

        theirs = student_tokenizer(job.teacher)
        examples = training_examples(job.tasks, job.source, rows=job.budget.rows)
        counts = {"aligned": 0, "positions": 0}

        def encoder(
            tokenizer: Any, pairs: Iterable[tuple[str, str]], *, longest: int
        ) -> "tuple[list[TokenRow], int]":
            shown = {example.prompt: job.source.show(theirs, example.asked) for example in examples}
            context = Shape.of_folder(job.teacher.path).context
            rows, too_long = aligned_rows(
                tokenizer, theirs, pairs, longest=longest, their_longest=context, shown=shown
            )
            counts["aligned"] = sum(
                len(row.teacher_tokens.pairs) for row in rows if row.teacher_tokens
            )
            counts["positions"] = sum(row.trained_tokens for row in rows)
            if rows and counts["aligned"] <= len(rows):
                raise CellFailed(
                    "the two tokenizers share no boundary inside any training text; type --methods "
                    "cot"
                )
            return rows, too_long

        def value(at: Positions) -> Any:
            assert at.batch is not None
            [teacher] = at.teachers
            assert teacher.logits_NV is not None
            ours, start = [], 0
            for row in at.batch.rows:
                assert row.teacher_tokens is not None
                ours += [start + own for own, _ in row.teacher_tokens.pairs]
                start += row.trained_tokens
            index = torch.tensor(ours, device=at.labels_N.device)
            found = torch.zeros(len(at.labels_N), device=at.labels_N.device)
            return found.index_put(
                (index,), universal_logit(at.student_NV[index], teacher.logits_NV)
            )

        terms = [hard_labels()]
        terms += [Term("uld", self.uld_weight, value, counts=aligned_positions)]
        teachers = Teachers(models=(job.teacher,), vocabulary=None, own_tokens=True)
        return self.train(
            job,
            full_solution_pairs(examples),
            terms=terms,
            teachers=teachers,
            options=TrainOptions(encoder=encoder),
            notes=counts,
        )


def aligned_positions(row: "TokenRow") -> int:
    """Return how many positions of a row are compared with the teacher's."""
    return len(row.teacher_tokens.pairs) if row.teacher_tokens else 0


def aligned_rows(
    ours: Any,
    theirs: Any,
    pairs: Iterable[tuple[str, str]],
    *,
    longest: int,
    their_longest: int = 2**31,
    shown: Mapping[str, str] | None = None,
) -> "tuple[list[TokenRow], int]":
    """Tokenise (prompt, completion) in both tokenizers; a row's pairs are the positions that stand
    behind the same text.

    `shown` gives the prompt as the other model is shown it (its own chat template); the completion
    is the same text for both.
    """
    from dataclasses import replace

    from methods.training.rows import TeacherTokens, encode

    rows: list[TokenRow] = []
    too_long = 0
    for prompt, completion in pairs:
        texts = ((ours, prompt), (theirs, (shown or {}).get(prompt, prompt)))
        own, other = (encode(one, [(text, completion)], longest=2**31)[0][0] for one, text in texts)
        if len(own.ids) > longest or len(other.ids) > their_longest:
            too_long += 1
            continue
        behind = [
            _boundary_positions(one, row, text, completion)
            for (one, text), row in zip(texts, (own, other), strict=True)
        ]
        shared = sorted(behind[0].keys() & behind[1].keys())
        matched = tuple((behind[0][at], behind[1][at]) for at in shared)
        rows.append(
            replace(own, teacher_tokens=TeacherTokens(other.ids, other.trained_from, matched))
        )
    return rows, too_long


def _boundary_positions(
    tokenizer: Any, row: "TokenRow", prompt: str, completion: str
) -> dict[int, int]:
    """Return, by the number of the completion's characters read, the position that stands there;
    inside a character stands none.
    """
    from harness.models.encoding import token_ends

    ends = token_ends(tokenizer, prompt + completion)
    if ends is None:
        return _boundary_positions_by_decoding(tokenizer, row, completion)
    ends = ends[: len(row.ids) - 1]  # a tokenizer that ends texts with EOS gives its place too
    start = row.trained_from
    found = {0: 0} if not start or ends[start - 1] in (0, len(prompt)) else {}
    for position, end in enumerate(ends[start:], start=1):
        if end >= len(prompt):
            # of tokens that end in one character, the last has read it whole
            found[end - len(prompt)] = position
    return found


def _boundary_positions_by_decoding(
    tokenizer: Any, row: "TokenRow", completion: str
) -> dict[int, int]:
    """Return what `_boundaries` does where a tokenizer tells no offsets: by decoding ever longer
    beginnings.
    """
    from harness.models.encoding import decode_continuation

    found = {0: 0}
    before = row.ids[: row.trained_from]
    for count in range(1, len(row.ids) - row.trained_from):
        read = decode_continuation(
            tokenizer, before, row.ids[row.trained_from : row.trained_from + count]
        )
        if completion.startswith(read):
            found[len(read)] = count
    return found
