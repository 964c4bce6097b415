"""How often the search behind chatpdf.py finds the passage that answers, against plain BM25.

    python -m benchmarks.rag_recall
    python -m benchmarks.rag_recall --output benchmarks/results/rag_recall.md

Asks the questions of data/rag/questions over the documents of data/rag. A hit is a passage of the right file, and
page where the file has pages, that contains the evidence. Plain BM25 (k1 1.2, b 0.75) is written out here and searches
the very same passages by other words. Which words to index was decided on other data: the questions and answers of
data/finetune and data/eval, where a question has to find its own answer among all.
"""

import argparse
import json
import math
import platform
import sqlite3
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from importlib import metadata
from pathlib import Path

from benchmarks.table import publish

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DEPTHS = (1, 3, 5)
OFF_TOPIC = (
    "What is the capital of Australia?",
    "How do I change the oil of my car?",
    "Who won the football world cup in 2014?",
    "Which planet has the most moons?",
    "How do I bake sourdough bread?",
    "What does the Python keyword yield do?",
    "When was the Eiffel Tower built?",
    "How tall is Mount Everest?",
    "What is the boiling point of ethanol?",
    "Who wrote War and Peace?",
    "怎么更换自行车的轮胎？",
    "法国的首都是哪里？",
    "如何用Python读取文件？",
    "红烧肉怎么做才好吃？",
    "世界上最长的河是哪一条？",
    "谁发明了电灯？",
    "股票开户需要什么材料？",
    "北京到上海的高铁要多久？",
    "怎样给吉他调音？",
    "唐朝是哪一年建立的？",
)


def parse_command_line():
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", default=str(ROOT / "data/rag"))
    parser.add_argument("--questions", default=str(ROOT / "data/rag/questions/questions.jsonl"))
    parser.add_argument("--output", help="also write the tables to this file")
    return parser.parse_args()


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


class PlainBM25:
    """BM25 as in the textbook, over tokens of any kind; idf not below 0, as in SQLite."""

    def __init__(self, texts, tokenize):
        self.tokenize, self.counts = tokenize, [Counter(tokenize(text)) for text in texts]
        self.lengths = [sum(counts.values()) for counts in self.counts]
        self.mean = sum(self.lengths) / len(texts)
        self.documents = Counter(token for counts in self.counts for token in counts)

    def order(self, question):
        """Places of the texts with any token of the question, best first."""
        asked, scores = set(self.tokenize(question)), []
        for counts, length in zip(self.counts, self.lengths, strict=True):
            score = 0.0
            for token in asked:
                there, count = self.documents[token], counts[token]
                idf = max(math.log((len(self.counts) - there + 0.5) / (there + 0.5)), 1e-6)
                score += idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length / self.mean))
            scores.append(score)
        return sorted((place for place, score in enumerate(scores) if score), key=lambda place: -scores[place])


def ways_to_tokenize():
    """{title: function} of plain BM25."""
    import jieba

    from stagekit.words import cut, with_characters, without_stopwords

    jieba.setLogLevel(60)
    return {
        "whitespace": str.split,
        "characters": lambda text: [char for char in text if not char.isspace()],
        "jieba, as it comes (HMM on)": lambda text: [word for word in jieba.lcut(text) if word.strip()],
        "jieba, HMM off": lambda text: [word for word in jieba.lcut(text, HMM=False) if word.strip()],
        "ours, without characters and stems": lambda text: without_stopwords(cut(text)),
        "ours, without stems": lambda text: with_characters(without_stopwords(cut(text))),
    }


def squeeze(text):
    """Text without white space, compatible characters made equal."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def is_hit(row, passage):
    right = passage.file == row["file"] and row["page"] in (None, passage.page)
    return right and squeeze(row["evidence"]) in squeeze(passage.text)


def has_chinese(text):
    return any("\u4e00" <= char <= "\u9fff" for char in text)


def group_of(row):
    """The questions are counted apart by language; without vectors no question finds a passage of another one."""
    if has_chinese(row["question"]) != has_chinese(row["evidence"]):
        return "other language"
    return "Chinese" if has_chinese(row["question"]) else "English"


def recall_table(ranks, groups):
    """Rows of a table: ways × groups, hits at 1/3/5."""
    names = ["Chinese", "English", "other language"]
    lines = ["| search by | " + " | ".join(f"{name} ({groups.count(name)})" for name in names) + " | all |"]
    lines.append("|---|" + "---:|" * (len(names) + 1))
    for title, found in ranks.items():
        cells = []
        for name in [*names, None]:
            chosen = [rank for rank, group in zip(found, groups, strict=True) if name in (None, group)]
            cells.append(" / ".join(str(sum(rank <= depth for rank in chosen)) for depth in DEPTHS))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def first_hit(places, right):
    return next((rank for rank, place in enumerate(places, 1) if right(place)), 10**6)


def answer_pairs():
    """(question, answer) of data that is not asked about documents: first turns of fine-tuning, and evaluation."""
    pairs = []
    for name in ("finetune/medical_single_zh.jsonl", "finetune/medical_single_en.jsonl"):
        turns = [row["conversations"] for row in read_rows(ROOT / "data" / name)]
        pairs += [(first["value"], second["value"]) for first, second, *_ in turns]
    return pairs + [(row["question"], row["answer"]) for row in read_rows(ROOT / "data/eval/questions.jsonl")]


def index_texts(directory, texts):
    """An index of one file for each text; a file's name is its place."""
    from stagekit.documents import Limits
    from stagekit.retrieval import open_index

    folder = Path(directory, "texts")
    folder.mkdir()
    for place, text in enumerate(texts):
        (folder / f"{place}.txt").write_text(text, encoding="utf-8")
    index = open_index(Path(directory, "texts_index"))
    index.update(folder, Limits(chunk_chars=100_000))
    return index


