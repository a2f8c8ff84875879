"""Text to token ids and back: wraps `tokenizers.Tokenizer`, and makes two small ones to pretrain with.

A step encodes its prompts and decodes its completions for the rewards and the viewer.
Sampled ids go to training as sampled; a completion is never encoded again.
Reads any tokenizer.json; side_files.py reads the files next to it, chat.py renders its chat template.
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
from reason_rl.records import ConfigError

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHARACTERS = string.digits + string.ascii_lowercase + "+-*/()=<>,.:!? \n"
CHAR_VOCAB_SIZE = 64
"""A round number for the LM head; ids after the last character are `<reserved_n>` and are never encoded."""
EOS_NAMES = ("<eos>", "<|im_end|>", "<|endoftext|>", "</s>", "<|end_of_text|>")
PAD_NAMES = ("<pad>", "<|endoftext|>", "<|pad|>", "[PAD]", *EOS_NAMES)
FILE_NAME = "tokenizer.json"
BROKEN = "\ufffd"
"""Decoding puts it in place of bytes that are not a character, or not yet a whole one."""
MAX_HELD = 16
"""Most tokens that `TextStream` holds back for a whole character. One has at most four bytes, but a token
may end a character and begin the next; bytes that are still broken after this many tokens are not valid
text."""


class Tokenizer:
    """Encodes and decodes text; has the ids of the end and padding tokens and the chat template."""

    def __init__(self, inner: tokenizers.Tokenizer, side: SideFiles | None = None, json_text: str = "") -> None:
        """side: the files next to tokenizer.json. json_text: the text of that file, for `save`."""
        # Keep the library's tokenizer, without truncation and padding.
        side = side or SideFiles()
        self._inner, self._json = inner, json_text or str(inner.to_str(pretty=True))
        inner.no_truncation()
        inner.no_padding()
        ids = inner.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = 1 + max(ids, default=-1)  # ids may have gaps

        # Special tokens and the chat template.
        self.stop_ids = self._stop_ids(side)
        """All tokens that end a completion; `eos_id` is the first of them."""
        self.eos_id = self.stop_ids[0]
        self.pad_id = self._pad_id(side)
        self.chat = ChatTemplate(side.chat_template, side.special, side.folder) if side.chat_template else None
        """None if the folder has no chat template."""

        # A tag may be one token or several; only an added token encodes it the same way everywhere.
        added = {token.content: i for i, token in inner.get_added_tokens_decoder().items()}
        self._think_ids = added.get("<think>"), added.get("</think>")
        # A character tokenizer drops unknown characters silently, so `encode` checks its alphabet.
        self._alphabet = _alphabet_of(inner, set(added))

    def id_of(self, token: str) -> int:
        """The id of a single token such as `<think>`."""
        found = self._inner.token_to_id(token)
        if found is None:
            raise ConfigError(f"the tokenizer has no token {token!r} among its {self.vocab_size}")
        return int(found)

    def has_token(self, token: str) -> bool:
        return self._inner.token_to_id(token) is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone, without BOS or EOS: for rendered chats and for documents."""
        self._check_characters(text)
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a raw prompt, with the tokens that the tokenizer adds, such as a BOS."""
        self._check_characters(text)
        return list(self._inner.encode(text).ids)

    def encode_batch(self, texts: Sequence[str], are_prompts: bool = False) -> list[list[int]]:
        """`encode` (or `encode_prompt`) of each text in one call: some 100,000 short texts a second."""
        for text in texts:
            self._check_characters(text)
        return [e.ids for e in self._inner.encode_batch_fast(list(texts), add_special_tokens=are_prompts)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text, special tokens included. `decode(encode(text)) == text` for the char and byte tokenizers."""
        return str(self._inner.decode(list(token_ids), skip_special_tokens=False))

    def decode_completion(self, token_ids: Sequence[int]) -> str:
        """A completion's text as the rewards read it: without its last token if that is an end token."""
        ends = len(token_ids) > 0 and token_ids[-1] in self.stop_ids
        return self.decode(token_ids[:-1] if ends else token_ids)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The text that each token adds, for the viewer: "" for a token whose character is not yet whole."""
        stream = TextStream(self)
        texts = [stream.push(token) for token in token_ids]
        return [*texts[:-1], texts[-1] + stream.flush()] if texts else []

    def thinking_tokens(self, token_ids: Sequence[int], prefix: str = "") -> int:
        """Number of tokens between the first opening tag and the first closing tag after it.

        prefix: text before the completion that counts as its start, such as a `<think>` that the prompt ends
        with. A thought that never closes counts to the completion's end; without an opening tag the result is
        0. If the tags are not single tokens, they are found in the text, and a token is inside the thought if
        its first character is; a thought that lies entirely within the tags' tokens counts as 1.
        """
        # The tags are single tokens: count ids between them.
        ids, is_open = list(token_ids), "<think>" in prefix and "</think>" not in prefix
        opening, closing = self._think_ids
        if opening is not None and closing is not None:
            if not is_open and opening not in ids:
                return 0
            start = 0 if is_open else ids.index(opening) + 1
            return (ids.index(closing, start) if closing in ids[start:] else len(ids)) - start

        # The tags are several tokens: find them in the text.
        text = self.decode(ids)
        if not is_open and "<think>" not in text:
            return 0
        first = 0 if is_open else text.index("<think>") + len("<think>")
        last = text.find("</think>", first)
        count = (len(ids) if last < 0 else self._num_before(ids, last)) - self._num_before(ids, first)
        return count or int(text[first:last if last >= 0 else None] != "")

    def _num_before(self, ids: Sequence[int], position: int) -> int:
        """Number of tokens that begin before this character, by bisection: more tokens give no less text."""
        return bisect_left(range(len(ids)), position, key=lambda n: len(self.decode(ids[:n]).rstrip(BROKEN)))

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return self._json

    def save(self, folder: str | Path) -> None:
        """Writes folder/tokenizer.json; creates the folder if it does not exist."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / FILE_NAME).write_text(self._json, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        path = Path(folder) / FILE_NAME
        if not path.parent.is_dir():
            raise ConfigError(f"no checkpoint folder at {folder}")
        if not path.is_file():
            raise ConfigError(f"no {FILE_NAME} in {folder}: expected a checkpoint folder with its tokenizer")

        # The library raises a bare Exception for a bad file.
        try:
            text = path.read_text(encoding="utf-8")
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            raise ConfigError(f"{path} is not a readable tokenizer file: {error}") from error

        # Errors about its tokens name the folder.
        try:
            return cls(inner, read_side_files(Path(folder)), text)
        except ValueError as error:
            raise ConfigError(error if str(folder) in str(error) else f"{folder}: {error}") from error

    def _stop_ids(self, side: SideFiles) -> tuple[int, ...]:
        for token_id in side.eos_ids:
            if self._inner.id_to_token(token_id) is None:
                raise ConfigError(f"eos_token_id {token_id} is not one of the tokenizer's {self.vocab_size} tokens")
        named = (self.id_of(side.special["eos_token"]),) if "eos_token" in side.special else ()
        found = (*named, *side.eos_ids) or tuple(self.id_of(name) for name in EOS_NAMES if self.has_token(name))[:1]
        if not found:
            raise ConfigError(f"the tokenizer has no end-of-text token; looked for {', '.join(EOS_NAMES)}")
        return tuple(dict.fromkeys(found))

    def _pad_id(self, side: SideFiles) -> int:
        if side.pad_id is not None:
            return side.pad_id
        names = [name for name in (side.special.get("pad_token", ""), *PAD_NAMES) if self.has_token(name)]
        return self.id_of(names[0]) if names else self.eos_id

    def _check_characters(self, text: str) -> None:
        if self._alphabet is not None and not self._alphabet.issuperset(text):
            unknown = next(c for c in text if c not in self._alphabet)
            raise ConfigError(f"character {unknown!r} at position {text.index(unknown)} of {text!r} is not in the "
                             f"tokenizer's alphabet {''.join(sorted(self._alphabet))!r}")


