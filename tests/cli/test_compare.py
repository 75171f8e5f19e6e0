"""The command `harness compare`: exit codes, files, and logs that lm-eval itself wrote."""

import json
import math
import sys

import pytest
from gate_rows import flipped, harness, marks
from lm_eval_logs import line, lines_of, write_log

from harness.models.resolve import EMBEDDED

BEFORE = marks(300, 500)


@pytest.fixture
def logs(tmp_path):
    after = flipped(BEFORE, lose=40, win=12)
    return [
        write_log(tmp_path / name, lines_of(run)) for name, run in (("a", BEFORE), ("b", after))
    ]


def test_a_regression_ends_with_1_and_is_written_as_json(logs, tmp_path):
    out = tmp_path / "verdict.json"
    done = harness("compare", *logs, "--json", out)
    assert done.return_value == 1
    assert "lost on letters (acc): 0, 1" in done.output
    written = json.loads(out.read_text(encoding="utf-8"))
    assert (written["verdict"], written["before"], written["after"]) == ("regressed", "a", "b")
    assert len(written["changed"][0]["lost"]) == 40


def test_the_other_exit_codes(logs, tmp_path):
    assert harness("compare", logs[0], logs[0]).return_value == 0
    few = write_log(tmp_path / "few", lines_of("1100"))
    other = write_log(tmp_path / "other", lines_of("1101"))
    assert harness("compare", few, other).return_value == 3
    assert harness("compare", logs[0], few).return_value == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--alpha", "0.7"), "--alpha 0.7"),
        (("--tasks", "letters,letters"), "named twice"),
        (("--metric", "acc_norm"), "no task has such a figure"),
        (("--tolerance", "-1"), "--tolerance -1"),
    ],
)
def test_mistakes_are_one_line(logs, options, message):
    done = harness("compare", *logs, *options)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


YAML = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.slow
def test_logs_of_lm_evals_own_command_give_the_test_computed_by_hand(tmp_path, monkeypatch):
    from itertools import islice

    from lm_eval.__main__ import cli_evaluate

    from suites.mmlu_mini import generated_items

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "letters.jsonl"
    items = list(islice(generated_items("test"), 30))
    data.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "letters.yaml").write_text(YAML.format(data=data), encoding="utf-8")
    for name in ("tiny", "tiny-math"):
        words = f"lm_eval run --model hf --model_args pretrained={EMBEDDED / name},dtype=float32 "
        words += f"--device cpu --tasks letters --include_path {tmp_path / 'tasks'} "
        words += f"--batch_size 30 --log_samples --output_path {tmp_path / name}"
        monkeypatch.setattr(sys, "argv", words.split())
        cli_evaluate()
    places = [next((tmp_path / name).rglob("samples_*.jsonl")) for name in ("tiny", "tiny-math")]
    rows = [
        [json.loads(text) for text in place.read_text(encoding="utf-8").splitlines()]
        for place in places
    ]
    assert set(line(0, 1.0, acc_norm=1.0)) == set(rows[0][0])
    out = tmp_path / "verdict.json"
    harness("compare", tmp_path / "tiny", tmp_path / "tiny-math", "--json", out)
    written = json.loads(out.read_text(encoding="utf-8"))
    lost, won = (
        [
            old["doc_id"]
            for old, new in zip(*rows, strict=True)
            if sign * (old["acc"] - new["acc"]) > 0
        ]
        for sign in (1, -1)
    )
    assert (written["changed"][0]["lost"], written["changed"][0]["won"]) == (lost, won)
    flips = len(lost) + len(won)
    by_hand = sum(math.comb(flips, k) for k in range(len(lost), flips + 1)) / 2**flips
    [finding] = written["findings"]
    assert flips
    assert finding["numbers"]["p_holm"] == pytest.approx(by_hand, rel=1e-9)
