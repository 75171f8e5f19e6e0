"""Which records may stand in one table, and how two rows of them are paired."""

import pytest
from made_records import ENVIRONMENT, RECORDS, make

from harness.analysis import comparison
from harness.records.conditions import DataReference, ModelReference
from harness.reporting import report


def test_records_of_two_machines_never_share_a_column_and_the_field_is_named():
    other_record = make("sft", 0.6, seed=1).model_copy(
        update={"environment": ENVIRONMENT.model_copy(update={"machine": "another, 8 cores"})}
    )
    text = report.markdown([*RECORDS, other_record])
    assert (
        "stand in 2 tables, because a table never mixes conditions. They differ in machine "
        "(another, 8 cores | made up, 2 cores)." in text
    )
    newer = make("sft", 0.6, seed=1, tasks=("gsm8k-mini@2",))
    assert "tasks (gsm8k-mini@1 | gsm8k-mini@2)" in report.markdown([*RECORDS, newer])
    assert "never mixes" not in report.markdown(RECORDS)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("budget", {"budget_tokens": 2000}),
        ("path", {"path": "transformers/other/1"}),
        ("machine", {"environment": ENVIRONMENT.model_copy(update={"machine": "another"})}),
        ("student", {"student_recipe": "depth:0.25"}),
    ],
)
def test_rows_made_under_other_conditions_stand_in_another_table(field, changes):
    other_record = make("sft", 0.5, seed=1, **changes)
    groups = comparison.group_records([*RECORDS, other_record])
    assert len(groups) == 2
    with_sft = next(group for group in groups if "sft" in {row.label for row in group.rows})
    without = next(group for group in groups if "cot" in {row.label for row in group.rows})
    assert with_sft.shared[field] != without.shared[field]
    assert all({"sft", "cot"} - {row.label for row in group.rows} for group in groups)


def test_one_teacher_and_one_untouched_student_serve_two_budgets():
    other_records = [
        make("sft", 0.5, seed=1, budget_tokens=2000),
        make("cot", 0.6, seed=1, budget_tokens=2000, controls=("untouched",)),
    ]
    groups = comparison.group_records([*RECORDS, *other_records])
    assert len(groups) == 2 and all(group.teacher for group in groups)
    assert all("untouched" in {row.label for row in group.rows} for group in groups)
    assert "no retention" not in report.markdown([*RECORDS, *other_records])


def test_a_failure_never_hides_a_success_and_stays_in_its_own_table():
    failed = make(
        "cot",
        seed=1,
        status="failed",
        reason="later trouble",
        created="2026-11-25T08:00:00Z",
        key="newer",
    )
    text = report.markdown([*RECORDS, failed])
    assert comparison.ResultRow("cot", ()).label in text and text.count(
        "| cot "
    ) == report.markdown(RECORDS).count("| cot ")
    trial = make("cot", seed=1, status="failed", reason="trial trouble", limited=True)
    tables = report.markdown([*RECORDS, trial]).split("## ")[1:]
    assert len(tables) == 2
    assert [("TRIAL" in table, "trial trouble" in table) for table in sorted(tables, key=len)] == [
        (True, True),
        (False, False),
    ]


def test_equal_seeds_make_no_pairs():
    """Two methods draw their trainings each for itself: all of them count, whatever their seeds are
    called.
    """
    cot = [make("cot", 0.6, seed=seed) for seed in (1, 3)]
    sft = [make("sft", 0.3, seed=seed) for seed in (1, 2, 3)]
    interval = comparison.compare(
        comparison.ResultRow("cot", tuple(cot)),
        comparison.ResultRow("sft", tuple(sft)),
        "gsm8k-mini",
        ratio=False,
    )
    renamed = [record.model_copy(update={"seed": record.seed + 7}) for record in sft]
    assert interval == comparison.compare(
        comparison.ResultRow("cot", tuple(cot)),
        comparison.ResultRow("sft", tuple(renamed)),
        "gsm8k-mini",
        ratio=False,
    )
    values = [[record.scores[0].value for record in side] for side in (cot, sft)]
    assert interval.value == pytest.approx(sum(values[0]) / 2 - sum(values[1]) / 3)


