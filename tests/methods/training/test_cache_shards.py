"""Shards: what waits on the device comes to the host as one block, bit by bit."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transfers import Transfers

from harness.scoring.backend import TopK
from methods.training import cache_shards
from methods.training.cache_forms import id_bits, unpack_ids, unpack_log_p
from methods.training.cache_shards import KeptForm, RowPlace, ShardWriter, host_words, to_host


def tops(rows=5, k=7, vocabulary=70_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    result = []
    for row in range(rows):
        logits = torch.randn(3 + row, vocabulary, generator=generator) * 3
        values, ids = torch.log_softmax(logits, -1).topk(k)
        result.append(TopK(ids, values))
    return result


@pytest.mark.parametrize("dense", [True, False])
def test_several_rows_travel_at_once_and_keep_every_bit(dense):
    rows = tops()
    host = to_host(rows, dense=dense)
    expected = torch.cat([row.log_p_NK for row in rows]).numpy()
    assert host.log_p_NK.tobytes() == expected.tobytes()
    if dense:
        assert host.ids_NK.shape[1] == 0
    else:
        assert np.array_equal(host.ids_NK, torch.cat([row.ids_NK for row in rows]).numpy())


@pytest.mark.parametrize("dense", [True, False])
def test_the_rows_of_a_batch_are_one_transfer(dense):
    """On fake tensors of a GPU: they have devices and shapes and no values, so whatever asks for
    a value fails.
    """
    with FakeTensorMode(), Transfers() as transfers:
        rows = [
            TopK(
                torch.empty(9, 50, dtype=torch.int64, device="cuda"),
                torch.empty(9, 50, device="cuda"),
            )
            for _ in range(64)
        ]
        words = host_words(rows, dense=dense)
        assert words.device.type == "cpu" and words.shape == (64 * 9, 50 if dense else 100)
    assert transfers.count == 1


@pytest.mark.parametrize("form", ["float32", "float16", "int8"])
@pytest.mark.parametrize("waiting", [1, 300, 2**24])
def test_files_hold_what_was_added_however_much_waits(tmp_path, monkeypatch, form, waiting):
    monkeypatch.setattr(cache_shards, "_TRANSFER_BYTES", waiting)
    writer = ShardWriter(tmp_path, KeptForm(7, 70_000, form), shard_bytes=2 * 7 * 10)
    rows = tops()
    for row in rows:
        writer.add(row)
    writer.flush()
    # 3 + 4 positions, then 5, 6, 7: a shard holds ten
    assert writer.places == [
        RowPlace(0, 0, 3),
        RowPlace(0, 3, 4),
        RowPlace(1, 0, 5),
        RowPlace(2, 0, 6),
        RowPlace(3, 0, 7),
    ]
    exact = torch.cat([row.log_p_NK for row in rows]).numpy()
    arrays = {
        name: np.concatenate([np.load(tmp_path / f"{name}-{n:03}.npy") for n in range(4)])
        for name in ("log_p", "ids", *(("range",) if form == "int8" else ()))
    }
    ids = unpack_ids(arrays.pop("ids"), id_bits(70_000), 7)
    assert np.array_equal(ids, torch.cat([row.ids_NK for row in rows]).numpy())
    kept = unpack_log_p(arrays, form)
    assert (
        kept.tobytes() == exact.tobytes()
        if form == "float32"
        else np.allclose(kept, exact, atol=0.02)
    )
    assert writer.mass == pytest.approx(np.exp(exact).sum(), rel=1e-6)
    assert (writer.kl == 0) == (form == "float32") and writer.kl < 0.01 * len(exact)
