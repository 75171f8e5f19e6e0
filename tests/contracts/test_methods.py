"""The contract that every method keeps, and what single methods promise."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from distilling import FEW, Quick

import methods
import suites
from harness.checking.method_checks import METHOD_CHECKS
from harness.contract import Budget, Checkpoint, Job, Method
from harness.data.examples import examples_of
from harness.data.source import LocalOrHubData
from harness.errors import CellFailed, HarnessError
from harness.models.cache_format import stored_cache_format
from harness.models.resolve import resolve
from harness.registry import Registry, settings_with_defaults
from harness.scoring.generation import Generation
from harness.testing import ContractError, ContractReport, check_method, method_registry
from methods.training.base import default_learning_rate

REGISTRY = Registry("method", methods.METHODS)
QUICK = Quick("method", methods.METHODS)
TASKS = {name: suites.load(name) for name in ("gsm8k-mini", "mmlu-mini")}
TRAINED = [
    name
    for name in methods.METHODS
    if REGISTRY.load(name).trains and REGISTRY.canonical(name) == name
]


EXTRAS = {
    "nf4": "bitsandbytes",
    "bnb-int8": "bitsandbytes",
    "torchao": "torchao",
    "quanto": "optimum.quanto",
    "gptq": "gptqmodel",
    "autoround": "auto_round",
}
CANONICAL = [name for name in methods.METHODS if REGISTRY.canonical(name) == name]
DEFAULTS = {name: REGISTRY.build(name, {}) for name in CANONICAL}
COMPRESSING = [
    name for name, method in DEFAULTS.items() if method.family != "control" and not method.trains
]
PACKED = [
    name
    for name, method in DEFAULTS.items()
    if name not in EXTRAS and (method.bits_per_weight is not None or not method.keeps_architecture)
]
BESIDE = {
    "response",
    "feature",
    "attention",
    "selective",
    "selective-random",
    "best-single-teacher",
    "on-policy",
    "uld",
}  # teacher run live
# a teacher read or wrote before training, whatever the budget
CACHED = {"cot", "cot-unfiltered", "multi-teacher", "best-single-teacher"}
ALONE = {"sft", "answer-only"}  # no teacher at all; other methods are held to what they declare


def job(teacher, folder, *, seed=1, tokens=1500, rows=24, student="depth:0.5", tasks=None, **more):
    folder.mkdir(parents=True, exist_ok=True)
    second = more.pop("second", None)
    return Job(
        teachers=(teacher,) if second is None else (teacher, second),
        student=student,
        student_base=teacher,
        tasks=tasks or {"gsm8k-mini": TASKS["gsm8k-mini"]},
        source=LocalOrHubData(),
        budget=Budget(seen_tokens=tokens, rows=rows),
        seed=seed,
        workdir=folder,
        cache=folder.parent / "cache",
        **more,
    )


@pytest.fixture(scope="module")
def specialist():
    return resolve("tiny-math", cache=Path("unused"))


@pytest.fixture(scope="module")
def teacher():
    return resolve("tiny", cache=Path("unused"))


@pytest.fixture(scope="module")
def contracts(tmp_path_factory):
    """Return what the public contract check says of each method, or how it failed."""
    folder = tmp_path_factory.mktemp("students")
    reports = {}
    for name in CANONICAL:
        # what the student writes is long
        settings = (
            {"batch_size": 4}
            if "on_policy_share" in settings_with_defaults(REGISTRY.build(name, {}))
            else {}
        )
        settings |= FEW if DEFAULTS[name].trains else {}
        try:
            reports[name] = check_method(name, settings, folder=folder / name, fresh=False)
        except ContractError as problem:
            reports[name] = problem
    return reports


@pytest.fixture(scope="module")
def students(contracts):
    """Return each method's students, of small budgets: two of one seed, one of another.

    Methods that this machine cannot run are left out.
    """
    reports = {
        name: checked
        for name, checked in contracts.items()
        if isinstance(checked, ContractReport) and checked.students
    }
    return {
        name: [student.checkpoint for student in checked.students.values()]
        for name, checked in reports.items()
    }


def made_by(name, students):
    """Return a method's students, or skip the test where this machine cannot make them."""
    return students[name] if name in students else pytest.skip(f"no student of {name} here")


