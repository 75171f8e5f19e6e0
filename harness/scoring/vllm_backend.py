"""The vLLM backend (`--backend vllm`): the same prompts, cuts, journal and grading, computed by
vLLM.

vLLM lives in an environment of its own and is imported here alone. Its prefix cache does what our
shared path does; its kernels are not batch-invariant, so a table never mixes its rows with others
(the path is in every record).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from harness.contract import Checkpoint
from harness.errors import HarnessError
from harness.machine.memory import release_memory
from harness.models.language_model import LanguageModel, tokenizer_of
from harness.scoring.backend import Answer, Generation, Sampling, Scored, StopReason, TopK, unheard

CHUNK = 2_048  # requests handed over at once: what a killed run loses at most
BACKENDS = ("transformers", "vllm")
# of a position: what a teacher's cache keeps; vLLM refuses more than it was started for
MOST_LOGPROBS = 64


def require_vllm() -> None:
    """Refuse in one line where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise HarnessError(
            "--backend vllm: vllm is not installed here; type: pip install vllm (in an environment "
            "of its own), or --backend transformers"
        )


@dataclass(frozen=True)
class _Description:
    """What the scorer asks of a model beside its answers: vLLM holds the weights in its own
    process.
    """

    config: Any
    generation_config: Any
    dtype: Any


