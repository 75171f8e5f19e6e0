"""Files of spooled tensors are, byte for byte, those that safetensors writes."""

import gc
import json

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file

from harness.models.tensor_spool import TensorSpool


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "b.weight": torch.randn(7, 5, dtype=torch.bfloat16),
        "a.weight": torch.randint(-127, 127, (3, 4, 1), dtype=torch.int8),
        "ä.scale": torch.randn(3),
        "a.zero": torch.randint(0, 255, (3, 1), dtype=torch.uint8),
        "counts": torch.arange(4),
        "half": torch.randn(2, 2).half(),
        "one": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "turned": torch.randn(4, 3).T,
        "mask": torch.tensor([True, False, True]),
        "double": torch.randn(3, dtype=torch.float64),
    }


def test_a_written_file_has_the_bytes_of_the_library(tensors, tmp_path):
    spool = TensorSpool(tmp_path / "work" / ".spool.1.part")
    for name, tensor in tensors.items():
        spool.add(name, tensor)
    assert list(spool) == list(tensors) and len(spool) == len(tensors)
    for names in (
        list(tensors),
        ["b.weight"],
        ["ä.scale", "a.zero", "counts"],
        list(tensors)[::-1],
    ):
        spool.write_file(tmp_path / "ours.safetensors", names)
        chosen = {name: tensors[name].contiguous() for name in names}
        save_file(chosen, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
        ours = (tmp_path / "ours.safetensors").read_bytes()
        assert ours == (tmp_path / "theirs.safetensors").read_bytes()
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as opened:
        assert torch.equal(opened.get_tensor("turned"), tensors["turned"])


def test_tensors_come_back_as_they_were_added_and_the_file_goes_with_them(tensors, tmp_path):
    path = tmp_path / ".spool.1.part"
    spool = TensorSpool(path)
    for name, tensor in tensors.items():
        spool.add(name, tensor)
    for name, tensor in tensors.items():
        assert torch.equal(spool[name], tensor) and spool[name].dtype == tensor.dtype
        assert spool.empty(name).device.type == "meta" and spool.empty(name).shape == tensor.shape
    assert path.is_file()
    del spool
    gc.collect()
    assert not path.exists()


def test_empty_tensors_are_split_into_files_as_full_ones_are(tensors, tmp_path):
    spool = TensorSpool(tmp_path / ".spool.1.part")
    for name, tensor in tensors.items():
        spool.add(name, tensor)
    empty = split_torch_state_dict_into_shards(
        {name: spool.empty(name) for name in spool}, max_shard_size=60
    )
    full = split_torch_state_dict_into_shards(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, max_shard_size=60
    )
    assert len(full.filename_to_tensors) > 2
    assert json.dumps(empty.filename_to_tensors) == json.dumps(full.filename_to_tensors)
    assert empty.metadata == full.metadata


def test_a_spool_that_was_cut_off_is_an_error(tmp_path):
    spool = TensorSpool(tmp_path / ".spool.1.part")
    spool.add("x", torch.ones(100))
    spool.path.write_bytes(b"abc")
    with pytest.raises(OSError, match="ends too early"):
        spool.write_file(tmp_path / "x.safetensors", ["x"])
    with pytest.raises(OSError, match="ends too early"):
        spool["x"]
