"""Every form of metric, document and group gets the figure of lm-eval's own `simple_evaluate`."""

import json
import math
import subprocess
import sys
from statistics import fmean

import pytest

import suites
from harness.data.source import LocalOrHubData
from harness.errors import CellFailed, HarnessError
from harness.models.language_model import open_model
from harness.scoring.lm_eval_model import HarnessLM
from harness.scoring.score import score_task

UTILS = """
def score_of(word, text):
    return (sum(letter in text for letter in word) + 1) / (len(word) + 2)

def fractional_acc(doc, results):
    best = max(range(len(results)), key=lambda at: results[at][0])
    return {"acc": (best + 1) / (len(results) + 1)}

def overlap(references, predictions, **_):
    return score_of(references[0], predictions[0])

def error_rate(references, predictions, **_):
    return 1.25 - score_of(references[0], predictions[0])

def several(references, predictions, **_):
    return {"rouge1": score_of(references[0], predictions[0]) * 100, "rouge2": 1.0}

def macro_f1(items):
    from sklearn.metrics import f1_score
    golds, predictions = zip(*items)
    return f1_score(golds, predictions, average="macro")

def some(doc, results):
    return {"acc": 1.0} if len(doc["question"]) % 2 else {"other": 0.5}

def filtered(dataset):
    return dataset.filter(lambda doc: doc["number"] % 3 != 1)

def expanded(dataset):
    from datasets import Dataset
    marked = [(doc, mark) for doc in dataset for mark in ("?", "!")]
    return Dataset.from_list([dict(doc, question=doc["question"] + mark) for doc, mark in marked])

def reordered(dataset):
    return dataset.select(range(len(dataset) - 1, -1, -1))
"""


