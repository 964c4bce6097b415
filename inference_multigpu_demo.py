"""Answer a file of questions on several GPUs at once, one process and one whole model on each.

Reads and writes what inference.py does, in the same order; with --temperature 0 on the CPU to the byte (16-bit GPUs
round by the questions that share a batch). Questions are dealt out by length, so that all processes have about as much
to do. Each keeps a journal, OUTPUT_FILE.partial.0, .1, …; the same command goes on from them after an interruption,
also with another number of processes. One process works too, without torchrun.

    torchrun --nproc_per_node 2 inference_multigpu_demo.py --lora_model outputs/sft \\
        --data_file data/eval/questions.jsonl --output_file predictions.jsonl

The processes meet once, when all have read the journals and none has begun. From then on they speak through the
journals alone: process 0 reads along until every question is answered somewhere, and writes the output file. A
collective at the end would have to wait as long as the slowest process works, and no timeout is right for that. On
several machines OUTPUT_FILE must lie in a directory they share.
"""

import argparse
import logging
import os
import re
import time
from collections.abc import Container
from pathlib import Path

from stagekit.commandline import (
    Parser,
    add_generation_flags,
    add_model_flags,
    add_prediction_flags,
    check_prediction_flags,
    choose_gpus,
    loading_options,
    run,
    sampling_options,
)
from template import get_template

logger = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; nothing heavy is imported for that."""
    parser = Parser("inference_multigpu_demo.py", __doc__)
    model = parser.add_argument_group("model (--base_model or --lora_model is enough)")
    add_model_flags(model, gpus="each process uses one")
    add_prediction_flags(parser.add_argument_group("task"))
    add_generation_flags(
        parser.add_argument_group("generation (default: the checkpoint's generation_config.json, else as named here)"),
        temperature="0, the default, takes the likeliest token",
    )
    args = parser.parse_args(argv)
    check_prediction_flags(args, parser)
    if not args.data_file:
        parser.error("--data_file is missing: name a file or directory of questions")
    return args


def main(args: argparse.Namespace) -> None:
    """Read the questions, answer this process's share of them; process 0 then writes all answers."""
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if rank:
        logging.getLogger("stagekit").setLevel(logging.WARNING)
    if args.template_name:
        get_template(args.template_name)
    from stagekit import prediction

    prompts = prediction.read_prompts(args.data_file, args.system_prompt)
    choose_own_gpu(args.only_cpu, args.gpus)
    from stagekit import generation

    source = generation.find_source(args.base_model, args.lora_model)
    chat = generation.load_chat(source, args.tokenizer_path, args.template_name)
    header = prediction.describe_run(args, source, chat, prompts)
    journal = prediction.open_journal(args.output_file, header, f".{rank}")
    gathered = Gathered(args.output_file, header)
    gathered.read()
    if processes > 1:
        meet()
    waiting = deal_out(prompts, gathered.rows, processes)[rank]
    num_shortened = 0
    if waiting:
        loaded = generation.load_for_generation(source, chat, **loading_options(args))
        chosen = {**sampling_options(args), "temperature": args.temperature or 0.0}
        settings = generation.choose_settings(loaded, **chosen)
        num_shortened = prediction.answer_prompts(
            loaded, settings, prompts, waiting, journal, args.batch_size, total=None if rank else len(waiting)
        )
    journal.close()
    if rank == 0:
        gathered.wait_for(len(prompts))
        gathered.write()
        prediction.report(args.output_file, gathered.rows, num_shortened=0)
    if num_shortened:
        logger.info("process %d: %d asked without their oldest exchanges", rank, num_shortened)


def choose_own_gpu(only_cpu: bool, gpus: str | None) -> None:
    """Let this process see one GPU: of those that were given, the one of its number on this machine.

    Raises:
        ValueError: there are fewer GPUs than processes.
    """
    choose_gpus(only_cpu, gpus)
    import torch

    count = torch.cuda.device_count()  # asks the driver and starts nothing: the variable still counts afterwards
    if count == 0:
        return
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")[:count]
    here, number = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if here > count:
        raise ValueError(
            f"{here} processes on this machine, but {count} GPU{'s' * (count > 1)}; --nproc_per_node {count}, or "
            "--only_cpu"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = names[number]


def meet() -> None:
    """Wait for the other processes, which are about to read the same files: torch's default of 30 minutes is ample."""
    from torch import distributed

    distributed.init_process_group("gloo")
    distributed.barrier()
    distributed.destroy_process_group()  # nothing is left that could time out while they work


def deal_out(prompts: list, answered: Container[int], processes: int) -> list[list[int]]:
    """Give each process every n-th of the questions that are not answered, in the order of their lengths.

    Lengths are in characters: for tokens each process would have to tokenise the questions of all.
    """

    def length(index):
        return sum(len(message["content"]) for message in prompts[index].messages)

    waiting = [index for index in range(len(prompts)) if index not in answered]
    waiting.sort(key=length, reverse=True)
    return [waiting[rank::processes] for rank in range(processes)]


class Gathered:
    """What all processes have answered so far, of this run and of interrupted ones.

    Attributes:
        rows: answers by the places of their questions.
    """

    def __init__(self, output_file: str, header: dict):
        self.output_file, self.header, self.rows = Path(output_file), header, {}
        self.read_up_to: dict[Path, int] = {}
        self.launcher = os.getppid()

    def journals(self) -> list[Path]:
        """The journals of all processes, and that of an inference.py that was asked the same."""
        name = re.compile(re.escape(self.output_file.name) + r"\.partial(\.\d+)?")
        return sorted(path for path in self.output_file.absolute().parent.iterdir() if name.fullmatch(path.name))

    def read(self) -> None:
        """Read what the journals have gained.

        Raises:
            ValueError: one is of a run with other questions, model or settings.
        """
        from stagekit.journal import check_header, read_lines

        for path in self.journals():
            start = self.read_up_to.get(path, 0)
            lines, end = read_lines(path, start)
            if start == 0:
                if len(lines) < 2:  # no answer: its process, now or later, may write the header anew
                    continue
                check_header(path, lines.pop(0), self.header)
            self.read_up_to[path] = end
            self.rows.update((row["index"], row) for row in lines)

    def wait_for(self, count: int) -> None:
        """Wait until so many questions are answered.

        Raises:
            ValueError: torchrun, which would end this process if another failed, is gone.
        """
        from tqdm import tqdm

        self.read()
        if len(self.rows) == count:
            return
        with tqdm(total=count, unit="question", desc="all processes") as progress:
            while len(self.rows) < count:
                progress.update(len(self.rows) - progress.n)
                if os.getppid() != self.launcher:
                    raise ValueError("torchrun is gone; the same command goes on from what is answered")
                time.sleep(0.2)
                self.read()

    def write(self) -> None:
        """Write all answers in the order of the questions; the journals are not needed any more."""
        from stagekit.journal import write_lines

        write_lines(self.output_file, [self.rows[index] for index in sorted(self.rows)])
        for path in self.journals():
            path.unlink()


if __name__ == "__main__":
    run(main, parse_args(), "inference_multigpu_demo.py", "; the same command goes on from what is answered")
