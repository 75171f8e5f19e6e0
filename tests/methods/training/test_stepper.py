"""A step waits for its device once, and what it reads is what was read one by one before."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from distilling import SETTINGS, rows_of
from torch.utils._python_dispatch import TorchDispatchMode

from harness.models.language_model import open_model
from harness.scoring.backend import TopK
from methods.training import loop, preparation, row_attention
from methods.training import state as states
from methods.training.batch_loss import GradientNorm
from methods.training.divergences import distribution_kl, mixed_kl
from methods.training.losses import forward_kl, jensen_shannon
from methods.training.positions import Distribution
from methods.training.rows import TeacherTokens
from methods.training.selection import Selection
from methods.training.settings import Training
from methods.training.stepper import StepReadings, mean_cross_entropy
from methods.training.taps import TapConfig
from methods.training.teachers import CrossTokenizerTeacher, LiveTeacher, TrainedPositionLogits
from methods.training.terms import Objective, Term, hard_labels
from methods.training.transfers import to_device
from methods.uld import aligned_positions, uld_values

# operators whose result Python or the size of a tensor depends on: a GPU is waited for
_READS = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
)
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: reads of numbers, sizes found from values, copies back."""

    def __init__(self, optimizers=()):
        super().__init__()
        self.optimizers = optimizers
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name.removeprefix("aten::")
        if name in _READS and not self._stays_on_the_processor(arguments[0]):
            self.seen.append(name)
        if name in _INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1]
        ):
            self.seen.append(f"{name} by a mask")
        return function(*arguments, **(options or {}))

    def _stays_on_the_processor(self, tensor):
        """Tell whether a tensor is an optimizer's count of steps, which no GPU holds."""
        counts = (
            state["step"]
            for optimizer in self.optimizers
            for state in optimizer.state.values()
            if isinstance(state.get("step"), torch.Tensor)
        )
        return any(count.data_ptr() == tensor.data_ptr() for count in counts)


@pytest.fixture
def waits_of_steps(monkeypatch):
    """Return a list that gets what each step of a training waited for."""
    waited = []
    advance, tolist = loop._TrainingRun._advance, torch.Tensor.tolist
    open_modes = []

    def counted(run, step, rows):
        optimizers = [each.optimizer for each in run.prepared.optimizers.prepared]
        with Waits(optimizers) as waits:
            open_modes.append(waits)
            advance(run, step, rows)
            open_modes.pop()
        waited.append(waits.seen)

    def seen_tolist(tensor):
        if open_modes:
            open_modes[-1].seen.append("tolist")
        return tolist(tensor)

    monkeypatch.setattr(loop._TrainingRun, "_advance", counted)
    monkeypatch.setattr(torch.Tensor, "tolist", seen_tolist)
    monkeypatch.setattr(states, "SECONDS_BETWEEN_STATES", 1e9)
    monkeypatch.setattr(row_attention, "packs_by_default", lambda device: True)
    return waited


class Kept:
    """The teacher's likeliest tokens, as a cache gives them."""

    reads_in_parts = True

    def read(self, batch, vocabulary):
        count = batch.trained_tokens
        ids = torch.arange(8).expand(count, -1)
        log_p = torch.log_softmax(torch.arange(9.0), -1)[:8].expand(count, -1)
        return Distribution(
            None, TopK(to_device(ids, batch.device), to_device(log_p, batch.device))
        )

    read_parts = read


def both(at):
    return mixed_kl(at, torch.ones(len(at.labels_N), 2, device=at.labels_N.device), 2.0)


KL = Term("kl", 0.5, lambda at: forward_kl(at.student_NV, at.teacher_NV, temperature=2.0))
TOP = Term("kl", 0.5, lambda at: distribution_kl(at.student_NV, at.teachers[0], 2.0))
JSD = Term("jsd", 1.0, lambda at: jensen_shannon(at.student_NV, at.teacher_NV, beta=0.3))
FEATURE = Term("feature", "auto", lambda at: at.inner_states.hidden_state_distance(at))
ULD = Term("uld", 1.5, uld_values, counts=aligned_positions)


def attention_term(taps):
    return Term(
        "attention",
        0.5,
        lambda at: at.inner_states.attention_divergence(at),
        taps.attention_positions,
    )


