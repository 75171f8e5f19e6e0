"""Checks of what a method declares, made when its class is loaded; errors are one line.

Unknown traits, families and starts are refused. A class that derives from nothing is completed
with the defaults of `harness.contract.Method`, so that other modules read each trait as an
attribute. Names of older versions are read with a deprecation line.
"""

import dataclasses
import difflib
import inspect
import warnings
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from harness.contract import Family, Method
from harness.errors import HarnessError, OldName, in_one_line
from harness.renames.notice import renames_of

FAMILIES: tuple[str, ...] = get_args(Family)
# families whose students are made from the teacher, unless the method states another start
FROM_TEACHER = ("pruning", "low-rank", "quantization", "cache")
RENAMED = renames_of("trait")
OLD_NAMES: Mapping[str, str] = {old: rename.new for old, rename in RENAMED.items()}
# similarity from which a helper's name counts as a misspelt protocol method: one letter of ten
_MISSPELLING_RATIO = 0.9


@cache
def fixed_traits() -> Mapping[str, Any]:
    """Return the traits that belong to a class, with their types."""
    return {
        name: get_args(hint)[0] for name, hint in get_type_hints(Method, {"Shape": Any}).items()
    }


@cache
def traits_by_settings() -> Mapping[str, Any]:
    """Return the traits that may follow from settings, with their types."""
    properties = {
        name: value for name, value in vars(Method).items() if isinstance(value, property)
    }
    return {name: get_type_hints(value.fget)["return"] for name, value in properties.items()}


@cache
def protocol_methods() -> tuple[str, ...]:
    """Return the names of what the harness may call."""
    return tuple(name for name, value in vars(Method).items() if inspect.isfunction(value))


def known_traits() -> tuple[str, ...]:
    """Return every name that a method may state."""
    return (*fixed_traits(), *traits_by_settings(), *protocol_methods())


def complete_method(name: str, method_class: type[Any], methods: Collection[str]) -> type[Any]:
    """Return a method's class, completed with defaults.

    `methods` are the names that controls may have. Raises `HarnessError` for what is misspelt,
    unknown, of a wrong type, or stated by two names.
    """
    where = f"method {name!r} ({method_class.__module__}:{method_class.__qualname__})"
    if not dataclasses.is_dataclass(method_class):
        raise HarnessError(
            f"{where} is no dataclass; write @settings above the class (from methods.base import "
            "settings)"
        )
    fields = _setting_names(where, method_class)
    _read_old_names(where, method_class, fields)
    for base in _own_classes(method_class):
        _refuse_unknown(where, base, fields)
    _fill_defaults(where, method_class)
    for trait, kind in (*fixed_traits().items(), *traits_by_settings().items()):
        stated = inspect.getattr_static(method_class, trait)
        if not isinstance(stated, property):
            _refuse_type(where, trait, stated, kind)
        elif trait in fixed_traits():
            raise HarnessError(
                f"{where}: {trait} belongs to the class and cannot follow from settings; write "
                f"{trait}: ClassVar = VALUE"
            )
    for called in protocol_methods():
        value = getattr(method_class, called)
        if not callable(value):
            raise HarnessError(
                f"{where}: {called} is called by the harness, and is {value!r}; write def "
                f"{called}(self)"
            )
    method: type[Any] = method_class
    if method.compress is Method.compress:
        raise HarnessError(f"{where} has no compress(self, job), which makes the student")
    for control in method.controls:
        if control not in methods:
            raise HarnessError(
                f"{where}: its control {control!r} is no method{_suggestion(control, methods)}"
            )
    return method


def refuse_values(name: str, method: Any) -> None:
    """Refuse traits of a method that are of a wrong type, or that cannot be computed.

    They are read from a method that was built with its settings.
    """
    for trait, kind in traits_by_settings().items():
        try:
            value = getattr(method, trait)
        except Exception as problem:  # a plug-in's own code
            raise HarnessError(
                f"method {name!r}: its trait {trait} fails ({in_one_line(problem)})"
            ) from problem
        _refuse_type(f"method {name!r}", trait, value, kind)


def _own_classes(method_class: type[Any]) -> Iterator[type[Any]]:
    """Yield the classes that may state something, base classes first."""
    return (
        base
        for base in reversed(method_class.__mro__)
        if base not in (object, Method) and base.__module__ != "typing"
    )


def _setting_names(where: str, method_class: type[Any]) -> tuple[str, ...]:
    """Return the names of a method's settings.

    Refuses settings without a default, and traits that are written as settings.
    """
    for field in dataclasses.fields(method_class):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise HarnessError(f"{where}: the setting {field.name} has no default; give it one")
        if field.name in known_traits():
            raise HarnessError(
                f"{where}: {field.name} is a trait, and is written as a setting; write "
                f"{field.name}: ClassVar = VALUE"
            )
    return tuple(field.name for field in dataclasses.fields(method_class))


