"""Scores through llama.cpp: a GGUF file as it is served. No torch at import."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from harness.models.language_model import LanguageModel
from harness.models.llama_cpp import LlamaCppContext, version
from harness.scoring.backend import (
    Generation,
    Likelihood,
    LikelihoodRequest,
    Sampling,
    TopK,
    ignore_report,
)
from harness.scoring.stopping import StopRule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class LlamaCppBackend:
    """Computes with llama.cpp, one text at a time; beginnings in common are read once."""

    def __init__(self, opened: LanguageModel) -> None:
        """Take a model that `open_model` opened through llama.cpp."""
        self.opened = opened
        self._context: LlamaCppContext = opened.model.context
        self.max_length = opened.context - 1
        self.path = f"llama-cpp/{version()}"
        # the beginning of the requests that are being scored, and the logits (1, V) at its end
        self._start: tuple[list[int], NDArray[np.float32]] | None = None

    def score(
        self,
        requests: Sequence[LikelihoodRequest],
        *,
        known: Mapping[int, Likelihood],
        finished: Callable[[int, Likelihood], None] = ignore_report,
        say: Callable[[str], None] = ignore_report,
    ) -> list[Likelihood]:
        """Score every request that is not `known`; those of one beginning follow each other."""
        answers = dict(known)
        missing = [index for index in range(len(requests)) if index not in known]

        def parts_of(index: int) -> tuple[list[int], list[int]]:
            ids, count = list(requests[index].ids), requests[index].count
            return ids[:-count], ids[-count:]

        for index in sorted(missing, key=parts_of):
            answers[index] = self._likelihood(requests[index])
            finished(index, answers[index])
        return [answers[index] for index in range(len(requests))]

    def _likelihood(self, request: LikelihoodRequest) -> Likelihood:
        import numpy as np

        log_p = _log_softmax(self._end_logits(request))
        tokens = np.asarray(request.ids[-request.count :])
        chosen = np.take_along_axis(log_p, tokens[:, None], axis=1)
        is_greedy = bool((log_p.argmax(axis=1) == tokens).all())
        return Likelihood(float(chosen.sum()), is_greedy)

    def _end_logits(self, request: LikelihoodRequest) -> "NDArray[np.float32]":
        """Return the logits (N, V) that predict a request's last tokens.

        What stands before them is read once for all requests that have it in common.
        """
        import numpy as np

        start = list(request.ids[: -request.count])
        if self._start is None or self._start[0] != start:
            self._start = start, self._context.logits(start, 1)
        first = self._start[1]
        if request.count == 1:
            return first
        rest = self._context.logits(request.ids[:-1], request.count - 1, keep=len(start))
        return np.concatenate([first, rest])

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
        """Continue every prompt until EOS, a stop string or `max_new_tokens`."""
        self._start = None
        rule = StopRule.of(self.opened, stop)
        answers: dict[int, Generation] = {}
        for row in sorted(range(len(prompts)), key=lambda number: list(prompts[number])):
            choose = _chooser(sampling, row)
            written: list[int] = []
            while not written or not rule.ended([written], max_new_tokens):
                ids = [*prompts[row], *written]
                keep = len(ids) - 1 if written else 0
                written.append(choose(self._context.logits(ids, 1, keep=keep)[0]))
            answers[row] = rule.finish(written)
            finished(row, answers[row])
            progress(1)
        return [answers[row] for row in range(len(prompts))]

    def top_k(
        self, requests: Sequence[LikelihoodRequest], *, k: int | None, width: int | None = None
    ) -> Iterator[TopK]:
        """Yield for each request the `k` likeliest tokens at its last positions; None: all."""
        import torch

        from harness.scoring.reading import top_tokens

        for request in requests:
            logits_NV = torch.from_numpy(self._end_logits(request))
            yield top_tokens(torch.log_softmax(logits_NV[:, :width].float(), dim=-1), k)


def _log_softmax(logits: "NDArray[np.float32]") -> "NDArray[np.float64]":
    """Return log-probabilities (N, V) of logits (N, V), in double precision."""
    import numpy as np

    numbers = logits.astype(np.float64)
    numbers -= numbers.max(axis=1, keepdims=True)
    log_p: NDArray[np.float64] = numbers - np.log(np.exp(numbers).sum(axis=1, keepdims=True))
    return log_p


def _chooser(sampling: Sampling | None, row: int) -> "Callable[[NDArray[np.float32]], int]":
    """Return what chooses the next token from its logits (V): the likeliest, or a draw."""
    import numpy as np

    if sampling is None:
        return lambda logits: int(logits.argmax())
    generator = np.random.default_rng(sampling.stream_of(row))
    temperature = sampling.temperature

    def draw(logits: "NDArray[np.float32]") -> int:
        p = np.exp(_log_softmax(logits[None] / temperature)[0])
        return int(generator.choice(len(p), p=p / p.sum()))

    return draw
