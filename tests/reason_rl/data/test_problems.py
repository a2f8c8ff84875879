"""Generated tasks and their problems: worked thoughts are right, splits are disjoint, draws depend on their
keys alone.

Worked thoughts are checked by computing their steps from the prompt, without the code that wrote them.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from reason_rl.config import Config, ConfigError, ModelConfig, RLConfig, RunConfig, TaskConfig, load_config
from reason_rl.data import (
    TASKS,
    CorpusTask,
    Exercise,
    TooFewProblems,
    byte_tokenizer,
    char_tokenizer,
    corpus_documents,
    load_problems,
    load_task,
)
from reason_rl.data.split import problem_id_of, split_of
from reason_rl.records import Problem, SamplingParams

TOKENIZER = char_tokenizer()
COUNTDOWN = load_config("configs/countdown_cpu.toml")
CONFIGS = [Config(), COUNTDOWN]


def config_name(config: Config) -> str:
    return config.task.name


def corpus_task(name: str) -> CorpusTask:
    task = TASKS[name]
    assert isinstance(task, CorpusTask)
    return task


def draws(name: str, level: int, operations: str = "+-*", count: int = 400) -> list[Exercise]:
    rng = random.Random(f"{name}/{level}/{operations}")
    return [TASKS[name].draw(rng, level, operations) for _ in range(count)]


def run_program(prompt: str) -> list[int]:
    """The value after each line, computed by Python's `eval`."""
    first, *rest = prompt.removesuffix("?").split(",")
    values = [int(first[1:])]
    for line in rest:
        values.append(eval(f"({values[-1]}{line[1:]}) % 10"))
    return values


def exact(expression: str) -> Fraction:
    return eval(re.sub(r"(\d+)", r"Fraction(\1)", expression), {"Fraction": Fraction})


def numbers_in(expression: str) -> list[int]:
    return sorted(n.value for n in ast.walk(ast.parse(expression)) if isinstance(n, ast.Constant))


@pytest.mark.parametrize("level", [1, 2, 4, 8, 26])
def test_every_line_of_a_program_is_right(level: int) -> None:
    for exercise in draws("program", level):
        work = corpus_task("program").work(exercise)
        values = run_program(exercise.prompt)
        lines = exercise.prompt.removesuffix("?").split(",")
        assert len(lines) == level == exercise.level
        assert list(work.lines) == [lines[0], *(f"{line}={v}" for line, v in zip(lines[1:], values[1:]))]
        assert work.answer == exercise.answer == str(values[-1])


def test_no_guess_beats_one_in_ten_on_programs() -> None:
    counts = [0] * 10
    for exercise in draws("program", 5, count=5000):
        counts[int(exercise.answer)] += 1
    # 500 expected of each, standard deviation 21: six of them
    assert all(370 < n < 630 for n in counts)


def check_countdown_trace(exercise: Exercise) -> None:
    """Every equation, comparison and label of a thought, read left to right."""
    work = corpus_task("countdown").work(exercise)
    target = exercise.facts["target"]
    labels = dict(re.findall(r"([a-h])(\d+)", exercise.prompt.split("=")[0]))
    for line in work.lines:
        if made := re.fullmatch(r"([a-h])(\d+)([-+*/])([a-h])(\d+)=([ef])(\d+)\.", line):
            x, a, operation, y, b, new, value = made.groups()
            assert (labels[x], labels[y]) == (a, b) and exact(f"{a}{operation}{b}") == int(value)
            labels[new] = value
            continue
        head, rest = line.split(":")
        x, a, operation, y, b, pair = re.fullmatch(r"([a-h])(\d+)([-+*/])([a-h])(\d+)=(\d+)", head).groups()
        assert (labels[x], labels[y]) == (a, b) and exact(f"{a}{operation}{b}") == int(pair)
        candidates = re.findall(r"([^<>!]+)=(\d+)/(\d+)([<>!])", rest)
        assert "".join(f"{m}={v}/{t}{s}" for m, v, t, s in candidates) == rest
        for move, value, restated, sign in candidates:
            label, number = re.search(r"([a-h])(\d+)", move).groups()
            assert labels[label] == number and label not in (x, y) and int(restated) == target
            plain = re.sub("[a-h]", "", move)
            assert exact(f"{pair}{plain}" if plain[0] in "+-*/" else f"{plain}{pair}") == int(value) <= 99
            assert sign == ("!" if int(value) == target else "<" if int(value) < target else ">")
    text = "".join(work.lines)
    assert text.count("!") == 1 and text.endswith("!")
    assert exact(work.answer) == target and numbers_in(work.answer) == sorted(exercise.facts["numbers"])


