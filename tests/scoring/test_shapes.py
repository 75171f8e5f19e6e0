"""Widths on a GPU: few of them, the same answers, and no kernel that plans each; a CPU's stay."""

import random
from dataclasses import replace

import pytest
import torch

from harness.scoring import prefix_sharing, shapes
from harness.scoring.backend import LikelihoodRequest
from harness.scoring.generation import generate
from harness.scoring.likelihood import log_likelihoods
from harness.scoring.prefix_sharing import TokenTree, shared_attention


@pytest.mark.parametrize(
    ("tokens", "width"),
    [(0, 0), (1, 64), (64, 64), (65, 128), (1_000, 1_024), (1_025, 1_152), (4_000, 4_096)],
)
def test_widths_by_hand(tokens, width):
    assert shapes.rounded_width(tokens, "cuda:0") == width
    assert shapes.rounded_width(tokens, "cpu") == tokens


def test_no_width_is_narrower_an_eighth_is_padding_and_there_are_32_up_to_a_full_pack():
    widths = [shapes.rounded_width(tokens, "cuda") for tokens in range(1, 4_097)]
    padding = [width - tokens for tokens, width in enumerate(widths, 1)]
    assert min(padding) == 0 and all(
        more < max(64, width / 8 + 1) for more, width in zip(padding, widths, strict=True)
    )
    assert len(set(widths)) == 32 and all(width % 64 == 0 for width in widths)
    assert {shapes.rounded_rows(rows, "cuda") for rows in range(1, 513)} == set(range(8, 513, 8))


@pytest.fixture
def attention_shapes(monkeypatch):
    """Keep the shapes of every call of torch's attention, and whether cuDNN's was allowed."""
    calls = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, **options):
        calls.append((tuple(query.shape), tuple(key.shape)))
        return plain(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return calls


def subjects(count, questions):
    """Return requests as MMLU's: subjects with a shared beginning, questions of four letters."""
    draw = random.Random(0)
    requests = []
    for _ in range(count):
        shots = [draw.randrange(10, 900) for _ in range(draw.randint(60, 180))]
        for _ in range(questions):
            question = [draw.randrange(10, 900) for _ in range(draw.randint(8, 40))]
            requests += [
                LikelihoodRequest([*shots, *question, letter], 1) for letter in (5, 6, 7, 8)
            ]
    return requests


def test_packs_of_many_subjects_meet_few_shapes_and_give_the_same(
    small, attention_shapes, monkeypatch
):
    opened, requests = small("Llama"), subjects(24, 12)
    log_likelihoods(opened, requests[:4])  # the probe, which has shapes of its own
    attention_shapes.clear()
    exact = log_likelihoods(opened, requests, pack=320)
    without_rule = set(attention_shapes)
    attention_shapes.clear()
    monkeypatch.setattr(shapes, "ROUNDED_DEVICES", ("cuda", "cpu"))
    rounded = log_likelihoods(opened, requests, pack=320)
    with_rule = set(attention_shapes)
    # packs of 64 to 320 tokens after beginnings of 64 to 192
    assert len(with_rule) <= 5 * 4 < 40 < len(without_rule)
    assert {query[2] % 64 for query, _ in with_rule} == {0} == {key[2] % 64 for _, key in with_rule}
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.log_probability == pytest.approx(theirs.log_probability, abs=1e-4)
        assert ours.is_greedy == theirs.is_greedy


@pytest.mark.parametrize("shared", [0, 40])
def test_answers_are_decoded_in_few_widths_and_stay_the_same(small, shared, monkeypatch):
    opened, draw = small("Llama"), random.Random(1)
    beginning = [draw.randrange(10, 900) for _ in range(shared)]
    prompts = [
        [*beginning, *(draw.randrange(10, 900) for _ in range(draw.randint(3, 30)))]
        for _ in range(21)
    ]
    widths = []
    prepare = prefix_sharing.DecodingSlots.prepare

    def watched(slots):
        prepare(slots)
        widths.append(slots._width)

    monkeypatch.setattr(prefix_sharing.DecodingSlots, "prepare", watched)

    def decoded():
        widths.clear()
        return [
            answer.ids for answer in generate(opened, prompts, max_new_tokens=70, batch_size=6)
        ], set(widths)

    exact, all_widths = decoded()
    monkeypatch.setattr(shapes, "ROUNDED_DEVICES", ("cuda", "cpu"))
    rounded, few_widths = decoded()
    assert rounded == exact and len(few_widths) <= 2 < 60 < len(all_widths)


def test_padding_of_a_tree_is_seen_by_none_of_its_tokens():
    for sequences in ([[1, 2, 3], [1, 2, 4], [5]], [[1, 2, 3, 4, 5]]):
        tree = TokenTree.of(sequences)
        padded = tree.padded(8, 0)
        assert padded.paths == tree.paths and len(padded.tokens) == 8
        visible = padded.visible() if not padded.is_chain else torch.ones(8, 8).tril().bool()
        count = len(tree.tokens)
        assert not visible[:count, count:].any() and visible.diagonal().all()
        own = tree.visible() if not tree.is_chain else torch.ones(count, count).tril().bool()
        assert visible[:count, :count].equal(own)


def test_every_tree_sees_its_ancestors_as_walking_up_finds_them():
    draw = random.Random(2)
    for _ in range(20):
        rows = sorted([draw.randrange(3) for _ in range(draw.randint(1, 9))] for _ in range(7))
        for tree in (TokenTree.of(rows), TokenTree.unmerged(rows)):
            ancestors = [set() for _ in tree.tokens]
            for index, parent in enumerate(tree.parents):
                ancestors[index] = {index} | (ancestors[parent] if parent >= 0 else set())
            expected = [[column in seen for column in range(len(ancestors))] for seen in ancestors]
            visible = tree.visible()
            assert visible is None if tree.is_chain else visible.tolist() == expected


def test_scoring_on_a_gpu_leaves_cudnn_out_and_gives_the_choice_back(small, monkeypatch):
    opened = small("Llama")
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        with shared_attention(opened):
            assert enabled()  # a CPU has no such choice to make
        with shared_attention(replace(opened, device="cuda:0")):
            assert not enabled()
        assert enabled()
        with pytest.raises(ValueError), shapes.without_planning("cuda"):
            raise ValueError
        assert enabled()
        monkeypatch.setattr(shapes, "MAY_PLAN", True)
        with shapes.without_planning("cuda"):
            assert enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.gpu
def test_on_a_gpu_rounded_widths_give_what_exact_ones_give(small, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    opened = small("Llama")
    opened = replace(opened, model=opened.model.to("cuda"), device="cuda")
    requests = subjects(3, 5)
    rounded = log_likelihoods(opened, requests, pack=320)
    monkeypatch.setattr(shapes, "ROUNDED_DEVICES", ())
    exact = log_likelihoods(opened, requests, pack=320)
    assert [value for value, _ in rounded] == pytest.approx([value for value, _ in exact], abs=2e-3)
