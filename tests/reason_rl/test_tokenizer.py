"""The tokenizer: what goes in comes out, tags are single tokens, and what it does not know is named."""

from __future__ import annotations

import pytest
import tokenizers

from reason_rl.data.tokenizer import CHARACTERS, TAGS, Tokenizer, char_tokenizer

TEXT = "a2,b*3,c-1?<think>a2,b*3=6,c-1=5</think><answer>5</answer>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return char_tokenizer()


def test_decode_gives_back_what_was_encoded(tokenizer: Tokenizer) -> None:
    for text in (TEXT, "", CHARACTERS, "x<y>z/</think", "a\nb c!\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tags_are_one_token_and_characters_one_each(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<think>12</think><answer>3</answer>")
    assert len(ids) == 7
    assert [ids[0], ids[3], ids[4], ids[6]] == [tokenizer.think_open_id, tokenizer.think_close_id,
                                               tokenizer.answer_open_id, tokenizer.answer_close_id]
    assert len({tokenizer.id_of(tag) for tag in TAGS}) == 4


def test_the_vocabulary_has_64_ids_and_each_has_a_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 64
    texts = [tokenizer.token_text(i) for i in range(64)]
    assert len(set(texts)) == 64 and all(texts)
    assert tokenizer.eos_id != tokenizer.pad_id


def test_an_unknown_character_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="'A' at position 2"):
        tokenizer.encode("12A")
    with pytest.raises(ValueError, match="'٣'"):
        tokenizer.encode_batch(["1", "٣"])


def test_an_unknown_token_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="<search>"):
        tokenizer.id_of("<search>")


def test_batches_encode_as_single_texts_do(tokenizer: Tokenizer) -> None:
    texts = [TEXT[:n] for n in range(len(TEXT))]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_a_completion_is_read_without_its_one_end_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<think>")
    assert tokenizer.decode_completion(ids) == "<think>"
    assert tokenizer.decode_completion([*ids, tokenizer.eos_id]) == "<think>"
    assert tokenizer.decode_completion([*ids, tokenizer.eos_id, tokenizer.eos_id]) == "<think><eos>"


def test_saving_and_loading_changes_nothing(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert (loaded.vocab_size, loaded.eos_id, loaded.pad_id) == (64, tokenizer.eos_id, tokenizer.pad_id)
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    with pytest.raises(ValueError, match="'A'"):
        loaded.encode("A")


def test_a_missing_or_damaged_file_is_said_to_be_so(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="not a readable tokenizer file"):
        Tokenizer.load(tmp_path)


def test_a_foreign_tokenizer_without_an_end_token_is_refused() -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(ValueError, match="no end-of-text token"):
        Tokenizer(inner)


def test_a_tokenizer_of_pieces_has_no_alphabet_to_check() -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    inner.add_special_tokens(["<|endoftext|>"])
    wrapped = Tokenizer(inner)
    assert wrapped.encode("abab") == [2, 2]
    assert wrapped.eos_id == wrapped.pad_id == 3
