"""What several test files share: tiny random models of every family, and the bundled reference model.

The process that hands tests to the workers reads this file too, so that libraries are imported where they are used.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tiny_checkpoint import Bench
    from transformers import PreTrainedModel

os.environ.setdefault("HF_HUB_OFFLINE", "1")
gc.disable()  # until everything is imported and collected: there is nothing to free
pytest.register_assert_rewrite("kdprune.testing")  # before anything imports it


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model(name, seed=0, std=0.15)``: a fresh model from tests/families.py."""
    from families import build

    return build


@pytest.fixture(scope="session")
def bundled() -> PreTrainedModel:
    """The bundled reference model in float32. Shared: do not change it."""
    import torch
    from transformers import AutoModelForCausalLM

    import kdprune

    path = Path(kdprune.__file__).parent / "bundled" / "model"
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A tiny checkpoint with its tokenizer, and text. Shared: do not change it."""
    from tiny_checkpoint import build_bench

    return build_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def alone(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``prune`` of the tiny checkpoint writes without a work directory, undrawn. Shared: do not change it."""
    from tiny_checkpoint import no_drawing, pruned_well

    out = tmp_path_factory.mktemp("alone") / "out"
    with no_drawing():
        pruned_well(bench, "none", out)
    return out


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices are slower on many threads, above all where other processes want the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[None]:
    """Nothing is drawn in this file; in a file that also draws, ``@no_drawing()`` is for one test."""
    from tiny_checkpoint import no_drawing

    with no_drawing():
        yield


@pytest.fixture(scope="session", autouse=True)
def _quiet_worker() -> None:
    """No progress bars of transformers; one core a worker."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _nothing_drawn_on_meta() -> Iterator[None]:
    """Random values for tensors without data are none; torch takes a fifth of the loading of a tiny model over them."""
    from torch.nn import init

    def only_data(own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda tensor, *args, **kwargs: tensor if tensor.is_meta else own(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_uniform_", "uniform_", "normal_"):
            patch.setattr(init, name, only_data(getattr(init, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def _short_speeds() -> Iterator[None]:
    """Where a run measures speed or shows samples, it writes few tokens, once: tests about those say how many."""
    from kdprune.evaluation import samples, speed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "NEW_TOKENS", 1)
        patch.setattr(speed, "REPEATS", 1)
        patch.setattr(samples, "NEW_TOKENS", 4)
        yield


@pytest.fixture(scope="session", autouse=True)
def _light_collections() -> None:
    """What the libraries hold stays: no garbage collection, of which every measured stretch has one, walks it again."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Work directories of the command line go to a place of the test run."""
    os.environ["KDPRUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
