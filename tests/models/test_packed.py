"""Packed weights: formulas by hand, packing and its inverse, kernels against what they stand for,
and what a checkpoint promises.
"""

import json

import pytest
import torch

from harness.models.packed import (
    Int4Linear,
    Int8DynamicLinear,
    Int8Embedding,
    Int8Linear,
    TiedHead,
    WrongDevice,
    pack_nibbles,
    packed_module,
    unpack_nibbles,
)
from methods.compression.rounding import (
    inverse_cholesky,
    packed_layer,
    round_to_nearest,
    round_with_gptq,
)


def filled(spec, tensors, name="m"):
    """Return the module of a spec with its tensors in it."""
    module = packed_module(spec, torch.float32)
    with torch.no_grad():
        for leaf, tensor in tensors.items():
            getattr(module, leaf.removeprefix(f"{name}.")).copy_(tensor)
    return module


def test_nibbles_come_back_in_order_and_an_odd_column_is_filled_up():
    codes = torch.tensor([[1, 15, 0, 7, 9], [8, 8, 2, 3, 4]])
    both = pack_nibbles(codes)
    assert both.shape == (2, 3) and both[0, 0] == 1 + (15 << 4) and both[0, 2] == 9
    assert unpack_nibbles(both, 5).equal(codes.to(torch.uint8))


def test_int8_by_hand():
    rounded = round_to_nearest(torch.tensor([[1.27, -0.635, 0.0], [0.0, 0.0, 0.0]]), bits=8)
    scale = float(torch.tensor(0.01).bfloat16())  # 1.27 / 127, rounded before the weights are
    assert float(rounded.scale[0, 0]) == scale
    assert rounded.codes.tolist() == [[127, round(-0.635 / scale), 0], [0, 0, 0]]
    # a row of zeros has a scale, and stays zero
    assert rounded.dequantized()[1].tolist() == [0, 0, 0]


def test_int4_by_hand_symmetric_and_asymmetric():
    w = torch.tensor([[0.7, -0.3, 0.1, 0.0, 1.5, 0.75, 0.0, 0.1]])
    symmetric = round_to_nearest(w, bits=4, group_size=4)
    assert symmetric.codes[0, :4].tolist() == [15, 5, 9, 8]  # scale 0.1: 7, -3, 1, 0 around 8
    shifted = round_to_nearest(w, bits=4, group_size=4, symmetric=False)
    assert shifted.zero_point.tolist() == [
        [4.0, 0.0]
    ]  # 0.3 / (1.0 / 15) = 4.5 to even; all positive
    assert shifted.codes[0, 4:].tolist() == [15, 7 if float(shifted.scale[0, 1]) > 0.1 else 8, 0, 1]
    assert shifted.dequantized()[0, [3, 6]].tolist() == [0, 0]  # zero stays zero


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_rounding_is_within_half_a_step_and_again_changes_nothing(bits, zeros):
    if bits == 8 and zeros:
        pytest.skip("int8 is symmetric here")
    torch.manual_seed(1)
    w = torch.randn(6, 64)
    rounded = round_to_nearest(w, bits=bits, group_size=16, symmetric=not zeros)
    step = rounded.scale.float().repeat_interleave(16, dim=1)
    # bf16 scales clamp the extremes a little
    assert ((rounded.dequantized() - w).abs() <= step * (0.51 if not zeros else 0.76)).all()
    again = round_to_nearest(rounded.dequantized(), bits=bits, group_size=16, symmetric=not zeros)
    codes = rounded.codes.view(6, -1, 16)
    spanned = (
        (codes.amin(-1) == 0) & (codes.amax(-1) == 2**bits - 1)
        if zeros
        else torch.ones(6, 4, dtype=torch.bool)
    )
    # twice is once
    assert (
        spanned.any()
        and (again.dequantized() == rounded.dequantized()).view(6, -1, 16)[spanned].all()
    )


def test_the_golden_numbers_of_rounding():
    assert round_to_nearest(torch.tensor([[0.5, -1.27, 0.01]]), bits=8).codes.tolist() == [
        [50, -127, 1]
    ]
    assert (round_to_nearest(torch.tensor([[0.7, -0.32, 0.11]]), bits=4).codes - 8).tolist() == [
        [7, -3, 1]
    ]


