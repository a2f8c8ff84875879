"""The language reward: the share of the thought that is in the prompt's language (as in R1, arXiv:2501.12948, 2.3.2).

Counted are words of two letters and more (of languages without spaces, characters); digits, formulas, LaTeX commands and
single letters have no language. Words are told apart by script; among languages of the Latin script by their commonest words,
where both prompt and thought have some. A thought without words is consistent: 1.0.

Left out: telling apart languages that share a script and are not in COMMON; a proper language model would be a judge.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

# Code points, first and last, of each script. Japanese mixes kana and Han, so a text with kana counts both as one.
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


def language_reward(prompt: str, text: str) -> float:
    """0.0 to 1.0."""
    asked, thought = list(_words(prompt)), list(_words(_thought(text)))
    if not thought or not asked:
        return 1.0
    scripts = Counter(script for script, _ in asked)
    wanted = {"kana", "han"} if scripts["kana"] else {scripts.most_common(1)[0][0]}
    inside = [word for script, word in thought if script in wanted]
    share = len(inside) / len(thought)
    language = _latin_language([word for _, word in asked]) if wanted == {"latin"} else None
    if language is None:
        return share
    others = frozenset().union(*(words for name, words in COMMON.items() if name != language)) - COMMON[language]
    own, foreign = (sum(word in words for word in inside) for words in (COMMON[language], others))
    return share * own / (own + foreign) if own + foreign else share


def _latin_language(words: list[str]) -> str | None:
    counts = {name: sum(word in common for word in words) for name, common in COMMON.items()}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] and list(counts.values()).count(counts[best]) == 1 else None


def _thought(text: str) -> str:
    """What stands between the tags; all of a text without them."""
    return text.partition("<think>")[2].partition("</think>")[0] if "<think>" in text else text.rpartition("</think>")[0] or text


def _words(text: str) -> Iterator[tuple[str, str]]:
    """(script, word in lower case)"""
    for found in WORD.finditer(FORMULA.sub(" ", text)):
        word = found.group().lower()
        script = _script(word[0])
        if script in WITHOUT_SPACES:
            yield from ((_script(character), character) for character in word)
        elif len(word) > 1:
            yield script, word


def _script(character: str) -> str:
    code = ord(character)
    return next((name for first, last, name in SCRIPTS if first <= code <= last), "other")
