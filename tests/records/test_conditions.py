"""Conditions are one object, held by job and record.

Every field says whether rows must agree in it, and nothing lists the fields again.
"""

import json
from pathlib import Path
from typing import Annotated

import pytest

from harness.analysis.comparison import conditions_of, group_records
from harness.estimating.advice import _setting_advice
from harness.gate.check import check
from harness.gate.frozen import condition_difference
from harness.records import record as records
from harness.records.baseline import FrozenRow, freeze_record
from harness.records.conditions import (
    BaselineText,
    Conditions,
    DataReference,
    MayDiffer,
    ModelReference,
    MustAgree,
    WithFlatConditions,
    baseline_conditions,
    first_difference,
    shared_conditions,
)
from harness.records.record import BadRecord, Environment, RunRecord, TaskScore, row_kinds
from harness.reporting import report

STUDIES = Path(__file__).parents[2] / "results"
BASE = ModelReference(name="tiny", digest="d")
PLAIN = {
    "suites": ("math",),
    "tasks": ("gsm8k@1",),
    "device": "cpu",
    "dtype": "float32",
    "teachers": (BASE,),
    "student_recipe": "depth:0.5",
    "student_base": BASE,
    "budget_tokens": 1000,
    "budget_rows": 10,
}
ALL = ("every row", "students", "trained rows")


class Wider(Conditions):
    """The conditions with planted settings.

    One is of every row, one of students, one of training, and one does not matter.
    """

    colour: Annotated[str, MustAgree("colour")] = "none"
    bits: Annotated[int, MustAgree("bits", lambda n: f"{n} bits", "students")] = 16
    curriculum: Annotated[
        bool, MustAgree("curriculum", lambda on: "easy first" if on else "", "trained rows")
    ] = False
    desk: Annotated[str, MayDiffer("where a run was started says nothing of it")] = ""


def make(label, conditions=None, *, seed=None, **changes):
    marks = "1101" * 100
    score = TaskScore(
        task="gsm8k",
        version="1",
        kind="generate",
        primary="m",
        chance=0.0,
        n=400,
        value=0.75,
        stderr=0.02,
        outcomes={"m": marks},
        items_digest="same",
        answers_digest=label,
        invalid_share=0.0,
        seconds=1.0,
    )
    fields = {
        "key": f"{label}-{seed}",
        "status": "success",
        "label": label,
        "method": label,
        "family": "x",
        "is_control": False,
        "seed": seed,
        "trains": seed is not None,
        "path": "p",
        "scores": (score,),
        "conditions": conditions or Conditions(**PLAIN),
        "student": ModelReference(name=label, digest=f"{label}{seed}"),
        "environment": Environment(
            device="cpu",
            dtype="float32",
            threads=1,
            machine="m",
            platform="p",
            python="3",
            versions={},
            commit=None,
            dirty=None,
        ),
    }
    return RunRecord(**{**fields, **changes})


@pytest.mark.parametrize(
    ("change", "rows", "text"),
    [
        ({"colour": "red"}, {"teacher", "int8", "sft"}, "red"),
        ({"bits": 4}, {"int8", "sft"}, "4 bits"),
        ({"curriculum": True}, {"sft"}, "easy first"),
    ],
)
def test_a_planted_condition_splits_tables_refuses_comparisons_and_is_frozen(change, rows, text):
    """It is named nowhere but in its field."""
    [name] = change
    seeds = {"teacher": None, "int8": None, "sft": 1}
    usual = [make(label, Wider(**PLAIN), seed=seed) for label, seed in seeds.items()]
    other = [
        make(label, Wider(**PLAIN, **change), seed=seed, key=f"{label}-other")
        for label, seed in seeds.items()
    ]
    assert len(group_records(usual)) == 1
    for before, current in zip(usual, other, strict=True):
        says = before.label in rows
        assert condition_difference(freeze_record(before), before) is None
        assert (condition_difference(freeze_record(before), current) is not None) == says, (
            "from its default"
        )
        assert (condition_difference(freeze_record(current), before) is not None) == says, (
            "and back"
        )
        assert (name in freeze_record(current).conditions) == says and name not in freeze_record(
            before
        ).conditions, "at its default a baseline is as before"
        apart = group_records([*usual[:1], before, current])
        assert (len(apart) == 2) == (before.label in rows), [record.shared for record in apart]
    mixed = [*usual, make("cot", Wider(**PLAIN, **change), seed=1)]
    first, second = group_records(mixed)
    assert {first.shared[name], second.shared[name]} == {
        shared_conditions(Wider(**PLAIN), ALL)[name],
        text,
    }
    assert "cot" not in {
        row.label for row in (first if first.shared[name] != text else second).rows
    }
    assert f"{name}" in report.markdown(mixed) and text in report.markdown(mixed), (
        "what differs is said above the tables"
    )


