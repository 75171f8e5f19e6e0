"""The teacher's cache: the same training as with a live teacher, the right row's distributions, and
nothing damaged is used.
"""

import hashlib
import json
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distilling import FEW

import suites
from harness.contract import Budget, Job
from harness.data.examples import training_examples
from harness.data.source import LocalOrHubData
from harness.errors import CellFailed
from harness.files.lines import signed_line
from harness.files.writing import write_signed
from harness.models.artefacts import cache_entries, entry_note
from harness.models.language_model import open_model
from harness.models.resolve import resolve
from methods.response import ResponseDistillation
from methods.training import teacher_cache as caching
from methods.training.losses import forward_kl, top_k_kl
from methods.training.rows import TokenRow, collate, encode
from methods.training.stepper import Stepper
from methods.training.teacher_cache import damage_of, row_key, teacher_cache
from methods.training.teachers import LiveTeacher, TrainedPositionLogits
from methods.training.terms import Objective, Term

TASKS = {"gsm8k-mini": suites.load("gsm8k-mini")}


@pytest.fixture(scope="module")
def teacher():
    return resolve("tiny", cache=Path("unused"))


@pytest.fixture(scope="module")
def rows(embedded):
    examples = training_examples(TASKS, LocalOrHubData(), rows=40)
    return encode(
        embedded.tokenizer,
        [(example.prompt, example.completion) for example in examples],
        longest=512,
    )[0]


@pytest.fixture
def job(teacher, tmp_path):
    reports = []
    the_job = Job(
        teachers=(teacher,),
        student="depth:0.5",
        student_base=teacher,
        tasks=TASKS,
        source=LocalOrHubData(),
        budget=Budget(seen_tokens=8_000, rows=40),
        seed=1,
        workdir=tmp_path / "work",
        cache=tmp_path / "cache",
        progress=reports.append,
    )
    the_job.workdir.mkdir()
    return the_job, reports


def live(embedded, row):
    ids, attention, trained = collate([row], embedded.pad_id)
    with torch.no_grad():
        logits = embedded.model(input_ids=ids, attention_mask=attention).logits
    return torch.log_softmax(logits[0, :-1][trained[0, 1:]].float(), -1)


@pytest.mark.parametrize("dense", [True, False])
def test_what_is_kept_is_what_the_teacher_says_in_any_order_of_rows(
    job, teacher, rows, embedded, monkeypatch, dense
):
    monkeypatch.setattr(caching, "MAX_DENSE_VOCABULARY", 2_048 if dense else 16)
    # 300 tokens: several shards
    monkeypatch.setattr(caching, "SHARD_BYTES", 300 * 2 * (1024 if dense else 8))
    cache = teacher_cache(job[0], teacher, rows, k=8, width=1024)
    assert cache.dense == dense and cache.k == (1024 if dense else 8) and len(cache.log_p) > 2
    shuffled = rows[:]
    random.Random(5).shuffle(shuffled)
    picked = shuffled[:7]
    live_log_p = torch.cat([live(embedded, row) for row in picked])
    if dense:
        cached_log_p = cache.logits(picked, "cpu")
        assert (
            cached_log_p.shape == live_log_p.shape
            and (cached_log_p - live_log_p)[live_log_p > -12].abs().max() < 0.02
        )
    else:
        top = cache.top(picked, "cpu")
        expected = live_log_p.topk(8)
        assert (
            torch.equal(top.ids_NK[:, 0], expected.indices[:, 0])
            and (top.log_p_NK - expected.values).abs().max() < 0.03
        )
    assert cache.meta["positions"] == sum(
        len(row.ids) - row.trained_from for row in {row_key(r): r for r in rows}.values()
    )


def test_a_step_from_the_cache_has_the_gradient_of_a_live_one_and_a_shuffled_cache_has_not(
    job, teacher, rows, embedded
):
    cache = teacher_cache(job[0], teacher, rows, k=8, width=1024)
    student = open_model(teacher).model
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += (
                0.05
                * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
                * parameter.std()
            )
    term = Term(
        "kl",
        1.0,
        lambda positions: forward_kl(positions.student_NV, positions.teacher_NV, temperature=2.0),
    )

    def gradient(source):
        student.zero_grad()
        stepper = Stepper(
            student,
            TrainedPositionLogits(student),
            Objective(terms=[term], sources=[source], vocabulary=1024),
            5,
            embedded.pad_id,
        )
        values = stepper.backward(
            rows[:12], weights={"kl": 1.0}, backward=lambda loss: loss.backward()
        ).means
        stepper.head.close()
        return values["kl"], torch.cat(
            [p.grad.flatten() for p in student.parameters() if p.grad is not None]
        )

    live_loss, expected = gradient(LiveTeacher(open_model(teacher)))
    cached_loss, cached_gradient = gradient(cache)
    assert (
        cached_loss == pytest.approx(live_loss, rel=2e-3)
        and torch.nn.functional.cosine_similarity(cached_gradient, expected, dim=0) > 0.9999
    )
    names = list(cache.index)
    same_length = {
        name: next(
            (
                other
                for other in names
                if other != name and cache.index[other][2] == cache.index[name][2]
            ),
            name,
        )
        for name in names
    }
    shuffled = replace(cache, index={name: cache.index[same_length[name]] for name in names})
    assert gradient(shuffled)[0] > 2 * live_loss  # another row's distributions: clearly worse


