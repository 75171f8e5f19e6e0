"""Real tasks over a made-up data folder: lm-eval's own prompts and graders, versions, and every bad input in one line."""

import gzip
import json
import math
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

import suites
from harness.data.examples import examples_of, training_examples
from harness.data.source import DataSource, NoSplit
from harness.errors import HarnessError
from suites.loading import numbers
from suites.loading.lm_eval import built, builtin
from suites.wikitext import documents

REAL = ("gsm8k", "gsm8k-cot", "mmlu", "mmlu-cloze", "wikitext")
LOCAL = Path(__file__).parents[1] / "tasks"
SUBJECTS = ("anatomy", "marketing")


def gsm8k_rows(split, count):
    return [
        {
            "question": f"A {split} crate holds {n} figs and {n + 1} dates. How many fruits are that?",
            "answer": f"Fruits are {n}+{n + 1}=<<{n}+{n + 1}={2 * n + 1}>>{2 * n + 1} in all.\nSo it’s {2 * n + 1}.\n#### {2 * n + 1}",
        }
        for n in range(1, count + 1)
    ]


def mmlu_rows(split, count):
    return [
        {
            "id": f"{subject}/{split}/{n}", "subject": subject, "question": f" Which {split} word of {subject} has number {n}?\n",
            "choices": [f"word {n} {letter}" for letter in "stuv"], "answer": "ABCD"[n % 4],
        }
        for subject in SUBJECTS
        for n in range(count)
    ]  # fmt: skip


PAGES = [
    ' = Old Mill = \n The mill , built in 1 @,@ 250 , stood on a hill . \n = = Owners = = \n It was owned by " the abbey " . \n',
    " = River Song = \n A song in 3 @.@ 5 parts . \n = = = Verse = = = \n x = 3 is sung twice . \n",
]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())


@pytest.fixture
def folder(tmp_path):
    """Return a data folder in the published layout, without a manifest; every item is made up."""
    write_rows(tmp_path / "gsm8k/train.jsonl.gz", gsm8k_rows("train", 40))
    write_rows(tmp_path / "gsm8k/test.jsonl", gsm8k_rows("test", 12))
    for split, count in (("dev", 5), ("val", 3), ("test", 8)):
        write_rows(tmp_path / f"mmlu/{split}.jsonl.gz", mmlu_rows(split, count))
    (tmp_path / "wikitext2").mkdir()
    raw = "".join(PAGES).replace("\n", "\r\n").encode()
    (tmp_path / "wikitext2/wiki.test.raw.gz").write_bytes(gzip.compress(raw))
    return tmp_path


@pytest.fixture
def source(folder):
    return DataSource(folder=folder)


def upstream(yaml, rows, **changes):
    """Build lm-eval's own task from its own YAML over the given splits: what ours is compared with."""
    from datasets import Dataset

    base = {key: value for key, value in builtin(yaml).items() if key not in {"dataset_path", "dataset_name"}}
    return built(base, custom_dataset=lambda **_: {split: Dataset.from_list(part) for split, part in rows.items()}, **changes)


def with_numbers(rows):
    return [row | {"answer": "ABCD".index(row["answer"])} for row in rows]


def contexts(task):
    return [task.fewshot_context(doc, num_fewshot=task.config.num_fewshot or 0) for doc in task.eval_docs]


class Oracle:
    """Answers every request rightly: the gold choice, the gold text, and one nat per word."""

    def __new__(cls, answers):
        from lm_eval.api.model import LM

        class Knowing(LM):
            def loglikelihood(self, requests):
                return [(0.0 if one.args[1] in answers[one.doc["question"]] else -9.0, True) for one in requests]

            def loglikelihood_rolling(self, requests):
                return [-float(len(one.doc["page"].split())) for one in requests]

            def generate_until(self, requests):
                return [answers[one.doc["question"]] for one in requests]

        return Knowing()


def evaluated(tasks, answers):
    from lm_eval.evaluator import evaluate

    return evaluate(Oracle(answers), tasks, bootstrap_iters=0, log_samples=True)


# Prompts


def test_gsm8k_shows_lm_evals_template_with_the_first_five_training_rows(source, no_network):
    (name, task), *_ = suites.load("gsm8k").lm_eval_tasks(source).items()
    train, test = gsm8k_rows("train", 40), gsm8k_rows("test", 12)
    shots = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in train[:5])
    first_n = upstream("gsm8k/gsm8k.yaml", {"train": train, "test": test}, fewshot_config={"sampler": "first_n"})
    assert name == "gsm8k" and contexts(task) == contexts(first_n)
    assert contexts(task) == [f"{shots}Question: {row['question']}\nAnswer:" for row in test]
    assert "<<" in shots and task.config.generation_kwargs["max_gen_toks"] == 512
    assert not no_network


def test_gsm8k_cot_shows_lm_evals_eight_shots(source, no_network):
    (name, task), *_ = suites.load("gsm8k-cot").lm_eval_tasks(source).items()
    assert name == "gsm8k_cot" and contexts(task) == contexts(upstream("gsm8k/gsm8k-cot.yaml", {"test": gsm8k_rows("test", 12)}))
    assert len({context.rpartition("Q: ")[0] for context in contexts(task)}) == 1
    assert contexts(task)[0].count("The answer is") == 8 and task.config.generation_kwargs["max_gen_toks"] == 512
    assert not no_network


@pytest.mark.parametrize(("name", "folder_name", "suffix"), [("mmlu", "default", ""), ("mmlu-cloze", "continuation", "_continuation")])
def test_mmlu_shows_lm_evals_templates(name, folder_name, suffix, source, no_network):
    tasks = suites.load(name).lm_eval_tasks(source)
    assert list(tasks) == [f"mmlu_{subject}{suffix}" for subject in SUBJECTS]
    for subject, task in zip(SUBJECTS, tasks.values(), strict=True):
        rows = {
            split: with_numbers([row for row in mmlu_rows(split, n) if row["subject"] == subject]) for split, n in (("dev", 5), ("test", 8))
        }
        theirs = upstream(f"mmlu/{folder_name}/mmlu_{subject}.yaml", rows, num_fewshot=5)
        assert contexts(task) == contexts(theirs)
        assert all(type(doc["answer"]) is int and set(doc) == {"question", "subject", "choices", "answer"} for doc in task.eval_docs)
        assert contexts(task)[0].startswith("The following are") and f"about {subject}" in contexts(task)[0]
        assert contexts(task)[0].count("\nAnswer:") == 6
        assert [task.doc_to_choice(doc) for doc in task.eval_docs] == [theirs.doc_to_choice(doc) for doc in theirs.eval_docs]
    assert list(suites.load(name).lm_eval_tasks(source, subjects=["marketing"])) == [f"mmlu_marketing{suffix}"]
    assert not no_network


