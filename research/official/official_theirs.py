"""The published code of the peers on SmolLM2-135M, driven from checkouts given by path. Needs transformers 4.45.2.

    python official_theirs.py CHECKOUTS WORK [linearpatch replaceme streamline sleb slicegpt llm-pruner dense]

WORK is a folder that ``official_ours.py prepare`` made. Published functions are imported and called, nothing of them stands
here; text replaced in them is listed in PATCHES, with why, and goes into the record.
"""

import argparse
import contextlib
import io
import os
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from official_shared import (FIRST, HELD, LAST, LENGTH, RATE, ROWS, RUN, SLEB_LAYERS, SLEB_ROWS, SLICE_LENGTH, SLICES, SPARSITY,
                    Work, loss_of, patched)
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

PATCHES: dict[str, list[tuple[str, str, str, str]]] = {  # file, old, new, why
    "linearpatch": [
        ("layer_select.py", ".half())", ".float())", "the model is float32"),
        ("block_scaling.py", ".to(torch.float16)", ".to(torch.float32)", "the same"),
    ],
    "replaceme": [
        ("ReplaceMe/utils.py", "from lm_eval import evaluator", "evaluator = None", "tasks are not run"),
        ("ReplaceMe/utils.py", "from torchmin import minimize", "minimize = None", "its other solvers are not run"),
        ("ReplaceMe/utils.py", '"cuda"', '"cpu"', "no CUDA"),
        ("ReplaceMe/lstsq.py", "'cuda'", "'cpu'", "no CUDA"),
        ("ReplaceMe/lstsq.py", "torch.load(distances_path)", "torch.load(distances_path, weights_only=False)",
         "torch 2.6 and later"),
        ("ReplaceMe/lstsq.py", "torch.bfloat16", "torch.float32", "to see past its rounding; left in once"),
        ("ReplaceMe/cosine_dist.py", "torch.bfloat16", "torch.float32", "the same"),
    ],
    "streamline": [
        ("LLM_Streamline/get_cosine.py", "assert len(dataset) > num_data", "assert len(dataset) >= num_data",
         "all rows"),
        ("LLM_Streamline/get_cosine.py", "return best_layer", "return best_layer, similarities", "to compare them"),
        ("LLM_Streamline/train_lightweightnetwork.py", "best_layer = get_cosine_similarity(",
         "best_layer, _ = get_cosine_similarity(", "the same"),
        ("LLM_Streamline/train_lightweightnetwork.py", "torch.arange(0, 2048)", "torch.arange(0, 128)",
         "rows of 128 tokens"),
    ],
    "sleb": [("sleb.py", 'torch.device("cuda:0")', 'torch.device("cpu")', "no CUDA")],
    "slicegpt": [],
    "llm-pruner": [("llama3.py", "torch.float16", "torch.float32", "no gradients in float16 on a CPU")],
}


def patches(method: str, file: str, leave: str = "") -> list[tuple[str, str]]:
    return [(old, new) for name, old, new, _ in PATCHES[method] if name == file and old != leave]


def dense(work: Work, attention: str = "sdpa") -> Any:
    model = LlamaForCausalLM.from_pretrained(work.model, torch_dtype=torch.float32, attn_implementation=attention)
    return model.eval()


