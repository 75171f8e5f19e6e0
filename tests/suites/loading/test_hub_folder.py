"""Data sets of the Hub in a data folder: read without a network, counted, hashed; every bad copy is
refused in one line.
"""

import gzip
import json
import os
import re
from pathlib import Path

import pytest
from hub_tasks import science_rows, write_hub, write_tasks
from task_data import refused, write_rows

import suites
from harness.data.source import LocalOrHubData
from harness.errors import HarnessError


@pytest.fixture
def tasks(tmp_path):
    return write_tasks(tmp_path / "tasks")


def load(name, tasks, data):
    return suites.load(f"lm-eval:{name}", include_path=tasks, data_folder=data)


def test_a_task_reads_its_data_set_from_the_folder(tasks, tmp_path, no_network):
    data = write_hub(tmp_path / "data")
    task = load("science", tasks, data)
    [built] = task.lm_eval_tasks(LocalOrHubData(folder=data)).values()
    assert [doc["question"] for doc in built.eval_docs] == [
        row["question"] for row in science_rows("test", 12)
    ]
    assert task.count() == 12 and task.chance == 0.25 and not task.needs_hub and not no_network


def test_without_the_folder_it_needs_the_hub_as_before(tasks, tmp_path):
    assert load("science", tasks, None).needs_hub
    (tmp_path / "empty").mkdir()
    assert load("science", tasks, tmp_path / "empty").needs_hub
    refused(
        lambda: load("science", tasks, None).lm_eval_tasks(LocalOrHubData()),
        "harness data fetch lm-eval:science --to FOLDER",
    )


def test_a_split_that_is_only_offered_may_be_missing(tasks, tmp_path, no_network):
    task = load("science", tasks, write_hub(tmp_path / "data"))
    assert task.no_training(LocalOrHubData()) == "science has no training split"
    whole = load(
        "science", tasks, write_hub(tmp_path / "whole", splits=("train", "validation", "test"))
    )
    examples = list(whole.examples("train", LocalOrHubData()))
    assert len(examples) == 12 and examples[0].prompt.startswith("Question: Which train thing")
    assert not whole.no_training(LocalOrHubData()) and not no_network