@pytest.mark.parametrize("zeros", [False, True])
def test_a_group_of_zeros_stays_zero(zeros):
    w = torch.randn(3, 24)
    w[:, 8:16] = 0
    rounded = round_to_nearest(w, bits=4, group_size=8, symmetric=not zeros).dequantized()
    assert (
        torch.isfinite(rounded).all()
        and (rounded[:, 8:16] == 0).all()
        and (rounded[:, :8] != 0).any()
    )


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "int4", "int4 zeros"])
def test_kernels_compute_what_the_weights_stand_for_for_any_number_of_rows(kind, rows):
    torch.manual_seed(2)
    w, bias, x = torch.randn(48, 64), torch.randn(48), torch.randn(1, rows, 64)
    name, _, zeros = kind.partition(" ")
    rounded = round_to_nearest(
        w,
        bits=4 if name == "int4" else 8,
        group_size=32 if name == "int4" else 0,
        symmetric=not zeros,
    )
    module = filled(*packed_layer("m", rounded, bias, kind=name))
    assert module.dequantized().equal(rounded.dequantized())
    expected = x @ rounded.dequantized().T + bias
    with torch.inference_mode():
        output = module(x)
    assert output.shape == expected.shape and output.dtype == x.dtype
    # bf16 or int8 activations, of outputs of size 8
    tolerance = {"int8": 0.02, "int8-dynamic": 0.03, "int4": 0.03}[name]
    assert (output - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("rows", [1, 5, 8, 9])
@pytest.mark.parametrize("width", [57, 24, 8])
@pytest.mark.parametrize("aligned", [True, False])
def test_inputs_of_any_number_are_multiplied_where_the_kernel_would_crash(aligned, width, rows):
    """PyTorch's int8 kernel of few rows reads 16 inputs at a time and kills the process on other
    numbers.
    """
    torch.manual_seed(7)
    rounded = round_to_nearest(torch.randn(40, width), bits=8)
    module = filled(*packed_layer("m", rounded, None, kind="int8"))
    table = filled(*packed_layer("m", rounded, None, kind="int8", embedding=True))
    if aligned:
        module.align(), table.align()
        assert (
            module.weight.shape == (40, width + -width % 16, 1)
            and module.weight.data_ptr() % 64 == 0
        )
    assert module.dequantized().equal(rounded.dequantized())
    assert table(torch.tensor([3, 39])).equal(rounded.dequantized()[[3, 39]])
    x = torch.randn(rows, width)
    with torch.inference_mode():
        for one in (module, TiedHead(table)):
            assert (one(x) - x @ rounded.dequantized().T).abs().max() < 0.02 * (
                x @ rounded.dequantized().T
            ).abs().max()


@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize("outputs", [40, 57, 8])
def test_any_number_of_outputs_takes_the_int4_kernel(outputs, rows):
    torch.manual_seed(8)
    rounded = round_to_nearest(torch.randn(outputs, 96), bits=4, group_size=32, symmetric=False)
    module = filled(*packed_layer("m", rounded, torch.randn(outputs), kind="int4"))
    x = torch.randn(2, rows, 96)
    expected = x @ rounded.dequantized().T + module.bias
    with torch.inference_mode():
        output = module(x)
    assert module.laid_out == "cpu" and output.shape == expected.shape
    assert (output - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("rows", [1, 9])
def test_large_activations_and_small_scales_survive_in_half_precision(rows):
    """Sums over int8 codes pass 65,504 long before the output does, and fp16 has no numbers as
    small as a scale may be.
    """
    torch.manual_seed(9)
    w = torch.randn(32, 64) * 1e-3
    x = torch.randn(rows, 64) * 20_000
    for name in ("int8", "int8-dynamic"):
        rounded = round_to_nearest(w, bits=8)
        module = filled(*packed_layer("m", rounded, None, kind=name))
        expected = x @ rounded.dequantized().T
        assert 100 < expected.abs().max() < 65_504
        with torch.inference_mode():
            output = module(x.half())
        assert (
            output.dtype == torch.float16
            and (output.float() - expected).abs().max() < 0.03 * expected.abs().max()
        ), name


def test_a_packed_student_of_half_precision_opens_in_bf16(compress, tmp_path):
    import shutil

    from transformers import AutoModelForCausalLM

    student, _ = compress("int8")
    shutil.copytree(student.path, tmp_path / "half")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    (tmp_path / "half" / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert (
        model.model.layers[0].mlp.up_proj.scale.dtype
        == model.model.norm.weight.dtype
        == torch.bfloat16
    )


def test_without_fbgemm_activations_are_rounded_alike(monkeypatch):
    torch.manual_seed(10)
    spec, tensors = packed_layer(
        "m", round_to_nearest(torch.randn(24, 64), bits=8), torch.randn(24), kind="int8-dynamic"
    )
    x = torch.randn(2, 5, 64)
    with torch.inference_mode():
        kernel = filled(spec, tensors)(x)
        monkeypatch.setattr("harness.models.packed.HAS_FBGEMM", False)
        module = filled(spec, tensors)
        floats = module(x)
    assert not hasattr(module, "prepared") and torch.allclose(
        kernel, floats, atol=1e-3 * float(kernel.abs().max())
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cut", "settings"),
    [("lowrank", {"keep": 0.6}), ("prune-width", {"ratio": 0.2, "multiple": 1})],
)
def test_odd_ranks_and_widths_decode_in_int8(cut, settings, compress):
    """One token at a time, in a process of its own: what it guards against is a crash."""
    import subprocess
    import sys

    base, _ = compress(cut, {**settings, "num_calibration_samples": 8, "max_seq_length": 64})
    student, _ = compress("int8", base=base)
    modules = json.loads((student.path / "config.json").read_text())["quantization_config"][
        "modules"
    ]
    assert any(spec["kind"] == "int8" and spec["shape"][1] % 16 for spec in modules.values())
    code = (
        "import sys, torch, methods.packed\nfrom transformers import AutoModelForCausalLM\n"
        "a, b = (AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32).eval() for one in "
        "sys.argv[1:])\n"
        "ids = torch.arange(5, 9)[None]\n"
        "with torch.inference_mode():\n    x, y = (model(ids).logits for model in (a, b))\n"
        "assert float((x - y).abs().max()) < 1.0, float((x - y).abs().max())"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(student.path), str(base.path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_a_dynamic_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(3)
    spec, tensors = packed_layer(
        "m", round_to_nearest(torch.randn(32, 64), bits=8), None, kind="int8-dynamic"
    )
    module = filled(spec, tensors)
    module_hat = module.dequantized()
    # very different in size: one scale for all would ruin the small ones
    rows = torch.randn(12, 64) * torch.logspace(-3, 3, 12)[:, None]
    with torch.inference_mode():
        together = module(rows)
        alone = torch.cat([module(row[None]) for row in rows])
    assert together.equal(alone)
    # small rows too
    assert (
        (together - rows @ module_hat.T).abs().amax(1) < 0.02 * (rows @ module_hat.T).abs().amax(1)
    ).all()


def test_a_group_that_no_kernel_knows_is_computed_all_the_same():
    torch.manual_seed(4)
    w, x = torch.randn(10, 24), torch.randn(5, 24)
    spec, tensors = packed_layer("m", round_to_nearest(w, bits=4, group_size=16), None, kind="int4")
    module = filled(spec, tensors)
    assert torch.allclose(module(x), x @ module.dequantized().T, atol=1e-5) and not module.laid_out


def test_the_head_reads_the_table_of_tokens():
    torch.manual_seed(5)
    rounded = round_to_nearest(torch.randn(40, 16), bits=8)
    table = filled(*packed_layer("m", rounded, None, kind="int8", embedding=True))
    assert isinstance(table, Int8Embedding)
    ids = torch.tensor([[3, 39]])
    assert table(ids).equal(rounded.dequantized()[ids])
    head = TiedHead(table)
    x = torch.randn(2, 16)
    with torch.inference_mode():
        assert torch.allclose(head(x), x @ rounded.dequantized().T, atol=0.1)
    assert head.weight is table.weight and len(list(head.parameters())) == 1


def test_weights_laid_out_for_a_kernel_say_so_instead_of_lying():
    spec, tensors = packed_layer(
        "m", round_to_nearest(torch.randn(32, 64), bits=4, group_size=32), None, kind="int4"
    )
    module = filled(spec, tensors)
    module(torch.randn(1, 64))
    assert module.laid_out == "cpu"
    with pytest.raises(RuntimeError, match="open the model again"):
        module.dequantized()
    dynamic = packed_module({"kind": "int8-dynamic", "shape": [16, 32]}, dtype=torch.float32)
    dynamic.weight.data, dynamic.scale.data = (
        torch.ones_like(dynamic.weight),
        torch.ones_like(dynamic.scale),
    )
    assert dynamic.dequantized().shape == (16, 32)
    dynamic(torch.randn(2, 32))
    with pytest.raises(WrongDevice, match="laid out for a kernel"):
        dynamic.dequantized()


def test_every_packed_weight_has_another_shape_than_the_float_one():
    for module in (
        Int8Linear((8, 16), bias=False),
        Int8DynamicLinear((8, 16), bias=True),
        Int4Linear((8, 16), group_size=16, has_zeros=True, bias=False),
    ):
        assert module.weight.shape != (8, 16) and not module.weight.is_floating_point()


def test_a_newer_format_and_an_unknown_kind_are_named():
    from harness.models.packed import PackedConfig

    with pytest.raises(ValueError, match="version 9"):
        PackedConfig({}, version=9)
    with pytest.raises(ValueError, match="int3"):
        packed_module({"kind": "int3", "shape": [2, 2]}, None)


def outputs_error(w, w_hat, gram):
    """Return trace((W - W_hat) H (W - W_hat)^T): the summed squared error of the outputs."""
    gap = (w - w_hat).double()
    return float((gap @ gram.double() * gap).sum())


def inputs(tokens=400, width=32, seed=6):
    torch.manual_seed(seed)
    mixing = torch.randn(width, width)
    return torch.randn(tokens, width) @ mixing


@pytest.mark.parametrize("group", [0, 8, 32])
@pytest.mark.parametrize("columns", [4, 12, 128])
def test_compensated_rounding_beats_the_nearest_on_real_inputs_whatever_its_parts(group, columns):
    x = inputs()
    w, gram = torch.randn(24, 32), x.T @ x
    nearest = round_to_nearest(w, bits=4, group_size=group)
    rounded = round_with_gptq(w, gram, bits=4, group_size=group, columns=columns)
    assert rounded.scale.shape == nearest.scale.shape
    assert outputs_error(w, rounded.dequantized(), gram) < 0.8 * outputs_error(
        w, nearest.dequantized(), gram
    )
    whole = round_with_gptq(w, gram, bits=4, group_size=group, columns=128)
    # the split into parts is arithmetic, not a choice
    assert (rounded.codes != whole.codes).float().mean() < 0.02


def test_compensated_rounding_without_correlations_is_the_nearest():
    w = torch.randn(5, 16)
    rounded = round_with_gptq(w, torch.eye(16), bits=4, group_size=8)
    assert rounded.codes.equal(round_to_nearest(w, bits=4, group_size=8).codes)


def test_the_factor_is_that_of_the_inverse_and_dead_inputs_are_told():
    x = inputs(width=6)
    x[:, 2] = 0
    factor, dead = inverse_cholesky(x.T @ x, dampening=0.01)
    assert dead.tolist() == [False, False, True, False, False, False]
    h = (x.T @ x).clone()
    h[2, 2] = 1
    h += 0.01 * h.diagonal().mean() * torch.eye(6)
    assert torch.allclose(factor.T @ factor @ h, torch.eye(6), atol=1e-2)
    w = torch.randn(3, 6)
    assert (round_with_gptq(w, x.T @ x, bits=8).dequantized()[:, 2] == 0).all()


def header_of(folder):
    """Return what a safetensors file says of its tensors, and the bytes of that header; nothing
    else in the folder holds weights.
    """
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, 8 + length


CLAIMS = {  # bytes of a packed matrix (O, I), its scales in bf16
    "int8": lambda o, i, spec: o * i + 2 * o,
    "int4": lambda o, i, spec: (
        o * -(-i // 2)
        + -(-i // spec["group"]) * 2 * o
        + (o * -(-i // spec["group"] // 2) if spec.get("zeros") else 0)
    ),
    "float": lambda o, i, spec: 2 * o * i,
}


FEW = {"num_calibration_samples": 8, "max_seq_length": 64}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("int8", {}),
        ("int8-dynamic", {}),
        ("int4", {}),
        ("int4", {"group_size": 32, "symmetric": False}),
        ("lowrank", FEW),
        ("prune-width", {"allocation": "global", **FEW}),
    ],
)
def test_every_byte_on_disk_is_one_that_a_formula_claims(name, settings, compress):
    student, _ = compress(name, settings)
    tensors, header = header_of(student.path)
    sizes = {
        one: entry["data_offsets"][1] - entry["data_offsets"][0] for one, entry in tensors.items()
    }
    modules = json.loads((student.path / "config.json").read_text())["quantization_config"][
        "modules"
    ]
    for module, spec in modules.items():
        if spec["kind"] != "tied":
            sizes_of_module = [
                size for one, size in sizes.items() if one.rpartition(".")[0] == module
            ]
            assert sum(sizes_of_module) == CLAIMS[spec["kind"].removesuffix("-dynamic")](
                *spec["shape"], spec
            ), module
    rest = {one: entry for one, entry in tensors.items() if one.rpartition(".")[0] not in modules}
    assert all(entry["dtype"] == "BF16" for entry in rest.values())
    assert (
        student.bytes_on_disk
        == header + sum(sizes.values())
        == (student.path / "model.safetensors").stat().st_size
    )


@pytest.mark.parametrize("name", ["int8", "int8-dynamic", "int4"])
def test_a_packed_student_answers_alike_alone_and_among_others(name, compress):
    """Few rows at once: above eight the int8 product takes another kernel, whose last bits differ
    (docs/design.md).
    """
    import suites
    from harness.data.source import LocalOrHubData
    from harness.models.language_model import open_model
    from harness.scoring.score import score_task

    opened = open_model(compress(name)[0])
    for task in ("gsm8k-mini", "mmlu-mini"):
        rounded = [
            score_task(
                opened,
                suites.load(task),
                LocalOrHubData(),
                batch_size=size,
                limit=24,
                progress=lambda one: None,
            )[1]
            for size in (1, 8)
        ]
        assert [(row.text, row.correct) for row in rounded[0]] == [
            (row.text, row.correct) for row in rounded[1]
        ]


@pytest.mark.parametrize("rows", [1, 9, 300])
@pytest.mark.parametrize("width", [128, 96])
@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "int8"},
        {"kind": "int8-dynamic"},
        {"kind": "int4", "group": 32},
        {"kind": "int4", "group": 64},
    ],
)
def test_the_kernels_of_a_gpu_take_what_is_laid_out_for_them(spec, width, rows):
    """Shapes and types alone, on no device: our modules on torch's own description of its CUDA
    kernels.
    """
    from torch._subclasses import FakeTensorMode

    if torch.version.cuda and not torch.cuda.is_available() and torch.__version__ < (2, 14):
        pytest.skip("a torch for CUDA describes its kernels without a driver from 2.14 on")
    with FakeTensorMode(), torch.device("cuda"):
        module = packed_module({**spec, "shape": [48, width], "bias": True}, torch.bfloat16)
        output = module(torch.empty((1, rows, width), dtype=torch.bfloat16))
    assert (
        output.shape == (1, rows, 48)
        and output.dtype == torch.bfloat16
        and output.device.type == "cuda"
    )
    if spec["kind"] == "int4":
        assert module.laid_out == "cuda" and (module.in_features + module.padding) % 128 == 0


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "int4"])
def test_a_kernel_that_a_card_lacks_is_replaced_by_the_plain_product(kind, rows, monkeypatch):
    from torch._subclasses import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    from harness.models import packed

    called = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.name())
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(packed, "gpu_kernel_works", lambda kind, x: False)
    with FakeTensorMode(), torch.device("cuda"):
        spec = {"kind": kind, "shape": [48, 128], "group": 32}
        module = packed_module(spec, torch.bfloat16)
        with Names():
            output = module(torch.empty((1, rows, 128), dtype=torch.bfloat16))
    assert output.shape == (1, rows, 48) and output.dtype == torch.bfloat16
    kernels = ("_weight_int8pack_mm", "_weight_int4pack_mm", "_int_mm")
    assert not [name for name in called if name.removeprefix("aten::") in kernels]
    assert getattr(module, "laid_out", "") == ""


@pytest.mark.parametrize(
    ("kind", "capability", "hip"), [("int4", (7, 5), None), ("int4", (9, 4), "6.4")]
)
def test_the_int4_kernel_is_not_tried_on_cards_that_it_is_not_built_for(
    kind, capability, hip, monkeypatch
):
    from harness.models import packed

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert packed._tried_kernel.__wrapped__(kind) is False


@pytest.mark.gpu
def test_packed_layers_that_are_slower_than_bf16_on_this_card_are_named():
    import time
    import warnings

    from harness.models.packed import _tried_kernel

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    torch.manual_seed(3)
    w = 0.02 * torch.randn(512, 512)
    plain = torch.nn.Linear(512, 512, bias=False).to("cuda", torch.bfloat16)

    def seconds(module, x):
        module(x)
        torch.cuda.synchronize()
        began = time.perf_counter()
        module(x)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    slower = []
    for kind in ("int8", "int8-dynamic", "int4"):
        rounded = round_to_nearest(
            w, bits=4 if kind == "int4" else 8, group_size=64 if kind == "int4" else 0
        )
        module = filled(*packed_layer("m", rounded, None, kind=kind)).cuda()
        for rows in (1, 9, 300):
            x = torch.randn(rows, 512, dtype=torch.bfloat16).cuda()
            with torch.inference_mode():
                expected = x.float() @ rounded.dequantized().cuda().T
                assert (module(x).float() - expected).abs().max() < 0.03 * expected.abs().max()
                if seconds(module, x) > seconds(plain, x):
                    slower.append(f"{kind}, {rows} rows")
    assert _tried_kernel("int4") or torch.cuda.get_device_capability() < (8, 0)
    if slower:
        warnings.warn(f"slower than bf16 on this card: {'; '.join(slower)}", stacklevel=1)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 9, 40, 300])
