"""From options to cells: names, settings, controls, keys, and what is refused before anything is
computed.
"""

import json
import os
import shutil

import pytest

import methods
from harness.api import plan_run
from harness.errors import HarnessError
from harness.models.resolve import EMBEDDED, resolve
from harness.models.shaping import kept_blocks, parse_student_cut
from harness.planning.config import build_config, read_run_file
from harness.planning.spec import limit_for, parse_limit, parse_method, parse_set, split_list
from harness.registry import Registry


def plan(**values):
    return plan_run(build_config(values))


def labels(**values):
    return [cell.label for cell in plan(**values).cells]


def test_repeated_lists_add_up_and_a_path_that_is_there_wins(tmp_path, monkeypatch):
    from harness.planning.spec import joined_lists, parse_teachers, split_teachers

    assert joined_lists(["int8", "response[temperature=1,teacher_share=0.5],sft"]) == [
        "int8",
        "response[temperature=1,teacher_share=0.5]",
        "sft",
    ]
    assert joined_lists(None) is None and joined_lists([]) is None
    monkeypatch.chdir(tmp_path)
    for name in ("lr=0.5", "a,b", "c,d=0.25", "plain"):
        (tmp_path / name).mkdir()
    assert parse_teachers(["lr=0.5"]) == (("lr=0.5",), ()) and parse_teachers(
        ["./lr=0.5=0.25", "plain=0.75"]
    )[1] == (0.25, 0.75)
    assert split_teachers("a,b") == ["a,b"] and split_teachers("a,b,plain") == ["a,b", "plain"]
    assert split_teachers("a,b=0.3,c,d=0.25=0.7") == ["a,b=0.3", "c,d=0.25=0.7"] and split_teachers(
        f"{tmp_path}/a,b"
    ) == [f"{tmp_path}/a,b"]
    assert parse_teachers(split_teachers("a,b=0.3,c,d=0.25=0.7"))[0] == ("a,b", "c,d=0.25")
    assert split_teachers("tiny=0.7, tiny-math=0.3,") == ["tiny=0.7", "tiny-math=0.3"]


def test_controls_stand_beside_the_methods_that_need_them():
    assert labels(methods=["cot", "response"]) == [
        "teacher",
        "cot",
        "response",
        "answer-only",
        "untouched",
        "sft",
    ]
    assert labels(methods=["cot", "response"], controls=False) == ["teacher", "cot", "response"]
    assert labels(methods=["response"]) == ["teacher", "response", "sft", "untouched"]
    assert labels(methods=["identity"]) == ["teacher", "identity"]


def test_seeds_multiply_the_rows_that_draw():
    cells = plan(methods=["cot"], seeds=3).cells
    assert [(cell.label, cell.seed) for cell in cells if cell.label == "cot"] == [
        ("cot", 1),
        ("cot", 2),
        ("cot", 3),
    ]
    assert [cell.seed for cell in cells if cell.label in {"teacher", "untouched"}] == [None, None]
    assert (
        sum(
            cell.label == "untouched"
            for cell in plan(methods=["untouched"], seeds=3, student="scratch:0.5").cells
        )
        == 3
    )


def test_settings_make_rows_of_their_own():
    planned = plan(methods=["response[temperature=1]", "response[temperature=4]"], controls=False)
    assert [cell.label for cell in planned.cells[1:]] == [
        "response[temperature=1.0]",
        "response[temperature=4.0]",
    ]
    assert len({cell.key for cell in planned.cells}) == 3
    assert planned.cells[1].settings["teacher_share"] == 0.5  # defaults expanded


def test_equal_settings_written_in_two_ways_are_one_row():
    bare = plan(methods=["response"], controls=False).cells[1]
    written = plan(methods=["response[temperature=2]"], controls=False).cells[1]
    through_set = plan(
        methods=["response"], set={"response": {"temperature": 2.0}}, controls=False
    ).cells[1]
    assert bare.key == written.key == through_set.key


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": 1000},
        {"rows": 100},
        {"student": "depth:0.25"},
        {"teacher": ["tiny-math"]},
        {"dtype": "bfloat16"},
        {"suite": ["knowledge"]},
        {"limit": 10},
        {"limit": {"gsm8k-mini": 10}},
    ],
)
def test_what_changes_a_result_changes_the_key(changes):
    before, after = plan(methods=["sft"]).cells[1], plan(methods=["sft"], **changes).cells[1]
    assert before.key != after.key


