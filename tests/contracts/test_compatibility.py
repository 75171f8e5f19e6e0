"""What goes on to work (docs/compatibility.md): old files, and old names, typed and imported.

The page itself is fresh.
"""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from harness import renames
from harness.errors import OldName
from harness.files.closure import code_digests
from harness.gate.check import check
from harness.gate.rules import Rules
from harness.records import baseline as baselines
from harness.records import record as records
from harness.records.baseline import Baseline, Change, freeze_record, read_baseline, write_baseline
from harness.registry import Registry
from harness.renames.modules import current_modules
from harness.reporting.report import markdown

ROOT = Path(__file__).parents[2]
NEW_NAMES = 9  # the first schema whose records have settings by the names of now
STUDY = ROOT / "results" / "compression-smollm2" / "records"


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def test_the_page_and_the_schema_are_what_their_program_writes():
    program = generator()
    text = program.PAGE.read_text(encoding="utf-8")
    assert program.page(text) == text and program.schema() == program.SCHEMA_FILE.read_text(
        encoding="utf-8"
    ), "type: python docs/generate.py"
    for old, (new, *_) in (
        renames.SETTINGS | renames.TRAITS | renames.MODULES | renames.COLUMNS
    ).items():
        assert f"| `{old}` | `{new}`" in text
    assert program.page(text.replace("| `group` |", "| `groups` |")) == text


def test_no_page_tells_anybody_to_type_an_old_name():
    pages = [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "results").glob("*/findings.md"),
    ]
    for path in pages:
        text = path.read_text(encoding="utf-8")
        for old, (*_, having) in renames.SETTINGS.items():
            for method in having:
                assert f"{method}.{old}=" not in text and f"{method}[{old}=" not in text, path


# Files


def signed(data):
    data = {name: value for name, value in data.items() if name != "digest"}
    return json.dumps(
        {**data, "digest": records._digest(data)}
        if data["schema"] >= records._FIRST_SIGNED_SCHEMA
        else data
    )


def study(folder, rows, schema):
    """Write records as an older schema had them: int4's row by these names, the others as is."""
    folder.mkdir()
    for name in ("teacher", "int4", "int4-calibrated"):
        data = json.loads((STUDY / f"{name}.json").read_text())
        data |= {**rows.get(name, {}), "schema": schema}
        if schema >= 10:
            data["inherited_settings"] = data.pop("handed_on")
        (folder / f"{name}.json").write_text(signed(data))
    return [records.read_record(path) for path in sorted(folder.iterdir())]


OLD = {
    "int4": {
        "label": "int4[group=128]",
        "settings": {"group": 128, "zeros": False, "embeddings": "int8", "skip": []},
    },
    "int4-calibrated": {
        "settings": {
            "group": 64,
            "zeros": True,
            "skip": ["lm_head"],
            "sequences": 16,
            "tokens": 32,
            "damp": 0.01,
        },
        "handed_on": {"group": 64, "zeros": True, "skip": ["lm_head"]},
    },
}
NEW = {
    "int4": {
        "label": "int4[group_size=128]",
        "settings": {"group_size": 128, "symmetric": True, "embeddings": "int8", "ignore": []},
    },
    "int4-calibrated": {
        "settings": {
            "group_size": 64,
            "symmetric": False,
            "ignore": ["lm_head"],
            "num_calibration_samples": 16,
            "max_seq_length": 32,
            "dampening_frac": 0.01,
        },
        "handed_on": {"group_size": 64, "symmetric": False, "ignore": ["lm_head"]},
    },
}


@pytest.mark.parametrize("schema", range(records._FIRST_SIGNED_SCHEMA, NEW_NAMES))
def test_records_of_older_schemas_are_the_rows_of_now(schema, tmp_path):
    old, new = study(tmp_path / "old", OLD, schema), study(tmp_path / "new", NEW, records.SCHEMA)
    assert old == new
    assert (
        markdown(old) == markdown(new)
        and "int4[group_size=128]" in markdown(old)
        and "[group=" not in markdown(old)
    )