def tokenizer_of(work: Work) -> Any:
    return PreTrainedTokenizerFast(tokenizer_file=str(work.model / "tokenizer.json"), pad_token="<|endoftext|>",
                                   eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def run_dense(checkouts: Path, work: Work) -> dict[str, Any]:
    return {"loss": loss_of(dense(work), work.rows()["heldout"])}


def run_linearpatch(checkouts: Path, work: Work) -> dict[str, Any]:
    sys.path.insert(0, str(checkouts / "LinearPatch"))
    select = patched("layer_select", checkouts / "LinearPatch/layer_select.py", patches("linearpatch", "layer_select.py"))
    scaling = patched("block_scaling", checkouts / "LinearPatch/block_scaling.py",
                      patches("linearpatch", "block_scaling.py"))
    from rotate_utils.hadamard_utils import get_hadamard_matrix

    rows, model = work.rows(), dense(work)
    loader = [(row,) for row in rows["calibration"].split(1)]
    # It divides by 128, however many rows there are.
    _, start, end, similarity = select.get_pruned_layer_with_cosine(model, loader, RUN, "cpu")
    fitted = loader[:-HELD]
    scales = select.get_scale_params(model, fitted, start, end, True, "cpu") * (128 / len(fitted))
    matrix = scaling.generate_symmetric_matrix(scales.float())
    model.model.layers = torch.nn.ModuleList(
        [layer for i, layer in enumerate(model.model.layers) if i < start or i >= end])
    plain = loss_of(model, rows["heldout"])
    scaling.register_linear_patch(model, start, scales, "cpu", rotated=True)
    work.save("linearpatch", {"scales": scales, "matrix": matrix, "hadamard": get_hadamard_matrix(576, "cpu")})
    return {"block": [start, end], "similarity": similarity * 128 / len(loader), "loss": loss_of(model, rows["heldout"]),
            "loss without patch": plain}


class Rows:
    """Token rows where the published code expects a data set of texts and a tokenizer: a text is a row's number."""

    pad_token = eos_token = "<|endoftext|>"

    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def loader(self, batch: int) -> Any:
        return torch.utils.data.DataLoader([str(i) for i in range(len(self.ids))], batch_size=batch, shuffle=False,
                                           drop_last=True)

    def __call__(self, batch: list[str], **_: Any) -> dict[str, torch.Tensor]:
        ids = self.ids[[int(text) for text in batch]]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def save_pretrained(self, folder: str) -> None:
        """Has nothing to save."""


def replaceme(checkouts: Path, leave: str = "") -> dict[str, Any]:
    root = checkouts / "ReplaceMe/ReplaceMe"
    package = types.ModuleType("ReplaceMe")
    package.__path__ = [str(root)]
    sys.modules["ReplaceMe"] = package
    return {name: patched(f"ReplaceMe.{name}", root / f"{name}.py", patches("replaceme", f"ReplaceMe/{name}.py", leave))
            for name in ("utils", "distance", "lstsq", "cosine_dist")}


def run_replaceme(checkouts: Path, work: Work) -> dict[str, Any]:
    data, here = work.rows(), os.getcwd()
    os.chdir(work.folder)
    common = {"model_path": str(work.model), "dataset": "rows", "dataset_column": "text", "batch_size": 2,
              "max_length": data["calibration"].shape[1], "layers_to_skip": RUN}

    def fed(module: Any, rows: Rows) -> Any:
        module.get_calib_dataloader = lambda *args: rows.loader(2)
        module.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda path: rows)
        return module

    found: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    fitted = Rows(data["calibration"][:-HELD])
    for name, leave in (("float32", ""), ("bfloat16", "torch.bfloat16")):
        modules = replaceme(checkouts, leave)
        if name == "float32":
            if not Path("distances.pth").exists():
                fed(modules["distance"], Rows(data["calibration"])).profile_distances(**common, dataset_size=ROWS)
            distances = torch.load("distances.pth", weights_only=False)
            start, end = modules["utils"].select_non_overlapping_blocks(distances, RUN, num_blocks=1)[0]
            found |= {"block": [start, end], "distances": [float(one) for one in distances]}
        path = fed(modules["lstsq"], fitted).lstsq(**common, dataset_size=len(fitted.ids), save_transform_only=True,
                                                   save_path=f"replaceme-{name}")
        paths = {"least squares": path}
        for kind, accurate in (("update", False), ("stream", True)) if name == "float32" else ():
            torch.manual_seed(0)
            paths[f"cosine, {kind}"] = fed(modules["cosine_dist"], fitted).cosine_dist(
                **common, dataset_size=len(fitted.ids), start_id=start, end_id=end, save_transform_only=True,
                save_path=f"replaceme-{name}-{kind}", accurate=accurate)
        for solver, path in paths.items():
            model = LlamaForCausalLM.from_pretrained(path, torch_dtype=torch.float32).eval()
            found[f"loss, {solver}, {name}"] = loss_of(model, data["heldout"])
            transform = torch.load(f"{path}_transform", weights_only=False)
            tensors[f"{solver}, {name}"] = {
                "transform": (transform[0] if isinstance(transform, list) else transform).detach(),
                "down": model.model.layers[start - 1].mlp.down_proj.weight.detach().clone()}
    os.chdir(here)
    work.save("replaceme", tensors)
    return found