def test_wikitext_is_cut_at_titles_and_counted_as_lm_eval_counts(source, no_network):
    task = suites.load("wikitext").lm_eval_tasks(source)["wikitext"]
    assert [doc["page"] for doc in task.eval_docs] == PAGES == documents("".join(PAGES))
    assert task.doc_to_target(task.eval_docs[0]).startswith(" = Old Mill =\nThe mill, built in 1,250, stood on a hill.")
    assert set(task.process_results(task.eval_docs[0], [-3.0])) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert documents("words before\n" + PAGES[0]) == ["words before\n", PAGES[0]]
    assert evaluated({"wikitext": task}, {})["results"]["wikitext"]["word_perplexity,none"] < 2.8
    assert suites.load("wikitext").grade("", "text") == ()


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k-cot", "mmlu", "mmlu-cloze"])
def test_training_prompts_are_lm_evals_without_shots(name, source):
    task = suites.load(name)
    docs = {task.doc_to_text(doc) for task in task.lm_eval_tasks(source).values() for doc in task.eval_docs}
    examples = list(task.examples("test", source))
    assert {example.prompt for example in examples} == docs and len(examples) == (12 if "gsm8k" in name else 16)
    for example in examples:
        assert "<<" not in example.completion and example.completion.startswith(" ") and not example.prompt[-1].isspace()
        assert all(grade.correct for grade in task.grade(example.gold, example.completion))
        assert all(grade.correct for grade in task.grade(example.gold, example.answer))
        assert not any(grade.correct for grade in task.grade(example.gold, ""))
        assert task.kind == "choose" or task.grade(example.gold, f"So it is that.\n{example.ending}")[0].correct


def test_training_forms(source):
    plain, cot = (next(suites.load(name).examples("train", source)) for name in ("gsm8k", "gsm8k-cot"))
    assert plain.completion == " Fruits are 1+2=3 in all.\nSo it’s 3.\n#### 3" and plain.answer == " #### 3"
    assert cot.completion == " Fruits are 1+2=3 in all. So it’s 3. The answer is 3." and cot.answer == " The answer is 3."
    letters, texts = (next(suites.load(name).examples("validation", source)) for name in ("mmlu", "mmlu-cloze"))
    assert (letters.completion, letters.gold) == (" A", "A") and (texts.completion, texts.gold) == (" word 0 s", "word 0 s")


# Grades


def test_an_oracle_scores_one(source, no_network):
    problems = gsm8k_rows("test", 12)
    answers = {row["question"]: f" {row['answer']}" for row in problems}
    assert evaluated(suites.load("gsm8k").lm_eval_tasks(source), answers)["results"]["gsm8k"]["exact_match,strict-match"] == 1.0
    said = {row["question"]: f" The answer is {row['answer'].rpartition('#### ')[2]}." for row in problems}
    assert evaluated(suites.load("gsm8k-cot").lm_eval_tasks(source), said)["results"]["gsm8k_cot"]["exact_match,strict-match"] == 1.0
    for name in ("mmlu", "mmlu-cloze"):
        chosen = {
            row["question"]: {" " + (row["answer"] if name == "mmlu" else row["choices"]["ABCD".index(row["answer"])])}
            for row in mmlu_rows("test", 8)
        }
        results = evaluated(suites.load(name).lm_eval_tasks(source), chosen)["results"]
        assert len(results) == 2 and all(result["acc,none"] == 1.0 for result in results.values())
    assert not no_network


TEXTS = [
    "#### 18", "The answer is 18.", "The answer is $18.", "**18**", "$18.00", "18...", r"\boxed{18}", "17.5 which rounds to 18",
    "#### 1,800", "", "#### 18 .. verified in 2 ways", "#### -18", "#### 18.", "a 1 b 22 c 3", "-$5,000.50", "####18",
    "#### 18\n\nQuestion", "The answer is 18", "The answer is 18, so The answer is 19.", "The answer is 180", "The answer is -18.\n",
]  # fmt: skip


@pytest.mark.parametrize(("name", "stated"), [("gsm8k", numbers.HASHES), ("gsm8k-cot", numbers.SENTENCE), ("gsm8k-mini", numbers.HASHES)])
def test_our_graders_agree_with_lm_evals_filters(name, stated, source):
    from lm_eval.api.instance import Instance

    (task,) = suites.load(name).lm_eval_tasks(source).values()
    doc = {"question": "?", "answer": "#### 18", "steps": 2}
    instances = [
        Instance(request_type="generate_until", doc=doc, arguments=("", {}), idx=0, metadata=("t", i, 1), resps=[text])
        for i, text in enumerate(TEXTS)
    ]
    task._instances = instances
    task.apply_filters()
    assert stated.pattern == builtin(f"gsm8k/{name.removesuffix('-mini')}.yaml")["filter_list"][0]["filter"][0]["regex_pattern"]
    for text, instance in zip(TEXTS, instances, strict=True):
        grades = suites.load(name).grade("18", text)
        assert [grade.extractor for grade in grades] == ["strict-match", "flexible-extract", "numeric"]
        for grade in grades[:2]:
            theirs = instance.filtered_resps[grade.extractor]
            assert (theirs, bool(task.process_results(doc, [theirs])["exact_match"])) == (grade.extracted or "[invalid]", grade.correct)


@pytest.mark.parametrize(
    ("text", "number", "equal"),
    [
        ("-$5", "-5", "-5"), ("$-5", "-5", "-5"), (".5", ".5", "0.5"), ("\u22125", "-5", "-5.0"), ("1/2", "1/2", ".5"),
        ("50/2=25", "25", "25"),
        ("#### -$5,000.50", "-5,000.50", "-5000.5"), (r"\boxed{-.5}", "-.5", "-1/2"), ("The answer is \u22123/4.", "-3/4", "-0.75"),
        ("on 12/25/2020", "2020", "2020"), ("1/0", "0", "0"), ("\u20ac 7", "7", "7"), ("18...", "18", "18.00"), ("3 - 2 = 1", "1", "1"),
    ],
)  # fmt: skip
def test_numbers_are_read_as_they_are_written(text, number, equal):
    assert numbers.numeric(text) == number
    assert numbers.grade_number(equal, text)[2].correct and not numbers.grade_number("77", text)[2].correct
    assert not numbers.grade_number(equal, "no number")[2].correct


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("The answer is (B).", "B"), ("The answer is: B. Lima", "B"), ("**Answer:** B", "B"), ("Rome is A.\n\n**B**", "B"),
        ("Answer: B\nAnswer: C", None), ("The answer is B or C.", None), ("The answer is Bern.", None), ("A is wrong, B may be.", None),
        ("the answer is a.", None), ("", None),
    ],
)  # fmt: skip
def test_a_letter_is_read_out_of_prose_that_states_one(text, letter):
    primary, stated = suites.load("mmlu").grade(letter or "B", text)
    assert stated.extracted == letter and stated.correct == (letter is not None)
    assert primary.extracted == ("B" if text == "B" else None)


