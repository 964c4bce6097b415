"""New tokens: chosen as a plain count chooses, old text left as it was, rows by hand, the way through the stages."""

import collections
import json
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CORPUS, ROOT, SPECIAL, build_model, build_tokenizer, conversations, stage_of, write_jsonl
from safetensors.torch import load_file
from test_merge_adapter import answers, logits_of, merge, reloaded, write_adapter
from test_reward_modeling import run_main
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stagekit import generation, memory
from stagekit.checkpoint import EXTENDED_VOCABULARY, base_fingerprint, file_sha256, resolve, write_stage
from stagekit.commandline import run
from stagekit.modeling import add_adapter, load_config, load_model, model_class, whole_modules
from stagekit.seen_prompts import SEEN_PROMPTS
from stagekit.tokenization import document_control, encode_document
from stagekit.vocabulary import (
    BYTE_LEVEL,
    SENTENCEPIECE,
    add_tokens,
    is_token,
    kind_of,
    language_of,
    learn,
    measure,
    read_pieces,
    read_vocabulary,
    shown,
)
from tools import extend_vocabulary as tool
from tools.extend_vocabulary import add_rows, hold_out, main, parse_args, passages, read_documents, strings

TEXTS = [
    *["高血压患者应控制血压，按医嘱服用阿司匹林。", "糖尿病和高血压都要复查；血压高于140/90时就医。"],
    *["Hypertension and diabetes raise the risk; patients take aspirin.", "Patients with hypertension: check it!"],
    "def dose(mg):\n    return mg * 2  # hypertension",
] * 4
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# -- tokenizers of every kind ----------------------------------------------------------------------------------------


def trained():
    """(vocabulary, merges) of conftest's byte-level tokenizer, without control tokens."""
    model = json.loads(build_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted((token for token in model["vocab"] if token not in SPECIAL), key=model["vocab"].get)
    return {token: number for number, token in enumerate(tokens)}, [tuple(merge) for merge in model["merges"]]


def gpt2_kind():
    """Control tokens in the model's vocabulary, in front."""
    return build_tokenizer()


def qwen_kind():
    """Control tokens behind the model's vocabulary and not in it, as Qwen publishes them; NFC."""
    vocabulary, merges = trained()
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token=SPECIAL[0], pad_token=SPECIAL[3])
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    return tokenizer


def llama3_kind():
    """A word that is in the vocabulary is taken without merges."""
    vocabulary, merges = trained()
    vocabulary["Ġaspirin"] = len(vocabulary)  # no merge leads there
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=SPECIAL[0], pad_token=SPECIAL[3])


