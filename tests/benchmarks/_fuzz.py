"""What is fuzzed: a file of each kind, how it is harmed, and the readers that read it."""

import json
import random
import re
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _mutations import BINARY, HEADER, JSON, LINES, SETTINGS, Mutation
from _records import frozen_baseline, scored_record
from typer.testing import CliRunner

from harness.cli.app import app
from harness.errors import CellFailed, HarnessError
from harness.files.digests import file_digest
from harness.files.writing import read_signed, write_atomically, write_signed
from harness.models.artefacts import (
    UNSIGNED_FIELDS,
    CacheEntry,
    entry_damage,
    read_description,
    signed_description,
)
from harness.records.baseline import read_baseline, write_baseline
from harness.records.record import BadRecord, read_record, write_record
from harness.records.samples import Evidence
from harness.records.store import Store, read_records
from harness.scoring.answer_cache import AnswerCache
from harness.scoring.items import ItemRow, read_rows, write_rows

SECONDS = 20.0  # that no reading of a small file takes
EMBEDDED = Path(__file__).parents[2] / "harness" / "embedded" / "tiny"
TASKS = Path(__file__).parents[1] / "tasks"
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# what a reader accepted, by name, without what it refused or computed again
Believed = dict[str, Any]


class Hang(BaseException):
    """A reader did not return in time."""


class RawOutput(Exception):
    """A file's control characters reached the terminal."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of file: `make` writes an intact one, `read` returns what the reader accepts."""

    name: str
    mutations: Sequence[Mutation]
    make: Callable[[Path], Path]
    read: Callable[[Path, Path], Believed]
    signed: bool  # what is believed of a harmed file must be what was written
    heavy: bool = False  # needs torch


@dataclass
class FuzzResult:
    """What the mutations of a kind of file led to."""

    tried: int = 0
    refused: int = 0
    tracebacks: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)


def command(*arguments: object) -> str:
    """Run the command in this process; return what it printed.

    Raises what a user would see as a traceback.
    """
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], standalone_mode=False)
    if (
        done.exception is not None
        and not isinstance(done.exception, SystemExit)
        and not hasattr(done.exception, "format_message")
    ):
        raise done.exception
    _refuse_raw(done.output)
    return done.output


def _refuse_raw(text: str) -> None:
    if match := _CONTROL_CHARACTERS.search(text):
        raise RawOutput(f"{match[0]!r} in {text[max(0, match.start() - 60) : match.end() + 20]!r}")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `Hang` if the block takes longer than `seconds`."""

    def late(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(
    target: Target, folder: Path, *, count: int, seed: int = 0, seconds: float = SECONDS
) -> FuzzResult:
    """Harm an intact file `count` times, read it each time, and return the results."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = target.make(folder)
    original = path.read_bytes()
    truth = json.loads(json.dumps(target.read(folder, path), default=str))
    assert truth, f"{target.name}: the whole file is not believed"
    result = FuzzResult()
    for number in range(count):
        draw = random.Random(f"{seed}/{target.name}/{number}")
        path.write_bytes(_harmed(target, original, draw))
        result.tried += 1
        _judge(target, folder, path, truth, result, f"{target.name} {seed}/{number}", seconds)
        if not path.parent.is_dir():
            target.make(folder)
    return result


def _harmed(target: Target, original: bytes, draw: random.Random) -> bytes:
    """Return harmed bytes; where a mutation does not fit the file, another one is drawn."""
    while True:
        try:
            return draw.choice(target.mutations)(original, draw)
        except (ValueError, LookupError, TypeError, RecursionError):
            continue


def _judge(
    target: Target,
    folder: Path,
    path: Path,
    truth: Believed,
    result: FuzzResult,
    name: str,
    seconds: float,
) -> None:
    try:
        with time_limit(seconds):
            believed = json.loads(json.dumps(target.read(folder, path), default=str))
    except Hang:
        result.hangs.append(name)
    except (HarnessError, CellFailed, BadRecord) as problem:
        result.refused += 1
        if (
            "\n" in str(problem)
            or _CONTROL_CHARACTERS.search(str(problem))
            or len(str(problem)) > 3_000
            or not str(problem)
        ):
            result.tracebacks.append(f"{name}: no one line: {str(problem)[:200]!r}")
    except RawOutput as problem:
        result.silent.append(f"{name}: raw: {problem}")
    except Exception as problem:  # noqa: BLE001  any other is what is looked for
        place = traceback.extract_tb(problem.__traceback__)[-1]
        result.tracebacks.append(
            f"{name}: {type(problem).__name__}: {str(problem)[:120]} "
            f"({Path(place.filename).name}:{place.lineno})"
        )
    else:
        result.refused += not believed
        lies = (
            [key for key, value in believed.items() if truth.get(key) != value]
            if target.signed
            else []
        )
        if lies:
            result.silent.append(f"{name}: {lies[0]} is believed: {str(believed[lies[0]])[:80]}")


