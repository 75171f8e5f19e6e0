"""Reading distributions: whole or in parts the same, few forward passes, no waiting for a GPU."""

from types import SimpleNamespace

import pytest
import torch
from transfers import Transfers

from harness.models.position_head import PositionHead
from harness.scoring import reading
from harness.scoring.backend import LikelihoodRequest
from harness.scoring.reading import Reader, batches_by_memory, right_padded
from methods.training.cache_shards import host_words


def requests(number=24, seed=0, vocabulary=1024):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(number):
        length = int(torch.randint(6, 40, (1,), generator=generator))
        ids = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        rows.append(LikelihoodRequest(ids, length // 2))
    return sorted(rows, key=lambda row: len(row.ids), reverse=True)


@pytest.mark.parametrize("k", [5, None])
@pytest.mark.parametrize("width", [None, 700])
def test_parts_give_what_the_whole_gives(embedded, monkeypatch, k, width):
    rows = requests()
    whole = list(Reader(embedded, 8).top_k(rows, k=k, width=width))
    monkeypatch.setattr(reading, "_LOGIT_BYTES", 4 * 1024 * 7)  # seven positions at once
    parts = list(Reader(embedded, 8).top_k(rows, k=k, width=width))
    for row, expected, top in zip(rows, whole, parts, strict=True):
        assert torch.equal(top.ids_NK, expected.ids_NK) and len(top.ids_NK) == row.count
        assert torch.allclose(top.log_p_NK, expected.log_p_NK, atol=1e-5)
        assert torch.allclose(top.normaliser_N, expected.normaliser_N, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Cohere", {"logit_scale": 0.25}),
        ("Gemma2", {"final_logit_softcapping": 5.0}),
        ("GPTNeoX", {}),
    ],
)
def test_parts_hold_what_a_model_does_behind_its_head(small, monkeypatch, kind, changes):
    opened = small(kind, **changes)
    rows = requests(6)
    whole = list(Reader(opened, 6).top_k(rows, k=9))
    monkeypatch.setattr(reading, "_LOGIT_BYTES", 4 * 1024 * 5)
    parts = list(Reader(opened, 6).top_k(rows, k=9))
    for expected, top in zip(whole, parts, strict=True):
        assert torch.allclose(top.log_p_NK, expected.log_p_NK, atol=1e-5)


def test_a_logit_is_its_log_probability_and_the_normaliser(embedded):
    [row] = requests(1)
    [top] = Reader(embedded).top_k([row], k=None)
    ids = torch.tensor([list(row.ids)])
    with torch.no_grad():
        logits = embedded.model(input_ids=ids).logits[0, -row.count - 1 : -1]
    assert torch.allclose(top.log_p_NK + top.normaliser_N[:, None], logits, atol=1e-4)


def test_a_large_vocabulary_is_read_in_as_few_passes_as_a_small_one(small, monkeypatch):
    """150,000 tokens, of which prompts would need 40 MiB of logits a row: eight rows a pass."""
    opened = small("Llama", vocab_size=150_000)
    rows = [LikelihoodRequest([*range(1, 65)], 8) for _ in range(40)]
    passes, forward = [], opened.model.forward

    def counted(*args, **kwargs):
        passes.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(opened.model, "forward", counted)
    monkeypatch.setattr(reading, "_LOGIT_BYTES", 2**24)  # 27 positions; a row holds eight
    tops = list(Reader(opened).top_k(rows, k=50))
    assert len(tops) == 40 and all(top.ids_NK.shape == (8, 50) for top in tops)
    # a CPU takes 2,048 tokens a batch: 32 rows of 64; the probes read 8 tokens and 2
    assert [tuple(shape) for shape in passes if shape[1] > 8] == [(32, 64), (8, 64)]
    assert len(passes) == 4


def test_a_head_that_cannot_be_run_alone_is_read_whole(small, monkeypatch):
    opened = small("Llama")
    rows = requests(8)
    expected = list(Reader(opened).top_k(rows, k=5))
    monkeypatch.setattr(reading, "logit_tail_of", lambda model: None)
    monkeypatch.setattr(reading, "_LOGIT_BYTES", 4 * 1024 * 50)  # two texts of 25 tokens
    reader = Reader(opened)
    assert max(map(len, reader.batches(rows))) < 8
    for top, other in zip(reader.top_k(rows, k=5), expected, strict=True):
        assert torch.allclose(top.log_p_NK, other.log_p_NK, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_in_parts_the_vocabulary_does_not_limit_a_batch(device):
    rows = [LikelihoodRequest(range(40), 1)] * 300
    small, large = (
        [len(batch) for batch in batches_by_memory(rows, width, device, in_parts=True)]
        for width in (1_000, 1_000_000)
    )
    assert small == large and sum(small) == 300
    whole = [len(batch) for batch in batches_by_memory(rows, 1_000_000, device)]
    assert max(whole) == 1 < max(large)


class Model(torch.nn.Module):
    """A table and a head: no operation of the body asks for a value."""

    def __init__(self):
        super().__init__()
        self.table, self.head = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50, bias=False)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.head(self.table(input_ids)))


def opened_on(device):
    torch.manual_seed(0)
    return SimpleNamespace(model=Model().to(device), pad_id=0, device=device, vocabulary=50)


def test_a_device_is_not_waited_for():
    """The body's own operations apart: a mask on the host selects states of a device without asking
    it how many there are. Tensors of the device `meta` have no values, so whatever asks for one
    fails.
    """

    rows = [LikelihoodRequest([1, 2, 3, 4, 5], 2), LikelihoodRequest([1, 2, 3], 1)]
    opened = opened_on("meta")
    with Transfers() as transfers:
        tops = list(Reader(opened, 2).top_k(rows, k=5))
    assert [tuple(top.ids_NK.shape) for top in tops] == [(2, 5), (1, 5)]
    assert all(top.ids_NK.device.type == "meta" for top in tops)
    assert transfers.count == 0
    # a mask on the device, as it was, has to be counted there
    ids, attention, selected = right_padded(rows, 0, "meta")
    with Transfers() as transfers, pytest.raises((NotImplementedError, RuntimeError)):
        PositionHead(opened.model).logits_at(ids, attention, selected.to("meta"))
    assert transfers.count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_card_a_batch_is_one_transfer_and_says_what_a_cpu_says():
    rows = requests(64, vocabulary=50)
    expected = list(Reader(opened_on("cpu"), 64).top_k(rows, k=5))
    with Transfers() as transfers:
        words = host_words(list(Reader(opened_on("cuda"), 64).top_k(rows, k=5)), dense=False)
    assert transfers.count == 1
    log_p = torch.cat([top.log_p_NK for top in expected])
    assert torch.allclose(words[:, 5:].contiguous().view(torch.float32), log_p, atol=1e-4)
