"""Students of many architectures against independent oracles: blocks bypassed by hooks, channels
zeroed, files opened again.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import BLOCKS, FAMILIES, random_family, saved_family

from harness.errors import CellFailed, HarnessError
from harness.models.checkpoint import describe, first_non_finite, weight_files
from harness.models.language_model import open_model
from harness.models.resolve import resolve, smallest_exact_dtype
from harness.models.shaping import save_student, student_of

IDS = torch.arange(5, 35)[None]
FEW = {"num_calibration_samples": 4, "max_seq_length": 32}


def logits(model, **more):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False, **more).logits


def decoder_blocks(model):
    """Find the blocks by their place in the name, not as the harness does."""
    named = dict(model.named_modules())
    return next(
        module
        for name, module in named.items()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == BLOCKS
        and "vision" not in name
    )


def bypassed(model, dropped):
    """Make blocks hand on what enters them."""

    def hand_on(module, given, named, out):
        states = given[0] if given else named["hidden_states"]
        return (states, *out[1:]) if isinstance(out, tuple) else states

    for at in dropped:
        decoder_blocks(model)[at].register_forward_hook(hand_on, with_kwargs=True)
    return model


@pytest.mark.parametrize("saved", ["floats", "packed", "its own student"])
def test_a_student_has_the_same_bytes_whether_the_hub_is_switched_off_or_not(
    saved, tmp_path, monkeypatch
):
    """transformers writes into a tokenizer how it was opened: the digest of a student would follow
    HF_HUB_OFFLINE.
    """
    from transformers import tokenization_utils_base

    from harness.models.packed import save_packed

    def made(folder, offline):
        monkeypatch.setattr(tokenization_utils_base, "is_offline_mode", lambda: offline)
        base = resolve("tiny", cache=tmp_path)
        # a tokenizer that was written by plain transformers, with its notes
        if saved == "its own student":
            from transformers import AutoTokenizer

            base = save_student(
                open_model(base), folder / "first", name="x", dtype=torch.float32, parents=()
            )
            AutoTokenizer.from_pretrained(base.path).save_pretrained(base.path)
        opened = open_model(base)
        if saved == "packed":
            (folder / "student").mkdir(parents=True)
            save_packed(opened, folder / "student", specs={}, tensors={}, dtype=torch.float32)
            return describe(folder / "student", name="x").digest
        return save_student(
            opened, folder / "student", name="x", dtype=torch.float32, parents=()
        ).digest

    assert made(tmp_path / "offline", True) == made(tmp_path / "online", False)


CUT = [
    "Llama, biases",
    "Gemma 2",
    "Gemma 3, with vision",
    "Phi-3",
    "GPT-2",
    "GPT-Neo",
    "OPT",
    "Falcon",
    "MPT",
    "Mixtral",
    "Qwen2-MoE",
    "Qwen3-MoE",
    "DeepSeek-V2",
    "DeepSeek-V3",
    "Llama 4",
    "ERNIE 4.5 MoE",
    "SmolLM3",
    "LFM2",
    "Bamba",
    "Qwen3-Next",
    "RecurrentGemma",
    "Mamba",
    "xLSTM",
    "Kimi Linear",
    "XGLM",
    "DBRX",
]


@pytest.mark.parametrize("family", CUT)
def test_a_depth_cut_saved_and_opened_is_the_teacher_with_its_other_blocks_bypassed(
    family, tmp_path
):
    base = saved_family(family, tmp_path / "base")
    student = student_of("depth:0.5", base, seed=0, device="cpu", dtype="float32")
    made = save_student(student, tmp_path / "student", name="x", dtype=torch.float32, parents=())
    expected = logits(bypassed(open_model(base).model, [1, 2]))
    assert torch.allclose(logits(open_model(made).model), expected, atol=1e-4)
    # the blocks do something
    assert not torch.allclose(expected, logits(open_model(base).model), atol=1e-2)


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("DiffLlama", "lambda_init is"),
        ("Gemma 3n", "embed_tokens_per_layer"),
        ("Zamba 2", "shared_transformer"),
        ("Zamba", "shared_transf"),
    ],
)
def test_a_depth_cut_that_would_be_another_model_is_refused_by_name(
    family, named, tmp_path, compress
):
    base = saved_family(family, tmp_path / "base")
    with pytest.raises(CellFailed, match=rf"depth:0\.5: .*{named}"):
        student_of("depth:0.5", base, seed=0, device="cpu", dtype="float32")
    if not family.startswith("Zamba"):
        with pytest.raises(CellFailed, match=named):
            compress("prune-depth-random", {"ratio": 0.5}, base=base, seed=3)


def test_a_class_that_counts_its_blocks_by_a_setting_of_its_own_is_refused(tmp_path, monkeypatch):
    from harness.models import depth

    monkeypatch.setattr(depth, "BLOCK_COUNT_SETTINGS", ())
    with pytest.raises(
        CellFailed,
        match=r"counts its blocks by another setting than num_hidden_layers .* 4 for 2; use "
        r"width:0\.5",
    ):
        student_of(
            "depth:0.5",
            saved_family("xLSTM", tmp_path / "base"),
            seed=0,
            device="cpu",
            dtype="float32",
        )


def test_random_blocks_of_a_mixture_keep_their_kind(tmp_path, compress):
    for family, seed in (("Qwen2-MoE", 1), ("DeepSeek-V3", 2), ("Llama 4", 3)):
        base = saved_family(family, tmp_path / family)
        student, values = compress("prune-depth-random", {"ratio": 0.5}, base=base, seed=seed)
        expected = logits(bypassed(open_model(base).model, values["dropped"]))
        assert torch.allclose(logits(open_model(student).model), expected, atol=1e-4), family


READERS = {
    "Llama, biases": "mlp.down_proj",
    "Gemma 3, with vision": "mlp.down_proj",
    "Phi-3": "mlp.down_proj",
    "GLM-4": "mlp.down_proj",
    "GPT-NeoX": "mlp.dense_4h_to_h",
    "GPT-2": "mlp.c_proj",
    "OPT": "fc2",
    "StarCoder 2": "mlp.c_proj",
    "Falcon": "mlp.dense_4h_to_h",
    "Bamba": "feed_forward.down_proj",
    "LFM2": "feed_forward.w2",
    "Phi": "mlp.fc2",
}


def channels_zeroed(teacher, student, reader):
    """Zero those inputs of the teacher's reading layers that the student's do not have, found by
    comparing columns.
    """
    for block, small in zip(decoder_blocks(teacher), decoder_blocks(student), strict=True):
        layer, cut = block.get_submodule(reader), small.get_submodule(reader)
        # (I, O)
        whole, left = (
            one.weight.data if type(one).__name__ == "Conv1D" else one.weight.data.T
            for one in (layer, cut)
        )
        stays = torch.tensor([bool((left == row).all(1).any()) for row in whole])
        assert int(stays.sum()) == len(left) < len(whole)
        whole[~stays] = 0
    return teacher


@pytest.mark.slow
@pytest.mark.parametrize("family", READERS)
@pytest.mark.parametrize("name", ["width:0.4", "prune-width"])
def test_a_width_cut_is_the_teacher_with_its_other_channels_zeroed(
    family, name, tmp_path, compress
):
    base = saved_family(family, tmp_path / "base")
    if name == "prune-width":
        made, _ = compress(name, {**FEW, "ratio": 0.5, "multiple": 4}, base=base)
    else:
        student = student_of(name, base, seed=0, device="cpu", dtype="float32")
        made = save_student(
            student, tmp_path / "student", name="x", dtype=torch.float32, parents=()
        )
    student, teacher = open_model(made).model, open_model(base).model
    whole = logits(teacher)
    expected = logits(channels_zeroed(teacher, student, READERS[family]))
    assert torch.allclose(logits(student), expected, atol=1e-4)
    assert not torch.allclose(expected, whole, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("Mixtral", "experts"),
        ("Qwen3-MoE", r"model\.layers\.\*\.mlp\.experts"),
        ("DeepSeek-V3", "experts"),
        ("Llama 4", "experts"),
        ("GPT-OSS", "experts"),
        ("Qwen3-Next", "experts"),
        ("BitNet", "ffn_sub_norm"),
        ("Bloom", "no setting of BloomConfig"),
        ("Mamba", "A_log"),
    ],
)
def test_what_cannot_be_narrowed_is_named(family, named, tmp_path, compress):
    base = saved_family(family, tmp_path / "base")
    with pytest.raises(CellFailed, match=rf"width:0\.5: .*{named}.*use depth:0\.5"):
        student_of("width:0.5", base, seed=0, device="cpu", dtype="float32")
    with pytest.raises(CellFailed, match=rf"prune-width.*: .*{named}.*use prune-depth"):
        compress("prune-width-random", {"ratio": 0.5, "multiple": 1}, base=base)


def test_the_oracles_see_what_a_cut_gets_wrong(tmp_path, monkeypatch):
    base = saved_family("Phi-3", tmp_path / "phi")
    from harness.models import depth, width

    honest = width.cut_to_channels
    with monkeypatch.context() as patched:  # other channels cut out than are masked
        patched.setattr(
            width,
            "cut_to_channels",
            lambda model, state, part, chosen: honest(model, state, part, chosen.flip(0)) and None,
        )
        # an order alone changes nothing
        student_of("width:0.5", base, seed=0, device="cpu", dtype="float32")
        patched.setattr(width, "channel_norms", lambda model, part: torch.arange(float(part.width)))
        patched.setattr(
            width,
            "cut_to_channels",
            lambda model, state, part, chosen: honest(model, state, part, chosen - 1),
        )
        with pytest.raises(
            CellFailed, match=r"width:0\.5: .*dropped channels masked \(block 0 differs"
        ):
            student_of("width:0.5", base, seed=0, device="cpu", dtype="float32")
    windows = saved_family("Gemma 2", tmp_path / "gemma")
    # longer than the probe
    config = json.loads((windows.path / "config.json").read_text()) | {"sliding_window": 400}
    (windows.path / "config.json").write_text(json.dumps(config))
    with monkeypatch.context() as patched:
        patched.setattr(
            depth,
            "_renumbered_list",
            lambda name, value, kept, count: (
                [value[at] for at in kept][::-1] if name == "layer_types" else None
            ),
        )
        with pytest.raises(
            CellFailed, match=r"depth:0\.5: .*bypassed \(of block 0, .*(sliding|attention)"
        ):
            student_of("depth:0.5", windows, seed=0, device="cpu", dtype="float32")
    with monkeypatch.context() as patched:
        filled = depth._copy_weights

        def off(model, small, *more):
            filled(model, small, *more)
            small.model.layers[1].self_attn.o_proj.weight.data.mul_(1.01)

        patched.setattr(depth, "_copy_weights", off)
        with pytest.raises(CellFailed, match=r"depth:0\.5: .*block 3 differs"):
            student_of("depth:0.5", base, seed=0, device="cpu", dtype="float32")


def test_a_file_that_is_not_what_was_in_memory_is_never_put_in_place(tmp_path, monkeypatch):
    opened = open_model(saved_family("Llama", tmp_path / "base"))
    honest = type(opened.model).save_pretrained

    def torn(model, folder, **more):
        honest(model, folder, **more)
        from safetensors.torch import load_file, save_file

        [path] = weight_files(Path(folder))
        tensors = load_file(path)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 3] += 1
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(type(opened.model), "save_pretrained", torn)
    with pytest.raises(
        CellFailed,
        match=r"model\.layers\.1\.mlp\.up_proj\.weight holds other numbers when the saved student "
        r"is opened again",
    ):
        save_student(opened, tmp_path / "student", name="x", dtype=torch.float32, parents=())
    assert not (tmp_path / "student").exists() and not list(tmp_path.glob(".*part"))


@pytest.fixture
def untied(tmp_path):
    """Return a model whose configuration ties head and table, and whose file holds another head."""
    from safetensors.torch import load_file, save_file

    base = saved_family("Llama, biases", tmp_path / "untied")
    [path] = weight_files(base.path)
    tensors = load_file(path)
    tensors["lm_head.weight"] = torch.randn(tensors["model.embed_tokens.weight"].shape)
    save_file(tensors, path, metadata={"format": "pt"})
    assert json.loads((base.path / "config.json").read_text())["tie_word_embeddings"]
    return describe(base.path, name="untied")


@pytest.mark.parametrize(
    "name",
    [
        "depth:0.5",
        "width:0.5",
        "prune-depth",
        "prune-width",
        "prune-magnitude",
        "sft",
        "lowrank-plain",
        "int8",
    ],
)
def test_head_and_table_are_as_in_the_opened_model_whatever_its_configuration_says(
    name, untied, compress
):
    table, head = (
        one.weight
        for one in (
            open_model(untied).model.get_input_embeddings(),
            open_model(untied).model.get_output_embeddings(),
        )
    )
    if ":" in name:
        made, _ = compress(
            "sft",
            base=untied,
            tokens=400,
            settings={
                "learning_rate": 1e-6,
                "warmup_ratio": 0.0,
                "validation_rows": 2,
                "batch_size": 2,
            },
        )
        student = student_of(name, untied, seed=0, device="cpu", dtype="float32").model
    else:
        settings = {
            "prune-depth": FEW,
            "prune-width": FEW,
            "sft": {"learning_rate": 1e-6, "validation_rows": 2, "batch_size": 2},
        }.get(name, {})
        made, _ = compress(name, settings, base=untied, tokens=400)
        student = open_model(made).model
    ours, own = student.get_input_embeddings(), student.get_output_embeddings()
    first, second = (
        one.dequantized() if hasattr(one, "dequantized") else one.weight for one in (ours, own)
    )
    near = {"atol": 0.05} if name == "int8" else {"atol": 1e-3} if name == "sft" else {"atol": 0}
    assert torch.allclose(first, table, **near) and torch.allclose(second, head, **near)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_named_and_no_student_is_made_of_it(value, tmp_path, compress):
    base = saved_family("Llama", tmp_path / "base")
    opened = open_model(base)
    opened.model.model.layers[2].mlp.up_proj.weight.data[1, 1] = value
    opened.model.save_pretrained(base.path)
    base = describe(base.path, name="broken")
    assert first_non_finite(opened.model.named_parameters()).startswith(
        "model.layers.2.mlp.up_proj.weight[1, 1] is "
    )
    for name in (
        "untouched",
        "int8",
        "int4",
        "prune-magnitude",
        "prune-depth",
        "prune-width-random",
        "lowrank-plain",
        "sft",
    ):
        with pytest.raises(
            CellFailed,
            match=r"broken holds numbers that are not finite: "
            r"model\.layers\.2\.mlp\.up_proj\.weight\[1, 1\]",
        ):
            compress(name, FEW if name == "prune-depth" else {}, base=base)
    with pytest.raises(CellFailed, match="not finite"):
        save_student(opened, tmp_path / "student", name="x", dtype=torch.float32, parents=())


NOISY = [
    "Phi",
    "Phi-3",
    "OPT",
    "Bloom",
    "Falcon",
    "GPT-NeoX",
    "XGLM",
    "BioGPT",
    "StableLM",
    "StarCoder 2",
    "GPT-2",
    "Mixtral",
]


@pytest.mark.parametrize("family", NOISY)
def test_every_dropout_is_silenced_and_comes_back(family):
    from methods.training.noise import refuse_noise, restore_noise, silence_noise

    model = random_family(family)
    before = model.config.to_dict()
    with pytest.raises(CellFailed, match="two passes differ"):
        refuse_noise(model)
    silenced = silence_noise(model)
    refuse_noise(model)
    assert not model.training
    restore_noise(silenced)
    assert model.config.to_dict() == before
    with pytest.raises(CellFailed, match="two passes differ"):
        refuse_noise(model)


def test_noise_that_goes_by_no_name_is_refused():
    from methods.training.noise import refuse_noise, silence_noise

    model = random_family("Llama")
    model.model.norm.register_forward_hook(
        lambda module, given, out: out + 0.01 * torch.randn_like(out) if module.training else out
    )
    silence_noise(model)
    with pytest.raises(CellFailed, match="LlamaForCausalLM draws something at random"):
        refuse_noise(model)


PACKS = [
    "GPT-2",
    "OPT",
    "Falcon",
    "Gemma 3, with vision",
    "Phi-3",
    "Bamba",
    "LFM2",
    "GPT-Neo",
    "XGLM",
    "RecurrentGemma",
]


@pytest.mark.parametrize("family", PACKS)
def test_a_packed_student_stands_for_its_codes_in_every_family(family, tmp_path, compress):
    base = saved_family(family, tmp_path / "base")
    made, values = compress("int8", base=base)
    student, plain = open_model(made).model, open_model(base).model
    packed = [name for name, module in student.named_modules() if hasattr(module, "dequantized")]
    assert len(packed) >= values["packed_layers"] and not any("vision" in name for name in packed)
    with torch.no_grad():
        for name in packed:
            layer, result = plain.get_submodule(name), student.get_submodule(name).dequantized()
            layer.weight.copy_(result.T if type(layer).__name__ == "Conv1D" else result)
    expected, given = logits(plain), logits(student)
    assert (given - expected).abs().max() < 0.06 * max(1.0, float(expected.abs().max()))


def test_all_strangers_stand_in_one_setting_that_works(tmp_path, compress):
    import shlex

    from harness.planning.spec import parse_set

    for family in ("Mixtral", "DBRX", "Llama 4"):
        base = saved_family(family, tmp_path / family)
        with pytest.raises(CellFailed, match="does not know") as caught:
            compress("int4", {"group_size": 32}, base=base)
        [setting] = shlex.split(re.search(r"--set (.*)$", str(caught.value))[1])
        student, _ = compress("int4", {"group_size": 32, **parse_set([setting])["int4"]}, base=base)
        before, after = open_model(base).model.state_dict(), open_model(student).model.state_dict()
        experts = [name for name in before if "experts" in name and "shared" not in name]
        assert experts and all(torch.equal(before[name], after[name]) for name in experts)


def test_a_layer_whose_weight_is_read_beside_it_is_left_alone_and_said_so(tmp_path, compress):
    base = saved_family("Mamba", tmp_path / "base")
    with pytest.raises(
        CellFailed,
        match=r"int8: MambaForCausalLM casts what it hands lm_head to the integers .* --set "
        r"int8\.embeddings=skip",
    ):
        compress("int8", base=base)
    _, values = compress("int8", {"embeddings": "skip"}, base=base)
    assert "backbone.layers.*.mixer.dt_proj.weight" in values["left_alone"]


def test_a_class_built_on_linear_that_computes_something_else_is_no_linear_layer():
    from methods.compression.layers import as_linear

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Plain(torch.nn.Linear):
        pass

    assert as_linear(Doubled(8, 8)) is None and as_linear(Plain(8, 4)) is not None


@pytest.mark.slow
def test_rows_that_are_all_too_long_are_a_line(tmp_path, compress):
    base = saved_family("Llama", tmp_path / "base")
    config = json.loads((base.path / "config.json").read_text()) | {"max_position_embeddings": 12}
    (base.path / "config.json").write_text(json.dumps(config))
    for name in ("sft", "response", "answer-only"):
        with pytest.raises(CellFailed, match=r"rows are longer than the 12 tokens"):
            compress(name, base=describe(base.path, name="short"))


def test_a_packed_student_is_copied_and_not_cut(tmp_path, compress):
    from methods.identity import Identity
    from methods.untouched import Untouched

    packed, _ = compress("int8")
    for method, given in (
        (Untouched(), {"student": str(packed.path), "student_base": packed}),
        (Identity(), {"teacher": packed}),
    ):
        student = method.compress(
            SimpleNamespace(workdir=tmp_path / type(method).__name__, **given)
        )
        assert (
            student.digest == describe(packed.path, name="x").digest and student.path != packed.path
        )
    with pytest.raises(
        CellFailed, match=r"student depth:0\.5: .* is packed \(int8\+tied\) and cannot be cut"
    ):
        student_of("depth:0.5", packed, seed=0, device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("given", "repository", "revision"),
    [
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name", "org/name", None),
        ("gpt2", "gpt2", None),
        ("gpt2@refs/pr/3", "gpt2", "refs/pr/3"),
    ],
)
def test_hub_ids_may_be_single_names_and_name_a_revision(
    given, repository, revision, tmp_path, random_model, monkeypatch
):
    asked = []

    def download(name, **more):
        asked.append((name, more.get("revision")))
        return str(random_model.path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve(given, cache=tmp_path).digest == f"hub:{repository}@{random_model.path.name}"
    assert asked == [(repository, revision)]


def test_a_single_name_that_the_hub_does_not_know_is_an_unknown_model(tmp_path, no_network):
    for name in ("nothing-of-the-kind", "tinny"):
        with pytest.raises(HarnessError, match="unknown model"):
            resolve(name, cache=tmp_path)


def test_the_smallest_type_that_holds_every_weight():
    layer = torch.nn.Linear(4, 4)
    layer.weight.data.fill_(1 + 2**-7)
    layer.bias.data.fill_(0.5)
    assert smallest_exact_dtype(layer) is torch.bfloat16
    layer.weight.data.fill_(1 + 2**-10)
    assert smallest_exact_dtype(layer) is torch.float16
    layer.bias.data.fill_(1e-9)
    assert smallest_exact_dtype(layer) is torch.float32


def test_the_page_of_architectures_is_what_its_program_writes():
    import importlib.util

    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location(
        "architectures", root / "tests" / "benchmarks" / "architectures.py"
    )
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    results = json.loads(program.RESULTS.read_text(encoding="utf-8"))
    assert results.keys() == FAMILIES.keys() and len(results) >= 36
    assert program.PAGE.read_text(encoding="utf-8") == program.page(results)
    assert not [
        message
        for row in results.values()
        for message in row.values()
        if message.startswith("breaks")
    ]
