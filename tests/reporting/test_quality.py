"""The quality table and the comparisons beside it: retention, controls, figures of all items, what
is not judged.
"""

import math
import re

from made_records import RECORDS, TEACHERS, guesses, make, numbered, together

from harness.analysis import comparison
from harness.reporting import quality, report
from harness.reporting.table import BestCell


def test_the_best_and_all_that_are_not_worse_are_bold():
    near, far, best = make("near", 0.6), make("far", 0.2), make("best", 0.6)
    marks = best.scores[0].outcomes["strict-match"]
    flipped = marks.replace("1", "0", 3)  # three items worse of 400: exact McNemar p .125
    score = best.scores[0].model_copy(
        update={"outcomes": {"strict-match": flipped}, "value": flipped.count("1") / 400}
    )
    near = near.model_copy(update={"scores": (score,)})
    control = make("control", 0.99, control=True)
    text = report.markdown([RECORDS[0], near, far, best, control])
    bold = {
        line.split("|")[1].strip()
        for line in text.split("**Speed")[0].splitlines()
        if line.startswith("|") and "**" in line
    }
    assert bold == {"near", "best"} and "Bold: the best row, and all rows" in text


def test_a_method_is_compared_with_its_controls():
    text = report.markdown(RECORDS)
    line = next(
        line for line in text.splitlines() if line.startswith("| cot") and "answer-only" in line
    )
    assert "better" in line
    gap = comparison.compare(
        comparison.ResultRow("cot", tuple(RECORDS[1:4])),
        comparison.ResultRow("answer-only", tuple(RECORDS[4:7])),
        "gsm8k-mini",
        ratio=False,
    )
    assert 0 < gap.low < gap.value < gap.high


def test_above_chance_stands_beside_plain_retention_for_choices():
    records = [
        make("teacher", 0.9, task="mmlu-mini", chance=0.25),
        make("cot", 0.5, seed=1, task="mmlu-mini", chance=0.25),
    ]
    text = report.markdown(records)
    assert "above chance" in text and "tokens" not in text.split("**")[2]


def test_a_row_stands_against_its_own_control_and_not_against_anothers():
    def row(label, share, **more):
        return make(label, 0.5, seed=1, settings={"share": share, "unit": "tokens"}, **more)

    records = [
        make("teacher", 0.9),
        *(
            row(
                f"selective[{s}]",
                s,
                controls=("selective-random",),
                inherited_settings={"share": s, "unit": "tokens"},
            )
            for s in (0.3, 0.5)
        ),
        *(row(f"selective-random[{share}]", share, control=True) for share in (0.3, 0.5)),
    ]
    [group] = comparison.group_records(records)
    table = quality.controls_table(group)
    pairs = set(zip(table.frame["row"], table.frame["against"], strict=True))
    assert pairs == {
        ("selective[0.3]", "selective-random[0.3]"),
        ("selective[0.5]", "selective-random[0.5]"),
    }


def test_a_chain_stands_beside_the_variant_that_it_holds():
    wanda = {name: {"ratio": 0.5, "pattern": name} for name in ("unstructured", "2:4")}
    training = {"learning_rate": 1e-3}
    chain = make(
        "prune-wanda+response",
        0.5,
        seed=1,
        method="prune-wanda+response",
        family="chain",
        controls=("prune-wanda", "prune-wanda+sft"),
        settings={"prune-wanda": wanda["unstructured"], "response": {**training, "alpha": 0.1}},
        inherited_settings={"learning_rate": 1e-3},
    )
    single_rows = [
        make("prune-wanda", 0.4, settings=wanda["unstructured"]),
        make("prune-wanda[pattern=2:4]", 0.3, method="prune-wanda", settings=wanda["2:4"]),
        *(
            make(
                f"prune-wanda{pattern}+sft{rate}",
                0.4,
                seed=1,
                method="prune-wanda+sft",
                control=True,
                family="chain",
                settings={"prune-wanda": wanda[name], "sft": {"learning_rate": value}},
            )
            for pattern, name in (("", "unstructured"), ("[pattern=2:4]", "2:4"))
            for rate, value in (("", 1e-3), ("[learning_rate=0.01]", 1e-2))
        ),
    ]
    [group] = comparison.group_records([make("teacher", 0.9), chain, *single_rows])
    assert set(quality.controls_table(group).frame["against"]) == {"prune-wanda", "prune-wanda+sft"}


