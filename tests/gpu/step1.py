"""Step 1: the embedded pair by command line on the card: beside the CPU, resumed, checked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from kit import GIB, ROOT, Figures, Kit, last_lines

PACKED, TRAINED = "int8,int4,prune-depth", "response,cot,feature,on-policy"
# the toy trains on 30 rows: scoring 200 held-out ones before and after would take most of its time
FEW = "validation_rows=8"
DRY_PACKED = "int4,prune-depth"  # of each kind one: a minute of CI less
DRY_TRAINED = f"response[{FEW}],feature[{FEW}],on-policy[{FEW},longest=16]"
ROOM = 4 * GIB  # of the card: contexts of three processes, and little more
# how far below the teacher a packed row may score: garbage of a kernel scores nothing
KEEPS = {"int8": 0.03, "int4": 0.15}


def run(kit: Kit) -> None:
    """Run the step's parts; stores lie beside the figures, so that a stopped run continues."""
    kit.part(
        "packed and cut",
        lambda: rows_of(kit, DRY_PACKED if kit.dry else PACKED),
        needs=ROOM,
        seconds=120,
    )
    kit.part("fp32 against the CPU", lambda: against_cpu(kit), needs=ROOM, seconds=90)
    kit.part("bf16 against fp32", lambda: flips(kit))
    kit.part(
        "trained",
        lambda: rows_of(kit, DRY_TRAINED if kit.dry else TRAINED),
        needs=ROOM,
        seconds=180,
    )
    kit.part("kill and resume", lambda: killed(kit), needs=ROOM, seconds=80)
    kit.part("report and check", lambda: judged(kit))
    kit.part("records", lambda: keep_records(kit))


def _sizes(kit: Kit) -> list[str]:
    return (
        ["--budget", "1200", "--rows", "30", "--limit", "4"]
        if kit.dry
        else ["--budget", "60000", "--limit", "200"]
    )


def _command(kit: Kit, store: str, *more: str) -> list[str]:
    return [
        "run",
        "--suite",
        "mini",
        "--no-controls",
        "--grid",
        "none",
        "--out",
        str(kit.work / store),
        "--cache",
        str(kit.work / "cache"),
        *_sizes(kit),
        *more,
    ]


def _records(store: Path) -> list[dict[str, Any]]:
    return [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(store.glob("cells/*/record.json"))
    ]