# Records, baselines, run files


def _records(folder: Path) -> list[Any]:
    teacher = scored_record("teacher", "1" * 40).model_copy(update={"measurements": ()})
    return [
        teacher,
        scored_record("cot", "10" * 20, 1),
        scored_record("plain", "100" * 13 + "1", 1, control=True),
    ]


def _study(folder: Path) -> Path:
    for record in _records(folder):
        write_record(folder / "study" / "records" / f"{record.label}.json", record)
    return folder / "study" / "records" / "cot.json"


def _read_record(folder: Path, path: Path) -> Believed:
    command("report", folder / "study", "--out", folder / "tables", "--forms", "md,tex,csv,json")
    for table in (folder / "tables").iterdir():
        _refuse_raw(table.read_text(encoding="utf-8"))
    return {"record": read_record(path).model_dump(mode="json")}


def _baseline(folder: Path) -> Path:
    write_baseline(folder / "baseline.json", frozen_baseline(*_records(folder)))
    _study(folder)
    return folder / "baseline.json"


def _read_baseline(folder: Path, path: Path) -> Believed:
    command("baseline", "show", path)
    command("baseline", "diff", path, folder / "study")
    command("check", folder / "study", "--baseline", path, "--json", folder / "verdict.json")
    return {"baseline": read_baseline(path).model_dump(mode="json")}


def _run(folder: Path) -> Path:
    store = Store(folder / "store")
    store.prepare()
    for record in _records(folder):
        write_record(store.record_path(record.key), record)
    return store.write_run(
        {"methods": ["cot"], "seeds": 1}, [record.key for record in _records(folder)]
    )


def _read_run(folder: Path, path: Path) -> Believed:
    command("report", path, "--out", folder / "tables")
    records, problems = read_records(path)
    return {} if problems else {"cells": [record.key for record in records]}


# What a person types


_RUN_TOML = """methods = ["cot", "response[temperature=4]"]
suite = ["math"]
teacher = "tiny=0.5,tiny-math=0.5"
student = "depth:0.5"
seeds = 2
budget = 1000
rows = 50
controls = true
limit = 20
batch-size = 8
system = "Be short."
out = "results/runs"
noise = 10
grid = "none"
[set.response]
temperature = 2.0
"""


def _toml(folder: Path) -> Path:
    write_atomically(folder / "run.toml", _RUN_TOML)
    return folder / "run.toml"


def _read_toml(folder: Path, path: Path) -> Believed:
    from harness.planning.config import build_config, read_run_file

    return build_config(read_run_file(path), where=str(path)).model_dump(mode="json")


def _suite(folder: Path) -> Path:
    write_atomically(
        folder / "mine.toml",
        'name = "mine"\ntasks = ["gsm8k-mini", "mmlu-mini"]\nmeasure = true\nhelp = "both"\n',
    )
    return folder / "mine.toml"


def _read_suite(folder: Path, path: Path) -> Believed:
    import suites

    return {
        name: str(suite.tasks) for name, suite in suites.resolve([str(path)], embedded=True).items()
    }


def _measured(folder: Path) -> Path:
    measurement = scored_record("cot", "10", 1).measurements[0].model_dump(mode="json")
    write_atomically(
        folder / "measured.json",
        json.dumps(
            {
                "environment": {},
                "models": [{"name": name, "measurements": [measurement]} for name in "ab"],
            }
        ),
    )
    _study(folder)
    return folder / "measured.json"


def _read_measured(folder: Path, path: Path) -> Believed:
    return {"told": command("check", folder / "study", "--measured", path)}


def _data(folder: Path) -> Path:
    lines = [
        json.dumps({"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"}) for n in range(6)
    ]
    write_atomically(folder / "data" / "test.jsonl", "\n".join(lines) + "\n")
    return folder / "data" / "test.jsonl"


def _read_data(folder: Path, path: Path) -> Believed:
    from harness.data.source import LocalOrHubData

    return {
        "rows": len(
            LocalOrHubData(folder=folder / "data").rows("test.jsonl", fields=("question", "answer"))
        )
    }


def _yaml(folder: Path) -> Path:
    shutil.copytree(TASKS, folder / "tasks")
    return folder / "tasks" / "arc_style.yaml"


