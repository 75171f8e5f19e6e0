"""The configuration of a run: one frozen object, built from flags, a TOML file or Python."""

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
    model_validator,
)

from harness.errors import HarnessError, unknown
from harness.files import untrusted
from harness.models.artefacts import default_cache as default_cache
from harness.planning.fields import Spelling, with_environment
from harness.planning.spec import (
    parse_checkpoints,
    parse_limit,
    parse_set,
    parse_teachers,
    split_list,
    split_teachers,
)
from harness.renames.options import current_options

# tokens seen in training: under a minute for the embedded student on two cores
EMBEDDED_BUDGET = 250_000
OUTSIDE_BUDGET = 1_000_000


Count = Annotated[int, Field(ge=1)]
_SECONDS_IN = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def parse_seconds(value: object) -> object:
    """Parse `90`, `90s`, `30m` or `2h` as seconds; a value that is no text is returned as it is."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*(s|m|min|h|)\s*", value)
    if not match:
        raise ValueError("give seconds, minutes or hours: 90s, 30m, 2h")
    return float(match[1]) * _SECONDS_IN[match[2]]


def _list_reader(split: Callable[[str], list[str]]) -> tuple[BeforeValidator, Spelling]:
    """Return the readers of a list: from one text (run file, Python), and from typed options."""
    return (
        BeforeValidator(lambda value: tuple(split(value)) if isinstance(value, str) else value),
        Spelling(read=lambda texts: tuple(part for text in texts for part in split(text))),
    )


def _checkpoint_specs(value: object) -> object:
    """Return checkpoints as a tuple of `NAME=MODEL`; a run file and Python may give a table."""
    if isinstance(value, Mapping):
        return tuple(f"{name}={model}" for name, model in value.items())
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], *_list_reader(lambda text: split_list(text))]
# not split at commas: a path may hold them, and the option is repeated
Checkpoints = Annotated[
    tuple[str, ...],
    BeforeValidator(_checkpoint_specs),
    Spelling(read=tuple, default="none", metavar="NAME=MODEL"),
]
Teachers = Annotated[tuple[str, ...], *_list_reader(lambda text: split_teachers(text))]


class _Settings(BaseModel):
    """A part of a configuration.

    A setting is defined once, as a field: command line, run files and Python take its name, type,
    bounds, default and help from there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _without_nul(cls, value: object) -> object:
        items = value if isinstance(value, (list, tuple)) else [value]
        if any("\0" in str(item) for item in items if isinstance(item, (str, Path))):
            raise ValueError("it contains a NUL character, which no name or path may contain")
        return value


