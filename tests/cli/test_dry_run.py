"""What a plan prints: the card, and of each row the recipe and the peak of each piece of work."""

import json
import re

import pytest
from counted_memory import QWEN_1_5B, QWEN_7B

from harness.api import plan_run
from harness.cli.dry_run import plan_lines
from harness.machine.gpu import Gpu
from harness.planning.config import build_config

GIB = 2**30
H100 = Gpu(name="NVIDIA H100 80GB HBM3", driver="580.1", cuda="13.0", capability="9.0")
T4 = Gpu(name="Tesla T4", driver="535.1", cuda="12.8", capability="7.5")
METHODS = "cot,response,response+int4,int8,int4,prune-depth+response"


def tensors_of(config):
    """Yield name and shape of each weight of a Qwen2 model."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", keys), ("v", keys)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{prefix}.self_attn.{name}_proj.bias", (rows,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        for name in ("gate", "up"):
            yield f"{prefix}.mlp.{name}_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (hidden,)


def write_model(folder, config):
    """Write a model of a configuration whose weights are a hole in the file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    entries, end = {}, 0
    for name, shape in tensors_of(config):
        size = 2
        for width in shape:
            size *= width
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return folder


@pytest.fixture
def dry_run(tmp_path, monkeypatch):
    """Plan the 7B and 1.5B command on a card, and return the lines of its dry run."""
    from harness.contract import Checkpoint

    def describe(folder, *, name, **_):
        return Checkpoint(path=folder, name=name, digest=f"digest of {name}", bytes_on_disk=1)

    teacher = write_model(tmp_path / "Qwen2.5-7B", QWEN_7B)
    student = write_model(tmp_path / "Qwen2.5-1.5B", QWEN_1_5B)
    monkeypatch.setattr("harness.models.resolve.describe", describe)
    monkeypatch.setattr("harness.machine.gpu._first_gpu", lambda: card["gpu"])
    monkeypatch.setattr("harness.api.choose_device", lambda requested, say: "cuda")
    monkeypatch.setattr(
        "harness.estimating.hardware.device_bytes", lambda device: card["gibibytes"] * GIB
    )
    monkeypatch.setattr("harness.planning.recipes.find_spec", lambda package: package)
    card = {}

    def lines(gpu, gibibytes, methods=METHODS, **settings):
        card.update(gpu=gpu, gibibytes=gibibytes)
        config = {
            "teacher": [str(teacher)],
            "student": str(student),
            "methods": methods,
            "suite": "math,knowledge",
            "out": tmp_path / "runs",
            **settings,
        }
        return [*plan_lines(plan_run(build_config(config), say=lambda line: None))]

    return lines


def rows_of(lines):
    """Return the line of each row by its label, and the lines of its peaks."""
    rows, label = {}, ""
    for line in lines:
        if line.startswith("      "):
            rows[label][1].append(line.strip())
        elif line.startswith("  "):
            label = line.strip().partition(": ")[0]
            rows[label] = (line, [])
    return rows


def test_the_7b_and_1_5b_command_fits_one_h100(dry_run):
    lines = dry_run(H100, 79.2)
    assert "cuda (NVIDIA H100 80GB HBM3, 79.2 GiB), bfloat16" in lines[0]
    rows = rows_of(lines)
    assert {"teacher", "cot seed 1", "response seed 1", "int8", "int4"} <= set(rows)
    for label, (line, peaks) in rows.items():
        peak = float(re.search(r"peak ([\d.]+) GiB of 79\.2 GiB", line)[1])
        assert peak < 0.92 * 79.2 and "DOES NOT FIT" not in line, line
        largest = max(float(re.search(r" ([\d.]+) GiB \(", text)[1]) for text in peaks)
        assert largest == peak, label
    assert "recipe full; peak" in rows["response seed 1"][0]
    deep = rows["prune-depth+response[recipe=bf16] seed 1"]
    assert re.search(r"recipe bf16: full needs 1\d\d\.\d GiB of 79\.2; peak", deep[0])
    assert [peak.partition(" ")[0] for peak in deep[1]][-2:] == ["scoring", "timing"]
    assert any(peak.startswith("train: response ") and "gradients" in peak for peak in deep[1])
    assert any(peak.startswith("compress: prune-depth") for peak in deep[1])
    assert any(peak.startswith("teacher writes") for peak in rows["cot seed 1"][1])
    assert any(peak.startswith("teacher reads") for peak in rows["response seed 1"][1])
    assert "not measured on this card" in lines[-1] and re.search(r"about \d+ min to", lines[-1])


def test_a_chains_companions_train_by_its_recipe(dry_run):
    rows = rows_of(dry_run(H100, 79.2))
    assert "prune-depth+sft[recipe=bf16] seed 1 (control)" in rows


def test_on_a_small_card_the_student_trains_by_less_and_the_row_says_why(dry_run):
    row, _ = rows_of(dry_run(H100, 39.4, "response", controls=False))[
        "response[recipe=bf16] seed 1"
    ]
    assert re.search(r"recipe bf16: full needs 4\d\.\d GiB of 39\.4", row)


def test_what_fits_no_recipe_is_refused_with_a_card_and_a_student_that_do(dry_run):
    from harness.errors import HarnessError

    with pytest.raises(
        HarnessError,
        match=r"^response fits no recipe here: response\[recipe=\w+\], the smallest, needs "
        r"[\d.]+ GiB, and NVIDIA H100 80GB HBM3 has 6\.0 GiB; give a card such as \w+ "
        r"\(\d+ GiB\) or a --student of at most [\d.]+ billion parameters \(such as this one "
        r"with \d+ of its 28 blocks\)$",
    ):
        dry_run(H100, 6.0, "response")


def test_a_card_without_bf16_computes_in_float32_and_refuses_bf16(dry_run):
    from harness.errors import HarnessError

    with pytest.raises(HarnessError, match=r"^--dtype bfloat16: Tesla T4 \(capability 7\.5\)"):
        dry_run(T4, 14.6, "response", dtype="bfloat16")
    with pytest.raises(HarnessError, match=r"response\[recipe=bf16\]: Tesla T4 has no bf16"):
        dry_run(T4, 14.6, "response[recipe=bf16]")
    lines = dry_run(T4, 14.6, "int8", controls=False)
    assert "cuda (Tesla T4, 14.6 GiB), float32" in lines[0]


def test_two_suites_train_on_the_tasks_that_have_a_split(dry_run, folder):
    lines = dry_run(H100, 79.2, "response", data_dir=folder, controls=False)
    [said] = [line for line in lines if line.startswith("rows train on gsm8k, not on all tasks")]
    assert "mmlu: " in said
    untrained = dry_run(H100, 79.2, "int8", data_dir=folder, controls=False)
    assert not any(line.startswith("rows train on") for line in untrained)
