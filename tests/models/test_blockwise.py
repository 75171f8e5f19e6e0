"""A model opened block by block: the same numbers as opened whole, in the room of one block."""

import json
import shutil

import pytest
import torch
from families import saved_family
from safetensors.torch import load_file, save_file

from harness.errors import CellFailed
from harness.models import blockwise as rules
from harness.models.blocks import named_blocks, probe_ids
from harness.models.blockwise import BlockwiseModel, NotBlockwise, open_blockwise
from harness.models.checkpoint import describe
from harness.models.language_model import open_model

# names in the files as in the model; a prefix more; transposed; tied; experts of several tensors
FAMILIES = ("Llama", "GPT-NeoX", "GPT-2", "Gemma 3", "Qwen3", "Mixtral")


def block_bytes(opened):
    """Return what the weights of each block take in memory."""
    _, blocks = named_blocks(opened.model)
    return [
        sum(
            weight.numel() * weight.element_size()
            for weight in block.parameters()
            if not weight.is_meta
        )
        for block in blocks
    ]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """Return a random model of a family, opened whole and block by block."""
    base = saved_family(request.param, tmp_path_factory.mktemp("models") / "base")
    opened = open_blockwise(base, device="cpu", dtype="float32")
    assert opened is not None, request.param
    return open_model(base), opened


def test_it_computes_the_same_and_holds_one_block_at_most(pair):
    whole, (opened, blockwise) = pair
    ids = probe_ids(whole.model)
    held = []
    for block in blockwise.blocks:
        block.register_forward_hook(lambda *_: held.append(sum(map(bool, block_bytes(opened)))))
    assert not any(block_bytes(opened))
    with torch.no_grad():
        assert torch.equal(opened.model(ids).logits, whole.model(ids).logits)
    assert held == [1] * len(blockwise.blocks)
    blockwise.drop_resting()
    assert not any(block_bytes(opened))


def test_its_tensors_are_those_of_the_model_opened_whole(pair):
    whole, (opened, blockwise) = pair
    expected = whole.model.state_dict()
    assert list(opened.model.state_dict()) == list(expected)
    for block in (*blockwise.block_names(), ""):
        names = blockwise.weights.names_below(block) if block else blockwise.rest()
        with blockwise.holding(block):
            for name, tensor in blockwise.state_of(names).items():
                assert torch.equal(tensor, expected[name]), name
    buffers = dict(whole.model.named_buffers())
    for name, buffer in opened.model.named_buffers():
        if name not in expected:  # what no file holds is computed
            assert torch.equal(buffer, buffers[name]), name
    generation = [model.model.generation_config.to_dict() for model in (whole, opened)]
    assert generation[0] == generation[1]


def test_a_held_block_stays_and_its_changes_go_when_it_is_dropped(pair):
    _, (opened, blockwise) = pair
    name, last = blockwise.block_names()[0], blockwise.block_names()[-1]
    ids = probe_ids(opened.model)
    with torch.no_grad():
        before = opened.model(ids).logits
        with blockwise.holding(name):
            for weight in blockwise.blocks[0].parameters():
                assert not weight.requires_grad
                weight.zero_()
            changed = opened.model(ids).logits
            assert not torch.equal(changed, before) and block_bytes(opened)[0]
            with blockwise.holding(name):  # again: nothing is read
                assert torch.equal(opened.model(ids).logits, changed)
        assert torch.equal(opened.model(ids).logits, before)
    assert blockwise.block_of(f"{last}.x") == last and blockwise.block_of("lm_head") == ""


def test_a_layer_is_read_without_its_block(tmp_path):
    base = saved_family("Llama", tmp_path / "base")
    opened, blockwise = open_blockwise(base, device="cpu", dtype="float32")
    with blockwise.holding("model.layers.1.mlp.up_proj"):
        layer = blockwise.blocks[1].mlp.up_proj
        assert block_bytes(opened) == [0, layer.weight.numel() * 4, 0, 0]