def main():
    """Ask, count, print tables."""
    args = parse_command_line()
    from stagekit.documents import Limits
    from stagekit.grounding import MIN_SCORE
    from stagekit.retrieval import open_index
    from stagekit.words import load_jieba

    load_jieba()
    rows = read_rows(args.questions)
    asked = [row for row in rows if row["file"]]
    groups = [group_of(row) for row in asked]
    with tempfile.TemporaryDirectory() as directory:
        index = open_index(Path(directory, "index"))
        index.update(args.docs)
        passages = index.passages()
        absent = [row["question"] for row in asked if not any(is_hit(row, passage) for passage in passages)]
        assert not absent, f"no passage holds the evidence of {absent}"

        ranks, scores = {}, {}
        for title, tokenize in ways_to_tokenize().items():
            plain = PlainBM25([passage.text for passage in passages], tokenize)
            ranks[f"plain BM25: {title}"] = [
                first_hit(plain.order(row["question"]), lambda place, row=row: is_hit(row, passages[place]))
                for row in asked
            ]
        start = time.perf_counter()
        found = [index.search(row["question"]) for row in asked]
        milliseconds = 1000 * (time.perf_counter() - start) / len(asked)
        ranks["**chatpdf.py**"] = [
            first_hit(places, lambda passage, row=row: is_hit(row, passage))
            for row, places in zip(asked, found, strict=True)
        ]

        def best(questions):
            return [max((passage.score for passage in index.search(text)), default=0.0) for text in questions]

        own = [row["question"] for row, group in zip(asked, groups, strict=True) if group != "other language"]
        scores["answered by a passage of its language"] = best(own)
        scores["near the subject, not in the documents"] = best(row["question"] for row in rows if not row["file"])
        scores["about something else"] = best(OFF_TOPIC)

        sizes = {}
        for size in (200, 300, 500, 700, 1000):
            with open_index(Path(directory, f"index{size}")) as other:
                count = other.update(args.docs, Limits(chunk_chars=size, overlap_chars=size // 5)).num_passages
                answers = [other.search(row["question"]) for row in asked]
            hits = [
                first_hit(answer, lambda passage, row=row: is_hit(row, passage))
                for row, answer in zip(asked, answers, strict=True)
            ]
            num_chars = sum(len(passage.text) for answer in answers for passage in answer) / len(asked)
            sizes[size] = count, " / ".join(str(sum(rank <= depth for rank in hits)) for depth in DEPTHS), num_chars

        pairs = answer_pairs()
        pair_groups = ["Chinese" if has_chinese(question) else "English" for question, _ in pairs]
        pair_ranks = {}
        for title, tokenize in ways_to_tokenize().items():
            plain = PlainBM25([answer for _, answer in pairs], tokenize)
            pair_ranks[f"plain BM25: {title}"] = [
                first_hit(plain.order(question), lambda place, own=own: place == own)
                for own, (question, _) in enumerate(pairs)
            ]
        with index_texts(directory, [answer for _, answer in pairs]) as texts:
            pair_ranks["**chatpdf.py**"] = [
                first_hit(texts.search(question), lambda passage, own=own: passage.file == f"{own}.txt")
                for own, (question, _) in enumerate(pairs)
            ]
        index.close()

    lines = [
        "# chatpdf.py: is the passage that answers among the first 1 / 3 / 5?",
        "",
        f"{len(asked)} questions with an answer and {len(rows) - len(asked)} without over the documents of data/rag, "
        f"{len(passages)} passages of at most {Limits().chunk_chars} characters. Questions of another language than "
        "their document have hardly a word in common with it: finding those takes an `--embedding_model`, which was "
        "not measured. "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, jieba {metadata.version('jieba')}; "
        f"{milliseconds:.1f} ms a question (`python -m benchmarks.rag_recall`).",
        "",
        *recall_table(ranks, groups),
        "",
        "## Which words",
        "",
        f"{len(pairs)} questions of data/finetune and data/eval, each of which has to find its own answer among all; "
        "per cent at 1 / 3 / 5. Decided here: no hidden Markov model, characters beside the words, English stems.",
        "",
        "| search by | " + " | ".join(f"{name} ({pair_groups.count(name)})" for name in ("Chinese", "English")) + " |",
        "|---|---:|---:|",
    ]
    for title, found in pair_ranks.items():
        cells = []
        for name in ("Chinese", "English"):
            chosen = [rank for rank, group in zip(found, pair_groups, strict=True) if group == name]
            shares = [100 * sum(rank <= depth for rank in chosen) / len(chosen) for depth in DEPTHS]
            cells.append(" / ".join(f"{share:.1f}" for share in shares))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += [
        "",
        "## How long a passage",
        "",
        "| `--chunk_chars` | passages | hits at 1 / 3 / 5 | characters of 5 passages |",
        "|---:|---:|---:|---:|",
        *(f"| {size} | {count} | {hits} | {chars:,.0f} |" for size, (count, hits, chars) in sizes.items()),
        "",
        "## When to say that it is not in the documents",
        "",
        "Questions that are refused below a score (the share of a question's words that the best passage holds, "
        f"weighted by rarity; `--min_score`, default {MIN_SCORE}). It tells apart what is about something else; near "
        "the subject words cannot tell, and the model has to.",
        "",
        "| refused below | " + " | ".join(f"{title} ({len(values)})" for title, values in scores.items()) + " |",
        "|---:|" + "---:|" * len(scores),
    ]
    for limit in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5):
        counts = (str(sum(value < limit for value in values)) for values in scores.values())
        lines.append(f"| {limit:.2f} | {' | '.join(counts)} |")
    publish(lines, args.output)


if __name__ == "__main__":
    main()
