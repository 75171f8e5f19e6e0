"""What a run is asked to do: one frozen object, built alike from flags, from a TOML file and from
Python.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
)

from harness.errors import HarnessError, unknown
from harness.files import untrusted
from harness.models.artefacts import default_cache as default_cache
from harness.planning.fields import Spelling, with_environment
from harness.planning.spec import parse_limit, parse_set, parse_teachers, split_list, split_teachers
from harness.renames.options import current_options

# seen tokens: under a minute of training for the embedded student on two cores
EMBEDDED_BUDGET = 250_000
OUTSIDE_BUDGET = 1_000_000


Count = Annotated[int, Field(ge=1)]
_SECONDS_IN = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def parse_seconds(given: object) -> object:
    """Read `90`, `90s`, `30m` or `2h` as seconds; what is no text comes back as it is."""
    if not isinstance(given, str):
        return given
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*(s|m|min|h|)\s*", given)
    if not match:
        raise ValueError("give seconds, minutes or hours: 90s, 30m, 2h")
    return float(match[1]) * _SECONDS_IN[match[2]]


def _list_reader(split: Callable[[str], list[str]]) -> tuple[BeforeValidator, Spelling]:
    """Return what reads a list written as one text, in a run file or in Python, and as texts typed
    once or several times.
    """
    return (
        BeforeValidator(lambda given: tuple(split(given)) if isinstance(given, str) else given),
        Spelling(read=lambda texts: tuple(part for text in texts for part in split(text))),
    )


Names = Annotated[tuple[str, ...], *_list_reader(lambda text: split_list(text))]
Teachers = Annotated[tuple[str, ...], *_list_reader(lambda text: split_teachers(text))]


class _Settings(BaseModel):
    """A part of a configuration. A field is the one place of a setting: every door reads its name,
    type, bounds, default and help there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _writable(cls, value: object) -> object:
        if any(
            "\0" in str(one)
            for one in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(one, (str, Path))
        ):
            raise ValueError("it holds a NUL character, which no name or path may")
        return value


class RowSettings(_Settings):
    """Which rows a run has and what trains them."""

    methods: Names = Field(
        default=("cot", "response"),
        description="Rows, separated by commas: cot,response or response[temperature=4].",
    )
    suite: Names = Field(
        default=("math",),
        description="Suites, tasks, lm-eval:NAME or a suite file, separated by commas: "
        "math,knowledge.",
    )
    teacher: Teachers = Field(
        default=("tiny",),
        description="Embedded name, folder, .gguf file or Hub id; several: a=0.7,b=0.3.",
    )
    student: str = Field(
        default="depth:0.5", description="depth:S, width:S or scratch:S of the teacher, or a model."
    )
    seeds: Annotated[int, Field(ge=1, le=100)] = Field(
        default=1, description="Independent training runs of each trained row."
    )
    budget: Annotated[
        Annotated[int, Field(ge=100)] | None,
        Spelling(default=f"{EMBEDDED_BUDGET} for the embedded pair, else {OUTSIDE_BUDGET}"),
    ] = Field(default=None, description="Seen tokens of each trained row.")
    rows: Count = Field(default=2_000, description="Distinct training items.")
    tune: bool = Field(
        default=False,
        description="Choose each trained row's learning rate on a held-out slice of train, once.",
    )
    set: Annotated[
        dict[str, dict[str, JsonValue]],
        Spelling(read=lambda texts: parse_set(texts), metavar="METHOD.SETTING=VALUE"),
    ] = Field(default={}, description="A method's setting, repeatable: response.temperature=4.")
    controls: bool = Field(default=True, description="Run the controls that the methods need.")

    @field_validator("suite", "teacher")
    @classmethod
    def _some(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("nothing is named; leave it out for its default")
        return names

    @field_validator("methods", "suite", "teacher")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if any(not name.strip() for name in names):
            raise ValueError("a name is empty")
        if double := next((name for at, name in enumerate(names) if name in names[:at]), ""):
            raise ValueError(
                f"{double} is named twice; name it once (more trainings of a row: --seeds 3)"
            )
        return names

    @field_validator("student")
    @classmethod
    def _not_empty(cls, name: str) -> str:
        if not name.strip():
            raise ValueError("it is empty; write for example depth:0.5")
        return name

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """The teachers without their weights."""
        return parse_teachers(self.teacher)[0]

    @property
    def teacher_weights(self) -> tuple[float, ...]:
        """The teachers' weights, which sum to 1; none where none is given."""
        return parse_teachers(self.teacher)[1]


class ScoringSettings(_Settings):
    """On what rows are made and scored, and how prompts are shown."""

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="{choices}.")
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Spelling(default="auto: float32 on CPU, bfloat16 on GPU"),
    ] = Field(default="auto", description="{choices}.")
    chat_template: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Show prompts in the chat template: auto (where the teacher is from outside "
        "and has one), on, off.",
    )
    system: Annotated[str | None, Spelling(default="none", may_be_empty=True)] = Field(
        default=None, description="A system prompt, shown with every item of a chat model."
    )
    limit: Annotated[
        Count | dict[str, Count] | None,
        Spelling(
            read=lambda texts: parse_limit(",".join(texts)), default="all", metavar="N | TASK=N,..."
        ),
    ] = Field(
        default=None,
        description="Score a seeded sample of N items of each task, or of those named "
        "(gsm8k=20,mmlu=100): a trial, marked so in "
        "records and tables.",
    )
    include_path: Path | None = Field(
        default=None, description="Folder with YAML tasks of your own, for --suite lm-eval:NAME."
    )


