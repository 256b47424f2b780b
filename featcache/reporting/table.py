"""Tables on the terminal, and the words for scores."""

METRIC_NAMES = {"map": "mAP", "top1": "top-1", "top5": "top-5"}


def format_table(columns, rows):
    """Lay out rows of strings under their columns, numbers to the right. Returns text."""
    cells = [columns, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _is_number(text):
    return not text or text[0].isdigit() or text[0] == "-"


def percent(value, low=None, high=None):
    """Format a fraction as percent, with its interval if given; a missing value is a dash."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + ("" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]")


def known(number):
    """Shorten a number of scores.csv; it is a dash where an imported probe has none."""
    return f"{float(number):g}" if number else "-"


def score_rows(run, most=None):
    """Return (columns, rows of strings) of a run's probes, best on the selection split first."""
    metric, split = run.summary["select"]["metric"], run.summary["select"]["split"]
    chosen = [r for r in run.scores if r["metric"] == metric and r["split"] == split]
    chosen.sort(key=lambda r: -1 if r["value"] is None else r["value"], reverse=True)
    columns = [
        "probe",
        "head",
        "features",
        "loss",
        "lr",
        "wd",
        "seed",
        f"{split} {METRIC_NAMES[metric]} %",
        f"{run.judge} {METRIC_NAMES[metric]} % [95%]",
    ]
    rows = []
    for row in chosen[:most]:
        test = run.value(row["probe"], metric, run.judge)
        rows.append([
            row["probe"], describe_head(row), row["features"], row["loss.type"], known(row["optimizer.lr"]),
            known(row["optimizer.weight_decay"]), row["seed"] or "-", percent(row["value"]),
            percent(test["value"], test["low"], test["high"]),
        ])  # fmt: skip
    return columns, rows


def describe_head(row):
    """Name a head in a word or two, as in `mlp-2 (256)`."""
    if row["head.type"] == "linear":
        return "linear"
    width = f" ({row['head.hidden']})" if int(row["head.hidden"]) else ""
    return f"{row['head.type']}-{row['head.layers']}{width}"
