"""Calibration text and sweeps: what it is, what it may not be, and that every block sees the
changed ones before it.
"""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from harness.contract import Example
from harness.data.contamination import contaminated_texts
from harness.data.source import LocalOrHubData
from harness.errors import CellFailed
from methods.compression.calibration import (
    CalibrationData,
    InputStatistics,
    block_influence,
    recording_inputs,
    visit_blocks,
)
from methods.compression.layers import layers_of


@pytest.mark.slow
def test_text_comes_from_train_is_named_and_hashed_and_the_same_every_time(compress):
    descriptions = [
        compress("prune-wanda", {"num_calibration_samples": 6, "max_seq_length": 64})[1][
            "calibration"
        ]
        for _ in range(2)
    ]
    assert (
        descriptions[0] == descriptions[1]
        and descriptions[0]["name"] == "train split of gsm8k-mini"
    )
    assert (descriptions[0]["sequences"], descriptions[0]["tokens_each"]) == (6, 64) and len(
        descriptions[0]["digest"]
    ) == 64
    assert (
        descriptions[0]["compared_with"] == ["gsm8k-mini"]
        and descriptions[0]["dropped_for_evaluation_text"] == 0
    )
    of_mmlu = compress(
        "prune-wanda", {"num_calibration_samples": 6, "max_seq_length": 64}, tasks=("mmlu-mini",)
    )[1]["calibration"]
    assert (
        of_mmlu["digest"] != descriptions[0]["digest"]
        and of_mmlu["name"] == "train split of mmlu-mini"
    )


def test_a_task_without_train_reads_c4_and_says_what_is_missing(compress, tmp_path):
    with pytest.raises(CellFailed, match="no text to calibrate on"):
        compress("prune-wanda", tasks=("wikitext",))
    (tmp_path / "c4_demo").mkdir()
    with gzip.open(tmp_path / "c4_demo" / "c4_demo.jsonl.gz", "wt") as stream:
        stream.writelines(
            json.dumps({"text": f"A plain sentence, number {n}, about nothing much at all."}) + "\n"
            for n in range(200)
        )
        stream.write(
            json.dumps(
                {"text": "Somebody has copied this: " + " ".join(f"word{n}" for n in range(13))}
            )
            + "\n"
        )
    (tmp_path / "wikitext2").mkdir()
    page = (
        f" = A title = \n \n Before it , {' '.join(f'word{n}' for n in range(13))} and behind .\n"
    )
    (tmp_path / "wikitext2" / "wiki.test.raw.gz").write_bytes(gzip.compress(page.encode()))
    few = {"num_calibration_samples": 4, "max_seq_length": 64}
    notes = compress(
        "prune-wanda", few, tasks=("wikitext",), source=LocalOrHubData(folder=tmp_path)
    )[1]
    assert notes["calibration"]["name"] == "C4 sample"
    assert (
        notes["calibration"]["compared_with"] == ["wikitext"]
        and notes["calibration"]["dropped_for_evaluation_text"] == 1
    )


def test_text_that_holds_an_evaluation_question_is_dropped_in_data_from_outside():
    run = " ".join(f"w{number}" for number in range(13))
    evaluated = [Example(task="t", prompt=f"before {run} after", completion="", answer="", gold="")]
    task = SimpleNamespace(
        name="t",
        kind="generate",
        files=("a.jsonl",),
        examples=lambda split, source: iter(evaluated),
    )
    texts = [f"Here {run.upper()} there", "nothing of it", run.rpartition(" ")[0]]
    assert contaminated_texts(texts, {"t": task}, LocalOrHubData()) == ({0}, ["t"])
    task.files = ()
    assert contaminated_texts(texts, {"t": task}, LocalOrHubData()) == (set(), [])


def test_too_little_text_is_said(compress):
    with pytest.raises(CellFailed, match="fill no sequence"):
        compress("prune-wanda", {"max_seq_length": 512}, rows=2)


