"""The page: self-contained, and driven in a real headless browser: sort, filter, hover, keyboard,
dark mode, print, answers.

The browser tests need playwright and a Chromium (found on PATH, or playwright's own); they are
skipped, saying so, without one.
"""

import json
import random
import re
import shutil
import time

import pytest
from typer.testing import CliRunner

import harness
from harness.cli.app import app
from harness.records.conditions import ModelReference
from harness.records.record import (
    Cost,
    Environment,
    Measurement,
    RunRecord,
    TaskScore,
    write_record,
)
from harness.records.samples import Evidence, evidence_of
from harness.reporting import html_page, report
from harness.reporting.recommendation import answer_text

ENVIRONMENT = Environment(
    device="cpu",
    dtype="float32",
    threads=2,
    machine="made up",
    platform="Linux x86_64",
    python="3.11.0",
    versions={},
    commit=None,
    dirty=None,
)
TINY = ModelReference(name="tiny", digest="t", weight_bytes=4_000)
NASTY = "</script><script>window.broken = true</script> & <b>bold</b> \u2028 end"


def record(
    label, share, *, seed=None, family="distillation", control=False, n=60, speed=2.0, key=None
):
    draw = random.Random(f"{label}{seed}")
    marks = "".join("1" if draw.random() < share else "0" for _ in range(n))
    score = TaskScore(
        task="gsm8k-mini",
        version="1",
        kind="generate",
        primary="strict-match",
        chance=0.0,
        n=n,
        value=marks.count("1") / n,
        stderr=0.05,
        outcomes={"strict-match": marks},
        items_digest="i",
        answers_digest=f"{label}{seed}",
        groups={
            steps: half.count("1") / len(half)
            for steps, half in (("2", marks[: n // 2]), ("3", marks[n // 2 :]))
        },
        invalid_share=0.0,
        truncated_share=0.0,
        tokens_per_answer=12.0,
        seconds=1.0,
    )
    return RunRecord(
        key=(key or f"{label}-{seed}").ljust(24, "x"),
        status="success",
        label=label,
        method=label.partition("[")[0],
        family=family,
        is_control=control,
        trains=seed is not None,
        suites=("math",),
        tasks=("gsm8k-mini@1",),
        device="cpu",
        dtype="float32",
        teachers=(TINY,),
        student_recipe="depth:0.5",
        student_base=TINY,
        student=TINY,
        seed=seed,
        budget_tokens=1000,
        budget_rows=10,
        path="transformers/shared/1",
        scores=(score,),
        environment=ENVIRONMENT,
        created="2026-11-24T08:00:00Z",
        cost=Cost(seen_tokens=990, seconds=1.5) if seed is not None else Cost(),
        measurements=(
            Measurement(
                name="decode_speedup",
                value=speed,
                low=speed - 0.1,
                high=speed + 0.1,
                unit="ratio",
                higher_is_better=True,
            ),
            Measurement(
                name="weight_bytes_disk", value=4_000 / speed, unit="bytes", higher_is_better=False
            ),
        ),
    )


def records():
    return [
        record("teacher", 0.9, speed=1.0, family="control"),
        *(record("response", 0.7, seed=seed) for seed in (1, 2)),
        *(record("cot", 0.5, seed=seed, speed=1.9) for seed in (1, 2)),
        record("int8", 0.88, family="quantization", speed=1.5),
        record("untouched", 0.05, control=True, family="control"),
    ]


def store(folder, records_to_write):
    """Write a store with answers and training logs beside the records."""
    for record in records_to_write:
        cell = folder / "cells" / record.key[:24]
        write_record(cell / "record.json", record)
        marks = record.scores[0].outcomes["strict-match"]
        items = [
            {
                "task": "gsm8k-mini",
                "item": number,
                "group": "2",
                "gold": str(number),
                "prompt": f"Shot.\n\nQuestion: {NASTY if number == 0 else number}\nAnswer:",
                "text": f" She has {number} pens {'and' if mark == '1' else 'or'} more. #### "
                f"{number if mark == '1' else number + 1}",
                "correct": {"strict-match": mark == "1"},
                "tokens": 9,
            }
            for number, mark in enumerate(marks)
        ]
        (cell / "samples.jsonl").write_text(
            "".join(json.dumps(item) + "\n" for item in items), encoding="utf-8"
        )
        if record.trains:
            student = folder / "students" / record.key[:24]
            student.mkdir(parents=True)
            steps = [
                {
                    "step": number,
                    "epoch": 0,
                    "seen": 100 * number,
                    "rate": 1e-3,
                    "kl": 2.0 / number,
                    "ce": 3.0 / number,
                }
                for number in range(1, 400)
            ]
            steps[199]["validation_ce"] = 0.5
            steps[299]["ce"] = float("nan")
            (student / "training.jsonl").write_text(
                "".join(json.dumps(step) + "\n" for step in steps) + '{"step": 400, "se'
            )
            (cell / "job.json").write_text(
                json.dumps({"stage_folders": [f"/elsewhere/students/{record.key[:24]}"]})
            )
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    every = records()
    store(folder / "store", every)
    html_page.write_page(
        report.build_sections(every), folder, evidence=evidence_of(folder / "store", every)
    )
    return folder


def data_of(path):
    return json.loads(
        re.search(
            r'<script id="data" type="application/json">(.*?)</script>',
            path.read_text(encoding="utf-8"),
        )[1]
    )


# What needs no browser


def test_one_file_that_asks_for_nothing_outside(made):
    text = (made / "page.html").read_text(encoding="utf-8")
    outside = [
        link
        for link in re.findall(r"""(?:src|href)\s*=\s*["'`]([^"'`]+)""", text)
        if not link.startswith("#")
    ]
    assert (
        not outside
        and "@import" not in text
        and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    )
    assert sorted(path.name for path in made.glob("*.*")) == ["page-answers-2.js", "page.html"]


def test_the_page_holds_what_the_tables_hold(made):
    data = data_of(made / "page.html")
    [group] = data["groups"]
    [expected] = report.build_sections(records())
    assert [tuple(map(tuple, table["rows"])) for table in group["tables"]] == [
        tuple(map(tuple, table.rows)) for table in expected.tables
    ]
    points = {point[0]: point for point in group["points"]["gsm8k-mini"]["speed"]}
    assert (
        points["teacher"][2][0] == 1.0
        and points["untouched"][4] is False
        and points["response"][3][0] == 2.0
    )
    assert [(row, [run["run"] for run in runs]) for row, runs in group["curves"].items()] == [
        (row, ["seed 1", "seed 2"]) for row in ("response", "cot")
    ]
    series = group["curves"]["cot"][0]["series"]
    assert (
        set(series) == {"rate", "kl", "ce", "validation_ce"}
        and len(series["kl"][0]) <= 161
        and series["kl"][0][-1] == 39900
    )
    assert series["validation_ce"] == [[20000], [0.5]]  # logged once: thinning never loses a term


def test_the_page_answers_which_row_to_take_as_recommend_does(made):
    offered = data_of(made / "page.html")["groups"][0]["decisions"]
    answers = iter(offered["answers"])
    said = []
    for keep in offered["keep"]:
        for faster in offered["faster"]:
            for take in offered["take"]:
                share = float(keep.removesuffix(" %")) / 100
                ratio = None if faster == "any" else float(faster.removesuffix(" x"))
                expected = harness.recommend(records(), keep=share, faster=ratio, take=take)
                answer = next(answers)
                said.append(answer["said"])
                assert answer["said"] == answer_text(expected)
                assert [row[1] for row in answer["rows"]] == [
                    candidate.label for candidate in expected.candidates
                ]
    assert next(answers, None) is None and len(set(said)) > 2


def test_a_page_without_a_teacher_offers_no_decision(tmp_path):
    html_page.write_page(report.build_sections(records()[1:]), tmp_path)
    assert data_of(tmp_path / "page.html")["groups"][0]["decisions"] == {}


def test_the_frontier_holds_what_nothing_beats():
    [group] = [one.group for one in report.build_sections(records())]
    from harness.reporting.plots import points_of

    points = points_of(group, "gsm8k-mini", "speed")
    frontier = {one.label for one in points if one.on_frontier}
    methods = [one for one in points if one.block != "control"]

    def place(point):
        return point.retention.value, point.gain.value

    for one in points:
        beaten = any(
            place(other) != place(one)
            and all(a >= b for a, b in zip(place(other), place(one), strict=True))
            for other in methods
        )
        assert (one.label in frontier) == (not beaten and one.block != "control")
    assert frontier and "untouched" not in frontier


def test_the_same_records_give_the_same_page(made, tmp_path):
    every = records()
    html_page.write_page(
        report.build_sections(every[::-1]), tmp_path, evidence=evidence_of(made / "store", every)
    )
    for name in ("page.html", "page-answers-2.js"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()


def test_without_answers_the_page_says_so(tmp_path):
    html_page.write_page(report.build_sections(records()), tmp_path)
    data = data_of(tmp_path / "page.html")
    assert data["answers"] is False and data["groups"][0]["curves"] == {}


def test_half_a_surrogate_pair_stops_nothing(tmp_path):
    [one, *others] = records()
    (tmp_path / "s.jsonl").write_text(
        '{"task": "gsm8k-mini", "item": 0, "gold": "\\ud800", "text": "\\ud83d", '
        '"correct": {"s": true}}\n'
    )
    broken = one.model_copy(
        update={
            "label": "x",
            "method": "x",
            "status": "failed",
            "reason": "a \ud800 b",
            "scores": (),
        }
    )
    html_page.write_page(
        report.build_sections([one, broken, *others]),
        tmp_path,
        evidence={one.key: Evidence(tmp_path / "s.jsonl", None)},
    )
    assert data_of(tmp_path / "page.html")["groups"][0]["failed"] == {"x": "failed: a ? b"}


def test_what_cannot_be_drawn_has_its_reason():
    def why(records):
        return [
            group["why"]
            for group in [
                html_page._group_data(section, "x", {})
                for section in report.build_sections(records)
            ]
        ]

    [first, *students] = records()
    assert why([first])[0]["gsm8k-mini"]["speed"] == "the teacher's row is the only one"
    assert "the teacher has no row" in why(students)[0]["gsm8k-mini"]["speed"]
    untimed = [record.model_copy(update={"measurements": ()}) for record in records()]
    assert why(untimed)[0]["gsm8k-mini"] == {
        "speed": "nothing was timed beside the teacher",
        "memory": "no bytes on disk were measured",
        "weights": "no bytes in memory were measured",
    }
    assert why(records())[0]["gsm8k-mini"]["speed"] == ""


def test_the_command_writes_page_and_pictures(made, tmp_path):
    done = CliRunner().invoke(
        app,
        [
            "report",
            str(made / "store"),
            "--out",
            str(tmp_path),
            "--html",
            "--plots",
            "--forms",
            "md",
        ],
        standalone_mode=False,
    )
    assert done.return_value == 0, done.exception
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "page.html",
        "page-answers-2.js",
        "table.md",
        "retention-speed-gsm8k-mini.png",
        "retention-memory-gsm8k-mini.svg",
    } <= names
    picture = (tmp_path / "retention-speed-gsm8k-mini.svg").read_text()
    assert (
        "response" in picture
        and "frontier" in picture
        and (tmp_path / "retention-speed-gsm8k-mini.png").read_bytes()[:4] == b"\x89PNG"
    )


# In a browser


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(
        (
            path
            for name in ("chromium", "chromium-browser", "google-chrome")
            if (path := shutil.which(name))
        ),
        None,
    )
    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-sync",
        "--disable-component-update",
    ]
    with api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=found, args=flags)
        except api.Error as problem:
            pytest.skip(
                f"no Chromium to drive ({str(problem).splitlines()[0][:90]}); install one, or "
                "type: playwright install chromium"
            )
        yield started
        started.close()


@pytest.fixture
def shown(browser, made):
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong, asked = [], []
    tab.on("pageerror", lambda problem: wrong.append(str(problem)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto((made / "page.html").as_uri())
    tab.wait_for_selector("html[data-ready]")
    yield tab
    assert not wrong and all(url.startswith(("file:", "blob:", "data:")) for url in asked)
    tab.close()


QUALITY = "section[data-table=quality]"


def names(tab):
    return tab.locator(f"{QUALITY} tbody th").all_inner_texts()


def test_sorting(shown):
    assert names(shown) == ["teacher", "int8", "response", "cot", "untouched (control)"]
    head = shown.locator(f"{QUALITY} thead th", has_text="score").first
    head.locator("button").click()
    assert (
        head.get_attribute("aria-sort") == "descending"
        and names(shown)[-1] == "untouched (control)"
    )
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending" and names(shown)[:2] == [
        "teacher",
        "untouched (control)",
    ]
    shown.locator(f"{QUALITY} button", has_text="as made").click()
    assert names(shown)[0] == "teacher" and head.get_attribute("aria-sort") == "none"


def test_choosing_what_a_row_must_keep_changes_the_answer(shown):
    part = shown.locator("section[aria-label=decision]")
    answer = part.locator("p[role=status]").first
    strict = answer.inner_text()
    part.locator("select").first.select_option("90 %")
    part.locator("select").nth(1).select_option("2 x")
    assert answer.inner_text() != strict
    expected = harness.recommend(records(), keep=0.9, faster=2.0)
    assert answer.inner_text() == answer_text(expected)
    assert part.locator("tbody tr").count() == len(expected.candidates)
    assert "harness recommend RUN --keep 0.9 --faster 2" in part.inner_text()


def test_filtering(shown):
    shown.get_by_label("Filter the rows of Quality").fill("quantization")
    assert names(shown) == ["int8"] and "1 of 5 rows" in shown.locator(QUALITY).inner_text()
    shown.get_by_label("Filter the rows of Quality").fill("no such row")
    assert names(shown) == []


def test_hovering_and_the_keyboard_say_what_a_point_is(shown):
    point = shown.locator("svg .point[aria-label^='response']").first
    point.hover()
    tip = shown.locator("#tip")
    assert tip.is_visible() and tip.inner_text().startswith("response (distillation)\nkeeps ")
    shown.mouse.move(2, 2)
    assert tip.is_hidden()
    point.focus()
    assert tip.is_visible() and "decodes 2.00x" in tip.inner_text()
    shown.keyboard.press("ArrowLeft")  # one tab stop a picture, arrows between its rows
    assert tip.is_visible() and not tip.inner_text().startswith("response")
    shown.keyboard.press("Escape")
    assert tip.is_hidden()


def test_a_table_is_sorted_by_keyboard_alone(shown):
    shown.locator(f"{QUALITY} thead button", has_text="row").focus()
    shown.keyboard.press("Enter")
    assert names(shown) == ["teacher", *sorted(names(shown)[1:])]


def test_dark_mode(shown, browser, made):
    def paper(tab):
        return tab.evaluate("getComputedStyle(document.body).backgroundColor")

    assert paper(shown) == "rgb(255, 255, 255)"
    shown.locator("#theme").click()
    assert (
        paper(shown) == "rgb(20, 23, 26)"
        and shown.locator("#theme").get_attribute("aria-pressed") == "true"
    )
    night = browser.new_page(color_scheme="dark")
    night.goto((made / "page.html").as_uri())
    assert paper(night) == "rgb(20, 23, 26)"
    night.close()


def test_printing_is_white_and_without_tools(shown):
    shown.locator("#theme").click()
    shown.emulate_media(media="print")
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert (
        shown.locator(".tools").first.is_hidden() and shown.locator(f"{QUALITY} table").is_visible()
    )


def test_a_phone_scrolls_tables_and_not_the_page(browser, made):
    phone = browser.new_page(viewport={"width": 360, "height": 740})
    phone.goto((made / "page.html").as_uri())
    phone.wait_for_selector("html[data-ready]")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    phone.close()


def test_answers_side_by_side(shown):
    shown.get_by_role("button", name="Show answers").click()
    shown.wait_for_selector("[data-side=left]")
    tools = shown.locator(".answers .tools")
    assert re.search(r"1 of \d+", tools.inner_text())
    tools.get_by_label("items").select_option("all")
    tools.get_by_label("right").select_option("cot")
    assert (
        "\u2028" in shown.locator(".answers .answer").first.inner_text()
        or "<b>bold</b>" in shown.locator(".answers .answer").first.inner_text()
    )
    assert shown.evaluate("window.broken") is None  # what a model wrote is text, never markup
    tools.get_by_label("items").select_option("lost")
    left, right = (shown.locator(f"[data-side={side}]") for side in ("left", "right"))
    assert "and more" in left.inner_text() and "or more" in right.inner_text()
    assert "or" in right.locator("mark").all_inner_texts()
    before = shown.locator(".answers strong").first.inner_text()
    shown.get_by_role("button", name="next").click()
    assert shown.locator(".answers strong").first.inner_text() != before
    place = (
        shown.locator(".answers strong").first.inner_text(),
        tools.get_by_label("right").input_value(),
    )
    # the other seed's file stands beside the page; the place is kept
    tools.get_by_label("seed").select_option("2")
    shown.wait_for_function("document.querySelector('.answers select').value === '2'")
    assert (
        shown.locator("[data-side=left]").is_visible()
        and tools.get_by_label("right").input_value() == place[1]
    )
    tools.get_by_label("items").select_option("all")
    tools.get_by_label("item", exact=True).fill("7")
    tools.get_by_label("item", exact=True).press("Enter")
    assert shown.locator(".answers strong").first.inner_text() == "Item 7"


def test_training_curves_show_every_term_of_every_seed(shown):
    part = shown.locator("section[data-part=curves]")
    figures = part.locator("figure[data-term]")
    assert [one.get_attribute("data-term") for one in figures.all()] == [
        "kl",
        "ce",
        "validation_ce",
        "rate",
    ]
    assert part.locator("figure[data-term=kl] polyline").count() == 2  # two seeds
    # broken where a value was no number, and said so
    assert part.locator("figure[data-term=ce] polyline").count() == 4
    assert "2 values not finite" in part.locator("figure[data-term=ce]").inner_text()
    assert part.locator("figure[data-term=validation_ce] circle").count() == 2
    part.get_by_label("row").select_option("cot")
    part.get_by_label("logarithmic").check()
    assert (
        part.locator("figure[data-term=kl] svg").get_attribute("aria-label").startswith("kl of cot")
    )


def test_every_control_and_picture_has_a_name(shown):
    unnamed = shown.evaluate(
        """() => {
          const parts = "button, select, input, svg:not([aria-hidden]), [role=region]";
          const named = (part) =>
            part.getAttribute("aria-label") || part.textContent.trim() || part.closest("label");
          return [...document.querySelectorAll(parts)]
            .filter((part) => !named(part)).map((part) => part.outerHTML.slice(0, 80));
        }"""
    )
    assert unnamed == []
    every = (
        "[...document.querySelectorAll('thead th')].every((one) => one.scope === 'col' && "
        "one.hasAttribute('aria-sort'))"
    )
    heads = shown.evaluate(every)
    assert heads and shown.get_attribute("html", "lang") == "en"


def test_a_page_of_thirty_methods_and_three_seeds(browser, tmp_path):
    """30 methods x 3 seeds x 1,319 items: at most 8 MB, the first view drawn within a second by the
    browser's own clock.
    """
    words = [
        "Lena",
        "Omar",
        "finds",
        "buys",
        "sells",
        "gives",
        "twelve",
        "pens",
        "nuts",
        "boxes",
        "then",
    ]
    all_records = [record("teacher", 0.9, n=1319, speed=1.0)]
    for at in range(30):
        all_records += [
            record(f"response[temperature={at}]", 0.6 + at / 100, seed=seed, n=1319)
            for seed in (1, 2, 3)
        ]
    evidence = {}
    for one in all_records:
        draw = random.Random(one.key)
        path = tmp_path / f"{one.key[:24].strip()}.jsonl".replace("[", "_").replace("]", "_")
        with path.open("w") as stream:
            for at, mark in enumerate(one.scores[0].outcomes["strict-match"]):
                text = " ".join(
                    draw.choice(words) if draw.random() < 0.6 else str(draw.randrange(99))
                    for _ in range(40)
                )
                item = {
                    "task": "gsm8k-mini",
                    "item": at,
                    "gold": str(at),
                    "text": text,
                    "correct": {"s": mark == "1"},
                    "tokens": 40,
                }
                stream.write(json.dumps(item) + "\n")
        evidence[one.key] = Evidence(path, None)
    html_page.write_page(report.build_sections(all_records), tmp_path / "out", evidence=evidence)
    size = (tmp_path / "out" / "page.html").stat().st_size
    assert size <= 8_000_000
    tab = browser.new_page()
    began = time.monotonic()
    tab.goto((tmp_path / "out" / "page.html").as_uri())
    tab.wait_for_selector("html[data-ready]")
    assert tab.locator(f"{QUALITY} tbody tr").count() == 31
    print(
        f"{size:,} bytes, first view: {time.monotonic() - began:.2f} s, "
        f"{tab.evaluate('performance.now()'):.0f} ms since navigation"
    )
    tab.get_by_role("button", name="Show answers").click()
    tab.wait_for_selector("[data-side=left]", timeout=60_000)
    tab.close()
