"""A small run that writes each kind of file, its faults, and what must survive them."""

import fcntl
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import _forked
from _faults import ANY, FAULT, ROOT, STRUCK, Fault, log_of, path_when_finished

from harness.files.lines import read_signed_lines
from harness.files.untrusted import Unreadable
from harness.files.writing import read_signed
from harness.models.artefacts import folder_damage
from harness.models.checkpoint import describe
from harness.records.record import BadRecord, RunRecord, read_record
from harness.running.evaluation import NO_TEACHER_ANSWERS

ROWS = "cot,response,cot+int8"
OPTIONS = (
    "--no-controls",
    "--suite",
    "math,knowledge",
    "--limit",
    "4",
    "--noise",
    "2",
    "--grid",
    "none",
    "--budget",
    "1500",
    "--rows",
    "12",
    "--set",
    "cot.longest=96",
    "--set",
    "cot.validation_rows=8",
    "--set",
    "response.validation_rows=8",
)
ATTEMPTS = 3  # of the plain command, after the last fault
MOMENTS = 15  # kills between events
ORPHANS = 10.0  # seconds that a process may outlive its command
LONGEST = 180.0  # seconds of an attempt
STATES = "HARNESS_STATE_SECONDS"
_TIMES = ("seconds", "joules", "peak", "created", "environment", "cores_in_use", "from_journal")
_DAMAGE = ("torn",)  # deeds that take away what was finished


def command_line(root: Path, rows: str = ROWS) -> list[str]:
    """Return the command's arguments over the store and the cache of a folder."""
    places = ["--out", str(root / "store"), "--cache", str(root / "cache")]
    return ["run", "--methods", rows, *OPTIONS, *places]


@dataclass(frozen=True)
class CommandEnd:
    """How a command ended."""

    code: int
    said: str
    orphans: int  # processes of its group that were there 10 s later
    struck: bool = False


def environment(root: Path, fault: Fault | None) -> dict[str, str]:
    """Return a command's environment: watched folder, fault, and a saved state after each step."""
    inherited = {name: value for name, value in os.environ.items() if name != FAULT}
    return {
        **inherited,
        ROOT: str(root),
        STATES: "0",
        **({FAULT: fault.as_json()} if fault else {}),
    }


def begin(root: Path, rows: str = ROWS, fault: Fault | None = None, name: str = "") -> int:
    """Start the command; return its process, which leads a group of its own."""
    root.mkdir(parents=True, exist_ok=True)
    output = root.with_name(f"{root.name}{name}.out")
    output.unlink(missing_ok=True)
    return _forked.start(command_line(root, rows), output, environment(root, fault))


def end(root: Path, number: int, name: str = "") -> CommandEnd:
    """Wait for a command to end, then for the processes that it left."""
    call_off = _killed_late(number)
    _, status = os.waitpid(number, 0)
    call_off()
    output = root.with_name(f"{root.name}{name}.out")
    text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
    struck = any(event[1] == STRUCK for event in events(root))
    return CommandEnd(os.waitstatus_to_exitcode(status), text, _count_orphans(number), struck)


def _killed_late(number: int) -> Callable[[], None]:
    """Kill a group that runs for too long; return the function that cancels this."""
    timer = threading.Timer(LONGEST, os.killpg, (number, signal.SIGKILL))
    timer.daemon = True
    timer.start()
    return timer.cancel


def attempt(root: Path, fault: Fault | None = None, *, fresh: bool = False) -> CommandEnd:
    """Run the command once: forked, or (`fresh`) in a new Python as a user's shell starts it."""
    before = len(events(root))
    ended = _attempt_in_new_python(root, fault) if fresh else end(root, begin(root, fault=fault))
    return replace(ended, struck=any(event[1] == STRUCK for event in events(root)[before:]))


def _attempt_in_new_python(root: Path, fault: Fault | None) -> CommandEnd:
    preload = root.with_name(f"{root.name}.preload")
    preload.mkdir(parents=True, exist_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(__file__).parent
    text = (
        f"import sys\nsys.path.append({str(folder)!r})\n"
        "import _faults\n_faults.watch_from_environment()\n"
    )
    (preload / "sitecustomize.py").write_text(text, encoding="utf-8")
    variables = environment(root, fault)
    variables["PYTHONPATH"] = os.pathsep.join(
        [str(preload), str(folder.parents[1]), variables.get("PYTHONPATH", "")]
    )
    output = root.with_name(f"{root.name}.out")
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "harness.cli", *command_line(root)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=variables,
            start_new_session=True,
        )
    return end(root, process.pid)


