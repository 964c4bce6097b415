"""New tokens for a tokenizer, learnt as its own training would go on, and put where old text stays as it was.

Byte-pair encoding always joins the pair that stands first in its list of merges. Merges behind all others can only
join what those have left (continued BPE training, arXiv:2512.03989). So the new ids of any text are its old ids, some
of them put together: no text gets longer, and one without a new token keeps its ids. No models here, and no files.
"""

import heapq
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

BYTE_LEVEL, SENTENCEPIECE = "byte-level BPE", "SentencePiece BPE"
BLANK = "▁"  # how SentencePiece writes a blank
BARRIER = -1  # in place of a piece that no new token may hold; smaller numbers are characters without a piece
BATCH = 64  # texts encoded at a time
MEASURES = ("passages", "characters", "bytes", "tokens_before", "tokens_after")
PRINTABLE = (
    *range(0x21, 0x7F),
    *range(0xA1, 0xAD),
    *range(0xAE, 0x100),
)  # bytes that byte-level BPE writes as they are
BYTES = {chr(byte): byte for byte in PRINTABLE}
BYTES |= {chr(0x100 + number): byte for number, byte in enumerate(sorted({*range(256)} - {*PRINTABLE}))}


@dataclass(frozen=True)
class NewToken:
    """A token to add.

    Attributes:
        id: behind all ids of the base.
        token: as the tokenizer's vocabulary writes it.
        content: what it stands for; a part of a character is no UTF-8.
        parts: ids of the two tokens that are joined, or None for a character that had no piece of its own.
        pieces: ids of the base for the same content.
    """

    id: int
    token: str
    content: bytes
    parts: tuple[int, int] | None
    pieces: tuple[int, ...]


@dataclass
class Vocabulary:
    """The tokens of a base.

    Attributes:
        kind: BYTE_LEVEL or SENTENCEPIECE.
        tokens, contents: {id: as the vocabulary writes it, what it stands for}.
        ids: {token: id}, added tokens included.
        first_id: of the tokens to come.
        joins: (first_id,) whether a new token may hold it.
        byte_values: (first_id,) the byte that a token of SentencePiece stands for, -1 for any other.
        characters: those met in a text without a piece of their own; character i is written as BARRIER - 1 - i.
    """

    kind: str
    tokens: dict[int, str]
    contents: dict[int, bytes]
    ids: dict[str, int]
    first_id: int
    joins: np.ndarray
    byte_values: np.ndarray
    characters: dict[str, int] = field(default_factory=dict)


# -- what kind it is -------------------------------------------------------------------------------------------------


def kind_of(spec: dict) -> str:
    """Tell the kind of a tokenizer.json.

    Raises:
        ValueError: it is of no kind whose encoding of old text can be kept; the text says why.
    """
    model = spec["model"]
    if model["type"] == "Unigram":
        raise ValueError(
            "a Unigram tokenizer weighs all its pieces against each other, so that new ones change how other text is "
            "read; take a base with a BPE tokenizer (Qwen, Llama, Mistral, Gemma, GPT-2)"
        )
    if model["type"] != "BPE":
        raise ValueError(f"a {model['type']} tokenizer has no merges to add to; take a base with a BPE tokenizer")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"this BPE tokenizer has {option} {model[option]!r}, which is not supported")
    if "ByteLevel" in {*_step_types(spec.get("pre_tokenizer")), *_step_types(spec.get("normalizer"))}:
        return BYTE_LEVEL
    if model.get("byte_fallback"):
        return SENTENCEPIECE
    raise ValueError(
        "this BPE tokenizer knows no bytes (it is neither byte-level nor has byte_fallback), so it loses characters"
    )


def _step_types(step):
    if isinstance(step, dict):
        if isinstance(step.get("type"), str):
            yield step["type"]
        for value in step.values():
            yield from _step_types(value)
    elif isinstance(step, list):
        for item in step:
            yield from _step_types(item)


def read_vocabulary(spec: dict) -> Vocabulary:
    """Take the vocabulary out of a tokenizer.json.

    Raises:
        ValueError: see kind_of.
    """
    kind = kind_of(spec)
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    ids = {**spec["model"]["vocab"], **added}
    tokens = {number: token for token, number in ids.items()}
    contents = {number: _content(kind, token) for number, token in tokens.items()}
    first_id = max(tokens) + 1
    joins, byte_values = np.zeros(first_id, dtype=bool), np.full(first_id, -1, dtype=np.int32)
    for number, token in tokens.items():
        if token in added:
            continue
        if kind == SENTENCEPIECE and _is_byte(token):
            byte_values[number] = contents[number][0]
        else:
            joins[number] = _can_join(contents[number])
    return Vocabulary(kind, tokens, contents, ids, first_id, joins, byte_values)


