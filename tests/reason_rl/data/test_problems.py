"""Tasks and problems: right by construction, disjoint by construction, and a function of their keys alone.

The arithmetic of worked thoughts is derived again here from the prompts, without the code that wrote them.
"""

from __future__ import annotations

import ast
import random
import re
from dataclasses import replace
from fractions import Fraction

import pytest

from reason_rl.config import Config, ConfigError, ModelConfig, RunConfig, TaskConfig, load_config
from reason_rl.data import TASKS, char_tokenizer, check_problems, heldout_problems, rl_problems, split_of, task_of
from reason_rl.data.problems import problem_id_of
from reason_rl.data.tasks import Exercise
from reason_rl.records import SamplingParams

TOKENIZER = char_tokenizer()
COUNTDOWN = load_config("configs/countdown_cpu.toml")
ARITHMETIC = Config(task=TaskConfig(name="arithmetic", min_level=2, max_level=5))
CONFIGS = [Config(), COUNTDOWN, ARITHMETIC]


def config_name(config: Config) -> str:
    return config.task.name


def draws(name: str, level: int, operations: str = "+-*", count: int = 400) -> list[Exercise]:
    rng = random.Random(f"{name}/{level}/{operations}")
    return [TASKS[name].draw(rng, level, operations) for _ in range(count)]


def run_program(prompt: str) -> list[int]:
    """The value after each line, by Python's own arithmetic."""
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
        work = TASKS["program"].work(exercise)
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


@pytest.mark.parametrize("level", [1, 2, 3, 7, 13])
@pytest.mark.parametrize("operation", ["+", "-", "*"])
def test_every_column_of_long_arithmetic_is_right(level: int, operation: str) -> None:
    for exercise in draws("arithmetic", level, operation, count=100):
        left, right = exercise.prompt.removesuffix("?").split(operation)
        value = exact(re.sub("[a-m]", "", left) + operation + re.sub("[n-z]", "", right).lstrip("0").rjust(1, "0"))
        work = TASKS["arithmetic"].work(exercise)
        assert work.answer == exercise.answer == str(value)
        assert len(work.lines) == level
        digits = dict(re.findall(r"([a-z])(\d)", exercise.prompt))
        carry = "0"
        for line in work.lines:
            shape = r"([a-m])(\d)[-+*]([n-z])(\d)[-+](\d)=(\d)(\d)"
            label, digit, other_label, other, carried, next_carry, result = re.fullmatch(shape, line).groups()
            assert (digits[label], digits[other_label], carry) == (digit, other, carried)
            total = exact(re.sub("[a-z]", "", line.split("=")[0]))
            assert total == int(result) + 10 * int(next_carry) * (-1 if operation == "-" else 1)
            carry = next_carry


def check_countdown_trace(exercise: Exercise) -> None:
    """Every equation, comparison and label of a thought, read left to right."""
    work = TASKS["countdown"].work(exercise)
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
        work = TASKS["countdown"].work(exercise)
        longest = max(longest, len("".join(work.lines)) + len(work.answer))
    # four tags and the end token stand beside them
    assert 250 < longest + 5 <= COUNTDOWN.sampling.max_tokens


@pytest.mark.parametrize("name,level", [("program", 4), ("arithmetic", 1), ("arithmetic", 6), ("countdown", 3),
                                        ("countdown", 4)])
def test_wrong_answers_are_wrong_and_well_formed(name: str, level: int) -> None:
    rng = random.Random(0)
    for exercise in draws(name, level):
        guess = TASKS[name].wrong_answer(rng, exercise)
        if name == "countdown":
            assert exact(guess) != exercise.facts["target"]
            assert numbers_in(guess) == sorted(exercise.facts["numbers"])
        else:
            assert guess != exercise.answer and guess.isdigit()


def test_a_wrong_answer_is_found_even_where_every_sum_is_right() -> None:
    exercise = draws("countdown", 3, "+", count=1)[0]
    assert exact(TASKS["countdown"].wrong_answer(random.Random(0), exercise)) != exercise.facts["target"]


def test_facts_are_true() -> None:
    rng = random.Random(0)
    for _ in range(500):
        left, right = TASKS["program"].fact(rng, "").split("=")
        assert exact(left) % 10 == int(right)
        left, right = TASKS["arithmetic"].fact(rng, "+-*").split("=")
        borrowed = "-" in left
        assert exact(left) == int(right[1]) + 10 * int(right[0]) * (-1 if borrowed else 1)
        value, move, result, target, sign = re.fullmatch(
            r"(\d+):(.+)=(\d+)/(\d+)([<>!])", TASKS["countdown"].fact(rng, "+-*/")).groups()
        plain = re.sub("[a-h]", "", move)
        assert exact(f"{value}{plain}" if plain[0] in "+-*/" else f"{plain}{value}") == int(result)
        assert sign == ("!" if result == target else "<" if int(result) < int(target) else ">")


@pytest.mark.parametrize("config", CONFIGS, ids=config_name)
def test_rl_and_heldout_problems_never_meet(config: Config) -> None:
    heldout = {p.problem_id for p in heldout_problems(config, TOKENIZER, 500)}
    rl = {p.problem_id for step in range(60) for p in rl_problems(config, TOKENIZER, step, 16)}
    assert len(heldout) == 500 and len(rl) > 300
    assert not heldout & rl


