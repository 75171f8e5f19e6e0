"""In short floats a model may share where float32 agrees and rounding is no worse than its own."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import random_family

from harness.models.language_model import LanguageModel, open_model
from harness.models.resolve import EMBEDDED, resolve
from harness.scoring import admission, prefix_sharing, rounding
from harness.scoring.admission import shared_path_refusal
from harness.scoring.rounding import (
    MAX_DEVIATION_RATIO,
    in_float32,
    own_attention_logits,
    own_log_probabilities,
    rms_deviation,
)

FAMILIES = ("Llama", "Qwen3", "Gemma", "GPT-NeoX", "OPT", "Granite", "Mixtral", "DeepSeek-V3")


@pytest.fixture(scope="module")
def family(embedded):
    """Return a maker of random models in bf16 with the embedded tokenizer.

    A larger `spread` of the weights gives larger logits, which round more.
    """

    def make(name, *, spread=0.2, dtype=torch.bfloat16):
        return LanguageModel(
            random_family(name, spread=spread).to(dtype),
            embedded.tokenizer,
            "cpu",
            embedded.checkpoint,
        )

    return make


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_short_floats_share_where_float32_does(name, dtype, family):
    assert (
        shared_path_refusal(family(name, dtype=dtype))
        == shared_path_refusal(family(name, dtype=torch.float32))
        == ""
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_right_path_rounds_as_the_own_attention_does(name, family, monkeypatch):
    # rounding alone decides
    monkeypatch.setattr(admission, "_TOLERANCE", {"float32": 2e-3, "bfloat16": 0.0, "float16": 0.0})
    assert shared_path_refusal(family(name)) == ""


def _scaled(factor):
    def plant(monkeypatch):
        original = prefix_sharing._attend_by_memory
        monkeypatch.setattr(
            prefix_sharing,
            "_attend_by_memory",
            lambda *arguments, scaling=None, **named: original(
                *arguments, scaling=factor * scaling, **named
            ),
        )

    return plant


def _leaks_in_the_tree(monkeypatch):
    """The first token of the second branch sees the last of the first."""
    original = prefix_sharing.TokenTree.visible

    def visible(tree, device="cpu"):
        mask = original(tree, device)
        if mask is not None:
            branch = next(index for index, parent in enumerate(tree.parents) if parent != index - 1)
            mask[branch, branch - 1] = True
        return mask

    monkeypatch.setattr(prefix_sharing.TokenTree, "visible", visible)


def _leaks_in_slots(monkeypatch):
    """Rows see one column more than they have: zeros, or what an earlier row left in the slot."""
    original = prefix_sharing.DecodingSlots.prepare

    def prepare(slots):
        original(slots)
        slots._mask = torch.cat(
            [torch.zeros_like(slots._mask[..., :1]), slots._mask[..., :-1]], dim=-1
        )

    monkeypatch.setattr(prefix_sharing.DecodingSlots, "prepare", prepare)


def _keys_of_another_row(monkeypatch):
    original = prefix_sharing.DecodingSlots.admit

    def admit(slots, computed, spans):
        original(slots, computed, spans)
        slots.layers = {
            layer: (keys.roll(1, 0), values.roll(1, 0))
            for layer, (keys, values) in slots.layers.items()
        }

    monkeypatch.setattr(prefix_sharing.DecodingSlots, "admit", admit)


def _keys_of_the_row_that_left(monkeypatch):
    """The last row is not copied into the hole."""
    original = prefix_sharing.DecodingSlots.retire

    def retire(slots, ended):
        unmoved_layers = {
            layer: (keys.clone(), values.clone()) for layer, (keys, values) in slots.layers.items()
        }
        order = original(slots, ended)
        slots.layers = unmoved_layers
        return order

    monkeypatch.setattr(prefix_sharing.DecodingSlots, "retire", retire)


def _positions_off_by_one(memory):
    def plant(monkeypatch, opened):
        original = opened.model.forward

        def forward(*arguments, **named):
            if isinstance(named.get("memory"), memory):
                named["position_ids"] = named["position_ids"] + 1
            return original(*arguments, **named)

        monkeypatch.setattr(opened.model, "forward", forward)

    return plant


FAULTS = {
    "scaling 10 % more": _scaled(1.1),
    "scaling 10 % less": _scaled(0.9),
    "a leak in the tree": _leaks_in_the_tree,
    "a leak in slots": _leaks_in_slots,
    "keys of another row": _keys_of_another_row,
    "keys of a row that left": _keys_of_the_row_that_left,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ("Llama", "Qwen3", "GPT-NeoX", "OPT", "tiny"))
def test_a_wrong_path_is_refused_in_bf16(name, fault, family, monkeypatch):
    opened = (
        open_model(resolve("tiny", cache=Path("unused")), dtype="bfloat16")
        if name == "tiny"
        else family(name)
    )
    assert shared_path_refusal(opened) == ""
    FAULTS[fault](monkeypatch)
    assert "in float32" in shared_path_refusal(opened)


@pytest.mark.parametrize("name", ("Llama", "Qwen3", "GPT-NeoX"))
def test_positions_of_steps_that_are_off_by_one_are_refused_in_bf16(name, family, monkeypatch):
    opened = family(name)
    _positions_off_by_one(prefix_sharing.DecodingSlots)(monkeypatch, opened)
    assert "in float32" in shared_path_refusal(opened)


def test_a_path_that_rounds_wider_than_the_own_attention_is_refused(family, monkeypatch):
    opened = family("Llama", spread=0.3)
    original = prefix_sharing._attend_by_memory

    def coarse(module, query, key, value, *arguments, **named):
        # a softmax in few bits, as a careless kernel has it: right in float32
        if query.dtype != torch.float32:
            key, value = (
                key.to(torch.float8_e4m3fn).to(key.dtype),
                value.to(torch.float8_e4m3fn).to(value.dtype),
            )
        return original(module, query, key, value, *arguments, **named)

    monkeypatch.setattr(prefix_sharing, "_attend_by_memory", coarse)
    monkeypatch.setattr(admission, "_TOLERANCE", {"float32": 2e-3, "bfloat16": 0.1})
    assert "its own attention by" in shared_path_refusal(opened)


def test_without_room_for_float32_the_fixed_gap_decides(family, monkeypatch):
    opened = family("Llama")
    monkeypatch.setattr(rounding, "free_bytes", lambda device: 1000)
    assert shared_path_refusal(opened) == ""
    _scaled(2.0)(monkeypatch)
    monkeypatch.setattr(admission, "_TOLERANCE", {"bfloat16": 0.01})
    assert "cannot be computed in float32" in shared_path_refusal(opened)


@pytest.mark.parametrize("name", ("Llama, biases", "GPT-2", "Mixtral"))
def test_in_float32_the_same_weights_compute_and_come_back_untouched(name, family):
    opened = family(name)
    parameters = dict(opened.model.named_parameters(remove_duplicate=False))
    text = [list(range(5, 29))]
    with in_float32(opened) as exact:
        assert exact.dtype == "float32"
        log_p = own_log_probabilities(exact, text)
        # ties are kept
        assert len({id(parameter) for parameter in opened.model.parameters()}) == len(
            {id(parameter) for parameter in parameters.values()}
        )
    expected = own_log_probabilities(
        replace(opened, model=copy.deepcopy(opened.model).float()), text
    )
    assert torch.equal(log_p, expected)
    restored = dict(opened.model.named_parameters(remove_duplicate=False))
    assert (
        all(restored[key] is parameters[key] for key in parameters) and opened.dtype == "bfloat16"
    )


def test_the_own_attention_is_computed_in_seven_ways_that_agree_in_float32(family):
    opened = family("Llama", dtype=torch.float32)
    texts = [list(range(5, 29)), [*range(5, 21), *range(30, 38)]]
    expected = own_log_probabilities(opened, texts)
    log_ps = [torch.log_softmax(logits, -1) for logits in own_attention_logits(opened, texts)]
    assert len(log_ps) == 7 and all(
        torch.allclose(log_p, expected[:, 12:], atol=1e-4) for log_p in log_ps
    )


def test_a_deviation_by_hand():
    exact = torch.log_softmax(torch.tensor([[0.0, 0.0, -20.0]]), -1)
    moved = torch.tensor([[0.3, -0.3, 5.0 - 20.0]])  # the tail does not count
    gaps = torch.log_softmax(moved, -1)[0, :2] - exact[0, :2]
    assert rms_deviation(moved, exact) == pytest.approx(float(gaps.square().mean().sqrt()))
    assert MAX_DEVIATION_RATIO == 1.5 and (EMBEDDED / "tiny").is_dir()


def test_under_mixed_precision_float32_is_the_model_without_it(embedded):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        mixed = replace(
            embedded,
            model=Accelerator(cpu=True, mixed_precision="bf16").prepare(
                copy.deepcopy(embedded.model)
            ),
            autocast="bfloat16",
        )
        text = [list(range(5, 29))]
        wrapped = mixed.model.forward
        with in_float32(mixed) as exact:
            assert torch.equal(
                own_log_probabilities(exact, text), own_log_probabilities(embedded, text)
            )
        assert mixed.model.forward == wrapped
        assert not torch.equal(
            own_log_probabilities(mixed, text), own_log_probabilities(embedded, text)
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
