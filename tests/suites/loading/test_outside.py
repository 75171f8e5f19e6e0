"""Tasks from outside, by YAML: their data beside them, their versions, their grades, and every odd
one refused.
"""

import json
import shutil

import pytest
from task_data import LOCAL, evaluated, refused

import suites
from harness.data.examples import training_examples
from harness.data.source import LocalOrHubData


@pytest.fixture(scope="module")
def outside():
    return {
        name: suites.load(f"lm-eval:{name}", include_path=LOCAL)
        for name in ("arc_style", "svamp_style")
    }


def test_local_yaml_tasks_resolve_their_data_beside_them(
    outside, tmp_path, monkeypatch, no_network
):
    monkeypatch.chdir(tmp_path)
    arc, svamp = (task.lm_eval_tasks(LocalOrHubData()) for task in outside.values())
    assert list(arc) == ["arc_style"] and list(svamp) == ["svamp_style"]
    assert len(arc["arc_style"].eval_docs) == len(svamp["svamp_style"].eval_docs) == 12
    assert [(task.kind, task.chance, task.primary, task.domain) for task in outside.values()] == [
        ("choose", 0.25, "acc", "other"),
        ("generate", 0.0, "last-number", "other"),
    ]
    assert not no_network


def test_local_yaml_tasks_grade_and_train(outside, no_network):
    for task in outside.values():
        examples = training_examples({task.name: task}, LocalOrHubData(), rows=3)
        assert (
            len(examples) == 3
            and examples[0].task == task.name
            and examples[0].prompt.endswith("Answer:")
        )
        prompts = {
            split: {example.prompt for example in task.examples(split, LocalOrHubData())}
            for split in ("train", "validation", "test")
        }
        assert (
            prompts["validation"]
            and not prompts["train"] & prompts["validation"]
            and len(prompts["test"]) == 12
        )
        for example in task.examples("test", LocalOrHubData()):
            assert (
                task.grade(example.gold, example.completion)[0].correct
                and not task.grade(example.gold, "")[0].correct
            )
        refused(lambda task=task: task.examples("dev", LocalOrHubData()), "no dev items")
    grades = outside["svamp_style"].grade("5", " 14-9 is 5 rolls")
    assert [(grade.extractor, grade.extracted, grade.correct) for grade in grades] == [
        ("last-number", "5", True),
        ("whole", "14-9 is 5 rolls", False),
    ]
    assert outside["svamp_style"].grade("5", "none")[0].extracted is None
    assert not no_network


def test_an_oracle_scores_one_on_local_yaml_tasks(outside):
    arc = outside["arc_style"]
    answers = {
        example.prompt.removeprefix("Question: ").partition("\n")[0]: {example.completion}
        for example in arc.examples("test", LocalOrHubData())
    }
    assert (
        evaluated(arc.lm_eval_tasks(LocalOrHubData()), answers)["results"]["arc_style"]["acc,none"]
        == 1.0
    )


def test_an_edited_yaml_or_data_file_is_another_version(outside, tmp_path):
    def version(place):
        return suites.load("lm-eval:arc_style", include_path=place).version

    first, second, third = (
        shutil.copytree(LOCAL, tmp_path / name) for name in ("first", "second", "third")
    )
    (second / "arc_style.yaml").write_text(
        (second / "arc_style.yaml").read_text(encoding="utf-8") + "# edited\n", encoding="utf-8"
    )
    (third / "arc_style_train.jsonl").write_text(
        (third / "arc_style_train.jsonl").read_text(encoding="utf-8") + "\n", encoding="utf-8"
    )
    assert (
        version(first) == outside["arc_style"].version
        and len({version(first), version(second), version(third)}) == 3
    )
    assert version(first).startswith("1.0+lm-eval+")


