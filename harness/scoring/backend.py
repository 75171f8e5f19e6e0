"""One protocol before everything that asks a model, and the plain values that go in and come out.
No torch at import.

A backend is given token ids, never text: prompts, templates and cuts are the asker's. It continues
texts (`generate`), scores their ends (`score`) and says what is likely at their ends (`top_k`). Who
needs one ability asks for that alone (`CanGenerate`, `CanScore`, `CanRead`): a student's key holds
the code that its method imports, and a teacher's cache must not be made again because decoding has
changed.

Shapes: N positions, K tokens, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from harness.models.language_model import LanguageModel

BatchSize = int | Literal["auto"]  # rows at once; "auto": by memory
StopReason = Literal["eos", "stop", "length"]


def unheard(*_: object) -> None:
    """Take what is reported where nobody listens: the default of every callback."""


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt: text cut before its stop string, token count with the
    ending one.
    """

    text: str
    tokens: int
    stop: StopReason
    # as they were chosen, the ending one among them
    ids: tuple[int, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Draw instead of taking the likeliest token. Row r always draws from the stream of (seed, r),
    or (seed, numbers[r]) where given.
    """

    temperature: float
    seed: int
    numbers: Sequence[int] = ()

    def stream_of(self, row: int) -> int:
        """Return the seed of a row's own stream, below 2**56: whatever is written beside it, it
        draws the same.
        """
        digest = hashlib.sha256(
            f"{self.seed}/{self.numbers[row] if self.numbers else row}".encode()
        ).digest()
        return int.from_bytes(digest[:7], "big")


@dataclass(frozen=True)
class Scored:
    """A text as token ids, of which the last `count` are scored; at least one token stands before
    them.
    """

    ids: Sequence[int]
    count: int


class Answer(NamedTuple):
    """What a scored row is worth: the log-probability of its last tokens in nats, and whether each
    was the likeliest.
    """

    log_probability: float
    greedy: bool


@dataclass(frozen=True)
class TopK:
    """Tokens and their log-probabilities at temperature 1, (N, K) each: the likeliest first, or all
    of them by id where K is V.
    """

    ids_NK: "torch.Tensor"
    log_p_NK: "torch.Tensor"


class CanGenerate(Protocol):
    """Continues texts."""

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
        """Continue each prompt until EOS, a stop string or `max_new_tokens`, greedily unless
        `sampling` is given.

        Answers come in the given order; `finished` is called once for each row, as soon as it is
        over, and `progress` with how many are over since it was called last.
        """
        ...


class CanScore(Protocol):
    """Scores the ends of texts."""

    def score(
        self,
        rows: Sequence[Scored],
        *,
        known: Mapping[int, Answer],
        finished: Callable[[int, Answer], None] = unheard,
        say: Callable[[str], None] = unheard,
    ) -> list[Answer]:
        """Score every row; answers come in the given order, `finished` is called once for each that
        was computed.

        Rows whose answer is `known` are not computed, but keep their place: the others are in the
        same company as without it, so that a scoring that goes on after a kill ends with the same
        digits.
        """
        ...


class CanRead(Protocol):
    """Says what is likely at the ends of texts."""

    @property
    def max_length(self) -> int:
        """The longest input in tokens."""
        ...

    def top_k(
        self, rows: Sequence[Scored], *, k: int | None, width: int | None = None
    ) -> Iterator[TopK]:
        """Yield, row by row in the given order, the `k` likeliest tokens at each of the last
        `count` positions.

        The distribution at a position is that of the token which stands there, behind those before
        it. `k=None` gives it whole. Logits are cut to the first `width` tokens before they are made
        probabilities. Rows are read a batch at a time, while they are taken: distributions of many
        texts fit no memory.
        """
        ...


class Backend(CanGenerate, CanScore, CanRead, Protocol):
    """What computes: an opened model, or an engine that holds one."""

    @property
    def path(self) -> str:
        """How it computes, as records print it: rows of one table share it."""
        ...

    @property
    def opened(self) -> "LanguageModel":
        """Tokenizer, context and identity of what it computes with."""
        ...
