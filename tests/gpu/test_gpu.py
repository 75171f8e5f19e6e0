"""The choice of a GPU, its name in keys and tables, and the verification kit on a stand-in card."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness.errors import HarnessError
from harness.machine import gpu as gpus
from harness.machine.gpu import Gpu, choose_device, default_dtype, device_label, signs_of_gpu

KIT = Path(__file__).parents[1] / "gpu"
H100 = Gpu(name="NVIDIA H100 80GB HBM3", driver="580.159.04", cuda="13.0", capability="9.0")
A100 = Gpu(name="NVIDIA A100-SXM4-80GB", driver="580.159.04", cuda="13.0", capability="8.0")
T4 = Gpu(name="Tesla T4", driver="535.104.05", cuda="12.8", capability="7.5")


@pytest.fixture
def card(monkeypatch):
    """Let this process believe that it has a GPU."""

    def have(gpu):
        monkeypatch.setattr(gpus, "_first_gpu", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
        # plans ask how much memory it has
        properties = SimpleNamespace(total_memory=80 * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        monkeypatch.setattr(torch.version, "cuda", gpu.cuda)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(gpus, "signs_of_gpu", lambda: ["/dev/nvidia0"])

    return have


@pytest.mark.parametrize(
    ("files", "signs"),
    [
        ((), []),
        (("dev/nvidiactl", "dev/nvidia-uvm"), []),
        (("dev/nvidia0", "dev/nvidia1", "dev/nvidiactl"), ["dev/nvidia0", "dev/nvidia1"]),
        (("dev/dxg",), []),  # every WSL has it, whatever the GPU
        (("dev/dxg", "usr/lib/wsl/lib/libcuda.so.1"), ["dev/dxg"]),
        (("dev/kfd",), ["dev/kfd"]),
        (("dev/nvhost-gpu",), ["dev/nvhost-gpu"]),
    ],
)
def test_signs_of_a_gpu_are_device_files(files, signs, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert signs_of_gpu(tmp_path) == [str(tmp_path / sign) for sign in signs]


def _unavailable(monkeypatch, message, cuda="13.0"):
    def fail():
        raise RuntimeError(message)

    monkeypatch.setattr(gpus, "signs_of_gpu", lambda: ["/dev/nvidia0"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("problem", "cuda", "message"),
    [
        (
            "The NVIDIA driver on your system is too old (found version 11040). Please update",
            "13.0",
            "is too old (found version 11040)",
        ),
        (
            "CUDA unknown error - this may be due to an incorrectly set up environment",
            "13.0",
            "CUDA unknown error",
        ),
        ("No CUDA GPUs are available", "13.0", "No CUDA GPUs are available"),
        ("never asked", None, "is built for the CPU alone; install a build for your GPU"),
    ],
)
def test_auto_says_why_a_gpu_that_is_there_is_not_used_and_cuda_refuses_with_the_same(
    problem, cuda, message, monkeypatch
):
    _unavailable(monkeypatch, problem, cuda)
    lines = []
    assert choose_device("auto", say=lines.append) == "cpu"
    assert (
        len(lines) == 1
        and message in lines[0]
        and "/dev/nvidia0" in lines[0]
        and "--device cpu" in lines[0]
    )
    with pytest.raises(HarnessError, match="--device cuda") as refused:
        choose_device("cuda")
    assert message in str(refused.value) and "\n" not in str(refused.value)
    lines.clear()
    assert choose_device("cpu", say=lines.append) == "cpu" and not lines


def test_a_gpu_that_a_user_hid_is_said_to_be_hidden(monkeypatch):
    _unavailable(monkeypatch, "never asked")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    lines = []
    assert (
        choose_device("auto", say=lines.append) == "cpu"
        and "CUDA_VISIBLE_DEVICES='' hides every GPU" in lines[0]
    )


def test_auto_without_a_gpu_says_nothing_and_imports_no_torch():
    code = (
        "import sys; from harness.machine.gpu import choose_device; print(choose_device('auto', "
        "say=print), 'torch' in sys.modules)"
    )
    if signs_of_gpu():
        pytest.skip("this machine has a GPU")
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "cpu False"


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("sm_80", "8.0", True),
        ("sm_80", "8.6", True),
        ("sm_86", "8.0", False),
        ("sm_80", "9.0", False),
        ("compute_80", "9.0", True),
        ("sm_90a", "9.0", True),
        ("compute_120", "10.0", False),
        ("sm_120", "12.0", True),
        ("gfx90a", "9.0", False),
    ],
)
def test_code_runs_on_its_own_major_version_and_ptx_on_later_ones(arch, capability, runs):
    assert gpus._runs_on(arch, capability) is runs


def test_a_card_that_torch_has_no_kernels_for_is_not_chosen(card):
    card(Gpu(name="NVIDIA GeForce GTX 1080", driver="535.1", cuda="13.0", capability="6.1"))
    lines = []
    assert choose_device("auto", say=lines.append) == "cpu"
    assert (
        "has no kernels for NVIDIA GeForce GTX 1080 (capability 6.1; built for sm_75 sm_80 sm_90)"
        in lines[0]
    )


@pytest.mark.parametrize(
    ("gpu", "dtype"), [(H100, "bfloat16"), (A100, "bfloat16"), (T4, "float32")]
)
def test_auto_takes_bf16_where_the_card_multiplies_it(gpu, dtype, card):
    card(gpu)
    lines = []
    assert choose_device("auto") == "cuda" and default_dtype("cuda", say=lines.append) == dtype
    assert bool(lines) is (dtype == "float32") and default_dtype("cpu") == "float32"


def _plan(tmp_path, **changes):
    from harness.api import plan_run
    from harness.planning.config import build_config

    return plan_run(
        build_config(
            {
                "methods": ("response", "int8"),
                "controls": False,
                "out": tmp_path,
                "cache": tmp_path / "c",
                **changes,
            }
        )
    )


def test_cells_and_students_of_one_gpu_are_not_taken_for_anothers(card, tmp_path):
    keys = {}
    for name, gpu in {
        "H100": H100,
        "A100": A100,
        "newer driver": H100.model_copy(update={"driver": "590.1"}),
    }.items():
        card(gpu)
        keys[name] = [(cell.key, cell.student_key) for cell in _plan(tmp_path).cells]
    assert not {key for key, _ in keys["H100"]} & {key for key, _ in keys["A100"]}
    # a training's seconds are a card's
    assert not {key for _, key in keys["H100"] if key} & {key for _, key in keys["A100"] if key}
    assert not {key for key, _ in keys["H100"]} & {key for key, _ in keys["newer driver"]}
    # weights need no new training for a driver
    assert [key for _, key in keys["H100"]] == [key for _, key in keys["newer driver"]]
    card(H100)
    assert (
        keys["H100"] == [(cell.key, cell.student_key) for cell in _plan(tmp_path).cells]
        and device_label("cuda:0") == f"cuda {H100.name}"
    )


def _records_of(gpu):
    from harness.records.store import read_records

    records, _ = read_records(Path(__file__).parents[2] / "results" / "embedded")
    return [
        record.model_copy(
            update={
                "device": "cuda",
                "environment": record.environment.model_copy(update={"gpu": gpu}),
            }
        )
        for record in records
        if record.label in ("teacher", "identity")
    ]


def test_records_of_two_gpus_stand_in_two_tables_that_name_them():
    from harness.analysis.comparison import group_records
    from harness.reporting.report import markdown

    both = [*_records_of(H100), *_records_of(A100)]
    assert len(group_records(both)) == 2 and len(group_records(_records_of(H100))) == 1
    text = markdown(both)
    assert (
        f"- Device cuda ({H100};" in text
        and f"- Device cuda ({A100};" in text
        and "driver 580.159.04, CUDA 13.0" in text
    )


def test_a_record_names_the_gpu_and_is_read_back_and_older_ones_have_none(card, tmp_path):
    from harness.records import environment as records_environment
    from harness.records import record as records

    card(H100)
    record = _records_of(
        records_environment.current_environment(device="cuda", dtype="bfloat16", threads=1).gpu
    )[0]
    records.write_record(tmp_path / "r.json", record)
    assert records.read_record(tmp_path / "r.json").environment.gpu == H100
    old = next((Path(__file__).parents[2] / "results" / "embedded" / "records").glob("*.json"))
    assert records.read_record(old).environment.gpu is None


@pytest.fixture
def teacher_job(tmp_path):
    from harness.records.store import Store
    from harness.running.runner import _cell_job

    plan = _plan(
        tmp_path,
        methods=("identity",),
        limit=6,
        grid="none",
        suite=("mini",),
        noise=4,
        device="cpu",
    )
    store = Store(tmp_path)
    store.cell(plan.cells[0].key).mkdir(parents=True)
    return _cell_job(plan, plan.cells[0], store)


@pytest.mark.parametrize(
    "problem",
    [torch.OutOfMemoryError("CUDA out of memory"), ValueError("no such kernel"), MemoryError()],
)
def test_a_noise_floor_that_cannot_be_taken_leaves_the_scored_row(
    problem, teacher_job, monkeypatch
):
    from harness.models import language_model
    from harness.reporting.notes import group_notes
    from harness.running import cell

    plain = language_model.open_model

    def opens(checkpoint, *, device, dtype):
        if dtype == "bfloat16":
            raise problem
        return plain(checkpoint, device=device, dtype=dtype)

    monkeypatch.setattr(language_model, "open_model", opens)
    record = cell._compute(teacher_job, lambda _: None, time.monotonic())
    assert record.status == "success" and [score.n for score in record.scores] == [6, 6]
    floors = [floor for floor in record.measurements if floor.name.startswith("noise_flips")]
    assert len(floors) == 2 and all(
        floor.remark.startswith("not measured: ") and not floor.values for floor in floors
    )

    from harness.analysis.comparison import group_records

    [table] = group_records([record.model_copy(update={"label": "teacher"})])
    lines = [line for line in group_notes(table) if "noise floor" in line]
    assert len(lines) == 2 and all(": no noise floor: not measured: " in line for line in lines)


def test_distances_that_cannot_be_measured_leave_the_scored_row_and_numbers_that_are_none_do_not(
    teacher_job, monkeypatch
):
    from harness.errors import CellFailed
    from harness.running import cell, evaluation
    from harness.scoring import fidelity

    def out_of_memory(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fidelity, "save_hidden_states", out_of_memory)
    monkeypatch.setattr(evaluation, "_distances_to_teacher", out_of_memory)
    job = teacher_job.model_copy(update={"noise": 0})
    record = cell._compute(job, lambda _: None, time.monotonic())
    assert (
        record.status == "success"
        and [score.n for score in record.scores] == [6, 6]
        and record.fidelity == ()
    )
    remark = record.measurement("skipped_fidelity").remark
    assert remark.startswith("its distance to the teacher was not measured: out of memory")

    def not_a_number(*arguments, **named):
        raise CellFailed("answers with NaN")

    monkeypatch.setattr(evaluation, "_distances_to_teacher", not_a_number)
    with pytest.raises(CellFailed, match="NaN"):
        cell._compute(job, lambda _: None, time.monotonic())


def test_a_bf16_teacher_is_asked_again_in_its_own_type_a_few_rows_at_once(teacher_job):
    from harness.running import cell

    record = cell._compute(
        teacher_job.model_copy(update={"dtype": "bfloat16"}), lambda _: None, time.monotonic()
    )
    floors = [floor for floor in record.measurements if floor.name.startswith("noise_flips")]
    assert [floor.condition for floor in floors] == ["bfloat16, 8 rows at once"] * 2 and [
        floor.values for floor in floors
    ] == [(4.0,), (4.0,)]


def test_memory_is_given_back_before_scoring_and_before_timing(teacher_job, monkeypatch):
    from harness.machine import memory
    from harness.models import language_model
    from harness.running import cell, evaluation
    from harness.running.student import Cost, Student

    order = []
    plain_release, plain_open = memory.release_memory, language_model.open_model
    for module in (cell, evaluation):
        monkeypatch.setattr(
            module,
            "release_memory",
            lambda device: (order.append("release"), plain_release(device)),
        )
    monkeypatch.setattr(
        language_model, "open_model", lambda *a, **k: (order.append("open"), plain_open(*a, **k))[1]
    )
    monkeypatch.setattr(
        cell,
        "student_of_cell",
        lambda loaded: (order.append("make"), Student(loaded.teachers[0], Cost(), ()))[1],
    )
    timed = SimpleNamespace(measurements=(), raw={}, skipped=())
    monkeypatch.setattr(evaluation, "measure", lambda *a, **k: (order.append("time"), timed)[1])
    job = teacher_job.model_copy(update={"noise": 0, "measure": True, "grid": "8x1x2"})
    cell._compute(job, lambda _: None, time.monotonic())
    assert order[:3] == ["make", "release", "open"] and order[order.index("time") - 1] == "release"


@pytest.fixture
def on_card():
    """Return the embedded teacher on the card, in float32."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    from harness.machine.memory import release_memory
    from harness.models.language_model import open_model
    from harness.models.resolve import resolve

    yield open_model(resolve("tiny", cache=Path("unused")), device="cuda", dtype="float32")
    release_memory("cuda")


