"""Factors: the law of what is lost, the full rank, ranks and their allocation, and what is
refused.
"""

import json

import pytest
import torch

from harness.errors import CellFailed
from harness.models.language_model import open_model
from harness.registry import Registry
from methods import METHODS
from methods.lowrank import break_even_rank, decompose, factorize, rank_for_share, ranks_by_energy


def layer(outputs, inputs, seed=1):
    torch.manual_seed(seed)
    return torch.nn.Linear(inputs, outputs, bias=False)


def moments(width, seed=2, tokens=300):
    torch.manual_seed(seed)
    x = torch.randn(tokens, width) @ torch.randn(width, width)
    return x, x.T @ x


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_what_is_lost_on_the_inputs_is_the_dropped_energy_and_plain_svd_never_loses_less(rank):
    w = torch.randn(16, 12, dtype=torch.float64)
    x, gram = moments(12)
    x = x.double()
    _, values, _, _ = decompose(w, gram, jitter=1e-4)
    up, down = factorize(w, rank, gram)
    lost = float((x @ (w - up @ down).T).square().sum())
    assert lost == pytest.approx(float(values[rank:].square().sum()), rel=1e-3)
    plain_up, plain_down = factorize(w, rank)
    assert lost <= float((x @ (w - plain_up @ plain_down).T).square().sum()) * (1 + 1e-6)
    plain = decompose(w, None, jitter=1e-4)[1]
    assert float((w - plain_up @ plain_down).square().sum()) == pytest.approx(
        float(plain[rank:].square().sum()), rel=1e-6
    )


@pytest.mark.parametrize("whitened", [True, False])
def test_the_full_rank_is_the_matrix(whitened):
    w = torch.randn(10, 14)
    up, down = factorize(w, 10, moments(14)[1] if whitened else None)
    assert torch.allclose(up @ down, w, atol=1e-4)


def lost_on(x, w, factors):
    """Return what factors lose on inputs, as a share of the output's energy."""
    up, down = factors
    x, w = x.double().cpu(), w.double().cpu()
    gap = w - (up.double() @ down.double()).cpu()
    return float((x @ gap.T).square().sum() / (x @ w.T).square().sum())


def test_single_precision_as_on_a_gpu_loses_no_more_than_double(monkeypatch):
    from methods import lowrank

    assert lowrank.svd_dtype("cuda") == torch.float32 and lowrank.svd_dtype("cpu") == torch.float64
    w = torch.randn(96, 64)
    x, gram = moments(64)
    for rank in (8, 32, 60):
        double = lost_on(x, w, factorize(w, rank, gram))
        with monkeypatch.context() as patch:
            patch.setattr(lowrank, "svd_dtype", lambda device: torch.float32)
            single = lost_on(x, w, factorize(w, rank, gram))
        assert single == pytest.approx(double, rel=1e-3, abs=1e-9) and single != double


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_loses_no_more_than_the_cpu():
    w = torch.randn(512, 384)
    x, gram = moments(384, tokens=2_000)
    for rank in (16, 128, 300):
        on_cpu = lost_on(x, w, factorize(w, rank, gram))
        on_gpu = lost_on(x, w, factorize(w.cuda(), rank, gram.cuda()))
        assert on_gpu == pytest.approx(on_cpu, rel=1e-3, abs=1e-9)


def test_inputs_that_span_too_little_still_factorise():
    w = torch.randn(6, 8)
    x = torch.randn(3, 8)  # fewer tokens than inputs: no Cholesky factor without jitter
    up, down = factorize(w, 3, x.T @ x)
    # three tokens need three directions
    assert torch.isfinite(up).all() and torch.allclose(x @ (up @ down).T, x @ w.T, atol=1e-2)


def test_ranks_by_hand():
    assert rank_for_share(layer(128, 384), 0.8) == int(0.8 * 128 * 384 / 512) == 76
    assert break_even_rank(layer(128, 128)) == 64 and break_even_rank(layer(3, 2)) == 2


def test_energy_gives_ranks_where_it_is_and_keeps_the_total():
    layers = {"flat": layer(32, 32), "steep": layer(32, 32)}
    spectra = {"flat": torch.ones(32), "steep": 0.5 ** torch.arange(32.0)}
    ranks = ranks_by_energy(spectra, layers, 0.5)
    assert ranks["flat"] > ranks["steep"] >= 1
    assert 64 * sum(ranks.values()) <= 0.5 * 2 * 32 * 32


@pytest.mark.slow
def test_a_student_opens_again_packs_and_trains_and_holds_what_it_says(compress, tiny):
    student, notes = compress("lowrank", {"keep": 0.6})
    # keys and values stay whole
    assert notes["matrices"] == 40 and notes["kept_of_them"] == pytest.approx(0.6, abs=0.02)
    opened = open_model(student)
    projection = opened.model.model.layers[2].mlp.gate_proj
    assert projection.weight.shape == (57, 128) and projection.up.weight.shape == (384, 57)
    trained, _ = compress("response", base=student)
    assert open_model(trained).model.model.layers[2].mlp.gate_proj.up.weight.shape == (384, 57)
    packed, notes = compress("int8", base=trained)
    assert notes["packed_layers"] == 96  # both factors of 40, and 16 whole ones
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        gap = (
            (open_model(packed).model(ids).logits - open_model(trained).model(ids).logits)
            .abs()
            .max()
        )
    assert gap < 1.0


def test_a_student_answers_as_its_teacher_with_the_products_in_place_of_the_matrices(
    compress, tiny
):
    """What reopens is compared number by number with plain layers that hold up x down, read from
    the file alone.
    """
    from safetensors.torch import load_file

    student, _ = compress("lowrank", {"keep": 0.6})
    plain, teacher_model = open_model(tiny).model, load_file(student.path / "model.safetensors")
    for name, tensor in teacher_model.items():
        if name.endswith(".up.weight"):
            owner = name.removesuffix(".up.weight")
            plain.get_submodule(owner).weight.data = (
                tensor.float() @ teacher_model[f"{owner}.weight"].float()
            )
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        assert torch.allclose(open_model(student).model(ids).logits, plain(ids).logits, atol=2e-4)


@pytest.mark.slow
def test_the_control_of_ranks_by_energy_has_the_same_ranks(compress):
    given = {
        "keep": 0.6,
        "allocation": "energy",
        "num_calibration_samples": 8,
        "max_seq_length": 64,
    }
    ranks = []
    handed = Registry("method", METHODS).build("lowrank", given).control_settings()
    assert {name: handed[name] for name in given} == given
    for name, settings in (("lowrank", given), ("lowrank-plain", handed)):
        student, _ = compress(name, settings)
        modules = json.loads((student.path / "config.json").read_text())["quantization_config"][
            "modules"
        ]
        ranks.append(
            {name: spec["shape"][0] for name, spec in modules.items() if spec.get("factors")}
        )
    assert ranks[0] == ranks[1] and len(set(ranks[0].values())) > 5


def test_nothing_left_to_factorise_is_said_so(compress):
    with pytest.raises(CellFailed, match="no matrix is left to factorise"):
        compress("lowrank", {"ignore": ["*.q_proj", "*.o_proj", "*.mlp"]})


def test_a_rank_that_saves_nothing_is_refused_with_the_largest_that_does(compress):
    with pytest.raises(
        CellFailed,
        match=r"rank 64 saves nothing in model\.layers\.0\.self_attn\.q_proj \(128 x 128\); give "
        r"at most 63",
    ):
        compress("lowrank", {"rank": 64})