def objective_of(kind, small):
    """Return an objective of each kind of term, source and selection."""
    teacher = lambda: LiveTeacher(small("Llama", hidden_size=64))  # noqa: E731
    hidden = TapConfig(hidden_layers="auto")
    attention = TapConfig(hidden_layers="auto", attention_layers="auto")
    return Objective(
        **{
            "labels": lambda: {"terms": [hard_labels()]},
            "tags": lambda: {"terms": [hard_labels(0.4, tag=0), hard_labels(0.6, tag=1)]},
            "live": lambda: {"terms": [KL, hard_labels(0.5)], "sources": [teacher()]},
            "cached": lambda: {"terms": [TOP, hard_labels(0.5)], "sources": [Kept()]},
            "several": lambda: {"terms": [Term("kl", 1.0, both)], "sources": [Kept(), Kept()]},
            "auto": lambda: {"terms": [JSD, hard_labels("auto")], "sources": [teacher()]},
            "entropy": lambda: {
                "terms": [KL, hard_labels(0.5)],
                "sources": [teacher()],
                "selection": Selection(0.4, "entropy", 1),
            },
            "random": lambda: {
                "terms": [hard_labels()],
                "selection": Selection(0.4, "random", 1),
            },
            "hidden": lambda: {
                "terms": [KL, hard_labels(0.5), FEATURE],
                "sources": [teacher()],
                "taps": hidden,
            },
            "attention": lambda: {
                "terms": [KL, FEATURE, attention_term(attention)],
                "sources": [teacher()],
                "taps": attention,
            },
            "uld": lambda: {
                "terms": [hard_labels(), ULD],
                "sources": [CrossTokenizerTeacher(small("Llama", hidden_size=64))],
            },
        }[kind]()
    )


def rows_for(kind):
    rows = [replace(row, tag=index % 2) for index, row in enumerate(rows_of(24, shortest=8))]
    if kind != "uld":
        return rows
    return [
        replace(row, teacher_tokens=TeacherTokens(row.ids, row.trained_from, ((0, 0),)))
        for row in rows
    ]


def trained(student, kind, small, folder, **changes):
    folder.mkdir(exist_ok=True)
    return loop.fit(
        student,
        rows=rows_for(kind),
        validation=rows_of(6, seed=9),
        objective=objective_of(kind, small),
        settings=replace(SETTINGS, learning_rate=1e-3, **changes),
        training=Training(seen_tokens=900, seed=4, workdir=folder, stop_after_steps=5),
    )


KINDS = [
    "labels",
    "tags",
    "live",
    "cached",
    "several",
    "auto",
    "entropy",
    "random",
    "hidden",
    "attention",
    "uld",
]


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_two_micro_batches_waits_for_its_device_once(
    small, tmp_path, kind, in_parts, waits_of_steps, monkeypatch
):
    """Also in the step that asks for the norms, the first; `auto` weighs its terms before it."""
    if in_parts:
        monkeypatch.setattr(preparation, "positions_of_a_part", lambda vocabulary: 5)
    trained(small("Llama"), kind, small, tmp_path / "a")
    is_auto = any(term.weight == "auto" for term in objective_of(kind, small).terms)
    first, *later = waits_of_steps
    assert first == ["tolist"] * (2 if is_auto else 1)
    assert len(later) == 4 and all(seen == ["tolist"] for seen in later)


@pytest.mark.parametrize("start", ["float", "packed"])
def test_a_step_of_adapters_waits_for_its_device_once(
    small, compress, tmp_path, start, waits_of_steps
):
    pytest.importorskip("peft")
    from methods.training.lora import add_adapters

    student = small("Llama") if start == "float" else open_model(compress("int4")[0])
    add_adapters(student.model, rank=2, alpha=4, seed=1, label="x")
    trained(student, "cached", small, tmp_path / "a")
    assert waits_of_steps == [["tolist"]] * 5


def test_a_step_in_bf16_waits_for_its_device_once(small, tmp_path, waits_of_steps):
    pytest.importorskip("torchao")
    student = small("Llama")
    student.model.bfloat16()
    trained(student, "cached", small, tmp_path / "a", optimizer="adamw-8bit")
    first, *later = waits_of_steps
    assert later == [["tolist"]] * 4
    assert set(first) == {"tolist"}  # it makes the moments, and the library their tables from lists


