"""Decodes prompts: every row stops for itself, a finished row leaves and the next in the queue
takes its place.

Used by the scorer and by methods that let a teacher write. What the prompts share at their
beginning is computed once. In fp32 the batch size does not change an answer. Models that the shared
path refuses are decoded in left-padded batches by their own attention, with the same rules for
stopping.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from harness.models.language_model import LanguageModel
from harness.scoring.admission import refusal
from harness.scoring.backend import BatchSize, Generation, Sampling, unheard
from harness.scoring.batch_sizes import common_beginning, rows_by_memory
from harness.scoring.decoding import Decoding, padded, shared
from harness.scoring.finite import NoNumber, not_finite
from harness.scoring.plain import note_of
from harness.scoring.prefix_sharing import shared_attention
from harness.scoring.stopping import StopRule

_REFUSALS: "WeakKeyDictionary[Any, str]" = WeakKeyDictionary()


def why_plain(opened: LanguageModel) -> str:
    """Return why a model is run by its own attention in padded batches, "" where it shares; asked
    once a model.
    """
    if opened.model not in _REFUSALS:
        _REFUSALS[opened.model] = refusal(opened)
    return _REFUSALS[opened.model]


def generate(
    opened: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: BatchSize = "auto",
    sampling: Sampling | None = None,
    finished: Callable[[int, Generation], None] = unheard,
    say: Callable[[str], None] = unheard,
) -> list[Generation]:
    """Continue each prompt (token ids) until EOS, a stop string or `max_new_tokens`; answers in the
    given order.

    `finished` is called as soon as a row is over. Out of memory halves the rows decoded at once and
    tells `say`; with one row left it raises.
    """
    if not prompts:
        return []
    plain = bool(why_plain(opened))
    longest = max(map(len, prompts)) + max_new_tokens - (0 if plain else common_beginning(prompts))
    size = rows_by_memory(opened, longest) if batch_size == "auto" else batch_size
    decoding = Decoding(
        opened, prompts, max_new_tokens, StopRule.of(opened, stop), sampling, size, finished
    )
    if plain and (note := note_of(opened, writes=True)):
        say(note)
    try:
        with nullcontext() if plain else shared_attention(opened):
            decoding.all_rows(padded if plain else shared, say)
    # the text is read once more to find the place, by the model's own attention
    except NoNumber as problem:
        raise not_finite(opened, problem.ids) from None
    return [decoding.answers[row] for row in range(len(prompts))]


@dataclass(frozen=True, eq=False)
class Writer:
    """A transformers model that continues texts: `CanGenerate` and no more, for methods that let a
    model write.
    """

    opened: LanguageModel
    batch_size: BatchSize = "auto"

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        progress: Callable[[int], None] = unheard,
        finished: Callable[[int, Generation], None] = unheard,
        say: Callable[[str], None] = unheard,
    ) -> list[Generation]:
        """Continue each prompt; answers in the given order."""

        def over(row: int, answer: Generation) -> None:
            finished(row, answer)
            progress(1)

        return generate(
            self.opened,
            prompts,
            max_new_tokens=max_new_tokens,
            stop=stop,
            batch_size=self.batch_size,
            sampling=sampling,
            finished=over,
            say=say,
        )