def pieces():
    """(vocabulary, merges) as SentencePiece has them: bytes, a few characters, what follows from them."""
    trainer = Tokenizer(models.BPE())
    trainer.pre_tokenizer = pre_tokenizers.Metaspace()
    known = sorted({*"abcdefghijklmnopqrstuvwxyz▁.,HP:高血压患者"})
    options = {"initial_alphabet": known, "limit_alphabet": len(known), "show_progress": False}
    trainer.train_from_iterator(CORPUS + ["高血压患者"], trainers.BpeTrainer(vocab_size=120, **options))
    model = json.loads(trainer.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(model["vocab"], key=model["vocab"].get)
    return {token: number for number, token in enumerate(tokens)}, [tuple(merge) for merge in model["merges"]]


def llama2_kind():
    """Metaspace as pre-tokenizer, which splits nothing."""
    vocabulary, merges = pieces()
    return LlamaTokenizer(vocab=vocabulary, merges=merges)


def old_llama2_kind():
    """The same by a normaliser, and no pre-tokenizer."""
    inner = sentencepiece_tokenizer()
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma_kind():
    """Words split at blanks, nothing put in front."""
    inner = sentencepiece_tokenizer()
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece_tokenizer():
    vocabulary, merges = pieces()
    inner = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return inner


KINDS = {
    "gpt2": (gpt2_kind, BYTE_LEVEL),
    "qwen": (qwen_kind, BYTE_LEVEL),
    "llama3": (llama3_kind, BYTE_LEVEL),
    "llama2": (llama2_kind, SENTENCEPIECE),
    "old llama2": (old_llama2_kind, SENTENCEPIECE),
    "gemma": (gemma_kind, SENTENCEPIECE),
}


def spec_of(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())


def teach(tokenizer, texts, num_tokens=60, min_frequency=3, max_width=20):
    """(new tokens, occurrences) that the tokenizer learns from texts."""
    vocabulary = read_vocabulary(spec_of(tokenizer))
    ids = read_pieces(tokenizer.backend_tokenizer, vocabulary, texts, lambda done: None)
    return learn(ids, vocabulary, num_tokens, min_frequency, max_width, lambda done: None)


def extend(tokenizer, tokens):
    """The extended tokenizer, in memory."""
    spec = spec_of(tokenizer)
    add_tokens(spec, tokens)
    return Tokenizer.from_str(json.dumps(spec))


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module", params=KINDS)
def grown(request, tmp_path_factory):
    """(old, new, tokens) of a kind of tokenizer, written by the tool's own function and loaded as a stage loads it."""
    build, kind = KINDS[request.param]
    tokenizer = build()
    tokens, _ = teach(tokenizer, TEXTS)
    directory = tmp_path_factory.mktemp("tokenizer")
    Qwen3Config().save_pretrained(directory)
    extended = tool.write_tokenizer(tokenizer, tokens, directory)
    assert kind_of(spec_of(tokenizer)) == kind and len(tokens) == 60
    return tokenizer, extended, tokens


# -- what a text becomes ---------------------------------------------------------------------------------------------

SCRAPS = (
    *("高血压", "患者", "阿司匹林", "发烧", "糖尿病", "的", "，", "。", "１２", "龘", "𠮷", "é", "ñandú", "αβ"),
    *("hypertension", "Patients", "aspirin", "the", "XYZ", "don't", "H1N1", "37.5", "140/90", "\t", "\n\n", "  ", " "),
    *("🙂", "👩‍⚕️", "🇨🇳", "for i in range(9):\n    x[i] += 1", "\u200b", "\u0301", "▁", "<0x41>", "<s>", "<|im_end|>"),
    *("<tool_call>", "<|endoftext|>", "\u2028", "ﷺ", "ก็", "\x07", "<|im_"),
)


def random_texts(count, seed):
    draw = random.Random(seed)
    for _ in range(count):
        some = [draw.choice(SCRAPS) for _ in range(draw.randrange(1, 12))]
        some += [chr(draw.choice([*range(32, 0x600), *range(0x4E00, 0x9FFF), *range(0x1F300, 0x1F6FF)]))]
        draw.shuffle(some)
        yield draw.choice(["", " "]).join(some)


def test_new_ids_are_the_old_ids_some_of_them_joined(grown):
    tokenizer, extended, tokens = grown
    old, new, joined = tokenizer.backend_tokenizer, extended.backend_tokenizer, {each.id: each for each in tokens}
    shorter = 0
    for text in [*TEXTS, *random_texts(400, seed=1)]:
        before, after = ids_of(old, text), ids_of(new, text)
        parts = [piece for number in after for piece in (joined[number].pieces if number in joined else [number])]
        assert parts == before, text
        assert new.decode(after, skip_special_tokens=False) == old.decode(before, skip_special_tokens=False)
        if not joined.keys() & set(after):
            assert after == before
        shorter += len(after) < len(before)
    assert shorter > 200


def test_every_new_token_is_produced_and_every_old_one_keeps_its_id(grown):
    tokenizer, extended, tokens = grown
    old, new = tokenizer.get_vocab(), extended.get_vocab()
    assert {token: new[token] for token in old} == old
    assert {token: number for token, number in new.items() if token not in old} == {
        each.token: each.id for each in tokens
    }
    assert [each.id for each in tokens] == list(range(max(old.values()) + 1, max(old.values()) + 61))
    for each in tokens:
        assert [piece.id for piece in extended.backend_tokenizer.model.tokenize(each.token)] == [each.id]


def test_control_tokens_are_read_as_before_and_never_forged(grown):
    tokenizer, extended, _ = grown
    assert extended.special_tokens_map == tokenizer.special_tokens_map
    assert extended.added_tokens_decoder == tokenizer.added_tokens_decoder
    for control in tokenizer.added_tokens_decoder.values():
        text = f"高血压{control.content}高血压"
        number = tokenizer.convert_tokens_to_ids(control.content)
        assert number in ids_of(extended.backend_tokenizer, text)
        samples = encode_document(document_control(extended), extended, text, 1000)
        assert number not in samples[0].input_ids[:-1][1 if extended.bos_token_id is not None else 0 :]


def test_a_tokenizer_that_is_saved_again_is_the_same(grown, tmp_path, capfd):
    _, extended, _ = grown
    extended.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert "hole" not in capfd.readouterr().out  # what the tokenizers library prints about unused ids
    for text in random_texts(50, seed=2):
        assert ids_of(again.backend_tokenizer, text) == ids_of(extended.backend_tokenizer, text)


def test_terms_of_the_field_become_shorter(grown):
    tokenizer, extended, _ = grown
    for term in ("高血压", " hypertension"):
        before, after = (len(ids_of(each.backend_tokenizer, term)) for each in (tokenizer, extended))
        assert after < before


# -- which tokens ----------------------------------------------------------------------------------------------------


def test_tokens_and_what_they_save_are_those_of_a_count_by_hand():
    # a b | Ġ a b | Ġ a b | Ġ a b c:  (a, b) 4 times, (Ġ, a) 3; then (Ġ, ab) 3 times; then (Ġab, c) once, too rare
    tokenizer = bytes_only()
    a, b, blank = (tokenizer.convert_tokens_to_ids(token) for token in "abĠ")
    first = len(tokenizer)
    tokens, occurrences = teach(tokenizer, ["ab ab ab abc"], min_frequency=2)
    assert [(each.id, each.token, each.content, each.parts, each.pieces) for each in tokens] == [
        (first, "ab", b"ab", (a, b), (a, b)),
        (first + 1, "Ġab", b" ab", (blank, first), (blank, a, b)),
    ]
    assert occurrences == {first: 1, first + 1: 3}  # ab | Ġab | Ġab | Ġab c
    old, new = tokenizer.backend_tokenizer, extend(tokenizer, tokens)
    saved = [tool.describe(each, occurrences[each.id])["saved"] for each in tokens]
    assert saved == [1, 6] and len(ids_of(old, "ab ab ab abc")) - len(ids_of(new, "ab ab ab abc")) == 7


def bytes_only():
    """A byte-level tokenizer without a merge."""
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(sorted(trained_alphabet()))}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([SPECIAL[0]])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=SPECIAL[0])


def trained_alphabet():
    return pre_tokenizers.ByteLevel.alphabet()


def test_sizes_of_held_out_text_are_those_of_a_count_by_hand():
    tokenizer = bytes_only()
    tokens, _ = teach(tokenizer, ["高血压"] * 3)
    assert [shown(each.content) for each in tokens][-1] == "高血压" and len(tokens) == 8  # nine bytes, eight merges
    found = measure(tokenizer.backend_tokenizer, extend(tokenizer, tokens), ["高血压", "the", "血"], lambda done: None)
    chinese = {"passages": 2, "characters": 4, "bytes": 12, "tokens_before": 12, "tokens_after": 2}
    english = {"passages": 1, "characters": 3, "bytes": 3, "tokens_before": 3, "tokens_after": 3}
    assert found == {
        "Chinese": chinese,
        "English": english,
        "all": {name: chinese[name] + english[name] for name in chinese},
    }
    assert tool.ratios(chinese) == {
        **{"tokens_per_character_before": 3.0, "tokens_per_character_after": 0.5},
        **{"characters_per_token_before": 0.3333, "characters_per_token_after": 2.0},
        **{"bytes_per_token_before": 1.0, "bytes_per_token_after": 6.0},
    }