@pytest.mark.parametrize("level", [3, 4])
@pytest.mark.parametrize("operations", ["+-*", "+-*/", "+", "-*", "/"])
def test_every_step_of_a_countdown_search_is_right(level: int, operations: str) -> None:
    for exercise in draws("countdown", level, operations, count=150):
        check_countdown_trace(exercise)


@pytest.mark.parametrize("level", [3, 4])
def test_every_countdown_problem_comes_with_a_solution(level: int) -> None:
    for exercise in draws("countdown", level, "+-*/"):
        numbers = exercise.facts["numbers"]
        assert len(numbers) == level and all(1 <= n <= 9 for n in numbers)
        assert 1 <= exercise.facts["target"] <= 99
        assert exact(exercise.answer) == exercise.facts["target"]
        assert numbers_in(exercise.answer) == sorted(numbers)


def test_countdown_thoughts_fit_the_configs_max_tokens() -> None:
    longest = 0
    for exercise in draws("countdown", 3, count=3000):
        work = corpus_task("countdown").work(exercise)
        longest = max(longest, len("".join(work.lines)) + len(work.answer))
    # plus four tags and the end token
    assert 250 < longest + 5 <= COUNTDOWN.sampling.max_tokens


@pytest.mark.parametrize("name,level", [("program", 4), ("countdown", 3), ("countdown", 4)])
def test_wrong_answers_are_wrong_and_well_formed(name: str, level: int) -> None:
    rng = random.Random(0)
    for exercise in draws(name, level):
        guess = corpus_task(name).wrong_answer(rng, exercise)
        if name == "countdown":
            assert exact(guess) != exercise.facts["target"]
            assert numbers_in(guess) == sorted(exercise.facts["numbers"])
        else:
            assert guess != exercise.answer and guess.isdigit()


def test_a_wrong_answer_is_found_even_where_every_sum_is_right() -> None:
    exercise = draws("countdown", 3, "+", count=1)[0]
    assert exact(corpus_task("countdown").wrong_answer(random.Random(0), exercise)) != exercise.facts["target"]


def test_facts_are_true() -> None:
    rng = random.Random(0)
    for _ in range(500):
        left, right = corpus_task("program").fact(rng, "").split("=")
        assert exact(left) % 10 == int(right)
        value, move, result, target, sign = re.fullmatch(
            r"(\d+):(.+)=(\d+)/(\d+)([<>!])", corpus_task("countdown").fact(rng, "+-*/")).groups()
        plain = re.sub("[a-h]", "", move)
        assert exact(f"{value}{plain}" if plain[0] in "+-*/" else f"{plain}{value}") == int(result)
        assert sign == ("!" if result == target else "<" if int(result) < int(target) else ">")


@pytest.mark.parametrize("config", CONFIGS, ids=config_name)
def test_train_and_heldout_problems_are_disjoint(config: Config) -> None:
    problems = load_problems(config, TOKENIZER)
    heldout = {p.problem_id for p in problems.heldout(500)}
    train = {p.problem_id for step in range(60) for p in problems.train(step, 16)}
    assert len(heldout) == 500 and len(train) > 300
    assert not heldout & train


def test_the_split_does_not_depend_on_the_order_of_writing() -> None:
    seen: dict[str, set[str]] = {}
    for exercise in draws("countdown", 3, count=3000):
        same = f"{sorted(exercise.facts['numbers'])} {exercise.facts['target']}"
        seen.setdefault(same, set()).add(split_of(exercise.key, COUNTDOWN.task))
    assert all(len(splits) == 1 for splits in seen.values())
    assert {split for splits in seen.values() for split in splits} == {"corpus", "train", "heldout"}


def test_splits_have_the_sizes_of_the_config() -> None:
    task = TaskConfig(heldout_share=0.2, rl_share=0.3)
    splits = [split_of(f"key {i}", task) for i in range(10_000)]
    # standard deviations 0.0040 and 0.0046: five of them
    assert abs(splits.count("heldout") / 10_000 - 0.2) < 0.02
    assert abs(splits.count("train") / 10_000 - 0.3) < 0.023


def test_a_larger_heldout_share_keeps_what_was_held_out() -> None:
    small, large = TaskConfig(heldout_share=0.1), TaskConfig(heldout_share=0.2)
    keys = [f"key {i}" for i in range(2000)]
    held = [k for k in keys if split_of(k, small) == "heldout"]
    assert held and all(split_of(k, large) == "heldout" for k in held)


@pytest.mark.parametrize("config", CONFIGS, ids=config_name)
def test_the_first_heldout_problems_are_the_same_whatever_the_count(config: Config) -> None:
    problems = load_problems(config, TOKENIZER)
    many = problems.heldout(300)
    assert many[:100] == problems.heldout(100)
    assert len({p.problem_id for p in many}) == 300
    assert many != problems.heldout(300, seed=1)


