"""The vLLM backend against the transformers one, with a stand-in engine that answers as vLLM does; the real one where it is."""

import sys
from types import SimpleNamespace

import pytest

import suites
from harness.data.source import DataSource
from harness.errors import HarnessError
from harness.scoring.generation import generate
from harness.scoring.score import score_task
from harness.scoring.vllm_backend import Vllm, require_vllm


@pytest.fixture
def stand_in(embedded, monkeypatch):
    """Install a module `vllm` whose engine computes with transformers and answers in vLLM's own types of fields."""
    import torch

    calls = []

    class Engine:
        def __init__(self, **settings):
            calls.append(settings)
            if settings["max_model_len"] > embedded.context:  # vLLM's own two rules on length
                raise ValueError("User-specified max_model_len is greater than the derived max_model_len")

        def generate(self, prompts, sampling_params, use_tqdm):
            for prompt in prompts:
                assert len(prompt["prompt_token_ids"]) + 1 <= calls[0]["max_model_len"]
            return [self.one(prompt["prompt_token_ids"], **vars(sampling_params)) for prompt in prompts]

        def one(self, ids, max_tokens, temperature, prompt_logprobs=None, stop=(), stop_token_ids=(), skip_special_tokens=True):
            assert temperature == 0
            if prompt_logprobs is not None:
                logs = torch.log_softmax(embedded.model(torch.tensor([ids])).logits[0].float(), -1)
                told = [None]
                for before, token in zip(logs, ids[1:], strict=False):
                    rank = 1 + int((before > before[token]).sum())
                    told.append({token: SimpleNamespace(logprob=float(before[token]), rank=rank)})
                return SimpleNamespace(prompt_logprobs=told)
            [one] = generate(embedded, [ids], max_new_tokens=max_tokens, stop=tuple(stop))
            finish = "length" if one.stop == "length" else "stop"
            told = stop[0] if one.stop == "stop" else None
            out = SimpleNamespace(text=one.text, token_ids=[0] * one.tokens, finish_reason=finish, stop_reason=told)
            return SimpleNamespace(outputs=[out])

    fake = SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace, __version__="0.0", __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k-mini", "mmlu-mini"])
def test_answers_and_counts_are_those_of_the_default_backend(embedded, stand_in, name):
    task = suites.load(name)
    engine = Vllm(embedded.checkpoint, dtype="float32", device="cpu")
    theirs, rows = score_task(engine.opened, task, DataSource(), backend=engine, limit=24, progress=lambda one: None)
    ours, same = score_task(embedded, task, DataSource(), limit=24, progress=lambda one: None)
    assert engine.path == "vllm/0.0" and stand_in[0]["model"] == str(embedded.checkpoint.path) and stand_in[0]["seed"] == 0
    assert theirs.outcomes == ours.outcomes and theirs.tokens_per_answer == ours.tokens_per_answer
    for left, right in zip(rows, same, strict=True):
        assert (left.text, left.stop, left.tokens) == (right.text, right.stop, right.tokens)
        assert left.log_probabilities == pytest.approx(right.log_probabilities, abs=1e-4)
    engine.close()


def test_paths_have_journals_of_their_own(embedded, stand_in, tmp_path):
    task = suites.load("gsm8k-mini")
    score_task(embedded, task, DataSource(), limit=4, progress=lambda one: None, cache=tmp_path)
    engine = Vllm(embedded.checkpoint, dtype="float32", device="cpu")
    score, _ = score_task(engine.opened, task, DataSource(), backend=engine, limit=4, progress=lambda one: None, cache=tmp_path)
    assert score.from_journal == 0 and len(list(tmp_path.rglob("*.jsonl"))) == 2


def test_a_text_as_long_as_the_context_leaves_vllm_its_room(embedded, stand_in):
    from lm_eval.api.instance import Instance

    from harness.scoring.lm_eval_model import HarnessLM

    engine = Vllm(embedded.checkpoint, dtype="float32", device="cpu")
    lm = HarnessLM(engine.opened, backend=engine)
    long = "one two three " * 1_000
    asked = Instance(request_type="loglikelihood", doc={}, arguments=(long, " four"), idx=0, metadata=("t", 0, 1))
    [(value, _)] = lm.loglikelihood([asked])
    assert value < 0 and lm.cut_prompts == 1


def test_without_vllm_it_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("harness.scoring.vllm_backend.find_spec", lambda name: None)
    with pytest.raises(HarnessError, match="pip install vllm"):
        require_vllm()


@pytest.mark.gpu
def test_the_real_engine_agrees_on_most_items(embedded):
    pytest.importorskip("vllm", reason="vllm is not installed")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    task = suites.load("mmlu-mini")
    engine = Vllm(embedded.checkpoint, dtype="float32", device="cuda")
    theirs, _ = score_task(engine.opened, task, DataSource(), backend=engine, limit=64, progress=lambda one: None)
    ours, _ = score_task(embedded, task, DataSource(), limit=64, progress=lambda one: None)
    same = sum(a == b for a, b in zip(theirs.outcomes["acc"], ours.outcomes["acc"], strict=True))
    engine.close()
    assert same >= 62
