"""Loading where kdprune is not installed: a process of its own, by the code beside the weights alone."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from kdprune.testing.models import IDS

_SCRIPT = """
import json, shutil, sys
from pathlib import Path
sys.modules["kdprune"] = None  # the package is not installed here
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

work, paths = Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]]
ids = load_file(work / "ids.safetensors")["ids"]
logits, notes = {}, {}
with torch.no_grad():
    for path in paths:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="float32", trust_remote_code=True)
        base = AutoModel.from_pretrained(path, config=model.config, dtype="float32", trust_remote_code=True)
        states = [m(ids).last_hidden_state for m in (model.base_model, base)]
        logits[path.name] = model(ids).logits
        heads = {}
        for name in set(getattr(model.config, "auto_map", {})) - {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}:
            head = getattr(transformers, name).from_pretrained(
                path, num_labels=3, dtype="float32", trust_remote_code=True)
            heads[name] = torch.equal(head.base_model(ids).last_hidden_state, states[0])
        notes[path.name] = {"module": type(model).__module__, "base": torch.equal(*states), "heads": heads}
    model.save_pretrained(work / "again")
    again = AutoModelForCausalLM.from_pretrained(work / "again", trust_remote_code=True)
    notes["again"] = torch.equal(again(ids).logits, logits[path.name])
shutil.copytree(path, work / "bare")
config = json.loads((work / "bare" / "config.json").read_text())
del config["auto_map"]
(work / "bare" / "config.json").write_text(json.dumps(config))
for name, where in (("untrusted", path), ("bare", work / "bare")):
    for auto in (AutoConfig, AutoModelForCausalLM):
        try:
            auto.from_pretrained(where)
            notes[name] = "was loaded"
        except ValueError as error:
            notes.setdefault(name, str(error))
save_file(logits, work / "logits.safetensors")
(work / "notes.json").write_text(json.dumps(notes))
"""


@dataclass(frozen=True)
class Elsewhere:
    """What a process without kdprune found.

    Attributes:
        logits: of ``IDS``, in float32, by the name of the directory.
        notes: by the same name, ``module`` that the class is from, whether ``base``, loaded by AutoModel, has the
            same states, and so have the models with other ``heads``; of the last directory, whether a model saved
            ``again`` computes the same, and what was said to loading it ``untrusted`` and ``bare`` of its ``auto_map``.
    """

    logits: dict[str, Tensor]
    notes: dict[str, Any]


def load_elsewhere(directories: Sequence[Path], work: Path, ids: Tensor = IDS) -> Elsewhere:
    """Loads checkpoints with ``trust_remote_code`` in one process that cannot import kdprune.

    Args:
        directories: of checkpoints, of different names.
        work: an empty directory for what the process needs and writes.
        ids: token ids (B, T).

    Raises:
        AssertionError: with what the process printed, if it failed.
    """
    work.mkdir(parents=True, exist_ok=True)
    save_file({"ids": ids}, work / "ids.safetensors")
    environment = {
        **os.environ, "HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(work), *map(str, directories)],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    notes = json.loads((work / "notes.json").read_text(encoding="utf-8"))
    return Elsewhere(load_file(work / "logits.safetensors"), notes)