PROMPTS = (
    "Question: 2 + 3?\nAnswer:",
    "Question: Tom has 5 apples and buys 7 more. How many are there?\nAnswer:",
    "A",
)


@pytest.mark.gpu
def test_on_a_gpu_the_shared_path_is_taken_and_gives_what_the_cpu_gives(on_card, embedded):
    from harness.scoring.backend import LikelihoodRequest
    from harness.scoring.generation import generate, reason_for_plain_path
    from harness.scoring.likelihood import log_likelihoods

    assert reason_for_plain_path(on_card) == ""
    prompts = [on_card.encode(prompt) for prompt in PROMPTS]
    ours, theirs = (generate(opened, prompts, max_new_tokens=24) for opened in (on_card, embedded))
    assert [answer.ids for answer in ours] == [answer.ids for answer in theirs]
    assert [answer.ids for answer in ours] == [
        answer.ids for answer in generate(on_card, prompts, max_new_tokens=24, batch_size=1)
    ]
    rows = [
        LikelihoodRequest([*prompt, *answer.ids], len(answer.ids))
        for prompt, answer in zip(prompts, ours, strict=True)
    ]
    for (value, _), (other, _) in zip(
        log_likelihoods(on_card, rows), log_likelihoods(embedded, rows), strict=True
    ):
        assert value == pytest.approx(other, abs=2e-3)