def _count_orphans(group: int) -> int:
    """Return how many processes of a group still run after `ORPHANS` seconds."""
    until = time.monotonic() + ORPHANS
    while (count := len(_members(group))) and time.monotonic() < until:
        time.sleep(0.02)
    return count


def _members(group: int) -> list[int]:
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):  # it ended while we looked
            continue
        if int(its_group) == group and state != "Z":
            members.append(int(path.parent.name))
    return members


def events(root: Path) -> list[list[str]]:
    """Return every event so far: process, operation, kind, path."""
    log = log_of(root)
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    return [line.split("\t") for line in text.splitlines() if line.count("\t") == 3]


# What a run leaves


@dataclass(frozen=True)
class Reference:
    """The undisturbed run: its records without times, and its events in order."""

    records: Mapping[str, Any]
    events: Sequence[Sequence[str]]

    def count(self, operation: str, kind: str) -> int:
        """Return how many events of an operation and a kind the undisturbed run has."""
        return _count(self.events, operation, kind)


def _count(events: Iterable[Sequence[str]], operation: str, kind: str) -> int:
    return sum(event[1] == operation and event[2] == kind for event in events)


def reference(root: Path) -> Reference:
    """Run the command undisturbed. Raises `RuntimeError` where it does not succeed."""
    ended = attempt(root)
    if ended.code:
        raise RuntimeError(f"the undisturbed run ended with {ended.code}:\n{ended.said}")
    return Reference(records(root), [event for event in events(root) if event[1] != STRUCK])


def records(root: Path) -> dict[str, Any]:
    """Return the comparable form of each cell's record, by the cell's folder."""
    records_by_cell: dict[str, Any] = {}
    for path in sorted((root / "store" / "cells").glob("*/record.json")):
        try:
            record = read_record(path)
        except BadRecord as problem:
            records_by_cell[path.parent.name] = {"unreadable": str(problem)}
        else:
            records_by_cell[path.parent.name] = comparable(record)
    return records_by_cell


def comparable(record: RunRecord) -> Any:
    """Return a record without times, energy and peaks of memory."""
    fields = record.model_dump(mode="json")
    fields["measurements"] = [
        measurement
        for measurement in fields["measurements"]
        if not any(
            word in measurement["name"] or word in measurement["unit"]
            for word in (*_TIMES, "bytes")
        )
    ]
    return _timeless(fields)


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _timeless(part)
            for name, part in value.items()
            if not any(word in name for word in _TIMES)
        }
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def difference(ours: Any, theirs: Any, where: str = "") -> str:
    """Return the first place where two values differ, "" if they are equal."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = sorted({*ours, *theirs})
        pairs = [(f"{where}.{name}", ours.get(name), theirs.get(name)) for name in names]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [
            (f"{where}[{at}]", *pair) for at, pair in enumerate(zip(ours, theirs, strict=True))
        ]
    else:
        text = f"{where.lstrip('.')}: {str(ours)[:60]} is {str(theirs)[:60]} undisturbed"
        return "" if ours == theirs else text
    return next(
        (
            text
            for at, our_part, their_part in pairs
            if (text := difference(our_part, their_part, at))
        ),
        "",
    )


def finished_work(root: Path) -> dict[str, Any]:
    """Return all finished, intact work, each with a stamp that changes if it is computed again."""
    store, cache = root / "store", root / "cache"
    stamps: dict[str, Any] = {}
    for path in (store / "cells").glob("*/record.json"):
        if _succeeded(path):
            # stages that are scored later are filled in
            stamps[f"record {path.parent.name}"] = read_record(path).seconds
    for path in (store / "students").glob("*/done.json"):
        if _student_is_whole(path):
            stamps[f"student {path.parent.name}"] = path.stat().st_mtime_ns
    for path in (cache / "traces").glob("*.json"):
        if _traces_are_whole(path):
            stamps[f"traces {path.name}"] = path.stat().st_mtime_ns
    for path in (cache / "teachers").glob("*/meta.json"):
        if not path.parent.name.startswith(".") and not folder_damage(path.parent):
            stamps[f"teacher cache {path.parent.name}"] = path.stat().st_mtime_ns
    for path in (cache / "answers").rglob("*.jsonl"):
        for line in read_signed_lines(path)[0]:
            stamps[f"answer {path.stem} {line[0]}"] = json.dumps(line)
    return stamps


def _succeeded(path: Path) -> bool:
    """Tell whether a record succeeded; a teacher's record also needs all its sample rows."""
    try:
        record = read_record(path)
    except BadRecord:
        return False
    samples = path.with_name("samples.jsonl")
    values, wrong = read_signed_lines(samples)
    complete = not wrong and len(values) == sum(score.n for score in record.scores)
    rows_stand = record.label != "teacher" or complete
    return record.status == "success" and rows_stand and not _lacks_teacher(record)


