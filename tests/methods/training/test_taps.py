"""Hidden states and attention: what a tap sees, what its losses promise, and what it leaves as it
was.
"""

import pytest
import torch
from distilling import rows_of, seen_inside

from harness.errors import CellFailed
from methods.training.rows import TokenRow, batch_of
from methods.training.taps import InnerStates, TapConfig, parse_block_pairs


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "GPTNeoX"])
def test_equal_models_have_no_feature_or_attention_loss_and_different_ones_have(small, kind):
    student, other = small(kind), small(kind)
    taps = TapConfig(hidden_layers="auto", attention_layers="auto")
    inside, positions = seen_inside(student, other, taps)
    assert (
        inside.hidden_state_distance(positions).abs().max() < 1e-6
        and inside.attention_divergence(positions).abs().max() < 1e-6
    )
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    inside.close()
    inside, positions = seen_inside(student, other, taps)
    for loss in (inside.hidden_state_distance(positions), inside.attention_divergence(positions)):
        assert loss.shape == positions.labels_N.shape and loss.sum() > 1e-3
        gradients = torch.autograd.grad(
            loss.sum(), list(student.model.parameters()), allow_unused=True, retain_graph=True
        )
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    inside.close()


def test_a_tap_sees_the_block_and_not_what_stands_behind_the_final_norm(small):
    opened = small("Llama")
    rows = rows_of(3)
    inside, positions = seen_inside(opened, opened, TapConfig(hidden_layers="1-1,2-2"), rows)
    with torch.no_grad():
        states = opened.model(
            input_ids=positions.batch.ids,
            attention_mask=positions.batch.attention,
            output_hidden_states=True,
        ).hidden_states
        last = opened.model.model.norm(inside.hidden_taps[1][0].value)
    assert torch.allclose(inside.hidden_taps[0][0].value, states[1], atol=1e-6)
    assert torch.allclose(last, states[-1], atol=1e-5) and not torch.allclose(
        inside.hidden_taps[1][0].value, states[-1], atol=1e-3
    )


def test_attention_scores_give_the_maps_of_the_models_own_eager_attention(small):
    opened = small("Llama")
    inside, positions = seen_inside(opened, small("Llama"), TapConfig(attention_layers="2-2"))
    query, key, _, scale = inside.attention_taps[0][0].value
    from methods.training.taps import _attention_scores

    scores = _attention_scores(query, key, None, scale)
    length = scores.shape[-1]
    allowed = (
        torch.tril(torch.ones(length, length, dtype=torch.bool))
        & positions.batch.attention.bool()[:, None, None, :]
    )
    maps = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1)
    inside.close()
    opened.model.set_attn_implementation("eager")
    maps_of_model = opened.model(
        input_ids=positions.batch.ids,
        attention_mask=positions.batch.attention,
        output_attentions=True,
    ).attentions[1]
    real = positions.batch.attention.bool()[:, None, :, None].expand_as(maps)
    assert torch.allclose(maps[real], maps_of_model[real], atol=1e-6)


def test_taps_change_no_logits_and_leave_the_model_as_it_was(small):
    opened = small("Llama")
    batch = batch_of(rows_of(3), 1)
    before = opened.model(input_ids=batch.ids, attention_mask=batch.attention).logits
    configs = [module.config for module in opened.model.modules() if hasattr(module, "config")]
    inside = InnerStates(
        opened, small("Llama").model, TapConfig(hidden_layers="auto", attention_layers="auto")
    )
    assert torch.allclose(
        opened.model(input_ids=batch.ids, attention_mask=batch.attention).logits, before, atol=1e-6
    )
    inside.close()
    assert [
        module.config for module in opened.model.modules() if hasattr(module, "config")
    ] == configs
    assert not any(module._forward_hooks for module in opened.model.modules())