@pytest.mark.gpu
def test_on_a_gpu_sampling_is_the_same_again_and_by_any_batch(on_card):
    from harness.scoring.generation import Sampling, generate

    prompts = [on_card.encode(prompt) for prompt in PROMPTS]
    samples = [
        [
            answer.ids
            for answer in generate(
                on_card,
                prompts,
                max_new_tokens=16,
                sampling=Sampling(temperature=1.0, seed=3),
                batch_size=size,
            )
        ]
        for size in (3, 3, 1)
    ]
    assert samples[0] == samples[1] == samples[2]


@pytest.mark.gpu
def test_on_a_gpu_what_a_released_model_had_allocated_is_free(on_card):
    from harness.machine.memory import release_memory
    from harness.models.language_model import open_model
    from harness.models.resolve import resolve

    before = torch.cuda.memory_allocated()
    more = open_model(resolve("tiny-math", cache=Path("unused")), device="cuda", dtype="bfloat16")
    assert torch.cuda.memory_allocated() > before
    del more
    release_memory("cuda")
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.gpu
def test_on_a_gpu_the_environment_names_it():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    from harness.records.environment import current_environment

    gpus._first_gpu.cache_clear()
    gpu = current_environment(device="cuda", dtype="bfloat16", threads=1).gpu
    assert gpu is not None and gpu.name == torch.cuda.get_device_name(0) and gpu.cuda
    assert choose_device("auto" if signs_of_gpu() else "cuda") == "cuda"


