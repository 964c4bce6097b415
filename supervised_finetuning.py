r"""Stage 2: supervised fine-tuning on conversations; the loss is on the answers and the token that ends them.

Reads   --model_name_or_path   a base model, or the directory of the pretraining stage
        --train_file_dir       conversations (ShareGPT, OpenAI, Alpaca, question/answer, tools); README lists the forms
Writes  --output_dir           adapter (or weights), tokenizer with chat template, stage.json: all inference.py needs

Run it through scripts/run_sft.sh, or:

    python supervised_finetuning.py --model_name_or_path outputs/pt --train_file_dir data/finetune \
        --output_dir outputs/sft --do_train --do_eval

--preview 3 prints three samples with the learnt tokens in colour, and the account of every row, and trains nothing.
"""

from dataclasses import dataclass, field

from stagekit import checks
from stagekit.arguments import (
    AnswerArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    PromptArguments,
    RunArguments,
    StageTrainingArguments,
    parse_args,
)
from stagekit.data import accept_conversation
from stagekit.encoding import encode_samples
from stagekit.modeling import add_adapter, load_config, load_model, load_tokenizer, packs_exactly, prepare_for_training
from stagekit.run import check_memory, finish_run, load_data, plan_questions, print_preview, run_stage, start_run
from stagekit.tokenization import Collator, encode_conversation, prepare_chat
from stagekit.trainers import LanguageTrainer


@dataclass
class SFTArguments:
    """What only this stage asks for."""

    _argument_group_name = "fine-tuning"

    max_length: int = field(
        default=1024,
        metadata={
            "help": "Longest sample, prompt and answer, in tokens. Longer conversations are split at turn borders."
        },
    )
    packing: bool | None = field(
        default=None,
        metadata={
            "help": "Put several samples into a row, without attention between them. Default: yes where the model can "
            "keep them apart (all with position_ids). False trains the same tokens with padding."
        },
    )
    train_on_inputs: bool = field(default=False, metadata={"help": "Learn the prompts as well as the answers."})
    neft_alpha: float | None = field(
        default=None, metadata={"help": "Noise on the embeddings while training (NEFTune, arXiv:2310.05914), e.g. 5."}
    )
    preview: int | None = field(
        default=None, metadata={"help": "Print this many samples, learnt tokens in colour, and exit without training."}
    )

    def __post_init__(self):
        if self.max_length < 16:
            raise ValueError(f"--max_length must be at least 16 tokens, got {self.max_length}")


ARGUMENTS = (
    ModelArguments,
    DataArguments,
    PromptArguments,
    LoraArguments,
    SFTArguments,
    AnswerArguments,
    RunArguments,
    StageTrainingArguments,
)


@run_stage
def main():
    parsed = parse_args(*ARGUMENTS, description=__doc__)
    model_args, data_args, prompt_args, lora_args, sft_args, answer_args, run_args, training_args = parsed
    training_args.neftune_noise_alpha = sft_args.neft_alpha or training_args.neftune_noise_alpha
    training_args.do_train = training_args.do_train and not sft_args.preview
    own = (data_args, prompt_args, sft_args, answer_args)
    run = start_run("sft", model_args, lora_args, run_args, training_args, *own)

    tokenizer = load_tokenizer(run.source, model_args)
    run.chat = chat = prepare_chat(tokenizer, prompt_args.template_name)
    plan_questions(run, answer_args, sft_args.max_length // 2, sft_args.max_length // 2)
    config = load_config(run.source, model_args, longest=sft_args.max_length)
    packing = packs_exactly(config, sft_args.packing)

    def encode(record):
        return encode_conversation(chat, record, sft_args.max_length, sft_args.train_on_inputs)

    def encode_chunk(rows):
        return encode_samples(rows, encode, sft_args.max_length, packing)

    settings = (sft_args.max_length, packing, sft_args.train_on_inputs)
    datasets, probes = load_data(run, data_args, accept_conversation, encode_chunk, tokenizer, *settings)
    run.checks.run("loss_mask", checks.loss_mask, chat, probes, sft_args.train_on_inputs)
    run.checks.run("template_parity", checks.template_parity, chat, probes)
    run.checks.run("no_forged_turns", checks.no_forged_turns, chat)
    if sft_args.preview:
        return print_preview(chat, probes, sft_args.preview)

    check_memory(run, config, model_args, lora_args, sft_args.max_length)
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
