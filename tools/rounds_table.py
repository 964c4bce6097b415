r"""Say what each round of scripts/run_rounds.sh changed.

Reads   DIRECTORY/1, 2, …    samples/summary.json, policy/stage.json, rm/stage.json of each round, as far as there are
        DIRECTORY/../rm      the reward model that the first round began with, if there is one
Writes  DIRECTORY/table.md   the table that is printed

    python -m tools.rounds_table outputs/rounds
"""

import argparse
import json
import sys
from pathlib import Path

HEADINGS = (
    *("round", "scored by", "prompts", "mean score", "of the best", "cut off", "pairs", "policy", "rows"),
    *("held out, before → after", "RM rows", "RM accuracy, before → after"),
)
HELD_OUT = {"rewards/accuracies": "reward accuracy", "loss": "loss"}  # the first that a stage has
NOTHING = "-"


def read(path: Path) -> dict:
    """A JSON file; empty where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error})") from None


def number(value: float | None, form: str) -> str:
    """A number for people."""
    return NOTHING if value is None else format(value, form)


def held_out(stage: dict) -> str:
    """What a stage measured before and after its training."""
    before, after = (stage.get("metrics", {}).get(when) or {} for when in ("before", "after"))
    name = next((name for name in HELD_OUT if name in after), None)
    if name is None:
        return NOTHING
    return f"{HELD_OUT[name]} {number(before.get(name), '.3f')} → {number(after[name], '.3f')}"


def accuracies(before: dict, after: dict) -> str:
    """Held-out accuracy of two reward models; of the first only if it was measured on the same rows."""
    if not after:
        return NOTHING
    found = [(stage.get("metrics", {}).get("after") or {}).get("accuracy") for stage in (before, after)]
    rows = [stage.get("data", {}).get("validation", {}) for stage in (before, after)]
    same = all(rows[0].get(key) == rows[1].get(key) for key in ("files", "used"))
    return f"{number(found[0] if same else None, '.3f')} → {number(found[1], '.3f')}"


def used(stage: dict) -> str:
    """Rows that a stage was trained on."""
    return number(stage.get("data", {}).get("train", {}).get("used"), ",")


def scorer(summary: dict, root: Path) -> str:
    """What scored the answers of a round; a reward model below root by the rest of its path."""
    reward = summary.get("reward", {})
    model = (reward.get("model") or {}).get("name_or_path")
    names = [model and model.removeprefix(f"{root}/"), reward.get("functions")]
    return " + ".join(filter(None, names)) or NOTHING


def row(directory: Path, reward_before: dict) -> list[str]:
    """One round, a text for each heading."""
    names = ("samples/summary.json", "policy/stage.json", "rm/stage.json")
    summary, policy, reward = (read(directory / name) for name in names)
    scores, answers = summary.get("mean_score", {}), summary.get("answers")
    return [
        *(directory.name, scorer(summary, directory.parents[1]), number(summary.get("prompts"), ",")),
        *(number(scores.get("all"), "+.3f"), number(scores.get("best"), "+.3f")),
        *(number(summary["cut"] / answers if answers else None, ".0%"), number(summary.get("pairs"), ",")),
        *(policy.get("stage", NOTHING), used(policy), held_out(policy), used(reward)),
        accuracies(reward_before, reward),
    ]


def build_table(directory: Path) -> str:
    """The table in Markdown, and what has to be said about it.

    Raises:
        FileNotFoundError: no round there.
    """
    names = sorted((path.name for path in directory.glob("*") if path.name.isdigit()), key=int)
    if not names:
        raise FileNotFoundError(f"{directory}: no rounds (1, 2, …) in there; sh scripts/run_rounds.sh 2 makes them")
    rows, reward = [], read(directory.parent / "rm" / "stage.json")
    for name in names:
        rows.append(row(directory / name, reward))
        reward = read(directory / name / "rm" / "stage.json") or reward
    widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
    lines = [HEADINGS, ["-" * width for width in widths], *rows]
    table = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    if len({line[1] for line in rows if line[1] != NOTHING}) > 1:
        table += [
            "",
            "Scores of different reward models have no common scale: compare mean scores only within a round.",
        ]
    return "\n".join(table) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="rounds_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="such as outputs/rounds")
    directory = parser.parse_args(argv).directory
    from stagekit.journal import write_whole

    table = build_table(directory)
    write_whole(directory / "table.md", table)
    print(table, end="")
    print(f"saved: {directory / 'table.md'}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        print(f"rounds_table: error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
