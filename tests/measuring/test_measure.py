"""Timing and weighing: counts against independent counters, processes that are really told when,
and what is left out.
"""

import json
import math
import os
import random
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness.errors import CellFailed, HarnessError
from harness.machine import energy, monitor, processor
from harness.measuring import measure as measuring
from harness.measuring.measure import TimedModel, TimingSettings, lower_quartile, measure
from harness.measuring.rounds import RoundsRule
from harness.measuring.scenario import FULL_GRID, GRIDS, Scenario, parse_grid
from harness.measuring.turns import time_alternately
from harness.measuring.worker import cache_bytes, generate_greedily, resident_bytes, token_times
from harness.models.resolve import EMBEDDED
from harness.models.shape import (
    Shape,
    forward_flops_per_token,
    parameters_on_disk,
    shape_of_size,
    weight_bytes,
)
from harness.statistics import stats


def test_a_grid_is_every_combination_once():
    assert parse_grid("128,512x1x32") == (
        Scenario(prompt_tokens=128, batch=1, new_tokens=32),
        Scenario(prompt_tokens=512, batch=1, new_tokens=32),
    )
    assert len(parse_grid("1,2x3,4x5,6")) == 8 and len(parse_grid("8x1x4 8x1x4;9x1x4")) == 2


def test_a_gpu_is_timed_at_two_points_by_default_and_at_nine_on_request():
    assert [str(scenario) for scenario in parse_grid(GRIDS["cuda"])] == [
        "2048 prompt tokens, 32 new tokens, batch 1",
        "128 prompt tokens, 64 new tokens, batch 32",
    ]
    assert parse_grid(" Full ") == parse_grid(FULL_GRID) and len(parse_grid("full")) == 9


@pytest.mark.parametrize("text", ["", "128", "128x1", "128x1x1", "0x1x8", "ax1x8", "128 x 1 x 32"])
def test_what_is_no_grid_is_said(text):
    with pytest.raises(HarnessError, match="--grid"):
        parse_grid(text)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Mistral", "Gemma2"])
def test_a_shape_counts_what_the_model_has(small, kind):
    opened = small(kind)
    shape = Shape.of_config(opened.model.config.to_dict(), name=kind)
    parameters = sum(p.numel() for p in opened.model.parameters())
    # biases and further norms are not in the formula
    assert shape.parameters == pytest.approx(parameters, rel=0.02)
    out = generate_greedily(opened.model, torch.zeros((3, 20), dtype=torch.long), 5)
    # 20 read and 4 written; the fifth is never fed
    assert cache_bytes(out) == shape.kv_bytes(batch=3, tokens=24, item=4)


def test_public_shapes_have_their_public_sizes():
    for size in (0.135e9, 0.494e9, 1.24e9, 3.21e9, 6.74e9, 8.03e9, 13.0e9, 32.8e9, 70.6e9, 405.9e9):
        assert shape_of_size(size).parameters == pytest.approx(size, rel=0.01)
    tiny = EMBEDDED / "tiny"
    assert Shape.of_folder(tiny).parameters == parameters_on_disk(tiny)
    smol = shape_of_size(0.135e9)
    assert smol.kv_bytes(batch=1, tokens=1, item=4) == 2 * 30 * 3 * 64 * 4  # by hand
    windowed = Shape.of_config(
        {
            "hidden_size": 8,
            "num_attention_heads": 2,
            "num_hidden_layers": 4,
            "vocab_size": 9,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        name="w",
    )
    assert windowed.kv_bytes(batch=1, tokens=100, item=2) == 2 * 2 * 4 * 2 * (2 * 100 + 2 * 16)


def test_flops_agree_with_torchs_own_counter(embedded):
    from torch.utils.flop_counter import FlopCounterMode

    length = 96
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        embedded.model.set_attn_implementation("eager")
        try:
            embedded.model(torch.zeros((1, length), dtype=torch.long), use_cache=False)
        finally:
            embedded.model.set_attn_implementation("sdpa")
    shape = Shape.of_folder(EMBEDDED / "tiny")
    # the counter counts whole score matrices; a causal one is half of that, which is what the
    # formula says
    half = 4 * shape.layers * shape.heads * shape.head_size * length / 2
    assert length * (shape.forward_flops(length) + half) == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )
    assert forward_flops_per_token(embedded.model, length) == pytest.approx(
        shape.forward_flops(length), rel=0.01
    )


