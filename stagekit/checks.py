"""Checks that stop a run which does not train what it claims. Each is cheap, runs every time and prints one line."""

import json
import logging
import math
import os
import re
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from stagekit.encoding import Probe
from stagekit.seen_prompts import load_seen_prompts
from stagekit.tokenization import IGNORE_INDEX, Chat, answer_runs, encode_prompt, histories

logger = logging.getLogger(__name__)

NAMES = (
    "leakage",
    "loss_mask",
    "template_parity",
    "no_forged_turns",
    "memory",
    "packing_is_exact",
    "score_position",
    "reference_is_parent",
    "reward_model_is_trained",
    "rollout_is_policy",
    "sampler_is_policy",
    "policy_is_sane",
    "processes_share_gradients",
    "gradients_flow",
    "finite",
    "saved_is_loaded",
)


class CheckError(ValueError):
    """A check that does not hold; the text says what was found and what would do."""


@dataclass
class Checks:
    """The checks of one run: skips what the user skips, prints, and keeps the outcomes for stage.json."""

    skip: set[str] = field(default_factory=set)
    outcomes: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def from_flag(cls, names: str | None) -> "Checks":
        """Read --skip_checks.

        Raises:
            ValueError: a name that is no check.
        """
        skip = {name.strip() for name in (names or "").split(",") if name.strip()}
        unknown = skip - set(NAMES)
        if unknown:
            raise ValueError(f"--skip_checks {sorted(unknown)[0]!r} is not a check; known: {', '.join(NAMES)}")
        return cls(skip)

    def run(self, name: str, function, *args, quiet: bool = False):
        """Run a check: function(*args) returns (value, limit) as text, or raises CheckError.

        quiet leaves out the line, for a check that runs again and again.
        """
        assert name in NAMES, name
        if name in self.skip:
            self.outcomes[name] = {"passed": None, "value": "skipped by --skip_checks", "limit": ""}
            if not quiet:
                logger.warning("check %s: skipped by --skip_checks", name)
            return
        try:
            value, limit = function(*args)
        except CheckError as error:
            raise CheckError(f"check {name} failed: {error}") from None
        self.outcomes[name] = {"passed": True, "value": value, "limit": limit}
        if not quiet:
            logger.info("check %s: passed (%s; limit: %s)", name, value, limit)


# -- data ------------------------------------------------------------------------------------------------------------


def leakage(
    train: np.ndarray, held_out: list[tuple[int, str]], parent_directory: str | None, max_percentage: float
) -> tuple[str, str]:
    """Count held-out prompts that were trained on, here or in an ancestor.

    Args:
        train: prompt hashes of the training rows, (n,) uint64.
        held_out: (prompt hash, "file:line") of every held-out row.
        parent_directory: stage directory this run starts from, or None.
        max_percentage: of the held-out prompts.
    """
    here, earlier = set(train.tolist()), set(load_seen_prompts(parent_directory).tolist())
    found_here = [origin for value, origin in held_out if value in here]
    found_earlier = [origin for value, origin in held_out if value in earlier and value not in here]
    total = len(found_here) + len(found_earlier)
    percentage = 100 * total / max(1, len(held_out))
    value = f"{total} of {len(held_out)} held-out prompts seen in training"
    if found_earlier:
        value += f", {len(found_earlier)} of them by an earlier stage"
    if percentage > max_percentage:
        examples = ", ".join((found_here + found_earlier)[:5])
        raise CheckError(
            f"{value} ({percentage:.1f} %, limit {max_percentage:g} %): {examples}; remove those rows from "
            "one side, or "
            "raise --max_leaked_percentage"
        )
    return value, f"{max_percentage:g} %"


# -- prompts and masks -----------------------------------------------------------------------------------------------


