r"""The data doctor: look at the rows of a stage before it trains on them. Nothing is trained.

Reads   DATA                  files and directories, as --train_file_dir takes them
        --model_name_or_path  tokenizer and chat template (of a base model, or of a directory a stage wrote); without
                              it lengths are in characters, and what needs tokens is left out
        --against             evaluation data, to be looked for in DATA
Prints  the ledger, lengths, what is cut at several length limits, duplicates, overlap, languages, roles and turns,
        pairs, likely personal data, samples with what is learnt in colour, and a verdict in the last line
Writes  --plot lengths.png, --json report.json, --rejected_file rejected_rows.jsonl, where asked for

    python -m tools.check_data data/finetune --stage sft --model_name_or_path outputs/pt --against data/eval
    python -m tools.check_data data/reward --stage rm --model_name_or_path outputs/sft --max_length 512,1024 \
        --max_truncated_percentage 1 --max_personal_data 0

Of several --max_length the first one is what the stage is to be run with: ledger, verdict and limits speak of it.
Exit code 0, 1 where a limit given on the command line is passed, 2 for input that cannot be read at all.

Keys of --json (format 1; they keep their meaning):

    format, stage, files, model, template, unit ("tokens" or "characters"), max_length
    ledger          as in stage.json: read, used, dropped {reason: rows}, repaired {kind: times}, truncated, samples,
                    turns, tokens, …
    rejected        rows, reasons {reason: rows, numbers as N}, first [{origin, reason}]
    lengths         rows, min, max, mean, p50, p90, p99, bins [{from, to, rows}] (both ends included)
    limits          for each --max_length: max_length, samples, tokens, rows_truncated (they lose their end),
                    rows_split (they become several samples), rows_shortened (their prompt loses its beginning),
                    rows_dropped, dropped {reason: rows}, answers_lost, learnt_tokens_lost,
                    learnt_tokens_lost_percentage
    duplicates      threshold; exact, near, same_prompt (with another answer): rows, first [[origin, earlier origin]]
    overlap         null without --against; against [file], against_rows, against_unreadable, against_rows_seen,
                    against_rows_seen_percentage; same_prompt: rows, first [[origin, origin there]]; shared_run (13
                    words or characters): rows, against_rows, most [[origin, origin there, share of the runs of a
                    text there, the first run]]; seen: same prompt, or a share of one half
    languages       rows by language: zh, en (any in Latin letters), mixed, other; switched: rows, first [origin]
    conversations   roles {role: messages}, rows_by_turns {user turns: rows}, rows_with_tools, rows_with_system,
                    rows_without_reference
    pairs           null but for rm, dpo, orpo; pairs, identical: pairs, first [origin]; chosen_is_longer: share, low,
                    high (95 % interval, a tie is one half); difference (chosen minus rejected): mean, low, high
    personal_data   count, rows, kinds {kind: count}, found [{origin, kind, masked}] (the first 1000)
    findings        [what is to be looked at, in words]
    limits_passed   [{flag, limit, found}]
"""

import argparse
import dataclasses
import json
import re
import sys
import textwrap
import unicodedata
from itertools import accumulate
from pathlib import Path

from stagekit.commandline import Parser, run