@pytest.mark.parametrize("changes", [{"batch_size": 8}, {"force": True}, {"wait": False}])
def test_what_changes_no_result_changes_no_key(changes):
    assert [cell.key for cell in plan(methods=["sft"]).cells] == [
        cell.key for cell in plan(methods=["sft"], **changes).cells
    ]


def test_rounds_are_the_devices_and_a_rule_is_another_result_than_a_number():
    plain = plan(methods=("int8",))
    assert (
        plain.rounds == 6 and plain.cells[0].key == plan(methods=("int8",), rounds=6).cells[0].key
    )
    assert plan(methods=("int8",), rounds="6").cells[0].key == plain.cells[0].key
    ruled = plan(methods=("int8",), rounds="auto:0.01")
    assert ruled.rounds == "auto:0.01" and ruled.cells[0].key != plain.cells[0].key
    # the key holds the number as it did when it could be nothing else
    assert plain.request["grid"] == ["128x1x32", 6]


def test_the_budget_is_no_part_of_a_row_that_does_not_train():
    assert (
        plan(methods=["untouched"], budget=1000).cells[1].key
        == plan(methods=["untouched"]).cells[1].key
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ["respones"]}, "did you mean 'response'"),
        ({"methods": ["response[temprature=4]"]}, "did you mean 'temperature'"),
        ({"methods": ["response[temperature=0]"]}, "greater than 0"),
        ({"methods": ["response[temperature=hot]"]}, "response.temperature"),
        ({"methods": ["cot[samples=4]"]}, "sampling_temperature"),
        ({"methods": ["sft"], "set": {"respones": {"temperature": 1}}}, "did you mean 'response'"),
        (
            {"methods": ["sft"], "set": {"response": {"temperature": 1}}},
            "which no row of this run uses",
        ),
        ({"methods": []}, "no method"),
        ({"methods": ["int8+response"]}, "type response+int8"),
        ({"methods": ["prune-magnitude+prune-wanda"]}, "leaves as many zeros already"),
        ({"suite": ["maths"]}, "did you mean 'math'"),
        ({"teacher": ["tinny"]}, "did you mean 'tiny'"),
        ({"teacher": ["./nowhere"]}, "./nowhere"),
        ({"student": "depth:2"}, "above 0 and at most 1"),
        ({"student": "dept:0.5"}, "did you mean 'depth'"),
        ({"seeds": 0}, "--seeds"),
        ({"device": "gpu"}, "--device"),
        ({"methdos": ["cot"]}, "did you mean 'methods'"),
        ({"limit": 0}, "--limit 0"),
        (
            {"limit": {"gsm8k-min": 5}},
            "unknown task in --limit 'gsm8k-min'; did you mean 'gsm8k-mini'?",
        ),
        ({"limit": {"gsm8k-mini": "few"}}, "--limit"),
    ],
)
def test_mistakes_are_refused_in_one_line_that_says_what_to_type(values, message):
    with pytest.raises(HarnessError) as caught:
        plan(**values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(HarnessError, match=r"config\.json is missing"):
        plan(teacher=[str(tmp_path)])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(HarnessError, match="safetensors"):
        plan(teacher=[str(tmp_path)])


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


TORN = {
    "an empty configuration": ("config.json", lambda path: path.write_text("")),
    "a cut configuration": ("config.json", lambda path: path.write_text('{"model_type": "lla')),
    "a list for a configuration": ("config.json", lambda path: path.write_text("[]")),
    "cut weights": ("model-00002-of-00002.safetensors", cut),
    "a pointer for weights": (
        "model-00001-of-00002.safetensors",
        lambda path: path.write_text("version https://git-lfs"),
    ),
    "empty weights": ("model-00002-of-00002.safetensors", lambda path: path.write_bytes(b"")),
    "missing weights": ("model-00002-of-00002.safetensors", lambda path: path.unlink()),
    "a cut index": ("model.safetensors.index.json", cut),
}


@pytest.fixture
def sharded(tmp_path, random_model):
    """Return a model folder in two files of weights."""
    from harness.models.language_model import open_model

    opened = open_model(random_model)
    opened.model.save_pretrained(tmp_path / "sharded", max_shard_size="140KB")
    opened.tokenizer.save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) == 2
    return tmp_path / "sharded"


