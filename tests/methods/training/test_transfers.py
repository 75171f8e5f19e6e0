"""Numbers are read at once, and exactly as `float` reads each of them."""

import torch

from methods.training.transfers import read_numbers, to_device


def test_numbers_are_read_exactly_whatever_their_types():
    scalars = [
        torch.tensor(0.1),
        torch.tensor([[2.5]]),
        torch.tensor(1 / 3, dtype=torch.bfloat16),
        torch.tensor(float("nan")),
        torch.tensor(3.0, requires_grad=True),
    ]
    numbers = read_numbers(scalars)
    assert [repr(number) for number in numbers] == [repr(scalar.item()) for scalar in scalars]
    exact = torch.tensor(1 / 3, dtype=torch.float64)
    assert read_numbers([exact, torch.tensor(0.1)]) == [1 / 3, float(torch.tensor(0.1))]
    assert read_numbers([]) == []


def test_a_tensor_goes_to_a_device():
    tensor = torch.arange(3)
    assert to_device(tensor, "cpu") is tensor
    assert to_device(tensor, "meta").device.type == "meta"
