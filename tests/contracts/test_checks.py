"""The public contract checks: every planted fault is found by the check that is there for it."""

import contextlib
import json
import os
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, ClassVar

import pytest
from distilling import FEW
from pydantic import BeforeValidator

import suites
from harness.checking.method_checks import METHOD_CHECKS
from harness.checking.task_checks import TASK_CHECKS
from harness.checking.trespass import written_outside
from harness.contract import Grade, Method
from harness.errors import Skipped
from harness.testing import ContractError, check_method, check_task
from methods.base import settings
from methods.cot import ChainOfThought
from methods.identity import Identity
from methods.int8 import Int8
from methods.prune_depth import DepthPruning
from methods.prune_magnitude import MagnitudePruning, RandomPruning
from methods.prune_wanda import WandaPruning
from methods.sft import SupervisedFineTuning
from methods.uld import UniversalLogitDistillation
from suites.gsm8k_mini import Gsm8kMini
from suites.mmlu_mini import MmluMini


@settings
class Misspelt(MagnitudePruning):
    draws_random_number: ClassVar[bool] = True


@dataclass
class Changeable:
    family: ClassVar[str] = "pruning"
    ratio: float = 0.5

    def compress(self, job):
        raise NotImplementedError


@settings
class Halving(MagnitudePruning):
    ratio: Annotated[float, BeforeValidator(lambda value: value / 2)] = 0.5


@settings
class Crashing(MagnitudePruning):
    def compress(self, job):
        raise RuntimeError("no driver")


@settings
class Empty(MagnitudePruning):
    def compress(self, job):
        return None


@settings
class Vandal(MagnitudePruning):
    def compress(self, job):
        student = super().compress(job)
        (job.teacher.path / "generation_config.json").write_text("{}")
        return student


@settings
class Stray(MagnitudePruning):
    def compress(self, job):
        (job.workdir.parent / "stray.txt").write_text("here")
        return super().compress(job)


@settings
class BadCost(MagnitudePruning):
    def compress(self, job):
        student = super().compress(job)
        (job.workdir / "cost.json").write_text(json.dumps({"seconds": -1}))
        return student


@settings
class WrongStart(Identity):
    starts_from: ClassVar[str] = "student"


@settings
class Lazy(MagnitudePruning):
    def compress(self, job):
        from harness.models.shaping import copy_student

        return copy_student(job.teacher, job.workdir / "student", name="lazy")


@settings
class SecretTraining(SupervisedFineTuning):
    trains: ClassVar[bool] = False


@settings
class NoTraining(MagnitudePruning):
    trains: ClassVar[bool] = True


@settings
class SecretReading(WandaPruning):
    calibrates = False


@settings
class NoReading(MagnitudePruning):
    calibrates = True


@settings
class SecretTraces(ChainOfThought):
    writes_traces = False


@settings
class SecretTeacher(UniversalLogitDistillation):
    reads_teacher_live = False


@settings
class NoTeacher(SupervisedFineTuning):
    reads_teacher_live = True


@settings
class OtherShape(DepthPruning):
    def resulting_shape(self, before):
        return before


@settings
class WrongBits(Int8):
    bits_per_weight = 4.25


@settings
class NoBits(Int8):
    bits_per_weight = None


@settings
class HiddenZeros(MagnitudePruning):
    leaves_zeros: ClassVar[bool] = False


@settings
class NoZeros(DepthPruning):
    leaves_zeros: ClassVar[bool] = True
    zero_share = 0.5


@settings
class Unopenable(MagnitudePruning):
    def compress(self, job):
        student = super().compress(job)
        path = student.path / "config.json"
        path.write_text(path.read_text().replace('"llama"', '"nonesuch"'))
        return student


@settings
class Forgetful(RandomPruning):
    def compress(self, job):
        return super().compress(replace(job, seed=int.from_bytes(os.urandom(4), "little")))


@settings
class SecretDraw(RandomPruning):
    draws_random_numbers: ClassVar[bool] = False


