"""The vLLM backend against the transformers one, with a stand-in for vLLM, or vLLM on a GPU."""

import pytest
from vllm_stand_in import install

import suites
from harness.data.source import LocalOrHubData
from harness.errors import HarnessError
from harness.machine.memory import CardMemory
from harness.scoring import vllm_backend
from harness.scoring.backend import Likelihood, LikelihoodRequest
from harness.scoring.score import score_task
from harness.scoring.transformers_backend import TransformersBackend
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
        engine, task, LocalOrHubData(), limit=24, progress=lambda _: None
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
        engine,
        task,
        LocalOrHubData(),
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
    theirs, _ = score_task(engine, task, LocalOrHubData(), limit=64, progress=lambda _: None)
    ours, _ = score_task(embedded, task, LocalOrHubData(), limit=64, progress=lambda _: None)
    agreeing = sum(
        a == b for a, b in zip(theirs.outcomes["acc"], ours.outcomes["acc"], strict=True)
    )
    engine.close()
    assert agreeing >= 62


@pytest.fixture
def multiple_choice(embedded):
    """Return requests as MMLU's: a long beginning, 20 questions after it, four letters each.

    The letters are tokens that a model finds likely, and a few that it does not.
    """
    import random

    draw = random.Random(0)
    shots = [draw.randrange(20, 900) for _ in range(200)]
    prompts = [[*shots, *(draw.randrange(20, 900) for _ in range(25))] for _ in range(20)]
    whole = TransformersBackend(embedded).top_k(
        [LikelihoodRequest([*prompt, 0], 1) for prompt in prompts], k=None
    )
    requests = []
    for prompt, top in zip(prompts, whole, strict=True):
        likely = top.log_p_NK[0].argsort(descending=True).tolist()
        letters = [likely[rank] for rank in (0, 3, 20, 63)]
        requests += [LikelihoodRequest([*prompt, letter], 1) for letter in letters]
    rare = [LikelihoodRequest([*prompts[0], likely[500]], 1)]
    return requests, rare


def test_letters_are_read_off_one_answer_to_each_question_and_questions_share_their_examples(
    embedded, stand_in, multiple_choice
):
    requests, rare = multiple_choice
    expected = TransformersBackend(embedded).score([*requests, *rare], known={})
    engine = VllmBackend(embedded.checkpoint, dtype="float32", device="cpu")
    answers = engine.score(requests, known={})
    [model] = stand_in.engines
    # 200 tokens once, 25 of each question, and what is left of a block of 16
    assert model.computed_tokens <= 200 + 20 * (25 + 16)
    one_by_one = sum(len(request.ids) for request in requests)
    assert one_by_one > 15 * model.computed_tokens
    answers += engine.score(rare, known={})  # not among the 64 likeliest: read in its text
    assert stand_in.engines == [model]
    for ours, theirs in zip(answers, expected, strict=True):
        assert ours.log_probability == pytest.approx(theirs.log_probability, abs=1e-4)
        assert ours.is_greedy == theirs.is_greedy


def test_known_answers_are_not_asked_and_each_other_is_reported_once(
    embedded, stand_in, multiple_choice
):
    requests, rare = multiple_choice
    both = [*requests[:8], *rare]
    engine = VllmBackend(embedded.checkpoint, dtype="float32", device="cpu")
    reported = []
    answers = engine.score(
        both, known={0: Likelihood(-1.0, False)}, finished=lambda index, _: reported.append(index)
    )
    assert sorted(reported) == list(range(1, 9)) and answers[0] == Likelihood(-1.0, False)


def test_the_engine_is_as_long_as_its_items_and_starts_again_for_longer_ones(
    embedded, stand_in, monkeypatch
):
    monkeypatch.setattr(vllm_backend, "MIN_MODEL_LEN", 64)
    monkeypatch.setattr(vllm_backend, "_LENGTH_STEP", 32)
    engine = VllmBackend(embedded.checkpoint, dtype="float32", device="cpu")
    assert stand_in == []  # nothing is known of the items yet
    for length, new_tokens in ((20, 8), (50, 8), (70, 8), (90, 40), (30, 8)):
        engine.generate([[5] * length], max_new_tokens=new_tokens)
    assert [settings["max_model_len"] for settings in stand_in] == [64, 96, 160]
    context = embedded.context
    engine.score([LikelihoodRequest([5] * (context - 1), 2)], known={})
    assert stand_in[-1]["max_model_len"] == context
    assert engine.max_length == context - 2  # prompts are cut for the model, not for the engine


def test_memory_is_released_before_an_engine_starts_and_when_it_ends(
    embedded, stand_in, monkeypatch
):
    order = []
    monkeypatch.setattr(vllm_backend, "release_memory", lambda device: order.append("release"))
    monkeypatch.setattr(
        vllm_backend, "cards_memory", lambda device: order.append(f"{len(stand_in)} engines") or ()
    )
    engine = VllmBackend(embedded.checkpoint, dtype="float32", device="cpu")
    engine.generate([[5, 6]], max_new_tokens=2)
    engine.close()
    assert order == ["release", "0 engines", "release"] and len(stand_in) == 1


GIB = 2**30


@pytest.mark.parametrize(
    ("free", "total", "cards", "weights", "heads", "settings"),
    [
        (78, 80, 1, 15, (28, 4), (1, 0.9)),  # a bare H100
        (40, 80, 1, 15, (28, 4), (1, 0.48)),  # beside what another process holds
        (7, 8, 1, 3, (12, 2), (1, 0.75)),
        (78, 80, 8, 141, (64, 8), (4, 0.9)),  # 70B: three cards would do, and heads are 64
        (78, 80, 8, 15, (28, 4), (1, 0.9)),  # a small model is not spread
        (22, 24, 8, 60, (28, 4), (4, 0.87)),  # 7 divides 28 and not 4: no keys for a card
        (22, 24, 2, 600, (32, 8), (2, 0.87)),  # too large: vLLM says by how much
    ],
)
def test_cards_and_memory_follow_what_is_free(free, total, cards, weights, heads, settings):
    memory = [CardMemory(free * GIB, total * GIB)] * cards
    assert vllm_backend.card_settings(memory, weights * GIB, *heads) == {
        "tensor_parallel_size": settings[0],
        "gpu_memory_utilization": settings[1],
    }
    assert vllm_backend.card_settings([], weights * GIB, *heads) == {}


def test_the_fullest_card_decides_and_the_settings_reach_the_engine(
    embedded, stand_in, monkeypatch
):
    memory = (CardMemory(60 * GIB, 80 * GIB), CardMemory(9 * GIB, 80 * GIB))
    monkeypatch.setattr(vllm_backend, "cards_memory", lambda device: memory)
    VllmBackend(embedded.checkpoint, dtype="float32", device="cpu").generate(
        [[5]], max_new_tokens=1
    )
    assert stand_in[0]["tensor_parallel_size"] == 1
    assert stand_in[0]["gpu_memory_utilization"] == 0.73
    spread = vllm_backend.card_settings(memory, 9 * GIB, 4, 4)
    assert spread == {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.1}
