"""The record of one row of a task table."""

from pydantic import Field

from kdprune.report.records import Number, Record


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