def _is_byte(token):
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _content(kind, token):
    if kind == BYTE_LEVEL:
        known = all(character in BYTES for character in token)  # an added token is written plainly
        return bytes(BYTES[character] for character in token) if known else token.encode()
    return bytes([int(token[3:5], 16)]) if _is_byte(token) else token.replace(BLANK, " ").encode()


# -- what a token may be ---------------------------------------------------------------------------------------------


def _can_join(content: bytes) -> bool:
    """Whether a piece may be part of a new token: letters, a blank before them, a part of a character."""
    return content == b" " or _is_fragment(content) or _is_word(_text(content))


def is_token(content: bytes, max_width: int) -> bool:
    """Whether a new token may stand for this: a word, one character that is no digit, or a part of one character.

    A word is letters with at most one blank before them. Digits stay apart, so that numbers are read as they were.
    """
    text = _text(content)
    if text is None:
        return _is_fragment(content)
    return (_is_word(text) or _is_character(text)) and _width(text) <= max_width


def _text(content):
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _is_word(text):
    letters = (text or "").removeprefix(" ")
    return bool(letters) and all(unicodedata.category(character)[0] in "LM" for character in letters)


def _is_character(text):
    return len(text) == 1 and not text.isspace() and not text.isnumeric()


def _is_fragment(content):
    """A beginning, middle or end of one character's UTF-8, perhaps behind a blank."""
    lead, *rest = content.removeprefix(b" ") or b" "
    if any(not 0x80 <= byte < 0xC0 for byte in rest):
        return False
    if 0x80 <= lead < 0xC0:
        return len(rest) < 3
    return 0xC2 <= lead < 0xF5 and len(rest) < (1 if lead < 0xE0 else 2 if lead < 0xF0 else 3)