def rows(count, start=0, choices=None):
    def most(n):
        return choices or 2 + n % 3

    words = ["fig", "plum", "pear", "lime", "date"]
    return [
        {
            "number": n,
            "question": f"Item {n}: which is number {n % 4}",
            "word": words[n % 5],
            "gold": n % most(n),
            "options": [f"{words[position % 5]}{n}" for position in range(most(n))],
            "steps": ["a", str(n)],
            "text": f"A page about {words[n % 5]} and number {n}. " * (1 + n % 3),
        }
        for n in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a task of every form."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "forms.py").write_text(UTILS, encoding="utf-8")
    for name, items in {
        "mixed": rows(14),
        "two": rows(9, 40, 2),
        "few": rows(4, 60, 2),
        "train": rows(12, 80),
    }.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in items), encoding="utf-8"
        )

    def task(name, data="mixed", functions=None, **keys):
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": f"{data}.jsonl", "train": "train.jsonl"}},
            "test_split": "test",
            "training_split": "train",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}\nAnswer:",
            "doc_to_target": "gold",
            "doc_to_choice": "options",
            "metadata": {"version": 1},
            **keys,
        }
        text = "".join(
            f"{key}: {json.dumps(value)}\n" for key, value in config.items() if value is not None
        )
        text += "".join(
            f"{key}: !function forms.{value}\n" for key, value in (functions or {}).items()
        )
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")

    def metrics(*names, **more):
        return [
            {"metric": name, "aggregation": "mean", "higher_is_better": True, **more}
            for name in names
        ]

    task("letters", metric_list=metrics("acc", "acc_norm"))
    task("norm_only", metric_list=metrics("acc_norm"))
    task("mutual", metric_list=metrics("acc", "acc_mutual_info"))
    task("fraction", functions={"process_results": "fractional_acc"}, metric_list=metrics("acc"))
    task("brier", "two", metric_list=[{"metric": "brier_score"}])
    task("uneven_brier", metric_list=[{"metric": "brier_score"}])
    task("unheard", metric_list=metrics("no_such_metric"))
    task("mcc", "two", metric_list=[{"metric": "mcc"}])
    task("mcc_few", "few", metric_list=[{"metric": "mcc"}])
    task("f1_acc", "two", metric_list=[{"metric": "f1"}, *metrics("acc")])
    task("f1", "two", metric_list=[{"metric": "f1"}])
    task(
        "own_f1",
        "two",
        metric_list=[{"metric": "f1", "aggregation": "OWN", "higher_is_better": True}],
    )
    own_f1_yaml = (folder / "own_f1.yaml").read_text(encoding="utf-8").partition("metric_list")[0]
    own_f1_yaml += (
        "metric_list:\n  - metric: f1\n    aggregation: !function forms.macro_f1\n    "
        "higher_is_better: true\n"
    )
    (folder / "own_f1.yaml").write_text(own_f1_yaml, encoding="utf-8")
    task("holes", functions={"process_results": "some"}, metric_list=metrics("acc"))
    for name in ("filtered", "expanded", "reordered"):
        task(name, functions={"process_docs": name}, metric_list=metrics("acc"))
    task("shots", num_fewshot=2, metric_list=metrics("acc"))
    task(
        "shots_filtered",
        num_fewshot=2,
        functions={"process_docs": "filtered"},
        metric_list=metrics("acc"),
    )
    task(
        "own_shots",
        num_fewshot=2,
        fewshot_split="test",
        training_split=None,
        metric_list=metrics("acc"),
    )
    task("winogrande", doc_to_text="gold", doc_to_target="{{question}}", metric_list=metrics("acc"))
    write = {
        "output_type": "generate_until",
        "doc_to_choice": None,
        "doc_to_target": "word",
        "generation_kwargs": {"max_gen_toks": 6, "until": ["\n"]},
    }
    task("written", **write, metric_list=metrics("exact_match"))
    task(
        "hashes",
        **write | {"doc_to_target": "so it is #### {{word}}"},
        metric_list=metrics("exact_match"),
    )
    for name in ("bleu", "chrf", "ter"):
        task(name, **write, metric_list=[{"metric": name}])
    for name, function, better in (
        ("overlap", "overlap", True),
        ("error", "error_rate", False),
        ("rouge", "several", True),
    ):
        task(name, **write)
        text = (
            f"metric_list:\n  - metric: !function forms.{function}\n    aggregation: mean\n    "
            f"higher_is_better: {str(better).lower()}\n"
        )
        (folder / f"{name}.yaml").write_text(
            (folder / f"{name}.yaml").read_text() + text, encoding="utf-8"
        )
    page = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "doc_to_choice": None,
        "training_split": None,
    }
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        task(f"read_{name}", **page, metric_list=[{"metric": name}])
    task("small", "few", metric_list=metrics("acc"))

    def group(name, members, **keys):
        lines = {"group": name, "task": members, **keys}
        (folder / f"{name}.yaml").write_text(
            "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()),
            encoding="utf-8",
        )

    group(
        "sized",
        ["letters", "small"],
        aggregate_metric_list=[{"metric": "acc", "weight_by_size": True}],
    )
    group(
        "alike",
        ["letters", "small", "f1_acc"],
        aggregate_metric_list=[{"metric": "acc", "weight_by_size": False}],
    )
    group(
        "normed",
        ["letters", "norm_only"],
        aggregate_metric_list=[{"metric": "acc_norm", "weight_by_size": False}],
    )
    group(
        "lacking",
        ["letters", "mcc", "small"],
        aggregate_metric_list=[{"metric": "acc", "weight_by_size": False}],
    )
    group("corpora", ["mcc", "f1"])
    group("unlike", ["letters", "norm_only"])
    group("both_ways", ["letters", "brier"])
    group(
        "corpus_alike",
        ["f1", "f1_acc"],
        aggregate_metric_list=[{"metric": "f1", "weight_by_size": False}],
    )
    group(
        "corpus_sized",
        ["mcc", "mcc_few"],
        aggregate_metric_list=[{"metric": "mcc", "weight_by_size": True}],
    )
    group("pages", ["read_word_perplexity", "read_bits_per_byte"])
    group("units", ["read_word_perplexity", "read_byte_perplexity"])
    return folder


@pytest.fixture(scope="module")
def opened(random_model):
    return open_model(random_model)


@pytest.fixture(scope="module")
def scored(place, opened):
    """Return a function that scores a task once."""
    results = {}

    def score(name, **settings):
        key = (name, *sorted(settings.items()))
        if key not in results:
            task = suites.load(f"lm-eval:{name}", include_path=place)
            results[key] = (
                *score_task(opened, task, LocalOrHubData(), progress=lambda _: None, **settings),
                task,
            )
        return results[key]

    return score