def _samples(store: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the teacher's rows of a store, by task and item."""
    [folder] = [
        path.parent
        for path in store.glob("cells/*/record.json")
        if json.loads(path.read_text())["method"] == "teacher"
    ]
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    return {(row["task"], row["item"]): row for row in rows}


def _succeeded(done: subprocess.CompletedProcess[str], store: Path) -> list[dict[str, Any]]:
    """Return a run's records.

    Raises `RuntimeError` with the last lines and the failed rows if the run did not succeed.
    """
    records = _records(store)
    bad = [
        f"{record['label']}: {record['status']}: {record['reason']}"
        for record in records
        if record["status"] != "success"
    ]
    if done.returncode or bad:
        traces = [record["trace"][-1500:] for record in records if record["status"] == "failed"]
        raise RuntimeError(
            f"exit {done.returncode}; {'; '.join(bad)}; {last_lines(done)}; {' | '.join(traces)}"
        )
    return records


def rows_of(kit: Kit, methods: str) -> Figures:
    """Run some rows and their teacher on the card in one store.

    A row that is slow leaves the rows before it finished.
    """
    began = time.monotonic()
    done = kit.harness(
        *_command(
            kit,
            "pair",
            "--methods",
            methods,
            "--device",
            "cuda",
            "--noise",
            "4" if kit.dry else "100",
        )
    )
    records = _succeeded(done, kit.work / "pair")
    gpus = {str(record["environment"]["gpu"]) for record in records}
    paths = {record["path"] for record in records}
    assert len(gpus) == 1 and "None" not in gpus, f"records that do not name the GPU: {gpus}"
    assert paths == {"transformers/shared/1"}, f"rows that do not take the shared path: {paths}"
    low = [] if kit.dry else _far_below_the_teacher(records)
    assert not low, f"packed rows that score like garbage: {low}"
    return {
        "seconds": round(time.monotonic() - began, 1),
        "rows": {record["label"]: _row(record) for record in records},
        "gpu in the records": gpus.pop(),
        "paths": sorted(paths),
        "dtype": records[0]["dtype"],
    }


def _far_below_the_teacher(records: list[dict[str, Any]]) -> list[str]:
    """Return packed rows whose scores no rounding explains."""
    by_label = {
        record["label"]: {score["task"]: score["value"] for score in record["scores"]}
        for record in records
    }
    return [
        f"{label} {task} {value:.3f} of {by_label['teacher'][task]:.3f}"
        for label, room in KEEPS.items()
        for task, value in by_label.get(label, {}).items()
        if value < by_label["teacher"][task] - room
    ]


def _row(record: dict[str, Any]) -> dict[str, Any]:
    cost = record["cost"]
    return {
        "scores": {score["task"]: score["value"] for score in record["scores"]},
        "seconds": record["seconds"],
        "training tokens/s": round(cost["seen_tokens"] / cost["seconds"])
        if cost["seen_tokens"] and cost["seconds"]
        else None,
        "peak_bytes": cost["peak_bytes"],
        "energy_joules": cost["energy_joules"],
        "notes": [score["notes"] for score in record["scores"] if score["notes"]],
    }


def against_cpu(kit: Kit) -> Figures:
    """Compare the float32 teacher on card and CPU: same answers, equal up to rounding."""
    rows = {}
    for device in ("cuda", "cpu"):
        store = kit.work / f"fp32-{device}"
        done = kit.harness(
            *_command(
                kit,
                f"fp32-{device}",
                "--methods",
                "identity",
                "--noise",
                "0",
                "--device",
                device,
                "--dtype",
                "float32",
            ),
            **({"HARNESS_STAND_IN_CARD": ""} if device == "cpu" else {}),
        )
        _succeeded(done, store)
        rows[device] = _samples(store)
    expected = 2 * (4 if kit.dry else 200)
    assert rows["cuda"].keys() == rows["cpu"].keys() and len(rows["cpu"]) == expected, (
        f"{expected} items are not on both sides"
    )
    pairs = [(row, rows["cpu"][key]) for key, row in rows["cuda"].items()]
    other = [ours["item"] for ours, theirs in pairs if ours["text"] != theirs["text"]]
    gaps = [
        abs(our_value - their_value)
        for ours, theirs in pairs
        for our_value, their_value in zip(
            ours["log_probabilities"], theirs["log_probabilities"], strict=True
        )
    ]
    figures = {
        "items": len(pairs),
        "other answers": len(other),
        "largest gap in nats": max(gaps, default=None),
    }
    if len(other) > 0.01 * len(pairs) or max(gaps, default=0.0) > 5e-3:
        raise RuntimeError(
            f"the card's float32 answers are not the CPU's: {figures}, items {other[:10]}"
        )
    return figures


def flips(kit: Kit) -> Figures:
    """Compare the bfloat16 teacher with the float32 one, beside the noise floor of the run."""
    half, full = _samples(kit.work / "pair"), _samples(kit.work / "fp32-cuda")
    [teacher] = [record for record in _records(kit.work / "pair") if record["method"] == "teacher"]
    floors = {
        measurement["name"].partition(":")[2]: measurement
        for measurement in teacher["measurements"]
        if measurement["name"].startswith("noise_flips")
    }
    figures: Figures = {}
    for task, floor in floors.items():
        keys = [key for key in full if key[0] == task and key in half]
        changed = [key for key in keys if full[key]["correct"] != half[key]["correct"]]
        figures[task] = {
            "items": len(keys),
            "flips": len(changed),
            "noise floor": floor["value"],
            "how": floor["condition"],
            "remark": floor["remark"],
        }
        if floor["remark"]:
            raise RuntimeError(f"the noise floor was not measured: {floor['remark']}")
        # of flips by rounding: bf16 against float32 is a little more than bf16 against itself
        share = max(floor["value"], 0.02)
        most = share * len(keys) + 3 * (share * len(keys)) ** 0.5
        if len(changed) > most:
            raise RuntimeError(
                f"{task}: {len(changed)} of {len(keys)} items flip between bf16 and float32; "
                f"{most:.1f} are what rounding does"
            )
    return figures


def killed(kit: Kit) -> Figures:
    """Kill a training without warning; it must resume from its last state and succeed."""
    store = kit.work / "killed"
    shutil.rmtree(store, ignore_errors=True)
    # a toy of two steps may be over before it is killed
    longer = ["--budget", "8000", "--set", f"response.{FEW}"] if kit.dry else []
    command = _command(
        kit, "killed", "--methods", "response", "--noise", "0", "--device", "cuda", *longer
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "harness.cli", *command],
        cwd=ROOT,
        env=kit.environment(HARNESS_STATE_SECONDS="0"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 240
    while (
        process.poll() is None
        and time.monotonic() < until
        and not list(store.glob("students/*/state/step-*/loop.json"))
    ):
        time.sleep(0.01)
    before = _steps_logged(store)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    unfinished = not list(store.glob("students/*/done.json"))
    records = _succeeded(kit.harness(*command), store)
    after = _steps_logged(store)
    if not (before and unfinished and after[: len(before)] == before):
        raise RuntimeError(
            f"not killed in the middle, or begun anew: steps {before[:3]} before, {after[:3]} "
            f"after, unfinished: {unfinished}"
        )
    [row] = [record for record in records if record["method"] == "response"]
    undisturbed = [
        record
        for record in _records(kit.work / "pair")
        if record["label"] == "response" and not longer
    ]
    return {
        "steps before it was killed": len(before),
        "steps": row["cost"]["steps"],
        "seen tokens": row["cost"]["seen_tokens"],
        "the same bytes as the run that was not killed": [
            r["student"]["digest"] == row["student"]["digest"] for r in undisturbed
        ],
    }


def _steps_logged(store: Path) -> list[str]:
    """Return the log of a training: whole lines alone."""
    return [
        line
        for path in store.glob("students/*/training.jsonl")
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]
    ]


def judged(kit: Kit) -> Figures:
    """Tables and verdicts from the records alone."""
    [listing] = sorted((kit.work / "pair" / "runs").glob("*.json"))[-1:]
    report = kit.harness("report", str(listing))
    check = kit.harness("check", str(listing))
    # 2: a mistake or a defect, 4: records that do not fit together
    if report.returncode or check.returncode not in (0, 1, 3):
        raise RuntimeError(
            f"report exited with {report.returncode}, check with {check.returncode}: "
            f"{last_lines(report)}; {last_lines(check)}"
        )
    device = next(
        (line for line in report.stdout.splitlines() if line.startswith("- Device cuda")), ""
    )
    if str(kit.conditions["gpu"]).partition(",")[0] not in device:
        raise RuntimeError(f"the table does not name the card: {device}")
    return {"device line": device, "check": check.returncode, "verdict": last_lines(check, 6)}


def keep_records(kit: Kit) -> Figures:
    """Put the run's records and the teacher's rows into one file."""
    store, packed = kit.work / "pair", kit.out / "step-1-records.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        files = [
            path
            for pattern in ("cells/*/record.json", "cells/*/samples.jsonl", "runs/*.json")
            for path in sorted(store.glob(pattern))
        ]
        for path in files:
            archive.add(path, arcname=str(path.relative_to(store)))
    return {"files": len(files), "bytes": packed.stat().st_size, "file": packed.name}
