"""The words by which documents are found: Chinese by jieba, everything else at signs and blanks."""

import functools
import logging
import re
import unicodedata

# Words that say nothing about what is asked for. English ones as they stand, not stemmed.
STOPWORDS = frozenset(
    """
    a about after all also am an and any are as at be because been before being between both but by can could did do
    does doing during each few for from further had has have having he her here hers him his how i if in into is it
    its just many me more most much my no nor not of off on once only or other our out over own please same shall she
    should so some such tell than that the their them then there these they this those through to too under until up
    very was we were what when where which while who whom whose why will with would you your
    的 了 在 是 和 与 或 及 或者 以及 而 而且 并 并且 但 但是 也 都 就 还 又 再 被 把 让 对 对于 关于 从 到 由
    于 向 给 用 为 为了 以 之 其 此 这 那 这个 那个 这些 那些 这样 那样 它 他 她 我 你 您 我们 你们 他们 它们
    自己 有 没有 不 不是 会 能 可以 能够 应 应该 应当 该 要 需要 吗 呢 吧 啊 呀 么 什么 怎么 怎样 怎么办 如何
    为什么 为何 哪 哪个 哪些 哪里 哪种 几 多少 多久 多大 多长时间 是否 能否 可否 请 请问 一下 一个 一些 一种 时
    时候 如果 因为 所以 上 下 中 里 个 种 些 等 按 根据 多 很 最 更
    """.split()
)
_HAN = "\u3400-\u9fff\U00020000-\U000323af"
_STARTS_HAN = re.compile(f"[{_HAN}]")
_RUNS = re.compile(rf"([{_HAN}]+)|\d+(?:\.\d+)*|[^\W\d_{_HAN}][^\W_{_HAN}]*")


def cut(text: str) -> list[str]:
    """Cut a text into words.

    Full-width characters become plain ones, capitals small ones. Of "5mg" the number is a word of its own, "H1N1" is
    one word. Chinese is cut by jieba's dictionary without its hidden Markov model: that one guesses words which the
    dictionary does not have, such as names of medicines, otherwise in a question than in a document.
    """
    words = []
    for run in _RUNS.finditer(unicodedata.normalize("NFKC", text).lower()):
        words += load_jieba().cut(run[0], HMM=False) if run[1] else [run[0]]
    return words


def with_characters(words: list[str]) -> list[str]:
    """Put the characters of every Chinese word of several behind it.

    What is one word in the document may be two in the question, or part of a longer one. The characters stand in more
    passages than the words and weigh less.
    """
    return [part for word in words for part in (word, *(word if len(word) > 1 and _STARTS_HAN.match(word) else ""))]


def without_stopwords(words: list[str]) -> list[str]:
    """Leave out the words that say nothing about what is asked for, unless there are no others."""
    return [word for word in words if word not in STOPWORDS] or words


@functools.cache
def load_jieba():
    """Import jieba and load its dictionary, once."""
    import jieba

    jieba.setLogLevel(logging.WARNING)
    jieba.initialize()
    return jieba