def test_a_letter_in_prose_is_trained_as_the_task_grades_it(source):
    from types import SimpleNamespace

    from harness.scoring.generation import Generation
    from methods.training.traces import surviving

    example = next(one for one in suites.load("mmlu").examples("dev", source) if one.gold == "B")
    examples = [replace(example, prompt=f"Question {n}?") for n in range(5)]
    said = ["(B)", "It is Lima. Answer: B", "It is Lima.\nThe answer is (B).", "The answer is C.", "B. Lima"]
    given = SimpleNamespace(tasks={"mmlu": suites.load("mmlu")}, source=source, seed=1, progress=lambda one: None)
    kept, counts = surviving(examples, [[Generation(text, 9, "eos")] for text in said], given)
    assert [text for _, text in kept] == [" B", "It is Lima. Answer: B", "It is Lima.\nThe answer is (B).\nB"]
    assert (counts["kept_in_another_form"], counts["dropped_wrong"], counts["dropped_unreadable"]) == (3, 1, 1)


# Versions and rows


def test_versions_are_those_of_lm_evals_yaml():
    files = {
        "gsm8k": "gsm8k/gsm8k.yaml", "gsm8k-cot": "gsm8k/gsm8k-cot.yaml", "mmlu": "mmlu/default/_default_template_yaml",
        "mmlu-cloze": "mmlu/continuation/_continuation_template_yaml", "wikitext": "wikitext/wikitext.yaml",
    }  # fmt: skip
    for name, file in files.items():
        assert float(suites.load(name).version.partition("+")[0]) == builtin(file)["metadata"]["version"]
    assert [suites.load(name).version for name in REAL] == ["3+first_n+512", "3+512", "1+5shot", "1+5shot", "2+documents"]
    assert len(suites.load("mmlu").known_subjects()) == len(suites.load("mmlu-cloze").known_subjects()) == 57


def test_validation_is_held_out_from_the_training_rows(source):
    task = suites.load("gsm8k")
    train, validation = ([example.prompt for example in task.examples(split, source)] for split in ("train", "validation"))
    assert len(train) == 36 and len(validation) == 4 and not set(train) & set(validation)


def test_examples_are_rendered_for_the_model_and_guarded_as_they_are(source, folder):
    tasks = {name: suites.load(name) for name in ("gsm8k", "gsm8k-cot", "wikitext")}
    chat = DataSource(folder=folder, render=lambda one: replace(one, prompt=f"<user>{one.prompt}<assistant>"))
    plain, rendered = (training_examples(tasks, one, rows=6) for one in (source, chat))
    assert [f"<user>{example.prompt}<assistant>" for example in plain] == [example.prompt for example in rendered]
    assert [example.task for example in plain] == ["gsm8k", "gsm8k-cot"] * 3  # perplexity takes no part
    assert examples_of(tasks, "train", chat, rows=6) == rendered and chat == source
    write_rows(folder / "gsm8k/test.jsonl", gsm8k_rows("train", 2))
    with pytest.raises(HarnessError, match="2 evaluation items of gsm8k stand in the training data"):
        training_examples(tasks, chat, rows=6)


def test_the_fingerprint_is_of_the_unpacked_bytes(folder, source):
    files = suites.load("gsm8k").files
    packed = source.fingerprint(files)
    plain = gzip.decompress((folder / "gsm8k/train.jsonl.gz").read_bytes())
    (folder / "gsm8k/train.jsonl.gz").unlink()
    (folder / "gsm8k/train.jsonl").write_bytes(plain)
    assert source.fingerprint(files) == packed != ""
    (folder / "gsm8k/train.jsonl").write_bytes(plain + b"\n")
    assert source.fingerprint(files) != packed
    assert DataSource().fingerprint(files) == ""


# What can be wrong


