"""Parses an answer's tokens into a tree: numbers, expressions, tuples, intervals, sets, matrices,
(in)equalities.

Second half of reading an answer, by recursive descent. At the outermost level a comma, "and" and "or"
separate several values; they are right only if the right answer has as many. Nesting is bounded.

    answer    relation (, relation)*     sum      term (+- term)*
    relation  union (= union)*           term     power ((* | / | nothing) power)*
    union     ratio (\\cup ratio)*       power    primary (! | % | degree)* [^ power]
    ratio     quantity (: quantity)*     primary  number, name, \\frac, \\sqrt, call, brackets, |...|, matrix
    quantity  [currency] sum [unit]
"""

from __future__ import annotations

from fractions import Fraction

from reason_rl.answers.math.tokens import Token, Unreadable, clean, tokenize
from reason_rl.answers.math.tree import Node, negative, number, spelled
from reason_rl.answers.math.units import changes_the_value, unit_words

MAX_DEPTH = 60
"""Of the reader's recursion; a bracket takes three levels."""
MAX_TOKENS = 300
MAX_VALUES = 64
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
CURRENCIES = {"¤": "$", "€": "€", "£": "£"}
CLOSING = {"(": (")", "]"), "[": ("]", ")"), "\\{": ("\\}",), "{": ("}",)}


def parse(text: str, with_thousands: bool = True) -> Node:
    """The tree of an answer's text; raises `Unreadable`."""
    reader = _Reader(tokenize(clean(text), with_thousands))
    if not 0 < len(reader.tokens) <= MAX_TOKENS:
        raise Unreadable(f"an answer has 1 to {MAX_TOKENS} tokens, got {len(reader.tokens)}")
    node = reader.several("")
    if reader.peek() is not None:
        raise Unreadable(f"expected the end, got {reader.peek()!r}")
    return node