def loss_mask(chat: Chat, probes: list[Probe], train_on_inputs: bool) -> tuple[str, str]:
    """Compare what is learnt, decoded, with the answers of the data and their end-of-turn.

    An answer that the data excludes ("train": False) must not be learnt, nor under --train_on_inputs.
    """
    for probe in probes:
        sample, messages = probe.sample, probe.conversation.messages
        excluded = [message for message in messages if not message.get("train", True)]
        runs = answer_runs(sample.labels)
        if any(messages[turn] in excluded for turn in sample.turns):
            raise CheckError(f"{probe.origin}: an answer is learnt that the data excludes")
        # Where answers cannot be told from the history they stand in, only what may be learnt is learnt.
        if train_on_inputs and not (excluded and runs == sorted(sample.turns.values())):
            _compare_rest(chat, probe, excluded)
            continue
        if runs != sorted(sample.turns.values()):
            raise CheckError(f"{probe.origin}: tokens outside of the answers are learnt, or answers are not")
        for number, (turn, (start, end)) in enumerate(sorted(sample.turns.items())):
            if sample.labels[start:end] != sample.input_ids[start:end]:
                raise CheckError(f"{probe.origin}: labels differ from the tokens they stand for")
            complete = not (sample.truncated and number == len(sample.turns) - 1)
            learnt = chat.tokenizer.decode(sample.labels[start:end], clean_up_tokenization_spaces=False)
            if wrong := _difference(chat, messages[turn], learnt, complete):
                raise CheckError(f"{probe.origin}: {wrong}")
    return f"{len(probes)} samples", "exact"


def _compare_rest(chat, probe, excluded):
    """All but the first token is learnt, and all but the answers that the data excludes."""
    rest = [IGNORE_INDEX if label != IGNORE_INDEX else 0 for label in probe.sample.labels[1:]]
    for start, end in answer_runs([IGNORE_INDEX, *rest]):
        text = chat.tokenizer.decode(probe.sample.input_ids[start:end], clean_up_tokenization_spaces=False)
        cut = end == len(rest) + 1  # an excluded answer at the end of a sample may have lost its own
        if not any(
            None in {_difference(chat, message, text, whole) for whole in (True, not cut)} for message in excluded
        ):
            raise CheckError(f"{probe.origin}: --train_on_inputs True, but not every token is learnt")


def _difference(chat, message, learnt, complete):
    """What tells what is learnt from the answer of the data, None if nothing does."""
    end = next((end for end in (chat.ends.turn, chat.ends.call) if learnt.endswith(end)), "")
    if complete != bool(end):
        state = "lacks its end-of-turn" if complete else "was cut but has an end-of-turn"
        return f"the answer {learnt[-40:]!r} {state}"
    text, content = learnt.removesuffix(end).strip(), message["content"].strip()
    if "think>" in content + text:
        text, content = _even(text), _even(content)
    if message.get("tool_calls"):
        wanted = [content, *(call["function"]["name"] for call in message["tool_calls"])]
        if complete and not all(part in text for part in wanted):
            return f"the tool call {wanted[-1]!r} is not in what is learnt, {text[:80]!r}"
    elif complete and text != content:
        return f"learnt {text[:80]!r}…, but the answer is {content[:80]!r}…"
    elif not complete and not content.startswith(text.rstrip("\ufffd")):  # a cut may split a character
        return f"learnt {text[:80]!r}…, which does not begin the answer {content[:80]!r}…"
    return None


def _even(text):
    """An answer with thoughts without what templates settle: their white space, an empty thought, and which of the
    tags belongs to the prompt."""
    text = re.sub(r"^\s*(?:<think>)?\s*</think>\s*", "", text)
    return re.sub(r"\s*(</?think>)\s*", r"\1", text).removeprefix("<think>").strip()


def template_parity(chat: Chat, probes: list[Probe]) -> tuple[str, str]:
    """Compare the prompts in training samples with what inference sends, and with transformers' own rendering."""
    compared = same_as_transformers = 0
    chat = replace(chat, frame=None)  # no short cuts here: the template itself writes
    for probe in probes:
        sample = probe.sample
        if not sample.turns:
            continue
        turn = min(sample.turns)
        start = sample.turns[turn][0]
        thinking = sample.thinking
        if thinking is None:
            thinking = chat.thinking_of(probe.conversation.messages[turn])
        history = _shown_messages(chat, probe, turn, thinking)
        sent = encode_prompt(chat, history, probe.conversation.tools, thinking)
        if sent != sample.input_ids[:start]:
            raise CheckError(
                f"{probe.origin}: inference sends {_tail(chat, sent)!r}, training saw "
                f"{_tail(chat, sample.input_ids[:start])!r}; "
                "the chat template or the tokenizer is not the one the data was prepared with"
            )
        compared += 1
        plain = chat.tokenizer.apply_chat_template(
            history,
            tools=probe.conversation.tools,
            add_generation_prompt=True,
            return_dict=False,
            **({} if thinking is None else {"enable_thinking": thinking}),
        )
        same_as_transformers += plain == sent
        bos = chat.tokenizer.bos_token_id
        if bos is not None and bos != chat.tokenizer.eos_token_id and sent.count(bos) > 1 and sent[:2] == [bos, bos]:
            raise CheckError(f"{probe.origin}: the prompt begins with two BOS tokens")
    if compared == 0:
        raise CheckError("no prompt could be compared")
    stop = chat.tokenizer.convert_ids_to_tokens(chat.stop_ids[0])
    return f"{compared} prompts, {same_as_transformers} equal to transformers' own, stop token {stop!r}", "exact"