def refused(call, *parts):
    with pytest.raises(HarnessError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def change(path, row, **values):
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    rows[row] |= values
    write_rows(path, [{key: value for key, value in one.items() if value is not ...} for one in rows])


def test_answers_by_position_and_files_with_a_byte_order_mark_are_read(folder, source):
    letters = [dict(doc) for task in suites.load("mmlu").lm_eval_tasks(source).values() for doc in task.eval_docs]
    found = mmlu_rows("test", 8)
    odd = [row | {"answer": (n, str(n), row["answer"])[at % 3]} for at, row in enumerate(found) for n in ["ABCD".index(row["answer"])]]
    text = "\ufeff" + "".join(json.dumps(row) + "\n" for row in odd)
    (folder / "mmlu/test.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert [dict(doc) for task in suites.load("mmlu").lm_eval_tasks(source).values() for doc in task.eval_docs] == letters


def test_what_has_a_train_split_is_trained_on_and_the_rest_is_named(folder, source):
    from harness.data.examples import untrained

    tasks = {name: suites.load(name) for name in ("gsm8k", "mmlu", "wikitext")}
    rows = training_examples(tasks, source, rows=6)
    assert [row.task for row in rows] == ["gsm8k"] * 6 and {row.task for row in examples_of(tasks, "validation", source, rows=2)} == {
        "gsm8k"
    }
    assert list(untrained(tasks, source)) == ["mmlu"] and "never trained on" in untrained(tasks, source)["mmlu"]
    with pytest.raises(NoSplit, match="never trained on"):
        training_examples({"mmlu": tasks["mmlu"]}, source, rows=6)
    assert {row.task for row in examples_of({"mmlu": tasks["mmlu"]}, "validation", source, rows=2)} == {"mmlu"}


def test_training_on_nothing_is_refused_while_planning(folder, no_network):
    import harness.api
    from harness.planning.config import build

    asked = {"suite": ("knowledge",), "teacher": ("tiny",), "data_dir": folder}
    asked["suite"] = (str(folder / "own.toml"),)
    (folder / "own.toml").write_text('name = "own"\ntasks = ["mmlu", "wikitext"]\n')
    refused(
        lambda: harness.api.plan_run(build({**asked, "methods": ("response",)})),
        "response has nothing to train on",
        "mmlu: ",
        "--suite math",
    )
    assert harness.api.plan_run(build({**asked, "methods": ("int8",)})).hub_data is False
    (folder / "own.toml").write_text('name = "own"\ntasks = ["mmlu", "gsm8k"]\n')
    assert harness.api.plan_run(build({**asked, "methods": ("response",)})).cells


def test_missing_files_are_named(folder, source):
    (folder / "gsm8k/test.jsonl").unlink()
    refused(lambda: suites.load("gsm8k").lm_eval_tasks(source), str(folder), "gsm8k/train.jsonl.gz and gsm8k/test.jsonl", "--data-dir")
    (folder / "mmlu/dev.jsonl.gz").unlink()
    refused(lambda: suites.load("mmlu").lm_eval_tasks(source), str(folder), "mmlu/dev.jsonl.gz and mmlu/test.jsonl.gz")
    refused(lambda: DataSource().rows("gsm8k/test.jsonl", fields=()), "--data-dir")


def test_bad_rows_are_named_by_file_and_line(folder, source):
    path, mmlu = folder / "mmlu/test.jsonl.gz", suites.load("mmlu")
    for values, told in (
        ({"answer": "E"}, "A, B, C, D, given 'E'"),
        ({"answer": 4}, "given 4"),
        ({"answer": True}, "given True"),
        ({"answer": -1}, "given -1"),
        ({"answer": "AB"}, "given 'AB'"),
        ({"choices": ["a", "b", "c"]}, "four texts, 3 given"),
        ({"choices": "abcd"}, "four texts"),
        ({"subject": ...}, "no field 'subject'"),
    ):
        write_rows(path, mmlu_rows("test", 8))
        change(path, 2, **values)
        refused(lambda: mmlu.lm_eval_tasks(source), f"{path}, line 3: ", told)
    path = folder / "gsm8k/test.jsonl"
    gsm8k = suites.load("gsm8k")
    path.write_text('{"question": "a", "answer": "#### 1"}\n\n{"question": \n', encoding="utf-8")
    refused(lambda: gsm8k.lm_eval_tasks(source), f"{path}, line 3: no JSON")
    path.write_text("[1]\n", encoding="utf-8")
    refused(lambda: gsm8k.lm_eval_tasks(source), f"{path}, line 1: ", "object")
    path.write_text('{"question": "a", "answer": "18"}\n', encoding="utf-8")
    refused(lambda: gsm8k.lm_eval_tasks(source), f"{path}, line 1: ", "'#### N'")
    path.write_bytes(b'{"question": "a", "answer": "#### 1"}\n\xff\n')
    refused(lambda: gsm8k.lm_eval_tasks(source), f"{path}, line 2: not UTF-8")


def test_empty_cut_and_half_there_files_say_found_and_expected(folder, source):
    path, gsm8k = folder / "gsm8k/test.jsonl", suites.load("gsm8k")
    path.write_text("", encoding="utf-8")
    refused(lambda: gsm8k.lm_eval_tasks(source), str(path), "0 rows found and 1,319 expected")
    write_rows(path, gsm8k_rows("test", 12))
    (folder / "MANIFEST.md").write_text(
        "| file | rows |\n|---|--:|\n| gsm8k/test.jsonl | 1,000 |\n| wikitext2/wiki.test.raw.gz | 9 lines |\n"
    )
    refused(lambda: gsm8k.lm_eval_tasks(source), str(path), "12 rows found and 1,000 expected", "MANIFEST.md")
    refused(lambda: suites.load("wikitext").lm_eval_tasks(source), "8 lines found and 9 expected")
    (folder / "MANIFEST.md").write_text("| file | rows |\n|---|--:|\n| gsm8k/test.jsonl | 12 |\n")
    assert len(gsm8k.lm_eval_tasks(source)["gsm8k"].eval_docs) == 12
    packed = folder / "gsm8k/train.jsonl.gz"
    packed.write_bytes(packed.read_bytes()[:-40])
    refused(lambda: gsm8k.lm_eval_tasks(source), str(packed), "cut short", "rows found and 7,473 expected")
    packed.write_bytes(b"no gzip at all")
    refused(lambda: gsm8k.lm_eval_tasks(source), str(packed), "0 rows found and 7,473 expected")
    refused(lambda: source.fingerprint(gsm8k.files), str(packed), "damaged")


def test_subjects_are_checked(folder, source):
    mmlu = suites.load("mmlu")
    refused(lambda: mmlu.lm_eval_tasks(source, subjects=["anatomi"]), "did you mean 'anatomy'")
    change(folder / "mmlu/test.jsonl.gz", 0, subject="anatomies")
    refused(lambda: mmlu.lm_eval_tasks(source), "mmlu/test.jsonl", "did you mean 'anatomy'")
    write_rows(folder / "mmlu/test.jsonl.gz", mmlu_rows("test", 8))
    write_rows(folder / "mmlu/dev.jsonl.gz", mmlu_rows("dev", 3))
    refused(lambda: mmlu.lm_eval_tasks(source), "3 rows of anatomy and 5 are shown")


def test_splits_that_do_not_exist_are_refused(source):
    refused(lambda: suites.load("gsm8k").examples("dev", source) and list(suites.load("gsm8k").examples("dev", source)), "no dev split")
    refused(lambda: suites.load("wikitext").examples("train", source), "no training form")
    for name in ("mmlu", "mmlu-cloze"):
        refused(lambda name=name: suites.load(name).examples("train", source), "dev, val and test only, which are never trained on")
    with pytest.raises(NoSplit, match="perplexity only"):
        examples_of({"wikitext": suites.load("wikitext")}, "train", source, rows=2)


@pytest.mark.parametrize("name", REAL)
def test_without_folder_and_network_one_line_comes_at_once(name, no_network):
    began = time.monotonic()
    task = suites.load(name)
    refused(
        lambda: task.lm_eval_tasks(DataSource()),
        name,
        "Hub could not be reached",
        f"give --data-dir a folder with {' and '.join(task.files)}",
    )
    assert time.monotonic() - began < 15


# Tasks from outside


@pytest.fixture(scope="module")
def outside():
    return {name: suites.load(f"lm-eval:{name}", include_path=LOCAL) for name in ("arc_style", "svamp_style")}


def test_local_yaml_tasks_resolve_their_data_beside_them(outside, tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    arc, svamp = (task.lm_eval_tasks(DataSource()) for task in outside.values())
    assert list(arc) == ["arc_style"] and list(svamp) == ["svamp_style"]
    assert len(arc["arc_style"].eval_docs) == len(svamp["svamp_style"].eval_docs) == 12
    assert [(one.kind, one.chance, one.primary, one.domain) for one in outside.values()] == [
        ("choose", 0.25, "acc", "other"), ("generate", 0.0, "last-number", "other"),
    ]  # fmt: skip
    assert not no_network


def test_local_yaml_tasks_grade_and_train(outside, no_network):
    for task in outside.values():
        examples = training_examples({task.name: task}, DataSource(), rows=3)
        assert len(examples) == 3 and examples[0].task == task.name and examples[0].prompt.endswith("Answer:")
        held = {split: {one.prompt for one in task.examples(split, DataSource())} for split in ("train", "validation", "test")}
        assert held["validation"] and not held["train"] & held["validation"] and len(held["test"]) == 12
        for example in task.examples("test", DataSource()):
            assert task.grade(example.gold, example.completion)[0].correct and not task.grade(example.gold, "")[0].correct
        refused(lambda task=task: task.examples("dev", DataSource()), "no dev items")
    grades = outside["svamp_style"].grade("5", " 14-9 is 5 rolls")
    assert [(grade.extractor, grade.extracted, grade.correct) for grade in grades] == [
        ("last-number", "5", True), ("whole", "14-9 is 5 rolls", False),
    ]  # fmt: skip
    assert outside["svamp_style"].grade("5", "none")[0].extracted is None
    assert not no_network


def test_an_oracle_scores_one_on_local_yaml_tasks(outside):
    arc = outside["arc_style"]
    right = {
        example.prompt.removeprefix("Question: ").partition("\n")[0]: {example.completion} for example in arc.examples("test", DataSource())
    }
    assert evaluated(arc.lm_eval_tasks(DataSource()), right)["results"]["arc_style"]["acc,none"] == 1.0


def test_an_edited_yaml_or_data_file_is_another_version(outside, tmp_path):
    def version(place):
        return suites.load("lm-eval:arc_style", include_path=place).version

    first, second, third = (shutil.copytree(LOCAL, tmp_path / name) for name in ("first", "second", "third"))
    (second / "arc_style.yaml").write_text((second / "arc_style.yaml").read_text(encoding="utf-8") + "# edited\n", encoding="utf-8")
    (third / "arc_style_train.jsonl").write_text((third / "arc_style_train.jsonl").read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert version(first) == outside["arc_style"].version and len({version(first), version(second), version(third)}) == 3
    assert version(first).startswith("1.0+lm-eval+")


CODE = {
    "constant": ("open('golds.json').read()", "golds.json", ""),
    "beside": ("(Path(__file__).parents[1] / 'data' / 'golds.json').read_text()", "data/golds.json", ""),
    "named": ("FILE.read_text()", "golds.json", ""),
    "folder": ("[one.read_text() for one in Path('data').glob('*.json')]", "data/golds.json", ""),
    "imported": ("deeper.read()", "golds.json", ""),
    "put together": ("open('gold' + str(1) + '.json').read()", "", "only running it tells"),
    "environment": ("open(os.environ['GOLDS']).read()", "", "os.environ"),
    "address": ("urllib.request.urlopen('http://x.y/z').read()", "", "urlopen"),
}  # fmt: skip


@pytest.mark.parametrize("form", CODE)
def test_what_code_reads_is_in_the_version_or_said_to_be_unknown(form, tmp_path):
    call, file, why = CODE[form]
    place = shutil.copytree(LOCAL, tmp_path / "place")
    (place / "data").mkdir()
    for name in ("golds.json", "data/golds.json"):
        (place / name).write_text('{"a": 1}', encoding="utf-8")
    (place / "deeper.py").write_text(
        "from pathlib import Path\ndef read():\n    return (Path(__file__).parents[1] / 'golds.json').read_text()\n"
    )
    constant = "FILE = Path(__file__).parents[1] / 'golds.json'\n" if form == "named" else ""
    head = f"import os, urllib.request\nfrom pathlib import Path\nimport deeper\n{constant}"
    (place / "code.py").write_text(f"{head}def docs(dataset):\n    {call}\n    return dataset\n", encoding="utf-8")
    (place / "arc_style.yaml").write_text((place / "arc_style.yaml").read_text() + "process_docs: !function code.docs\n", encoding="utf-8")
    task = suites.load("lm-eval:arc_style", include_path=place)
    assert why in task.unknown_inputs and bool(task.unknown_inputs) == bool(why)
    assert not why or any("nothing of this task is kept from run to run" in note for note in task.notes)
    for changed in filter(None, (file, "code.py", "deeper.py")):
        (place / changed).write_text((place / changed).read_text() + "\n", encoding="utf-8")
        fresh = suites.load("lm-eval:arc_style", include_path=place)
        assert fresh.version != task.version, changed
        task = fresh


@pytest.mark.parametrize(
    ("path", "more"),
    [("folder", {}), ("./folder", {}), ("json", {"data_dir": "folder"}), ("json", {"data_files": {"test": "folder/*.jsonl"}})],
)
def test_local_data_of_every_form_is_found_beside_the_yaml_and_in_the_version(path, more, tmp_path, monkeypatch, no_network):
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    (place / "folder").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    shutil.copy(LOCAL / "arc_style_test.jsonl", place / "folder" / "test.jsonl")
    base = {
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": 0,
        "doc_to_choice": ["a", "b"],
    }
    write_yaml(place, "own", task="own", dataset_path=path, dataset_kwargs=more or None, **base)
    task = suites.load("lm-eval:own", include_path=place)
    assert len(task.lm_eval_tasks(DataSource())["own"].eval_docs) == 12 and not task.needs_hub
    (place / "folder" / "test.jsonl").write_text((place / "folder" / "test.jsonl").read_text() + "\n", encoding="utf-8")
    assert suites.load("lm-eval:own", include_path=place).version != task.version


def test_tasks_of_unknown_inputs_are_planned_anew_every_time(tmp_path):
    import harness.api
    from harness.planning.config import build

    place = shutil.copytree(LOCAL, tmp_path / "place")
    asked = {"suite": ("lm-eval:arc_style",), "methods": ("int8",), "include_path": place, "allow_task_code": True}

    def keys():
        return [cell.key for cell in harness.api.plan_run(build(asked)).cells]

    assert keys() == keys()
    (place / "code.py").write_text("import os\ndef docs(dataset):\n    os.environ.get('X')\n    return dataset\n", encoding="utf-8")
    (place / "arc_style.yaml").write_text((place / "arc_style.yaml").read_text() + "process_docs: !function code.docs\n", encoding="utf-8")
    assert not set(keys()) & set(keys())


def test_ones_own_items_are_counted_where_that_is_cheap(outside, tmp_path):
    assert [task.count() for task in outside.values()] == [12, 12]
    place = shutil.copytree(LOCAL, tmp_path / "place")
    (place / "code.py").write_text("def docs(dataset):\n    return dataset\n", encoding="utf-8")
    (place / "arc_style.yaml").write_text((place / "arc_style.yaml").read_text() + "process_docs: !function code.docs\n", encoding="utf-8")
    assert suites.load("lm-eval:arc_style", include_path=place).count() is None


def write_yaml(folder, name, **keys):
    (folder / f"{name}.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()), encoding="utf-8")


def test_groups_are_flattened_and_odd_tasks_refused(tmp_path, monkeypatch, no_network):
    place = shutil.copytree(LOCAL, tmp_path / "place")
    base = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "arc_style_test.jsonl"}}, "test_split": "test"}
    write_yaml(place, "twin", include="arc_style.yaml", task="twin", metadata={"version": 2.0})
    write_yaml(place, "pair", group="pair", task=["arc_style", {"group": "inner", "task": ["twin"]}])
    write_yaml(place, "mixed", group="mixed", task=["arc_style", "svamp_style"])
    write_yaml(place, "plain", task="plain", output_type="loglikelihood", **base)
    write_yaml(
        place, "gone", task="gone", output_type="generate_until", dataset_path="json", dataset_kwargs={"data_files": {"test": "no.jsonl"}}
    )
    write_yaml(place, "far", task="far", dataset_path="someone/unknown", test_split="test", metadata={"version": 1})
    pair = suites.load("lm-eval:pair", include_path=place)
    assert list(pair.lm_eval_tasks(DataSource())) == ["arc_style", "twin"] and pair.version.startswith("1.0/2.0+lm-eval+")
    assert len(list(pair.examples("test", DataSource()))) == 24
    refused(lambda: suites.load("lm-eval:mixed", include_path=place), "mixes generate_until and multiple_choice")
    refused(lambda: suites.load("lm-eval:plain", include_path=place), "output_type loglikelihood")
    refused(lambda: suites.load("lm-eval:gone", include_path=place), f"no data file {place}/no.jsonl")
    write_yaml(place, "odd", task="odd", output_type="generate_until", doc_to_text="{{ nothing.at.all }}", doc_to_target="x", **base)
    odd = suites.load("lm-eval:odd", include_path=place)
    refused(lambda: odd.lm_eval_tasks(DataSource()), "lm-eval:odd cannot be built", "correct", "odd.yaml")
    (place / "svamp_style_test.jsonl").write_text("{broken\n", encoding="utf-8")
    broken = suites.load("lm-eval:svamp_style", include_path=place)
    refused(lambda: broken.lm_eval_tasks(DataSource()), "lm-eval:svamp_style cannot be built", "data files")
    far = suites.load("lm-eval:far", include_path=place)
    refused(lambda: far.lm_eval_tasks(DataSource()), "lm-eval:far", "Hub could not be reached", "--include-path")
    refused(lambda: suites.load("lm-eval:x", include_path=place / "nowhere"), "no folder at", "--include-path")


def test_unknown_outside_names_are_guessed_from_the_users_folder(monkeypatch):
    from suites.loading import definition

    real = definition._index
    monkeypatch.setattr(definition, "_index", lambda path, defaults: {} if defaults else real(path, False))  # lm-eval's own scan takes 20 s
    refused(lambda: suites.load("lm-eval:ark_style", include_path=LOCAL), "did you mean 'arc_style'")
    refused(lambda: suites.load("lm-eval:nothing"), "lm-eval ls tasks", "--include-path")


# Suites


def test_suites_of_ones_own(tmp_path):
    assert suites.resolve(["gsm8k-cot"], embedded=True)["gsm8k-cot"].tasks == ("gsm8k-cot",)
    assert suites.resolve(["lm-eval:arc_style"], embedded=False, include_path=LOCAL)["lm-eval:arc_style"].tasks == ("lm-eval:arc_style",)
    shutil.copytree(LOCAL, tmp_path / "mine")
    file = tmp_path / "mine.toml"
    file.write_text('name = "own"\ntasks = ["lm-eval:svamp_style", "gsm8k-mini"]\nmeasure = false\nhelp = "x"\ninclude_path = "mine"\n')
    names = [str(file), "math"]
    found = suites.resolve(names, embedded=True)
    assert list(found) == ["math", "own"] and found["own"].tasks == ("lm-eval:svamp_style", "gsm8k-mini") and not found["own"].measure
    assert suites.include_path_of(names) == tmp_path / "mine" and suites.include_path_of(names, LOCAL) == LOCAL
    assert suites.include_path_of(["math"]) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('name = "a"\ntask = ["gsm8k"]', "did you mean 'tasks'"),
        ('name = "a"\ntasks = ["gsm8k-minni"]', "did you mean 'gsm8k-mini'"),
        ('name = "math"\ntasks = ["gsm8k"]', "another name"),
        ('name = "a"\ntasks = "gsm8k"', "tasks must be a list"),
        ('tasks = ["gsm8k"]', "must state a name"),
        ("name = a", "no TOML"),
    ],
)
def test_bad_suite_files_are_refused(text, told, tmp_path):
    file = tmp_path / "suite.toml"
    file.write_text(text)
    refused(lambda: suites.resolve([str(file)], embedded=False), told)
    refused(lambda: suites.resolve([str(tmp_path / "no.toml")], embedded=False), "no suite file at")