@pytest.mark.parametrize("harm", TORN)
def test_a_torn_model_folder_is_refused_by_the_name_of_the_file(sharded, tmp_path, harm):
    name, break_it = TORN[harm]
    assert resolve(str(sharded), cache=tmp_path / "cache").bytes_on_disk
    break_it(sharded / name)
    with pytest.raises(
        HarnessError, match=rf"{name} is (damaged|missing).*; download or save the model again"
    ) as caught:
        resolve(str(sharded), cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_torn_configuration_cannot_be_planned_for(sharded):
    from harness.api import estimate_plans

    (sharded / "config.json").write_text("{")
    with pytest.raises(HarnessError, match=r"config\.json is damaged"):
        estimate_plans(["int8"], teacher=str(sharded))


def test_weights_are_read_once_and_remembered_until_they_change(sharded, tmp_path, monkeypatch):
    from harness.files import digests
    from harness.models import checkpoint

    first = resolve(str(sharded), cache=tmp_path / "cache")
    assert first.digest == checkpoint.folder_digest(sharded)
    read = digests.file_digest
    paths = []
    monkeypatch.setattr(
        checkpoint, "file_digest", lambda path: paths.append(path.name) or read(path)
    )
    assert resolve(str(sharded), cache=tmp_path / "cache") == first
    assert "config.json" in paths and not any(name.endswith(".safetensors") for name in paths)
    weights = sharded / "model-00002-of-00002.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    os.utime(weights, ns=(0, 0))
    assert resolve(str(sharded), cache=tmp_path / "cache").digest != first.digest


@pytest.mark.parametrize("complete", [True, False])
def test_a_second_copy_of_the_weights_is_not_counted(sharded, random_model, tmp_path, complete):
    from harness.models.shape import parameters_on_disk

    folder = sharded
    if complete:
        folder = tmp_path / "whole"
        shutil.copytree(random_model.path, folder)
    alone = resolve(str(folder), cache=tmp_path / "cache")
    shutil.copy(random_model.path / "model.safetensors", folder / "consolidated.safetensors")
    assert resolve(str(folder), cache=tmp_path / "cache") == alone
    assert parameters_on_disk(folder) == parameters_on_disk(random_model.path)


def test_a_students_type_is_that_of_its_bases_matrices_not_of_a_norm(tmp_path):
    import torch
    from safetensors.torch import save_file

    from harness.models.checkpoint import describe
    from harness.models.language_model import stored_dtype

    tensors = {
        "a_norm": torch.ones(8),
        "packed": torch.zeros(90, dtype=torch.int8),
        "up": torch.zeros(8, 8, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert stored_dtype(describe(tmp_path, name="mixed")) == torch.bfloat16


def test_a_student_with_another_vocabulary_is_refused_before_anything_is_computed(
    tmp_path, random_model
):
    other = tmp_path / "other"
    shutil.copytree(random_model.path, other)
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(HarnessError, match=r"different vocabularies.*2 differ"):
        plan(methods=["response"], student=str(other))
    assert plan(methods=["sft"], student=str(other)).cells  # text can be trained all the same


def test_lists_are_split_outside_brackets():
    assert split_list("cot,response[temperature=1,teacher_share=0.5], sft") == [
        "cot",
        "response[temperature=1,teacher_share=0.5]",
        "sft",
    ]
    assert parse_method("answer-only[equal=tokens]") == ("answer-only", {"equal": "tokens"})
    assert parse_set(["response.temperature=4", "response.teacher_share=1"]) == {
        "response": {"temperature": 4, "teacher_share": 1}
    }
    with pytest.raises(HarnessError, match=r"METHOD\.SETTING=VALUE"):
        parse_set(["temperature=4"])


def test_a_limit_is_a_number_or_one_for_each_task_named():
    assert parse_limit("100") == 100 and parse_limit("mmlu=50, wikitext=3") == {
        "mmlu": 50,
        "wikitext": 3,
    }
    for bad in ("", "100,200", "a=1,a=2", "=5", "a=0", "-3", "5,a=3", "a="):
        with pytest.raises(HarnessError, match="--limit gsm8k=20,mmlu=100"):
            parse_limit(bad)
    assert [limit_for(limit, "mmlu") for limit in (None, 7, {"mmlu": 5}, {"wikitext": 3})] == [
        None,
        7,
        5,
        None,
    ]
    keys = [
        plan(methods=["sft"], suite=["mini"], limit=limit).cells[1].key
        for limit in (None, {}, 5, {"mmlu-mini": 5})
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_a_file_and_flags_build_the_same_plan(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'methods = ["cot", "response"]\nsuite = "math"\nseeds = 2\n'
        "[set.response]\ntemperature = 4\n"
    )
    from_file = plan(**read_run_file(path))
    from_flags = plan(
        methods=["cot", "response"], suite=["math"], seeds=2, set={"response": {"temperature": 4}}
    )
    assert [cell.key for cell in from_file.cells] == [cell.key for cell in from_flags.cells]
    (tmp_path / "bad.toml").write_text("methods = [")
    with pytest.raises(HarnessError, match=r"bad\.toml"):
        read_run_file(tmp_path / "bad.toml")
    with pytest.raises(HarnessError, match="no run file"):
        read_run_file(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("count", "share", "kept"),
    [
        (8, 0.5, [0, 2, 5, 7]),
        (4, 0.5, [0, 3]),
        (6, 0.5, [0, 3, 5]),
        (8, 1.0, list(range(8))),
        (8, 0.1, [0]),
    ],
)
def test_kept_blocks_are_evenly_spaced(count, share, kept):
    assert kept_blocks(count, share) == kept


def test_a_recipe_is_not_a_path():
    assert parse_student_cut("depth:0.25") == ("depth", 0.25)
    assert parse_student_cut("Qwen/Qwen2.5-0.5B") is None
    assert parse_student_cut("./folder") is None
    assert [
        parse_student_cut(f"{kind}:0.5").draws_weights for kind in ("depth", "width", "scratch")
    ] == [False, False, True]


def test_a_recipe_is_one_line_of_one_table(monkeypatch):
    """What a new kind of student is, is asked of its line: nothing falls into another kind's
    branch.
    """
    from harness.models import shaping
    from harness.models.shape import Shape

    halved = shaping.CutKind(
        lambda model, share, cut: model,
        lambda base, share: base.narrower(share / 2),
        draws_weights=True,
    )
    monkeypatch.setitem(shaping.CUT_KINDS, "half-width", halved)
    recipe = parse_student_cut("half-width:0.5")
    assert recipe.draws_weights
    base = Shape.of_folder(EMBEDDED / "tiny")
    assert recipe.shape_of(base).intermediate == base.intermediate // 4
    with pytest.raises(HarnessError, match=r"half-width:0\.5"):
        parse_student_cut("quarter:0.5")


def test_two_packages_cannot_claim_one_name(monkeypatch):
    from importlib import metadata

    point = metadata.EntryPoint("cot", "elsewhere:Cot", "harness.methods")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
    with pytest.raises(HarnessError, match="two packages claim the method 'cot'"):
        Registry.with_entry_points("method", methods.METHODS, "harness.methods")


def test_a_method_that_cannot_be_imported_says_so():
    with pytest.raises(HarnessError, match="cannot be imported from nowhere:Nothing"):
        Registry("method", {"odd": "nowhere:Nothing"}).load("odd")


def test_several_teachers_have_weights_rows_and_keys_of_their_own():
    planned = plan(methods=["multi-teacher"], teacher=["tiny=3", "tiny-math=1"], controls=False)
    assert [cell.label for cell in planned.cells] == [
        "teacher",
        "teacher tiny-math",
        "multi-teacher",
    ]
    assert planned.config.teacher_weights == (0.75, 0.25) and [
        cell.is_teacher for cell in planned.cells
    ] == [True, False, False]
    equal = plan(methods=["multi-teacher"], teacher=["tiny", "tiny-math"], controls=False)
    flipped = plan(methods=["multi-teacher"], teacher=["tiny-math", "tiny"], controls=False)
    assert len({each_plan.cells[-1].key for each_plan in (planned, equal, flipped)}) == 3
    assert (
        len({cell.key for cell in planned.cells}) == 3
        and planned.cells[0].key != plan(methods=["sft"]).cells[0].key
    )


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (["tiny=0.7", "tiny-math"], "give every teacher a weight above 0, or give none"),
        (["tiny=0", "tiny-math=1"], "a weight above 0"),
        (["tiny", "tiny"], "named twice"),
        (["tiny=1.2.3", "tiny-math=1"], "a weight above 0"),
    ],
)
def test_weights_that_are_none_are_refused(teacher, message):
    with pytest.raises(HarnessError, match=message):
        plan(methods=["multi-teacher"], teacher=teacher)


def test_a_mixture_of_one_teacher_is_refused_with_what_to_type():
    with pytest.raises(
        HarnessError,
        match=r"multi-teacher needs two teachers or more; type for example --teacher "
        r"tiny,tiny-math",
    ):
        plan(methods=["multi-teacher"])


def test_another_name_of_a_method_is_the_same_row():
    assert labels(methods=["cot-human", "sft"], controls=False) == ["teacher", "sft"]


def test_a_control_takes_over_what_its_row_hands_on():
    planned = plan(methods=["selective", "selective[by=short,share=0.25]"])
    assert [cell.label for cell in planned.cells if cell.method == "selective-random"] == [
        "selective-random",
        "selective-random[unit=rows,share=0.25]",
    ]
    assert [cell.inherited_settings for cell in planned.cells if cell.method == "selective"] == [
        {"share": 0.5, "unit": "tokens"},
        {"share": 0.25, "unit": "rows"},
    ]


def test_a_list_of_terms_is_a_row_whose_name_can_stand_in_a_list():
    [cell] = plan(
        methods=["response"], set={"response": {"terms": ["jsd=0.7", "ce=0.3"]}}, controls=False
    ).cells[1:]
    assert cell.label == "response[terms=jsd=0.7+ce=0.3]" and cell.settings["terms"] == [
        "jsd=0.7",
        "ce=0.3",
    ]


def test_pairs_and_lists_stand_in_brackets():
    rows = labels(
        methods=split_list(
            'feature[feature_layers=2-4,4-8,learning_rate=0.01],response[terms=["jsd=0.7","ce=0.3"]]'
        ),
        controls=False,
    )
    assert rows[1:] == [
        "feature[learning_rate=0.01,feature_layers=2-4+4-8]",
        "response[terms=jsd=0.7+ce=0.3]",
    ]


def test_controls_start_and_diverge_as_their_row_does():
    rows = labels(methods=["response[start=random]", "selective[temperature=4]"])
    assert "sft[start=random]" in rows and "selective-random[temperature=4.0]" in rows


def test_two_teachers_of_one_name_or_the_same_weights_are_refused(tmp_path):
    import shutil

    from harness.models.resolve import EMBEDDED

    for folder in ("a", "b"):
        shutil.copytree(EMBEDDED / "tiny", tmp_path / folder / "student")
    with pytest.raises(HarnessError, match="two teachers have the same name or the same weights"):
        plan(
            methods=["multi-teacher"],
            teacher=[str(tmp_path / "a" / "student"), str(tmp_path / "b" / "student")],
        )


def test_a_searched_rate_and_a_tracker_that_is_missing():
    plain, tuned = (plan(methods=["sft"], tune=tune).cells[1].key for tune in (False, True))
    assert plain != tuned
    with pytest.raises(
        HarnessError,
        match=r"--track trackio: that package is not installed; type: pip install trackio",
    ):
        plan(methods=["sft"], track="trackio")


def test_local_models_keep_the_hub_out_only_where_the_items_are_here_too(tmp_path, monkeypatch):
    from dataclasses import replace

    from harness.running.runner import _environment

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HARNESS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    generated = plan_run(build_config({"suite": ("mini",), "methods": ("int8",)}))
    assert not generated.hub_data and _environment(generated)["HF_HUB_OFFLINE"] == "1"
    real = plan_run(build_config({"suite": (str(own_suite(tmp_path)),), "methods": ("int8",)}))
    assert (
        real.hub_data
        and "HF_HUB_OFFLINE" not in _environment(real)
        and "HF_DATASETS_OFFLINE" not in _environment(real)
    )
    assert _environment(replace(real, hub_data=False))["HF_DATASETS_OFFLINE"] == "1"


def own_suite(folder):
    file = folder / "own.toml"
    file.write_text('name = "own"\ntasks = ["mmlu"]\n', encoding="utf-8")
    return file


def test_checkpoints_alone_are_the_only_rows_and_beside_methods_they_come_first():
    tiny = str(EMBEDDED / "tiny-math")
    assert labels(checkpoint=[f"mine={tiny}"]) == ["teacher", "mine"]
    assert labels(checkpoint={"mine": tiny}, methods=["int8"]) == ["teacher", "mine", "int8"]
    cell = plan(checkpoint=[f"mine={tiny}"]).cells[1]
    assert (cell.method, cell.family, cell.seed, cell.stages) == ("checkpoint",) * 2 + (None, ())
    assert cell.checkpoint.digest == resolve("tiny-math", cache=EMBEDDED).digest


def test_the_key_of_a_checkpoint_is_that_of_its_contents_and_name(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(EMBEDDED / "tiny-math", here)

    def key(name, folder, **values):
        return plan(checkpoint=[f"{name}={folder}"], **values).cells[1].key

    first = key("mine", here)
    shutil.copytree(here, there)
    assert key("mine", there) == first  # the same bytes elsewhere
    assert key("mine", here, student="depth:0.7", budget=999, rows=7) == first  # nothing is trained
    assert key("other", here) != first
    assert key("mine", here, teacher=["tiny-math"]) != first  # it is compared with the teacher
    assert key("mine", here, limit=7) != first
    settings = json.loads((there / "generation_config.json").read_text())
    (there / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 9}))
    assert key("mine", there) != first


def test_other_rows_keep_their_keys_beside_a_checkpoint():
    alone = {cell.label: cell.key for cell in plan(methods=["int8"]).cells}
    beside = plan(methods=["int8"], checkpoint=[f"mine={EMBEDDED / 'tiny-math'}"]).cells
    assert {cell.label: cell.key for cell in beside if cell.label != "mine"} == alone


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["int8=tiny"], r"int8 is the name of a method or of a row; .* my-int8"),
        (["teacher=tiny"], r"teacher is the name of a method or of a row"),
        (["a=tiny", "a=tiny-math"], r"a is named twice"),
        (["tiny"], r"give NAME=MODEL"),
        (["=tiny"], r"give NAME=MODEL"),
        (["a b=tiny"], r"give NAME=MODEL"),
        (["a="], r"give NAME=MODEL"),
        (["a=./no/such/folder"], r"unknown model './no/such/folder'"),
    ],
)
def test_checkpoints_that_cannot_be_rows_are_refused(specs, message):
    with pytest.raises(HarnessError, match=message):
        plan(checkpoint=specs)


