"""Old names go on to work: typed, in files, in programs and in plug-ins.

Each gives one warning, and two names for one thing are refused.
"""

import dataclasses
import importlib
import inspect
import pickle
import re
import sys
import warnings
from typing import ClassVar

import pytest
from pydantic import Field, ValidationError

import methods
from harness import renames
from harness.contract import Method
from harness.errors import HarnessError, OldName
from harness.planning.config import build_config as configured
from harness.records import columns
from harness.registry import Registry, settings_with_defaults
from harness.renames import notice
from harness.renames.columns import current_column
from harness.renames.labels import current_label, settings_in_records
from harness.renames.modules import by_old_name
from harness.renames.options import current_flags, current_options
from harness.renames.settings import current_settings, settings_of_class
from methods.base import settings
from methods.compression.calibrated import Calibrated
from methods.int4 import Int4, Int4Calibrated

REGISTRY = Registry("method", methods.METHODS)
# one value of each old setting that is not its default, and what it is by the new name
OTHER = {
    "group": 32,
    "zeros": True,
    "damp": 0.05,
    "skip": ["*.down_proj"],
    "sequences": 8,
    "tokens": 64,
}
OTHER |= {"batch_rows": 4, "micro_rows": 2, "checkpointing": True, "warmup": 0.1, "clip": 0.5}


def other(method, old):
    """Return a value of a setting that is not the method's default."""
    return 16 if (method, old) == ("kv-int4", "group") else OTHER[old]


EVERY = [(method, old) for old, (*_, having) in renames.SETTINGS.items() for method in having]


@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
    """Let every test hear each old name again."""
    monkeypatch.setattr(notice, "_WARNED", set())


