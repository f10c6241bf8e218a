"""What makes two runs, models or token sets the same: hashes of everything that figures follow from."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

from kdprune.errors import KDPruneError
from kdprune.store.files import whole_file
from kdprune.store.tensors import raw_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = Path(__file__).parent.parent
SHOWS = ("cli", "report", "planning", "testing", "__init__.py", "__main__.py")
_NO_FILE: WeakKeyDictionary[type, str] = WeakKeyDictionary()  # what stands for the code of classes without one
WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.py")  # what a checkpoint directory's model is read from


class IdentityPart(NamedTuple):
    """One named part of a run's identity: a text to read, and the hash that decides."""

    text: str
    hash: str


def part(text: str, data: Any) -> IdentityPart:
    """A part whose hash is that of plain data, a ready hash among them."""
    return IdentityPart(text, digest(data))


def as_part(value: str | IdentityPart) -> IdentityPart:
    """A text decides by itself."""
    return value if isinstance(value, IdentityPart) else part(value, value)


def differences(there: Mapping[str, IdentityPart], here: Mapping[str, IdentityPart]) -> list[str]:
    """What to say of every part whose hash is not the same, or which is given on one side alone."""
    found = []
    for name in dict.fromkeys([*here, *there]):
        old, new = there.get(name), here.get(name)
        if old is None or new is None:
            found.append(f"{name} {old.text if old else 'not given'} there, {new.text if new else 'not given'} here")
        elif old.hash != new.hash:
            contents = "" if old.text != new.text else f" with other contents ({old.hash[:8]}, {new.hash[:8]})"
            found.append(f"{name} {old.text} there, {new.text} here{contents}")
    return found


def digest(parts: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def code_identity(root: Path = PACKAGE) -> str:
    """A hash of the source that figures follow from: those of other code are measured again.

    What only shows figures (``SHOWS``) is left out: a changed plot, page or command keeps the cache.
    """
    files = [file for file in sorted(root.rglob("*.py")) if file.relative_to(root).parts[0] not in SHOWS]
    return digest([(str(file.relative_to(root)), file.read_text(encoding="utf-8")) for file in files])


def class_identity(kind: type) -> list[str]:
    """Hashes of the files that a class and its bases come from, as ``code_identity`` has those of kdprune; empty for a
    class of its own. What a console holds and no file is another class whenever it is typed in."""
    found = []
    for base in kind.__mro__:
        package = base.__module__.partition(".")[0]
        if package == PACKAGE.name or package in sys.stdlib_module_names:
            continue
        try:
            found.append(hashlib.sha256(Path(inspect.getfile(base)).read_bytes()).hexdigest())
        except (OSError, TypeError):
            found.append(_NO_FILE.setdefault(base, uuid.uuid4().hex))
    return found


def model_identity(model: PreTrainedModel) -> str:
    """A hash of architecture and weights, wherever the model was loaded from."""
    left_out = ("_name_or_path", "transformers_version")
    config = {key: value for key, value in model.config.to_dict().items() if key not in left_out}
    attention = getattr(model.config, "_attn_implementation", None)  # to_dict leaves it out; last bits follow from it
    found = hashlib.sha256(digest([type(model).__name__, config, attention]).encode())
    for name, weight in model.named_parameters():
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        feed(found, weight)
    return found.hexdigest()


def files_identity(folder: str | Path, cache: str | Path | None = None) -> str:
    """A hash of the weights, config and tokenizer files of a checkpoint directory, by content and relative name.

    Args:
        cache: a file that remembers each file's hash by its path, size and time of change, so that only the first look
            at a large model reads it all (about 1.6 GB/s). It may be lost or unwritable: then everything is read.

    Raises:
        KDPruneError: not a directory, or nothing in it that a model could be read from.
    """
    folder = Path(folder)
    files = sorted({file for pattern in WEIGHTS for file in folder.glob(pattern) if file.is_file()})
    if not files:
        raise KDPruneError(f"got {folder}, expected a directory with a model's config and weights; check the path")
    known = _read_cache(cache)
    seen: dict[str, list[Any]] = {}
    for file in files:
        about = file.stat()
        stamp = [about.st_size, about.st_mtime_ns]
        name = str(file.resolve())
        found = known.get(name)
        fresh = isinstance(found, list) and len(found) == 3 and found[:2] == stamp
        seen[name] = found if fresh else [*stamp, file_hash(file)]  # type: ignore[assignment]
    if cache is not None and any(known.get(name) != entry for name, entry in seen.items()):
        try:
            with whole_file(cache) as partial:
                partial.write_text(json.dumps({**known, **seen}, indent=1), encoding="utf-8")
        except (OSError, KDPruneError):
            pass  # the next run reads everything again
    return digest([(file.name, seen[str(file.resolve())][2]) for file in files])


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_cache(cache: str | Path | None) -> dict[str, Any]:
    try:
        found = json.loads(Path(cache).read_text(encoding="utf-8")) if cache is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def feed(found: Any, tensor: Tensor) -> None:
    """The bytes of a tensor into a hash."""
    found.update(raw_bytes(tensor.cpu().contiguous()))
