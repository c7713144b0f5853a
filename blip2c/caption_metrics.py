"""BLEU and CIDEr-D of captions, and the accuracy of VQA answers, as their papers' evaluation code computes them.

* BLEU-1..4 (Papineni et al. 2002): n-gram precision over the whole corpus, each count clipped by the largest in one
  reference, geometric mean, brevity penalty with the closest reference length (of equally close ones the shorter).
* CIDEr-D (Vedantam et al. 2015): of n = 1..4 the tf-idf cosine with each reference, the candidate's weights clipped by
  the reference's, times exp(-(difference of lengths)^2 / (2 * 6^2)), mean over references and n, times 10. Document
  frequencies are counted over the pictures that are evaluated; differences of lengths are in bigrams.
* VQA accuracy (Antol et al. 2015, visualqa.org/evaluation): mean over the ten people of min(1, others who agree / 3).

Captions are split into words as the Penn Treebank does, without punctuation, in lower case.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["CaptionScores", "caption_scores", "normal_answer", "tokenize_caption", "vqa_accuracy"]

_ORDERS = 4
_CIDER_SIGMA = 6.0
_TINY, _SMALL = 1e-15, 1e-9  # so that an empty corpus has the score 0

# -- words --------------------------------------------------------------------------------------------------------

# What the published code drops. It looks for brackets in upper case among words in lower case, so those stay words.
_DROPPED = frozenset(["''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PLAIN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "--", "\u2014": "--", "\u2026": "..."}
)
_ABBREVIATIONS = frozenset(
    ["mr", "mrs", "ms", "dr", "st", "jr", "sr", "vs", "prof", "gen", "rep", "sen", "gov", "lt", "col", "sgt", "capt",
     "ave", "blvd", "rd", "inc", "corp", "co", "ltd", "etc"]
)  # fmt: skip
_TWO_WORDS = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "lemme": "lem me", "gimme": "gim me", "wanna": "wan na",
}  # fmt: skip
_CLITIC = re.compile(r"(?<=\w)(n't|'s|'re|'ve|'ll|'d|'m)$")
_TOKEN = re.compile(
    r"""
      (?:[a-z]\.){2,}                              # u.s.a.
    | \d+(?:[.,:/]\d+)+                            # 10:30, 1,000, 3.5, 1/2
    | '[^\W_]' (?=\s|$) | '\d\ds?\b                # rock 'n' roll, the '90s
    | [^\W_]+(?:['_./&@-][^\W_]+)*'?               # words, with what joins their parts
    | \.{2,} | -{2,} | [!?]{2,}
    | \S
    """,
    re.VERBOSE,
)


def _split_word(word: str) -> Iterator[str]:
    if word in _TWO_WORDS:
        yield from _TWO_WORDS[word].split()
        return
    tail = "'" if word.endswith("'") and len(word) > 1 else ""
    word = word[: len(word) - len(tail)]
    found = _CLITIC.search(word)
    if found and found.start():
        yield word[: found.start()]
        yield found[1]
    else:
        yield word
    if tail:
        yield tail


def _keeps_point(word: str, rest: str) -> bool:
    """Whether a point behind a word belongs to it: "st. bernard", "vitamin c.", "no. 5"."""
    return (
        word in _ABBREVIATIONS or (len(word) == 1 and word.isalpha()) or (word == "no" and rest.lstrip()[:1].isdigit())
    )


def tokenize_caption(text: str) -> list[str]:
    """The words of a caption, in lower case, without punctuation: "A man's dog." -> ["a", "man", "'s", "dog"]."""
    text = text.lower().translate(_PLAIN)
    words: list[str] = []
    for match in _TOKEN.finditer(text):
        word = match[0]
        if (
            word == "."
            and words
            and text[: match.start()].endswith(words[-1])
            and _keeps_point(words[-1], text[match.end() :])
        ):
            words[-1] += "."
            continue
        parts = [word] if word[0] == "'" else _split_word(_BRACKETS.get(word, word))
        words.extend(part for part in parts if part not in _DROPPED and set(part) != {"."})
    return words


# -- captions -----------------------------------------------------------------------------------------------------

NGram = tuple[str, ...]


@dataclass(frozen=True)
class CaptionScores:
    """bleu: BLEU-1 to BLEU-4, between 0 and 1. cider: CIDEr-D, between 0 and 10; papers print 100 times both.

    ciders: of each picture.
    """

    bleu: tuple[float, ...]
    cider: float
    ciders: list[float]

    def __str__(self) -> str:
        bleus = ", ".join(f"BLEU-{n} {100 * value:.2f}" for n, value in enumerate(self.bleu, 1))
        return f"CIDEr {100 * self.cider:.2f}, {bleus} ({len(self.ciders)} pictures)"


def _ngrams(words: Sequence[str]) -> Counter[NGram]:
    return Counter(tuple(words[i : i + n]) for n in range(1, _ORDERS + 1) for i in range(len(words) - n + 1))


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Scores of one caption a picture against the references of each. Raises ValueError where they do not fit."""
    if len(captions) != len(references) or not captions:
        raise ValueError(f"{len(captions)} captions for {len(references)} lists of references")
    for place, refs in enumerate(references):
        if isinstance(refs, str) or not refs:
            raise ValueError(f"references of picture {place}: expected a list of at least one text, found {refs!r}")
    return word_scores(
        [tokenize_caption(c) for c in captions], [[tokenize_caption(r) for r in refs] for refs in references]
    )


def word_scores(captions: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> CaptionScores:
    """As caption_scores(), of texts that are split into words."""
    candidates = [_ngrams(words) for words in captions]
    counted = [[_ngrams(words) for words in refs] for refs in references]
    ciders = _ciders(candidates, counted)
    return CaptionScores(_bleu(captions, references, candidates, counted), math.fsum(ciders) / len(ciders), ciders)


def _bleu(
    captions: Sequence[list[str]],
    references: Sequence[Sequence[list[str]]],
    candidates: Sequence[Counter[NGram]],
    counted: Sequence[Sequence[Counter[NGram]]],
) -> tuple[float, ...]:
    length = closest = 0
    guessed, correct = [0] * _ORDERS, [0] * _ORDERS
    for words, texts, grams, refs in zip(captions, references, candidates, counted, strict=True):
        length += len(words)
        closest += min((abs(len(text) - len(words)), len(text)) for text in texts)[1]
        for n in range(_ORDERS):
            guessed[n] += max(0, len(words) - n)
        for gram, count in grams.items():
            correct[len(gram) - 1] += min(count, max(ref[gram] for ref in refs))
    ratio = (length + _TINY) / (closest + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(_ORDERS):
        product *= (correct[n] + _TINY) / (guessed[n] + _SMALL)
        scores.append(product ** (1 / (n + 1)) * penalty)
    return tuple(scores)


def _ciders(candidates: Sequence[Counter[NGram]], references: Sequence[Sequence[Counter[NGram]]]) -> list[float]:
    seen: Counter[NGram] = Counter()
    for refs in references:
        seen.update({gram for ref in refs for gram in ref})
    pictures = math.log(len(references))

    def weigh(grams: Mapping[NGram, int]) -> tuple[dict[NGram, float], list[float], int]:
        weights = {gram: count * (pictures - math.log(max(1, seen[gram]))) for gram, count in grams.items()}
        squares = [0.0] * _ORDERS
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight * weight
        return weights, [math.sqrt(s) for s in squares], sum(c for gram, c in grams.items() if len(gram) == 2)

    scores = []
    for grams, refs in zip(candidates, references, strict=True):
        weights, norms, length = weigh(grams)
        total = 0.0
        for ref in refs:
            others, other_norms, other_length = weigh(ref)
            products = [0.0] * _ORDERS
            for gram, weight in weights.items():
                other = others.get(gram, 0.0)
                products[len(gram) - 1] += min(weight, other) * other
            near = math.exp(-((length - other_length) ** 2) / (2 * _CIDER_SIGMA**2))
            for product, norm, other_norm in zip(products, norms, other_norms, strict=True):
                total += product / (norm * other_norm) * near if norm and other_norm else 0.0
        scores.append(10.0 * total / (_ORDERS * len(refs)))
    return scores


# -- answers ------------------------------------------------------------------------------------------------------

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBER_WORDS)}}
_ARTICLES = frozenset(["a", "an", "the"])
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_POINT = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_WITH_APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd"
    " he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't"
    " must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've"
    " somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd"
    " something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're"
    " they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've"
    " who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll"
    " y'all'd've you'd you'd've you'll you're you've"
)


