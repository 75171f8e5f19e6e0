"""Tables from made-up records: same bytes again, nothing mixed, every status with its reason."""

import csv
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.analysis import comparison
from harness.cli.app import app
from harness.errors import HarnessError
from harness.records import record
from harness.records.conditions import ModelReference
from harness.records.record import BadRecord, Cost, Environment, Measurement, RunRecord, SharedCost, TaskScore
from harness.records.store import read_all
from harness.reporting import claims, glossary, quality, report
from harness.reporting.table import Best

ENVIRONMENT = Environment(
    device="cpu",
    dtype="float32",
    threads=2,
    machine="made up, 2 cores",
    platform="Linux x86_64",
    python="3.11.0",
    versions={},
    commit=None,
    dirty=None,
)


def outcomes_of(share, n=400, seed=0):
    draw = random.Random(seed)
    return "".join("1" if draw.random() < share else "0" for _ in range(n))


def make(label, share=0.6, *, seed=None, status="success", control=False, controls=(), task="gsm8k-mini", chance=0.0, **changes):
    marks = outcomes_of(share, seed=hash_of(label, seed))
    score = TaskScore(
        task=task, version="1", kind="choose" if chance else "generate", primary="strict-match", chance=chance, n=len(marks),
        value=marks.count("1") / len(marks), stderr=0.02, outcomes={"strict-match": marks}, items_digest="same", answers_digest=label,
        invalid_share=0.01, truncated_share=None if chance else 0.0, tokens_per_answer=None if chance else 31.5, seconds=4.0,
    )  # fmt: skip
    fields = {
        "key": f"{label}-{seed}", "status": status, "label": label, "method": label.partition("[")[0],
        "family": "x", "is_control": control, "controls": controls, "trains": seed is not None, "suites": ("math",),
        "tasks": (f"{task}@1",), "device": "cpu", "dtype": "float32", "student_base": ModelReference(name="tiny", digest="d"),
        "teachers": (ModelReference(name="tiny", digest="d"),), "student_recipe": "depth:0.5", "seed": seed, "budget_tokens": 1000,
        "budget_rows": 10, "path": "transformers/plain/1", "scores": (score,) if status == "success" else (),
        "measurements": (
            Measurement(name="decode_speedup", value=1.9, unit="ratio", higher_is_better=True),
            Measurement(name="weight_bytes_disk", value=2**20 * (4 if label == "teacher" else 2), unit="bytes", higher_is_better=False),
        ),
        "cost": Cost(seen_tokens=990, seconds=1.5, flops=1e9) if seed is not None else Cost(), "environment": ENVIRONMENT,
        "created": "2026-11-24T08:00:00Z",
    }  # fmt: skip
    return RunRecord(**{**fields, **changes})


def hash_of(label, seed):
    return sum(map(ord, label)) + (seed or 0) * 7919


RECORDS = [
    make("teacher", 0.9),
    *(make("cot", 0.6, seed=seed, controls=("answer-only", "untouched")) for seed in (1, 2, 3)),
    *(make("answer-only", 0.2, seed=seed, control=True) for seed in (1, 2, 3)),
    make("untouched", 0.05, control=True),
    make("response", seed=1, status="failed", reason="the loss became nan at step 3"),
]


