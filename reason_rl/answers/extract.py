"""Finds the answer in a completion: one stated rule for each verifier, in one pass over the text.

`extract_answer`, for answers compared as text and for countdown: the inside of the one <answer> block.

`find_answer`, for math. After the last </think>, if the text has one:
1. with any answer tag: the inside of the one <answer>...</answer>, or the box in it; several tags of one kind
   are no answer;
2. else the last \\boxed{...}: earlier boxes do not count, and a last box that never closes is no answer;
3. else the text after the last ####, up to the end of its line;
4. else the text after the last "the answer is" or "answer:", up to the end of the sentence.

Nothing else is an answer: reading a lone number at the end of a text would be a guess.
"""

from __future__ import annotations

import re

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # matches an escaped brace as one unit, so that it is not counted
SAID = re.compile(r"\banswer\s*(?:\bis\b|:|=)\s*:?", re.IGNORECASE)
SENTENCE_END = re.compile(r"\.(?:\s|$)|\n|<")


def extract_answer(text: str) -> str | None:
    """The inside of the one answer block, stripped; None unless the text has exactly one."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    _, _, rest = text.partition("<answer>")
    answer, closing, _ = rest.partition("</answer>")
    return answer.strip() if closing else None


def find_answer(text: str) -> str | None:
    """The math answer's text, stripped; None if there is no answer."""
    text = text.rpartition("</think>")[2]

    # Rule 1: an answer block, and a box inside it.
    if "<answer>" in text or "</answer>" in text:
        block = extract_answer(text)
        if block is None:
            return None
        inner = _boxed(block) if BOX.search(block) else _said(block)
        return (block if inner is None and not BOX.search(block) else inner) or None

    # Rules 2 to 4: a box, ####, "the answer is".
    if BOX.search(text):
        return _boxed(text) or None
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip() or None
    return _said(text) or None


def _boxed(text: str) -> str | None:
    """The inside of the last box. `\\boxed 5` boxes one character, as in LaTeX."""
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
    """The text after the last "answer is", without Markdown's stars."""
    found = list(SAID.finditer(text))
    if not found:
        return None
    rest = text[found[-1].end() :].strip()
    return SENTENCE_END.split(rest, maxsplit=1)[0].strip().strip("*_").strip()