@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "int4", "int4 zeros"])
@pytest.mark.parametrize("width", [128, 96])
def test_kernels_of_a_gpu_compute_what_the_weights_stand_for(kind, rows, width):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    torch.manual_seed(2)
    w, bias, x = torch.randn(48, width), torch.randn(48), torch.randn(1, rows, width)
    name, _, zeros = kind.partition(" ")
    rounded = round_to_nearest(
        w,
        bits=4 if name == "int4" else 8,
        group_size=32 if name == "int4" else 0,
        symmetric=not zeros,
    )
    module = filled(*packed_layer("m", rounded, bias, kind=name)).cuda()
    expected = x @ rounded.dequantized().T + bias
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            output = module(x.cuda().to(dtype)).cpu().float()
        assert (output - expected).abs().max() < 0.03 * expected.abs().max()


def test_a_checkpoint_says_what_it_packs_and_weighs_what_it_claims(compress, tmp_path):
    from harness.models.language_model import open_model
    from harness.models.resolve import quantized_by

    student, output = compress("int4", {"group_size": 32, "symmetric": False})
    config = json.loads((student.path / "config.json").read_text())["quantization_config"]
    assert (
        config["quant_method"] == "compression-harness"
        and quantized_by(student.path) == "int4+int8+tied"
    )
    one = config["modules"]["model.layers.0.mlp.up_proj"]
    assert one == {"kind": "int4", "shape": [384, 128], "group": 32, "zeros": True}
    assert output["bits_of_a_packed_weight"] == 4 + 16 / 32 + 4 / 32
    body = 8 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128)
    claimed = body * output["bits_of_a_packed_weight"] / 8 + 1024 * (128 + 2) + 17 * 128 * 2
    assert student.bytes_on_disk == claimed + header_of(student.path)[1]
    with pytest.raises(ValueError, match="not serializable"):
        open_model(student).model.save_pretrained(tmp_path / "again")