def test_the_order_of_writing_does_not_decide_the_split() -> None:
    seen: dict[str, set[str]] = {}
    for exercise in draws("countdown", 3, count=3000):
        same = f"{sorted(exercise.facts['numbers'])} {exercise.facts['target']}"
        seen.setdefault(same, set()).add(split_of(exercise.key, COUNTDOWN.task))
    assert all(len(splits) == 1 for splits in seen.values())
    assert {split for splits in seen.values() for split in splits} == {"train", "rl", "heldout"}


def test_shares_are_as_wide_as_the_config_says() -> None:
    task = TaskConfig(heldout_share=0.2, rl_share=0.3)
    splits = [split_of(f"key {i}", task) for i in range(10_000)]
    # standard deviations 0.0040 and 0.0046: five of them
    assert abs(splits.count("heldout") / 10_000 - 0.2) < 0.02
    assert abs(splits.count("rl") / 10_000 - 0.3) < 0.023


def test_a_larger_heldout_share_keeps_what_was_held_out() -> None:
    small, large = TaskConfig(heldout_share=0.1), TaskConfig(heldout_share=0.2)
    keys = [f"key {i}" for i in range(2000)]
    held = [k for k in keys if split_of(k, small) == "heldout"]
    assert held and all(split_of(k, large) == "heldout" for k in held)


@pytest.mark.parametrize("config", CONFIGS, ids=config_name)
def test_the_first_heldout_problems_are_the_same_whatever_the_count(config: Config) -> None:
    many = heldout_problems(config, TOKENIZER, 300)
    assert many[:100] == heldout_problems(config, TOKENIZER, 100)
    assert len({p.problem_id for p in many}) == 300
    assert many != heldout_problems(config, TOKENIZER, 300, seed=1)


@pytest.mark.parametrize("config", CONFIGS, ids=config_name)
def test_rl_problems_follow_from_seed_step_and_round_alone(config: Config) -> None:
    first = rl_problems(config, TOKENIZER, 7, 12)
    random.seed(0)  # no global generator takes part
    assert first == rl_problems(config, TOKENIZER, 7, 12)
    assert first[:5] == rl_problems(config, TOKENIZER, 7, 5)
    others = [rl_problems(config, TOKENIZER, 8, 12), rl_problems(config, TOKENIZER, 7, 12, round=1),
              rl_problems(replace(config, run=RunConfig(seed=1)), TOKENIZER, 7, 12)]
    assert all(other != first for other in others)


@pytest.mark.parametrize("config", CONFIGS, ids=config_name)
def test_problems_are_in_range_and_encoded(config: Config) -> None:
    problems = rl_problems(config, TOKENIZER, 0, 64)
    assert {p.level for p in problems} == set(range(config.task.min_level, config.task.max_level + 1))
    for problem in problems:
        assert 0 <= problem.problem_id < 2**62
        assert TOKENIZER.decode(problem.prompt_ids) == problem.prompt
        assert problem.task == config.task.name


def test_a_step_never_holds_a_problem_twice() -> None:
    tight = replace(COUNTDOWN, task=replace(COUNTDOWN.task, rl_share=0.05))
    had: list[int] = []
    for round in range(4):
        had += [p.problem_id for p in rl_problems(tight, TOKENIZER, 0, 40, round=round, exclude=had)]
    assert len(set(had)) == len(had) == 160


def test_problem_ids_are_stable() -> None:
    """Noise is keyed by them: another hash would change every run."""
    assert problem_id_of("program", "a2,b*3?") == 3084736321481036068


def test_too_few_problems_are_said_to_be_too_few() -> None:
    tiny = Config(task=TaskConfig(min_level=1, max_level=1))
    with pytest.raises(ValueError, match="too few problems: 20 distinct heldout"):
        heldout_problems(tiny, TOKENIZER, 20)
    empty = Config(task=TaskConfig(rl_share=0.0))
    with pytest.raises(ValueError, match=r"too few problems.*only 0 found"):
        rl_problems(empty, TOKENIZER, 0, 1)


@pytest.mark.parametrize("task,message", [
    (TaskConfig(name="sudoku"), "unknown task.name 'sudoku'"),
    (TaskConfig(name="countdown", min_level=2, max_level=3), "task.min_level must be between 3 and 4"),
    (TaskConfig(min_level=4, max_level=27), "task.max_level must be between 1 and 26"),
    (TaskConfig(name="arithmetic", operations="+/"), "task.operations must be some of"),
    (TaskConfig(name="countdown", min_level=3, max_level=3, operations=""), "task.operations must be some of"),
])
def test_a_task_that_cannot_be_is_refused(task: TaskConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        task_of(Config(task=task))


def test_a_prompt_without_room_for_its_completion_is_refused() -> None:
    config = Config(model=ModelConfig(max_position_embeddings=100), sampling=SamplingParams(max_tokens=80))
    problems = heldout_problems(config, TOKENIZER, 50)
    fitting = [p for p in problems if len(p.prompt_ids) <= 20]
    check_problems(fitting, config)
    assert len(fitting) < 50
    with pytest.raises(ValueError, match="leaves 20"):
        check_problems(problems, config)