def test_a_setting_that_is_free_splits_nothing():
    record, other = make("int8", Wider(**PLAIN)), make("sft", Wider(**PLAIN, desk="window"), seed=1)
    assert (
        len(group_records([record, other])) == 1
        and condition_difference(freeze_record(record), make("int8", Wider(**PLAIN, desk="x")))
        is None
    )
    assert first_difference(record.conditions, other.conditions) == "desk"


def test_a_claim_is_not_judged_across_a_planted_condition():
    from harness.gate.rules import Rules

    teacher, row = make("teacher", Wider(**PLAIN)), make("int8", Wider(**PLAIN, colour="red"))
    findings = check([teacher, row], Rules(margin=0.9)).findings
    assert any(
        "colour differs: none of the teacher, red of the row" in record.told for record in findings
    ), [record.told for record in findings]


def test_advice_compares_only_records_that_differ_in_nothing_else():
    def tried(value, **under):
        return make("response", Wider(**PLAIN, **under), seed=1, settings={"temperature": value})

    assert "best measured" in _setting_advice([tried(1), tried(4)], "temperature", "2.0", "why")
    for under in ({"colour": "red"}, {"curriculum": True}):
        assert "best measured" not in _setting_advice(
            [tried(1), tried(4, **under)], "temperature", "2.0", "why"
        )


def test_a_condition_that_does_not_say_whether_rows_must_agree_in_it_is_refused():
    with pytest.raises(TypeError, match=r"Careless\.shots says neither MustAgree"):

        class Careless(Conditions):
            shots: int = 0

    for name, field in Conditions.model_fields.items():
        assert any(isinstance(mark, (MustAgree, MayDiffer)) for mark in field.metadata), name


CHANGED = {
    "suites": ("knowledge",),
    "teachers": (ModelReference(name="tiny", digest="other"),),
    "tasks": ("gsm8k@2",),
    "device": "cuda",
    "dtype": "bfloat16",
    "limit": 5,
    "limited": True,
    "subset": "quick:300:1",
    "chat": True,
    "system": "Be brief.",
    "student_recipe": "width:0.5",
    "student_base": ModelReference(name="tiny", digest="other"),
    "budget_tokens": 2000,
    "budget_rows": 20,
    "tuned": True,
    "teacher_weights": (0.7, 0.3),
    "train_data": (DataReference(name="own:a.jsonl", digest="d", examples=9),),
    "calibration_data": DataReference(name="own:b.jsonl", digest="d", examples=9),
}


@pytest.mark.parametrize("name", list(Conditions.model_fields))
def test_every_field_of_today_splits_as_it_says(name):
    record, other = (
        make("sft", Conditions(**{**PLAIN, **change}), seed=1)
        for change in ({}, {name: CHANGED[name]})
    )
    marks = [mark for mark in Conditions.model_fields[name].metadata if isinstance(mark, MustAgree)]
    apart = bool(marks) or name == "limit"  # a limit makes a sample, which is a condition
    # a row that calibrated on no data of the user's own says nothing of it, and joins every table
    first = record
    if name == "calibration_data":
        other_data = DataReference(name="own:c.jsonl", digest="c", examples=9)
        first = record.model_copy(update={name: other_data})
    assert (len(group_records([first, other.model_copy(update={"label": "cot"})])) == 2) == apart
    held = [mark for mark in marks if mark.in_baselines] or name == "limit"
    assert (condition_difference(freeze_record(record), other) is not None) == bool(held)


def test_tables_and_baselines_write_conditions_as_they_did():
    given = Conditions(
        **{
            **PLAIN,
            "chat": True,
            "system": "Be brief.",
            "limited": True,
            "tuned": True,
            "teacher_weights": (0.7, 0.3),
        }
    )
    assert shared_conditions(given, ALL) == {
        "teacher": "tiny",
        "teacher digest": "d",
        "tasks": "gsm8k@1",
        "device": "cpu",
        "dtype": "float32",
        "limited": "a sample of the items",
        "prompts": "chat template, system prompt 'Be brief.'",
        "student": "depth:0.5",
        "student base": "d",
        "budget": "1,000 seen tokens, 10 items, a learning rate of its own",
        "weights": "0.7+0.3",
    }
    assert baseline_conditions(Conditions(**PLAIN), ALL) == {
        "teacher": "d",
        "device": "cpu",
        "dtype": "float32",
        "limited": "no",
        "prompts": "plain",
        "student": "depth:0.5",
        "student base": "d",
        "budget": "1000 tokens, 10 items",
    }
    assert baseline_conditions(given, ALL)["prompts"] == "chat Be brief."
    assert conditions_of(make("teacher"))["path"] == "p"


