"""The record as a page: python official_page.py official.json > official.md"""

import json
import sys
from typing import Any


def off(value: float) -> str:
    return f"{value:.1e}"


def page(record: dict[str, Any]) -> str:
    theirs, ours = record["theirs"], record["ours"]
    dense = {"theirs": theirs["dense"]["loss"], "ours": ours["dense"]["loss"]}

    def excess(side: str, method: str, *keys: str) -> str:
        value: Any = record[side][method]
        for key in keys:
            value = value[key]
        return f"{value - dense[side]:.4f}"

    rows: list[tuple[str, str, str, str]] = []
    rows.append(("dense", "loss on the held-out text", f"{dense['theirs']:.6f}", f"{dense['ours']:.6f}"))

    name, a, b = "LinearPatch", theirs["linearpatch"], ours["linearpatch"]
    rows += [(name, "run of 8 layers", str(a["block"]), str(b["block"])),
             (name, "its similarity, channel by channel", f"{a['similarity']:.6f}", f"{b['similarity']:.6f}"),
             (name, "excess loss", excess("theirs", "linearpatch", "loss"), excess("ours", "linearpatch", "loss")),
             (name, "excess loss without the patch", excess("theirs", "linearpatch", "loss without patch"),
              excess("ours", "linearpatch", "loss without patch")),
             (name, "P, apart", "", off(b["P apart"]))]
    rows.append((name, "excess loss, their matrix with random signs of its rows, least and most of 6", "",
                 f"{min(b['losses, random signs']) - dense['ours']:.4f} to {max(b['losses, random signs']) - dense['ours']:.4f}"))
    for switch in ("their Hadamard matrix", "their Hadamard matrix and mean of ratios"):
        rows += [(name, f"excess loss, {switch}", excess("theirs", "linearpatch", "loss"),
                  excess("ours", "linearpatch", f"loss, {switch}")),
                 (name, f"P, {switch}, apart", "", off(b[f"P apart, {switch}"]))]

    name, a, b = "ReplaceMe", theirs["replaceme"], ours["replaceme"]
    rows += [(name, "run of 8 layers", str(a["block"]), str(b["block"])),
             (name, "distances of all 22 runs, most apart", "", off(b["distance off by"])),
             (name, "excess loss without a map", "", excess("ours", "replaceme", "loss without map"))]
    for ridge in ("0", "1e-06"):
        key = f"least squares, ridge {ridge}"
        rows += [(name, f"T, {key}, apart", "", off(b[f"T apart, {key}"])),
                 (name, f"folded down projection, {key}, apart", "", off(b[f"down projection apart, {key}"])),
                 (name, f"excess loss, {key}", excess("theirs", "replaceme", "loss, least squares, float32"),
                  excess("ours", "replaceme", f"loss, {key}"))]
    rows.append((name, "excess loss, least squares, saved in bfloat16 as published",
                 excess("theirs", "replaceme", "loss, least squares, bfloat16"), ""))
    for kind in ("update", "stream"):
        end = b[f"distance at the end, cosine, {kind}"]
        rows += [(name, f"cosine ({kind}): distance, {b['distance at the start'][kind]:.6f} at the start",
                  f"{end['theirs']:.6f}", f"{end['ours']:.6f}"),
                 (name, f"excess loss, cosine ({kind})", excess("theirs", "replaceme", f"loss, cosine, {kind}, float32"),
                  excess("ours", "replaceme", f"loss, cosine, {kind}"))]
    held = ours["replaceme-rate"]
    rows += [(name, "cosine (update), our rate held as theirs is: distance",
              f"{b['distance at the end, cosine, update']['theirs']:.6f}", f"{held['distance at the end']:.6f}"),
             (name, "excess loss, the same", excess("theirs", "replaceme", "loss, cosine, update, float32"),
              excess("ours", "replaceme-rate", "loss"))]

    name, a, b = "LLM-Streamline", theirs["streamline"], ours["streamline"]
    rows += [(name, "run of 8 layers", str(a["block"]), str(b["block"])),
             (name, "similarities of all 23 runs, most apart", "", off(b["similarity off by"]))]
    for epoch in (0, 1, 2, 5, 10):
        rows.append((name, f"error on held-out rows after {epoch} epochs, both causal",
                     f"{a['causal']['curve'][epoch]:.4f}", f"{b['curve'][epoch]:.4f}"))
    leak = "change of the first 100 outputs when later inputs change"
    rows += [(name, "excess loss, both causal", excess("theirs", "streamline", "causal", "loss"),
              excess("ours", "streamline", "loss")),
             (name, "error after 10 epochs, theirs as published", f"{a['as published']['curve'][10]:.4f}", ""),
             (name, "excess loss, theirs as published", excess("theirs", "streamline", "as published", "loss"), ""),
             (name, f"{leak}, as published / causal", f"{a['as published'][leak]:.3g} / {a['causal'][leak]:.3g}", ""),
             (name, "excess loss, layer not trained", "", excess("ours", "streamline", "loss without stand-in"))]

    name, a, b = "SLEB", theirs["sleb"], ours["sleb"]
    rows += [(name, "layers in the order they go", str(a["order"]), str(b["order"])),
             (name, f"losses of all {b['evaluations']} candidates, most apart", "", off(b["losses off by"])),
             (name, "excess loss", excess("theirs", "sleb", "loss"), excess("ours", "sleb", "loss"))]

    name, a, b = "SliceGPT", theirs["slicegpt"], ours["slicegpt"]
    rows.append((name, "width of 576", str(a["width"]), ", ".join(map(str, b["widths"]))))
    for key in ("pca, embeddings not centred", "pca", "ours with other batches"):
        gram, weights = b[f"W Q Qᵀ Wᵀ apart, by layer, {key}"], b[f"|W Q| apart, by layer, {key}"]
        if f"loss, {key}" in theirs["slicegpt"]:
            rows.append((name, f"excess loss, {key}", excess("theirs", "slicegpt", f"loss, {key}"),
                         excess("ours", "slicegpt", "loss")))
        else:
            rows.append((name, f"excess loss, {key}", "", excess("ours", "slicegpt", f"loss, {key}")))
        rows += [(name, f"logits of a held-out row, {key}, apart", "", off(b[f"logits apart, {key}"])),
                 (name, f"W Q Qᵀ Wᵀ of projections, {key}, layer 0 / most, apart", "", f"{off(gram[0])} / {off(max(gram))}"),
                 (name, f"\\|W Q\\| of projections, {key}, layer 0 / most, apart", "",
                  f"{off(weights[0])} / {off(max(weights))}")]
    rows += [(name, "excess loss, as published (random orientation)", excess("theirs", "slicegpt", "loss, as published"),
              excess("ours", "slicegpt", "loss")),
             (name, "excess loss of norms folded and embeddings centred, nothing cut",
              excess("theirs", "slicegpt", "loss, norms folded and embeddings centred, nothing cut"), "")]

    name, a, b = "LLM-Pruner", theirs["llm-pruner"], ours["llm-pruner"]
    for key, order in (("param_first", "first"), ("param_second", "second")):
        found = b[order]
        rows += [(name, f"{order}: channel scores of all layers, most apart", "", off(found["channel scores apart, most"])),
                 (name, f"{order}: removed channels that are the same", "",
                  f"{found['share of removed channels that are the same']:.2%}"),
                 (name, f"{order}: head scores, most apart", "", off(found["head scores apart, most"])),
                 (name, f"{order}: head scores, query head h counted for group h mod 3, most apart", "",
                  off(found["head scores apart with query head h counted for group h mod 3, most"])),
                 (name, f"{order}: layers with the same heads", "",
                  f"{found['layers with the same heads']} of {found['of']}"),
                 (name, f"{order}: excess loss", excess("theirs", "llm-pruner", key, "loss"),
                  excess("ours", "llm-pruner", order, "loss"))]

    lines = ["# The peers' own code beside ours", "",
             f"{record['model']}, float32; {record['rows'][0]} calibration rows of {record['rows'][1]} tokens, "
             f"{record['held']} of them kept out of fits; held-out text {record['heldout'][0]} rows of "
             f"{record['heldout'][1]} tokens. Ours at commit {record['commit']}, transformers {record['transformers']}; "
             "theirs with transformers 4.45.2; torch " + record["torch"] + ". Losses are nats a token, excess over the "
             "dense model's. Apart: ‖ours − theirs‖ / ‖theirs‖ (Frobenius), or the largest difference where it says so.",
             "", "| peer | what | theirs | ours |", "|---|---|---:|---:|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "## What was replaced in their text", "", "| peer | file | text | by | why |", "|---|---|---|---|---|"]
    for method, found in theirs.items():
        for file, old, new, why in found["patches"]:
            lines.append(f"| {method} | {file} | `{old}` | `{new}` | {why} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(json.loads(open(sys.argv[1]).read())), end="")
