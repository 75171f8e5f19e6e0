"""Real tasks scored from a data folder alone: conversations, items, answers."""

import math
from dataclasses import replace

import pytest
from task_data import gsm8k_rows, mmlu_rows, write_rows

import suites
from harness.data.source import LocalOrHubData


@pytest.mark.parametrize("name", ["gsm8k-cot", "mmlu", "wikitext"])
def test_a_real_task_is_scored_from_the_folder_alone(name, source, small, no_network):
    from harness.scoring.score import score_task

    opened = small("Llama", max_position_embeddings=2048)
    score, rows = score_task(
        opened, suites.load(name), source, batch_size="auto", limit=2, progress=lambda _: None
    )
    assert score.n == len(rows) == 2 and score.version == suites.load(name).version
    if name == "mmlu":
        assert (
            len(score.groups) == 2
            and score.macro == score.value
            and sum(score.chosen.values()) == pytest.approx(1)
        )
    if name == "wikitext":
        assert score.value == pytest.approx(
            math.exp(-sum(t for t, _ in score.totals) / sum(w for _, w in score.totals))
        )
        assert score.stderr is None and not score.outcomes
    assert not no_network


@pytest.mark.parametrize("name", ["gsm8k-cot", "mmlu"])
def test_a_conversation_is_shown_as_the_template_says_with_one_bos(name, source, small):
    """With a template, shots become turns, the system prompt is first, and BOS comes once."""
    from harness.contract import Prompting
    from harness.scoring.score import score_task

    opened = small("Llama", max_position_embeddings=4096)
    tokenizer = opened.tokenizer
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    )
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    shown = []
    encode = type(opened).encode

    class Watched(type(opened)):
        def encode(self, text, *, special=None):
            ids = encode(self, text, special=special)
            shown.append((text, ids))
            return ids

    watched = Watched(opened.model, tokenizer, "cpu", opened.checkpoint)
    prompting = Prompting(chat=True, system="Be brief.")
    task = suites.load(name)
    score, _ = score_task(
        watched,
        task,
        source,
        batch_size="auto",
        limit=2,
        progress=lambda _: None,
        prompting=prompting,
    )
    text, ids = next(text_and_ids for text_and_ids in shown if "<assistant>" in text_and_ids[0])
    assert (
        text.startswith(f"{tokenizer.bos_token}<system>Be brief.")
        and text.count("<user>") > 2
        and score.n == 2
    )
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_items_are_the_same_in_any_chat_template_and_others_with_other_words_or_shots(
    small, folder, source
):
    from harness.contract import Prompting
    from harness.scoring.score import score_task

    opened = small("Llama", max_position_embeddings=2048)

    class Fewer(type(suites.load("gsm8k"))):
        def lm_eval_tasks(self, source):
            tasks = super().lm_eval_tasks(source)
            tasks["gsm8k"].set_config("num_fewshot", 3)
            return tasks

    def scored(template, task=None, **prompting):
        opened.tokenizer.chat_template = template
        settings = {
            "limit": 2,
            "progress": lambda _: None,
            "prompting": Prompting(chat=template is not None, **prompting),
        }
        return score_task(
            opened, task or suites.load("gsm8k"), LocalOrHubData(folder=folder), **settings
        )

    angles = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    headed = (
        "{% for m in messages %}## {{ m.role }}\n{{ m.content }}\n{% endfor %}{% if "
        "add_generation_prompt %}## assistant\n{% endif %}"
    )
    angled, angled_rows = scored(angles)
    with_headings, heading_rows = scored(headed)
    assert (
        angled.items_digest == with_headings.items_digest
        and angled_rows[0].prompt_hash != heading_rows[0].prompt_hash
    )
    plain, _ = scored(None)
    fewer_shots, with_system = scored(angles, Fewer()), scored(angles, system="Be brief.")
    digests = [
        angled.items_digest,
        plain.items_digest,
        fewer_shots[0].items_digest,
        with_system[0].items_digest,
    ]
    for split, count in (("train", 40), ("test", 12)):
        path = folder / f"gsm8k/{split}.jsonl{'.gz' if split == 'train' else ''}"
        write_rows(
            path,
            [
                row | {"question": row["question"].replace("figs", "nuts")}
                for row in gsm8k_rows(split, count)
            ],
        )
        digests.append(scored(angles)[0].items_digest)
    assert len(set(digests)) == len(digests)


