"""The records of what a model answers, a row of the task table each, and of what it writes."""

import statistics

from pydantic import Field

from kdprune.report.records import Number, Numbers, Record


class TaskScore(Record):
    """What a model scored on a task: one row of the table."""

    task: str = Field(description="task or benchmark, lm-eval's name where it has one")
    group: str = Field(description="row of the table within the task; the task's own name where it is one row")
    metric: str = Field(description="lm-eval's name of the metric")
    value: Number = Field(description="the score; accuracies and ROUGE from 0 to 1")
    stderr: Number = Field(None, description="its standard error over the items")
    chance: Number = Field(None, description="the score of guessing; null for perplexities")
    items: int = Field(description="items scored; tokens for the perplexity of a text")
    higher_is_better: bool = Field(description="false for perplexities")
    right: list[str] = Field(
        default_factory=list,
        description="item by item 1 or 0: strings whose shares of 1 have the value as their mean, one a task, or one "
                    "of all tasks where these weigh as many items as they have; empty where items score anything else, "
                    "and in older records")

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells a row from others."""
        return self.task, self.group, self.metric

    @property
    def is_share(self) -> bool:
        """Whether it says how much is right, not how likely a text is."""
        return self.higher_is_better and "perplexity" not in self.metric


class Generation(Record):
    """What a model writes, greedily, after prompts from the held-out texts, against what the dense model writes."""

    prompt: int = Field(description="tokens a prompt")
    new_tokens: int = Field(description="n, tokens a continuation")
    same_beginning: Numbers = Field(description="of each prompt: tokens before the first that differs, / n")
    same_tokens: Numbers = Field(description="of each prompt: tokens that are the dense model's at their place, / n")
    repeated: Numbers = Field(
        description="of each prompt: share of the runs of four tokens that stood before in the same continuation")

    def mean(self, name: str) -> float | None:
        """The mean of a measure over the prompts."""
        known = [value for value in getattr(self, name) if value is not None]
        return statistics.fmean(known) if known else None