def test_sums_are_those_of_a_plain_forward_pass_for_any_batch(embedded, monkeypatch):
    from methods.compression import calibration

    ids = torch.randint(3, 1000, (5, 24))
    layers = layers_of(embedded.model, method="test").linear
    plain = InputStatistics("gram")
    with torch.no_grad(), recording_inputs(plain, layers):
        embedded.model(input_ids=ids, use_cache=False)
    for tokens in (24, 48, 1_000):  # one at a time; two, and one left over; all at once
        monkeypatch.setattr(calibration, "TOKENS_PER_BATCH", tokens)
        sums = {}
        visit_blocks(
            embedded,
            CalibrationData(ids, {}),
            layers,
            kind="gram",
            visit=lambda block, flow, sums=sums: sums.update(flow.sums),
        )
        assert sums.keys() == plain.sums.keys()
        for name in sums:
            assert torch.allclose(
                sums[name],
                plain.sums[name],
                rtol=1e-3,
                atol=1e-3 * float(plain.sums[name].abs().max()),
            ), name


@pytest.mark.parametrize("normalized", [False, True])
def test_second_moments_of_many_inputs_are_summed_in_parts(monkeypatch, normalized):
    from methods.compression import calibration

    torch.manual_seed(5)
    batches, sums = [torch.randn(3, 7, 20) for _ in range(2)], []
    for at_once in (2_048, 8):  # all at once; three columns of X^T X at a time, and two left over
        monkeypatch.setattr(calibration, "_INPUTS_AT_ONCE", at_once)
        flow = InputStatistics("gram", normalized)
        for batch in batches:
            flow.add("x", batch)
        sums.append(flow.sums["x"])
    assert torch.allclose(*sums, atol=1e-5)
    rows = torch.cat([batch.reshape(-1, 20) for batch in batches])
    rows = torch.nn.functional.normalize(rows, dim=-1) if normalized else rows
    assert torch.allclose(sums[0], rows.T @ rows, atol=1e-4)


def test_tokens_count_alike_whatever_their_size():
    torch.manual_seed(3)
    rows = torch.randn(40, 6)
    larger = rows * torch.logspace(-2, 4, 40)[:, None]
    for kind in ("gram", "squares"):
        sums = {}
        for name, x, normalized in (
            ("plain", rows, True),
            ("sized", larger, True),
            ("raw", larger, False),
            ("zero", torch.zeros(1, 6), True),
        ):
            flow = InputStatistics(kind, normalized)
            flow.add("x", x)
            sums[name] = flow.sums["x"]
        assert torch.allclose(sums["plain"], sums["sized"], atol=1e-5)
        trace = float(sums["plain"].diagonal().sum() if kind == "gram" else sums["plain"].sum())
        assert trace == pytest.approx(40, rel=1e-5)  # each token adds one
        assert float(sums["raw"].abs().max()) > 1e6 and (sums["zero"] == 0).all()


def test_a_token_that_outweighs_all_others_does_not_decide_how_they_are_rounded():
    """An attention sink: one direction, thousands of times larger. As published the error of all
    other tokens hardly counts.
    """
    from methods.compression.rounding import round_to_nearest, round_with_gptq

    torch.manual_seed(4)
    x = torch.randn(400, 32) @ torch.randn(32, 32)
    sink = torch.zeros(4, 32)
    sink[:, 5] = 30_000
    w = torch.randn(24, 32)
    errors = {}
    for name, normalized in (("alike", True), ("raw", False)):
        flow = InputStatistics("gram", normalized)
        flow.add("w", torch.cat([sink, x]))
        rounded = round_with_gptq(w, flow.sums["w"], bits=4, group_size=16).dequantized()
        errors[name] = float(((w - rounded) @ x.T).square().sum())
    nearest = float(
        ((w - round_to_nearest(w, bits=4, group_size=16).dequantized()) @ x.T).square().sum()
    )
    assert errors["alike"] < 0.7 * errors["raw"] and errors["alike"] < 0.7 * nearest


