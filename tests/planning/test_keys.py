"""Keys contain everything that can change a number, and nothing else."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import methods
import suites
from harness.api import plan_run
from harness.files.closure import code_digest, code_digests
from harness.models.resolve import EMBEDDED
from harness.planning import keys
from harness.planning.config import build_config
from harness.registry import Registry

ROOT = Path(methods.__file__).parents[1]
ROWS = ("cot", "response", "int8", "prune-wanda", "untouched")


def plan(**values):
    return plan_run(build_config({"methods": ROWS, "suite": ("mini",), **values}))


def keyed(planned):
    return {cell.label: (cell.key, cell.student_key) for cell in planned.cells}


def changed(before, after):
    """Return the rows whose student's key changed, and those whose cell's did."""
    old_keys, new_keys = keyed(before), keyed(after)
    return {row for row in old_keys if old_keys[row][1] != new_keys[row][1]}, {
        row for row in old_keys if old_keys[row][0] != new_keys[row][0]
    }


# --- how much code a key holds

REPORTING = (
    "report",
    "page",
    "plots",
    "table",
    "quality",
    "costs",
    "claims",
    "groups",
    "stats",
    "means",
    "corpus",
    "gate",
    "gate_claims",
    "gate_frozen",
    "baseline",
    "cli",
    "cli_check",
    "console",
    "api",
    "runner",
    "store",
    "config",
    "chain",
    "card",
    "export",
    "advice",
    "estimate",
    "plan",
)


@pytest.mark.parametrize("name", [*methods.METHODS, *suites.TASKS])
def test_no_student_and_no_task_holds_what_tables_and_commands_are_made_by(name):
    kind, table = ("method", methods.METHODS) if name in methods.METHODS else ("task", suites.TASKS)
    files = code_digests(Registry(kind, table).load(name))
    assert not {
        f"harness/{module}.py" for module in (*REPORTING, "stopwatch", "measure", "score", "lm")
    } & set(files)


@pytest.mark.parametrize("name", keys.SCORING_MODULES + keys.TIMING_MODULES)
def test_no_score_holds_what_tables_and_commands_are_made_by(name):
    assert not {f"harness/{module}.py" for module in REPORTING} & set(code_digests(name))


@pytest.mark.parametrize(
    "name", keys.SCORING_MODULES + keys.TIMING_MODULES + keys.MODEL_MODULES + keys.CELL_MODULES
)
def test_the_roots_of_keys_are_there(name):
    assert f"{name.replace('.', '/')}.py" in code_digests(name)


@pytest.mark.skipif(
    not (ROOT / "methods" / "base.py").exists(), reason="settings stand beside the loop"
)
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in methods.METHODS
        if name.startswith(("int", "nf4", "bnb", "fake", "gptq", "prune", "low"))
    ],
)
def test_what_is_not_trained_holds_no_loop(name):
    files = code_digests(Registry("method", methods.METHODS).load(name))
    assert not {
        f"methods/_{module}.py"
        for module in (
            "training",
            "terms",
            "losses",
            "teacher_cache",
            "traces",
            "rows",
            "tuning",
            "base",
        )
    } & set(files)


@pytest.mark.parametrize("name", methods.METHODS)
def test_whoever_asks_a_grader_holds_it(name):
    kind = Registry("method", methods.METHODS).load(name)
    files = code_digests(kind)
    grades = any(
        ".grade(" in (ROOT / file).read_text() for file in files if file.startswith("methods/")
    )
    assert grades or not kind().writes_traces
    if kind().writes_traces:
        assert "suites/loading/numbers.py" in keys.CodeDigests(
            {"gsm8k-mini": suites.load("gsm8k-mini")}
        ).for_student(kind())


def test_a_loss_is_not_behind_answers():
    assert not any(
        name.startswith("methods/") for name in code_digests("harness.scoring.lm_eval_model")
    )


# --- edits of our own code, in a copy of it

PACKED = {"int8", "prune-wanda", "prune-magnitude", "prune-random"}  # with its controls
EDITS = {
    "a comment in _quantization": ("methods/compression/quantized.py", "\n# a remark\n", (), ()),
    "a comment in the grader": ("suites/loading/numbers.py", "\n# a remark\n", (), ()),
    "the grader": ("suites/loading/numbers.py", "\nADDED = 1\n", {"cot"}, "all"),
    "a task": (
        "suites/gsm8k_mini.py",
        "\nADDED = 1\n",
        {"cot", "response", "prune-wanda", "sft", "answer-only"},
        "all",
    ),
    "items": (
        "suites/loading/generated.py",
        "\nADDED = 1\n",
        {"cot", "response", "prune-wanda", "sft", "answer-only"},
        "all",
    ),
    "the scorer": ("harness/scoring/lm_eval_model.py", "\nADDED = 1\n", (), "all"),
    "the timing": ("harness/measuring/worker.py", "\nADDED = 1\n", (), "all"),
    "fidelity": ("harness/scoring/fidelity.py", "\nADDED = 1\n", (), "all"),
    "the process of a cell": ("harness/running/cell.py", "\nADDED = 1\n", (), "all"),
    "how a cell evaluates": ("harness/running/evaluation.py", "\nADDED = 1\n", (), "all"),
    "how a cell makes students": ("harness/running/student.py", "\nADDED = 1\n", (), "all"),
    # its defaults decide what is computed
    "what a cell is told": ("harness/running/job.py", "\nADDED = 1\n", (), "all"),
    "the words of a failure": ("harness/running/failure.py", "\nADDED = 1\n", (), ()),
    "what reads old names": ("harness/renames/settings.py", "\nADDED = 1\n", (), ()),
    "the plan": ("harness/planning/plan.py", "\nADDED = 1\n", (), ()),
    "generation": ("harness/scoring/generation.py", "\nADDED = 1\n", {"cot"}, "all"),
    "decoding": ("harness/scoring/decoding.py", "\nADDED = 1\n", {"cot"}, "all"),
    "likelihoods": ("harness/scoring/likelihood.py", "\nADDED = 1\n", (), "all"),
    "reading for caches": (
        "harness/scoring/reading.py",
        "\nADDED = 1\n",
        {"cot", "response", "sft", "answer-only"},
        "all",
    ),
    "reading for distances": ("harness/scoring/plain_reading.py", "\nADDED = 1\n", (), "all"),
    "traces": ("methods/training/traces.py", "\nADDED = 1\n", {"cot"}, {"cot"}),
    "int8 itself": ("methods/int8.py", "\nADDED = 1\n", {"int8"}, {"int8"}),
    "packing": ("methods/compression/rounding.py", "\nADDED = 1\n", PACKED, PACKED),
    "what opens models": ("harness/models/packed.py", "\nADDED = 1\n", "made", "all"),
    "tables": ("harness/reporting/report.py", "\nADDED = 1\n", (), ()),
    "statistics": ("harness/statistics/stats.py", "\nADDED = 1\n", (), ()),
    "intervals of means": ("harness/statistics/means.py", "\nADDED = 1\n", (), ()),
    "the gate": ("harness/gate/check.py", "\nADDED = 1\n", (), ()),
    "the command": ("harness/cli/app.py", "\nADDED = 1\n", (), ()),
    "options": ("harness/planning/config.py", "\nADDED = 1\n", (), ()),
    "the table of methods": ("methods/__init__.py", "\nADDED = 1\n", (), ()),
    "the table of renames": ("harness/renames/__init__.py", "\nADDED = 1\n", (), ()),
}
PROGRAM = """
import json, sys
from pathlib import Path
from harness.api import plan_run
from harness.planning.config import build_config

