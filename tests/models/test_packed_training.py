"""Training beside packed weights: gradients by hand, adapters kept beside them, opened again."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness.models import packed
from harness.models.language_model import LanguageModel, open_model
from harness.models.packed import (
    CPU_LEVELS,
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    TiedHead,
    packed_module,
    quantized_rows,
)
from harness.models.packed_training import (
    Adapter,
    adaptable_layers,
    frozen_product,
    make_differentiable,
    save_with_adapters,
    use_kernels_again,
)
from harness.models.shape import forward_flops_per_token, weight_counts
from methods.compression.rounding import packed_layer, round_to_nearest

KINDS = ["int8", "int4", "int4 zeros", "int8-dynamic"]


def layer_of(kind, shape=(48, 64), bias=True, **entries):
    """Return a packed layer with random weights."""
    torch.manual_seed(2)
    name, _, zeros = kind.partition(" ")
    rounded = round_to_nearest(
        torch.randn(shape),
        bits=4 if name == "int4" else 8,
        **({"group_size": 32, "symmetric": not zeros} if name == "int4" else {}),
    )
    offset = torch.randn(shape[0]) if bias else None
    spec, tensors = packed_layer("m", rounded, offset, kind=name, **entries)
    module = packed_module(spec, torch.float32)
    with torch.no_grad():
        for leaf, tensor in tensors.items():
            getattr(module, leaf.removeprefix("m.")).copy_(tensor)
    return module


def as_int8(x):
    """Return what an int8 activation stands for."""
    rows = quantized_rows(x, CPU_LEVELS)
    return (rows.codes * rows.step).view(x.shape)


@pytest.mark.parametrize("rows", [1, 20])  # below and above what kernels take
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_float_matrix_that_the_codes_stand_for(kind, rows):
    layer = layer_of(kind)
    w_hat = layer.dequantized()
    x, slope = torch.randn(2, rows, 64), torch.randn(2, rows, 48)
    packed_x = x.clone().requires_grad_()
    product = frozen_product(layer, packed_x)
    product.backward(slope)
    read = as_int8(x) if kind == "int8-dynamic" else x
    assert torch.allclose(product, F.linear(read, w_hat, layer.bias), atol=1e-5)
    assert torch.allclose(packed_x.grad, slope @ w_hat, atol=1e-5)
    assert torch.equal(layer.dequantized(), w_hat)  # nothing was laid out for a kernel
    assert all(weight.grad is None for weight in layer.parameters())


def test_a_tied_head_has_the_gradient_of_its_table():
    table = layer_of("int8", (300, 64), bias=False, embedding=True)
    assert type(table) is Int8Embedding
    x = torch.randn(5, 64, requires_grad=True)
    frozen_product(TiedHead(table), x).sum().backward()
    assert torch.allclose(x.grad, table.dequantized().sum(0).expand(5, -1), atol=1e-4)


def test_products_under_autocast_are_in_its_type():
    layer, x = layer_of("int4"), torch.randn(9, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        product = frozen_product(layer, x)
    product.sum().backward()
    assert product.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    expected = layer.dequantized().sum(0).expand(9, -1)
    assert torch.allclose(x.grad, expected, rtol=0.02, atol=0.1)


def test_kernels_come_back_after_training():
    model = nn.Sequential(layer_of("int4"), layer_of("int8", (32, 48)))
    x = torch.randn(3, 64)
    before = nn.Sequential(layer_of("int4"), layer_of("int8", (32, 48)))(x)
    make_differentiable(model)
    model(x)
    assert not model[0].laid_out
    use_kernels_again(model)
    assert torch.equal(model(x), before) and model[0].laid_out == "cpu"


@pytest.fixture(scope="module")
def packed_folder(random_model, tmp_path_factory):
    """Return a random model whose blocks are int4, but for one layer, and its table int8."""
    from distilling import REGISTRY, job

    folder = tmp_path_factory.mktemp("packed") / "int4"
    method = REGISTRY.build("int4", {"group_size": 32, "ignore": ["*.0.mlp.up_proj"]})
    return method.compress(job([random_model], folder, student=str(random_model.path)))


def random_adapters(opened, rank=3, seed=5):
    draw = torch.Generator().manual_seed(seed)
    return {
        name: Adapter(
            torch.randn(rank, layer.in_features, generator=draw) / 8,
            torch.randn(layer.out_features, rank, generator=draw) / 8,
        )
        for name, layer in adaptable_layers(opened.model).items()
    }


def saved(opened, folder, adapters):
    return save_with_adapters(
        opened, folder, adapters, name="x", dtype=torch.float32, parents=(opened.checkpoint.digest,)
    )


IDS = torch.arange(3, 43)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def test_an_adapter_may_stand_beside_every_matrix_of_the_blocks(packed_folder):
    opened = open_model(packed_folder)
    layers = adaptable_layers(opened.model)
    assert len(layers) == 2 * 7
    assert type(layers["model.layers.0.mlp.up_proj"]) is nn.Linear
    assert type(layers["model.layers.1.mlp.up_proj"]) is Int4Linear
    assert not adaptable_layers(nn_model(opened))


def nn_model(opened):
    """Return a float model of the same architecture."""
    from transformers import AutoModelForCausalLM

    config = opened.model.config.__class__.from_dict(
        {k: v for k, v in opened.model.config.to_dict().items() if k != "quantization_config"}
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_saved_student_is_its_packed_matrices_plus_the_products(packed_folder, tmp_path):
    """Against a float model of plain transformers, which holds w_hat + up @ down."""
    opened = open_model(packed_folder)
    adapters = random_adapters(opened)
    student = saved(opened, tmp_path / "student", adapters)
    opened = open_model(packed_folder)  # nothing of it is laid out for a kernel yet
    plain = nn_model(opened)
    with torch.no_grad():
        for name, module in opened.model.named_modules():
            if name in adapters:
                is_packed = isinstance(module, Int4Linear | Int8Linear)
                w_hat = module.dequantized() if is_packed else module.weight
                down, up = adapters[name]
                plain.get_submodule(name).weight.copy_(w_hat + up @ down)
            elif isinstance(module, Int8Embedding):
                plain.get_submodule(name).weight.copy_(module.dequantized())
            elif "norm" in name and hasattr(module, "weight"):
                plain.get_submodule(name).weight.copy_(module.weight)
    with_adapters = logits(open_model(student).model)
    expected = logits(plain)
    # kernels read activations in bf16
    assert (with_adapters - expected).abs().max() < 0.03 * expected.abs().max()
    assert (logits(opened.model) - expected).abs().max() > 0.2 * expected.abs().max()


@pytest.mark.slow
def test_it_opens_in_a_fresh_process_by_plain_transformers_with_equal_logits(
    packed_folder, tmp_path
):
    opened = open_model(packed_folder)
    student = saved(opened, tmp_path / "student", random_adapters(opened))
    torch.set_num_threads(1)
    torch.save(logits(open_model(student).model), tmp_path / "here.pt")
    code = (
        "import sys, torch, methods.packed\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(1)\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()\n"
        "with torch.no_grad():\n"
        "    there = model(input_ids=torch.arange(3, 43)[None], use_cache=False).logits\n"
        "assert torch.equal(there, torch.load(sys.argv[2])), 'other logits'\n"
    )
    arguments = [str(student.path), str(tmp_path / "here.pt")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


def test_packed_tensors_keep_their_bytes_and_only_adapters_are_added(packed_folder, tmp_path):
    from safetensors.torch import load_file

    opened = open_model(packed_folder)
    student = saved(opened, tmp_path / "student", random_adapters(opened))
    before = load_file(packed_folder.path / "model.safetensors")
    after = load_file(student.path / "model.safetensors")
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    added = after.keys() - before.keys()
    assert len(added) == 2 * 14 and all(".adapter_" in name for name in added)


def test_a_second_adapter_makes_a_pair_of_both_ranks(packed_folder, tmp_path):
    opened = open_model(packed_folder)
    first = random_adapters(opened)
    once = open_model(saved(opened, tmp_path / "once", first))
    second = random_adapters(once, rank=2, seed=6)
    assert second.keys() == first.keys()
    twice = open_model(saved(once, tmp_path / "twice", second))
    together = {
        name: Adapter(
            torch.cat([first[name].down, second[name].down]),
            torch.cat([first[name].up, second[name].up], dim=1),
        )
        for name in first
    }
    opened = open_model(packed_folder)
    expected = open_model(saved(opened, tmp_path / "together", together))
    assert torch.equal(logits(twice.model), logits(expected.model))
    config = json.loads((tmp_path / "twice/config.json").read_text())
    entry = config["quantization_config"]["modules"]["model.layers.1.mlp.up_proj"]
    assert entry["adapter"] == 5 and entry["kind"] == "int4"


def test_an_installation_that_does_not_know_adapters_refuses_them(
    packed_folder, tmp_path, monkeypatch
):
    opened = open_model(packed_folder)
    student = saved(opened, tmp_path / "student", random_adapters(opened))
    versions = [
        json.loads((checkpoint.path / "config.json").read_text())["quantization_config"]["version"]
        for checkpoint in (packed_folder, student)
    ]
    assert versions == [1, 2]
    monkeypatch.setattr(packed, "VERSION", 1)
    open_model(packed_folder)
    with pytest.raises(Exception, match="version 2; this installation reads up to 1: upgrade"):
        open_model(student)


def test_codes_stand_for_all_their_weights_and_scales_for_none(packed_folder, random_model):
    plain, opened = open_model(random_model), open_model(packed_folder)
    counts = [sum(weight_counts(model.model).values()) for model in (plain, opened)]
    assert counts[0] == sum(weight.numel() for weight in plain.model.parameters()) == counts[1]
    flops = [forward_flops_per_token(model.model, 20.0) for model in (plain, opened)]
    assert flops[0] == flops[1]
    assert isinstance(opened, LanguageModel)
