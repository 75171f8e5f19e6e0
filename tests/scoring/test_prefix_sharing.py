"""The shared path against the model's own attention, its fallbacks, and its cache of answers."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import suites
from harness.data.source import LocalOrHubData
from harness.errors import CellFailed
from harness.models.language_model import open_model
from harness.scoring.admission import shared_path_refusal
from harness.scoring.answer_cache import AnswerCache, request_key
from harness.scoring.backend import LikelihoodRequest
from harness.scoring.fidelity import (
    answers_to_compare,
    choice_fidelity,
    clustered_mean,
    distribution_reader,
    load_teacher_readings,
    read_answers,
    save_hidden_states,
    token_fidelity,
)
from harness.scoring.generation import generate, reason_for_plain_path
from harness.scoring.items import ItemRow
from harness.scoring.likelihood import log_likelihoods, prefix_groups
from harness.scoring.prefix_sharing import KeyValues, TokenTree, shared_attention
from harness.scoring.score import score_task

KINDS = ("Llama", "Qwen2", "Qwen3", "Gemma", "GPTNeoX")


def by_hand(opened, ids, count):
    with torch.no_grad():
        logs = torch.log_softmax(opened.model(torch.tensor([ids])).logits[0], dim=-1)
    return sum(
        float(logs[position - 1, ids[position]]) for position in range(len(ids) - count, len(ids))
    )


def sequences(shared, tails, count):
    return [LikelihoodRequest([*shared, *tail], count) for tail in tails]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_shares_or_says_why_not(small, kind):
    opened = small(kind)
    reason = reason_for_plain_path(opened)
    rows = sequences(list(range(5, 65)), [[7, 8, 9], [7, 8, 10], [11], [11, 12, 13, 14]], 1)
    for row, (value, _) in zip(rows, log_likelihoods(opened, rows), strict=True):
        assert value == pytest.approx(by_hand(opened, row.ids, row.count), abs=1e-4), reason
    if kind in ("Llama", "Qwen2", "Qwen3"):
        assert reason == ""


def test_a_window_a_mixture_of_layers_and_a_quantised_cache_are_refused_with_the_reason(small):
    assert shared_path_refusal(small("Qwen2")) == ""
    mixed = small("Llama")
    mixed.model.config.layer_types = ["full_attention", "sliding_attention"]
    assert "sliding_attention" in shared_path_refusal(mixed)
    window = small("Mistral", sliding_window=16)
    assert "window of 16" in shared_path_refusal(window) or "sliding" in shared_path_refusal(window)
    quantised = small("Llama")
    quantised.model.generation_config.cache_implementation = "quantized"
    assert "quantized cache" in shared_path_refusal(quantised)


def test_a_model_whose_probe_differs_is_refused(small, monkeypatch):
    from harness.scoring import prefix_sharing

    opened = small("Llama")
    monkeypatch.setattr(
        prefix_sharing.DecodingSlots,
        "attend",
        lambda self, layer, query, key, value, scaling: query.transpose(1, 2) * 0,
    )
    assert "moved by" in shared_path_refusal(opened)


@pytest.mark.parametrize(("dtype", "refused"), [(torch.float32, True), (torch.bfloat16, False)])
def test_a_tail_that_moves_refuses_a_model_only_where_its_numbers_are_exact(small, dtype, refused):
    opened = small("Llama")
    opened.model.to(dtype)
    calls = []

    def move_the_tail(module, inputs, logits):
        calls.append(1)
        logits[..., 100:] = -50 - 3 * len(calls)
        return logits

    opened.model.get_output_embeddings().register_forward_hook(move_the_tail)
    assert ("moved by" in shared_path_refusal(opened)) == refused


def test_the_models_own_attention_comes_back(small):
    opened = small("Llama")
    with shared_attention(opened):
        assert opened.model.config._attn_implementation == "harness-shared"
    assert opened.model.config._attn_implementation == "sdpa"


def test_a_tree_sees_ancestors_only():
    tree = TokenTree.of([[1, 2, 3], [1, 2, 4], [5]])
    assert (tree.tokens, tree.depths, tree.parents) == (
        [1, 2, 3, 4, 5],
        [0, 1, 2, 2, 0],
        [-1, 0, 1, 1, -1],
    )
    assert tree.paths == [[0, 1, 2], [0, 1, 3], [4]]
    assert tree.visible().int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert TokenTree.of([[1, 2, 3]]).visible() is None


@pytest.mark.parametrize("least", [1, 3, 8, 100])
def test_stretches_of_a_pack_hold_every_node_once_and_see_nothing_of_each_other(least):
    texts = [[5, 6, 7], [5, 6, 8, 9], [10], [11, 12], [11, 13], [14, 15, 16, 17, 18]]
    tree = TokenTree.of(texts)
    stretches = tree.stretches(least)
    nodes = [list(range(stretch.nodes.start, stretch.nodes.stop)) for stretch in stretches]
    assert [node for part in nodes for node in part] == list(range(len(tree.tokens)))
    assert all(len(part) >= least for part in nodes[:-1])
    assert len(stretches) == {1: 4, 3: 3, 8: 2, 100: 1}[least]
    visible = tree.visible()
    for index, stretch in enumerate(stretches):
        for other in stretches[:index] + stretches[index + 1 :]:
            assert not visible[stretch.nodes, other.nodes].any()
        own = visible[stretch.nodes, stretch.nodes]
        assert stretch.is_chain is torch.equal(own, torch.ones_like(own).tril())
    assert TokenTree.of([[1, 2], [1, 3]]).stretches(1) == [(slice(0, 3), False)]
    assert TokenTree.of([[1, 2], [3]]).stretches(1) == [(slice(0, 2), True), (slice(2, 3), True)]


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "GPTNeoX"])
def test_texts_that_share_nothing_attend_to_themselves_alone(small, kind, monkeypatch):
    attention, keys_of_calls = torch.nn.functional.scaled_dot_product_attention, []

    def counted(query, key, *arguments, **options):
        keys_of_calls.append(key.shape[-2])
        return attention(query, key, *arguments, **options)

    opened = small(kind)
    texts = [[5 + number, *range(20, 60 + 9 * number), 7, 8] for number in range(12)]
    # two continuations of the first one: a tree among chains
    rows = [LikelihoodRequest(text, 2) for text in [*texts, [*texts[0][:-2], 9, 10]]]
    assert reason_for_plain_path(opened) == ""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    answers = log_likelihoods(opened, rows, pack=2_000)
    monkeypatch.undo()
    tokens = sum(map(len, texts))
    # a stretch is less than 48 tokens and the longest text
    assert len(keys_of_calls) > 5 and max(keys_of_calls) < 48 + max(map(len, texts)) < tokens
    for row, (value, _) in zip(rows, answers, strict=True):
        assert value == pytest.approx(by_hand(opened, row.ids, row.count), abs=1e-4)


def test_prefix_groups_end_before_the_first_scored_position():
    long = list(range(100))
    rows = [*sequences(long, [[1, 2], [1, 3], [4, 5]], 1), LikelihoodRequest([900, 901, 902], 1)]
    order = sorted(range(4), key=lambda row: rows[row].ids)
    assert prefix_groups(rows, order) == [([0, 1, 2], 100), ([3], 1)]
    # the last shared token is the input of the first scored one
    alone = sequences(long, [[1, 2], [3, 2]], 2)
    assert prefix_groups(alone, [0, 1]) == [([0, 1], 99)]


@pytest.mark.parametrize("most", [16, 40, 768])
def test_packs_of_any_size_and_long_texts_give_the_same_numbers(small, monkeypatch, most):
    from harness.scoring import likelihood

    monkeypatch.setattr(likelihood, "tokens_per_pack", lambda opened: most)
    opened = small("Llama")
    draw = torch.Generator().manual_seed(1)
    long = torch.randint(5, 1000, (60,), generator=draw).tolist()
    rows = sequences(long, [[7, 8, 9], [7, 8, 10], [11, 4], [11, 12, 13, 14]], 2)
    rows += [
        LikelihoodRequest([3, 4, 5, 6], 1),
        LikelihoodRequest(long[:50], 49),
        LikelihoodRequest([9, 9], 1),
    ]
    answers = log_likelihoods(opened, rows)
    for row, (value, _) in zip(rows, answers, strict=True):
        assert value == pytest.approx(by_hand(opened, row.ids, row.count), abs=1e-3)


def test_each_question_costs_its_own_tokens_and_no_more(small, monkeypatch):
    """One more question costs its own tokens: the shared examples are read once."""
    opened = small("Llama", max_position_embeddings=2048)
    reason_for_plain_path(opened)
    fed = []
    forward = opened.model.forward
    monkeypatch.setattr(
        opened.model,
        "forward",
        lambda *a, **k: (fed.append(k["input_ids"].numel()), forward(*a, **k))[1],
    )
    shared = [5 + index % 900 for index in range(700)]
    questions = [[100 + index, 7, 8, letter] for index in range(100) for letter in (1, 2, 3, 4)]
    log_likelihoods(opened, sequences(shared, questions, 1))
    assert sum(fed) == 700 + 100 * 3  # the letters themselves are never fed


@pytest.mark.parametrize("path", ["packs", "prefix", "plain"])
def test_known_answers_change_no_digit_of_the_others(small, monkeypatch, path):
    """A resumed scoring ends with the same digits, because missing rows stay in the same packs."""
    from harness.scoring import likelihood

    opened = small("Llama", max_position_embeddings=2048)
    if path == "plain":
        monkeypatch.setattr(likelihood, "reason_for_plain_path", lambda opened: "a test")
    draw = torch.Generator().manual_seed(3)
    shared = torch.randint(5, 1000, (60 if path == "prefix" else 3,), generator=draw).tolist()
    questions = [
        torch.randint(5, 1000, (2 + index % 9,), generator=draw).tolist() for index in range(40)
    ]
    rows = sequences(shared, questions, 1)

    def scored(known):
        computed_rows = []
        options = {"batch_size": 4} if path == "plain" else {"pack": 70}
        answers = log_likelihoods(
            opened,
            rows,
            known=known,
            finished=lambda row, answer: computed_rows.append(row),
            **options,
        )
        return answers, computed_rows

    answers, all_computed = scored({})
    assert sorted(all_computed) == list(range(40))
    for known_rows in (range(0, 40, 2), range(5, 39), range(7), [39], range(40)):
        known = {row: answers[row] for row in known_rows}
        resumed, computed = scored(known)
        assert resumed == answers
        assert sorted(computed) == [row for row in range(40) if row not in known]
    fed = []
    forward = opened.model.forward
    monkeypatch.setattr(
        opened.model, "forward", lambda *a, **k: (fed.append(1), forward(*a, **k))[1]
    )
    scored({row: answers[row] for row in range(40)})
    assert not fed  # nothing is left: the model is not asked


@pytest.mark.parametrize("common", [0, 50])
def test_refilled_slots_write_what_a_single_row_writes(small, common):
    opened = small("Llama")
    draw = torch.Generator().manual_seed(2)
    shared = torch.randint(5, 1000, (common,), generator=draw).tolist()
    prompts = [
        [*shared, *torch.randint(5, 1000, (size,), generator=draw).tolist()]
        for size in (3, 9, 4, 12, 5, 6, 7, 3, 8)
    ]
    alone = [generate(opened, [prompt], max_new_tokens=12, batch_size=1)[0] for prompt in prompts]
    for size in (2, 4, 64):
        assert generate(opened, prompts, max_new_tokens=12, batch_size=size) == alone
    # and what transformers' own generate writes
    for prompt, answer in zip(prompts[:3], alone, strict=False):
        out = opened.model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        eos = opened.tokenizer.eos_token_id
        ids = out[0, len(prompt) :].tolist()
        ids = ids[: ids.index(eos)] if eos in ids else ids
        assert opened.tokenizer.decode(ids, skip_special_tokens=True) == answer.text


def test_out_of_memory_halves_what_is_done_at_once_and_says_so(small, monkeypatch):
    from harness.scoring import prefix_sharing

    opened = small("Llama")
    prompts = [[5, 6, 7, index] for index in range(20, 29)]
    plain = generate(opened, prompts, max_new_tokens=6, batch_size=8)
    admit, lines = prefix_sharing.DecodingSlots.admit, []

    def tight(self, computed, spans):
        if self.size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return admit(self, computed, spans)

    monkeypatch.setattr(prefix_sharing.DecodingSlots, "admit", tight)
    assert generate(opened, prompts, max_new_tokens=6, batch_size=9, say=lines.append) == plain
    assert lines == [
        "out of memory: 9 rows at once became 4",
        "out of memory: 4 rows at once became 2",
    ]


def test_a_real_error_is_not_taken_for_want_of_memory(small, monkeypatch):
    from harness.scoring import prefix_sharing

    opened = small("Llama")
    reason_for_plain_path(opened)

    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(prefix_sharing.DecodingSlots, "admit", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        generate(opened, [[5, 6, 7]], max_new_tokens=6)


def test_an_answer_cache_keeps_whole_lines_and_drops_a_cut_one(tmp_path):
    path = tmp_path / "deep" / "answers.jsonl"
    cache = AnswerCache(path)
    cache.put(request_key([1, 2], 1), [-0.5, True], 0.25)
    assert cache.hits == 0 and cache.get(request_key([1, 2], 1)) == ([-0.5, True], 0.25)
    path.write_bytes(path.read_bytes() + b'["torn", [1')
    reopened = AnswerCache(path)
    assert reopened.get(request_key([1, 2], 1)) == ([-0.5, True], 0.25) and reopened.hits == 1
    reopened.put(request_key([3], 1), [-1.0, False], 0.5)
    assert AnswerCache(path).get(request_key([3], 1)) == ([-1.0, False], 0.5)
    assert AnswerCache(path).get(request_key([1, 2], 2)) is None


def scored(opened, name, cache, limit=40):
    return score_task(
        opened,
        suites.load(name),
        LocalOrHubData(),
        batch_size="auto",
        limit=limit,
        progress=lambda _: None,
        cache=cache,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k-mini", "mmlu-mini"])
def test_answers_are_read_from_the_cache_but_never_another_models(
    embedded, random_model, tmp_path, name
):
    score, rows = scored(embedded, name, tmp_path)
    cached_score, cached_rows = scored(embedded, name, tmp_path)
    assert score.from_journal == 0 and cached_score.from_journal == (
        40 if name == "gsm8k-mini" else 160
    )
    assert (
        rows == cached_rows
        and cached_score.value == score.value
        and cached_score.seconds == pytest.approx(score.seconds, abs=0.05)
    )
    other_score, other_rows = scored(open_model(random_model), name, tmp_path)
    assert other_score.from_journal == 0
    assert [row.text for row in other_rows] != [row.text for row in rows] or [
        r.log_probabilities for r in other_rows
    ] != [r.log_probabilities for r in rows]


KILLED = """
import sys
from pathlib import Path
import suites
from harness.scoring import prefix_sharing
from harness.data.source import LocalOrHubData
from harness.models.language_model import open_model
from harness.models.resolve import resolve
from harness.scoring.score import score_task
opened = open_model(resolve("tiny", cache=Path("unused")))
print("begin", flush=True)
task, how = suites.load("gsm8k-mini"), {"progress": lambda step: None, "cache": Path(sys.argv[1])}
score_task(opened, task, LocalOrHubData(), batch_size=4, limit=200, **how)
"""


@pytest.mark.slow
def test_a_killed_scoring_goes_on_where_it_was(embedded, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begin\n"
    caches = []
    while process.poll() is None and not caches:
        caches = [
            path for path in tmp_path.rglob("*.jsonl") if path.read_bytes().count(b"\n") >= 20
        ]
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    cached_answers = sum(1 for line in caches[0].read_bytes().splitlines() if line.endswith(b"]"))
    score, rows = scored(embedded, "gsm8k-mini", tmp_path, limit=200)
    assert 20 <= cached_answers < 200 and score.from_journal >= cached_answers - 1
    fresh, same = scored(embedded, "gsm8k-mini", None, limit=200)
    assert rows == same and fresh.outcomes == score.outcomes


@pytest.mark.parametrize("task", ["gsm8k-mini", "mmlu-mini"])
def test_damaged_answers_are_computed_again_with_a_message_and_the_same_score(
    embedded, tmp_path, capsys, task
):
    undamaged, _ = scored(embedded, task, tmp_path, limit=12)
    [path] = tmp_path.rglob("*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], lines[3][: len(lines[3]) // 2] + b"\n", *lines[4:]]))
    mended, _ = scored(embedded, task, tmp_path, limit=12)
    assert "1 cached answers are damaged and were dropped" in capsys.readouterr().err
    assert (mended.notes, mended.outcomes, mended.answers_digest, mended.likelihoods_digest) == (
        undamaged.notes,
        undamaged.outcomes,
        undamaged.answers_digest,
        undamaged.likelihoods_digest,
    )


def row_of(item, logs=(), prompt="", text=""):
    return ItemRow(
        task="t",
        item=item,
        group="",
        doc_hash="",
        prompt_hash="",
        target_hash="",
        gold="",
        text=text,
        extracted={},
        correct={},
        tokens=0,
        stop="",
        log_probabilities=tuple(logs),
        prompt=prompt,
    )


def test_choice_divergence_by_hand():
    teacher = [row_of(1, [math.log(0.5), math.log(0.5)]), row_of(2, [math.log(0.9), math.log(0.1)])]
    student = [
        row_of(1, [math.log(0.25), math.log(0.75)]),
        row_of(2, [math.log(0.9), math.log(0.1)]),
    ]
    fidelity = choice_fidelity("t", teacher, student)
    divergence = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert (
        fidelity.items == 2
        and fidelity.kl == pytest.approx(divergence / 2)
        and fidelity.agreement == 0.5
    )
    assert choice_fidelity("t", teacher, teacher).kl == pytest.approx(0)
    shifted = [
        row_of(1, [3 + math.log(0.5)] * 2),
        row_of(2, [7 + math.log(0.9), 7 + math.log(0.1)]),
    ]
    # a choice's shared log-probability does not matter
    assert choice_fidelity("t", teacher, shifted).kl == pytest.approx(0)


def test_clustered_errors_of_equal_clusters_are_the_plain_ones():
    values = [1.0, 2.0, 4.0, 9.0]
    mean, error = clustered_mean([(10 * value, 10.0) for value in values])
    spread = math.sqrt(sum((value - 4) ** 2 for value in values) / 3)
    assert mean == 4 and error == pytest.approx(spread / 2)


def test_token_fidelity_is_zero_against_oneself_and_counts_by_token(embedded, random_model):
    rows = [
        row_of(index, prompt=f"Question: {index} plus 1?\nAnswer:", text=f" It is {index + 1}.")
        for index in range(6)
    ]
    texts = answers_to_compare(embedded, "t", rows)
    to_itself = token_fidelity(
        "t", read_answers(distribution_reader(embedded), texts), distribution_reader(embedded)
    )
    assert (
        to_itself.kl == pytest.approx(0, abs=1e-6)
        and to_itself.agreement == 1
        and to_itself.items == 6
    )
    student = open_model(random_model)
    to_student = token_fidelity(
        "t", read_answers(distribution_reader(embedded), texts), distribution_reader(student)
    )
    assert to_student.kl > 0.5 and to_student.agreement < 0.5 and to_student.kl_stderr > 0
    by_hand = []
    # an independent sum over single sequences, without batches or padding
    for prompt, answer in texts:
        with torch.no_grad():
            p, q = (
                torch.log_softmax(
                    model.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1], -1
                )
                for model in (embedded, student)
            )
        by_hand.append((float((p.exp() * (p - q)).sum()), len(answer)))
    assert to_student.kl == pytest.approx(
        sum(kl for kl, _ in by_hand) / sum(size for _, size in by_hand), rel=1e-4
    )


def test_what_the_teacher_read_is_kept_for_every_student(
    embedded, random_model, tmp_path, monkeypatch
):
    rows = [
        row_of(index, prompt=f"Question: {index} plus 1?\nAnswer:", text=f" It is {index + 1}.")
        for index in range(6)
    ]
    path, student = tmp_path / "reads.safetensors", open_model(random_model)
    fresh = token_fidelity(
        "t",
        read_answers(distribution_reader(embedded), answers_to_compare(embedded, "t", rows)),
        distribution_reader(student),
    )
    save_hidden_states(path, embedded, {"t": answers_to_compare(embedded, "t", rows)})
    monkeypatch.setattr(
        type(embedded.model), "forward", lambda *a, **k: pytest.fail("the teacher was asked again")
    )
    readings = load_teacher_readings(path, embedded.checkpoint, "t", device="cpu")
    monkeypatch.undo()
    from_file = token_fidelity("t", readings, distribution_reader(student))
    assert (
        from_file.kl == pytest.approx(fresh.kl, rel=1e-5)
        and from_file.agreement == fresh.agreement
        and from_file.items == fresh.items
    )
    assert (
        load_teacher_readings(path, student.checkpoint, "t", device="cpu") is None
    )  # of another teacher
    assert load_teacher_readings(tmp_path / "none", embedded.checkpoint, "t", device="cpu") is None


def test_a_teachers_head_crosses_to_the_device_once(embedded, tmp_path):
    from harness.scoring.fidelity import _saved_readings

    rows = [
        row_of(index, prompt=f"Question: {index} plus 1?\nAnswer:", text=f" It is {index + 1}.")
        for index in range(3)
    ]
    save_hidden_states(
        tmp_path / "reads.safetensors", embedded, {"t": answers_to_compare(embedded, "t", rows)}
    )
    crossed = []

    class Head:
        def to(self, device, dtype):
            crossed.append(device)
            return embedded.model.get_output_embeddings().weight.detach()

    names = {f"t/{index}/hidden" for index in range(3)}
    assert len(
        list(_saved_readings(tmp_path / "reads.safetensors", "t", Head(), names, "cpu"))
    ) == 3 and crossed == ["cpu"]


def test_nothing_is_kept_where_the_head_alone_does_not_make_the_logits(
    embedded, tmp_path, monkeypatch
):
    rows = [row_of(0, prompt="Question: 1 plus 1?\nAnswer:", text=" It is 2.")]
    head = embedded.model.get_output_embeddings()
    capped = head.register_forward_hook(lambda module, inputs, output: torch.tanh(output / 5) * 5)
    try:
        save_hidden_states(
            tmp_path / "reads.safetensors", embedded, {"t": answers_to_compare(embedded, "t", rows)}
        )
    finally:
        capped.remove()
    assert not (tmp_path / "reads.safetensors").exists()


def test_an_empty_memory_has_no_length():
    assert KeyValues().length == 0


def test_two_bos_tokens_are_an_error(embedded, monkeypatch):
    from harness.scoring.lm_eval_model import HarnessLM

    lm = HarnessLM(embedded)
    monkeypatch.setattr(type(lm.tokenizer), "bos_token_id", 5, raising=False)
    monkeypatch.setattr(type(lm.tokenizer), "bos_token", "<s>", raising=False)
    with pytest.raises(CellFailed, match="two BOS"):
        lm.tokens.refuse_two_bos([5, 5, 6])
    lm.tokens.refuse_two_bos([5, 6, 5])


def test_lm_evals_own_command_knows_the_model():
    from lm_eval.api.registry import get_model

    import harness.scoring.lm_eval_model  # noqa: F401  registers it

    model = get_model("harness").create_from_arg_string(
        "pretrained=tiny", {"batch_size": 8, "device": "cpu"}
    )
    assert (
        model.opened.checkpoint.name == "tiny"
        and model.engine.batch_size == 8
        and model.backend == "causal"
    )


def test_rows_come_back_as_they_were_written(tmp_path):
    from harness.scoring.items import read_rows, write_rows

    rows = [row_of(1, [-0.5, -1.0], prompt="p", text="ä")]
    write_rows(tmp_path / "samples.jsonl", rows)
    assert read_rows(tmp_path / "samples.jsonl") == rows
    assert json.loads((tmp_path / "samples.jsonl").read_text())["text"] == "ä"


def test_under_mixed_precision_the_shared_path_is_judged_by_the_type_of_the_products(embedded):
    import copy
    from dataclasses import replace

    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from harness.scoring.generation import generate, reason_for_plain_path

    def prepared(autocast):
        AcceleratorState._reset_state(reset_partial_state=True)
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare(copy.deepcopy(embedded.model))
        return replace(embedded, model=model, autocast=autocast)

    try:
        # by its weights' type it would be held to float32
        assert "moved by" in reason_for_plain_path(prepared(""))
        mixed = prepared("bfloat16")
        assert (
            reason_for_plain_path(mixed) == ""
            and mixed.dtype == "bfloat16"
            and embedded.dtype == "float32"
        )
        prompts = [embedded.encode("Question: 2 + 3?\nAnswer:"), embedded.encode("A")]
        assert all(answer.tokens for answer in generate(mixed, prompts, max_new_tokens=8))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