def _python(*arguments, **environment):
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in ("PYTHONPATH", "HARNESS_STAND_IN_CARD")
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**inherited, **environment},
        check=False,
    )


STAND_IN = {"PYTHONPATH": str(KIT / "stand_in"), "HARNESS_STAND_IN_CARD": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "output"),
    [
        ("print((x + 1).device, x.sum().item(), x.tolist())", "cuda:0 3.0 [1.0, 1.0, 1.0]"),
        ("x + torch.ones(3)", "found at least two devices, cuda:0 and cpu"),
        ("torch.cat([x, torch.ones(3)])", "found at least two devices"),
        ("torch.nn.Linear(3, 2)(x)", "found at least two devices"),
        ("torch.nn.Linear(3, 2).to('cuda')(torch.ones(3))", "found at least two devices"),
        ("x.numpy()", "Use Tensor.cpu() to copy the tensor to host memory first"),
        (
            "print(x.cpu().numpy().sum(), x.to('cpu').device, (x * torch.tensor(2.0)).device)",
            "3.0 cpu cuda:0",
        ),
        (
            "m = torch.nn.Linear(3, 1).to('cuda'); m(x).sum().backward(); "
            "print(m.weight.grad.device, m.weight.grad.tolist())",
            "cuda:0 [[1.0, 1",
        ),
    ],
)
def test_the_stand_in_card_computes_and_keeps_its_tensors_apart_as_a_gpu_does(line, output):
    done = _python("-c", f"import torch\nx = torch.ones(3, device='cuda')\n{line}", **STAND_IN)
    assert (
        output in done.stdout + done.stderr.strip().splitlines()[-1]
        if done.stderr.strip()
        else output in done.stdout
    )