def test_listing_imports_no_machinery():
    import subprocess
    import sys

    code = (
        "import sys, suites\nfor name in suites.TASKS: suites.load(name)\n"
        "assert not {'torch', 'lm_eval', 'datasets', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(suites.__file__).parent.parent)


# The published data


@pytest.fixture
def published():
    if not os.environ.get("HARNESS_DATA_DIR"):
        pytest.skip("needs the published data: set HARNESS_DATA_DIR to a folder with gsm8k/, mmlu/ and wikitext2/")
    return DataSource.from_environment()


def test_published_items_are_all_there(published, no_network):
    assert len(suites.load("gsm8k").lm_eval_tasks(published)["gsm8k"].eval_docs) == 1_319
    assert len(suites.load("gsm8k-cot").lm_eval_tasks(published)["gsm8k_cot"].eval_docs) == 1_319
    assert len(suites.load("wikitext").lm_eval_tasks(published)["wikitext"].eval_docs) == 62
    task = suites.load("gsm8k")
    assert [sum(1 for _ in task.examples(split, published)) for split in ("train", "validation")] == [6_973, 500]
    assert all(task.grade(one.gold, one.completion)[0].correct for one in task.examples("train", published))
    assert training_examples({"gsm8k": task}, published, rows=200)
    assert not no_network


@pytest.mark.parametrize("name", ["mmlu", "mmlu-cloze"])
def test_published_mmlu_is_whole_and_its_golds_are_choices(name, published):
    began = time.monotonic()
    tasks = suites.load(name).lm_eval_tasks(published)
    assert time.monotonic() - began < 10
    assert len(tasks) == 57 and sum(len(task.eval_docs) for task in tasks.values()) == 14_042
    for task in tasks.values():
        for doc in list(task.eval_docs)[:20]:
            gold, choices = task.doc_to_target(doc), task.doc_to_choice(doc)
            right = [(float(index == gold), False) for index in range(4)]
            assert isinstance(gold, int) and len(choices) == 4 and task.process_results(doc, right)["acc"] == 1.0
        context = task.fewshot_context(task.eval_docs[0], num_fewshot=5)
        shown = [row["choices"][row["answer"]] if name == "mmlu-cloze" else "ABCD"[row["answer"]] for row in task.dataset["dev"]]
        assert len(shown) == 5 and all(f"\nAnswer: {answer}\n\n" in context for answer in shown)


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k-cot", "mmlu", "mmlu-cloze", "wikitext"])
def test_offline_and_item_by_item_what_lm_evals_own_backend_answers(name, source, small, no_network):
    """The same task objects, the same model, sockets blocked: ours, shared and packed, against HFLM at batch 1."""
    from lm_eval.models.huggingface import HFLM

    from harness.scoring.lm_eval_model import HarnessLM

    opened = small("Llama", max_position_embeddings=96 if name == "wikitext" else 4096)
    requests = []
    for task in suites.load(name).lm_eval_tasks(source).values():
        task.build_all_requests(limit=3, rank=0, world_size=1)
        requests += task.instances
    theirs = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=1)
    ours = HarnessLM(opened)
    kind = requests[0].request_type
    left, right = getattr(ours, kind)(requests), getattr(theirs, kind)(requests)
    if kind == "generate_until":
        assert left == right and len(left) == 3
    elif kind == "loglikelihood":
        assert [one[0] for one in left] == pytest.approx([one[0] for one in right], abs=1e-4)
        assert [one[1] for one in left] == [one[1] for one in right]
    else:
        assert left == pytest.approx(right, rel=1e-5)
    assert ours.requests == len(requests) and not no_network


