"""What is killed: one small whole run with every kind of written file; how it is struck, and what must stand afterwards."""

import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import _forked
from _faults import ANY, FAULT, ROOT, STRUCK, Fault, log_of

from harness.cache import described_damage
from harness.checkpoint import describe, read_signed
from harness.lines import signed_lines
from harness.record import BadRecord, RunRecord, read
from harness.untrusted import Unreadable

ROWS = "cot,response,cot+int8"
OPTIONS = (
    "--no-controls", "--suite", "math,knowledge", "--limit", "4", "--noise", "2", "--grid", "none",
    "--budget", "1500", "--rows", "12", "--set", "cot.longest=96", "--set", "cot.validation_rows=8", "--set", "response.validation_rows=8",
)  # fmt: skip
ATTEMPTS = 3  # of the plain command, after the last fault
MOMENTS = 15  # kills between events
ORPHANS = 10.0  # seconds that a process may outlive its command
LONGEST = 180.0  # seconds of an attempt
STATES = "HARNESS_STATE_SECONDS"
_TIMES = ("seconds", "joules", "peak", "created", "environment", "cores_in_use")
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
    """Return what a command is told: the watched folder, the fault, and to keep the state of every training step."""
    kept = {name: value for name, value in os.environ.items() if name != FAULT}
    return {
        **kept, ROOT: str(root), STATES: "0", **({FAULT: fault.as_json()} if fault else {}),
    }  # fmt: skip


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
    text = f"import sys\nsys.path.append({str(here)!r})\nimport _faults\n_faults.from_environment()\n"
    (preload / "sitecustomize.py").write_text(text, encoding="utf-8")
    found = environment(root, fault)
    found["PYTHONPATH"] = os.pathsep.join([str(preload), str(here.parents[1]), found.get("PYTHONPATH", "")])
    output = root.with_name(f"{root.name}.out")
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "harness.cli", *typed(root)],
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=found, start_new_session=True,
        )  # fmt: skip
    return end(root, process.pid)


def _outlived(group: int) -> int:
    """Return how many processes of a group are left after `ORPHANS` seconds; usually none is after a moment."""
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
    """Return every record that succeeded, by its cell's folder, without what two runs may differ in."""
    whole: dict[str, Any] = {}
    for path in sorted((root / "store" / "cells").glob("*/record.json")):
        try:
            record = read(path)
        except BadRecord as problem:
            whole[path.parent.name] = {"unreadable": str(problem)}
        else:
            whole[path.parent.name] = comparable(record)
    return whole


def comparable(record: RunRecord) -> Any:
    """Return a record without times, energy and peaks of memory."""
    told = record.model_dump(mode="json")
    told["measurements"] = [
        each for each in told["measurements"] if not any(word in each["name"] or word in each["unit"] for word in (*_TIMES, "bytes"))
    ]
    return _timeless(told)


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(part) for name, part in value.items() if not any(word in name for word in _TIMES)}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def difference(ours: Any, theirs: Any, where: str = "") -> str:
    """Name the first place in which two values differ, "" where there is none."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = sorted({*ours, *theirs})
        pairs = [(f"{where}.{name}", ours.get(name), theirs.get(name)) for name in names]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(f"{where}[{at}]", *pair) for at, pair in enumerate(zip(ours, theirs, strict=True))]
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
            whole[f"record {path.parent.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in (store / "students").glob("*/done.json"):
        if _student_is_whole(path):
            whole[f"student {path.parent.name}"] = path.stat().st_mtime_ns
    for path in (cache / "traces").glob("*.json"):
        if _traces_are_whole(path):
            whole[f"traces {path.name}"] = path.stat().st_mtime_ns
    for path in (cache / "teachers").glob("*/meta.json"):
        if not path.parent.name.startswith(".") and not described_damage(path.parent):
            whole[f"teacher cache {path.parent.name}"] = path.stat().st_mtime_ns
    for path in (cache / "answers").rglob("*.jsonl"):
        for line in signed_lines(path)[0]:
            whole[f"answer {path.stem} {line[0]}"] = json.dumps(line)
    return whole


def _succeeded(path: Path) -> bool:
    """Tell whether a record is one, and a teacher's rows stand beside it whole."""
    try:
        record = read(path)
    except BadRecord:
        return False
    samples = path.with_name("samples.jsonl")
    values, wrong = signed_lines(samples)
    complete = not wrong and len(values) == sum(score.n for score in record.scores)
    return record.status == "success" and (record.label != "teacher" or complete)


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
    """Name what a killed process has left: half-written files, notes of locks, locks, states of finished trainings."""
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
    """One fresh store and the faults that strike it, one an attempt; then the command is typed until it is through."""

    number: int
    faults: tuple[Fault, ...]
    fresh: bool = False  # in new Pythons


@dataclass
class Outcome:
    """What came of a case."""

    lines: list[str] = field(default_factory=list)  # one a fault
    struck: list[Fault] = field(default_factory=list)
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