def test_a_torn_checkpoint_ends_the_run_before_anything_is_computed(tmp_path):
    torn = shutil.copytree(EMBEDDED / "tiny", tmp_path / "torn")
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(HarnessError, match=r"model\.safetensors is damaged .* download or save"):
        plan(checkpoint=[f"mine={torn}"])


def test_a_subset_is_in_the_keys_of_scores_and_in_no_students():
    def cells(**values):
        return {cell.label: cell for cell in plan(methods=["int8"], **values).cells}

    whole, quick = cells(), cells(subset="quick:30")
    for label, cell in quick.items():
        assert cell.key != whole[label].key
        assert cell.student_key == whole[label].student_key
    for other in ("quick:30:2", "quick:31"):
        assert cells(subset=other)["int8"].key != quick["int8"].key
    assert cells(subset="quick:30:1")["int8"].key == quick["int8"].key
    conditions = plan(methods=["int8"], subset="quick:30").conditions
    assert conditions.subset == "quick:30:1" and not conditions.limited


def test_a_subset_that_cannot_be_scored_is_refused_at_once(tmp_path):
    path = tmp_path / "quick.json"
    path.write_text(json.dumps({"name": "quick", "items": {"gsm8k-mini": ["0" * 64]}}))
    for values, message in (
        ({"subset": "quick:30", "limit": 7}, r"drop --limit, or name a smaller subset"),
        ({"subset": str(path)}, r"1 items of gsm8k-mini that its data does not hold"),
        ({"subset": str(path), "suite": ["mmlu-mini"]}, r"lists no item of mmlu-mini"),
        ({"subset": "quick"}, r"type for example quick:300"),
    ):
        with pytest.raises(HarnessError, match=message):
            plan(methods=["int8"], **values)