def test_a_packed_model_is_scored_on_the_path_of_the_others_and_weighed_with_what_kernels_hold(
    compress,
):
    from harness.measuring.worker import resident_bytes
    from harness.models.language_model import open_model
    from harness.scoring.generation import reason_for_plain_path

    for name in ("int8", "int8-dynamic", "int4"):
        opened = open_model(compress(name)[0])
        before = resident_bytes(opened.model)
        assert reason_for_plain_path(opened) == "", name
        # after the kernels have laid out their weights
        assert abs(resident_bytes(opened.model) - before) < 0.01 * before, name


def test_embeddings_can_be_left_alone_and_layers_skipped(compress):
    student, logits = compress("int8", {"embeddings": "skip", "ignore": ["*.down_proj"]})
    modules = json.loads((student.path / "config.json").read_text())["quantization_config"][
        "modules"
    ]
    assert (
        not any(name.endswith(("down_proj", "embed_tokens", "lm_head")) for name in modules)
        and len(modules) == 48
    )
    assert logits["packed_layers"] == 48 and logits["table_and_head"] == "skip"


def test_a_tied_head_is_left_alone_with_its_table_or_not_at_all(compress):
    from harness.errors import CellFailed

    for one in ("lm_head", "model.embed_tokens"):
        with pytest.raises(CellFailed, match="are one matrix in this model, and ignore names only"):
            compress("int8", {"ignore": [one]})
    student, _ = compress("int8", {"ignore": ["lm_head", "model.embed_tokens"]})
    modules = json.loads((student.path / "config.json").read_text())["quantization_config"][
        "modules"
    ]
    assert not {"lm_head", "model.embed_tokens"} & modules.keys()


