"""A stand-in for the module `vllm`: computes with transformers, answers in vLLM's types."""

import sys
from types import SimpleNamespace


def install(monkeypatch, opened):
    """Install the module for one test; return the settings of every engine that is started."""
    calls = []

    class Engine(_Engine):
        def __init__(self, **settings):
            super().__init__(opened, settings)
            calls.append(settings)

    fake = SimpleNamespace(
        LLM=Engine, SamplingParams=SimpleNamespace, __version__="0.0", __spec__=SimpleNamespace()
    )
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return calls


class _Engine:
    """An engine with vLLM's rules on lengths, log-probabilities and random streams."""

    def __init__(self, opened, settings):
        self.opened, self.settings = opened, settings
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

    def _output(self, ids, params):
        if params.get("prompt_logprobs") is not None:
            return self._read(ids, **params)
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