# What lm-eval, datasets and optimum bring along and a bare machine does not have.
LACKS = (
    "evaluate,nltk,pytablewriter,rouge_score,sqlitedict,word2number,more_itertools,chardet,pytz,"
    "optimum,playwright,tox"
)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Return a folder with what was packed for a bare machine."""
    folder = tmp_path_factory.mktemp("bare")
    done = _python(KIT / "pack.py", "--installed", "--out", folder / "pack")
    assert done.returncode == 0, done.stderr
    assert (
        not (folder / "pack/lm_eval/tasks/arc").exists()
        and (folder / "pack/lm_eval/tasks/gsm8k").is_dir()
    )
    return folder


@pytest.mark.parametrize("steps", [("0", "3"), ("1",), ("2", "5"), ("4", "7"), ("6",)])
def test_every_step_of_the_kit_runs_on_the_stand_in_card_with_the_packed_folder_and_goes_on(
    steps, bare, tmp_path
):
    command = [KIT / "run.py", *steps, "--dry", "--pack", bare / "pack", "--out", tmp_path / "out"]
    missing = {"HARNESS_LACKS": LACKS, "PYTHONPATH": str(KIT / "stand_in"), "OMP_NUM_THREADS": "1"}
    done = _python(*command, **missing)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    for step in steps:
        figures = json.loads((tmp_path / "out" / f"step-{step}.json").read_text())
        assert figures["conditions"]["dry"] and figures["conditions"]["gpu"].startswith(
            "stand-in card"
        )
        assert figures["parts"] and all(
            part["status"] == "done" and part["figures"] for part in figures["parts"].values()
        )
    if steps == ("1",):
        parts = figures["parts"]
        assert parts["fp32 against the CPU"]["figures"]["other answers"] == 0
        assert parts["kill and resume"]["figures"]["steps before it was killed"]
        assert all(
            "stand-in card" in parts[name]["figures"]["gpu in the records"]
            for name in ("packed and cut", "trained")
        )
        assert (tmp_path / "out" / "step-1-records.tar.gz").stat().st_size
    # a few flat files are all that comes back
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    if steps == ("0", "3"):  # a second call finds what the first has done
        again = _python(*command, **missing)
        assert again.returncode == 0 and again.stdout.count("finished before") == 6


@pytest.mark.slow
def test_without_a_card_the_kit_says_so_in_a_line_and_a_broken_wheel_is_named(tmp_path):
    if signs_of_gpu():
        pytest.skip("this machine has a GPU")
    done = _python(KIT / "run.py", "0", "--out", tmp_path)
    assert (
        done.returncode == 2
        and "no GPU can be used here: " in done.stderr
        and "--dry" in done.stderr
    )
    (tmp_path / "pack/dill").mkdir(parents=True)
    (tmp_path / "pack/dill/__init__.py").write_text(
        "raise ImportError('dill.so: cannot open shared object file')"
    )
    done = _python(KIT / "run.py", "0", "--dry", "--out", tmp_path, "--pack", tmp_path / "pack")
    assert (
        done.returncode == 2
        and "dill does not import: ImportError: dill.so: cannot open shared object file; pack it "
        "again"
        in done.stderr
    )
    done = _python(KIT / "run.py", "0", "--pack", tmp_path / "none")
    assert done.returncode == 2 and "make it with: python tests/gpu/pack.py" in done.stderr
    done = _python(KIT / "run.py", "8")
    assert done.returncode == 2 and "invalid choice" in done.stderr


@pytest.mark.slow
def test_a_part_without_room_is_skipped_with_both_numbers_and_a_failed_one_does_not_stop_the_next(
    tmp_path,
):
    code = (
        f"import sys; sys.path.insert(0, {str(KIT)!r})\nimport torch\nfrom pathlib import "
        "Path\nfrom kit import Kit\n"
        f"kit = Kit(out=Path({str(tmp_path)!r}), dry=False, conditions={{}})\nkit.open_step(9)\n"
        "kit.part('large', lambda: {'x': 1}, needs=80 * 2**30)\nkit.part('broken', lambda: 1 / "
        "0)\nkit.part('next', lambda: {'x': 2})\n"
    )
    done = _python("-c", code, **STAND_IN)
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "step-9.json").read_text())["parts"]
    assert (
        parts["large"]["status"] == "skipped"
        and parts["large"]["reason"] == "about 80.0 GiB would be needed and 8.0 GiB are free"
    )
    assert (
        parts["broken"]["status"] == "failed"
        and "ZeroDivisionError" in parts["broken"]["reason"]
        and parts["next"]["figures"] == {"x": 2}
    )