@pytest.mark.parametrize("config", CONFIGS, ids=config_name)
def test_train_problems_depend_on_seed_step_and_round_alone(config: Config) -> None:
    problems = load_problems(config, TOKENIZER)
    first = problems.train(7, 12)
    random.seed(0)  # the global generator is not used
    assert first == problems.train(7, 12) == load_problems(config, TOKENIZER).train(7, 12)
    assert first[:5] == problems.train(7, 5)
    others = [problems.train(8, 12), problems.train(7, 12, round=1),
              load_problems(replace(config, run=RunConfig(seed=1)), TOKENIZER).train(7, 12)]
    assert all(other != first for other in others)


@pytest.mark.parametrize("config", CONFIGS, ids=config_name)
def test_problems_are_in_range_and_encoded(config: Config) -> None:
    problems = load_problems(config, TOKENIZER).train(0, 64)
    assert {p.level for p in problems} == set(range(config.task.min_level, config.task.max_level + 1))
    for problem in problems:
        assert 0 <= problem.problem_id < 2**62
        assert TOKENIZER.decode(problem.prompt_ids) == problem.prompt
        assert problem.task == config.task.name


def test_a_step_never_holds_a_problem_twice() -> None:
    tight = replace(COUNTDOWN, task=replace(COUNTDOWN.task, rl_share=0.05))
    problems, had = load_problems(tight, TOKENIZER), list[int]()
    for round in range(4):
        had += [p.problem_id for p in problems.train(0, 40, round=round, exclude=had)]
    assert len(set(had)) == len(had) == 160


def test_problem_ids_are_stable() -> None:
    """The sampler's noise is keyed by them, so another hash would change every run."""
    assert problem_id_of("program", "a2,b*3?") == 3084736321481036068


def test_an_exhausted_split_raises_too_few_problems() -> None:
    tiny = Config(task=TaskConfig(min_level=1, max_level=1))
    with pytest.raises(TooFewProblems, match="asked for 20 distinct heldout problems"):
        load_problems(tiny, TOKENIZER).heldout(20)
    empty = Config(task=TaskConfig(rl_share=0.0))
    with pytest.raises(TooFewProblems, match=r"got 0; task\.rl_share is 0\.0: raise it"):
        load_problems(empty, TOKENIZER).train(0, 1)


@pytest.mark.parametrize("task,message", [
    (TaskConfig(name="sudoku"), "unknown task.name 'sudoku'"),
    (TaskConfig(name="countdown", min_level=2, max_level=3), "task.min_level must be between 3 and 4"),
    (TaskConfig(min_level=4, max_level=27), "task.max_level must be between 1 and 26"),
    (TaskConfig(name="countdown", min_level=3, max_level=3, operations="+%"), "task.operations must be some of"),
    (TaskConfig(name="countdown", min_level=3, max_level=3, operations=""), "task.operations must be some of"),
])
def test_an_invalid_task_section_is_refused(task: TaskConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_task(task)


def test_a_prompt_without_room_for_its_completion_is_refused() -> None:
    config = Config(model=ModelConfig(max_position_embeddings=100), sampling=SamplingParams(max_tokens=80))
    problems = load_problems(config, TOKENIZER)
    drawn = problems.heldout(50)
    fitting = [p for p in drawn if len(p.prompt_ids) <= 20]
    problems.check(fitting, config)
    assert len(fitting) < 50
    with pytest.raises(ValueError, match=r"leaves 20$"):
        problems.check(drawn, config)


OWN_TASKS = """
from reason_rl.data import Exercise, Task

class Reverse(Task):
    levels = range(1, 10)
    def draw(self, rng, level, operations):
        word = "".join(rng.choices("abc", k=level))
        return Exercise(prompt=word + "?", level=level, answer=word[::-1], key=word)

class Undrawn(Task):
    levels = range(1, 10)

class Unlevelled(Task):
    def draw(self, rng, level, operations): ...

class Unrelated:
    pass

number = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working directory that holds OWN_TASKS."""
    monkeypatch.chdir(tmp_path)
    name = f"own_tasks_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN_TASKS)
    (tmp_path / f"broken_{name}.py").write_text("raise KeyError('no such word list')")
    return name


def test_a_task_class_in_the_working_directory_generates_problems(own_module: str) -> None:
    config = Config(task=TaskConfig(name=f"{own_module}:Reverse"), model=ModelConfig(init_from="some/folder"))
    problems = load_problems(config, TOKENIZER)
    drawn = problems.train(0, 20)
    assert all(p.answer == p.prompt[-2::-1] and 5 <= p.level <= 8 and p.task == config.task.name for p in drawn)
    assert problems.train(0, 20) == drawn and len({p.problem_id for p in drawn}) == 20
    with pytest.raises(ConfigError, match=r"task\.min_level must be between 1 and 9"):
        load_problems(replace(config, task=replace(config.task, min_level=0)), TOKENIZER)


def test_a_task_without_worked_thoughts_cannot_be_pretrained_on(own_module: str) -> None:
    with pytest.raises(ConfigError, match=r"Reverse is a Task and not a CorpusTask .*: set model\.init_from") as caught:
        corpus_documents(Config(task=TaskConfig(name=f"{own_module}:Reverse")), TOKENIZER, 0, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "message"), [
    ("nowhere:Reverse", "importing 'nowhere' failed: ModuleNotFoundError: No module named 'nowhere'"),
    ("broken_{own}:Reverse", "importing 'broken_{own}' failed: KeyError: 'no such word list'"),
    ("{own}:Reversed", "'Reversed' in module '{own}' must be a subclass of reason_rl.data.Task, got nothing of that name"),
    ("{own}:Unrelated", "'Unrelated' in module '{own}' must be a subclass of reason_rl.data.Task, got <class '{own}.Unrelated'>"),
    ("{own}:number", "'number' in module '{own}' must be a subclass of reason_rl.data.Task, got 3"),
    ("{own}:Undrawn", "'Undrawn' in module '{own}' must define draw"),
    ("{own}:Unlevelled", "'Unlevelled' in module '{own}' must define levels as a range such as range(1, 10), got None"),
    ("{own}:", "task.name must be module:Class, got '{own}:'"),
    (":Reverse", "task.name must be module:Class, got ':Reverse'"),
])
def test_a_task_class_that_cannot_be_used_is_one_error(name: str, message: str, own_module: str) -> None:
    name, message = name.replace("{own}", own_module), message.replace("{own}", own_module)
    with pytest.raises(ConfigError) as caught:
        load_problems(Config(task=TaskConfig(name=name)), TOKENIZER)
    assert str(caught.value).endswith(message) and name in str(caught.value) and "\n" not in str(caught.value)


