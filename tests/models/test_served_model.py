"""A model that llama.cpp holds is called, timed and weighed as any other one."""

import pytest
import torch
from llama_cpp_stand_in import install

from harness.errors import CellFailed
from harness.measuring.runs import generate_greedily
from harness.measuring.weighing import cache_bytes, resident_bytes
from harness.models.resolve import EMBEDDED
from harness.models.served_model import ServedModel
from harness.models.shape import parameters_of_architecture, parameters_on_disk

FILE = EMBEDDED / "tiny" / "model.safetensors"  # any file: the stand-in has the weights


@pytest.fixture
def served(embedded, monkeypatch):
    install(monkeypatch, embedded)
    return ServedModel(FILE, EMBEDDED / "tiny", threads=1)


def test_steps_write_what_the_model_writes(served, embedded):
    ids = torch.tensor([[5, 17, 300, 41]])
    ours, theirs = (generate_greedily(model, ids, 5) for model in (served, embedded.model))
    assert torch.allclose(ours.logits, theirs.logits[:, -1:], atol=1e-4)
    assert ours.past_key_values.ids[:4] == ids[0].tolist()
    assert len(ours.past_key_values.ids) == 8


def test_it_weighs_its_file_and_what_it_keeps_of_a_text(served):
    output = generate_greedily(served, torch.tensor([[5, 17, 300, 41]]), 3)
    assert resident_bytes(served) == FILE.stat().st_size
    assert cache_bytes(output) == 64 * 6  # as the stand-in says of six tokens
    assert parameters_of_architecture(served) == parameters_on_disk(EMBEDDED / "tiny")


def test_one_text_at_a_time_is_read(served):
    with pytest.raises(CellFailed, match="one text"):
        served(torch.tensor([[1, 2], [3, 4]]))