@pytest.mark.parametrize("name", ["gsm8k-cot", "mmlu", "wikitext"])
def test_a_real_task_is_scored_from_the_folder_alone(name, source, small, no_network):
    from harness.scoring.score import score_task

    opened = small("Llama", max_position_embeddings=2048)
    score, rows = score_task(opened, suites.load(name), source, batch_size="auto", limit=2, progress=lambda one: None)
    assert score.n == len(rows) == 2 and score.version == suites.load(name).version
    if name == "mmlu":
        assert len(score.groups) == 2 and score.macro == score.value and sum(score.chosen.values()) == pytest.approx(1)
    if name == "wikitext":
        assert score.value == pytest.approx(math.exp(-sum(t for t, _ in score.totals) / sum(w for _, w in score.totals)))
        assert score.stderr is None and not score.outcomes
    assert not no_network


@pytest.mark.parametrize("name", ["gsm8k-cot", "mmlu"])
def test_a_conversation_is_shown_as_the_template_says_with_one_bos(name, source, small):
    """Chat on: shots become turns, the system prompt comes first, and the template's own BOS is the only one."""
    from harness.contract import Prompting
    from harness.scoring.score import score_task

    opened = small("Llama", max_position_embeddings=4096)
    tokenizer = opened.tokenizer
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    shown = []
    encode = type(opened).encode

    class Watched(type(opened)):
        def encode(self, text, *, special=None):
            ids = encode(self, text, special=special)
            shown.append((text, ids))
            return ids

    watched = Watched(opened.model, tokenizer, "cpu", opened.checkpoint)
    prompting = Prompting(chat=True, system="Be brief.")
    task = suites.load(name)
    score, _ = score_task(watched, task, source, batch_size="auto", limit=2, progress=lambda one: None, prompting=prompting)
    text, ids = next(one for one in shown if "<assistant>" in one[0])
    assert text.startswith(f"{tokenizer.bos_token}<system>Be brief.") and text.count("<user>") > 2 and score.n == 2
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}", "26 Jul 2024"),
        ("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}", "26 Jul 2024"),
        ("{% macro day() %}{{ strftime_now('%Y-%m-%d, %-m %B') }}{% endmacro %}{{ day() }}", "2024-07-26, 07 July"),
    ],
)
def test_a_template_that_writes_the_date_writes_the_same_one_every_day(template, told, small):
    """In what is scored and in what teacher and student are trained on alike."""
    from harness.contract import Prompting
    from harness.models.rendering import renderer
    from harness.scoring.lm_eval_model import HarnessLM

    opened = small("Llama")
    opened.tokenizer.chat_template = template + "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    lm = HarnessLM(opened)
    turns = [{"role": "user", "content": "2 and 2?"}, {"role": "assistant", "content": "Answer:"}]
    assert lm.apply_chat_template(turns[:1]) == f"{told}<user>2 and 2?"
    assert lm.apply_chat_template(turns, add_generation_prompt=False) == f"{told}<user>2 and 2?<assistant>Answer:"
    _, show = renderer(Prompting(chat=True), opened.checkpoint)
    assert show(opened.tokenizer, "2 and 2?") == f"{told}<user>2 and 2?"


