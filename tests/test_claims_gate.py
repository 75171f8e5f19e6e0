"""What the gate's claims are allowed to say: above chance, pooled over tasks, missed or regressed, and what *passed* means."""

import pytest

from harness import means, stats


def marks(right, n=1000):
    return "1" * right + "0" * (n - right)


def numbers(*runs):
    return [[float(mark) for mark in run] for run in runs]


# The margin above chance


@pytest.mark.parametrize(("chance", "right"), [(0.0, 720), (0.25, 745), (0.5, 770)])
def test_a_student_exactly_at_the_margin_is_neither_kept_nor_lost(chance, right):
    """90 % of what a teacher at 80 % has above chance: 72, 74.5 and 77 % of the items."""
    for students in ([marks(right)], [marks(right - 3), marks(right + 3)]):
        assert stats.keeps(students, [marks(800)], 0.9, chance=chance) == pytest.approx((0.5, 0.5), abs=1e-6)
        assert means.keeps(numbers(*students), numbers(marks(800)), 0.9, chance=chance) == pytest.approx((0.5, 0.5), abs=1e-6)
    assert stats.keeps([marks(right + 30)], [marks(800)], 0.9, chance=chance)[0] < 0.01
    assert stats.keeps([marks(right - 30)], [marks(800)], 0.9, chance=chance)[1] < 0.01


def test_means_above_chance_are_means_of_what_is_above_it():
    teacher, student = numbers(marks(800)), numbers(marks(770))
    shifted = [[[value - 0.25 for value in side[0]]] for side in (student, teacher)]
    assert means.keeps(student, teacher, 0.9, chance=0.25) == pytest.approx(means.keeps(*shifted, 0.9))