def test_a_plain_prompt_counts_as_it_is_shown(small, source):
    """Committed records were digested so."""
    from harness.files.digests import digest_of
    from harness.scoring.score import score_task

    score, rows = score_task(
        small("Llama", max_position_embeddings=2048),
        suites.load("gsm8k"),
        source,
        limit=2,
        progress=lambda _: None,
    )
    assert score.items_digest == digest_of(
        [(row.item, row.doc_hash, row.prompt_hash, row.target_hash) for row in rows]
    )


CHOICES = {
    "unlike": lambda n: [f"word {n} {letter}" for letter in "stuv"],
    "two alike": lambda n: [f"word {n}", f"word {n}", f"other {n}", f"third {n}"],
    "alike but for white space": lambda n: [f"word {n}", f"word {n} ", f" word {n}", f"third {n}"],
    "all alike": lambda n: [f"word {n}"] * 4,
    "one within another": lambda n: [
        f"word {n}",
        f"word {n} s",
        f"word {n} s t",
        f"word {n} s t u",
    ],
}


@pytest.mark.parametrize("form", CHOICES)
def test_answers_of_a_cloze_task_are_told_apart_by_their_place(form, folder, source, random_model):
    """Two choices with the same text are different answers: one of them may be right."""
    from harness.files.digests import digest_of
    from harness.models.language_model import open_model
    from harness.scoring.score import score_task

    documents = [row | {"choices": CHOICES[form](n)} for n, row in enumerate(mmlu_rows("test", 8))]
    write_rows(folder / "mmlu/test.jsonl.gz", documents)
    score, rows = score_task(
        open_model(random_model), suites.load("mmlu-cloze"), source, progress=lambda _: None
    )
    golds = [("ABCD".index(row["answer"]), row["choices"]) for row in documents]
    assert len(rows) == len(golds) == 16 and score.answers_digest == digest_of(
        [row.answer for row in rows]
    )
    for row, (gold, choices) in zip(rows, golds, strict=True):
        assert row.text == choices[row.position].strip() and row.correct["acc"] == (
            row.position == gold
        )
        assert row.twins == ([choice.strip() for choice in choices].count(row.text) > 1)
        for position in set(range(4)) - {row.position}:
            # the same text, the same outcome, another place
            assert replace(row, position=position).answer != row.answer
        assert (
            replace(row, correct={name: not hit for name, hit in row.correct.items()}).answer
            != row.answer
        )
        longer = replace(
            row,
            log_probabilities=tuple(value * 1.001 for value in row.log_probabilities),
            prompt="other machine",
        )
        assert longer.answer == row.answer  # last digits are the machine's
    assert (
        score.items_digest != ""
        and set(score.outcomes) == {"acc", "acc_norm"}
        and sum(score.chosen.values()) == pytest.approx(1)
    )


def test_letters_of_shown_choices_are_answers_by_themselves(folder, source, random_model):
    from harness.models.language_model import open_model
    from harness.scoring.score import score_task

    write_rows(
        folder / "mmlu/test.jsonl.gz",
        [row | {"choices": ["same"] * 4} for row in mmlu_rows("test", 4)],
    )
    _, rows = score_task(
        open_model(random_model), suites.load("mmlu"), source, progress=lambda _: None
    )
    # four choices alike have four letters
    assert [row.answer for row in rows] == ["ABCD"[row.position] for row in rows]
