#!/usr/bin/env python3
"""Cut the calibration and held-out text that travel with the package, and write their attribution.

Usage: python reference/bundle.py [--data ../shared/data/heldout] [--out src/kdprune/bundled] [--share 1.0]

Every text comes from files that the reference model is not trained on; no document is in both cuts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SEPARATOR = "<|endoftext|>"
LONGEST = 8_000      # characters of one document
WIKIPEDIA = "https://en.wikipedia.org"
WIKINEWS = "https://en.wikinews.org"


@dataclass(frozen=True)
class Book:
    """One public-domain book of the Project Gutenberg file, found by how its document begins."""

    begins: str      # first characters of the document
    title: str
    starts: str      # the paragraph with which its own text starts: front matter is left out
    budget: int      # characters to take, rounded down to whole paragraphs


CALIBRATION_BOOKS = (
    Book("LIFE’S HANDICAP", "Rudyard Kipling, Life's Handicap (1891)", "In Northern India stood", 60_000),
    Book("THE MAN UPSTAIRS", "P. G. Wodehouse, The Man Upstairs and Other Stories (1914)",
         "There were three distinct stages", 60_000),
)
HELDOUT_BOOKS = (
    Book("The Blockade Runners", "Jules Verne, The Blockade Runners (1865), translated by N. D'Anvers",
         "The Clyde was the first river", 60_000),
)


def documents(path: Path) -> list[str]:
    """The documents of a text file, stripped, in order."""
    texts = (text.strip() for text in path.read_text(encoding="utf-8").split(SEPARATOR))
    return [text for text in texts if text]


def opening(text: str, budget: int) -> str:
    """As many whole lines of `text` as fit into `budget` characters."""
    if len(text) <= budget:
        return text
    end = text.rfind("\n", 0, budget + 1)
    return text[:end].rstrip() if end > 0 else ""


def take(texts: Iterable[str], budget: int, *, longest: int = LONGEST, shortest: int = 400) -> list[str]:
    """Documents in order until the budget is full; of a long one, the opening paragraphs."""
    taken: list[str] = []
    for text in texts:
        cut = opening(text, min(longest, budget))
        if len(cut) < shortest:
            continue
        taken.append(cut)
        budget -= len(cut)
        if budget < shortest:
            break
    return taken


def excerpt(texts: Iterable[str], book: Book, share: float = 1.0) -> str:
    """The chosen stretch of one book, or this share of it, from the start of its own text."""
    text = next(text for text in texts if text.startswith(book.begins))
    return opening(text[text.index(book.starts):], round(share * book.budget))


def titles(texts: Iterable[str]) -> str:
    """The first line of each document, as an attribution list."""
    return "; ".join(text.split("\n", 1)[0].strip() for text in texts)


def section(name: str, file: str, wiki: list[str], books: tuple[Book, ...], news: list[str]) -> str:
    """Attribution of one of the two files."""
    return "\n".join([
        f"## {name}: `{file}`",
        "",
        f"**Wikipedia** ({WIKIPEDIA}), 2015 text, by the contributors to the articles named here, licence "
        f"CC BY-SA 3.0 (https://creativecommons.org/licenses/by-sa/3.0/): {titles(wiki)}.",
        "",
        "**Project Gutenberg**, public domain in the United States, an excerpt of each: "
        + "; ".join(book.title for book in books) + ".",
        "",
        f"**Wikinews** ({WIKINEWS}), by its contributors, licence CC BY 2.5 "
        f"(https://creativecommons.org/licenses/by/2.5/): {titles(news)}.",
        "",
    ])


INTRODUCTION = f"""# Bundled text

Calibration and held-out text for the bundled reference model, which saw none of it in training.
Documents are separated by a line `{SEPARATOR}`; no document is in both files. `reference/bundle.py`
writes both files and this page.

Changes to the sources: markup and tables removed; of a long article only the opening paragraphs, of a
book only a stretch of its own text. Wikipedia text in these files, changed or not, stays under
CC BY-SA 3.0.

"""


def main() -> None:
    """Write calibration.txt, heldout.txt and README.md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/heldout"))
    parser.add_argument("--out", type=Path, default=Path("src/kdprune/bundled"))
    parser.add_argument("--share", type=float, default=1.0, help="of the bundled size of each kind of text")
    parser.add_argument("--only", choices=("calibration", "heldout"), help="write one of the two (default: both)")
    args = parser.parse_args()
    novels = documents(args.data / "gutenberg_valid.txt")
    news = documents(args.data / "wikinews_en_valid.txt")
    split = len(news) * 5 // 8
    cuts = (
        ("Calibration", "calibration.txt", documents(args.data / "wiki_en_2015_valid.txt"), 200_000,
         CALIBRATION_BOOKS, news[:split], 80_000),
        ("Held-out", "heldout.txt", documents(args.data / "wiki_en_2015_test.txt"), 100_000,
         HELDOUT_BOOKS, news[split:], 40_000),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    page = INTRODUCTION
    for name, file, articles, wiki_budget, books, stories, news_budget in cuts:
        if args.only and file != f"{args.only}.txt":
            continue
        wiki, reports = (take(texts, round(args.share * budget), longest=round(args.share * LONGEST))
                         for texts, budget in ((articles, wiki_budget), (stories, news_budget)))
        texts = wiki + [excerpt(novels, book, args.share) for book in books] + reports
        (args.out / file).write_text(f"\n{SEPARATOR}\n".join(texts) + "\n", encoding="utf-8")
        page += section(name, file, wiki, books, reports) + "\n"
        print(f"{file}: {len(texts)} documents, {(args.out / file).stat().st_size} bytes")
    (args.out / "README.md").write_text(page.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
