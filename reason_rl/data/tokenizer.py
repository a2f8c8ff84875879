"""Text to token ids and back: a thin wrapper around `tokenizers.Tokenizer`, and our own character tokenizer.

It stands at both ends of a step: `data` encodes prompts and corpus documents with it, and completions are decoded with
it for the rewards and the viewer. Sampled ids go to training as sampled; nothing here ever re-encodes a completion.
Left out: chat templates, normalisation, truncation, padding.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

import tokenizers

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHARACTERS = string.digits + string.ascii_lowercase + "+-*/()=<>,.:!? \n"
CHAR_VOCAB_SIZE = 64
"""A round number for the LM head; ids past the last character are `<reserved_n>` and never encoded."""
EOS_NAMES = ("<eos>", "<|im_end|>", "<|endoftext|>", "</s>", "<|end_of_text|>")
PAD_NAMES = ("<pad>", "<|endoftext|>", "<|pad|>", "[PAD]", *EOS_NAMES)
FILE_NAME = "tokenizer.json"


class Tokenizer:
    """What the trainer needs of a tokenizer. Tags such as `<think>` must be single tokens for `id_of` to find them."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        self.eos_id = self._first_of(EOS_NAMES, "end-of-text")
        self.pad_id = self._first_of(PAD_NAMES, "padding")
        # A character model drops what it does not know in silence, so its alphabet is checked here.
        self._alphabet = _alphabet_of(inner)

    @property
    def think_open_id(self) -> int:
        return self.id_of("<think>")

    @property
    def think_close_id(self) -> int:
        return self.id_of("</think>")

    @property
    def answer_open_id(self) -> int:
        return self.id_of("<answer>")

    @property
    def answer_close_id(self) -> int:
        return self.id_of("</answer>")

    def id_of(self, token: str) -> int:
        """The id of a single token such as `<think>`."""
        found = self._inner.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {token!r} among its {self.vocab_size}")
        return int(found)

    def has_token(self, token: str) -> bool:
        return self._inner.token_to_id(token) is not None

    def encode(self, text: str) -> list[int]:
        self._check_characters(text)
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in the library's own loop: some 100,000 short texts a second."""
        for text in texts:
            self._check_characters(text)
        return [e.ids for e in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included: `decode(encode(text)) == text` for the character tokenizer."""
        return str(self._inner.decode(list(token_ids), skip_special_tokens=False))

    def decode_completion(self, token_ids: Sequence[int]) -> str:
        """A completion's text as the rewards read it: without the one end token it stopped at."""
        ends = len(token_ids) > 0 and token_ids[-1] == self.eos_id
        return self.decode(token_ids[:-1] if ends else token_ids)

    def token_text(self, token_id: int) -> str:
        """One token as text, for the viewer; special tokens by their names."""
        return self.decode([token_id])

    def to_json(self) -> str:
        """What tokenizer.json holds."""
        return str(self._inner.to_str(pretty=True))

    def save(self, folder: str | Path) -> None:
        """Writes folder/tokenizer.json, making the folder if need be."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self._inner.save(str(path / FILE_NAME))

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise ValueError(f"no {FILE_NAME} in {folder}: a checkpoint folder with its tokenizer is expected")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path} is not a readable tokenizer file: {error}") from error
        return cls(inner)

    def _first_of(self, names: Sequence[str], role: str) -> int:
        for name in names:
            if self.has_token(name):
                return self.id_of(name)
        raise ValueError(f"the tokenizer has no {role} token; looked for {', '.join(names)}")

    def _check_characters(self, text: str) -> None:
        if self._alphabet is not None and not self._alphabet.issuperset(text):
            unknown = next(c for c in text if c not in self._alphabet)
            raise ValueError(f"character {unknown!r} at position {text.index(unknown)} of {text!r} is not in the "
                             f"tokenizer's alphabet {''.join(sorted(self._alphabet))!r}")


def char_tokenizer() -> Tokenizer:
    """Our own: the tags, `<pad>` and `<eos>` as one token each, then one token a character; 64 ids in all."""
    special = ["<pad>", "<eos>", *TAGS]
    reserved = [f"<reserved_{n}>" for n in range(CHAR_VOCAB_SIZE - len(special) - len(CHARACTERS))]
    vocab = {token: i for i, token in enumerate([*special, *CHARACTERS, *reserved])}
    assert len(vocab) == CHAR_VOCAB_SIZE
    # BPE without merges is one token a character.
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.add_special_tokens([*special, *reserved])
    inner.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(inner)


def _alphabet_of(inner: tokenizers.Tokenizer) -> frozenset[str] | None:
    """The characters of a character tokenizer; None for one whose tokens are pieces or bytes."""
    added = {token.content for token in inner.get_added_tokens_decoder().values()}
    plain = [token for token in inner.get_vocab() if token not in added]
    return frozenset(plain) if all(len(token) == 1 for token in plain) else None
