"""Captured decoding on a CPU: a tape in place of a CUDA graph, the same logits in every family.

The tape holds Python's numbers as a graph does, and refuses what a capture refuses.
"""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from families import random_family

from harness.measuring import captured, worker
from harness.measuring.captured import NotCaptured, captured_decoder
from harness.measuring.measure import TimedModel, TimingSettings, measure
from harness.measuring.scenario import parse_grid
from harness.measuring.worker import TimingJob, TimingWorker
from harness.records import columns

PROMPT, NEW = 11, 9


def _stand_in(name):
    path = Path(__file__).parents[1] / "gpu" / "stand_in" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tape = _stand_in("tape")


def prompts(rows=2, tokens=PROMPT):
    return torch.arange(5, 5 + tokens)[None] + torch.arange(rows)[:, None] * 7


def captured_on_tape(model, ids, new_tokens=NEW):
    return captured_decoder(model, ids, new_tokens, capture=tape.capture_on_tape, dtype="float32")


def replayed_tokens(decoder):
    """Return the tokens that a timed run writes, (B, new tokens)."""
    written = []
    with torch.inference_mode():
        decoder.run(lambda: written.append(decoder.token_B1.clone()))
    return torch.cat(written[1:], dim=1)  # the first stamp comes before the prefill


def tokens_read_anew(model, ids, new_tokens=NEW):
    """Write greedily, the whole text read at every step: no cache at all."""
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = model(input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids[:, start:]


CAPTURED = (
    "Llama",
    "Qwen2",
    "Phi",
    "GPT-2",
    "GPT-NeoX",
    "OPT",
    "Mixtral",
    "Qwen3-MoE",
    "DeepSeek-V3",
    "Llama 4",
    "LFM2",
    "Qwen3-Next",
)


@pytest.mark.parametrize("name", CAPTURED)
def test_replayed_steps_write_what_the_whole_text_read_anew_gives(name):
    model = random_family(name)
    decoder = captured_on_tape(model, prompts())
    expected = tokens_read_anew(model, prompts())
    assert torch.equal(replayed_tokens(decoder), expected)
    assert torch.equal(replayed_tokens(decoder), expected)  # and again: a run begins anew


@pytest.mark.parametrize("name", ["Mistral", "Gemma 2", "Gemma 3", "Cohere 2", "GPT-OSS"])
@pytest.mark.parametrize(
    ("tokens", "segments"),
    # of a window of 8: it is never full, becomes full on the way, is full from the start
    [(3, [0]), (5, [0, 3]), (11, [0])],
)
def test_a_window_has_a_graph_for_each_of_its_states(name, tokens, segments):
    model, ids = random_family(name), prompts(tokens=tokens)
    new_tokens = 5 if tokens == 3 else NEW
    decoder = captured_on_tape(model, ids, new_tokens)
    assert sorted(decoder._segments) == segments
    assert torch.equal(replayed_tokens(decoder), tokens_read_anew(model, ids, new_tokens))


@pytest.mark.parametrize("tokens", [2, 11])
def test_a_number_of_python_in_a_graph_is_seen_before_anything_is_timed(tokens, monkeypatch):
    """Without its own graph for a full window, or with a position of Python, a replay is wrong."""
    model = random_family("Llama")
    plain, calls = model.forward, []

    def forward(input_ids=None, attention_mask=None, position_ids=None, cache=None, **named):
        if input_ids.shape[1] == 1 and position_ids is not None:
            calls.append(1)
            position_ids = torch.full_like(position_ids, tokens + cache.layers[0].python_steps)
            cache.layers[0].python_steps += 1
        elif cache is not None:
            cache.layers[0].python_steps = 0
        return plain(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            **named,
        )

    model.forward = forward
    with pytest.raises(NotCaptured, match="in the captured graph its logits differ by"):
        captured_on_tape(model, prompts(tokens=tokens))
    assert calls


def test_a_window_without_a_second_graph_is_never_timed(monkeypatch):
    """The graph of a window that fills goes on to write, past its end."""
    monkeypatch.setattr(captured.StaticDecoder, "_segment_starts", lambda self: frozenset({0}))
    with pytest.raises(IndexError, match="out of bounds"):
        captured_on_tape(random_family("Gemma 3"), prompts(tokens=5))


def test_a_static_cache_that_gives_other_logits_is_refused(monkeypatch):
    model = random_family("Llama")
    plain = captured.StaticDecoder._library_masks

    def without_the_first_token(self):
        masks = {layer_type: mask.clone() for layer_type, mask in plain(self).items()}
        for mask in masks.values():
            mask[..., 0] = False
        return masks

    monkeypatch.setattr(captured.StaticDecoder, "_library_masks", without_the_first_token)
    with pytest.raises(NotCaptured, match="behind a static cache its logits differ by"):
        captured_on_tape(model, prompts())


def test_a_step_that_makes_the_host_wait_is_not_captured():
    model = random_family("Llama")
    plain = model.model.norm.forward
    model.model.norm.forward = lambda hidden: plain(hidden) * hidden.abs().amax().sign().item()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        captured_on_tape(model, prompts())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Mamba", "its forward takes no positions and masks from outside"),
        ("RWKV", "its forward takes no positions and masks from outside"),
        ("RecurrentGemma", "it hands no cache from step to step"),
        # the library's own static cache gives it other logits than its own
        ("GPT-Neo", "behind a static cache its logits differ by"),
    ],
)
def test_a_family_without_what_it_takes_says_which(name, reason):
    with pytest.raises(NotCaptured, match=reason):
        captured_on_tape(random_family(name), prompts())