def test_items_are_the_same_in_any_chat_template_and_others_with_other_words_or_shots(small, folder, source):
    from harness.contract import Prompting
    from harness.scoring.score import score_task

    opened = small("Llama", max_position_embeddings=2048)

    class Fewer(type(suites.load("gsm8k"))):
        def lm_eval_tasks(self, source):
            found = super().lm_eval_tasks(source)
            found["gsm8k"].set_config("num_fewshot", 3)
            return found

    def scored(template, task=None, **prompting):
        opened.tokenizer.chat_template = template
        given = {"limit": 2, "progress": lambda one: None, "prompting": Prompting(chat=template is not None, **prompting)}
        return score_task(opened, task or suites.load("gsm8k"), DataSource(folder=folder), **given)

    angles = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    headed = "{% for m in messages %}## {{ m.role }}\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}## assistant\n{% endif %}"
    one, rows = scored(angles)
    other, others = scored(headed)
    assert one.items_digest == other.items_digest and rows[0].prompt_hash != others[0].prompt_hash
    plain, _ = scored(None)
    fewer, told = scored(angles, Fewer()), scored(angles, system="Be brief.")
    digests = [one.items_digest, plain.items_digest, fewer[0].items_digest, told[0].items_digest]
    for split, count in (("train", 40), ("test", 12)):
        path = folder / f"gsm8k/{split}.jsonl{'.gz' if split == 'train' else ''}"
        write_rows(path, [row | {"question": row["question"].replace("figs", "nuts")} for row in gsm8k_rows(split, count)])
        digests.append(scored(angles)[0].items_digest)
    assert len(set(digests)) == len(digests)


