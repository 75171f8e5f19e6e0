"""Real tasks over a made-up data folder: lm-eval's own prompts and graders, versions, and every bad
input in one line.
"""

import gzip
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from task_data import (
    LOCAL,
    PAGES,
    REAL,
    SUBJECTS,
    evaluated,
    gsm8k_rows,
    mmlu_rows,
    refused,
    write_rows,
)

import suites
from harness.data.examples import examples_of, training_examples
from harness.data.source import LocalOrHubData, NoSplit
from suites.loading.lm_eval import build_task, read_builtin
from suites.wikitext import documents


def upstream(yaml, rows, **changes):
    """Build lm-eval's own task from its own YAML over the given splits: what ours is
    compared with.
    """
    from datasets import Dataset

    base = {
        key: value
        for key, value in read_builtin(yaml).items()
        if key not in {"dataset_path", "dataset_name"}
    }
    return build_task(
        base,
        custom_dataset=lambda **_: {split: Dataset.from_list(part) for split, part in rows.items()},
        **changes,
    )


def with_numbers(rows):
    return [row | {"answer": "ABCD".index(row["answer"])} for row in rows]


def contexts(task):
    return [
        task.fewshot_context(doc, num_fewshot=task.config.num_fewshot or 0)
        for doc in task.eval_docs
    ]


# Prompts


def test_gsm8k_shows_lm_evals_template_with_the_first_five_training_rows(source, no_network):
    (name, task), *_ = suites.load("gsm8k").lm_eval_tasks(source).items()
    train, test = gsm8k_rows("train", 40), gsm8k_rows("test", 12)
    shots = "".join(
        f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in train[:5]
    )
    first_n = upstream(
        "gsm8k/gsm8k.yaml", {"train": train, "test": test}, fewshot_config={"sampler": "first_n"}
    )
    assert name == "gsm8k" and contexts(task) == contexts(first_n)
    assert contexts(task) == [f"{shots}Question: {row['question']}\nAnswer:" for row in test]
    assert "<<" in shots and task.config.generation_kwargs["max_gen_toks"] == 512
    assert not no_network


def test_gsm8k_cot_shows_lm_evals_eight_shots(source, no_network):
    (name, task), *_ = suites.load("gsm8k-cot").lm_eval_tasks(source).items()
    assert name == "gsm8k_cot" and contexts(task) == contexts(
        upstream("gsm8k/gsm8k-cot.yaml", {"test": gsm8k_rows("test", 12)})
    )
    assert len({context.rpartition("Q: ")[0] for context in contexts(task)}) == 1
    assert (
        contexts(task)[0].count("The answer is") == 8
        and task.config.generation_kwargs["max_gen_toks"] == 512
    )
    assert not no_network


@pytest.mark.parametrize(
    ("name", "folder_name", "suffix"),
    [("mmlu", "default", ""), ("mmlu-cloze", "continuation", "_continuation")],
)
def test_mmlu_shows_lm_evals_templates(name, folder_name, suffix, source, no_network):
    tasks = suites.load(name).lm_eval_tasks(source)
    assert list(tasks) == [f"mmlu_{subject}{suffix}" for subject in SUBJECTS]
    for subject, task in zip(SUBJECTS, tasks.values(), strict=True):
        rows = {
            split: with_numbers([row for row in mmlu_rows(split, n) if row["subject"] == subject])
            for split, n in (("dev", 5), ("test", 8))
        }
        theirs = upstream(f"mmlu/{folder_name}/mmlu_{subject}.yaml", rows, num_fewshot=5)
        assert contexts(task) == contexts(theirs)
        assert all(
            type(doc["answer"]) is int and set(doc) == {"question", "subject", "choices", "answer"}
            for doc in task.eval_docs
        )
        assert (
            contexts(task)[0].startswith("The following are")
            and f"about {subject}" in contexts(task)[0]
        )
        assert contexts(task)[0].count("\nAnswer:") == 6
        assert [task.doc_to_choice(doc) for doc in task.eval_docs] == [
            theirs.doc_to_choice(doc) for doc in theirs.eval_docs
        ]
    assert list(suites.load(name).lm_eval_tasks(source, subjects=["marketing"])) == [
        f"mmlu_marketing{suffix}"
    ]
    assert not no_network


