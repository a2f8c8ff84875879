"""The tokenizers: decoding inverts encoding, a checkpoint's tokenizer equals that of transformers, errors
name their cause."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reason_rl.config import Config, ModelConfig, PretrainConfig
from reason_rl.data.tokenizer import CHARACTERS, TAGS, TextStream, Tokenizer, byte_tokenizer, char_tokenizer, tokenizer_of
from reason_rl.records import Completion, Group, Problem
from reason_rl.rl.packing import Sample, pack_samples
from tests.reason_rl.trained import KINDS, TEXTS, folder_of

TEXT = "a2,b*3,c-1?<think>a2,b*3=6,c-1=5</think><answer>5</answer>"
BYTES = byte_tokenizer()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return char_tokenizer()


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp(request.param), request.param)


def test_decode_gives_back_what_was_encoded(tokenizer: Tokenizer) -> None:
    for text in (TEXT, "", CHARACTERS, "x<y>z/</think", "a\nb c!\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_the_byte_tokenizer_encodes_any_text(text: str) -> None:
    ids = BYTES.encode(text)
    assert BYTES.decode(ids) == text == "".join(BYTES.pieces(ids))
    if not any(tag in text for tag in (*TAGS, "<pad>", "<eos>")):
        assert len(ids) == len(text.encode())


def test_our_own_tokenizers_have_their_sizes_and_their_names() -> None:
    for name, size in (("char", 64), ("byte", 262)):
        own = tokenizer_of(Config(pretrain=PretrainConfig(tokenizer=name)))  # type: ignore[arg-type]
        assert (own.vocab_size, own.pad_id, own.eos_id, own.stop_ids, own.chat) == (size, 0, 1, (1,), None)
        texts = [own.decode([i]) for i in range(6)]
        assert texts == ["<pad>", "<eos>", *TAGS]
    assert len({char_tokenizer().decode([i]) for i in range(64)}) == 64
    assert len({BYTES.id_of(symbol) for symbol in tokenizers.pre_tokenizers.ByteLevel.alphabet()} | set(range(6))) == 262


def test_tags_are_one_token_and_characters_one_each(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<think>12</think><answer>3</answer>")
    assert len(ids) == 7
    assert [ids[0], ids[3], ids[4], ids[6]] == [tokenizer.id_of(tag) for tag in TAGS]


def test_an_unknown_character_is_named(tokenizer: Tokenizer) -> None:
    for encode in (tokenizer.encode, tokenizer.encode_prompt):
        with pytest.raises(ValueError, match="'A' at position 2"):
            encode("12A")
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


def test_saving_and_loading_changes_nothing(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert (loaded.vocab_size, loaded.eos_id, loaded.pad_id) == (64, tokenizer.eos_id, tokenizer.pad_id)
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    with pytest.raises(ValueError, match="'A'"):
        loaded.encode("A")
    Tokenizer.load(folder).save(tmp_path / "foreign")  # to the byte, whatever we set in it for ourselves
    assert (tmp_path / "foreign" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        tokenizer_of(Config(model=ModelConfig(init_from=str(tmp_path))))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="not a readable tokenizer file"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("file", "text", "message"), [
    ("generation_config.json", '{"eos_token_id": 99999}', "eos_token_id 99999 is not one of the tokenizer's 700 tokens"),
    ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id must be a token id or a list of them, got '</s>'"),
    ("generation_config.json", '{"eos_token_id"', r"generation_config\.json is damaged"),
    ("tokenizer_config.json", '{"eos_token": "<absent>"}', "no token '<absent>'"),
    ("tokenizer_config.json", "[]", "must hold a JSON object, got list"),
    ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be text or a list of named texts, got int"),
    ("tokenizer_config.json", '{"chat_template": [{"name": "rag", "template": "x"}]}', r"several chat templates \(rag\)"),
    ("chat_template.jinja", "{% for %}", "is not a valid template: line 1"),
])
def test_a_folder_that_contradicts_itself_is_refused_by_name(file: str, text: str, message: str, tmp_path: Path) -> None:
    folder_of(tmp_path / "given")
    (tmp_path / "given" / file).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(tmp_path / "given")
    assert "given" in str(caught.value)


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


@pytest.mark.parametrize(("generation", "config", "stops", "pad"), [
    (None, {}, (2,), 0),
    ({"eos_token_id": 0}, {}, (2, 0), 0),
    ({"eos_token_id": [2, 3, 0], "pad_token_id": 5}, {}, (2, 3, 0), 5),
    ({"eos_token_id": [3, 0]}, {"eos_token": None, "pad_token": {"content": "<|eot|>"}}, (3, 0), 3),
    ({"eos_token_id": None}, {"eos_token": {"content": "<|eot|>", "special": True}}, (3,), 0),
    (None, {"eos_token": None}, (2,), 0),  # by name
])
def test_every_token_that_the_folder_names_ends_a_completion(
    generation: dict[str, Any] | None, config: dict[str, Any], stops: tuple[int, ...], pad: int, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path, generation=generation, **config))
    assert (tokenizer.stop_ids, tokenizer.eos_id, tokenizer.pad_id) == (stops, stops[0], pad)
    text = tokenizer.encode("4")
    assert all(tokenizer.decode_completion([*text, stop]) == "4" for stop in stops)
    assert tokenizer.decode_completion([*text, 7]) == "4<|start_header_id|>"


def test_ends_are_read_from_the_models_config_where_there_is_no_other(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, eos_token=None)
    (folder / "config.json").write_text('{"eos_token_id": [3, 2]}')
    assert Tokenizer.load(folder).stop_ids == (3, 2)
    (folder / "generation_config.json").write_text('{"eos_token_id": null, "temperature": 0.6}')
    assert Tokenizer.load(folder).stop_ids == (3, 2)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert Tokenizer.load(folder).stop_ids == (2,)
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|eot|>"}, "bos_token": "<|begin|>"}')
    assert Tokenizer.load(folder).stop_ids == (3, 2)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert Tokenizer.load(folder).stop_ids == (2,)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint folder at .*/nowhere"):
        Tokenizer.load(tmp_path / "nowhere")


def test_raw_prompts_and_texts_are_those_of_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = ours.encode_prompt(text)
        assert ids == theirs(text).input_ids
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("adds", [True, False, None], ids=str)
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_tokenizer_json_alone_decides_the_first_tokens_of_a_raw_prompt(kind: str, adds: bool | None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = folder_of(tmp_path, kind, add_bos_token=adds, add_eos_token=adds)
    ids = Tokenizer.load(folder).encode_prompt("Tom has")
    assert ids == transformers.AutoTokenizer.from_pretrained(folder)("Tom has").input_ids
    assert (ids[0] == 1) == (kind == "byte_fallback")


def test_a_tokenizer_that_would_cut_or_pad_does_neither(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    inner.save(str(folder / "tokenizer.json"))
    assert Tokenizer.load(folder).decode(Tokenizer.load(folder).encode_prompt(TEXT)) == TEXT


def test_a_stream_gives_whole_characters_and_all_of_the_text(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    for text in TEXTS:
        for ids in (tokenizer.encode_prompt(text), tokenizer.encode(text)):
            pieces = tokenizer.pieces(ids)
            assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)
            assert not any("\ufffd" in piece for piece in pieces)


def test_a_stream_of_bytes_that_are_no_text_goes_on_after_them() -> None:
    broken, stream = BYTES.encode("🙂")[:1], TextStream(BYTES)
    assert [stream.push(token) for token in BYTES.encode("a数")] == ["a", "", "", "数"]
    assert stream.push(broken[0]) == "" and stream.push(BYTES.encode("b")[0]) == "\ufffdb"
    texts = [stream.push(token) for token in broken * 40]
    assert "\ufffd" in "".join(texts)  # it holds them back for a limited time only
    assert ("".join(texts) + stream.push(BYTES.encode("!")[0])) == "\ufffd" * 40 + "!"
    assert stream.push(broken[0]) == "" and stream.flush() == "\ufffd" and stream.flush() == ""
    whole = BYTES.pieces(broken * 17 + BYTES.encode("🙂")[1:] + BYTES.encode("x"))  # held back too long
    assert "".join(whole) == "\ufffd" * 20 + "x"


def by_character(tokenizer: Tokenizer, text: str) -> list[int]:
    return [token for character in text for token in tokenizer.encode(character)]


@pytest.mark.parametrize(("text", "prefix", "count"), [
    ("<think>1+1=2</think><answer>2</answer>", "", 5), ("<think></think><answer>2</answer>", "", 0), ("<think>1+", "", 2),
    ("2", "", 0), ("", "", 0), ("x<think>ab</think><think>abc</think>", "", 2), ("</think><think>1</think>", "", 1),
    ("1+1=2</think><answer>2</answer>", "<think>", 5), ("</think>x", "<think>", 0), ("12", "<think>", 2), ("", "<think>", 0),
    ("x</think>", "<think></think>", 0),
])
def test_thinking_tokens_are_between_the_tags_of_one_or_several_tokens(
    text: str, prefix: str, count: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pieces = Tokenizer.load(folder_of(tmp_path))
    assert not pieces.has_token("<think>")
    assert tokenizer.thinking_tokens(tokenizer.encode(text), prefix) == count
    assert pieces.thinking_tokens(by_character(pieces, text), prefix) == count
    ids = [*tokenizer.encode(text), tokenizer.eos_id]  # an end token in a thought that never closes belongs to the thought
    assert tokenizer.thinking_tokens(ids, prefix) == pieces.thinking_tokens([*by_character(pieces, text), 2], prefix)


def joined(vocab: dict[str, int]) -> Tokenizer:
    """A tokenizer with this vocabulary whose decoder joins tokens without separators."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(inner)


