"""Chains: what may follow what, which rows stand beside them, which stages they share, and one run
from end to end.
"""

import json

import pytest

from harness.api import plan_run
from harness.errors import HarnessError
from harness.planning.config import build_config
from harness.planning.spec import parse_set


def plan(methods, *, settings=(), **more):
    return plan_run(build_config({"methods": methods, "set": parse_set(list(settings)), **more}))


def by_label(planned):
    return {cell.label: cell for cell in planned.cells}


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (
            "int8+response",
            r"response cannot follow int8: packed weights take no gradient .*; type response\+int8",
        ),
        (
            "int8+response",
            r"beside int8 and int4, recipe=lora trains adapters",
        ),
        ("int4+sft[recipe=bf16]", r"sft cannot follow int4: packed weights take no gradient"),
        ("nf4+response[recipe=lora]", r"response cannot follow nf4: packed weights take no"),
        ("fake-int4+response[recipe=lora]", r"response cannot follow fake-int4"),
        ("int4+response[recipe=lora]+int8", r"int8 cannot follow int4: the weights are packed"),
        (
            "prune-wanda+response[recipe=lora]",
            r"response cannot follow prune-wanda: adapters would fill its zeros; train every "
            r"weight \(response\[recipe=full\]\)",
        ),
        (
            "prune-wanda+int4+sft[recipe=lora]",
            r"sft cannot follow prune-wanda: adapters would fill its zeros.*before anything packs",
        ),
        (
            "int4+prune-depth",
            r"prune-depth cannot follow int4: packed weights cannot be cut; type prune-depth\+int4",
        ),
        ("int4+lowrank", r"lowrank cannot follow int4"),
        ("int8+int4", r"int4 cannot follow int8: the weights are packed already$"),
        ("lowrank+prune-width", r"prune-width cannot follow lowrank: factors have no channels"),
        (
            "prune-wanda+lowrank",
            r"lowrank cannot follow prune-wanda: the factors of a matrix with zeros",
        ),
        (
            "prune-depth+int8+response",
            r"response cannot follow int8: .*; type prune-depth\+response\+int8",
        ),
        ("response+response", r"response is in it twice"),
        (
            "prune-width[allocation=global]+prune-depth",
            r"needs the shapes of the original architecture",
        ),
        (
            "lowrank+nf4",
            r"nf4 cannot follow lowrank: it needs the shapes of the original architecture",
        ),
        (
            "prune-wanda[pattern=2:4]+prune-width",
            r"dropping channels would break its groups of pattern 2:4; put prune-width first",
        ),
        ("identity+int8", r"identity changes nothing"),
        ("kv-int8+kv-int4", r"kv-int4 cannot follow kv-int8: keys and values are quantized"),
        ("response++int8", r"empty stage"),
        ("response+intt8", r"unknown method 'intt8'; did you mean 'int8'"),
        ("prune-depth+sft[start=random]", r"would discard the stages before it"),
    ],
)
def test_an_order_that_cannot_work_is_refused_before_anything_is_computed(chain, message):
    with pytest.raises(HarnessError, match=message):
        plan([chain])


@pytest.mark.parametrize(
    "chain",
    [
        "response+int8",
        "prune-depth+response+int8",
        "prune-wanda+response+int4",
        "lowrank+response",
        "lowrank+int4",
        "prune-width+prune-depth",
        "prune-wanda+prune-width",
        "prune-width+prune-wanda[pattern=2:4]",
        "response+prune-depth",
        "prune-depth+lowrank+response+int8-dynamic",
        "sft+response",
        "int4+response[recipe=lora]",
        "prune-depth+int8+response[recipe=lora]",
        "lowrank+int8-dynamic+sft[recipe=lora]",
        "int4-calibrated+sft[recipe=lora]+response[recipe=lora]",
        "int4+kv-int8",
        "kv-int8+int4",
        "prune-depth+kv-int4",
        "kv-int4+response[recipe=lora]",
        "prune-depth+int4+kv-int4+response[recipe=lora]",
    ],
)
def test_an_order_that_works_is_planned(chain):
    assert chain in by_label(plan([chain]))


def test_beside_a_chain_stand_its_beginning_its_end_and_what_it_would_be_without_its_training():
    cells = by_label(plan(["prune-depth+response+int8"]))
    assert set(cells) == {
        "teacher",
        "prune-depth+response+int8",
        "prune-depth+response",
        "int8",
        "prune-depth+int8",
        "prune-depth",
        "prune-depth-random",
        "prune-depth+sft",
    }
    assert cells["prune-depth+response+int8"].controls == (
        "prune-depth+response",
        "int8",
        "prune-depth+int8",
    )
    assert cells["prune-depth+sft"].is_control and not cells["prune-depth+response"].is_control
    assert [cell.label for cell in plan(["prune-depth+response+int8"], controls=False).cells] == [
        "teacher",
        "prune-depth+response+int8",
    ]


