r"""Merge a chain of adapters into its base: one model that stands alone, proven to be the same model.

Reads   --lora_model   directory of the last stage; base, earlier adapters, tokenizer and template are found through it
Writes  --output_dir   safetensors shards, config, tokenizer with its chat template, generation settings (or the score
                       head of a reward model), stage.json, seen_prompts.npy, and sha256sums.txt for `sha256sum -c`

    python -m tools.merge_adapter --lora_model outputs/sft --output_dir outputs/sft-merged

The sum is computed in fp32 and rounded once, at the end. Then the directory is loaded as any other program would load
it and compared with base and adapter apart, on questions with their greedy answers; a merge that is not exact leaves
nothing behind and ends with exit code 2. What was trained on a 4-bit or 8-bit base goes into the original weights.

Memory: 4 bytes a weight, and a few GB more with a large vocabulary (7 billion weights: about 37 GB). Disk: the new
weights, beside what stands there. Both are predicted, and compared with what there is, before anything is loaded.
"""

import argparse
import logging
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

from stagekit.commandline import SHARD_SIZE, Parser, add_shard_flag, add_switch, check_flags, choose_gpus, run
from template import get_template

logger = logging.getLogger(__name__)

PROGRAM = "python -m tools.merge_adapter"
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Questions whose answers are compared; the written answers are what a reward model scores.
PROBES = (
    (
        "感冒三天了，鼻涕变黄，要不要吃抗生素？",
        "多数感冒由病毒引起，抗生素没有用。多休息、多喝水；超过十天不好或高烧时请就医。",
    ),
    ("高血压患者平时饮食要注意什么？", "少盐，多吃蔬菜水果，限酒，控制体重，并按医嘱服药和测量血压。"),
    ("孩子发烧到三十九度怎么办？", "让他多喝水、少穿一些，按体重使用退烧药；精神差、抽搐或持续不退要马上去医院。"),
    ("什么是糖尿病？", "不知道。"),
    ("What is a fever, and when should I see a doctor?", "A raised body temperature. See a doctor if it lasts."),
    ("I have had chest pain for an hour. What should I do?", "Call the emergency number now and sit down quietly."),
    ("How does a vaccine work?", "It shows the immune system a harmless part of a germ, so that it is prepared."),
    ("List three ways to sleep better.", "Tools are arguments."),
)
ANSWER_TOKENS = 24  # greedy continuation of a probe
# Limits. The sum W + s·BA rounds every weight once in fp32, and W·x + s·B(Ax) is another order of the same sums. On
# models of 2 to 24 layers, 64 to 2048 wide, that changes logits 0.5 to 1.7 times as much as moving every weight at
# random to a neighbouring number does (7 times where one weight is 100,000): about 1e-6 of their size. Rounding to 16
# bits is measured the same way.
OF_ARITHMETIC = 20  # times what random rounding in fp32 changes
OF_ROUNDING = 4  # times what random rounding to the written type changes
OF_TRAINING = 0.1  # of what training changed may be lost to rounding


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; nothing heavy is imported for that."""
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--lora_model", required=True, help="adapter directory, such as outputs/sft")
    parser.add_argument("--base_model", help="its base, where that is not where the adapter says")
    parser.add_argument("--output_dir", required=True, help="where the merged model goes")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as the base has them")
    add_shard_flag(parser)
    parser.add_argument("--tokenizer_path", help="tokenizer, if not the one saved with the adapter")
    parser.add_argument("--template_name", help="prompt template of template.py for a tokenizer that brings none")
    add_switch(parser, "--resize_emb", "add embedding rows when the tokenizer has more tokens than the base")
    add_switch(parser, "--overwrite_output_dir", "replace what --output_dir holds, once the merge has succeeded")
    add_switch(parser, "--only_cpu", "use no GPU; without it one GPU is used when its memory is large enough")
    parser.add_argument("--gpus", help='the GPU to use, such as "1"')
    args = parser.parse_args(argv)
    check_flags(args, parser, ())
    if args.template_name:
        try:
            get_template(args.template_name)
        except ValueError as error:
            parser.error(str(error))
    return args


def main(args: argparse.Namespace) -> None:
    """Load the chain, note what it says, merge, write, load what was written, compare."""
    started = time.monotonic()
    choose_gpus(args.only_cpu, args.gpus)
    from stagekit.export import check_target, export_record, finish, size_text, staged, weight_bytes
    from stagekit.memory import used_bytes
    from stagekit.modeling import merge_into_base

    source = find_chain(args.base_model, args.lora_model)
    check_target(args.output_dir, args.overwrite_output_dir, source)
    plan = plan_merge(args, source)
    tokenizer, chat = load_text_side(args, source, plan)
    model = load_chain(args, source, plan, tokenizer)
    rows = probe_rows(model, source, plan, tokenizer, chat)
    apart = outputs(model, rows, "base and adapter")
    with model.disable_adapter():
        effect = difference(apart, outputs(model, rows, "base alone"))
    model = merge_into_base(model, progressbar=True)
    exact = outputs(model, rows, "merged")
    with staged(args.output_dir) as directory:
        tensors, rounded = round_weights(model, plan.dtype)
        save(model, directory, source, plan, tokenizer, chat, args.max_shard_size or SHARD_SIZE)
        del model
        model = reload(directory, plan, tensors)
        merged = outputs(model, rows, "reloaded")
        noise = measure_noise(model, rows, merged, rounded, plan.dtype)
        del model
        check = merge_is_exact(apart, exact, merged, effect, noise, plan.dtype)
        logger.info("check merge_is_exact: passed (%s; limit: %s)", check["value"], check["limit"])
        tuning = {
            "method": "merged",
            "adapters": [merged_from(path, args.output_dir) for path in (*source.merged, source.adapter)],
            "dtype": str(plan.dtype).removeprefix("torch."),
        }
        if plan.quantised:
            tuning["trained_on"] = say_quantised(source, plan, rows, merged)
        record = export_record(
            *("merge", PROGRAM, source, args),
            tuning=tuning,
            checks={"merge_is_exact": check},
            metrics=(source.stage or {}).get("metrics", {}),  # of the chain, which this model is
            device=plan.device,
        )
        measured = used_bytes(plan.device == "cpu", peak=True) - plan.bytes_before
        record["memory"] = {"predicted_bytes": plan.memory_bytes, "measured_bytes": measured}
        finish(directory, source, {**record, "seconds": round(time.monotonic() - started, 1)})
    size = size_text(weight_bytes(args.output_dir))
    logger.info("saved: %s (%s, %s; sha256sum -c sha256sums.txt)", args.output_dir, size, tuning["dtype"])


# -- before anything large is loaded ---------------------------------------------------------------------------------


@dataclass
class Plan:
    """What will be done.

    Attributes:
        config: of the base, for the model that is written.
        scores: it is a reward model.
        dtype: torch.dtype of the written weights.
        device: "cpu" or the accelerator's kind.
        memory_bytes, bytes_before: predicted peak of the merge; what the process held before it.
        quantised: "load_in_4bit" or "load_in_8bit" where the last adapter was trained on such a base, else None.
    """

    config: object
    scores: bool
    dtype: object
    device: str
    memory_bytes: int
    bytes_before: int
    quantised: str | None


def find_chain(base_model: str | None, lora_model: str):
    """Find base and adapters behind the flags.

    Raises:
        ValueError: there is no adapter, or not on this base.
        FileNotFoundError: a directory that does not exist.
    """
    from stagekit.checkpoint import check_base, resolve

    source = resolve(base_model, lora_model) if base_model else resolve(lora_model)
    if not source.adapter:
        raise ValueError(f"--lora_model {lora_model} holds no adapter: its weights stand alone already")
    check_base(source)
    return source


def plan_merge(args, source) -> Plan:
    """Choose type and device, and predict memory and disk.

    Raises:
        ValueError: the base is quantised, or memory or disk are too small.
    """
    import torch

    from stagekit.export import check_room, size_text
    from stagekit.generation import model_arguments
    from stagekit.memory import available_bytes, count_parameters, used_bytes
    from stagekit.modeling import inference_device, is_reward_model, load_config, model_class

    scores = is_reward_model(source, None)
    config = load_config(source, model_arguments(source), scores=scores)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{source.base} holds quantised weights, into which an update cannot be merged exactly; name the original "
            "16-bit or 32-bit model with --base_model"
        )
    stored = getattr(config, "dtype", None) or torch.float32
    dtype = stored if args.dtype == "auto" else args.dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    device, needed = inference_device(args.only_cpu)[0], 0
    if scores:
        config.num_labels = 1
    if model_class(config, scores) is not None:
        weights = count_parameters(config, model_class(config, scores))[0]
        check_room(args.output_dir, int(1.02 * weights * dtype.itemsize) + 2**25)  # and its tokenizer
        vocabulary = config.get_text_config().vocab_size
        logits = 0 if scores else 4 * len(PROBES) * 100 * vocabulary * 4  # four sets of them are held
        needed = 4 * weights + 8 * vocabulary * config.get_text_config().hidden_size + logits
        if device != "cpu" and needed > available_bytes(use_cpu=False):
            logger.info("the GPU is too small for %s of fp32 weights: merging on the CPU", size_text(needed))
            device = "cpu"
        if needed > available_bytes(use_cpu=True):  # weights come through main memory in any case
            raise ValueError(
                f"merging in fp32 needs {size_text(needed)} of memory and {size_text(available_bytes(True))} are "
                "available; use a machine with more"
            )
        logger.info("%.4g million weights, predicted peak %s on %s", weights / 1e6, size_text(needed), device)
    stage = source.stage or {}
    given, method = stage.get("arguments", {}), stage.get("tuning", {}).get("method")
    quantised = "load_in_8bit" if given.get("load_in_8bit") else "load_in_4bit" if method == "qlora" else None
    return Plan(config, scores, dtype, device, needed, used_bytes(device == "cpu", peak=False), quantised)


def load_text_side(args, source, plan):
    """(tokenizer, Chat); no Chat where there is no template and none was named."""
    from stagekit.generation import model_arguments
    from stagekit.modeling import load_tokenizer, prepare_to_score
    from stagekit.pairs import padding_id
    from stagekit.tokenization import prepare_chat

    tokenizer = load_tokenizer(source, model_arguments(source, tokenizer_name_or_path=args.tokenizer_path))
    chat = None
    if tokenizer.chat_template or args.template_name or plan.scores:
        chat = prepare_chat(tokenizer, args.template_name)
    if plan.scores:  # padded as it was trained: a token that ends no answer
        tokenizer.pad_token_id = padding_id(tokenizer, chat.stop_ids)
        prepare_to_score(plan.config, tokenizer.pad_token_id)
    return tokenizer, chat


# -- the models ------------------------------------------------------------------------------------------------------


def load_chain(args, source, plan, tokenizer):
    """The base in fp32 with earlier adapters merged into it and the last one on top, in eval mode.

    Raises:
        ValueError: weights that do not belong together.
    """
    from transformers import GenerationConfig

    from stagekit.generation import fit_embeddings, model_arguments, put_adapter
    from stagekit.modeling import load_model

    names = [os.path.basename(os.path.normpath(path)) for path in (*source.merged, source.adapter)]
    logger.info("base %s, adapter %s", source.base, " + ".join(names))
    settings = SimpleNamespace(bf16=False, fp16=False, use_cpu=plan.device == "cpu", deepspeed=None)
    model = load_model(source, model_arguments(source, dtype="float32"), settings, plan.config, scores=plan.scores)
    if not plan.scores:
        model.generation_config = GenerationConfig()  # generate() fills what a call leaves open from here: nothing
    fit_embeddings(model, tokenizer, args.resize_emb)
    model = put_adapter(model, source)
    return model.to(plan.device).eval()


def round_weights(model, dtype) -> tuple[dict[str, int], set[str]]:
    """Round every parameter, in place.

    Returns:
        (checksums, rounded): CRC-32 of each parameter's bytes; names of those that rounding changed.

    Raises:
        ValueError: a weight is too large for the type.
    """
    import torch

    rounded = set()
    for name, parameter in model.named_parameters():
        exact, parameter.data = parameter.data, parameter.data.to(dtype)
        if not torch.isfinite(parameter.data).all():
            raise ValueError(
                f"{name} holds {exact.abs().max().item():.3g}, which {dtype} cannot; use --dtype bfloat16 or float32"
            )
        if not torch.equal(parameter.data.float(), exact):
            rounded.add(name)
    return parameter_checksums(model, dtype), rounded


def parameter_checksums(model, dtype) -> dict[str, int]:
    """{name: CRC-32 of its bytes} of all parameters, shared ones under each of their names."""
    from stagekit.export import tensor_checksums

    parameters = model.named_parameters(remove_duplicate=False)
    return tensor_checksums((name, parameter.detach().to(dtype)) for name, parameter in parameters)


def save(model, directory, source, plan, tokenizer, chat, max_shard_size) -> None:
    """Write weights, config, tokenizer, and what tells where an answer ends."""
    from transformers import GenerationConfig

    from stagekit.modeling import generation_settings

    if not plan.scores:
        if Path(source.adapter, "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source.adapter)
        else:
            model.generation_config = generation_settings(
                chat.stop_ids if chat else [tokenizer.eos_token_id], tokenizer
            )
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)


def reload(directory, plan, tensors: dict[str, int]):
    """Load the written directory as any program would, compare its tensors, and return it in fp32, in eval mode.

    Raises:
        CheckError: a tensor is missing, new or other than the one that was written.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from stagekit.checks import CheckError

    auto = AutoModelForSequenceClassification if plan.scores else AutoModelForCausalLM
    model = auto.from_pretrained(directory, dtype=plan.dtype)
    found = parameter_checksums(model, plan.dtype)
    other = sorted(name for name in {*found, *tensors} if found.get(name) != tensors.get(name))
    if other:
        raise CheckError(
            f"check merge_is_exact failed: {len(other)} of {len(tensors)} tensors are not the ones that were written, "
            f"e.g. {other[0]}"
        )
    return model.float().to(plan.device).eval()