def plain_count(tokenizer, texts, num_tokens, min_frequency):
    """Continued BPE training in its plainest form, for texts of Latin letters: [(token, count when chosen)]."""
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    words = []
    for text in texts:
        encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        groups = collections.defaultdict(list)
        for number, word in zip(encoding.ids, encoding.word_ids, strict=True):
            groups[word].append(number)
        words += groups.values()
    found, taken = [], set(names.values())
    while len(found) < num_tokens:
        counts = collections.Counter()
        for word in words:
            place = 0
            while place + 1 < len(word):
                pair = (word[place], word[place + 1])
                joined = names[pair[0]] + names[pair[1]]
                if joined.removeprefix("Ġ").isalpha() and joined not in taken:
                    counts[pair] += 1
                place += 2 if word[place : place + 3] == [pair[0]] * 3 else 1  # of three alike one pair counts
        frequent = [(-count, *pair) for pair, count in counts.items() if count >= min_frequency]
        if not frequent:
            break
        count, left, right = min(frequent)
        new = len(names)
        names[new] = names[left] + names[right]
        found.append((names[new], -count))
        taken.add(names[new])
        for word in words:
            place = 0
            while place + 1 < len(word):
                if word[place : place + 2] == [left, right]:
                    word[place : place + 2] = [new]
                place += 1
    return found


@pytest.mark.parametrize("seed", range(3))
def test_each_token_is_the_one_that_saves_most(seed):
    draw = random.Random(seed)
    stems = ["card", "itis", "hyper", "tension", "gastr", "o", "ology", "dia", "betes", "anan", "pneumo", "nia"]
    texts = [
        " ".join("".join(draw.choices(stems, k=draw.randrange(1, 4))) for _ in range(30)) + draw.choice([".", " 12 x"])
        for _ in range(20)
    ]
    tokenizer = build_tokenizer()
    tokens, occurrences = teach(tokenizer, texts, num_tokens=120, min_frequency=4, max_width=99)
    wanted = plain_count(tokenizer, texts, 120, 4)
    assert [each.token for each in tokens] == [token for token, _ in wanted] and len(tokens) > 60
    saved = sum(count * (len(each.pieces) - 1) for each, count in zip(tokens, occurrences.values(), strict=True))
    new = extend(tokenizer, tokens)
    lengths = [sum(len(ids_of(each, text)) for text in texts) for each in (tokenizer.backend_tokenizer, new)]
    assert lengths[0] - lengths[1] == saved


def test_three_of_a_kind_in_a_row_are_joined_from_the_left():
    # a a a a a | Ġ a a a:  the pair stands twice in the first word and once in the second
    tokenizer = bytes_only()
    tokens, occurrences = teach(tokenizer, ["aaaaa aaa"] * 2, num_tokens=1, min_frequency=2)
    assert [each.token for each in tokens] == ["aa"] and list(occurrences.values()) == [6]
    assert len(ids_of(extend(tokenizer, tokens), "aaaaa aaa")) == 3 + 3  # aa aa a | Ġ aa a


def test_a_character_without_a_piece_becomes_one_when_that_saves_most():
    # 糖尿病: 9 bytes, three characters each twice: 2 · 2 bytes saved by each; then pairs, 2 saved by each
    tokenizer = llama2_kind()
    tokens, occurrences = teach(tokenizer, ["糖尿病", "a糖尿病"], num_tokens=9, min_frequency=2)
    assert {(each.token, each.parts, len(each.pieces)) for each in tokens[:3]} == {
        (each, None, 3) for each in "糖尿病"
    }
    assert [(each.token, len(each.pieces)) for each in tokens[4:]] == [("糖尿病", 9)] and tokens[3].parts
    assert occurrences[tokens[-1].id] == 2 and sum(occurrences.values()) == 2
    sugar = next(each for each in tokens if each.token == "糖")
    assert "".join(tokenizer.convert_ids_to_tokens(list(sugar.pieces))) == "<0xE7><0xB3><0x96>"


@pytest.mark.parametrize(
    ("texts", "num_tokens", "wanted"),
    [
        ([".糖尿", ".糖尿", ".糖"], 9, ["糖", "尿", "糖尿"]),  # 3 · 2 bytes are saved, 2 · 2, then the pair twice
        ([".尿", ".尿 xq xq xq"], 1, ["尿"]),  # 2 · 2 bytes are more than 3 pairs
        (["Z Z", "Z"], 9, []),  # a character of one byte saves nothing
    ],
)
def test_characters_and_pairs_are_weighed_by_what_they_save(texts, num_tokens, wanted):
    tokens, _ = teach(llama2_kind(), texts, num_tokens=num_tokens, min_frequency=2)
    assert [each.token for each in tokens] == wanted


def test_a_token_the_base_has_is_not_added_again():
    tokenizer = bytes_only()
    spec = spec_of(tokenizer)
    spec["model"]["vocab"]["ab"] = len(tokenizer)  # no merge leads there, so text holds a and b
    dead = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))
    tokens, _ = teach(dead, ["ab ab ab abc"], min_frequency=2)  # not (a, b), 4 times, but (Ġ, a) and (Ġa, b), each 3
    assert [each.token for each in tokens] == ["Ġa", "Ġab"]


def test_nothing_is_joined_across_what_the_tokenizer_splits():
    inner = bytes_only().backend_tokenizer
    split = pre_tokenizers.Split(Regex("[A-Za-z]+|[^A-Za-z]+"), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokens, occurrences = teach(tokenizer, ["ct检查"] * 5, num_tokens=99)
    assert {shown(each.content) for each in tokens if occurrences[each.id]} == {"ct", "检查"}


@pytest.mark.parametrize(
    ("content", "allowed"),
    [
        *((text.encode(), True) for text in ("a", " a", "高血压", " 高", "B超", "é", "ก็", "🙂", "℃", "病人abc")),
        *(
            (text.encode(), False)
            for text in (" ", "1", "a1", "１", "a.", "。\n", "a b", "  a", "🙂🙂", "🙂a", "\n", "½")
        ),
        *((part, True) for part in (b"\xe9", b"\xe9\xab", b"\xab\x98", b"\x98", b" \xe9", b"\xf0\x9f\x99")),
        *((part, False) for part in (b"\x98\xe8", b"a\xe9", b"\xe9\xab\x98\xe8", b"\xff", b"\xc0\x80", b"\x80" * 4)),
    ],
)
def test_a_new_token_is_a_word_a_character_or_a_part_of_one(content, allowed):
    assert is_token(content, 20) == allowed


def test_a_token_is_no_wider_than_asked():
    tokenizer = build_tokenizer()
    tokens, _ = teach(tokenizer, TEXTS, num_tokens=300, max_width=6)
    texts = [shown(each.content) for each in tokens if not shown(each.content).startswith("<")]
    assert max(len(text) for text in texts if text.isascii()) == 6
    assert max(len(text) for text in texts if "高" <= text[0]) <= 3 and len(texts) > 50


def test_numbers_and_punctuation_keep_their_tokens():
    tokens, _ = teach(build_tokenizer(), ["In 2026, 140/90 mmHg... 12.5 mg/kg!"] * 20, num_tokens=99)
    assert tokens and not any(character in shown(each.content) for each in tokens for character in "0123456789.,/!")


# -- kinds that are refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "Unigram"}, "weighs all its pieces against each other, so that new ones change how other text is"),
        ({"type": "WordPiece"}, "a WordPiece tokenizer has no merges to add to"),
        ({"type": "BPE", "end_of_word_suffix": "</w>"}, "has end_of_word_suffix '</w>', which is not supported"),
        ({"type": "BPE", "dropout": 0.1}, "has dropout 0.1, which is not supported"),
        ({"type": "BPE", "byte_fallback": False}, "knows no bytes"),
    ],
)
def test_a_tokenizer_that_cannot_be_extended_says_why(model, message):
    with pytest.raises(ValueError, match=message):
        kind_of({"model": model, "pre_tokenizer": {"type": "Whitespace"}, "normalizer": None, "added_tokens": []})


