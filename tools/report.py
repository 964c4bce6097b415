r"""Write one page about all stages below a directory: what did PT, SFT, RM, PPO, DPO, ORPO, GRPO each bring?

Reads   DIRECTORY/**/stage.json   of every stage, at any depth; beside it, as far as they are there
          trainer_state.json       the course of its training
          samples.jsonl            answers of PPO and GRPO while training
          eval/                    what eval_benchmark.py wrote; a base model's results may stand anywhere below
Writes  DIRECTORY/report.html      one page that needs nothing else, in English and Chinese, light and dark
        DIRECTORY/report.json      the same facts for machines

    python -m tools.report outputs

Differences between stages are claimed only where 95 % intervals do not overlap.
"""

import argparse
import json
from pathlib import Path

from stagekit.commandline import Parser, command_line, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser("report", __doc__)
    parser.add_argument("directory", help="where the stages wrote, such as outputs")
    parser.add_argument(
        "--output", metavar="FILE", help="the page, default DIRECTORY/report.html; .json stands beside it"
    )
    parser.add_argument(
        "--language", choices=["zh", "en", "auto"], default="auto", help="shown first; default: the browser's language"
    )
    parser.add_argument("--questions", type=int, default=5, help="questions whose answers are shown, default 5")
    args = parser.parse_args(argv)
    if args.questions < 0:
        parser.error(f"--questions {args.questions} must be 0 or more")
    args.output = Path(args.output or Path(args.directory, "report.html"))
    if args.output.suffix not in (".html", ".htm"):
        parser.error(f"--output {args.output} must end in .html")
    return args


def main(args: argparse.Namespace) -> None:
    """Collect, judge, write."""
    from stagekit.journal import write_whole
    from stagekit.report import collect
    from stagekit.report_findings import judge
    from stagekit.report_page import render

    facts = judge(collect(args.directory, args.questions))
    json_path = args.output.with_suffix(".json")
    page = render(facts, args.language, command_line("python -m tools.report"), json_path.name)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(json_path, json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(args.output, page)
    for finding in facts["findings"]:
        print(finding["en"])
    print(f"saved: {args.output} ({len(page.encode()) / 1024:.0f} KiB, {len(facts['stages'])} stages), {json_path}")


if __name__ == "__main__":
    run(main, parse_args(), "report", "; nothing was written")