def test_the_top_k_form_is_a_lower_bound_of_the_dense_one(job, teacher, rows, monkeypatch):
    dense = teacher_cache(job[0], teacher, rows, k=8, width=1024).logits(rows[:4], "cpu")
    monkeypatch.setattr(caching, "MAX_DENSE_VOCABULARY", 16)
    top = teacher_cache(job[0], teacher, rows, k=8, width=1024).top(rows[:4], "cpu")
    student = torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))
    dense_loss, top_loss = (
        float(forward_kl(student, dense).sum()),
        float(top_k_kl(student, top.ids_NK, top.log_p_NK).sum()),
    )
    # the teacher is sure of itself: eight tokens hold nearly all of it
    assert 0.7 * dense_loss < top_loss <= dense_loss * 1.001


def test_it_is_made_once_and_a_second_teacher_or_other_rows_have_their_own(
    job, teacher, rows, monkeypatch
):
    first = teacher_cache(job[0], teacher, rows, k=8, width=1024)
    monkeypatch.setattr(
        caching, "open_model", lambda *a, **k: pytest.fail("the teacher was opened again")
    )
    second = teacher_cache(job[0], teacher, list(reversed(rows)) + rows[:3], k=8, width=1024)
    assert second.key == first.key and second.cost() == first.cost()
    for changed in (
        {"rows": rows[:-1]},
        {"teacher": replace(teacher, digest="other")},
        {"width": 1000},
    ):
        # k does not matter where all is kept
        arguments = {"teacher": teacher, "rows": rows, "k": 8, "width": 1024, **changed}
        with pytest.raises(pytest.fail.Exception, match="opened again"):
            teacher_cache(job[0], arguments.pop("teacher"), arguments.pop("rows"), **arguments)
    with pytest.raises(CellFailed, match="made for other rows"):
        first.logits([TokenRow((5, 6, 7), 1)], "cpu")


@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "meta", "version"])
def test_a_damaged_cache_is_said_so_and_made_again(job, teacher, rows, harm):
    the_job, reports = job
    first = teacher_cache(the_job, teacher, rows, k=8, width=1024)
    folder = the_job.cache / "teachers" / first.key
    shard = folder / "log_p-000.npy"
    if harm == "flip":
        log_p = np.load(shard)
        log_p[0, 0] += 1
        np.save(shard, log_p)
    elif harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif harm == "gone":
        shard.unlink()
    elif harm == "meta":
        (folder / "meta.json").write_text("{")
    else:
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, "version": 0}))
    assert damage_of(folder)
    reports.clear()
    rebuilt = teacher_cache(the_job, teacher, rows, k=8, width=1024)
    assert any(
        "is damaged" in report.detail and "computed again" in report.detail for report in reports
    )
    assert not damage_of(folder) and torch.equal(
        first.logits(rows[:2], "cpu"), rebuilt.logits(rows[:2], "cpu")
    )


def test_a_cache_that_disagrees_with_the_teacher_is_not_kept(job, teacher, rows, monkeypatch):
    plain = caching.Reader.top_k
    calls = []

    def drifting(reader, scored, **settings):
        calls.append(len(scored))
        return (
            replace(top, log_p_NK=top.log_p_NK + (0.5 if len(scored) == 1 else 0.0))
            for top in plain(reader, scored, **settings)
        )

    monkeypatch.setattr(caching.Reader, "top_k", drifting)
    with pytest.raises(CellFailed, match=r"differs from a live forward pass by 0\.5"):
        teacher_cache(job[0], teacher, rows, k=8, width=1024)
    assert not list((job[0].cache / "teachers").glob("*/meta.json")) and 1 in calls