def test_relations_compare_models_of_unequal_heads_and_are_zero_for_equal_ones(small):
    student, teacher = (
        small("Llama"),
        small("Llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8, hidden_size=64),
    )
    inside, positions = seen_inside(student, teacher, TapConfig(attention_layers="auto"))
    divergence = inside.attention_divergence(positions)
    assert (
        divergence.shape == positions.labels_N.shape
        and bool(torch.isfinite(divergence).all())
        and divergence.sum() > 0
    )
    inside.close()
    inside, positions = seen_inside(
        student, small("Llama"), TapConfig(attention_layers="auto", attention_kind="relations")
    )
    assert inside.attention_divergence(positions).abs().max() < 1e-6
    inside.close()
    inside, positions = seen_inside(
        student, teacher, TapConfig(attention_layers="auto", relation_heads=3)
    )
    with pytest.raises(CellFailed, match="relation_heads=3 does not divide all widths"):
        inside.attention_divergence(positions)
    inside.close()


def test_relations_of_grouped_heads_agree_with_loops(small):
    student, teacher = (
        small("Llama"),
        small("Llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8, hidden_size=64),
    )
    rows, count = rows_of(3), 2
    inside, positions = seen_inside(
        student,
        teacher,
        TapConfig(attention_layers="2-2", attention_kind="relations", relation_heads=count),
        rows,
    )
    divergence = inside.attention_divergence(positions)
    expected = []
    for number, row in enumerate(rows):
        for place in range(row.trained_from - 1, len(row.ids) - 1):
            total = 0.0
            for part in range(3):  # queries, keys, values
                for relation in range(count):
                    logs = []
                    for tap in inside.attention_taps[0]:
                        # (T, heads * d), head by head
                        vectors = torch.cat(list(tap.value[part][number].detach()), dim=-1)
                        size = vectors.shape[1] // count
                        head_vectors = vectors[:, relation * size : (relation + 1) * size].double()
                        logs.append(
                            torch.log_softmax(
                                torch.stack(
                                    [
                                        head_vectors[place] @ head_vectors[key]
                                        for key in range(place + 1)
                                    ]
                                )
                                / size**0.5,
                                -1,
                            )
                        )
                    total += float((logs[1].exp() * (logs[1] - logs[0])).sum())
            expected.append(total / (3 * count))
    inside.close()
    assert divergence.tolist() == pytest.approx(expected, abs=1e-5) and max(expected) > 1e-4


def test_a_projection_starts_as_the_least_squares_map(small):
    student, teacher = small("Llama"), small("Llama", hidden_size=64)
    rows = rows_of(30, longest=40)
    inside, positions = seen_inside(
        student, teacher, TapConfig(hidden_layers="2-2", hidden_distance="plain-mse"), rows
    )
    random = float(inside.hidden_state_distance(positions).sum())
    inside.fit_projections([positions.batch])
    weight = inside.projections[0].weight
    real = positions.batch.attention.bool()
    real[:, 0] = False  # a row's first position takes no part
    x, y = (tap.value[real].detach() for tap in inside.hidden_taps[0])
    best = torch.linalg.lstsq(x.double(), y.double()).solution.T
    assert (
        torch.allclose(weight.double(), best, atol=1e-2)
        and float(inside.hidden_state_distance(positions).sum()) < random
    )
    inside.close()


def test_pairs_are_spread_evenly_or_read_and_a_missing_block_is_named():
    assert parse_block_pairs("auto", 4, 8, auto_most=4, setting="x") == (
        (1, 2),
        (2, 4),
        (3, 6),
        (4, 8),
    )
    assert parse_block_pairs("auto", 12, 28, auto_most=4, setting="x") == (
        (3, 7),
        (6, 14),
        (9, 21),
        (12, 28),
    )
    assert parse_block_pairs("auto", 4, 8, auto_most=1, setting="x") == ((4, 8),)
    assert parse_block_pairs("1-8, 4-2", 4, 8, auto_most=4, setting="x") == ((1, 8), (4, 2))
    with pytest.raises(
        CellFailed, match=r"feature_layers='5-8': the student has no block 5; its blocks are 1 to 4"
    ):
        parse_block_pairs("5-8", 4, 8, auto_most=4, setting="feature_layers")
    with pytest.raises(CellFailed, match=r"'2' is not STUDENT-TEACHER"):
        parse_block_pairs("2", 4, 8, auto_most=4, setting="feature_layers")


def test_a_model_without_the_attention_interface_is_said_so(small):
    opened = small("Llama")
    inside, positions = seen_inside(opened, small("Llama"), TapConfig(attention_layers="auto"))
    inside.attention_taps[0][0].value = None  # what a model with kernels of its own leaves
    with pytest.raises(
        CellFailed, match=r"the student's attention yields no queries and keys.*--methods feature"
    ):
        inside.attention_divergence(positions)
    inside.close()


def test_positions_zero_and_padding_take_no_part_in_features(small):
    student, teacher = small("Llama"), small("Llama")
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    rows = [TokenRow((5, 6, 7, 8), 1), TokenRow((5, 6, 7, 8, 9, 10, 11, 12), 3)]
    inside, positions = seen_inside(student, teacher, TapConfig(hidden_layers="auto"), rows)
    distance = inside.hidden_state_distance(positions)
    assert float(distance[0]) == 0 and (distance[1:] > 0).all()
    inside.close()
    inside, alone = seen_inside(student, teacher, TapConfig(hidden_layers="auto"), rows[:1])
    assert torch.allclose(inside.hidden_state_distance(alone), distance[:3], atol=1e-5)


def test_attention_counts_only_the_positions_that_it_compares(small):
    taps = TapConfig(attention_layers="auto", attention_tokens=6)
    assert [
        taps.attention_positions(row)
        for row in (
            TokenRow(tuple(range(10)), 3),
            TokenRow(tuple(range(10)), 8),
            TokenRow((1, 2, 3), 1),
        )
    ] == [4, 0, 2]
    inside, positions = seen_inside(
        small("Llama"), small("Llama", hidden_size=64), taps, [TokenRow(tuple(range(3, 13)), 3)]
    )
    divergence = inside.attention_divergence(positions)
    assert (divergence[:4] > 0).all() and (divergence[4:] == 0).all()
    inside.close()
