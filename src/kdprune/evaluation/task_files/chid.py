"""ChID's rows, several passages with several blanks, taken apart into one item a blank."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datasets import Dataset

BLANK = re.compile(r"#idiom\d+#")


def blanks(rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """`before`, the passage up to the blank; `filled`, each idiom with what follows; `gold`, the right one's index.

    Rows have candidates (idioms), content (passages), answers {text, candidate_id} in the order of the blanks.
    The passage's other blanks hold their right idioms.
    """
    return Dataset.from_list([item for row in rows for item in _items(row)])


def _items(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    answers = iter(zip(row["answers"]["text"], row["answers"]["candidate_id"], strict=True))
    for passage in row["content"]:
        right = [next(answers) for _ in BLANK.findall(passage)]
        parts = BLANK.split(passage)
        for index, (_, gold) in enumerate(right):
            before, after = parts[0], parts[index + 1]
            for other, (idiom, _) in enumerate(right):
                if other < index:
                    before += idiom + parts[other + 1]
                elif other > index:
                    after += idiom + parts[other + 1]
            yield {"before": before, "filled": [idiom + after for idiom in row["candidates"]], "gold": int(gold)}
