"""`wikitext`: perplexity of WikiText-2's raw test text (Merity et al. 2016), by document.

It is lm-eval's definition. Text comes from `wikitext2/wiki.test.raw` of the data folder (plain or
.gz), else documents from the Hub.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from harness.contract import DataSource, Example, Grade, Split
from harness.data.source import NoSplit
from suites.loading.lm_eval import (
    build_task,
    build_task_over_rows,
    data_dir_hint,
    explaining_hub_errors,
    hub_rows,
    read_builtin,
)

if TYPE_CHECKING:
    from suites.loading.fetching import HubFile

FILES = ("wikitext2/wiki.test.raw.gz",)
PUBLISHED = 2_891  # lines, empty ones dropped
_TITLE = re.compile(r" = [^=]+ = ?")  # ` = Title = `; deeper headings have more than one pair


def documents(text: str) -> list[str]:
    """Split the raw text into documents, before every heading of level one.

    Text before the first heading is a document where it has words.
    """
    pages: list[list[str]] = [[]]
    # not `splitlines`, which also splits at other characters than line breaks
    for line in text.removesuffix("\n").split("\n"):
        if _TITLE.fullmatch(line):
            pages.append([])
        pages[-1].append(line)
    return [page for lines in pages if (page := "\n".join([*lines, ""])).strip()]


class WikiText:
    """WikiText-2 test: perplexity per word, per byte, and bits per byte, over whole documents."""

    name = "wikitext"
    version = "2+documents"  # lm-eval's version; its data set's documents, cut from the raw text
    kind = "perplexity"
    chance = 0.0
    primary = "word_perplexity"
    domain = "language"
    files = FILES
    hub_datasets = ("EleutherAI/wikitext_document_level",)  # lm-eval's own

    def hub_files(self) -> "Iterator[HubFile]":
        """Yield the file that `harness data fetch` writes: the raw text without empty lines."""
        from suites.loading.fetching import HubFile

        def lines() -> Iterator[str]:
            with explaining_hub_errors(self.name, data_dir_hint(FILES)):
                rows = hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
            return (text for row in rows if (text := row["text"].removesuffix("\n")).strip())

        yield HubFile(FILES[0], "Salesforce/wikitext wikitext-2-raw-v1 test", lines)

    def lm_eval_tasks(self, source: DataSource) -> dict[str, Any]:
        """Return lm-eval's wikitext over one row `{page}` per document.

        Its detokenizer and its word counts are lm-eval's.
        """
        base = read_builtin("wikitext/wikitext.yaml")
        if source.folder is None:
            with explaining_hub_errors(self.name, data_dir_hint(FILES)):
                return {self.name: build_task(base)}
        pages = [
            {"page": page}
            for page in documents(
                source.text("wikitext2/wiki.test.raw", expected=PUBLISHED, wanted=FILES)
            )
        ]
        task = build_task_over_rows(
            base, rows=lambda _: pages, splits=("test",), training_split=None, validation_split=None
        )
        return {self.name: task}

    def no_training(self, source: DataSource) -> str:
        """Return why there is nothing to train on."""
        return "it measures perplexity only"

    def texts(self, source: DataSource) -> Iterator[str]:
        """Yield the documents, which training text is compared with."""
        if source.folder is None:
            [task] = self.lm_eval_tasks(source).values()
            yield from (str(task.doc_to_target(doc)) for doc in task.eval_docs)
        else:
            yield from documents(
                source.text("wikitext2/wiki.test.raw", expected=PUBLISHED, wanted=FILES)
            )

    def examples(self, split: Split, source: DataSource) -> Iterator[Example]:
        """Raise `NoSplit`: a text has no prompt and no answer to train on."""
        raise NoSplit(
            "wikitext has no training form: it measures perplexity only; train on another suite, "
            "for example --suite math"
        )

    def grade(self, gold: str, text: str) -> tuple[Grade, ...]:
        """Return (): no answer is written."""
        return ()
