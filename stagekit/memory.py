"""How much memory a run needs on one device: predicted before the weights are loaded, measured afterwards."""

import os

import torch

GIB = 1024**3


def count_parameters(config, model_class) -> tuple[int, int]:
    """(all parameters, parameters of linear layers but the head) of a model, without allocating it."""
    with torch.device("meta"):
        model = model_class(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, sum(
        module.in_features + module.out_features
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "head" not in name
    )


def count_modules(config, model_class, names: set[str]) -> int:
    """Parameters of the modules with these names (their last part), a shared matrix once, without allocating them."""
    if not names:
        return 0
    with torch.device("meta"):
        model = model_class(config)
    modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] in names]
    return sum({parameter: parameter.numel() for module in modules for parameter in module.parameters()}.values())


def predict_training_bytes(
    config, model_class, model_args, lora_args, training_args, max_tokens: int, whole: set[str] = frozenset()
) -> dict[str, int]:
    """Predict the peak bytes of a training step on one device.

    Weights, gradients, Adam's two moments in fp32, activations and logits. Activations follow the count of
    arXiv:2205.05198 (34 x hidden bytes a token and layer in 16 bit without attention scores), or the layer inputs and
    one layer in full under activation checkpointing. An estimate: within a factor of two of what is measured.

    Args:
        config: of the base model.
        model_class: as AutoModelForCausalLM would choose.
        model_args, lora_args, training_args: the flags.
        max_tokens: tokens of the longest row.
        whole: names of the modules that are trained whole beside an adapter.

    Returns:
        {"weights", "gradients", "optimizer", "activations", "logits", "total"} in bytes.
    """
    parameters, linear_sides = count_parameters(config, model_class)
    if lora_args.use_peft:
        trainable = lora_args.lora_rank * linear_sides + count_modules(config, model_class, whole)
        per_weight = (
            0.55
            if model_args.load_in_4bit
            else 1.05
            if model_args.load_in_8bit
            else _weight_bytes(model_args, training_args, config)
        )
        weights = int(parameters * per_weight) + 4 * trainable
    else:
        trainable, weights = parameters, 4 * parameters
    stage, processes = zero_stage(training_args.deepspeed), int(os.environ.get("WORLD_SIZE", "1"))
    tokens = training_args.per_device_train_batch_size * max_tokens
    compute = 2 if training_args.bf16 or training_args.fp16 else 4
    text = config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    per_layer = 34 * hidden * tokens * compute // 2
    activations = (
        layers * hidden * tokens * compute + per_layer
        if training_args.activation_checkpointing
        else layers * per_layer
    )
    parts = {
        "weights": weights // (processes if stage >= 3 else 1),
        "gradients": 4 * trainable // (processes if stage >= 2 else 1),
        "optimizer": 8 * trainable // (processes if stage >= 1 else 1),
        "activations": int(activations),
        "logits": 2 * tokens * text.vocab_size * compute,
    }
    return {**parts, "total": sum(parts.values())}


def _weight_bytes(model_args, training_args, config):
    if model_args.dtype in ("bfloat16", "float16") or (model_args.dtype == "auto" and training_args.bf16):
        return 2
    stored = getattr(config, "dtype", None)
    return (
        2 if model_args.dtype == "auto" and stored in (torch.bfloat16, torch.float16) and not training_args.fp16 else 4
    )


def zero_stage(deepspeed_config) -> int:
    """The ZeRO stage of a DeepSpeed configuration (path or dict), 0 without one."""
    if not deepspeed_config:
        return 0
    if isinstance(deepspeed_config, str):
        import json

        with open(deepspeed_config, encoding="utf-8") as stream:
            deepspeed_config = json.load(stream)
    return int(deepspeed_config.get("zero_optimization", {}).get("stage", 0))


def available_bytes(use_cpu: bool) -> int:
    """Memory a new allocation could take: free on this GPU, or available on the machine."""
    if not use_cpu and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def used_bytes(use_cpu: bool, peak: bool) -> int:
    """Memory this process holds, now or at its peak (on a CPU: resident memory, libraries included)."""
    if not use_cpu and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if peak:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    import psutil

    return psutil.Process().memory_info().rss
