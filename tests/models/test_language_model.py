"""Opening a model straight onto a device: the same bytes, tied as before, and nothing around it."""

import pytest
import torch

from harness.models import language_model
from harness.models.language_model import open_model


def test_a_gpu_gets_weights_as_they_are_read_and_a_cpu_opens_as_always():
    assert language_model.placement("cuda:0") == {"device_map": {"": "cuda:0"}}
    assert language_model.placement("cpu") == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["", "int8", "int4"])
def test_weights_that_are_read_onto_their_device_are_those_that_are_copied_there(
    method, dtype, compress, random_model, monkeypatch
):
    checkpoint = compress(method)[0] if method else random_model
    copied = open_model(checkpoint, dtype=dtype)
    monkeypatch.setattr(language_model, "placement", lambda device: {"device_map": {"": device}})
    read = open_model(checkpoint, dtype=dtype)
    states = [opened.model.state_dict() for opened in (copied, read)]
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype and tensor.equal(states[1][name]), name
    pointers = [
        [weight.data_ptr() for weight in opened.model.parameters()] for opened in (copied, read)
    ]
    assert len(pointers[0]) == len(pointers[1])  # tied weights count once
    assert not [name for name, module in read.model.named_modules() if hasattr(module, "_hf_hook")]
    ids = torch.arange(10)[None] + 5
    with torch.inference_mode():
        assert read.model(ids).logits.equal(copied.model(ids).logits)


@pytest.mark.gpu
def test_on_a_gpu_an_opened_model_lies_there_with_the_bytes_of_its_file(random_model):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    on_card, on_cpu = (open_model(random_model, device=device) for device in ("cuda", "cpu"))
    for name, tensor in on_cpu.model.state_dict().items():
        there = on_card.model.state_dict()[name]
        assert there.device.type == "cuda" and there.cpu().equal(tensor), name