def _read_old_names(where: str, method_class: type[Any], fields: Collection[str]) -> None:
    """Let what is stated by an old name count by its new one, and report it once.

    Refuses a class that states one trait by both names.
    """
    renames_used = []
    for base in _own_classes(method_class):
        stated = vars(base)
        for old, new in OLD_NAMES.items():
            # A field is a setting of the class's own. A function that both names have is an alias
            # which `_keep_callable` made when a class derived from this one was loaded.
            is_alias = inspect.isfunction(stated.get(old)) and stated[old] is stated.get(new)
            if old not in stated or old in fields or is_alias:
                continue
            if new in stated:
                raise HarnessError(
                    f"{where}: {old} and {new} are two names for one trait; keep {new}"
                )
            # `False` leaves a trait that follows from settings to the property of a base class
            if stated[old] is not False or new in fixed_traits():
                setattr(base, new, stated[old])
            renames_used.append(RENAMED[old])
            _keep_callable(method_class, old, new)
    if renames_used:
        changes = dict.fromkeys(f"{rename.old} is {rename.new} now" for rename in renames_used)
        message = f"{where}: {', '.join(changes)}; the old name {renames_used[0].until}"
        warnings.warn(message, OldName, stacklevel=2)


def _keep_callable(method_class: type[Any], old: str, new: str) -> None:
    """Let `super().OLD()` reach what the classes before it have by the new name."""
    for base in (*_own_classes(method_class), Method):
        if new in vars(base) and old not in vars(base) and inspect.isfunction(vars(base)[new]):
            setattr(base, old, vars(base)[new])


def _refuse_unknown(where: str, stating_class: type[Any], fields: Collection[str]) -> None:
    """Refuse public names that are no setting, no trait and no helper.

    These are constants, and misspelt methods of the protocol.
    """
    known_names = (*known_traits(), *OLD_NAMES)
    for name in dict.fromkeys((*vars(stating_class), *inspect.get_annotations(stating_class))):
        if name.startswith("_") or name in known_names or name in fields:
            continue
        helper = callable(value := inspect.getattr_static(stating_class, name, None)) or isinstance(
            value, property | classmethod | staticmethod
        )
        if not helper:
            raise HarnessError(
                f"{where}: unknown trait {name!r}{_suggestion(name, known_traits())} "
                f"(a setting is annotated with its type, a constant of its own is named _{name})"
            )
        near = difflib.get_close_matches(name, known_names, n=1, cutoff=_MISSPELLING_RATIO)
        if near and near[0] in (*protocol_methods(), *OLD_NAMES):
            raise HarnessError(
                f"{where}: {name} is nothing that the harness calls; did you mean {near[0]!r}? "
                f"Else name it _{name}"
            )


def _fill_defaults(where: str, method_class: type[Any]) -> None:
    """Give a class the defaults of what it does not state, after its family was looked at."""
    family = getattr(method_class, "family", None)
    if family is None:
        raise HarnessError(
            f"{where} states no family; write family: ClassVar = one of "
            f"{', '.join(map(repr, FAMILIES))}"
        )
    if family not in FAMILIES:
        raise HarnessError(
            f"{where}: unknown family {family!r}{_suggestion(str(family), FAMILIES)}"
        )
    if not hasattr(method_class, "starts_from"):
        method_class.starts_from = "teacher" if family in FROM_TEACHER else "student"
    for trait in known_traits():
        if not hasattr(method_class, trait):
            setattr(method_class, trait, vars(Method)[trait])


def _refuse_type(where: str, trait: str, value: object, trait_type: Any) -> None:
    try:
        _adapter(trait_type).validate_python(value, strict=True)
    except ValidationError as problem:
        expected = (
            "a value or a property (write @property above it)"
            if inspect.isfunction(value)
            else _describe_type(trait_type)
        )
        raise HarnessError(f"{where}: {trait} = {value!r} is not {expected}") from problem


@cache
def _adapter(trait_type: Any) -> TypeAdapter[Any]:
    return TypeAdapter(trait_type)


def _describe_type(trait_type: Any) -> str:
    """Say in words what values a type has."""
    words = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "a text",
        float | None: "a number or None",
    }
    if trait_type in words:
        return words[trait_type]
    if isinstance(get_args(trait_type)[0], str):
        return f"one of {', '.join(map(repr, get_args(trait_type)))}"
    return "a tuple of names, as ('sft', 'untouched') or ('sft',)"


def _suggestion(name: str, known_names: Collection[str]) -> str:
    """Return the nearest name, where one is near, and all known names, as the end of a message."""
    near = difflib.get_close_matches(name, sorted(known_names), n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    return f"{guess}{'' if guess else ';'} known: {', '.join(sorted(known_names))}"