def test_a_timed_run_writes_what_generate_writes_with_a_stamp_for_each_token(embedded):
    ids = torch.tensor([embedded.encode("Question: 3 plus 4?\nAnswer:")])
    written: list[int] = []
    plain = embedded.model.forward

    def forward(*given, **named):
        out = plain(*given, **named)
        written.append(int(out.logits[0, -1].argmax()))
        return out

    embedded.model.forward = forward
    try:
        stamps = token_times(embedded.model, ids, 24, "cpu")
    finally:
        embedded.model.forward = plain
    theirs = embedded.model.generate(
        ids,
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=1,
    )
    # past the end of the answer: EOS stops neither
    assert written == theirs[0, ids.shape[1] :].tolist()
    assert len(stamps) == 25 and all(b > a for a, b in pairwise(stamps))


def test_each_storage_counts_once_and_packed_tensors_by_their_parts():
    weight = torch.nn.Parameter(torch.zeros(16, 8))
    tied = torch.nn.Linear(8, 16, bias=False)
    tied.weight = weight
    model = torch.nn.ModuleDict({"a": tied, "b": torch.nn.Linear(8, 16, bias=False)})
    model["b"].weight = weight
    # a view of the same bytes
    torch.nn.Module.register_buffer(model, "first_rows", weight.data[:8])
    assert resident_bytes(model) == 16 * 8 * 4

    class Packed:
        """What torchao's tensors look like from outside."""

        values, scale = torch.zeros(32, dtype=torch.uint8), torch.zeros(4)

        def __tensor_flatten__(self):
            return ["values", "scale"], None

    packed = SimpleNamespace(
        modules=list, parameters=lambda: iter([Packed(), Packed()]), buffers=lambda: iter(())
    )
    assert resident_bytes(packed) == 32 + 16


def test_the_lower_quartile_by_hand():
    assert (
        lower_quartile([4, 1, 3, 2, 5]) == 2
        and lower_quartile([1, 2]) == 1.25
        and lower_quartile([7]) == 7
    )


def test_a_ratio_of_rounds_and_its_interval():
    result = stats.ratio_of_rounds([2.0, 0.5, 1.0])
    assert result.value == pytest.approx(1) and result.low < 1 < result.high
    forward = stats.ratio_of_rounds([1.1, 1.2, 1.3, 1.15])
    backward = stats.ratio_of_rounds([1 / value for value in (1.1, 1.2, 1.3, 1.15)])
    assert backward.value == pytest.approx(1 / forward.value) and backward.low == pytest.approx(
        1 / forward.high, rel=0.02
    )
    assert stats.ratio_of_rounds([1.0, 1.1]).low is None
    still = stats.ratio_of_rounds([1.0] * 5, spread=0.01)
    assert still.high == pytest.approx(math.exp(stats.Z95 * 0.01)) and still.low == pytest.approx(
        1 / still.high
    )


def test_the_interval_of_ten_rounds_holds_the_truth_as_often_as_it_says():
    draw = random.Random(3)
    covered = 0
    for _ in range(400):
        interval = stats.ratio_of_rounds(
            [math.exp(draw.gauss(0.05, 0.1)) for _ in range(10)], resamples=1_000
        )
        covered += interval.low <= math.exp(0.05) <= interval.high
    assert 0.92 <= covered / 400 <= 0.98  # 95 %, give or take what 400 trials show


@pytest.fixture(scope="module")
def measured(embedded, tmp_path_factory):
    """The embedded teacher beside itself in two processes, two scenarios that fit and one that does
    not.
    """
    folder = tmp_path_factory.mktemp("measured")
    same = TimedModel(embedded.checkpoint)
    settings = TimingSettings(grid=parse_grid("32x1,2x4 2000x1x4"), rounds=3, visit_seconds=0.01)
    return measure(same, same, settings, folder=folder), folder


