"""GGUF files of many kinds, written here: to which floats they are unpacked, that this is said, and
that the numbers are gguf's own.
"""

import pytest
import torch
from gguf_files import exact, write_llama
from safetensors.torch import load_file

from harness.errors import HarnessError
from harness.models.language_model import open_model, stored_dtype
from harness.models.resolve import EMBEDDED, resolve

pytest.importorskip("gguf", reason="opening GGUF files needs the gguf package")

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
    "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
    "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
    "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
}
KEPT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.float32}
ROUNDED = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
)


def unpacked(kinds, folder):
    stored = write_llama(folder / "small.gguf", kinds, EMBEDDED / "tiny")
    checkpoint = resolve(str(folder / "small.gguf"), cache=folder / "cache")
    return checkpoint, stored, load_file(checkpoint.path / "model.safetensors")


def numbers(held, name):
    return torch.from_numpy(exact(*held[name]).copy())


@pytest.mark.parametrize("kind", KEPT)
def test_kinds_of_many_bits_are_kept_to_the_last(kind, tmp_path):
    checkpoint, stored, tensors = unpacked({"": kind}, tmp_path)
    for theirs, ours in NAMES.items():
        assert torch.equal(tensors[ours].float(), numbers(stored, theirs)), theirs
    dtype = str(stored_dtype(checkpoint)).removeprefix("torch.")
    assert checkpoint.note == f"unpacked from GGUF {kind}, kept in {dtype}"
    assert stored_dtype(checkpoint) is KEPT[kind]


@pytest.mark.parametrize("kind", ROUNDED)
def test_kinds_of_few_bits_are_rounded_to_bf16_and_no_further(kind, tmp_path):
    checkpoint, stored, tensors = unpacked({"": kind}, tmp_path)
    assert (
        checkpoint.note == f"unpacked from GGUF {kind}, rounded to bfloat16"
        and stored_dtype(checkpoint) is torch.bfloat16
    )
    for theirs, ours in NAMES.items():
        assert torch.equal(tensors[ours], numbers(stored, theirs).to(torch.bfloat16)), theirs
    # so that the note is true
    assert any(
        not torch.equal(tensors[NAMES[name]].float(), numbers(stored, name)) for name in NAMES
    )


@pytest.mark.parametrize(
    ("kinds", "note"),
    [
        ({"": "Q4_0", "output.weight": "Q8_0"}, "Q4_0, rounded to bfloat16"),
        # the one matrix of few bits is kept too
        ({"": "F16", "output.weight": "Q4_0"}, "F16, kept in float32"),
        (
            {"": "Q4_K", "output.weight": "Q6_K", "blk.0.ffn_down.weight": "Q6_K"},
            "Q4_K, rounded to bfloat16",
        ),
    ],
)
def test_a_mixture_is_named_by_its_commonest_kind_and_the_note_holds_for_all_of_it(
    kinds, note, tmp_path
):
    checkpoint, stored, tensors = unpacked(kinds, tmp_path)
    assert checkpoint.note == f"unpacked from GGUF {note}"
    dtype = stored_dtype(checkpoint)
    for theirs, ours in NAMES.items():
        assert torch.equal(tensors[ours], numbers(stored, theirs).to(dtype)), theirs


@pytest.mark.parametrize("kind", ["F16", "Q4_1", "Q6_K"])
def test_it_is_unpacked_once_says_the_same_again_and_runs(kind, tmp_path):
    first, _, _ = unpacked({"": kind}, tmp_path)
    stamp = (first.path / "model.safetensors").stat().st_mtime_ns
    again = resolve(str(tmp_path / "small.gguf"), cache=tmp_path / "cache")
    assert again == first and (first.path / "model.safetensors").stat().st_mtime_ns == stamp
    opened = open_model(first)
    logits = opened.model(input_ids=torch.tensor([opened.encode("2 + 3 = 5")])).logits
    assert (
        bool(torch.isfinite(logits).all())
        and opened.tokenizer.decode(opened.encode("2 + 3 = 5")) == "2 + 3 = 5"
    )
    assert opened.dtype == "float32"


def test_a_file_that_is_torn_or_none_is_a_line(tmp_path):
    write_llama(tmp_path / "whole.gguf", {"": "Q8_0"}, EMBEDDED / "tiny")
    whole = (tmp_path / "whole.gguf").read_bytes()
    for name, content in (
        ("torn", whole[: len(whole) // 2]),
        ("empty", b""),
        ("text", b"no model\n" * 99),
    ):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(
            HarnessError, match=f"{name}.gguf (cannot be read as a|is no) GGUF file"
        ):
            resolve(str(tmp_path / f"{name}.gguf"), cache=tmp_path / "cache")
