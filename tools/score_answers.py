r"""Score answers with a trained reward model.

Reads   --reward_model   the directory reward_modeling.py wrote
        --data_file      answers to score: predictions of inference.py, conversations (the last answer is scored),
                         questions with answers, preferences or rankings (every answer is scored)
Writes  --output_file    the same records, one a line, with "score" ("chosen_score" and "rejected_score", or "scores")

    python -m tools.score_answers --reward_model outputs/rm --data_file predictions.jsonl --output_file scores.jsonl

A higher score is a better answer; only differences between answers to one prompt mean something.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path


def parse_command_line(argv):
    parser = argparse.ArgumentParser(
        prog="score_answers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reward_model", required=True, help="directory of a trained reward model")
    parser.add_argument("--data_file", required=True, help="file or directory with answers")
    parser.add_argument("--output_file", default="scores.jsonl", help="where the scores go (default scores.jsonl)")
    parser.add_argument("--data_format", default="auto", help="force one reading of the records; README lists them")
    parser.add_argument("--max_length", type=int, default=1024, help="longest sequence in tokens (default 1024)")
    parser.add_argument("--batch_size", type=int, default=8, help="answers in a forward pass (default 8)")
    parser.add_argument("--only_cpu", action="store_true", help="use no accelerator even if there is one")
    return parser.parse_args(argv)


def answers_of(record, data_format):
    """What a record asks to be scored: (kind of result, prompt, answers, tools)."""
    from stagekit.formats import to_canonical
    from stagekit.records import Conversation, Preference, Question, Ranking, RowError, Text

    if isinstance(record, dict) and "prediction" in record and isinstance(record.get("messages"), list):
        if not isinstance(record["prediction"], str):
            raise RowError(f"field 'prediction' must be a string, got {type(record['prediction']).__name__}")
        # an empty prediction is an answer too, and a bad one: it is put in after the prompt was checked
        asked = {
            "messages": [*record["messages"], {"role": "assistant", "content": "…"}],
            "tools": record.get("tools"),
        }
        canonical, _ = to_canonical(asked, "conversation")
        answer = [{"role": "assistant", "content": record["prediction"]}]
        return "score", canonical.messages[:-1], [answer], canonical.tools
    canonical, _ = to_canonical(record, data_format)
    if isinstance(canonical, Conversation):
        return "score", canonical.messages[:-1], [canonical.messages[-1:]], canonical.tools
    if isinstance(canonical, Question):
        if not canonical.solution:
            raise RowError("this is a question alone, and only answers can be scored")
        return "score", canonical.prompt, [[{"role": "assistant", "content": canonical.solution}]], None
    if isinstance(canonical, Preference):
        return "pair", canonical.prompt, [canonical.chosen, canonical.rejected], canonical.tools
    if isinstance(canonical, Ranking):
        return "ranking", canonical.prompt, canonical.answers, canonical.tools
    kind = "running text" if isinstance(canonical, Text) else f"a {type(canonical).__name__.lower()}"
    raise RowError(f"this is {kind}, and only answers can be scored")


def read_answers(data_file, data_format):
    """[(record, kind, (prompt, answers, tools))] of all records; a broken one ends the program with file and line."""
    from stagekit.files import find_files, read_records
    from stagekit.records import RowError

    rows = []
    for path in find_files(data_file):
        for record, line in read_records(path):
            try:
                if isinstance(record, RowError):
                    raise record
                kind, *item = answers_of(record, data_format)
                rows.append((record, kind, tuple(item)))
            except RowError as error:
                raise ValueError(f"{path}:{line}: {error}") from None
    return rows


def main(argv=None):
    args = parse_command_line(argv)
    from tqdm import tqdm

    from stagekit.pair_metrics import wilson_interval
    from stagekit.scoring import load_reward_model, score_answers

    rows = read_answers(args.data_file, args.data_format)
    reward = load_reward_model(args.reward_model, args.only_cpu)
    items = [item for _, _, item in rows]
    scores = [[None] * len(answers) for _, answers, _ in items]
    progress = tqdm(total=sum(map(len, scores)), desc="scoring", unit="answer")
    for (index, number), score in score_answers(reward, items, args.max_length, args.batch_size):
        scores[index][number] = score
        progress.update()
    progress.close()

    lines, right, pairs = [], 0.0, 0
    for (record, kind, _), mine in zip(rows, scores, strict=True):
        named = {"score": {"score": mine[0]}, "ranking": {"scores": mine}}
        if kind == "pair":
            named["pair"] = {"chosen_score": mine[0], "rejected_score": mine[1]}
            if None not in mine:
                right, pairs = right + (mine[0] > mine[1]) + 0.5 * (mine[0] == mine[1]), pairs + 1
        record = record if isinstance(record, dict) else {"text": record}
        lines.append(json.dumps({**record, **named[kind]}, ensure_ascii=False) + "\n")
    temporary = Path(args.output_file + ".part")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, args.output_file)

    known = [score for mine in scores for score in mine if score is not None]
    unknown = sum(map(len, scores)) - len(known)
    if unknown:
        print(f"{unknown} answers do not fit --max_length {args.max_length}: their score is null")
    if known:
        print(
            f"{len(known)} answers, mean score {statistics.fmean(known):+.3f}, {min(known):+.3f} to {max(known):+.3f}"
        )
    if pairs:
        low, high = wilson_interval(right, pairs)
        print(f"pairs in the right order: {right / pairs:.3f} (95 % interval {low:.3f} to {high:.3f}, {pairs} pairs)")
    print(f"saved: {args.output_file}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        print(f"score_answers: error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
