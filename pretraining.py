r"""Stage 1: continued pretraining on running text; the loss is on every token.

Reads   --model_name_or_path   a base model, or the directory of an earlier pretraining run
        --train_file_dir       .txt, .jsonl, .json (also .gz) with {"text": ...}; a file or folder, several with commas
Writes  --output_dir           adapter (or weights), tokenizer, stage.json, curves.png: what the next stage reads

Run it through scripts/run_pt.sh, or:

    python pretraining.py --model_name_or_path Qwen/Qwen3-0.6B-Base --train_file_dir data/pretrain \
        --output_dir outputs/pt --do_train --do_eval
"""

from dataclasses import dataclass, field

from stagekit.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    RunArguments,
    StageTrainingArguments,
    parse_args,
)
from stagekit.data import accept_text
from stagekit.encoding import encode_samples
from stagekit.modeling import add_adapter, load_config, load_model, load_tokenizer, packs_exactly, prepare_for_training
from stagekit.run import check_memory, finish_run, load_data, run_stage, start_run
from stagekit.tokenization import Collator, document_control, encode_document
from stagekit.trainers import LanguageTrainer


@dataclass
class PretrainingArguments:
    """What only this stage asks for."""

    _argument_group_name = "pretraining"

    block_size: int = field(default=1024, metadata={"help": "Length of a packed row, in tokens."})
    packing: bool | None = field(
        default=None,
        metadata={
            "help": "Put several samples into a row, without attention between them. Default: yes where the model can "
            "keep them apart (all with position_ids). False trains the same tokens with padding."
        },
    )

    def __post_init__(self):
        if self.block_size < 8:
            raise ValueError(f"--block_size must be at least 8 tokens, got {self.block_size}")


ARGUMENTS = (ModelArguments, DataArguments, LoraArguments, PretrainingArguments, RunArguments, StageTrainingArguments)


@run_stage
def main():
    model_args, data_args, lora_args, pt_args, run_args, training_args = parse_args(*ARGUMENTS, description=__doc__)
    run = start_run("pt", model_args, lora_args, run_args, training_args, data_args, pt_args)

    tokenizer = load_tokenizer(run.source, model_args)
    config = load_config(run.source, model_args, longest=pt_args.block_size)
    packing = packs_exactly(config, pt_args.packing)
    control = document_control(tokenizer)

    def encode(record):
        return encode_document(control, tokenizer, record.text, pt_args.block_size), 0

    def encode_chunk(rows):
        return encode_samples(rows, encode, pt_args.block_size, packing)

    datasets, _ = load_data(run, data_args, accept_text, encode_chunk, tokenizer, pt_args.block_size, packing)

    check_memory(run, config, model_args, lora_args, pt_args.block_size)
    model = load_model(run.source, model_args, training_args, config)
    model, run.tuning = add_adapter(model, run.source, lora_args, training_args)
    prepare_for_training(model, training_args)
    trainer = LanguageTrainer(
        run,
        model=model,
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        data_collator=Collator.for_model(config, tokenizer, model_args, training_args),
        processing_class=tokenizer,
    )
    finish_run(trainer, run, tokenizer)


if __name__ == "__main__":
    main()
