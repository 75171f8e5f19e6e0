"""Our LM against lm-eval's own Hugging Face backend, and against itself at other batch sizes."""

from itertools import islice

import pytest

import suites
from harness.data.source import LocalOrHubData
from harness.errors import CellFailed
from harness.scoring.lm_eval_model import HarnessLM
from harness.scoring.sampling import stratified_sample
from harness.scoring.score import score_task

TASKS = {name: suites.load(name) for name in ("gsm8k-mini", "mmlu-mini")}
ITEMS = 60


def limited(name):
    built = TASKS[name].lm_eval_tasks(LocalOrHubData())[name]
    built.dataset["test"] = built.dataset["test"].select(range(ITEMS))
    return built


def samples_of(model, name):
    from lm_eval.evaluator import evaluate

    return evaluate(model, {name: limited(name)}, bootstrap_iters=0)["samples"][name]


@pytest.fixture(scope="module")
def upstream(embedded):
    """lm-eval's own backend on the same model, at batch 1: its batch-size bug has no effect."""
    from lm_eval.models.huggingface import HFLM

    yield HFLM(pretrained=embedded.model, tokenizer=embedded.tokenizer, batch_size=1)


def test_log_probabilities_are_those_of_lm_evals_backend(embedded, upstream):
    theirs, ours = (
        samples_of(upstream, "mmlu-mini"),
        samples_of(HarnessLM(embedded, batch_size=16), "mmlu-mini"),
    )
    for their_sample, our_sample in zip(theirs, ours, strict=True):
        assert their_sample["acc"] == our_sample["acc"]
        assert their_sample["prompt_hash"] == our_sample["prompt_hash"]
        for (a, greedy_a), (b, greedy_b) in zip(
            their_sample["filtered_resps"], our_sample["filtered_resps"], strict=True
        ):
            assert a == pytest.approx(b, abs=1e-4)
            assert greedy_a == greedy_b


