"""The corpus: each document follows from its number alone, says what is true, and stays out of RL's problems."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest

from reason_rl.config import Config, ConfigError, ModelConfig, PretrainConfig, RunConfig, TaskConfig, load_config
from reason_rl.data import Document, char_tokenizer, corpus_documents, heldout_problems, rl_problems, split_of

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


def test_documents_follow_from_their_number_alone(documents: list[Document]) -> None:
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


def test_every_kind_thinks_as_much_as_its_name_says(documents: list[Document]) -> None:
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
def test_the_corpus_stays_out_of_rl_and_heldout_problems(config: Config) -> None:
    prompts = {read(d)[0] for d in corpus_documents(config, TOKENIZER, 0, NUM_DOCUMENTS) if d.kind != "fact"}
    theirs = {p.prompt for p in heldout_problems(config, TOKENIZER, 500)}
    theirs |= {p.prompt for step in range(40) for p in rl_problems(config, TOKENIZER, step, 16)}
    assert not prompts & theirs
    if config.task.name == "program":
        assert all(split_of(prompt, config.task) == "train" for prompt in prompts)


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


def test_arithmetic_documents_fit_the_default_context() -> None:
    config = Config(task=TaskConfig(name="arithmetic", min_level=3, max_level=8))
    documents = corpus_documents(config, TOKENIZER, 0, 500)
    assert {d.kind for d in documents} == {"direct", "worked", "partial", "fact"}
    assert max(len(d.token_ids) for d in documents) <= config.model.max_position_embeddings


def test_a_document_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.max_position_embeddings = 64"):
        corpus_documents(Config(model=ModelConfig(max_position_embeddings=64)), TOKENIZER, 0, 1000)


def test_levels_out_of_order_are_refused() -> None:
    config = replace(Config(), pretrain=PretrainConfig(min_level=9))
    with pytest.raises(ConfigError, match=r"pretrain\.min_level = 9 is above"):
        corpus_documents(config, TOKENIZER, 0, 1)