@pytest.mark.parametrize(
    ("dtype", "gap", "share", "said"),
    [
        (torch.bfloat16, 3.0, 0.0005, ""),  # a few values of very many round far away
        (
            torch.bfloat16,
            3.0,
            0.005,
            r"by 3\.000 nats at the 99\.9th percentile and by 0\.015 on average",
        ),
        (
            torch.bfloat16,
            0.1,
            1.0,
            r"by 0\.100 nats at the 99\.9th percentile and by 0\.100 on average",
        ),
        (torch.float32, 3.0, 0.0005, r"by 3\.000 nats at most and by 0\.00\d on average"),
    ],
)
def test_a_cache_is_judged_as_finely_as_the_teacher_computes(monkeypatch, dtype, gap, share, said):
    live_log_p = torch.full((40, 500), -6.0)
    cached_log_p = live_log_p.clone()
    cached_log_p.flatten()[: int(share * cached_log_p.numel())] += gap
    cache = SimpleNamespace(
        dense=True, logits=lambda rows, device: cached_log_p, steps=lambda row: torch.zeros(1, 1)
    )
    teacher = SimpleNamespace(top_k=lambda rows, k, width: iter([caching.TopK(None, live_log_p)]))
    opened = SimpleNamespace(device="cpu", model=SimpleNamespace(dtype=dtype))

    with pytest.raises(CellFailed, match=said) if said else nullcontext():
        caching._check_against_live(cache, teacher, opened, [TokenRow((1, 2), 1)], 500)


@pytest.mark.parametrize(
    "changed", [{"teacher": "another"}, {"dtype": "bfloat16"}, {"vocabulary": 1_000}, {"k": 7}]
)
def test_a_whole_cache_of_another_teacher_or_form_is_not_trained_on(job, teacher, rows, changed):
    """A folder that was copied or renamed: its digests hold, its rows are found, and it is the
    wrong one.
    """
    the_job, reports = job
    first = teacher_cache(the_job, teacher, rows, k=8, width=1024)
    meta = the_job.cache / "teachers" / first.key / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), **changed}))
    assert damage_of(meta.parent) == ""
    rebuilt = teacher_cache(the_job, teacher, rows, k=8, width=1024)
    [(name, value)] = changed.items()
    assert (
        any(f"its {name} is {value}, not" in report.detail for report in reports)
        and rebuilt.meta[name] == first.meta[name]
    )


def test_it_says_how_much_of_the_probability_it_kept(job, teacher, rows, embedded, monkeypatch):
    assert teacher_cache(job[0], teacher, rows, k=8, width=1024).meta["kept_mass"] == 1
    monkeypatch.setattr(caching, "MAX_DENSE_VOCABULARY", 16)
    cache = teacher_cache(job[0], teacher, rows, k=3, width=1024)
    distinct = {row_key(row): row for row in rows}.values()
    top_mass = torch.cat([live(embedded, row).exp().topk(3).values.sum(-1) for row in distinct])
    assert (
        cache.meta["kept_mass"] == pytest.approx(float(top_mass.mean()), abs=1e-4)
        and cache.meta["kept_mass"] < 1
    )


@pytest.mark.parametrize("dense", [True, False])
def test_forms_keep_what_they_say_and_have_caches_of_their_own(
    job, teacher, rows, monkeypatch, dense
):
    monkeypatch.setattr(caching, "MAX_DENSE_VOCABULARY", 2_048 if dense else 16)
    caches = {
        form: teacher_cache(job[0], teacher, rows, k=50, width=1024, dtype=form)
        for form in ("float32", "float16", "int8")
    }
    assert len({cache.key for cache in caches.values()}) == 3
    exact = caches["float32"].logits(rows, "cpu")
    # what is read again is what the teacher computed, bit by bit
    longest_first = sorted(
        {row_key(row): row for row in rows}.values(), key=lambda row: len(row.ids), reverse=True
    )
    requests = [caching.likelihood_request(row) for row in longest_first]
    reader = caching.teacher_reader(open_model(teacher))
    computed = [top.log_p_NK for top in reader.top_k(requests, k=None if dense else 50, width=1024)]
    kept = caches["float32"].logits(longest_first, "cpu")
    assert kept.numpy().tobytes() == torch.cat(computed).numpy().tobytes()
    assert torch.equal(exact.half().float(), caches["float16"].logits(rows, "cpu"))
    assert caches["float32"].meta["rounding_kl"] == 0
    assert 0 < caches["float16"].meta["rounding_kl"] < caches["int8"].meta["rounding_kl"] < 1e-3
    if not dense:
        ids = [cache.top(rows[:3], "cpu").ids_NK for cache in caches.values()]
        assert torch.equal(ids[0], ids[1]) and torch.equal(ids[0], ids[2])
    folder = job[0].cache / "teachers" / caches["int8"].key
    size = sum(np.load(path, mmap_mode="r").nbytes for path in folder.glob("*.npy"))
    meta = caches["int8"].meta
    assert size == meta["positions"] * meta["position_bytes"]