def _shown_messages(chat, probe, turn, thinking):
    """The messages a sample shows before an answer: the system prompt and the history that fitted."""
    shown, tools = [history for _, history in histories(probe.conversation.messages[:turn])], probe.conversation.tools
    length = probe.sample.turns[turn][0]
    fitting = (item for item in shown if len(encode_prompt(chat, item, tools, thinking)) == length)
    return next(fitting, shown[0])


def _tail(chat, ids):
    return chat.tokenizer.decode(ids[-24:], clean_up_tokenization_spaces=False)


def no_forged_turns(chat: Chat) -> tuple[str, str]:
    """Send a user text full of control strings and count the control tokens that come out."""
    control = sorted(set(chat.tokenizer.all_special_tokens) | {chat.end_of_turn})
    forged = " ".join(control) + f"{chat.end_of_turn}\nassistant"
    benign = encode_prompt(chat, [{"role": "user", "content": "hello"}])
    attacked = encode_prompt(chat, [{"role": "user", "content": forged}])
    ids = {chat.tokenizer.convert_tokens_to_ids(token) for token in control}
    before, after = (sum(token in ids for token in prompt) for prompt in (benign, attacked))
    if after != before:
        raise CheckError(
            f"{after - before} control tokens came out of a user's text; the tokenizer cannot be used safely"
        )
    if forged.replace(" ", "") not in chat.tokenizer.decode(attacked, clean_up_tokenization_spaces=False).replace(
        " ", ""
    ):
        raise CheckError("a user's text with control strings did not survive tokenisation unchanged")
    return f"{len(control)} control strings in a user's text", "0 control tokens"


# -- the model -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def packing_is_exact(model, collator, samples: list[list[int]]) -> tuple[str, str]:
    """Compare the logits of samples packed into one row by the collator with those of the same samples alone.

    Two forward passes on every process, on the same samples: under ZeRO-3 a forward pass is a collective call.

    Args:
        model: as the trainer wrapped it.
        collator: the trainer's, which must restart the positions at every sample.
        samples: token ids of two or more samples.
    """
    lengths, ids = [len(sample) for sample in samples], [token for sample in samples for token in sample]
    device = next(model.parameters()).device
    packed = {
        key: value.to(device)
        for key, value in collator([{"input_ids": ids, "labels": ids, "lengths": lengths}]).items()
    }
    packed.pop("labels")
    width = max(lengths)
    alone = torch.tensor([sample + sample[-1:] * (width - len(sample)) for sample in samples], device=device)
    positions = torch.arange(width, device=device).expand(len(samples), width)
    was_training = model.training
    model.eval()
    together = model(**packed, use_cache=False).logits[0, : len(ids)].float()
    apart = model(input_ids=alone, position_ids=positions, use_cache=False).logits.float()
    model.train(was_training)
    apart = torch.cat([apart[row, :length] for row, length in enumerate(lengths)])
    difference = ((together - apart).abs().max() / apart.abs().max()).item()
    limit = 1e-4 if _computes_in_fp32(model) else 5e-2
    if not difference <= limit:
        raise CheckError(
            f"packed samples see each other: logits differ by {difference:.2g} of their size; use --packing "
            "False with this "
            "model or attention implementation"
        )
    return f"{len(samples)} samples in a row, logits differ by {difference:.1g} of their size", f"{limit:g}"


