"""Which part of a completion is its answer: one stated rule, in one pass over the text.

After the last </think>, where there is one:
1. with any answer tag: the inside of the one <answer>...</answer>; several opening or closing tags are no answer. A box inside it
   is preferred to the rest of it;
2. else the last \\boxed{...}: earlier boxes do not count, and a last box that never closes is no answer;
3. else what follows the last #### on its line;
4. else what follows the last "the answer is" or "answer:", up to the end of the sentence.

Nothing else is an answer: a lone number at the end of a text is a guess at what was meant.
"""

from __future__ import annotations

import re

from reason_rl.reward.accuracy import extract_answer

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is none; the first match is the opening one
SAID = re.compile(r"\banswer\s*(?:\bis\b|:|=)\s*:?", re.IGNORECASE)
SENTENCE_END = re.compile(r"\.(?:\s|$)|\n|<")


def find_answer(text: str) -> str | None:
    """The answer's text, stripped; None where there is none."""
    text = text.rpartition("</think>")[2]
    if "<answer>" in text or "</answer>" in text:
        block = extract_answer(text)
        if block is None:
            return None
        inner = _boxed(block) if BOX.search(block) else _said(block)
        return (block if inner is None and not BOX.search(block) else inner) or None
    if BOX.search(text):
        return _boxed(text) or None
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip() or None
    return _said(text) or None


def _boxed(text: str) -> str | None:
    """The inside of the last box. `\\boxed 5` boxes one character, as LaTeX has it."""
    *_, last = BOX.finditer(text)
    rest = text[last.end() :].lstrip()
    if not rest.startswith("{"):
        return rest[:1] or None
    depth = 0
    for found in BRACE.finditer(rest):
        depth += {"{": 1, "}": -1}.get(found.group(), 0)
        if depth == 0:
            return rest[1 : found.start()].strip()
    return None


def _said(text: str) -> str | None:
    found = list(SAID.finditer(text))
    if not found:
        return None
    rest = text[found[-1].end() :].strip()
    return SENTENCE_END.split(rest, maxsplit=1)[0].strip().strip("*_").strip()