# -- the corpus ------------------------------------------------------------------------------------------------------


def test_a_corpus_is_anything_the_toolkit_reads(tmp_path):
    write_jsonl(tmp_path / "c" / "a.jsonl", [{"text": "高血压"}, {"text": "高血压"}])
    write_jsonl(tmp_path / "c" / "b.jsonl", [{"instruction": "什么是发烧？", "input": "", "output": "体温升高。"}])
    pair = {"question": "Fever?", "response_chosen": "Rest.", "response_rejected": "Panic."}
    write_jsonl(tmp_path / "c" / "d.jsonl", [pair, {"nonsense": 1}])
    (tmp_path / "c" / "e.txt").write_text("one\n\ntwo\n")
    found = read_documents("--corpus", str(tmp_path / "c"), "auto", 10**6, seed=1)
    assert sorted(found.texts) == ["Fever?\nRest.\nPanic.", "one", "two", "什么是发烧？\n体温升高。", "高血压"]
    assert (found.records, found.unreadable) == (7, 1) and len(found.files) == 4


def test_ids_roles_and_tools_are_no_text():
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "tools": [{"x": "y"}]}
    assert list(strings(record)) == ["a", "b"] and list(strings([1, None, ("c",)])) == ["c"]


def test_what_is_drawn_depends_on_contents_and_seed_alone(tmp_path):
    rows = [{"text": f"text number {number:04}"} for number in range(300)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", rows[::-1] + rows)
    draws = [
        read_documents("--corpus", str(tmp_path / name), "auto", limit, seed).texts
        for name, limit, seed in (
            ("a.jsonl", 1600, 1),
            ("b.jsonl", 1600, 1),
            ("a.jsonl", 1600, 2),
            ("a.jsonl", 9**9, 1),
        )
    ]
    assert len(draws[0]) == 100 and draws[0] == draws[1] and draws[0] != draws[2]  # 16 characters each
    assert sorted(draws[3]) == [row["text"] for row in rows] and draws[3][:100] == draws[0]


def test_long_texts_are_cut_at_line_ends(monkeypatch):
    monkeypatch.setattr(tool, "PASSAGE_CHARS", 10)
    text = "aaaa\nbbbb\ncccccccccccccccc\n\ndd"
    assert list(passages(text)) == ["aaaa\nbbbb", "cccccccccc", "cccccc\n\ndd"]
    assert list(passages("\n \n")) == []


def test_a_share_of_each_language_is_held_out():
    texts = [f"word {number} fever" for number in range(20)] + [f"发烧{number}" for number in range(10)] + ["1", "2"]
    learnt, held_out = hold_out(texts, 10.0)
    assert sorted(learnt + held_out) == sorted(texts)
    assert [language_of(text) for text in held_out] == ["English"] * 3 + [
        "Chinese",
        "other",
    ]  # 25 of 250 characters, 3 of 30, 1 of 2
    assert hold_out(["one"], 10.0) == (["one"], [])


# -- the rows --------------------------------------------------------------------------------------------------------

FLAGS = ("--num_tokens", "60", "--min_frequency", "3")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    write_jsonl(root / "texts.jsonl", [{"text": f"{text} {number}"} for number, text in enumerate(TEXTS)])
    write_jsonl(root / "held_out.jsonl", [{"text": "高血压患者。"}, {"text": "Hypertension is common."}])
    write_jsonl(root / "chats.jsonl", conversations(12))
    return root


def run_tool(base, corpus, target, *flags):
    given = ["--base_model", base, "--corpus", corpus / "texts.jsonl", "--output_dir", target, *FLAGS, *flags]
    main(parse_args(list(map(str, given))))
    return target


@pytest.fixture(scope="module", params=["tied", "untied"])
def family(request, corpus, tmp_path_factory):
    """(base, extended, whether the head shares the embedding's matrix)"""
    root = tmp_path_factory.mktemp("family")
    base = build_model(root / "base", "qwen3" if request.param == "tied" else "llama")
    settings = {"eos_token_id": [2, 0], "pad_token_id": 3, "do_sample": True, "temperature": 0.3}
    (base / "generation_config.json").write_text(json.dumps(settings))
    return base, run_tool(base, corpus, root / "extended"), request.param == "tied"


def made_by(directory):
    return json.loads((directory / EXTENDED_VOCABULARY).read_text(encoding="utf-8"))


def matrices(directory):
    """Embedding and, if it is another, head."""
    tensors = load_file(directory / "model.safetensors")
    return [tensors[name] for name in ("model.embed_tokens.weight", "lm_head.weight") if name in tensors]


def test_a_new_row_is_the_mean_of_its_old_pieces(family):
    base, extended, tied = family
    assert len(matrices(extended)) == (1 if tied else 2)
    for old, new in zip(matrices(base), matrices(extended), strict=True):
        assert torch.equal(new[:400], old[:400])
        for token in made_by(extended)["tokens"]:
            by_hand = sum(old[piece].double() for piece in token["pieces"]) / len(token["pieces"])
            assert_close(new[token["id"]].double(), by_hand, rtol=0, atol=1e-7)
        assert new.shape == (512, 64)  # 460 tokens, and on to a multiple of 64
        assert_close(new[460:], old[:400].mean(0).expand(52, 64))


def test_the_pieces_are_those_the_base_reads_the_token_as(family):
    base, extended, _ = family
    tokenizer = AutoTokenizer.from_pretrained(base)
    for token in made_by(extended)["tokens"]:
        found = tokenizer.backend_tokenizer.model.tokenize(token["token"])
        assert [piece.id for piece in found] == token["pieces"]


def test_a_model_reads_text_without_a_new_token_as_its_base_does(family):
    base, extended, tied = family
    first, second = (AutoModelForCausalLM.from_pretrained(place) for place in (base, extended))
    assert (second.lm_head.weight is second.model.embed_tokens.weight) == tied == second.config.tie_word_embeddings
    assert second.config.vocab_size == 512
    ids = torch.tensor([AutoTokenizer.from_pretrained(extended).encode("Drink 12 cups; 7 or 8?")])
    assert ids.max() < 400
    with torch.no_grad():
        assert_close(second(ids).logits[..., :400], first(ids).logits[..., :400], rtol=1e-5, atol=1e-5)


def test_what_belongs_to_the_base_is_kept(family):
    base, extended, _ = family
    old, new = (AutoTokenizer.from_pretrained(place) for place in (base, extended))
    assert new.chat_template == old.chat_template and new.special_tokens_map == old.special_tokens_map
    names = ("eos_token_id", "pad_token_id", "bos_token_id", "unk_token_id")
    assert [getattr(new, name) for name in names] == [getattr(old, name) for name in names]
    configs = [json.loads((place / "config.json").read_text()) for place in (base, extended)]
    assert {key for key in configs[0] if configs[0][key] != configs[1][key]} == {"vocab_size"}
    settings = json.loads((extended / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [2, 0] and settings["temperature"] == 0.3


def test_the_record_says_how_it_was_made(family, corpus):
    base, extended, tied = family
    made, stage = made_by(extended), stage_of(extended)
    assert made["base_model"]["fingerprint"] == base_fingerprint(str(base)) and made["kind"] == BYTE_LEVEL
    assert made["base_model"]["name_or_path"] == "../base" and made["num_tokens"] == len(made["tokens"]) == 60
    grown = made["embeddings"]
    assert (grown["rows_before"], grown["rows_after"], grown["tied"]) == (448, 512, tied)
    assert grown["parameters_added"] == 64 * 64 * (1 if tied else 2)
    sizes = [sum(tensor.numel() for tensor in load_file(place / "model.safetensors").values()) for place in family[:2]]
    assert grown["parameters_before"] == sizes[0] and sizes[1] - sizes[0] == grown["parameters_added"]
    texts = [json.loads(line)["text"] for line in (corpus / "texts.jsonl").open(encoding="utf-8")]
    assert made["corpus"]["characters"] + made["held_out"]["characters"] == sum(map(len, texts))
    old, new = (AutoTokenizer.from_pretrained(place) for place in (base, extended))
    row = made["held_out_sizes"]["all"]
    assert row["tokens_after"] < row["tokens_before"] <= sum(len(old.encode(text)) for text in texts)
    assert stage["stage"] == "extend_vocabulary" and all(check["passed"] for check in stage["checks"].values())
    lines = (extended / "sha256sums.txt").read_text().splitlines()
    assert {line.split("  ")[1]: line.split("  ")[0] for line in lines} == {
        path.name: file_sha256(path) for path in extended.iterdir() if path.name != "sha256sums.txt"
    }
    assert len(new) == 460


def test_held_out_texts_are_not_learnt_from(tiny_qwen3, corpus, tmp_path, capsys):
    shutil.copytree(corpus, tmp_path / "corpus")
    both = tmp_path / "corpus" / "texts.jsonl"
    both.write_text(both.read_text() + (corpus / "held_out.jsonl").read_text())
    flags = ("--validation_file_dir", corpus / "held_out.jsonl", "--validation_split_percentage", "5")
    made = made_by(run_tool(tiny_qwen3, tmp_path / "corpus", tmp_path / "extended", *flags))
    assert made["corpus"]["passages"] == len(TEXTS) and made["corpus"]["records"] == len(TEXTS) + 2
    assert made["held_out"]["files"] == [str(corpus / "held_out.jsonl")]
    assert made["held_out_sizes"]["all"]["characters"] == len("高血压患者。Hypertension is common.")
    old, new = (AutoTokenizer.from_pretrained(place) for place in (tiny_qwen3, tmp_path / "extended"))
    by_hand = [len(each.encode("高血压患者。")) for each in (old, new)]
    row = made["held_out_sizes"]["Chinese"]
    assert [row["tokens_before"], row["tokens_after"]] == by_hand
    told = capsys.readouterr().out
    line = next(line.split() for line in told.splitlines() if line.startswith("Chinese"))
    assert line[1:] == [
        "6",
        *map(str, by_hand),
        *(f"{n / 6:.3f}" for n in by_hand),
        f"{by_hand[1] / by_hand[0] - 1:.1%}",
    ]


def test_rows_beyond_the_tokenizer_are_used_first_and_never_taken_away(tiny_qwen3, corpus, tmp_path, capsys):
    base = shutil.copytree(tiny_qwen3, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(530)  # far more than 430 and its next multiple of 64
    model.save_pretrained(base)
    made = made_by(run_tool(base, corpus, tmp_path / "extended", "--num_tokens", "30"))
    old, new = matrices(base)[0], matrices(tmp_path / "extended")[0]
    assert new.shape == old.shape == (530, 64) and made["embeddings"]["parameters_added"] == 0
    assert [token["id"] for token in made["tokens"]] == list(range(400, 430))
    assert torch.equal(new[430:], old[430:]) and not torch.equal(new[400:430], old[400:430])
    assert "530 before, 530 after, shared with the head; 0 parameters added" in capsys.readouterr().out


def test_a_head_with_a_bias_and_bf16_rows_are_means_too():
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = PhiForCausalLM(PhiConfig(vocab_size=10, **sizes)).to(torch.bfloat16)
    torch.nn.init.normal_(model.lm_head.bias)
    before = {name: tensor.clone().double() for name, tensor in model.state_dict().items()}
    tokens, _ = teach(bytes_only(), ["ab ab ab abc"], min_frequency=2)
    tokens = [type(token)(10 + i, token.token, b"", None, (3, 4, 7)[: 2 + i]) for i, token in enumerate(tokens)]
    add_rows(model, tokens)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        after, old = model.state_dict()[name], before[name]
        assert after.shape[0] == 64 and torch.equal(after[:10].double(), old)
        for number, wanted in ((10, (old[3] + old[4]) / 2), (11, (old[3] + old[4] + old[7]) / 3)):
            assert_close(after[number].double(), wanted, rtol=2**-8, atol=0)


def test_a_sentencepiece_base_is_extended(corpus, tmp_path):
    tokenizer = llama2_kind()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=16, **sizes)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    made = made_by(run_tool(tmp_path / "base", corpus, tmp_path / "extended"))
    assert made["kind"] == SENTENCEPIECE and made["held_out_sizes"]["Chinese"]["tokens_per_character_before"] > 1
    again = AutoTokenizer.from_pretrained(tmp_path / "extended")
    text = "高血压患者 hypertension 🙂\n龘"
    assert again.decode(again.encode(text), skip_special_tokens=True) == text
    assert len(again.encode(text)) < len(tokenizer.encode(text))
    assert reloaded(tmp_path / "extended").get_input_embeddings().weight.shape[0] % 64 == 0


# -- what is refused -------------------------------------------------------------------------------------------------


def refusal(base, corpus, target, *flags):
    """The message with which it ends; nothing is left."""
    before = sorted(target.iterdir()) if target.exists() else None
    with pytest.raises((ValueError, OSError)) as error:
        run_tool(base, corpus, target, *flags)
    assert (sorted(target.iterdir()) if target.exists() else None) == before
    assert not target.with_name(target.name + ".unfinished").exists() and "\n" not in str(error.value)
    return str(error.value)


def test_bases_that_cannot_grow_are_refused(tiny_qwen3, corpus, tmp_path):
    adapter = write_adapter(tiny_qwen3, tmp_path / "sft")
    message = refusal(adapter, corpus, tmp_path / "out")
    assert f"--base_model {adapter} is an adapter on {tiny_qwen3}" in message and "tools.merge_adapter" in message
    shutil.copytree(tiny_qwen3, tmp_path / "quantised")
    config = json.loads((tiny_qwen3 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    assert "holds quantised weights, whose embeddings cannot grow" in refusal(
        tmp_path / "quantised", corpus, tmp_path / "out"
    )
    shutil.copytree(tiny_qwen3, tmp_path / "reward")
    config = json.loads((tiny_qwen3 / "config.json").read_text())
    (tmp_path / "reward" / "config.json").write_text(
        json.dumps({**config, "architectures": ["Qwen3ForSequenceClassification"]})
    )
    assert "is a reward model" in refusal(tmp_path / "reward", corpus, tmp_path / "out")
    assert "no such model directory" in refusal(tmp_path / "nothing", corpus, tmp_path / "out")


def test_a_directory_that_holds_something_is_replaced_only_when_asked(tiny_qwen3, corpus, tmp_path):
    target = run_tool(tiny_qwen3, corpus, tmp_path / "out", "--num_tokens", "3")
    assert "is not empty; name another directory, or replace it with --overwrite_output_dir True" in refusal(
        tiny_qwen3, corpus, target
    )
    run_tool(tiny_qwen3, corpus, target, "--num_tokens", "5", "--overwrite_output_dir")
    assert made_by(target)["num_tokens"] == 5
    (target / "thesis.docx").write_text("mine")
    assert "holds 'thesis.docx', which --overwrite_output_dir would delete" in refusal(
        tiny_qwen3, corpus, target, "--overwrite_output_dir"
    )
    assert "is what the run starts from" in refusal(tiny_qwen3, corpus, tiny_qwen3, "--overwrite_output_dir")


def test_a_corpus_that_teaches_nothing_is_refused(tiny_qwen3, corpus, tmp_path, caplog):
    out = tmp_path / "out"
    message = refusal(tiny_qwen3, corpus, out, "--min_frequency", "999")
    assert "no two pieces of a word stand together 999 times" in message and "lower --min_frequency" in message
    write_jsonl(tmp_path / "one" / "texts.jsonl", [{"text": "高血压"}])
    assert "holds one text only" in refusal(tiny_qwen3, tmp_path / "one", out)
    write_jsonl(tmp_path / "bad" / "texts.jsonl", [{"nonsense": 1}] * 2)
    assert "none of the 2 records could be read; the first: " in refusal(tiny_qwen3, tmp_path / "bad", out)
    assert "no such file or directory" in refusal(tiny_qwen3, tmp_path / "missing", out)
    same = ("--validation_file_dir", corpus / "texts.jsonl")
    assert "stands in --validation_file_dir" in refusal(tiny_qwen3, corpus, out, *same)
    run_tool(tiny_qwen3, corpus, out, "--num_tokens", "5000")
    assert "tokens were found instead of 5000" in caplog.text


def test_a_tokenizer_of_another_kind_is_named_with_its_base(tiny_qwen3, corpus, tmp_path):
    shutil.copytree(tiny_qwen3, tmp_path / "unigram")
    inner = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("<|endoftext|>", -9.0)], unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>").save_pretrained(tmp_path / "unigram")
    message = refusal(tmp_path / "unigram", corpus, tmp_path / "out")
    assert message.startswith(f"{tmp_path / 'unigram'}: a Unigram tokenizer weighs all its pieces")


def test_an_error_is_one_line_and_exit_code_2(tiny_qwen3, tmp_path, capsys):
    args = parse_args(
        ["--base_model", str(tiny_qwen3), "--corpus", str(tmp_path / "no"), "--output_dir", str(tmp_path / "o")]
    )
    with pytest.raises(SystemExit) as end:
        run(main, args, tool.PROGRAM, "")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and error.startswith("python -m tools.extend_vocabulary: error: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_tokens", "0"], "--num_tokens 0 must be at least 1"),
        (["--min_frequency", "1"], "--min_frequency 1 must be at least 2"),
        (["--validation_split_percentage", "100"], "--validation_split_percentage 100 must be between 0 and 100"),
        (["--max_shard_size", "big"], "--max_shard_size 'big' is no size such as 5GB"),
        (["--num_token", "5"], "unknown flag --num_token; did you mean --num_tokens?"),
    ],
)
def test_wrong_flags_are_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        parse_args(["--base_model", "a", "--corpus", "b", "--output_dir", "c", *flags])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


def test_help_loads_nothing_heavy():
    code = (
        "import sys, tools.extend_vocabulary as tool\n"
        "try: tool.parse_args(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.startswith("usage: python -m tools.extend_vocabulary") and told.endswith("[]\n")


# -- faults in what was written --------------------------------------------------------------------------------------


def test_a_tokenizer_that_moved_an_id_is_caught(tmp_path, monkeypatch, corpus):
    """As it happens when added tokens are left out of the model's vocabulary."""
    tokenizer = qwen_kind()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=448, num_key_value_heads=1, head_dim=16, **sizes)).save_pretrained(
        tmp_path / "base"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    run_tool(tmp_path / "base", corpus, tmp_path / "right")

    def without_added(spec, tokens):
        return add_tokens({**spec, "added_tokens": []}, tokens)

    monkeypatch.setattr("stagekit.vocabulary.add_tokens", without_added)
    message = refusal(tmp_path / "base", corpus, tmp_path / "out")
    assert message.startswith("check vocabulary_is_extended failed: '<tool_call>' has the id")


def test_a_merge_that_changes_old_text_is_caught(tiny_qwen3, corpus, tmp_path, monkeypatch):
    def in_front(spec, tokens):
        count = len(spec["model"]["merges"])
        add_tokens(spec, tokens)
        merges = spec["model"]["merges"]
        spec["model"]["merges"] = merges[count:] + merges[:count]

    monkeypatch.setattr("stagekit.vocabulary.add_tokens", in_front)
    assert "check vocabulary_is_extended failed" in refusal(tiny_qwen3, corpus, tmp_path / "out")


def test_an_old_row_that_changed_is_caught(tiny_qwen3, corpus, tmp_path, monkeypatch):
    def careless(model, tokens):
        add_rows(model, tokens)
        with torch.no_grad():
            model.get_input_embeddings().weight[17, 3] += 1e-3

    monkeypatch.setattr(tool, "add_rows", careless)
    message = refusal(tiny_qwen3, corpus, tmp_path / "out")
    assert message.startswith("check base_is_unchanged failed: ") and "is not the base's" in message


# -- the way through the stages --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(family, corpus, tmp_path_factory):
    """(base, extended, pt, sft, tied): pretraining as the tool's last line says, then fine-tuning."""
    base, extended, tied = family
    root = extended.parent
    modules = "embed_tokens" if tied else "embed_tokens,lm_head"
    common = ("--do_train", "--max_steps", "3", "--learning_rate", "1e-2", "--report_to", "none")
    common += ("--disable_tqdm", "True", "--data_cache_dir", root / "cache", "--logging_steps", "1")
    given = ("--model_name_or_path", extended, "--train_file_dir", corpus / "texts.jsonl", "--output_dir", root / "pt")
    assert run_main("pretraining", *given, "--modules_to_save", modules, "--block_size", "64", *common) == 0
    given = ("--model_name_or_path", root / "pt", "--train_file_dir", corpus / "chats.jsonl")
    assert run_main("supervised_finetuning", *given, "--output_dir", root / "sft", *common) == 0
    return base, extended, root / "pt", root / "sft", tied


def saved(directory):
    return load_file(directory / "adapter_model.safetensors")


def test_the_last_line_is_the_command_to_go_on_with(tiny_qwen3, tiny_llama, corpus, tmp_path, capsys, caplog):
    for base, modules in ((tiny_qwen3, "embed_tokens"), (tiny_llama, "embed_tokens,lm_head")):
        target = run_tool(base, corpus, tmp_path / f"{base.name} extended", "--num_tokens", "5")
        assert capsys.readouterr().out.splitlines()[-1] == (
            f"train the new rows: python pretraining.py --model_name_or_path '{target}' --train_file_dir "
            f"{corpus / 'texts.jsonl'} --output_dir '{target}-pt' --modules_to_save {modules} --learning_rate 2e-4 "
            "--do_train --do_eval"
        )
        assert f"{target} has another vocabulary than {base}: adapters trained on that do not fit it" in caplog.text


def test_pretraining_and_fine_tuning_move_the_new_rows(chain):
    _, extended, pt, sft, tied = chain
    tokenizer = AutoTokenizer.from_pretrained(sft)
    number = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("高血压")[-1])
    assert 400 <= number < 460
    names = ["base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"]
    start = matrices(extended) * (2 if tied else 1)
    for name, before in zip(names, start, strict=True):
        first, second = saved(pt)[name], saved(sft)[name]
        assert (first[number] - before[number]).abs().max() > 1e-3
        assert not torch.equal(second, first)
    assert stage_of(sft)["tuning"]["continued"] and stage_of(sft)["base_model"]["name_or_path"] == "../extended"
    assert stage_of(pt)["parent"]["stage"] == "extend_vocabulary"