@pytest.mark.slow
def test_answers_are_those_of_lm_evals_backend(embedded, upstream):
    theirs, ours = (
        samples_of(upstream, "gsm8k-mini"),
        samples_of(HarnessLM(embedded, batch_size=16), "gsm8k-mini"),
    )
    assert [sample["resps"] for sample in theirs] == [sample["resps"] for sample in ours]
    assert [sample["exact_match"] for sample in theirs] == [
        sample["exact_match"] for sample in ours
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_batch_size_does_not_change_a_score_or_an_answer(embedded, name):
    rows_by_size = [
        score_task(
            embedded,
            TASKS[name],
            LocalOrHubData(),
            batch_size=size,
            limit=ITEMS,
            progress=lambda _: None,
        )[1]
        for size in (1, 8)
    ]
    answers = [
        [(row.item, row.text, row.correct, row.tokens, row.stop) for row in rows]
        for rows in rows_by_size
    ]
    assert answers[0] == answers[1]
    for row_of_one, row_of_eight in zip(*rows_by_size, strict=True):
        assert row_of_one.log_probabilities == pytest.approx(
            row_of_eight.log_probabilities, abs=1e-4
        )


def test_a_choice_of_several_tokens_is_scored_whole(embedded):
    import torch

    lm = HarnessLM(embedded, batch_size=4)
    context, continuations = (
        "Question: What is the capital of Kenya?\nAnswer:",
        [" Nairobi", " Oslo", " a much longer answer than that"],
    )
    from lm_eval.api.instance import Instance

    requests = [
        Instance(
            request_type="loglikelihood",
            doc={},
            arguments=(context, text),
            idx=0,
            metadata=("t", 0, 1),
        )
        for text in continuations
    ]
    for text, (value, _) in zip(continuations, lm.loglikelihood(requests), strict=True):
        context_ids, ids = lm.tok_encode(context), lm.tok_encode(context + text)
        with torch.no_grad():
            logs = torch.log_softmax(embedded.model(torch.tensor([ids])).logits[0], dim=-1)
        by_hand = sum(
            float(logs[position - 1, ids[position]])
            for position in range(len(context_ids), len(ids))
        )
        assert value == pytest.approx(by_hand, abs=1e-4)


def test_a_second_model_is_really_asked(embedded, random_model):
    from harness.models.language_model import open_model

    rows = [
        score_task(
            model,
            TASKS["mmlu-mini"],
            LocalOrHubData(),
            batch_size=16,
            limit=40,
            progress=lambda _: None,
        )[1]
        for model in (embedded, open_model(random_model))
    ]
    assert [row.prompt_hash for row in rows[0]] == [row.prompt_hash for row in rows[1]]
    assert [row.log_probabilities for row in rows[0]] != [row.log_probabilities for row in rows[1]]


def test_a_prompt_longer_than_the_context_is_cut_on_the_left_and_counted(random_model):
    from lm_eval.api.instance import Instance

    from harness.models.language_model import open_model

    lm = HarnessLM(open_model(random_model), batch_size=1)
    long = Instance(
        request_type="generate_until",
        doc={},
        arguments=("word " * 3000, {"until": []}),
        idx=0,
        metadata=("t", 0, 1),
    )
    lm.generate_until([long])
    assert lm.cut_prompts == 1
    hopeless = Instance(
        request_type="generate_until",
        doc={},
        arguments=("word", {"max_gen_toks": 512}),
        idx=0,
        metadata=("t", 0, 1),
    )
    with pytest.raises(CellFailed, match="no room for a prompt"):
        lm.generate_until([hopeless])


def test_sampling_is_refused_rather_than_scored_greedily(embedded):
    from lm_eval.api.instance import Instance

    request = Instance(
        request_type="generate_until",
        doc={},
        arguments=("x", {"do_sample": True}),
        idx=0,
        metadata=("t", 0, 1),
    )
    with pytest.raises(CellFailed, match="only greedy"):
        HarnessLM(embedded, batch_size=1).generate_until([request])


def test_a_limited_sample_is_seeded_and_spread_over_the_groups():
    groups = ["a"] * 80 + ["b"] * 15 + ["c"] * 5
    numbers = stratified_sample(groups, 20, name="t")
    assert (
        numbers == stratified_sample(groups, 20, name="t") == sorted(set(numbers))
        and len(numbers) == 20
    )
    assert [sum(groups[item] == group for item in numbers) for group in "abc"] == [8, 7, 5]
    assert stratified_sample(groups, 20, name="other") != numbers
    assert stratified_sample(groups, 500, name="t") == list(range(100))


@pytest.mark.slow
def test_the_embedded_teachers_reach_their_committed_scores():
    """The committed scores are those of the weights (on a seeded fifth of the items)."""
    import json
    from pathlib import Path

    from harness.models.language_model import open_model
    from harness.models.resolve import EMBEDDED, EMBEDDED_MODELS, resolve

    for model in EMBEDDED_MODELS:
        committed = json.loads((EMBEDDED / model / "scores.json").read_text())
        opened = open_model(resolve(model, cache=Path("unused")))
        for name, task in TASKS.items():
            score, _ = score_task(
                opened, task, LocalOrHubData(), batch_size=64, limit=200, progress=lambda _: None
            )
            assert committed[name]["n"] >= 1000 and committed[name]["version"] == task.version
            assert score.value == pytest.approx(
                committed[name]["value"], abs=4 * max(0.01, committed[name]["stderr"] * 5**0.5)
            )


def test_the_embedded_teachers_are_what_several_teachers_need():
    import json

    from harness.models.resolve import EMBEDDED

    general, specialist = (
        json.loads((EMBEDDED / name / "scores.json").read_text()) for name in ("tiny", "tiny-math")
    )
    assert specialist["gsm8k-mini"]["value"] > general["gsm8k-mini"]["value"]
    assert specialist["mmlu-mini"]["value"] < general["mmlu-mini"]["value"]
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*.safetensors")) <= 15e6


def test_ends_of_texts_are_those_of_lm_evals_backend(embedded, upstream, tmp_path):
    """LAMBADA's form, item by item: likelihoods, greedy or not, accuracy and perplexity."""
    from hub_tasks import ending_rows, write_hub, write_tasks
    from lm_eval.evaluator import evaluate
    from task_data import write_rows

    tasks, data = write_tasks(tmp_path / "tasks"), write_hub(tmp_path / "data")
    # the embedded model knows how worked solutions end, and not how sentences do
    solutions = [
        {"text": example.prompt + example.completion}
        for example in islice(TASKS["gsm8k-mini"].examples("train", LocalOrHubData()), 10)
    ]
    write_rows(data / "hub/someone/endings/default/test.jsonl", ending_rows(10) + solutions)
    endings, perplexity = (
        suites.load(name, include_path=tasks, data_folder=data)
        for name in ("lm-eval:endings", "lm-eval:endings:perplexity")
    )
    theirs = evaluate(upstream, endings.lm_eval_tasks(LocalOrHubData()), bootstrap_iters=0)
    samples = theirs["samples"]["endings"]
    score, rows = score_task(embedded, endings, LocalOrHubData(), progress=lambda _: None)
    assert len(rows) == len(samples) == 20 and {row.kind for row in [score]} == {"continue"}
    for sample, row in zip(samples, rows, strict=True):
        likelihood, is_greedy = sample["filtered_resps"][0]
        assert row.log_probabilities == pytest.approx((likelihood,), abs=1e-4)
        assert row.correct == {"acc": bool(is_greedy)} and row.gold == sample["target"]
        assert row.doc_hash == sample["doc_hash"] and row.prompt_hash == sample["prompt_hash"]
    figures = theirs["results"]["endings"]
    assert (score.value, score.metric) == (pytest.approx(figures["acc,none"]), "acc")
    assert 0 < score.value < 1, "both outcomes are seen"
    second, second_rows = score_task(
        embedded, perplexity, LocalOrHubData(), progress=lambda _: None
    )
    assert second.value == pytest.approx(figures["perplexity,none"], rel=1e-4)
    # a perplexity as of documents: its ratio has an interval over items, and the gate judges it
    assert (second.metric, second.kind) == ("perplexity", "perplexity")
    assert not second.higher_is_better and len(second.totals) == 20
    assert [row.item for row in second_rows] == [row.item for row in rows]