def test_the_simulated_one_holds_exactly_what_the_packed_one_stands_for(compress, tiny):
    from harness.models.language_model import open_model

    packed, fake = (open_model(compress(name)[0]).model for name in ("int4", "fake-int4"))
    for name, module in packed.named_modules():
        if hasattr(module, "dequantized"):
            assert fake.get_submodule(name).weight.equal(module.dequantized()), name
    left, output = compress("fake-int4", {"ignore": ["model.embed_tokens", "lm_head"]})
    assert (
        open_model(left)
        .model.get_input_embeddings()
        .weight.equal(open_model(tiny).model.get_input_embeddings().weight)
    )
    assert output["table_and_head"] == "int8" and output["skipped"] == [
        "model.embed_tokens",
        "lm_head",
    ]


def test_a_quantised_model_is_neither_cut_nor_trained_and_that_is_said_before_anything_is_computed(
    compress,
):
    from harness.api import plan_run
    from harness.errors import HarnessError
    from harness.planning.config import build_config

    folder = str(compress("int8")[0].path)
    for given in ({"student": folder}, {"teacher": [folder]}):
        with pytest.raises(
            HarnessError,
            match=r"response starts from student, which is quantized \(int8\+tied\) .*; give "
            r"--student a model whose weights are floats",
        ):
            plan_run(build_config({"methods": ["response"], **given}))
    found = plan_run(
        build_config({"methods": ["response"], "teacher": [folder], "student": "tiny"})
    )
    # a quantised teacher may teach; its note stands in the row
    assert found.teachers[0].note == "quantized (int8+tied)"