def test_a_plain_prompt_counts_as_it_is_shown(small, source):
    """Committed records were digested so."""
    from harness.files.digests import digest_of
    from harness.scoring.score import score_task

    score, rows = score_task(small("Llama", max_position_embeddings=2048), suites.load("gsm8k"), source, limit=2, progress=lambda one: None)
    assert score.items_digest == digest_of([(row.item, row.doc_hash, row.prompt_hash, row.target_hash) for row in rows])


# Who answered what


CHOICES = {
    "unlike": lambda n: [f"word {n} {letter}" for letter in "stuv"],
    "two alike": lambda n: [f"word {n}", f"word {n}", f"other {n}", f"third {n}"],
    "alike but for white space": lambda n: [f"word {n}", f"word {n} ", f" word {n}", f"third {n}"],
    "all alike": lambda n: [f"word {n}"] * 4,
    "one within another": lambda n: [f"word {n}", f"word {n} s", f"word {n} s t", f"word {n} s t u"],
}


@pytest.mark.parametrize("form", CHOICES)
def test_answers_of_a_cloze_task_are_told_apart_by_their_place(form, folder, source, random_model):
    """What a choice reads like does not say which it was: one of two alike is right, and models that take the other differ."""
    from harness.files.digests import digest_of
    from harness.models.language_model import open_model
    from harness.scoring.score import score_task

    found = [row | {"choices": CHOICES[form](n)} for n, row in enumerate(mmlu_rows("test", 8))]
    write_rows(folder / "mmlu/test.jsonl.gz", found)
    score, rows = score_task(open_model(random_model), suites.load("mmlu-cloze"), source, progress=lambda one: None)
    golds = [("ABCD".index(row["answer"]), row["choices"]) for row in found]
    assert len(rows) == len(golds) == 16 and score.answers_digest == digest_of([row.answer for row in rows])
    for row, (gold, choices) in zip(rows, golds, strict=True):
        assert row.text == choices[row.position].strip() and row.correct["acc"] == (row.position == gold)
        assert row.twins == ([choice.strip() for choice in choices].count(row.text) > 1)
        for place in set(range(4)) - {row.position}:
            assert replace(row, position=place).answer != row.answer  # the same text, the same outcome, another place
        assert replace(row, correct={name: not hit for name, hit in row.correct.items()}).answer != row.answer
        longer = replace(row, log_probabilities=tuple(value * 1.001 for value in row.log_probabilities), prompt="other machine")
        assert longer.answer == row.answer  # last digits are the machine's
    assert score.items_digest != "" and set(score.outcomes) == {"acc", "acc_norm"} and sum(score.chosen.values()) == pytest.approx(1)


def test_letters_of_shown_choices_are_answers_by_themselves(folder, source, random_model):
    from harness.models.language_model import open_model
    from harness.scoring.score import score_task

    write_rows(folder / "mmlu/test.jsonl.gz", [row | {"choices": ["same"] * 4} for row in mmlu_rows("test", 4)])
    _, rows = score_task(open_model(random_model), suites.load("mmlu"), source, progress=lambda one: None)
    assert [row.answer for row in rows] == ["ABCD"[row.position] for row in rows]  # four choices alike have four letters


OUTSIDE = "task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/o.jsonl\n{train}test_split: test\n{form}"
ASKED = (
    "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\nmetric_list:\n  - metric: exact_match\n"
    "generation_kwargs:\n  until: ['\\n']\n"
)
READ = "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}}'\nmetric_list:\n  - metric: word_perplexity\n"


@pytest.fixture
def mixed_tasks(folder):
    """Return tasks with a train split, without one, and such as only measure a perplexity."""
    (folder / "o.jsonl").write_text("".join(json.dumps({"q": f"question {n}", "a": f"answer {n}"}) + "\n" for n in range(6)))
    (folder / "t.jsonl").write_text("".join(json.dumps({"q": f"trained {n}", "a": f"answer {n}"}) + "\n" for n in range(30)))
    train = {"taught": f"    train: {folder}/t.jsonl\ntraining_split: train\n", "bare": "", "read": ""}
    for name, lines in train.items():
        text = OUTSIDE.format(name=name, folder=folder, train=lines, form=READ if name == "read" else ASKED)
        (folder / f"{name}.yaml").write_text(text)
    outside = {name: suites.load(f"lm-eval:{name}", include_path=folder) for name in train}
    return {**{name: suites.load(name) for name in REAL}, **{task.name: task for task in outside.values()}}


NEVER = {"mmlu", "mmlu-cloze", "lm-eval:bare"}


def test_tasks_without_a_train_split_are_named_with_the_reason(mixed_tasks, source):
    from harness.data.examples import untrained

    found = untrained(mixed_tasks, source)
    assert set(found) == NEVER  # what measures a perplexity was never asked for rows
    assert all("never trained on" in found[name] for name in ("mmlu", "mmlu-cloze")) and "bare" in found["lm-eval:bare"]
    for name, task in mixed_tasks.items():
        assert set(untrained({name: task}, source)) == NEVER & {name}


@pytest.mark.parametrize("asked", [("gsm8k", "mmlu"), ("mmlu-cloze", "lm-eval:taught"), ("lm-eval:bare", "wikitext", "gsm8k-cot"), REAL])
def test_training_rows_are_of_none_of_them_and_their_share_goes_to_the_others(asked, mixed_tasks, source):
    tasks = {name: mixed_tasks[name] for name in asked}
    able = [name for name in asked if name not in NEVER | {"wikitext", "lm-eval:read"}]
    rows = training_examples(tasks, source, rows=12)
    counts = {name: sum(row.task == name for row in rows) for name in asked}
    assert counts == {name: 12 // len(able) if name in able else 0 for name in asked}
    held_out = examples_of(tasks, "validation", source, rows=4)
    assert {row.task for row in held_out} == set(able)  # held-out loss is of what is trained on


@pytest.mark.parametrize("name", sorted(NEVER))
def test_what_cannot_be_trained_on_at_all_is_refused_by_its_reason(name, mixed_tasks, source):
    with pytest.raises(NoSplit, match="never trained on" if name.startswith("mmlu") else "bare"):
        training_examples({name: mixed_tasks[name], "wikitext": mixed_tasks["wikitext"]}, source, rows=4)