def test_an_adapter_holds_lora_and_the_trained_matrices_and_nothing_else(chain):
    _, _, pt, sft, tied = chain
    for directory in (pt, sft):
        tensors = saved(directory)
        whole = {name: tensor for name, tensor in tensors.items() if "lora_" not in name}
        assert sorted(whole) == ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]
        # per layer rank 8 of q (64 + 64), k, v (64 + 32), o (64 + 64), gate, up (64 + 128), down (128 + 64)
        assert sum(tensor.numel() for name, tensor in tensors.items() if name not in whole) == 2 * 8 * (
            2 * 128 + 2 * 96 + 3 * 192
        )
        assert {tensor.shape for tensor in whole.values()} == {(512, 64)}
        if tied:  # PEFT 0.21 writes the shared matrix under both names, and asks for both when it loads
            assert torch.equal(*whole.values())
            assert json.loads((directory / "adapter_config.json").read_text())["ensure_weight_tying"]


def test_an_adapter_without_the_second_name_of_a_shared_matrix_does_not_load(chain, tmp_path):
    """The reason for which it is written twice; when PEFT needs it no longer, half of the file can go."""
    from peft import PeftModel
    from safetensors.torch import save_file

    _, extended, pt, _, _ = chain
    shutil.copytree(pt, tmp_path / "pt")
    tensors = saved(pt)
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, tmp_path / "pt" / "adapter_model.safetensors")
    with pytest.raises(KeyError, match="lm_head"):
        PeftModel.from_pretrained(reloaded(extended), tmp_path / "pt")


