"""Splits an answer's text into tokens: LaTeX and plain spellings become the same few kinds.

First half of reading an answer (parse.py is the second). Of the characters outside ASCII only those in
SYMBOLS are read; any other (digits of other scripts, look-alike letters, direction marks, control characters)
makes the answer unreadable. Length and digits are bounded here, which bounds all later work.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_CHARACTERS = 1000
MAX_DIGITS = 200

SYMBOLS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "√": r"\sqrt ", "π": r"\pi ",
    "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "±": r"\pm ",
    "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ",
    "²": "^2 ", "³": "^3 ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "≈": r"\approx ", "’": "'",
    "θ": r"\theta ", "\u00a0": " ",
}
FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln", "exp"}
RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=",
             "lt": "<", "gt": ">", "ne": "!=", "neq": "!=", "<=": "<=", ">=": ">=", "!=": "!=", "approx": "="}
GREEK = {"alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "theta", "lambda", "mu", "nu", "rho", "sigma", "tau", "phi",
         "varphi", "omega", "psi", "xi", "eta", "kappa", "chi", "zeta", "Delta", "Omega", "Gamma", "Theta", "Phi", "Lambda", "ell"}
WORDS = {"sqrt", "pi", "infinity", "inf", "theta", *FUNCTIONS}
"""Commands and functions that are also read without a backslash."""
UNITS = frozenset(("cm", "mm", "km", "kg", "mg", "ft", "in", "lb", "lbs", "oz", "ml", "mL", "hr", "hrs", "mi", "yd", "pm", "am",
                   "mph", "kph", "min", "sec", "day", "cup", "men", "sq", "per"))
"""Units short enough to be mistaken for products of variables."""
WRAPPERS = r"text|textbf|textit|textrm|mbox|mathrm|mathbf|mathit|boldsymbol|operatorname"


class Unreadable(ValueError):
    """The text is outside of the grammar, or beyond a bound."""


@dataclass(frozen=True)
class Token:
    kind: str
    """number, name, word (text, units), function, command, relation; else the operator or bracket itself."""
    text: str = ""
    is_apart: bool = False
    """Preceded by white space."""


REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r",\s*\\!\s*(?=\d{3})|\{,\}(?=\d{3})|(?<=\d)\\,(?=\d{3}(?!\d))", ""),  # thousands, three spellings
    (r"\\(?:left|right)(?![A-Za-z])\.?", ""),
    (r"\\(?:[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])|(?<!\\)\\!", ""),
    (r"(?<!\\)\\[,;:\s]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degrees?(?![A-Za-z])", r"\\deg "),
    (r"\\[lr]?vert(?![A-Za-z])", "|"),
    (r"\\lbrace(?![A-Za-z])", r"\\{"),
    (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"(?<!\\)\\[()]|(?<!\\)\\\[|(?<!\\)\\\]", " "),
    (r"\*\*", "^"),
]]
TOKEN = re.compile(r"""
    (?P<space>\s+)
  | (?P<repeating>\d*\.\d*\\overline\{\d+\})
  | (?P<thousands>[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)(?:\.\d+)?)
  | (?P<number>\d+(?:\.\d+)?(?:[eE][-+]?\d+(?![A-Za-z\d]))?|\.\d+)
  | \\(?:WRAPPERS)\s*\{(?P<wrapped>[^{}\\]*)\}
  | \\(?P<environment>begin|end)\s*\{(?P<what>[A-Za-z]+\*?)\}
  | (?P<row>\\\\)
  | \\(?P<command>[A-Za-z]+)
  | \\(?P<escaped>[{}%|$])
  | (?P<letters>[A-Za-z]+'*)
  | (?P<operator><=|>=|!=|[-+*/^_=<>()\[\]{}|!,;%&:¤€£])
""".replace("WRAPPERS", WRAPPERS), re.VERBOSE)


def clean(text: str) -> str:
    """Reduces LaTeX's synonyms to one spelling; raises `Unreadable` for long texts and foreign characters."""
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"an answer has at most {MAX_CHARACTERS} characters, got {len(text)}")

    # Symbols become LaTeX; any other character outside ASCII is refused.
    if not text.isascii():
        text = "".join(SYMBOLS.get(character, character) for character in text)
    for character in text:
        if not (" " <= character <= "~" or character in "\n\t¤€£"):
            raise Unreadable(f"the character U+{ord(character):04X}")

    # One dollar sign is money, two are LaTeX's delimiters.
    text = text.replace(r"\$", "¤")
    text = text.replace("$", "¤" if text.count("$") == 1 else " ")
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(".").strip()


