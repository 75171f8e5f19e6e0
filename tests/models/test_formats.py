"""Formats of other libraries: a missing library skips the row and says what to install."""

import json

import pytest

from harness.errors import HarnessError, Skipped
from harness.models import formats


def folder_of(tmp_path, quantization):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": quantization})
    )
    return tmp_path


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("awq", "gptqmodel"),
        ("gptq", "gptqmodel optimum"),
        ("compressed-tensors", "compressed-tensors"),
        ("bitsandbytes", "bitsandbytes"),
        ("torchao", "torchao"),
        ("quanto", "optimum-quanto"),
        ("hqq", "hqq"),
    ],
)
def test_a_format_without_its_library_is_skipped_by_name(name, packages, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda module: None)
    folder = folder_of(tmp_path, {"quant_method": name})
    with pytest.raises(
        Skipped, match=rf"^mine is stored as {name}, and .* pip install {packages}$"
    ):
        formats.require_format(folder, "mine", device="cpu")


def test_a_format_that_needs_a_device_which_is_not_here_is_skipped(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(formats, "find_spec", lambda module: object())
    folder = folder_of(tmp_path, {"quant_method": "eetq", "weights": "int8"})
    with pytest.raises(Skipped, match=r"mine is stored as eetq, which cannot be opened here"):
        formats.require_format(folder, "mine", device="cpu")


def test_a_format_that_nobody_knows_is_a_mistake(tmp_path):
    folder = folder_of(tmp_path, {"quant_method": "no-such-format"})
    with pytest.raises(HarnessError, match=r"no-such-format, a format that transformers does not"):
        formats.require_format(folder, "mine", device="cpu")


@pytest.mark.parametrize("quantization", [{}, {"quant_method": "compression-harness"}])
def test_plain_floats_and_our_own_format_need_nothing(quantization, tmp_path):
    formats.require_format(folder_of(tmp_path, quantization), "mine", device="cpu")


def test_adapters_without_peft_are_skipped(monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda module: None)
    with pytest.raises(Skipped, match=r"^mine is an adapter, and peft .* pip install peft$"):
        formats.require_peft("mine")


def test_kinds_of_gguf_that_cannot_be_unpacked_are_named():
    gguf = pytest.importorskip("gguf", reason="GGUF files need the gguf package")
    kinds = gguf.GGMLQuantizationType
    assert formats.unreadable_kinds([kinds.Q4_K, kinds.Q8_0, kinds.F16, kinds.BF16]) == []
    assert formats.unreadable_kinds([kinds.Q4_K, kinds.Q8_K, kinds.Q8_K]) == ["Q8_K"]


# --- checkpoints that the formats' own libraries write, opened as they are

IDS = [[5, 17, 300, 41, 8, 99]]


def logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits


def rounded(weight, *, bits, group):
    """Return scales and values of a matrix rounded symmetrically in groups of a row."""
    rows = weight.reshape(weight.shape[0], -1, group)
    most = 2 ** (bits - 1) - 1
    scale = rows.abs().amax(-1, keepdim=True) / most
    values = (rows / scale).round().clamp(-most - 1, most) * scale
    return scale.squeeze(-1), values.reshape(weight.shape)


def rounded_fp8(weight):
    import torch

    scale = weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return scale, (weight / scale).to(torch.float8_e4m3fn).float() * scale


CASES = {
    "int8 by channel": (8, "int", None),
    "int4 in groups of 16": (4, "int", 16),
    "fp8 by channel": (8, "float", None),
}


@pytest.mark.parametrize("case", CASES)
def test_compressed_tensors_open_with_the_values_that_were_rounded(case, random_model, tmp_path):
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness.models.language_model import open_model
    from harness.models.outside import resolve_outside

    bits, kind, group = CASES[case]
    by_hand = AutoModelForCausalLM.from_pretrained(random_model.path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(random_model.path, dtype=torch.float32)
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    arguments = QuantizationArgs(num_bits=bits, type=kind, symmetric=True, **strategy)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    apply_quantization_config(
        model,
        QuantizationConfig(
            config_groups={"all": scheme}, ignore=["lm_head"], quantization_status="frozen"
        ),
    )
    plain = dict(by_hand.named_modules())
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            weight = plain[name].weight.data
            scale, values = (
                rounded_fp8(weight)
                if kind == "float"
                else rounded(weight, bits=bits, group=group or weight.shape[1])
            )
            module.weight_scale.data = scale.reshape(module.weight_scale.shape)
            plain[name].weight.data = values
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    folder = tmp_path / "packed"
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    AutoTokenizer.from_pretrained(random_model.path).save_pretrained(folder)
    checkpoint = resolve_outside(str(folder), cache=tmp_path)
    assert checkpoint.note == "quantized (compressed-tensors)"
    opened = open_model(checkpoint).model
    assert torch.allclose(logits(opened), logits(by_hand.eval()), atol=1e-5)
    assert not torch.allclose(logits(opened), logits(open_model(random_model).model), atol=1e-5)
    assert checkpoint.bytes_on_disk == (folder / "model.safetensors").stat().st_size


def saved_by_transformers(quantization, plain, folder):
    """Save a model as transformers packs it while it opens it; return the opened one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        plain.path, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    ).eval()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(plain.path).save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_bitsandbytes_opens_as_it_was_saved(kind, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    import torch
    from transformers import BitsAndBytesConfig

    quantization = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
        )
    )
    _opens_as_saved(quantization, "bitsandbytes", tmp_path)


def test_torchao_opens_as_it_was_saved(tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    from transformers import TorchAoConfig

    quantization = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    _opens_as_saved(quantization, "torchao", tmp_path)


def _opens_as_saved(quantization, library, tmp_path):
    import torch

    from harness.models.language_model import open_model
    from harness.models.outside import resolve_outside
    from harness.models.shape import parameters_of_architecture, parameters_on_disk

    plain = resolve_outside("tiny", cache=tmp_path)  # wide enough for blocks of 64
    saved = saved_by_transformers(quantization, plain, tmp_path / "packed")
    checkpoint = resolve_outside(str(tmp_path / "packed"), cache=tmp_path)
    assert checkpoint.note == f"quantized ({library})"
    opened = open_model(checkpoint).model
    assert torch.equal(logits(opened), logits(saved))
    assert not torch.equal(logits(opened), logits(open_model(plain).model))
    # however the numbers are packed, the architecture has as many weights as before
    assert parameters_of_architecture(opened) == parameters_on_disk(plain.path)