def test_a_thought_within_the_tags_own_tokens_is_one_token() -> None:
    vocab = {"<think>1</think>": 0, "<think></think>": 1, "</s>": 2, "<think>2": 3, "3</think>": 4}
    tokenizer = joined(vocab)
    assert [tokenizer.thinking_tokens(ids) for ids in ([0], [1], [3, 4], [3], [4], [2])] == [1, 0, 1, 1, 0, 0]


def test_a_tag_in_the_vocabulary_may_still_be_split_over_tokens() -> None:
    vocab = {"<think>": 0, "</think>": 1, "<think>1": 2, "+1=2</": 3, "think>": 4, "2": 5, "</s>": 6}
    tokenizer = joined(vocab)
    assert [tokenizer.thinking_tokens(ids) for ids in ([2, 3, 4], [0, 5, 5, 1], [2, 5, 1], [0, 3, 4])] == [1, 2, 1, 1]


def test_a_thoughts_characters_of_several_tokens_are_counted_as_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path))
    opening, thought, closing = (tokenizer.encode(text) for text in ("<think>", "🙃数𝄞é", "</think>4"))
    assert len(thought) > 6 and tokenizer.thinking_tokens([*opening, *thought, *closing]) == len(thought)
    joined = tokenizer.encode("<think> Tom</think>")
    inside = sum(piece in (" Tom", " T", "om", " ", "T", "o", "m") for piece in tokenizer.pieces(joined))
    assert tokenizer.thinking_tokens(joined) == inside > 0


