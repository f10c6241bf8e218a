"""What a run may use, and where it keeps what it has done: budgets, placement, work directory."""

import contextlib
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import get_max_memory
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file

from kdprune.errors import KDPruneError
from kdprune.model.forms import located
from kdprune.model.loading import checkpoint_errors, load_model, read_config
from kdprune.model.quantised import LOAD_IN, load_quantised
from kdprune.model.streaming import Scratch, checkpoint_bytes, is_streamed, load_streamed, set_scratch
from kdprune.options import check_values, option, options_of, taken
from kdprune.runtime.distributed import world
from kdprune.runtime.machine import computes_in, resolve_device
from kdprune.runtime.memory import SCRATCH_SHARE, Memory, parse_bytes
from kdprune.store.cache import Cache, CacheInUse, cache_dir, default_work_dir
from kdprune.store.files import tell
from kdprune.store.hashing import IdentityPart, code_identity, digest, file_hash, files_identity, model_identity

AUTO, NONE = "auto", "none"  # values of work_dir beside a path


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Arguments of :func:`kdprune.prune` and options of the command line, by the same names.

    Raises:
        KDPruneError: a value cannot be.
    """

    device: str = option("auto", "where models run: auto, cpu, cuda, cuda:1", group="resources", recorded=False)
    work_dir: str | None = option(
        None, "directory that keeps finished stages, for the same command after a kill and for other ratios; none: "
        "keep nothing (a directory of the cache; of a comparison runs/ in its output)", group="resources",
        takes=str | Path | None, recorded=False, path=True,
        in_python="nothing is kept where left out, but by a comparison")
    host_memory: str | None = option(
        None, "memory this process may take, 6GiB: what does not fit is read layer by layer and spilled to the work "
        "directory (most of what is free)", group="resources", takes=str | int | None)
    device_memory: str | None = option(
        None, "the same on the accelerator (most of what is free)", group="resources", takes=str | int | None)
    device_map: str | None = option(
        None, "auto: spread the model over all devices, as in transformers", group="resources", rare=True)
    load_in: Literal["8bit", "4bit"] | None = option(
        None, "collect states from a copy of the model in so many bits; what is pruned stays in full precision",
        group="resources")

    def __post_init__(self) -> None:
        check_values(self)

    def memory(self, device: str) -> Memory:
        """The budgets in bytes. Raises KDPruneError for amounts that are none, or that the libraries alone exceed."""
        return Memory.of(self.host_memory, self.device_memory, resolve_device(device))

    def load(
        self, model: str | Path | PreTrainedModel, memory: Memory, *, device: str, dtype: str | None,
        trust_remote_code: bool, known_family: bool = True,
    ) -> PreTrainedModel:
        """The model: as it is, spread over devices, or with its layers left in the checkpoint if it is large.

        Args:
            model: directory, hub id or loaded model.
            memory: the budgets.
            device: where it runs.
            dtype: of its weights; None: the checkpoint's.
            trust_remote_code: whether code that comes with it may run.
            known_family: whether families without a row in the table are refused.
        """
        options: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        if not isinstance(model, str | Path):  # loaded already, or refused there
            return load_model(model, known_family=known_family, **options)
        if self.device_map is not None:
            # Of its own, as files in it are named by parameter alone; it goes with the model.
            folder = tempfile.TemporaryDirectory(prefix="kdprune-offloaded-")
            loaded = load_model(
                model, known_family=known_family, device_map=self.device_map, max_memory=self._max_memory(),
                offload_folder=folder.name, **options)
            weakref.finalize(loaded, folder.cleanup)
            return loaded
        if self._streams(model, memory, device, dtype):
            return load_streamed(model, **options)
        return load_model(model, known_family=known_family, **options)

    def widens(
        self, model: str | Path | PreTrainedModel, memory: Memory, *, device: str, dtype: str | None,
        trust_remote_code: bool,
    ) -> torch.dtype | None:
        """The checkpoint's dtype, if the model is better computed in float32: no dtype was asked for, the CPU has no
        arithmetic of the checkpoint's, and twice the bytes fit. Arguments as of :meth:`load`; else None.
        """
        place = resolve_device(device)
        if dtype is not None or self.device_map is not None or not isinstance(model, str | Path):
            return None
        if place.type != "cpu" or self._streams(model, memory, device, "float32"):
            return None
        with checkpoint_errors(model, trust_remote_code):
            found = read_config(model, trust_remote_code).dtype
        return found if isinstance(found, torch.dtype) and not computes_in(found, place) else None

    def _streams(self, model: str | Path, memory: Memory, device: str, dtype: str | None) -> bool:
        """Whether the model's layers stay in the checkpoint: it is too large, or a quantised copy has the device."""
        if self.load_in is not None and resolve_device(device).type != "cpu":
            return True
        try:
            large = memory.streams(checkpoint_bytes(model, dtype))
        except KDPruneError:  # there is something wrong with the checkpoint: loading it whole says what
            large = False
        return any(world().gather(large))

    def states_model(
        self, model: str | Path | PreTrainedModel, *, device: str, dtype: str | None, trust_remote_code: bool,
    ) -> PreTrainedModel | None:
        """The quantised model that hidden states come from, if one is asked for."""
        if self.load_in is None:
            return None
        return load_quantised(model, LOAD_IN[self.load_in], device, dtype=dtype, trust_remote_code=trust_remote_code)

    def _max_memory(self) -> dict[int | str, int | str] | None:
        """The budgets in transformers' form, which leaves a device alone that it does not name."""
        if self.host_memory is None and self.device_memory is None:
            return None
        found = dict(get_max_memory())
        if self.host_memory is not None:
            found["cpu"] = parse_bytes(self.host_memory)
        if self.device_memory is not None:
            found |= dict.fromkeys((name for name in found if name != "cpu"), parse_bytes(self.device_memory))
        return found

    @contextlib.contextmanager
    def cache(
        self, about: Mapping[str, IdentityPart], model: PreTrainedModel, memory: Memory, states_bytes: int,
        own: Path | None = None,
    ) -> Iterator[Cache]:
        """The cache of a run about these things; without a work directory, files of this run alone if need be.

        Args:
            about: what decides what is found in it.
            model: the dense model; a streamed one gets its scratch folder.
            memory: the budgets.
            states_bytes: of hidden states that are held at once; what does not fit is spilled.
            own: a directory of the command's own, which it uses where the user named none.
        """
        with contextlib.ExitStack() as stack:
            cache = stack.enter_context(self._cache(about) if own is None or self.work_dir not in (None, AUTO)
                                        else open_cache(own, about))
            fits = not is_streamed(model) and memory.holds(states_bytes)
            if cache.directory is None and not world().agree(fits):
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kdprune-")) if world().first else ""
                cache = stack.enter_context(open_cache(Path(world().broadcast(folder)) / "work", about))
            if is_streamed(model):
                scratch = cache.spill_directory("scratch", run_key(about))
                set_scratch(model, Scratch(scratch, int(SCRATCH_SHARE * memory.room())))
            yield cache

    def _cache(self, about: Mapping[str, IdentityPart]) -> Cache:
        if self.work_dir in (None, NONE):
            return Cache(None)
        if self.work_dir != AUTO:
            assert self.work_dir is not None
            return open_cache(Path(self.work_dir), about)
        try:
            return open_cache(default_work_dir(about), about)
        except KDPruneError as error:  # in all processes, or in none
            if not world().broadcast(isinstance(error, CacheInUse)):
                raise
            if world().first:
                tell(f"{default_work_dir(about)} is in use by another run on the same model and text; this one keeps "
                     "nothing, and cannot go on if it is stopped")
            return Cache(None)