def test_what_was_pruned_stays_zero_when_it_is_packed_with_compensation(compress):
    from harness.models.language_model import open_model

    pruned, _ = compress("prune-wanda", {"num_calibration_samples": 8, "max_seq_length": 64})
    packed = open_model(
        compress(
            "int4-calibrated", {"num_calibration_samples": 8, "max_seq_length": 64}, base=pruned
        )[0]
    ).model
    before = open_model(pruned).model
    for name, module in packed.named_modules():
        if name.endswith("_proj"):
            zeros = before.get_submodule(name).weight == 0
            assert (
                0.4 < float(zeros.float().mean()) < 0.6 and (module.dequantized()[zeros] == 0).all()
            ), name


def test_layers_outside_the_blocks_are_named_where_only_the_blocks_inputs_are_seen():
    from types import SimpleNamespace

    from transformers import OPTConfig, OPTForCausalLM

    from harness.errors import CellFailed
    from methods.compression.calibration import CalibrationData, visit_blocks
    from methods.compression.layers import layers_of

    model = OPTForCausalLM(
        OPTConfig(
            hidden_size=32,
            word_embed_proj_dim=16,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=64,
            max_position_embeddings=64,
        )
    ).eval()
    layers = layers_of(model, ignore=["*.embed_positions"], method="int4-calibrated").linear
    with pytest.raises(
        CellFailed,
        match=r"model\.decoder\.project_\w+, .* is outside the blocks .*METHOD\.ignore=\[",
    ):
        visit_blocks(
            SimpleNamespace(model=model, device="cpu"),
            CalibrationData(torch.arange(8)[None], {}),
            layers,
            kind="gram",
            visit=lambda *a: None,
        )


