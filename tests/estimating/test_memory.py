"""Peaks by formula against counts of fake tensors: whole steps of a 7B and a 1.5B model."""

from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
from counted_memory import (
    QWEN_1_5B,
    QWEN_7B,
    ROWS,
    LiveBytes,
    counted,
    hidden_states,
    model_of,
    opened,
)

from harness import catalog
from harness.estimating.estimate import student_stages
from harness.estimating.hardware import GIB, parse_hardware
from harness.estimating.memory import (
    PROCESS_BYTES,
    Peak,
    adapter_weights,
    available_memory,
    bytes_text,
    compression_parts,
    peak_text,
    reading_parts,
    rows_written_at_once,
    scoring_parts,
    timing_parts,
)
from harness.estimating.recipes import RecipesThatFit
from harness.estimating.workload import EstimateRequest, Packed, packed_as, workload_of
from harness.models.language_model import open_model
from harness.models.logit_tail import LogitTail
from harness.models.shape import Shape
from harness.scoring.backend import TopK
from harness.scoring.prefix_sharing import (
    DecodingSlots,
    KeyValues,
    TokenTree,
    forward_step,
    forward_tree,
    shared_attention,
)
from methods.training.chunked_logits import ChunkedLoss, positions_of_a_part
from methods.training.divergences import distribution_kl
from methods.training.losses import cross_entropy
from methods.training.optimizer import make_optimizers
from methods.training.positions import Distribution
from methods.training.settings import LoopSettings

TEACHER, STUDENT = Shape.of_config(QWEN_7B, name="7B"), Shape.of_config(QWEN_1_5B, name="1.5B")
H100 = parse_hardware("1xH100", [])
REQUEST = EstimateRequest(
    teacher=TEACHER,
    student=STUDENT,
    chain=(),
    budget=1_000_000,
    rows=2_000,
    items={"gsm8k": 1_319, "mmlu": 14_042},
    grid="128,512,2048x1,8,32x128",
)


def assert_near(planned, counted_bytes):
    """The plan is within 1.25 times of the count, on either side."""
    ratio = planned / counted_bytes
    assert 1 / 1.25 <= ratio <= 1.25, f"{planned / GIB:.2f} GiB / {counted_bytes / GIB:.2f} GiB"


def loop_settings(**changes):
    return LoopSettings(
        **{
            "learning_rate": 1e-4,
            "batch_size": 16,
            "micro_batch_size": 16,
            "warmup_ratio": 0.05,
            "weight_decay": 0.01,
            "max_grad_norm": 1.0,
            "validation_rows": 200,
            **changes,
        }
    )


def step_peak(config, *, recipe, hardware, rank=16, teacher=None):
    """Count two optimizer steps of `response`: the second has the states of the first."""
    mixed = hardware == "cuda" and recipe != "bf16"

    def autocast():
        return torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()

    if recipe == "bf16":
        from torchao.optim import subclass_8bit

        # torchao computes its tables once, and reads them: that needs numbers
        subclass_8bit.get_qmap_signed()
        subclass_8bit.get_qmap_unsigned()
    with counted() as count:
        dtype = torch.bfloat16 if recipe == "bf16" else torch.float32
        model = model_of(config, dtype).train()
        if recipe == "lora":
            add_adapters(model, rank)
        beside = teacher and model_of(teacher, torch.bfloat16).eval().requires_grad_(False)
        optimizer = "adamw-8bit" if recipe == "bf16" else "adamw"
        [scaled] = make_optimizers(model, loop_settings(optimizer=optimizer))
        head = model.get_output_embeddings()
        vocabulary = head.weight.shape[0]
        chunked = ChunkedLoss(head, LogitTail(), positions_of_a_part(vocabulary), None, autocast)
        for _ in range(2):
            one_step(model, beside, chunked, autocast)
            trained = [weight for weight in model.parameters() if weight.requires_grad]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            scaled.optimizer.step()
            scaled.optimizer.zero_grad()
    return count.peak