def _own_tasks(place: str | None, defaults: bool) -> dict[str, Any]:
    return {} if defaults else _INDEX[0](place, False)


# lm-eval's index, before it was replaced
_INDEX: list[Callable[[str | None, bool], dict[str, Any]]] = []


def _read_yaml(folder: Path, path: Path) -> Believed:
    import suites
    from suites.loading import definition

    if not _INDEX:
        _INDEX.append(definition._task_index.__wrapped__)
    # read anew every time, and without lm-eval's own tasks, which take 20 s
    definition._task_index = _own_tasks
    task = suites.load("lm-eval:arc_style", include_path=folder / "tasks")
    return {"version": task.version, "chance": getattr(task, "chance", 0.0)}


# Side files of cells and the cache


def _row(item: int) -> ItemRow:
    return ItemRow(
        task="t",
        item=item,
        group="",
        doc_hash="d",
        prompt_hash="p",
        target_hash="t",
        gold=str(item),
        text=f"answer\u2028 {item}",
        extracted={"acc": str(item)},
        correct={"acc": True},
        tokens=3,
        stop="eos",
        log_probabilities=(-1.5, -2.0),
        prompt="q",
    )


def _samples(folder: Path) -> Path:
    write_rows(folder / "samples.jsonl", map(_row, range(5)))
    return folder / "samples.jsonl"


def _read_samples(folder: Path, path: Path) -> Believed:
    answers = {f"shown {answer['item']}": answer for answer in Evidence(path, None).answers()}
    rows = {
        f"row {row.item}": [row.text, row.correct, row.log_probabilities, row.tokens]
        for row in read_rows(path)
    }
    return {**answers, **rows}


def _training(folder: Path) -> Path:
    write_atomically(
        folder / "training.jsonl",
        "".join(
            json.dumps({"step": step, "ce": 1 / step, "seen": 10 * step}) + "\n"
            for step in range(1, 6)
        ),
    )
    return folder / "training.jsonl"


def _read_training(folder: Path, path: Path) -> Believed:
    return {"steps": len(list(Evidence(None, path).steps()))}


def _answers(folder: Path) -> Path:
    path = folder / "cache" / "answers" / "ab" / "abc.jsonl"
    cache = AnswerCache(path)
    for number in range(5):
        cache.put(f"key{number}", [f"answer {number}", 3, "eos"], 0.5)
    return path


def _read_answers(folder: Path, path: Path) -> Believed:
    output = command("cache", "verify", "--cache", folder / "cache")
    cache = AnswerCache(path)
    if cache.dropped and "DAMAGED" not in output:
        return {"verify": output}
    return {
        key: answer
        for key, answer in ((f"key{number}", cache.get(f"key{number}")) for number in range(5))
        if answer is not None
    }


def _done(folder: Path) -> Path:
    (folder / "student").mkdir()
    write_atomically(folder / "cost.json", '{"seconds": 1.0}')
    write_signed(
        folder / "done.json",
        {
            "path": "student",
            "parents": ["d"],
            "digest": "s",
            "cost": file_digest(folder / "cost.json"),
        },
    )
    return folder / "done.json"


def _read_done(folder: Path, path: Path) -> Believed:
    from harness.running.student import _valid_mark

    mark = _valid_mark(folder, lambda line: None)
    return {} if mark is None else mark.model_dump(mode="json")


def _cost(folder: Path) -> Path:
    _done(folder)
    return folder / "cost.json"


def _read_cost(folder: Path, path: Path) -> Believed:
    return {"cost": path.read_text(encoding="utf-8")} if _read_done(folder, path) else {}


def _traces(folder: Path) -> Path:
    import hashlib

    payload = json.dumps(
        {
            "texts": [[{"text": "a", "tokens": 1, "stop": "eos"}]],
            "tokens": 1,
            "seconds": 1.0,
            "flops": 1.0,
        }
    )
    path = folder / "cache" / "traces" / "abc.json"
    write_atomically(
        path,
        json.dumps({"sha256": hashlib.sha256(payload.encode()).hexdigest(), "payload": payload}),
    )
    return path


def _read_traces(folder: Path, path: Path) -> Believed:
    command("cache", "verify", "--cache", folder / "cache")
    return (
        {}
        if entry_damage(CacheEntry("traces", path, 1, 0.0))
        else {"payload": json.loads(path.read_bytes())["payload"]}
    )


def _rates(folder: Path) -> Path:
    path = folder / "cache" / "rates" / "abc.json"
    write_signed(path, {"losses": {"0.001": 2.0, "0.002": 1.5}, "cost": {"seconds": 1.0}})
    return path


