"""Speed and memory of eval_metrics.py, against nltk and rouge-chinese called pair by pair.

    python -m benchmarks.eval_metrics
    python -m benchmarks.eval_metrics --pairs 20000 --output table.md

Pairs are made up: clauses of medical words, doses and signs in random order, of which a prediction shares about half
with its reference. eval_metrics.py is run as a user runs it, reading, bootstrap and check included, a process of its
own for every measurement. The libraries score a sample without bootstrap in one process, which is then extrapolated.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

from benchmarks.table import publish

ROOT = Path(__file__).resolve().parents[1]
WORDS = (
    "患者 症状 发热 咳嗽 头痛 胸闷 腹泻 乏力 皮疹 感染 病毒 细菌 炎症 血压 血糖 血脂 心率 "
    "体温 肝功能 肾功能 心电图 胸片 超声 核磁共振 抗生素 退烧药 降压药 胰岛素 布洛芬 阿司匹林 "
    "二甲双胍 对乙酰氨基酚 阿莫西林 氨氯地平 奥美拉唑 建议 需要 应当 可以 避免 及时 继续 停止 "
    "减少 增加 控制 监测 复查 就诊 治疗 预防 诊断 考虑 排除 提示 导致 引起 缓解 加重 持续 "
    "反复 出现 伴有 通常 可能 一般 如果 并且 或者 因此 但是 同时 尤其 老年人 儿童 孕妇 医生 "
    "医院 急诊 门诊 饮食 睡眠 运动 休息 清淡 多喝水 一天 两周 三个月 早晚 饭后 空腹 的 了 在 "
    "和 与 对 不 很 较 较为 明显 轻度 中度 严重 急性 慢性 右侧 左侧 上腹部 关节 皮肤 甲状腺 "
    "前列腺 颈动脉 腰椎间盘"
).split()
DOSES = ("5mg", "0.5g", "2.5 ml", "38.5℃", "140/90mmHg", "12%", "CT", "MRI", "WBC 11.2", "HbA1c", "qd", "3-5")


def parse_command_line():
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--sample", type=int, default=1000, help="pairs that the libraries score")
    parser.add_argument("--chars", type=int, default=150, help="mean length of an answer")
    parser.add_argument("--output", help="also write the table to this file")
    return parser.parse_args()


def clause(rng):
    """Some words in random order, now and then with a dose."""
    words = rng.choices(WORDS, k=rng.randint(3, 8))
    if rng.random() < 0.2:
        words.insert(rng.randrange(len(words)), rng.choice(DOSES))
    return "".join(words)


def make_pair(rng, num_chars):
    """A reference of about that many characters, and a prediction that shares some of its clauses."""
    reference, length = [], rng.uniform(0.5, 1.5) * num_chars
    while sum(map(len, reference)) + len(reference) < length:
        reference.append(clause(rng))
    prediction = [part if rng.random() < 0.5 else clause(rng) for part in reference]
    signs = rng.choices("，，，。；", k=len(reference))
    return tuple("".join(map("".join, zip(parts, signs, strict=True))) for parts in (prediction, reference))


def measure(path, flags):
    """Run eval_metrics.py: (seconds, CPU seconds and peak bytes of all of its processes, the JSON it prints)."""
    command = [sys.executable, str(ROOT / "eval_metrics.py"), path, "--json", *flags]
    start, before, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN), [0]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def watch():
        while process.poll() is None:
            peak[0] = max(peak[0], tree_bytes(process.pid))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, _ = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return seconds, spent, peak[0], json.loads(out)


def tree_bytes(pid):
    """Resident bytes of a process and its descendants, pages they share counted in each (Linux)."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(tree_bytes, map(int, children)))


