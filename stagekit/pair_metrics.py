"""How well scores tell better from worse answers: accuracy with its interval, calibration, and what length has to do
with it. Plain numpy; each function can be checked by hand.
"""

import math
from pathlib import Path

import numpy as np

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927); it stays inside [0, 1] and is right for few trials.

    Args:
        successes: may be a half, where ties count as half right.
        trials: more than 0.
    """
    rate, square = successes / trials, Z95**2
    centre = (rate + square / (2 * trials)) / (1 + square / trials)
    half = Z95 / (1 + square / trials) * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: np.ndarray) -> tuple[float, float | None, float | None]:
    """(mean, low, high): a mean with its 95 % interval by the normal approximation, which one value does not have."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    half = Z95 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def pair_accuracy(chosen: np.ndarray, rejected: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Share of pairs whose better answer has the higher score, ties counting half, with its 95 % interval.

    Args:
        chosen, rejected, weights: (pairs,); the pairs of a ranking share a weight of one.
    """
    right = weighted_mean((chosen > rejected) + 0.5 * (chosen == rejected), weights)
    low, high = wilson_interval(right * weights.sum(), weights.sum())
    return {"accuracy": right, "accuracy_low": low, "accuracy_high": high}


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    """Mean over prompts rather than pairs."""
    return float((values * weights).sum() / weights.sum())


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 where one side does not vary."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def calibration(
    chosen: np.ndarray, rejected: np.ndarray, weights: np.ndarray | None = None, num_bins: int = 5
) -> tuple[float, list[dict]]:
    """Compare how sure the scores are of a pair with how often they are right.

    The Bradley-Terry model gives the answer with the higher score the probability sigmoid(difference) of being better.

    Returns:
        (expected calibration error, bins): bins are {"from", "to", "pairs", "confidence", "accuracy"}.
    """
    weights = np.ones(len(chosen)) if weights is None else weights
    difference = chosen - rejected
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    right = (difference > 0) + 0.5 * (difference == 0)
    edges = np.linspace(0.5, 1, num_bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, num_bins - 1)
    bins, error = [], 0.0
    for index in range(num_bins):
        inside = place == index
        if not inside.any():
            continue
        sure, true = (weighted_mean(values[inside], weights[inside]) for values in (confidence, right))
        error += weights[inside].sum() / weights.sum() * abs(sure - true)
        limits = {"from": round(float(edges[index]), 2), "to": round(float(edges[index + 1]), 2)}
        bins.append({**limits, "pairs": int(inside.sum()), "confidence": sure, "accuracy": true})
    return float(error), bins


def by_length(chosen, rejected, chosen_length, rejected_length, weights) -> list[dict]:
    """Accuracy where the better answer is the shorter one, about as long (within 10 %), and the longer one.

    A model that rewards length is right in the last group and wrong in the first.

    Args:
        chosen, rejected: scores, (pairs,).
        chosen_length, rejected_length: in tokens, (pairs,).
        weights: (pairs,).
    """
    ratio = chosen_length / rejected_length
    groups = {
        "better answer shorter": ratio < 0.9,
        "about as long": (ratio >= 0.9) & (ratio <= 1.1),
        "better answer longer": ratio > 1.1,
    }
    return [
        {"group": name, "pairs": int(inside.sum()), **pair_accuracy(chosen[inside], rejected[inside], weights[inside])}
        for name, inside in groups.items()
        if inside.any()
    ]


def draw_scores(chosen, rejected, chosen_length, rejected_length, bins: list[dict], path: str | Path, title: str):
    """Draw the scores of better and worse answers, score over length, and calibration as one PNG.

    Args:
        chosen, rejected, chosen_length, rejected_length: see by_length.
        bins: what calibration returned.
        path: where the picture goes.
        title: heading.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    better, worse = "#1f6fb4", "#d1495b"
    figure = Figure(figsize=(13, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    edges = np.histogram_bin_edges(np.concatenate([chosen, rejected]), bins=24)
    left.hist(rejected, edges, color=worse, alpha=0.55, label="worse answers")
    left.hist(chosen, edges, color=better, alpha=0.55, label="better answers")
    left.set(xlabel="score", ylabel="answers", title=title)
    left.legend(frameon=False)
    middle.scatter(rejected_length, rejected, s=12, color=worse, alpha=0.6)
    middle.scatter(chosen_length, chosen, s=12, color=better, alpha=0.6)
    lengths, scores = np.concatenate([chosen_length, rejected_length]), np.concatenate([chosen, rejected])
    middle.set(xlabel="tokens of the answer", title=f"score over length (r = {correlation(lengths, scores):+.2f})")
    right.plot([0.5, 1], [0.5, 1], color="#888888", linewidth=1, linestyle="--")
    right.plot([item["confidence"] for item in bins], [item["accuracy"] for item in bins], color="#3a7d44", marker="o")
    for item in bins:
        place = (item["confidence"], item["accuracy"])
        right.annotate(f"{item['pairs']}", place, xytext=(4, -10), textcoords="offset points", fontsize=8)
    right.set(
        xlabel="how sure the scores are", title="share right (with pairs)", xlim=(0.48, 1.02), ylim=(-0.02, 1.05)
    )
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