class WorkSettings(_Settings):
    """How a cell goes about its work: what its process is given of a configuration, beside its
    conditions.
    """

    batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field(
        default="auto",
        description="auto (by memory) or the items scored at once; changes speed and memory, not "
        "answers.",
    )
    backend: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description="What scores: transformers, or vllm where it is installed.",
    )  # training and timing stay with transformers
    noise: Annotated[int, Field(ge=0)] = Field(
        default=100,
        description="Items on which the teacher is scored again at another dtype: the noise floor.",
    )
    grid: Annotated[str | None, Spelling(default="by device")] = Field(
        default=None,
        description="Timing: prompt tokens x batch x new tokens: 128,512x1,8x32 (all combined), or "
        "none.",
    )
    rounds: Count = Field(
        default=6, description="Timing: rounds of teacher, student, student, teacher."
    )
    track: Annotated[
        Literal["", "tensorboard", "wandb", "trackio"], Spelling(default="none", may_be_empty=True)
    ] = Field(
        default="",
        description="Show training steps in tensorboard, wandb or trackio, where it is installed.",
    )
    force: bool = Field(default=False, description="Compute finished cells again.")


class RunConfig(WorkSettings, ScoringSettings, RowSettings):
    """Everything that decides a run. Two equal configurations plan the same cells.

    Its parts, and in them the fields, stand in `--help` in the order of this file: bases count from
    the last to the first.
    """

    out: Path = Field(
        default=Path("results/runs"), description="Where cells, students and runs are kept."
    )
    cache: Annotated[
        Path | None, Spelling(default="$HARNESS_CACHE or the platform's cache folder")
    ] = Field(default=None, description="Where the teacher's work is kept.")
    data_dir: Annotated[
        Path | None, Spelling(default="$HARNESS_DATA_DIR", environment="HARNESS_DATA_DIR")
    ] = Field(default=None, description="Folder with the benchmarks' files.")
    cell_timeout: Annotated[
        Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(parse_seconds)] | None,
        Spelling(default="none", metavar="SECONDS | 30m | 2h"),
    ] = Field(default=None, description="End a cell that takes longer: 90s, 30m, 2h.")
    allow_task_code: bool = Field(
        # task files of one's own are programs: they run only where they were asked for by name
        default=False,
        description="Let the task files of --include-path run: they are programs.",
    )
    wait: bool = Field(
        default=True, description="Wait for cells that another run is computing, or leave them."
    )

    @property
    def cache_folder(self) -> Path:
        """The cache that this run reads and fills."""
        return self.cache or default_cache()

    @property
    def work(self) -> WorkSettings:
        """The part that a cell's process is given."""
        return WorkSettings.model_validate(self.model_dump(include=set(WorkSettings.model_fields)))


def build_config(values: Mapping[str, Any], *, where: str = "") -> RunConfig:
    """Check values and return the configuration; unknown keys and values out of range are the
    user's to mend.

    What nobody gave and a variable of the environment does is taken from there.
    """
    known = RunConfig.model_fields
    values = current_options(values, where=where)
    for key in values:
        if key not in known:
            raise unknown(f"setting{' in ' + where if where else ''}", key, known)
    try:
        return RunConfig.model_validate(with_environment(RunConfig, values))
    except ValidationError as problem:
        first = problem.errors()[0]
        name = str(first["loc"][0])
        told = " or ".join(
            one["msg"].removeprefix("Value error, ").lower()
            for one in problem.errors()
            if one["loc"][0] == name
        )
        flag = f"--{name.replace('_', '-')}"
        raise HarnessError(
            f"{where + ': ' if where else ''}{flag} {first['input']!r}: {told}; see harness run "
            "--help"
        ) from problem


def read_run_file(path: Path) -> dict[str, Any]:
    """Read a run file. Its keys are the long flags; `[set.response]` tables hold methods'
    settings.
    """
    if not path.exists():
        raise HarnessError(
            f"no run file at {path}; give a TOML file with for example: methods = ['cot', "
            "'response']"
        )
    values = untrusted.read_toml(path)
    return current_options(
        {key.replace("-", "_"): value for key, value in values.items()}, where=str(path)
    )


def merge_values(first: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of two doors: what was given later wins; methods' settings come together,
    one by one.
    """
    both = {**first, **later}
    if isinstance(first.get("set"), Mapping) and "set" in later:
        methods = dict.fromkeys((*first["set"], *later["set"]))
        both["set"] = {
            name: {**first["set"].get(name, {}), **later["set"].get(name, {})} for name in methods
        }
    return both