def test_strange_layers_and_idle_patterns_are_named(compress, random_model):
    from harness.errors import CellFailed

    with pytest.raises(CellFailed, match=r"ignore='\*\.nothing' matches no layer"):
        compress("int8", {"ignore": ["*.nothing"]})
    packed_once, _ = compress("int8")
    with pytest.raises(CellFailed, match="quantized already"):
        compress("int4", base=packed_once)


def test_transposed_layers_of_an_older_family_are_seen_as_the_linear_layers_that_they_are():
    from transformers import GPT2Config, GPT2LMHeadModel

    from methods.compression.layers import layers_of

    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=1,
            n_embd=32,
            n_head=2,
            vocab_size=64,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    layers = layers_of(model, method="int8")
    # a table of positions is no matrix of a linear layer
    assert layers.left_alone == ("transformer.wpe.weight",)
    x = torch.randn(3, 32)
    for name, layer in layers.linear.items():
        inputs = x if layer.in_features == 32 else torch.randn(3, layer.in_features)
        expected = torch.nn.functional.linear(inputs, layer.weight, layer.bias)
        assert torch.allclose(model.get_submodule(name)(inputs), expected, atol=1e-6), name
    with torch.no_grad():
        layers.linear["transformer.h.0.mlp.c_fc"].weight.mul_(0)
    # what is written into the view is written into the layer
    assert not model.transformer.h[0].mlp.c_fc.weight.any()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Qwen2", {"tie_word_embeddings": False}),
        ("Qwen3", {}),
        ("Gemma", {}),
        ("Gemma2", {}),
        ("GPTNeoX", {}),
    ],
    ids=["Qwen2", "Qwen3", "Gemma", "Gemma2", "GPTNeoX"],
)
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_other_architectures_reopen_as_what_their_packed_weights_stand_for(
    name, kind, changes, small, compress, tmp_path
):
    """Biases, heads of their own, norms of queries, scaled tables: the reopened student against
    floats made of the same codes.
    """
    from harness.models.checkpoint import describe
    from harness.models.language_model import open_model

    folder = tmp_path / kind
    opened = small(kind, **changes)
    opened.model.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)
    base = describe(folder, name=kind)
    settings = {"group_size": 32} if name == "int4" else {}
    made, _ = compress(name, settings, base=base)
    student = open_model(made).model
    plain = open_model(base).model
    with torch.no_grad():
        for name_of, module in student.named_modules():
            if hasattr(module, "dequantized"):
                plain.get_submodule(name_of).weight.copy_(module.dequantized())
        ids = torch.arange(5, 37)[None]
        expected, output = plain(ids).logits, student(ids).logits
    assert (output - expected).abs().max() < 0.05 * max(1.0, float(expected.abs().max()))