def test_wikitext_is_cut_at_titles_and_counted_as_lm_eval_counts(source, no_network):
    task = suites.load("wikitext").lm_eval_tasks(source)["wikitext"]
    assert [doc["page"] for doc in task.eval_docs] == PAGES == documents("".join(PAGES))
    assert task.doc_to_target(task.eval_docs[0]).startswith(
        " = Old Mill =\nThe mill, built in 1,250, stood on a hill."
    )
    assert set(task.process_results(task.eval_docs[0], [-3.0])) == {
        "word_perplexity",
        "byte_perplexity",
        "bits_per_byte",
    }
    assert documents("words before\n" + PAGES[0]) == ["words before\n", PAGES[0]]
    assert evaluated({"wikitext": task}, {})["results"]["wikitext"]["word_perplexity,none"] < 2.8
    assert suites.load("wikitext").grade("", "text") == ()


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k-cot", "mmlu", "mmlu-cloze"])
def test_training_prompts_are_lm_evals_without_shots(name, source):
    task = suites.load(name)
    docs = {
        task.doc_to_text(doc)
        for task in task.lm_eval_tasks(source).values()
        for doc in task.eval_docs
    }
    examples = list(task.examples("test", source))
    assert {example.prompt for example in examples} == docs and len(examples) == (
        12 if "gsm8k" in name else 16
    )
    for example in examples:
        assert (
            "<<" not in example.completion
            and example.completion.startswith(" ")
            and not example.prompt[-1].isspace()
        )
        assert all(grade.correct for grade in task.grade(example.gold, example.completion))
        assert all(grade.correct for grade in task.grade(example.gold, example.answer))
        assert not any(grade.correct for grade in task.grade(example.gold, ""))
        assert (
            task.kind == "choose"
            or task.grade(example.gold, f"So it is that.\n{example.ending}")[0].correct
        )


def test_training_forms(source):
    plain, cot = (
        next(suites.load(name).examples("train", source)) for name in ("gsm8k", "gsm8k-cot")
    )
    assert (
        plain.completion == " Fruits are 1+2=3 in all.\nSo it’s 3.\n#### 3"
        and plain.answer == " #### 3"
    )
    assert (
        cot.completion == " Fruits are 1+2=3 in all. So it’s 3. The answer is 3."
        and cot.answer == " The answer is 3."
    )
    letters, texts = (
        next(suites.load(name).examples("validation", source)) for name in ("mmlu", "mmlu-cloze")
    )
    assert (letters.completion, letters.gold) == (" A", "A") and (texts.completion, texts.gold) == (
        " word 0 s",
        "word 0 s",
    )


# Grades


def test_an_oracle_scores_one(source, no_network):
    problems = gsm8k_rows("test", 12)
    answers = {row["question"]: f" {row['answer']}" for row in problems}
    assert (
        evaluated(suites.load("gsm8k").lm_eval_tasks(source), answers)["results"]["gsm8k"][
            "exact_match,strict-match"
        ]
        == 1.0
    )
    said = {
        row["question"]: f" The answer is {row['answer'].rpartition('#### ')[2]}."
        for row in problems
    }
    assert (
        evaluated(suites.load("gsm8k-cot").lm_eval_tasks(source), said)["results"]["gsm8k_cot"][
            "exact_match,strict-match"
        ]
        == 1.0
    )
    for name in ("mmlu", "mmlu-cloze"):
        choices = {
            row["question"]: {
                " "
                + (row["answer"] if name == "mmlu" else row["choices"]["ABCD".index(row["answer"])])
            }
            for row in mmlu_rows("test", 8)
        }
        results = evaluated(suites.load(name).lm_eval_tasks(source), choices)["results"]
        assert len(results) == 2 and all(result["acc,none"] == 1.0 for result in results.values())
    assert not no_network


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("The answer is (B).", "B"),
        ("The answer is: B. Lima", "B"),
        ("**Answer:** B", "B"),
        ("Rome is A.\n\n**B**", "B"),
        ("Answer: B\nAnswer: C", None),
        ("The answer is B or C.", None),
        ("The answer is Bern.", None),
        ("A is wrong, B may be.", None),
        ("the answer is a.", None),
        ("", None),
    ],
)
def test_a_letter_is_read_out_of_prose_that_states_one(text, letter):
    primary, stated = suites.load("mmlu").grade(letter or "B", text)
    assert stated.extracted == letter and stated.correct == (letter is not None)
    assert primary.extracted == ("B" if text == "B" else None)