def _lacks_teacher(record: RunRecord) -> bool:
    """Tell whether a row was scored while its teacher's row had failed.

    It is compared later from its stored answers, once the teacher's row exists.
    """
    skipped = record.measurement("skipped_fidelity")
    return skipped is not None and skipped.remark.endswith(NO_TEACHER_ANSWERS)


def _incomplete(root: Path) -> int:
    """Count the records that wait for their teacher's row."""
    count = 0
    for path in (root / "store" / "cells").glob("*/record.json"):
        try:
            count += _lacks_teacher(read_record(path))
        except BadRecord:
            continue
    return count


def _student_is_whole(path: Path) -> bool:
    try:
        mark = read_signed(path)
        return describe(path.parent / mark["path"], name="").digest == mark["digest"]
    except (Unreadable, OSError, LookupError):
        return False


def _traces_are_whole(path: Path) -> bool:
    try:
        document = json.loads(path.read_bytes())
        digest = hashlib.sha256(document["payload"].encode()).hexdigest()
    except (ValueError, LookupError, TypeError):
        return False
    return bool(digest == document["sha256"])


def litter(root: Path) -> list[str]:
    """Name what a killed process left: partial files, lock notes, locks, states of runs."""
    names = []
    for path in sorted(root.rglob("*")):
        inside = str(path.relative_to(root))
        if path.suffix == ".lock":
            names += [f"{inside} is locked"] if _is_locked(path) else []
        elif _is_litter(path):
            names.append(inside)
    return names


def _is_litter(path: Path) -> bool:
    torn = path.name.endswith(".part") or path.name.startswith(".probe-")
    note = path.parent.name == "locks" and path.suffix == ".json"
    state = path.name in ("state", "best.pt") and path.parent.parent.name == "students"
    return torn or note or state


def _is_locked(path: Path) -> bool:
    with path.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


# How it is struck


@dataclass(frozen=True)
class Case:
    """A fresh store and the faults that strike it, one in each attempt.

    Afterwards the command is repeated until it succeeds.
    """

    number: int
    faults: tuple[Fault, ...]
    fresh: bool = False  # in new Pythons


@dataclass
class Outcome:
    """What happened in a case."""

    lines: list[str] = field(default_factory=list)  # one a fault
    struck: list[Fault] = field(default_factory=list)
    incomplete: int = 0  # records that were written while their teacher's row was missing
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


BOUNDARIES = ("open", "write", "sync", "rename", "renamed", "folder", "remove")
DEEDS = ("kill group", "kill parent", "kill self")
REFUSALS = {
    "open": ("EACCES", "ENOSPC"),
    "write": ("ENOSPC", "EIO", "short"),
    "sync": ("EIO",),
    "rename": ("ENOSPC",),
}
DISKS = (
    ("ENOSPC", "write", "answers"),
    ("ENOSPC", "write", "traces"),
    ("ENOSPC", "write", "teacher cache"),
    ("EROFS", "open", ANY),
    ("ENOSPC", "write", ANY),
)
LONGEST_CHAIN = 6
_OF_CELLS = ("job", "log", "lock", "lock note")  # that the command writes for a cell


@dataclass(frozen=True)
class AimedFault:
    """A fault and the event of an undisturbed run at which it comes."""

    at: int
    fault: Fault
    ends: bool = False  # the run continues without the file: no later event can be struck


