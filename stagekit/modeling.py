"""Load tokenizers, models and adapters the way the flags ask, each process on its own device."""

import copy
import inspect
import logging
import os

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.utils import logging as transformers_logging

from stagekit.checkpoint import Source, extended_vocabulary
from stagekit.memory import zero_stage
from template import TEMPLATES

logger = logging.getLogger(__name__)


def fetch_from_modelscope(name: str, revision: str | None, cache_dir: str | None) -> str:
    """Download a model from ModelScope and return its directory.

    Raises:
        ValueError: the package modelscope is not installed.
    """
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ValueError("--model_hub modelscope needs the package modelscope: pip install modelscope") from None
    return snapshot_download(name, revision=revision, cache_dir=cache_dir)


def explain_hub_error(name: str, error: Exception) -> ValueError:
    """One line for a hub that does not answer or does not know the model, with the ways out."""
    known = (
        "no such model there" if "404" in str(error) or "Repository Not Found" in str(error) else "cannot be reached"
    )
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return ValueError(
        f"model {name!r} is not a directory here, and the hub {endpoint} {known}; three ways out: a mirror "
        "(HF_ENDPOINT=https://…), --model_hub modelscope, or a local model (a path, or BASE_MODEL=starter "
        "for the wrappers)"
    )


def load_config(source: Source, model_args, longest: int | None = None, scores: bool = False):
    """Read the model's configuration and apply --rope_scaling.

    Args:
        source: what checkpoint.resolve found.
        model_args: ModelArguments.
        longest: the longest sequence the run will see, in tokens.
        scores: the model will score answers; else it writes them, which a reward model cannot.

    Raises:
        ValueError: a reward model is asked to write, the hub cannot be reached, the directory is no model, or the
            text is longer than the model's positions and --rope_scaling was not asked for.
    """
    try:
        config = AutoConfig.from_pretrained(
            source.base,
            revision=None if os.path.isdir(source.base) else model_args.model_revision,
            cache_dir=model_args.cache_dir,
            trust_remote_code=model_args.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        if not os.path.isdir(source.base):
            raise explain_hub_error(source.base, error) from error
        raise ValueError(f"{source.base}: not a model that transformers can load ({_first_line(error)})") from error
    if not scores and is_reward_model(source, config):
        name = source.directory or source.base
        raise ValueError(f"{name} is a reward model: it scores answers and cannot write any")
    inherited = (source.stage or {}).get("base_model", {})
    for name in STRETCHED:  # an adapter trained on stretched positions needs them ever after
        if (source.adapter or source.merged) and name in inherited:
            setattr(config, name, inherited[name])
    trained = _num_positions(config)
    if model_args.rope_scaling:
        _scale_rope(config, model_args.rope_scaling, longest, trained)
    elif longest and trained and longest > trained:
        raise ValueError(
            f"sequences of {longest} tokens do not fit the model's {trained} positions; shorten them, or stretch the "
            "positions with --rope_scaling yarn"
        )
    return config


STRETCHED = ("rope_parameters", "max_position_embeddings")


def stretched_positions(config) -> dict:
    """What --rope_scaling changed in a configuration, for stage.json; empty when nothing was."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict) or "factor" not in parameters:
        return {}
    return {name: getattr(config, name) for name in STRETCHED}


def _num_positions(config):
    """The longest text a model takes, in tokens, with positions that are stretched already; None without a limit."""
    trained = getattr(config, "max_position_embeddings", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    if not trained or not parameters.get("factor"):
        return trained
    original = trained if parameters["rope_type"] == "dynamic" else parameters.get("original_max_position_embeddings")
    return max(trained, round(original * parameters["factor"])) if original else trained


def _scale_rope(config, kind, longest, trained):
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or not trained:
        raise ValueError(f"--rope_scaling {kind}: {config.model_type} has no rotary positions to stretch")
    if "full_attention" in parameters or any(isinstance(value, dict) for value in parameters.values()):
        raise ValueError(f"--rope_scaling {kind}: {config.model_type} has several kinds of rotary positions")
    factor = max(1.0, (longest or trained) / trained)
    if factor == 1.0:
        logger.warning(
            "--rope_scaling %s changes nothing: %s tokens fit the model's %d positions", kind, longest, trained
        )
        return
    if parameters.get("rope_type", "default") != "default":
        raise ValueError(
            f"--rope_scaling {kind}: the positions of this model are stretched already "
            f"({parameters['rope_type']}, up to "
            f"{trained} tokens); shorten the sequences"
        )
    config.rope_parameters = {**parameters, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        config.rope_parameters["original_max_position_embeddings"] = trained
    if kind != "dynamic":  # dynamic NTK starts stretching where the model's own length ends
        config.max_position_embeddings = longest
    logger.info("--rope_scaling %s: factor %.3g, %d -> %d positions", kind, factor, trained, longest)


def load_tokenizer(source: Source, model_args):
    """Load the tokenizer and give it a padding token that is not its end-of-text token.

    Raises:
        ValueError: it cannot be loaded, or it has no fast implementation.
    """
    name = model_args.tokenizer_name_or_path or source.tokenizer or source.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, cache_dir=model_args.cache_dir, trust_remote_code=model_args.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        if not os.path.isdir(name):
            raise explain_hub_error(name, error) from error
        raise ValueError(f"{name}: no tokenizer that transformers can load ({_first_line(error)})") from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{name}: only fast tokenizers are supported (a tokenizer.json); {type(tokenizer).__name__} is not"
        )
    if tokenizer.eos_token is None:
        raise ValueError(f"{name}: the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json")
    choose_pad_token(tokenizer)
    return tokenizer


def choose_pad_token(tokenizer) -> None:
    """Set a padding token other than EOS, for where padding is masked by id, EOS would never be learnt.

    The labels of this project never depend on it (padding is masked by position), but other programs' do. The
    vocabulary does not grow: a token is chosen that text cannot produce, and that ends no answer in any template.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    taken = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    taken |= {stop for template in TEMPLATES.values() for stop in template.stop}
    unknown = tokenizer.unk_token if tokenizer.unk_token != tokenizer.eos_token else None  # GPT-2 has one for both
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    unused = [token for token in special if token not in taken]
    preferred = [token for token in unused if any(word in token.lower() for word in ("pad", "reserved", "unused"))]
    choice = next(iter([*preferred, *filter(None, [unknown]), *reversed(unused)]), None)
    if choice is None:
        logger.warning(
            "the tokenizer has no token to pad with but %r; padding is masked by position", tokenizer.eos_token
        )
        choice = tokenizer.eos_token
    tokenizer.pad_token = choice
    logger.info("padding token: %r", choice)


def model_class(config, scores: bool = False):
    """The class a configuration is loaded as (to write answers, or to score them), or None for remote code."""
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    return auto._model_mapping.get(type(config), None)


def takes_position_ids(config) -> bool:
    """Whether samples packed into one row can be kept apart: by positions that restart, which Bloom and MPT lack."""
    cls = model_class(config)
    return cls is not None and "position_ids" in inspect.signature(cls.forward).parameters


def count_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions from the first real token on, as generate() counts them, (batch, seq_len); padding has 0."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def packs_exactly(config, packing: bool | None) -> bool:
    """Decide on packing: what --packing says, else yes where the model can keep packed samples apart.

    Raises:
        ValueError: --packing True for a model that cannot.
    """
    possible = takes_position_ids(config)
    if packing and not possible:
        raise ValueError(
            f"--packing True: {config.model_type} has no position_ids, so packed samples would see each "
            "other; leave it out"
        )
    if packing is None and not possible:
        logger.info(
            "%s cannot keep packed samples apart: rows are padded instead, the loss is the same", config.model_type
        )
    return possible if packing is None else packing


def prepare_to_score(config, pad_token_id: int) -> None:
    """Make a configuration describe a reward model: one score, read at the last token that is not padding.

    Raises:
        ValueError: transformers has no scoring model of this architecture.
    """
    if model_class(config, scores=True) is None:
        raise ValueError(
            f"{config.model_type} models cannot be reward models: transformers has no scoring head for them"
        )
    config.num_labels = 1
    config.get_text_config().pad_token_id = pad_token_id


def is_reward_model(source: Source, config) -> bool:
    """Whether what a run starts from scores answers and cannot write any."""
    adapters = [*source.merged, *filter(None, [source.adapter])]
    if adapters:
        return any(PeftConfig.from_pretrained(adapter).task_type == "SEQ_CLS" for adapter in adapters)
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def load_model(source: Source, model_args, training_args, config, scores: bool = False):
    """Load the base weights on this process's own device, with a head that writes or, if `scores`, one that scores.

    Raises:
        ValueError: missing packages, or weights that do not belong to the configuration.
    """
    quantization = quantization_config(model_args)
    dtype = model_args.dtype
    if dtype == "auto" and training_args.bf16:
        dtype = "bfloat16"
    elif dtype == "auto" and training_args.fp16:
        dtype = "float32"  # fp16 weights under fp16 autocast lose small gradients; the scaler needs fp32 masters
    device_map = None
    if quantization is not None:
        device_map = {"": "cpu" if training_args.use_cpu else int(os.environ.get("LOCAL_RANK", 0))}
    attention = None
    if model_args.flash_attn:
        if training_args.use_cpu:
            raise ValueError(
                "--flash_attn True needs a GPU, and none was found; leave it out (sdpa is exact and fast)"
            )
        try:
            import flash_attn  # noqa: F401
        except ImportError:
            raise ValueError("--flash_attn True needs the package flash-attn: pip install flash-attn") from None
        attention = "flash_attention_2"
    if source.merged and (quantization is not None or zero_stage(training_args.deepspeed) == 3):
        raise ValueError(
            f"{source.merged[-1]} must be merged into its base, which a 4-bit or 8-bit base and ZeRO-3 do not allow; "
            "continue the adapter instead (without --new_adapter), or use ZeRO-2"
        )
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    level = transformers_logging.get_verbosity()
    if scores:
        transformers_logging.set_verbosity_error()  # that the score head is new, or the adapter's, is no news
    try:
        model = auto.from_pretrained(
            source.base,
            config=config,
            revision=None if os.path.isdir(source.base) else model_args.model_revision,
            cache_dir=model_args.cache_dir,
            trust_remote_code=model_args.trust_remote_code,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=quantization,
            device_map=device_map,
        )
    except OSError as error:
        if not os.path.isdir(source.base):
            raise explain_hub_error(source.base, error) from error
        raise ValueError(f"{source.base}: {_first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(level)
    for directory in source.merged:
        model = merge_adapter(model, directory)
    return model


def inference_device(only_cpu: bool) -> tuple[str, str]:
    """(device, number format) to answer or score with: bf16 on GPUs that have it, else fp16; fp32 on a CPU."""
    if only_cpu or not torch.accelerator.is_available():
        return "cpu", "float32"
    device = torch.accelerator.current_accelerator().type
    bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return device, "bfloat16" if bf16 else "float16"


def merge_adapter(model, directory: str):
    """Add the update of an adapter to the weights of its base, in memory."""
    config = PeftConfig.from_pretrained(directory)
    model = PeftModel(model, fitting_config(config, model))
    _load_adapter_weights(model, directory)
    return merge_into_base(model)


def merge_into_base(model: PeftModel, progressbar: bool = False):
    """Add the update of a model's adapter to the weights below it; return the model without adapter.

    Where LoRA sits on an embedding that shares its matrix with the head, the head has not learnt: it keeps the old
    values, in a matrix of its own from then on (PEFT would change both).

    Raises:
        ValueError: the sum is not a number somewhere.
    """
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if isinstance(embedding, LoraLayer) and not isinstance(head, LoraLayer) and head is not None:
        if head.weight is embedding.weight:
            head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            base.config.tie_word_embeddings = False
    return model.merge_and_unload(progressbar=progressbar, safe_merge=True)


def fitting_config(lora: LoraConfig, model) -> LoraConfig:
    """The LoraConfig of what an adapter becomes on this model, which writes or scores and lacks the other's head."""
    scores = has_score_head(model)
    lacking = OUTPUT_HEADS if scores else SCORE_HEADS
    fitting = copy.deepcopy(lora)
    fitting.task_type = "SEQ_CLS" if scores else "CAUSAL_LM"
    fitting.modules_to_save = [name for name in lora.modules_to_save or [] if name not in lacking] or None
    fitting.ensure_weight_tying = lora.ensure_weight_tying and not scores
    fitting.inference_mode = False
    return fitting


def _load_adapter_weights(model, directory):
    """Load what an adapter directory holds, but for a head the model does not have; a score head stays as it is."""
    state = get_peft_model_state_dict(model)
    saved = load_peft_weights(directory, device="cpu")
    if has_score_head(model.get_base_model()):
        saved = {name: value for name, value in saved.items() if not any(f".{head}." in name for head in OUTPUT_HEADS)}
    unknown = sorted(set(saved) - set(state))
    missing = sorted(name for name in set(state) - set(saved) if ".score." not in name)
    if unknown or missing:
        raise ValueError(f"{directory}: this adapter does not fit the model: {(unknown + missing)[0]}")
    set_peft_model_state_dict(model, {**state, **saved})


OUTPUT_HEADS = ("lm_head", "embed_out")
SCORE_HEADS = ("score", "classifier")  # PEFT lists both for any scoring model


def has_score_head(model) -> bool:
    """Whether a model (without adapter) scores sequences instead of predicting tokens."""
    return type(model).__name__.endswith("ForSequenceClassification")


def quantization_config(model_args):
    """The bitsandbytes configuration the flags ask for, or None. NF4 with double quantisation: arXiv:2305.14314."""
    if model_args.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if model_args.load_in_8bit else None


def add_adapter(model, source: Source, lora_args, training_args):
    """Continue the parent's adapter, start a new one, or prepare all weights for training.

    Returns:
        (model, tuning): tuning is what stage.json stores about the method.

    Raises:
        ValueError: all weights of an adapter chain or a quantised base were asked for; unknown module names.
    """
    quantised = bool(getattr(model, "is_quantized", False))
    if not lora_args.use_peft:
        if quantised:
            raise ValueError("--use_peft False trains all weights, which 4-bit and 8-bit bases do not allow")
        if source.adapter:
            raise ValueError(
                f"{source.adapter} is an adapter; --use_peft False would leave it out. Merge it into its base "
                "first, or "
                "train the adapter on"
            )
        # The optimiser needs fp32 weights to add small updates to; autocast computes in --bf16/--fp16 all the same.
        model = model.float() if not training_args.deepspeed else model
        return model, {"method": "full"}
    if quantised:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=bool(training_args.activation_checkpointing)
        )
        # On CPUs with AVX512-BF16 the first evaluation would repack 4-bit weights for a kernel that passes no gradient
        # back, and never undo it: training would go on without the layers below (bitsandbytes 0.50).
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if source.adapter:
        model = continue_adapter(model, source.adapter)
        _train_in_fp32(model, training_args)
        lora = model.peft_config["default"]
        kept = {"lora_rank": lora.r, "lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout}
        other = [f"{name} {value:g}" for name, value in kept.items() if getattr(lora_args, name) != value]
        if other:
            logger.info("the adapter of %s goes on as it is: %s", source.adapter, ", ".join(other))
        _tell_untrained_rows(source, model, lora)
        return model, _tuning(lora, model_quantised=quantised, continued=True)
    try:
        model = get_peft_model(model, lora_config(model, lora_args))
    except ValueError as error:
        raise ValueError(f"--target_modules {lora_args.target_modules}: {_first_line(error)}") from error
    _train_in_fp32(model, training_args)
    _tell_untrained_rows(source, model, model.peft_config["default"])
    return model, _tuning(model.peft_config["default"], model_quantised=quantised, continued=False)


def _tell_untrained_rows(source, model, lora):
    """New tokens of an extended base are worth nothing while their rows are what they began as."""
    extended = extended_vocabulary(source.base)
    if extended is None or source.merged:  # what was merged has trained them, or has said so
        return
    lacking = OUTPUT_HEADS if has_score_head(model.get_base_model()) else ()
    needed = [name for name in extended["embeddings"]["modules"] if name not in lacking]
    targets = lora.target_modules if isinstance(lora.target_modules, set | list) else ()  # else a word for all of them
    trained = {name.rpartition(".")[2] for name in (*(lora.modules_to_save or ()), *targets)}
    if not trained.issuperset(needed):
        logger.warning(
            "the rows of the %d tokens by which %s was extended are not trained: start from its pretraining, or with "
            "--modules_to_save %s",
            *(extended["num_tokens"], source.base, ",".join(needed)),
        )


def _train_in_fp32(model, training_args):
    """PEFT keeps LoRA in fp32 on a 16-bit base, but not modules trained whole: a score head would lose small updates.

    Autocast computes in 16 bits all the same; without it, or under DeepSpeed, types must stay as they are.
    """
    if (training_args.bf16 or training_args.fp16) and not training_args.deepspeed:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def continue_adapter(model, directory: str) -> PeftModel:
    """Put an adapter on its base, to be trained on; under a score head, which a writer's adapter lacks, a new one.

    PEFT cannot load a CAUSAL_LM adapter on a scoring model: it becomes a SEQ_CLS adapter of the same shape.
    """
    lora = PeftConfig.from_pretrained(directory)
    if not has_score_head(model) or lora.task_type == "SEQ_CLS":
        return PeftModel.from_pretrained(model, directory, is_trainable=True)
    fitting = fitting_config(lora, model)
    model = get_peft_model(model, fitting)  # a SEQ_CLS adapter trains and saves the score head, by PEFT's own rule
    _load_adapter_weights(model, directory)
    return model


def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """Copy all parameters of an adapter to another one of the same shape on the same model.

    TRL, which does so for DPO's reference, leaves out those whose names end with the adapter's (LoRA on embeddings).
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if source in parts:
            copy = parameters[".".join(target if part == source else part for part in parts)]
            copy.data.copy_(parameter.data)


def changed_tensors(model: PeftModel, name: str, directory: str) -> tuple[list[str], int]:
    """Compare an adapter in memory with the directory it should be: (tensors that differ, how many were compared)."""
    saved = load_peft_weights(directory, device="cpu")
    held = get_peft_model_state_dict(model, adapter_name=name)
    held = {key: value for key, value in held.items() if value.numel()}  # ZeRO-3 shows what it shards as empty
    changed = [
        key
        for key, value in held.items()
        if key not in saved or not torch.equal(saved[key].to(value.dtype), value.detach().cpu())
    ]
    return changed, len(held)


def lora_config(model, lora_args) -> LoraConfig:
    """The LoraConfig the flags describe; an embedding matrix shared with the head stays shared."""
    targets = lora_args.target_modules
    whole = [name.strip() for name in (lora_args.modules_to_save or "").split(",") if name.strip()]
    scores = has_score_head(model)
    if scores:
        whole = [
            name for name in whole if name not in (*OUTPUT_HEADS, *SCORE_HEADS)
        ]  # PEFT adds the score head itself
    tied = bool(getattr(model.config, "tie_word_embeddings", False)) and not scores
    if tied and whole:
        head = [name for name in whole if name in OUTPUT_HEADS]
        whole = [name for name in whole if name not in head] or whole
        if head and whole != head:
            logger.info("the head shares the embedding matrix: %s is trained through %s", head[0], whole[0])
    initial = True if lora_args.init_lora_weights == "True" else lora_args.init_lora_weights
    return LoraConfig(
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        r=lora_args.lora_rank,
        lora_alpha=lora_args.lora_alpha,
        lora_dropout=lora_args.lora_dropout,
        target_modules="all-linear" if targets == "all" else [name.strip() for name in targets.split(",")],
        modules_to_save=whole or None,
        ensure_weight_tying=bool(tied and whole),
        use_dora=lora_args.use_dora,
        use_rslora=lora_args.use_rslora,
        init_lora_weights=initial,
    )


def whole_modules(source: Source, lora_args) -> set[str]:
    """Names of the modules that are trained whole beside the adapter, the parent's or a new one."""
    if source.adapter:
        names = PeftConfig.from_pretrained(source.adapter).modules_to_save or []
    else:
        names = (lora_args.modules_to_save or "").split(",")
    return {name.strip().rpartition(".")[2] for name in names if name.strip()}


def _tuning(lora, model_quantised, continued):
    return {
        "method": "qlora" if model_quantised else "lora",
        "rank": lora.r,
        "alpha": lora.lora_alpha,
        "dropout": lora.lora_dropout,
        "target_modules": sorted(lora.target_modules)
        if not isinstance(lora.target_modules, str)
        else lora.target_modules,
        "modules_to_save": list(lora.modules_to_save or []),
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
        "continued": continued,
    }


def prepare_for_training(model, training_args) -> None:
    """Settings every causal model needs before it is trained, and a guard against training nothing.

    Raises:
        ValueError: no parameter takes gradients.
    """
    model.config.use_cache = False
    if training_args.activation_checkpointing:
        model.enable_input_require_grads()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("no parameter of this model takes gradients, so nothing would be trained (a frozen adapter?)")


def generation_settings(stop_ids: list[int], tokenizer) -> GenerationConfig:
    """The generation config a checkpoint carries: every stop token, the padding token, and sampling near the mode.

    A low temperature, for an answer about somebody's health should not change with every try.
    """
    return GenerationConfig(
        eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        do_sample=True,
        temperature=0.3,
        top_p=0.9,
        max_new_tokens=512,
    )


def _first_line(error):
    return str(error).strip().split("\n")[0][:300]