def test_of_a_tied_pair_written_twice_equal_halves_are_one_matrix_and_others_two(tmp_path):
    base = saved_family("Llama, biases", tmp_path / "base")
    file = base.path / "model.safetensors"
    for difference in (0.0, 1.0):
        tensors = load_file(file)
        table = tensors["model.embed_tokens.weight"]
        save_file(tensors | {"lm_head.weight": table + difference}, file, metadata={"format": "pt"})
        base = describe(base.path, name="twice")
        whole = open_model(base)
        opened, _ = open_blockwise(base, device="cpu", dtype="float32")
        heads = [model.model.get_output_embeddings().weight for model in (whole, opened)]
        tables = [model.model.get_input_embeddings().weight for model in (whole, opened)]
        assert (heads[0] is tables[0]) == (heads[1] is tables[1]) == (difference == 0.0)
        assert torch.equal(*heads) and torch.equal(*tables)
        assert whole.model.all_tied_weights_keys == opened.model.all_tied_weights_keys


@pytest.mark.parametrize("family", ["Zamba", "ALBERT's way"])
def test_a_weight_of_two_blocks_is_seen(family, tmp_path, monkeypatch):
    """Zamba's hybrid blocks share weights; so does any model whose blocks are made one."""
    if family == "Zamba":
        base = saved_family("Zamba", tmp_path / "base")
    else:
        base = saved_family("Llama", tmp_path / "base")
        empty = rules.empty_model

        def share(folder, dtype):
            model = empty(folder, dtype)
            model.model.layers[1].mlp = model.model.layers[0].mlp
            return model

        monkeypatch.setattr(rules, "empty_model", share)
    with pytest.raises(NotBlockwise):
        BlockwiseModel.of_folder(base.path, device="cpu", dtype=torch.float32)
    assert open_blockwise(base, device="cpu", dtype="float32") is None


def test_a_model_that_reads_a_blocks_weights_from_outside_is_opened_whole(tmp_path, monkeypatch):
    base = saved_family("Llama", tmp_path / "base")
    empty = rules.empty_model

    def look_in(folder, dtype):
        model = empty(folder, dtype)

        def read(module, positional, named):
            named["inputs_embeds"] = model.model.embed_tokens(named.pop("input_ids"))
            named["inputs_embeds"] = (
                named["inputs_embeds"] + model.model.layers[1].mlp.up_proj.weight[0, 0]
            )
            return positional, named

        model.model.register_forward_pre_hook(read, with_kwargs=True)
        return model

    monkeypatch.setattr(rules, "empty_model", look_in)
    assert open_blockwise(base, device="cpu", dtype="float32") is None


def test_a_missing_weight_is_left_to_the_way_that_opens_the_model_whole(tmp_path):
    base = saved_family("Llama", tmp_path / "base")
    tensors = load_file(base.path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base.path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotBlockwise, match="no file holds model"):
        BlockwiseModel.of_folder(base.path, device="cpu", dtype=torch.float32)


def test_a_number_that_is_not_finite_is_refused_by_name(tmp_path):
    base = saved_family("Llama", tmp_path / "base")
    tensors = load_file(base.path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = torch.nan
    save_file(tensors, base.path / "model.safetensors", metadata={"format": "pt"})
    said = r"Llama holds numbers that are not finite: model.layers.1.mlp.up_proj.weight\[2, 3\]"
    for open_it in (open_model, lambda base: open_blockwise(base, device="cpu", dtype="float32")):
        with pytest.raises(CellFailed, match=said):
            open_it(base)


def test_a_sharded_folder_is_read_file_by_file(tmp_path):
    base = saved_family("Qwen2", tmp_path / "base")
    whole = open_model(base)
    shards = tmp_path / "shards"
    shutil.copytree(base.path, shards)
    (shards / "model.safetensors").unlink()
    whole.model.save_pretrained(shards, max_shard_size="20KB")
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    opened, _ = open_blockwise(describe(shards, name="shards"), device="cpu", dtype="float32")
    ids = probe_ids(whole.model)
    with torch.no_grad():
        assert torch.equal(opened.model(ids).logits, whole.model(ids).logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_card_one_block_is_held(tmp_path):
    base = saved_family("Llama", tmp_path / "base")
    opened, blockwise = open_blockwise(base, device="cuda", dtype="bfloat16")
    whole = open_model(base, device="cuda", dtype="bfloat16")
    ids = probe_ids(whole.model)
    with torch.no_grad():
        assert torch.equal(opened.model(ids).logits, whole.model(ids).logits)
    assert sum(map(bool, block_bytes(opened))) == 1
    with blockwise.holding(blockwise.block_names()[0]):
        assert next(blockwise.blocks[0].parameters()).is_cuda
