"""Cuts: masks by hand, what stays zero, counts by formula, and laws that any cut obeys."""

import json

import pytest
import torch

from harness.errors import CellFailed
from harness.models.language_model import open_model
from methods.compression.sparsity import pruning_mask, sparse_gpt, wanda_score


def test_masks_by_hand():
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0], [8.0, 7.0, 6.0, 5.0]])
    assert pruning_mask(score, ratio=0.5, pattern="unstructured", compare="layer").tolist() == [
        [False] * 4,
        [True] * 4,
    ]
    assert pruning_mask(score, ratio=0.5, pattern="unstructured", compare="row").tolist() == [
        [True, False, True, False],
        [True, True, False, False],
    ]
    assert pruning_mask(score, ratio=0.25, pattern="unstructured", compare="row").sum(
        1
    ).tolist() == [
        3,
        3,
    ]


@pytest.mark.parametrize(("pattern", "of"), [("2:4", 4), ("4:8", 8)])
def test_a_pattern_keeps_half_of_every_group(pattern, of):
    torch.manual_seed(1)
    score = torch.randn(6, 32)
    mask = pruning_mask(score, ratio=0.5, pattern=pattern, compare="row").view(6, -1, of)
    assert (mask.sum(-1) == of // 2).all()
    lowest_kept = score.view(6, -1, of).masked_fill(~mask, torch.inf).amin(-1)
    assert (lowest_kept >= score.view(6, -1, of).masked_fill(mask, -torch.inf).amax(-1)).all()
    with pytest.raises(CellFailed, match="groups of"):
        pruning_mask(torch.randn(2, of + 1), ratio=0.5, pattern=pattern, compare="row")


def test_equal_scores_go_by_position_and_nothing_may_go_whole():
    assert (
        pruning_mask(torch.ones(2, 4), ratio=0.5, pattern="unstructured", compare="row").tolist()
        == [[False, False, True, True]] * 2
    )
    with pytest.raises(CellFailed, match="prunes all 4 weights of a row"):
        pruning_mask(torch.ones(2, 4), ratio=0.9, pattern="unstructured", compare="row")


def test_wanda_by_hand_prefers_a_small_weight_behind_a_large_input():
    score = wanda_score(torch.tensor([[1.0, -0.5], [0.1, 0.2]]), torch.tensor([1.0, 100.0]))
    assert score.tolist() == [[1.0, 5.0], [pytest.approx(0.1), pytest.approx(2.0)]]


def test_the_golden_row_of_wanda_drops_what_magnitude_keeps():
    row, squares = (
        torch.tensor([[4.0, -3.0, 2.0, 1.0]]),
        torch.tensor([0.1, 1.0, 2.0, 5.0]).square(),
    )
    options = {"ratio": 0.5, "pattern": "unstructured", "compare": "row"}
    assert pruning_mask(wanda_score(row, squares), **options).tolist() == [
        [False, False, True, True]
    ]
    assert pruning_mask(row.abs(), **options).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("columns", [8, 128])
def test_sparse_gpt_loses_less_on_real_inputs_than_magnitude_and_wanda(pattern, columns):
    torch.manual_seed(2)
    x = torch.randn(400, 32) @ torch.randn(32, 32)
    w, gram = torch.randn(24, 32), x.T @ x

    def error(pruned):
        gap = (w - pruned).double()
        return float((gap @ gram.double() * gap).sum())

    pruned = sparse_gpt(w, gram, ratio=0.5, pattern=pattern, dampening=0.01, columns=columns)
    assert float((pruned == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    for score, compare in ((w.abs(), "layer"), (wanda_score(w, gram.diagonal()), "row")):
        assert error(pruned) < 0.97 * error(
            w * pruning_mask(score, ratio=0.5, pattern=pattern, compare=compare)
        )


@pytest.mark.slow
def test_every_zeroing_method_zeroes_what_it_was_asked_to_and_nothing_else(compress, tiny):
    from safetensors.torch import load_file

    base = load_file(tiny.path / "model.safetensors")
    for name in ("prune-magnitude", "prune-random", "prune-wanda", "prune-sparsegpt"):
        for settings in ({"ratio": 0.3}, {"pattern": "2:4"}):
            student, notes = compress(name, settings)
            tensors = load_file(student.path / "model.safetensors")
            ratio = settings.get("ratio", 0.5)
            assert notes["zeros"] == pytest.approx(ratio, abs=0.01) and notes["layers"] == 56
            assert tensors["model.embed_tokens.weight"].equal(base["model.embed_tokens.weight"])
            down_proj = tensors["model.layers.3.mlp.down_proj.weight"]
            if name != "prune-sparsegpt":  # it moves what stays
                assert (down_proj == 0).float().mean().item() == pytest.approx(ratio, abs=0.01)
                assert down_proj[down_proj != 0].equal(
                    base["model.layers.3.mlp.down_proj.weight"][down_proj != 0]
                )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prune-magnitude", "prune-wanda", "prune-sparsegpt"])
def test_zeros_stay_zero_through_recovery_with_decay(compress, name):
    from safetensors.torch import load_file

    pruned, _ = compress(name, {"pattern": "2:4"})
    recovered, _ = compress(
        "sft", {"weight_decay": 0.1, "learning_rate": 3e-3}, base=pruned, tokens=6_000
    )
    before, after = (
        load_file(student.path / "model.safetensors") for student in (pruned, recovered)
    )
    for name, tensor in before.items():
        if name.endswith("_proj.weight"):
            assert (after[name][tensor == 0] == 0).all() and not after[name].equal(tensor), name
    # and through rounding, symmetric or not
    for settings in ({}, {"group_size": 32, "symmetric": False}):
        packed = open_model(
            compress("int4" if settings else "int8", settings, base=recovered)[0]
        ).model
        for name, tensor in after.items():
            if name.endswith("_proj.weight"):
                assert (
                    packed.get_submodule(name.removesuffix(".weight")).dequantized()[tensor == 0]
                    == 0
                ).all(), name
    dense, _ = compress("sft", tokens=3_000)  # a model without zeros is held by nothing
    assert (
        float(
            (load_file(dense.path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"] == 0)
            .float()
            .mean()
        )
        < 0.01
    )


def test_depth_drops_the_blocks_of_least_influence_and_counts(compress, tiny):
    student, notes = compress("prune-depth", {"ratio": 0.375})
    assert len(notes["dropped"]) == 3 and notes["kept"] == 5
    lowest = sorted(range(8), key=lambda block: notes["influence"][block])[:3]
    assert notes["dropped"] == sorted(lowest)
    block = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128 + 2 * 128
    assert notes["parameters"][0] - notes["parameters"][1] == 3 * block
    _, notes = compress("prune-depth", {"ratio": 0.375, "contiguous": True})
    first = notes["dropped"][0]
    assert notes["dropped"] == [first, first + 1, first + 2]
    drawn = {
        tuple(compress("prune-depth-random", {"ratio": 0.375}, seed=seed)[1]["dropped"])
        for seed in (1, 2, 3)
    }
    assert len(drawn) > 1
    opened = open_model(student)
    # keys and values are kept by it
    assert [block.self_attn.layer_idx for block in opened.model.model.layers] == list(range(5))


def test_a_shortened_student_is_the_teacher_without_those_blocks(compress, tiny):
    student, notes = compress("prune-depth", {"ratio": 0.375})
    teacher, short = open_model(tiny).model, open_model(student).model
    teacher.model.layers = torch.nn.ModuleList(
        block for number, block in enumerate(teacher.model.layers) if number not in notes["dropped"]
    )
    ids = torch.arange(2, 42)[None]
    with torch.inference_mode():
        expected = teacher(ids, use_cache=False).logits
        assert torch.equal(short(ids, use_cache=False).logits, expected)
        # with keys and values kept: their places are numbered anew
        first = short(ids[:, :30], use_cache=True)
        second = short(ids[:, 30:], past_key_values=first.past_key_values, use_cache=True).logits
    assert torch.allclose(second, expected[:, 30:], atol=1e-4)


def test_few_zeros_are_a_mask_where_pruning_made_them_and_none_where_a_file_of_few_bits_did(
    compress, tiny
):
    from methods.masks import kept_weights
    from methods.training.optimizer import freeze_zeros

    pruned = open_model(compress("prune-magnitude", {"ratio": 0.005})[0]).model
    assert len(freeze_zeros(pruned)) == 56  # every matrix of the blocks
    plain = open_model(tiny).model
    weight = plain.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        # a Q4_0 file has so many
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.1] = 0
    assert kept_weights(plain.config, weight) is None and not freeze_zeros(plain)
    with torch.no_grad():
        weight[:, ::2] = 0
    assert len(freeze_zeros(plain)) == 1  # pruned elsewhere: half of it


def test_influence_is_that_of_the_states_in_between(embedded, compress):
    from methods.compression.calibration import CalibrationData, block_influence

    ids = torch.arange(3, 3 + 4 * 32).view(4, 32)
    scores = block_influence(embedded, CalibrationData(ids, {}))
    with torch.no_grad():
        states = embedded.model.model(ids, output_hidden_states=True).hidden_states
    # the last of these states has passed the final norm, so the last block's is not among them
    for block in range(7):
        assert scores[block] == pytest.approx(
            float((1 - torch.cosine_similarity(states[block], states[block + 1], dim=-1)).mean()),
            abs=1e-5,
        )


def test_a_cut_that_leaves_nothing_is_refused(compress):
    with pytest.raises(CellFailed, match="removes all of 8 blocks"):
        compress("prune-depth", {"ratio": 0.97})
    with pytest.raises(CellFailed, match="at least one of each must stay"):
        compress("prune-width", {"groups": 2})
    for ratio in (0, 0.001):
        with pytest.raises(
            CellFailed, match=r"of 384 channels \(in multiples of 16\) and groups=0 prune nothing"
        ):
            compress("prune-width", {"ratio": ratio})


def saved(opened, folder, name):
    from harness.models.checkpoint import describe

    opened.model.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)
    return describe(folder, name=name)


def test_an_expert_beside_the_blocks_is_not_taken_for_their_feed_forward(small):
    opened = small("Llama")
    # what a shared expert's block says: the width of the others
    opened.model.config.intermediate_size = 100
    from types import SimpleNamespace

    from methods.compression.narrowing import WidthPruner
    from methods.prune_width import WidthPruning

    with pytest.raises(
        CellFailed,
        match=r"cannot narrow model\.layers\.\*\.mlp of LlamaForCausalLM; use prune-depth",
    ):
        WidthPruner(
            SimpleNamespace(model=opened.model, method="prune-width"), WidthPruning().reduction()
        )


@pytest.mark.slow
def test_channels_stay_in_multiples_that_kernels_take(compress):
    for settings, channels in (
        ({"ratio": 0.2}, 304),
        ({"ratio": 0.2, "multiple": 1}, 307),
        ({"ratio": 0.2, "multiple": 64}, 320),
    ):
        for name in ("prune-width", "prune-width-random"):
            assert compress(name, settings)[1]["channels"] == [384, [channels, channels]], (
                name,
                settings,
            )


@pytest.mark.slow
def test_a_norm_over_all_heads_is_named_and_nothing_is_cut(small, compress, tmp_path):
    base = saved(small("Olmo2"), tmp_path / "olmo", "Olmo2")
    with pytest.raises(
        CellFailed,
        match=r"groups=1 does not know model\.layers\.0\.self_attn\.q_norm\.weight, .*give "
        r"groups=0",
    ):
        compress("prune-width", {**FEW, "ratio": 0.25, "groups": 1}, base=base)
    assert compress("prune-width", {**FEW, "ratio": 0.25}, base=base)[1]["channels"] == [
        64,
        [48, 48],
    ]


def test_what_was_zero_stays_zero_behind_sparse_gpt(compress):
    base, _ = compress("prune-magnitude", {"ratio": 0.3})
    student, notes = compress("prune-sparsegpt", FEW, base=base)
    before, after = (open_model(model).model.state_dict() for model in (base, student))
    assert notes["zeros"] == pytest.approx(0.5, abs=0.01)
    for name, tensor in before.items():
        if name.endswith("_proj.weight"):
            assert (after[name][tensor == 0] == 0).all(), name
    with pytest.raises(CellFailed, match="no weight was pruned; give a larger ratio"):
        compress("prune-magnitude", {"ratio": 0.2}, base=student)


FEW = {"num_calibration_samples": 6, "max_seq_length": 48}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("prune-wanda", FEW),
        ("prune-sparsegpt", FEW),
        ("int4-calibrated", {**FEW, "group_size": 32}),
        ("lowrank", {**FEW, "keep": 0.7}),
        ("prune-depth", {**FEW, "ratio": 0.5}),
        ("prune-width", {**FEW, "ratio": 0.25, "groups": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Gemma2", "GPTNeoX"])
def test_cuts_of_other_architectures_reopen_and_keep_their_law(
    name, settings, kind, small, compress, tmp_path
):
    """Biases, norms of queries, alternating layer types, parallel blocks: each by something that
    must hold of what reopens.
    """
    base = saved(small(kind), tmp_path / kind, kind)
    if name == "prune-width" and kind == "GPTNeoX":
        with pytest.raises(CellFailed, match=r"groups=1 needs attentions of q_proj.*give groups=0"):
            compress(name, settings, base=base)
        settings = {**settings, "groups": 0}
    student, notes = compress(name, settings, base=base)
    before, after = open_model(base).model, open_model(student).model
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        logits, teacher_logits = (
            after(ids, use_cache=False).logits,
            before(ids, use_cache=False).logits,
        )
        first = after(ids[:, :30], use_cache=True)
        second = after(ids[:, 30:], past_key_values=first.past_key_values, use_cache=True).logits
    # cached is uncached
    assert torch.allclose(second, logits[:, 30:], atol=0.02 if name == "int4-calibrated" else 1e-4)
    assert not torch.equal(logits, teacher_logits)
    if name in ("prune-wanda", "prune-sparsegpt"):
        assert notes["zeros"] == pytest.approx(0.5, abs=0.02)
    elif name == "prune-depth":
        assert len(notes["dropped"]) == 1 and after.config.num_hidden_layers == 1
        assert len(getattr(after.config, "layer_types", None) or [0]) == 1
    elif name == "prune-width":
        assert (
            sum(parameter.numel() for parameter in after.parameters())
            == notes["parameters"][1]
            < notes["parameters"][0]
        )
    elif name == "lowrank":
        assert notes["kept_of_them"] == pytest.approx(0.7, abs=0.05)


def dead(tiny, folder):
    """Save `tiny` with a quarter of each feed-forward's channels, and one head group, that give
    nothing.
    """
    from harness.models.checkpoint import describe
    from harness.models.language_model import open_model

    opened = open_model(tiny)
    with torch.no_grad():
        for block in opened.model.model.layers:
            block.mlp.down_proj.weight[:, ::4] = 0
            block.self_attn.o_proj.weight[:, 64:] = 0  # queries 2 and 3: the second group
    opened.model.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)
    return describe(folder, name="dead")


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_cutting_what_gives_nothing_changes_nothing(allocation, compress, tiny, tmp_path):
    base = dead(tiny, tmp_path / "dead")
    student, notes = compress(
        "prune-width", {"ratio": 0.25, "groups": 1, "allocation": allocation}, base=base
    )
    assert notes["channels"] == [384, [288, 288]] and notes["head_groups"] == [2, 1]
    small, large = open_model(student), open_model(base)
    ids = torch.arange(2, 60)[None]
    with torch.no_grad():
        assert torch.allclose(small.model(ids).logits, large.model(ids).logits, atol=1e-4)
    config = json.loads((student.path / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (
        2,
        1,
        32,
    )
    parameters = sum(parameter.numel() for parameter in small.model.parameters())
    assert (
        parameters
        == notes["parameters"][1]
        == 1024 * 128 + 128 + 8 * (3 * 128 * 288 + 2 * 128 * 64 + 2 * 128 * 32 + 2 * 128)
    )


@pytest.mark.slow
def test_widths_that_differ_reopen_and_can_be_packed_and_trained(compress, tiny):
    student, notes = compress("prune-width", {"ratio": 0.4, "allocation": "global"})
    narrowest, widest = notes["channels"][1]
    assert narrowest < widest
    trained, _ = compress("sft", base=student)
    opened = open_model(trained)
    assert {block.mlp.up_proj.out_features for block in opened.model.model.layers} >= {
        narrowest,
        widest,
    }
    small, notes = compress("int8", base=trained)
    assert (
        notes["packed_layers"] == 56
        and open_model(small).model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    )