def test_controls_of_adapters_beside_packed_weights_train_adapters_too():
    cells = by_label(plan(["int4+response"], settings=["response.recipe=lora"]))
    assert set(cells) == {
        "teacher",
        "int4+response[recipe=lora]",
        "int4",
        "int4+sft[recipe=lora]",
    }
    assert cells["int4+sft[recipe=lora]"].is_control


def test_what_a_chain_begins_with_is_scored_before_it():
    order = [cell.label for cell in plan(["prune-depth+response+int8"]).cells]
    assert (
        order.index("prune-depth")
        < order.index("prune-depth+response")
        < order.index("prune-depth+response+int8")
    )


def test_chains_that_begin_alike_share_their_stages_and_a_lone_method_is_the_first_of_them():
    cells = by_label(plan(["prune-depth+response+int8", "prune-depth+response+int4"]))
    first, second = (
        cells["prune-depth+response+int8"].stages,
        cells["prune-depth+response+int4"].stages,
    )
    assert [stage.key for stage in first[:2]] == [stage.key for stage in second[:2]] and first[
        2
    ].key != second[2].key
    assert (
        cells["prune-depth"].student_key == first[0].key
        and cells["prune-depth+response"].student_key == first[1].key
    )
    assert cells["int8"].student_key != first[2].key  # of another parent
    changed = by_label(plan(["prune-depth+response+int8"], settings=["prune-depth.ratio=0.5"]))
    label = "prune-depth[ratio=0.5]+response+int8"
    assert not {stage.key for stage in changed[label].stages} & {stage.key for stage in first}
    assert changed[label].settings["prune-depth"]["ratio"] == 0.5


def test_seeds_are_drawn_where_a_stage_draws_and_what_does_not_draw_is_shared_by_them():
    planned = plan(["prune-depth+response+int8"], seeds=2)
    chains = [cell for cell in planned.cells if cell.label == "prune-depth+response+int8"]
    assert [cell.seed for cell in chains] == [1, 2]
    assert (
        chains[0].stages[0].key == chains[1].stages[0].key
        and chains[0].stages[1].key != chains[1].stages[1].key
    )
    assert [cell.seed for cell in planned.cells if cell.label == "int8"] == [None]
    assert [cell.seed for cell in planned.cells if cell.label == "prune-depth-random"] == [1, 2]


def test_a_control_in_a_chain_takes_over_what_its_row_hands_on():
    cells = by_label(plan(["prune-wanda[pattern=2:4]+response"]))
    assert "prune-magnitude[pattern=2:4]" in cells
    cells = by_label(plan(["response+int4-calibrated[group_size=32]"]))
    assert {
        "response+int4[group_size=32]",
        "int4-calibrated[group_size=32]",
        "int4[group_size=32]",
    } <= set(cells)