def test_everything_is_measured_and_raw_values_are_kept(measured):
    result, folder = measured
    by_name = {
        (measurement.name, measurement.condition): measurement
        for measurement in result.measurements
    }
    small = str(Scenario(prompt_tokens=32, batch=1, new_tokens=4))
    for name in (
        "ttft_seconds",
        "tpot_seconds",
        "end_to_end_seconds",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
    ):
        assert by_name[name, small].value > 0 and len(by_name[name, small].values) >= 6
    ratio = by_name["decode_speedup", small]
    # the same model twice: wide, for a machine that does other things too
    assert len(ratio.values) == 3 and 0.3 < ratio.value < 3
    visits = result.raw["scenarios"][small]["visits"]
    # three rounds of base, student, student, base
    assert len(visits["base"]) == len(visits["student"]) == 6
    stamps = next(stamps for stamps in visits["student"][0] if len(stamps) > 2)
    assert len(stamps) == 5 and stamps[0] == 0 and stamps == sorted(stamps)
    assert {measurement.name for measurement in result.measurements} >= {
        "load_seconds",
        "first_call_seconds",
        "weight_bytes_disk",
        "activation_bytes",
    }
    assert json.loads((folder / "stopwatch-student.json").read_text())["vocabulary"] == 1024


def test_counted_bytes_are_those_of_the_configuration(measured, embedded):
    result, _ = measured
    weights = next(
        measurement
        for measurement in result.measurements
        if measurement.name == "weight_bytes_resident"
    )
    assert weights.remark == "" and weights.value == pytest.approx(
        weight_bytes(embedded.checkpoint.path, "float32"), rel=0.001
    )
    batches = {1: None, 2: None}
    for batch in batches:
        measurement = next(
            m
            for m in result.measurements
            if m.name == "kv_bytes" and f"batch {batch}" in m.condition
        )
        # 2 L H d bytes, 32 read + 3 fed
        assert measurement.remark == "" and measurement.value == 2 * 8 * 2 * 32 * 4 * 35 * batch
    peak = next(m for m in result.measurements if m.name.startswith("decode_peak_bytes"))
    # the model's own, not the libraries' hundreds
    assert weights.value < peak.value < weights.value + 64 * 2**20


def test_what_the_context_does_not_hold_is_skipped_with_the_numbers(measured):
    result, _ = measured
    assert result.skipped == (
        "2000 prompt tokens, 4 new tokens, batch 1: 2004 tokens are more than the context of 1024 "
        "of tiny",
    )


def test_what_the_memory_does_not_hold_is_skipped_before_it_runs(embedded, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "free_bytes", lambda device: 3 * 2**20)
    monkeypatch.setattr(measuring, "Stopwatch", lambda *a: pytest.fail("a process was started"))
    result = measure(
        TimedModel(embedded.checkpoint),
        None,
        TimingSettings(grid=parse_grid("32x1x4")),
        folder=tmp_path,
    )
    assert "would be needed and 0.0 GiB are free" in result.skipped[0]
    assert [measurement.name for measurement in result.measurements] == ["weight_bytes_disk"]


WRAPPERS = """
import os, torch

def heavier(model):
    model.register_buffer("needless", torch.ones(16 * 2**20, dtype=torch.uint8), persistent=False)
    return model

def broken(model):
    raise ValueError("no such kernel")

def deadly(model):
    os._exit(7)
"""


