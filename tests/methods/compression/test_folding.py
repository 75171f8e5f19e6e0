"""Folded scales change nothing that a model computes, and are only found where that is so."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models import gemma, gpt2, llama

from harness.models.language_model import open_model
from harness.models.resolve import resolve
from methods.compression.folding import find_folds, fold_scale
from methods.compression.layers import layers_of

IDS = torch.arange(3, 60)[None]
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def made(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def endings(folds):
    """Return the last parts of the names of writers and readers of the first block."""
    return [
        (fold.writer.rpartition(".")[2], *(name.rpartition(".")[2] for name in fold.readers))
        for fold in folds[next(iter(folds))]
    ]


def test_random_folds_of_the_teacher_leave_its_logits():
    opened = open_model(resolve("tiny", cache=Path("unused")))
    model = opened.model.double().requires_grad_(False)
    layers = layers_of(model, method="awq")
    folds = find_folds(model, layers)
    assert endings(folds) == [
        ("input_layernorm", "q_proj", "k_proj", "v_proj"),
        ("v_proj", "o_proj"),  # two query heads share a value head here
        ("post_attention_layernorm", "gate_proj", "up_proj"),
        ("up_proj", "down_proj"),
    ]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = model(IDS).logits
        for fold in (fold for of_block in folds.values() for fold in of_block):
            inputs = layers.linear[fold.readers[0]].weight.shape[1]
            scale = fold.shared(0.3 + 3 * torch.rand(inputs, generator=generator))
            # the norms are saved in bf16: their readers make up for what that rounds
            fold_scale(model, layers.linear, fold, scale, dtype=torch.bfloat16)
        after = model(IDS).logits
    assert float((after - before).abs().max()) < 1e-5
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            assert torch.equal(parameter, parameter.bfloat16().double())


def test_a_scale_of_values_reaches_the_readers_of_the_same_head():
    model = made(llama.LlamaConfig(**SMALL))
    fold = find_folds(model, layers_of(model, method="awq"))["model.layers.0"][1]
    assert fold.heads == (2, 4)
    of_inputs = torch.arange(32.0)  # inputs 0 to 7 are the first query head, 8 to 15 the second
    shared = fold.shared(of_inputs)
    assert shared[:16].tolist() == [*range(4, 12), *range(4, 12)]
    assert fold.of_outputs(shared).tolist() == [*range(4, 12), *range(20, 28)]


def test_norms_that_add_one_and_layers_behind_an_activation_take_no_scale():
    # Gemma's norms multiply by 1 + weight; GPT-2's second layer reads what an activation bent
    gemmas = made(gemma.GemmaConfig(**SMALL))
    assert endings(find_folds(gemmas, layers_of(gemmas, method="awq"))) == [
        ("v_proj", "o_proj"),
        ("up_proj", "down_proj"),
    ]
    gpt = made(gpt2.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    layers = layers_of(gpt, method="awq")
    folds = find_folds(gpt, layers)
    assert endings(folds) == [("ln_1", "c_attn"), ("ln_2", "c_fc")]
    with torch.no_grad():
        before = gpt(IDS).logits
        for fold in folds["transformer.h.0"]:  # norms with biases, transposed layers
            fold_scale(gpt, layers.linear, fold, torch.full((32,), 1.7), dtype=torch.float32)
        assert torch.allclose(gpt(IDS).logits, before, atol=1e-5)


@pytest.mark.parametrize("ignored", ["*.v_proj", "*.q_proj"])
def test_a_norm_with_a_reader_that_stays_as_it_is_takes_no_scale(ignored):
    model = made(llama.LlamaConfig(**SMALL))
    folds = find_folds(model, layers_of(model, ignore=[ignored], method="awq"))
    writers = [names[0] for names in endings(folds)]
    assert "input_layernorm" not in writers and "post_attention_layernorm" in writers
    assert ("v_proj" in writers) == (ignored != "*.v_proj")