def kills(reference: Reference, draw: random.Random) -> list[Fault]:
    """Return a kill at every write boundary of every kind of file, at an occurrence that is drawn."""
    counts = Counter((event[0], event[1], event[2]) for event in reference.events)
    faults = []
    for kind in sorted({event[2] for event in reference.events}):
        for operation in BOUNDARIES:
            places = sorted(place for place in counts if place[1:] == (operation, kind))
            if places:
                process = draw.choice(places)[0]
                number = draw.randint(1, counts[process, operation, kind])
                deed = DEEDS[len(faults) % len(DEEDS)]
                after = draw.randint(0, 60)
                faults.append(Fault(deed, operation, kind, process, number, after))
    return faults


def moments(reference: Reference, draw: random.Random, count: int) -> list[Fault]:
    """Return kills at random moments: a few milliseconds after events that are spread over the whole run."""
    faults = []
    for part in range(count):
        low, high = (len(reference.events) * at // count for at in (part, part + 1))
        at = draw.randrange(low, max(low + 1, high))
        process = reference.events[at][0]
        number = sum(event[0] == process for event in reference.events[: at + 1])
        deed = DEEDS[part % len(DEEDS)]
        faults.append(Fault(deed, ANY, ANY, process, number, delay=draw.choice((0.002, 0.01, 0.03, 0.1))))
    return faults


def refusals(reference: Reference, draw: random.Random) -> list[Fault]:
    """Return what the system may say to every kind of file, and whole disks that are full, failing or read-only."""
    faults = []
    counts = Counter((event[0], event[1], event[2]) for event in reference.events)
    operations = tuple(REFUSALS)
    for at, kind in enumerate(sorted({event[2] for event in reference.events})):
        turned = operations[at % len(operations) :] + operations[: at % len(operations)]
        operation = next((each for each in turned if any(place[1:] == (each, kind) for place in counts)), None)
        if operation is not None:
            process = draw.choice(sorted(place for place in counts if place[1:] == (operation, kind)))[0]
            number = draw.randint(1, counts[process, operation, kind])
            deed = REFUSALS[operation][at // len(operations) % len(REFUSALS[operation])]
            faults.append(Fault(deed, operation, kind, process, number, draw.randint(0, 60)))
    for deed, kind in (
        ("ENOSPC", "answers"), ("ENOSPC", "traces"), ("ENOSPC", "teacher cache"), ("EROFS", ANY), ("ENOSPC", ANY),
    ):  # fmt: skip
        faults.append(Fault(deed, "write" if deed == "ENOSPC" else "open", kind, lasting=True))
    return faults


def tears(reference: Reference, draw: random.Random) -> list[Fault]:
    """Return a tear of every kind of file: cut to half once it has its name, as after a power cut without a sync."""
    counts = Counter((event[0], event[1], event[2]) for event in reference.events)
    faults = []
    for kind in sorted({event[2] for event in reference.events}):
        places = sorted(place for place in counts if place[1:] == ("renamed", kind))
        places = places or sorted(place for place in counts if place[1:] == ("write", kind))
        if places and kind not in ("lock", "cache lock", "probe", "other"):
            process, operation, _ = draw.choice(places)
            number = draw.randint(1, counts[process, operation, kind])
            faults.append(Fault("torn", operation, kind, process, number, after=10**6))
    return faults


def cases(reference: Reference, seed: int) -> list[Case]:
    """Return every case: stores that keep going are struck in one process after another, the last time by a refusal."""
    draw = random.Random(f"kills/{seed}")
    order = list(dict.fromkeys(event[0] for event in reference.events))
    waiting = [*kills(reference, draw), *tears(reference, draw), *moments(reference, draw, MOMENTS)]
    draw.shuffle(waiting)
    last = refusals(reference, draw)
    chains: list[list[Fault]] = [[] for _ in range(len(last))]
    for fault in waiting:
        free = [chain for chain in chains if all(each.process != fault.process for each in chain)]
        if not free:
            chains.append([])
            free = chains[-1:]
        min(free, key=len).append(fault)
    for chain, fault in zip(chains, last, strict=False):
        chain.sort(key=lambda each: order.index(each.process))
        chain.append(fault)
    return [Case(number, tuple(chain), fresh=number % 20 == 7) for number, chain in enumerate(chains, 1)]


def tried(case: Case, root: Path, whole: Reference) -> Outcome:
    """Strike a fresh store, type the command until it is through, and compare what stands with the undisturbed run."""
    outcome = Outcome()
    for path in (root, root.with_name(f"{root.name}.preload")):
        shutil.rmtree(path, ignore_errors=True)
    log_of(root).unlink(missing_ok=True)
    before: dict[str, Any] = {}
    for fault in case.faults:
        ended = attempt(root, fault, fresh=case.fresh)
        before = _after_an_attempt(outcome, root, before, ended, fault)
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


def _after_an_attempt(outcome: Outcome, root: Path, before: Mapping[str, Any], ended: Ended, fault: Fault | None) -> dict[str, Any]:
    """Look at what an attempt has left: what was finished before must stand, and nothing must live on."""
    now = finished(root)
    torn = fault is not None and fault.deed in _DAMAGE
    for name, value in before.items():
        if now.get(name) != value and not torn:
            outcome.lost.append(f"{name} was finished and is {'made again' if name in now else 'gone'}")
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
    """Count steps of training and answers that were computed again: a fault may cost the one that it struck."""
    for operation, kind in (("renamed", "state"), ("write", "answers"), ("renamed", "samples")):
        excess = _count(seen, operation, kind) - whole.count(operation, kind)
        if excess > len(outcome.struck):
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