@pytest.mark.parametrize("schema", range(1, NEW_NAMES))
def test_chains_of_older_schemas_have_the_names_of_now_in_every_stage(schema, tmp_path):
    data = json.loads(
        (ROOT / "results" / "compression-tiny" / "records" / "prune-depth_int8.json").read_text()
    )
    short = [name for name in data["scores"][0] if name not in records._LATER_FIELDS]
    scores = (
        data["scores"]
        if schema >= records._FIRST_SIGNED_SCHEMA
        else [{name: score[name] for name in short} for score in data["scores"]]
    )
    stages = [
        {**data["stages"][0], "label": "prune-depth[sequences=8]"},
        {**data["stages"][1], "label": "prune-depth[sequences=8]+int8[skip=*.mlp]"},
    ]
    settings = {
        "prune-depth": {"sequences": 8, "tokens": 256},
        "int8": {"embeddings": "skip", "skip": ["*.mlp"]},
    }
    changed = {
        "stages": stages,
        "label": stages[1]["label"],
        "settings": settings,
        "scores": scores,
        "schema": schema,
        "handed_on": {"skip": 1},
    }
    (tmp_path / "old.json").write_text(signed({**data, **changed}))
    read = records.read_record(tmp_path / "old.json")
    assert (
        read.label
        == read.stages[1].label
        == "prune-depth[num_calibration_samples=8]+int8[ignore=*.mlp]"
    )
    assert read.stages[
        0
    ].label == "prune-depth[num_calibration_samples=8]" and read.inherited_settings == {"ignore": 1}
    assert read.settings == {
        "prune-depth": {"num_calibration_samples": 8, "max_seq_length": 256},
        "int8": {"embeddings": "skip", "ignore": ["*.mlp"]},
    }


@pytest.mark.parametrize("field", ["label", "settings", "stages", "handed_on", "method"])
@pytest.mark.parametrize("value", [None, 7, [7], {"a": None}, "x"])
def test_an_older_record_of_a_wrong_form_is_refused_and_breaks_nothing(field, value, tmp_path):
    data = json.loads((STUDY / "int4.json").read_text())
    (tmp_path / "odd.json").write_text(signed({**data, field: value}))
    try:
        assert records.read_record(tmp_path / "odd.json").label
    except records.BadRecord as refused:
        now = {"handed_on": "inherited_settings"}.get(field, field)
        assert now in str(refused) and "\n" not in str(refused)


def of_schema_2(path, old, new):
    """Turn a baseline into the file that an older version had written of the same row."""
    data = json.loads(path.read_text().replace(new, old)) | {"schema": 2}
    path.write_text(json.dumps({**data, "digest": baselines._digest(data)}))


def test_a_row_of_an_older_baseline_is_still_that_row(tmp_path):
    old, new = study(tmp_path / "old", OLD, 7), study(tmp_path / "new", NEW, records.SCHEMA)
    frozen = tuple(map(freeze_record, old))
    names = tuple(row.label for row in frozen)
    change = Change(
        reason="first",
        date="2026-11-25T00:00:00Z",
        commit=None,
        rows=names,
        accepted=("int4[group_size=128]",),
    )
    path = tmp_path / "baseline.json"
    write_baseline(path, Baseline(history=(change,), rows=frozen))
    today = read_baseline(path)
    of_schema_2(path, "int4[group=128]", "int4[group_size=128]")
    assert "int4[group=128]" in path.read_text() and "group_size" not in path.read_text()
    before = read_baseline(path)
    assert before.model_copy(update={"digest": ""}) == today.model_copy(update={"digest": ""})
    assert before.last_change("int4[group_size=128]").accepted == ("int4[group_size=128]",)
    findings = check(new, Rules(), before).findings
    assert any(
        finding.row == "int4[group_size=128]"
        and finding.layer == "frozen"
        and finding.verdict.value == "passed"
        for finding in findings
    )
    assert not [finding.told for finding in findings if finding.verdict.value == "not comparable"]


# Typed and imported


def harness(*words, **more):
    line = [sys.executable, "-m", "harness.cli.app", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=120, **more)


def rows(done):
    """Return the rows that are to be computed, with their seeds."""
    lines = [line.strip() for line in done.stdout.splitlines() if ": to compute" in line]
    return [line.partition(": to compute")[0].removesuffix(" (control)") for line in lines]


def old_lines(done):
    return [line for line in done.stderr.splitlines() if "the old name works until version" in line]


