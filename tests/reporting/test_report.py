"""Tables from made-up records: same bytes again, nothing mixed, every status with its reason."""

import csv
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_records import RECORDS, make, rows_of, timed, weighed
from typer.testing import CliRunner

from harness.cli.app import app
from harness.records import record
from harness.records.record import Cost, Measurement, SharedCost
from harness.records.store import read_records
from harness.reporting import glossary, report


def test_tables_are_the_same_bytes_in_any_order_of_records(tmp_path):
    report.write_tables(RECORDS, tmp_path / "a")
    shuffled = RECORDS[:]
    random.Random(1).shuffle(shuffled)
    report.write_tables(shuffled, tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    every = (
        "controls.csv diagnostics.csv memory.csv quality.csv speed.csv table.md tables.json "
        "tables.tex training.csv"
    )
    assert " ".join(names) == every
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_table_says_what_the_records_say():
    text = report.markdown(RECORDS)
    quality = next(part for part in text.split("**") if "retention" in part)
    lines = {
        line.split("|")[1].strip(): line for line in quality.splitlines() if line.startswith("|")
    }
    assert "100.0 % [100.0, 100.0]" in lines["teacher"] and "0/0" in lines["teacher"]
    assert lines["cot"].split("|")[2].strip() == "3"
    assert "- response (seed 1) failed: the loss became nan at step 3" in text
    assert lines["response"].split("|")[3].strip() == "-"
    order = list(lines)
    assert order.index("teacher") < order.index("cot") < order.index("answer-only (control)")
    memory = next(
        line for line in text.split("**Memory")[1].splitlines() if line.startswith("| cot")
    )
    assert "2.00" in [cell.strip() for cell in memory.split("|")]  # 4 MiB over 2 MiB on disk


def test_a_speedup_counts_only_beside_its_verdict_on_quality():
    alike = RECORDS[0].scores[0].outcomes["strict-match"]
    same = make("identity")
    same = same.model_copy(
        update={
            "scores": (
                RECORDS[0]
                .scores[0]
                .model_copy(
                    update={"answers_digest": "other", "outcomes": {"strict-match": alike}}
                ),
            ),
            "measurements": (timed(1.01, 0.97, 1.05),),
        }
    )
    lost = make("cot", 0.6, seed=1, measurements=(timed(2.1, 2.0, 2.2),))
    speed_rows = rows_of(report.markdown([RECORDS[0], same, lost]), "Speed")
    assert (
        speed_rows["identity"]["keeps 95 %"] == "yes"
        and speed_rows["identity"]["decode x"] == "1.01 [0.97, 1.05]"
    )
    assert (
        speed_rows["cot"]["keeps 95 %"] == "no"
        and speed_rows["cot"]["decode x"] == "(2.10 [2.00, 2.20])"
    )
    alone = rows_of(report.markdown([make("teacher", status="failed", reason="x"), lost]), "Speed")
    assert alone["cot"]["keeps 95 %"] == "-" and alone["cot"]["decode x"] == "-"


def test_the_length_of_answers_outside_mlperfs_band_is_flagged():
    short = make("cot", 0.6, seed=1)
    short = short.model_copy(
        update={"scores": (short.scores[0].model_copy(update={"tokens_per_answer": 20.0}),)}
    )
    speed_rows = rows_of(report.markdown([RECORDS[0], short, make("sft", 0.6, seed=1)]), "Speed")
    assert speed_rows["cot"]["length x"] == "0.63 !" and speed_rows["sft"]["length x"] == "1.00"


def test_the_teachers_cached_work_is_divided_by_the_rows_that_used_it():
    shared = (SharedCost(key="traces", seconds=30.0),)
    cost = Cost(
        seen_tokens=990,
        seconds=5.0,
        device_seconds=10.0,
        devices=2,
        flops=1e9,
        shared=shared,
        energy_joules=50.0,
    )
    records = [
        RECORDS[0],
        *(make("cot", seed=seed, cost=cost) for seed in (1, 2, 3)),
        make("sft", seed=1, cost=Cost(seconds=4.0)),
    ]
    text = report.markdown(records, report.ReportOptions(price=3.6))
    cost_rows = rows_of(text, "Training cost (at 3.6 a device-hour)")
    assert (
        cost_rows["cot"]["shared s"] == "30.0"
        and cost_rows["cot"]["shared s/row"] == "10.0"
        and cost_rows["sft"]["shared s/row"] == "-"
    )
    assert (
        cost_rows["cot"]["money"] == "0.0200"
        and cost_rows["cot"]["energy J"] == "50"
        and cost_rows["sft"]["energy J"] == "-"
    )
    assert "money" not in report.markdown(records)


def test_a_grid_of_several_scenarios_has_a_table_of_its_own():
    def at(condition, value):
        return Measurement(
            name="decode_tokens_per_second",
            value=value,
            unit="tokens/s",
            higher_is_better=True,
            condition=condition,
        )

    several = make("cot", seed=1, measurements=(at("batch 1", 100.0), at("batch 8", 500.0)))
    text = report.markdown([RECORDS[0], several])
    assert (
        "Speed by scenario" in text
        and "| batch 8" in text
        and "Speed by scenario" not in report.markdown(RECORDS)
    )


def test_forms_agree_and_latex_is_whole(tmp_path):
    report.write_tables(RECORDS, tmp_path)
    data = json.loads((tmp_path / "tables.json").read_text())
    [group] = data["groups"]
    text, tex = (tmp_path / "table.md").read_text(), (tmp_path / "tables.tex").read_text()
    for table in group["tables"]:
        assert (
            all(cell in text for row in table["rows"] for cell in row)
            and f"**{table['title']}**" in text
        )
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == len(group["tables"])
    for line in tex.splitlines():
        if line.endswith(r"\\"):
            assert not re.search(r"(?<!\\)[%#_$]", line.replace(r"$\pm$", "")), line
    quality = next(table for table in group["tables"] if table["name"] == "quality")
    assert quality["blocks"] == ["teacher", "x", "x", "control", "control"]


def test_rows_are_ordered_by_a_column_within_their_family():
    def fast(label, speed, family):
        return weighed(label, family, 0.6, decode=speed, megabytes=1, seconds=1)

    records = [
        RECORDS[0],
        fast("a", 1.0, "x"),
        fast("b", 3.0, "x"),
        fast("c", 2.0, "y"),
        fast("d", 9.0, "z"),
    ]
    controls = [make("untouched", 0.05, control=True, family="control")]
    [section] = report.build_sections([*records, *controls], report.ReportOptions(sort="decode x"))
    speed = next(table for table in section.tables if table.name == "speed")
    assert [row[0] for row in speed.rows] == ["teacher", "d", "b", "a", "c", "untouched (control)"]
    [section] = report.build_sections([*records, *controls], report.ReportOptions(sort="-decode x"))
    assert [
        row[0] for row in next(table for table in section.tables if table.name == "speed").rows
    ][1:3] == ["a", "b"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--sort", "retentoin"], "did you mean 'retention'"),
        (["--forms", "pdf"], "unknown form 'pdf'"),
        (["--against", "nobody"], "nobody"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_kept(tmp_path, given, said):
    record.write_record(tmp_path / "records" / "a.json", RECORDS[0])
    done = CliRunner().invoke(
        app,
        ["report", str(tmp_path), "--keep", str(tmp_path / "study"), *given],
        standalone_mode=False,
    )
    assert (
        said in str(done.exception)
        and "\n" not in str(done.exception)
        and not (tmp_path / "study").exists()
    )


def test_more_tokens_a_second_are_better_and_more_seconds_are_not():
    from harness.reporting.table import less_is_better

    assert not any(
        map(
            less_is_better,
            ("decode tok/s", "prefill tok/s", "tokens", "score", "decode x", "top-1 agreement"),
        )
    )
    assert all(
        map(
            less_is_better,
            ("TTFT ms", "train s", "s/problem", "disk MiB", "KL", "losses/wins", "mmlu perplexity"),
        )
    )


def test_rows_timed_under_another_scenario_have_dashes():
    def timed(label, condition):
        speeds = [
            Measurement(name=name, value=5.0, unit="x", higher_is_better=True, condition=condition)
            for name in ("decode_tokens_per_second", "decode_speedup")
        ]
        return make(label, 0.9).model_copy(update={"measurements": tuple(speeds)})

    text = report.markdown(
        [timed("teacher", "batch 1"), timed("int8", "batch 1"), timed("int4", "batch 64")]
    )
    speed = rows_of(text, "Speed")
    assert "5" in speed["int8"]["decode tok/s"] and speed["int4"]["decode tok/s"] == "-"
    assert (
        "- int4: timed under another scenario than the table's (batch 64), so the speeds are "
        "dashes." in text
    )


def _timed_on_a_gpu(label, **values):
    """Return a record with speeds of one scenario, by the measurements' names."""
    speeds = [
        Measurement(
            name=name,
            value=value if isinstance(value, float) else 0.0,
            unit="x",
            higher_is_better=True,
            condition="batch 1",
            remark=value if isinstance(value, str) else "",
        )
        for name, value in {"decode_tokens_per_second": 5.0, **values}.items()
    ]
    return make(label, 0.9).model_copy(update={"measurements": tuple(speeds)})


def test_a_gpus_rows_say_how_their_steps_were_launched_and_what_eager_ones_took():
    reason = "decoding is eager, not captured in a graph (out of memory); bound by launches"
    captured = {"tpot_seconds": 0.005, "eager_tpot_seconds": 0.02, "decode_busy_share": 0.25}
    records = [
        _timed_on_a_gpu("teacher", decode_speedup=1.0, eager_decode_speedup=1.0, **captured),
        _timed_on_a_gpu("int8", decode_speedup=3.5, eager_decode_speedup=1.02, **captured),
        _timed_on_a_gpu(
            "int4",
            decode_speedup=0.9,
            tpot_seconds=0.02,
            decode_busy_share=0.2,
            skipped_decode_capture=reason,
        ),
        _timed_on_a_gpu(
            "svd", decode_speedup=0.9, decode_busy_share=0.95, skipped_decode_capture=reason
        ),
    ]
    text = report.markdown(records)
    speed = rows_of(text, "Speed")
    assert speed["int8"]["decode x"] == "3.50" and speed["int8"]["eager decode x"] == "1.02"
    assert speed["int8"]["TPOT ms"] == "5" and speed["int8"]["eager TPOT ms"] == "20"
    assert [speed[label]["steps"] for label in ("teacher", "int8", "int4", "svd")] == [
        "captured",
        "captured",
        "eager, bound by launches",
        "eager",
    ]
    assert speed["int4"]["eager decode x"] == "-"
    assert f"- Measurements of int4, svd: {reason}." in text


def test_rows_from_a_cpu_have_no_columns_of_launches():
    from harness.analysis.comparison import group_records

    records = [_timed_on_a_gpu(label, decode_speedup=1.0) for label in ("teacher", "int8")]
    [section] = report.build_sections(records)
    [speed] = [table for table in section.tables if table.name == "speed"]
    assert not [column for column in speed.columns if "eager" in column or column == "steps"]
    assert not [column for row in speed.exact for column in row if "eager" in column]
    assert len(group_records(records)) == 1


def test_tables_are_the_same_bytes_on_another_processor(tmp_path):
    """Another BLAS kernel, no vector instructions, one thread or two: whole numbers up to the last
    division.
    """
    study = Path(__file__).parents[2] / "results" / "embedded"
    seen = set()
    plain = {
        "OPENBLAS_CORETYPE": "Prescott",
        "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F",
        "OMP_NUM_THREADS": "2",
    }
    for number, more in enumerate(({}, plain)):
        folder = tmp_path / str(number)
        line = [
            sys.executable,
            "-c",
            "from harness.cli.app import main; main()",
            "report",
            str(study),
            "--out",
            str(folder),
        ]
        done = subprocess.run(line, env={**os.environ, **more}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen.add(tuple(path.read_bytes() for path in sorted(folder.iterdir())))
    assert len(seen) == 1
    assert (tmp_path / "0" / "table.md").read_bytes() == (
        study / "tables" / "table.md"
    ).read_bytes()


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
    mean = sum(record.scores[0].value for record in RECORDS[1:4]) / 3
    assert float(rows["cot"]["gsm8k-mini retention"]) == pytest.approx(mean / teacher, abs=1e-5)
    assert (
        float(rows["cot"]["gsm8k-mini retention low"])
        < mean / teacher
        < float(rows["cot"]["gsm8k-mini retention high"])
    )


def test_every_column_is_explained():
    text = report.markdown(RECORDS)
    columns = {
        cell.strip()
        for line in text.splitlines()
        if line.startswith("| row")
        for cell in line.strip("|").split("|")
    }
    explained = {*glossary.GLOSSARY, "against", "task", "difference (points)", "verdict"}
    words = {column.removesuffix(" x") for column in explained} | explained
    assert {column.removesuffix(" MiB").removesuffix(" x") for column in columns} <= words


STUDIES = {
    "embedded": (),
    "compression-tiny": ("prune-depth+int8",),
    "compression-smollm2": (),
    "distillation-tiny": ("response", "sft", "cot", "response[teacher=tiny-math]"),
}


@pytest.mark.parametrize("study", STUDIES)
def test_committed_tables_are_what_their_records_give_byte_for_byte(study, tmp_path):
    from pathlib import Path

    place = Path(__file__).parents[2] / "results" / study
    if not place.exists():
        pytest.skip("not run from a checkout")
    records, problems = read_records(place)
    assert records and not problems
    report.write_tables(records, tmp_path, report.ReportOptions(references=STUDIES[study]))
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_bytes() for path in (place / "tables").iterdir()}
    assert {name: body for name, body in committed.items() if name in written} == written, [
        name for name in written if written[name] != committed.get(name)
    ]
    assert not committed.keys() - written.keys(), "files that nothing makes any more"


def test_bars_and_line_breaks_stay_inside_their_cells():
    records = [make("teacher", 0.9), make("response[terms=a|b]", 0.5, seed=1)]
    lines = [line for line in report.markdown(records).splitlines() if line.startswith("|")]
    assert any(r"a\|b" in line for line in lines)
    for block in report.markdown(records).split("\n\n"):
        counts = {
            line.replace(r"\|", "").count("|")
            for line in block.splitlines()
            if line.startswith("|")
        }
        assert len(counts) <= 1


HOSTILE = "x|y <b>z</b> \x1b]0;owned\x07 =1+1 \\input{a}\n\\input{b} " + "w" * 100_000


def test_hostile_names_and_reasons_reach_no_form_as_they_are(tmp_path):
    bad = make("cot", 0.1, seed=8).model_copy(
        update={
            "label": "=cmd|'x'!A0\x1b[31m",
            "status": "failed",
            "reason": HOSTILE,
            "scores": (),
            "tasks": RECORDS[0].tasks,
        }
    )
    folder = tmp_path / "tables"
    report.write_tables([*RECORDS, bad], folder)
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "\x1b" not in text and "\x07" not in text and "w" * 3_000 not in text, path
    assert (
        "\n\\input" not in (folder / "tables.tex").read_text()
        and "<b>" not in (folder / "table.md").read_text()
    )
    for path in folder.glob("*.csv"):
        assert not any(
            cell[:1] in "=@" and cell for row in csv.reader(path.open()) for cell in row
        ), path
