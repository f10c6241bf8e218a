"""The part of results.json on healing."""

from typing import Literal

from pydantic import Field

from kdprune.report.records import Number, Numbers, Record


class Heal(Record):
    """Training of the pruned model after pruning. Losses before and after are taken on held-out calibration rows."""

    loss: Literal["lm", "kl"] = Field(description="next-token loss, or KL(dense‖pruned) of next-token distributions")
    what: Literal["stand-ins", "lora"] = Field(description="what was trained")
    tokens: int = Field(description="calibration tokens seen, repeats counted")
    parameters: int = Field(description="parameters trained")
    rate: Number = Field(None, description="peak learning rate; null in older records")
    curve: Numbers = Field(default_factory=list, description="training loss, means over successive stretches")
    watched: Numbers = Field(
        default_factory=list, description="the loss on held-out rows, before the first step and at those points")
    looks: list[int] = Field(
        default_factory=list, description="tokens seen at those looks at held-out rows; empty in older records")
    before: Number = Field(None, description="the loss trained on, before healing, nats")
    after: Number = Field(None, description="the same after healing")
    language_before: Number = Field(None, description="next-token loss before healing, nats")
    language_after: Number = Field(None, description="next-token loss after healing")
    language_dense: Number = Field(None, description="next-token loss of the dense model; null in older records")
    kept: bool = Field(description="false: held-out rows got worse and healing was undone")

    @property
    def tokens_at_looks(self) -> list[float]:
        """Tokens seen at each look at held-out rows: in older records evenly spaced, up to rounding."""
        if len(self.looks) == len(self.watched):
            return [*self.looks]
        return [self.tokens * number / max(1, len(self.watched) - 1) for number in range(len(self.watched))]
