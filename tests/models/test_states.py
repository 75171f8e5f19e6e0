"""Caches of every family, whatever they are called and whatever their layers keep; timing of models
that keep states, or nothing.
"""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from families import BLOCKS, FAMILIES, random_family, saved_family

from harness.errors import HarnessError
from harness.estimating.estimate import _decoding
from harness.estimating.hardware import parse_hardware
from harness.measuring.measure import TimedModel, TimingSettings, measure
from harness.measuring.scenario import parse_grid
from harness.measuring.worker import cache_bytes, generate_greedily, token_times
from harness.models.shape import Shape, forward_flops_per_token
from harness.models.states import cache_arguments, cache_tensors, forward_arguments
from harness.records.columns import DISK

ROWS, READ, NEW = 2, 20, 5
HELD = READ + NEW - 1  # the last token is never fed
KV = 2 * ROWS * 2 * 8 * 4  # bytes a token in a layer: keys and values of two heads of 8 in float32
FULL = ("Llama", "Qwen3", "Gemma", "GPT-NeoX", "Mixtral")


def written(name):
    """Run a family by our stopwatch; return its model, the last output and the tokens that were
    chosen.
    """
    torch.manual_seed(0)
    model = random_family(name)
    ids = torch.arange(5, 5 + READ)[None] + torch.arange(ROWS)[:, None] * 7
    return model, ids, generate_greedily(model, ids, NEW)


def anew(model, ids, steps):
    """Write greedily, the whole text read at every step: what decoding from a cache must give."""
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat(
                [ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1
            )
    return ids


@pytest.mark.parametrize("name", FULL)
def test_keys_and_values_are_counted_to_the_byte(name):
    model, _, out = written(name)
    heads = 2 if name == "GPT-NeoX" else 1  # GPT-NeoX does not group: four heads of 8
    assert cache_bytes(out) == BLOCKS * KV * heads * HELD
    shape = Shape.of_config(model.config.to_dict(), name=name)
    if name != "GPT-NeoX":
        assert shape.kv_bytes(batch=ROWS, tokens=HELD, item=4) == cache_bytes(out)


@pytest.mark.parametrize(
    "name",
    ["Mistral", "Gemma 2", "Gemma 3", "Gemma 3, with vision", "Gemma 3n", "Cohere 2", "GPT-OSS"],
)
def test_windows_hold_no_more_than_whole_texts_and_never_nothing(name):
    _, _, out = written(name)
    layers = BLOCKS - (name == "Gemma 3n")  # one of its layers shares another's
    assert layers * KV * 7 <= cache_bytes(out) <= BLOCKS * KV * HELD


@pytest.mark.parametrize(
    "name",
    [
        "Mamba",
        "Mamba 2",
        "Falcon Mamba",
        "RWKV",
        "LFM2",
        "Qwen3-Next",
        "Bamba",
        "Falcon-H1",
        "Jamba",
        "Granite MoE Hybrid",
        "Zamba 2",
    ],
)
def test_states_are_counted_in_whatever_layers_they_stand(name):
    model, ids, out = written(name)
    handed = next(iter(cache_arguments(out, forward_arguments(model)).values()))
    parts = (
        handed
        if isinstance(handed, list)
        else [part for layer in handed.layers for part in vars(layer).values()]
    )
    flat = [
        part for part in parts for part in (part.values() if isinstance(part, dict) else [part])
    ]
    by_hand = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in flat
        if isinstance(one, torch.Tensor) and one.ndim
    }
    assert cache_bytes(out) == sum(by_hand.values()) > 0
    if name in ("Mamba", "Mamba 2", "Falcon Mamba", "RWKV"):  # a state does not grow
        assert cache_bytes(generate_greedily(model, ids, 1)) == cache_bytes(out)
    else:
        assert cache_bytes(generate_greedily(model, ids, 1)) < cache_bytes(out)


@pytest.mark.parametrize(
    "name",
    [
        "Llama",
        "Gemma 3",
        "Mamba",
        "Mamba 2",
        "RWKV",
        "LFM2",
        "Qwen3-Next",
        "Jamba",
        "Granite MoE",
        "RecurrentGemma",
    ],
)
def test_timed_steps_write_what_the_whole_text_read_anew_gives(name):
    model, ids, _ = written(name)
    # transformers' own RWKV mixes rows that go on from a state; one row it continues
    ids = ids[:1] if name == "RWKV" else ids
    chosen = []
    plain = model.forward

    def forward(*given, **named):
        out = plain(*given, **named)
        chosen.append(out.logits[:, -1].argmax(dim=-1))
        return out

    model.forward = forward
    stamps = token_times(model, ids, NEW, "cpu")
    model.forward = plain
    assert torch.equal(torch.stack(chosen, dim=1), anew(model, ids, NEW)[:, READ:])
    assert len(stamps) == NEW + 1 and all(later > sooner for sooner, later in pairwise(stamps))


def test_a_static_cache_and_one_of_nested_containers_are_counted():
    from transformers import StaticCache

    model = random_family("Llama")
    cache = StaticCache(config=model.config, max_cache_len=64)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        out = model(
            input_ids=ids,
            **{
                next(
                    iter(
                        cache_arguments(
                            model(input_ids=ids, use_cache=True), forward_arguments(model)
                        )
                    )
                ): cache
            },
        )
    kept = cache_bytes(out)
    assert kept == BLOCKS * KV // ROWS * 64  # all of its room

    one = torch.zeros(10)
    nested = SimpleNamespace(
        layers=[
            SimpleNamespace(states={0: one, 1: None}, twice=one),
            {"view": one[:3], "more": (torch.zeros(4),)},
        ]
    )
    nested.layers[0].back = nested  # a ring ends
    assert sum(part.numel() for part in cache_tensors(nested)) == 10 + 10 + 3 + 4
    assert cache_bytes({"past_key_values": nested}) == 14 * 4