def test_a_list_of_the_cache_says_how_exact_each_one_is(job, teacher, rows):
    for form in ("float32", "int8"):
        teacher_cache(job[0], teacher, rows, k=8, width=1024, dtype=form)
    notes = sorted(map(entry_note, cache_entries(job[0].cache)))
    assert notes[0] == "all of 1,024 tokens in float32, 4,096 bytes a position, exact"
    assert re.fullmatch(
        r"all of 1,024 tokens in int8, 1,032 bytes a position, at a KL of [\d.e-]+ nats", notes[1]
    )


@pytest.mark.slow
def test_response_trains_from_the_cache_as_it_does_beside_the_teacher(job, tmp_path):
    the_job, _ = job
    losses, costs = {}, {}
    for cache in ("on", "off"):
        workdir = tmp_path / cache
        workdir.mkdir()
        ResponseDistillation(cache=cache, **FEW).compress(replace(the_job, workdir=workdir))
        lines = [json.loads(line) for line in (workdir / "training.jsonl").read_text().splitlines()]
        losses[cache] = [line["forward-kl"] for line in lines if "forward-kl" in line]
        costs[cache] = json.loads((workdir / "cost.json").read_text())
    assert losses["on"] == pytest.approx(losses["off"], rel=0.02)
    assert (
        costs["on"]["shared"][0]["key"] == costs["on"]["notes"]["teacher_cache"][0]
        and costs["on"].get("teacher_tokens", 0) == 0
    )
    assert (
        costs["off"]["teacher_tokens"] == costs["off"]["seen_tokens"] and not costs["off"]["shared"]
    )


@pytest.mark.slow
def test_a_budget_below_one_pass_and_a_loss_that_needs_all_tokens_go_without(
    job, monkeypatch, tmp_path
):
    the_job, _ = job
    monkeypatch.setattr(
        caching, "teacher_cache", lambda *a, **k: pytest.fail("a cache was asked for")
    )
    ResponseDistillation(batch_size=4, **FEW).compress(
        replace(the_job, budget=Budget(seen_tokens=1_500, rows=40))
    )
    # where all would be kept, too
    with pytest.raises(CellFailed, match="top_k=2000 is above the vocabulary of 1,024"):
        ResponseDistillation(top_k=2_000).compress(replace(the_job, workdir=tmp_path / "work"))
    monkeypatch.setattr("harness.models.shape.MAX_DENSE_VOCABULARY", 16)
    for method, message in (
        (ResponseDistillation(divergence="jsd", cache="on"), "needs all 1,024 probabilities"),
        (
            ResponseDistillation(top_k=2_000, cache="on"),
            "top_k=2000 is above the vocabulary of 1,024",
        ),
    ):
        with pytest.raises(CellFailed, match=message):
            method.compress(replace(the_job, workdir=tmp_path / "work"))


def command(*arguments):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "harness.cli", "cache", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


def test_the_command_lists_verifies_and_prunes(job, teacher, rows):
    the_job, _ = job
    cache = the_job.cache
    key = teacher_cache(the_job, teacher, rows, k=8, width=1024).key
    (cache / "traces").mkdir()
    (cache / "rates").mkdir()
    write_signed(cache / "rates" / "chosen.json", {"losses": {"0.001": 2.0}, "cost": {}})
    payload = "{}"
    digest = hashlib.sha256(payload.encode()).hexdigest()
    (cache / "traces" / "good.json").write_text(json.dumps({"sha256": digest, "payload": payload}))
    (cache / "traces" / "bad.json").write_text(json.dumps({"sha256": digest, "payload": "{} "}))
    (cache / "answers" / "ab").mkdir(parents=True)
    # what a kill leaves: asked again, not damaged
    (cache / "answers" / "ab" / "torn.jsonl").write_text(signed_line({"a": 1}) + '{"b"')
    (cache / "answers" / "ab" / "wrong.jsonl").write_text(
        signed_line({"a": 1}) + '{"b"\n' + signed_line({"c": 2})
    )
    (cache / "teachers" / ".half.1.part").mkdir()
    (cache / "teachers" / ".half.1.part" / "x.npy").write_bytes(b"x")
    code, text = command("ls", "--cache", cache)
    assert code == 0 and key in text and "7 artefacts" in text
    code, text = command("verify", "--cache", cache)
    assert (
        code == 1
        and text.count("DAMAGED") == 3
        and text.count("  whole\n") == 4
        and "line 2" in text
    )
    code, text = command("prune", "--cache", cache)
    assert code == 0 and text.count("deleted") == 3 and command("verify", "--cache", cache)[0] == 0
    assert (
        command("prune", "--cache", cache, "--older-than", "0", "--kind", "traces")[1].count(
            "deleted"
        )
        == 1
    )
    assert "3 artefacts" in command("ls", "--cache", cache)[1]
