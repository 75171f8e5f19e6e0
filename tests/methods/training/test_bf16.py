"""Training in bf16: bytes, rounding that is right on average, zeros, resumed runs, refusals."""

import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
from distilling import SETTINGS, rows_of

from harness.errors import CellFailed, Skipped
from harness.models.language_model import open_model
from methods.masks import mark_pruned
from methods.response import ResponseDistillation
from methods.training import bf16, preparation
from methods.training.bf16 import adamw_8bit, can_compile, refuse_bf16_training
from methods.training.loop import fit
from methods.training.optimizer import Optimizers, make_optimizers
from methods.training.settings import Training
from methods.training.terms import Objective, hard_labels

IN_BF16 = replace(SETTINGS, optimizer="adamw-8bit")


@pytest.fixture(scope="module")
def torchao():
    return pytest.importorskip("torchao")


def optimizer_of(weights, rate=1e-3, decay=0.0):
    group = {"params": weights, "weight_decay": decay}
    return adamw_8bit([group], rate=rate, betas=(0.9, 0.95), device="cpu")


def constant_steps(optimizer, weight, gradient, count):
    for _ in range(count):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()


def trained(random_model, folder, *, dtype="bfloat16", settings=IN_BF16, change=None, **options):
    """Train a model on its labels; return it and what it cost."""
    folder.mkdir(exist_ok=True)
    student = open_model(random_model, dtype=dtype)
    if change:
        change(student.model)
    training = Training(**{"seen_tokens": 900, "seed": 4, "workdir": folder, **options})
    spent = fit(
        student,
        rows=rows_of(24),
        validation=rows_of(6, seed=9),
        objective=Objective(terms=[hard_labels()], sources=[]),
        settings=settings,
        training=training,
    )
    return student.model, spent


def test_a_weight_takes_six_bytes_with_its_gradient_and_its_moments(torchao):
    model = torch.nn.Sequential(torch.nn.Linear(256, 512, bias=False)).to(torch.bfloat16)
    weight = model[0].weight
    optimizer = optimizer_of([weight])
    constant_steps(optimizer, weight, 0.01, 2)
    state = optimizer.state[weight]
    tensors = [weight, weight.grad]
    for name in ("exp_avg", "exp_avg_sq"):
        assert state[name].codes.dtype == torch.uint8
        tensors += [state[name].codes, state[name].scale]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    declared = ResponseDistillation(recipe="bf16").training_bytes_per_weight
    assert held == declared * weight.numel() and 6 <= declared < 6.1


