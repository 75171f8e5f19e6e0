"""A saved student is opened block by block and compared with what was to be saved."""

import pytest
import torch
from families import saved_family
from safetensors.torch import load_file, save_file

from harness.errors import CellFailed
from harness.models.language_model import open_model
from harness.models.reopening import refuse_changed_blocks


@pytest.fixture
def saved(tmp_path):
    """Return a saved model's folder and its tensors."""
    base = saved_family("Llama", tmp_path / "base")
    return base.path, open_model(base).model.state_dict()


def compare(folder, state, *, tied=False):
    refuse_changed_blocks(folder, state, name="x", dtype=torch.float32, tied=tied)


def test_what_is_as_it_was_passes(saved):
    compare(*saved)


@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_another_number_is_named(saved, key):
    folder, state = saved
    state[key] = state[key] + 1
    with pytest.raises(CellFailed, match=f"x: {key} holds other numbers"):
        compare(folder, state)


def test_a_lost_tensor_and_another_tie_are_named(saved):
    folder, state = saved
    with pytest.raises(CellFailed, match="x: other is lost when the saved student is opened"):
        compare(folder, {**state, "other": torch.ones(1)})
    with pytest.raises(CellFailed, match="x: head and table are one matrix, and not so when"):
        compare(folder, state, tied=True)


def test_a_number_that_is_not_finite_is_named(saved):
    folder, state = saved
    key = "model.layers.0.mlp.up_proj.weight"
    state[key][1, 1] = torch.inf
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CellFailed, match="the saved student holds a number that is not finite"):
        compare(folder, state)


def test_what_can_only_be_opened_whole_is_opened_whole(saved):
    """Without one of its tensors, transformers draws random numbers in its place."""
    folder, state = saved
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CellFailed, match=r"up_proj.weight holds other numbers"):
        compare(folder, state)


def test_what_cannot_be_opened_at_all_is_one_line(saved):
    folder, state = saved
    (folder / "config.json").write_text('{"model_type": "no such type"}')
    with pytest.raises(CellFailed, match="x: the saved student cannot be opened again"):
        compare(folder, state)