def test_where_the_teacher_is_at_chance_nothing_is_better_or_worse():
    good, plain = (
        make("good", 0.5, chance=0.25, controls=("plain",)),
        make("plain", 0.2, chance=0.25, control=True),
    )
    rows = [make("teacher", 0.2, chance=0.25), good, plain]
    [group] = comparison.group_records(rows)
    [line] = [
        dict(zip(quality.controls_table(group).columns, row, strict=True))
        for row in quality.controls_table(group).rows
    ]
    assert line["verdict"] == "teacher at chance: not judged" and line[
        "difference (points)"
    ].startswith("+30")


def test_a_teacher_at_chance_gives_no_retention_and_no_best_row():
    rows = [
        make(name, share, chance=0.25, task="mmlu")
        for name, share in (("teacher", 0.2), ("a", 0.4), ("b", 0.1))
    ]
    [group] = comparison.group_records(rows)
    table = quality.quality_table(group)
    position = table.columns.index
    assert (
        {row[position("retention")] for row in table.rows}
        == {row[position("above chance")] for row in table.rows}
        == {"-"}
    )
    assert not any(
        isinstance(cell, BestCell) for row in table.rows for cell in row
    ) and not comparison.best_labels(group, "mmlu")
    assert any(line.startswith("mmlu: teacher at chance (") for line in report.group_notes(group))
    [good] = comparison.group_records([make("teacher", 0.9, chance=0.25, task="mmlu"), *rows[1:]])
    assert comparison.best_labels(good, "mmlu") and not any(
        "at chance" in line for line in report.group_notes(good)
    )


def test_every_row_stands_against_a_named_one(tmp_path):
    [group] = comparison.group_records(RECORDS)
    table = quality.against_table(group, "cot")
    assert table.name == "against-cot" and set(table.frame["row"]) == {
        "teacher",
        "answer-only",
        "untouched",
    }
    assert quality.against_table(group, "nothing") is None
    names = [
        path.name
        for path in report.write_tables(
            RECORDS, tmp_path, report.ReportOptions(references=("cot",))
        )
    ]
    assert "against-cot.csv" in names and "Against cot" in (tmp_path / "table.md").read_text()


def test_perplexities_stand_against_controls_by_their_ratio():
    def read(label, factor, **more):
        record = make(label, 0.5, task="wikitext", **more)
        totals = tuple((-100.0 - number - 50 * math.log(factor), 50.0) for number in range(20))
        score = record.scores[0].model_copy(
            update={"kind": "perplexity", "totals": totals, "outcomes": {}, "value": 8.0 * factor}
        )
        return record.model_copy(update={"scores": (score,)})

    rows = [
        read("teacher", 1.0),
        read("good", 1.1, controls=("plain",)),
        read("plain", 2e4, control=True),
    ]
    [group] = comparison.group_records(rows)
    [line] = [
        dict(zip(quality.controls_table(group).columns, row, strict=True))
        for row in quality.controls_table(group).rows
    ]
    assert (
        line["difference (points)"].startswith("x5.5e-05 [5.5e-05") and line["verdict"] == "better"
    )
    [other] = [row for row in quality.against_table(group, "good").rows if row[0] == "plain"]
    assert other[-3].startswith("x1.8e+04 [1.8e+04, 1.8e+04]") and other[-1] == "worse"
    [note] = [line for line in report.group_notes(group) if line.startswith("Teacher ")]
    assert note.endswith(". Nothing was trained.")


def test_fractions_have_retention_with_an_interval_and_no_flips():
    text = report.markdown(
        [numbered("teacher", TEACHERS), numbered("int8", [0.9 * value for value in TEACHERS])]
    )
    assert (
        "90.0 % [" in text
        and "losses/wins" not in text
        and "items have numbers, so intervals are those of paired means" in text
    )
    assert "no retention" not in text


def test_a_figure_that_is_better_when_lower_is_no_retention():
    fields = {"higher_is_better": False, "unit": "number", "metric": "wer"}
    records = [
        numbered("teacher", TEACHERS, **fields),
        *(
            numbered(name, [share * v for v in TEACHERS], **fields)
            for name, share in (("worse", 1.5), ("better", 0.5))
        ),
    ]
    text = report.markdown(records)
    assert (
        "x1.500 [" in text
        and "x0.500 [" in text
        and "retention" not in text.partition("- Teacher")[0]
    )
    assert "wer is better when lower" in text
    [group] = comparison.group_records(records)
    assert comparison.best_labels(group, group.tasks[0]) == {"better"}
    assert [row.label for row in comparison.ordered_rows(group)][1] == "better"