def _width(text):
    """Columns of a text: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def shown(content: bytes) -> str:
    """A token for people: its text, or the bytes of a part of a character."""
    text = _text(content)
    return f"<{content.hex(' ').upper()}>" if text is None else text


# -- the corpus ------------------------------------------------------------------------------------------------------


def read_pieces(tokenizer, vocabulary: Vocabulary, texts: list[str], progress: Callable[[int], object]) -> np.ndarray:
    """Encode texts into what new tokens are learnt from.

    Args:
        tokenizer: tokenizers.Tokenizer without truncation and padding.
        vocabulary: its; characters without a piece are noted there.
        texts: to be encoded.
        progress: told how many characters are done.

    Returns:
        (n,) int32: ids, with BARRIER where nothing may be joined across: between texts and between what the tokenizer
        splits a text into, and at both ends.
    """
    found = [np.array([BARRIER])]
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            words = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
            ids = np.array(encoding.ids, dtype=np.int64)
            kept = np.where(vocabulary.joins[ids], ids, BARRIER)
            kept, words = _read_characters(vocabulary, ids, kept, words)
            found += [np.insert(kept, np.flatnonzero(words[1:] != words[:-1]) + 1, BARRIER), np.array([BARRIER])]
        progress(sum(map(len, batch)))
    return np.concatenate(found).astype(np.int32)


def _read_characters(vocabulary, ids, kept, words):
    """Put one number in place of the byte tokens of a character that has no piece."""
    values = vocabulary.byte_values[ids]
    places = np.flatnonzero(values >= 0)
    if not len(places):
        return kept, words
    alive = np.ones(len(ids), dtype=bool)
    for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
        place = run[0]
        for character in _text(bytes(values[run].tolist())) or "":
            number = vocabulary.characters.setdefault(character, len(vocabulary.characters))
            kept[place] = BARRIER - 1 - number if is_token(character.encode(), 2) else BARRIER
            size = len(character.encode())
            alive[place + 1 : place + size] = False
            place += size
    return kept[alive], words[alive]


# -- learning --------------------------------------------------------------------------------------------------------


class Pairs:
    """The neighbours in a text whose tokens are joined step by step.

    Attributes:
        ids: (n,) int32; a place whose token was joined to the one on its left holds BARRIER.
        next, previous: (n,) the places on the right and on the left that still hold something.
        places: {id: where it stood when it came up, from left to right}; some of them hold something else by now.
        counts: {(left, right): how often}, for those that are frequent enough. A count never rises: all occurrences of
            a pair come up at once, when the later of its tokens does.
    """

    def __init__(self, ids: np.ndarray, min_frequency: int):
        self.ids, self.min_frequency = ids, min_frequency
        self.next = np.arange(1, len(ids) + 1, dtype=np.int32)
        self.previous = np.arange(-1, len(ids) - 1, dtype=np.int32)
        order = np.argsort(ids, kind="stable").astype(np.int32)
        symbols, starts = np.unique(ids[order], return_index=True)
        self.places = dict(zip(symbols.tolist(), np.split(order, starts[1:]), strict=True))
        self.counts: dict[tuple[int, int], int] = {}
        self.record(np.arange(len(ids) - 1))

    def count(self, lefts: np.ndarray) -> Iterable[tuple[tuple[int, int], int]]:
        """((left, right), how often) of the pairs whose left token stands at these places."""
        left, right = self.ids[lefts].astype(np.int64), self.ids[self.next[lefts]].astype(np.int64)
        real = (left >= 0) & (right >= 0)
        keys, counts = np.unique(left[real] << 32 | right[real], return_counts=True)
        pairs = zip((keys >> 32).tolist(), (keys & 0xFFFFFFFF).tolist(), strict=True)
        return zip(pairs, counts.tolist(), strict=True)

    def record(self, lefts: np.ndarray) -> list[tuple[int, int]]:
        """Count new pairs; return those that are frequent enough."""
        found = {pair: count for pair, count in self.count(lefts) if count >= self.min_frequency}
        self.counts.update(found)
        return list(found)

    def find(self, left: int, right: int) -> np.ndarray:
        """Places of the left tokens of a pair, without overlaps, as byte-pair encoding takes them."""
        first, second = self.places[left], self.places[right]
        if len(first) <= len(second):
            found = first[(self.ids[first] == left) & (self.ids[self.next[first]] == right)]
        else:
            second = second[self.ids[second] == right]
            found = self.previous[second]
            found = found[self.ids[found] == left]
        if left == right:  # of three in a row the first two are joined
            apart, taken = [], -1
            for place in found.tolist():
                if place != taken:
                    apart.append(place)
                    taken = self.next[place]
            found = np.array(apart, dtype=np.int32)
        return found

    def join(self, left: int, right: int, new: int) -> list[tuple[int, int]]:
        """Put one token in place of a pair; return the pairs this makes, if frequent enough."""
        places = self.find(left, right)
        gone, before = self.next[places], self.previous[places]
        for pair, count in self.count(np.unique(np.concatenate([before, places, gone]))):
            if pair in self.counts:
                self.counts[pair] -= count
        self.counts.pop((left, right), None)
        behind = self.next[gone]
        self.ids[places], self.ids[gone] = new, BARRIER
        self.next[places], self.previous[behind] = behind, places
        self.places[new] = places
        return self.record(np.unique(np.concatenate([self.previous[places], places])))

    def name(self, character: int, new: int) -> list[tuple[int, int]]:
        """Give a character without a piece an id; return the pairs this makes, if frequent enough."""
        places = self.places.pop(character)
        self.ids[places] = new
        self.places[new] = places
        return self.record(np.unique(np.concatenate([self.previous[places], places])))


def learn(
    ids: np.ndarray,
    vocabulary: Vocabulary,
    num_tokens: int,
    min_frequency: int,
    max_width: int,
    progress: Callable[[int], object],
) -> tuple[list[NewToken], dict[int, int]]:
    """Choose tokens one by one, each time the one that saves most: a pair once for each time it stands in the corpus.

    Args:
        ids: what read_pieces returned; joined in place.
        vocabulary: of the base.
        num_tokens: how many at most.
        min_frequency: how often a token must stand in the corpus when it is chosen.
        max_width: of a token, in columns.
        progress: told 1 for each token.

    Returns:
        (tokens, occurrences): the tokens in the order of their merges, and how often each is left in the corpus when
        all of them are applied.
    """
    pairs = Pairs(ids, min_frequency)
    tokens, contents, known = dict(vocabulary.tokens), dict(vocabulary.contents), set(vocabulary.ids)
    pieces = {number: (number,) for number in tokens}
    queue = [(-count, *pair) for pair, count in pairs.counts.items()]
    byte_ids = {int(value): number for number, value in enumerate(vocabulary.byte_values) if value >= 0}
    named = {}
    for character, number in vocabulary.characters.items():
        code, content = BARRIER - 1 - number, character.encode()
        count = len(pairs.places.get(code, ()))
        if count >= min_frequency and len(content) > 1:
            named[code] = character
            queue.append((-count * (len(content) - 1), code, 0))
    heapq.heapify(queue)
    new = []
    while queue and len(new) < num_tokens:
        saved, left, right = heapq.heappop(queue)
        number = vocabulary.first_id + len(new)
        if left < BARRIER:
            token, content, parts = named[left], named[left].encode(), None
            origin, made = tuple(byte_ids[byte] for byte in content), pairs.name(left, number)
        else:
            count = pairs.counts.get((left, right), 0)
            if left == right:  # of three in a row two pairs are counted, of which one can be joined
                count = min(count, len(pairs.find(left, right)))
            if count != -saved:  # it has become rarer since it was queued
                if count >= min_frequency:
                    heapq.heappush(queue, (-count, left, right))
                continue
            token, content, parts = tokens[left] + tokens[right], contents[left] + contents[right], (left, right)
            if token in known or not is_token(content, max_width):
                del pairs.counts[left, right]
                continue
            origin, made = pieces[left] + pieces[right], pairs.join(left, right, number)
        new.append(NewToken(number, token, content, parts, origin))
        tokens[number], contents[number], pieces[number] = token, content, origin
        known.add(token)
        for pair in made:
            heapq.heappush(queue, (-pairs.counts[pair], *pair))
        progress(1)
    left_over = np.bincount(ids[ids >= vocabulary.first_id] - vocabulary.first_id, minlength=len(new))
    return new, {token.id: int(count) for token, count in zip(new, left_over, strict=True)}


# -- the tokenizer ---------------------------------------------------------------------------------------------------


def add_tokens(spec: dict, new: list[NewToken]) -> None:
    """Put new tokens and their merges into a tokenizer.json.

    Added tokens are written into the model's vocabulary as well: one that is not there gets its id by counting from
    the size of that vocabulary, which grows here (tokenizers 0.23).
    """
    model = spec["model"]
    vocabulary, merges = model["vocab"], model["merges"]
    for added in spec["added_tokens"]:
        vocabulary.setdefault(added["content"], added["id"])
    tokens = {number: token for token, number in vocabulary.items()}
    in_one = bool(merges) and isinstance(merges[0], str)
    for token in new:
        assert token.id not in tokens and token.token not in vocabulary, token
        vocabulary[token.token], tokens[token.id] = token.id, token.token
        if token.parts:
            joined = [tokens[part] for part in token.parts]
            merges.append(" ".join(joined) if in_one else joined)


def expand(ids: list[int], new: dict[int, NewToken]) -> list[int]:
    """The ids of the base for ids of the extended tokenizer."""
    return [piece for number in ids for piece in (new[number].pieces if number in new else (number,))]


# -- measuring -------------------------------------------------------------------------------------------------------


def language_of(text: str) -> str:
    """Chinese, English or other, by the first letters; a Chinese character weighs as much as three others."""
    text = text[:2000]
    chinese = sum("\u3400" <= character <= "\u9fff" for character in text)
    latin = sum(character.isascii() and character.isalpha() for character in text)
    others = sum(character.isalpha() for character in text) - chinese - latin
    weights = {"Chinese": 3 * chinese, "English": latin, "other": others}
    return max(weights, key=weights.get) if any(weights.values()) else "other"


def measure(old, new, texts: list[str], progress: Callable[[int], object]) -> dict[str, dict[str, int]]:
    """How long texts are for two tokenizers.

    Args:
        old, new: tokenizers.Tokenizer without truncation and padding.
        texts: that the new tokens were not learnt from.
        progress: told how many characters are done.

    Returns:
        {language: {each of MEASURES: its sum}}, with "all" at the end.
    """
    found: dict[str, dict[str, int]] = {}
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        before, after = (tokenizer.encode_batch(batch, add_special_tokens=False) for tokenizer in (old, new))
        for text, first, second in zip(batch, before, after, strict=True):
            sizes = (1, len(text), len(text.encode()), len(first.ids), len(second.ids))
            for name in (language_of(text), "all"):
                row = found.setdefault(name, dict.fromkeys(MEASURES, 0))
                for measure_name, size in zip(MEASURES, sizes, strict=True):
                    row[measure_name] += size
        progress(sum(map(len, batch)))
    return {name: found[name] for name in ("Chinese", "English", "other", "all") if name in found}
