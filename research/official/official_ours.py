"""kdprune's methods beside the published code, on the same blocks, rows and held-out text. Run with this package's own
libraries; ``official_theirs.py`` runs in between, with older ones.

    python official_ours.py prepare WORK --model SMOLLM2 --calibration FILE --heldout FILE
    python official_theirs.py CHECKOUTS WORK                        (transformers 4.45.2)
    python official_ours.py compare WORK [linearpatch …]
    python official_ours.py record WORK official.json               then: python official_page.py official.json > official.md
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from official_shared import (FIRST, HELD, LAST, LENGTH, ROWS, RUN, SLEB_LAYERS, SLEB_ROWS, SLICE_LENGTH, SLICES, SPARSITY, TEXT,
                    WINDOW, Work, apart, loss_of)

from kdprune.data.tokens import TokenSet, load_stream, load_tokens
from kdprune.methods.common.distance import measure_channel_cosine, measure_distances
from kdprune.methods.peers import linearpatch, llm_pruner
from kdprune.methods.peers.drop import losses_without
from kdprune.methods.peers.linearpatch import LinearPatch
from kdprune.methods.peers.llm_pruner import Kept, LLMPruner
from kdprune.methods.peers.replaceme import ReplaceMe, folded_weights, least_squares
from kdprune.methods.peers.slicegpt import SliceGPT
from kdprune.methods.peers.streamline import Streamline
from kdprune.model.families import decoder_layers
from kdprune.model.loading import load_model, load_tokenizer
from kdprune.model.structures import attention_parts, mlp_parts
from kdprune.model.surgery import Drop, Rewrite, apply_edits
from kdprune.runtime.run import Run
from kdprune.runtime.stages import Stages

SHARE = HELD / ROWS  # of the rows kept out of fits


def prepare(work: Work, model: Path, calibration: Path, heldout: Path) -> None:
    """Rows of tokens, and the model with a config that transformers 4 understands."""
    work.model.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(str(model))
    rows = load_tokens(str(calibration), tokenizer, samples=ROWS, length=LENGTH, seed=0)
    stream = load_stream(str(heldout), tokenizer, limit=TEXT * WINDOW)
    assert rows.mask.all() and rows.ids.shape == (ROWS, LENGTH)
    torch.save({"calibration": rows.ids, "heldout": stream.ids.view(TEXT, WINDOW)}, work.folder / "rows.pt")
    config = json.loads((model / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "torch_dtype": "float32"}
    (work.model / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("model.safetensors", "tokenizer.json"):
        if not (work.model / name).exists():
            (work.model / name).symlink_to((model / name).resolve())


class Ours:
    """The dense model and the rows as kdprune takes them."""

    def __init__(self, work: Work, model: str):
        self.work, self.model = work, load_model(model, device="cpu", dtype="float32")
        self.heldout = work.rows()["heldout"]
        ids = work.rows()["calibration"]
        self.tokens = TokenSet(ids, torch.ones_like(ids, dtype=torch.bool), "rows")
        self.run = Run(seed=0, batch_size=2, stages=Stages())

    @property
    def fitted(self) -> TokenSet:
        return self.tokens.fitted(SHARE)

    def loss(self, edits: Any) -> float:
        return loss_of(apply_edits(self.model, edits), self.heldout)


def compare_dense(ours: Ours, theirs: dict[str, Any]) -> dict[str, Any]:
    return {"loss": loss_of(ours.model, ours.heldout)}


@contextmanager
def their_hadamard(matrix: torch.Tensor) -> Iterator[None]:
    with mock.patch.object(linearpatch, "hadamard", lambda size: matrix.double()):
        yield


def compare_linearpatch(ours: Ours, theirs: dict[str, Any]) -> dict[str, Any]:
    left = ours.work.load("linearpatch")
    similarity = measure_channel_cosine(ours.model, ours.tokens, ours.run)
    starts = LinearPatch().allowed(ours.model)[: -RUN + 1]
    start = max(starts, key=lambda s: float(similarity[s, s + RUN]))
    block = tuple(theirs["block"])
    whole = LinearPatch(blocks=(block,), held=SHARE)

    def found(tokens: TokenSet) -> Any:
        """P and its edits; every row as a set of its own gives the ratio of that row."""
        edits = whole(ours.model, tokens, ours.run).edits
        return edits[0].stand_in.readout.weight.detach().clone(), edits

    own, edits = found(ours.tokens)
    losses = {"loss": ours.loss(edits)}
    with their_hadamard(left["hadamard"]):
        table, edits = found(ours.tokens)
        losses["loss, their Hadamard matrix"] = ours.loss(edits)
        rows = []
        for row in range(len(ours.fitted)):  # a second row is what a fit holds out
            pair = ours.tokens.select(torch.tensor([row, len(ours.tokens) - 1]))
            rows.append(LinearPatch(blocks=(block,), held=0.5)(ours.model, pair, ours.run).edits)
        mean = torch.stack([one[0].stand_in.readout.weight.detach() for one in rows]).mean(0)
        with torch.no_grad():
            edits[0].stand_in.readout.weight.copy_(mean)
        losses["loss, their Hadamard matrix and mean of ratios"] = ours.loss(edits)
    # The same matrix with random signs of its rows is another one with entries ±1/√d: how much hangs on which it is?
    draw, signed = torch.Generator().manual_seed(0), []
    for _ in range(6):
        signs = torch.randint(2, (576,), generator=draw).double() * 2 - 1
        with their_hadamard(signs[:, None] * left["hadamard"].double()):
            signed.append(ours.loss(found(ours.tokens)[1]))
    return {
        "block": [start, start + RUN], "losses, random signs": signed,
        "similarity": float(similarity[start, start + RUN]), **losses,
        "P apart": apart(own, left["matrix"]),
        "P apart, their Hadamard matrix": apart(table, left["matrix"]),
        "P apart, their Hadamard matrix and mean of ratios": apart(mean, left["matrix"]),
        "loss without patch": ours.loss([Drop(range(*block))]),
    }


def compare_replaceme(ours: Ours, theirs: dict[str, Any]) -> dict[str, Any]:
    left = ours.work.load("replaceme")
    distance = measure_distances(ours.model, ours.tokens, ours.run, normed=True).angular
    mine = [float(distance[s, s + RUN]) for s in range(1, 30 - RUN + 1)]
    start = 1 + min(range(len(mine)), key=mine.__getitem__)
    block = tuple(theirs["block"])
    found: dict[str, Any] = {
        "block": [start, start + RUN], "distance off by": max(abs(a - b) for a, b in zip(mine, theirs["distances"], strict=True)),
        "loss without map": ours.loss([Drop(range(*block))])}
    down = "mlp.down_proj.weight"
    for ridge in (0.0, 1e-6):
        matrix = least_squares(ours.model, ours.fitted, range(*block), ridge, 2)
        weights = folded_weights(ours.model, block[0] - 1, matrix)
        name = f"least squares, ridge {ridge:g}"
        published = left["least squares, float32"]
        found[f"T apart, {name}"] = apart(matrix, published["transform"].T)
        found[f"down projection apart, {name}"] = apart(weights[down], published["down"])
        found[f"loss, {name}"] = ours.loss([Rewrite(block[0] - 1, weights), Drop(range(*block))])
        found[f"T moved, {name}"] = apart(matrix, torch.eye(len(matrix)))
    for compared in ("update", "stream"):
        published = left[f"cosine, {compared}, float32"]
        method = ReplaceMe(blocks=(block,), solver="cosine", compared=compared, rate=1e-4, batch=8, held=SHARE)
        edits = method(ours.model, ours.tokens, ours.run).edits
        weights = edits[0].weights
        found[f"down projection apart, cosine, {compared}"] = apart(weights[down], published["down"])
        found[f"loss, cosine, {compared}"] = ours.loss(edits)
        found[f"distance at the end, cosine, {compared}"] = {
            "ours": cosine_distance(ours, block, weights[down], compared),
            "theirs": cosine_distance(ours, block, published["down"], compared)}
    found["distance at the start"] = {
        compared: cosine_distance(ours, block, decoder_layers(ours.model)[block[0] - 1].mlp.down_proj.weight, compared)
        for compared in ("update", "stream")}
    return found


def compare_replaceme_rate(ours: Ours, theirs: dict[str, Any]) -> dict[str, Any]:
    """The cosine solver with its rate held instead of annealed, as theirs holds it."""
    block, published = tuple(theirs["block"]), ours.work.load("replaceme")["cosine, update, float32"]
    method = ReplaceMe(blocks=(block,), solver="cosine", compared="update", rate=1e-4, batch=8, held=SHARE)

    class Held(torch.optim.lr_scheduler.OneCycleLR):
        def get_lr(self) -> list[Any]:
            return [group["max_lr"] for group in self.optimizer.param_groups]

    with mock.patch("torch.optim.lr_scheduler.OneCycleLR", Held):
        edits = method(ours.model, ours.tokens, ours.run).edits
    down = edits[0].weights["mlp.down_proj.weight"]
    return {"distance at the end": cosine_distance(ours, block, down, "update"), "loss": ours.loss(edits),
            "down projection apart": apart(down, published["down"])}


@torch.no_grad()
def cosine_distance(ours: Ours, block: tuple[int, ...], down: torch.Tensor, compared: str) -> float:
    """Mean of the distance that the cosine solver lowers, fitted rows, with ``down`` as down projection."""
    from torch.nn.functional import cosine_similarity

    layers = decoder_layers(ours.model)
    seen: dict[str, torch.Tensor] = {}
    projection = layers[block[0] - 1].mlp.down_proj
    hooks = [projection.register_forward_hook(lambda _, args, out: seen.update(into=args[0], out=out)),
             layers[block[0]].register_forward_pre_hook(lambda _, args: seen.update(start=args[0])),
             layers[block[1] - 1].register_forward_hook(lambda _, __, out: seen.update(end=out))]
    total, count = 0.0, 0
    for batch in ours.fitted.batches(2):
        ours.model.model(input_ids=batch.ids, use_cache=False)
        mapped, rest, end = seen["into"] @ down.float().T, seen["start"] - seen["out"], seen["end"]
        pair = (rest + mapped, end) if compared == "stream" else (mapped, end - rest)
        found = 1 - cosine_similarity(*pair, dim=-1)
        total, count = total + float(found.double().sum()), count + found.numel()
    for hook in hooks:
        hook.remove()
    return total / count


def compare_streamline(ours: Ours, theirs: dict[str, Any]) -> dict[str, Any]:
    cosine = measure_distances(ours.model, ours.tokens, ours.run, normed=True).cosine
    mine = [0.5 + 0.5 * float(cosine[s, s + RUN]) for s in range(30 - RUN + 1)]
    start = max(range(len(mine)), key=mine.__getitem__)
    off = max(abs(a - b) for a, b in zip(mine, theirs["similarities"], strict=True))
    block = tuple(theirs["block"])
    method = Streamline(blocks=(block,), stand_in="layer", epochs=10, rate=2e-4, batch=2, held=SHARE)
    curves: dict[str, Any] = {}
    train = Streamline._train

    def seen(self: Any, fitting: Any, energy: float, *args: Any) -> Any:
        rate, found = train(self, fitting, energy, *args)
        curves.update(found, energy=energy)
        return rate, found

    with mock.patch.object(Streamline, "_train", seen):
        edits = method(ours.model, ours.tokens, ours.run).edits
    unit = curves["energy"] / ours.model.config.hidden_size  # from units of the update's energy to their mean square
    return {"block": [start, start + RUN], "similarity off by": off,
            "curve": [value * unit for value in curves["watched"]], "loss": ours.loss(edits),
            "loss without stand-in": ours.loss([Drop(range(block[0] + 1, block[1]))])}


def compare_sleb(ours: Ours, theirs: dict[str, Any]) -> dict[str, Any]:
    """The greedy search of ``SLEB.choose``, its losses kept."""
    rows = TokenSet(ours.tokens.ids[:SLEB_ROWS], ours.tokens.mask[:SLEB_ROWS], "rows")
    order: list[int] = []
    every: list[tuple[int, float]] = []
    for _ in range(SLEB_LAYERS):
        losses = losses_without(ours.model, rows, order, [l for l in range(1, 29) if l not in order], 4)
        every += losses.items()
        order.append(min(losses, key=losses.__getitem__))
    off = max(abs(a[1] - b[1]) for a, b in zip(every, theirs["all"], strict=True))
    assert [layer for layer, _ in every] == [layer for layer, _ in theirs["all"]]
    return {"order": order, "evaluations": len(every), "losses off by": off,
            "loss": ours.loss([Drop(range(layer, layer + 1)) for layer in sorted(order)])}


def compare_slicegpt(ours: Ours, theirs: dict[str, Any]) -> dict[str, Any]:
    left = ours.work.load("slicegpt")
    method = SliceGPT(sparsity=SPARSITY, round_to=8, held=SHARE)
    sliced = apply_edits(ours.model, method(ours.model, ours.tokens, ours.run).edits)
    with torch.no_grad():
        logits = sliced(input_ids=ours.heldout[:1], use_cache=False).logits[0]
    mine = sliced.state_dict()
    found: dict[str, Any] = {"widths": sorted(set(method.widths(ours.model))), "loss": loss_of(sliced, ours.heldout)}

    def note(name: str, published: dict[str, torch.Tensor]) -> None:
        """Projections. Eigenvectors are right up to their signs, and up to rotations among nearly equal eigenvalues;
        W Q Qᵀ Wᵀ (of those out of a sublayer Wᵀ Q Qᵀ W) is right whatever these are. Theirs turn the last output."""
        layers: dict[int, list[tuple[float, float]]] = {}
        for key, value in mine.items():
            if key.split(".")[-2].endswith("_proj") and key != "model.layers.29.mlp.down_proj.weight":
                out = "o_proj" in key or "down_proj" in key
                pair = [one.double().T if out else one.double() for one in (value, published[key])]
                layers.setdefault(int(key.split(".")[2]), []).append(
                    (apart(*(one.abs() for one in pair)), apart(*(one @ one.T for one in pair))))
        found[f"|W Q| apart, by layer, {name}"] = [max(one for one, _ in layers[i]) for i in range(30)]
        found[f"W Q Qᵀ Wᵀ apart, by layer, {name}"] = [max(one for _, one in layers[i]) for i in range(30)]

    for name in ("pca", "pca, embeddings not centred"):
        published = left[name]["state"]
        found[f"logits apart, {name}"] = apart(logits, left[name]["logits"])
        note(name, published)
    # How much is rounding? The same method with other batches, whose sums round otherwise.
    again = apply_edits(ours.model, method(ours.model, ours.tokens, Run(batch_size=7, stages=Stages())).edits)
    with torch.no_grad():
        other = again(input_ids=ours.heldout[:1], use_cache=False).logits[0]
    found["logits apart, ours with other batches"] = apart(logits, other)
    note("ours with other batches", again.state_dict())
    found["loss, ours with other batches"] = loss_of(again, ours.heldout)
    return found


def compare_llm_pruner(ours: Ours, theirs: dict[str, Any]) -> dict[str, Any]:
    left = ours.work.load("llm-pruner")
    slices = [TokenSet(ours.tokens.ids[i : i + 1, :SLICE_LENGTH], ours.tokens.mask[i : i + 1, :SLICE_LENGTH], "slice")
              for i in range(SLICES)]
    dense = ours.model.state_dict()
    orders = {"param_first": "first", "param_second": "second"}
    found: dict[str, Any] = {}
    for name, order in orders.items():
        state = left[name]["state"]
        their_kept = {layer: kept_of(dense, state, layer) for layer in range(FIRST, LAST)}
        plan = {layer: Kept(len(groups), len(channels)) for layer, (groups, channels) in their_kept.items()}
        method = LLMPruner(order=order, held=SHARE)
        saliencies = dict(method.saliencies(ours.model, plan, slices))
        heads_off, alike_off, channels_off, same_heads, same_channels, removed = [], [], [], 0, 0, 0
        for layer, (groups, channels) in their_kept.items():
            module = decoder_layers(ours.model)[layer]
            heads, wide = (torch.stack([part.total(module, saliencies[layer]) for part in parts(ours.model, module)]).sum(0)
                           for parts in (attention_parts, mlp_parts))
            their_heads = left[name]["scores"][f"model.layers.{layer}.self_attn.k_proj"].view(3, -1).sum(1)
            their_wide = left[name]["scores"][f"model.layers.{layer}.mlp.gate_proj"]
            heads_off.append(apart(heads, their_heads))
            alike_off.append(apart(as_published(module, saliencies[layer]), their_heads))
            channels_off.append(apart(wide, their_wide))
            mine = (set(heads.argsort(descending=True)[: len(groups)].tolist()),
                    set(wide.argsort(descending=True)[: len(channels)].tolist()))
            same_heads += mine[0] == groups
            gone = set(range(1536)) - mine[1]
            same_channels += len(gone & (set(range(1536)) - channels))
            removed += len(gone)
        with (mock.patch.object(LLMPruner, "plan", lambda self, model, plan=plan: plan),
              mock.patch.object(llm_pruner, "random_slices", lambda *args: slices)):
            edits = method(ours.model, ours.tokens, ours.run).edits
        found[order] = {
            "kept of 3 groups, of 1536 channels": [len(their_kept[FIRST][0]), len(their_kept[FIRST][1])],
            "head scores apart, most": max(heads_off),
            "head scores apart with query head h counted for group h mod 3, most": max(alike_off), "channel scores apart, most": max(channels_off),
            "layers with the same heads": same_heads, "of": len(their_kept),
            "share of removed channels that are the same": same_channels / removed, "loss": ours.loss(edits)}
    return found


def as_published(layer: Any, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Scores of the three key-value groups, query head h and its output counted for group h mod 3 instead of h // 3."""
    per_head = {name: values[f"self_attn.{name}_proj.weight"].double().sum(0 if name == "o" else 1).view(-1, 64).sum(1)
                for name in "qkvo"}
    return per_head["k"] + per_head["v"] + (per_head["q"] + per_head["o"]).view(3, 3).sum(0)