def _contractions() -> dict[str, str]:
    """Each word without one of its apostrophes, as people write it, to the word."""
    found = {"somebody'd": "somebodyd"}  # the published table has it this way round
    for word in _WITH_APOSTROPHES.split():
        for place, letter in enumerate(word):
            if letter == "'":
                found[word[:place] + word[place + 1 :]] = word
    return found


_CONTRACTIONS = _contractions()


def normal_answer(text: str) -> str:
    """An answer as VQA compares it: lower case, no articles and little punctuation, numbers as digits, apostrophes."""
    text = _unbroken(text)
    result = text
    for mark in _PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if beside_space or _COMMA_IN_NUMBER.search(text) else " ")
    result = _POINT.sub("", result)
    words = [_NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Between 0 and 1: the mean, over the people, of min(1, how many of the others gave this answer / 3).

    Answers are compared as normal_answer() has them; where all people wrote the very same, as they stand, which is what
    the published code does and published figures rest on.
    """
    if isinstance(people, str) or not people:
        raise ValueError(f"people: expected a list of at least one answer, found {people!r}")
    said, wanted = _unbroken(answer), [_unbroken(person) for person in people]
    if len(set(wanted)) > 1:
        said, wanted = normal_answer(said), [normal_answer(person) for person in wanted]
    agree = [person == said for person in wanted]
    total = sum(agree)
    return math.fsum(min(1.0, (total - same) / 3) for same in agree) / len(agree)


def _unbroken(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