def one_step(model, beside, chunked, autocast):
    """Compute the loss of `response` and its gradient, as the stepper does for one micro-batch."""
    if beside is not None:
        with torch.no_grad():
            teacher_NH = hidden_states(beside)
    with autocast():
        hidden_NH = hidden_states(model)
    labels_N = torch.zeros(len(hidden_NH), dtype=torch.long)
    ids_NK = torch.zeros((len(hidden_NH), 64), dtype=torch.long)
    top = TopK(ids_NK, torch.zeros((len(hidden_NH), 64)))

    def loss(part, logits_CV):
        if beside is not None:
            with torch.no_grad():
                wide = beside.get_output_embeddings()(teacher_NH[part])
            distribution = Distribution(wide[:, : logits_CV.shape[1]])
        else:
            distribution = Distribution(None, top).part(part)
        return {
            "forward-kl": distribution_kl(logits_CV, distribution, 2.0).sum(),
            "ce": cross_entropy(logits_CV, labels_N[part]).sum(),
        }

    chunked.backward(hidden_NH, loss, {"forward-kl": 0.5, "ce": 0.5})


def add_adapters(model, rank):
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    # they are made where they belong, and fake parameters cannot be moved
    with mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
        inject_adapter_in_model(LoraConfig(r=rank, target_modules="all-linear"), model)
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name)


def planned_training(shape, method, settings, hardware=H100):
    """Return the peak of a training by the plan, without what the process holds by itself."""
    built = catalog.methods().build(method, settings)
    stage = student_stages(method, workload_of(built), shape, REQUEST, hardware)[-1]
    [peak] = stage.peaks
    return stage.memory_as_set - peak.parts["process"]


def packed_step_peak(student):
    """Count two steps of `response` with adapters beside packed weights, in real tensors."""
    from methods.training.lora import add_adapters

    model = open_model(student).model.train()
    add_adapters(model, rank=16, alpha=32, seed=1, label="x")
    weights = sum(weight.nbytes for weight in model.state_dict().values())
    [scaled] = make_optimizers(model, loop_settings())
    head = model.get_output_embeddings()
    chunked = ChunkedLoss(
        head, LogitTail(), positions_of_a_part(model.config.vocab_size), None, nullcontext
    )
    with LiveBytes() as count:
        for _ in range(2):
            one_step(model, None, chunked, nullcontext)
            scaled.optimizer.step()
            scaled.optimizer.zero_grad()
    return weights + count.peak


@pytest.mark.slow
def test_adapters_beside_packed_weights_hold_what_the_plan_says(compress):
    pytest.importorskip("peft")
    student, _ = compress("int4")
    shape = Shape.of_folder(student.path)
    request = replace(REQUEST, teacher=shape, student=shape)
    trained = ("response", catalog.methods().build("response", {"recipe": "lora"}))
    from_folder = RecipesThatFit(
        request, parse_hardware("cpu", []), student_packed=packed_as(student.path)
    )
    planned = from_folder.fit([trained]).needed - PROCESS_BYTES["cpu"]
    assert_near(planned, packed_step_peak(student))
    # the same, where a stage of the chain packs it
    chain = [("int4", catalog.methods().build("int4", {})), trained]
    behind = RecipesThatFit(request, parse_hardware("cpu", [])).fit(chain).needed
    assert behind - PROCESS_BYTES["cpu"] == pytest.approx(planned, rel=0.02)


def test_a_copy_of_a_state_has_frozen_weights_too():
    full, lora = (
        student_stages(
            "response",
            workload_of(catalog.methods().build("response", {"recipe": recipe})),
            STUDENT,
            REQUEST,
            H100,
        )[-1].state_copy
        for recipe in ("full", "lora")
    )
    assert full == 12 * STUDENT.parameters
    assert lora == 4 * STUDENT.parameters + 12 * adapter_weights(STUDENT, 16)
    on_cpu = parse_hardware("cpu", [])
    built = workload_of(catalog.methods().build("response", {"recipe": "full"}))
    assert student_stages("response", built, STUDENT, REQUEST, on_cpu)[-1].state_copy == 0


CUT_7B = {**QWEN_7B, "num_hidden_layers": 21}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "recipe"),
    [(QWEN_1_5B, "full"), (QWEN_1_5B, "bf16"), (QWEN_1_5B, "lora"), (CUT_7B, "bf16")],
    ids=["1.5B full", "1.5B bf16", "1.5B lora", "5.9B bf16"],
)
def test_a_training_step_holds_what_the_plan_says(config, recipe):
    pytest.importorskip({"bf16": "torchao", "lora": "peft"}.get(recipe, "torch"))
    planned = planned_training(Shape.of_config(config, name=""), "response", {"recipe": recipe})
    assert_near(planned, step_peak(config, recipe=recipe, hardware="cuda"))


