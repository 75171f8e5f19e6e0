"""What is killed: one small whole run with every kind of written file; how it is struck, and what
must stand afterwards.
"""

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
from _faults import ANY, FAULT, ROOT, STRUCK, Fault, log_of, plain

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


def typed(root: Path, rows: str = ROWS) -> list[str]:
    """Return the command's arguments over the store and the cache of a folder."""
    places = ["--out", str(root / "store"), "--cache", str(root / "cache")]
    return ["run", "--methods", rows, *OPTIONS, *places]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    said: str
    orphans: int  # processes of its group that were there 10 s later
    struck: bool = False


def environment(root: Path, fault: Fault | None) -> dict[str, str]:
    """Return what a command is told: the watched folder, the fault, and to keep the state of every
    training step.
    """
    kept = {name: value for name, value in os.environ.items() if name != FAULT}
    return {
        **kept,
        ROOT: str(root),
        STATES: "0",
        **({FAULT: fault.as_json()} if fault else {}),
    }


def begin(root: Path, rows: str = ROWS, fault: Fault | None = None, name: str = "") -> int:
    """Start the command; return its process, which leads a group of its own."""
    root.mkdir(parents=True, exist_ok=True)
    output = root.with_name(f"{root.name}{name}.out")
    output.unlink(missing_ok=True)
    return _forked.start(typed(root, rows), output, environment(root, fault))


def end(root: Path, number: int, name: str = "") -> Ended:
    """Wait for a command, then for whatever it has left behind."""
    call_off = _killed_late(number)
    _, status = os.waitpid(number, 0)
    call_off()
    output = root.with_name(f"{root.name}{name}.out")
    said = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
    struck = any(event[1] == STRUCK for event in events(root))
    return Ended(os.waitstatus_to_exitcode(status), said, _outlived(number), struck)


def _killed_late(number: int) -> Callable[[], None]:
    """Kill a group that does not come back; return what calls that off."""
    timer = threading.Timer(LONGEST, os.killpg, (number, signal.SIGKILL))
    timer.daemon = True
    timer.start()
    return timer.cancel


def attempt(root: Path, fault: Fault | None = None, *, fresh: bool = False) -> Ended:
    """Type the command once: forked, or (`fresh`) in a new Python as a user's shell starts it."""
    before = len(events(root))
    ended = _typed_fresh(root, fault) if fresh else end(root, begin(root, fault=fault))
    return replace(ended, struck=any(event[1] == STRUCK for event in events(root)[before:]))


def _typed_fresh(root: Path, fault: Fault | None) -> Ended:
    preload = root.with_name(f"{root.name}.preload")
    preload.mkdir(parents=True, exist_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    text = (
        f"import sys\nsys.path.append({str(here)!r})\nimport _faults\n_faults.from_environment()\n"
    )
    (preload / "sitecustomize.py").write_text(text, encoding="utf-8")
    found = environment(root, fault)
    found["PYTHONPATH"] = os.pathsep.join(
        [str(preload), str(here.parents[1]), found.get("PYTHONPATH", "")]
    )
    output = root.with_name(f"{root.name}.out")
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "harness.cli", *typed(root)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=found,
            start_new_session=True,
        )
    return end(root, process.pid)


def _outlived(group: int) -> int:
    """Return how many processes of a group are left after `ORPHANS` seconds; usually none is after
    a moment.
    """
    until = time.monotonic() + ORPHANS
    while (left := len(_members(group))) and time.monotonic() < until:
        time.sleep(0.02)
    return left


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
    """The undisturbed run: its records without their times, and its events in their order."""

    records: Mapping[str, Any]
    events: Sequence[Sequence[str]]

    def count(self, operation: str, kind: str) -> int:
        """Return how many events of one sort a whole run has."""
        return _count(self.events, operation, kind)


def _count(found: Iterable[Sequence[str]], operation: str, kind: str) -> int:
    return sum(event[1] == operation and event[2] == kind for event in found)


