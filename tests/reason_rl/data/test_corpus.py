"""The corpus: document i depends on i alone, worked thoughts are right, no prompt is also a train or
held-out problem."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest

from reason_rl.config import Config, ConfigError, ModelConfig, PretrainConfig, RunConfig, load_config
from reason_rl.data import Document, char_tokenizer, corpus_documents, load_problems
from reason_rl.data.split import split_of

TOKENIZER = char_tokenizer()
COUNTDOWN = load_config("configs/countdown_cpu.toml")
NUM_DOCUMENTS = 8000
DOCUMENT = re.compile(r"(.+\?)<think>(.*)</think><answer>(.*)</answer><eos>")


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return corpus_documents(Config(), TOKENIZER, 0, NUM_DOCUMENTS)


def read(document: Document) -> tuple[str, str, str]:
    return DOCUMENT.fullmatch(TOKENIZER.decode(document.token_ids)).groups()


def value_of(prompt: str) -> int:
    first, *rest = prompt.removesuffix("?").split(",")
    value = int(first[1:])
    for line in rest:
        value = eval(f"({value}{line[1:]}) % 10")
    return value


def test_a_document_depends_on_its_index_alone(documents: list[Document]) -> None:
    assert corpus_documents(Config(), TOKENIZER, 100, 50) == documents[100:150]
    backwards = [corpus_documents(Config(), TOKENIZER, i, 1)[0] for i in (9, 3, 0)]
    assert backwards == [documents[9], documents[3], documents[0]]
    other = corpus_documents(Config(run=RunConfig(seed=1)), TOKENIZER, 0, 50)
    assert other != documents[:50]


def test_every_answer_of_the_default_corpus_is_right(documents: list[Document]) -> None:
    for document in documents:
        if document.kind != "fact":
            prompt, _, answer = read(document)
            assert answer == str(value_of(prompt))


def test_a_thought_has_the_number_of_lines_of_its_kind(documents: list[Document]) -> None:
    for document in documents:
        if document.kind == "fact":
            assert re.fullmatch(r"\d[-+*]\d=\d<eos>", TOKENIZER.decode(document.token_ids))
            continue
        prompt, thought, _ = read(document)
        num_lines = len(thought.split(",")) if thought else 0
        assert prompt.count(",") + 1 == document.level
        match document.kind:
            case "direct":
                assert num_lines == 0
            case "worked":
                assert num_lines == document.level
            case "partial":
                assert 1 <= num_lines < document.level


def test_the_mix_is_the_configs(documents: list[Document]) -> None:
    kinds = Counter(d.kind for d in documents)
    assert abs(kinds["fact"] / NUM_DOCUMENTS - 0.2) < 0.025  # standard deviation 0.0045: five of them
    hard = Counter(d.kind for d in documents if d.level >= Config().task.min_level)
    easy = Counter(d.kind for d in documents if 2 <= d.level < Config().task.min_level)
    # some 4,000 and 1,600 documents: standard deviations up to 0.006 and 0.012
    for kind, share in (("direct", 0.82), ("worked", 0.09), ("partial", 0.09)):
        assert abs(hard[kind] / hard.total() - share) < 0.03
    for kind, share in (("direct", 0.51), ("worked", 0.40), ("partial", 0.09)):
        assert abs(easy[kind] / easy.total() - share) < 0.06
    assert {d.level for d in documents} == set(range(9))


@pytest.mark.parametrize("config", [Config(), COUNTDOWN], ids=lambda c: c.task.name)
def test_the_corpus_shares_no_prompt_with_train_and_heldout_problems(config: Config) -> None:
    prompts = {read(d)[0] for d in corpus_documents(config, TOKENIZER, 0, NUM_DOCUMENTS) if d.kind != "fact"}
    problems = load_problems(config, TOKENIZER)
    theirs = {p.prompt for p in problems.heldout(500)}
    theirs |= {p.prompt for step in range(40) for p in problems.train(step, 16)}
    assert not prompts & theirs
    if config.task.name == "program":
        assert all(split_of(prompt, config.task) == "corpus" for prompt in prompts)


def test_two_thirds_of_countdowns_guesses_are_wrong_and_no_searched_answer_is() -> None:
    documents = corpus_documents(COUNTDOWN, TOKENIZER, 0, 4000)
    hits: dict[str, list[bool]] = {"direct": [], "worked": []}
    for document in documents:
        prompt, thought, answer = read(document)
        value = eval(re.sub(r"(\d+)", r"Fraction(\1)", answer), {"Fraction": Fraction})
        hits[document.kind].append(value == int(prompt.removesuffix("?").split("=")[1]))
        assert bool(thought) == (document.kind == "worked")
    assert all(hits["worked"])
    assert abs(len(hits["worked"]) / 4000 - 0.2) < 0.035  # standard deviation 0.0063
    assert abs(sum(hits["direct"]) / len(hits["direct"]) - 0.33) < 0.045  # standard deviation 0.0083


def test_a_document_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.max_position_embeddings = 64"):
        corpus_documents(Config(model=ModelConfig(max_position_embeddings=64)), TOKENIZER, 0, 1000)


def test_documents_are_those_of_the_record() -> None:
    """If the record changes, the same config pretrains on other documents than before."""
    digests = []
    for config in (Config(), COUNTDOWN):
        text = repr([(d.token_ids, d.kind, d.level) for d in corpus_documents(config, TOKENIZER, 0, 200)])
        digests.append(hashlib.blake2b(text.encode(), digest_size=6).hexdigest())
    assert digests == ["3d8cf5e788a7", "d6f8faaee097"]


def test_levels_out_of_order_are_refused() -> None:
    config = replace(Config(), pretrain=PretrainConfig(min_level=9))
    with pytest.raises(ConfigError, match=r"pretrain\.min_level = 9 is above"):
        corpus_documents(config, TOKENIZER, 0, 1)
