"""Packed rows are padded rows: losses, gradients and whole trainings, wherever they are used."""

import json
from dataclasses import replace

import pytest
import torch
from distilling import SETTINGS, rows_of, train
from families import FAMILIES, random_family

from harness.errors import CellFailed
from harness.models.logit_tail import logit_tail_of
from methods.training import layouts
from methods.training import rows as training_rows
from methods.training.chunked_logits import ChunkedLoss
from methods.training.losses import forward_kl, jensen_shannon
from methods.training.row_attention import ATTENTION_NAME, RowAttention, layout_of, padding_of
from methods.training.rows import TeacherTokens, TokenRow, batch_of
from methods.training.selection import Selection
from methods.training.stepper import Stepper
from methods.training.taps import InnerStates, TapConfig
from methods.training.teachers import CrossTokenizerTeacher, LiveTeacher, TrainedPositionLogits
from methods.training.terms import Objective, Term, hard_labels
from methods.uld import aligned_positions, uld_values

KD = [
    Term("kl", 0.5, lambda at: forward_kl(at.student_NV, at.teacher_NV, temperature=2.0)),
    hard_labels(0.5),
]
JSD = [Term("jsd", 1.0, lambda at: jensen_shannon(at.student_NV, at.teacher_NV, beta=0.3))]
FEATURE = Term("feature", 0.7, lambda at: at.inner_states.hidden_state_distance(at))
# what is known to pack: a family that fell out of it would be padded without a word
PACKED = (
    "Llama",
    "Llama, biases",
    "Qwen2",
    "Qwen3",
    "Gemma",
    "Phi",
    "Phi-3",
    "OLMo",
    "Cohere",
    "Granite",
    "GPT-2",
    "GPT-NeoX",
    "Mixtral",
    "Qwen3-MoE",
)
# layers that carry a state from token to token, or windows
PADDED = ("Mistral", "Gemma 2", "Mamba", "RWKV", "LFM2", "Qwen3-Next", "Bamba", "RecurrentGemma")


def stepped(model, rows, teacher=None, *, pack, terms=None, in_parts=False, config=None, **aim):
    """Make a step's backward pass with packed or padded rows; return its values and gradient."""
    model.zero_grad()
    objective = Objective(
        terms=terms or [hard_labels()], sources=[teacher] if teacher else (), **aim
    )
    models = [model, *([teacher.model] if teacher else [])]
    attentions = [RowAttention(each, pack=True) for each in models] if pack else []
    assert not any(attention.refusal for attention in attentions)
    inside = InnerStates(_Opened(model), teacher.model, config) if config else None
    chunked = ChunkedLoss(model.get_output_embeddings(), logit_tail_of(model), 7)
    stepper = Stepper(
        model,
        TrainedPositionLogits(model),
        objective,
        4,
        1,
        inner_states=inside,
        chunked=chunked if in_parts else None,
    )
    weights = {term.name: term.weight for term in objective.terms}
    values = stepper.backward(
        rows, weights=weights, backward=lambda loss: loss.backward(), norms=True, step=3
    )
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    stepper.head.close()
    for closable in (*attentions, *([inside] if inside else [])):
        closable.close()
    return values, gradient


class _Opened:
    """What `InnerStates` asks a student for."""

    def __init__(self, model):
        self.model, self.device = model, "cpu"


def assert_same(packed, padded):
    assert packed[0].means == pytest.approx(padded[0].means, rel=1e-5)
    assert packed[0].norms == pytest.approx(padded[0].norms, rel=1e-5)
    scale = max(1.0, float(padded[1].abs().max()))
    assert torch.allclose(packed[1], padded[1], rtol=0, atol=1e-5 * scale)
    assert float(padded[1].abs().max()) > 1e-4


def tagged(rows):
    return [replace(row, tag=index % 2) for index, row in enumerate(rows)]