CODE = {
    "constant": ("open('golds.json').read()", "golds.json", ""),
    "beside": (
        "(Path(__file__).parents[1] / 'data' / 'golds.json').read_text()",
        "data/golds.json",
        "",
    ),
    "named": ("FILE.read_text()", "golds.json", ""),
    "folder": ("[one.read_text() for one in Path('data').glob('*.json')]", "data/golds.json", ""),
    "imported": ("deeper.read()", "golds.json", ""),
    "put together": ("open('gold' + str(1) + '.json').read()", "", "known only when it runs"),
    "environment": ("open(os.environ['GOLDS']).read()", "", "os.environ"),
    "address": ("urllib.request.urlopen('http://x.y/z').read()", "", "urlopen"),
}


@pytest.mark.parametrize("form", CODE)
def test_what_code_reads_is_in_the_version_or_said_to_be_unknown(form, tmp_path):
    call, file, why = CODE[form]
    place = shutil.copytree(LOCAL, tmp_path / "place")
    (place / "data").mkdir()
    for name in ("golds.json", "data/golds.json"):
        (place / name).write_text('{"a": 1}', encoding="utf-8")
    (place / "deeper.py").write_text(
        "from pathlib import Path\ndef read():\n    return (Path(__file__).parents[1] / "
        "'golds.json').read_text()\n"
    )
    constant = "FILE = Path(__file__).parents[1] / 'golds.json'\n" if form == "named" else ""
    head = f"import os, urllib.request\nfrom pathlib import Path\nimport deeper\n{constant}"
    (place / "code.py").write_text(
        f"{head}def docs(dataset):\n    {call}\n    return dataset\n", encoding="utf-8"
    )
    (place / "arc_style.yaml").write_text(
        (place / "arc_style.yaml").read_text() + "process_docs: !function code.docs\n",
        encoding="utf-8",
    )
    task = suites.load("lm-eval:arc_style", include_path=place)
    assert why in task.unknown_inputs and bool(task.unknown_inputs) == bool(why)
    assert not why or any("so no result of this task is reused" in note for note in task.notes)
    for changed in filter(None, (file, "code.py", "deeper.py")):
        (place / changed).write_text((place / changed).read_text() + "\n", encoding="utf-8")
        task_after = suites.load("lm-eval:arc_style", include_path=place)
        assert task_after.version != task.version, changed
        task = task_after


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("folder", {}),
        ("./folder", {}),
        ("json", {"data_dir": "folder"}),
        ("json", {"data_files": {"test": "folder/*.jsonl"}}),
    ],
)
def test_local_data_of_every_form_is_found_beside_the_yaml_and_in_the_version(
    path, more, tmp_path, monkeypatch, no_network
):
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
    assert len(task.lm_eval_tasks(LocalOrHubData())["own"].eval_docs) == 12 and not task.needs_hub
    (place / "folder" / "test.jsonl").write_text(
        (place / "folder" / "test.jsonl").read_text() + "\n", encoding="utf-8"
    )
    assert suites.load("lm-eval:own", include_path=place).version != task.version


def test_tasks_of_unknown_inputs_are_planned_anew_every_time(tmp_path):
    import harness.api
    from harness.planning.config import build_config

    place = shutil.copytree(LOCAL, tmp_path / "place")
    options = {
        "suite": ("lm-eval:arc_style",),
        "methods": ("int8",),
        "include_path": place,
        "allow_task_code": True,
    }

    def keys():
        return [cell.key for cell in harness.api.plan_run(build_config(options)).cells]

    assert keys() == keys()
    (place / "code.py").write_text(
        "import os\ndef docs(dataset):\n    os.environ.get('X')\n    return dataset\n",
        encoding="utf-8",
    )
    (place / "arc_style.yaml").write_text(
        (place / "arc_style.yaml").read_text() + "process_docs: !function code.docs\n",
        encoding="utf-8",
    )
    assert not set(keys()) & set(keys())


