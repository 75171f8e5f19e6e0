"""The vLLM backend (`--backend vllm`): same prompts, cuts, cache and grading, computed by vLLM.

vLLM is installed in an environment of its own and is imported only here. Its prefix cache does what
our shared path does: the choices of a question are tokens of one answer to it, and questions share
their examples. Its kernels are not batch-invariant, so a table never mixes its rows with others;
the path is in every record.

The engine starts with the first texts, as long as they need and in the memory that is free then; it
starts again for longer ones. A model that one card cannot hold is spread over several.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from harness.contract import Checkpoint
from harness.errors import HarnessError
from harness.machine.memory import CardMemory, cards_memory, release_memory
from harness.models.cache_format import stored_cache_format
from harness.models.language_model import LanguageModel, tokenizer_of
from harness.scoring.backend import (
    Generation,
    Likelihood,
    LikelihoodRequest,
    Sampling,
    StopReason,
    TopK,
    ignore_report,
)

CHUNK_SIZE = 2_048  # requests passed to vLLM at once: a killed run loses at most these
BACKENDS = ("transformers", "vllm")
# per position: as many as a teacher's cache keeps; vLLM refuses more than it was started with
MAX_LOGPROBS = 64
# tokens of the longest text that an engine takes, unless its items are longer: room for keys and
# values of a whole context is more than many a card has
MIN_MODEL_LEN = 4_096
_LENGTH_STEP = 1_024
MAX_MEMORY_SHARE = 0.9  # of a card: vLLM's own default
_ENGINE_BYTES = 2**30  # of a card: the context of the engine's process, which vLLM does not count
_WEIGHTS_SHARE = 0.6  # of a card's free memory: keys and values need the rest


def require_vllm() -> None:
    """Raise `HarnessError` where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise HarnessError(
            "--backend vllm: vllm is not installed here; type: pip install vllm (in an environment "
            "of its own), or --backend transformers"
        )


@dataclass(frozen=True)
class _ModelDescription:
    """What the scorer reads of a model; vLLM has the weights in its own process."""

    config: Any
    generation_config: Any
    dtype: Any