class _Reader:
    """A position in the tokens. Each method below reads one rule of the grammar and advances."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.position, self.depth, self.open_bars = tokens, 0, 0, 0

    def peek(self, ahead: int = 0) -> Token | None:
        position = self.position + ahead
        return self.tokens[position] if position < len(self.tokens) else None

    def at(self, *kinds: str, text: str | None = None) -> bool:
        token = self.peek()
        return token is not None and token.kind in kinds and (text is None or token.text == text)

    def take(self, *kinds: str) -> Token:
        token = self.peek()
        if token is None or (kinds and token.kind not in kinds):
            raise Unreadable(f"expected {' or '.join(kinds) or 'more'}, got {token.text or token.kind if token else 'the end'}")
        self.position += 1
        return token

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"nested more than {MAX_DEPTH} deep")

    def several(self, closing: str) -> Node:
        """Values up to a closing bracket (or the end); more than one become a list."""
        self.deeper()
        values = [self.relation()]
        while self.at(",", ";"):
            while self.at(",", ";"):  # "5, and 7"
                self.take()
            if len(values) == MAX_VALUES:
                raise Unreadable(f"more than {MAX_VALUES} values")
            if not closing and self.peek() is None:
                break
            values.append(self.relation())
        self.depth -= 1
        return values[0] if len(values) == 1 else Node("list", tuple(values))

    def relation(self) -> Node:
        if self.at("relation", text="="):
            self.take()  # "= 5", "\approx 5"
        parts, signs = [self.union()], []
        while self.at("relation") or self.at("command", text="in"):
            token = self.take()
            if token.kind == "command":  # x \in (1, 2) is read as the interval alone
                parts = []
            else:
                signs.append(token.text)
            parts.append(self.union())
        return parts[0] if len(parts) == 1 else Node("relation", tuple(parts), " ".join(signs))

    def union(self) -> Node:
        parts = [self.ratio()]
        while self.at("command", text="cup"):
            self.take()
            parts.append(self.ratio())
        return parts[0] if len(parts) == 1 else Node("union", tuple(parts))

    def ratio(self) -> Node:
        parts = [self.quantity()]
        while self.at(":"):
            self.take()
            parts.append(self.quantity())
        return parts[0] if len(parts) == 1 else Node("bracket", tuple(parts), ":")

    def quantity(self) -> Node:
        """A value with its unit: a currency sign before or after it, up to four words after it."""
        # A currency sign and the value: -$5, $5, 5 €.
        sign = self.at("-") and (after := self.peek(1)) is not None and after.kind in CURRENCIES
        if sign:
            self.take()
        money = CURRENCIES[self.take().kind] if self.at(*CURRENCIES) else ""
        node = self.sum()
        if sign:
            node = negative(node)
        if self.at(*CURRENCIES):
            money = f"{money} {CURRENCIES[self.take().kind]}".strip()

        # The words after it: a scale (5 million) multiplies, the others are the unit.
        words = self.unit() if node.op != "word" else []
        for word in [word for word in words if word in SCALES]:
            node = Node("mul", (node, Node("number", (), Fraction(SCALES[word]))), "scale")
            words.remove(word)
        if sum(word[0] != "^" and word != "per" for word in words) > 4 or changes_the_value(words):
            raise Unreadable(f"expected a unit after the value, got {' '.join(words)[:40]!r}")
        if words[:1] == ["percent"]:
            return Node("percent", (node,))
        if money:
            words.insert(words.index("per") if "per" in words else len(words), money)
        return Node("quantity", (node,), " ".join(words)) if words else node

    def unit(self) -> list[str]:
        """The words after a value, with powers as "^2" and a slash as "per"."""
        words: list[str] = []
        while self.at("word") or (words[-1:] == ["per"] and self.at("name")):
            words += unit_words(self.take().text)
            if self.at("^"):
                self.take()
                words.append(f"^{self.whole_power()}")
            if self.at("/") and (after := self.peek(1)) is not None and after.kind in ("word", "name"):  # km/h
                self.take()
                words.append("per")
        return words

    def whole_power(self) -> int:
        """The exponent of a unit."""
        power = self.signed_power()
        inner = power.args[0] if power.op == "neg" else power
        if inner.op != "number" or not isinstance(inner.value, Fraction) or inner.value not in range(100):
            raise Unreadable(f"expected a unit's power from -99 to 99, got {inner.op} {inner.value}")
        return int(inner.value) if power is inner else -int(inner.value)

    def sum(self) -> Node:
        node = self.signed()
        while self.at("+", "-") or self.at("command", text="pm"):
            sign = self.take()
            term = self.term()
            if sign.kind == "command":
                node = Node("pm", (node, term))
            else:
                node = Node("add", (node, negative(term) if sign.kind == "-" else term))
        return node

    def signed(self) -> Node:
        self.deeper()
        if self.at("-", "+"):
            is_negative = self.take().kind == "-"
            node = self.signed()
            node = negative(node) if is_negative else node
        elif self.at("command", text="pm"):
            self.take()
            node = Node("pm", (Node("number", (), Fraction(0)), self.term()))
        else:
            node = self.term()
        self.depth -= 1
        return node

    def term(self) -> Node:
        node = self.power()
        while True:
            if self.at("*", "/"):
                op = "mul" if self.take().kind == "*" else "div"
                node = Node(op, (node, self.signed_power()))
            elif self.starts_factor():
                is_number = self.at("number")
                node = self.product(node, self.power(), is_number)
            else:
                return node

    def product(self, node: Node, factor: Node, is_number: bool) -> Node:
        """Two factors without a sign between them: a mixed number, or a product."""
        whole = node.op == "number" and isinstance(node.value, Fraction) and node.value.denominator == 1
        if whole and factor.op == "div" and all(part.op == "number" for part in factor.args):
            return Node("mixed", (node, factor))
        if not is_number:
            return Node("mul", (node, factor))
        if not (whole and factor.op == "number" and self.at("/")):
            raise Unreadable("two numbers without a sign between them")
        self.take()  # the slash of 1 1/2
        return Node("mixed", (node, Node("div", (factor, self.power()))))

    def starts_factor(self) -> bool:
        token = self.peek()
        if token is None or (token.kind == "command" and token.text in ("cup", "pm", "in", "deg")):
            return False
        if token.kind == "number":
            before, after = self.peek(-1), self.peek(1)
            return token.is_apart and before is not None and before.kind == "number" and after is not None and after.kind == "/"
        if token.kind == "|":
            return not self.open_bars
        return token.kind in ("name", "command", "function", "(", "[", "{", "begin")

    def signed_power(self) -> Node:
        if self.at("-"):
            self.take()
            return negative(self.power())
        return self.power()

    def power(self) -> Node:
        # Postfix signs, then an exponent.
        node = self.primary()
        while True:
            if self.at("!"):
                self.take()
                node = Node("factorial", (node,))
            elif self.at("%"):
                self.take()
                node = Node("percent", (node,))
            elif self.at("command", text="deg"):
                self.take()
                node = Node("degree", (node,))
            else:
                break
        if self.at("^"):
            self.take()
            return Node("pow", (node, self.signed_power()))
        return node

    def primary(self) -> Node:
        self.deeper()
        node = self.primary_of(self.take())
        self.depth -= 1
        return node

    def primary_of(self, token: Token) -> Node:
        match token.kind:
            case "number":
                if self.at("_"):
                    self.take()
                    base = self.argument()
                    return Node("based", (base,), token.text)
                return Node("number", (), number(token.text))
            case "name":
                return self.name(token.text)
            case "word":
                return Node("word", (), token.text)
            case "function":
                return self.function(token.text)
            case "(" | "[" | "\\{" | "{":
                return self.brackets(token.kind)
            case "|":
                self.open_bars += 1
                node = self.several("|")
                self.take("|")
                self.open_bars -= 1
                return Node("abs", (node,))
            case "begin":
                return self.matrix(token.text)
            case "command":
                return self.command(token.text)
        raise Unreadable(f"{token.text or token.kind!r} is out of place")

    def name(self, text: str) -> Node:
        if self.at("_"):
            self.take()
            text += f"_{spelled(self.argument())}"
        return Node("const", (), text) if text in ("e", "i") else Node("name", (), text)

    def argument(self) -> Node:
        """The argument of \\frac, \\sqrt and _: a group in braces, else one token (one digit: \\frac12)."""
        if self.at("{"):
            self.take()
            node = self.several("}")
            self.take("}")
            return node
        token = self.peek()
        if token is not None and token.kind == "number" and len(token.text) > 1 and token.text.isdigit():
            self.tokens[self.position] = Token("number", token.text[1:])
            return Node("number", (), Fraction(token.text[0]))
        return self.primary()

    def command(self, text: str) -> Node:
        match text:
            case "frac":
                return Node("div", (self.argument(), self.argument()))
            case "binom":
                return Node("binom", (self.argument(), self.argument()))
            case "sqrt":
                index = Node("number", (), Fraction(2))
                if self.at("["):
                    self.take()
                    index = self.sum()
                    self.take("]")
                return Node("root", (self.argument(), index))
            case "pi" | "infty":
                return Node("const", (), text)
            case "emptyset":
                return Node("set")
            case "overline" | "vec" | "hat" | "bar":  # accents on names
                return self.argument()
        raise Unreadable(f"the command \\{text}")

    def function(self, text: str) -> Node:
        """\\sin^2 x, \\log_2 8, \\cos(x), \\sin 2x: without brackets the next product."""
        # The base and the exponent between the function's name and its argument.
        base, exponent = None, None
        if self.at("_"):
            self.take()
            base = self.argument()
        if self.at("^"):
            self.take()
            exponent = self.argument()

        # The argument.
        if self.at("(", "[", "{"):
            node = self.primary()
        else:
            node = self.signed_power()
            while self.starts_factor() and not self.at("function"):
                node = Node("mul", (node, self.power()))
        call = Node("call", (node,) if base is None else (node, base), text)
        return call if exponent is None else Node("pow", (call, exponent))

    def brackets(self, opening: str) -> Node:
        if opening == "\\{" and self.at("\\}"):
            self.take()
            return Node("set")
        node = self.several(CLOSING[opening][0])
        closing = self.take(*CLOSING[opening]).kind

        # Braces make a set (of one value only with a backslash); brackets make a tuple or interval of several
        # values.
        if opening in ("\\{", "{"):
            values = node.args if node.op == "list" else (node,)
            return Node("set", values) if opening == "\\{" or node.op == "list" else node
        if node.op == "list":
            return Node("bracket", node.args, opening + closing)
        if CLOSING[opening][0] != closing:
            raise Unreadable(f"expected {CLOSING[opening][0]} to close {opening}, got {closing}")
        return node

    def matrix(self, environment: str) -> Node:
        if environment not in ("pmatrix", "bmatrix", "matrix", "array", "smallmatrix"):
            raise Unreadable(f"the environment {environment}")
        if environment == "array" and self.at("{"):  # skip the columns' alignment
            while self.take().kind != "}":
                pass

        # Values separated by &, rows by \\\\; a last \\\\ starts no row.
        rows: list[list[Node]] = [[]]
        while not self.at("end"):
            rows[-1].append(self.relation())
            if self.at("row"):
                self.take()
                if not self.at("end"):
                    rows.append([])
            elif not self.at("end"):
                self.take("&")
        self.take("end")
        return Node("matrix", tuple(Node("row", tuple(row)) for row in rows))