def test_steps_below_half_a_bf16_step_move_weights_by_their_mean(torchao):
    """A constant gradient moves Adam by the rate a step; torch's own AdamW in bf16 stands still."""
    rate, steps = 2e-4, 200  # bf16 numbers below 1 are 2^-8 apart: a step is a twentieth of that
    torch.manual_seed(1)
    stochastic = torch.nn.Parameter(torch.full((64, 256), 0.75, dtype=torch.bfloat16))
    constant_steps(optimizer_of([stochastic], rate=rate), stochastic, 0.5, steps)
    nearest = torch.nn.Parameter(torch.full((64, 256), 0.75, dtype=torch.bfloat16))
    plain = torch.optim.AdamW([nearest], lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    constant_steps(plain, nearest, 0.5, steps)
    assert (nearest == 0.75).all()
    moved = float((0.75 - stochastic.detach().float()).mean())
    assert moved == pytest.approx(rate * steps, rel=0.02)  # 16,384 weights: a spread of 0.4 %


def test_weights_of_a_pruned_student_stay_zero(torchao, random_model, tmp_path):
    def prune(model):
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for layer in model.model.layers:
                weight = layer.mlp.up_proj.weight
                weight.mul_(torch.rand(weight.shape, generator=draw) > 0.5)
        mark_pruned(model.config)

    start = open_model(random_model, dtype="bfloat16").model
    prune(start)
    model, _ = trained(random_model, tmp_path / "pruned", change=prune)
    for before, after in zip(start.model.layers, model.model.layers, strict=True):
        zeros = before.mlp.up_proj.weight == 0
        assert (after.mlp.up_proj.weight[zeros] == 0).all()
        assert not torch.equal(before.mlp.up_proj.weight, after.mlp.up_proj.weight)


@pytest.mark.parametrize("stop", [1, 7])
def test_a_stopped_run_goes_on_to_the_same_bytes(torchao, random_model, tmp_path, stop):
    """Moments in 8 bits come back from the state, and so does the state of the random draws."""
    whole, spent = trained(random_model, tmp_path / "whole")
    trained(random_model, tmp_path / "parts", stop_after_steps=stop)
    torch.manual_seed(99)  # another process begins with other draws
    again, resumed = trained(random_model, tmp_path / "parts")
    assert (resumed.step, resumed.best) == (spent.step, spent.best)
    for name, tensor in whole.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(again.state_dict()[name], tensor)
    logs = [(tmp_path / name / "training.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("shape", [(40, 384), (64, 256), (8, 6, 256), (2048, 8)])
def test_a_step_in_slices_has_the_moments_of_a_step_of_the_whole(torchao, shape, monkeypatch):
    """Weights differ by one rounding up or down at most: only the draws are others."""

    def after_three_steps(size):
        monkeypatch.setattr(bf16, "_SLICE", size)
        draw = torch.Generator().manual_seed(5)
        weight = torch.nn.Parameter(torch.randn(shape, generator=draw).bfloat16())
        optimizer = optimizer_of([weight], rate=1e-2, decay=0.1)
        for _ in range(3):
            weight.grad = torch.randn(shape, generator=draw).bfloat16()
            optimizer.step()
            optimizer.zero_grad()
            assert weight.grad is None
        return weight.detach(), optimizer

    weight, at_once = after_three_steps(2**22)
    cut_weight, in_slices = after_three_steps(8_192)
    assert len(at_once.state) == 1 and len(in_slices.state) > 1
    for name in ("exp_avg", "exp_avg_sq"):
        [expected] = (state[name].dequantize().flatten() for state in at_once.state.values())
        pieces = [state[name].dequantize().flatten() for state in in_slices.state.values()]
        assert torch.equal(torch.cat(pieces), expected)
    difference = weight.float() - cut_weight.float()
    # a bf16 number has 8 bits, and the three steps move a weight by 0.03 at most
    assert (difference.abs() <= 3 * 2**-7 * (weight.float().abs() + 0.03)).all()
    assert float(difference.abs().mean()) > 0 and float(difference.mean().abs()) < 2e-4


def test_another_seed_rounds_otherwise(torchao, random_model, tmp_path):
    first, _ = trained(random_model, tmp_path / "a", stop_after_steps=1)
    torch.manual_seed(0)
    same, _ = trained(random_model, tmp_path / "b", stop_after_steps=1)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[weight], same.state_dict()[weight])
    optimizers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        moved = torch.nn.Parameter(torch.full((16, 256), 0.75, dtype=torch.bfloat16))
        constant_steps(optimizer_of([moved]), moved, 0.5, 3)
        optimizers.append(moved.detach())
    assert not torch.equal(*optimizers)


def test_it_learns_what_float32_learns(torchao, random_model, tmp_path):
    in_float, plain = trained(
        random_model, tmp_path / "float", dtype="float32", settings=SETTINGS, seen_tokens=3_000
    )
    in_bf16, spent = trained(random_model, tmp_path / "bf16", seen_tokens=3_000)
    assert plain.start_ce - plain.terms["ce"].last > 1.0  # it learnt its rows
    assert spent.start_ce == pytest.approx(plain.start_ce, rel=2e-3)
    assert spent.terms["ce"].last == pytest.approx(plain.terms["ce"].last, rel=0.1)
    assert {p.dtype for p in in_bf16.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in in_float.parameters()} == {torch.float32}


def test_logits_in_parts_train_what_all_at_once_train(torchao, random_model, tmp_path, monkeypatch):
    """Parts are added up in bf16, so that they are equal to its rounding and no better."""
    _, at_once = trained(random_model, tmp_path / "once")
    monkeypatch.setattr(preparation, "positions_of_a_part", lambda vocabulary: 5)
    _, in_parts = trained(random_model, tmp_path / "parts")
    assert in_parts.best == pytest.approx(at_once.best, rel=5e-3)


def test_it_learns_what_full_training_learns(torchao, random_model, tmp_path):
    _, in_bf16 = trained(random_model, tmp_path / "bf16")
    settings = replace(IN_BF16, optimizer="adamw")
    _, full = trained(random_model, tmp_path / "full", dtype="float32", settings=settings)
    learnt = full.start_ce - full.best
    assert learnt > 0.02 and in_bf16.start_ce - in_bf16.best > 0.8 * learnt


def test_the_rate_of_a_step_reaches_an_optimizer_that_takes_tensors_only(torchao):
    weight = torch.nn.Parameter(torch.ones(4, 256, dtype=torch.bfloat16))
    optimizer = optimizer_of([weight])
    rate = optimizer.param_groups[0]["lr"]
    Optimizers([optimizer], [0.5]).set_rate(0.3)
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(0.15)


def test_full_training_keeps_torchs_own_optimizer(random_model):
    [(optimizer, share)] = make_optimizers(open_model(random_model).model, SETTINGS)
    assert type(optimizer) is torch.optim.AdamW and share == 1.0
    settings = [
        ResponseDistillation(recipe=recipe).loop_settings(10**7, scratch=False)
        for recipe in ("full", "lora", "bf16")
    ]
    assert [setting.optimizer for setting in settings] == ["adamw", "adamw", "adamw-8bit"]
    assert settings[0].learning_rate == settings[2].learning_rate


def test_nothing_is_compiled_on_a_cpu_nor_without_a_compiler(monkeypatch):
    monkeypatch.setattr(bf16, "find_spec", lambda name: object())
    assert not can_compile("cpu")
    monkeypatch.setenv("CC", "cc")
    assert can_compile("cuda")
    monkeypatch.delenv("CC")
    monkeypatch.setattr(bf16.shutil, "which", lambda name: None)
    assert not can_compile("cuda:0")
    monkeypatch.setattr(bf16, "find_spec", lambda name: None)
    monkeypatch.setenv("CC", "cc")
    assert not can_compile("cuda")


def test_a_missing_torchao_is_skipped_with_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(Skipped, match=r"^x: torchao .*pip install 'compression-harness\[bf16\]'$"):
        refuse_bf16_training("cpu", "x")


def test_a_card_without_bf16_is_refused_by_its_name(torchao, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(CellFailed, match=r"^x: Tesla T4 has no bf16; use recipe=full or .*lora$"):
        refuse_bf16_training("cuda", "x")
    refuse_bf16_training("cpu", "x")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_compiled_step_on_a_card_does_what_the_eager_one_does(torchao, monkeypatch):
    weights = torch.nn.Parameter(torch.full((64, 256), 0.75, dtype=torch.bfloat16, device="cuda"))
    moved = []
    for compiled in (True, False):
        monkeypatch.setattr(bf16, "can_compile", lambda device, answer=compiled: answer)
        weight = torch.nn.Parameter(copy.deepcopy(weights.detach()))
        optimizer = adamw_8bit([{"params": [weight]}], rate=2e-4, betas=(0.9, 0.95), device="cuda")
        constant_steps(optimizer, weight, 0.5, 100)
        moved.append(float((0.75 - weight.detach().float()).mean()))
    assert moved[0] == pytest.approx(moved[1], rel=0.05)
    assert json.dumps(bf16.optimizer_notes("cuda"))