class Block(torch.nn.Module):
    """Takes a factor by place, or from elsewhere: a state that the model sets while it runs."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.elsewhere = 1.0

    def forward(self, hidden_states, factor=1.0, **_):
        return hidden_states + self.linear(hidden_states) * factor * self.elsewhere


class Decoder(torch.nn.Module):
    """Hands its blocks a factor by place, sets one aside, or hands each batch one of its own."""

    def __init__(self, *, by_place=False, of_the_batch=False):
        super().__init__()
        self.by_place, self.of_the_batch = by_place, of_the_batch
        self.table = torch.nn.Embedding(50, 8)
        self.layers = torch.nn.ModuleList(Block() for _ in range(3))

    def forward(self, input_ids, **_):
        states = self.table(input_ids)
        for block in self.layers:
            block.elsewhere = 1.0 if self.by_place or self.of_the_batch else 3.0
            factor = self.table(input_ids) if self.of_the_batch else 3.0
            states = block(states, factor) if self.by_place or self.of_the_batch else block(states)
            block.elsewhere = 1.0
        return states


def test_what_a_model_hands_a_block_by_place_goes_along():
    torch.manual_seed(0)
    model, data = Decoder(by_place=True), CalibrationData(torch.randint(0, 50, (2, 16)), {})
    layers = {f"layers.{number}.linear": block.linear for number, block in enumerate(model.layers)}
    sums, expected = {}, InputStatistics("squares")
    visit_blocks(
        SimpleNamespace(model=model),
        data,
        layers,
        kind="squares",
        visit=lambda name, flow: sums.update(flow.sums),
    )
    with torch.no_grad(), recording_inputs(expected, layers):
        model(data.ids)
    assert (
        all(torch.allclose(sums[name], expected.sums[name], rtol=1e-4) for name in layers)
        and len(sums) == 3
    )


def test_a_block_that_takes_something_from_elsewhere_is_refused_before_anything_is_summed(
    monkeypatch,
):
    from methods.compression import calibration

    torch.manual_seed(0)
    model, data = Decoder(), CalibrationData(torch.randint(0, 50, (2, 16)), {})
    layers = {f"layers.{number}.linear": block.linear for number, block in enumerate(model.layers)}
    refused = pytest.raises(
        CellFailed, match="Decoder: block 0 run alone returns other states than inside the model"
    )
    with refused:
        visit_blocks(
            SimpleNamespace(model=model),
            data,
            layers,
            kind="squares",
            visit=lambda name, flow: pytest.fail("visited"),
        )
    model.of_the_batch = True  # the first batch's would be right for the first batch alone
    monkeypatch.setattr(calibration, "TOKENS_PER_BATCH", 16)
    with refused:
        visit_blocks(
            SimpleNamespace(model=model),
            data,
            layers,
            kind="squares",
            visit=lambda name, flow: pytest.fail("visited"),
        )
    with torch.no_grad():
        model.table.weight[:] = torch.nan
    with pytest.raises(CellFailed, match="is not finite on the calibration text"):
        visit_blocks(
            SimpleNamespace(model=model),
            data,
            layers,
            kind="squares",
            visit=lambda name, flow: pytest.fail("visited"),
        )


def test_a_block_sees_what_was_done_to_the_blocks_before_it(tiny):
    from harness.models.language_model import open_model

    opened = open_model(tiny)
    layers = layers_of(opened.model, method="test").linear
    ids = torch.randint(3, 1000, (2, 16))
    sums = {}

    def visit(block, flow):
        sums[block] = flow.sums[f"{block}.self_attn.q_proj"].clone()
        if block.endswith(".0"):
            with torch.no_grad():
                opened.model.model.layers[0].mlp.down_proj.weight.zero_()

    visit_blocks(opened, CalibrationData(ids, {}), layers, kind="squares", visit=visit)
    expected = InputStatistics("squares")
    with torch.no_grad(), recording_inputs(expected, layers):
        opened.model(input_ids=ids, use_cache=False)
    assert torch.allclose(
        sums["model.layers.1"],
        expected.sums["model.layers.1.self_attn.q_proj"],
        rtol=1e-3,
        atol=1e-2,
    )


def test_layers_that_read_one_tensor_share_one_sum(embedded):
    layers = layers_of(embedded.model, method="test").linear
    flow = InputStatistics("gram")
    with torch.no_grad(), recording_inputs(flow, layers):
        embedded.model(input_ids=torch.arange(3, 20)[None], use_cache=False)
    sums = [flow.sums[f"model.layers.0.self_attn.{part}_proj"] for part in "qkv"]
    assert sums[0] is sums[1] is sums[2]
    assert flow.sums["model.layers.0.mlp.gate_proj"] is flow.sums["model.layers.0.mlp.up_proj"]
    assert len(block_influence(embedded, CalibrationData(torch.arange(3, 20)[None], {}))) == 8
