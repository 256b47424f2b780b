"""The report's pictures, as SVG or PNG text that a page can hold."""

import base64
import io

import numpy as np

from featcache.errors import BadInput
from featcache.reporting.table import METRIC_NAMES

try:
    import matplotlib
except ImportError:
    raise BadInput("the report needs matplotlib: pip install 'featcache[report]'") from None

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {"bce": "#0b6e99", "ce": "#c2571a"}
MARKERS = "osD^vP*X"
BOX_ARRAYS = ("box_examples", "boxes", "box_classes", "box_difficult")
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "featcache"}


def _embed(figure, kind):
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    figure.savefig(buffer, format=kind, bbox_inches="tight", dpi=110, metadata=metadata)
    plt.close(figure)
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def learning_rates(runs, metric):
    """Plot the validation score over the learning rate: a panel per run and head, a line per loss and decay.

    Points are means over seeds, bars reach from the lowest to the highest seed; the dotted line is
    chance. Probes that were trained elsewhere have no rate. Returns a data URL, or None if no probe has one.
    """
    panels = []
    for run in runs:
        split = run.summary["select"]["split"]
        rows = [r for r in run.scores if r["metric"] == metric and r["split"] == split and r["value"] is not None]
        rows = [r for r in rows if r["optimizer.lr"]]
        heads = dict.fromkeys(r["head.type"] for r in rows)
        panels += [(run, head, [r for r in rows if r["head.type"] == head]) for head in heads]
    if not panels:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3), sharey=True, squeeze=False)
        decays = sorted({float(r["optimizer.weight_decay"]) for _, _, rows in panels for r in rows})
        for axis, (run, head, rows) in zip(axes[0], panels, strict=True):
            _rate_lines(axis, rows, decays)
            axis.axhline(
                100 * run.summary["chance"][run.summary["select"]["split"]][metric], color="0.5", linestyle=":"
            )
            axis.set_title(f"{run.path.name}: {head}", fontsize=10)
            axis.set_xscale("log")
            rates = sorted({float(r["optimizer.lr"]) for r in rows})
            axis.set_xticks(rates[:: -(-len(rates) // 5)], [f"{r:.2g}" for r in rates[:: -(-len(rates) // 5)]])
            axis.minorticks_off()
            axis.set_xlabel("learning rate")
        axes[0][0].set_ylabel(f"{runs[0].summary['select']['split']} {METRIC_NAMES[metric]}, %")
        entries = dict(zip(*reversed(_legend(axes[0])), strict=True))
        figure.legend(entries.values(), entries.keys(), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        return _embed(figure, "svg")


def _rate_lines(axis, rows, decays):
    groups = {}
    for row in rows:
        key = (row["loss.type"], float(row["optimizer.weight_decay"]))
        groups.setdefault(key, {}).setdefault(float(row["optimizer.lr"]), []).append(100 * row["value"])
    for (loss, decay), points in sorted(groups.items()):
        rates = sorted(points)
        means = np.array([np.mean(points[r]) for r in rates])
        bars = [means - [min(points[r]) for r in rates], [max(points[r]) for r in rates] - means]
        axis.errorbar(
            rates, means, bars, color=COLOURS.get(loss, "0.3"), marker=MARKERS[decays.index(decay) % len(MARKERS)],
            markersize=4, linewidth=1, alpha=0.85, label=f"{loss}, wd {decay:g}",
        )  # fmt: skip


def _legend(axes):
    handles, labels = [], []
    for axis in axes:
        more = axis.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    return handles, labels


def heatmaps(kept, describe):
    """Draw example images with boxes, and beside each the maps of every probe and method.

    kept: the contents of attribution.npz. describe: function of a probe id to a short text.
    Returns a data URL, or None if there are no examples.
    """
    panels = [
        dict(zip(("probe", "method", "split", "id", "class", "epg", "share"), p, strict=True)) for p in kept["panels"]
    ]
    if not panels:
        return None
    lines = list(dict.fromkeys((p["id"], p["class"]) for p in panels))
    columns = list(dict.fromkeys((p["method"], p["probe"]) for p in panels))
    ids, size = list(kept["ids"]), kept["maps"].shape[1]
    with plt.rc_context(STYLE | {"font.size": 8}):
        shape = (len(lines), len(columns) + 1)
        figure, axes = plt.subplots(*shape, figsize=(1.75 * shape[1], 1.75 * shape[0]), squeeze=False)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set_visible(False)
        for axis, (method, probe) in zip(axes[0][1:], columns, strict=True):
            axis.set_title(f"{method}\n{describe(probe)}", fontsize=8)
        axes[0][0].set_title("image, boxes", fontsize=8)
        for line, (image_id, label) in zip(axes, lines, strict=True):
            number = ids.index(image_id)
            boxes = [
                (edges, str(name) == label, difficult)
                for at, edges, name, difficult in zip(*(kept[k] for k in BOX_ARRAYS), strict=True)
                if at == number
            ]
            picture = kept["images"][number] if "images" in kept else np.full((size, size, 3), 230, np.uint8)
            line[0].imshow(picture)
            line[0].set_ylabel(f"{image_id}\n{label}", fontsize=8)
            _draw_boxes(line[0], boxes)
            for panel, values in zip(panels, kept["maps"], strict=True):
                if (panel["id"], panel["class"]) == (image_id, label):
                    axis = line[1 + columns.index((panel["method"], panel["probe"]))]
                    _draw_map(axis, picture, values)
                    _draw_boxes(axis, boxes)
                    epg = float(panel["epg"])
                    axis.set_xlabel(
                        "no positive energy" if epg != epg else f"EPG {100 * epg:.0f}%", fontsize=7, labelpad=2
                    )
        figure.tight_layout(pad=0.4)
        return _embed(figure, "png")


def _draw_map(axis, picture, values):
    grey = picture.mean(2, keepdims=True).repeat(3, 2).astype(np.uint8)
    positive = np.clip(values, 0, None)
    # The 99.5th percentile, or one bright pixel would leave the rest dark.
    peak = np.quantile(positive, 0.995) or positive.max() or 1
    shown = np.clip(positive / peak, 0, 1)
    axis.imshow(grey, alpha=0.5)
    axis.imshow(shown, cmap="inferno", alpha=0.75, vmin=0, vmax=1)


def _draw_boxes(axis, boxes):
    """Draw boxes [(edges, whether of the explained class, difficult)]."""
    for (x0, y0, x1, y1), explained, difficult in boxes:
        colour, width = ("#9ad900", 1.4) if explained else ("white", 0.6)
        edge = dict(fill=False, edgecolor=colour, linewidth=width, linestyle=":" if difficult else "-")
        axis.add_patch(plt.Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, **edge))
