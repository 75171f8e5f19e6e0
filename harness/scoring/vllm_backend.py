"""The vLLM backend of the scorer (`--backend vllm`): the same prompts, cuts, journal and grading, computed by vLLM.

vLLM lives in an environment of its own and is imported here alone. Its prefix cache does what our shared path does;
its kernels are not batch-invariant, so a table never mixes its rows with others (the path is in every record).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from harness.contract import Checkpoint
from harness.errors import HarnessError
from harness.machine.memory import release_memory
from harness.models.language_model import LanguageModel, tokenizer_of
from harness.scoring.generation import Generation, StopReason
from harness.scoring.likelihood import Answer, Scored

CHUNK = 2_048  # requests handed over at once: what a killed run loses at most
BACKENDS = ("transformers", "vllm")


def require_vllm() -> None:
    """Refuse in one line where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise HarnessError(
            "--backend vllm: vllm is not installed here; type: pip install vllm (in an environment of its own), or --backend transformers"
        )


@dataclass(frozen=True)
class _Description:
    """What the scorer asks of a model beside its answers: vLLM holds the weights in its own process."""

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
            config, GenerationConfig.from_pretrained(checkpoint.path) if generation.exists() else GenerationConfig(), getattr(torch, dtype)
        )
        tokenizer = tokenizer_of(checkpoint.path)
        self.opened = LanguageModel(described, tokenizer, device, checkpoint)
        self.path = f"vllm/{vllm.__version__}"
        self.max_length = self.opened.context - 2  # a scored text is one token longer than its input, and vLLM wants room to write one
        self._params = vllm.SamplingParams
        self._engine = vllm.LLM(
            model=str(checkpoint.path), dtype=dtype, seed=0, max_model_len=self.opened.context, enable_prefix_caching=True,
            disable_log_stats=True,
        )  # fmt: skip

    def _asked(self, prompts: Sequence[Sequence[int]], params: Any) -> Iterator[tuple[int, Any]]:
        """Ask in chunks, prompts with a common beginning next to each other, so that vLLM's prefix cache finds it."""
        order = sorted(range(len(prompts)), key=lambda index: list(prompts[index]))
        for start in range(0, len(order), CHUNK):
            part = order[start : start + CHUNK]
            asked = [{"prompt_token_ids": list(prompts[index])} for index in part]
            yield from zip(part, self._engine.generate(asked, sampling_params=params, use_tqdm=False), strict=True)

    def log_likelihoods(
        self, rows: Sequence[Scored], *, known: Mapping[int, Answer], finished: Callable[[int, Answer], None], say: Callable[[str], None]
    ) -> list[Answer]:
        """Score the continuation of every row that is not `known`; vLLM returns each prompt token's log-probability and rank."""
        found = dict(known)
        left = [index for index in range(len(rows)) if index not in known]
        # prompt_logprobs switches vLLM's own prefix cache off for these requests: right answers before speed.
        params = self._params(temperature=0, max_tokens=1, prompt_logprobs=1)
        for place, output in self._asked([rows[index].ids for index in left], params):
            index = left[place]
            row = rows[index]
            tail = list(zip(row.ids, output.prompt_logprobs, strict=True))[len(row.ids) - row.count :]
            told = [held[token] for token, held in tail]
            found[index] = (float(sum(one.logprob for one in told)), all(one.rank == 1 for one in told))
            finished(index, found[index])
        return [found[index] for index in range(len(rows))]

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: tuple[str, ...], progress: Callable[[int], None],
        finished: Callable[[int, Generation], None], say: Callable[[str], None],
    ) -> list[Generation]:  # fmt: skip
        """Continue every prompt greedily until EOS, a stop string or the longest length."""
        params = self._params(
            temperature=0, max_tokens=max_new_tokens, stop=list(stop), stop_token_ids=sorted(self.opened.eos_ids), skip_special_tokens=True
        )
        found: dict[int, Generation] = {}
        for index, output in self._asked(prompts, params):
            one = output.outputs[0]
            by_string = isinstance(one.stop_reason, str)
            reason: StopReason = "length" if one.finish_reason == "length" else "stop" if by_string else "eos"
            found[index] = Generation(one.text, len(one.token_ids), reason)
            finished(index, found[index])
            progress(1)
        return [found[index] for index in range(len(prompts))]

    def close(self) -> None:
        """Stop the engine and give the device's memory back, before another process or library wants it."""
        core = getattr(getattr(self._engine, "llm_engine", None), "engine_core", None)
        if core is not None and hasattr(core, "shutdown"):
            core.shutdown()
        del self._engine
        release_memory(self.opened.device)