def test_a_letter_in_prose_is_trained_as_the_task_grades_it(source):
    from types import SimpleNamespace

    from harness.scoring.generation import Generation
    from methods.training.trace_filter import filter_traces

    example = next(one for one in suites.load("mmlu").examples("dev", source) if one.gold == "B")
    examples = [replace(example, prompt=f"Question {n}?") for n in range(5)]
    answers = [
        "(B)",
        "It is Lima. Answer: B",
        "It is Lima.\nThe answer is (B).",
        "The answer is C.",
        "B. Lima",
    ]
    job = SimpleNamespace(
        tasks={"mmlu": suites.load("mmlu")}, source=source, seed=1, progress=lambda one: None
    )
    traces, counts = filter_traces(
        examples, [[Generation(text, 9, "eos")] for text in answers], job
    )
    assert [text for _, text in traces] == [
        " B",
        "It is Lima. Answer: B",
        "It is Lima.\nThe answer is (B).\nB",
    ]
    assert (
        counts["kept_in_another_form"],
        counts["dropped_wrong"],
        counts["dropped_unreadable"],
    ) == (3, 1, 1)


# Versions and rows


def test_versions_are_those_of_lm_evals_yaml():
    files = {
        "gsm8k": "gsm8k/gsm8k.yaml",
        "gsm8k-cot": "gsm8k/gsm8k-cot.yaml",
        "mmlu": "mmlu/default/_default_template_yaml",
        "mmlu-cloze": "mmlu/continuation/_continuation_template_yaml",
        "wikitext": "wikitext/wikitext.yaml",
    }
    for name, file in files.items():
        assert (
            float(suites.load(name).version.partition("+")[0])
            == read_builtin(file)["metadata"]["version"]
        )
    assert [suites.load(name).version for name in REAL] == [
        "3+first_n+512",
        "3+512",
        "1+5shot",
        "1+5shot",
        "2+documents",
    ]
    assert (
        len(suites.load("mmlu").known_subjects())
        == len(suites.load("mmlu-cloze").known_subjects())
        == 57
    )


def test_the_fingerprint_is_of_the_unpacked_bytes(folder, source):
    files = suites.load("gsm8k").files
    packed = source.fingerprint(files)
    plain = gzip.decompress((folder / "gsm8k/train.jsonl.gz").read_bytes())
    (folder / "gsm8k/train.jsonl.gz").unlink()
    (folder / "gsm8k/train.jsonl").write_bytes(plain)
    assert source.fingerprint(files) == packed != ""
    (folder / "gsm8k/train.jsonl").write_bytes(plain + b"\n")
    assert source.fingerprint(files) != packed
    assert LocalOrHubData().fingerprint(files) == ""


def change(path, row, **values):
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    rows[row] |= values
    write_rows(
        path, [{key: value for key, value in row.items() if value is not ...} for row in rows]
    )


def test_answers_by_position_and_files_with_a_byte_order_mark_are_read(folder, source):
    letters = [
        dict(doc)
        for task in suites.load("mmlu").lm_eval_tasks(source).values()
        for doc in task.eval_docs
    ]
    rows = mmlu_rows("test", 8)
    mixed = [
        row | {"answer": (n, str(n), row["answer"])[position % 3]}
        for position, row in enumerate(rows)
        for n in ["ABCD".index(row["answer"])]
    ]
    text = "\ufeff" + "".join(json.dumps(row) + "\n" for row in mixed)
    (folder / "mmlu/test.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert [
        dict(doc)
        for task in suites.load("mmlu").lm_eval_tasks(source).values()
        for doc in task.eval_docs
    ] == letters


