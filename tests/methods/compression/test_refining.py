"""Refining a rounded matrix: by hand, by brute force, and as laws over random matrices."""

from itertools import product

import pytest
import torch

from methods.compression.refining import _Rows, refine, solved_scales
from methods.compression.rounding import QuantizedMatrix, round_with_gptq, round_with_searched_gptq


def moments_of(x):
    return x.T @ x


def errors(matrix, w, gram):
    """Return each row's squared error of the outputs."""
    difference = w - matrix.dequantized()
    return ((difference @ gram) * difference).sum(1)


def test_a_scale_by_hand():
    # codes 2 and 1 for weights 1 and 1, inputs independent: s = (2*1 + 1*1) / (4 + 1) = 0.6
    rows = _Rows(torch.ones(1, 2), torch.tensor([[2.0, 1.0]]), torch.full((1, 2), -8.0), None)
    solved = solved_scales(rows, torch.tensor([[0.5]]).bfloat16(), torch.eye(2), 2)
    assert float(solved) == float(torch.tensor(0.6).bfloat16())
    # the second input alone counts: the scale makes it exact
    solved = solved_scales(
        rows, torch.tensor([[0.5]]).bfloat16(), torch.diag(torch.tensor([1e-9, 1.0])), 2
    )
    assert float(solved) == 1.0


def test_scales_of_several_groups_are_a_least_squares_solution():
    torch.manual_seed(0)
    x, w = torch.randn(60, 12), torch.randn(1, 12)
    codes = torch.randint(-8, 8, (1, 12)).float()
    rows = _Rows(w, codes, torch.full((1, 12), -8.0), None)
    solved = solved_scales(rows, torch.ones(1, 3).bfloat16(), moments_of(x), 5)
    columns = [x[:, part] @ codes[0, part] for part in (slice(0, 5), slice(5, 10), slice(10, 12))]
    expected = torch.linalg.lstsq(torch.stack(columns, 1), (x @ w.T)).solution[:, 0]
    assert torch.allclose(solved.float()[0], expected, rtol=1e-2)


def test_codes_end_where_no_single_code_can_do_better():
    torch.manual_seed(1)
    x, w = torch.randn(40, 6) @ torch.randn(6, 6), torch.randn(3, 6)
    gram = moments_of(x)
    refined = refine(round_with_gptq(w, gram, bits=4, group_size=6), w, gram, passes=12)
    damped = gram + 1e-3 * gram.diagonal().mean() * torch.eye(6)
    reached = errors(refined, w, damped)
    for row, column, code in product(range(3), range(6), range(16)):
        codes = refined.codes.clone()
        codes[row, column] = code
        moved = QuantizedMatrix(codes, refined.scale, refined.zero_point, 6)
        assert errors(moved, w, damped)[row] >= reached[row] * (1 - 1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("inputs", "group_size"), [(96, 32), (150, 64)])
def test_no_row_gets_worse_and_all_together_better(inputs, group_size, symmetric):
    torch.manual_seed(2)
    x = torch.randn(300, inputs) @ torch.randn(inputs, inputs)
    w, gram = torch.randn(20, inputs), moments_of(x)
    first = round_with_searched_gptq(w, gram, group_size=group_size, symmetric=symmetric)
    damped = gram + 1e-3 * gram.diagonal().mean() * torch.eye(inputs)
    reached = errors(first, w, damped)
    for passes in (1, 3):
        refined = refine(first, w, gram, passes=passes)
        assert (errors(refined, w, damped) <= reached * (1 + 1e-4)).all()
        assert refined.codes.min() >= 0 and refined.codes.max() <= 15
        assert refined.scale.dtype == torch.bfloat16
        assert torch.equal(refined.zero_point, first.zero_point)
    assert errors(refined, w, damped).sum() < 0.97 * reached.sum()


def test_pruned_weights_stay_zero_and_rows_do_not_depend_on_one_another():
    torch.manual_seed(3)
    x = torch.randn(200, 64)
    keep = torch.rand(8, 64) > 0.5
    w, gram = torch.randn(8, 64) * keep, moments_of(x)
    first = round_with_searched_gptq(w, gram, group_size=32, keep_mask=keep)
    refined = refine(first, w, gram, passes=2, keep_mask=keep)
    assert not refined.dequantized()[~keep].any() and not torch.equal(refined.codes, first.codes)
    alone = refine(first.rows(slice(2, 3)), w[2:3], gram, passes=2, keep_mask=keep[2:3])
    assert torch.equal(alone.codes[0], refined.codes[2])