class Vllm:
    """Computes with a vLLM engine that holds one model."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: str, device: str) -> None:
        require_vllm()
        import torch
        import vllm
        from transformers import AutoConfig, GenerationConfig

        config = AutoConfig.from_pretrained(checkpoint.path)
        generation = checkpoint.path / "generation_config.json"
        described = _Description(
            config,
            GenerationConfig.from_pretrained(checkpoint.path)
            if generation.exists()
            else GenerationConfig(),
            getattr(torch, dtype),
        )
        tokenizer = tokenizer_of(checkpoint.path)
        self.opened = LanguageModel(described, tokenizer, device, checkpoint)
        self.path = f"vllm/{vllm.__version__}"
        # a scored text is one token longer than its input, and vLLM wants room to write one
        self.max_length = self.opened.context - 2
        self._params = vllm.SamplingParams
        self._engine = vllm.LLM(
            model=str(checkpoint.path),
            dtype=dtype,
            seed=0,
            max_model_len=self.opened.context,
            enable_prefix_caching=True,
            disable_log_stats=True,
            max_logprobs=MOST_LOGPROBS,
        )

    def _outputs(
        self, prompts: Sequence[Sequence[int]], params: Callable[[int], Any]
    ) -> Iterator[tuple[int, Any]]:
        """Ask in chunks, prompts with a common beginning next to each other, so that vLLM's prefix
        cache finds it.

        Yields (row, vLLM's output); `params` gives each row's settings.
        """
        order = sorted(range(len(prompts)), key=lambda row: list(prompts[row]))
        for start in range(0, len(order), CHUNK):
            part = order[start : start + CHUNK]
            inputs = [{"prompt_token_ids": list(prompts[row])} for row in part]
            outputs = self._engine.generate(
                inputs, sampling_params=[params(row) for row in part], use_tqdm=False
            )
            yield from zip(part, outputs, strict=True)

    def _read(
        self, rows: Sequence[Scored], count: int
    ) -> Iterator[tuple[int, list[Mapping[int, Any]]]]:
        """Yield (row, what vLLM says of each of its last tokens): `count` likeliest and the token
        itself, with their ranks.
        """
        # prompt_logprobs switches vLLM's own prefix cache off for these requests: right answers
        # before speed.
        params = self._params(temperature=0, max_tokens=1, prompt_logprobs=count)
        for row, output in self._outputs([row.ids for row in rows], lambda _: params):
            yield row, output.prompt_logprobs[len(rows[row].ids) - rows[row].count :]

    def score(
        self,
        rows: Sequence[Scored],
        *,
        known: Mapping[int, Answer],
        finished: Callable[[int, Answer], None] = unheard,
        say: Callable[[str], None] = unheard,
    ) -> list[Answer]:
        """Score the continuation of every row that is not `known`; vLLM returns each prompt token's
        log-probability and rank.
        """
        answers = dict(known)
        left = [index for index in range(len(rows)) if index not in known]
        for place, positions in self._read([rows[index] for index in left], 1):
            row = rows[left[place]]
            scored = [
                held[token]
                for token, held in zip(row.ids[len(row.ids) - row.count :], positions, strict=True)
            ]
            answer = Answer(
                float(sum(token.logprob for token in scored)),
                all(token.rank == 1 for token in scored),
            )
            answers[left[place]] = answer
            finished(left[place], answer)
        return [answers[index] for index in range(len(rows))]

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
        """Continue every prompt until EOS, a stop string or the longest length; what is drawn
        follows vLLM's own streams.
        """

        def params(row: int) -> Any:
            drawn = (
                {"temperature": sampling.temperature, "seed": sampling.stream_of(row)}
                if sampling
                else {"temperature": 0}
            )
            return self._params(
                max_tokens=max_new_tokens,
                stop=list(stop),
                stop_token_ids=sorted(self.opened.eos_ids),
                skip_special_tokens=True,
                **drawn,
            )

        answers: dict[int, Generation] = {}
        for row, output in self._outputs(prompts, params):
            answers[row] = _generation(output.outputs[0])
            finished(row, answers[row])
            progress(1)
        return [answers[row] for row in range(len(prompts))]

    def top_k(
        self, rows: Sequence[Scored], *, k: int | None, width: int | None = None
    ) -> Iterator[TopK]:
        """Return the `k` likeliest tokens at the last positions of each row; vLLM gives no whole
        distributions, and cuts no logits.
        """
        vocabulary = int(self.opened.text_config.vocab_size)
        if k is None or k > MOST_LOGPROBS:
            raise HarnessError(
                f"--backend vllm gives the {MOST_LOGPROBS} likeliest tokens at most, not "
                f"{'all' if k is None else k}; "
                "type --backend transformers"
            )
        if width is not None and width < vocabulary:
            raise HarnessError(
                f"--backend vllm gives probabilities among all {vocabulary:,} tokens, not among "
                f"{width:,}; type --backend transformers"
            )
        return self._tops(rows, k)

    def _tops(self, rows: Sequence[Scored], k: int) -> Iterator[TopK]:
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            tops = {row: _likeliest(positions, k) for row, positions in self._read(part, k)}
            yield from (tops[row] for row in range(len(part)))

    def close(self) -> None:
        """Stop the engine and give the device's memory back, before another process or library
        wants it.
        """
        core = getattr(getattr(self._engine, "llm_engine", None), "engine_core", None)
        if core is not None and hasattr(core, "shutdown"):
            core.shutdown()
        del self._engine
        release_memory(self.opened.device)


def _generation(output: Any) -> Generation:
    """Return what vLLM wrote; it stops by a string, by the id of a token (EOS), or at the longest
    length.
    """
    by_string = isinstance(output.stop_reason, str)
    reason: StopReason = (
        "length" if output.finish_reason == "length" else "stop" if by_string else "eos"
    )
    return Generation(output.text, len(output.token_ids), reason, tuple(output.token_ids))


def _likeliest(positions: Sequence[Mapping[int, Any]], k: int) -> TopK:
    """Return the likeliest tokens by rank; vLLM adds the token that stands there, whatever its
    rank, which goes.
    """
    import torch

    ranked = [
        sorted(held.items(), key=lambda item: (item[1].rank, item[0]))[:k] for held in positions
    ]
    ids = torch.tensor([[token for token, _ in tokens] for tokens in ranked], dtype=torch.long)
    return TopK(
        ids,
        torch.tensor(
            [[held.logprob for _, held in tokens] for tokens in ranked], dtype=torch.float32
        ),
    )