def test_what_hands_no_cache_back_has_no_bytes():
    _, _, out = written("RecurrentGemma")
    assert cache_bytes(out) is None
    assert (
        cache_bytes({"past_key_values": None}) is None
        and cache_bytes({"logits": torch.zeros(1)}) is None
    )
    assert cache_bytes({"state": []}) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Mamba", "Gemma 3", "LFM2", "RecurrentGemma"])
def test_a_stopwatch_runs_on_it(name, tmp_path):
    from harness.reporting.measured import ModelTimings, measurement_tables

    checkpoint = saved_family(name, tmp_path / "model")
    result = measure(
        TimedModel(checkpoint),
        None,
        TimingSettings(grid=parse_grid("24x2x4"), rounds=1, visit_seconds=0.01),
        folder=tmp_path / "m",
    )
    by = {one.name: one for one in result.measurements}
    assert by["decode_tokens_per_second"].value > 0 and not result.skipped
    assert "activation_bytes" in by
    shown = measurement_tables([ModelTimings(name, result.measurements, result.skipped)])
    column = [cell.strip() for cell in shown.splitlines()[0].split("|")].index("KV MiB")
    cell = shown.splitlines()[2].split("|")[column].strip()
    if name == "RecurrentGemma":
        assert (
            "kv_bytes" not in by
            and "each reads the whole text" in by["skipped_kv"].remark
            and cell == "-"
        )
        assert "doubtful: no cache" not in shown and "no cache is handed back" in shown
    else:
        assert by["kv_bytes"].value > 1000 and by["kv_bytes"].remark == "" and float(cell) > 0


def test_few_bytes_are_not_shown_as_none():
    assert [DISK.text(value) for value in (0.0, 0.00342, 0.004, 0.0123, 0.62, 1234.5)] == [
        "0.00",
        "0.0034",
        "0.004",
        "0.01",
        "0.62",
        "1,234.50",
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_shape(name, tmp_path):
    model = random_family(name)
    model.config.save_pretrained(tmp_path)
    shape = Shape.of_folder(tmp_path, name=name)
    assert (
        shape.layers == BLOCKS
        and shape.hidden == model.config.get_text_config().hidden_size
        and shape.parameters > 0
        and shape.forward_flops(16) > 0
    )
    assert shape.kv_bytes(batch=1, tokens=16, item=4) >= 0
    seconds, batch = _decoding(shape, 8, 16, 4, 20, parse_hardware("cpu:2x8GB", []))
    assert seconds > 0 and 1 <= batch <= 8
    half = shape.shallower(0.5)
    assert half.layers == 2 and half.kv_bytes(batch=1, tokens=16, item=4) <= shape.kv_bytes(
        batch=1, tokens=16, item=4
    )


@pytest.mark.parametrize(
    ("name", "attending", "stateful"),
    [
        ("Mamba", 0, 4),
        ("Mamba 2", 0, 4),
        ("Falcon Mamba", 0, 4),
        ("RWKV", 0, 4),
        ("LFM2", 2, 2),
        ("Qwen3-Next", 2, 2),
        ("Bamba", 2, 2),
        ("Jamba", 2, 2),
        ("Granite MoE Hybrid", 2, 2),
        ("Zamba 2", 2, 4),
        ("RecurrentGemma", 2, 2),
        ("Falcon-H1", None, 4),
        ("Llama", None, 0),
        ("Gemma 3", None, 0),
        ("Llama 4", None, 0),
    ],
)
def test_layers_that_attend_and_layers_that_keep_a_state_are_told_apart(
    name, attending, stateful, tmp_path
):
    random_family(name).config.save_pretrained(tmp_path)
    shape = Shape.of_folder(tmp_path)
    assert (shape.attending, shape.stateful) == (attending, stateful)


def test_a_configuration_without_heads_keeps_no_keys_and_values():
    plain = {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280}
    for more in (
        {},
        {"model_type": "mamba2", "num_heads": 24, "head_dim": 64, "expand": 2},
        {"model_type": "xlstm", "num_heads": 4},
    ):
        shape = Shape.of_config({**plain, **more}, name="odd")
        assert (shape.heads, shape.kv_heads, shape.head_size) == (0, 0, 0) and shape.kv_bytes(
            batch=4, tokens=99, item=2
        ) == 0
    lists = Shape.of_config(
        {**plain, "num_attention_heads": [12, None, 12], "intermediate_size": [64, 128]},
        name="uneven",
    )
    assert (lists.heads, lists.intermediate) == (8, 96)
    with pytest.raises(HarnessError, match="names a vocabulary in no form"):
        Shape.of_config({"hidden_size": 8, "num_hidden_layers": 2}, name="odd")


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "rwkv"])
def test_recurrent_models_of_their_usual_size_weigh_what_the_formula_says(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = Shape.of_config(config.to_dict(), name=kind)
    assert shape.parameters == pytest.approx(
        sum(one.numel() for one in model.parameters()), rel=0.1
    )
    assert forward_flops_per_token(model, 64) > 0
