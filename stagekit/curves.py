"""Pictures of a run, loss and learning rate or score and KL over the steps, and of how long the rows of data are."""

from pathlib import Path


def draw_curves(log_history: list[dict], path: str | Path, title: str) -> None:
    """Draw what the trainer logged as one PNG.

    Args:
        log_history: TrainerState.log_history: dicts with "step" and numbers such as "loss", "eval_loss", "score".
        path: where the picture goes.
        title: heading.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def series(name):
        points = [(entry["step"], entry[name]) for entry in log_history if isinstance(entry.get(name), (int, float))]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    scored = next((name for name in ("score", "reward") if series(name)[0]), None)
    shown, held_out = scored or "loss", series("eval_score" if scored else "eval_loss")
    names = ("score of sampled answers", "held-out score (greedy)") if scored else ("training loss", "held-out loss")
    left.plot(*series(shown), color="#1f6fb4", linewidth=1.8, label=names[0])
    left.plot(*held_out, color="#d1495b", marker="o", markersize=4, linewidth=1.8, label=names[1])
    if held_out[1]:
        left.annotate(
            f"{held_out[1][-1]:.3f}", (held_out[0][-1], held_out[1][-1]), xytext=(4, 6), textcoords="offset points"
        )
    left.set(xlabel="step", ylabel="score" if scored else "loss per token (nats)", title=title)
    left.legend(frameon=False)
    if series("kl")[0]:
        right.plot(*series("kl"), color="#3a7d44", linewidth=1.8)
        right.set(xlabel="step", title="KL to the reference (nats)")
    else:
        right.plot(*series("learning_rate"), color="#3a7d44", linewidth=1.8)
        right.set(xlabel="step", title="learning rate")
        right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    figure.savefig(path)


def draw_lengths(bins: list[dict], limits: list[int], path: str | Path, title: str, unit: str) -> None:
    """Draw how many rows there are of each length, with the length limits, as one PNG.

    Args:
        bins: {"from", "to", "rows"}, both ends included, in order (examination.histogram).
        limits: lengths to mark.
        path: where the picture goes.
        title: heading.
        unit: of the lengths, such as "tokens".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    starts, widths = [item["from"] for item in bins], [item["to"] + 1 - item["from"] for item in bins]
    axes.bar(starts, [item["rows"] for item in bins], widths, align="edge", color="#1f6fb4", edgecolor="white")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    for limit in limits:
        axes.axvline(limit, color="#d1495b", linewidth=1.2, linestyle="--")
        place = {"xytext": (4, -4), "textcoords": "offset points", "va": "top", "rotation": 90, "fontsize": 8}
        axes.annotate(f"{limit:,}", (limit, 1), xycoords=("data", "axes fraction"), color="#d1495b", **place)
    axes.set(xlabel=f"length of a row ({unit})", ylabel="rows", title=title)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
