"""What both contracts ask of a model: logits of fixed ids, and that a checkpoint of it computes the same bits."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdprune.data.tokens import TokenSet

# Two rows of twelve ids from 3 to 63, longer than the sliding windows of a tiny model.
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(5))


def _calibration() -> TokenSet:
    """Twelve rows, the last of them with padding, which must enter no statistic."""
    ids = torch.randint(3, 64, (12, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    ids[-1, 18:], mask[-1, 18:] = 0, False
    return TokenSet(ids, mask, "random ids")  # type: ignore[arg-type]


CALIBRATION = _calibration()


def logits_of(model: PreTrainedModel, ids: Tensor = IDS, **options: Any) -> Tensor:
    """Logits (B, T, V) of ``ids`` (B, T), without gradients; ``options`` go to the model's forward."""
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def close(found: Tensor, expected: Tensor) -> None:
    """Fails unless two tensors agree up to what another order of float32 sums changes."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def saved_and_loaded(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """What the Auto class makes of the checkpoint of ``model``.

    Fails unless it is of the same class and record, no weight is missing, left over or of another shape, and its
    logits are the same bits.
    """
    model.save_pretrained(directory)
    found: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    loaded, report = found
    assert type(loaded) is type(model)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert getattr(loaded.config, "kdp", None) == getattr(model.config, "kdp", None)
    assert torch.equal(logits_of(loaded), logits_of(model))
    return loaded
