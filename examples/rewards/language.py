"""The fraction of the thought that is in the prompt's language (as in R1, arXiv:2501.12948, 2.3.2), from 0 to
1.

    .venv/bin/python train.py --name language --reward.custom=examples.rewards.language:same_language --reward.custom_weight=0.1

Counts words of two letters or more (in languages without spaces, characters). Digits, formulas, LaTeX
commands and single letters have no language. Languages are distinguished by script; those of the Latin script
by their most common words, if both prompt and thought have some. A thought without words scores 1.

Left out: languages that share a script and are not in COMMON. A language model would distinguish them, as a
judge.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from reason_rl.records import Problem

# First and last code point of each script. Japanese mixes kana and Han, so a text with kana counts both as
# one.
SCRIPTS = [(0x41, 0x24F, "latin"), (0x370, 0x3FF, "greek"), (0x400, 0x52F, "cyrillic"), (0x590, 0x5FF, "hebrew"),
           (0x600, 0x6FF, "arabic"), (0x900, 0x97F, "devanagari"), (0xE00, 0xE7F, "thai"), (0x3040, 0x30FF, "kana"),
           (0x3400, 0x9FFF, "han"), (0xAC00, 0xD7AF, "hangul")]
WITHOUT_SPACES = ("kana", "han", "thai")
COMMON = {language: frozenset(words.split()) for language, words in {
    "english": "the of and to is that it for as with was on are this be by not or we have so then which what how",
    "german": "der die und das ist nicht ein eine zu den mit von auf für sich dem es wir dass also dann wie sind wird",
    "french": "le les et est une des que pour dans du qui sur pas il nous donc alors avec sont ce cette je au",
    "spanish": "el los y es una que para las del con por se lo como entonces más pero son su hay cada si",
    "italian": "il di che è per una della sono con non si quindi gli del alla anche più nel questo allora ogni",
    "portuguese": "o os e é uma que para do da não com em então mais são por um dos como se cada no na",
}.items()}
FORMULA = re.compile(r"\\[A-Za-z]+|<[^<>]{0,20}>")
WORD = re.compile(r"[^\W\d_]+")


def same_language(problem: Problem, text: str) -> float:
    # The words of both, and the scripts that the prompt asks for.
    asked, thought = list(words_of(problem.prompt)), list(words_of(thought_of(text)))
    if not thought or not asked:
        return 1.0
    scripts = Counter(script for script, _ in asked)
    wanted = {"kana", "han"} if scripts["kana"] else {scripts.most_common(1)[0][0]}
    inside = [word for script, word in thought if script in wanted]
    fraction = len(inside) / len(thought)

    # Among Latin languages, multiply by the fraction of common words that belong to the prompt's language.
    language = latin_language([word for _, word in asked]) if wanted == {"latin"} else None
    if language is None:
        return fraction
    others = frozenset().union(*(words for name, words in COMMON.items() if name != language)) - COMMON[language]
    own, foreign = (sum(word in words for word in inside) for words in (COMMON[language], others))
    return fraction * own / (own + foreign) if own + foreign else fraction


def latin_language(words: list[str]) -> str | None:
    """The language with the most common words in the text; None without any, or if two have as many."""
    counts = {name: sum(word in common for word in words) for name, common in COMMON.items()}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] and list(counts.values()).count(counts[best]) == 1 else None


def thought_of(text: str) -> str:
    """The text between the tags; all of it without them."""
    if "<think>" in text:
        return text.partition("<think>")[2].partition("</think>")[0]
    return text.rpartition("</think>")[0] or text


def words_of(text: str) -> Iterator[tuple[str, str]]:
    """(script, word in lower case)"""
    for found in WORD.finditer(FORMULA.sub(" ", text)):
        word = found.group().lower()
        script = script_of(word[0])
        if script in WITHOUT_SPACES:
            yield from ((script_of(character), character) for character in word)
        elif len(word) > 1:
            yield script, word


def script_of(character: str) -> str:
    code = ord(character)
    return next((name for first, last, name in SCRIPTS if first <= code <= last), "other")