def test_what_cannot_be_paired_is_shown_without_retention_and_says_why():
    fields = {
        "values": {},
        "unpaired": "mcc is one figure of all items together, and no item has one",
        "unit": "number",
        "metric": "mcc",
        "value": -0.25,
    }
    text = report.markdown(
        [numbered("teacher", TEACHERS, **fields), numbered("int8", TEACHERS, **fields)]
    )
    assert (
        "-0.250" in text
        and "no retention and no flips: mcc is one figure of all items together, and no item has "
        "one."
        in text
    )
    assert "100.0 %" not in text


def test_parts_that_count_alike_are_weighed_in_every_table():
    parts = ((10, 1 / 20), (390, 1 / 780))
    hits = {
        "values": {},
        "outcomes": {"strict-match": "1" * 10 + "0" * 390},
        "parts": parts,
        "value": 0.5,
        "metric": "acc",
    }
    half = {**hits, "outcomes": {"strict-match": "10" * 5 + "0" * 390}, "value": 0.25}
    text = report.markdown(
        [numbered("teacher", TEACHERS, **hits), numbered("int8", TEACHERS, **half)]
    )
    assert "50.0 % [" in text and "its 2 subtasks have equal weights" in text


def test_a_figure_of_all_items_has_retention_and_difference():
    records = [
        together("teacher", "f1", guesses(13)),
        together("int8", "f1", guesses(13)),
        together("nf4", "f1", guesses(3)),
    ]
    text = report.markdown(records)
    assert (
        "difference" in text
        and "100.0 % [" in text
        and "f1 is one figure of all items together" in text
        and "losses/wins" not in text
    )
    line = next(line for line in text.splitlines() if line.startswith("| nf4"))
    assert "66.7 %" in line and re.search(r"-\d+\.\d \[-\d+\.\d, -\d+\.\d\]", line)
    [group] = comparison.group_records(records)
    assert comparison.best_labels(group, group.tasks[0]) == {"int8"}


def test_a_figure_that_may_be_below_zero_has_a_difference_and_no_retention():
    text = report.markdown(
        [together("teacher", "mcc", guesses(13)), together("int8", "mcc", guesses(3))]
    )
    assert (
        "no retention: mcc may be below zero, and a ratio of two says nothing; see the difference."
        in text
    )
    line = next(line for line in text.splitlines() if line.startswith("| int8"))
    assert "100.0 %" not in line and re.search(r"\| +- \| +-0\.\d+ \[-0\.\d+, -0\.\d+\]", line), (
        line
    )


def test_lower_is_better_of_all_items_is_a_ratio():
    fields = {
        "higher_is_better": False,
        "unit": "number",
        "metric": "ter",
        "form": "ter",
        "values": {},
    }
    one, two = (
        numbered(
            name,
            [0.0] * 60,
            **fields,
            statistics=tuple(f"{at % 3 * edits} 10" for at in range(60)),
            value=10.0 * edits,
        )
        for name, edits in (("teacher", 1), ("int8", 2))
    )
    assert "x2.000 [" in report.markdown([one, two])
    from harness.gate.check import check
    from harness.gate.rules import Rules, Verdict

    assert check([one, two], Rules(margin=0.9)).verdict is Verdict.missed


def test_items_that_show_a_loss_are_those_of_the_power_formula():
    """Of 400 items 200 right, 10 lost and 6 won: .04 flip, and 1 % of .5 is a drop of .005."""
    from made_records import make

    from harness.analysis.comparison import group_records
    from harness.reporting.quality import diagnostics_table
    from harness.statistics.stats import items_to_detect

    def record(label, marks):
        made = make(label, 0.5)
        score = made.scores[0].model_copy(
            update={"outcomes": {"strict-match": marks}, "value": marks.count("1") / 400}
        )
        return made.model_copy(update={"scores": (score,)})

    teacher = "1" * 200 + "0" * 200
    student = "0" * 10 + "1" * 190 + "1" * 6 + "0" * 194
    [group] = group_records([record("teacher", teacher), record("int8", student)])
    by_row = {exact["row"]: exact for exact in diagnostics_table(group).exact}
    needed = [by_row["int8"][f"items for 1/2/5 % {share} %"] for share in (1, 2, 5)]
    assert needed == [items_to_detect(0.04, drop, alpha=0.05) for drop in (0.005, 0.01, 0.025)]
    assert needed == [9_890, 2_471, 394] and "items for 1/2/5 % 1 %" not in by_row["teacher"]