@pytest.mark.parametrize("name", ["DBRX", "Falcon"])
def test_a_family_whose_steps_make_the_host_wait_or_send_is_not_captured(name):
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        captured_on_tape(random_family(name), prompts())


def test_in_bf16_a_static_cache_may_round_as_far_as_a_text_that_is_read_anew(embedded):
    model = copy.deepcopy(embedded.model).bfloat16()
    ids = torch.randint(5, 1000, (4, 200), generator=torch.Generator().manual_seed(1))
    decoder = captured_decoder(model, ids, 17, capture=tape.capture_on_tape, dtype="bfloat16")
    assert replayed_tokens(decoder).shape == (4, 17)


@pytest.mark.parametrize("name", ["int8", "int4", "int8-dynamic"])
def test_packed_students_are_captured_too(name, compress):
    from harness.models.language_model import open_model

    model = open_model(compress(name)[0]).model
    decoder = captured_on_tape(model, prompts())
    assert torch.equal(replayed_tokens(decoder), tokens_read_anew(model, prompts()))


@pytest.fixture
def working(embedded, monkeypatch):
    """Return the timing worker of the embedded teacher, with a tape where a GPU has graphs."""
    monkeypatch.setattr(captured, "capture_on_cuda", tape.capture_on_tape)
    job = TimingJob(
        path=str(embedded.checkpoint.path),
        device="cpu",
        dtype="float32",
        threads=1,
        vocabulary=1024,
    )
    timing_worker = TimingWorker(job)
    timing_worker.model = embedded.model
    timing_worker.baseline = {"resident": 0}
    return timing_worker


def test_the_worker_times_captured_runs_beside_short_eager_ones(working, monkeypatch):
    monkeypatch.setattr(worker, "EAGER_TOKENS", 3)
    scenario = {"prompt_tokens": 6, "batch": 2, "new_tokens": 5}
    with pytest.raises(AssertionError, match="before capture"):
        working.visit(scenario, runs=1, prefills=0, captured=1)
    answer = working.capture(scenario, visit_seconds=0.001)
    assert answer["runs"] == 1 and len(answer["seconds"]) == worker.MIN_WARMUP_RUNS
    visit = working.visit(scenario, runs=1, prefills=2, captured=2)
    assert [len(times) for times in visit["stamps"]] == [4, 2, 2]  # a start and 3 tokens; prefills
    assert [len(times) for times in visit["captured"]] == [6, 6]
    assert all(times[0] == 0 and times == sorted(times) for times in visit["captured"])
    # nothing of it is in what is weighed, and a visit without it is what it was
    working.weigh(scenario)
    assert working.captured is None
    assert [len(times) for times in working.visit(scenario, runs=1, prefills=0)["stamps"]] == [6]


def test_the_worker_finds_nothing_to_watch_without_a_gpu(working, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    shares = working.busy({"prompt_tokens": 6, "batch": 1, "new_tokens": 4})
    assert shares == {"prefill": None, "decode": None}


def skip_without_graphs():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    if torch.cuda.get_device_name(0) == "stand-in card":
        pytest.skip("the stand-in card has no graphs; the tape is tried above")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma 2", "Gemma 3"])
@pytest.mark.parametrize("tokens", [5, 11])
def test_on_a_gpu_a_graph_gives_what_the_whole_text_read_anew_gives(name, tokens):
    skip_without_graphs()
    model, ids = random_family(name).to("cuda"), prompts(tokens=tokens).to("cuda")
    decoder = captured_decoder(model, ids, NEW, capture=captured.capture_on_cuda, dtype="float32")
    assert torch.equal(replayed_tokens(decoder), tokens_read_anew(model, ids))


@pytest.mark.gpu
def test_on_a_gpu_a_model_is_timed_by_captured_steps_and_watched(embedded, tmp_path):
    skip_without_graphs()
    same = TimedModel(embedded.checkpoint)
    settings = TimingSettings(
        grid=parse_grid("64x2x24"), rounds="auto:0.05:3-6", device="cuda", dtype="bfloat16"
    )
    result = measure(same, same, settings, folder=tmp_path)
    by = {measurement.name: measurement for measurement in result.measurements}
    assert columns.NOT_CAPTURED not in by, by[columns.NOT_CAPTURED].remark
    assert 3 <= len(by["decode_speedup"].values) <= 6 and "eager_decode_speedup" in by
    assert by["tpot_seconds"].value < by["eager_tpot_seconds"].value
    assert 0 < by["decode_busy_share"].value <= 1
    assert by["decode_speedup"].low < 1.1 and by["decode_speedup"].high > 0.9


def test_a_quantized_cache_grows_and_is_not_captured(small):
    model = small("Llama").model
    model.config.kv_cache_quantization = {"bits": 8, "group": 64}
    with pytest.raises(NotCaptured, match="its quantized cache grows from step to step"):
        captured_decoder(
            model, torch.arange(5, 25)[None], 4, capture=lambda work: work, dtype="float32"
        )