def kept_of(dense: dict[str, Any], state: dict[str, Any], layer: int) -> tuple[set[int], set[int]]:
    """Key-value heads and channels that a narrower layer kept, found by its rows."""
    def rows(name: str, size: int) -> set[int]:
        old, new = dense[f"model.layers.{layer}.{name}.weight"], state[f"model.layers.{layer}.{name}.weight"]
        number = {row.numpy().tobytes(): i for i, row in enumerate(old[::size])}
        return {number[row.numpy().tobytes()] for row in new[::size].contiguous()}

    return rows("self_attn.k_proj", 64), rows("mlp.gate_proj", 1)


COMPARED = {"dense": compare_dense, "linearpatch": compare_linearpatch, "replaceme": compare_replaceme, "replaceme-rate": compare_replaceme_rate,
            "streamline": compare_streamline, "sleb": compare_sleb, "slicegpt": compare_slicegpt,
            "llm-pruner": compare_llm_pruner}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["prepare", "compare", "record"])
    parser.add_argument("work", type=Path)
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--heldout", type=Path)
    asked = parser.parse_args()
    work = Work(asked.work.resolve())
    if asked.what == "prepare":
        prepare(work, asked.model, asked.calibration, asked.heldout)
    elif asked.what == "compare":
        ours = Ours(work, str(work.model))
        for name in asked.rest or COMPARED:
            began = time.perf_counter()
            found = COMPARED[name](ours, work.noted("theirs", name.removesuffix("-rate")))
            work.note("ours", name, {**found, "seconds": round(time.perf_counter() - began, 1)})
    else:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        record = {"commit": commit.stdout.strip(), "model": "SmolLM2-135M", "rows": [ROWS, LENGTH], "held": HELD,
                  "heldout": [TEXT, WINDOW],
                  "machine": platform.machine(), "torch": torch.__version__, "transformers": transformers.__version__,
                  **{side: {name: work.noted(side, name) for name in COMPARED if side == "ours" or not name.endswith("-rate")}
                     for side in ("theirs", "ours")}}
        Path(asked.rest[0]).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
