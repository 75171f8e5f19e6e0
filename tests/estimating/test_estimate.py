"""Plans by formula: against numbers worked out by hand, the layout that a device's memory allows,
rates from records.
"""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

import methods
import suites
from harness.api import estimate_plans, plan_run
from harness.data.sizes import ITEMS_BY_TASK
from harness.errors import HarnessError
from harness.estimating.estimate import (
    _scenario_seconds,
    _timing_seconds,
    duration,
    estimate_text,
)
from harness.estimating.expect import estimate_cells
from harness.estimating.hardware import GIB, parse_hardware, this_machine
from harness.estimating.memory import activation_bytes
from harness.estimating.workload import EstimateRequest, cut_parameters, workload_of
from harness.machine.gpu import Gpu
from harness.machine.processor import machine_label, parse_processor, thread_count
from harness.measuring.rounds import RoundsRule, rounds_on
from harness.measuring.scenario import FULL, GRIDS, Scenario
from harness.models.resolve import EMBEDDED
from harness.models.shape import Shape, shape_of_size
from harness.planning.config import build_config
from harness.records.conditions import ModelReference
from harness.records.record import Cost, Environment, RunRecord, TaskScore
from harness.records.store import Store
from harness.registry import Registry


def stage(estimate, name):
    return next(line for line in estimate.stages if line.name.startswith(name))


def record(label="response", *, settings=None, share=0.6, seconds=10.0, made_on="", **changes):
    """A finished row of this machine: 1e12 FLOPs in `seconds` of training, of which the teacher
    took 2 for 2e11.
    """
    score = TaskScore(
        task="gsm8k-mini",
        version="1",
        kind="generate",
        primary="strict-match",
        chance=0,
        n=1000,
        value=share,
        stderr=0.01,
        outcomes={},
        items_digest="i",
        answers_digest="a",
        invalid_share=0,
        seconds=20.0,
    )
    environment = Environment(
        device="cpu",
        dtype="float32",
        threads=thread_count(),
        machine=made_on or machine_label(),
        platform="",
        python="",
        versions={},
        commit=None,
        dirty=None,
    )
    return RunRecord(
        **{
            "key": f"{label}{settings}".ljust(20, "x"),
            "status": "success",
            "label": label,
            "method": label,
            "family": "x",
            "is_control": False,
            "trains": True,
            "settings": settings or {},
            "suites": ("math",),
            "tasks": ("gsm8k-mini@1",),
            "device": "cpu",
            "dtype": "float32",
            "teachers": (),
            "student_recipe": "depth:0.5",
            "student_base": ModelReference(name="tiny", digest="d"),
            "student": ModelReference(name="s", digest="s", parameters=918_656),
            "budget_tokens": 1,
            "budget_rows": 1,
            "path": "p",
            "scores": (score,),
            "environment": environment,
            "cost": Cost(seconds=seconds, flops=1e12, teacher_seconds=2.0, teacher_flops=2e11),
            **changes,
        }
    )


