"""Rewards that compare a completion with a reference transcript.

The transcript is the first accepted text of the example, and the completion's is the text in its answer tag, or the
whole completion if it has no such tag.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from rapidfuzz.distance import LCSseq, Levenshtein

from hark.data.choices import extract_answer
from hark.data.rewards.group import Group


def spoken(text: str) -> str:
    """The text as error rates compare it: NFKC, lower case, without punctuation and symbols, with single spaces.

    Apostrophes inside a word stay: "don't". Numbers are not spelled out.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" or c == "'" else " " for c in text)
    return " ".join(re.sub(r"(?<!\w)'|'(?!\w)", " ", kept).split())


def error_rate(reference: Sequence[object], given: Sequence[object]) -> float:
    """Substitutions, insertions and deletions per item of the reference; of an empty one 0 or 1."""
    return Levenshtein.distance(reference, given) / len(reference) if reference else float(bool(given))


def wer(group: Group, *, lowest: float = 0.0) -> list[float | None]:
    """max(1 - WER, lowest), with words as `spoken` has them; arXiv 2509.18569 (R1) has no limit: lowest=-.inf.

    None without a transcript.
    """
    return _compared(group, lambda reference, given: max(1 - error_rate(reference.split(), given.split()), lowest))


def cer(group: Group, *, lowest: float = 0.0) -> list[float | None]:
    """max(1 - CER, lowest), of the characters without spaces. None without a transcript."""
    return _compared(group, lambda one, other: max(1 - error_rate(_letters(one), _letters(other)), lowest))


def rouge_l(group: Group) -> list[float | None]:
    """F1 of the longest common subsequence of words: 2 P R / (P + R) (ROUGE-L, Lin 2004, with beta 1), not of stems.

    None without a transcript.
    """
    return _compared(group, _rouge_l)


def _rouge_l(reference: str, given: str) -> float:
    right, own = reference.split(), given.split()
    return 2 * LCSseq.similarity(right, own) / (len(right) + len(own)) if right or own else 1.0


def hallucination(group: Group, *, repeats: int = 4, longest: int = 8, absent: float = 0.2) -> list[float | None]:
    """-1 for a completion that repeats itself, has little of what was said, or is in another script; else 0.

    arXiv 2509.18569 (R2) names the three kinds and no rule; these are Hark's. Repetition: 1 to `longest` words follow
    one another `repeats` times, and not in the transcript. Absent: fewer than the share `absent` of the transcript's
    words are there, in order. Translated: most letters are of another script than most of the transcript's. None
    without a transcript.
    """

    def value(reference: str, given: str) -> float:
        loops = repeated(given.split(), repeats, longest) and not repeated(reference.split(), repeats, longest)
        return -1.0 if loops or _missing(reference, given, absent) or script(given) != script(reference) else 0.0

    return _compared(group, value)


def repeated(words: Sequence[str], times: int, longest: int) -> bool:
    """Whether 1 to `longest` words follow one another so many times."""
    for size in range(1, longest + 1):
        run = 0
        for n in range(size, len(words)):
            run = run + 1 if words[n] == words[n - size] else 0
            if run >= size * (times - 1):
                return True
    return False


def _missing(reference: str, given: str, share: float) -> bool:
    right, own = (list(_letters(text)) if script(text) == "CJK" else text.split() for text in (reference, given))
    return LCSseq.similarity(right, own) < share * len(right)


def script(text: str) -> str:
    """The script of most letters, such as LATIN; CJK for all of Chinese and Japanese; "" without letters."""
    names = [unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha()]
    names = ["CJK" if name in ("HIRAGANA", "KATAKANA") else name for name in names]
    return max(sorted(set(names)), key=names.count) if names else ""


def keywords(group: Group, *, key: str = "keywords") -> list[float | None]:
    """The mean of precision and recall of the example's keywords in the completion (arXiv 2509.18569, R3).

    key: the key of the example's row that lists them. Recall: the share of the keywords that are there. Precision: the
    share of those there, each at most as often as in the transcript; 0 if none is there. None without keywords.
    """
    listed = group.example.extra.get(key)
    if not listed:
        return [None] * len(group.texts)
    words = [listed] if isinstance(listed, str) else listed
    names = list(dict.fromkeys(filter(None, (spoken(str(word)) for word in words))))
    reference = spoken(group.example.answer_text) if group.example.has_answer else " ".join(names)
    return [_found(names, reference, given) for given in map(_given, group.texts)]


def _found(names: Sequence[str], reference: str, given: str) -> float:
    wanted, there = ([_count(name, text) for name in names] for text in (reference, given))
    right = sum(min(w, t) for w, t in zip(wanted, there, strict=True))
    recall = sum(t > 0 for t in there) / len(names) if names else 0.0
    return (right / sum(there) + recall) / 2 if sum(there) else 0.0


def _count(name: str, text: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(name)}(?!\w)", text)) if script(name) != "CJK" else text.count(name)


def _letters(text: str) -> str:
    return text.replace(" ", "")


def _given(text: str) -> str:
    answer = extract_answer(text)
    return spoken(text if answer is None else answer)


def _compared(group: Group, compare: Callable[[str, str], float]) -> list[float | None]:
    """The comparison of the transcript with each completion, both as `spoken`."""
    if not group.example.has_answer:
        return [None] * len(group.texts)
    reference = spoken(group.example.answer_text)
    return [compare(reference, _given(text)) for text in group.texts]
