"""ROUGE-1 of a summary."""

from collections.abc import Mapping, Sequence
from typing import Any

from rouge_score import rouge_scorer


def rouge1(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """F-measure of the shared words (Lin 2004), stems compared, 0 to 1."""
    scorer = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=True)
    return {"rouge1": scorer.score(row["summary"], results[0])["rouge1"].fmeasure}