def fingerprint(problems: list[Problem]) -> str:
    """Hash of every field of the problems, in order."""
    text = "\n".join(repr((p.problem_id, p.task, p.prompt, p.prompt_ids, p.answer, dict(p.facts), p.level, p.completion_prefix))
                     for p in problems)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


# Of steps 0, 1, 2: four problems in round 0, then four others in round 1.
# Then five held-out problems with seed 0, and five with seed 1.
RECORDED = {
    "program": ("20186b9e7442 75e4850dfaca 372545b1bcf9 c45dfc990f96 4215225322a4 91d9c1130197", "79b97d2ad4ee fb4f0ce5c7cd"),
    "countdown": ("1d36646b98e6 c738b285d29d a2b268dd38c0 518c96baca56 d39d3a91c19e 5c1b9772e752", "6a673e54b2f5 ae8c4e53aa0d"),
    "jsonl": ("f2933caabbec 6b4b22a58cd2 cff6ee245039 2041ae395f3e ab9e7173dc13 bf8c9d948faf", "b36245795a67 48be5e1c8c50"),
    "easy_first": ("94f135624439 226de583312b 6457d628b64b 1e461046f38e 36061ed1bc40 72db8c221160", "b36245795a67 48be5e1c8c50"),
}


def recorded_config(name: str, folder: Path) -> Config:
    if name in TASKS:
        return COUNTDOWN if name == "countdown" else Config()
    rows = [{"prompt": f"What is {i} + 1?", "answer": i + 1, "num_right": i % 9, "num_samples": 8} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskConfig(name="jsonl", path=str(folder / "rows.jsonl"), heldout_share=0.25, template="r1_zero")
    if name == "easy_first":
        task = replace(task, pass_rates=task.path, max_pass_rate=0.9, curriculum="easy_first")
    return Config(task=task, rl=RLConfig(prompts_per_step=4), model=ModelConfig(init_from="some/folder"))


@pytest.mark.parametrize("name", RECORDED)
def test_problems_are_those_of_the_record(name: str, tmp_path: Path) -> None:
    """If the record changes, the same config trains on other problems than before."""
    problems = load_problems(recorded_config(name, tmp_path), TOKENIZER if name in TASKS else byte_tokenizer())
    train = []
    for step in range(3):
        first = problems.train(step, 4)
        train += [fingerprint(first), fingerprint(problems.train(step, 4, 1, [p.problem_id for p in first]))]
    heldout = [fingerprint(problems.heldout(5)), fingerprint(problems.heldout(5, seed=1))]
    assert (" ".join(train), " ".join(heldout)) == RECORDED[name]
