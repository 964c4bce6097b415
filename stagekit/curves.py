"""Pictures of a run: loss, held-out loss and learning rate over the steps."""

from pathlib import Path


def draw_curves(log_history: list[dict], path: str | Path, title: str) -> None:
    """Draw what the trainer logged as one PNG.

    Args:
        log_history: TrainerState.log_history: dicts with "step" and "loss" or "eval_loss" or "learning_rate".
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
    left.plot(*series("loss"), color="#1f6fb4", linewidth=1.8, label="training loss")
    held_out = series("eval_loss")
    left.plot(*held_out, color="#d1495b", marker="o", markersize=4, linewidth=1.8, label="held-out loss")
    if held_out[1]:
        left.annotate(
            f"{held_out[1][-1]:.3f}", (held_out[0][-1], held_out[1][-1]), xytext=(4, 6), textcoords="offset points"
        )
    left.set(xlabel="step", ylabel="loss per token (nats)", title=title)
    left.legend(frameon=False)
    right.plot(*series("learning_rate"), color="#3a7d44", linewidth=1.8)
    right.set(xlabel="step", title="learning rate")
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    figure.savefig(path)