def run_streamline(checkouts: Path, work: Work) -> dict[str, Any]:
    root = checkouts / "LLM-Streamline"
    sys.path.insert(0, str(root))
    cosine = patched("LLM_Streamline.get_cosine", root / "LLM_Streamline/get_cosine.py",
                     patches("streamline", "LLM_Streamline/get_cosine.py"))
    train = patched("LLM_Streamline.train_lightweightnetwork", root / "LLM_Streamline/train_lightweightnetwork.py",
                    patches("streamline", "LLM_Streamline/train_lightweightnetwork.py"))
    from LLM_Streamline.train_mseloss import replace_lightweight_network

    data = work.rows()
    listed = [{"input_ids": row.tolist()} for row in data["calibration"]]
    model = dense(work)
    start, similarities = cosine.get_cosine_similarity(model, listed, ROWS, "cpu", RUN, 30)
    found: dict[str, Any] = {"block": [start, start + RUN], "similarities": similarities}
    tensors: dict[str, Any] = {"similarities": similarities}
    train.load_dataset = lambda name: {"train": None}
    train.process_datasets = lambda *args: (listed[:-HELD], listed[-HELD:])
    train.get_cosine_similarity = lambda *args: (start, None)
    measured: list[float] = []
    valid = train.valid_model

    def measuring(*args: Any) -> float:
        measured.append(valid(*args))
        return measured[-1]

    train.valid_model = measuring
    # Its entry reads the config by itself, which in this version means eager attention: no mask at all. With "sdpa" the
    # same layer, given no mask, is causal.
    for name, attention in (("as published", None), ("causal", "sdpa")):
        config = AutoConfig.from_pretrained(work.model)
        if attention:
            config._attn_implementation = attention
        measured.clear()
        torch.manual_seed(0)
        layer, best = train.lightweight_model_train(
            model, tokenizer_of(work), "cpu", RUN, 30, 14, 14, 1, 10, 2e-4, 0.0, 1e-3, config, str(work.model), 2)
        inputs = torch.randn(1, LENGTH, 576)
        changed = inputs.clone()
        changed[:, 100:] += 1
        with torch.no_grad():
            positions = torch.arange(LENGTH)[None]
            moved = (layer(hidden_states=inputs, position_ids=positions)[0][:, :100]
                     - layer(hidden_states=changed, position_ids=positions)[0][:, :100]).abs().max()
        config.num_hidden_layers -= RUN - 1
        config._attn_implementation = "sdpa"
        pruned = replace_lightweight_network(
            model, layer, AutoModelForCausalLM.from_config(config), best, RUN, str(work.model), 30).eval()
        found[name] = {"curve": list(measured), "change of the first 100 outputs when later inputs change": float(moved),
                       "loss": loss_of(pruned, data["heldout"])}
    work.save("streamline", tensors)
    return found


def run_sleb(checkouts: Path, work: Work) -> dict[str, Any]:
    root = checkouts / "SLEB"
    sys.path.insert(0, str(root))
    sleb = patched("sleb", root / "sleb.py", patches("sleb", "sleb.py"))
    data, model, here = work.rows(), dense(work), os.getcwd()
    model.seqlen, model.name = LENGTH, str(work.model)
    sleb.get_llm = lambda name: model
    ids = data["calibration"][:SLEB_ROWS].reshape(1, -1)
    sleb.get_trainloaders = lambda *args, **kwargs: types.SimpleNamespace(input_ids=ids)
    os.chdir(work.folder)
    (work.folder / "sleb_results/sleb_results.txt").unlink(missing_ok=True)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        sleb.sleb(str(work.model), num_blocks=30, num_remove_blocks=SLEB_LAYERS, eval_ppl=False)
    os.chdir(here)
    text = said.getvalue()
    order = [int(found) for found in re.findall(r"Originally block (\d+)\)", text)]
    losses = [float(found) for found in re.findall(r"SELECTED block .*Loss=([\d.]+)", text)]
    every = [(int(layer), float(loss)) for layer, loss in re.findall(r"Original block (\d+)\) removed\] Loss=([\d.]+)", text)]
    scale = SLEB_ROWS * LENGTH
    pruned = sleb.block_remove(model, list(order))
    return {"order": order, "losses": [loss / scale for loss in losses],
            "all": [(layer, loss / scale) for layer, loss in every], "loss": loss_of(pruned, data["heldout"])}


