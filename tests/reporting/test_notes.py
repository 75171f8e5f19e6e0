"""What is said below the tables: warnings, doubts, what a row was not trained on."""

import pytest
from made_records import RECORDS, make, rows_of, timed

from harness.analysis import comparison
from harness.records.conditions import ModelReference
from harness.records.record import Cost
from harness.reporting import report


def test_a_row_that_no_epoch_made_better_is_named_and_its_rate_is_shown():
    def trained(label, start, best, **changes):
        return make(
            label,
            0.6,
            seed=1,
            cost=Cost(
                seconds=3, notes={"learning_rate": 1.8e-4, "start_ce": start, "best_ce": best}
            ),
            **changes,
        )

    text = report.markdown([RECORDS[0], trained("response", 2.28, 2.31), trained("cot", 2.28, 1.5)])
    assert (
        "- response (seed 1): the held-out loss never fell below that of the start (2.31 "
        "against 2.28); try --tune." in text
    )
    assert (
        "cot (seed 1): the held-out" not in text
        and rows_of(text, "Training cost")["cot"]["rate"] == "0.00018"
    )
    assert "(2.31 against 2.28).\n" in report.markdown(
        [RECORDS[0], trained("response", 2.28, 2.31, tuned=True)]
    )
    # records of before have none to show
    assert "rate" not in rows_of(report.markdown(RECORDS), "Training cost")["cot"]


def test_a_doubtful_measurement_is_said_once_with_its_rows():
    busy = "other processes used 1.0 of 2 cores"
    records = [
        RECORDS[0],
        *(
            make(name, seed=1, measurements=(timed(2.0, 1.9, 2.1, remark=busy),) * 2)
            for name in ("cot", "sft")
        ),
    ]
    assert f"- Measurements of cot, sft: {busy}." in report.markdown(records)


def test_a_teacher_no_better_than_the_untouched_student_is_warned_of():
    weak = [
        make("teacher", 0.1),
        make("untouched", 0.6, control=True),
        make("response", 0.6, seed=1, family="distillation"),
    ]
    assert any(
        "response: WARNING: the teacher" in line and "not better" in line
        for line in report.group_notes(comparison.group_records(weak)[0])
    )
    strong = [make("teacher", 0.9), *weak[1:]]
    assert not any(
        "WARNING" in line for line in report.group_notes(comparison.group_records(strong)[0])
    )


def test_a_task_that_no_trace_was_left_of_is_warned_of_once():
    lost = Cost(
        notes={"tasks_without_trace": {"gsm8k-mini": "of 20 answers by the teacher 20 were wrong"}}
    )
    rows = [
        make("teacher", 0.9),
        *(make("cot", 0.6, seed=seed, cost=lost) for seed in (1, 2)),
        make("sft", 0.6, seed=1),
    ]
    [line] = [
        line
        for line in report.group_notes(comparison.group_records(rows)[0])
        if "no trace survived" in line
    ]
    assert (
        line
        == "gsm8k-mini, cot: WARNING: not trained on this task, no trace survived: of 20 answers "
        "by the teacher 20 were wrong."
    )


def test_a_packed_row_says_its_bits_and_what_became_of_table_and_head():
    packing = {
        "bits_per_weight": 5.19,
        "bits_of_a_packed_weight": 4.25,
        "table_and_head": "int8",
        "skipped": ["*.down_proj"],
    }
    rows = [
        make("teacher", 0.9),
        make("int4", 0.8, cost=Cost(notes={"int4": packing})),
        make("prune-wanda", 0.8, cost=Cost(notes={"prune-wanda": {}})),
    ]
    lines = [
        line for line in report.group_notes(comparison.group_records(rows)[0]) if "bits" in line
    ]
    assert lines == [
        "int4: 5.19 bits on disk for each weight of the model (4.25 in the blocks); token table "
        "and head in int8; unchanged: *.down_proj."
    ]


def test_the_warning_is_about_the_rows_own_teacher():
    both = {
        "teachers": (
            ModelReference(name="good", digest="g"),
            ModelReference(name="poor", digest="p"),
        )
    }
    rows = [
        make("teacher", 0.9, **both),
        make("teacher poor", 0.2, family="teacher", method="teacher", **both),
        make("untouched", 0.6, control=True, **both),
        make("response", 0.7, seed=1, family="distillation", **both),
        make(
            "response[teacher=poor]",
            0.5,
            seed=1,
            family="distillation",
            settings={"teacher": "poor"},
            **both,
        ),
    ]
    [line] = [
        line for line in report.group_notes(comparison.group_records(rows)[0]) if "WARNING" in line
    ]
    assert "response[teacher=poor]: WARNING: the teacher poor (" in line


@pytest.mark.parametrize("names", [("mmlu",), ("mmlu-cloze", "lm-eval:bare"), ()])
def test_the_table_names_every_task_that_a_row_was_not_trained_on(names):
    row = make("response", 0.5, seed=1)
    notes = (
        {"tasks_without_split": {name: f"{name} has no train split" for name in names}}
        if names
        else {}
    )
    row = row.model_copy(update={"cost": row.cost.model_copy(update={"notes": notes})})
    text = report.markdown([make("teacher", 0.9), row])
    assert [line for line in text.splitlines() if "not trained on" in line] == [
        f"- {name}, response: not trained on this task: {name} has no train split."
        for name in names
    ]


def test_the_table_says_why_a_row_trained_by_another_recipe():
    reason = "recipe lora: full needs 25.1 GiB of 16.0"
    rows = [make("sft[recipe=lora]", 0.5, seed=seed) for seed in (1, 2)]
    rows = [
        row.model_copy(
            update={
                "cost": row.cost.model_copy(update={"notes": {"recipe_chosen": {"sft": reason}}})
            }
        )
        for row in rows
    ]
    text = report.markdown([make("teacher", 0.9), make("response", 0.5, seed=1), *rows])
    assert [line for line in text.splitlines() if reason in line] == [
        f"- sft[recipe=lora]: {reason}."
    ]