def plain(pairs, words):
    """Seconds that nltk and rouge-chinese take for BLEU-1..4 of corpus and sentences and ROUGE-1, -2, -L of pairs.

    Returns:
        (seconds, mean BLEU-4, mean ROUGE-L), the last two times 100.
    """
    sys.path.insert(0, str(ROOT))
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu, sentence_bleu
    from rouge_chinese import Rouge

    from eval_metrics import tokenize

    jieba.setLogLevel(60)
    jieba.initialize()
    weights, smooth = [(1 / n,) * n for n in (1, 2, 3, 4)], SmoothingFunction().method3
    start, bleu, rouge, sides = time.perf_counter(), [], [], ([], [])
    for pair in pairs:
        ours, theirs = (jieba.lcut(text) if words else tokenize(text) for text in pair)
        ours, theirs = ([token for token in side if token.strip()] for side in (ours, theirs))
        bleu.append(sentence_bleu([theirs], ours, weights, smooth)[-1])
        rouge.append(Rouge().get_scores(" ".join(ours), " ".join(theirs))[0]["rouge-l"]["f"])
        sides[0].append([theirs])
        sides[1].append(ours)
    corpus_bleu(*sides, weights, smooth)
    return time.perf_counter() - start, 100 * sum(bleu) / len(bleu), 100 * sum(rouge) / len(rouge)


def main():
    """Measure every way and print a table."""
    args = parse_command_line()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        path, short = (str(Path(directory) / name) for name in ("all.jsonl", "sample.jsonl"))
        pairs, num_chars = [], 0
        with open(path, "w", encoding="utf-8") as file:
            for index in range(args.pairs):
                prediction, reference = make_pair(rng, args.chars)
                num_chars += len(prediction) + len(reference)
                if index < args.sample:
                    pairs.append((prediction, reference))
                file.write(json.dumps({"prediction": prediction, "reference": reference}, ensure_ascii=False) + "\n")
        with open(path, encoding="utf-8") as file, open(short, "w", encoding="utf-8") as target:
            target.writelines(line for _, line in zip(range(args.sample), file, strict=False))

        rows = []
        ways = {
            "characters (`mixed`)": ["--tokenization", "mixed"],
            "jieba's words (`zh-word`)": ["--tokenization", "zh-word"],
            "`--compatible llamafactory`": ["--compatible", "llamafactory"],
        }
        for title, flags in ways.items():
            seconds, busy, peak, found = measure(path, flags)
            print(f"{title}: {seconds:.1f} s, {busy:.1f} CPU s, {peak / 2**20:.0f} MiB", file=sys.stderr)
            theirs = ""
            if flags[-1] in ("mixed", "zh-word"):
                spent, bleu, rouge = plain(pairs, flags[-1] == "zh-word")
                mean = measure(short, [*flags, "--bootstrap", "0"])[3]["scores"][flags[-1]]["mean"]
                assert abs(mean["bleu4"]["score"] - bleu) < 1e-6 and abs(mean["rougeL"]["score"] - rouge) < 1e-6
                whole = spent / len(pairs) * args.pairs
                theirs = f"{whole:,.0f} | {whole / seconds:,.0f}"
            numbers = f"{seconds:.0f} | {busy:.0f} | {found['num_pairs'] / seconds:,.0f} | {peak / 2**20:,.0f}"
            rows.append(f"| {title} | {numbers} | {theirs or '| '} |")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("nltk", "rouge-chinese", "jieba", "numpy"))
    lines = [
        "# eval_metrics.py: pairs a second, against nltk and rouge-chinese",
        "",
        f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}, {versions}; "
        f"{args.pairs:,} made-up pairs, answers of {num_chars / 2 / args.pairs:.0f} characters; whole runs with "
        f"reading, 1,000 bootstrap resamples and the check. The libraries, one process and no bootstrap, were timed "
        f"on {args.sample:,} of the pairs, with equal BLEU-4 and ROUGE-L, and extrapolated "
        f"(`python -m benchmarks.eval_metrics`).",
        "",
        "| tokens | seconds | CPU seconds | pairs/s | peak memory (MiB) | nltk + rouge-chinese (s) | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *rows,
    ]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