def aim(reference: Reference, at: int, deed: str, **more: Any) -> AimedFault:
    """Aim a fault at an event of an undisturbed run.

    The fault strikes in the first attempt in which that event happens.
    """
    process, operation, kind, path = reference.events[at]
    own_path = path_when_finished(Path(path)) if process == "command" and kind in _OF_CELLS else ""
    same = (process, operation, kind)
    number = sum(
        tuple(event[:3]) == same and own_path in ("", path_when_finished(Path(event[3])))
        for event in reference.events[: at + 1]
    )
    return AimedFault(at, Fault(deed, operation, kind, process, own_path, number, **more))


def _random_event(
    reference: Reference, draw: random.Random, operation: str, kind: str
) -> int | None:
    """Draw a process, then one of its events of an operation and a kind; None if there is none."""
    places = [
        at
        for at, event in enumerate(reference.events)
        if event[1] == operation and event[2] == kind
    ]
    if not places:
        return None
    process = draw.choice(sorted({reference.events[at][0] for at in places}))
    return draw.choice([at for at in places if reference.events[at][0] == process])


def _kinds(reference: Reference) -> list[str]:
    return sorted({event[2] for event in reference.events} - {"other"})


def kills_at_boundaries(reference: Reference, draw: random.Random) -> Iterator[AimedFault]:
    """Yield a kill at each write boundary of each kind of file."""
    deeds = itertools.cycle(DEEDS)
    for kind, operation in itertools.product(_kinds(reference), BOUNDARIES):
        at = _random_event(reference, draw, operation, kind)
        if at is not None:
            yield aim(reference, at, next(deeds), after=draw.randint(0, 60))