root, edits = Path(sys.argv[1]), json.loads(sys.argv[2])
def keys_by_label():
    planned = plan_run(build_config({"methods": ROWS, "suite": ("mini",)}))
    return {cell.label: (cell.key, cell.student_key) for cell in planned.cells}
keys = keys_by_label()
changes = {}
for name, (file, addition) in edits.items():
    path = root / file
    text = path.read_text()
    path.write_text(text + addition)
    after = keys_by_label()
    changes[name] = [
        [row for row in keys if keys[row][kind] != after[row][kind]] for kind in (1, 0)
    ]
    path.write_text(text)
assert keys_by_label() == keys
print(json.dumps([list(keys), changes]))
"""


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """Return the rows of a plan, and which students and cells each edit makes anew."""
    root = tmp_path_factory.mktemp("copy")
    for package in ("harness", "methods", "suites"):
        shutil.copytree(
            ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    edits = json.dumps({name: edit[:2] for name, edit in EDITS.items()})
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("ROWS", repr(ROWS)), str(root), edits],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(root), "PATH": ""},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_makes_anew_what_it_can_change(edited, edit):
    rows, changes = edited
    students, cells = (set(labels) for labels in changes[edit])
    groups = {"all": set(rows), "made": set(rows) - {"teacher"}}
    for changed_rows, expected in ((students, EDITS[edit][2]), (cells, EDITS[edit][3])):
        assert (
            changed_rows == groups.get(expected, set(expected))
            if isinstance(expected, str)
            else changed_rows == set(expected)
        )


# --- what else is in the keys

OF_STUDENTS = {
    "teachers",
    "base",
    "recipe",
    "device",
    "dtype",
    "rows",
    "train",
    "threads",
    "method",
    "settings",
    "budget",
    "seed",
    "text",
    "parent",
    "code",
}
OF_CELLS = {"tasks", "code", "lm-eval", "measure", "grid", "machine", "noise"}
OF_TEACHERS = OF_CELLS | {"teachers", "device", "dtype", "data", "prompting", "teacher"}
# settings -> parts that are in keys only where these are not at their defaults: of students, of
# cells
WHERE_SET = {
    "defaults": ({}, set(), set()),
    "a search for the rate": ({"tune": True}, {"tune"}, set()),
    "weights of teachers": ({"teacher": ("tiny=0.7", "tiny-math=0.3")}, {"weights"}, set()),
    "a limit": ({"limit": 10}, set(), {"limit"}),
}


@pytest.mark.parametrize("name", WHERE_SET)
def test_keys_hold_these_parts_and_others_only_where_they_are_set(name):
    settings, of_students, of_cells = WHERE_SET[name]
    planned = plan(methods=("sft", "untouched"), suite=("math",), data_dir=None, **settings)
    for cell in planned.cells:
        parts = set(planned.parts[cell.key]["held"])
        assert parts == (OF_CELLS if cell.stages else OF_TEACHERS) | of_cells
        assert all(
            set(planned.parts[stage.key]["held"]) == OF_STUDENTS | of_students
            for stage in cell.stages
        )


def test_budget_and_seed_are_in_keys_of_what_draws_and_a_chains_stage_holds_its_parent():
    planned = plan(methods=("prune-depth+sft",), budget=1_000, seeds=2)
    for cell in (cell for cell in planned.cells if cell.label == "prune-depth+sft"):
        cut, trained = (planned.parts[stage.key]["held"] for stage in cell.stages)
        assert (cut["seed"], cut["budget"], cut["parent"]) == (None, 0, "")
        assert (trained["seed"], trained["budget"], trained["parent"]) == (
            cell.seed,
            1_000,
            cell.stages[0].key,
        )
        assert (
            planned.parts[cell.key]["students"] == [stage.key for stage in cell.stages]
            and cell.student_key == cell.stages[-1].key
        )


def test_the_version_of_lm_eval_is_in_cells_alone(monkeypatch):
    before = plan()
    monkeypatch.setattr("harness.planning.plan.lm_eval_version", lambda: "9.9")
    students, cells = changed(before, plan())
    assert not students and cells == set(keyed(before))


PLUGIN = {
    "__init__.py": "",
    "helper.py": "from acme_keys.deeper import two\n",
    "deeper.py": "two = 2\n",
    "unused.py": "",
    "method.py": """
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Mine:
    "Mine."
    family: ClassVar = "pruning"
    controls: ClassVar = ()
    trains: ClassVar = False
    is_control: ClassVar = False
    same_vocabulary: ClassVar = False

    def compress(self, job):
        from .helper import two