def test_missing_files_are_named(folder, source):
    (folder / "gsm8k/test.jsonl").unlink()
    refused(
        lambda: suites.load("gsm8k").lm_eval_tasks(source),
        str(folder),
        "gsm8k/train.jsonl.gz and gsm8k/test.jsonl",
        "--data-dir",
    )
    (folder / "mmlu/dev.jsonl.gz").unlink()
    refused(
        lambda: suites.load("mmlu").lm_eval_tasks(source),
        str(folder),
        "mmlu/dev.jsonl.gz and mmlu/test.jsonl.gz",
    )
    refused(lambda: LocalOrHubData().rows("gsm8k/test.jsonl", fields=()), "--data-dir")


def test_bad_rows_are_named_by_file_and_line(folder, source):
    path, mmlu = folder / "mmlu/test.jsonl.gz", suites.load("mmlu")
    for values, message in (
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
        refused(lambda: mmlu.lm_eval_tasks(source), f"{path}, line 3: ", message)
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
        "| file | rows |\n|---|--:|\n| gsm8k/test.jsonl | 1,000 |\n| wikitext2/wiki.test.raw.gz | "
        "9 lines |\n"
    )
    refused(
        lambda: gsm8k.lm_eval_tasks(source),
        str(path),
        "12 rows found and 1,000 expected",
        "MANIFEST.md",
    )
    refused(lambda: suites.load("wikitext").lm_eval_tasks(source), "8 lines found and 9 expected")
    (folder / "MANIFEST.md").write_text("| file | rows |\n|---|--:|\n| gsm8k/test.jsonl | 12 |\n")
    assert len(gsm8k.lm_eval_tasks(source)["gsm8k"].eval_docs) == 12
    packed = folder / "gsm8k/train.jsonl.gz"
    packed.write_bytes(packed.read_bytes()[:-40])
    refused(
        lambda: gsm8k.lm_eval_tasks(source),
        str(packed),
        "cut short",
        "rows found and 7,473 expected",
    )
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
    refused(lambda: mmlu.lm_eval_tasks(source), "3 rows of anatomy, and 5 are shown")


def test_splits_that_do_not_exist_are_refused(source):
    refused(
        lambda: (
            suites.load("gsm8k").examples("dev", source)
            and list(suites.load("gsm8k").examples("dev", source))
        ),
        "no dev split",
    )
    refused(lambda: suites.load("wikitext").examples("train", source), "no training form")
    for name in ("mmlu", "mmlu-cloze"):
        refused(
            lambda name=name: suites.load(name).examples("train", source),
            "dev, val and test only, which are never trained on",
        )
    with pytest.raises(NoSplit, match="perplexity only"):
        examples_of({"wikitext": suites.load("wikitext")}, "train", source, rows=2)


@pytest.mark.parametrize("name", REAL)
def test_without_folder_and_network_one_line_comes_at_once(name, no_network):
    start = time.monotonic()
    task = suites.load(name)
    refused(
        lambda: task.lm_eval_tasks(LocalOrHubData()),
        name,
        "Hub could not be reached",
        f"give --data-dir a folder with {' and '.join(task.files)}",
    )
    assert time.monotonic() - start < 15


# Suites


def test_suites_of_ones_own(tmp_path):
    assert suites.resolve(["gsm8k-cot"], embedded=True)["gsm8k-cot"].tasks == ("gsm8k-cot",)
    assert suites.resolve(["lm-eval:arc_style"], embedded=False, include_path=LOCAL)[
        "lm-eval:arc_style"
    ].tasks == ("lm-eval:arc_style",)
    shutil.copytree(LOCAL, tmp_path / "mine")
    file = tmp_path / "mine.toml"
    file.write_text(
        'name = "own"\ntasks = ["lm-eval:svamp_style", "gsm8k-mini"]\n'
        'measure = false\nhelp = "x"\ninclude_path = "mine"\n'
    )
    names = [str(file), "math"]
    resolved = suites.resolve(names, embedded=True)
    assert (
        list(resolved) == ["math", "own"]
        and resolved["own"].tasks == ("lm-eval:svamp_style", "gsm8k-mini")
        and not resolved["own"].measure
    )
    assert (
        suites.include_path_of(names) == tmp_path / "mine"
        and suites.include_path_of(names, LOCAL) == LOCAL
    )
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
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(suites.__file__).parent.parent
    )