@pytest.fixture(scope="module")
def response(teacher, tmp_path_factory):
    """Return a student of `response` as the job of these tests makes it."""
    return QUICK.build("response", {}).compress(
        job(teacher, tmp_path_factory.mktemp("response") / "x")
    )


@pytest.mark.parametrize("name", CANONICAL)
def test_keeps_the_public_contract(name, contracts):
    """As any method of another package does."""
    assert isinstance(contracts[name], ContractReport), contracts[name]
    if contracts[name].skipped:
        pytest.skip(next(iter(contracts[name].skipped.values())))
    assert set(contracts[name].passed) == set(METHOD_CHECKS)


@pytest.mark.parametrize("name", methods.METHODS)
def test_keeps_the_protocol(name):
    method = REGISTRY.build(name, {})
    assert isinstance(method, Method)
    assert REGISTRY.summary(name) and len(REGISTRY.summary(name)) < 110
    assert all(control in methods.METHODS for control in method.controls)
    assert REGISTRY.build(name, settings_with_defaults(method)) == method


@pytest.mark.parametrize("name", TRAINED)
def test_refuses_settings_out_of_range_and_unknown_ones(name):
    for settings in (
        {"learning_rate": 0},
        {"batch_size": 0},
        {"warmup_ratio": 1.0},
        {"max_grad_norm": -1},
    ):
        with pytest.raises(HarnessError, match=next(iter(settings))):
            REGISTRY.build(name, settings)
    with pytest.raises(HarnessError, match="did you mean 'learning_rate'"):
        REGISTRY.build(name, {"learning_rat": 1e-3})
    with pytest.raises(Exception, match=r"frozen|cannot assign"):
        REGISTRY.build(name, {}).learning_rate = 1.0


def test_the_learning_rate_follows_the_students_size_unless_it_is_set():
    assert [
        default_learning_rate(size)
        for size in (918_656, 10_000_000, 134_515_008, 1_000_000_000, 8_030_000_000)
    ] == [
        1e-3,
        1e-3,
        1.8e-4,
        4.6e-5,
        1.2e-5,
    ]
    assert [default_learning_rate(size, scratch=True) for size in (918_656, 1_000_000_000)] == [
        1e-3,
        2.2e-4,
    ]
    assert (
        REGISTRY.build("sft", {}).learning_rate == "auto"
        and REGISTRY.build("sft", {"learning_rate": 3e-3}).learning_rate == 3e-3
    )
    with pytest.raises(
        HarnessError,
        match=r"sft\.learning_rate: .*; write for example --set sft\.learning_rate=VALUE",
    ):
        REGISTRY.build("sft", {"learning_rate": 2})