def test_inference_loads_the_chain_and_answers(chain):
    _, _, _, sft, tied = chain
    found, loaded = answers(None, sft)
    assert all(answer.num_tokens for answer in found)
    inner = loaded.model.get_base_model()
    embedding, head = (each.modules_to_save["default"].weight for each in (inner.model.embed_tokens, inner.lm_head))
    assert (head is embedding) == tied
    assert_close(embedding, saved(sft)["base_model.model.model.embed_tokens.weight"])
    assert_close(head, saved(sft)["base_model.model.lm_head.weight"])
    assert len(loaded.chat.tokenizer) == 460


def test_the_chain_is_merged_into_one_model(chain, tmp_path):
    _, _, _, sft, tied = chain
    target = merge(sft, tmp_path / "merged")
    model = reloaded(target)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_close(model.model.embed_tokens.weight, saved(sft)["base_model.model.model.embed_tokens.weight"])
    _, loaded = answers(None, sft)
    assert_close(logits_of(model), logits_of(loaded.model), rtol=0, atol=2e-4)
    assert not (target / EXTENDED_VOCABULARY).exists()  # whose rows are trained


def test_terms_are_shorter_in_what_the_stages_wrote(chain):
    base, _, pt, sft, _ = chain
    lengths = [len(AutoTokenizer.from_pretrained(place).encode("高血压患者服用阿司匹林")) for place in (base, pt, sft)]
    assert lengths[1] == lengths[2] < lengths[0] / 2


