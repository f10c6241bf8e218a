"""Writes a Llama checkpoint of a given shape with random weights, one shard in memory at a time.

    python benchmarks/random_checkpoint.py 7b /tmp/7b --dtype bfloat16

Costs do not depend on the weights, but a run needs finite ones: every layer adds a small update to the stream, as those
of trained models do. There is no tokenizer: calibrate on token ids, ``kdprune.prune(model, calibration=LongTensor)``.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from speed import SHAPES
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from kdprune.data.sources import BUNDLED_MODEL
from kdprune.runtime.machine import generator

SHARD = 2**30  # bytes a file, about
UPDATE = 0.15  # size of a layer's update relative to what enters it, about


def shape_config(shape: str) -> PreTrainedConfig:
    """The config of a shape of ``benchmarks/speed.py``."""
    if not SHAPES[shape]:
        return AutoConfig.from_pretrained(BUNDLED_MODEL)
    return AutoConfig.for_model("llama", vocab_size=32000, max_position_embeddings=4096, **SHAPES[shape])


def random_weight(name: str, size: torch.Size, seed: int, number: int) -> Tensor:
    """Norms are one; a projection keeps the size of what it reads, but those into the stream shrink it."""
    if len(size) == 1:
        return torch.ones(size)
    scale = 1.0 if "embed" in name else 1 / math.sqrt(size[1])
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        scale *= UPDATE
    return scale * torch.randn(size, generator=generator(seed, number))


def write_checkpoint(shape: str, folder: Path, dtype: torch.dtype, seed: int = 0, shard: int = SHARD) -> Path:
    """A checkpoint as transformers writes it: config.json, numbered safetensors files and their index."""
    config = shape_config(shape)
    config.dtype, config.architectures = dtype, ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in shapes.items():
        taken = size.numel() * dtype.itemsize
        if shards[-1] and held + taken > shard:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += taken
    folder.mkdir(parents=True, exist_ok=True)
    weight_map, number = {}, 0
    for index, names in enumerate(shards):
        file, tensors = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors", {}
        for name in names:
            tensors[name] = random_weight(name, shapes[name], seed, number).to(dtype)
            weight_map[name], number = file, number + 1
        save_file(tensors, folder / file, metadata={"format": "pt"})
    total = sum(size.numel() for size in shapes.values()) * dtype.itemsize
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2), encoding="utf-8")
    config.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_checkpoint(given.shape, given.out, getattr(torch, given.dtype), given.seed)


if __name__ == "__main__":
    main()