def test_importing_every_method_imports_no_torch():
    code = (
        "import sys, methods\nfrom harness.registry import Registry, expanded\nr = "
        "Registry('method', methods.METHODS)\n"
        "[r.build(n, {}) for n in methods.METHODS]\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_every_file_is_a_method_and_every_method_a_file():
    files = {
        path.stem
        for path in Path(methods.__file__).parent.glob("*.py")
        if not path.stem.startswith("_")
    }
    assert files - {"base", "masks", "packed"} == {
        path.partition(":")[0].removeprefix("methods.") for path in methods.METHODS.values()
    }


def test_trained_methods_share_the_loop_settings():
    shared = [{field.name: field.default for field in fields(REGISTRY.load("sft"))}]
    for name in TRAINED:
        mine = {field.name: field.default for field in fields(REGISTRY.load(name))}
        assert shared[0].items() <= mine.items()


@pytest.mark.parametrize("name", CANONICAL)
def test_same_seed_gives_the_same_digest(name, students):
    first, again, *others = made_by(name, students)
    assert first.digest == again.digest
    # none of what trains
    assert all(
        (student.digest != first.digest) == DEFAULTS[name].draws_random_numbers
        for student in others
    )


@pytest.mark.parametrize("name", CANONICAL)
def test_changes_a_weight_unless_it_is_identity(name, students, teacher):
    from safetensors.torch import load_file

    student = load_file(made_by(name, students)[0].path / "model.safetensors")
    base = load_file(teacher.path / "model.safetensors")
    start = load_file(students["untouched"][0].path / "model.safetensors")
    if name == "identity":
        assert student.keys() == base.keys() and all(student[key].equal(base[key]) for key in base)
    elif REGISTRY.build(name, {}).family == "cache":  # its configuration says what is new
        assert student.keys() == base.keys() and all(student[key].equal(base[key]) for key in base)
        assert stored_cache_format(made_by(name, students)[0].path) is not None
    elif name in COMPRESSING:
        assert student.keys() != base.keys() or any(
            student[key].shape != base[key].shape or not student[key].equal(base[key])
            for key in base
        )
    elif name != "untouched":
        assert student.keys() == start.keys() and any(
            not student[key].equal(start[key]) for key in start
        )


@pytest.mark.parametrize("name", TRAINED)
def test_keeps_the_budget_and_says_what_it_spent(name, students):
    cost = json.loads((made_by(name, students)[0].path.parent / "cost.json").read_text())
    most = 1500
    assert 0 < cost["trained_tokens"] < cost["seen_tokens"] <= most
    if name != "answer-only":  # equal examples by default, fewer tokens
        assert cost["seen_tokens"] > most - 200
    if name in BESIDE | CACHED | ALONE:
        assert (cost.get("teacher_tokens", 0) > 0) == (name in BESIDE) and bool(cost["shared"]) == (
            name in CACHED
        )
    terms = cost["notes"]["terms"]
    assert (
        cost["notes"]["learning_rate"] == 1e-3
        and min(cost["notes"]["best_ce"], cost["notes"]["start_ce"]) > 0
    )
    assert terms and all(
        {"weight", "first", "last", "gradient_norm"} <= fields.keys() for fields in terms.values()
    )
    assert (
        cost["devices"] == 1
        and cost["device_seconds"] == cost["seconds"]
        and cost["peak_bytes"] > 100 * 2**20
    )


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["reverse-kl", "jsd", "skew-kl"])
def test_every_divergence_trains_a_student_of_its_own_and_is_logged_by_name(
    divergence, teacher, response, tmp_path
):
    student = QUICK.build("response", {"divergence": divergence}).compress(
        job(teacher, tmp_path / "x")
    )
    assert student.digest != response.digest
    steps = [
        json.loads(line) for line in (tmp_path / "x" / "training.jsonl").read_text().splitlines()
    ]
    assert steps[1][divergence] > 0 and "ce" in steps[1] and "forward-kl" not in steps[1]


def test_trained_rows_see_equal_tokens(students):
    costs = {
        name: json.loads((students[name][0].path.parent / "cost.json").read_text())
        for name in TRAINED
        if name in students
    }
    same_rows = (
        "sft",
        "response",
        "feature",
        "attention",
        "selective",
        "selective-random",
        "multi-teacher",
        "uld",
    )
    assert len({costs[name]["seen_tokens"] for name in same_rows}) == 1
    assert (
        len({costs[name]["trained_tokens"] for name in same_rows if "selective" not in name}) == 1
    )
    assert (
        costs["selective"]["trained_tokens"]
        == costs["selective-random"]["trained_tokens"]
        < 0.6 * costs["sft"]["trained_tokens"]
    )


def test_teacher_is_untouched_by_every_method(students, teacher):
    assert resolve("tiny", cache=Path("unused")).digest == teacher.digest