@settings
class NoDraw(MagnitudePruning):
    draws_random_numbers: ClassVar[bool] = True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faulty", "check", "message"),
    [
        (Misspelt, "class_loads", "did you mean 'draws_random_numbers'"),
        (Changeable, "settings_round_trip", "can be changed after it was built"),
        (Halving, "settings_round_trip", "it is another method"),
        (Crashing, "makes_a_student", "no driver"),
        (Empty, "makes_a_student", "compress returned None"),
        (Vandal, "makes_a_student", "changed its inputs: tiny/generation_config.json"),
        (Stray, "writes_in_its_folders_only", "stray.txt"),
        (BadCost, "cost_is_valid", "seconds"),
        (WrongStart, "starts_from", "declared starts_from = 'student'"),
        (Lazy, "changes_a_weight", "number by number"),
        (SecretTraining, "trains", "declared trains = False; by cost.json it saw 1,"),
        (NoTraining, "trains", "declared trains = True; by cost.json it saw 0 tokens"),
        (
            SecretReading,
            "calibrates",
            "declared calibrates = False; the task's train split was read",
        ),
        (
            NoReading,
            "calibrates",
            "declared calibrates = True; the task's train split was not read",
        ),
        (SecretTraces, "writes_traces", "declared writes_traces = False; the cache holds 1 files"),
        (SecretTeacher, "reads_teacher_live", "declared reads_teacher_live = False"),
        (NoTeacher, "reads_teacher_live", "the teacher read nothing"),
        (OtherShape, "resulting_shape", "layers 8 announced, 6 in config.json"),
        (
            WrongBits,
            "bits_per_weight",
            "declared bits_per_weight = 4.25; the matrices of the student's blocks take 8.",
        ),
        (NoBits, "bits_per_weight", "declared bits_per_weight = None"),
        (HiddenZeros, "leaves_zeros", "declared leaves_zeros = False; 0.5"),
        (NoZeros, "leaves_zeros", "declared zero_share = 0.5"),
        (Unopenable, "reopens", "nonesuch"),
        (Forgetful, "repeats_itself", "draw from job.seed alone"),
        (
            SecretDraw,
            "draws_random_numbers",
            "declared draws_random_numbers = False, trains = False; students of two seeds differ",
        ),
        (NoDraw, "draws_random_numbers", "students of two seeds are the same"),
    ],
)
def test_a_faulty_method_is_found_by_the_check_that_is_there_for_it(
    faulty, check, message, tmp_path
):
    with pytest.raises(ContractError) as caught:
        check_method(
            faulty,
            FEW if hasattr(faulty, "validation_rows") else {},
            folder=tmp_path / "kept",
            fresh=False,
        )
    assert str(caught.value).startswith(
        f"method '{faulty.__name__}': {check}: "
    ) and message in str(caught.value)