def test_rows_scored_on_other_items_are_not_paired():
    odd = make("cot", 0.6, seed=1)
    odd = odd.model_copy(
        update={"scores": (odd.scores[0].model_copy(update={"items_digest": "other"}),)}
    )
    interval = comparison.compare(
        comparison.ResultRow("cot", (odd,)),
        comparison.ResultRow("teacher", (RECORDS[0],)),
        "gsm8k-mini",
        ratio=True,
    )
    assert interval.value is None and "different items" in interval.reason


def test_models_with_different_chat_templates_are_paired_on_the_same_items(small):
    from harness.contract import Prompting
    from harness.data.source import LocalOrHubData
    from harness.scoring.score import score_task
    from suites.mmlu_mini import MmluMini

    def row(label, template, **changes):
        opened = small("Llama")
        opened.tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}"
        given = {"limit": 40, "progress": lambda one: None, "prompting": Prompting(chat=True)}
        score, _ = score_task(opened, MmluMini(), LocalOrHubData(), **given)
        return make(label, task="mmlu-mini", scores=(score,), chat=True, **changes)

    [group] = comparison.group_records(
        [
            row("teacher", "<{{ m.role }}>{{ m.content }}"),
            row("uld", "## {{ m.role }}\n{{ m.content }}\n", seed=1),
        ]
    )
    student = next(row_of_group for row_of_group in group.rows if row_of_group.label == "uld")
    assert comparison.compare(student, group.teacher, "mmlu-mini", ratio=True).value is not None


def test_the_newest_record_of_a_row_counts_and_the_older_is_said():
    older = make("cot", 0.1, seed=1, created="2026-11-23T08:00:00Z", key="old")
    text = report.markdown([older, *RECORDS])
    assert text.replace(
        "- 1 older records of the same rows are not shown.\n", ""
    ) == report.markdown(RECORDS)


def test_a_second_teacher_has_a_row_below_the_first_and_none_of_the_budget():
    both = (ModelReference(name="tiny", digest="d"), ModelReference(name="other", digest="e"))
    records = [
        make("response", 0.6, seed=1, teachers=both),
        make("teacher other", 0.7, teachers=both, method="teacher"),
        make("teacher", 0.9, teachers=both),
    ]
    [group] = comparison.group_records(records)
    assert [row.label for row in comparison.ordered_rows(group)] == [
        "teacher",
        "teacher other",
        "response",
    ] and group.teacher.label == "teacher"


DATA = {
    name: DataReference(name=f"own:{name}.jsonl", digest=f"{name}{name}", examples=9)
    for name in "ab"
}


def calibrated(label, name):
    return make(label, 0.5).model_copy(update={"calibration_data": DATA[name]})


@pytest.mark.parametrize("with_trained_rows", [True, False])
@pytest.mark.parametrize("names", ["a", "ab"])
def test_no_row_is_missing_from_every_table_and_calibrations_are_not_mixed(
    with_trained_rows, names
):
    rows = [make("teacher", 0.9), make("int8", 0.6)]
    rows += [make("sft", 0.6, seed=1)] if with_trained_rows else []
    rows += [calibrated(f"int4-calibrated-{name}", name) for name in names]
    groups = comparison.group_records(rows)
    labels = [{row.label for row in group.rows} for group in groups]
    assert set().union(*labels) == {record.label for record in rows}
    assert len(groups) == len(names)
    for name in names:
        [together] = [names_in for names_in in labels if f"int4-calibrated-{name}" in names_in]
        assert together >= {"teacher", "int8", *(["sft"] if with_trained_rows else [])}


def test_checkpoints_stand_beside_rows_of_every_training_and_of_another_scoring_path():
    outside = {"method": "checkpoint", "family": "checkpoint"}
    records = [
        make("teacher", 0.9),
        make("int8", 0.8),
        make("awq", 0.7, **outside),
        make("packed", 0.7, path="other/1", **outside),
    ]
    [group] = comparison.group_records(records)
    assert {row.label for row in group.rows} == {"teacher", "int8", "awq", "packed"}
    assert group.teacher is not None and group.shared["path"] == records[0].path
    elsewhere = make("int4", 0.8, path="other/1")
    assert (
        len(comparison.group_records([*records, elsewhere])) == 2
    )  # rows that are made here must agree
    alone = comparison.group_records([record for record in records if record.label != "int8"])
    assert [len(group.rows) for group in alone] == [3]
