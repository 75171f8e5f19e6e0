"""The vLLM backend against the transformers one, with a stand-in for vLLM, or vLLM on a GPU."""

import pytest
from vllm_stand_in import install

import suites
from harness.data.source import LocalOrHubData
from harness.errors import HarnessError
from harness.scoring.backend import LikelihoodRequest
from harness.scoring.score import score_task
from harness.scoring.vllm_backend import MAX_LOGPROBS, VllmBackend, require_vllm


@pytest.fixture
def stand_in(embedded, monkeypatch):
    """Install a module `vllm` that computes with transformers; return its engines' settings."""
    return install(monkeypatch, embedded)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k-mini", "mmlu-mini"])
def test_answers_and_counts_are_those_of_the_default_backend(embedded, stand_in, name):
    task = suites.load(name)
    engine = VllmBackend(embedded.checkpoint, dtype="float32", device="cpu")
    theirs, their_rows = score_task(
        engine.opened, task, LocalOrHubData(), backend=engine, limit=24, progress=lambda _: None
    )
    ours, our_rows = score_task(embedded, task, LocalOrHubData(), limit=24, progress=lambda _: None)
    assert (
        engine.path == "vllm/0.0"
        and stand_in[0]["model"] == str(embedded.checkpoint.path)
        and stand_in[0]["seed"] == 0
    )
    assert theirs.outcomes == ours.outcomes and theirs.tokens_per_answer == ours.tokens_per_answer
    for their_row, our_row in zip(their_rows, our_rows, strict=True):
        assert (their_row.text, their_row.stop, their_row.tokens) == (
            our_row.text,
            our_row.stop,
            our_row.tokens,
        )
        assert their_row.log_probabilities == pytest.approx(our_row.log_probabilities, abs=1e-4)
    engine.close()


def test_paths_have_answer_caches_of_their_own(embedded, stand_in, tmp_path):
    task = suites.load("gsm8k-mini")
    score_task(embedded, task, LocalOrHubData(), limit=4, progress=lambda _: None, cache=tmp_path)
    engine = VllmBackend(embedded.checkpoint, dtype="float32", device="cpu")
    score, _ = score_task(
        engine.opened,
        task,
        LocalOrHubData(),
        backend=engine,
        limit=4,
        progress=lambda _: None,
        cache=tmp_path,
    )
    assert score.from_journal == 0 and len(list(tmp_path.rglob("*.jsonl"))) == 2


def test_a_text_as_long_as_the_context_leaves_vllm_its_room(embedded, stand_in):
    from lm_eval.api.instance import Instance

    from harness.scoring.lm_eval_model import HarnessLM

    engine = VllmBackend(embedded.checkpoint, dtype="float32", device="cpu")
    lm = HarnessLM(engine.opened, backend=engine)
    long = "one two three " * 1_000
    request = Instance(
        request_type="loglikelihood", doc={}, arguments=(long, " four"), idx=0, metadata=("t", 0, 1)
    )
    [(value, _)] = lm.loglikelihood([request])
    assert value < 0 and lm.cut_prompts == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"k": None},
            "gives the 64 likeliest tokens at most, not all; type --backend transformers",
        ),
        ({"k": MAX_LOGPROBS + 1}, "gives the 64 likeliest tokens at most, not 65"),
        ({"k": 3, "width": 1_000}, "gives probabilities among all 1,024 tokens, not among 1,000"),
    ],
)
def test_what_vllm_does_not_give_is_refused_in_one_line_before_anything_is_asked(
    embedded, stand_in, settings, message
):
    engine = VllmBackend(embedded.checkpoint, dtype="float32", device="cpu")
    with pytest.raises(HarnessError, match=message) as refused:
        engine.top_k([LikelihoodRequest([5, 6, 7], 1)], **settings)
    assert "\n" not in str(refused.value)


def test_the_engine_is_started_for_as_many_likeliest_tokens_as_are_promised(embedded, stand_in):
    engine = VllmBackend(embedded.checkpoint, dtype="float32", device="cpu")
    [top] = engine.top_k([LikelihoodRequest([5, 6, 7], 2)], k=MAX_LOGPROBS, width=1_024)
    assert top.ids_NK.shape == (2, MAX_LOGPROBS) and stand_in[0]["max_logprobs"] == MAX_LOGPROBS


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
    engine = VllmBackend(embedded.checkpoint, dtype="float32", device="cuda")
    theirs, _ = score_task(
        engine.opened, task, LocalOrHubData(), backend=engine, limit=64, progress=lambda _: None
    )
    ours, _ = score_task(embedded, task, LocalOrHubData(), limit=64, progress=lambda _: None)
    agreeing = sum(
        a == b for a, b in zip(theirs.outcomes["acc"], ours.outcomes["acc"], strict=True)
    )
    engine.close()
    assert agreeing >= 62