# The published data


@pytest.fixture
def published():
    if not os.environ.get("HARNESS_DATA_DIR"):
        pytest.skip(
            "needs the published data: set HARNESS_DATA_DIR to a folder with gsm8k/, mmlu/ and "
            "wikitext2/"
        )
    return LocalOrHubData.from_environment()


@pytest.mark.slow
def test_published_items_are_all_there(published, no_network):
    assert len(suites.load("gsm8k").lm_eval_tasks(published)["gsm8k"].eval_docs) == 1_319
    assert len(suites.load("gsm8k-cot").lm_eval_tasks(published)["gsm8k_cot"].eval_docs) == 1_319
    assert len(suites.load("wikitext").lm_eval_tasks(published)["wikitext"].eval_docs) == 62
    task = suites.load("gsm8k")
    assert [
        sum(1 for _ in task.examples(split, published)) for split in ("train", "validation")
    ] == [6_973, 500]
    assert all(
        task.grade(example.gold, example.completion)[0].correct
        for example in task.examples("train", published)
    )
    assert training_examples({"gsm8k": task}, published, rows=200)
    assert not no_network


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmlu", "mmlu-cloze"])
def test_published_mmlu_is_whole_and_its_golds_are_choices(name, published):
    start = time.monotonic()
    tasks = suites.load(name).lm_eval_tasks(published)
    assert time.monotonic() - start < 10
    assert len(tasks) == 57 and sum(len(task.eval_docs) for task in tasks.values()) == 14_042
    for task in tasks.values():
        for doc in list(task.eval_docs)[:20]:
            gold, choices = task.doc_to_target(doc), task.doc_to_choice(doc)
            right = [(float(index == gold), False) for index in range(4)]
            assert (
                isinstance(gold, int)
                and len(choices) == 4
                and task.process_results(doc, right)["acc"] == 1.0
            )
        context = task.fewshot_context(task.eval_docs[0], num_fewshot=5)
        prompts = [
            row["choices"][row["answer"]] if name == "mmlu-cloze" else "ABCD"[row["answer"]]
            for row in task.dataset["dev"]
        ]
        assert len(prompts) == 5 and all(f"\nAnswer: {answer}\n\n" in context for answer in prompts)


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k-cot", "mmlu", "mmlu-cloze", "wikitext"])
def test_offline_and_item_by_item_what_lm_evals_own_backend_answers(
    name, source, small, no_network
):
    """The same task objects, the same model, sockets blocked: ours, shared and packed, against HFLM
    at batch 1.
    """
    from lm_eval.models.huggingface import HFLM

    from harness.scoring.lm_eval_model import HarnessLM

    opened = small("Llama", max_position_embeddings=96 if name == "wikitext" else 4096)
    requests = []
    for task in suites.load(name).lm_eval_tasks(source).values():
        task.build_all_requests(limit=3, rank=0, world_size=1)
        requests += task.instances
    upstream_model = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=1)
    our_model = HarnessLM(opened)
    kind = requests[0].request_type
    answers, expected = getattr(our_model, kind)(requests), getattr(upstream_model, kind)(requests)
    if kind == "generate_until":
        assert answers == expected and len(answers) == 3
    elif kind == "loglikelihood":
        assert [one[0] for one in answers] == pytest.approx([one[0] for one in expected], abs=1e-4)
        assert [one[1] for one in answers] == [one[1] for one in expected]
    else:
        assert answers == pytest.approx(expected, rel=1e-5)
    assert our_model.requests == len(requests) and not no_network