PLAN = ("run", "--dry-run", "--suite", "mini", "--no-controls", "--out")
TYPED = {
    "a setting": (
        ["--methods", "int4,fake-int4", "--set", "int4.group=32", "--set", "fake-int4.group=32"],
        "int4[group_size=32]",
        1,
    ),
    "brackets": (
        ["--methods", "int4[group=32,zeros=true],int8[skip=*.mlp]"],
        "int4[group_size=32,symmetric=False]",
        3,
    ),
    "a chain": (
        ["--methods", "prune-wanda[sequences=8]+sft[clip=0.5]"],
        "prune-wanda[num_calibration_samples=8]+sft[max_grad_norm=0.5] seed 1",
        2,
    ),
    "three seeds": (
        ["--methods", "sft[warmup=0.1]", "--seeds", "3"],
        "sft[warmup_ratio=0.1] seed 3",
        1,
    ),
    "brackets beside a setting": (
        ["--methods", "int4[group_size=32]", "--set", "int4.group=128"],
        "int4[group_size=32]",
        1,
    ),
}


@pytest.mark.parametrize("way", TYPED)
def test_old_names_are_typed_and_each_is_said_in_one_line(way, tmp_path):
    words, row, said = TYPED[way]
    done = harness(*PLAN, tmp_path / "runs", *words)
    assert done.returncode == 0 and row in rows(done), done.stderr
    assert len(old_lines(done)) == said and len(done.stderr.splitlines()) == said


def test_a_run_file_of_old_names_plans_the_rows_of_now(tmp_path):
    (tmp_path / "run.toml").write_text(
        'methods = ["int4-calibrated", "sft"]\n'
        "[set.int4-calibrated]\ndamp = 0.1\n[set.sft]\nmicro_rows = 4\n"
    )
    done = harness(*PLAN, tmp_path / "runs", tmp_path / "run.toml")
    assert done.returncode == 0 and len(old_lines(done)) == 2, done.stderr
    assert rows(done) == [
        "teacher",
        "int4-calibrated[dampening_frac=0.1]",
        "sft[micro_batch_size=4] seed 1",
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["int4[group=32,group_size=64]"],
        ["int4", "--set", "int4.group=32", "--set", "int4.group_size=64"],
    ],
)
def test_an_old_name_beside_its_new_one_is_refused(words, tmp_path):
    done = harness(*PLAN, tmp_path / "runs", "--methods", *words)
    assert done.returncode == 2 and done.stdout == ""
    line = (
        "harness: int4: group=32 and group_size=64 are two names for one setting, and differ; "
        "which is meant? Keep group_size, its name now"
    )
    assert done.stderr.splitlines() == [line]


def test_a_report_is_asked_for_a_row_by_its_old_name(tmp_path):
    study(tmp_path / "records", OLD, 7)
    done = harness(
        "report", tmp_path / "records", "--out", tmp_path / "tables", "--against", "int4[group=128]"
    )
    assert done.returncode == 0 and len(old_lines(done)) == 1, done.stderr
    assert "Against int4[group_size=128]" in done.stdout


def test_a_check_is_asked_for_a_row_by_its_old_name(tmp_path):
    study(tmp_path / "records", OLD, 7)
    judged = [
        harness("check", tmp_path / "records", "--margin", "50%", "--rows", f"int4[{name}=128]")
        for name in ("group", "group_size")
    ]
    assert judged[0].stdout == judged[1].stdout and "int4[group_size=128]" in judged[0].stdout, (
        judged[0].stderr
    )
    assert [len(old_lines(done)) for done in judged] == [1, 0] and judged[0].returncode == judged[
        1
    ].returncode != 2
    both = harness("check", tmp_path / "records", "--rows", "int4[group=128],int4[group_size=128]")
    assert both.returncode == 2 and "--rows: int4[group_size=128] is named twice" in both.stderr


def test_a_table_is_sorted_by_a_column_of_its_old_header(tmp_path):
    done = harness(
        "report", ROOT / "results" / "embedded", "--out", tmp_path / "a", "--sort", "seen"
    )
    again = harness(
        "report", ROOT / "results" / "embedded", "--out", tmp_path / "b", "--sort", "tokens seen"
    )
    assert done.returncode == 0 and len(old_lines(done)) == 1 and old_lines(again) == [], (
        done.stderr
    )
    assert (tmp_path / "a" / "table.md").read_bytes() == (tmp_path / "b" / "table.md").read_bytes()