""",
}


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Return the folder of a method's package from elsewhere, known as `acme`."""
    folder = tmp_path / "acme_keys"
    folder.mkdir()
    for name, text in PLUGIN.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(methods.METHODS, "acme", "acme_keys.method:Mine")
    importlib.invalidate_caches()
    yield folder
    for loaded in [name for name in sys.modules if name.startswith("acme_keys")]:
        del sys.modules[loaded]


@pytest.mark.parametrize(
    ("file", "anew"),
    [
        ("method.py", True),
        ("helper.py", True),
        ("deeper.py", True),
        ("__init__.py", True),
        ("unused.py", False),
    ],
)
def test_a_helper_of_another_package_is_in_its_students_keys(plugin, file, anew):
    before = plan(methods=("acme", "int8"), controls=False)
    (plugin / file).write_text((plugin / file).read_text() + "\nADDED = 1\n")
    students, cells = changed(before, plan(methods=("acme", "int8"), controls=False))
    assert students == cells == ({"acme"} if anew else set())


def test_the_data_folders_free_text_is_in_what_calibrates(tmp_path):
    text = tmp_path / "c4_demo" / "c4_demo.jsonl"
    text.parent.mkdir()
    text.write_text('{"text": "one"}\n')
    before = plan(data_dir=tmp_path)
    text.write_text('{"text": "two, in place"}\n')
    students, cells = changed(before, plan(data_dir=tmp_path))
    assert students == cells == {"prune-wanda"}