def reference(root: Path) -> Reference:
    """Run the command undisturbed. Raises `RuntimeError` where it does not succeed."""
    ended = attempt(root)
    if ended.code:
        raise RuntimeError(f"the undisturbed run ended with {ended.code}:\n{ended.said}")
    return Reference(records(root), [event for event in events(root) if event[1] != STRUCK])


def records(root: Path) -> dict[str, Any]:
    """Return every record that succeeded, by its cell's folder, without what two runs may differ
    in.
    """
    whole: dict[str, Any] = {}
    for path in sorted((root / "store" / "cells").glob("*/record.json")):
        try:
            record = read_record(path)
        except BadRecord as problem:
            whole[path.parent.name] = {"unreadable": str(problem)}
        else:
            whole[path.parent.name] = comparable(record)
    return whole


def comparable(record: RunRecord) -> Any:
    """Return a record without times, energy and peaks of memory."""
    told = record.model_dump(mode="json")
    told["measurements"] = [
        each
        for each in told["measurements"]
        if not any(word in each["name"] or word in each["unit"] for word in (*_TIMES, "bytes"))
    ]
    return _timeless(told)


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _timeless(part)
            for name, part in value.items()
            if not any(word in name for word in _TIMES)
        }
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def difference(ours: Any, theirs: Any, where: str = "") -> str:
    """Name the first place in which two values differ, "" where there is none."""
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
    return next((said for at, left, right in pairs if (said := difference(left, right, at))), "")


def finished(root: Path) -> dict[str, Any]:
    """Return what is finished and whole, each with what changes when it is computed again."""
    store, cache = root / "store", root / "cache"
    whole: dict[str, Any] = {}
    for path in (store / "cells").glob("*/record.json"):
        if _succeeded(path):
            # stages that are scored later are filled in
            whole[f"record {path.parent.name}"] = read_record(path).seconds
    for path in (store / "students").glob("*/done.json"):
        if _student_is_whole(path):
            whole[f"student {path.parent.name}"] = path.stat().st_mtime_ns
    for path in (cache / "traces").glob("*.json"):
        if _traces_are_whole(path):
            whole[f"traces {path.name}"] = path.stat().st_mtime_ns
    for path in (cache / "teachers").glob("*/meta.json"):
        if not path.parent.name.startswith(".") and not folder_damage(path.parent):
            whole[f"teacher cache {path.parent.name}"] = path.stat().st_mtime_ns
    for path in (cache / "answers").rglob("*.jsonl"):
        for line in read_signed_lines(path)[0]:
            whole[f"answer {path.stem} {line[0]}"] = json.dumps(line)
    return whole


def _succeeded(path: Path) -> bool:
    """Tell whether a record is one, is complete, and a teacher's rows stand beside it whole."""
    try:
        record = read_record(path)
    except BadRecord:
        return False
    samples = path.with_name("samples.jsonl")
    values, wrong = read_signed_lines(samples)
    complete = not wrong and len(values) == sum(score.n for score in record.scores)
    whole = record.label != "teacher" or complete
    return record.status == "success" and whole and not _lacks_teacher(record)


