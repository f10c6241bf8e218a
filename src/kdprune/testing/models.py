"""What both contracts ask of a model: logits of fixed ids, and that a checkpoint of it computes the same bits."""

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.model.surgery import sharing_copy

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


def hidden_states(model: PreTrainedModel) -> tuple[Tensor, ...]:
    """States (B, T, d) of ``IDS`` in front of every layer and behind the last.

    Those of a copy: transformers hooks what records its states, and then it does not pickle.
    """
    with torch.no_grad():
        return sharing_copy(model)(IDS, output_hidden_states=True).hidden_states


class Dense:
    """A dense model, and what it was when it was made. The cases that follow each other share it: none may change it.

    Attributes:
        model: the model.
        weights: copies of all that it holds, by name.
        config: a copy of its config.
        logits: of ``IDS``.
        embedded: what enters layer 0.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.weights = {name: value.clone() for name, value in model.state_dict().items()}
        self.config: dict[str, Any] = copy.deepcopy(model.config.to_dict())
        self.logits, self.embedded = logits_of(model), hidden_states(model)[0]

    def has_its_weights(self) -> bool:
        """To the bit, without gradients, and all of them can be trained."""
        now = self.model.state_dict()
        return (now.keys() == self.weights.keys() and all(torch.equal(now[key], self.weights[key]) for key in now)
                and all(p.requires_grad and p.grad is None for p in self.model.parameters()))

    def has_its_config(self) -> bool:
        """Every entry."""
        return self.model.config.to_dict() == self.config


@lru_cache(maxsize=1)  # cases of one model follow each other
def _made(build: Callable[[], PreTrainedModel]) -> Dense:
    return Dense(build())


def dense_of(build: Callable[[], PreTrainedModel]) -> Dense:
    """The model, made anew where it is another than that of the last case, or where that case changed it."""
    found = _made(build)
    if not (found.has_its_weights() and found.has_its_config()):
        _made.cache_clear()
        found = _made(build)
    return found


def close(found: Tensor, expected: Tensor) -> None:
    """Fails unless two tensors agree up to what another order of float32 sums changes."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def check_names(contract: type) -> list[str]:
    """A contract's methods ``check_…``, those of the class furthest up first, each once."""
    return list(dict.fromkeys(
        name for owner in reversed(contract.__mro__) for name in vars(owner) if name.startswith("check_")))


def saved_and_loaded(model: PreTrainedModel, directory: Path, logits: Tensor | None = None) -> PreTrainedModel:
    """What the Auto class makes of the checkpoint of ``model``, whose ``logits`` of ``IDS`` are computed if not given.

    Fails unless it is of the same class and record, no weight is missing, left over or of another shape, and its
    logits are the same bits.
    """
    model.save_pretrained(directory)
    found: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    loaded, report = found
    assert type(loaded) is type(model)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert getattr(loaded.config, "kdp", None) == getattr(model.config, "kdp", None)
    assert torch.equal(logits_of(loaded), logits_of(model) if logits is None else logits)
    return loaded


def run_checks(contract: object, names: Sequence[str], case: object, directory: Path) -> None:
    """Makes every check of a case, also behind one that fails.

    Args:
        contract: has the checks, methods of the case, or of the case and a directory.
        names: of the checks.
        case: what they are about.
        directory: empty; each check that writes gets one of its own below it.

    Raises:
        ExceptionGroup: of all that failed, each with the name of its check; its message has them too.
    """
    failed: dict[str, Exception] = {}
    for name in names:
        check = getattr(contract, name)
        try:
            if "directory" in inspect.signature(check).parameters:
                (directory / name).mkdir(parents=True)
                check(case, directory / name)
            else:
                check(case)
        except Exception as error:  # the other checks may say why
            error.add_note(name)
            failed[name] = error
    if failed:
        raise ExceptionGroup(f"{len(failed)} of {len(names)} checks: {', '.join(failed)}", list(failed.values()))