class VllmEngine:
    """vLLM's engine with one model: takes token ids, returns vLLM's own outputs.

    `context` is the longest text of the model in tokens, `heads` its heads of queries and of keys,
    `rows_at_once` the most rows that are computed together (None: as many as vLLM takes).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: str,
        device: str,
        context: int,
        heads: tuple[int, int],
        rows_at_once: int | None = None,
    ) -> None:
        import vllm

        self.version = vllm.__version__
        self.sampling_params = vllm.SamplingParams
        self.checkpoint, self.device, self.context, self.heads = checkpoint, device, context, heads
        self._settings: dict[str, Any] = {
            "model": str(checkpoint.path),
            "dtype": dtype,
            "seed": 0,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "max_logprobs": MAX_LOGPROBS,
            **({"max_num_seqs": rows_at_once} if rows_at_once else {}),
        }
        self._llm: Any = None
        self._length = 0  # tokens of the longest text that the running engine takes

    def _engine_for(self, tokens: int) -> Any:
        """Return an engine that takes texts of so many tokens; start it where none does.

        What this process still holds of the card is released first: vLLM's own process needs it.
        """
        if self._llm is None or tokens > self._length:
            import vllm

            self.close()
            longest = max(MIN_MODEL_LEN, -(-tokens // _LENGTH_STEP) * _LENGTH_STEP)
            self._length = min(longest, self.context)
            place = card_settings(
                cards_memory(self.device), self.checkpoint.bytes_on_disk, *self.heads
            )
            self._llm = vllm.LLM(**self._settings, **place, max_model_len=self._length)
        return self._llm

    def outputs(
        self, prompts: Sequence[Sequence[int]], params_of: Callable[[int], Any], new_tokens: int = 1
    ) -> Iterator[tuple[int, Any]]:
        """Yield (row, vLLM's output) in chunks; `params_of` returns the settings of a row.

        Prompts are sorted, so that vLLM's prefix cache finds common beginnings. A row may write
        `new_tokens`.
        """
        if not prompts:
            return
        llm = self._engine_for(max(map(len, prompts)) + new_tokens)
        order = sorted(range(len(prompts)), key=lambda row: list(prompts[row]))
        for start in range(0, len(order), CHUNK_SIZE):
            chunk = order[start : start + CHUNK_SIZE]
            inputs = [{"prompt_token_ids": list(prompts[row])} for row in chunk]
            outputs = llm.generate(
                inputs, sampling_params=[params_of(row) for row in chunk], use_tqdm=False
            )
            yield from zip(chunk, outputs, strict=True)

    def token_logprobs(
        self, requests: Sequence[LikelihoodRequest], count: int
    ) -> Iterator[tuple[int, list[Mapping[int, Any]]]]:
        """Yield (row, log-probabilities and ranks by token id at each of its last positions).

        A position has its `count` likeliest tokens, and the token of the text.
        """
        # prompt_logprobs switches vLLM's own prefix cache off for these requests: correct answers
        # matter more than speed.
        params = self.sampling_params(temperature=0, max_tokens=1, prompt_logprobs=count)
        for row, output in self.outputs([request.ids for request in requests], lambda _: params):
            first = len(requests[row].ids) - requests[row].count
            yield row, output.prompt_logprobs[first:]

    def next_logprobs(
        self, prompts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, Mapping[int, Any]]]:
        """Yield (row, log-probabilities and ranks of the `MAX_LOGPROBS` likeliest next tokens).

        These requests read from vLLM's prefix cache: prompts with a common beginning share it.
        """
        params = self.sampling_params(
            temperature=0, max_tokens=1, logprobs=MAX_LOGPROBS, detokenize=False
        )
        for row, output in self.outputs(prompts, lambda _: params):
            positions = output.outputs[0].logprobs
            yield row, positions[0] if positions else {}

    def close(self) -> None:
        """Stop the engine's process, and give back what this one holds of the card."""
        core = getattr(getattr(self._llm, "llm_engine", None), "engine_core", None)
        if core is not None and hasattr(core, "shutdown"):
            core.shutdown()
        self._llm = None
        release_memory(self.device)


def card_settings(
    cards: Sequence[CardMemory], weight_bytes: int, query_heads: int, key_heads: int
) -> dict[str, Any]:
    """Return vLLM's settings of the cards: on how many the model lies, and their share of memory.

    The fewest cards whose free memory holds the weights and as much again for the rest; all that
    the heads can be divided by where none do. Nothing without a card. The share is of a card's
    memory in all, as vLLM counts it, and no more than is free now.
    """
    if not cards:
        return {}
    counts = [
        count
        for count in range(1, len(cards) + 1)
        if query_heads % count == 0 and (key_heads % count == 0 or count % key_heads == 0)
    ]
    room = _WEIGHTS_SHARE * min(card.free for card in cards)
    count = next((count for count in counts if weight_bytes <= room * count), counts[-1])
    share = min((card.free - _ENGINE_BYTES) / card.total for card in cards[:count])
    percent = int(100 * min(MAX_MEMORY_SHARE, share))  # rounded down: vLLM refuses what is not free
    return {"tensor_parallel_size": count, "gpu_memory_utilization": max(1, percent) / 100}


class VllmBackend:
    """Computes with a vLLM engine that holds one model."""

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: str, device: str, rows_at_once: int | None = None
    ) -> None:
        require_vllm()
        description = _describe(checkpoint, dtype)
        self.opened = LanguageModel(description, tokenizer_of(checkpoint.path), device, checkpoint)
        # a scored text is one token longer than its input, and vLLM needs room to write one
        self.max_length = self.opened.context - 2
        self._engine = VllmEngine(
            checkpoint,
            dtype=dtype,
            device=device,
            context=self.opened.context,
            heads=_heads_of(self.opened.text_config),
            rows_at_once=rows_at_once,
        )
        self.path = f"vllm/{self._engine.version}"

    def score(
        self,
        requests: Sequence[LikelihoodRequest],
        *,
        known: Mapping[int, Likelihood],
        finished: Callable[[int, Likelihood], None] = ignore_report,
        say: Callable[[str], None] = ignore_report,
    ) -> list[Likelihood]:
        """Score every request that is not `known`, by vLLM's log-probabilities of its tokens.

        Requests that ask about one token are asked as one answer for each different text before
        it. A token that is not among the likeliest there, and longer ends, are read in the text.
        """
        answers = dict(known)
        missing = [index for index in range(len(requests)) if index not in known]
        single = [index for index in missing if requests[index].count == 1]
        for index, likelihood in self._next_token_answers(requests, single):
            answers[index] = likelihood
            finished(index, likelihood)
        missing = [index for index in missing if index not in answers]
        missing_requests = [requests[index] for index in missing]
        for row, positions in self._engine.token_logprobs(missing_requests, 1):
            likelihood = _likelihood(missing_requests[row], positions)
            answers[missing[row]] = likelihood
            finished(missing[row], likelihood)
        return [answers[index] for index in range(len(requests))]

    def _next_token_answers(
        self, requests: Sequence[LikelihoodRequest], indices: Sequence[int]
    ) -> Iterator[tuple[int, Likelihood]]:
        """Yield (index, answer) of requests about one token, where vLLM names that token."""
        indices_of: dict[tuple[int, ...], list[int]] = {}
        for index in indices:
            indices_of.setdefault(tuple(requests[index].ids[:-1]), []).append(index)
        prompts = list(indices_of)
        for row, by_id in self._engine.next_logprobs(prompts):
            for index in indices_of[prompts[row]]:
                token = requests[index].ids[-1]
                if token in by_id:
                    yield index, _likelihood(requests[index], [by_id])

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
        """Continue every prompt until EOS, a stop string or `max_new_tokens`.

        Sampled tokens come from vLLM's own random streams, one per row. Rows are reported when
        their chunk of `CHUNK_SIZE` prompts has ended. `say` is not used.
        """

        def params_of(row: int) -> Any:
            randomness = (
                {"temperature": sampling.temperature, "seed": sampling.stream_of(row)}
                if sampling
                else {"temperature": 0}
            )
            return self._engine.sampling_params(
                max_tokens=max_new_tokens,
                stop=list(stop),
                stop_token_ids=sorted(self.opened.eos_ids),
                skip_special_tokens=True,
                **randomness,
            )

        answers: dict[int, Generation] = {}
        for row, output in self._engine.outputs(prompts, params_of, max_new_tokens):
            answers[row] = _generation(output.outputs[0])
            finished(row, answers[row])
            progress(1)
        return [answers[row] for row in range(len(prompts))]

    def top_k(
        self, requests: Sequence[LikelihoodRequest], *, k: int | None, width: int | None = None
    ) -> Iterator[TopK]:
        """Yield the `k` likeliest tokens at the last positions of each request.

        Raises `HarnessError` where vLLM cannot: for all tokens (`k` None), for more than
        `MAX_LOGPROBS`, and for probabilities among the first `width` tokens of the vocabulary.
        """
        vocabulary = int(self.opened.text_config.vocab_size)
        if k is None or k > MAX_LOGPROBS:
            raise HarnessError(
                f"--backend vllm gives the {MAX_LOGPROBS} likeliest tokens at most, not "
                f"{'all' if k is None else k}; "
                "type --backend transformers"
            )
        if width is not None and width < vocabulary:
            raise HarnessError(
                f"--backend vllm gives probabilities among all {vocabulary:,} tokens, not among "
                f"{width:,}; type --backend transformers"
            )
        return self._top_tokens(requests, k)

    def _top_tokens(self, requests: Sequence[LikelihoodRequest], k: int) -> Iterator[TopK]:
        for start in range(0, len(requests), CHUNK_SIZE):
            chunk = requests[start : start + CHUNK_SIZE]
            tokens_of = {
                index: _top_tokens(positions, k)
                for index, positions in self._engine.token_logprobs(chunk, k)
            }
            yield from (tokens_of[index] for index in range(len(chunk)))

    def close(self) -> None:
        """Stop the engine, so that another process or library can use the device's memory."""
        self._engine.close()


