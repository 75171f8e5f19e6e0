"""LoRA through peft: adapters that change nothing at first, merge exactly, and train alone."""

import copy
import sys

import pytest
import torch
from families import random_family

from harness.errors import CellFailed, HarnessError, Skipped
from harness.testing import check_method, method_registry
from methods.masks import mark_pruned
from methods.response import ResponseDistillation
from methods.training.lora import add_adapters, merge_adapters
from methods.training.optimizer import make_optimizers
from methods.training.settings import LoopSettings

pytest.importorskip("peft")
IDS = torch.arange(3, 43)[None]
FAMILIES = ["Llama", "Qwen2", "Gemma 2", "GPT-2", "Phi", "Mixtral", "Falcon"]
SETTINGS = LoopSettings(
    learning_rate=1e-2,
    batch_size=4,
    micro_batch_size=2,
    warmup_ratio=0.1,
    weight_decay=0.01,
    max_grad_norm=1.0,
    validation_rows=4,
)


def adapted(family, seed=1, rank=4):
    model = random_family(family)
    count = add_adapters(model, rank=rank, alpha=8, seed=seed, label="x")
    return model, count


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def adapters(model):
    return {name: weight for name, weight in model.named_parameters() if "lora_" in name}


def move(model):
    """Give every second factor, which begins at zero, some value."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in adapters(model).items():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=draw)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_change_nothing_at_first_and_merge_into_what_they_computed(family):
    plain = random_family(family)
    model, count = adapted(family)
    assert count == sum(weight.numel() for weight in adapters(model).values()) > 0
    assert torch.equal(logits(model), logits(plain))
    move(model)
    before = logits(model)
    assert (before - logits(plain)).abs().max() > 1e-3
    merge_adapters(model)
    assert torch.allclose(logits(model), before, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert type(model) is type(plain) and not hasattr(model, "peft_config")
    assert all(weight.requires_grad for weight in model.parameters())


def test_the_merged_matrix_is_w_plus_alpha_over_rank_b_a():
    model, _ = adapted("Llama")
    move(model)
    [name] = [name for name in adapters(model) if "layers.1.mlp.up_proj.lora_A" in name]
    first = adapters(model)[name]
    second = adapters(model)[name.replace("lora_A", "lora_B")]
    frozen = model.model.layers[1].mlp.up_proj.base_layer.weight.clone()
    merge_adapters(model)
    expected = frozen + 8 / 4 * second @ first
    assert torch.allclose(model.model.layers[1].mlp.up_proj.weight, expected, atol=1e-6)


def test_only_adapters_are_trained_and_have_states():
    model, _ = adapted("Llama")
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == set(adapters(model))
    [(optimizer, _)] = make_optimizers(model, SETTINGS)
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert held == {id(weight) for weight in adapters(model).values()}


def test_the_factors_follow_the_seed_and_nothing_else():
    torch.manual_seed(0)
    first = adapters(adapted("Llama")[0])
    torch.manual_seed(9)
    same, other = adapters(adapted("Llama")[0]), adapters(adapted("Llama", seed=2)[0])
    names = [name for name in first if "lora_A" in name]
    assert all(torch.equal(first[name], same[name]) for name in names)
    assert not any(torch.equal(first[name], other[name]) for name in names)


def test_zeros_of_a_pruned_student_are_not_filled():
    model = random_family("Llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    mark_pruned(model.config)
    with pytest.raises(CellFailed, match=r"x: the student was pruned.*use recipe=full"):
        add_adapters(model, rank=4, alpha=8, seed=1, label="x")


def test_a_packed_student_that_was_pruned_is_told_what_works(monkeypatch):
    monkeypatch.setattr("methods.training.lora.is_plain", lambda model: False)
    model = random_family("Llama")
    mark_pruned(model.config)
    with pytest.raises(CellFailed, match="train it with recipe=full before it is packed"):
        add_adapters(model, rank=4, alpha=8, seed=1, label="x")


def test_a_missing_peft_is_skipped_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(Skipped, match=r"pip install 'compression-harness\[lora\]'"):
        add_adapters(random_family("Llama"), rank=4, alpha=8, seed=1, label="x")


def test_a_layer_that_peft_does_not_know_is_refused_by_name(monkeypatch):
    import peft

    def refuse(config, model):
        raise ValueError("Target module Odd() is not supported.")

    monkeypatch.setattr(peft, "inject_adapter_in_model", refuse)
    with pytest.raises(CellFailed, match=r"peft cannot adapt this model .*Odd.*use recipe=full"):
        add_adapters(random_family("Llama"), rank=4, alpha=8, seed=1, label="x")


def test_what_training_holds_and_its_learning_rate_follow_the_recipe():
    full, lora = ResponseDistillation(), ResponseDistillation(recipe="lora")
    assert full.training_bytes_per_weight == 16
    assert lora.training_bytes_per_weight == 4 + 16 * 16 / 256
    wide = ResponseDistillation(recipe="lora", lora_rank=1024)
    assert wide.training_bytes_per_weight == 20
    rates = [
        method.loop_settings(10_000_000, scratch=False).learning_rate for method in (full, lora)
    ]
    assert rates[1] == pytest.approx(10 * rates[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("sft", {}),
        ("response", {}),
        ("response", {"divergence": "jsd"}),
        ("feature", {}),
        ("attention", {}),
        ("selective", {}),
        ("on-policy", {"batch_size": 4}),
        ("cot", {}),
    ],
)
def test_every_kind_of_term_trains_adapters_and_keeps_the_contract(method, settings):
    """Its student opens in a fresh process with plain transformers; one seed, the same bytes."""
    check_method(method, {**settings, "recipe": "lora", "lora_rank": 4})


def test_a_copy_of_a_merged_model_is_whole():
    model, _ = adapted("Llama")
    move(model)
    merge_adapters(model)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize("method", ["response", "cot", "selective", "multi-teacher", "feature"])
def test_controls_train_by_the_same_recipe(method):
    built = method_registry().build(method, {"recipe": "lora", "lora_rank": 8})
    shared = built.control_settings()
    assert shared["recipe"] == "lora" and shared["lora_rank"] == 8
    assert "lora_alpha" not in shared  # at its default


def test_random_weights_are_not_frozen():
    with pytest.raises(HarnessError, match="start=random"):
        method_registry().build("sft", {"recipe": "lora", "start": "random"})