def written_by_hand(record):
    """Return what tables and baselines said when every condition's name stood in their code."""
    under, teacher, student = record.conditions, record.method == "teacher", record.student_recipe
    table = {
        "teacher": " and ".join(record.name for record in under.teachers),
        "teacher digest": " ".join(record.digest for record in under.teachers),
        "tasks": ", ".join(under.tasks),
        "device": under.device,
        "dtype": under.dtype,
        "limited": "a sample of the items" if under.limited else "",
        "prompts": f"chat template{f', system prompt {under.system!r}' if under.system else ''}"
        if under.chat
        else "",
    }
    made = {} if teacher else {"student": student, "student base": under.student_base.digest}
    budget = (
        f"{under.budget_tokens:,} seen tokens, {under.budget_rows:,} "
        f"items{', a learning rate of its own' if under.tuned else ''}"
    )
    trained = (
        {"budget": budget, "weights": "+".join(f"{share:.3g}" for share in under.teacher_weights)}
        if record.trains
        else {}
    )
    held = {
        "teacher": " ".join(record.digest for record in under.teachers),
        "device": under.device,
        "dtype": under.dtype,
        "path": record.path,
        "prompts": f"chat {under.system or ''}" if under.chat else "plain",
        "limited": "yes" if under.limited else "no",
        "lm-eval": record.environment.versions["lm-eval"],
        **made,
        **(
            {"budget": f"{under.budget_tokens} tokens, {under.budget_rows} items"}
            if record.trains
            else {}
        ),
    }
    return list({**table, **made, **trained}.items()), held


def test_every_committed_record_stands_under_the_words_that_it_stood_under():
    kept = [records.read_record(path) for path in sorted(STUDIES.glob("*/records/*.json"))]
    assert len(kept) > 150
    for record in kept:
        table, held = written_by_hand(record)
        assert (
            list(shared_conditions(record.conditions, ("every row", *row_kinds(record))).items())
            == table
        ), "in this order"
        # were not held at all: a tuned row was compared with one that was not
        late = ("tuned", "weights")
        assert {
            name: text for name, text in FrozenRow.conditions_of(record).items() if name not in late
        } == held
        assert ("tuned" in FrozenRow.conditions_of(record)) == (
            record.trains and record.conditions.tuned
        )


def test_a_file_has_the_conditions_among_its_fields_in_every_schema(tmp_path):
    for path in sorted(STUDIES.glob("*/records/*.json")):
        data = json.loads(path.read_text())
        held = records.read_record(path).conditions
        for name in set(Conditions.model_fields) & set(data):
            assert json.loads(held.model_dump_json())[name] == data[name], (path, name)
    whole = make("sft", Conditions(**PLAIN, limit={"gsm8k": 400}), seed=1)
    records.write_record(tmp_path / "a.json", whole)
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["schema"] == records.SCHEMA == 10 and "conditions" not in data
    assert (data["limit"], data["limited"], data["device"]) == ({"gsm8k": 400}, True, "cpu")
    assert records.read_record(tmp_path / "a.json") == whole


@pytest.mark.parametrize("schema", range(1, records.SCHEMA))
def test_older_schemas_read_to_the_same_object(schema, tmp_path):
    old = json.loads(
        make("sft", Conditions(**PLAIN, limited=True), seed=1).model_dump_json(by_alias=True)
    )
    old = {key: value for key, value in old.items() if key != "limit"} | {"schema": schema}
    signed = {"digest": records._digest(old)} if schema >= records._FIRST_SIGNED_SCHEMA else {}
    (tmp_path / "a.json").write_text(json.dumps({**old, **signed}))
    read = records.read_record(tmp_path / "a.json")
    assert (
        read == make("sft", Conditions(**PLAIN, limited=True), seed=1)
        and read.conditions.limit is None
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("device", 7), ("budget_tokens", -5), ("teachers", "tiny"), ("limit", "few")],
)
def test_a_wrong_condition_is_named_as_the_file_has_it(name, value, tmp_path):
    data = json.loads(make("sft", seed=1).model_dump_json(by_alias=True)) | {name: value}
    (tmp_path / "a.json").write_text(json.dumps({**data, "digest": records._digest(data)}))
    with pytest.raises(BadRecord, match=rf"a\.json: field {name}"):
        records.read_record(tmp_path / "a.json")