def test_parquet_is_read_as_json_lines_are(tasks, tmp_path, no_network):
    from datasets import Dataset

    data = write_hub(tmp_path / "data")
    folder = data / "hub" / "someone" / "science" / "Easy"
    (folder / "test.jsonl.gz").unlink()
    Dataset.from_list(science_rows("test", 12)).to_parquet(str(folder / "test.parquet"))
    task = load("science", tasks, data)
    [built] = task.lm_eval_tasks(LocalOrHubData()).values()
    assert list(built.eval_docs) == science_rows("test", 12) and task.count() == 12
    whole = (folder / "test.parquet").read_bytes()
    (folder / "test.parquet").write_bytes(whole[: len(whole) // 2])
    refused(lambda: load("science", tasks, data).count(), "test.parquet is cut short")
    assert not no_network


def test_the_data_are_in_the_digest_and_the_version_is_lm_evals(tasks, tmp_path):
    data, other = write_hub(tmp_path / "data"), write_hub(tmp_path / "other")
    rows = science_rows("test", 12)
    rows[3]["answerKey"] = "A"
    write_rows(other / "hub/someone/science/Easy/test.jsonl.gz", rows)
    here, there = load("science", tasks, data), load("science", tasks, other)
    assert here.files == there.files == ("hub/someone/science/Easy/test.jsonl.gz",)
    digests = {
        LocalOrHubData(folder=place).fingerprint(here.files) for place in (data, other, data)
    }
    assert len(digests) == 2 and here.version == there.version


def cut_in_the_middle(folder):
    file = folder / "test.jsonl.gz"
    file.write_bytes(file.read_bytes()[:-40])


def fewer_than_the_manifest_says(folder):
    manifest = folder.parents[3] / "MANIFEST.md"
    manifest.write_text(
        "| file | rows |\n|---|--:|\n| hub/someone/science/Easy/test.jsonl | 13 |\n"
    )


def no_scored_split(folder):
    (folder / "test.jsonl.gz").rename(folder / "train.jsonl.gz")


def another_configuration(folder):
    folder.rename(folder.with_name("Challenge"))


def no_json(folder):
    (folder / "test.jsonl.gz").write_bytes(gzip.compress(b'{"question": 1}\n{"quest'))


def no_rows(folder):
    (folder / "test.jsonl.gz").write_bytes(gzip.compress(b""))


BAD = {
    cut_in_the_middle: "is cut short or damaged",
    fewer_than_the_manifest_says: "12 rows found and 13 expected by the data folder's MANIFEST.md",
    no_scored_split: "has train; type: harness data fetch lm-eval:science --to",
    another_configuration: "(it has: Challenge); type: harness data fetch lm-eval:science --to",
    no_json: "line 2: no JSON",
    no_rows: "0 rows found",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_a_bad_copy_is_one_line(spoil, tasks, tmp_path, no_network):
    data = write_hub(tmp_path / "data")
    spoil(data / "hub" / "someone" / "science" / "Easy")
    refused(
        lambda: load("science", tasks, data).lm_eval_tasks(LocalOrHubData(folder=data)), BAD[spoil]
    )
    assert not no_network


def test_a_copy_of_another_revision_is_refused(tasks, tmp_path):
    data = write_hub(tmp_path / "data")
    yaml = tasks / "science.yaml"
    yaml.write_text(yaml.read_text() + "dataset_kwargs: {revision: b2}\n")
    file = data / "hub/someone/science/Easy/revision.json"
    file.write_text(json.dumps({"revision": "a1"}))
    refused(
        lambda: load("science", tasks, data),
        "holds revision a1 of someone/science and the task needs b2",
        "harness data fetch lm-eval:science --to",
    )
    file.write_text(json.dumps({"revision": "b2"}))
    assert load("science", tasks, data).count() == 12


def test_shots_come_from_the_split_that_lm_eval_takes_or_the_task_is_refused(tasks, tmp_path):
    yaml = tasks / "science.yaml"
    yaml.write_text(yaml.read_text() + "num_fewshot: 2\n")
    data = write_hub(tmp_path / "data")
    refused(
        lambda: load("science", tasks, data),
        "takes its 2 examples from the split train",
        "harness data fetch lm-eval:science --to",
    )
    # a split that is there is no substitute: prompts would be others than elsewhere
    other = write_hub(tmp_path / "other", splits=("validation", "test"))
    refused(lambda: load("science", tasks, other), "from the split train", "has test, validation")
    whole = write_hub(tmp_path / "whole", splits=("train", "test"))
    [built] = load("science", tasks, whole).lm_eval_tasks(LocalOrHubData()).values()
    shown = built.fewshot_context(built.eval_docs[0], num_fewshot=2)
    assert shown.count("Which train thing") == 2 and shown.count("Which test thing") == 1


@pytest.mark.parametrize("stated", ["fewshot_split: test", "fewshot_config: {split: test}"])
def test_a_definition_that_takes_its_shots_from_the_scored_split_is_scored_as_with_a_network(
    stated, tasks, tmp_path
):
    yaml = tasks / "science.yaml"
    yaml.write_text(yaml.read_text() + f"num_fewshot: 2\n{stated}\n")
    [built] = (
        load("science", tasks, write_hub(tmp_path / "data"))
        .lm_eval_tasks(LocalOrHubData())
        .values()
    )
    shown = built.fewshot_context(built.eval_docs[0], num_fewshot=2)
    assert shown.count("Which test thing") == 3


SAMPLES = f"fewshot_config: {{samples: {json.dumps(science_rows('own', 3))}}}"
# what is added to the definition, and the split that lm-eval then takes shots from
SHOTS_FROM = {
    "": "train",
    "fewshot_split: validation": "validation",
    "fewshot_config: {split: validation}": "validation",
    "fewshot_split: train\nfewshot_config: {split: validation}": "validation",
    "fewshot_split: validation\nfewshot_config: {split: null}": "train",
    f"fewshot_split: validation\n{SAMPLES}": "validation",
    "fewshot_config: {split: dev}": "dev",
    "training_split: null": "validation",
}


def prompt_of(task):
    [built] = task.lm_eval_tasks(LocalOrHubData()).values()
    built.set_fewshot_seed(1)
    return built.fewshot_context(built.eval_docs[0], num_fewshot=2)


def add_to(tasks, text):
    yaml, key = tasks / "science.yaml", text.partition(":")[0]
    kept = [line for line in yaml.read_text().splitlines() if not key or not line.startswith(key)]
    yaml.write_text("\n".join([*kept, text]) + "\n")


@pytest.mark.parametrize(("stated", "source"), SHOTS_FROM.items())
def test_shots_are_those_of_a_run_with_a_network(stated, source, tasks, tmp_path, monkeypatch):
    import datasets

    names = ("train", "validation", "dev", "test")
    online = {name: datasets.Dataset.from_list(science_rows(name, 12)) for name in names}
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: online)
    add_to(tasks, stated)
    add_to(tasks, "num_fewshot: 2")
    whole = write_hub(tmp_path / "whole", splits=names)
    prompt = prompt_of(load("science", tasks, whole))
    assert prompt == prompt_of(load("science", tasks, None))
    assert prompt.count(f"Which {source} thing") == 2
    lacking = write_hub(tmp_path / "lacking", splits=[name for name in names if name != source])
    refused(
        lambda: load("science", tasks, lacking),
        f"takes its 2 examples from the split {source}",
        f"harness data fetch lm-eval:science --to {lacking}",
    )


@pytest.mark.parametrize("stated", SHOTS_FROM)
def test_without_shots_their_split_may_be_missing(stated, tasks, tmp_path):
    add_to(tasks, stated)
    task = load("science", tasks, write_hub(tmp_path / "data"))
    [built] = task.lm_eval_tasks(LocalOrHubData()).values()
    assert len(built.eval_docs) == 12


def test_examples_that_a_definition_states_need_no_split(tasks, tmp_path):
    add_to(tasks, SAMPLES)
    add_to(tasks, "num_fewshot: 2")
    prompt = prompt_of(load("science", tasks, write_hub(tmp_path / "data")))
    assert prompt.count("Which own thing") == 2


@pytest.mark.parametrize(
    ("rows", "listed", "text"),
    [
        (12, 13, "12 rows found and 13 expected by the data folder's MANIFEST.md"),
        (1, 12, "1 rows found and 12 expected by the data folder's MANIFEST.md"),
        (0, 12, "copy the file again"),
        (0, 0, "copy the file again"),
    ],
)
def test_a_parquet_file_that_lost_rows_is_found(rows, listed, text, tasks, tmp_path):
    from datasets import Dataset

    data = write_hub(tmp_path / "data")
    folder = data / "hub" / "someone" / "science" / "Easy"
    (folder / "test.jsonl.gz").unlink()
    kept = Dataset.from_list(science_rows("test", 12)).select(range(rows))
    kept.to_parquet(str(folder / "test.parquet"))
    (data / "MANIFEST.md").write_text(
        f"| file | rows |\n|---|--:|\n| hub/someone/science/Easy/test.parquet | {listed} |\n"
    )
    refused(lambda: load("science", tasks, data).count(), text)


@pytest.mark.parametrize(
    "linked", ["hub", "hub/someone", "hub/someone/science", "hub/someone/science/Easy"]
)
def test_a_data_set_may_be_a_link(linked, tasks, tmp_path):
    data = write_hub(tmp_path / "data")
    (data / linked).rename(tmp_path / "elsewhere")
    (data / linked).symlink_to(tmp_path / "elsewhere")
    assert load("science", tasks, data).count() == 12


def test_certain_files_of_a_data_set_have_a_folder_of_their_own(tasks, tmp_path):
    yaml = tasks / "science.yaml"
    plain = yaml.read_text()
    data = write_hub(tmp_path / "data")
    folder = data / "hub" / "someone" / "science"
    names = set()
    for options in ("data_dir: easy", "data_files: {test: a.json}", "data_files: {test: b.json}"):
        yaml.write_text(plain + f"dataset_kwargs: {{{options}}}\n")
        with pytest.raises(HarnessError) as problem:
            load("science", tasks, data)
        name = re.search(r"has no folder (\S+)", str(problem.value))[1]
        names.add(name)
        (folder / "Easy").rename(folder / name)
        assert load("science", tasks, data).count() == 12
        (folder / name).rename(folder / "Easy")
    assert len(names) == 3 and all(name.startswith("Easy-") for name in names)


def test_a_pinned_revision_is_in_the_name_of_the_data_set(tasks):
    yaml = tasks / "science.yaml"
    assert load("science", tasks, None).hub_datasets == ("someone/science",)
    yaml.write_text(yaml.read_text() + "dataset_kwargs: {revision: b2}\n")
    assert load("science", tasks, None).hub_datasets == ("someone/science@b2",)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("someone/science", "../../secret"),
        ("Easy", "../../../../secret/Easy"),
        ("Easy", "../science/../.."),
    ],
)
def test_a_name_that_leaves_the_folder_is_no_data_set(name, other, tasks, tmp_path):
    yaml = tasks / "science.yaml"
    yaml.write_text(yaml.read_text().replace(name, other))
    write_hub(tmp_path / "data")
    (tmp_path / "secret" / "Easy").mkdir(parents=True)
    assert load("science", tasks, tmp_path / "data").needs_hub


@pytest.mark.slow
@pytest.mark.skipif("HARNESS_DATA_DIR" not in os.environ, reason="HARNESS_DATA_DIR is not set")
@pytest.mark.parametrize(
    ("name", "items", "kind", "chance"),
    [
        ("arc_easy", 2_376, "choose", 0.25),
        ("piqa", 1_838, "choose", 0.5),
        ("lambada_openai", 5_153, "continue", 0.0),
    ],
)
def test_lm_evals_own_definitions_find_the_published_items(name, items, kind, chance, no_network):
    data = Path(os.environ["HARNESS_DATA_DIR"])
    task = suites.load(f"lm-eval:{name}", data_folder=data)
    assert (task.count(), task.kind) == (items, kind)
    assert task.chance == pytest.approx(chance, abs=0.01) and not no_network