@pytest.mark.slow
def test_on_a_cpu_every_value_has_four_bytes():
    small = {**QWEN_1_5B, "num_hidden_layers": 4, "vocab_size": 4096}
    planned = planned_training(
        Shape.of_config(small, name=""), "response", {"recipe": "full"}, parse_hardware("cpu", [])
    )
    assert_near(planned, step_peak(small, recipe="full", hardware="cpu"))


@pytest.mark.slow
def test_a_live_teacher_stands_beside_its_student():
    planned = planned_training(STUDENT, "response", {"recipe": "full", "cache": "off"})
    counted_bytes = step_peak(QWEN_1_5B, recipe="full", hardware="cuda", teacher=QWEN_7B)
    assert_near(planned, counted_bytes)
    assert planned > planned_training(STUDENT, "response", {"recipe": "full"}) + 15e9


@pytest.mark.slow
def test_a_teacher_that_reads_rows_holds_its_weights_and_the_logits_of_a_batch():
    with counted() as count, torch.inference_mode():
        teacher = model_of(QWEN_7B, torch.bfloat16).eval()
        states = hidden_states(teacher, rows=1)
        logits = teacher.get_output_embeddings()(states)
        torch.log_softmax(logits.float(), dim=-1).topk(64)
    assert_near(sum(reading_parts(TEACHER, 380, 2).values()), count.peak)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "shape"), [(QWEN_7B, TEACHER), (QWEN_1_5B, STUDENT)], ids=["7B", "1.5B"]
)
def test_scoring_holds_a_pack_and_decoding_the_cache_of_its_rows(config, shape):
    parts = scoring_parts(shape, REQUEST, H100)
    tokens = 250 + 512  # of gsm8k: the longest question, and what may be written
    rows = rows_written_at_once(shape, 1_319, tokens, H100)
    assert rows * shape.kv_bytes(batch=1, tokens=tokens, item=2) <= 0.4 * available_memory(H100)
    with counted() as count, torch.inference_mode():
        model = model_of(config, torch.bfloat16).eval()
        scored = opened(model)
        with shared_attention(scored):
            decode(scored, rows, tokens, prompt=700)
            peak_of_decoding = count.peak
            count.peak = count.live
            tree = TokenTree.unmerged([[0] * 128] * 32)
            logits, _ = forward_tree(scored, tree, KeyValues(), [path[-1] for path in tree.paths])
            torch.logsumexp(logits.float(), dim=-1)
    assert_near(sum(parts.values()), max(peak_of_decoding, count.peak))


class FullSlots(DecodingSlots):
    """Slots whose rows are as long as they can become, without asking the device how long."""

    def prepare(self):
        self._width = self.capacity
        rows = len(self.lengths)
        keys = next(iter(self.layers.values()))[0]
        self._mask = keys.new_zeros((rows, 1, 1, self._width))


def decode(scored, rows, tokens, *, prompt):
    """Make one step of `rows` rows after a common prompt, with room for `tokens` of each."""
    config = scored.model.config
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    weights = scored.model.dtype

    def layer(rows, length):
        return tuple(torch.zeros((rows, heads, length, size), dtype=weights) for _ in "kv")

    layers = range(config.num_hidden_layers)
    prefix = KeyValues({index: layer(1, prompt) for index in layers})
    lengths = torch.zeros(rows, dtype=torch.long)
    slots = FullSlots(
        prefix, rows, tokens, lengths, {index: layer(rows, tokens) for index in layers}
    )
    logits = forward_step(scored, [0] * rows, slots)
    logits.argmax(dim=-1)


def test_adapters_have_as_many_weights_as_peft_gives_them():
    config = {**QWEN_1_5B, "num_hidden_layers": 2, "vocab_size": 64}
    with counted():
        model = model_of(config, torch.float32)
        add_adapters(model, 16)
        weights = sum(weight.numel() for name, weight in model.named_parameters() if "lora" in name)
    assert adapter_weights(Shape.of_config(config, name=""), 16) == weights