def test_a_new_setting_reaches_the_file_and_comes_back_by_its_field_alone(tmp_path):
    class WiderRecord(RunRecord):
        conditions: Wider

    whole = WiderRecord(
        **{**dict(make("sft", seed=1)), "conditions": Wider(**PLAIN, colour="red", bits=4)}
    )
    text = whole.model_dump_json(by_alias=True)
    assert json.loads(text)["colour"] == "red" and WiderRecord.model_validate_json(text) == whole
    assert whole.model_copy(update={"bits": 2, "seed": 3}).conditions.bits == 2


def test_programs_that_read_a_records_conditions_by_their_old_names_go_on():
    record = make("sft", Conditions(**{**PLAIN, "device": "cuda"}), seed=1)
    assert (record.device, record.budget_tokens, record.limited) == ("cuda", 1000, False)
    assert not hasattr(record, "colour") and isinstance(record, WithFlatConditions)
    with pytest.raises(AttributeError):
        record.colour  # noqa: B018


def test_one_name_may_hold_several_fields_and_a_text_may_be_left_out():
    class Two(Conditions):
        low: Annotated[
            int,
            MustAgree(
                "range", lambda n: f"from {n}", frozen=BaselineText("range", lambda n: f"{n}-")
            ),
        ] = 1
        high: Annotated[
            int, MustAgree("range", lambda n: f"to {n}", frozen=BaselineText("range", str))
        ] = 2
        card: Annotated[str | None, MustAgree("card", lambda name: name)] = None

    assert (
        shared_conditions(Two(**PLAIN))["range"] == "from 1, to 2"
        and baseline_conditions(Two(**PLAIN), ALL)["range"] == "1-2"
    )
    assert (
        "card" not in shared_conditions(Two(**PLAIN))
        and shared_conditions(Two(**PLAIN, card="H100"))["card"] == "H100"
    )


GIVEN = {
    "batch_size": 3,
    "noise": 0,
    "grid": "8x1x2",
    "rounds": 2,
    "force": True,
    "limit": {"gsm8k-mini": 7},
    "tune": True,
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A plan with every setting of a cell away from its default, and its store."""
    from harness.api import plan_run
    from harness.planning.config import build_config
    from harness.records.store import Store

    place = tmp_path_factory.mktemp("planned")
    given = {
        **GIVEN,
        "teacher": ["tiny=0.7", "tiny-math=0.3"],
        "methods": ["response", "int8"],
        "out": place,
        "cache": place / "cache",
    }
    return plan_run(build_config(given)), Store(place)


def test_a_cells_job_holds_its_conditions_and_its_part_of_the_configuration(planned):
    from harness.planning.config import WorkSettings
    from harness.running.job import CellJob
    from harness.running.runner import _cell_job

    plan, store = planned
    for cell in plan.cells:
        # as it crosses to the process
        job = CellJob.model_validate_json(_cell_job(plan, cell, store).model_dump_json())
        assert job.conditions == plan.conditions_of(cell) and job.work == plan.config.work
        assert job.conditions.tuned == cell.trains, "what does not train has no rate"
        assert job.conditions.teacher_weights == (0.7, 0.3) and job.conditions.limited
        assert {
            name: getattr(job.work, name) for name in set(GIVEN) & set(WorkSettings.model_fields)
        } == {name: value for name, value in GIVEN.items() if name in WorkSettings.model_fields}
        assert job.model_copy(update={"dtype": "bfloat16", "noise": 5}).work.noise == 5
        assert not set(CellJob.model_fields) & (
            set(WorkSettings.model_fields)
            | set(Conditions.model_fields) - {"teachers", "student_base"}
        )


def test_the_record_of_a_process_that_died_holds_the_conditions_that_it_was_given(planned):
    from harness.running.cell import _record
    from harness.running.runner import _cell_job, _failed_record

    plan, store = planned
    for cell in plan.cells:
        died, failed = (
            _failed_record(plan, cell, "killed"),
            _record(_cell_job(plan, cell, store), 0.0, status="failed", reason="killed"),
        )
        assert died.conditions == failed.conditions == plan.conditions_of(cell)
        assert conditions_of(died) == conditions_of(failed)