def open_cache(directory: Path, about: Mapping[str, IdentityPart]) -> Cache:
    """The cache in this directory, for all processes of the run."""
    return Cache(directory, about, first=world().first, agree=world().agree)


def run_key(about: Mapping[str, IdentityPart]) -> str:
    """The hash of all that a run's stages follow from: code, libraries, and these parts."""
    libraries = [version(name) for name in ("torch", "transformers")]
    return digest([code_identity(), libraries, {name: part.hash for name, part in about.items()}])


def make_resources(given: Mapping[str, Any]) -> Resources:
    """The resources that options ask for; None is as if not given."""
    return taken(Resources, {
        name: str(given[name]) for name in options_of(Resources) if given.get(name) is not None})


def model_part(model: str | Path | PreTrainedModel, loaded: PreTrainedModel, name: str) -> IdentityPart:
    """The model as part of a run's identity: its files by content, or the weights in memory.

    Raises:
        KDPruneError: a loaded model some of whose weights are not in memory.
    """
    if isinstance(model, PreTrainedModel):
        if any(parameter.is_meta for parameter in loaded.parameters()):
            raise KDPruneError("got a loaded model with offloaded weights and a work directory, expected the name of "
                               "its checkpoint: what is kept is found again by the checkpoint's files")
        return IdentityPart(name, model_identity(loaded))
    place, file = located(model)
    if file:
        return IdentityPart(name, file_hash(Path(place) / file["gguf_file"]))
    folder = Path(model) if Path(model).is_dir() else Path(str(cached_file(model, CONFIG_NAME))).parent
    return IdentityPart(name, files_identity(folder, cache_dir() / "files.json"))