def test_a_timing_holds_both_models_and_both_processes():
    parts = timing_parts(STUDENT, TEACHER, REQUEST, H100)
    assert parts["weights"] == 2 * (STUDENT.parameters + TEACHER.parameters)
    largest = [shape.kv_bytes(batch=32, tokens=2048 + 128, item=2) for shape in (STUDENT, TEACHER)]
    assert parts["keys and values"] == sum(largest)
    packed = timing_parts(STUDENT, TEACHER, REQUEST, H100, Packed(4.25, None))
    assert parts["weights"] - packed["weights"] == pytest.approx(STUDENT.body * (2 - 4.25 / 8))
    with_table = timing_parts(STUDENT, TEACHER, REQUEST, H100, Packed(4.25, 8.0))
    assert packed["weights"] - with_table["weights"] == STUDENT.embedding


def test_a_quantized_cache_holds_codes_where_it_is_timed_and_floats_where_it_is_scored():
    row = catalog.methods().build("kv-int4", {}).resulting_shape(STUDENT)
    full, coded = (timing_parts(shape, TEACHER, REQUEST, H100) for shape in (STUDENT, row))
    # of a head of 128 channels: 64 bytes of codes, four scales and offsets of 2, in place of 256
    floats = STUDENT.kv_bytes(batch=32, tokens=2048 + 128, item=2)
    assert STUDENT.head_size == 128 and row.kv_bytes(batch=1, tokens=1, item=2) * 256 == (
        STUDENT.kv_bytes(batch=1, tokens=1, item=2) * (64 + 4 * 4)
    )
    assert full["keys and values"] - coded["keys and values"] == floats * (1 - 80 / 256)
    # one layer of floats at a time
    assert coded["activations"] - full["activations"] == floats / STUDENT.layers
    assert scoring_parts(row, REQUEST, H100) == scoring_parts(STUDENT, REQUEST, H100)


def test_a_method_that_works_by_block_holds_no_other_blocks():
    workload = workload_of(catalog.methods().build("int4-calibrated", {}))
    whole = compression_parts(replace(workload, by_block=False), TEACHER, 2)
    blocks = compression_parts(replace(workload, by_block=True), TEACHER, 2)
    assert whole["weights"] == 2 * TEACHER.parameters
    assert whole["codes"] == pytest.approx(TEACHER.body * workload.bits / 8)
    assert blocks["weights"] == 4 * TEACHER.embedding  # two tables of two bytes
    assert blocks["blocks"] == pytest.approx(3 * 2 * TEACHER.body / 28)
    assert blocks["states"] == whole["states"] == 2 * 128 * 256 * 3584 * 2


def test_parts_of_the_recipes_are_their_bytes_a_weight():
    def states(recipe):
        built = catalog.methods().build("response", {"recipe": recipe})
        [peak] = student_stages("response", workload_of(built), STUDENT, REQUEST, H100)[-1].peaks
        return {name: size / STUDENT.parameters for name, size in peak.parts.items()}

    full, bf16, lora = map(states, ("full", "bf16", "lora"))
    assert (full["weights"], full["gradients"], full["optimizer"]) == (4, 4, 8)
    assert full["bf16 copies"] == pytest.approx(2 * STUDENT.body / STUDENT.parameters)
    assert (bf16["weights"], bf16["gradients"]) == (2, 2) and "bf16 copies" not in bf16
    assert bf16["optimizer"] == pytest.approx(2.03, abs=0.01)
    assert 4 < lora["weights"] < 4.1 and lora["optimizer"] < 0.2


def test_a_peak_names_its_parts_and_leaves_out_the_smallest():
    built = catalog.methods().build("response", {"recipe": "full"})
    workload = replace(workload_of(built), recomputes=True)
    [less] = student_stages("response", workload, STUDENT, REQUEST, H100)[-1].peaks
    [peak] = student_stages("response", workload_of(built), STUDENT, REQUEST, H100)[-1].peaks
    assert less.parts["activations"] < peak.parts["activations"] / 8
    text = peak_text(peak)
    assert text.startswith(f"train: response {peak.total / GIB:.1f} GiB (weights 5.8 GiB, ")
    assert "activations" in text and "process" in text
    assert "logits" not in peak_text(Peak("train", {"weights": 100.0 * GIB, "logits": 0.5 * GIB}))
    assert bytes_text(3 * 2**20) == "3 MiB"
    assert REQUEST.micro_batch_size == ROWS