def kills_between_events(
    reference: Reference, draw: random.Random, count: int
) -> Iterator[AimedFault]:
    """Yield kills a few milliseconds after random events, spread over the whole run."""
    for part in range(count):
        low, high = (len(reference.events) * at // count for at in (part, part + 1))
        delay = draw.choice((0.002, 0.01, 0.03, 0.1))
        yield aim(
            reference,
            draw.randrange(low, max(low + 1, high)),
            DEEDS[part % len(DEEDS)],
            delay=delay,
        )


def tears(reference: Reference, draw: random.Random) -> Iterator[AimedFault]:
    """Yield a tear of each kind of file: cut to half after its rename, as a power cut does."""
    for kind in _kinds(reference):
        at = _random_event(reference, draw, "renamed", kind)
        if at is not None:
            yield aim(reference, at, "torn")


def refusals(reference: Reference, draw: random.Random) -> Iterator[AimedFault]:
    """Yield errors of the system for each kind of file, and disks that are full or read-only."""
    for turn, kind in enumerate(_kinds(reference)):
        operations = [*itertools.islice(itertools.cycle(REFUSALS), turn, turn + len(REFUSALS))]
        places = (
            (operation, _random_event(reference, draw, operation, kind)) for operation in operations
        )
        operation, at = next(
            ((operation, place) for operation, place in places if place is not None), ("", None)
        )
        if at is not None:
            deed = draw.choice(REFUSALS[operation])
            yield replace(aim(reference, at, deed, after=draw.randint(0, 60)), ends=True)
    for deed, operation, kind in DISKS:
        at = next(
            at
            for at, event in enumerate(reference.events)
            if event[1] == operation and kind in (ANY, event[2])
        )
        yield AimedFault(at, Fault(deed, operation, kind, lasting=True), ends=True)


def cases(reference: Reference, seed: int) -> list[Case]:
    """Return all cases: chains of faults in the order of the run, one for each cell's process.

    So every fault comes: a second one in a cell that goes on from its state would count other
    events.
    """
    draw = random.Random(f"kills/{seed}")
    faults = [
        *kills_at_boundaries(reference, draw),
        *tears(reference, draw),
        *kills_between_events(reference, draw, MOMENTS),
        *refusals(reference, draw),
    ]
    chains: list[list[AimedFault]] = []
    for fault in sorted(faults, key=lambda fault: fault.at):
        free = [chain for chain in chains if _can_follow(chain, fault)]
        if not free:
            chains.append([fault])
        else:
            shortest = min(map(len, free))
            draw.choice([chain for chain in free if len(chain) == shortest]).append(fault)
    draw.shuffle(chains)
    chains.sort(key=len, reverse=True)
    return [
        Case(number, tuple(fault.fault for fault in chain), fresh=number % 20 == 7)
        for number, chain in enumerate(chains, 1)
    ]


def _can_follow(chain: Sequence[AimedFault], after: AimedFault) -> bool:
    process = after.fault.process
    struck = any(earlier.fault.process == process for earlier in chain if process != "command")
    return (
        not struck and not chain[-1].ends and chain[-1].at < after.at and len(chain) < LONGEST_CHAIN
    )


def try_case(case: Case, root: Path, undisturbed: Reference) -> Outcome:
    """Strike a fresh store, repeat the command until it succeeds, and compare the results."""
    outcome = Outcome()
    for path in (root, root.with_name(f"{root.name}.preload")):
        shutil.rmtree(path, ignore_errors=True)
    log_of(root).unlink(missing_ok=True)
    before: dict[str, Any] = {}
    for fault in case.faults:
        ended = attempt(root, fault, fresh=case.fresh)
        before = _look_after_attempt(outcome, root, before, ended, fault)
        outcome.incomplete = max(outcome.incomplete, _incomplete(root))
        if ended.struck:
            outcome.struck.append(fault)
        how = f"ended with {ended.code}" if ended.struck else "never came"
        outcome.lines.append(f"{case.number}: {fault}: {how}")
    for _ in range(ATTEMPTS):
        ended = attempt(root)
        before = _look_after_attempt(outcome, root, before, ended, None)
        if ended.code == 0:
            break
    else:
        last = ended.said.strip().splitlines()[-1:] or [""]
        outcome.lost.append(f"no attempt succeeded: {last[0][:200]}")
    _compare(outcome, root, undisturbed)
    return outcome


def _look_after_attempt(
    outcome: Outcome, root: Path, before: Mapping[str, Any], ended: CommandEnd, fault: Fault | None
) -> dict[str, Any]:
    """Check an attempt: earlier finished work is unchanged and no process still runs."""
    stamps = finished_work(root)
    torn = fault is not None and fault.deed in _DAMAGE
    for name, value in before.items():
        if stamps.get(name) != value and not torn:
            change = "computed again" if name in stamps else "removed"
            outcome.lost.append(f"{name} was finished and then {change}")
    if ended.orphans:
        outcome.left.append(f"{ended.orphans} processes still run")
    if "Traceback (most recent call last)" in ended.said:
        outcome.left.append(f"a traceback: {ended.said.strip().splitlines()[-1][:200]}")
    if ended.code not in (0, 1, 2, -signal.SIGKILL):
        outcome.left.append(f"it ended with {ended.code}: {ended.said.strip()[-200:]}")
    return stamps


def _compare(outcome: Outcome, root: Path, undisturbed: Reference) -> None:
    ours = records(root)
    for name, record in undisturbed.records.items():
        if name not in ours:
            outcome.lost.append(f"cell {name} has no record")
        elif text := difference(ours[name], record):
            outcome.different.append(f"{record['label']} {text}")
    if not any(fault.deed in _DAMAGE for fault in outcome.struck):
        _count_repeated_work(outcome, events(root), undisturbed)
    outcome.left += _litter_that_stays(root)


def _count_repeated_work(
    outcome: Outcome, logged: Sequence[Sequence[str]], undisturbed: Reference
) -> None:
    """Count training steps and answers that were computed again.

    A fault may cost the step or the answer that it struck, and no more.
    """
    for operation, kind in (("renamed", "state"), ("write", "answers"), ("renamed", "samples")):
        excess = _count(logged, operation, kind) - undisturbed.count(operation, kind)
        if excess > len(outcome.struck) + outcome.incomplete * (kind == "samples"):
            outcome.lost.append(f"{excess} of {kind} were computed again")


def _litter_that_stays(root: Path) -> list[str]:
    """Return the litter that remains after another start, an hour later."""
    if not litter(root):
        return []
    hour = time.time() - 3_600
    for path in root.rglob("*"):
        os.utime(path, (hour, hour))
    attempt(root)
    return [f"{name} stays" for name in litter(root)]