def measure_noise(model, rows, merged: list, rounded: set[str], dtype) -> tuple[float, float]:
    """How much outputs change when weights round otherwise: in fp32, and to the type they are written in.

    The weights of the model are lost.

    Args:
        model, rows, merged: the reloaded model, the probes, and its outputs on them.
        rounded: names of the parameters that rounding to `dtype` changed.
    """
    import torch

    add_rounding_noise(model, {name for name, _ in model.named_parameters()}, torch.float32)
    arithmetic = difference(merged, outputs(model, rows, "rounded otherwise in fp32")).largest
    if not rounded:
        return arithmetic, 0.0
    add_rounding_noise(model, rounded, dtype)
    return arithmetic, difference(merged, outputs(model, rows, "rounded otherwise to 16 bits")).largest


def add_rounding_noise(model, names: set[str], dtype) -> None:
    """Move fp32 weights, in place, to random others that round to the same: by up to half a unit in the last place.

    In fp32 itself, where there is nothing between two numbers: to a neighbour, down or up, or not at all.
    """
    import torch

    kind, width = torch.finfo(dtype), 2 if dtype == torch.float32 else 1
    for name, parameter in model.named_parameters():
        if name not in names:
            continue
        generator = torch.Generator(parameter.device).manual_seed(0)
        for part in parameter.data.view(-1).split(1 << 22):
            size = part.abs().clamp_(min=kind.smallest_normal)  # below it numbers stand at even distances
            _, exponent = torch.frexp(size)  # size = m·2^exponent, ½ ≤ m < 1
            unit = torch.ldexp(torch.full_like(size, kind.eps), exponent - 1)
            chance = torch.rand(part.shape, generator=generator, device=part.device) - 0.5
            part += width * unit * chance