def _lacks_teacher(record: RunRecord) -> bool:
    """Tell whether a row was scored while its teacher's had failed: it is compared, from its kept
    answers, once that one stands.
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
        told = read_signed(path)
        return describe(path.parent / told["path"], name="").digest == told["digest"]
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
    """Name what a killed process has left: half-written files, notes of locks, locks, states of
    finished trainings.
    """
    left = []
    for path in sorted(root.rglob("*")):
        inside = str(path.relative_to(root))
        if path.suffix == ".lock":
            left += [f"{inside} is locked"] if _held(path) else []
        elif _is_litter(path):
            left.append(inside)
    return left


def _is_litter(path: Path) -> bool:
    torn = path.name.endswith(".part") or path.name.startswith(".probe-")
    note = path.parent.name == "locks" and path.suffix == ".json"
    state = path.name in ("state", "best.pt") and path.parent.parent.name == "students"
    return torn or note or state


def _held(path: Path) -> bool:
    with path.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


# How it is struck


@dataclass(frozen=True)
class Case:
    """One fresh store and the faults that strike it, one an attempt; then the command is typed
    until it is through.
    """

    number: int
    faults: tuple[Fault, ...]
    fresh: bool = False  # in new Pythons


@dataclass
class Outcome:
    """What came of a case."""

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
class Aimed:
    """A fault and where in a whole run it comes."""

    at: int
    fault: Fault
    ends: bool = False  # the run goes on behind it: nothing of it is left to strike


def aimed(reference: Reference, at: int, deed: str, **more: Any) -> Aimed:
    """Aim a fault at an event of a whole run, so that it finds it in whatever attempt that event
    comes for the first time.
    """
    process, operation, kind, path = reference.events[at]
    own = plain(Path(path)) if process == "command" and kind in _OF_CELLS else ""
    same = (process, operation, kind)
    number = sum(
        tuple(event[:3]) == same and own in ("", plain(Path(event[3])))
        for event in reference.events[: at + 1]
    )
    return Aimed(at, Fault(deed, operation, kind, process, own, number, **more))


def _drawn(reference: Reference, draw: random.Random, operation: str, kind: str) -> int | None:
    """Draw an event of one sort, from a process that is drawn first; None where there is none."""
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


def kills(reference: Reference, draw: random.Random) -> Iterator[Aimed]:
    """Yield a kill at every write boundary of every kind of file."""
    deeds = itertools.cycle(DEEDS)
    for kind, operation in itertools.product(_kinds(reference), BOUNDARIES):
        at = _drawn(reference, draw, operation, kind)
        if at is not None:
            yield aimed(reference, at, next(deeds), after=draw.randint(0, 60))


def moments(reference: Reference, draw: random.Random, count: int) -> Iterator[Aimed]:
    """Yield kills at random moments: a few milliseconds after events that are spread over the whole
    run.
    """
    for part in range(count):
        low, high = (len(reference.events) * at // count for at in (part, part + 1))
        delay = draw.choice((0.002, 0.01, 0.03, 0.1))
        yield aimed(
            reference,
            draw.randrange(low, max(low + 1, high)),
            DEEDS[part % len(DEEDS)],
            delay=delay,
        )


def tears(reference: Reference, draw: random.Random) -> Iterator[Aimed]:
    """Yield a tear of every kind of file: cut to half once it has its name, as after a power cut
    without a sync.
    """
    for kind in _kinds(reference):
        at = _drawn(reference, draw, "renamed", kind)
        if at is not None:
            yield aimed(reference, at, "torn")


def refusals(reference: Reference, draw: random.Random) -> Iterator[Aimed]:
    """Yield what the system may say to every kind of file, and whole disks that are full or
    read-only.
    """
    for turn, kind in enumerate(_kinds(reference)):
        operations = [*itertools.islice(itertools.cycle(REFUSALS), turn, turn + len(REFUSALS))]
        places = ((each, _drawn(reference, draw, each, kind)) for each in operations)
        operation, at = next(
            ((each, place) for each, place in places if place is not None), ("", None)
        )
        if at is not None:
            deed = draw.choice(REFUSALS[operation])
            yield replace(aimed(reference, at, deed, after=draw.randint(0, 60)), ends=True)
    for deed, operation, kind in DISKS:
        at = next(
            at
            for at, event in enumerate(reference.events)
            if event[1] == operation and kind in (ANY, event[2])
        )
        yield Aimed(at, Fault(deed, operation, kind, lasting=True), ends=True)


def cases(reference: Reference, seed: int) -> list[Case]:
    """Return every case: stores that keep going are struck in the order of the run, at most once in
    the process of a cell.

    So every fault comes: a second one in a cell that goes on from its state would count other
    events.
    """
    draw = random.Random(f"kills/{seed}")
    every = [
        *kills(reference, draw),
        *tears(reference, draw),
        *moments(reference, draw, MOMENTS),
        *refusals(reference, draw),
    ]
    chains: list[list[Aimed]] = []
    for each in sorted(every, key=lambda each: each.at):
        free = [chain for chain in chains if _goes_on(chain, each)]
        if not free:
            chains.append([each])
        else:
            shortest = min(map(len, free))
            draw.choice([chain for chain in free if len(chain) == shortest]).append(each)
    draw.shuffle(chains)
    chains.sort(key=len, reverse=True)
    return [
        Case(number, tuple(each.fault for each in chain), fresh=number % 20 == 7)
        for number, chain in enumerate(chains, 1)
    ]


def _goes_on(chain: Sequence[Aimed], after: Aimed) -> bool:
    own = after.fault.process
    struck = any(each.fault.process == own for each in chain if own != "command")
    return (
        not struck and not chain[-1].ends and chain[-1].at < after.at and len(chain) < LONGEST_CHAIN
    )


def tried(case: Case, root: Path, whole: Reference) -> Outcome:
    """Strike a fresh store, type the command until it is through, and compare what stands with the
    undisturbed run.
    """
    outcome = Outcome()
    for path in (root, root.with_name(f"{root.name}.preload")):
        shutil.rmtree(path, ignore_errors=True)
    log_of(root).unlink(missing_ok=True)
    before: dict[str, Any] = {}
    for fault in case.faults:
        ended = attempt(root, fault, fresh=case.fresh)
        before = _after_an_attempt(outcome, root, before, ended, fault)
        outcome.incomplete = max(outcome.incomplete, _incomplete(root))
        if ended.struck:
            outcome.struck.append(fault)
        how = f"ended with {ended.code}" if ended.struck else "never came"
        outcome.lines.append(f"{case.number}: {fault}: {how}")
    for _ in range(ATTEMPTS):
        ended = attempt(root)
        before = _after_an_attempt(outcome, root, before, ended, None)
        if ended.code == 0:
            break
    else:
        last = ended.said.strip().splitlines()[-1:] or [""]
        outcome.lost.append(f"it never ends well: {last[0][:200]}")
    _compare(outcome, root, whole)
    return outcome


def _after_an_attempt(
    outcome: Outcome, root: Path, before: Mapping[str, Any], ended: Ended, fault: Fault | None
) -> dict[str, Any]:
    """Look at what an attempt has left: what was finished before must stand, and nothing must live
    on.
    """
    now = finished(root)
    torn = fault is not None and fault.deed in _DAMAGE
    for name, value in before.items():
        if now.get(name) != value and not torn:
            outcome.lost.append(
                f"{name} was finished and is {'made again' if name in now else 'gone'}"
            )
    if ended.orphans:
        outcome.left.append(f"{ended.orphans} processes live on")
    if "Traceback (most recent call last)" in ended.said:
        outcome.left.append(f"a traceback: {ended.said.strip().splitlines()[-1][:200]}")
    if ended.code not in (0, 1, 2, -signal.SIGKILL):
        outcome.left.append(f"it ended with {ended.code}: {ended.said.strip()[-200:]}")
    return now


def _compare(outcome: Outcome, root: Path, whole: Reference) -> None:
    ours = records(root)
    for name, record in whole.records.items():
        if name not in ours:
            outcome.lost.append(f"cell {name} has no record")
        elif said := difference(ours[name], record):
            outcome.different.append(f"{record['label']} {said}")
    if not any(fault.deed in _DAMAGE for fault in outcome.struck):
        _again(outcome, events(root), whole)
    outcome.left += _remaining(root)


def _again(outcome: Outcome, seen: Sequence[Sequence[str]], whole: Reference) -> None:
    """Count steps of training and answers that were computed again: a fault may cost the one that
    it struck.
    """
    for operation, kind in (("renamed", "state"), ("write", "answers"), ("renamed", "samples")):
        excess = _count(seen, operation, kind) - whole.count(operation, kind)
        if excess > len(outcome.struck) + outcome.incomplete * (kind == "samples"):
            outcome.lost.append(f"{excess} of {kind} were computed again")


def _remaining(root: Path) -> list[str]:
    """Return what stays for ever: what another start, an hour later, does not take away either."""
    if not litter(root):
        return []
    hour = time.time() - 3_600
    for path in root.rglob("*"):
        os.utime(path, (hour, hour))
    attempt(root)
    return [f"{name} stays" for name in litter(root)]