def _read_rates(folder: Path, path: Path) -> Believed:
    command("cache", "verify", "--cache", folder / "cache")
    return {} if entry_damage(CacheEntry("rates", path, 1, 0.0)) else {"rates": read_signed(path)}


def _meta(folder: Path) -> Path:
    place = folder / "cache" / "teachers" / "abc"
    write_atomically(place / "index.npz", "numbers")
    meta = {
        "version": 2,
        "teacher": "t",
        "k": 8,
        "shards": 3,
        "files": {"index.npz": file_digest(place / "index.npz")},
    }
    write_atomically(place / "meta.json", signed_description(meta))
    return place / "meta.json"


def _read_meta(folder: Path, path: Path) -> Believed:
    command("cache", "verify", "--cache", folder / "cache")
    if entry_damage(CacheEntry("teachers", path.parent, 1, 0.0)):
        return {}
    return {
        name: value
        for name, value in read_description(path.parent).items()
        if name not in UNSIGNED_FIELDS
    }


# Models from elsewhere


def _model(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "model").mkdir()
        for file in (
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "model.safetensors",
        ):
            shutil.copy(EMBEDDED / file, folder / "model" / file)
        return folder / "model" / name

    return make


def _read_model(folder: Path, path: Path) -> Believed:
    from harness.models.checkpoint import refuse_damaged
    from harness.models.resolve import quantized_by
    from harness.models.shape import Shape, parameters_on_disk, weight_bytes
    from harness.models.vocabulary import token_map
    from harness.planning.setup import has_chat_template

    place = folder / "model"
    refuse_damaged(place)
    shape = Shape.of_folder(place)
    tokens = token_map(place)
    facts = [
        shape.parameters,
        parameters_on_disk(place),
        weight_bytes(place, "float32"),
        quantized_by(place),
        has_chat_template(place),
    ]
    return {"model": [*facts, len(tokens or ())]}


def _gguf(folder: Path) -> Path:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(folder / "a.gguf", "llama")
    writer.add_context_length(64)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.ones((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "a.gguf"


def _read_gguf(folder: Path, path: Path) -> Believed:
    from harness.models.resolve import gguf_type

    return {"kind": gguf_type(path)}


TARGETS = (
    Target(name="record", mutations=JSON, make=_study, read=_read_record, signed=True),
    Target(name="baseline", mutations=JSON, make=_baseline, read=_read_baseline, signed=True),
    Target(name="run file", mutations=JSON, make=_run, read=_read_run, signed=True),
    Target(name="run configuration", mutations=SETTINGS, make=_toml, read=_read_toml, signed=False),
    Target(name="suite file", mutations=SETTINGS, make=_suite, read=_read_suite, signed=False),
    Target(name="measured", mutations=JSON, make=_measured, read=_read_measured, signed=False),
    Target(name="data", mutations=LINES, make=_data, read=_read_data, signed=False),
    Target(name="samples", mutations=LINES, make=_samples, read=_read_samples, signed=True),
    Target(name="training log", mutations=LINES, make=_training, read=_read_training, signed=False),
    Target(name="answers", mutations=LINES, make=_answers, read=_read_answers, signed=True),
    Target(name="done", mutations=JSON, make=_done, read=_read_done, signed=True),
    Target(name="cost", mutations=JSON, make=_cost, read=_read_cost, signed=True),
    Target(name="traces", mutations=JSON, make=_traces, read=_read_traces, signed=True),
    Target(name="rates", mutations=JSON, make=_rates, read=_read_rates, signed=True),
    Target(name="teacher's cache", mutations=JSON, make=_meta, read=_read_meta, signed=True),
    Target(
        name="config", mutations=JSON, make=_model("config.json"), read=_read_model, signed=False
    ),
    Target(
        name="generation config",
        mutations=JSON,
        make=_model("generation_config.json"),
        read=_read_model,
        signed=False,
    ),
    Target(
        name="tokenizer",
        mutations=JSON,
        make=_model("tokenizer.json"),
        read=_read_model,
        signed=False,
    ),
    Target(
        name="tokenizer config",
        mutations=JSON,
        make=_model("tokenizer_config.json"),
        read=_read_model,
        signed=False,
    ),
    Target(
        name="safetensors",
        mutations=HEADER,
        make=_model("model.safetensors"),
        read=_read_model,
        signed=False,
    ),
    Target(name="GGUF", mutations=BINARY, make=_gguf, read=_read_gguf, signed=False),
    Target(
        name="task YAML", mutations=SETTINGS, make=_yaml, read=_read_yaml, signed=False, heavy=True
    ),
)