@pytest.fixture
def said():
    """Return what was said of old names."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(warning.message) for warning in caught if warning.category is OldName]


def renamed(old, value):
    return not value if renames.SETTINGS[old][1] == "opposite" else value


@pytest.mark.parametrize(("method", "old"), EVERY)
def test_an_old_setting_makes_the_same_method_as_its_new_name(method, old, said):
    new = renames.SETTINGS[old][0]
    built = REGISTRY.build(method, {old: other(method, old)})
    assert (
        built
        == REGISTRY.build(method, {new: renamed(old, other(method, old))})
        != REGISTRY.build(method, {})
    )
    assert old not in settings_with_defaults(built) and settings_with_defaults(built)[
        new
    ] == renamed(old, other(method, old))
    [line] = said()
    assert line.startswith(f"{method}.{old}: {old} is {new} now") and "\n" not in line
    assert line.endswith("; the old name works until version 0.3.0 and 2027-12-01")


def test_the_table_names_the_methods_that_have_a_setting_and_no_old_name_stands_for_another_one():
    having = {new: set() for new, *_ in renames.SETTINGS.values()}
    for name in methods.METHODS:
        for setting in settings_of_class(REGISTRY.load(name)):
            assert setting not in renames.SETTINGS, (name, setting)
            having.setdefault(setting, set()).add(name)
    for old, (new, reading, _, listed) in renames.SETTINGS.items():
        assert set(listed) == having[new] and len(set(listed)) == len(listed), old
        assert reading in ("same", "opposite")
    assert set(OTHER) == set(renames.SETTINGS)


def test_every_rename_has_a_version_and_a_date_and_one_new_name():
    every = list(notice.all_renames())
    assert len({(rename.kind, rename.old) for rename in every}) == len(every) > 10
    for rename in every:
        assert re.fullmatch(r"\d+\.\d+\.\d+", rename.version) and re.fullmatch(
            r"20\d\d-\d\d-\d\d", rename.date
        )
        assert rename.old != rename.new and rename.new not in notice.renames_of(rename.kind), (
            "a chain of renames"
        )


def test_a_name_is_said_once_in_a_process_however_many_rows_and_methods_use_it(said):
    for _ in range(3):
        REGISTRY.build("int4", {"group": 32})
        REGISTRY.build("gptq", {"group": 64})
        Int4(group=128)
    assert len(said()) == 1
    REGISTRY.build("int4", {"skip": "*.mlp"})
    assert len(said()) == 2


@pytest.mark.parametrize("old", OTHER)
def test_both_names_are_refused_where_they_differ_and_taken_where_they_agree(old, said):
    new, _, _, (method, *_) = renames.SETTINGS[old]
    default = settings_with_defaults(REGISTRY.build(method, {}))[new]
    for given in ({old: other(method, old), new: default}, {new: default, old: other(method, old)}):
        with pytest.raises(HarnessError) as refused:
            REGISTRY.build(method, given)
        line = str(refused.value)
        assert (
            "which is meant?" in line
            and f"Keep {new}" in line
            and f"{old}=" in line
            and f"{new}=" in line
            and "\n" not in line
        )
    assert said() == []
    agreed = REGISTRY.build(
        method, {old: other(method, old), new: renamed(old, other(method, old))}
    )
    assert (
        agreed == REGISTRY.build(method, {new: renamed(old, other(method, old))})
        and len(said()) == 1
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"group": 7}, "int4.group_size: .*given 7"),
        ({"zeros": "perhaps"}, "int4.symmetric: .*given 'perhaps'"),
        ({"grup": 32}, "unknown"),
    ],
)
def test_a_wrong_value_by_an_old_name_is_refused_by_the_new_one(given, message):
    with warnings.catch_warnings(), pytest.raises(HarnessError, match=message):
        warnings.simplefilter("ignore")
        REGISTRY.build("int4", given)


@pytest.mark.parametrize(
    ("typed", "symmetric"),
    [
        *[(value, False) for value in (True, "true", "yes", "on", "t", "y", "Y", 1, "1", 1.0)],
        *[(value, True) for value in (False, "false", "no", "off", "f", "n", "N", 0, "0", 0.0)],
    ],
)
def test_zeros_turns_its_sense(typed, symmetric):
    with pytest.warns(OldName, match="true by the old name is false by the new one"):
        assert REGISTRY.build("int4", {"zeros": typed}).symmetric is symmetric


def test_a_program_gives_and_reads_settings_by_old_names(said):
    method = Int4Calibrated(
        group=32, zeros=True, damp=0.02, skip=("*.mlp",), sequences=8, tokens=64
    )
    assert method == Int4Calibrated(
        group_size=32,
        symmetric=False,
        dampening_frac=0.02,
        ignore=("*.mlp",),
        num_calibration_samples=8,
        max_seq_length=64,
    )
    assert len(said()) == 6
    assert (
        method.group,
        method.zeros,
        method.damp,
        method.skip,
        method.sequences,
        method.tokens,
    ) == (
        32,
        True,
        0.02,
        ("*.mlp",),
        8,
        64,
    )
    assert len(said()) == 6, "said when they were given"
    with pytest.raises(HarnessError, match="which is meant"):
        Int4(group=32, group_size=64)
    with pytest.raises(ValidationError):
        Int4(groups=32)
    with pytest.raises(AttributeError, match="no attribute 'sequences'"):
        _ = Int4().sequences
    assert (
        pickle.loads(pickle.dumps(method)) == method
        and dataclasses.replace(method, group_size=64).group_size == 64
    )


def test_a_plug_in_of_old_names_keeps_working(said):
    @settings
    class Finer(Int4Calibrated):
        """A plug-in that states a setting anew, reads it, and hands it on."""

        group: int = 16
        zeros: bool = True
        lowest: int = 3

        def control_settings(self):
            return {"group": self.group, "skip": self.skip}

    method = Finer()
    assert settings_of_class(Finer) == (*settings_of_class(Int4Calibrated), "lowest")
    assert (method.group_size, method.symmetric, method.group, Finer(group=8).group_size) == (
        16,
        False,
        16,
        8,
    )
    assert current_settings("int4", method.control_settings(), settings_of_class(Int4)) == {
        "group_size": 16,
        "ignore": (),
    }
    assert len(said()) == 3  # group, zeros, skip


@pytest.mark.parametrize("default", [Field(default=True), dataclasses.field(default=True), True])
def test_a_default_that_a_plug_in_states_as_a_field_turns_its_sense_too(said, default):
    class Zeroed(Int4):
        zeros: bool = default

    assert settings(Zeroed)().symmetric is False and Zeroed(zeros=False).symmetric is True
    assert Int4().symmetric is True


def test_a_setting_of_another_package_may_have_a_name_that_was_ours(said):
    @settings
    class Grouped(Method):
        """It has nothing to do with rounding."""

        family: ClassVar[str] = "pruning"
        group: int = 2
        skip: int = 1

    @settings
    class Both(Calibrated):
        """Its own `group`, and our calibration."""

        group: int = 2

    assert Grouped(group=3).group == 3 and Grouped().skip == 1
    assert current_settings("own", {"group": 3, "skip": 2}, settings_of_class(Grouped)) == {
        "group": 3,
        "skip": 2,
    }
    assert Both(group=3).group == 3 and said() == []
    assert Both(sequences=4).num_calibration_samples == 4 and len(said()) == 1


def test_a_class_that_states_both_names_is_refused():
    with pytest.raises(
        HarnessError, match="group and group_size are two names for one setting; keep group_size"
    ):

        @settings
        class Both(Int4):
            group: int = 32
            group_size: int = 32


# Labels


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("int4[group=32]", "int4[group_size=32]"),
        (
            "int4[group=32,zeros=True,skip=*.mlp+*.q_proj]",
            "int4[group_size=32,symmetric=False,ignore=*.mlp+*.q_proj]",
        ),
        (
            "int4-calibrated[skip=model.[0-3].*,damp=0.1]",
            "int4-calibrated[ignore=model.[0-3].*,dampening_frac=0.1]",
        ),
        (
            "prune-wanda[sequences=8,tokens=64]+response[temperature=4.0]+int4[group=128]",
            "prune-wanda[num_calibration_samples=8,max_seq_length=64]+response[temperature=4.0]+int4[group_size=128]",
        ),
        ("int4[group_size=32]", "int4[group_size=32]"),
        ("answer-only[equal=tokens]", "answer-only[equal=tokens]"),
        ("int8[embeddings=skip]", "int8[embeddings=skip]"),
        (
            "acme[group=3,skip=1]",
            "acme[group=3,skip=1]",
        ),  # another package's: its settings are its own
        ("response", "response"),
        ("teacher tiny-math", "teacher tiny-math"),
    ],
)
def test_a_row_of_an_older_file_has_its_name_of_now(old, new, said):
    assert current_label(old) == new == current_label(new) and said() == []


def test_labels_are_those_that_a_plan_writes_now():
    from harness.planning.rows import label_of

    for method, old in EVERY:
        value = other(method, old)
        if REGISTRY.canonical(method) != method:
            continue
        written = "+".join(value) if isinstance(value, list) else str(value)
        new = renames.SETTINGS[old][0]
        assert current_label(f"{method}[{old}={written}]") == label_of(
            method, REGISTRY.build(method, {new: renamed(old, value)})
        )


def test_settings_of_records_are_renamed_by_method_and_stage_by_stage(said):
    assert settings_in_records("int4", {"group": 64, "zeros": False}) == {
        "group_size": 64,
        "symmetric": True,
    }
    assert settings_in_records("acme", {"group": 64}) == {"group": 64}
    chain = {"prune-wanda": {"skip": [], "ratio": 0.5}, "int4": {"group": 64}}
    assert settings_in_records("prune-wanda+int4", chain) == {
        "prune-wanda": {"ignore": [], "ratio": 0.5},
        "int4": {"group_size": 64},
    }
    assert said() == []


def test_a_row_that_is_typed_by_an_old_name_is_read_and_said(said):
    assert current_label("int4[group=32]", typed_in="--against") == "int4[group_size=32]"
    assert said() == [
        "--against int4[group=32]: group is group_size now; the old name works until version 0.3.0 "
        "and 2027-12-01"
    ]
    with pytest.raises(HarnessError, match="names one setting twice, as group and group_size"):
        current_label("int4[group=32,group_size=64]", typed_in="--rows")


# Columns


def test_no_column_has_an_old_header_and_every_new_one_is_a_column():
    headers = {
        value.header for value in vars(columns).values() if isinstance(value, columns.Quantity)
    }
    for old, (new, _) in renames.COLUMNS.items():
        assert new in headers and old not in headers, old


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("seen", "tokens seen"),
        ("-same top", "-top-1 agreement"),
        ("arc same top", "arc top-1 agreement"),
        ("won arc", "wins arc"),
        ("tokens seen", "tokens seen"),
        ("seen score", "seen score"),  # a task may be called so: it is asked for by its own name
        ("score", "score"),
    ],
)
def test_a_column_that_is_typed_by_its_old_header(typed, read, said):
    assert current_column(typed, {"arc"}, typed_in="--sort") == read
    assert len(said()) == (typed != read)


# Options, modules


@pytest.fixture
def pretended(monkeypatch):
    """Pretend that options and modules were renamed."""
    monkeypatch.setattr(
        renames,
        "OPTIONS",
        {"trainings": ("seeds", renames.FROM_0_1), "follow": ("track", renames.FROM_0_1)},
    )
    moved = {
        "methods._four": ("methods.int4", renames.FROM_0_1),
        "harness.errors:UserError": ("harness.errors:HarnessError", renames.FROM_0_1),
    }
    monkeypatch.setattr(renames, "MODULES", moved)


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (["--trainings", "3", "--rows", "5"], ["--seeds", "3", "--rows", "5"]),
        (["--trainings=3"], ["--seeds=3"]),
        (["--", "--trainings"], ["--", "--trainings"]),
        (["--seeds", "3"], ["--seeds", "3"]),
    ],
)
def test_a_flag_by_its_old_name(typed, read, pretended, said):
    assert current_flags(typed) == read
    assert len(said()) == (typed != read)


def test_an_option_by_its_old_name_in_a_run_file_and_in_python(pretended, said):
    assert configured({"trainings": 3}).seeds == 3 and len(said()) == 1
    assert configured({"trainings": 3, "seeds": 3}).seeds == 3 and len(said()) == 1
    with pytest.raises(HarnessError, match="trainings=3 and seeds=2 are two names for one option"):
        configured({"trainings": 3, "seeds": 2})
    with pytest.raises(HarnessError, match="--trainings and --seeds are two names for one option"):
        current_flags(["--trainings", "3", "--seeds=2"])
    assert current_options({"rows": 5}) == {"rows": 5}


def test_a_module_and_a_name_of_a_module_by_their_old_names(pretended, said):
    try:
        import methods._four as four

        assert (
            four.Int4 is Int4
            and four.__name__ == "methods.int4"
            and four.__spec__.name == "methods.int4"
        )
        assert said() == [
            "import: methods._four is methods.int4 now; the old name works until version 0.3.0 and "
            "2027-12-01"
        ]
        with pytest.raises(ModuleNotFoundError):
            import methods._five  # noqa: F401
    finally:
        sys.modules.pop("methods._four", None)
    find = by_old_name("harness.errors")
    assert find("UserError") is HarnessError and len(said()) == 2
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        find("Other")


@pytest.mark.parametrize("old", [old for old in renames.MODULES if ":" in old])
def test_a_renamed_function_or_class_is_found_in_its_module_by_the_old_name(old, said):
    new = renames.MODULES[old][0]
    (old_module, old_name), (new_module, new_name) = old.split(":"), new.split(":")
    value = getattr(importlib.import_module(old_module), old_name)
    assert value is getattr(importlib.import_module(new_module), new_name)
    [line] = said()
    assert line.startswith(f"import: {old} is {new} now; the old name works until version ")


def test_an_argument_is_taken_by_its_old_name_and_refused_beside_its_new_one(said):
    from methods.training.base import TrainOptions
    from methods.training.sources import Teachers

    teachers = {"models": (), "vocabulary": None}
    assert Teachers(**teachers, whole=True) == Teachers(**teachers, needs_all_probabilities=True)
    assert TrainOptions(inwards="x").taps == "x"
    agreed = Teachers(**teachers, inside=True, needs_inner_states=True)
    assert agreed.needs_inner_states and not agreed.own_tokenizer
    assert [line.partition(" now; ")[0] for line in said()] == [
        "methods.training.sources:Teachers: methods.training.sources:Teachers.whole is "
        "needs_all_probabilities",
        "methods.training.base:TrainOptions: methods.training.base:TrainOptions.inwards is taps",
        "methods.training.sources:Teachers: methods.training.sources:Teachers.inside is "
        "needs_inner_states",
    ]
    with pytest.raises(HarnessError, match=r"which is meant\? Keep needs_all"):
        Teachers(**teachers, whole=True, needs_all_probabilities=False)


@pytest.mark.parametrize("old", renames.ARGUMENTS)
def test_an_argument_of_the_table_is_one_of_its_function(old):
    place, _, argument = old.rpartition(".")
    module, name = place.split(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    assert renames.ARGUMENTS[old][0] in parameters and argument not in parameters
