"""Text to token ids and back: a thin wrapper around `tokenizers.Tokenizer`, and a character and a byte tokenizer of our own.

It stands at both ends of a step: `data` encodes prompts and corpus documents with it, and completions are decoded with
it for the rewards and the viewer. Sampled ids go to training as sampled; nothing here ever re-encodes a completion.
Any tokenizer.json will do; what stands beside it in a Hugging Face folder is read by side_files.py, its chat template by chat.py.
Left out: truncation, padding; tokenizers without a tokenizer.json.
"""

from __future__ import annotations

import string
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from reason_rl.config import Config
from reason_rl.data.chat import ChatTemplate
from reason_rl.data.side_files import SideFiles, read_side_files

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHARACTERS = string.digits + string.ascii_lowercase + "+-*/()=<>,.:!? \n"
CHAR_VOCAB_SIZE = 64
"""A round number for the LM head; ids past the last character are `<reserved_n>` and never encoded."""
EOS_NAMES = ("<eos>", "<|im_end|>", "<|endoftext|>", "</s>", "<|end_of_text|>")
PAD_NAMES = ("<pad>", "<|endoftext|>", "<|pad|>", "[PAD]", *EOS_NAMES)
FILE_NAME = "tokenizer.json"
BROKEN = "\ufffd"
"""What stands in a decoded text for bytes that are no character, or none yet."""
MAX_HELD = 16
"""Tokens that wait for their character to be whole. It has at most four bytes, but a token may end one and begin the next; what
is still broken after as many is no text."""