def test_a_pattern_leaves_all_below_it_and_a_word_is_a_pattern(compress):
    student, output = compress("int8", {"ignore": "*.mlp"})
    modules = json.loads((student.path / "config.json").read_text())["quantization_config"][
        "modules"
    ]
    assert output["packed_layers"] == 32 and not any(".mlp." in name for name in modules)
    student, _ = compress("int8", {"ignore": ["*embed_tokens", "lm_head"]})
    modules = json.loads((student.path / "config.json").read_text())["quantization_config"][
        "modules"
    ]
    assert "model.embed_tokens" not in modules and "lm_head" not in modules


@pytest.mark.parametrize("dead", [False, True])
def test_a_factorisation_leaves_the_second_moments_as_they_were(dead):
    """It works in their place: layers that get the same inputs share them."""
    from methods.compression.rounding import inverse_cholesky

    torch.manual_seed(6)
    x = torch.randn(30, 12)
    if dead:
        x[:, 3] = 0
    gram = x.T @ x
    before = gram.clone()
    factor, is_dead = inverse_cholesky(gram, 0.01)
    assert torch.equal(gram, before)
    assert is_dead.tolist() == [dead and index == 3 for index in range(12)]
    h = gram.double()
    h.diagonal()[is_dead] = 1.0
    h.diagonal().add_(0.01 * h.diagonal().mean())
    assert torch.allclose((factor.T @ factor).double(), h.inverse(), rtol=1e-3, atol=1e-4)
    assert torch.equal(factor, factor.triu())


def test_parts_of_a_rounded_matrix_are_those_of_the_whole(monkeypatch):
    from harness.errors import CellFailed
    from harness.models import packed
    from methods.compression.rounding import packed_layer, round_to_nearest

    torch.manual_seed(7)
    w = torch.randn(10, 24)
    for options in ({"bits": 8}, {"bits": 4, "group_size": 8, "symmetric": False}):
        whole_matrix = round_to_nearest(w, **options)
        with monkeypatch.context() as patch:
            patch.setattr(packed, "_PART_WEIGHTS", 3 * 24)  # parts of three rows, and one of one
            assert [part.stop for part in packed.row_parts(10, 24)] == [3, 6, 9, 10]
            in_parts = round_to_nearest(w, **options)
            target = torch.empty_like(w)
            in_parts.write_into(target)
        for name in ("codes", "scale", "zero_point"):
            assert torch.equal(getattr(in_parts, name), getattr(whole_matrix, name))
        assert torch.equal(target, whole_matrix.dequantized())
        spec, tensors = packed_layer("x", whole_matrix, None, kind=f"int{options['bits']}")
        module = packed.packed_module(spec, torch.float32)
        for name, tensor in tensors.items():
            setattr(module, name[2:], torch.nn.Parameter(tensor, requires_grad=False))
        assert torch.equal(module.dequantized(slice(4, 7)), target[4:7])
        packed.refuse_wrong_codes("x", spec, {n: t[4:7] for n, t in tensors.items()}, target[4:7])
        with pytest.raises(CellFailed, match="does not stand for its codes"):
            packed.refuse_wrong_codes("x", spec, tensors, target + 1)