@pytest.mark.parametrize(
    "kind", ["labels", "kl", "jsd", "parts", "tags", "entropy", "random", "hidden", "narrow"]
)
@pytest.mark.parametrize("model_kind", ["Llama", "GPTNeoX"])
def test_losses_norms_and_gradients_of_packed_rows_are_those_of_padded_ones(
    small, kind, model_kind
):
    model, teacher = small(model_kind).model, LiveTeacher(small(model_kind, hidden_size=64))
    options = {
        "labels": {},
        "kl": {"teacher": teacher, "terms": KD},
        "jsd": {"teacher": teacher, "terms": JSD},
        "parts": {"teacher": teacher, "terms": KD, "in_parts": True},
        "tags": {"terms": [hard_labels(0.4, tag=0), hard_labels(0.6, tag=1)]},
        "entropy": {"teacher": teacher, "terms": KD, "selection": Selection(0.4, "entropy", 1)},
        "random": {"selection": Selection(0.4, "random", 1)},
        "hidden": {
            "teacher": LiveTeacher(small(model_kind)),
            "terms": [FEATURE, hard_labels()],
            "config": TapConfig(hidden_layers="auto"),
        },
        "narrow": {"teacher": teacher, "terms": KD, "vocabulary": 700},
    }[kind]
    if kind == "hidden":
        with torch.no_grad():
            for parameter in options["teacher"].model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    rows = tagged(rows_of(10))
    assert_same(
        stepped(model, rows, pack=True, **options), stepped(model, rows, pack=False, **options)
    )


def test_a_teacher_with_another_tokenizer_reads_its_own_rows_packed(small):
    model = small("Llama").model
    rows = [
        replace(
            row,
            teacher_tokens=TeacherTokens((5, *row.ids), row.trained_from + 1, ((0, 0), (1, 1))),
        )
        for row in rows_of(6, shortest=8)
        if row.trained_tokens > 2
    ]
    options = {
        "teacher": CrossTokenizerTeacher(small("Llama", hidden_size=64)),
        "terms": [hard_labels(), Term("uld", 1.5, uld_values, counts=aligned_positions)],
    }
    assert_same(
        stepped(model, rows, pack=True, **options), stepped(model, rows, pack=False, **options)
    )


