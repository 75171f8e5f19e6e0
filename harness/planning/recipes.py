"""Chooses the recipe of trained rows that name none: the first that fits the device. No torch.

A recipe that was typed is kept where it fits, and refused where it does not.

A row's key holds the recipe that was chosen, so a student is the same whether its recipe was typed
or chosen. A student that is stored already decides: where memory is another than when it was
trained, a run goes on with the recipe that it has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

from harness.errors import HarnessError

NamedMethod = tuple[str, Any]  # a method's name, and the method built from its settings
AUTO = "auto"
_PACKAGES = {"bf16": "torchao", "lora": "peft"}  # recipe -> the package that it trains with
_GIB = 2**30


class TrainingFit(NamedTuple):
    """Whether the training of a stage fits a device."""

    needed: float  # bytes at its peak, with the settings that it has
    least: float  # bytes at its peak with settings that need less
    memory: float  # bytes of the device
    fits: bool  # with the settings that it has
    smaller: str = ""  # settings with which it would fit, "" where it does or none are enough
    device: str = "this device"

    @property
    def advice(self) -> str:
        """What to type where it fits with other settings alone, "" where it fits as it is."""
        return f"it fits with {self.smaller}" if self.smaller else ""


class TrainingFits(Protocol):
    """Tells by formula what a training needs; `harness.estimating` has the one that is used."""

    def fit(self, stages: Sequence[NamedMethod]) -> TrainingFit:
        """Return whether the training of the last stage fits."""
        ...

    def refusal(self, stages: Sequence[NamedMethod], needed: float) -> str:
        """Say that a stage fits in no recipe, and what would; `needed` is the least of them."""
        ...


class SettledStages(NamedTuple):
    """A row's stages, each with the recipe that it trains by, and why it is not the first one."""

    stages: list[NamedMethod]
    notes: dict[str, str]  # method -> "recipe lora: full needs 25.1 GiB of 16.0"


Settle = Callable[[Sequence[NamedMethod]], SettledStages]


@dataclass(frozen=True)
class Candidates:
    """The recipes that a method could train by, the dearest first, and why others cannot be."""

    methods: dict[str, Any]  # recipe -> the method with it
    left_out: dict[str, str]  # recipe -> what it lacks