class TextStream:
    """Turns tokens into text as they arrive, in whole characters that join to `decode` of all tokens.

    A token's text may depend on the token before it (a first token may lose its leading space), so it is the
    difference between decoding with and without the new tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        """The tokens whose text was returned last, as context for decoding the next."""
        self._held: list[int] = []
        """Tokens whose text is not yet returned."""

    def push(self, token_id: int) -> str:
        self._held.append(token_id)
        text = self._text()
        if text.endswith(BROKEN) and len(self._held) <= MAX_HELD:
            return ""
        self._context, self._held = [] if text.endswith(BROKEN) else self._held, []
        return text

    def flush(self) -> str:
        """The remaining text at the end, whole characters or not."""
        text, self._context, self._held = self._text(), [], []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode([*self._context, *self._held])[len(before):]


def tokenizer_of(config: Config) -> Tokenizer:
    """The tokenizer of model.init_from, or the one that pretrain.tokenizer names."""
    if config.model.init_from:
        return Tokenizer.load(config.model.init_from)
    return {"char": char_tokenizer, "byte": byte_tokenizer}[config.pretrain.tokenizer]()


def char_tokenizer() -> Tokenizer:
    """One token each for the tags, `<pad>` and `<eos>`, then one per character; 64 ids in all."""
    reserved = [f"<reserved_{n}>" for n in range(CHAR_VOCAB_SIZE - 2 - len(TAGS) - len(CHARACTERS))]
    inner = _without_merges([*CHARACTERS], reserved)
    assert inner.get_vocab_size() == CHAR_VOCAB_SIZE
    inner.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(inner)


def byte_tokenizer() -> Tokenizer:
    """One token each for the tags, `<pad>` and `<eos>`, then one per byte of UTF-8; 262 ids in all."""
    inner = _without_merges(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), [])
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(inner)


def _without_merges(symbols: Sequence[str], reserved: Sequence[str]) -> tokenizers.Tokenizer:
    """BPE without merges has one token per symbol."""
    special = ["<pad>", "<eos>", *TAGS]
    vocab = {token: i for i, token in enumerate([*special, *symbols, *reserved])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.add_special_tokens([*special, *reserved])
    return inner


def _alphabet_of(inner: tokenizers.Tokenizer, added: set[str]) -> frozenset[str] | None:
    """The characters of a character tokenizer; None if its tokens are subwords or bytes."""
    plain = [token for token in inner.get_vocab() if token not in added]
    is_by_character = inner.pre_tokenizer is None and all(len(token) == 1 for token in plain)
    return frozenset(plain) if is_by_character else None