def test_rows_that_are_not_trained_are_told(family, tiny_qwen3, tmp_path, caplog):
    from test_modeling import TRAINING, lora_args, model_args

    _, extended, tied = family

    def told(directory, **flags):
        caplog.clear()
        source = resolve(str(directory))
        model = load_model(source, model_args(), TRAINING, load_config(source, model_args()))
        add_adapter(model, source, lora_args(**flags), TRAINING)
        return [record.getMessage() for record in caplog.records if "are not trained" in record.getMessage()]

    modules = "embed_tokens" if tied else "embed_tokens,lm_head"
    (line,) = told(extended)
    assert f"the rows of the 60 tokens by which {extended} was extended are not trained" in line
    assert line.endswith(f"--modules_to_save {modules}")
    assert told(extended, modules_to_save=modules) == [] and told(tiny_qwen3) == []
    assert bool(told(extended, modules_to_save="embed_tokens")) != tied
    assert told(extended, use_peft=False) == []


def test_an_adapter_of_the_unextended_base_is_told_that_the_vocabulary_differs(family, tmp_path, caplog):
    base, extended, tied = family
    adapter = write_adapter(base, tmp_path / "sft")
    with pytest.raises(ValueError) as error:
        generation.find_source(str(extended), str(adapter))
    assert f"was trained on {base}, not on {extended}; the vocabulary differs: " in str(error.value)
    assert f"{extended} is {base} with 60 tokens more" in str(error.value)
    other = write_adapter(extended, tmp_path / "other")
    with pytest.raises(ValueError, match="the vocabulary differs"):
        generation.find_source(str(base), str(other))
    stranger = write_adapter(build_model(tmp_path / "stranger", seed=9), tmp_path / "third")
    with pytest.raises(ValueError, match=f"was trained on .*stranger, not on {extended}$"):
        generation.find_source(str(extended), str(stranger))

    (adapter / "stage.json").unlink()  # an adapter of another program, whose base is not here
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "far/away"}))
    answers(extended, adapter)
    assert "has none of the 60 tokens by which" in caplog.text
    caplog.clear()
    answers(None, other)
    assert "has none of" not in caplog.text