STAGES = ("pt", "sft", "rm", "dpo", "orpo", "ppo", "grpo")
# Flags that say how rows are read, as the stages have them.
READING = ("dataset_name", "dataset_split", "dataset_hub", "data_format", "columns", "first_option", "txt_documents")
COLUMNS = 100
BAR = 36
HEAD, TAIL = 200, 80  # tokens shown of a long sample
LIMITS = {  # flag -> help
    "max_dropped_percentage": "rows that the stage would drop, of those read",
    "max_truncated_percentage": "rows that lose their end, of those read (needs --model_name_or_path)",
    "max_duplicate_percentage": "rows that repeat an earlier one, exactly or nearly, of those read",
    "max_overlap_percentage": "evaluation rows that stand in the data, of those of --against",
    "max_personal_data": "likely pieces of personal data, a number",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; nothing heavy is imported for that."""
    parser = Parser("check_data", __doc__)
    parser.add_argument("data", nargs="?", help="files and directories, several with commas")
    parser.add_argument("--stage", required=True, choices=STAGES, help="which stage is to take them")
    reading = parser.add_argument_group("reading, as the stages have it")
    reading.add_argument("--model_name_or_path", help="where tokenizer and chat template come from")
    reading.add_argument("--tokenizer_name_or_path", help="tokenizer, if not the model's own")
    reading.add_argument("--template_name", help="prompt template of template.py, for a tokenizer that brings none")
    reading.add_argument("--dataset_name", help="a dataset of the hub, in place of DATA or beside it")
    reading.add_argument("--dataset_split", default="train", help="which of its splits, default train")
    reading.add_argument(
        "--dataset_hub", choices=["huggingface", "modelscope"], default="huggingface", help="default huggingface"
    )
    reading.add_argument(
        "--data_format", default="auto", help="force one reading of the records; docs/data.md lists them"
    )
    reading.add_argument("--columns", help="your fields for the names that are looked for, e.g. prompt=问题,chosen=好")
    reading.add_argument("--first_option", type=int, choices=[0, 1], help="number of option A in the field cop")
    reading.add_argument(
        "--txt_documents",
        choices=["blank_line", "line", "file"],
        default="blank_line",
        help="what separates the documents of a .txt file, default blank_line",
    )
    looking = parser.add_argument_group("what is looked at")
    looking.add_argument(
        "--max_length",
        metavar="N,N",
        help="length limits in tokens (--block_size of pt, --max_prompt_length of ppo and grpo); the first is the one "
        "meant; default: the stage's own, half and double of it",
    )
    looking.add_argument("--against", metavar="PATH", help="evaluation files and directories to look for in the data")
    looking.add_argument(
        "--near_threshold", type=float, default=0.8, help="least similarity of near duplicates, default 0.8"
    )
    looking.add_argument("--preview", type=int, default=3, help="samples shown with what is learnt, default 3")
    looking.add_argument("--num_workers", type=int, help="processes; default: all cores above 2,000 rows")
    writing = parser.add_argument_group("files")
    writing.add_argument("--plot", metavar="FILE.png", help="write the lengths as a picture")
    writing.add_argument("--json", metavar="FILE.json", help="write everything for machines (keys: see above)")
    writing.add_argument("--rejected_file", metavar="FILE.jsonl", help="write the rows that cannot be read, and why")
    stopping = parser.add_argument_group("limits (exit code 1 when there is more)")
    for name, text in LIMITS.items():
        stopping.add_argument(f"--{name}", type=float, metavar="N", help=text)
    args = parser.parse_args(argv)
    _check(args, parser)
    return args


def _check(args, parser):
    if not (args.data or args.dataset_name):
        parser.error("DATA is missing: name a file or directory, or a dataset of the hub with --dataset_name")
    if args.max_length is not None:
        if not re.fullmatch(r"[0-9]+(,[0-9]+)*", args.max_length):
            parser.error(f"--max_length {args.max_length}: expected numbers with commas, such as 1024,2048")
        args.max_length = list(dict.fromkeys(map(int, args.max_length.split(","))))
        if min(args.max_length) < 16:
            parser.error(f"--max_length {min(args.max_length)} must be at least 16 tokens")
    if not 0 < args.near_threshold <= 1:
        parser.error(f"--near_threshold {args.near_threshold} must be above 0 and at most 1")
    for name in ("preview", *LIMITS):
        if getattr(args, name) is not None and not getattr(args, name) >= 0:
            parser.error(f"--{name} {getattr(args, name):g} must be 0 or more")
    if args.num_workers is not None and args.num_workers < 1:
        parser.error(f"--num_workers {args.num_workers} must be at least 1")
    if args.max_overlap_percentage is not None and not args.against:
        parser.error("--max_overlap_percentage needs --against: which evaluation data?")
    for name in ("max_length", "max_truncated_percentage", "template_name", "tokenizer_name_or_path"):
        if getattr(args, name) is not None and not args.model_name_or_path:
            parser.error(f"--{name} needs --model_name_or_path: tokens are counted by its tokenizer")


def main(args: argparse.Namespace) -> None:
    """Read, examine, print, write."""
    from stagekit.arguments import DataArguments
    from stagekit.contamination import read_evaluations
    from stagekit.data import find_sources
    from stagekit.examination import FORMAT, examine, judge
    from stagekit.fitting import ACCEPT, DEFAULT_LIMITS, make_fitter
    from stagekit.reading import load_rows

    tokenizer, chat = load_chat(args) if args.model_name_or_path else (None, None)
    evaluations = read_evaluations(args.against) if args.against else None
    same = {name: getattr(args, name) for name in READING}
    same["preprocessing_num_workers"] = args.num_workers
    reading = DataArguments(train_file_dir=args.data, on_bad_row="report", **same)
    rows, ledger, rejected = load_rows(find_sources(reading).train, ACCEPT[args.stage], reading)
    default = DEFAULT_LIMITS[args.stage]
    limits = args.max_length or [default, default // 2, default * 2]
    fit = make_fitter(args.stage, tokenizer, chat) if tokenizer else None
    count = (lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])) if tokenizer else len
    found, refused = examine(
        rows, ledger, args.stage, fit, count, limits, evaluations, args.near_threshold, args.num_workers
    )
    for index, reason in refused:
        row = rows[index]
        rejected.add(row.origin, reason, dataclasses.asdict(row.record))
    report = {
        "format": FORMAT,
        "stage": args.stage,
        "files": ledger.files,
        "model": args.model_name_or_path,
        "template": chat.name if chat else None,
        "max_length": limits[0] if tokenizer else None,
        **found,
        "rejected": {
            "rows": rejected.num_stopping,
            "reasons": dict(rejected.reasons.most_common()),
            "first": [{"origin": origin, "reason": reason} for origin, reason in rejected.first],
        },
    }
    report["findings"] = judge(report)
    report["limits_passed"] = passed_limits(args, report)
    show(report, args)
    if tokenizer:
        show_samples(args.stage, tokenizer, chat, rows, limits[0], args.preview)
    write(report, rejected, args)
    show_verdict(report)
    if report["limits_passed"]:
        sys.exit(1)


def load_chat(args: argparse.Namespace):
    """(tokenizer, Chat or None for pretraining); the weights are not needed.

    Raises:
        ValueError, FileNotFoundError: no such model, or no template that the stage could use.
    """
    from stagekit.arguments import ModelArguments
    from stagekit.checkpoint import Source, resolve
    from stagekit.modeling import load_tokenizer
    from stagekit.tokenization import prepare_chat
    from template import get_template

    name = args.model_name_or_path
    if args.template_name:
        get_template(args.template_name)
    own = Path(name, "tokenizer_config.json").is_file()
    source = Source(name, tokenizer=name) if own else resolve(name, verify=False)
    model_args = ModelArguments(model_name_or_path=name, tokenizer_name_or_path=args.tokenizer_name_or_path)
    tokenizer = load_tokenizer(source, model_args)
    return tokenizer, None if args.stage == "pt" else prepare_chat(tokenizer, args.template_name)


def passed_limits(args: argparse.Namespace, report: dict) -> list[dict]:
    """The limits of the command line that the data passes."""
    from stagekit.examination import percentage

    ledger, duplicates, overlap = report["ledger"], report["duplicates"], report["overlap"]
    repeats = duplicates["exact"]["rows"] + duplicates["near"]["rows"]
    found = {
        "max_dropped_percentage": percentage(sum(ledger["dropped"].values()), ledger["read"]),
        "max_duplicate_percentage": percentage(repeats, ledger["read"]),
        "max_personal_data": report["personal_data"]["count"],
    }
    if report["limits"]:
        found["max_truncated_percentage"] = percentage(report["limits"][0]["rows_truncated"], ledger["read"])
    if overlap:
        found["max_overlap_percentage"] = overlap["against_rows_seen_percentage"]
    given = {name: getattr(args, name) for name in LIMITS if getattr(args, name) is not None}
    return [
        {"flag": name, "limit": limit, "found": found[name]} for name, limit in given.items() if found[name] > limit
    ]


def write(report: dict, rejected, args: argparse.Namespace) -> None:
    """Write the files that were asked for, each whole or not at all."""
    from stagekit.curves import draw_lengths
    from stagekit.journal import write_whole

    written = {"plot": args.plot, "json": args.json, "rejected_file": args.rejected_file}
    for path in filter(None, written.values()):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    if args.plot and report["lengths"]["rows"]:
        limits = [item["max_length"] for item in report["limits"]]
        title = f"{report['lengths']['rows']:,} rows for {args.stage}"
        draw_lengths(report["lengths"]["bins"], limits, args.plot, title, report["unit"])
    if args.json:
        write_whole(args.json, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if args.rejected_file:
        rejected.save(args.rejected_file)
    saved = [path for path in written.values() if path]
    if saved:
        print(f"\nsaved: {', '.join(saved)}")


# -- printing --------------------------------------------------------------------------------------------------------


def show(report: dict, args: argparse.Namespace) -> None:
    """Print all sections."""
    ledger = report["ledger"]
    model = (
        f"tokens by {report['model']}"
        if report["model"]
        else "no --model_name_or_path: lengths in characters, no length limits, no samples"
    )
    template = f", template {report['template']}" if report["template"] else ""
    files = "1 file" if len(ledger["files"]) == 1 else f"{len(ledger['files']):,} files"
    print(clip(f"{args.data} for {report['stage']}: {ledger['read']:,} rows of {files}", COLUMNS))
    print(clip(f"{model}{template}", COLUMNS))
    show_ledger(report)
    rows = sum(report["languages"][name] for name in ("zh", "en", "mixed", "other"))  # those that could be read
    if not rows:
        return
    show_lengths(report)
    if report["limits"]:
        show_limits(report)
    show_duplicates(report["duplicates"], rows, "text" if report["stage"] == "pt" else "prompt and answer")
    if report["overlap"]:
        show_overlap(report["overlap"])
    show_languages(report["languages"], rows)
    if report["stage"] != "pt":
        show_conversations(report, rows)
    if report["pairs"]:
        show_pairs(report["pairs"], report["unit"])
    show_personal_data(report["personal_data"])


def show_ledger(report: dict) -> None:
    ledger, rejected = report["ledger"], report["rejected"]
    heading("Ledger" + (f", at {report['max_length']:,} tokens" if report["max_length"] else ""))
    show_counts("rows read", ledger["read"])
    show_counts("rows used", ledger["used"], ledger["read"])
    for title in ("dropped", "repaired"):
        for reason, count in sorted(ledger[title].items()):
            show_counts(f"{title}: {reason}", count, ledger["read"] if title == "dropped" else None)
    if report["limits"]:
        show_counts("samples", ledger["samples"])
        show_counts("tokens", ledger["tokens"]["used"])
        if report["stage"] not in ("ppo", "grpo"):
            show_counts("tokens learnt", ledger["tokens"]["trained"], ledger["tokens"]["used"])
    if rejected["rows"]:
        heading("Rows that cannot be read")
        for reason, count in list(rejected["reasons"].items())[:10]:
            say(f"{count:>9,}  {reason}", 13)
        print()
        for item in rejected["first"]:
            print(clip(f"  {item['origin']}: {item['reason']}", COLUMNS))


def show_lengths(report: dict) -> None:
    lengths = report["lengths"]
    heading(f"Length of a row, in {report['unit']}")
    most = max(item["rows"] for item in lengths["bins"])
    for item in lengths["bins"]:
        bar = "█" * round(BAR * item["rows"] / most) or ("▏" if item["rows"] else "")
        share = f"{100 * item['rows'] / lengths['rows']:5.1f} %"
        print(f"  {item['from']:>9,} to {item['to']:>9,}  {bar:<{BAR}}  {item['rows']:>10,}  {share}")
    parts = [("shortest", "min"), ("median", "p50"), ("mean", "mean"), ("90 %", "p90"), ("99 %", "p99")]
    print("  " + ", ".join(f"{name} {lengths[key]:,}" for name, key in [*parts, ("longest", "max")]))


def show_limits(report: dict) -> None:
    heading("What length limits cost, in rows")
    print(
        f"  {'limit':>8}  {'samples':>10}  {'cut at the end':>14}  {'split':>8}  {'prompt cut':>10}  {'dropped':>8}",
        end="",
    )
    print(f"  {'answers lost':>12}  learnt lost")
    for item in sorted(report["limits"], key=lambda item: item["max_length"]):
        mark = "*" if item["max_length"] == report["max_length"] else " "
        print(
            f"  {item['max_length']:>7,}{mark}  {item['samples']:>10,}  {item['rows_truncated']:>14,}  "
            f"{item['rows_split']:>8,}  {item['rows_shortened']:>10,}  {item['rows_dropped']:>8,}  "
            f"{item['answers_lost']:>12,}  {item['learnt_tokens_lost_percentage']:>9.1f} %"
        )
    print("  * what ledger and verdict speak of; split: one row becomes several samples, nothing is lost")


def show_duplicates(duplicates: dict, rows: int, what: str) -> None:
    heading("Duplicates")
    names = {
        "exact": f"{what} as in an earlier row",
        "near": f"nearly ({duplicates['threshold']:g} or more of the 5-grams)",
        "same_prompt": "same but for case and signs" if what == "text" else "same prompt, another answer",
    }
    for kind, text in names.items():
        show_counts(text, duplicates[kind]["rows"], rows)
    for kind in ("exact", "near"):
        for origin, earlier in duplicates[kind]["first"]:
            say(f"{origin} {'repeats' if kind == 'exact' else 'is like'} {beside(origin, earlier)}", 4)


def show_overlap(overlap: dict) -> None:
    heading("Overlap with evaluation data")
    show_counts("evaluation rows", overlap["against_rows"])
    if overlap["against_unreadable"]:
        show_counts("evaluation rows that cannot be read", overlap["against_unreadable"])
    show_counts("seen: same prompt, or half of a text", overlap["against_rows_seen"], overlap["against_rows"])
    show_counts(
        "with 13 words or characters of a row here", overlap["shared_run"]["against_rows"], overlap["against_rows"]
    )
    show_counts("rows here with the same prompt", overlap["same_prompt"]["rows"])
    show_counts("rows here with 13 words or characters of theirs", overlap["shared_run"]["rows"])
    for origin, there in overlap["same_prompt"]["first"]:
        say(f"{origin} asks what {there} asks", 4)
    for origin, there, share, words in overlap["shared_run"]["most"]:
        say(f"{origin} and {there}: {share:.0%} of its text, beginning", 4)
        print(clip(f"    {words}", COLUMNS))


def show_languages(languages: dict, rows: int) -> None:
    heading("Languages, by script")
    names = {"zh": "Chinese", "en": "English (Latin letters)", "mixed": "mixed", "other": "other, or no words"}
    for key, name in names.items():
        if languages[key]:
            show_counts(name, languages[key], rows)
    if languages["switched"]["rows"]:
        show_counts("answers in another language than their question", languages["switched"]["rows"], rows)
        for origin in languages["switched"]["first"][:3]:
            say(origin, 4)


def show_conversations(report: dict, rows: int) -> None:
    found = report["conversations"]
    heading("Roles and turns")
    for role, count in found["roles"].items():
        show_counts(f"messages of {role}", count)
    numbers = {int(number): count for number, count in found["rows_by_turns"].items()}
    for low, high in ((0, 0), (1, 1), (2, 2), (3, 4), (5, 9), (10, max(numbers, default=0))):
        count = sum(count for number, count in numbers.items() if low <= number <= high)
        if count:
            name = f"{low}" if low == high else f"{low} or more" if low == 10 else f"{low} to {high}"
            show_counts(f"rows with {name} user turn{'' if name == '1' else 's'}", count, rows)
    for key, text in (("system", "a system prompt"), ("tools", "tools")):
        if found[f"rows_with_{key}"]:
            show_counts(f"rows with {text}", found[f"rows_with_{key}"], rows)
    if report["stage"] == "grpo":
        show_counts("rows without an answer to compare with", found["rows_without_reference"], rows)


def show_pairs(pairs: dict, unit: str) -> None:
    heading("Better and worse answers")
    show_counts("pairs", pairs["pairs"])
    show_counts("of identical answers", pairs["identical"]["pairs"], pairs["pairs"])
    for origin in pairs["identical"]["first"]:
        say(origin, 4)
    longer, difference = pairs["chosen_is_longer"], pairs["difference"]
    if longer:
        interval = f"95 % interval {100 * longer['low']:.1f} to {100 * longer['high']:.1f} %"
        print(f"  the better answer is the longer one in {100 * longer['share']:.1f} % of the rows ({interval})")
        low, high = difference["low"], difference["high"]
        interval = "" if low is None else f" (95 % interval {low:+.1f} to {high:+.1f})"
        print(f"  it is {difference['mean']:+.1f} {unit} longer on average{interval}")


def show_personal_data(personal: dict) -> None:
    heading("Likely personal data")
    show_counts("pieces", personal["count"])
    for kind, count in sorted(personal["kinds"].items()):
        show_counts(kind, count)
    for item in personal["found"][:10]:
        say(f"{item['origin']}: {item['kind']} {item['masked']}", 4)
    if personal["count"] > 10:
        print(f"  … and {personal['count'] - 10:,} more (--json lists them)")


def show_samples(stage: str, tokenizer, chat, rows, limit: int, count: int) -> None:
    """Print samples of the first row, the last one and those between, with what is learnt in colour.

    Of a long one its beginning and its end are shown.
    """
    from stagekit.fitting import samples_to_show
    from stagekit.records import RowError
    from stagekit.tokenization import Sample, preview

    wanted = sorted({round(place * (len(rows) - 1) / max(1, count - 1)) for place in range(min(count, len(rows)))})
    if not wanted:
        return
    color = sys.stdout.isatty()
    heading(f"Samples; what is learnt is {'green' if color else 'between ⟦ and ⟧'}")

    def part(sample, start, end):
        return preview(tokenizer, Sample(sample.input_ids[start:end], sample.labels[start:end]), color).rstrip("\n")

    for row in (rows[index] for index in wanted):
        try:
            samples = samples_to_show(stage, tokenizer, chat, row.record, limit)
        except RowError:  # told among the rows that cannot be read
            continue
        for name, sample in samples:
            length = len(sample.input_ids)
            print(clip(f"--- {name} of {length:,} tokens, {row.origin}", COLUMNS))
            if length <= HEAD + TAIL:
                print(part(sample, 0, length))
            else:
                print(part(sample, 0, HEAD), f"[… {length - HEAD - TAIL:,} tokens …]", part(sample, -TAIL, length))


def show_verdict(report: dict) -> None:
    """Print the limits that were passed, and last of all the verdict."""
    print()
    for item in report["limits_passed"]:
        print(f"limit passed: --{item['flag']} {item['limit']:g}, found {item['found']:g}")
    findings = report["findings"]
    if not findings:
        print("nothing to mend")
        return
    things = "1 thing" if len(findings) == 1 else f"{len(findings)} things"
    text = f"{things} to look at: {'; '.join(findings)}"
    print(textwrap.fill(text, COLUMNS, subsequent_indent="  ", break_long_words=False))


def heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}")


def say(text: str, indent: int) -> None:
    """Print a line behind two blanks; what does not fit goes on below, three lines at most."""
    text = " ".join(text.splitlines())
    form = {"initial_indent": "  ", "subsequent_indent": " " * indent, "max_lines": 3, "placeholder": " …"}
    print(textwrap.fill(text, COLUMNS, break_on_hyphens=False, **form))


def beside(origin: str, other: str) -> str:
    """The other origin, for where this one stands before it: its line, if it is in the same file."""
    file, _, line = other.rpartition(":")
    return f"line {line}" if origin.rpartition(":")[0] == file else other


def show_counts(name: str, count: int, whole: int | None = None) -> None:
    share = f"  {100 * count / whole:5.1f} %" if whole else ""
    print(f"  {clip(name, 60):<60}  {count:>14,}{share}")


def clip(text: str, columns: int) -> str:
    """A text in one line of at most so many columns; Chinese characters take two."""
    text = " ".join(text.splitlines())
    ends = list(accumulate(1 + (unicodedata.east_asian_width(char) in "WF") for char in text))
    if not ends or ends[-1] <= columns:
        return text
    return text[: sum(end < columns for end in ends)] + "…"


if __name__ == "__main__":
    run(main, parse_args(), "check_data", "; nothing was written")
