"""Logs of lm-eval: which files a place holds, what a line says, and what is refused."""

import json
import math

import pytest
from lm_eval_logs import DATE, line, lines_of, write_log

from harness.errors import HarnessError
from harness.records.lm_eval_logs import (
    lm_eval_files,
    read_lm_eval_log,
    read_lm_eval_model,
    task_of_file,
)


def test_a_log_has_its_items_and_a_score_for_each_figure(tmp_path):
    lines = lines_of("1101")
    for number, value in enumerate(lines):
        value["metrics"].append("acc_norm")
        value["acc_norm"] = float(number == 0)
    log = read_lm_eval_log(write_log(tmp_path, lines))
    assert log.task == "letters"
    assert [item.number for item in log.items] == [0, 1, 2, 3]
    assert list(log.scores) == ["acc", "acc_norm"]
    assert log.scores["acc"].outcomes == {"acc": "1101"}
    assert (log.scores["acc"].value, log.scores["acc_norm"].value) == (0.75, 0.25)
    assert log.limited is None


def test_filters_are_figures_of_their_own(tmp_path):
    lines = [
        value
        for name, marks in (("strict-match", "100"), ("flexible-extract", "110"))
        for value in lines_of(marks, metric="exact_match", filter_name=name)
    ]
    log = read_lm_eval_log(write_log(tmp_path, lines))
    assert {name: score.value for name, score in log.scores.items()} == {
        "strict-match": 1 / 3,
        "flexible-extract": 2 / 3,
    }


def test_items_may_stand_in_any_order(tmp_path):
    in_order, lines = lines_of("1100"), lines_of("1100")[::-1]
    logs = [
        read_lm_eval_log(write_log(tmp_path / name, values))
        for name, values in (("a", in_order), ("b", lines))
    ]
    assert logs[0].items == logs[1].items
    assert logs[0].scores == logs[1].scores


def test_documents_make_lm_evals_perplexity(tmp_path):
    lines = [line(number, 0.0, metric="word_perplexity") for number in range(2)]
    for value, total in zip(lines, ([-10.0, 4], [-20.0, 6]), strict=True):
        value["word_perplexity"] = total
    score = read_lm_eval_log(write_log(tmp_path, lines)).scores["word_perplexity"]
    assert score.kind == "perplexity"
    assert score.value == pytest.approx(math.exp(30 / 10))
    assert score.totals == ((-10.0, 4.0), (-20.0, 6.0))


def test_bits_per_byte_are_bits(tmp_path):
    value = line(0, 0.0, metric="bits_per_byte") | {"bits_per_byte": [-10.0, 4]}
    score = read_lm_eval_log(write_log(tmp_path, [value])).scores["bits_per_byte"]
    assert score.value == pytest.approx(2.5 / math.log(2))


def test_a_figure_of_all_items_together_pairs_nothing(tmp_path):
    lines = [line(number, 0.0, metric="f1") | {"f1": [0, 1]} for number in range(3)]
    score = read_lm_eval_log(write_log(tmp_path, lines)).scores["f1"]
    assert "3 of 3 items have no f1" in score.unpaired


def test_equal_choices_are_equal_answers_whatever_their_likelihoods_are(tmp_path):
    lines, other = lines_of("10"), lines_of("10")
    other[0]["filtered_resps"] = [["-2.5", "False"], ["-1.5", "False"]]
    logs = [
        read_lm_eval_log(write_log(tmp_path / name, values))
        for name, values in (("a", lines), ("b", other))
    ]
    digests = [log.scores["acc"].answers_digest for log in logs]
    assert digests[0] == digests[1]


def test_the_results_beside_a_log_say_direction_and_sample(tmp_path):
    path = write_log(tmp_path, lines_of("10", metric="wer"))
    results = {
        "higher_is_better": {"letters": {"wer": False}},
        "n-samples": {"letters": {"original": 100, "effective": 2}},
    }
    (tmp_path / f"results_{DATE}.json").write_text(json.dumps(results), encoding="utf-8")
    log = read_lm_eval_log(path)
    assert log.limited is True
    assert log.scores["wer"].lower_is_better


def test_a_place_is_a_log_a_folder_the_folder_above_or_the_results(tmp_path):
    folder = tmp_path / "out" / "org__model"
    paths = [write_log(folder, lines_of("1"), task=task) for task in ("letters", "sums")]
    results = folder / f"results_{DATE}.json"
    results.write_text("{}", encoding="utf-8")
    assert lm_eval_files(paths[0]) == [paths[0]]
    assert lm_eval_files(folder) == lm_eval_files(tmp_path / "out") == lm_eval_files(results)
    assert read_lm_eval_model(paths).name == "org__model"
    assert read_lm_eval_model(paths).tasks == ["letters", "sums"]
    assert lm_eval_files(tmp_path / "nothing") == []
    assert task_of_file(paths[1]) == "sums"


def test_two_runs_and_two_models_in_a_folder_are_refused(tmp_path):
    write_log(tmp_path / "out" / "a", lines_of("1"))
    write_log(tmp_path / "out" / "a", lines_of("1"), date="2026-11-28T10-00-00.000001")
    with pytest.raises(HarnessError, match=r"two logs of letters .*name one run's results"):
        lm_eval_files(tmp_path / "out" / "a")
    results = tmp_path / "out" / "a" / f"results_{DATE}.json"
    results.write_text("{}", encoding="utf-8")
    assert len(lm_eval_files(results)) == 1
    write_log(tmp_path / "out" / "b", lines_of("1"))
    with pytest.raises(HarnessError, match="logs of 2 models; name the folder of one"):
        lm_eval_files(tmp_path / "out")
    results = tmp_path / "out" / "b" / "results_2026-11-29T10-00-00.1.json"
    results.write_text("{}", encoding="utf-8")
    with pytest.raises(HarnessError, match="--log_samples"):
        lm_eval_files(results)


def without(name):
    value = line(0, 1.0)
    del value[name]
    return [value]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no item"),
        ([*lines_of("10"), line(1, 0.0)], "item 1 stands there twice"),
        (without("doc_hash"), "line 1: no doc_hash, which lm-eval 0.4.5"),
        (without("filter"), "no filter"),
        (without("metrics"), "no list of metrics"),
        ([["a list"]], "no object"),
        ([line(0, 1.0), line(1, 1.0), line(0, 1.0, filter_name="x")], "the log is torn"),
    ],
)
def test_what_lm_eval_did_not_write_is_refused_in_one_line(tmp_path, lines, message):
    with pytest.raises(HarnessError, match=message) as problem:
        read_lm_eval_log(write_log(tmp_path, lines))
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_torn_line_is_refused(tmp_path, cut):
    path = write_log(tmp_path, lines_of("10110"))
    path.write_bytes(path.read_bytes()[: -cut - 1])
    with pytest.raises(HarnessError, match=r"line 5: .*torn or edited"):
        read_lm_eval_log(path)