def test_ones_own_items_are_counted_where_that_is_cheap(outside, tmp_path):
    assert [task.count() for task in outside.values()] == [12, 12]
    place = shutil.copytree(LOCAL, tmp_path / "place")
    (place / "code.py").write_text("def docs(dataset):\n    return dataset\n", encoding="utf-8")
    (place / "arc_style.yaml").write_text(
        (place / "arc_style.yaml").read_text() + "process_docs: !function code.docs\n",
        encoding="utf-8",
    )
    assert suites.load("lm-eval:arc_style", include_path=place).count() is None


def write_yaml(folder, name, **keys):
    (folder / f"{name}.yaml").write_text(
        "".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()), encoding="utf-8"
    )


@pytest.mark.slow
def test_groups_are_flattened_and_odd_tasks_refused(tmp_path, monkeypatch, no_network):
    place = shutil.copytree(LOCAL, tmp_path / "place")
    base = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "arc_style_test.jsonl"}},
        "test_split": "test",
    }
    write_yaml(place, "twin", include="arc_style.yaml", task="twin", metadata={"version": 2.0})
    write_yaml(
        place, "pair", group="pair", task=["arc_style", {"group": "inner", "task": ["twin"]}]
    )
    write_yaml(place, "mixed", group="mixed", task=["arc_style", "svamp_style"])
    write_yaml(place, "plain", task="plain", output_type="ranking", **base)
    write_yaml(
        place,
        "gone",
        task="gone",
        output_type="generate_until",
        dataset_path="json",
        dataset_kwargs={"data_files": {"test": "no.jsonl"}},
    )
    write_yaml(
        place,
        "far",
        task="far",
        dataset_path="someone/unknown",
        test_split="test",
        metadata={"version": 1},
    )
    pair = suites.load("lm-eval:pair", include_path=place)
    assert list(pair.lm_eval_tasks(LocalOrHubData())) == [
        "arc_style",
        "twin",
    ] and pair.version.startswith("1.0/2.0+lm-eval+")
    assert len(list(pair.examples("test", LocalOrHubData()))) == 24
    refused(
        lambda: suites.load("lm-eval:mixed", include_path=place),
        "mixes generate_until and multiple_choice",
    )
    refused(lambda: suites.load("lm-eval:plain", include_path=place), "output_type ranking")
    refused(
        lambda: suites.load("lm-eval:gone", include_path=place),
        f"names the data file {place}/no.jsonl, which does not exist",
    )
    write_yaml(
        place,
        "odd",
        task="odd",
        output_type="generate_until",
        doc_to_text="{{ nothing.at.all }}",
        doc_to_target="x",
        **base,
    )
    odd_task = suites.load("lm-eval:odd", include_path=place)
    refused(
        lambda: odd_task.lm_eval_tasks(LocalOrHubData()),
        "lm-eval:odd cannot be built",
        "correct",
        "odd.yaml",
    )
    (place / "svamp_style_test.jsonl").write_text("{broken\n", encoding="utf-8")
    broken = suites.load("lm-eval:svamp_style", include_path=place)
    refused(
        lambda: broken.lm_eval_tasks(LocalOrHubData()),
        "lm-eval:svamp_style cannot be built",
        "data files",
    )
    far = suites.load("lm-eval:far", include_path=place)
    refused(
        lambda: far.lm_eval_tasks(LocalOrHubData()),
        "lm-eval:far",
        "Hub could not be reached",
        "--data-dir",
    )
    refused(
        lambda: suites.load("lm-eval:x", include_path=place / "nowhere"),
        "no folder at",
        "--include-path",
    )


def test_unknown_outside_names_are_guessed_from_the_users_folder(monkeypatch):
    from suites.loading import definition

    real = definition._task_index
    # lm-eval's own scan takes 20 s
    monkeypatch.setattr(
        definition, "_task_index", lambda path, defaults: {} if defaults else real(path, False)
    )
    refused(
        lambda: suites.load("lm-eval:ark_style", include_path=LOCAL), "did you mean 'arc_style'"
    )
    refused(lambda: suites.load("lm-eval:nothing"), "lm-eval ls tasks", "--include-path")