# -- the comparison --------------------------------------------------------------------------------------------------


def probe_rows(model, source, plan, tokenizer, chat) -> list[list[int]]:
    """Token ids on which the models are compared.

    Questions in both languages as inference sends them, with the chain's greedy answers; for a reward model with given
    answers up to the end of the turn; without a template the texts alone.
    """
    from stagekit.generation import LoadedModel, Settings, generate_batch
    from stagekit.pairs import encode_answers
    from stagekit.tokenization import encode_prompt

    limit = getattr(plan.config.get_text_config(), "max_position_embeddings", None) or 2048

    def said(role, content):
        return [{"role": role, "content": content}]

    if plan.scores:
        answers = [(said("user", question), [said("assistant", answer)]) for question, answer in PROBES]
        return [encode_answers(chat, prompt, said, None, limit)[0][0].input_ids for prompt, said in answers]
    if chat is None:
        texts = [f"{question} {answer}" for question, answer in PROBES]
        return [tokenizer(text, add_special_tokens=False)["input_ids"][:limit] for text in texts]
    prompts = [encode_prompt(chat, said("user", question))[-limit // 2 :] for question, _ in PROBES]
    loaded = LoadedModel(model, chat, source, limit, chat.stop_ids, model.generation_config)
    answers = generate_batch(loaded, prompts, Settings(min(ANSWER_TOKENS, limit // 2), 0.0, 1.0, 1.0, 0))
    texts = [tokenizer(answer.text, add_special_tokens=False)["input_ids"] for answer in answers]
    return [(prompt + text)[:limit] for prompt, text in zip(prompts, texts, strict=True)]


def outputs(model, rows: list[list[int]], title: str) -> list:
    """Logits (seq_len, vocabulary), or scores (1,), of each row alone; in fp32 on the CPU."""
    import torch
    from tqdm import tqdm

    found = []
    with torch.no_grad():
        for ids in tqdm(rows, desc=f"probes: {title}", leave=False):
            tensor = torch.tensor([ids], device=model.device)
            logits = model(input_ids=tensor, attention_mask=torch.ones_like(tensor), use_cache=False).logits
            found.append(logits[0].float().cpu())
    return found


@dataclass(frozen=True)
class Difference:
    """How two sets of outputs differ.

    Attributes:
        largest: absolute difference of logits or scores.
        kl_mean, kl_max: KL divergence of the second from the first, in nats a token; None for scores.
        same_top: at how many of all `positions` the likeliest token is the same.
    """

    largest: float
    kl_mean: float | None
    kl_max: float | None
    same_top: int
    positions: int


def difference(reference: list, other: list) -> Difference:
    """Compare outputs row by row; what is no number counts as infinitely far."""
    import torch

    def far(value):
        return torch.nan_to_num(value, nan=math.inf)

    def gap(a, b):  # some models never give tokens that only fill the vocabulary up: -inf on both sides
        return (a - b).masked_fill(a == b, 0.0)

    largest = max(far(gap(a, b).abs()).max().item() for a, b in zip(reference, other, strict=True))
    if reference[0].dim() == 1:
        return Difference(largest, None, None, 0, 0)
    divergences, same = [], 0
    for a, b in zip(reference, other, strict=True):
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        divergences.append(far((p.exp() * gap(p, q)).sum(-1)))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    kl = torch.cat(divergences)
    return Difference(largest, max(0.0, kl.mean().item()), max(0.0, kl.max().item()), same, len(kl))


def merge_is_exact(
    apart: list, exact: list, merged: list, effect: Difference, noise: tuple[float, float], dtype
) -> dict:
    """Compare the merged model with base and adapter apart; return the outcome for stage.json.

    Args:
        apart, exact, merged: outputs of base and adapter, of the sum in fp32, and of the reloaded directory.
        effect: what the adapter changes on its base.
        noise: what measure_noise returned.
        dtype: torch.dtype of the written weights.

    Raises:
        CheckError: it is another model, or rounding lost too much of what training changed.
    """
    from stagekit.checks import CheckError

    kind = str(dtype).removeprefix("torch.")
    (arithmetic, rounding), before, found = noise, difference(apart, exact), difference(apart, merged)
    limits = OF_ARITHMETIC * arithmetic, OF_ARITHMETIC * arithmetic + OF_ROUNDING * rounding
    for when, largest, limit in (("in fp32", before.largest, limits[0]), (f"in {kind}", found.largest, limits[1])):
        if not (math.isfinite(largest) and largest <= limit):
            raise CheckError(
                f"check merge_is_exact failed: merged {when}, outputs differ by {largest:.3g} from those of base and "
                f"adapter apart (limit {limit:.2g}); nothing is left in --output_dir"
            )
    scores = found.kl_mean is None
    lost, change = (found.largest, spread(apart)) if scores else (found.kl_mean, effect.kl_mean)
    if rounding and not lost <= OF_TRAINING * change:
        what, of = ("scores", "those of the probes differ by") if scores else ("nats a token", "training moved it by")
        raise CheckError(
            f"check merge_is_exact failed: rounding to {kind} moves the model by {lost:.2g} {what}, and {of} "
            f"{change:.2g} only: too much is lost; use --dtype float32"
        )
    if effect.largest <= limits[0]:
        logger.warning("the adapter changes nothing on the probes: the merged model is its base")
    value = f"outputs differ by {before.largest:.1g} in fp32 and {found.largest:.1g} reloaded in {kind}"
    if not scores:
        value += f", KL {found.kl_mean:.1g} nats a token, at most {found.kl_max:.1g}, where training changed "
        value += f"{change:.2g}; likeliest token the same at {found.same_top} of {found.positions} places"
    limit = f"{limits[0]:.1g}, {OF_ARITHMETIC} times what another rounding in fp32 changes"
    if rounding:
        limit += f"; {limits[1]:.1g} with {OF_ROUNDING} times what another rounding to {kind} does"
    return {"passed": True, "value": value, "limit": limit, **asdict(found)}


def spread(scores: list) -> float:
    """Range of the scores of the probes."""
    values = [row.item() for row in scores]
    return max(values) - min(values)


def say_quantised(source, plan, rows, merged) -> dict:
    """Say that the merge is into other weights than training saw, and measure what that changes.

    Returns:
        what stage.json keeps: the kind of base, and how far its answers are from the merged ones, where that is known.
    """
    from peft import PeftModel

    from stagekit.generation import model_arguments
    from stagekit.modeling import load_config, load_model

    bits = "4-bit" if plan.quantised == "load_in_4bit" else "8-bit"
    logger.warning(
        "trained on a %s base: the adapter is merged into the original weights, which it was not trained on, so "
        "answers differ slightly from those of inference.py --%s True",
        bits,
        plan.quantised,
    )
    try:
        options = {plan.quantised: True, "dtype": "bfloat16" if plan.scores else "float32"}
        config = load_config(source, model_arguments(source), scores=plan.scores)
        if plan.scores:
            config.num_labels, config.get_text_config().pad_token_id = 1, plan.config.get_text_config().pad_token_id
        settings = SimpleNamespace(bf16=False, fp16=False, use_cpu=plan.device == "cpu", deepspeed=None)
        model = load_model(source, model_arguments(source, **options), settings, config, scores=plan.scores)
        model = PeftModel.from_pretrained(model, source.adapter).eval()
        found = difference(outputs(model, rows, f"{bits} base and adapter"), merged)
    except (ImportError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        logger.warning("how much they differ could not be measured here (%s)", reason)
        return {"base": bits}
    if found.kl_mean is None:
        logger.info("scores on the probes differ from the %s ones by up to %.3g", bits, found.largest)
        return {"base": bits, "largest_difference": found.largest}
    logger.info(
        "from %s base and adapter to the merged model: KL %.3g nats a token, at most %.3g; likeliest token the same "
        "at %d of %d places",
        *(bits, found.kl_mean, found.kl_max, found.same_top, found.positions),
    )
    return {"base": bits, "kl_mean": found.kl_mean, "kl_max": found.kl_max}


# -- the record ------------------------------------------------------------------------------------------------------


def merged_from(directory: str, output_dir: str) -> dict:
    """Where an adapter stands, and its fingerprint."""
    from stagekit.checkpoint import DELIVERED, directory_files, fingerprint, relative

    return {"path": relative(directory, output_dir), "fingerprint": fingerprint(directory_files(directory, DELIVERED))}


if __name__ == "__main__":
    run(main, parse_args(), PROGRAM, "; nothing was written to --output_dir")