@dataclass(frozen=True)
class RecipeChooser:
    """Replaces `recipe=auto` in the stages of rows, and refuses typed recipes that do not fit."""

    fits: TrainingFits
    lacks_bf16: str = ""  # the name of a card that has no bf16
    draws_weights: bool = False  # students start from new random weights
    starts_packed: bool = False  # students start from packed weights
    # tells whether the student of stages is in the store
    is_stored: Callable[[Sequence[NamedMethod]], bool] = lambda stages: False
    has_package: Callable[[str], bool] = lambda package: find_spec(package) is not None

    def settle(self, stages: Sequence[NamedMethod]) -> SettledStages:
        """Return the stages with a recipe each.

        Raises `HarnessError` for a stage that fits in no recipe, and for one whose typed recipe
        does not fit.
        """
        return self._settled(stages, refuses_typed=True)

    def settle_control(self, stages: Sequence[NamedMethod]) -> SettledStages:
        """Return a control's stages with a recipe each; what it has of its row is kept."""
        return self._settled(stages, refuses_typed=False)

    def _settled(self, stages: Sequence[NamedMethod], *, refuses_typed: bool) -> SettledStages:
        settled: list[NamedMethod] = []
        notes: dict[str, str] = {}
        for name, method in stages:
            chosen, note = self._chosen(name, method, settled)
            is_typed = chosen is method and getattr(method, "recipe", "") != ""
            if refuses_typed and is_typed:
                self._refuse_unfit(name, method, settled)
            settled.append((name, chosen))
            if note:
                notes[name] = note
        return SettledStages(settled, notes)

    def _chosen(self, name: str, method: Any, settled: Sequence[NamedMethod]) -> tuple[Any, str]:
        if getattr(method, "recipe", "") == "bf16" and self.lacks_bf16:
            raise HarnessError(
                f"{name}[recipe=bf16]: {self.lacks_bf16} has no bf16 arithmetic; type --set "
                f"{name}.recipe=lora, or leave the recipe to what fits"
            )
        if getattr(method, "recipe", "") != AUTO:
            return method, ""
        earlier = [stage for _, stage in settled]
        first = replace(method, recipe=method.recipes[0])
        if any(stage.bits_per_weight and not stage.simulated for stage in earlier):
            return first, ""  # the chain's own rules say what packed weights take
        candidates = self._candidates(method, earlier)
        fits = {
            recipe: self.fits.fit([*settled, (name, candidate)])
            for recipe, candidate in candidates.methods.items()
        }
        fitting = self._fitting(fits)
        stored = self._stored(name, candidates, settled)
        if stored and stored != fitting:
            return candidates.methods[stored], f"recipe {stored}: the stored student has it"
        if not fitting:
            raise HarnessError(self._refusal(name, candidates, settled, fits))
        reasons = [_reason(fits, candidates.left_out, method, fitting), fits[fitting].advice]
        if not any(reasons):
            return candidates.methods[fitting], ""
        note = f"recipe {fitting}: {', '.join(filter(None, reasons))}"
        return candidates.methods[fitting], note

    def _refuse_unfit(self, name: str, method: Any, settled: Sequence[NamedMethod]) -> None:
        """Refuse a typed recipe that does not fit, unless the student is stored already."""
        typed_fit = self.fits.fit([*settled, (name, method)])
        only_typed = Candidates({method.recipe: method}, {})
        if typed_fit.fits or self._stored(name, only_typed, settled):
            return
        candidates = self._candidates(method, [stage for _, stage in settled])
        fits = {
            recipe: self.fits.fit([*settled, (name, candidate)])
            for recipe, candidate in candidates.methods.items()
        }
        if not (advice := _what_fits(name, typed_fit, fits)):
            fits = {method.recipe: typed_fit, **fits}
            methods = {method.recipe: method, **candidates.methods}
            tried = replace(candidates, methods=methods)
            raise HarnessError(self._refusal(name, tried, settled, fits))
        raise HarnessError(
            f"{name}[recipe={method.recipe}] needs {typed_fit.needed / _GIB:,.1f} GiB, and "
            f"{typed_fit.device} has {typed_fit.memory / _GIB:,.1f} GiB; type {advice}"
        )

    def _candidates(self, method: Any, earlier: Sequence[Any]) -> Candidates:
        """Return the recipes of a method that follows `earlier` methods of its chain."""
        left_out = {
            recipe: reason
            for recipe in method.recipes
            if (reason := self._lack(recipe, method, earlier))
        }
        usable = [recipe for recipe in method.recipes if recipe not in left_out]
        return Candidates({recipe: replace(method, recipe=recipe) for recipe in usable}, left_out)

    def _lack(self, recipe: str, method: Any, earlier: Sequence[Any]) -> str:
        """Return why a recipe cannot train a stage here, "" where it can."""
        is_packed = any(stage.bits_per_weight and not stage.simulated for stage in earlier)
        if recipe != "lora" and (is_packed or (self.starts_packed and not earlier)):
            return "packed weights take no gradient"
        if recipe == "bf16" and self.lacks_bf16:
            return f"{self.lacks_bf16} has no bf16"
        draws_weights = self.draws_weights and not earlier and method.starts_from == "student"
        if recipe == "lora" and (draws_weights or method.discards_weights):
            return "new weights are not worth freezing"
        if recipe == "lora" and any(stage.leaves_zeros for stage in earlier):
            return "adapters would fill the zeros"
        package = _PACKAGES.get(recipe, "")
        if package and not self.has_package(package):
            return f"{package} is not installed (pip install 'compression-harness[{recipe}]')"
        return ""

    @staticmethod
    def _fitting(fits: Mapping[str, TrainingFit]) -> str:
        """Return the first recipe that fits as it is, else the first that would with less."""
        as_it_is = next((recipe for recipe, fit in fits.items() if fit.fits), "")
        return as_it_is or next((recipe for recipe, fit in fits.items() if fit.smaller), "")

    def _stored(self, name: str, candidates: Candidates, settled: Sequence[NamedMethod]) -> str:
        """Return the recipe of a stored student of these stages, "" where there is none."""
        return next(
            (
                recipe
                for recipe, candidate in candidates.methods.items()
                if self.is_stored([*settled, (name, candidate)])
            ),
            "",
        )

    def _refusal(
        self,
        name: str,
        candidates: Candidates,
        settled: Sequence[NamedMethod],
        fits: Mapping[str, TrainingFit],
    ) -> str:
        smallest = min(fits, key=lambda recipe: fits[recipe].least)
        stages = [*settled, (name, candidates.methods[smallest])]
        missing = "".join(
            f"; recipe={recipe}: {reason}" for recipe, reason in candidates.left_out.items()
        )
        return self.fits.refusal(stages, fits[smallest].least) + missing


def _reason(
    fits: Mapping[str, TrainingFit], left_out: Mapping[str, str], method: Any, chosen: str
) -> str:
    """Say why no recipe before the chosen one was taken: what it needs of the memory, or lacks."""
    dearer = method.recipes[: method.recipes.index(chosen)]
    memory = f"of {fits[chosen].memory / _GIB:,.1f}"
    return ", ".join(
        f"{recipe}: {left_out[recipe]}"
        if recipe in left_out
        else f"{recipe} needs {fits[recipe].needed / _GIB:,.1f} GiB {memory}"
        for recipe in dearer
    )


def _what_fits(name: str, typed: TrainingFit, fits: Mapping[str, TrainingFit]) -> str:
    """Return what to type in place of a recipe that does not fit, "" where nothing does.

    Those are settings that need less, and the recipes that fit, the smallest first.
    """
    ordered = sorted(
        (recipe for recipe, fit in fits.items() if fit.fits), key=lambda name: fits[name].needed
    )
    recipes = [
        f"--set {name}.recipe={recipe} ({fits[recipe].needed / _GIB:,.1f} GiB)"
        for recipe in ordered
    ]
    return " or ".join([*recipes, typed.smaller] if typed.smaller else recipes)


def first_recipes(stages: Sequence[NamedMethod]) -> SettledStages:
    """Return the stages with the first of their recipes, where nothing tells what fits."""
    settled = [
        (name, replace(method, recipe=method.recipes[0]))
        if getattr(method, "recipe", "") == AUTO
        else (name, method)
        for name, method in stages
    ]
    return SettledStages(settled, {})
