"""A stand-in for the module `vllm`: computes with transformers, answers in vLLM's types.

`computed_tokens` of an engine counts what vLLM would compute: blocks of 16 tokens that were
computed before are read from the prefix cache, but for a request that wants log-probabilities of
its prompt.
"""

import sys
from types import SimpleNamespace


def install(monkeypatch, opened):
    """Install the module for one test; return the settings of every engine that is started."""
    calls = _Calls()

    class Engine(_Engine):
        def __init__(self, **settings):
            super().__init__(opened, settings)
            calls.append(settings)
            calls.engines.append(self)

    fake = SimpleNamespace(
        LLM=Engine, SamplingParams=SimpleNamespace, __version__="0.0", __spec__=SimpleNamespace()
    )
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return calls


class _Calls(list):
    """The settings of every engine that was started, and the engines."""

    def __init__(self):
        super().__init__()
        self.engines = []


class _Engine:
    """An engine with vLLM's rules on lengths, log-probabilities and random streams."""

    BLOCK = 16

    def __init__(self, opened, settings):
        self.opened, self.settings = opened, settings
        self.computed_tokens, self._blocks = 0, set()
        if settings["max_model_len"] > opened.context:
            raise ValueError(
                "User-specified max_model_len is greater than the derived max_model_len"
            )

    def generate(self, prompts, sampling_params, use_tqdm):
        assert len(prompts) == len(sampling_params) and not use_tqdm
        for prompt in prompts:
            assert len(prompt["prompt_token_ids"]) + 1 <= self.settings["max_model_len"]
        return [
            self._output(prompt["prompt_token_ids"], vars(params))
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def _count_computed(self, ids, reads_cache):
        """Count a prompt's tokens that no block of the prefix cache holds; keep its blocks."""
        ends = range(self.BLOCK, len(ids), self.BLOCK)  # the last token is always computed
        cached = [end for end in ends if tuple(ids[:end]) in self._blocks]
        self.computed_tokens += len(ids) - (max(cached, default=0) if reads_cache else 0)
        self._blocks |= {tuple(ids[:end]) for end in ends}

    def _output(self, ids, params):
        self._count_computed(ids, params.get("prompt_logprobs") is None)
        if params.get("prompt_logprobs") is not None:
            return self._read(ids, **params)
        if params.get("logprobs") is not None:
            return self._next(ids, **params)
        return self._written(ids, **params)

    def _read(self, ids, temperature, max_tokens, prompt_logprobs):
        """Return log-probability and rank of each later token and of the likeliest there."""
        import torch

        assert max_tokens == 1 and temperature == 0
        if prompt_logprobs > self.settings.get("max_logprobs", 20):
            raise ValueError(
                f"Requested prompt logprobs of {prompt_logprobs}, which is greater than max allowed"
            )
        with torch.inference_mode():
            logs = torch.log_softmax(self.opened.model(torch.tensor([ids])).logits[0].float(), -1)
        positions = [None]
        for before, token in zip(logs, ids[1:], strict=False):
            likeliest = before.topk(prompt_logprobs).indices.tolist()
            rank = {named: 1 + int((before > before[named]).sum()) for named in {*likeliest, token}}
            positions.append(
                {
                    named: SimpleNamespace(logprob=float(before[named]), rank=at)
                    for named, at in rank.items()
                }
            )
        return SimpleNamespace(prompt_logprobs=positions)

    def _next(self, ids, temperature, max_tokens, logprobs, detokenize):
        """Return log-probability and rank of the likeliest next tokens."""
        assert max_tokens == 1 and temperature == 0 and not detokenize
        assert logprobs <= self.settings["max_logprobs"]
        [positions] = [self._read([*ids, 0], 0, 1, logprobs).prompt_logprobs]
        by_id = {named: at for named, at in positions[-1].items() if at.rank <= logprobs}
        return SimpleNamespace(outputs=[SimpleNamespace(logprobs=[by_id])])

    def _written(
        self,
        ids,
        temperature,
        max_tokens,
        seed=None,
        stop=(),
        stop_token_ids=(),
        skip_special_tokens=True,
    ):
        from harness.scoring.backend import Sampling
        from harness.scoring.generation import generate

        assert (seed is None) == (temperature == 0)
        sampling = Sampling(temperature=temperature, seed=seed) if temperature else None
        [answer] = generate(
            self.opened, [ids], max_new_tokens=max_tokens, stop=tuple(stop), sampling=sampling
        )
        finish = "length" if answer.stop == "length" else "stop"
        reason = stop[0] if answer.stop == "stop" else None
        out = SimpleNamespace(
            text=answer.text, token_ids=list(answer.ids), finish_reason=finish, stop_reason=reason
        )
        return SimpleNamespace(outputs=[out])