def test_tables_are_the_same_bytes_in_any_order_of_records(tmp_path):
    report.write_tables(RECORDS, tmp_path / "a")
    shuffled = RECORDS[:]
    random.Random(1).shuffle(shuffled)
    report.write_tables(shuffled, tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    every = "controls.csv diagnostics.csv memory.csv quality.csv speed.csv table.md tables.json tables.tex training.csv"
    assert " ".join(names) == every
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_table_says_what_the_records_say():
    text = report.markdown(RECORDS)
    quality = next(part for part in text.split("**") if "retention" in part)
    lines = {line.split("|")[1].strip(): line for line in quality.splitlines() if line.startswith("|")}
    assert "100.0 % [100.0, 100.0]" in lines["teacher"] and "0/0" in lines["teacher"]
    assert lines["cot"].split("|")[2].strip() == "3"
    assert "- response (seed 1) failed: the loss became nan at step 3" in text
    assert lines["response"].split("|")[3].strip() == "-"
    order = list(lines)
    assert order.index("teacher") < order.index("cot") < order.index("answer-only (control)")
    memory = next(line for line in text.split("**Memory")[1].splitlines() if line.startswith("| cot"))
    assert "2.00" in [cell.strip() for cell in memory.split("|")]  # 4 MiB over 2 MiB on disk


def rows_of(text, title):
    """Return the rows of the table under a title, as {row: {column: cell}}."""
    lines = [line for line in text.split(f"**{title}")[1].split("**", 1)[1].split("**")[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def timed(value, low, high, **changes):
    return Measurement(name="decode_speedup", value=value, unit="ratio", higher_is_better=True, low=low, high=high, **changes)


def test_a_row_that_no_epoch_made_better_is_named_and_its_rate_is_shown():
    def trained(label, start, best, **changes):
        return make(
            label, 0.6, seed=1, cost=Cost(seconds=3, notes={"learning_rate": 1.8e-4, "start_ce": start, "best_ce": best}), **changes
        )

    text = report.markdown([RECORDS[0], trained("response", 2.28, 2.31), trained("cot", 2.28, 1.5)])
    assert "- response (seed 1): no epoch's held-out loss was below that of the untouched start (2.31 against 2.28); try --tune." in text
    assert "cot (seed 1): no epoch" not in text and rows_of(text, "Training cost")["cot"]["rate"] == "0.00018"
    assert "(2.31 against 2.28).\n" in report.markdown([RECORDS[0], trained("response", 2.28, 2.31, tuned=True)])
    assert "rate" not in rows_of(report.markdown(RECORDS), "Training cost")["cot"]  # records of before have none to show


def test_a_speedup_counts_only_beside_its_verdict_on_quality():
    alike = RECORDS[0].scores[0].outcomes["strict-match"]
    same = make("identity")
    same = same.model_copy(update={
        "scores": (RECORDS[0].scores[0].model_copy(update={"answers_digest": "other", "outcomes": {"strict-match": alike}}),),
        "measurements": (timed(1.01, 0.97, 1.05),),
    })  # fmt: skip
    lost = make("cot", 0.6, seed=1, measurements=(timed(2.1, 2.0, 2.2),))
    shown = rows_of(report.markdown([RECORDS[0], same, lost]), "Speed")
    assert shown["identity"]["keeps 95 %"] == "yes" and shown["identity"]["decode x"] == "1.01 [0.97, 1.05]"
    assert shown["cot"]["keeps 95 %"] == "no" and shown["cot"]["decode x"] == "(2.10 [2.00, 2.20])"
    alone = rows_of(report.markdown([make("teacher", status="failed", reason="x"), lost]), "Speed")
    assert alone["cot"]["keeps 95 %"] == "-" and alone["cot"]["decode x"] == "-"


def test_the_length_of_answers_outside_mlperfs_band_is_flagged():
    short = make("cot", 0.6, seed=1)
    short = short.model_copy(update={"scores": (short.scores[0].model_copy(update={"tokens_per_answer": 20.0}),)})
    shown = rows_of(report.markdown([RECORDS[0], short, make("sft", 0.6, seed=1)]), "Speed")
    assert shown["cot"]["length x"] == "0.63 !" and shown["sft"]["length x"] == "1.00"


def test_the_teachers_cached_work_is_divided_by_the_rows_that_used_it():
    shared = (SharedCost(key="traces", seconds=30.0),)
    cost = Cost(seen_tokens=990, seconds=5.0, device_seconds=10.0, devices=2, flops=1e9, shared=shared, energy_joules=50.0)
    records = [RECORDS[0], *(make("cot", seed=seed, cost=cost) for seed in (1, 2, 3)), make("sft", seed=1, cost=Cost(seconds=4.0))]
    text = report.markdown(records, report.Asked(price=3.6))
    shown = rows_of(text, "Training cost (at 3.6 a device-hour)")
    assert shown["cot"]["shared s"] == "30.0" and shown["cot"]["shared s/row"] == "10.0" and shown["sft"]["shared s/row"] == "-"
    assert shown["cot"]["money"] == "0.0200" and shown["cot"]["energy J"] == "50" and shown["sft"]["energy J"] == "-"
    assert "money" not in report.markdown(records)


def test_a_doubtful_measurement_is_said_once_with_its_rows():
    busy = "other processes used 1.0 of 2 cores"
    records = [RECORDS[0], *(make(name, seed=1, measurements=(timed(2.0, 1.9, 2.1, remark=busy),) * 2) for name in ("cot", "sft"))]
    assert f"- Measured, cot, sft: {busy}." in report.markdown(records)


def test_a_grid_of_several_scenarios_has_a_table_of_its_own():
    def at(condition, value):
        return Measurement(name="decode_tokens_per_second", value=value, unit="tokens/s", higher_is_better=True, condition=condition)

    several = make("cot", seed=1, measurements=(at("batch 1", 100.0), at("batch 8", 500.0)))
    text = report.markdown([RECORDS[0], several])
    assert "Speed by scenario" in text and "| batch 8" in text and "Speed by scenario" not in report.markdown(RECORDS)


def test_forms_agree_and_latex_is_whole(tmp_path):
    report.write_tables(RECORDS, tmp_path)
    data = json.loads((tmp_path / "tables.json").read_text())
    [group] = data["groups"]
    text, tex = (tmp_path / "table.md").read_text(), (tmp_path / "tables.tex").read_text()
    for table in group["tables"]:
        assert all(cell in text for row in table["rows"] for cell in row) and f"**{table['title']}**" in text
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == len(group["tables"])
    for line in tex.splitlines():
        if line.endswith(r"\\"):
            assert not re.search(r"(?<!\\)[%#_$]", line.replace(r"$\pm$", "")), line
    quality = next(table for table in group["tables"] if table["name"] == "quality")
    assert quality["blocks"] == ["teacher", "x", "x", "control", "control"]


def test_the_best_and_all_that_are_not_worse_are_bold():
    near, far, best = make("near", 0.6), make("far", 0.2), make("best", 0.6)
    marks = best.scores[0].outcomes["strict-match"]
    turned = marks.replace("1", "0", 3)  # three items worse of 400: exact McNemar p .125
    score = best.scores[0].model_copy(update={"outcomes": {"strict-match": turned}, "value": turned.count("1") / 400})
    near = near.model_copy(update={"scores": (score,)})
    control = make("control", 0.99, control=True)
    text = report.markdown([RECORDS[0], near, far, best, control])
    bold = {line.split("|")[1].strip() for line in text.split("**Speed")[0].splitlines() if line.startswith("|") and "**" in line}
    assert bold == {"near", "best"} and "Bold: the best row that is no control" in text


def test_rows_are_ordered_by_a_column_within_their_family():
    def fast(label, speed, family):
        return weighed(label, family, 0.6, decode=speed, megabytes=1, seconds=1)

    records = [RECORDS[0], fast("a", 1.0, "x"), fast("b", 3.0, "x"), fast("c", 2.0, "y"), fast("d", 9.0, "z")]
    controls = [make("untouched", 0.05, control=True, family="control")]
    [made] = report.made_of([*records, *controls], report.Asked(sort="decode x"))
    speed = next(table for table in made.tables if table.name == "speed")
    assert [row[0] for row in speed.rows] == ["teacher", "d", "b", "a", "c", "untouched (control)"]
    [made] = report.made_of([*records, *controls], report.Asked(sort="-decode x"))
    assert [row[0] for row in next(table for table in made.tables if table.name == "speed").rows][1:3] == ["a", "b"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--sort", "retentoin"], "did you mean 'retention'"),
        (["--forms", "pdf"], "unknown form 'pdf'"),
        (["--against", "nobody"], "nobody"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_kept(tmp_path, given, said):
    record.write(tmp_path / "records" / "a.json", RECORDS[0])
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--keep", str(tmp_path / "study"), *given], standalone_mode=False)
    assert said in str(done.exception) and "\n" not in str(done.exception) and not (tmp_path / "study").exists()


def test_more_tokens_a_second_are_better_and_more_seconds_are_not():
    from harness.reporting.table import less_is_better

    assert not any(map(less_is_better, ("decode tok/s", "prefill tok/s", "tokens", "score", "decode x", "top-1 agreement")))
    assert all(map(less_is_better, ("TTFT ms", "train s", "s/problem", "disk MiB", "KL", "losses/wins", "mmlu perplexity")))


def test_rows_timed_under_another_scenario_have_dashes():
    def timed(label, condition):
        speeds = [Measurement(name=name, value=5.0, unit="x", higher_is_better=True, condition=condition)
                  for name in ("decode_tokens_per_second", "decode_speedup")]  # fmt: skip
        return make(label, 0.9).model_copy(update={"measurements": tuple(speeds)})

    text = report.markdown([timed("teacher", "batch 1"), timed("int8", "batch 1"), timed("int4", "batch 64")])
    speed = rows_of(text, "Speed")
    assert "5" in speed["int8"]["decode tok/s"] and speed["int4"]["decode tok/s"] == "-"
    assert "- int4: timed under another scenario than the table's (batch 64): dashes." in text


def test_records_of_two_machines_never_share_a_column_and_the_field_is_named():
    other = make("sft", 0.6, seed=1).model_copy(update={"environment": ENVIRONMENT.model_copy(update={"machine": "another, 8 cores"})})
    text = report.markdown([*RECORDS, other])
    assert "stand in 2 tables, since a column never mixes: machine (another, 8 cores | made up, 2 cores)" in text
    newer = make("sft", 0.6, seed=1, tasks=("gsm8k-mini@2",))
    assert "tasks (gsm8k-mini@1 | gsm8k-mini@2)" in report.markdown([*RECORDS, newer])
    assert "never mixes" not in report.markdown(RECORDS)


def test_tables_are_the_same_bytes_on_another_processor(tmp_path):
    """Another BLAS kernel, no vector instructions, one thread or two: whole numbers up to the last division."""
    study = Path(__file__).parents[2] / "results" / "embedded"
    seen = set()
    plain = {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F", "OMP_NUM_THREADS": "2"}
    for number, more in enumerate(({}, plain)):
        folder = tmp_path / str(number)
        line = [sys.executable, "-c", "from harness.cli.app import main; main()", "report", str(study), "--out", str(folder)]
        done = subprocess.run(line, env={**os.environ, **more}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen.add(tuple(path.read_bytes() for path in sorted(folder.iterdir())))
    assert len(seen) == 1
    assert (tmp_path / "0" / "table.md").read_bytes() == (study / "tables" / "table.md").read_bytes()


def test_report_needs_no_torch(tmp_path):
    study = Path(__file__).parents[2] / "results" / "embedded"
    code = f"""
import sys
sys.argv = ["harness", "report", {str(study)!r}, "--out", {str(tmp_path)!r}, "--html"]
from harness.cli.app import app
app(standalone_mode=False)
assert "torch" not in sys.modules and "lm_eval" not in sys.modules
"""
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_retention_in_the_csv_is_the_ratio_of_the_records(tmp_path):
    report.write_tables(RECORDS, tmp_path)
    rows = {row["row"]: row for row in csv.DictReader((tmp_path / "quality.csv").open())}
    teacher = RECORDS[0].scores[0].value
    mean = sum(one.scores[0].value for one in RECORDS[1:4]) / 3
    assert float(rows["cot"]["gsm8k-mini retention"]) == pytest.approx(mean / teacher, abs=1e-5)
    assert float(rows["cot"]["gsm8k-mini retention low"]) < mean / teacher < float(rows["cot"]["gsm8k-mini retention high"])


def test_a_method_is_compared_with_its_controls():
    text = report.markdown(RECORDS)
    line = next(line for line in text.splitlines() if line.startswith("| cot") and "answer-only" in line)
    assert "better" in line
    gap = comparison.compare(
        comparison.Row("cot", tuple(RECORDS[1:4])), comparison.Row("answer-only", tuple(RECORDS[4:7])), "gsm8k-mini", ratio=False
    )  # fmt: skip
    assert 0 < gap.low < gap.value < gap.high


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
    other = make("sft", 0.5, seed=1, **changes)
    found = comparison.group([*RECORDS, other])
    assert len(found) == 2
    with_sft = next(group for group in found if "sft" in {row.label for row in group.rows})
    without = next(group for group in found if "cot" in {row.label for row in group.rows})
    assert with_sft.shared[field] != without.shared[field]
    assert all({"sft", "cot"} - {row.label for row in group.rows} for group in found)


def test_one_teacher_and_one_untouched_student_serve_two_budgets():
    other = [make("sft", 0.5, seed=1, budget_tokens=2000), make("cot", 0.6, seed=1, budget_tokens=2000, controls=("untouched",))]
    found = comparison.group([*RECORDS, *other])
    assert len(found) == 2 and all(group.teacher for group in found)
    assert all("untouched" in {row.label for row in group.rows} for group in found)
    assert "no retention" not in report.markdown([*RECORDS, *other])


def test_a_failure_never_hides_a_success_and_stays_in_its_own_table():
    failed = make("cot", seed=1, status="failed", reason="later trouble", created="2026-11-25T08:00:00Z", key="newer")
    text = report.markdown([*RECORDS, failed])
    assert comparison.Row("cot", ()).label in text and text.count("| cot ") == report.markdown(RECORDS).count("| cot ")
    trial = make("cot", seed=1, status="failed", reason="trial trouble", limited=True)
    tables = report.markdown([*RECORDS, trial]).split("## ")[1:]
    assert len(tables) == 2
    assert [("TRIAL" in table, "trial trouble" in table) for table in sorted(tables, key=len)] == [(True, True), (False, False)]


def test_equal_seeds_make_no_pairs():
    """Two methods draw their trainings each for itself: all of them count, whatever their seeds are called."""
    cot = [make("cot", 0.6, seed=seed) for seed in (1, 3)]
    sft = [make("sft", 0.3, seed=seed) for seed in (1, 2, 3)]
    found = comparison.compare(comparison.Row("cot", tuple(cot)), comparison.Row("sft", tuple(sft)), "gsm8k-mini", ratio=False)
    renamed = [record.model_copy(update={"seed": record.seed + 7}) for record in sft]
    assert found == comparison.compare(comparison.Row("cot", tuple(cot)), comparison.Row("sft", tuple(renamed)), "gsm8k-mini", ratio=False)
    values = [[record.scores[0].value for record in side] for side in (cot, sft)]
    assert found.value == pytest.approx(sum(values[0]) / 2 - sum(values[1]) / 3)


def test_rows_scored_on_other_items_are_not_paired():
    odd = make("cot", 0.6, seed=1)
    odd = odd.model_copy(update={"scores": (odd.scores[0].model_copy(update={"items_digest": "other"}),)})
    found = comparison.compare(comparison.Row("cot", (odd,)), comparison.Row("teacher", (RECORDS[0],)), "gsm8k-mini", ratio=True)
    assert found.value is None and "different items" in found.reason


def test_models_with_different_chat_templates_are_paired_on_the_same_items(small):
    from harness.contract import Prompting
    from harness.data.source import DataSource
    from harness.scoring.score import score_task
    from suites.mmlu_mini import MmluMini

    def row(label, template, **changes):
        opened = small("Llama")
        opened.tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}"
        given = {"limit": 40, "progress": lambda one: None, "prompting": Prompting(chat=True)}
        score, _ = score_task(opened, MmluMini(), DataSource(), **given)
        return make(label, task="mmlu-mini", scores=(score,), chat=True, **changes)

    [found] = comparison.group([row("teacher", "<{{ m.role }}>{{ m.content }}"), row("uld", "## {{ m.role }}\n{{ m.content }}\n", seed=1)])
    student = next(one for one in found.rows if one.label == "uld")
    assert comparison.compare(student, found.teacher, "mmlu-mini", ratio=True).value is not None


def test_above_chance_stands_beside_plain_retention_for_choices():
    records = [make("teacher", 0.9, task="mmlu-mini", chance=0.25), make("cot", 0.5, seed=1, task="mmlu-mini", chance=0.25)]
    text = report.markdown(records)
    assert "above chance" in text and "tokens" not in text.split("**")[2]


def test_the_newest_record_of_a_row_counts_and_the_older_is_said():
    older = make("cot", 0.1, seed=1, created="2026-11-23T08:00:00Z", key="old")
    text = report.markdown([older, *RECORDS])
    assert text.replace("- 1 older records of the same rows are not shown.\n", "") == report.markdown(RECORDS)


def test_records_are_kept_as_a_study_that_gives_the_same_tables(tmp_path):
    from harness.records.store import keep_records

    record.write(tmp_path / "records" / "stale.json", make("stale", 0.1, seed=9))
    keep_records(RECORDS, tmp_path / "records")
    read, problems = read_all(tmp_path)
    assert not problems and report.markdown(read) == report.markdown(RECORDS)
    assert (tmp_path / "records" / "cot-seed2.json").exists() and not (tmp_path / "records" / "stale.json").exists()


@pytest.mark.parametrize("text", ["{}", "[1]", '{"kind": "run", "cells": []}', "torn {", '{"name": "my-package", "schema": 3}'])
def test_keeping_records_touches_no_file_that_is_none(text, tmp_path):
    from harness.records.store import keep_records

    (tmp_path / "records").mkdir()
    foreign = tmp_path / "records" / "package.json"
    foreign.write_text(text)
    keep_records(RECORDS, tmp_path / "records")
    keep_records(RECORDS[:2], tmp_path / "records")
    assert foreign.read_text() == text and len(list((tmp_path / "records").iterdir())) == 3
    (tmp_path / "records" / "teacher.json").write_text(text)
    with pytest.raises(HarnessError, match=r"teacher\.json is no record"):
        keep_records(RECORDS, tmp_path / "records")
    assert (tmp_path / "records" / "teacher.json").read_text() == text


def test_a_folder_that_is_no_study_is_refused_and_left_as_it_is(tmp_path):
    from harness.records.store import keep_records

    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(HarnessError, match="not empty, and no study"):
        keep_records(RECORDS, tmp_path / "records")
    with pytest.raises(HarnessError, match="is a file"):
        keep_records(RECORDS, tmp_path / "thesis.tex" / "records")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_records_survive_a_round_trip(tmp_path):
    for index, one in enumerate(RECORDS):
        record.write(tmp_path / f"{index}.json", one)
    read, problems = read_all(tmp_path)
    assert sorted(read, key=lambda r: r.key) == sorted(RECORDS, key=lambda r: r.key) and not problems
    assert report.markdown(read) == report.markdown(RECORDS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"schema": 1, "kind": "cell", "key"', "not a whole JSON file"),
        ('{"some": "json"}', "not a record of this harness"),
        ('{"schema": 99, "kind": "cell"}', "schema 99"),
        ('{"schema": 1, "kind": "cell", "key": "x"}', "field"),
    ],
)
def test_a_file_that_is_no_record_is_named_and_skipped(tmp_path, content, said):
    record.write(tmp_path / "good.json", RECORDS[0])
    (tmp_path / "bad.json").write_text(content)
    records, problems = read_all(tmp_path)
    assert len(records) == 1 and len(problems) == 1
    assert "bad.json" in problems[0] and said in problems[0]


def test_a_record_that_was_edited_by_hand_is_refused(tmp_path):
    record.write(tmp_path / "a.json", RECORDS[0])
    assert read_all(tmp_path) == ([RECORDS[0]], [])
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text.replace('"tokens_per_answer": 31.5', '"tokens_per_answer": 21.5'))
    [problem] = read_all(tmp_path)[1]
    assert "a.json: edited after it was written" in problem
    (tmp_path / "a.json").write_text(re.sub(r',\s*"digest": "\w{64}"\s*}\s*$', "}", text))
    assert "edited after it was written" in read_all(tmp_path)[1][0]
    (tmp_path / "a.json").write_text(text.replace(f'"schema": {record.SCHEMA}', '"schema": 5'))  # an older schema has no digest
    assert "edited after it was written" in read_all(tmp_path)[1][0]


def test_every_older_schema_is_read(tmp_path):
    data = json.loads(json.dumps(RECORDS[0].model_dump(mode="json", by_alias=True)))
    for schema in range(1, record.SCHEMA):
        old = {**data, "schema": schema}
        signed = {"digest": record._digest(old)} if schema >= record._SIGNED else {}  # files hold their own digest since schema 6
        (tmp_path / f"{schema}.json").write_text(json.dumps({**old, **signed}))
    found, problems = read_all(tmp_path)
    assert not problems and len(found) == record.SCHEMA - 1 and {one.schema_number for one in found} == {record.SCHEMA}


def test_a_field_that_no_schema_knows_is_refused(tmp_path):
    data = json.loads(RECORDS[0].model_dump_json(by_alias=True))
    (tmp_path / "x.json").write_text(json.dumps({**data, "schema": 5, "accuracy": 1.0}))
    with pytest.raises(BadRecord, match="accuracy"):
        record.read(tmp_path / "x.json")


def test_every_column_is_explained():
    text = report.markdown(RECORDS)
    columns = {cell.strip() for line in text.splitlines() if line.startswith("| row") for cell in line.strip("|").split("|")}
    known = {*glossary.GLOSSARY, "against", "task", "difference (points)", "verdict"}
    words = {column.removesuffix(" x") for column in known} | known
    assert {column.removesuffix(" MiB").removesuffix(" x") for column in columns} <= words


def test_a_row_stands_against_its_own_control_and_not_against_anothers():
    def row(label, share, **more):
        return make(label, 0.5, seed=1, settings={"share": share, "unit": "tokens"}, **more)

    records = [
        make("teacher", 0.9),
        *(row(f"selective[{s}]", s, controls=("selective-random",), handed_on={"share": s, "unit": "tokens"}) for s in (0.3, 0.5)),
        *(row(f"selective-random[{share}]", share, control=True) for share in (0.3, 0.5)),
    ]
    [found] = comparison.group(records)
    table = quality.controls(found)
    pairs = set(zip(table.frame["row"], table.frame["against"], strict=True))
    assert pairs == {("selective[0.3]", "selective-random[0.3]"), ("selective[0.5]", "selective-random[0.5]")}


def test_a_chain_stands_beside_the_variant_that_it_holds():
    wanda = {name: {"ratio": 0.5, "pattern": name} for name in ("unstructured", "2:4")}
    training = {"learning_rate": 1e-3}
    chain = make(
        "prune-wanda+response", 0.5, seed=1, method="prune-wanda+response", family="chain", controls=("prune-wanda", "prune-wanda+sft"),
        settings={"prune-wanda": wanda["unstructured"], "response": {**training, "alpha": 0.1}}, handed_on={"learning_rate": 1e-3},
    )  # fmt: skip
    others = [
        make("prune-wanda", 0.4, settings=wanda["unstructured"]),
        make("prune-wanda[pattern=2:4]", 0.3, method="prune-wanda", settings=wanda["2:4"]),
        *(
            make(f"prune-wanda{pattern}+sft{rate}", 0.4, seed=1, method="prune-wanda+sft", control=True, family="chain",
                 settings={"prune-wanda": wanda[name], "sft": {"learning_rate": value}})
            for pattern, name in (("", "unstructured"), ("[pattern=2:4]", "2:4"))
            for rate, value in (("", 1e-3), ("[learning_rate=0.01]", 1e-2))
        ),
    ]  # fmt: skip
    [found] = comparison.group([make("teacher", 0.9), chain, *others])
    assert set(quality.controls(found).frame["against"]) == {"prune-wanda", "prune-wanda+sft"}


def test_where_the_teacher_is_at_chance_nothing_is_better_or_worse():
    good, plain = make("good", 0.5, chance=0.25, controls=("plain",)), make("plain", 0.2, chance=0.25, control=True)
    rows = [make("teacher", 0.2, chance=0.25), good, plain]
    [found] = comparison.group(rows)
    [line] = [dict(zip(quality.controls(found).columns, row, strict=True)) for row in quality.controls(found).rows]
    assert line["verdict"] == "teacher at chance: not judged" and line["difference (points)"].startswith("+30")


def test_a_teacher_no_better_than_the_untouched_student_is_warned_of():
    weak = [make("teacher", 0.1), make("untouched", 0.6, control=True), make("response", 0.6, seed=1, family="distillation")]
    assert any("response: WARNING: the teacher" in line and "not better" in line for line in report.notes(comparison.group(weak)[0]))
    strong = [make("teacher", 0.9), *weak[1:]]
    assert not any("WARNING" in line for line in report.notes(comparison.group(strong)[0]))


def test_a_task_that_no_trace_was_left_of_is_warned_of_once():
    lost = Cost(notes={"tasks_without_trace": {"gsm8k-mini": "of 20 answers by the teacher 20 were wrong"}})
    rows = [make("teacher", 0.9), *(make("cot", 0.6, seed=seed, cost=lost) for seed in (1, 2)), make("sft", 0.6, seed=1)]
    [line] = [line for line in report.notes(comparison.group(rows)[0]) if "no trace survived" in line]
    assert line == "gsm8k-mini, cot: WARNING: not trained, no trace survived: of 20 answers by the teacher 20 were wrong."


def megabytes_of(record):
    return record.measured("weight_bytes_disk").value / 2**20


def test_a_teacher_at_chance_gives_no_retention_and_no_best_row():
    rows = [make(name, share, chance=0.25, task="mmlu") for name, share in (("teacher", 0.2), ("a", 0.4), ("b", 0.1))]
    [found] = comparison.group(rows)
    table = quality.quality(found)
    at = table.columns.index
    assert {row[at("retention")] for row in table.rows} == {row[at("above chance")] for row in table.rows} == {"-"}
    assert not any(isinstance(cell, Best) for row in table.rows for cell in row) and not comparison.leaders(found, "mmlu")
    assert any(line.startswith("mmlu: teacher at chance (") for line in report.notes(found))
    [good] = comparison.group([make("teacher", 0.9, chance=0.25, task="mmlu"), *rows[1:]])
    assert comparison.leaders(good, "mmlu") and not any("at chance" in line for line in report.notes(good))


def test_a_packed_row_says_its_bits_and_what_became_of_table_and_head():
    told = {"bits_per_weight": 5.19, "bits_of_a_packed_weight": 4.25, "table_and_head": "int8", "skipped": ["*.down_proj"]}
    rows = [
        make("teacher", 0.9),
        make("int4", 0.8, cost=Cost(notes={"int4": told})),
        make("prune-wanda", 0.8, cost=Cost(notes={"prune-wanda": {}})),
    ]
    lines = [line for line in report.notes(comparison.group(rows)[0]) if "bits" in line]
    assert lines == [
        "int4: 5.19 bits on disk for each weight of the model (4.25 in the blocks); table and head in int8; left as they were: *.down_proj."
    ]


def test_the_warning_is_about_the_rows_own_teacher():
    both = {"teachers": (ModelReference(name="good", digest="g"), ModelReference(name="poor", digest="p"))}
    rows = [
        make("teacher", 0.9, **both), make("teacher poor", 0.2, family="teacher", method="teacher", **both),
        make("untouched", 0.6, control=True, **both), make("response", 0.7, seed=1, family="distillation", **both),
        make("response[teacher=poor]", 0.5, seed=1, family="distillation", settings={"teacher": "poor"}, **both),
    ]  # fmt: skip
    [line] = [line for line in report.notes(comparison.group(rows)[0]) if "WARNING" in line]
    assert "response[teacher=poor]: WARNING: the teacher poor (" in line


def test_a_second_teacher_has_a_row_below_the_first_and_none_of_the_budget():
    both = (ModelReference(name="tiny", digest="d"), ModelReference(name="other", digest="e"))
    records = [
        make("response", 0.6, seed=1, teachers=both), make("teacher other", 0.7, teachers=both, method="teacher"),
        make("teacher", 0.9, teachers=both),
    ]  # fmt: skip
    [found] = comparison.group(records)
    assert [row.label for row in comparison.ordered(found)] == ["teacher", "teacher other", "response"] and found.teacher.label == "teacher"


def test_every_row_stands_against_a_named_one(tmp_path):
    [found] = comparison.group(RECORDS)
    table = quality.against(found, "cot")
    assert table.name == "against-cot" and set(table.frame["row"]) == {"teacher", "answer-only", "untouched"}
    assert quality.against(found, "nothing") is None
    names = [path.name for path in report.write_tables(RECORDS, tmp_path, report.Asked(references=("cot",)))]
    assert "against-cot.csv" in names and "Against cot" in (tmp_path / "table.md").read_text()


def weighed(label, family, share, *, decode, megabytes, seconds, **more):
    made = make(label, share, family=family, **more)
    measured = (
        Measurement(name="decode_speedup", value=decode, unit="ratio", higher_is_better=True, low=decode - 0.1, high=decode + 0.1),
        Measurement(name="weight_bytes_disk", value=2**20 * megabytes, unit="bytes", higher_is_better=False),
    )
    return made.model_copy(update={"measurements": measured, "cost": Cost(seconds=seconds)})


def good(label, like, lost, **more):
    """A record that misses so many of the items that another one has right."""
    marks = list(like.scores[0].outcomes["strict-match"])
    for at in [at for at, mark in enumerate(marks) if mark == "1"][:lost]:
        marks[at] = "0"
    score = like.scores[0].model_copy(update={"outcomes": {"strict-match": "".join(marks)}, "value": marks.count("1") / len(marks)})
    return weighed(label, share=0.9, **more).model_copy(update={"scores": (score,)})


def claims_of(records):
    [found] = comparison.group(records)
    table = claims.claimed(found)
    return {(row[0], row[1]): dict(zip(table.columns, row, strict=True)) for row in table.rows}


def test_claims_are_judged_by_rows_and_named():
    teacher = weighed("teacher", "teacher", 0.9, decode=1.0, megabytes=8, seconds=0)
    packed = good("int8", teacher, 2, family="quantization", decode=2.5, megabytes=2, seconds=3)
    slow = good("int4", teacher, 2, family="quantization", decode=1.2, megabytes=1, seconds=3)
    zeros = good("prune-wanda", teacher, 100, family="pruning", decode=1.0, megabytes=8, seconds=30)
    trained = good("response", teacher, 60, family="distillation", decode=2.0, megabytes=4, seconds=200)
    told = claims_of([teacher, packed, slow, zeros, trained])
    assert told["Quantization", "accuracy retention"]["verdict"] == "holds here (int4, 2 of 2 rows)"
    assert told["Quantization", "decode speedup (over float32)"]["verdict"] == "holds here (int8, 1 of 2 rows)"
    assert told["Quantization", "decode speedup (over float32)"]["measured"] == "1.20 to 2.50 x"
    assert told["Quantization", "all at once"]["verdict"] == "holds here (int8, 1 of 2 rows)"
    for one in ("accuracy retention", "decode speedup (over float32)", "memory reduction (disk)"):
        assert told["Pruning", one]["verdict"] == "does not"
    assert told["Distillation", "memory reduction (disk)"]["claimed"] == "3 to 10 x"
    assert told["Low-rank", "accuracy retention"] | {"measured": "-"} == told["Low-rank", "accuracy retention"]
    assert told["Low-rank", "all at once"]["verdict"] == "not testable here"
    assert [told[one, "training cost"]["verdict"] for one in ("Quantization", "Pruning", "Distillation")] == ["holds here"] * 3
    assert told["Quantization", "accuracy retention"]["published"].startswith(
        "MMLU 34.2 to 101.1 %, GSM8K 62.0 to 104.7 %, other 98.9 % (0.5B"
    )
    assert told["Low-rank", "decode speedup (over float32)"]["published"] == "-"
    assert told["Chains", "all at once"]["verdict"] == "not testable here"
    whole = good("a+b", teacher, 4, family="chain", decode=2.0, megabytes=0.5, seconds=9)
    assert claims_of([teacher, packed, slow, whole])["Chains", "all at once"]["verdict"] == "holds here (a+b)"
    poor = good("a+b", teacher, 160, family="chain", decode=2.0, megabytes=0.5, seconds=9)  # smaller, and keeps too little
    assert claims_of([teacher, packed, slow, poor])["Chains", "all at once"]["verdict"] == "does not"
    large = good("a+b", teacher, 40, family="chain", decode=2.0, megabytes=1, seconds=9)  # int4 alone is as small and keeps more
    assert claims_of([teacher, packed, slow, large])["Chains", "all at once"]["verdict"] == "does not"
    alike = good("a+b", teacher, 4, family="chain", decode=2.0, megabytes=1, seconds=9)  # as small, two items fewer: nobody knows
    assert claims_of([teacher, packed, slow, alike])["Chains", "all at once"]["verdict"] == "cannot tell"
    dear = claims_of([teacher, packed.model_copy(update={"cost": Cost(seconds=500)}), trained])
    assert dear["Quantization", "training cost"]["verdict"] == dear["Distillation", "training cost"]["verdict"] == "does not"


def test_a_teacher_at_chance_makes_retention_untestable():
    teacher = weighed("teacher", "teacher", 0.25, decode=1.0, megabytes=8, seconds=0, task="mmlu-mini", chance=0.25)
    packed = weighed("int8", "quantization", 0.25, decode=2.5, megabytes=2, seconds=3, task="mmlu-mini", chance=0.25)
    told = claims_of([teacher, packed])
    assert told["Quantization", "accuracy retention"]["verdict"] == "not testable here"
    assert told["Quantization", "accuracy retention"]["measured"] == "-"
    assert told["Quantization", "decode speedup (over float32)"]["verdict"] == "holds here (int8)"
    assert told["Quantization", "all at once"]["verdict"] == "not testable here"


def test_claims_stand_only_where_something_was_compressed():
    assert claims.claimed(comparison.group(RECORDS)[0]) is None


def test_a_chain_is_told_stage_by_stage_with_the_product_of_its_parts():
    from harness.records.record import StageRecord

    teacher = make("teacher", 0.9)
    first, last = good("a", teacher, 90, family="pruning", decode=1.5, megabytes=4, seconds=2), None
    last = good("b", teacher, 36, family="quantization", decode=2, megabytes=2, seconds=1)
    whole = good("a+b", teacher, 120, family="chain", decode=2.5, megabytes=1, seconds=3)
    stages = tuple(
        StageRecord(label=label, method=label[-1], key=label, digest="d", weight_bytes=size * 2**20, cost=Cost(seconds=seconds))
        for label, size, seconds in (("a", 4, 2.0), ("a+b", 1, 1.0))
    )
    whole = whole.model_copy(update={"stages": stages})
    [found] = comparison.group([teacher, first, last, whole])
    table = claims.chains(found)
    lines = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [line["stage"] for line in lines] == ["a", "a+b"] and [line["stage s"] for line in lines] == ["2.0", "1.0"]
    right = teacher.scores[0].outcomes["strict-match"].count("1")
    product = (right - 90) / right * (right - 36) / right
    assert lines[1]["retention of the parts"] == f"{100 * product:.1f} %" and lines[0]["retention of the parts"] == "-"
    assert lines[1]["retention"].startswith(f"{100 * (right - 120) / right:.1f} %")
    assert lines[1]["decode x of the parts"] == "3.00" and lines[1]["decode x"] == "2.50"
    assert (lines[1]["MiB"], lines[1]["MiB of the parts"]) == ("1.00", f"{4 * 2 / megabytes_of(teacher):.2f}")


def test_perplexities_stand_against_controls_by_their_ratio():
    def read(label, factor, **more):
        one = make(label, 0.5, task="wikitext", **more)
        totals = tuple((-100.0 - at - 50 * math.log(factor), 50.0) for at in range(20))
        score = one.scores[0].model_copy(update={"kind": "perplexity", "totals": totals, "outcomes": {}, "value": 8.0 * factor})
        return one.model_copy(update={"scores": (score,)})

    rows = [read("teacher", 1.0), read("good", 1.1, controls=("plain",)), read("plain", 2e4, control=True)]
    [found] = comparison.group(rows)
    [line] = [dict(zip(quality.controls(found).columns, row, strict=True)) for row in quality.controls(found).rows]
    assert line["difference (points)"].startswith("x5.5e-05 [5.5e-05") and line["verdict"] == "better"
    [other] = [row for row in quality.against(found, "good").rows if row[0] == "plain"]
    assert other[-3].startswith("x1.8e+04 [1.8e+04, 1.8e+04]") and other[-1] == "worse"
    [note] = [line for line in report.notes(found) if line.startswith("Teacher ")]
    assert note.endswith("; nothing was trained.")


STUDIES = {
    "embedded": (), "compression-tiny": ("prune-depth+int8",), "compression-smollm2": (),
    "distillation-tiny": ("response", "sft", "cot", "response[teacher=tiny-math]"),
}  # fmt: skip


@pytest.mark.parametrize("study", STUDIES)
def test_committed_tables_are_what_their_records_give_byte_for_byte(study, tmp_path):
    from pathlib import Path

    place = Path(__file__).parents[2] / "results" / study
    if not place.exists():
        pytest.skip("not run from a checkout")
    records, problems = read_all(place)
    assert records and not problems
    report.write_tables(records, tmp_path, report.Asked(references=STUDIES[study]))
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    held = {path.name: path.read_bytes() for path in (place / "tables").iterdir()}
    assert {name: body for name, body in held.items() if name in made} == made, [name for name in made if made[name] != held.get(name)]
    assert not held.keys() - made.keys(), "files that nothing makes any more"


def test_costs_of_stages_add_up():
    one = Cost(seen_tokens=10, seconds=2.0, flops=5.0, peak_bytes=7, shared=(SharedCost(key="k", seconds=1.0),), notes={"a": 1})
    two = Cost(seconds=3.0, peak_bytes=9, shared=(SharedCost(key="k", seconds=1.0),), notes={"b": 2})
    both = one + two
    assert (both.seen_tokens, both.seconds, both.flops, both.peak_bytes) == (10, 5.0, 5.0, 9)
    assert len(both.shared) == 1 and both.notes == {"a": 1, "b": 2} and both.energy_joules is None


# Outcomes that are numbers


def numbered(label, numbers, **changes):
    """Return a record whose items carry numbers."""
    record = make(label, 0.5)
    value = sum(numbers) / len(numbers)
    given = {
        "outcomes": {},
        "values": {"strict-match": tuple(numbers)},
        "value": value,
        "stderr": 0.01,
        "metric": "f1",
        "n": len(numbers),
        **changes,
    }
    return record.model_copy(update={"scores": (record.scores[0].model_copy(update=given),)})


TEACHERS = [(at % 10) / 10 for at in range(400)]


def test_fractions_have_retention_with_an_interval_and_no_flips():
    text = report.markdown([numbered("teacher", TEACHERS), numbered("int8", [0.9 * value for value in TEACHERS])])
    assert "90.0 % [" in text and "losses/wins" not in text and "items carry numbers, so intervals are those of paired means" in text
    assert "no retention" not in text


def test_a_figure_that_is_better_when_lower_is_no_retention():
    given = {"higher_is_better": False, "unit": "number", "metric": "wer"}
    records = [numbered("teacher", TEACHERS, **given), *(numbered(name, [share * v for v in TEACHERS], **given) for name, share in
                                                         (("worse", 1.5), ("better", 0.5)))]  # fmt: skip
    text = report.markdown(records)
    assert "x1.500 [" in text and "x0.500 [" in text and "retention" not in text.partition("- Teacher")[0]
    assert "wer is better when lower" in text
    [found] = comparison.group(records)
    assert comparison.leaders(found, found.tasks[0]) == {"better"}
    assert [row.label for row in comparison.ordered(found)][1] == "better"


def test_what_cannot_be_paired_is_shown_without_retention_and_says_why():
    given = {
        "values": {},
        "unpaired": "mcc is one figure of all items together, and no item has one",
        "unit": "number",
        "metric": "mcc",
        "value": -0.25,
    }
    text = report.markdown([numbered("teacher", TEACHERS, **given), numbered("int8", TEACHERS, **given)])
    assert "-0.250" in text and "no retention and no flips: mcc is one figure of all items together, and no item has one." in text
    assert "100.0 %" not in text


def test_bars_and_line_breaks_stay_inside_their_cells():
    records = [make("teacher", 0.9), make("response[terms=a|b]", 0.5, seed=1)]
    lines = [line for line in report.markdown(records).splitlines() if line.startswith("|")]
    assert any(r"a\|b" in line for line in lines)
    for block in report.markdown(records).split("\n\n"):
        counts = {line.replace(r"\|", "").count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(counts) <= 1


def test_parts_that_count_alike_are_weighed_in_every_table():
    parts = ((10, 1 / 20), (390, 1 / 780))
    hits = {"values": {}, "outcomes": {"strict-match": "1" * 10 + "0" * 390}, "parts": parts, "value": 0.5, "metric": "acc"}
    half = {**hits, "outcomes": {"strict-match": "10" * 5 + "0" * 390}, "value": 0.25}
    text = report.markdown([numbered("teacher", TEACHERS, **hits), numbered("int8", TEACHERS, **half)])
    assert "50.0 % [" in text and "its 2 tasks count alike, whatever their size" in text


@pytest.mark.parametrize("lower", [False, True])
def test_a_claim_and_a_frozen_row_of_numbers_are_judged(lower):
    from harness.gate.check import check
    from harness.gate.rules import Rules, Verdict
    from harness.records.baseline import Baseline, freeze

    given = {"higher_is_better": not lower, "unit": "number" if lower else "share"}
    teacher, same = numbered("teacher", TEACHERS, **given), numbered("int8", TEACHERS, **given)
    bad = numbered("int8", [value * (1.4 if lower else 0.7) for value in TEACHERS], answers_digest="other", **given)
    claims = [check([teacher, row], Rules(margin=0.95)).verdict for row in (same, bad)]
    assert claims == [Verdict.passed, Verdict.missed]
    frozen = Baseline(history=(), rows=(freeze(teacher), freeze(same)))
    assert Baseline.model_validate_json(frozen.model_dump_json(by_alias=True)).rows[1].scores[0].numbers == tuple(TEACHERS)
    assert check([teacher, same], Rules(), frozen).verdict is Verdict.passed
    found = check([teacher, bad], Rules(), frozen)
    assert found.verdict is Verdict.regressed and "items worse" in " ".join(one.told for one in found.findings)


def test_a_claim_on_what_cannot_be_paired_cannot_be_told():
    from harness.gate.check import check
    from harness.gate.rules import Rules, Verdict

    given = {"values": {}, "unpaired": "mcc is one figure of all items together"}
    found = check([numbered("teacher", TEACHERS, **given), numbered("int8", TEACHERS, **given)], Rules(margin=0.95))
    assert found.verdict is Verdict.cannot_tell and "mcc is one figure" in found.findings[0].told


def together(label, metric, runs, **changes):
    """Return a record whose figure all items make together, from (gold, prediction) pairs."""
    from harness.statistics import corpus

    run = corpus.Corpus(metric, tuple(f"{gold} {chosen}" for gold, chosen in runs))
    given = {
        "values": {}, "form": metric, "statistics": run.statistics, "metric": metric, "value": corpus.weighted(run),
        "signed": metric in corpus.SIGNED, "unit": "share" if metric in corpus.SHARES else "number", "answers_digest": label,
    }  # fmt: skip
    return numbered(label, [0.0] * len(runs), **{**given, **changes})


def guesses(wrong):
    """Return 600 pairs, every `wrong`-th prediction a miss."""
    return [(at % 2, at % 2 if at % wrong else 1 - at % 2) for at in range(600)]


def test_a_figure_of_all_items_has_retention_and_difference():
    records = [together("teacher", "f1", guesses(13)), together("int8", "f1", guesses(13)), together("nf4", "f1", guesses(3))]
    text = report.markdown(records)
    assert "difference" in text and "100.0 % [" in text and "all items make its f1 together" in text and "losses/wins" not in text
    line = next(line for line in text.splitlines() if line.startswith("| nf4"))
    assert "66.7 %" in line and re.search(r"-\d+\.\d \[-\d+\.\d, -\d+\.\d\]", line)
    [found] = comparison.group(records)
    assert comparison.leaders(found, found.tasks[0]) == {"int8"}


def test_a_figure_that_may_be_below_zero_has_a_difference_and_no_retention():
    text = report.markdown([together("teacher", "mcc", guesses(13)), together("int8", "mcc", guesses(3))])
    assert "no retention: mcc may be below zero, and a ratio of two says nothing; see the difference." in text
    line = next(line for line in text.splitlines() if line.startswith("| int8"))
    assert "100.0 %" not in line and re.search(r"\| +- \| +-0\.\d+ \[-0\.\d+, -0\.\d+\]", line), line


@pytest.mark.parametrize(("metric", "rules", "told"), [
    ("f1", {"margin": 0.95}, "retention"), ("f1", {"margin": 0.05, "points": True}, "difference"),
    ("mcc", {"margin": 0.05, "points": True}, "difference"),
])  # fmt: skip
def test_a_claim_and_a_frozen_row_of_a_figure_of_all_items_are_judged(metric, rules, told):
    from harness.gate.check import check
    from harness.gate.rules import Rules, Verdict
    from harness.records.baseline import Baseline, freeze

    teacher, same, bad = (
        together("teacher", metric, guesses(13)),
        together("int8", metric, guesses(13)),
        together("int8", metric, guesses(3), answers_digest="other"),
    )
    found = [check([teacher, row], Rules(**rules)) for row in (same, bad)]
    assert [one.verdict for one in found] == [Verdict.passed, Verdict.missed] and told in found[1].findings[0].told
    frozen = Baseline(history=(), rows=(freeze(teacher), freeze(same)))
    again = Baseline.model_validate_json(frozen.model_dump_json(by_alias=True))
    assert again.rows[1].scores[0].statistics == same.scores[0].statistics
    assert check([teacher, same], Rules(), again).verdict is Verdict.passed
    worse = check([teacher, bad], Rules(), again)
    assert worse.verdict is Verdict.regressed and "600 items, p" in " ".join(one.told for one in worse.findings)


def test_a_share_of_a_figure_that_may_be_below_zero_is_not_claimed():
    from harness.gate.check import check
    from harness.gate.rules import Rules, Verdict

    found = check([together("teacher", "mcc", guesses(13)), together("int8", "mcc", guesses(13))], Rules(margin=0.95))
    assert found.verdict is Verdict.cannot_tell and "give --margin 2points" in found.findings[0].told


def test_lower_is_better_of_all_items_is_a_ratio():
    given = {"higher_is_better": False, "unit": "number", "metric": "ter", "form": "ter", "values": {}}
    one, two = (
        numbered(name, [0.0] * 60, **given, statistics=tuple(f"{at % 3 * edits} 10" for at in range(60)), value=10.0 * edits)
        for name, edits in (("teacher", 1), ("int8", 2))
    )
    assert "x2.000 [" in report.markdown([one, two])
    from harness.gate.check import check
    from harness.gate.rules import Rules, Verdict

    assert check([one, two], Rules(margin=0.9)).verdict is Verdict.missed


def test_records_without_parts_are_read_and_said_unpaired(tmp_path):
    old = numbered("teacher", TEACHERS, values={}, unpaired="f1 is one figure of all items together", metric="f1")
    record.write(tmp_path / "old.json", old)
    data = json.loads((tmp_path / "old.json").read_text())
    data.pop("digest")
    for score in data["scores"]:
        for name in ("form", "statistics", "signed"):
            score.pop(name)
    data["digest"] = record._digest(data)
    (tmp_path / "old.json").write_text(json.dumps(data))
    read = record.read(tmp_path / "old.json")
    assert read.scores[0].form == "" and "f1 is one figure" in report.markdown([read])


@pytest.mark.parametrize("names", [("mmlu",), ("mmlu-cloze", "lm-eval:bare"), ()])
def test_the_table_names_every_task_that_a_row_was_not_trained_on(names):
    row = make("response", 0.5, seed=1)
    notes = {"tasks_without_split": {name: f"{name} has no train split" for name in names}} if names else {}
    row = row.model_copy(update={"cost": row.cost.model_copy(update={"notes": notes})})
    text = report.markdown([make("teacher", 0.9), row])
    assert [line for line in text.splitlines() if "not trained on" in line] == [
        f"- {name}, response: not trained on: {name} has no train split." for name in names
    ]


def test_every_committed_record_is_signed_and_none_is_read_without_its_digest(tmp_path):
    paths = sorted(Path(__file__).parents[2].glob("results/*/records/*.json"))
    assert len(paths) > 150
    for path in paths:
        data = json.loads(path.read_text(encoding="utf-8"))
        assert data["schema"] >= record._SIGNED and len(data["digest"]) == 64, path
    del data["digest"]
    for schema in (record.SCHEMA, record.SCHEMA - 1):
        (tmp_path / "x.json").write_text(json.dumps({**data, "schema": schema}))
        with pytest.raises(BadRecord, match="has a digest, and it has none"):
            record.read(tmp_path / "x.json")


def test_a_record_that_says_an_older_schema_than_its_fields_is_refused(tmp_path):
    whole = RECORDS[0].model_dump(mode="json", by_alias=True)
    whole["scores"][0]["metric"] = "exact_match"
    for schema in (1, 5):
        (tmp_path / "x.json").write_text(json.dumps({**whole, "schema": schema}))
        with pytest.raises(BadRecord, match=f"says schema {schema}, and metric came with schema"):
            record.read(tmp_path / "x.json")


@pytest.mark.parametrize("schema", [[], {}, "7", 7.0, None, True, 0, -1, 99, 10**17])
def test_a_schema_that_is_no_number_of_ours_is_said(schema, tmp_path):
    whole = RECORDS[0].model_dump(mode="json", by_alias=True)
    (tmp_path / "x.json").write_text(json.dumps({**whole, "schema": schema}))
    with pytest.raises(BadRecord, match="schema"):
        record.read(tmp_path / "x.json")


@pytest.mark.parametrize("cells", [None, {}, "key", [], [1], ["../../etc"], [[]], [""]])
def test_a_run_file_without_cells_is_one_line(cells, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text(json.dumps({"kind": "run", "cells": cells} if cells is not None else {"kind": "run"}))
    found = CliRunner().invoke(app, ["report", str(tmp_path / "runs" / "a.json")], standalone_mode=False)
    assert isinstance(found.exception, HarnessError) and "cells are no list of keys" in str(found.exception)


HOSTILE = "x|y <b>z</b> \x1b]0;owned\x07 =1+1 \\input{a}\n\\input{b} " + "w" * 100_000


def test_hostile_names_and_reasons_reach_no_form_as_they_are(tmp_path):
    bad = make("cot", 0.1, seed=8).model_copy(
        update={"label": "=cmd|'x'!A0\x1b[31m", "status": "failed", "reason": HOSTILE, "scores": (), "tasks": RECORDS[0].tasks}
    )
    folder = tmp_path / "tables"
    report.write_tables([*RECORDS, bad], folder)
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "\x1b" not in text and "\x07" not in text and "w" * 3_000 not in text, path
    assert "\n\\input" not in (folder / "tables.tex").read_text() and "<b>" not in (folder / "table.md").read_text()
    for path in folder.glob("*.csv"):
        assert not any(cell[:1] in "=@" and cell for row in csv.reader(path.open()) for cell in row), path