@pytest.mark.parametrize("old", [old for old in renames.MODULES if ":" not in old])
def test_a_module_is_imported_by_its_old_name(old):
    first = renames.MODULES[old][0].partition(", ")[0]
    public = {
        "methods._settings": "settings",
        "harness.checkpoint": "describe",
        "methods._base": "Trained",
        "methods._terms": "hard_labels",
        "methods._distil": "Distilled",
    }
    name = public.get(old, "open_model")
    lines = (
        f"from {old} import {name} as old\nimport {old}\nfrom {first} import {name} as new\nassert "
        "old is new\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (
        len(old_lines(done)) == len(done.stderr.splitlines()) == 1
        and f"{old} is {renames.MODULES[old][0]} now" in done.stderr
    )


def test_the_parts_of_a_split_module_are_found():
    lines = (
        "from harness.model import open_model, save_student, resolve\nfrom harness.checkpoint "
        "import describe, write_whole\n"
    )
    lines += (
        "from methods._base import Trained, Teachers, shared_vocabulary, sources_of, context_of\n"
    )
    lines += (
        "from methods._terms import TopK, Distribution, Head, OtherTokens, Score, mixed_kl, "
        "hard_labels\n"
    )
    lines += "try:\n from harness.model import nothing\nexcept ImportError: print('no')"
    done = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "no\n"), done.stderr
    assert all(
        importlib.util.find_spec(part.partition(":")[0])
        for old in renames.MODULES
        for part in current_modules(old)
    )


PLUG_IN = """
    from typing import ClassVar
    from methods._base import Trained, worked
    from methods._settings import settings

    @settings
    class Gentle(Trained):
        controls: ClassVar[tuple[str, ...]] = ("sft",)
        clip: float = 0.5

        def hands_on(self):
            return {"clip": self.clip, "micro_rows": self.micro_rows}

        def compress(self, job):
            from methods import _terms
            return self.train(job, worked([]), terms=[_terms.hard_labels()])
"""


def test_a_plug_in_of_old_names_throughout_plans_its_rows_and_controls(tmp_path):
    """A plug-in's old names: modules, a setting stated anew, a trait, settings for its controls.

    The control takes them over by current names.
    """
    (tmp_path / "gentle.py").write_text(textwrap.dedent(PLUG_IN))
    info = tmp_path / "gentle-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gentle\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[harness.methods]\ngentle = gentle:Gentle\n")
    words = [word for word in PLAN if word != "--no-controls"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = harness(*words, tmp_path / "runs", "--methods", "gentle[micro_rows=4]", env=environment)
    assert done.returncode == 0, done.stderr
    control = "sft[micro_batch_size=4,max_grad_norm=0.5] seed 1"
    assert rows(done) == ["teacher", "gentle[micro_batch_size=4] seed 1", control, "untouched"]
    assert len(old_lines(done)) == 6  # two modules, a function, two settings, a trait


def test_a_key_follows_what_is_imported_by_an_old_name(tmp_path, monkeypatch):
    (tmp_path / "gentle.py").write_text(textwrap.dedent(PLUG_IN))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(OldName):
        files = set(
            code_digests(
                Registry(
                    "method", {"gentle": "gentle:Gentle", "sft": "methods.sft:SupervisedFineTuning"}
                ).load("gentle")
            )
        )
    sys.modules.pop("gentle")
    assert {
        "gentle.py",
        "methods/base.py",
        "methods/training/base.py",
        "methods/training/loop.py",
        "methods/training/terms.py",
    } <= files
    assert not [file for file in files if file.startswith("harness/renames/")], (
        "old names are read before anything has a key"
    )


def test_what_controls_inherit_is_read_by_its_old_name_in_files_and_in_python():
    path = next(
        path for path in sorted(STUDY.glob("*.json")) if '"handed_on": {' in path.read_text()
    )
    record = records.read_record(path)
    assert len(record.inherited_settings) == len(json.loads(path.read_text())["handed_on"])
    assert record.handed_on == record.inherited_settings