def test_the_files_of_tasks_are_in_all_keys(tmp_path):
    place = tmp_path / "wikitext2" / "wiki.test.raw"
    place.parent.mkdir()
    place.write_text(" = A = \n text\n")
    before = plan(methods=("int8",), suite=("wikitext",), data_dir=tmp_path)
    place.write_text(" = A = \n other text\n")
    assert changed(before, plan(methods=("int8",), suite=("wikitext",), data_dir=tmp_path))[
        1
    ] == set(keyed(before))


def test_a_template_changed_in_place_is_in_all_keys(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED / "tiny", model)
    template = model / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    before = plan(teacher=(str(model),), methods=("int8",), cache=tmp_path / "cache")
    template.write_text("{% for m in messages %}> {{ m.content }}{% endfor %}")
    assert changed(
        before, plan(teacher=(str(model),), methods=("int8",), cache=tmp_path / "cache")
    )[1] == set(keyed(before))


@pytest.mark.parametrize(
    "edit",
    [
        ("num_fewshot: 0", "num_fewshot: 5"),
        ("doc_to_text: a", "doc_to_text: b"),
        ("version: 1", "version: 2"),
    ],
)
def test_the_files_that_define_a_task_of_lm_evals_own_are_in_its_definition(tmp_path, edit):
    from suites.loading.definition import TaskDefinition
    from suites.loading.outside import LmEvalTask

    file = tmp_path / "own.yaml"
    (tmp_path / "base.yaml").write_text("num_fewshot: 0\nmetadata:\n  version: 1\n")

    def definition(changes=()):
        task = object.__new__(LmEvalTask)
        task._definitions = [
            TaskDefinition(name="own", path=file, changes=dict(changes), local=False)
        ]
        return task.definition

    file.write_text("include: base.yaml\ndoc_to_text: a\n")
    before = definition()
    assert definition({"num_fewshot": 3}) != before
    for place in (file, tmp_path / "base.yaml"):
        place.write_text(place.read_text().replace(*edit))
    assert definition() != before
    assert keys.lm_eval_parts({"own": type("T", (), {"definition": before})()})["definitions"] == {
        "own": before
    }


def test_answers_and_traces_and_caches_hold_their_own_code():
    assert {
        "harness/scoring/generation.py",
        "harness/scoring/likelihood.py",
        "harness/scoring/prefix_sharing.py",
        "harness/scoring/rounding.py",
    } <= set(code_digests("harness.scoring.lm_eval_model"))
    assert {"methods/training/traces.py", "harness/scoring/generation.py"} <= set(
        code_digests("methods.training.traces")
    )
    assert {"methods/training/teacher_cache.py", "methods/training/rows.py"} <= set(
        code_digests("methods.training.teacher_cache")
    )
    assert {
        "methods/training/tuning.py",
        "methods/training/loop.py",
        "methods/training/noise.py",
    } <= set(code_digests("methods.training.tuning"))
    assert (
        len(
            {
                code_digest(name)
                for name in (
                    "harness.scoring.lm_eval_model",
                    "methods.training.traces",
                    "methods.training.teacher_cache",
                    "methods.training.tuning",
                )
            }
        )
        == 4
    )