@pytest.fixture
def wrappers(tmp_path, monkeypatch):
    (tmp_path / "wrappers.py").write_text(WRAPPERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.slow
def test_a_planted_buffer_stands_in_the_weights_and_its_row_says_so(
    embedded, tmp_path, wrappers, measured
):
    plain = {
        measurement.name: measurement.value
        for measurement in measured[0].measurements
        if measurement.unit == "bytes"
    }
    settings = TimingSettings(grid=parse_grid("32x1x4"), rounds=1, visit_seconds=0.01)
    result = measure(
        TimedModel(embedded.checkpoint, "wrappers:heavier"),
        None,
        settings,
        folder=tmp_path / "m",
    )
    weights = next(
        measurement
        for measurement in result.measurements
        if measurement.name == "weight_bytes_resident"
    )
    assert weights.value - plain["weight_bytes_resident"] == 16 * 2**20
    assert "22.51 MiB counted, 6.51 MiB by arithmetic" in weights.remark
    assert not any(measurement.name.endswith("_speedup") for measurement in result.measurements)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrap", "said"), [("broken", "ValueError: no such kernel"), ("deadly", "ended with status 7")]
)
def test_a_process_that_fails_says_why(embedded, tmp_path, wrappers, wrap, said):
    with pytest.raises(CellFailed, match=said):
        measure(
            TimedModel(embedded.checkpoint, f"wrappers:{wrap}"),
            None,
            TimingSettings(grid=parse_grid("8x1x2")),
            folder=tmp_path / "m",
        )


def test_no_rounds_are_refused(embedded, tmp_path):
    with pytest.raises(HarnessError, match="at least one round"):
        measure(
            TimedModel(embedded.checkpoint),
            None,
            TimingSettings(grid=parse_grid("8x1x2"), rounds=0),
            folder=tmp_path,
        )


def test_a_clock_that_runs_backwards_makes_the_row_dirty():
    process = SimpleNamespace(
        process=SimpleNamespace(pid=1),
        ask=lambda do, **_: (
            {"runs": 1, "prefills": 0, "seconds": [1.0]}
            if do == "warm"
            else {"stamps": [[0.0, 0.2, 0.1]]}
        ),
    )
    timed = time_alternately(
        {"student": process},
        Scenario(new_tokens=2),
        RoundsRule.parse(1),
        lambda done: None,
        visit_seconds=0.1,
    )
    assert "the clock stood still or ran backwards" in timed["dirty"]


def sampled(monkeypatch, *samples):
    waiting = iter(samples)
    monkeypatch.setattr(monitor.InterferenceMonitor, "_sample", lambda self: next(waiting))
    monkeypatch.setattr(monitor, "allowed_cpus", lambda: {0, 1})
    measurement = monitor.InterferenceMonitor()
    measurement.begin()
    return measurement.end()


def test_a_quiet_stretch_is_clean_and_what_spoils_it_is_named(monkeypatch):
    sample = monitor._MachineSample
    before = sample(100.0, 10.0, 50.0, 1.0, 5.0, 3)
    assert sampled(monkeypatch, before, sample(110.0, 20.0, 62.0, 1.1, 16.5, 3)) == ()
    assert sampled(monkeypatch, before, sample(110.0, 20.0, 70.0, 1.0, 15.0, 3)) == (
        "other processes used 1.0 of 2 cores",
    )
    assert sampled(monkeypatch, before, sample(170.0, 20.0, 51.0, 1.0, 6.0, 3)) == (
        "the clock jumped by +60.0 s",
    )
    assert sampled(monkeypatch, before, sample(110.0, 20.0, 51.0, 4.0, 6.0, 5)) == (
        "the hypervisor took 0.3 of 2 cores",
        "the CPU throttled 2 times",
    )
    nothing = sample(110.0, 20.0, None, None, None, None)  # a system that tells nothing
    assert sampled(monkeypatch, sample(100.0, 10.0, None, None, None, None), nothing) == ()


def test_cpu_seconds_are_read_for_our_cpus_alone(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 0 50 900 1 2 3 4 0 0\ncpu1 700 0 0 0 0 0 0 0 0 0\nintr "
        "5\n"
    )
    busy, stolen = processor.cpu_seconds({0}, stat)
    assert (busy, stolen) == pytest.approx(
        (155 / processor._TICKS_PER_SECOND, 4 / processor._TICKS_PER_SECOND)
    )
    assert processor.cpu_seconds({0}, tmp_path / "none") == (None, None)


