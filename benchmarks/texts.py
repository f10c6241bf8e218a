"""Makes the texts of the page on real models: calibration text of four kinds, and held-out text of these and of code.

    python benchmarks/texts.py DATA OUT      DATA holds train/, heldout/ and bench/; OUT gets one file a text

Calibration: books, encyclopedia, news, and conversations (questions and answers of GSM8K, MIT licence) as plain turns,
in an order drawn from seed 0; as many characters of each of the first three, a third of that of conversations; files of
some of these kinds alone, of conversations also as messages, for a model's chat template; one with as much Python code
as there is of each kind of prose besides, and one of that code alone. Held out: the same four kinds, of other
documents, conversations as messages too, and code. Code is of the standard library (PSF licence) of the Python that
runs this, what is held out of other modules, so that figures on it compare within one version. Models have surely been
trained on these modules: what a pruned one loses on them is partly what it has forgotten by heart.
"""

import json
import lzma
import random
import re
import sys
import sysconfig
from pathlib import Path

KINDS = {"books": "gutenberg-00", "encyclopedia": "wiki_en_2015-00", "news": "wikinews_en-00"}
PARTS = {  # files of calibration text: all of it, and some kinds
    "calibration": (*KINDS, "chat"), "calibration-prose": tuple(KINDS), "calibration-books": ("books",),
    "calibration-chat": ("chat",)}
HELD_OUT = {"books": "gutenberg_valid", "encyclopedia": "wiki_en_2015_valid", "news": "wikinews_en_valid"}
CALIBRATION = 1_600_000  # characters of each kind of prose: some 370,000 tokens
LONGEST = 12_000  # characters of a document, so that no book is all there is
EVALUATED = 150_000  # characters of each held-out text
MODULES = (
    "argparse", "heapq", "json/decoder", "textwrap", "asyncio/queues", "shutil", "csv", "fractions", "http/cookies",
    "zipfile", "statistics", "difflib", "configparser", "tarfile", "string", "ipaddress", "urllib/parse", "calendar",
    "sched", "dataclasses", "logging/handlers", "email/header", "pathlib", "graphlib", "tempfile", "unittest/mock",
    "selectors", "xml/dom/minidom", "queue", "bisect")
PACKAGES = (
    "asyncio", "collections", "concurrent/futures", "email", "html", "http", "json", "logging", "unittest", "xml/dom")
MODULE = 5_000  # characters of each, from the first class or function on: what stands before is prose
TURNS = 300  # conversations that are held out, the first


def calibration(data: Path) -> list[dict[str, str]]:
    """Documents of all kinds, each with its kind, shuffled."""
    found = []
    for kind, name in KINDS.items():
        with lzma.open(data / "train" / f"{name}.txt.xz", "rt", encoding="utf-8") as file:
            left = CALIBRATION
            for document in file.read(4 * CALIBRATION).split("<|endoftext|>"):
                for start in range(0, len(document), LONGEST):
                    piece = document[start:start + LONGEST].strip()[:left]
                    if len(piece) > 500:
                        found.append({"text": piece, "kind": kind})
                        left -= len(piece)
    found += [{"text": as_turns(one), "kind": "chat"} for one in conversations(data)[TURNS:]]
    random.Random(0).shuffle(found)
    return found


def conversations(data: Path) -> list[dict[str, str]]:
    """Questions with their answers."""
    return [json.loads(line) for line in (data / "bench" / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines()]


def as_turns(one: dict[str, str]) -> str:
    """A question and its answer as plain text."""
    return f"User: {one['question']}\n\nAssistant: {one['answer']}"


def as_messages(some: list[dict[str, str]]) -> str:
    """Questions and answers as a file of conversations."""
    return "".join(json.dumps({"messages": [
        {"role": "user", "content": one["question"]}, {"role": "assistant", "content": one["answer"]}]},
        ensure_ascii=False) + "\n" for one in some)


def calibration_code() -> list[dict[str, str]]:
    """Whole modules of the standard library, and pieces of long ones, but for those that are held out."""
    library, found, left = Path(sysconfig.get_paths()["stdlib"]), [], CALIBRATION
    held = {module(library, name) for name in MODULES}
    files = {*library.glob("*.py"), *(file for name in PACKAGES for file in (library / name).glob("*.py"))} - held
    for file in sorted(files):
        text = file.read_text(encoding="utf-8")
        for start in range(0, len(text), LONGEST):
            piece = text[start:start + LONGEST].strip()[:left]
            if len(piece) > 500:
                found.append({"text": piece, "kind": "code"})
                left -= len(piece)
    return found


def module(library: Path, name: str) -> Path:
    """The file of a module of the standard library."""
    return file if (file := library / f"{name}.py").is_file() else library / name / "__init__.py"


def code() -> str:
    """Parts of modules of the standard library, whole lines."""
    library, found = Path(sysconfig.get_paths()["stdlib"]), []
    for name in MODULES:
        text = module(library, name).read_text(encoding="utf-8")
        begun = re.search(r"^(?:@|(?:async )?def |class )", text, re.MULTILINE)
        piece = text[begun.start() if begun else 0:][:MODULE]
        found.append(piece[: piece.rfind("\n") + 1])
    return "\n\n".join(found)


def main() -> None:
    data, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    documents = calibration(data)
    mixed = [*documents, *calibration_code()]
    random.Random(0).shuffle(mixed)
    parts = {name: [one for one in documents if one["kind"] in kinds] for name, kinds in PARTS.items()} | {
        "calibration-code": mixed, "calibration-code-alone": [one for one in mixed if one["kind"] == "code"]}
    for name, some in parts.items():
        lines = [json.dumps(one, ensure_ascii=False) for one in some]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    held = {name: (data / "heldout" / f"{file}.txt").read_text(encoding="utf-8") for name, file in HELD_OUT.items()}
    talks = conversations(data)
    held |= {"chat": "\n\n".join(map(as_turns, talks[:TURNS])), "code": code()}
    for name, text in held.items():
        (out / f"{name}.txt").write_text(text[:EVALUATED], encoding="utf-8")
    (out / "messages.jsonl").write_text(as_messages(talks[:TURNS]), encoding="utf-8")
    (out / "calibration-messages.jsonl").write_text(as_messages(talks[TURNS:]), encoding="utf-8")


if __name__ == "__main__":
    main()