def test_training_is_six_flops_a_weight_and_token_and_sixteen_bytes_a_weight():
    request = {"teacher": "70B", "student": "3B", "hardware": "1xH200"}
    [estimate] = estimate_plans(["sft"], budget=10_000_000, **request)
    training, shape = stage(estimate, "train"), estimate.request.student
    attention = 4 * shape.layers * shape.heads * shape.head_size * 190 / 2
    forward = 2 * (shape.body + shape.embedding) + attention
    held_out = (2 + 10_000_000 // (2_000 * 190)) * 200 * 190 * forward / (0.45 * 989e12)
    assert training.seconds == pytest.approx(14 + 3 * forward * 1e7 / (0.35 * 989e12) + held_out)
    tokens = 16 * 380  # the longest batch
    # fp32 streams beside bf16 products, and a bf16 copy of each matrix
    activations = tokens * 28 * (26 * 3072 + 8 * (24 + 8) * 128 + 8 * 8_192)
    copies = 2 * shape.body + 2 * 128_256 * 3072
    logits = 4 * 128_256 * 4 * 65  # of 32 MiB at once
    states = 16 * shape.parameters + copies
    assert (
        training.memory == pytest.approx(0.6 * GIB + states + activations + logits)
        and training.tokens == 1e7
    )


def test_recomputing_activations_leaves_the_logits_and_costs_a_third_more():
    request = {"teacher": "8B", "student": "3B", "budget": 10**8}
    [roomy] = estimate_plans(["sft"], hardware="8x80GB", **request)
    [tight] = estimate_plans(["sft"], hardware="8x24GB", **request)
    assert "recomputed" not in stage(roomy, "train").layout
    assert "recomputed" in stage(tight, "train").layout or not stage(tight, "train").fits
    tokens = 16 * 380
    # whole-batch logits at the very least
    assert stage(tight, "train").memory > 4 * 128_256 * 2 * tokens


def test_hidden_states_are_not_cached():
    request = {
        "teacher": "70B",
        "student": "3B",
        "hardware": "2x80GB",
        "budget": 10**8,
        "rows": 1_000,
    }
    [logits] = estimate_plans(["response"], **request)
    [inside] = estimate_plans(["feature"], **request)
    assert not any(line.name.startswith("teacher reads") for line in inside.stages)
    assert stage(logits, "train").seconds < stage(inside, "train").seconds / 3
    assert not any("distributions" in line for line in inside.advice)


def test_a_mixture_of_experts_is_refused_and_no_weights_are_touched(tmp_path, monkeypatch):
    import harness.models.language_model

    monkeypatch.setattr(
        harness.models.resolve, "describe", lambda *a, **k: pytest.fail("weights were hashed")
    )
    config = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "intermediate_size": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    [estimate] = estimate_plans(["sft"], teacher=str(tmp_path), hardware="1xH100")
    assert estimate.request.teacher.layers == 2
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_local_experts": 8}))
    with pytest.raises(HarnessError, match="mixture of 8 experts"):
        estimate_plans(["sft"], teacher=str(tmp_path), hardware="1xH100")


def test_the_layout_is_the_simplest_that_fits():
    [estimate] = estimate_plans(
        ["response+int4"],
        teacher="70B",
        student="7B",
        hardware="8x80GB",
        budget=10**9,
        rows=100_000,
    )
    assert (
        stage(estimate, "train").layout.startswith("FSDP2 over 8")
        and "teacher" not in stage(estimate, "train").layout
    )
    assert "GiB of cache" in stage(estimate, "teacher reads").note
    assert all(line.fits for line in estimate.stages)
    # 141 GB of bf16 are no 80
    assert stage(estimate, "score the teacher").layout.startswith("tensor parallel over")
    assert "4.25 bits" in stage(estimate, "compress: int4").note
    [small] = estimate_plans(
        ["response"], teacher="135M", student="135M", hardware="8xH100", budget=100_000
    )
    assert stage(small, "train").layout == "DDP over 8, teacher beside it"
    [alone] = estimate_plans(
        ["response"], teacher="70B", student="7B", hardware="1x80GB", budget=100_000
    )
    assert (
        not stage(alone, "train").fits
        and "DOES NOT FIT" in estimate_text(alone)
        and any("NOT EVERYTHING FITS" in line for line in alone.advice)
    )
    assert stage(alone, "train").memory / GIB > 0.92 * 80
    assert stage(alone, "train").note == "give a smaller student, or a device with more memory"
    assert any(
        "over 8 devices are only calculated: this version trains in one process" in line
        for line in estimate.advice
    )


def test_the_teacher_costs_two_flops_a_weight_and_token_live_and_once_a_row_in_a_cache():
    request = {"teacher": "70B", "student": "7B", "hardware": "8xB200"}
    [plain] = estimate_plans(["sft"], budget=10**6, rows=10_000, **request)
    # 1.9 M tokens of rows: fewer than all are read
    [live] = estimate_plans(["response"], budget=10**6, rows=10_000, **request)
    teacher = live.request.teacher
    attention = 4 * teacher.layers * teacher.heads * teacher.head_size * 190 / 2
    token = (2 * (teacher.body + teacher.embedding) + attention) / (8 * 0.45 * 2250e12)
    assert stage(live, "train").seconds - stage(plain, "train").seconds == pytest.approx(
        1e6 * token
    )
    [kept] = estimate_plans(["response"], budget=10**9, rows=10_000, **request)
    assert stage(kept, "teacher reads").seconds == pytest.approx(1.9e6 * token)
    assert "one pass of the teacher instead of 526.3" in next(
        line for line in kept.advice if "distributions" in line
    )
    assert teacher.vocabulary == 128_256  # an id takes 17 bits, a log-probability 16
    cached_bytes = 1.9e6 * 0.6 * 64 * (17 + 16) / 8
    assert stage(kept, "teacher reads").note == f"{cached_bytes / GIB:.2f} GiB of cache"


def test_a_plan_says_how_its_stages_train_and_what_their_peaks_are_made_of():
    request = {"teacher": "7B", "student": "1B", "budget": 10**7}
    [large] = estimate_plans(["response"], hardware="1xH100", **request)
    assert "response trains by recipe full." in large.advice
    assert "- Peak: train: response " in (text := estimate_text(large))
    assert "gradients" in text and "not measured on this card" in text
    [small] = estimate_plans(["response"], hardware="1xL4", **request)
    assert any(
        line.startswith("response trains by recipe bf16: full needs ") for line in small.advice
    )
    # what compares the unlikely tokens too cannot be read from a cache of the likeliest
    [whole] = estimate_plans(["response[divergence=jsd]"], hardware="1xH100", **request)
    assert "teacher beside it" in stage(whole, "train").layout
    assert not any(line.name.startswith("teacher reads") for line in whole.stages)
    [typed] = estimate_plans(["response[recipe=full]"], hardware="1xL4", **request)
    assert stage(typed, "train").note == "--set response.micro_batch_size=1"
    [old] = estimate_plans(["response"], hardware="1xT4", **request)
    assert not any("recipe bf16:" in line for line in old.advice)


def test_a_price_is_device_hours():
    [estimate] = estimate_plans(
        ["sft"], teacher="70B", student="7B", hardware="8xH100", budget=10**9
    )
    assert f"{estimate.seconds * 8 * 3 / 3600:,.2f} at 3 a device-hour" in estimate_text(
        estimate, price=3.0
    )
    assert "device-hour" not in estimate_text(estimate)


def test_rates_come_from_this_machines_records_and_no_others():
    own_records = [record(seconds=seconds) for seconds in (10.0, 12.0, 22.0)]
    hardware = parse_hardware(
        "cpu", [*own_records, record(made_on="another, 64 cores"), record(status="failed")]
    )
    # medians, the teacher's seconds out
    assert hardware.train == pytest.approx(1e12 / 10) and hardware.forward == pytest.approx(1e11)
    assert "3 trained rows" in hardware.source
    assert "rule of thumb" in parse_hardware("cpu", []).source
    # another machine: no record of this one speaks for it
    assert parse_hardware("cpu:8x32GB", own_records).memory == 32 * GIB
    [plan] = estimate_plans(["sft"], records=own_records)
    assert stage(plan, "score and time").note == "1 of 1 tasks from this machine's records"


def test_settings_are_recommended_by_what_was_measured_else_by_what_was_published():
    [plain] = estimate_plans(["response"])
    assert any(
        line.startswith("temperature: 2.0 (our default; published") and "distil-20" in line
        for line in plain.advice
    )
    tried = [
        record(settings={"temperature": 1.0}, share=0.7),
        record(settings={"temperature": 4.0}, share=0.5),
    ]
    [estimate] = estimate_plans(["response"], records=tried)
    line = next(line for line in estimate.advice if line.startswith("temperature"))
    assert line.startswith(
        "temperature: 1.0, the best measured here on gsm8k-mini (1.0 70.0 %, 4.0 50.0 %; records "
        "response{'te"
    )
    # no fair comparison: not compared
    for other in ({"limited": True}, {"budget_tokens": 2}, {"student_recipe": "depth:0.25"}):
        mixed = [tried[0], record(settings={"temperature": 4.0}, share=0.9, **other)]
        [estimate] = estimate_plans(["response"], records=mixed)
        assert any(line.startswith("temperature: 2.0 (our default") for line in estimate.advice)


def test_every_quoted_publication_is_in_the_file():
    from harness.estimating.advice import PUBLISHED

    publications = {
        publication["id"]: publication
        for publication in json.loads(PUBLISHED.read_text(encoding="utf-8"))["records"]
    }
    [estimate] = estimate_plans(["cot+int4"], teacher="70B", student="7B", hardware="8xH100")
    quoted = [
        word.strip("(),;.")
        for line in estimate.advice
        for word in line.split()
        if word.strip("(),;.").rpartition("-")[2].isdigit()
    ]
    ids = [word for word in quoted if word.startswith(("distil-", "prune-"))]
    assert len(ids) >= 6 and set(ids) <= set(publications)
    assert any(
        f"{publications['distil-04']['retention_pct']:g} % at 10.4x" in line
        for line in estimate.advice
    )


def test_every_method_and_task_is_known_to_the_plan():
    registry = Registry("method", methods.METHODS)
    workloads = {name: workload_of(registry.build(name, {})) for name in registry.table}
    assert all(work.trains == registry.load(name).trains for name, work in workloads.items())
    assert (
        workloads["cot"].writes_traces
        and workloads["response"].reads_teacher
        and not workloads["sft"].reads_teacher
    )
    assert workloads["int4"].bits == 4.25 and workloads["int4-calibrated"].calibrates == (128, 256)
    assert workloads["prune-magnitude"].changes_weights and workloads[
        "prune-magnitude"
    ].calibrates == (
        0,
        0,
    )
    assert (
        workloads["on-policy"].reads_teacher_live and not workloads["response"].reads_teacher_live
    )
    assert workload_of(registry.build("response", {"cache": "off"})).reads_teacher_live
    assert {name for name in suites.TASKS if not name.startswith("lm-eval")} <= set(ITEMS_BY_TASK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "many"], "8xH100"),
        (["--hardware", "8xH1000"], "did you mean 'H100'"),
        (["--teacher", "seventy"], "unknown model 'seventy'"),
        (["--methods", "respons"], "did you mean 'response'"),
        (["--methods", ""], "no method is asked for"),
        (["--methods", "cot[sampels=8]"], "did you mean 'samples'"),
        (["--hardware", "cpu:0x32GB"], "at least one core, and memory"),
        (["--teacher", "0B"], "write for example 7B"),
        (["--student", "7X"], "write for example 7B or 135M"),
        (["--hardware", "8xA100"], "write 8xA100-80GB or 8xA100-40GB"),
        (["--rows", "0"], "--rows"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    result = subprocess.run(
        [sys.executable, "-P", "-m", "harness.cli", "plan", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (
        result.returncode == 2
        and message in result.stderr
        and len(result.stderr.strip().splitlines()) == 1
    ), result.stderr


def test_what_does_not_fit_ends_with_exit_code_1(tmp_path):
    line = [
        sys.executable,
        "-P",
        "-m",
        "harness.cli",
        "plan",
        "--teacher",
        "70B",
        "--student",
        "7B",
        "--hardware",
        "1x80GB",
    ]
    result = subprocess.run(
        [*line, "--methods", "response"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 1 and "DOES NOT FIT" in result.stdout


def test_a_stage_behind_a_cut_has_the_size_that_is_left():
    request = {"teacher": "8B", "hardware": "1xB200"}
    [plain] = estimate_plans(["sft"], student="depth:0.5", **request)
    [half] = estimate_plans(["prune-depth[ratio=0.5]+sft"], student="depth:0.75", **request)
    assert (
        stage(half, "train").memory == stage(plain, "train").memory
        and stage(half, "score and").memory == stage(plain, "score and").memory
    )
    [narrow] = estimate_plans(
        ["prune-width[ratio=0.5,groups=2]+sft"], student="depth:0.75", **request
    )
    cut_shape = replace(plain.request.teacher, intermediate=7_168, kv_heads=6, heads=24)
    assert stage(narrow, "train").memory - stage(plain, "train").memory == pytest.approx(
        16 * (cut_shape.parameters - plain.request.student.parameters)
        + 2 * (cut_shape.body - plain.request.student.body)  # bf16 copies of the matrices
        + activation_bytes(cut_shape, 16 * 380, "mixed")
        - activation_bytes(plain.request.student, 16 * 380, "mixed")
    )
    [uncut] = estimate_plans(["identity"], student="depth:0.5", **request)
    assert stage(uncut, "score and").memory == stage(uncut, "score the teacher").memory


def expected(methods, *, finished=(), **settings):
    """Return what the cells of a run would take, by label and seed, and their keys."""
    plan = plan_run(build_config({"methods": methods, "controls": False, **settings}))
    estimates = estimate_cells(plan, finished)
    return {
        (cell.label, cell.seed): estimate
        for cell, estimate in zip(plan.cells, estimates, strict=True)
    }, [cell.key for cell in plan.cells]


def test_a_planned_cell_is_priced_at_its_own_size_and_with_its_timing(tmp_path):
    rows = ["int8", "untouched", "fake-int4", "prune-depth[ratio=0.5]+sft"]
    cells, _ = expected(rows, out=tmp_path)
    untimed, _ = expected(rows, out=tmp_path, grid="none")
    teacher = Shape.of_folder(EMBEDDED / "tiny")
    run = {key: cell.seconds for key, cell in untimed.items()}
    scored = {key: run[key, None] for key in ("teacher", "untouched")}
    # scored at the teacher's size, and packed before
    assert scored["untouched"] < scored["teacher"] < run["int8", None]
    # which is not timed
    assert all(
        cells[key].seconds > cell.seconds + 9
        for key, cell in untimed.items()
        if key[0] != "fake-int4"
    )
    assert cells["fake-int4", None].seconds == run["fake-int4", None]
    chain = cells["prune-depth[ratio=0.5]+sft", 1]
    assert (
        chain.training_bytes == 16 * replace(teacher, layers=4).parameters
        and chain.verdict == "fits"
        and not cells["int8", None].training_bytes
    )
    beside, _ = expected(["feature", "response"], out=tmp_path)
    assert (
        beside["feature", 1].training_bytes - beside["response", 1].training_bytes
        == 4 * teacher.parameters
    )


def test_a_gpus_default_timing_takes_at_most_three_minutes_a_row():
    hardware = parse_hardware("1xH100", [])
    teacher, student = shape_of_size(7.6e9), shape_of_size(1.5e9)

    def seconds(grid, rounds):
        request = EstimateRequest(
            teacher=teacher,
            student=student,
            chain=(),
            budget=1,
            rows=1,
            items={},
            grid=grid,
            rounds=rounds,
        )
        # the dearest row: the teacher beside itself
        return _timing_seconds((teacher, teacher), request, hardware)

    rule = RoundsRule.parse(rounds_on("cuda", None))
    assert seconds(GRIDS["cuda"], rule.expected) < seconds(GRIDS["cuda"], rule.most) <= 180
    assert seconds(FULL, 6) > 600 and seconds("", 6) == 0
    # a captured step is bound by the weights that it reads, an eager one by its launches
    point = Scenario(prompt_tokens=128, batch=1, new_tokens=101)
    eager = _scenario_seconds(point, student, hardware)
    captured = _scenario_seconds(point, student, hardware, launches=False)
    assert eager == pytest.approx(student.layers * 6.5e-4 * 102, rel=0.01) and eager > 3 * captured


def test_what_cells_share_counts_once_and_what_is_finished_not_at_all(tmp_path):
    cells, keys = expected(["cot", "prune-depth", "prune-depth+sft"], seeds=2, out=tmp_path)
    seconds = {key: cell.seconds for key, cell in cells.items()}
    assert seconds["cot", 1] > seconds["cot", 2] and list(cells)[1:4] == [
        ("cot", 1),
        ("cot", 2),
        ("prune-depth", None),
    ]
    # the cut is the row's before it
    assert seconds["prune-depth+sft", 1] == seconds["prune-depth+sft", 2]
    rest, _ = expected(
        ["cot", "prune-depth", "prune-depth+sft"], seeds=2, out=tmp_path, finished=keys[1:2]
    )
    assert rest["cot", 1].seconds == 0 and rest["cot", 2].seconds == seconds["cot", 2]


def test_training_that_does_not_fit_is_said_before_it_runs(tmp_path, monkeypatch):
    # a student that is stored needs no training; another is refused before there is a plan
    plan = plan_run(build_config({"methods": ["sft"], "controls": False, "out": tmp_path}))
    done = Store(tmp_path).student(plan.cells[-1].student_key) / "done.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    monkeypatch.setattr("harness.estimating.hardware.device_bytes", lambda device: 2**23)
    with pytest.raises(HarnessError, match=r"^sft fits no recipe here"):
        expected(["sft[recipe=full,patience=3]"], out=tmp_path)
    cells, _ = expected(["sft[recipe=full]"], out=tmp_path)
    assert (
        cells["sft", 1].verdict
        == "DOES NOT FIT, give a smaller student or a device with more memory"
        and cells["teacher", None].training_bytes == 0
    )


def test_a_gpu_is_taken_for_the_listed_one_of_its_size(monkeypatch):
    monkeypatch.setattr("harness.estimating.hardware.device_bytes", lambda device: 79.6 * GIB)
    unlisted = Gpu(name="A card", driver="", cuda="13.0")
    monkeypatch.setattr("harness.estimating.hardware.gpu_of", lambda device: unlisted)
    hardware = this_machine("cuda", [])
    assert (
        hardware.kind == "cuda"
        and hardware.memory == 79.6 * GIB
        and "taken for 80GB" in hardware.name
    )


def test_weights_that_lie_twice_in_a_folder_are_not_counted_twice(tmp_path):
    import shutil

    folder = shutil.copytree(EMBEDDED / "tiny", tmp_path / "twice")
    shape = Shape.of_folder(folder)
    assert cut_parameters(folder, shape.shallower(0.5)) == shape.shallower(0.5).parameters
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert cut_parameters(folder, shape) == shape.parameters


def test_sizes_share_the_teachers_vocabulary():
    [estimate] = estimate_plans(["response"], teacher="70B", student="7B", hardware="8xH100")
    assert estimate.request.student.vocabulary == estimate.request.teacher.vocabulary


def test_durations_in_words():
    assert [duration(value) for value in (40, 600, 9_000, 10 * 86_400)] == [
        "40 s",
        "10 min",
        "2.5 h",
        "10 d",
    ]


def test_a_bad_hardware_is_refused_from_python_too():
    with pytest.raises(HarnessError, match="COUNTxGPU"):
        parse_hardware("0xH100", [])


def test_two_processors_of_one_name_are_told_apart_by_their_instructions():
    first = (
        "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx avx2 avx512f avx512_vnni "
        "sse2\n\nprocessor\t: 1\nmodel name\t: Other\n"
    )
    assert parse_processor(first) == "Some CPU (avx2 avx512f avx512_vnni)"
    assert parse_processor(first.replace("avx512f avx512_vnni", "")) == "Some CPU (avx2)"
    assert parse_processor("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n").endswith(
        "(asimddp i8mm)"
    )
    assert parse_processor("model name\t: Plain\n") == "Plain" and parse_processor("") == ""