def test_a_packed_row_says_what_the_plain_model_says_of_it_alone(small):
    model = small("Llama").model
    rows = rows_of(5)
    attention = RowAttention(model, pack=True)
    packed = layout_of(model, batch_of(rows, 1))
    assert packed.ids.shape == (1, sum(len(row.ids) for row in rows))
    logits = model(input_ids=packed.ids, **packed.inputs).logits[0]
    attention.close()
    start = 0
    for row in rows:
        alone = model(input_ids=torch.tensor([row.ids])).logits[0]
        assert torch.allclose(logits[start : start + len(row.ids)], alone, atol=1e-5)
        start += len(row.ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_packs_its_rows_rightly_or_keeps_padded_ones(family):
    """Whatever its layers are: logits at trained positions are those of padded rows."""
    model = random_family(family)
    rows = [replace(row, ids=tuple(3 + token % 900 for token in row.ids)) for row in rows_of(5)]
    batch = batch_of(rows, 1)
    head = TrainedPositionLogits(model)
    implementation = model.config.get_text_config()._attn_implementation
    with torch.no_grad():
        expected = head(batch)
        attention = RowAttention(model, pack=True)
        logits = head(batch)
        packs = layout_of(model, batch).ids.shape[0] == 1
        attention.close()
        afterwards = head(batch)
    scale = float(expected.abs().max())
    assert torch.allclose(logits, expected, rtol=0, atol=1e-4 * scale)
    assert packs == (not attention.refusal)
    assert packs >= (family in PACKED) and packs <= (family not in PADDED), attention.refusal
    assert torch.equal(afterwards, expected)
    assert model.config.get_text_config()._attn_implementation == implementation


@pytest.mark.parametrize("rows", [rows_of(4), [TokenRow((5, 6, 7, 8), 1)] * 3])
@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Gemma 3", "Mistral"])
def test_padded_rows_under_our_attention_have_the_same_bytes(family, rows):
    """Padding or none, windows or none: our mask is that of the model's own attention."""
    model, batch = random_family(family), batch_of(rows, 1)
    head = TrainedPositionLogits(model)
    expected = head(batch)
    attention = RowAttention(model, pack=False)
    config = model.config.get_text_config()
    assert config._attn_implementation == ATTENTION_NAME and not attention.refusal
    assert torch.equal(head(batch), expected)
    attention.close()


def test_without_a_word_of_padding_our_mask_is_the_models_own(small):
    """A sampler that pads on the left asks for no layout."""
    model = small("Llama").model
    ids, mask = torch.tensor([[1, 1, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1] * 4])
    expected = model(input_ids=ids, attention_mask=mask).logits
    attention = RowAttention(model, pack=True)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    attention.close()


def test_a_model_that_says_nothing_of_a_window_but_attends_to_one_is_refused(small, monkeypatch):
    model = small("Mistral", sliding_window=8).model
    monkeypatch.setattr(model.config, "use_sliding_window", False, raising=False)
    attention = RowAttention(model, pack=True)
    assert attention.refusal == "its attention uses sliding_window"
    attention.close()


def test_widths_that_are_rounded_change_nothing(small, monkeypatch):
    """What a GPU gets, on a CPU."""
    model, rows = small("Llama").model, rows_of(9)
    plain = stepped(model, rows, pack=False)

    original = layouts.rounded_width
    for module in (layouts, training_rows):
        monkeypatch.setattr(
            module,
            "rounded_width",
            lambda width, device, most=None: original(width, "cuda", most=most),
        )
    assert batch_of(rows, 1).ids.shape[1] == 64
    assert_same(stepped(model, rows, pack=False), plain)
    assert_same(stepped(model, rows, pack=True), plain)


# whole trainings


@pytest.mark.parametrize("taps", [None, TapConfig(hidden_layers="auto")])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_on_packed_rows_is_that_on_padded_rows(small, tmp_path, taps, recompute):
    """Projections, validation, auto weights and norms among it."""

    def trained(packing):
        settings = replace(
            SETTINGS, packing=packing, gradient_checkpointing=recompute, learning_rate=1e-3
        )
        student = small("Llama")
        weights, spent = train(
            student,
            small("Llama", hidden_size=64),
            tmp_path / packing,
            taps=taps,
            settings=settings,
        )
        assert student.model.config._attn_implementation == "sdpa"
        lines = (tmp_path / packing / "training.jsonl").read_text().splitlines()
        return weights, spent, [json.loads(line) for line in lines]

    start = small("Llama").model.state_dict()
    padded_weights, padded, padded_log = trained("off")
    packed_weights, packed, packed_log = trained("on")
    assert packed.start_ce == pytest.approx(padded.start_ce, rel=1e-5)
    assert packed.best == pytest.approx(padded.best, rel=1e-4)
    for name, tensor in padded_weights.items():
        difference, update = packed_weights[name] - tensor, tensor - start[name]
        assert difference.norm() <= 1e-3 * update.norm(), name
    for packed_line, padded_line in zip(packed_log, padded_log, strict=True):
        assert packed_line.keys() == padded_line.keys()
        assert list(packed_line.values()) == pytest.approx(list(padded_line.values()), rel=1e-3)


def test_rows_are_packed_by_default_on_a_gpu_alone(small, tmp_path):
    widths = []
    student = small("Llama")
    student.model.register_forward_pre_hook(
        lambda module, arguments, named: widths.append(named["input_ids"].shape[0]),
        with_kwargs=True,
    )
    train(student, None, tmp_path / "a", terms=[hard_labels()], stop=2)
    assert set(widths[-4:]) == {2}  # micro-batches of two rows
    widths.clear()
    settings = replace(SETTINGS, packing="on")
    train(student, None, tmp_path / "b", terms=[hard_labels()], stop=2, settings=settings)
    assert set(widths[-4:]) == {1}


@pytest.mark.parametrize(
    ("kind", "taps", "reason"),
    [
        ("Mistral", None, r"its attention slides over a window of 8 tokens"),
        ("Llama", TapConfig(attention_layers="auto"), "attention is compared of padded rows"),
    ],
)
def test_rows_that_cannot_be_packed_are_refused_where_they_must_be(
    small, tmp_path, kind, taps, reason
):
    changes = {"sliding_window": 8} if kind == "Mistral" else {}
    student = small(kind, **changes)
    settings = replace(SETTINGS, packing="on")
    with pytest.raises(CellFailed, match=rf"packing=on: .*{reason}.*packing=auto"):
        train(student, small(kind), tmp_path / "a", taps=taps, settings=settings)
    assert student.model.config._attn_implementation == "sdpa"


@pytest.mark.gpu
def test_packed_rows_on_a_gpu_are_padded_rows(small):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    opened = small("Llama")
    model, rows = opened.model.to("cuda"), rows_of(9)
    batch = batch_of(rows, 1, "cuda")
    head = TrainedPositionLogits(model)
    with torch.no_grad():
        expected = head(batch)
        attention = RowAttention(model, pack=True)
        layout = layout_of(model, batch)
        assert layout.ids.shape[0] == 1 and layout.ids.shape[1] % 64 == 0
        with padding_of(layout):
            assert torch.allclose(head(batch), expected, atol=1e-4)
    attention.close()