class RowSettings(_Settings):
    """Which rows a run has, and how they are trained."""

    methods: Names = Field(
        default=("cot", "response"),
        description="Rows, separated by commas: cot,response or response[temperature=4].",
    )
    checkpoint: Checkpoints = Field(
        default=(),
        description="A row that is scored as it is, repeatable: q8=FOLDER, FILE.gguf, "
        "llama-cpp:FILE.gguf (as it is served), a Hub id (with @revision), or the folder of a LoRA "
        "adapter on the teacher. Without --methods the "
        "checkpoints are the only rows.",
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
    ] = Field(default=None, description="Tokens seen by each trained row in training.")
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
    train_data: Names = Field(
        default=(),
        description="Train on your own data instead of the tasks' train splits: a FILE of JSON "
        "lines (prompt and completion, messages, or text), ORG/NAME of the Hub, or what the "
        "teacher writes: teacher (answers to the tasks' train prompts), teacher:free (from "
        "nothing); several with weights: a.jsonl=0.7,teacher=0.3.",
    )
    calibration: Path | None = Field(
        default=None,
        description="Calibrate on your own FILE, in the same form as for --train-data.",
    )
    overlap: Literal["drop", "refuse"] = Field(
        default="drop",
        description="What happens to an example of your data that contains a scored item: "
        "{choices}.",
    )

    @model_validator(mode="before")
    @classmethod
    def _checkpoints_alone(cls, values: Any) -> Any:
        """Run no method where checkpoints are named and methods are not."""
        if isinstance(values, Mapping) and values.get("checkpoint") and "methods" not in values:
            return {**values, "methods": ()}
        return values

    @field_validator("suite", "teacher")
    @classmethod
    def _some(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("it is empty; leave it out to use its default")
        return names

    @field_validator("methods", "suite", "teacher")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if any(not name.strip() for name in names):
            raise ValueError("a name is empty")
        if repeated := next((name for name in names if names.count(name) > 1), ""):
            raise ValueError(
                f"{repeated} is named twice; name it once (to train a row several times: --seeds 3)"
            )
        return names

    @field_validator("student")
    @classmethod
    def _not_empty(cls, name: str) -> str:
        if not name.strip():
            raise ValueError("it is empty; write for example depth:0.5")
        return name

    @field_validator("checkpoint")
    @classmethod
    def _named_models(cls, specs: tuple[str, ...]) -> tuple[str, ...]:
        parse_checkpoints(specs)
        return specs

    @property
    def checkpoint_models(self) -> dict[str, str]:
        """The models of the checkpoints, by the names of their rows."""
        return parse_checkpoints(self.checkpoint)

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """The names of the teachers, without their weights."""
        return parse_teachers(self.teacher)[0]

    @property
    def teacher_weights(self) -> tuple[float, ...]:
        """The weights of the teachers, which sum to 1; empty if none was given."""
        return parse_teachers(self.teacher)[1]


class ScoringSettings(_Settings):
    """The device of a run, its items, and how prompts are rendered."""

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="{choices}.")
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Spelling(default="auto: float32 on CPU, bfloat16 on GPU"),
    ] = Field(default="auto", description="{choices}.")
    chat_template: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Render prompts with the chat template: auto (if teacher and "
        "checkpoints have one, and the teacher is not embedded), on, off.",
    )
    system: Annotated[str | None, Spelling(default="none", may_be_empty=True)] = Field(
        default=None, description="A system prompt for every item of a chat model."
    )
    limit: Annotated[
        Count | dict[str, Count] | None,
        Spelling(
            read=lambda texts: parse_limit(",".join(texts)), default="all", metavar="N | TASK=N,..."
        ),
    ] = Field(
        default=None,
        description="Score a seeded sample of N items of each task, or of the tasks named "
        "(gsm8k=20,mmlu=100): a trial, marked as such in records and tables.",
    )
    subset: Annotated[
        str | None, Spelling(default="all items", metavar="NAME:ITEMS[:SEED] | FILE")
    ] = Field(
        default=None,
        description="Score a frozen subset of each task that may become a baseline: so many items, "
        "drawn by a seed from every subject in proportion (quick:300), or those that a FILE lists "
        "(harness data subset).",
    )
    include_path: Path | None = Field(
        default=None, description="Folder with YAML tasks of your own, for --suite lm-eval:NAME."
    )
    num_fewshot: Annotated[
        Annotated[int, Field(ge=0, le=100)] | None, Spelling(default="the task's")
    ] = Field(
        default=None,
        description="Examples shown before each item of tasks lm-eval:NAME, drawn as lm-eval does.",
    )


class WorkSettings(_Settings):
    """How a cell computes: the settings that its process gets beside its conditions."""

    batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field(
        default="auto",
        description="Items scored at once, or auto (by memory); changes speed and memory, not "
        "answers.",
    )
    # training and timing always use transformers
    backend: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description="What scores: transformers, or vllm if it is installed.",
    )
    noise: Annotated[int, Field(ge=0)] = Field(
        default=100,
        description="Items on which the teacher is scored again at another dtype: the noise floor.",
    )
    grid: Annotated[str | None, Spelling(default="by device")] = Field(
        default=None,
        description="Timing: prompt tokens x batch x new tokens: 128,512x1,8x32 (all combined), "
        "full, or none.",
    )
    rounds: Annotated[int | str | None, Spelling(default="6; auto on a GPU")] = Field(
        default=None,
        description="Timing: rounds of teacher, student, student, teacher; auto:0.02:4-12 stops "
        "when intervals are within 2 %, after 4 to 12.",
    )
    track: Annotated[
        Literal["", "tensorboard", "wandb", "trackio"], Spelling(default="none", may_be_empty=True)
    ] = Field(
        default="",
        description="Show training steps in tensorboard, wandb or trackio, if it is installed.",
    )
    force: bool = Field(default=False, description="Compute finished cells again.")