def tokenize(text: str, with_thousands: bool = True) -> list[Token]:
    """The tokens of a cleaned text. with_thousands: read 1,234 outside of brackets as one number."""
    tokens: list[Token] = []
    position, depth, is_apart = 0, 0, False
    while position < len(text):
        found = TOKEN.match(text, position)
        if found is None:
            raise Unreadable(f"{text[position : position + 20]!r} is not mathematics")
        kind, value = found.lastgroup or "", found.group(found.lastgroup or 0)

        # Inside brackets a comma separates values: take the digits before it alone.
        if kind == "thousands" and (depth or not with_thousands):
            found = re.compile(r"\d+(?:\.\d+)?").match(text, position)
            assert found is not None
            kind, value = "number", found.group()
        position = found.end()
        if kind == "space":
            is_apart = True
            continue

        after_number = is_apart and bool(tokens) and tokens[-1].kind == "number"
        new = _letters(value, is_apart, after_number) if kind == "letters" else _tokens_of(kind, value, found.group(), is_apart)
        depth += sum((token.kind in ("(", "[", r"\{")) - (token.kind in (")", "]", r"\}")) for token in new)
        tokens += new
        is_apart = False
    return tokens


def _tokens_of(kind: str, value: str, whole: str, is_apart: bool) -> list[Token]:
    match kind:
        case "number" | "thousands" | "repeating":
            if sum(character.isdigit() for character in value) > MAX_DIGITS:
                raise Unreadable(f"a number with more than {MAX_DIGITS} digits")
            return [Token("number", value.replace(",", ""), is_apart)]
        case "wrapped":
            return _wrapped(value, whole, is_apart)
        case "command":
            return [_command(value, is_apart)]
        case "what":
            return [Token("begin" if whole.startswith(r"\begin") else "end", value, is_apart)]
        case "escaped":
            return [Token({"%": "%", "|": "|", "$": "¤"}.get(value, "\\" + value), "", is_apart)]
        case "row":
            return [Token("row", "", is_apart)]
    return [Token("relation", RELATIONS[value], is_apart) if value in RELATIONS else Token(value, "", is_apart)]


def _command(value: str, is_apart: bool) -> Token:
    if value in FUNCTIONS:
        return Token("function", value, is_apart)
    if value in RELATIONS:
        return Token("relation", RELATIONS[value], is_apart)
    if value in GREEK:
        return Token("name", value, is_apart)
    same = {"times": "*", "cdot": "*", "ast": "*", "div": "/", "mp": "pm", "varnothing": "emptyset", "lbrack": "[", "rbrack": "]"}
    value = same.get(value, value)
    return Token(value, "", is_apart) if value in "*/[]" else Token("command", value, is_apart)


def _letters(value: str, is_apart: bool, after_number: bool) -> list[Token]:
    """A run of letters: a command's name, a unit or other text, or a product of one-letter names.

    after_number: white space separates it from a number, where three letters are a word too (5 USD).
    """
    if value in WORDS:
        known = {"infinity": "infty", "inf": "infty"}.get(value, value)
        return [_command(known, is_apart)]
    if value.lower() in ("or", "and"):
        return [Token(",", value, is_apart)]
    if value in UNITS or len(value.rstrip("'")) > (2 if after_number else 3):
        return [Token("word", value, is_apart)]
    names = re.findall(r"[A-Za-z]'*", value)
    return [Token("name", name, is_apart and number == 0) for number, name in enumerate(names)]


def _wrapped(value: str, whole: str, is_apart: bool) -> list[Token]:
    """The inside of \\text{...}: "and", "or", a number or words; of \\mathrm{...} also a name."""
    inside = value.strip()
    if inside.strip(", ").lower() in ("and", "or"):
        return [Token(",", "and", True)]
    if not any(character.isalpha() for character in inside):  # \\mathbf{5}
        return tokenize(inside)
    if len(inside) == 1 and inside.isalpha() and whole.startswith((r"\math", r"\bold")):
        return [Token("name", inside, is_apart)]
    return [Token("word", inside, is_apart)]
