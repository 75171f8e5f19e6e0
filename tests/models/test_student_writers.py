"""Students written block by block have the bytes of students written from memory."""

import gc
import hashlib
import json
import re
import shlex
from itertools import product

import pytest
import torch
from families import saved_family

from harness.errors import CellFailed
from harness.models import blockwise as rules
from harness.models import student_writers
from harness.models.blockwise import open_blockwise
from harness.models.language_model import open_model
from harness.models.student_writers import BlockwiseWriter, WholeWriter
from harness.planning.spec import parse_set
from methods.compression.rounding import packed_layer, round_to_nearest

FAMILIES = (
    "Llama",
    "Llama, biases",
    "Qwen2",
    "Qwen3",
    "Gemma",
    "Gemma 3",
    "Gemma 3n",
    "GPT-2",
    "GPT-NeoX",
    "OPT",
    "Mixtral",
    "Qwen3-MoE",
    "Mamba",
    "Zamba",
)
TEXT = {"num_calibration_samples": 4, "max_seq_length": 48}
ROWS = {
    "int8": {},
    "int8-dynamic": {},
    "int4": {"group_size": 32, "symmetric": False},
    "fake-int4": {"group_size": 32},
    "int4-calibrated": {**TEXT, "group_size": 32},
    "prune-wanda": TEXT,
    "prune-sparsegpt": {**TEXT, "pattern": "2:4"},
    "prune-magnitude": {"ratio": 0.3},
    "lowrank": {**TEXT, "keep": 0.6},
    "lowrank-plain": {"rank": 4},
}