REOPEN = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
door, out, *folders = sys.argv[1:]
if door == "packed":
    import methods.packed
found = {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Question: Mia has 3 pens.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found[folder] = model(ids).logits.contiguous()
save_file(found, out)
assert door == "packed" or not {"harness", "methods"} & set(sys.modules)
"""


@pytest.mark.parametrize("door", ["plain", "packed"])
def test_every_student_reopens_in_a_fresh_process_with_plain_transformers(
    door, students, teacher, tmp_path
):
    import torch
    from safetensors.torch import load_file

    from harness.models.language_model import open_model

    chosen = [
        checkpoints
        for name, checkpoints in students.items()
        if name not in EXTRAS and (name in PACKED) == (door == "packed")
    ]
    folders = [str(checkpoints[0].path) for checkpoints in chosen]
    subprocess.run(
        [sys.executable, "-P", "-c", REOPEN, door, str(tmp_path / "logits"), *folders],
        capture_output=True,
        check=True,
    )
    logits = load_file(tmp_path / "logits")
    for first, *_ in chosen:
        # without its door a cache of codes is not there: the weights, which are the teacher's, are
        has_full_cache = stored_cache_format(first.path) is None
        opened = open_model(first if has_full_cache else teacher)
        ids = opened.tokenizer("Question: Mia has 3 pens.", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = opened.model(ids).logits
        assert torch.allclose(expected, logits[str(first.path)], rtol=0, atol=1e-5)
        assert (
            sum(path.stat().st_size for path in first.path.glob("*.safetensors"))
            == first.bytes_on_disk
        )


WITHOUT_A_DOOR = """
import sys, traceback
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    print("opening", folder, file=sys.stderr, flush=True)
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception:
        traceback.print_exc()
    else:
        print("it opened", file=sys.stderr, flush=True)
assert not {"harness", "methods"} & set(sys.modules)
"""


def test_a_packed_student_is_refused_loudly_without_our_door(students):
    folders = {name: str(students[name][0].path) for name in PACKED}
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_A_DOOR, *folders.values()],
        capture_output=True,
        text=True,
        check=True,
    )
    reports = done.stderr.split("opening ")
    for name, folder in folders.items():
        [mine] = [part for part in reports if part.startswith(f"{folder}\n")]
        assert (
            "Traceback" in mine and "ignore_mismatched_sizes" in mine and "it opened" not in mine
        ), name


@pytest.mark.parametrize("name", EXTRAS)
def test_a_missing_library_is_a_skipped_row_that_says_what_to_type(
    name, teacher, tmp_path, monkeypatch
):
    from harness.errors import Skipped

    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(Skipped, match=r"pip install 'compression-harness\[\w+\]'|runs on a GPU"):
        REGISTRY.build(name, {}).compress(job(teacher, tmp_path / "x"))


OPENED = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    save_file({"logits": model(torch.arange(3, 43)[None]).logits.float().contiguous()}, sys.argv[2])
assert not {"harness", "methods"} & set(sys.modules)
"""


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("nf4", {}),
        ("nf4", {"double": True}),
        ("bnb-int8", {}),
        ("torchao", {}),
        ("torchao", {"scheme": "int8-dynamic"}),
        ("quanto", {"bits": 8}),
        ("quanto", {"bits": 4}),
        ("quanto", {"bits": 2}),
    ],
)
def test_a_librarys_student_is_whole_and_opens_in_a_fresh_process(
    name, settings, teacher, tmp_path
):
    """Libraries have saved integers that reopen as other numbers.

    They have also saved random weights, with a mere warning: so it is tried.
    """
    import torch
    from safetensors.torch import load_file

    from harness.models.language_model import open_model
    from harness.models.resolve import quantized_by

    pytest.importorskip(EXTRAS[name], reason=f"{EXTRAS[name]} is not installed here")
    student, again = (
        REGISTRY.build(name, settings).compress(job(teacher, tmp_path / place))
        for place in ("a", "b")
    )
    assert student.digest == again.digest and student.bytes_on_disk == sum(
        one.stat().st_size for one in student.path.glob("*.safetensors")
    )
    subprocess.run(
        [sys.executable, "-P", "-c", OPENED, str(student.path), str(tmp_path / "out")],
        capture_output=True,
        check=True,
    )
    fresh = load_file(tmp_path / "out")["logits"]
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected, base = (open_model(one).model(ids).logits.float() for one in (student, teacher))
    assert (fresh - expected).abs().max() <= 1e-3 * max(1.0, float(expected.abs().max()))
    apart = float((expected - base).abs().mean() / base.std())
    assert (
        1e-4
        < apart
        < {
            "nf4": 0.4,
            "bnb-int8": 0.1,
            "torchao": 0.1,
            "quanto": {8: 0.05, 4: 0.6, 2: 3.0}.get(settings.get("bits")),
        }[name]
    )
    notes = json.loads((student.path.parent / "cost.json").read_text())["notes"][name]
    assert notes["packed_layers"] == 56 and notes["table_and_head"] == "skip"
    if name == "quanto":  # floats that stand for so many levels of each group
        row = load_file(student.path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"][0]
        assert row.dtype == torch.float32 and 2 < len(row.unique()) <= 2 ** settings["bits"]
    else:
        assert (
            quantized_by(student.path) == EXTRAS[name]
            and student.bytes_on_disk < 0.75 * teacher.bytes_on_disk
        )
        embeddings = load_file(student.path / "model.safetensors")["model.embed_tokens.weight"]
        assert embeddings.dtype == torch.bfloat16  # what is left alone takes no more than before


def test_students_hold_half_the_blocks_and_nothing_else(students, specialist):
    from safetensors.torch import load_file

    base = load_file(specialist.path / "model.safetensors")
    start = load_file(students["untouched"][0].path / "model.safetensors")
    for name, tensor in start.items():
        original = name
        for new, old in enumerate((0, 2, 5, 7)):
            if f".layers.{new}." in name:
                original = name.replace(f".layers.{new}.", f".layers.{old}.")
                break
        assert tensor.equal(base[original])
    config = json.loads((students["untouched"][0].path / "config.json").read_text())
    assert config["num_hidden_layers"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["depth:0.25", "width:0.5", "scratch:0.5"])
def test_students_of_every_recipe_reopen(recipe, teacher, tmp_path):
    student = QUICK.build("untouched", {}).compress(job(teacher, tmp_path / "x", student=recipe))
    subprocess.run(
        [sys.executable, "-P", "-c", REOPEN, "plain", str(tmp_path / "out"), str(student.path)],
        capture_output=True,
        check=True,
    )
    config = json.loads((student.path / "config.json").read_text())
    expected = {"depth:0.25": (2, 384), "width:0.5": (8, 192), "scratch:0.5": (4, 384)}[recipe]
    assert (config["num_hidden_layers"], config["intermediate_size"]) == expected


def test_a_full_width_student_is_the_teacher(teacher, tmp_path):
    import torch

    from harness.models.language_model import open_model
    from harness.models.shaping import student_of

    for recipe in ("width:1", "depth:1"):
        student = student_of(recipe, teacher, seed=0, device="cpu", dtype="float32")
        ids = torch.arange(2, 40)[None]
        with torch.no_grad():
            assert torch.allclose(
                student.model(ids).logits, open_model(teacher).model(ids).logits, atol=1e-5
            )


@pytest.mark.slow
def test_response_with_no_teacher_share_is_sft(teacher, tmp_path):
    alone = QUICK.build("sft", {}).compress(job(teacher, tmp_path / "sft"))
    zero = QUICK.build("response", {"teacher_share": 0.0}).compress(
        job(teacher, tmp_path / "response")
    )
    from safetensors.torch import load_file

    response, sft = (
        load_file(alone.path / "model.safetensors"),
        load_file(zero.path / "model.safetensors"),
    )
    assert all(response[key].equal(sft[key]) for key in response)


@pytest.mark.slow
def test_answer_only_sees_each_example_as_often_as_sft_does(teacher, tmp_path):
    sft = QUICK.build("sft", {}).compress(job(teacher, tmp_path / "a", tokens=6000))
    bare = QUICK.build("answer-only", {}).compress(job(teacher, tmp_path / "b", tokens=6000))
    equal = QUICK.build("answer-only", {"equal": "tokens"}).compress(
        job(teacher, tmp_path / "c", tokens=6000)
    )
    steps = {
        student.path: json.loads((student.path.parent / "cost.json").read_text())
        for student in (sft, bare, equal)
    }
    assert abs(steps[sft.path]["steps"] - steps[bare.path]["steps"]) <= 1
    assert steps[bare.path]["seen_tokens"] < steps[equal.path]["seen_tokens"] <= 6000
    assert steps[equal.path]["seen_tokens"] > 5800


@pytest.mark.slow
def test_only_right_and_finished_traces_survive(teacher, tmp_path):
    from methods.training.trace_filter import filter_traces

    examples = examples_of({"gsm8k-mini": TASKS["gsm8k-mini"]}, "train", LocalOrHubData(), rows=4)
    right_traces = [Generation(example.completion, 30, "eos") for example in examples]
    trace_job = job(teacher, tmp_path / "x")
    texts = [
        [right_traces[0], right_traces[0], Generation(examples[0].answer, 4, "eos")],
        [Generation(examples[1].completion + "1", 30, "eos")] * 3,
        [
            Generation(examples[2].completion, 30, "length"),
            right_traces[2],
            Generation("", 1, "eos"),
        ],
        [Generation("no number", 3, "eos")] * 3,
    ]
    kept, counts = filter_traces(examples, texts, trace_job)
    assert kept == [
        (examples[0], examples[0].completion),
        (examples[0], examples[0].answer),
        (examples[2], examples[2].completion),
    ]
    assert counts == {
        "traces_written": 12,
        "traces_kept": 3,
        "kept_in_another_form": 0,
        "dropped_wrong": 1,
        "dropped_unreadable": 2,
        "dropped_in_another_form": 0,
        "dropped_unfinished": 1,
        "dropped_short": 0,
        "dropped_repeats": 5,
        "dropped_contaminated": 0,
        "problems_without_trace": 2,
        "keep_rate": 0.25,
    }
    long_enough, counts = filter_traces(examples, texts, trace_job, shortest=5)
    assert len(long_enough) == 2 and counts["dropped_short"] == 5
    # as many, right or wrong, always the same for a seed
    drawn, counts = filter_traces(examples, texts, trace_job, reject_wrong=False)
    assert (
        len(drawn) == counts["traces_kept"] == 3
        and drawn == filter_traces(examples, texts, trace_job, reject_wrong=False)[0]
    )
    assert counts["wrong_among_kept"] == sum(example not in kept for example in drawn)


def test_a_right_answer_in_another_form_is_closed_as_the_task_closes_its_own(teacher, tmp_path):
    from methods.training.trace_filter import filter_traces

    trace_job = job(teacher, tmp_path / "x")
    examples = examples_of(trace_job.tasks, "train", trace_job.source, rows=5)
    golds = [example.gold for example in examples]
    answers = [
        f"So the answer is **{golds[0]}**.\n",
        f" {golds[1]}.",
        f"#### 0\nNo, the answer is {golds[2]}.",
        f"It is {golds[3]}1.",
        "Who knows?",
    ]
    texts = [[Generation(text, 9, "eos")] for text in answers]
    kept, counts = filter_traces(examples, texts, trace_job)
    assert kept == [
        (examples[0], f"So the answer is **{golds[0]}**.\n#### {golds[0]}"),
        (examples[1], examples[1].answer),
    ]
    assert (
        counts["kept_in_another_form"],
        counts["dropped_wrong"],
        counts["dropped_unreadable"],
    ) == (2, 2, 1)
    # a task that cannot say how its answers end
    silent = [replace(example, ending="") for example in examples]
    with pytest.raises(
        CellFailed,
        match="by the teacher 2 were wrong, 1 had no readable answer, 2 were right in another form",
    ):
        filter_traces(silent, texts, trace_job)


def test_a_task_without_any_trace_is_named_and_what_would_end_its_answers(teacher, tmp_path):
    from methods.training.trace_filter import filter_traces

    progress = []
    trace_job = job(teacher, tmp_path / "x", tasks=TASKS, progress=progress.append)
    examples = examples_of(TASKS, "train", trace_job.source, rows=4)
    texts = [
        [Generation(example.completion, 30, "eos" if example.task == "gsm8k-mini" else "length")]
        for example in examples
    ]
    kept, counts = filter_traces(examples, texts, trace_job)
    assert (
        {example.task for example, _ in kept}
        == {"gsm8k-mini"}
        == set(TASKS) - set(counts["tasks_without_trace"])
    )
    assert (
        "of 2 answers" in counts["tasks_without_trace"]["mmlu-mini"]
        and "mmlu-mini" in progress[-1].detail
    )
    with pytest.raises(
        CellFailed, match=r"2 did not end, .*; most did not end: --set cot.longest=60$"
    ):
        filter_traces(examples[1::2], texts[1::2], trace_job)


def test_calculator_marks_are_not_trained(teacher, tmp_path):
    from methods.training.trace_filter import filter_traces

    [example] = examples_of({"gsm8k-mini": TASKS["gsm8k-mini"]}, "train", LocalOrHubData(), rows=1)
    marked = example.completion.replace("=", "=<<1+1=2>>", 1)
    assert filter_traces(
        [example], [[Generation(marked, 30, "eos")]], job(teacher, tmp_path / "x")
    )[0] == [(example, example.completion)]


def test_a_problem_that_is_also_an_evaluation_item_is_dropped_with_its_traces(teacher, tmp_path):
    from dataclasses import replace

    from methods.training.trace_filter import filter_traces

    trace_job = job(teacher, tmp_path / "x")
    trained, tested = (
        examples_of(trace_job.tasks, split, LocalOrHubData(), rows=2) for split in ("train", "test")
    )
    leaked = replace(
        trained[0], prompt="One shot.\n\n" + tested[0].prompt.upper().replace(" ", "  ")
    )
    texts = [[Generation(example.completion, 30, "eos")] for example in trained]
    kept, counts = filter_traces([leaked, trained[1]], texts, trace_job)
    assert [example for example, _ in kept] == [trained[1]] and counts["dropped_contaminated"] == 1


def test_a_long_run_of_words_from_an_evaluation_item_counts_in_data_from_outside_only():
    from types import SimpleNamespace

    from harness.contract import Example
    from harness.data.contamination import overlapping_prompts

    def task(files, text):
        items = [Example(task="t", prompt=text, completion="", answer="", gold="")]
        return SimpleNamespace(
            name="t", kind="generate", files=files, examples=lambda split, source: iter(items)
        )

    run = " ".join(f"w{number}" for number in range(13))
    near, far = (
        Example(task="t", prompt=f"{words} and something else", completion="", answer="", gold="")
        for words in (run, run.rpartition(" ")[0])
    )
    for files, expected in ((("a.jsonl",), {near.prompt}), ((), set())):
        assert (
            overlapping_prompts(
                [near, far], {"t": task(files, f"before {run} after")}, LocalOrHubData()
            )
            == expected
        )


def test_a_question_shown_in_a_chat_template_is_compared_without_it():
    from types import SimpleNamespace

    from harness.contract import Example
    from harness.data.contamination import overlapping_prompts

    items = [Example(task="t", prompt="What is  two and two?", completion="", answer="", gold="4")]
    task = SimpleNamespace(
        name="t", kind="generate", files=(), examples=lambda split, source: iter(items)
    )
    shown = Example(
        task="t",
        prompt="<user>What is two and TWO?<end>",
        completion="",
        answer="",
        gold="4",
        plain="What is two and TWO?",
    )
    assert overlapping_prompts([shown], {"t": task}, LocalOrHubData()) == {shown.prompt}
    assert (
        overlapping_prompts(
            [replace(shown, plain="What is two and three?")], {"t": task}, LocalOrHubData()
        )
        == set()
    )


@pytest.mark.slow
def test_a_teacher_that_solves_nothing_fails_with_its_counts(random_model, tmp_path):
    with pytest.raises(
        CellFailed,
        match=r"no trace survived: of 8 answers .* were wrong, .* did not end, .* too short",
    ):
        REGISTRY.build("cot", {"longest": 12}).compress(job(random_model, tmp_path / "x", rows=8))


@pytest.mark.slow
def test_traces_are_cached_by_content_and_a_damaged_cache_is_made_again(
    teacher, tmp_path, monkeypatch
):
    from methods.training import traces

    trace_job = job(teacher, tmp_path / "x")
    examples = examples_of(trace_job.tasks, "train", trace_job.source, rows=6)
    sampling = {"samples": 1, "temperature": 0.0, "longest": 96}
    first = traces.teacher_traces(trace_job, examples, **sampling)
    calls = []
    generate = traces.Writer.generate
    monkeypatch.setattr(
        traces.Writer, "generate", lambda *a, **k: calls.append(1) or generate(*a, **k)
    )
    assert traces.teacher_traces(trace_job, examples, **sampling) == first and not calls
    assert (
        traces.teacher_traces(trace_job, examples[:5], **sampling).texts == first.texts[:5]
        and len(calls) == 1
    )
    other_teacher = Checkpoint(path=teacher.path, name="other", digest="another model")
    traces.teacher_traces(
        Job(**{**trace_job.__dict__, "teachers": (other_teacher,)}), examples, **sampling
    )
    assert len(calls) == 2  # a second teacher is really asked
    for path in (tmp_path / "cache" / "traces").iterdir():
        path.write_text(path.read_text()[:-40])
    assert (
        traces.teacher_traces(trace_job, examples, **sampling).texts == first.texts
        and len(calls) == 3
    )


@pytest.mark.slow
def test_sampled_traces_differ_and_repeat_with_the_seed(teacher, tmp_path):
    from methods.training import traces

    trace_job = job(teacher, tmp_path / "x")
    examples = examples_of(trace_job.tasks, "train", trace_job.source, rows=3)
    sampling = {"samples": 4, "temperature": 4.0, "longest": 48}
    first = traces.teacher_traces(trace_job, examples, **sampling)
    assert all(len({trace.text for trace in group}) > 1 for group in first.texts)
    again = Job(**{**trace_job.__dict__, "cache": tmp_path / "elsewhere"})
    assert traces.teacher_traces(again, examples, **sampling).texts == first.texts


@pytest.mark.gpu
def test_training_on_a_gpu_gives_a_student(teacher, tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    gpu_job = Job(
        **{**job(teacher, tmp_path / "x").__dict__, "device": "cuda", "dtype": "bfloat16"}
    )
    assert REGISTRY.build("response", {}).compress(gpu_job).bytes_on_disk > 0


@pytest.mark.parametrize("setting", ["compute", "double"])
def test_a_setting_that_a_format_does_not_have_is_refused(setting):
    value = {"compute": "float32", "double": True}[setting]
    assert method_registry().build("nf4", {setting: value})
    with pytest.raises(HarnessError, match=f"unknown setting of bnb-int8 '{setting}'"):
        method_registry().build("bnb-int8", {setting: value})
