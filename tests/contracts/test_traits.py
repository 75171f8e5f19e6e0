"""What a method declares is read from one place and refused where it is wrong.

Wrong is: unknown, misspelt, of a wrong type, or stated twice.
"""

import ast
import importlib
import itertools
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

import methods
from harness.contract import Method
from harness.errors import HarnessError, OldName
from harness.estimating.workload import workload_of
from harness.records.record import RunRecord
from harness.registry import Registry
from harness.traits import FAMILIES, OLD_NAMES, fixed_traits, known_traits, traits_by_settings

REGISTRY = Registry("method", methods.METHODS)
NUMBERS = itertools.count()
HEAD = """
from dataclasses import dataclass
from typing import ClassVar

from harness.contract import Checkpoint, Job, Method
from methods.training.base import Trained
from methods.training.distilled import Distilled
from methods.base import settings
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that loads a class `Mine` from source, as the registry loads a plug-in."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def loaded(body, *, head=HEAD, build=None):
        name = f"plug_in_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(head + textwrap.dedent(body))
        importlib.invalidate_caches()
        registry = Registry("method", {**methods.METHODS, "mine": f"{name}:Mine"})
        return registry.load("mine") if build is None else registry.build("mine", build)

    return loaded


def stated(*lines, base="", compress=True):
    """Return the source of a class that states these lines."""
    body = [f"    {line}" for line in lines]
    body += (
        ["    def compress(self, job: Job) -> Checkpoint:", "        raise NotImplementedError"]
        if compress
        else ["    pass"]
    )
    return "\n".join(["@settings", f"class Mine{base}:", *body])


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_trait_of_every_method_is_of_its_declared_type(name):
    method = REGISTRY.build(name, {})
    assert isinstance(method, Method) and method.family in FAMILIES
    assert (
        method.starts_from == "teacher"
        if method.family in ("pruning", "low-rank", "quantization", "cache")
        else method.starts_from
    )
    assert (
        not (method.trains and method.calibrates)
        and (method.calibration_tokens() > (0, 0)) >= method.calibrates
    )


def test_no_trait_goes_by_an_old_name_here():
    for name in methods.METHODS:
        for base in REGISTRY.load(name).__mro__:
            # a plug-in of old names gives the classes before it the old ones too, for `super()`
            stated = vars(base)
            assert all(
                old not in stated or stated[old] is stated[new] for old, new in OLD_NAMES.items()
            ), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", ["", "(Method)"])
def test_what_a_class_does_not_state_has_the_defaults_of_the_protocol(load, family, base):
    method = load(
        stated(f"family: ClassVar[str] = {family!r}", "share: float = 0.5", base=base), build={}
    )
    assert method.starts_from == (
        "teacher" if family in ("pruning", "low-rank", "quantization", "cache") else "student"
    )
    assert not any(getattr(method, name) for name, kind in fixed_traits().items() if kind is bool)
    assert (
        method.controls == ()
        and method.control_settings() == {}
        and method.resulting_shape("shape") == "shape"
    )
    assert workload_of(method).starts_from_teacher == (method.starts_from == "teacher")


def test_a_stated_start_counts_whatever_the_family(load):
    cut = load(
        stated("family: ClassVar[str] = 'pruning'", "starts_from: ClassVar[str] = 'student'"),
        build={},
    )
    assert not workload_of(cut).starts_from_teacher


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["family: ClassVar[str] = 'layer-pruning'"],
            "unknown family 'layer-pruning'; did you mean 'pruning'? known: cache, control",
        ),
        (["family: ClassVar[str] = 'quantisation'"], "did you mean 'quantization'?"),
        (["family: ClassVar[str] = 'Pruning'"], "did you mean 'pruning'?"),
        (["family = 3"], "unknown family 3"),
        (
            ["family: str = 'pruning'"],
            "family is a trait, and is written as a setting; write family: ClassVar = VALUE",
        ),
        (["trains: ClassVar[bool] = True"], "states no family"),
        (
            ["family = 'pruning'", "starts_from = 'the teacher'"],
            "starts_from = 'the teacher' is not one of 'teacher', 'student'",
        ),
        (
            ["family = 'pruning'", "starts_form = 'student'"],
            "unknown trait 'starts_form'; did you mean 'starts_from'?",
        ),
        (
            ["family = 'pruning'", "draws_random_number: ClassVar[bool] = True"],
            "did you mean 'draws_random_numbers'?",
        ),
        (["family = 'pruning'", "drawz: ClassVar[bool] = True"], "unknown trait 'drawz'"),
        (
            ["family = 'pruning'", "is_contol: ClassVar[bool]"],
            "unknown trait 'is_contol'; did you mean 'is_control'?",
        ),
        (["family = 'pruning'", "lowest = 3"], "a constant of its own is named _lowest"),
        (["family = 'pruning'", "trains = 'no'"], "trains = 'no' is not True or False"),
        (["family = 'pruning'", "simulated = 1"], "simulated = 1 is not True or False"),
        (
            ["family = 'pruning'", "bits_per_weight = '4'"],
            "bits_per_weight = '4' is not a number or None",
        ),
        (
            ["family = 'pruning'", "controls = 'sft'"],
            "controls = 'sft' is not a tuple of names, as ('sft', 'untouched') or ('sft',)",
        ),
        (["family = 'pruning'", "controls = ['sft']"], "is not a tuple of names"),
        (
            ["family = 'pruning'", "controls = ('stf',)"],
            "its control 'stf' is no method; did you mean 'sft'?",
        ),
        (
            ["family = 'pruning'", "resulting_shape = 3"],
            "resulting_shape is called by the harness, and is 3",
        ),
        (
            ["family = 'pruning'", "def writes_traces(self): return True"],
            "is not a value or a property (write @property above it)",
        ),
        (
            ["family = 'pruning'", "def control_setings(self): return {}"],
            "did you mean 'control_settings'?",
        ),
        (
            ["family = 'pruning'", "def resulting_shapes(self, before): return before"],
            "did you mean 'resulting_shape'?",
        ),
        (
            ["family = 'pruning'", "@property", "def trains(self): return False"],
            "trains belongs to the class and cannot",
        ),
        (
            ["family = 'pruning'", "draws = True", "draws_random_numbers = True"],
            "are two names for one trait; keep draws_random_numbers",
        ),
        (
            ["family = 'pruning'", "shaped = None", "resulting_shape = None"],
            "are two names for one trait",
        ),
    ],
)
def test_what_is_unknown_is_refused_in_one_line_when_it_is_loaded(load, lines, message):
    with pytest.raises(HarnessError) as refusal:
        load(stated(*lines))
    assert (
        message in str(refusal.value)
        and "\n" not in str(refusal.value)
        and "Mine" in str(refusal.value)
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "class Mine:\n    family = 'pruning'\n    def compress(self, job): pass",
            "is no dataclass; write @settings above the class",
        ),
        ("def Mine(job): pass", "is no class"),
        ("Mine = {'family': 'pruning'}", "is no class"),
        (stated("family = 'pruning'", compress=False), "has no compress(self, job)"),
        (
            stated("family = 'pruning'", base="(Method)", compress=False),
            "has no compress(self, job)",
        ),
        (
            stated("family: ClassVar[str] = 'pruning'", "ratio: float"),
            "the setting ratio has no default",
        ),
        ("raise RuntimeError('no driver')", "cannot be imported from"),
        ("def Mine(:", "cannot be imported from"),
    ],
)
def test_what_is_no_method_is_refused_in_one_line(load, source, message):
    with pytest.raises(HarnessError) as refusal:
        load(source)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_trait_that_follows_from_settings_is_looked_at_with_them(load):
    source = stated(
        "family = 'quantization'",
        "size: int = 4",
        "@property",
        "def bits_per_weight(self): return 16 / self.size or '?'",
    )
    assert load(source, build={"size": 2}).bits_per_weight == 8
    with pytest.raises(
        HarnessError, match=r"method 'mine': its trait bits_per_weight fails \(ZeroDivisionError"
    ):
        load(source, build={"size": 0})
    wrong = source.replace("16 / self.size or '?'", "str(self.size)")
    with pytest.raises(HarnessError, match="bits_per_weight = '4' is not a number or None"):
        load(wrong, build={})


def test_helpers_private_constants_and_nested_classes_are_a_methods_own(load):
    lines = [
        "family = 'pruning'",
        "_lowest = 3",
        "@staticmethod",
        "def compressed(w): return w",
        "def score(self): return 1",
        "@property",
        "def width(self): return 2",
        "class Part: pass",
    ]
    assert load(stated(*lines), build={}).score() == 1


OLD = {
    "draws": ("draws = True", lambda method: method.draws_random_numbers),
    "several_teachers": ("several_teachers = True", lambda method: method.needs_several_teachers),
    "same_vocabulary": ("same_vocabulary = True", lambda method: method.needs_same_vocabulary),
    "reads_inside": ("reads_inside = True", lambda method: method.reads_teacher_live),
    "hands_on": (
        "def hands_on(self): return {'ratio': 1}",
        lambda method: method.control_settings() == {"ratio": 1},
    ),
    "shaped": (
        "def shaped(self, before): return 'smaller'",
        lambda method: method.resulting_shape("whole") == "smaller",
    ),
}


@pytest.mark.parametrize("old", OLD_NAMES)
@pytest.mark.parametrize("base", ["", "(Trained)"])
def test_a_plug_in_of_old_names_keeps_working_with_one_deprecation_line(load, old, base):
    line, holds = OLD[old]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method = load(stated("family = 'distillation'", line, base=base), build={})
    messages = [str(warning.message) for warning in caught if warning.category is OldName]
    assert (
        holds(method)
        and len(messages) == 1
        and f"{old} is {OLD_NAMES[old]} now" in messages[0]
        and "\n" not in messages[0]
    )


def test_an_old_override_reaches_what_its_base_has_by_the_new_name(load):
    source = stated(
        "def hands_on(self): return {**super().hands_on(), 'more': 1}", base="(Distilled)"
    )
    with pytest.warns(OldName):
        method = load(source, build={"temperature": 4.0})
    assert method.control_settings() == {"temperature": 4.0, "more": 1}


def test_a_setting_may_have_an_old_name_and_then_is_no_trait(load):
    method = load(stated("family: ClassVar[str] = 'pruning'", "draws: int = 3"), build={"draws": 4})
    assert method.draws == 4 and not method.draws_random_numbers


def test_old_names_do_not_switch_off_what_a_base_says_by_its_settings(load):
    with pytest.warns(OldName):
        method = load(stated("reads_inside = False", base="(Distilled)"), build={"cache": "off"})
    assert method.reads_teacher_live


ROOM = "import harness.planning.plan\n"


@pytest.mark.parametrize(
    "imports",
    [
        ROOM,
        "from harness.reporting.formats import as_markdown\n",
        "from harness.records import store\n",
        "def late():\n    from harness.api import run\n",
        "if True:\n    import harness.cli.app as door\n",
    ],
)
def test_a_plug_in_that_imports_the_upper_half_is_refused(load, imports):
    with pytest.raises(
        HarnessError, match=r"imports harness\.\w+, which runs and reports methods"
    ) as refusal:
        load(stated("family = 'pruning'"), head=HEAD + imports)
    assert "\n" not in str(refusal.value)


def test_a_helper_of_its_own_package_is_looked_at_too_and_types_are_not(tmp_path, monkeypatch):
    package = tmp_path / "outer_house"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "method.py").write_text(
        HEAD + "from . import helper\n" + stated("family = 'pruning'")
    )
    (package / "helper.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import harness.planning.plan\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("method", {**methods.METHODS, "mine": "outer_house.method:Mine"})
    assert registry.load("mine")
    (package / "helper.py").write_text("def late():\n    import harness.planning.plan\n")
    again = Registry(
        "method",
        {**methods.METHODS, "mine": "outer_house.method:Mine", "other": "outer_house.method:Mine"},
    )
    with pytest.raises(HarnessError, match=r"outer_house\.helper imports harness\.plan"):
        again.load("mine")


def python_of(folder):
    """Yield the files of a package with their syntax trees."""
    for path in sorted(Path(methods.__file__).parents[1].joinpath(folder).rglob("*.py")):
        yield path.name, ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", ["harness", "methods"])
def test_no_trait_is_read_by_a_getattr_with_a_default(folder):
    """A default would hide a misspelt trait.

    `closure` asks whether a base class is a method's; it reads no value.
    """
    traits = {*known_traits(), *OLD_NAMES, "pattern", "allocation", "ratio", "micro_batch_size"}
    for name, tree in python_of(folder):
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") in ("getattr", "hasattr")
                and len(node.args) > 1
            ):
                attribute = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
                # traits.py completes classes
                assert attribute not in traits or name in ("traits.py", "closure.py"), (
                    f"{name}:{node.lineno}"
                )


def test_the_harness_treats_no_method_specially_by_its_name():
    allowed = {("advice.py", "response")}  # whose settings it recommends
    for name, tree in python_of("harness"):
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "attr", "") == "startswith"
                and isinstance(node.args[0], ast.Constant)
            ):
                assert node.args[0].value not in methods.METHODS, f"{name}:{node.lineno}"
            # kinds of storage have names of methods
            if isinstance(node, ast.Compare) and name != "packed.py":
                parts = [
                    part
                    for side in (node.left, *node.comparators)
                    for part in (getattr(side, "elts", None) or [side])
                ]
                values = {part.value for part in parts if isinstance(part, ast.Constant)}
                assert (
                    not {(name, value) for value in values if value in methods.METHODS} - allowed
                ), f"{name}:{node.lineno}"


def test_traits_by_settings_are_properties_of_the_protocol():
    assert set(traits_by_settings()) >= {
        "reads_teacher_live",
        "writes_traces",
        "calibrates",
        "bits_per_weight",
    }


def test_the_command_line_refuses_in_one_line_and_says_old_names_in_one(tmp_path):
    """A family of another name silently cut the student in place of the teacher."""
    sources = {"odd": "family = 'layer-pruning'", "old": "family = 'pruning'\n    draws = True"}
    for name, lines in sources.items():
        (tmp_path / f"{name}.py").write_text(HEAD + stated(lines))
    info = tmp_path / "outer-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outer\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[harness.methods]\n" + "".join(f"{name} = {name}:Mine\n" for name in sources)
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(methods.__file__).parents[1])])

    def run(name):
        words = [
            "run",
            "--methods",
            name,
            "--suite",
            "mini",
            "--seeds",
            "3",
            "--device",
            "cpu",
            "--dry-run",
        ]
        line = [sys.executable, "-P", "-m", "harness.cli", *words]
        return subprocess.run(
            line,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
            check=False,
        )

    odd, old = run("odd"), run("old")
    assert odd.returncode == 2 and odd.stderr.startswith(
        "harness: method 'odd' (odd:Mine): unknown family 'layer-pruning'; did you mean"
    )
    assert len(odd.stderr.splitlines()) == 1
    assert old.returncode == 0 and old.stderr.splitlines().count("harness: " + OLD_LINE) == 1, (
        old.stderr
    )
    # it draws, so each seed is a row
    assert all(f"old seed {seed}: to compute" in old.stdout for seed in (1, 2, 3))


@pytest.mark.parametrize(
    ("fields", "is_one"),
    [
        ({"method": "untouched"}, True),  # of before `starts_from` was noted
        ({"method": "identity"}, False),
        ({"method": "mine", "starts_from": "student"}, True),
        ({"method": "mine", "starts_from": "teacher"}, False),
        ({"method": "untouched", "starts_from": "teacher"}, False),
        ({"method": "mine", "starts_from": "student", "trains": True}, False),
        ({"method": "mine", "starts_from": "student", "family": "pruning"}, False),
    ],
)
def test_the_row_before_training_is_known_by_what_it_started_from(fields, is_one):
    assert (
        RunRecord.model_construct(
            **{"family": "control", "trains": False, "starts_from": "", **fields}
        ).is_starting_point
        is is_one
    )


OLD_LINE = (
    "method 'old' (old:Mine): draws is draws_random_numbers now; the old name works until version "
    "0.3.0 and 2027-12-01"
)