@torch.no_grad()
def score_position(model, inputs: dict, stop_id: int) -> tuple[str, str]:
    """A reward model scores at the end-of-turn token, and padding behind it changes nothing.

    Args:
        model: as the trainer wrapped it.
        inputs: input_ids and attention_mask of a batch padded on the right, (rows, seq_len).
        stop_id: the token at which generation stops.
    """
    lengths = inputs["attention_mask"].sum(dim=1)
    last = inputs["input_ids"].gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)
    if (last != stop_id).any():
        raise CheckError(
            f"{int((last != stop_id).sum())} of {len(last)} sequences do not end with the end-of-turn token "
            f"{stop_id}: they would be scored where generation never stops"
        )
    scores = model(**inputs, use_cache=False).logits.float().squeeze(-1)
    rows = [0, len(lengths) // 2]  # one better and one worse answer: as many forward passes on every process
    head = next(module for name, module in model.named_modules() if name.rpartition(".")[2] == "score")
    dtype = head.weight.dtype  # outside of the model's forward there is no autocast
    alone, at_the_end = [], []
    for row in rows:
        ids, mask = (inputs[name][row : row + 1, : lengths[row]] for name in ("input_ids", "attention_mask"))
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        alone.append(out.logits.float().flatten())
        at_the_end.append(head(out.hidden_states[-1][:, -1].to(dtype)).float().flatten())
    difference = (torch.cat(alone) - scores[rows]).abs().max().item()
    elsewhere = (torch.cat(alone) - torch.cat(at_the_end)).abs().max().item()
    limit = (1e-4 if _computes_in_fp32(model) else 5e-2) * max(1.0, scores.abs().max().item())
    if not difference <= limit:
        raise CheckError(
            f"the score of an answer changes by {difference:.2g} with the padding behind it: the model does not read "
            "it at the end-of-turn token"
        )
    if not elsewhere <= limit:
        raise CheckError(
            f"the score is not that of the end-of-turn token, it differs by {elsewhere:.2g}: the model takes that "
            "token for padding"
        )
    return (
        f"{len(last)} sequences scored at token {stop_id}, padding changes scores by {difference:.1g}",
        f"{limit:.1g}",
    )


def _computes_in_fp32(model):
    """No autocast, and no weight in 16 bits or quantised (those are multiplied in bf16)."""
    parameters = list(model.parameters())
    autocast = torch.is_autocast_enabled(parameters[0].device.type)
    return not autocast and all(parameter.dtype == torch.float32 for parameter in parameters)


def reference_is_parent(
    model,
    policy: torch.Tensor,
    reference: torch.Tensor,
    loss: float | None,
    plain: float,
    changed: list[str],
    num_compared: int,
    resumed: bool,
) -> tuple[str, str]:
    """At step 0 policy and reference are the parent's policy: log-ratios are 0, so KL is 0 and DPO's loss is ln 2.

    Args:
        model: as the trainer wrapped it.
        policy, reference: log-probabilities of whole answers under both, (answers,).
        loss: of the batch, where it is Eq. 7 of arXiv:2305.18290; None for other losses.
        plain: largest difference between the trainer's token log-probabilities and those of the model's own logits.
        changed: names of reference tensors that differ from what the parent saved.
        num_compared: how many tensors were compared with it.
        resumed: the policy has been trained already, so only the reference's tensors can be compared.
    """
    if changed:
        raise CheckError(
            f"{len(changed)} tensors of the reference are not those of the parent stage, e.g. {changed[0]}: the run "
            "would be held to a policy that nobody trained"
        )
    if resumed:
        return f"{num_compared} reference tensors equal the parent's (resumed: the policy has moved on)", "exact"
    difference = (policy - reference).abs().max().item()
    size = max(1.0, reference.abs().max().item())
    exact = _computes_in_fp32(model)
    limit = (3e-6 if exact else 2e-3) * size
    if not difference <= limit:
        raise CheckError(
            f"before the first step policy and reference differ by {difference:.3g} nats for an answer: the reference "
            "is not the parent's policy"
        )
    if not plain <= 5e-2:
        raise CheckError(f"token log-probabilities differ from those of the model's logits by {plain:.3g} nats")
    value = f"{num_compared} tensors equal the parent's, log-ratios and KL {difference:.1g} nats"
    if loss is not None:
        if not abs(loss - math.log(2)) <= (1e-4 if exact else 5e-2):
            raise CheckError(f"the loss before the first step is {loss:.6f} instead of ln 2")
        value += f", loss {loss:.6f} = ln 2"
    return value, f"{limit:.1g}"


def reward_model_is_trained(stage: dict | None, directory: str, allowed: bool) -> tuple[str, str]:
    """A reward model that cannot tell better from worse answers would train the policy on noise.

    Args:
        stage: the reward model's stage.json, None where it has none.
        directory: where it stands.
        allowed: --allow_untrained_reward_model.
    """
    after = ((stage or {}).get("metrics") or {}).get("after") or {}
    low = after.get("accuracy_low")
    if low is not None and low > 0.5:
        return f"held-out accuracy {after['accuracy']:.3f}, 95 % interval from {low:.3f}", "lower bound > 0.5"
    found = "no held-out accuracy" if low is None else f"a held-out accuracy whose 95 % interval begins at {low:.3f}"
    if allowed:
        return f"{found}; allowed by --allow_untrained_reward_model", "lower bound > 0.5"
    raise CheckError(
        f"{directory} shows {found}, so its scores may be chance; train it on more pairs, measure it (--do_eval), or "
        "insist with --allow_untrained_reward_model True"
    )


def rollout_is_policy(model, logps: torch.Tensor, rollout_logps: torch.Tensor, mask: torch.Tensor) -> tuple[str, str]:
    """Before the first step the policy gives its own answers the probabilities noted in the rollout: ratio 1.

    Args:
        model: as the trainer wrapped it.
        logps, rollout_logps, mask: (batch, response_len).
    """
    difference = ((logps - rollout_logps).abs() * mask).max().item()
    limit = 1e-4 if _computes_in_fp32(model) else 5e-2
    if not difference <= limit:
        raise CheckError(
            f"the policy gives tokens of its rollout other log-probabilities (by up to {difference:.3g} nats): it is "
            "not what sampled them"
        )
    return f"ratio 1 within {math.expm1(difference):.1g}", f"{limit:g}"


def sampler_is_policy(
    model, sampled: torch.Tensor, trained: torch.Tensor, mask: torch.Tensor, samples_apart: bool = False
) -> tuple[str, str]:
    """The sampler (a cache, padding; vLLM's copy of the weights) gives tokens the probabilities training computes.

    Args:
        model: as the trainer wrapped it.
        sampled, trained: log-probabilities of answers' tokens under both, (batch, response_len); NaN is not known.
        mask: (batch, response_len).
        samples_apart: the sampler is another program with other kernels, so that only means are alike.
    """
    differences = (sampled - trained).abs()[mask.bool()]
    mean = differences[~differences.isnan()].mean().item()
    limit = 1e-4 if _computes_in_fp32(model) and not samples_apart else 5e-2
    if not mean <= limit:
        raise CheckError(
            f"the sampler's log-probabilities differ from the trainer's by {mean:.3g} nats a token (limit {limit:g}): "
            + ("its weights are not the policy's" if samples_apart else "it does not compute what is trained")
        )
    return f"mean difference {mean:.1g} nats a token", f"{limit:g}"


def policy_is_sane(kl: float, max_kl: float, entropy: float, min_entropy: float) -> tuple[str, str]:
    """The policy has not run away from its reference, and still has a choice.

    Args:
        kl: mean KL of whole answers to the reference, in nats.
        max_kl: limit for it.
        entropy: mean entropy of a token, in nats.
        min_entropy: limit for it.
    """
    if not (np.isfinite(kl) and np.isfinite(entropy)):
        raise CheckError(f"KL {kl} and entropy {entropy} are no numbers; lower --learning_rate")
    if kl > max_kl:
        raise CheckError(
            f"the policy is {kl:.1f} nats an answer away from its reference (limit {max_kl:g}), where scores mislead; "
            "raise --kl_coef, set --target_kl, or lower --learning_rate (--max_kl moves the limit)"
        )
    if entropy < min_entropy:
        raise CheckError(
            f"the policy has collapsed: its entropy is {entropy:.4f} nats a token (limit {min_entropy:g}), so it "
            "tries nothing else; raise --kl_coef or --entropy_coef, or lower --learning_rate (--min_entropy moves "
            "the limit)"
        )
    return f"KL {kl:.3f} nats an answer, entropy {entropy:.3f} nats a token", f"KL {max_kl:g}, entropy {min_entropy:g}"


def processes_share_gradients(trainer) -> tuple[str, str]:
    """Compare what the launcher started with what the trainer believes: otherwise N runs train apart in silence."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    believed = trainer.accelerator.num_processes
    if started != believed or (started > 1 and trainer.accelerator.distributed_type.name == "NO"):
        raise CheckError(
            f"{started} processes were started, but the trainer sees {believed} "
            f"({trainer.accelerator.distributed_type.name}): gradients would not be shared; on CPU add --use_cpu True"
        )
    if trainer.args.deepspeed and trainer.accelerator.distributed_type.name != "DEEPSPEED":
        raise CheckError(
            f"--deepspeed was given, but the trainer runs as {trainer.accelerator.distributed_type.name}; unset "
            "ACCELERATE_USE_CPU and other ACCELERATE_… variables"
        )
    return f"{believed} process(es), {trainer.accelerator.distributed_type.name}", f"{started}"


def gradients_flow(trainer, model) -> tuple[str, str]:
    """Before the first optimiser step: some gradient is not zero, and every process holds the same gradients."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    norms = [gradient.detach().float().norm() for gradient in gradients if gradient is not None]
    total = torch.stack(norms).norm() if norms else torch.zeros(())
    if trainer.is_deepspeed_enabled:  # the engine keeps gradients to itself, and has stepped already
        total = torch.tensor(float(trainer.model_wrapped.get_global_grad_norm() or 0.0))
    if not torch.isfinite(total):
        raise CheckError(
            f"the gradient norm of the first step is {total.item()}; lower --learning_rate or use --bf16 True"
        )
    if total == 0:
        raise CheckError(
            "the gradient of the first step is zero, so nothing is trained (a frozen or disconnected adapter)"
        )
    everywhere = trainer.accelerator.gather(total.to(trainer.args.device).reshape(1))
    spread = ((everywhere.max() - everywhere.min()) / everywhere.max()).item()
    if spread > 1e-5:
        raise CheckError(
            "after the first backward pass the processes hold different gradients (norms "
            f"{everywhere.tolist()}): they are "
            "not shared; check the launcher and --ddp_backend"
        )
    return f"norm {total.item():.3g} on {len(everywhere)} process(es)", "> 0 and equal"


def finite(value: float, step: int) -> tuple[str, str]:
    """A loss that is a number."""
    if not np.isfinite(value):
        raise CheckError(
            f"the loss is {value} at step {step}; lower --learning_rate, use --bf16 True instead of --fp16, "
            "or look at the rows "
            "of that step"
        )
    return f"every logged loss up to step {step}", "finite"


def _check_score_head(directory, reference):
    """The score head was trained, and an adapter's configuration makes whoever loads it load the head."""
    if not any(name.endswith("score.weight") for name in reference):
        raise CheckError("the score head is not among what is trained and saved; every reload would draw another one")
    path = os.path.join(directory, "adapter_config.json")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as stream:
            config = json.load(stream)
        if config.get("task_type") != "SEQ_CLS" or "score" not in (config.get("modules_to_save") or []):
            raise CheckError(f"{path} does not name the score head in modules_to_save: it would not be loaded")


def saved_is_loaded(
    directory: str, reference: dict[str, torch.Tensor], compare_logits=None, scores: bool = False
) -> tuple[str, str]:
    """Read the saved tensors back and compare them with the ones in memory.

    Args:
        directory: where the weights were written (one or several safetensors files).
        reference: tensors in memory under the names the files use.
        compare_logits: function that loads the saved adapter into the model and returns the largest difference of
            logits, where that can be done.
        scores: a reward model, which is worth nothing without its score head.
    """
    from safetensors import safe_open

    if scores:
        _check_score_head(directory, reference)

    loaded = {}
    for name in sorted(os.listdir(directory)):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(directory, name), framework="pt") as stream:
                loaded.update({key: stream.get_tensor(key) for key in stream.keys()})
    if not loaded:
        raise CheckError(f"{directory} holds no weights")
    empty = [name for name, tensor in loaded.items() if tensor.numel() == 0]
    if empty:
        raise CheckError(f"{empty[0]} was saved empty ({len(empty)} such tensors)")
    missing = sorted(set(reference) - set(loaded))
    if missing:
        raise CheckError(f"{missing[0]} was trained but not saved ({len(missing)} such tensors)")
    for name, tensor in reference.items():
        there = loaded[name]
        if there.shape != tensor.shape:
            raise CheckError(f"{name} was saved with shape {tuple(there.shape)} instead of {tuple(tensor.shape)}")
        difference = (there.float() - tensor.detach().cpu().to(there.dtype).float()).abs().max().item()
        if not difference == 0:  # NaN, which max() would pass over, is not equal to 0 either
            raise CheckError(f"what was saved differs from what was trained: {name} by up to {difference:.3g}")
    value = f"{len(reference)} tensors read back, equal"
    if compare_logits is not None:
        difference = compare_logits()
        if not difference <= 1e-5:
            raise CheckError(f"the reloaded adapter gives other logits (by up to {difference:.3g})")
        value += f"; logits differ by {difference:.1g}"
    return value, "exact"