def test_a_simulated_row_is_neither_weighed_nor_timed():
    assert (
        by_label(plan(["fake-int4"]))["fake-int4"].simulated
        and by_label(plan(["response+fake-int4"]))["response+fake-int4"].simulated
    )
    assert not by_label(plan(["int4"]))["int4"].simulated


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A chain, what it begins with, and a simulated row, run in one store; and what to run more
    with.
    """
    import harness

    folder = tmp_path_factory.mktemp("chains")
    settings = {
        "suite": "math",
        "budget": 4_000,
        "rows": 120,
        "limit": 20,
        "out": folder / "runs",
        "cache": folder / "cache",
        "grid": "none",
        "noise": 0,
        "controls": False,
    }
    run = harness.run(
        "prune-depth,prune-depth+response,prune-depth+response+int8,fake-int4", **settings
    )
    return run, folder, settings


def test_a_student_in_another_type_and_other_files_is_still_the_model_it_started_from(
    tmp_path, random_model
):
    import torch

    from harness.errors import CellFailed
    from harness.models.checkpoint import describe
    from harness.models.language_model import open_model
    from harness.running.student import _refuse_unchanged

    model = open_model(random_model).model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "start")
    model.to(torch.float32).save_pretrained(tmp_path / "same", max_shard_size="140KB")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[-1, -1] += 1e-3
    model.save_pretrained(tmp_path / "changed", max_shard_size="140KB")
    start, same, changed = (
        describe(tmp_path / name, name=name) for name in ("start", "same", "changed")
    )
    assert start.digest != same.digest
    stage = by_label(plan(["fake-int4"]))["fake-int4"].stages[0]
    with pytest.raises(CellFailed, match="fake-int4 changed no weight"):
        _refuse_unchanged(stage, same, (random_model, start))
    _refuse_unchanged(stage, changed, (random_model, start))


def _student(finished, record):
    return finished[1] / "runs" / "students" / record.stages[-1].key[:24] / "student"


def test_a_chain_runs_from_end_to_end_and_says_what_each_stage_gave(finished):
    from harness.reporting.report import markdown

    run, _, _ = finished
    records = {record.label: record for record in run.records}
    assert run.succeeded, [record.reason for record in run.records]
    chain = records["prune-depth+response+int8"]
    assert [stage.label for stage in chain.stages] == [
        "prune-depth",
        "prune-depth+response",
        "prune-depth+response+int8",
    ]
    for stage, label in zip(chain.stages, ("prune-depth", "prune-depth+response"), strict=False):
        assert stage.scores == {score.task: score.value for score in records[label].scores}
        assert stage.digest == records[label].student.digest
    # the last stage's are the row's own
    assert chain.stages[2].scores == {score.task: score.value for score in chain.scores}
    card = (_student(finished, chain) / "README.md").read_text()
    assert (
        "model-index:" in card
        and chain.student.digest in card
        and "prune-depth+response+int8" in card
    )
    assert chain.stages[2].digest == chain.student.digest and chain.student.parents == (
        chain.stages[1].digest,
    )
    assert (
        chain.stages[2].weight_bytes
        < 0.6 * chain.stages[1].weight_bytes
        < chain.stages[0].weight_bytes
    )
    assert chain.cost.seconds == pytest.approx(sum(stage.cost.seconds for stage in chain.stages))
    assert chain.cost.seen_tokens == records["prune-depth+response"].cost.seen_tokens > 0
    # packed ones are counted as what they were
    assert chain.student.parameters == records["prune-depth"].student.parameters
    assert records["fake-int4"].measurement("weight_bytes_disk") is None
    assert chain.path == records["teacher"].path  # one table
    assert "Chains, stage by stage" in markdown(list(run.records))


def test_a_second_chain_finds_its_beginning_made_and_a_torn_stage_is_found_and_made_again(finished):
    import harness

    run, folder, settings = finished
    chain = next(record for record in run.records if record.label == "prune-depth+response+int8")
    students = {path.name for path in (folder / "runs" / "students").iterdir()}
    assert harness.run("prune-depth+response+int4", **settings).succeeded
    [fresh] = {path.name for path in (folder / "runs" / "students").iterdir()} - students
    assert json.loads((folder / "runs" / "students" / fresh / "done.json").read_text())[
        "parents"
    ] == [chain.stages[1].digest]
    weights = (
        folder / "runs" / "students" / chain.stages[1].key[:24] / "student" / "model.safetensors"
    )
    weights.write_bytes(weights.read_bytes()[:-100])
    torn = harness.run("prune-depth+response+int8-dynamic", **settings)
    assert "is damaged" in torn.records[-1].reason
    again = harness.run("prune-depth+response+int8-dynamic", **settings)
    # the same bytes again
    assert again.succeeded and again.records[-1].stages[1].digest == chain.stages[1].digest


def test_a_row_of_the_cache_states_a_format_and_no_later_stage_loses_it(random_model, tmp_path):
    from dataclasses import replace

    from harness.errors import CellFailed
    from harness.models.cache_format import CacheFormat
    from harness.models.shaping import copy_student
    from harness.running.student import _refuse_lost_cache, _refuse_unchanged

    codes = CacheFormat(bits=4, group=32)
    coded = copy_student(random_model, tmp_path / "kv", name="kv", cache_format=codes)
    stages = by_label(plan(["kv-int4+int8"]))["kv-int4+int8"].stages
    _refuse_unchanged(stages[0], coded, (random_model,))  # the weights are the teacher's
    with pytest.raises(CellFailed, match="kv-int4 changed nothing: its student has a cache of"):
        _refuse_unchanged(stages[0], random_model, (random_model,))
    _refuse_lost_cache(stages[1], coded, coded)
    with pytest.raises(CellFailed, match=r"int8 lost the quantized cache \(int4-32\) of the stage"):
        _refuse_lost_cache(stages[1], replace(random_model, name="int8"), coded)


def test_beside_rows_of_the_cache_stand_the_same_models_with_the_full_cache():
    assert set(by_label(plan(["kv-int8"]))) == {"teacher", "kv-int8", "identity"}
    beside = by_label(plan(["int4+kv-int8", "kv-int4+response[recipe=lora]"]))
    assert {"int4", "kv-int8", "kv-int4", "kv-int4+sft[recipe=lora]"} <= set(beside)