def digests(folder):
    """Return a digest of each file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def opened_blockwise(monkeypatch):
    """Return a list that notes of each opened base whether it was opened block by block."""
    notes, opening = [], open_blockwise

    def note(*positional, **named):
        result = opening(*positional, **named)
        notes.append(result is not None)
        return result

    monkeypatch.setattr(rules, "open_blockwise", note)
    return notes


@pytest.fixture
def both_ways(compress, monkeypatch, opened_blockwise):
    """Return a maker of a student block by block and whole; it checks that both are one."""

    def outcome(name, settings, **more):
        try:
            made, notes = compress(name, settings, rows=12, **more)
            return made, digests(made.path), notes
        except CellFailed as problem:
            return None, str(problem), {}

    def make(name, settings, **more):
        with monkeypatch.context() as patch:
            patch.setattr(rules, "open_blockwise", lambda *_, **__: None)
            whole = outcome(name, settings, **more)
            pasted = re.search(r"--set ('[^']+'|\S+)", whole[1]) if whole[0] is None else None
            if pasted:  # what a refusal gives to paste, such as to leave experts alone
                more_settings = parse_set([shlex.split(pasted[1])[0]])[name]
                settings = {**settings, **more_settings}
                whole = outcome(name, settings, **more)
        parts = outcome(name, settings, **more)
        assert parts[1:] == whole[1:]
        return parts[0]

    return make


@pytest.mark.parametrize(("family", "name"), product(FAMILIES, ROWS))
def test_both_ways_make_one_student(family, name, tmp_path, both_ways, opened_blockwise):
    base = saved_family(family, tmp_path / "base")
    both_ways(name, ROWS[name], base=base)
    assert opened_blockwise == [family not in ("Zamba", "Mamba")] or family == "Mamba"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["int4-calibrated", "prune-wanda", "lowrank"])
def test_both_ways_keep_the_type_of_the_base(name, dtype, tmp_path, both_ways):
    base = saved_family("Qwen2", tmp_path / "base")
    model = open_model(base).model.to(getattr(torch, dtype))
    model.save_pretrained(base.path)
    made = both_ways(name, ROWS[name], base=base)
    assert json.loads((made.path / "config.json").read_text())["dtype"] == dtype


def test_chains_are_one_both_ways(both_ways):
    """A pruned student keeps its zeros, factors are packed as matrices are."""
    pruned = both_ways("prune-wanda", TEXT)
    assert both_ways("int4-calibrated", ROWS["int4-calibrated"], base=pruned)
    assert both_ways("prune-sparsegpt", ROWS["prune-sparsegpt"], base=pruned)
    factors = both_ways("lowrank", ROWS["lowrank"])
    assert both_ways("int4", ROWS["int4"], base=factors)
    assert both_ways("prune-magnitude", {}, base=factors)
    assert both_ways("int8", {"embeddings": "skip", "ignore": ["*.down_proj"]})


def test_several_files_are_split_as_the_libraries_split_them(tmp_path, both_ways, monkeypatch):
    """A limit of 5 GB or 50 GB is far; here it is 20 KB in both ways."""
    import huggingface_hub
    from transformers import LlamaForCausalLM

    base = saved_family("Llama", tmp_path / "base")
    splitting, saving = huggingface_hub.save_torch_state_dict, LlamaForCausalLM.save_pretrained

    def split_small(*positional, **named):
        return splitting(*positional, **{**named, "max_shard_size": "20KB"})

    def save_small(self, *positional, max_shard_size="20KB", **named):
        return saving(self, *positional, max_shard_size=max_shard_size, **named)

    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", split_small)
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_small)
    monkeypatch.setattr(student_writers, "PACKED_SHARD", "20KB")
    for name in ("int8", "prune-magnitude"):
        made = both_ways(name, {}, base=base)
        assert (made.path / "model.safetensors.index.json").is_file()
        assert len(list(made.path.glob("*.safetensors"))) > 2


def writers_of(base, tmp_path):
    """Return both writers of one base."""
    opened, blockwise = open_blockwise(base, device="cpu", dtype="float32")
    yield WholeWriter(open_model(base), torch.float32)
    yield BlockwiseWriter(opened, blockwise, torch.float32, tmp_path)


def test_writers_write_one_student_with_a_change_and_a_packed_layer(tmp_path):
    base = saved_family("Llama", tmp_path / "base")
    floats, packed = [], []
    for number, writer in enumerate(writers_of(base, tmp_path)):
        block = "model.layers.1"
        with torch.no_grad(), writer.changing(block):
            writer.opened.model.get_submodule(block).mlp.up_proj.weight.requires_grad_(False)
            writer.opened.model.get_submodule(block).mlp.up_proj.weight[0] = 0.5
        made = writer.save_floats(tmp_path / f"floats-{number}", name="x", parents=("p",))
        assert made.parents == ("p",)
        floats.append(digests(made.path))
    assert floats[0] == floats[1]
    assert floats[0]["model.safetensors"] != digests(base.path)["model.safetensors"]
    for number, writer in enumerate(writers_of(base, tmp_path)):
        name = "model.layers.0.mlp.up_proj"
        with writer.holding(name):
            matrix = round_to_nearest(writer.opened.model.get_submodule(name).weight, bits=8)
        spec, tensors = packed_layer(name, matrix, None, kind="int8")
        writer.add(name, tensors)
        assert writer.packed_bytes == sum(part.nbytes for part in tensors.values())
        folder = tmp_path / f"packed-{number}"
        folder.mkdir()
        writer.save_packed(folder, {name: spec}, method="x")
        packed.append(digests(folder))
    assert packed[0] == packed[1]


def test_a_number_that_is_not_finite_is_refused_and_nothing_stays_behind(tmp_path):
    base = saved_family("Llama", tmp_path / "base")
    for number, writer in enumerate(writers_of(base, tmp_path / "work")):
        with torch.no_grad(), writer.changing("model.layers.0"):
            weight = writer.opened.model.model.layers[0].mlp.up_proj.weight
            weight.requires_grad_(False)[1, 2] = torch.inf
        said = r"x holds numbers that are not finite: model.layers.0.mlp.up_proj.weight\[1, 2\]"
        with pytest.raises(CellFailed, match=said):
            writer.save_floats(tmp_path / f"student-{number}", name="x", parents=())
        assert not (tmp_path / f"student-{number}").exists()
    del writer
    gc.collect()
    assert not list((tmp_path / "work").iterdir())


def test_a_file_that_differs_from_what_was_written_is_refused(tmp_path, monkeypatch):
    base = saved_family("Llama", tmp_path / "base")
    *_, writer = writers_of(base, tmp_path / "work")
    writing = student_writers.TensorSpool.write_file

    def damage(self, path, names):
        writing(self, path, names)
        content = bytearray(path.read_bytes())
        content[-4:] = b"\x00\x00\x00\x40"  # 2.0
        path.write_bytes(content)

    monkeypatch.setattr(student_writers.TensorSpool, "write_file", damage)
    with pytest.raises(CellFailed, match="holds other numbers when the saved student is opened"):
        writer.save_floats(tmp_path / "student", name="x", parents=())
    assert not (tmp_path / "student").exists()