class RunConfig(WorkSettings, ScoringSettings, RowSettings):
    """Everything that decides a run: two equal configurations plan the same cells.

    `--help` lists the fields in the order of this file, hence the order of the base classes:
    pydantic takes their fields from the last to the first.
    """

    out: Path = Field(
        default=Path("results/runs"), description="Folder for cells, students and runs."
    )
    cache: Annotated[
        Path | None, Spelling(default="$HARNESS_CACHE or the platform's cache folder")
    ] = Field(default=None, description="Folder for what teachers have computed.")
    data_dir: Annotated[
        Path | None, Spelling(default="$HARNESS_DATA_DIR", environment="HARNESS_DATA_DIR")
    ] = Field(default=None, description="Folder with the files of the benchmarks.")
    cell_timeout: Annotated[
        Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(parse_seconds)] | None,
        Spelling(default="none", metavar="SECONDS | 30m | 2h"),
    ] = Field(default=None, description="Stop a cell that takes longer: 90s, 30m, 2h.")
    allow_task_code: bool = Field(
        # a user's task files are programs: they run only if the user allows it
        default=False,
        description="Allow the task files of --include-path to run: they are programs.",
    )
    wait: bool = Field(
        default=True, description="Wait for cells that another run is computing, or skip them."
    )

    @property
    def cache_folder(self) -> Path:
        """The cache folder of this run."""
        return self.cache or default_cache()

    @property
    def work(self) -> WorkSettings:
        """The settings that the process of a cell gets."""
        return WorkSettings.model_validate(self.model_dump(include=set(WorkSettings.model_fields)))


def build_config(values: Mapping[str, Any], *, where: str = "") -> RunConfig:
    """Return the configuration of these values, completed from environment variables.

    `where` is the run file, for messages. Raises `HarnessError` for unknown settings and for values
    out of range.
    """
    settings = RunConfig.model_fields
    values = current_options(values, where=where)
    for name in values:
        if name not in settings:
            raise unknown(f"setting{' in ' + where if where else ''}", name, settings)
    try:
        return RunConfig.model_validate(with_environment(RunConfig, values))
    except ValidationError as problem:
        first = problem.errors()[0]
        name = str(first["loc"][0])
        reasons = " or ".join(
            error["msg"].removeprefix("Value error, ").lower()
            for error in problem.errors()
            if error["loc"][0] == name
        )
        flag = f"--{name.replace('_', '-')}"
        raise HarnessError(
            f"{where + ': ' if where else ''}{flag} {first['input']!r}: {reasons}; see harness run "
            "--help"
        ) from problem


def read_run_file(path: Path) -> dict[str, Any]:
    """Return the settings of a run file.

    Its keys are the long flags; tables `[set.METHOD]` contain the settings of methods.
    """
    if not path.exists():
        raise HarnessError(
            f"there is no run file {path}; give a TOML file with for example: methods = ['cot', "
            "'response']"
        )
    values = untrusted.read_toml(path)
    return current_options(
        {key.replace("-", "_"): value for key, value in values.items()}, where=str(path)
    )


def merge_values(first: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Return both values; later ones override first ones, settings of methods one by one."""
    merged = {**first, **later}
    if isinstance(first.get("set"), Mapping) and "set" in later:
        methods = dict.fromkeys((*first["set"], *later["set"]))
        merged["set"] = {
            name: {**first["set"].get(name, {}), **later["set"].get(name, {})} for name in methods
        }
    return merged
