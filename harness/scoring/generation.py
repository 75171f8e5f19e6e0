"""Decodes prompts: each row ends by itself, and the next in the queue takes the free place.

The scorer uses it, and so do methods that let a teacher write. The common prefix of the prompts is
computed once. In float32 the batch size does not change an answer. Models that the shared path
refuses are decoded in left-padded batches by their own attention, with the same stop rules.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from harness.models.language_model import LanguageModel
from harness.models.unpacked import unpacked_once
from harness.scoring.admission import shared_path_refusal
from harness.scoring.backend import BatchSize, Generation, Sampling, ignore_report
from harness.scoring.batch_sizes import rows_that_fit, worthwhile_prefix_length
from harness.scoring.decoding import DecodingCall, decode_in_slots, decode_padded_batch
from harness.scoring.finite import NonFiniteLogits, non_finite_error
from harness.scoring.plain import single_row_note
from harness.scoring.prefix_sharing import shared_attention
from harness.scoring.shapes import without_planning
from harness.scoring.stopping import StopRule

_REFUSALS: "WeakKeyDictionary[Any, str]" = WeakKeyDictionary()


def reason_for_plain_path(opened: LanguageModel) -> str:
    """Return why a model cannot take the shared path; "" where it can. Probed once per model."""
    if opened.model not in _REFUSALS:
        _REFUSALS[opened.model] = shared_path_refusal(opened)
    return _REFUSALS[opened.model]


def generate(
    opened: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: BatchSize = "auto",
    sampling: Sampling | None = None,
    finished: Callable[[int, Generation], None] = ignore_report,
    say: Callable[[str], None] = ignore_report,
) -> list[Generation]:
    """Continue each prompt (token ids) until EOS, a stop string or `max_new_tokens`.

    Answers come in the given order. `finished` is called as soon as a row ends. Where memory runs
    out, half as many rows are decoded at once and `say` is called; with one row left the error is
    raised.
    """
    if not prompts:
        return []
    is_plain = bool(reason_for_plain_path(opened))
    common = 0 if is_plain else worthwhile_prefix_length(prompts)
    longest = max(map(len, prompts)) + max_new_tokens - common
    size = rows_that_fit(opened, longest) if batch_size == "auto" else batch_size
    call = DecodingCall(
        opened, prompts, max_new_tokens, StopRule.of(opened, stop), sampling, size, finished
    )
    if is_plain and (note := single_row_note(opened, writes=True)):
        say(note)
    try:
        with without_planning(opened.device) if is_plain else shared_attention(opened):
            call.decode_all(decode_padded_batch if is_plain else decode_in_slots, say)
    # outside of shared_attention: the text is read again by the model's own attention
    except NonFiniteLogits as problem:
        raise non_finite_error(opened, problem.ids) from None
    return [call.answers[row] for row in range(len(prompts))]


@dataclass(frozen=True, eq=False)
class Writer:
    """A transformers model that continues texts (`CanGenerate`), for methods that let it write."""

    opened: LanguageModel
    batch_size: BatchSize = "auto"

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        progress: Callable[[int], None] = ignore_report,
        finished: Callable[[int, Generation], None] = ignore_report,
        say: Callable[[str], None] = ignore_report,
    ) -> list[Generation]:
        """Continue each prompt; return the answers in the given order."""

        def report(row: int, answer: Generation) -> None:
            finished(row, answer)
            progress(1)

        with unpacked_once(self.opened):
            return generate(
                self.opened,
                prompts,
                max_new_tokens=max_new_tokens,
                stop=stop,
                batch_size=self.batch_size,
                sampling=sampling,
                finished=report,
                say=say,
            )
