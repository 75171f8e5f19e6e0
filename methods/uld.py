"""Universal logit distillation: a teacher with another tokenizer (Boizard et al., 2024, ULD).

Loss: the labels' cross-entropy plus `w * sum_i |sort(q)_i - sort(p)_i|` at the positions where both
tokenizers have a boundary at the same place of the text: there both models have read the same text
and predict what follows. The sorted form compares how sure the two are, not of which token.

Cost: the teacher beside the student, on its own tokens. Its controls are `sft` and `cot`
(sequence-level distillation, which works across tokenizers too and is the safer choice). Fails
where boundaries seldom meet; the record has the share of aligned positions.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from harness.contract import Checkpoint, Job
from methods.base import Weight, settings
from methods.training.base import Trained, TrainOptions, full_solution_pairs
from methods.training.sources import Teachers

if TYPE_CHECKING:
    from methods.training.positions import Positions
    from methods.training.rows import TokenRow


@settings
class UniversalLogitDistillation(Trained):
    """Match the sorted probabilities of a teacher with another tokenizer, where tokens align."""

    controls: ClassVar[tuple[str, ...]] = ("cot", "sft", "untouched")
    uld_weight: Weight = 1.5

    @property
    def reads_teacher_live(self) -> bool:
        """Return True: the teacher reads beside the student, in its own tokens."""
        return True

    @property
    def logits_in_parts(self) -> bool:
        """Return False: the teacher's positions are not the student's, so parts do not match."""
        return False

    def compress(self, job: Job) -> Checkpoint:
        """Align every training text in both tokenizers, then train beside the teacher."""
        from harness.data.examples import training_examples
        from harness.errors import CellFailed
        from harness.models.language_model import student_tokenizer
        from harness.models.rendering import prompt_for
        from harness.models.shape import Shape
        from methods.training.terms import Term, hard_labels

        teacher_tokenizer = student_tokenizer(job.teacher)
        examples = training_examples(job.tasks, job.source, rows=job.budget.rows)
        counts = {"aligned": 0, "positions": 0}

        def encoder(
            tokenizer: Any, pairs: Iterable[tuple[str, str]], *, longest: int
        ) -> "tuple[list[TokenRow], int]":
            teacher_prompts = {
                example.prompt: prompt_for(job.source, teacher_tokenizer, example)
                for example in examples
            }
            rows, too_long = aligned_rows(
                tokenizer,
                teacher_tokenizer,
                pairs,
                longest=longest,
                teacher_longest=Shape.of_folder(job.teacher.path).context,
                teacher_prompts=teacher_prompts,
            )
            counts["aligned"] = sum(map(aligned_positions, rows))
            counts["positions"] = sum(row.trained_tokens for row in rows)
            if rows and counts["aligned"] <= len(rows):
                raise CellFailed(
                    "the tokenizers of student and teacher share no token boundary inside the "
                    "training texts; use --methods cot"
                )
            return rows, too_long

        terms = [hard_labels()]
        terms += [Term("uld", self.uld_weight, uld_values, counts=aligned_positions)]
        teachers = Teachers(models=(job.teacher,), vocabulary=None, own_tokenizer=True)
        return self.train(
            job,
            full_solution_pairs(examples),
            terms=terms,
            teachers=teachers,
            options=TrainOptions(encoder=encoder),
            notes=counts,
        )


def uld_values(positions: "Positions") -> Any:
    """Return the distance of sorted probabilities at each position, (N,); 0 where none aligns."""
    import torch

    from methods.training.losses import universal_logit
    from methods.training.transfers import to_device

    assert positions.batch is not None
    [teacher] = positions.teachers
    assert teacher.logits_NV is not None
    aligned, start = [], 0
    for row in positions.batch.rows:
        assert row.teacher_tokens is not None
        aligned += [start + position for position, _ in row.teacher_tokens.pairs]
        start += row.trained_tokens
    device = positions.labels_N.device
    index = to_device(torch.tensor(aligned), device)
    distances = universal_logit(positions.student_NV[index], teacher.logits_NV)
    return torch.zeros(len(positions.labels_N), device=device).index_put((index,), distances)


def aligned_positions(row: "TokenRow") -> int:
    """Return how many positions of a row are compared with the teacher's."""
    return len(row.teacher_tokens.pairs) if row.teacher_tokens else 0


def aligned_rows(
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    pairs: Iterable[tuple[str, str]],
    *,
    longest: int,
    teacher_longest: int = 2**31,
    teacher_prompts: Mapping[str, str] | None = None,
) -> "tuple[list[TokenRow], int]":
    """Tokenise (prompt, completion) pairs in both tokenizers; also count those that are too long.

    A row's pairs are the positions of student and teacher that have read the same text.
    `teacher_prompts` has the prompt in the teacher's own form (its chat template), by the student's
    prompt; the completion is the same text for both.
    """
    from dataclasses import replace

    from methods.training.rows import TeacherTokens, encode

    rows: list[TokenRow] = []
    too_long = 0
    for prompt, completion in pairs:
        teacher_prompt = (teacher_prompts or {}).get(prompt, prompt)
        student_row, teacher_row = (
            encode(tokenizer, [(text, completion)], longest=2**31)[0][0]
            for tokenizer, text in (
                (student_tokenizer, prompt),
                (teacher_tokenizer, teacher_prompt),
            )
        )
        if len(student_row.ids) > longest or len(teacher_row.ids) > teacher_longest:
            too_long += 1
            continue
        of_student = _boundary_positions(student_tokenizer, student_row, prompt, completion)
        of_teacher = _boundary_positions(teacher_tokenizer, teacher_row, teacher_prompt, completion)
        shared = sorted(of_student.keys() & of_teacher.keys())
        matched = tuple((of_student[end], of_teacher[end]) for end in shared)
        teacher_tokens = TeacherTokens(teacher_row.ids, teacher_row.trained_from, matched)
        rows.append(replace(student_row, teacher_tokens=teacher_tokens))
    return rows, too_long


def _boundary_positions(
    tokenizer: Any, row: "TokenRow", prompt: str, completion: str
) -> dict[int, int]:
    """Return trained positions by the number of characters of the completion read so far.

    A position inside a character has no entry.
    """
    from harness.models.encoding import token_ends

    ends = token_ends(tokenizer, prompt + completion)
    if ends is None:
        return _boundary_positions_by_decoding(tokenizer, row, completion)
    ends = ends[: len(row.ids) - 1]  # a tokenizer that ends texts with EOS has an end for it too
    start = row.trained_from
    positions = {0: 0} if not start or ends[start - 1] in (0, len(prompt)) else {}
    for position, end in enumerate(ends[start:], start=1):
        if end >= len(prompt):
            # of the tokens that end in one character, the last has read all of it
            positions[end - len(prompt)] = position
    return positions


def _boundary_positions_by_decoding(
    tokenizer: Any, row: "TokenRow", completion: str
) -> dict[int, int]:
    """Return what `_boundary_positions` does, for a tokenizer that gives no offsets.

    It decodes longer and longer beginnings of the completion.
    """
    from harness.models.encoding import decode_continuation

    positions = {0: 0}
    prompt_ids = row.ids[: row.trained_from]
    for count in range(1, len(row.ids) - row.trained_from):
        completion_ids = row.ids[row.trained_from : row.trained_from + count]
        text = decode_continuation(tokenizer, prompt_ids, completion_ids)
        if completion.startswith(text):
            positions[len(text)] = count
    return positions
