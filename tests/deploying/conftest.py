"""A store of made-up rows, as a run leaves one, without a model."""

import json

import pytest
from gate_rows import TEACHES, flipped, marks, row

from harness.planning.config import RunConfig
from harness.records.record import write_record
from harness.records.store import Store


@pytest.fixture
def made_store(tmp_path):
    """Return a store of a teacher and of int4 at two group sizes, one with a student's files."""
    store = Store(tmp_path / "runs")
    store.prepare()
    rows = [
        TEACHES.model_copy(update={"key": "teaches"}),
        row("int4", flipped(marks(800), lose=45, win=10), key="plain"),
        row("int4[group_size=32]", flipped(marks(800), lose=20, win=10), key="small"),
    ]
    student = store.student("student-of-int4") / "student"
    student.mkdir(parents=True)
    (student / "config.json").write_text("{}")
    (student / "model.safetensors").write_bytes(b"12345")
    for record in rows:
        write_record(store.record_path(record.key), record)
        stages = ["/elsewhere/students/student-of-int4"] if record.label == "int4" else []
        job = {"stage_folders": stages, "teachers": [{"path": str(tmp_path / "gone")}]}
        (store.cell(record.key) / "job.json").write_text(json.dumps({**job, "cell": {}}))
    (store.cell(rows[1].key) / "log.txt").write_text("a line of the log\n")
    asked = RunConfig(methods=("int4", "int4[group_size=32]"), seeds=1, limit=1000)
    store.write_run(asked.model_dump(mode="json"), [record.key for record in rows])
    return store


@pytest.fixture(scope="session")
def packed_student(random_model, tmp_path_factory):
    """Return a maker of packed students of a random Llama: every block's matrix by `quantize`.

    `others` names the kinds of single layers, None for floats. The table becomes int8 unless
    `table` is False.
    """
    import torch

    from harness.models.language_model import open_model
    from harness.models.packed import save_packed
    from methods.compression.rounding import packed_layer, round_to_nearest

    def make(kind, *, table=True, others=(), **settings):
        opened = open_model(random_model)
        opened.model.to(torch.bfloat16)
        specs, tensors = {}, {}
        for name, layer in opened.model.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                own_kind = dict(others).get(name, kind)
                if own_kind is None:
                    continue
                own_settings = settings if own_kind == kind else {}
                bits = 4 if own_kind == "int4" else 8
                matrix = round_to_nearest(layer.weight, bits=bits, **own_settings)
                specs[name], own = packed_layer(name, matrix, None, kind=own_kind)
                tensors |= own
        if table:
            name, weight = "model.embed_tokens", opened.model.model.embed_tokens.weight
            rows = round_to_nearest(weight, bits=8)
            specs[name], own = packed_layer(name, rows, None, kind="int8", embedding=True)
            specs["lm_head"] = {"kind": "tied", "table": name}
            tensors |= own
        folder = tmp_path_factory.mktemp("packed") / "student"
        folder.mkdir()
        save_packed(opened, folder, specs=specs, tensors=tensors, dtype=torch.bfloat16)
        return folder

    return make
