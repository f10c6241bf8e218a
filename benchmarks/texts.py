"""Makes the texts of the page on real models: calibration text of three kinds, and held-out text of four.

    python benchmarks/texts.py DATA OUT      DATA holds train/, heldout/ and bench/; OUT gets one file a text

Calibration: books, encyclopedia, news, and conversations (questions and answers of GSM8K, MIT licence) as plain turns,
in an order drawn from seed 0; as many characters of each of the first three, a third of that of conversations. Held
out: the same four kinds, of other documents.
"""

import json
import lzma
import random
import sys
from pathlib import Path

KINDS = {"books": "gutenberg-00", "encyclopedia": "wiki_en_2015-00", "news": "wikinews_en-00"}
HELD_OUT = {"books": "gutenberg_valid", "encyclopedia": "wiki_en_2015_valid", "news": "wikinews_en_valid"}
CALIBRATION = 1_600_000  # characters of each kind of prose: some 370,000 tokens
LONGEST = 12_000  # characters of a document, so that no book is all there is
EVALUATED = 150_000  # characters of each held-out text
TURNS = 300  # conversations that are held out, the first


def calibration(data: Path) -> list[str]:
    """Documents of all kinds, shuffled."""
    found = []
    for name in KINDS.values():
        with lzma.open(data / "train" / f"{name}.txt.xz", "rt", encoding="utf-8") as file:
            left = CALIBRATION
            for document in file.read(4 * CALIBRATION).split("<|endoftext|>"):
                for start in range(0, len(document), LONGEST):
                    piece = document[start:start + LONGEST].strip()[:left]
                    if len(piece) > 500:
                        found.append(piece)
                        left -= len(piece)
    found += conversations(data)[TURNS:]
    random.Random(0).shuffle(found)
    return found


def conversations(data: Path) -> list[str]:
    """Questions with their answers, as turns."""
    lines = (data / "bench" / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines()
    return [f"User: {item['question']}\n\nAssistant: {item['answer']}" for item in map(json.loads, lines)]


def main() -> None:
    data, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in calibration(data)]
    (out / "calibration.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    held = {name: (data / "heldout" / f"{file}.txt").read_text(encoding="utf-8") for name, file in HELD_OUT.items()}
    for name, text in (held | {"chat": "\n\n".join(conversations(data)[:TURNS])}).items():
        (out / f"{name}.txt").write_text(text[:EVALUATED], encoding="utf-8")


if __name__ == "__main__":
    main()
