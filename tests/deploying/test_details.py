"""What is shown of a row: each figure is the record's, each file is there, the command gives it."""

from gate_rows import marks, row

from harness.analysis.single import score_interval
from harness.deploying.details import row_details, run_file_of
from harness.deploying.row import find_row
from harness.records.record import StageRecord, write_record


def lines_of(store, label):
    return row_details(find_row(label, store.root)).splitlines()


def test_scores_have_their_interval_and_what_was_kept(made_store):
    [line] = [line for line in lines_of(made_store, "int4") if "gsm8k-mini@1" in line]
    score = find_row("int4", made_store.root).record.scores[0]
    interval = score_interval(score)
    assert score.value == 0.765  # 800 - 45 + 10 of 1,000
    assert f"76.5 % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]  n = 1,000" in line
    assert "95.6 % [" in line and line.endswith("of the teacher's")  # 765 / 800


def test_files_are_named_with_their_bytes_and_the_command_gives_the_run_again(made_store):
    lines = lines_of(made_store, "int4")
    student = made_store.student("student-of-int4") / "student"
    [weights] = [line for line in lines if "model.safetensors" in line]
    assert weights.endswith(" 5 bytes") and f"          {student}" in "\n".join(lines)
    assert any(line.endswith("log.txt (18 bytes)") for line in lines)
    [command] = [line for line in lines if line.startswith("command")]
    typed = "harness run --methods 'int4,int4[group_size=32]' --limit 1000"
    assert command.removeprefix("command").strip().startswith(typed)


def test_a_row_without_its_store_says_so(tmp_path):
    write_record(tmp_path / "int8.json", row("int8", marks(700)))
    text = row_details(find_row("int8", tmp_path))
    assert "its files are not here" in text and "a study holds records alone" in text


def test_a_failed_row_says_why_and_a_chain_shows_its_stages(tmp_path):
    from harness.records.record import Cost

    stages = tuple(
        StageRecord(label=label, method="m", key=label, digest="d", weight_bytes=9, cost=Cost())
        for label in ("response", "response+int4")
    )
    record = row("response+int4", marks(700), stages=stages)
    write_record(tmp_path / "chain.json", record)
    why = {"status": "failed", "reason": "it fell", "student": None, "measurements": ()}
    write_record(tmp_path / "x.json", row("x", "", scores=(), **why))
    text = row_details(find_row("response+int4", tmp_path))
    assert "stages    response: 9 bytes" in text and "          response+int4: 9 bytes" in text
    assert "status    failed: it fell" in row_details(find_row("x", tmp_path))


def test_the_run_that_computed_a_row_is_the_last_one_begun_before_its_record(made_store):
    found = find_row("int4", made_store.root)  # its record is of 2026-11-24, 08:00
    [own] = (made_store.root / "runs").glob("*.json")
    for name in ("20261123-080000-1", "20261124-075900-2", "20261125-080000-3"):
        own.with_name(f"{name}.json").write_bytes(own.read_bytes())
    assert run_file_of(found).stem == "20261124-075900-2"