def test_what_waits_for_a_device_is_seen(small, tmp_path, waits_of_steps, monkeypatch):
    """The counter can fail: transformers asks every batch's mask whether it has padding."""
    monkeypatch.setattr(row_attention, "packs_by_default", lambda device: False)
    trained(small("Llama"), "labels", small, tmp_path / "a")
    assert all(seen.count("_local_scalar_dense") >= 2 for seen in waits_of_steps)
    with Waits() as waits:
        values = torch.arange(4.0)
        values[values > 1]
        float(values.sum())
        values.nonzero()
    assert waits.seen == ["index by a mask", "_local_scalar_dense", "nonzero"]


@pytest.mark.parametrize("kind", KINDS)
def test_waiting_once_writes_the_numbers_that_were_read_one_by_one(
    small, tmp_path, kind, monkeypatch
):
    """To the last digit: sums of micro-batches are added on the processor, as they were."""
    trained(small("Llama"), kind, small, tmp_path / "once")
    readings = StepReadings.read_with

    def read_one_by_one(self, *others):
        values, numbers = readings(self, *others)
        means = dict.fromkeys(self._names, 0.0)
        for name, value in self._sums:
            means[name] += float(value)
        assert means == values.means and numbers == [float(other) for other in others]
        for name, norm in self._norms.items():
            number = 0.0 if norm.norm is None else float(norm.norm) / norm.share
            assert values.norms[name] == norm.weight * number
        return values, numbers

    monkeypatch.setattr(StepReadings, "read_with", read_one_by_one)
    trained(small("Llama"), kind, small, tmp_path / "one-by-one")
    logs = [
        (tmp_path / name / "training.jsonl").read_text(encoding="utf-8")
        for name in ("once", "one-by-one")
    ]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) >= 6


def test_a_step_that_diverges_moves_no_weight(small, tmp_path):
    """The values are read before the optimizer's step, so nothing is to be taken back."""
    student = small("Llama")
    bad = Term("odd", 1.0, lambda at: at.student_NV.float().sum(-1) * float("nan"))
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    with pytest.raises(Exception, match="the term odd became nan at step 1"):
        loop.fit(
            student,
            rows=rows_of(8),
            validation=rows_of(2, seed=9),
            objective=Objective(terms=[hard_labels(), bad]),
            settings=replace(SETTINGS, warmup_ratio=0.0),
            training=Training(seen_tokens=300, seed=4, workdir=tmp_path),
        )
    after = student.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    lines = (tmp_path / "training.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0]  # the validation before it


def test_readings_are_added_up_by_hand():
    readings = StepReadings(["a", "b"])
    assert not readings.has_norms
    readings.add({"a": torch.tensor(0.5), "b": torch.tensor(2.0, requires_grad=True)})
    readings.add_norms({"a": GradientNorm(torch.tensor(3.0), 0.5), "b": GradientNorm(None)})
    readings.add_norms({"a": GradientNorm(torch.tensor(9.0))})  # of a later micro-batch
    readings.add({"a": torch.tensor(0.25)})
    values, others = readings.read_with(torch.tensor(7.0), torch.tensor(8.0))
    assert values == ({"a": 0.75, "b": 2.0}, {"a": 6.0, "b": 0.0}) and others == [7.0, 8.0]
    assert (readings.means, readings.norms) == tuple(values)


def test_validation_reads_all_its_losses_at_once(random_model):
    model, rows = open_model(random_model).model, rows_of(9)
    options = {"head": TrainedPositionLogits(model), "pad_id": 1, "device": "cpu"}
    attention = row_attention.RowAttention(model, pack=True)
    with Waits() as waits:
        at_once = mean_cross_entropy(rows, micro_batch_size=2, **options)
    assert waits.seen == []
    attention.close()
    alone = [mean_cross_entropy([row], micro_batch_size=1, **options) for row in rows]
    total = sum(loss * row.trained_tokens for loss, row in zip(alone, rows, strict=True))
    assert at_once == pytest.approx(total / sum(row.trained_tokens for row in rows), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_a_gpu_waits_once(small, tmp_path, kind, monkeypatch):
    """What CUDA itself says of its waiting, after steps that made its memory."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    advance, counts = loop._TrainingRun._advance, []

    def counted(run, step, rows):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            advance(run, step, rows)
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in said))

    def on_gpu(name, **changes):
        opened = small(name, **changes)
        opened.model.to("cuda")
        return replace(opened, device="cuda")

    monkeypatch.setattr(loop._TrainingRun, "_advance", counted)
    monkeypatch.setattr(states, "SECONDS_BETWEEN_STATES", 1e9)
    trained(on_gpu("Llama"), kind, on_gpu, tmp_path / "a")
    assert all(count <= 1 for count in counts[2:4])