HEAVY = """
import torch
from typing import ClassVar
from methods.base import settings
from methods.prune_magnitude import MagnitudePruning

@settings
class Heavy(MagnitudePruning):
    pass
"""
DOORED = """
from methods.base import settings
from methods.lowrank import PlainLowRank

@settings
class Doored(PlainLowRank):
    keeps_architecture = True
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source", "check", "message"),
    [
        ("Heavy", HEAVY, "builds_without_torch", "imports torch"),
        (
            "Doored",
            DOORED,
            "reopens",
            "a fresh process with transformers alone cannot open the student",
        ),
    ],
)
def test_a_fresh_process_finds_what_this_one_cannot(
    name, source, check, message, tmp_path, monkeypatch
):
    import importlib

    (tmp_path / f"faulty_{name.lower()}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    method_class = getattr(importlib.import_module(f"faulty_{name.lower()}"), name)
    with pytest.raises(ContractError) as caught:
        check_method(method_class)
    assert f": {check}: " in str(caught.value) and message in str(caught.value)


@pytest.mark.slow
def test_a_sound_method_passes_every_check_in_a_minute_and_leaves_nothing_behind(
    tmp_path, monkeypatch
):
    import time

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    began = time.monotonic()
    checked = check_method("prune-depth-random", {"ratio": 0.5})
    assert (
        checked.passed == tuple(METHOD_CHECKS)
        and not checked.skipped
        and time.monotonic() - began < 60
    )
    assert not list(tmp_path.glob("check-*"))  # torch may make an empty folder of its own there


def test_a_method_that_this_machine_cannot_run_is_said_to_be_unchecked(tmp_path):
    @settings
    class Elsewhere(MagnitudePruning):
        def compress(self, job):
            raise Skipped("it runs on a GPU")

    checked = check_method(Elsewhere, fresh=False)
    assert checked.passed == ("class_loads", "settings_round_trip", "builds_without_torch")
    assert set(checked.skipped) == set(METHOD_CHECKS) - set(checked.passed) and set(
        checked.skipped.values()
    ) == {"it runs on a GPU"}


def test_files_written_elsewhere_are_seen_and_those_that_are_gone_are_not(tmp_path):
    allowed, elsewhere = tmp_path / "given", tmp_path / "other"
    allowed.mkdir()
    elsewhere.mkdir()
    with written_outside([allowed]) as outside:
        (allowed / "a").write_text("in")
        (elsewhere / "b").write_text("out")
        (elsewhere / "c").write_text("for a moment")
        (elsewhere / "c").unlink()
        (elsewhere / "d").mkdir()
        (elsewhere / "d" / "f").write_text("out")
        (elsewhere / "empty").mkdir()
        os.rename(allowed / "a", elsewhere / "e")  # noqa: PTH104  as libraries do
        (elsewhere / "b").read_text()
    assert outside == [str(elsewhere / name) for name in ("b", "d", "d/f", "e")]


@pytest.mark.parametrize("name", suites.TASKS)
def test_every_task_keeps_the_contract(name, monkeypatch):
    checked = check_task(name, items=60)
    assert set(checked.passed) | set(checked.skipped) == set(TASK_CHECKS)
    if name.endswith("-mini"):
        assert checked.passed == tuple(TASK_CHECKS)


class NoName(Gsm8kMini):
    name = ""


class WrongKind(Gsm8kMini):
    kind = "write"


class AtMark(Gsm8kMini):
    version = "1@2"


class SureGuess(MmluMini):
    chance = 1.5


class NoItems(Gsm8kMini):
    def examples(self, split, source):
        return iter(())


class OtherName(Gsm8kMini):
    def examples(self, split, source):
        return (replace(example, task="other") for example in super().examples(split, source))


class Shuffled(Gsm8kMini):
    def examples(self, split, source):
        import random

        examples = list(islice(super().examples(split, source), 300))
        return iter(random.SystemRandom().sample(examples, len(examples)))


class Leaking(Gsm8kMini):
    def examples(self, split, source):
        yield from super().examples("validation" if split == "test" else split, source)


class Strict(Gsm8kMini):
    def grade(self, gold, text):
        return (
            Grade(extractor=self.primary, extracted=None, correct=False),
            *super().grade(gold, text)[1:],
        )


class OtherFirst(Gsm8kMini):
    def grade(self, gold, text):
        return tuple(reversed(super().grade(gold, text)))


class Kind(Gsm8kMini):
    def grade(self, gold, text):
        return (Grade(extractor=self.primary, extracted=gold, correct=True),)


class Unbuilt(Gsm8kMini):
    def lm_eval_tasks(self, source):
        return {}


class Online(Gsm8kMini):
    def lm_eval_tasks(self, source):
        import socket

        with contextlib.suppress(OSError):
            socket.create_connection(("192.0.2.1", 9), timeout=0.01)
        return super().lm_eval_tasks(source)


@pytest.mark.parametrize(
    ("faulty", "check", "message"),
    [
        (NoName, "declares_itself", "declared name = ''"),
        (WrongKind, "declares_itself", "declared kind = 'write'"),
        (AtMark, "declares_itself", "neither may hold an @"),
        (SureGuess, "chance_is_a_share", "declared chance = 1.5"),
        (NoItems, "has_items", "no split has an item"),
        (OtherName, "has_items", "names the task 'other'; declared name = 'gsm8k-mini'"),
        (Shuffled, "items_repeat", "read twice, the items"),
        (Leaking, "splits_share_no_item", "an item stands in"),
        (Strict, "grades_gold_right", "takes the gold answer for wrong"),
        (OtherFirst, "grades_gold_right", "declared primary"),
        (Kind, "grades_wrong_wrong", "takes '' for right"),
        (Unbuilt, "lm_eval_builds_it", "must be a mapping"),
        (Online, "is_offline", "asked the network for"),
    ],
)
def test_a_faulty_task_is_found_by_the_check_that_is_there_for_it(faulty, check, message):
    with pytest.raises(ContractError) as caught:
        check_task(faulty, items=40)
    assert f": {check}: " in str(caught.value) and message in str(caught.value)


def test_every_check_has_a_name_of_its_own_and_says_what_it_holds():
    for check in (*METHOD_CHECKS.values(), *TASK_CHECKS.values()):
        assert check.__doc__
    assert issubclass(ContractError, AssertionError) and isinstance(Method, type)