def test_a_completion_is_trained_on_as_it_was_sampled_and_never_encoded_again(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path))
    sampled = (*by_character(tokenizer, "apples 4"), tokenizer.eos_id)
    text = tokenizer.decode_completion(sampled)
    assert text == "apples 4" and tuple(tokenizer.encode(text)) != sampled[:-1]  # encoding gives fewer
    completion = Completion(sampled, (-1.0,) * len(sampled), (0.0,) * len(sampled), "stop", 0, 0)
    group = Group(Problem(0, "test", "Tom", tuple(tokenizer.encode("Tom")), "4"), (completion,))
    (pack,) = pack_samples([Sample(group, 0, 0)], torch.ones(1, 1), 1000)
    assert tuple(pack.target_ids.tolist()) == sampled


def test_tokens_are_read_by_their_ids_even_where_these_have_gaps() -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "</s>": 9}, merges=[]))
    inner.add_special_tokens(["</s>"])
    assert Tokenizer(inner).vocab_size == 10


def test_random_tokens_of_any_kind_are_streamed_without_losing_text(folder: Path) -> None:
    """A policy may sample ids that no text encodes to, and bytes that are not characters; only the valid
    text is compared."""
    tokenizer, rng = Tokenizer.load(folder), random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(3, tokenizer.vocab_size) for _ in range(30)]
        whole, pieces = tokenizer.decode(ids), tokenizer.pieces(ids)
        assert len(pieces) == 30
        if "\ufffd" not in whole:
            assert "".join(pieces) == whole
    assert json.loads(tokenizer.to_json())["version"] == "1.0"