class Tokenizer:
    """What the trainer needs of a tokenizer."""

    def __init__(self, inner: tokenizers.Tokenizer, side: SideFiles | None = None, json_text: str = "") -> None:
        """side: what its folder says beside tokenizer.json. json_text: that file as it stands, to be handed on unchanged."""
        side = side or SideFiles()
        self._inner, self._json = inner, json_text or str(inner.to_str(pretty=True))
        inner.no_truncation()
        inner.no_padding()
        ids = inner.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = 1 + max(ids, default=-1)  # ids may have gaps
        self.stop_ids = self._stop_ids(side)
        """Every token that ends a completion; `eos_id` is the first of them."""
        self.eos_id = self.stop_ids[0]
        self.pad_id = self._pad_id(side)
        self.chat = ChatTemplate(side.chat_template, side.special, side.folder) if side.chat_template else None
        """None where the folder has no chat template."""
        added = {token.content: i for i, token in inner.get_added_tokens_decoder().items()}
        self._think_ids = added.get("<think>"), added.get("</think>")  # a piece of that text may be one token here, several there
        # A character model drops what it does not know in silence, so its alphabet is checked here.
        self._alphabet = _alphabet_of(inner, set(added))

    def id_of(self, token: str) -> int:
        """The id of a single token such as `<think>`."""
        found = self._inner.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {token!r} among its {self.vocab_size}")
        return int(found)

    def has_token(self, token: str) -> bool:
        return self._inner.token_to_id(token) is not None

    def encode(self, text: str) -> list[int]:
        """The text's own tokens and no other: what a chat template has written, and documents."""
        self._check_characters(text)
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, text: str) -> list[int]:
        """A raw text that opens a sequence: with what the tokenizer itself puts around one, such as a BOS."""
        self._check_characters(text)
        return list(self._inner.encode(text).ids)

    def encode_batch(self, texts: Sequence[str], are_prompts: bool = False) -> list[list[int]]:
        """`encode` (or `encode_prompt`) of each text, in the library's own loop: some 100,000 short texts a second."""
        for text in texts:
            self._check_characters(text)
        return [e.ids for e in self._inner.encode_batch_fast(list(texts), add_special_tokens=are_prompts)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included: `decode(encode(text)) == text` for our own tokenizers."""
        return str(self._inner.decode(list(token_ids), skip_special_tokens=False))

    def decode_completion(self, token_ids: Sequence[int]) -> str:
        """A completion's text as the rewards read it: without the one end token it stopped at."""
        ends = len(token_ids) > 0 and token_ids[-1] in self.stop_ids
        return self.decode(token_ids[:-1] if ends else token_ids)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """What each token adds to the text, for the viewer: "" for one whose character is not yet whole."""
        stream = TextStream(self)
        texts = [stream.push(token) for token in token_ids]
        return [*texts[:-1], texts[-1] + stream.flush()] if texts else []

    def thinking_tokens(self, token_ids: Sequence[int], prefix: str = "") -> int:
        """How many tokens stand between the first opening tag and the first closing tag after it.

        prefix: text before the completion that counts as its own, such as a `<think>` that the prompt ends with. A thought that
        never closes counts to the completion's end, one that never opens is 0; a completion "thinks" when this is above 0. Tags
        that are no tokens of their own are found in the text; a token belongs to where its first character stands, and a thought
        that stands within the tags' own tokens is one.
        """
        ids, is_open = list(token_ids), "<think>" in prefix and "</think>" not in prefix
        opening, closing = self._think_ids
        if opening is not None and closing is not None:
            if not is_open and opening not in ids:
                return 0
            start = 0 if is_open else ids.index(opening) + 1
            return (ids.index(closing, start) if closing in ids[start:] else len(ids)) - start
        text = self.decode(ids)
        if not is_open and "<think>" not in text:
            return 0
        first = 0 if is_open else text.index("<think>") + len("<think>")
        last = text.find("</think>", first)
        count = (len(ids) if last < 0 else self._num_before(ids, last)) - self._num_before(ids, first)
        return count or int(text[first:last if last >= 0 else None] != "")

    def _num_before(self, ids: Sequence[int], position: int) -> int:
        """How many tokens begin before that character of their text: found by halving, since a longer start has a longer text."""
        return bisect_left(range(len(ids)), position, key=lambda n: len(self.decode(ids[:n]).rstrip(BROKEN)))

    def to_json(self) -> str:
        """What tokenizer.json holds."""
        return self._json

    def save(self, folder: str | Path) -> None:
        """Writes folder/tokenizer.json, making the folder if need be."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / FILE_NAME).write_text(self._json, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        path = Path(folder) / FILE_NAME
        if not path.parent.is_dir():
            raise ValueError(f"no checkpoint folder at {folder}")
        if not path.is_file():
            raise ValueError(f"no {FILE_NAME} in {folder}: a checkpoint folder with its tokenizer is expected")
        try:
            text = path.read_text(encoding="utf-8")
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path} is not a readable tokenizer file: {error}") from error
        try:
            return cls(inner, read_side_files(Path(folder)), text)
        except ValueError as error:
            raise ValueError(error if str(folder) in str(error) else f"{folder}: {error}") from error

    def _stop_ids(self, side: SideFiles) -> tuple[int, ...]:
        for token_id in side.eos_ids:
            if self._inner.id_to_token(token_id) is None:
                raise ValueError(f"eos_token_id {token_id} is none of the tokenizer's {self.vocab_size} tokens")
        named = (self.id_of(side.special["eos_token"]),) if "eos_token" in side.special else ()
        found = (*named, *side.eos_ids) or tuple(self.id_of(name) for name in EOS_NAMES if self.has_token(name))[:1]
        if not found:
            raise ValueError(f"the tokenizer has no end-of-text token; looked for {', '.join(EOS_NAMES)}")
        return tuple(dict.fromkeys(found))

    def _pad_id(self, side: SideFiles) -> int:
        if side.pad_id is not None:
            return side.pad_id
        names = [name for name in (side.special.get("pad_token", ""), *PAD_NAMES) if self.has_token(name)]
        return self.id_of(names[0]) if names else self.eos_id

    def _check_characters(self, text: str) -> None:
        if self._alphabet is not None and not self._alphabet.issuperset(text):
            unknown = next(c for c in text if c not in self._alphabet)
            raise ValueError(f"character {unknown!r} at position {text.index(unknown)} of {text!r} is not in the "
                             f"tokenizer's alphabet {''.join(sorted(self._alphabet))!r}")


class TextStream:
    """Tokens as they come -> text, never a part of a character: the pieces joined are `decode` of all tokens.

    A token's text may depend on the one before it (a first one may lose its leading space), so it is read off the difference of two
    decodings that begin there.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._said: list[int] = []
        """The tokens given out last: what the next ones' text is read beside."""
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        self._held.append(token_id)
        text = self._text()
        if text.endswith(BROKEN) and len(self._held) <= MAX_HELD:
            return ""
        self._said, self._held = [] if text.endswith(BROKEN) else self._held, []
        return text

    def flush(self) -> str:
        """What is left at the end, whole characters or not."""
        text, self._said, self._held = self._text(), [], []
        return text

    def _text(self) -> str:
        return self._tokenizer.decode([*self._said, *self._held])[len(self._tokenizer.decode(self._said)):]


def tokenizer_of(config: Config) -> Tokenizer:
    """The checkpoint's that a run starts from; else pretrain.tokenizer, of our own."""
    if config.model.init_from:
        return Tokenizer.load(config.model.init_from)
    return {"char": char_tokenizer, "byte": byte_tokenizer}[config.pretrain.tokenizer]()


def char_tokenizer() -> Tokenizer:
    """The tags, `<pad>` and `<eos>` as one token each, then one token a character; 64 ids in all."""
    reserved = [f"<reserved_{n}>" for n in range(CHAR_VOCAB_SIZE - 2 - len(TAGS) - len(CHARACTERS))]
    inner = _without_merges([*CHARACTERS], reserved)
    assert inner.get_vocab_size() == CHAR_VOCAB_SIZE
    inner.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(inner)


def byte_tokenizer() -> Tokenizer:
    """The tags, `<pad>` and `<eos>` as one token each, then one token a byte of UTF-8: any text, 262 ids in all."""
    inner = _without_merges(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), [])
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(inner)


def _without_merges(symbols: Sequence[str], reserved: Sequence[str]) -> tokenizers.Tokenizer:
    """BPE without merges is one token a symbol."""
    special = ["<pad>", "<eos>", *TAGS]
    vocab = {token: i for i, token in enumerate([*special, *symbols, *reserved])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.add_special_tokens([*special, *reserved])
    return inner


def _alphabet_of(inner: tokenizers.Tokenizer, added: set[str]) -> frozenset[str] | None:
    """The characters of a character tokenizer; None for one whose tokens are pieces or bytes."""
    plain = [token for token in inner.get_vocab() if token not in added]
    is_by_character = inner.pre_tokenizer is None and all(len(token) == 1 for token in plain)
    return frozenset(plain) if is_by_character else None