def upstream(place, opened, name):
    """Return what lm-eval's own `simple_evaluate` makes of the task, our model answering."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(place), include_defaults=False)
    return simple_evaluate(HarnessLM(opened), tasks=[name], task_manager=manager, bootstrap_iters=0)


# name -> lm-eval's key of the figure
HITS = {
    "letters": "acc,none",
    "norm_only": "acc_norm,none",
    "mutual": "acc,none",
    "f1_acc": "acc,none",
    "filtered": "acc,none",
    "expanded": "acc,none",
    "reordered": "acc,none",
    "shots": "acc,none",
    "shots_filtered": "acc,none",
    "own_shots": "acc,none",
    "winogrande": "acc,none",
    "written": "exact_match,none",
    "hashes": "exact_match,none",
    "sized": "acc,none",
}
NUMBERS = {
    "fraction": "acc,none",
    "overlap": "overlap,none",
    "error": "error_rate,none",
    "rouge": "rouge1,none",
    "alike": "acc,none",
    "normed": "acc_norm,none",
    "lacking": "acc,none",
}
PARTS = {
    "brier": "brier_score,none",
    "mcc": "mcc,none",
    "f1": "f1,none",
    "corpus_alike": "f1,none",
    "corpus_sized": "mcc,none",
    "bleu": "bleu,none",
    "chrf": "chrf,none",
    "ter": "ter,none",
}
TOGETHER = {"holes": "acc,none", "own_f1": "f1,none"}
DOCUMENTS = {
    "read_word_perplexity": "word_perplexity,none",
    "read_byte_perplexity": "byte_perplexity,none",
    "read_bits_per_byte": "bits_per_byte,none",
}


@pytest.mark.parametrize("name", [*HITS, *NUMBERS, *PARTS, *TOGETHER, *DOCUMENTS])
def test_every_form_of_task_has_lm_evals_figure(name, place, opened, scored, monkeypatch):
    score, items, _ = scored(name)
    monkeypatch.chdir(place)  # lm-eval looks for data files in the working directory
    theirs = upstream(place, opened, name)
    key = {**HITS, **NUMBERS, **PARTS, **TOGETHER, **DOCUMENTS}[name]
    assert score.value == pytest.approx(theirs["results"][name][key], rel=1e-9, abs=1e-12)
    samples = [
        sample for subtask_samples in theirs["samples"].values() for sample in subtask_samples
    ]
    if name != "lacking":  # lm-eval asks the members that its group's figure leaves out
        assert score.n == len(samples) == len(items)
        # the same shots
        assert sorted(row.prompt_hash for row in items) == sorted(
            sample["prompt_hash"] for sample in samples
        )
        assert sorted(row.doc_hash for row in items) == sorted(
            sample["doc_hash"] for sample in samples
        )
    numbered = bool(score.numbers) and not score.hit_or_miss
    forms = (
        score.hit_or_miss,
        numbered,
        bool(score.statistics),
        bool(score.unpaired),
        bool(score.totals),
    )
    assert forms == tuple(name in group for group in (HITS, NUMBERS, PARTS, TOGETHER, DOCUMENTS))
    assert score.retains == (
        name in {*HITS, *NUMBERS, "f1", "corpus_alike", "bleu", "chrf"} - {"error"}
    )
    if score.numbers:
        from harness.statistics.figures import weighted_mean

        assert weighted_mean(score.numbers, score.parts) == pytest.approx(score.value)
    if score.statistics:
        from harness.statistics import corpus

        assert len(score.statistics) == score.n and score.stderr is not None
        assert corpus.run_figure(
            corpus.Corpus(score.form, score.statistics), score.parts
        ) == pytest.approx(score.value, rel=1e-9, abs=1e-9)


def test_direction_unit_and_reasons_are_told(scored):
    error, rouge, brier = (scored(name)[0] for name in ("error", "rouge", "brier"))
    assert (
        error.lower_is_better
        and not error.retains
        and error.metric == "error_rate"
        and not error.unpaired
    )
    assert (
        rouge.unit == "number"
        and rouge.metric == "rouge1"
        and any("have no several" in note for note in rouge.notes)
    )
    assert (
        brier.lower_is_better and not brier.unpaired and brier.form == "mean" and brier.chance == 0
    )
    assert "items of holes have no acc" in scored("holes")[0].unpaired
    assert (
        scored("fraction")[0].values["acc"]
        and scored("fraction")[0].outcomes == {}
        and scored("letters")[0].values == {}
    )
    lacking = scored("lacking")[0]
    assert lacking.parts == ((14, 1 / 28), (4, 1 / 8)) and any(
        "without mcc, which have no acc" in note for note in lacking.notes
    )


def test_items_keep_what_a_corpus_metric_aggregates(scored, tmp_path):
    from harness.scoring.items import read_rows, write_rows

    f1, items, _ = scored("f1")
    # (gold, prediction)
    assert [row.parts["f1"] for row in items] == [
        [(row.item + 40) % 2, row.position] for row in items
    ]
    assert f1.statistics == tuple(
        f"{gold} {chosen}" for gold, chosen in (row.parts["f1"] for row in items)
    )
    assert (f1.unit, f1.signed, scored("mcc")[0].signed) == ("share", False, True)
    _, written, _ = scored("bleu")
    assert all(
        [row.gold, row.text.strip()] == [references_and_text[0], references_and_text[1].strip()]
        for row in written
        for references_and_text in [row.parts["none"]]
    )
    assert scored("letters")[1][0].parts == {}  # a hit or miss needs none
    write_rows(tmp_path / "rows.jsonl", items)
    assert read_rows(tmp_path / "rows.jsonl") == items


def test_what_a_tasks_own_code_aggregates_is_not_compared_and_says_so(scored):
    score = scored("own_f1")[0]
    assert (
        score.unpaired
        == "f1 is one figure of all items together (macro_f1), made by the task's own code, which "
        "records do not hold"
    )
    # the items still hold the parts
    assert not score.statistics and scored("own_f1")[1][0].parts["f1"]


def test_parts_that_a_record_cannot_hold_stay_with_the_items(scored, place, opened, monkeypatch):
    from harness.scoring import outcomes, parts

    monkeypatch.setattr(parts, "MAX_CHARACTERS", 10)
    task = suites.load("lm-eval:f1", include_path=place)
    score, items = score_task(opened, task, LocalOrHubData(), progress=lambda _: None)
    assert (
        "what its items add takes 27 characters, more than a record holds (10); try --limit"
        in score.unpaired
        and items[0].parts
    )
    monkeypatch.setattr(parts, "MAX_CHARACTERS", 2_000_000)
    monkeypatch.setattr(outcomes, "MAX_CHARACTERS", 10)
    task = suites.load("lm-eval:corpus_alike", include_path=place)
    assert (
        "more than the 10 characters"
        in score_task(opened, task, LocalOrHubData(), progress=lambda _: None)[0].unpaired
    )


@pytest.mark.parametrize("name", ["units", "pages"])
def test_words_and_bytes_are_not_summed_into_one_perplexity(scored, name):
    score = scored(name)[0]
    assert "figures of different kinds (" in score.unpaired and not score.totals
    assert "word_perplexity" in score.unpaired


def test_chance_is_the_mean_of_what_guessing_gives(scored):
    sizes = [2 + n % 3 for n in range(14)]
    assert (
        scored("letters")[0].chance
        == pytest.approx(fmean(1 / k for k in sizes))
        != pytest.approx(1 / fmean(sizes))
    )
    assert scored("letters")[2].chance == pytest.approx(scored("letters")[0].chance)
    assert (
        scored("alike")[0].chance
        == pytest.approx((fmean(1 / k for k in sizes) + 0.5 + 0.5) / 3)
        == pytest.approx(scored("alike")[2].chance)
    )


def test_choices_without_a_question_are_no_choices(scored):
    score, items, _ = scored("mutual")
    assert [len(row.log_probabilities) for row in items] == [2 + n % 3 for n in range(14)]
    assert set(score.outcomes) == {"acc", "acc_mutual_info"} and max(score.chosen) == "D"
    assert [row.text for row in items] == [row.text for row in scored("letters")[1]]


def test_members_with_other_metrics_are_told_apart_or_refused(scored):
    unlike, corpora = scored("unlike")[0], scored("corpora")[0]
    assert unlike.metric == "acc_norm"  # both members have it
    assert (
        "judged by different metrics (mcc: mcc; f1: f1)" in " ".join(corpora.notes)
        and corpora.unpaired
    )
    assert scored("pages")[0].unpaired and set(corpora.groups) == {"mcc", "f1"}
    with pytest.raises(
        CellFailed,
        match=r"better in different directions \(acc higher, brier_score lower\); name them one by "
        r"one",
    ):
        scored("both_ways")


def test_answers_that_read_alike_are_told_apart_by_their_place(scored, place, opened):
    _, items, _ = scored("winogrande")
    assert len({row.text for row in items}) > 1 and not any(row.twins for row in items)
    from dataclasses import replace

    from harness.files.digests import digest_of

    flipped = [
        replace(
            items[0],
            correct={"acc": not items[0].correct["acc"]},
            position=1 - items[0].position,
            text="x",
            twins=True,
        ),
        *items[1:],
    ]
    same = [replace(row, text="x", twins=True) for row in items]
    assert digest_of([row.answer for row in flipped]) != digest_of([row.answer for row in same])
    normed = replace(items[0], correct={"acc": True, "acc_norm": False})
    assert normed.answer != replace(normed, correct={"acc": True, "acc_norm": True}).answer


# One index: of processed documents


@pytest.mark.parametrize(
    "name", ["filtered", "expanded", "reordered", "shots", "shots_filtered", "own_shots", "sized"]
)
def test_a_sample_holds_the_whole_runs_items_under_the_same_numbers(name, scored):
    _, all_rows, _ = scored(name)
    score, items, _ = scored(name, limit=5)
    by_number = {row.item: row for row in all_rows}
    assert score.n == len(items) == 5
    assert all(
        (row.doc_hash, row.prompt_hash, row.text) == (same.doc_hash, same.prompt_hash, same.text)
        for row in items
        for same in [by_number[row.item]]
    )


def test_list_valued_fields_make_no_groups(scored):
    assert scored("letters")[0].groups == {} and set(scored("sized")[0].groups) == {
        "letters",
        "small",
    }


PROMPTS = """
import sys, json, random
from pathlib import Path
import suites
from harness.data.source import LocalOrHubData
from harness.models.checkpoint import describe
from harness.models.language_model import open_model
from harness.scoring.score import score_task
random.seed(int(sys.argv[3]))
task = suites.load("lm-eval:shots", include_path=sys.argv[2])
model = open_model(describe(Path(sys.argv[1]), name="m"))
_, rows = score_task(model, task, LocalOrHubData(), progress=lambda step: None)
print(json.dumps([row.prompt_hash for row in rows]))
"""


@pytest.mark.slow
def test_every_process_shows_the_same_shots(random_model, place, scored):
    process = subprocess.run(
        [sys.executable, "-c", PROMPTS, str(random_model.path), str(place), "7"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(process.stdout.splitlines()[-1]) == [
        row.prompt_hash for row in scored("shots")[1]
    ]


def test_seeds_are_put_back(place):
    import random

    import numpy as np
    import torch

    from harness.data.seeding import seeded_as_lm_eval

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    unseeded_draws = (random.random(), float(np.random.rand()), float(torch.rand(1)))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    with seeded_as_lm_eval():
        seeded_draws = (random.random(), float(np.random.rand()), float(torch.rand(1)))
    assert (random.random(), float(np.random.rand()), float(torch.rand(1))) == unseeded_draws
    with seeded_as_lm_eval():
        assert (random.random(), float(np.random.rand()), float(torch.rand(1))) == seeded_draws


# Grading by item


def test_an_answer_is_graded_by_its_own_item(place):
    task = suites.load("lm-eval:hashes", include_path=place)
    for example in task.examples("test", LocalOrHubData()):
        assert example.gold.startswith("so it is #### ")
        assert (
            task.grade(example.gold, f" {example.gold}")[0].correct
            == task.grade(str(example.gold), f" {example.gold}")[0].correct
        )
    overlap = suites.load("lm-eval:overlap", include_path=place)
    example = next(iter(overlap.examples("test", LocalOrHubData())))
    # a part of the marks is no right answer
    assert not overlap.grade(example.gold, " nothing")[0].correct


def test_bits_per_byte_are_bits(scored):
    bits, perplexity = scored("read_bits_per_byte")[0], scored("read_byte_perplexity")[0]
    assert (
        bits.value == pytest.approx(math.log2(perplexity.value))
        and bits.totals == perplexity.totals
    )


def test_what_cannot_be_asked_is_refused_while_planning(place, tmp_path):
    base = (place / "written.yaml").read_text(encoding="utf-8")
    odd = {
        "unsafe": ("unsafe_code: true\n", "unsafe_code"),
        "seen": ("doc_to_image: text\n", "pictures"),
    }
    for name, (line, _) in odd.items():
        (tmp_path / f"{name}.yaml").write_text(
            base.replace('"written"', f'"{name}"') + line, encoding="utf-8"
        )
    for name, (_, message) in odd.items():
        with pytest.raises(HarnessError, match=message):
            suites.load(f"lm-eval:{name}", include_path=tmp_path)


def test_a_metric_that_lm_eval_cannot_compute_is_a_line(scored):
    with pytest.raises(
        CellFailed, match=r"lm-eval:uneven_brier: lm-eval cannot compute its figures .*array"
    ):
        scored("uneven_brier")
    with pytest.raises(CellFailed, match="unheard gives its items no metric"):
        scored("unheard")


def test_how_a_group_averages_is_in_its_version(place, tmp_path):
    for file in place.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (place / "alike.yaml").read_text(encoding="utf-8")
    version = suites.load("lm-eval:alike", include_path=tmp_path).version
    (tmp_path / "alike.yaml").write_text(text.replace("false", "true"), encoding="utf-8")
    assert suites.load("lm-eval:alike", include_path=tmp_path).version != version