def test_prompts_that_a_base_was_trained_on_are_remembered(tiny_qwen3, corpus, tmp_path):
    base = shutil.copytree(tiny_qwen3, tmp_path / "base")
    np.save(base / SEEN_PROMPTS, np.arange(7, dtype=np.uint64))
    origin = {"name_or_path": ".", "revision": None, "fingerprint": base_fingerprint(str(base))}
    write_stage(base, {"format": 1, "stage": "pt", "base_model": origin, "parent": None, "seed": 1})
    target = run_tool(base, corpus, tmp_path / "extended", "--num_tokens", "5")
    assert np.load(target / SEEN_PROMPTS).tolist() == list(range(7)) and stage_of(target)["parent"]["stage"] == "pt"


@pytest.mark.parametrize(("model", "whole"), [("tiny_qwen3", 448 * 64), ("tiny_llama", 2 * 448 * 64)])
def test_the_predicted_memory_counts_matrices_that_are_trained_whole(request, tmp_path, model, whole):
    from test_modeling import TRAINING, lora_args, model_args

    base = request.getfixturevalue(model)
    training = SimpleNamespace(**vars(TRAINING), per_device_train_batch_size=1)
    adapter = write_adapter(base, tmp_path / "sft", modules_to_save=["embed_tokens", "lm_head"])

    def predicted(directory, flags):
        source = resolve(str(directory))
        config = load_config(source, model_args())
        names = whole_modules(source, flags)
        return memory.predict_training_bytes(config, model_class(config), model_args(), flags, training, 64, names)

    plain, flagged = predicted(base, lora_args()), predicted(base, lora_args(modules_to_save="embed_tokens,lm_head"))
    for parts in (flagged, predicted(adapter, lora_args())):  # the parent's modules go on without a flag
        grown = {name: parts[name] - plain[name] for name in parts}
        assert grown == {
            **{"weights": 4 * whole, "gradients": 4 * whole, "optimizer": 8 * whole, "activations": 0, "logits": 0},
            "total": 16 * whole,
        }