def _heads_of(config: Any) -> tuple[int, int]:
    """Return a configuration's heads of queries and of keys; 1 where it names none."""
    query_heads = getattr(config, "num_attention_heads", None) or 1
    return int(query_heads), int(getattr(config, "num_key_value_heads", None) or query_heads)


def _describe(checkpoint: Checkpoint, dtype: str) -> _ModelDescription:
    """Read what the scorer needs to know of a checkpoint, without its weights."""
    import torch
    from transformers import AutoConfig, GenerationConfig

    if stored_cache_format(checkpoint.model_folder) is not None:
        raise HarnessError(
            f"{checkpoint.name} has a quantized cache, and vLLM computes with a cache of its own; "
            "type --backend transformers"
        )
    has_generation_config = (checkpoint.path / "generation_config.json").exists()
    return _ModelDescription(
        AutoConfig.from_pretrained(checkpoint.path),
        GenerationConfig.from_pretrained(checkpoint.path)
        if has_generation_config
        else GenerationConfig(),
        getattr(torch, dtype),
    )


def _likelihood(request: LikelihoodRequest, positions: Sequence[Mapping[int, Any]]) -> Likelihood:
    """Return the likelihood of a request's last tokens, from vLLM's tokens at their positions."""
    scored_ids = request.ids[len(request.ids) - request.count :]
    tokens = [by_id[token] for token, by_id in zip(scored_ids, positions, strict=True)]
    return Likelihood(
        float(sum(token.logprob for token in tokens)), all(token.rank == 1 for token in tokens)
    )


def _generation(output: Any) -> Generation:
    """Return vLLM's output as an answer.

    vLLM stops at a string, at the id of a token (EOS), or at the longest length.
    """
    by_string = isinstance(output.stop_reason, str)
    reason: StopReason = (
        "length" if output.finish_reason == "length" else "stop" if by_string else "eos"
    )
    return Generation(output.text, len(output.token_ids), reason, tuple(output.token_ids))


def _top_tokens(positions: Sequence[Mapping[int, Any]], k: int) -> TopK:
    """Return the `k` likeliest tokens of each position, by rank.

    vLLM adds the token of the text, whatever its rank; it is left out here.
    """
    import torch

    ranked = [
        sorted(by_id.items(), key=lambda item: (item[1].rank, item[0]))[:k] for by_id in positions
    ]
    ids = torch.tensor([[token for token, _ in tokens] for tokens in ranked], dtype=torch.long)
    log_p = [[logprob.logprob for _, logprob in tokens] for tokens in ranked]
    return TopK(ids, torch.tensor(log_p, dtype=torch.float32))