def test_energy_and_throttling_counters_are_read_where_they_are(tmp_path):
    for name, value in (
        ("intel-rapl:0", 5_000_000),
        ("intel-rapl:0:0", 4_000_000),
        ("intel-rapl:1", 2_500_000),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(str(value))
    assert energy.rapl_joules(tmp_path) == 7.5 and energy.rapl_joules(tmp_path / "none") is None
    for cpu, count in (("cpu0", 2), ("cpu1", 3)):
        (tmp_path / cpu / "thermal_throttle").mkdir(parents=True)
        (tmp_path / cpu / "thermal_throttle" / "core_throttle_count").write_text(str(count))
    assert (
        processor.throttle_events(tmp_path) == 5
        and processor.throttle_events(tmp_path / "none") is None
    )


def test_energy_is_counted_piece_by_piece_and_none_where_the_counter_wrapped(monkeypatch):
    readings = iter([10.0, 12.5, 13.0, 3.0, None])
    monkeypatch.setattr(energy, "rapl_joules", lambda: next(readings))
    meter = energy.EnergyMeter("cpu")
    assert [meter.joules() for _ in range(4)] == [2.5, 0.5, None, None] and meter.source == "RAPL"


class Refused(Exception):
    """NVML's error."""


def nvml(processes, held):
    return SimpleNamespace(
        NVMLError=Refused,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        NVML_PERF_POLICY_POWER=0,
        NVML_PERF_POLICY_THERMAL=1,
        nvmlDeviceGetViolationStatus=lambda handle, policy: SimpleNamespace(
            violationTime=held[policy]
        ),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [
            SimpleNamespace(pid=pid) for pid in processes
        ],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 5_000,
    )


def test_a_gpu_that_is_held_back_or_shared_makes_the_row_dirty(monkeypatch):
    processes, nanoseconds = [1, 2], [0, 10]
    monkeypatch.setitem(sys.modules, "pynvml", nvml(processes, nanoseconds))
    reader = energy.NvmlReader.open()
    before = reader.sample()
    assert reader.interference(before, reader.sample(), {1, 2}) == [] and reader.joules() == 5.0
    # a card at its limit is held back for moments: less than a twentieth of the time is not said
    later = before._replace(steady=before.steady + 100)
    for seconds, said in ((4, []), (6, ["power held the GPU back for 6.0 s"])):
        held = {**later.throttled, "power": int(seconds * 1e9)}
        assert reader.interference(before, later._replace(throttled=held), {1, 2}) == said
    processes.append(999)
    nanoseconds[1] += 2_500_000_000
    assert reader.interference(before, reader.sample(), {1, 2}) == [
        "heat held the GPU back for 2.5 s",
        "1 other processes were on the GPU",
    ]
    # in a container the numbers are the host's: ours are among them, none is known by name
    nanoseconds[1] = 10
    assert reader.interference(before, before, {70, 71}) == []
    assert reader.interference(before, reader.sample(), {70, 71}) == [
        "1 other processes were on the GPU"
    ]
    assert energy.EnergyMeter("cuda").source == "NVML"


def test_a_gpus_energy_is_not_read_from_the_cpus_counter(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(energy, "rapl_joules", lambda: 5.0)
    meter = energy.EnergyMeter("cuda")
    assert (
        meter.joules() is None and meter.source == "" and energy.EnergyMeter("cpu").joules() == 0.0
    )


def test_a_process_counts_its_own_cpu_seconds():
    before, began = processor.process_seconds(os.getpid()), time.process_time()
    while time.process_time() - began < 0.3:
        pass
    passed = time.process_time() - began
    # counted in ticks of 10 ms
    assert processor.process_seconds(os.getpid()) - before == pytest.approx(passed, abs=0.06)
    assert processor.process_seconds(2**22 + 1) is None


@pytest.mark.slow
def test_models_are_measured_by_the_command_with_a_file_of_raw_values(tmp_path):
    from harness.api import measure_models
    from harness.reporting.measured import ModelTimings, measurement_tables

    result, path = measure_models(
        ["tiny", "tiny-math"], grid="16x1x3", rounds=3, threads=1, out=tmp_path
    )
    shown = measurement_tables(
        [
            ModelTimings(
                measurement.name, measurement.measured.measurements, measurement.measured.skipped
            )
            for measurement in result
        ]
    )
    lines = [line for line in shown.splitlines() if line.startswith("| tiny")]
    assert len(lines) == 4 and "base" in lines[0] and "[" in lines[1]
    document = json.loads(path.read_text())
    assert [measurement["name"] for measurement in document["models"]] == [
        "tiny",
        "tiny-math",
    ] and document["environment"]["threads"] == 1
    assert document["models"][1]["raw"]["scenarios"]["16 prompt tokens, 3 new tokens, batch 1"][
        "visits"
    ]["base"]
    assert str(Path(tmp_path)) not in path.read_text()


@pytest.mark.gpu
def test_on_a_gpu_memory_is_what_the_allocator_counted_and_time_is_by_events(embedded, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    same = TimedModel(embedded.checkpoint)
    settings = TimingSettings(grid=parse_grid("64x2x8"), rounds=3, device="cuda", dtype="bfloat16")
    result = measure(same, same, settings, folder=tmp_path)
    by_name = {measurement.name: measurement for measurement in result.measurements}
    assert (
        by_name["decode_peak_bytes:reserved"].value
        >= by_name["decode_peak_bytes:allocated"].value
        > by_name["weight_bytes_resident"].value
    )
    assert by_name["kv_bytes"].remark == "" and by_name["decode_speedup"].low < 1.2


def test_the_stopwatch_needs_no_more_than_opening_and_running():
    code = (
        "import sys, harness.measuring.worker; print(sorted({'torch', 'lm_eval', 'datasets', "
        "'pandas', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_an_answer_cut_in_the_middle_is_the_end_of_the_process(embedded, tmp_path, wrappers):
    (tmp_path / "wrappers.py").write_text(
        "import os\n\ndef torn(model):\n    os.write(3, b'{')\n    os.kill(os.getpid(), 9)\n"
    )
    with pytest.raises(CellFailed, match="killed \\(SIGKILL, perhaps for want of memory\\)"):
        measure(
            TimedModel(embedded.checkpoint, "wrappers:torn"),
            None,
            TimingSettings(grid=parse_grid("8x1x2")),
            folder=tmp_path / "m",
        )


def test_a_scenario_that_runs_out_of_memory_leaves_the_others(embedded, tmp_path, monkeypatch):
    answers = {
        "open": {"seconds": 1.0, "libraries_loaded": True, "peak": None},
        "warm": {"seconds": [1.0], "runs": 1, "prefills": 0},
        "visit": {"stamps": [[0.0, 0.1, 0.2]]},
        "weigh": {"weights": 5, "kv": None, "peaks": {}, "kv_tokens": 9},
    }

    class Scripted:
        process = SimpleNamespace(pid=1, poll=lambda: None)

        def __init__(self, job, folder, name):
            pass

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *problem: None  # noqa: E731
        wait_until_ready = lambda self: None  # noqa: E731

        def ask(self, do, **question):
            if do == "visit" and question["scenario"]["batch"] == 4:
                raise CellFailed("out of memory")
            return answers[do]

    monkeypatch.setattr(measuring, "Stopwatch", Scripted)
    result = measure(
        TimedModel(embedded.checkpoint),
        None,
        TimingSettings(grid=parse_grid("8x1,4x2"), rounds=1),
        folder=tmp_path,
    )
    assert result.skipped == ("8 prompt tokens, 2 new tokens, batch 4: out of memory",)
    assert [
        measurement.condition
        for measurement in result.measurements
        if measurement.name == "ttft_seconds"
    ] == ["8 prompt tokens, 2 new tokens, batch 1"]


def test_a_configuration_that_names_nothing_known_is_refused():
    with pytest.raises(HarnessError, match="names a number of layers in no form"):
        Shape.of_config({"hidden_size": 8, "num_heads": 2, "vocab_size": 9}, name="odd")
    old = Shape.of_config(
        {
            "hidden_size": 8,
            "num_heads": 2,
            "num_layers": 3,
            "vocab_size": 9,
            "model_type": "gpt_neo",
        },
        name="neo",
    )
    assert (old.layers, old.heads, old.gated) == (3, 2, False)
