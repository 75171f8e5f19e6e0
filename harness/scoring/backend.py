"""The protocol of everything that computes a model's answers, and the values it takes and returns.

No torch at import.

A backend gets token ids, never text: its caller makes prompts, applies templates and cuts. A
backend continues texts (`generate`), scores their ends (`score`) and returns the likeliest tokens
at their ends (`top_k`). A caller that needs one ability asks for that ability alone (`CanGenerate`,
`CanScore`, `CanRead`). The key of a student holds the code that its method imports, so a change of
the decoding code must not make a teacher's cache invalid.

Shapes: N positions, K tokens, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from harness.renames.modules import by_old_name

if TYPE_CHECKING:
    import torch

    from harness.models.language_model import LanguageModel

BatchSize = int | Literal["auto"]  # rows at once; "auto": by memory
StopReason = Literal["eos", "stop", "length"]


def ignore_report(*_: object) -> None:
    """Do nothing with a report: the default of every callback."""


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt.

    The text is cut before its stop string. The number of tokens includes the one that ended it.
    """

    text: str
    tokens: int
    stop: StopReason
    # the chosen tokens, with the one that ended the text
    ids: tuple[int, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings for sampled instead of greedy decoding.

    Row r draws from its own stream, seeded by (seed, r), or by (seed, numbers[r]) where `numbers`
    is given.
    """

    temperature: float
    seed: int
    numbers: Sequence[int] = ()

    def stream_of(self, row: int) -> int:
        """Return the seed of a row's own stream, below 2**56, independent of the other rows."""
        digest = hashlib.sha256(
            f"{self.seed}/{self.numbers[row] if self.numbers else row}".encode()
        ).digest()
        return int.from_bytes(digest[:7], "big")


@dataclass(frozen=True)
class LikelihoodRequest:
    """A text as token ids, and how many of its last tokens are asked about; never all of them."""

    ids: Sequence[int]
    count: int


class Likelihood(NamedTuple):
    """The answer to a `LikelihoodRequest`: log-probability in nats of its last tokens together."""

    log_probability: float
    is_greedy: bool  # whether each of the tokens was the likeliest one


@dataclass(frozen=True)
class TopK:
    """Tokens and their log-probabilities at temperature 1, (N, K) each.

    The likeliest token comes first; where K is V, all tokens come in the order of their ids.
    """

    ids_NK: "torch.Tensor"
    log_p_NK: "torch.Tensor"
    # log of the sum of the exponentials of all logits, (N,): a logit is its log-probability and
    # this. None where a backend does not say it
    normaliser_N: "torch.Tensor | None" = None


class CanGenerate(Protocol):
    """Continues texts."""

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
        """Continue each prompt until EOS, a stop string or `max_new_tokens`.

        Decoding is greedy unless `sampling` is given. Answers come in the given order. `finished`
        is called once for each row, after the row (or the chunk that it is computed in) has ended;
        `progress` is called with the number of rows that ended since its last call.
        """
        ...


class CanScore(Protocol):
    """Scores the ends of texts."""

    def score(
        self,
        requests: Sequence[LikelihoodRequest],
        *,
        known: Mapping[int, Likelihood],
        finished: Callable[[int, Likelihood], None] = ignore_report,
        say: Callable[[str], None] = ignore_report,
    ) -> list[Likelihood]:
        """Score every request; return the answers in the given order.

        `finished` is called once for each request that was computed. A request whose answer is
        `known` is not computed but keeps its place, so that the others are batched as they would be
        without it: a scoring that resumes after a kill ends with the same digits.
        """
        ...


class CanRead(Protocol):
    """Returns which tokens are likely at the ends of texts."""

    @property
    def max_length(self) -> int:
        """The longest input in tokens."""
        ...

    def top_k(
        self, requests: Sequence[LikelihoodRequest], *, k: int | None, width: int | None = None
    ) -> Iterator[TopK]:
        """Yield for each request, in order, the `k` likeliest tokens at its last `count` positions.

        The distribution at a position is the one that predicts the token there from the tokens
        before it. `k=None` gives the whole distribution. Logits are cut to the first `width` tokens
        of the vocabulary before the softmax. Texts are read a batch at a time, while the caller
        iterates, because the distributions of many texts do not fit into memory.
        """
        ...


class Backend(CanGenerate, CanScore, CanRead, Protocol):
    """Computes a model's answers: an opened model, or an engine that holds one."""

    @property
    def path(self) -> str:
        """How it computes, as records print it; all rows of one table have the same path."""
        ...

    @property
    def opened(self) -> "LanguageModel":
        """The model's tokenizer, context and identity."""
        ...


if not TYPE_CHECKING:  # a type checker would take every name for one of ours
    __getattr__ = by_old_name(__name__)