def run_slicegpt(checkouts: Path, work: Work) -> dict[str, Any]:
    sys.path.insert(0, str(checkouts / "TransformerCompression/src"))
    from slicegpt import layernorm_fusion, rotate
    from slicegpt.adapters.llama_adapter import LlamaModelAdapter
    from slicegpt.slicing_scheduler import ConstSlicingScheduler

    data = work.rows()
    calibration = data["calibration"][:-HELD]
    loader = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in calibration.split(2)]
    width = int((1 - SPARSITY) * 576) // 8 * 8
    found: dict[str, Any] = {"width": width}
    tensors: dict[str, Any] = {}
    for name, orientation, centred in (("as published", "random", True), ("pca", "pca", True),
                                       ("pca, embeddings not centred", "pca", False)):
        adapter = LlamaModelAdapter(dense(work))
        adapter.model.config.torch_dtype = torch.float32
        table = adapter.get_embeddings()[0].weight.data.clone()
        layernorm_fusion.replace_layers(adapter)
        layernorm_fusion.fuse_modules(adapter)
        if not centred:
            adapter.get_embeddings()[0].weight.data = table
        if name == "pca":
            found["loss, norms folded and embeddings centred, nothing cut"] = loss_of(adapter.model, data["heldout"])
        rotate.rotate_and_slice(adapter, loader, ConstSlicingScheduler(width), final_orientation=orientation)
        found[f"loss, {name}"] = loss_of(adapter.model, data["heldout"])
        if name != "as published":
            with torch.no_grad():
                logits = adapter.model(input_ids=data["heldout"][:1], use_cache=False).logits[0]
            tensors[name] = {"state": {key: value.clone() for key, value in adapter.model.state_dict().items()},
                             "logits": logits}
    work.save("slicegpt", tensors)
    return found


def run_llm_pruner(checkouts: Path, work: Work) -> dict[str, Any]:
    root = checkouts / "LLM-Pruner"
    sys.path.insert(0, str(root))
    main = patched("llama3", root / "llama3.py", patches("llm-pruner", "llama3.py"))
    data, here = work.rows(), os.getcwd()
    slices = data["calibration"][:SLICES, :SLICE_LENGTH]
    found: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    main.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda path: tokenizer_of(work))
    main.get_examples = lambda *args, **kwargs: slices
    raw = main.llama_pruner.TaylorImportance.__call__
    names: dict[int, str] = {}
    current: dict[str, Any] = {}

    def measuring(self: Any, group: Any, **kwargs: Any) -> Any:
        value = raw(self, group, **kwargs)
        first = group[0][0].target.module
        label = current["names"].get(id(first), "?")
        members = [(current["names"].get(id(dep.target.module), "?"), len(idxs)) for dep, idxs in group
                   if id(dep.target.module) in current["names"]]
        current["scores"][label] = value.clone()
        current["members"].setdefault(label, members)
        return value

    main.llama_pruner.TaylorImportance.__call__ = measuring
    loaded = main.LlamaForCausalLM

    class Loading:
        @staticmethod
        def from_pretrained(path: str, **_: Any) -> Any:
            model = loaded.from_pretrained(path, torch_dtype=torch.float32, attn_implementation=current["attention"])
            current["names"] = {id(module): name for name, module in model.named_modules()}
            return model

    main.LlamaForCausalLM = Loading
    main.PPLMetric = lambda model, *args, **kwargs: current.update(model=model)
    os.chdir(work.folder)
    for order in ("param_first", "param_second"):
        current.update(names={}, scores={}, members={}, attention="eager")
        main.main(types.SimpleNamespace(
            base_model=str(work.model), save_ckpt_log_name="official", pruning_ratio=RATE, pruner_type="taylor",
            temperature=1.0, top_p=0.95, max_seq_len=128, channel_wise=False, block_wise=True, layer_wise=False,
            layer=12, block_attention_layer_start=FIRST, block_attention_layer_end=LAST, block_mlp_layer_start=FIRST,
            block_mlp_layer_end=LAST, iterative_steps=1, grouping_strategy="sum", global_pruning=False, taylor=order,
            num_examples=SLICES, device="cpu", test_before_train=False, eval_device="cpu", test_after_train=False,
            seed=42, save_model=False))
        model = current["model"].eval()
        found[order] = {"loss": loss_of(model, data["heldout"]),
                        "parameters": sum(p.numel() for p in model.parameters())}
        found["members"] = {name: current["members"][name] for name in list(current["members"])[:2]}
        tensors[order] = {"scores": current["scores"],
                          "state": {key: value.detach().clone() for key, value in model.state_dict().items()
                                    if "self_attn" in key or "gate_proj" in key}}
        work.save("llm-pruner", tensors)
        del model, current["model"]
    os.chdir(here)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkouts", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("methods", nargs="*")
    asked = parser.parse_args()
    checkouts, work = asked.checkouts.resolve(), Work(asked.work.resolve())
    runs = {"dense": run_dense, "linearpatch": run_linearpatch, "replaceme": run_replaceme,
            "streamline": run_streamline, "slicegpt": run_slicegpt, "llm-pruner": run_llm_pruner, "sleb": run_sleb}
    for method in asked.methods or runs:
        began = time.perf_counter()
        found = runs[method](checkouts, work)
        work.note("theirs", method, {**found, "seconds": round(time.perf_counter() - began, 1),
                                     "patches": [list(one) for one in PATCHES.get(method, [])]})


if __name__ == "__main__":
    main()
