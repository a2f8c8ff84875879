"""Measure a checkpoint: `python -m reason_rl.eval runs/program/checkpoints/final --samples 16 --k 1,4,16`.

Samples every problem --samples times, grades, and reports pass@1 (the mean over the samples), the unbiased pass@k, the majority's
cons@k, thinking tokens and what was truncated or ungradable, each mean with a 95 % interval. A checkpoint in a run's folder is
measured on that run's task and template; any other wants --task or --config. The same command again goes on where it was stopped.
Under torchrun each process takes a share of the problems. docs/evaluation.md says what each number means.

Left out: a run's own evaluations (session.py). evaluation.py has the arithmetic, eval_folder.py the files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from reason_rl.config import Config, ConfigError, load_config
from reason_rl.data import (
    Tokenizer,
    check_problems,
    describe_problems,
    heldout_problems,
    is_file_task,
    load_dataset,
    rl_problems,
)
from reason_rl.engine import Engine, check_fits
from reason_rl.eval_folder import SUMMARY_FILE, EvalFolder, fingerprint
from reason_rl.evaluation import may_vote, problem_row, summarise
from reason_rl.model.weights import load_model, read_model_config
from reason_rl.reward import Grader, Pending, check_rewards
from reason_rl.reward.gold import verifier_of
from reason_rl.reward.verdict import Verdict
from reason_rl.reward.votes import COMPARED, answer_of
from reason_rl.run_folder import CONFIG_FILE
from reason_rl.session import EVAL_KEY
from reason_rl.trainer.distributed import World, close_world, end_process, init_world
from reason_rl.types import Completion, Group, Problem, SamplingParams

EVAL_STEP = 3 * EVAL_KEY
"""The step in the noise key of everything sampled here: no rollout and no evaluation of a run has it."""
DEFAULT_MAX_TOKENS = 2048
"""Of a completion, where neither --max-tokens nor a config says it; less where the context leaves less."""
CHUNK = 4
"""Problems go to the engine in portions of so many times the completions it decodes together, so that memory stays bounded."""


@dataclass(frozen=True)
class Plan:
    """What is to be measured, checked as far as it can be without the weights."""

    checkpoint: Path
    config: Config
    """With the checkpoint's own model, and its [sampling] as used here."""
    split: str
    num_samples: int
    ks: tuple[int, ...]
    seed: int
    out: Path
    tokenizer: Tokenizer
    problems: list[Problem]
    notes: tuple[str, ...]
    """What is worth saying of the task."""

    @property
    def sampling(self) -> SamplingParams:
        values = self.config.sampling
        return SamplingParams(values.temperature, values.top_k, values.top_p, values.min_p, values.max_tokens,
                              self.tokenizer.stop_ids)

    def setting(self, world: World) -> dict[str, Any]:
        """All that the rows follow from. The engine's sizes and --k are not among it."""
        config = self.config
        sections: dict[str, Any] = {"task": config.task, "reward": config.reward, "sampling": config.sampling}
        return {
            "checkpoint": str(self.checkpoint), "weights": fingerprint(self.checkpoint), "split": self.split,
            "problems": len(self.problems), "prompts": prompts_digest(self.problems), "samples": self.num_samples,
            "seed": self.seed, "device": world.device.type,
            "dtype": str(world.dtype).removeprefix("torch."), "exact": config.run.exact,
            **{f"{name}.{key}": value for name, values in sections.items() for key, value in asdict(values).items()}}


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """-> (options, `--section.key=value` overrides)"""
    parser = argparse.ArgumentParser(
        prog="python -m reason_rl.eval", allow_abbrev=False, usage="%(prog)s CHECKPOINT [options] [--section.key=value ...]",
        description="pass@k, cons@k and lengths of a checkpoint on a task's problems. Keys of the config (train.py --help) go too.")
    parser.add_argument("checkpoint", help="a checkpoint folder, e.g. runs/program/checkpoints/final")
    parser.add_argument("--task", help="the task's name; default: the run's, or --config's")
    parser.add_argument("--config", help="a TOML file to take task, template and rewards from; default: the run's config.toml")
    parser.add_argument("--split", choices=("heldout", "rl", "all"), default="heldout",
                        help="which problems (default: heldout); all: of a task from files")
    parser.add_argument("--problems", type=int, help="how many; default: all of a file's, else the config's eval.final_problems")
    parser.add_argument("--samples", type=int, default=4, help="completions of each problem (default 4)")
    parser.add_argument("--k", help="comma-separated k of pass@k and cons@k, none above --samples; default: 1 and --samples")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy (default 0.6)")
    parser.add_argument("--top-p", type=float, default=0.95, help="default 0.95")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all (default)")
    parser.add_argument("--min-p", type=float, default=0.0, help="default 0")
    parser.add_argument("--max-tokens", type=int, help="of a completion; default: the config's sampling.max_tokens, or "
                                                       f"{DEFAULT_MAX_TOKENS} where there is no config")
    parser.add_argument("--seed", type=int, default=0, help="other draws of the completions (default 0)")
    parser.add_argument("--device", help="as run.device; default: the config's")
    parser.add_argument("--dtype", help="as run.dtype; default: the config's")
    parser.add_argument("--out", help="folder of the results; default: evals/NAME in the run's folder, or in runs/")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    options, rest = parser.parse_known_args(arguments)
    for argument in rest:
        if not argument.startswith("--") or "=" not in argument or "." not in argument.partition("=")[0]:
            parser.error(f"unknown argument {argument!r}; a key of the config reads --section.key=value")
    return options, rest


def make_plan(options: argparse.Namespace, overrides: list[str]) -> Plan:
    """Everything about the command that can fail, before weights are read."""
    checkpoint = Path(options.checkpoint)
    tokenizer, (model_config, vocab_size) = Tokenizer.load(checkpoint), read_model_config(checkpoint)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{checkpoint}: its tokenizer has {tokenizer.vocab_size} tokens, its model only {vocab_size}")
    ks = parse_ks(options.k, options.samples)
    config, has_file = resolve_config(options, overrides, checkpoint)
    config = replace(config, model=replace(model_config, init_from=config.model.init_from))
    problems = problems_of(config, tokenizer, options.split, options.problems)
    if not problems:
        raise ValueError(f"task {config.task.name!r} has no problem for --split {options.split}")
    max_tokens = config.sampling.max_tokens if has_file else min(
        DEFAULT_MAX_TOKENS, model_config.max_positions - max(len(problem.prompt_ids) for problem in problems))
    sampling = SamplingParams(options.temperature, options.top_k, options.top_p, options.min_p,
                              max_tokens if options.max_tokens is None else options.max_tokens)  # checks its values
    config = replace(config, sampling=replace(
        config.sampling, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p,
        max_tokens=sampling.max_tokens))
    check_problems(problems, config)
    check_fits(problems, sampling.max_tokens, model_config.max_positions, config.engine.num_blocks)
    notes = (*describe_problems(config, tokenizer)[0], *check_rewards(config, problems[0]))
    out = Path(options.out) if options.out else default_folder(checkpoint, f"{config.task.name}-{options.split}")
    return Plan(checkpoint, config, options.split, options.samples, ks, options.seed, out, tokenizer, problems, notes)


def problems_of(config: Config, tokenizer: Tokenizer, split: str, count: int | None) -> list[Problem]:
    """The first `count` problems of the split, held-out ones in the order of a run's evaluations. None: all of a file's, and of a
    task that makes its own as many as a run's last evaluation has."""
    if count is not None and count < 1:
        raise ValueError(f"--problems must be at least 1, got {count}")
    if not is_file_task(config):
        count = config.eval.final_problems if count is None else count
        if split == "all":
            raise ValueError(f"task {config.task.name!r} makes its problems without end: --split is heldout or rl")
        return heldout_problems(config, tokenizer, count) if split == "heldout" else rl_problems(config, tokenizer, 0, count)
    dataset = load_dataset(config, tokenizer)
    if split == "heldout":
        return heldout_problems(config, tokenizer, len(dataset.heldout) if count is None else count)
    problems = [*dataset.rl, *(dataset.heldout if split == "all" else ())]
    if count is not None and count > len(problems):
        raise ValueError(f"--problems {count} were asked for, but --split {split} of task {config.task.name!r} has {len(problems)}")
    random.Random(f"0/{split}").shuffle(problems)
    return problems[:count]


def prompts_digest(problems: Sequence[Problem]) -> str:
    """Tells when a file or a template has changed under an evaluation."""
    told = "/".join(f"{problem.problem_id}:{problem.prompt_ids}:{problem.answer}" for problem in problems)
    return hashlib.blake2b(told.encode(errors="replace"), digest_size=8).hexdigest()


def parse_ks(text: str | None, num_samples: int) -> tuple[int, ...]:
    if num_samples < 1:
        raise ValueError(f"--samples must be at least 1, got {num_samples}")
    if text is None:
        return tuple(sorted({1, num_samples}))
    try:
        ks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"--k must be numbers like 1,4,16, got {text!r}") from None
    if ks[0] < 1 or ks[-1] > num_samples:
        raise ValueError(f"--k must be within 1..{num_samples} (--samples), got {text!r}")
    return tuple(ks)


def resolve_config(options: argparse.Namespace, overrides: Sequence[str], checkpoint: Path) -> tuple[Config, bool]:
    """-> (config, whether a file had a say in it): --config, else that of the run whose folder it is in, else the defaults."""
    run = run_of(checkpoint)
    path = options.config or (run / CONFIG_FILE if run else None)
    given = [f"--model.init_from={checkpoint}", *overrides]
    given += [f"--{key}={value}" for key, value in (
        ("task.name", options.task), ("run.device", options.device), ("run.dtype", options.dtype)) if value is not None]
    if path is None and not any(argument.startswith("--task.name=") for argument in given):
        raise ConfigError(f"{checkpoint} is in no run's folder, so say which problems: --task NAME or --config FILE")
    fixed = [argument for argument in overrides if argument.startswith("--sampling.")]
    if fixed:
        raise ConfigError(f"{fixed[0]}: here sampling is set by --temperature, --top-p, --top-k, --min-p and --max-tokens")
    config = load_config(path, given)
    # Only what says right or wrong: the rest of a reward is the training's.
    return replace(config, reward=replace(config.reward, custom="", judge="", model="")), path is not None


def run_of(checkpoint: Path) -> Path | None:
    """The run's folder that the checkpoint is in, as train.py lays it out."""
    folder = checkpoint.resolve().parent.parent
    return folder if checkpoint.resolve().parent.name == "checkpoints" and (folder / CONFIG_FILE).is_file() else None


def default_folder(checkpoint: Path, name: str) -> Path:
    return (run_of(checkpoint) or Path("runs")) / "evals" / f"{checkpoint.resolve().name}-{name}"


@dataclass
class Sampled:
    """A problem's completions on their way: sampled, then graded and compared."""

    problem: Problem
    completions: dict[int, Completion] = field(default_factory=dict)
    answers: dict[int, str | None] = field(default_factory=dict)
    pending: dict[int, Pending] = field(default_factory=dict)
    votes: Future[Verdict] | None = None

    @property
    def is_done(self) -> bool:
        return all(one.is_done for one in self.pending.values()) and (self.votes is None or self.votes.done())


@dataclass
class Evaluator:
    """Samples problems and hands over each one's row as soon as it is graded, in the order in which problems finish sampling."""

    plan: Plan
    engine: Engine
    grader: Grader
    on_row: Callable[[dict[str, Any]], None]
    on_completion: Callable[[Completion], None]
    _open: dict[int, Sampled] = field(default_factory=dict)
    _waiting: deque[Sampled] = field(default_factory=deque)

    def run(self, problems: Sequence[Problem]) -> None:
        portion = max(1, CHUNK * self.engine.config.max_num_seqs // self.plan.num_samples)
        try:
            for start in range(0, len(problems), portion):
                self.engine.generate(problems[start : start + portion], self.plan.num_samples, self.plan.sampling, step=EVAL_STEP,
                                     on_finish=self._finished)
        finally:  # after Ctrl-C too: what is sampled needs but its grades
            while self._waiting:
                self._hand_over()

    def _finished(self, problem: Problem, completion: Completion) -> None:
        sampled = self._open.setdefault(problem.problem_id, Sampled(problem))
        text, index = self.plan.tokenizer.decode_completion(completion.token_ids), completion.sample_index
        sampled.completions[index] = completion
        sampled.answers[index] = answer_of(problem.completion_prefix + text, verifier_of(problem.task, self.plan.config.reward))
        sampled.pending[index] = self.grader.submit(problem, text, len(completion.token_ids), completion.finish_reason)
        self.on_completion(completion)
        if len(sampled.pending) == self.plan.num_samples:
            self._compare(sampled)
            self._waiting.append(self._open.pop(problem.problem_id))
        while self._waiting and self._waiting[0].is_done:
            self._hand_over()

    def _compare(self, sampled: Sampled) -> None:
        """Ask which of the answers are the same, of the samples that may vote."""
        verifier = verifier_of(sampled.problem.task, self.plan.config.reward)
        if verifier in COMPARED:
            answers = [sampled.answers[n] for n in range(self.plan.num_samples)
                       if may_vote(sampled.answers[n], sampled.completions[n].finish_reason)]
            sampled.votes = self.grader.service.submit("votes", {"answers": answers, "verifier": verifier})

    def _hand_over(self) -> None:
        """The row of the problem that has waited longest; waits for what is missing."""
        sampled, order = self._waiting.popleft(), range(self.plan.num_samples)
        scores = tuple(sampled.pending[n].score() for n in order)
        group = Group(sampled.problem, tuple(sampled.completions[n] for n in order), scores)
        votes = None if sampled.votes is None else self.grader.service.result("votes", sampled.votes)
        self.on_row(problem_row(group, [sampled.answers[n] for n in order], votes, self.plan.tokenizer))


def sample_missing(plan: Plan, world: World, folder: EvalFolder, missing: Sequence[Problem]) -> None:
    """This process's share of the problems that have no row yet."""
    mine = world.share(missing)
    model = load_model(plan.checkpoint, world.dtype, weights_dtype=world.dtype).to(world.device).requires_grad_(False)
    model.use_gemm("torch" if plan.config.run.exact == "off" else "auto")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Grader(plan.config) as grader, Progress(
            *columns, console=Console(stderr=True), transient=True, disable=not world.is_main) as progress:
        bar = progress.add_task(f"completions, {len(plan.problems) - len(missing)} of {len(plan.problems)} problems done before",
                                total=len(mine) * plan.num_samples)
        engine = Engine(model, plan.config.engine, plan.seed)
        Evaluator(plan, engine, grader, folder.append, lambda completion: progress.advance(bar)).run(mine)


def evaluate(plan: Plan, world: World) -> dict[str, Any] | None:
    """-> the summary, on rank 0; None on the others."""
    folder = EvalFolder(plan.out, world, plan.setting(world), [problem.problem_id for problem in plan.problems])
    done = folder.open()
    missing = [problem for problem in plan.problems if problem.problem_id not in done]
    try:
        if missing:
            sample_missing(plan, world, folder, missing)
    finally:
        folder.close()
    world.barrier()
    if not world.is_main:
        return None
    rows = folder.collect()
    assert len(rows) == len(plan.problems), f"{len(rows)} rows for {len(plan.problems)} problems"
    summary = {**summarise(rows, plan.ks), "setting": folder.setting}
    folder.write_summary(summary)
    return summary


def table_of(summary: Mapping[str, Any]) -> Table:
    setting = summary["setting"]
    table = Table(title=f"{setting['checkpoint']} · {setting['task.name']}, {setting['split']}: {summary['problems']} problems x "
                        f"{summary['samples']} samples", title_justify="left")
    for heading in ("", "mean", "95 % interval", "problems"):
        table.add_column(heading, justify="right" if heading else "left")

    def add(name: str, value: Mapping[str, Any], form: str) -> None:
        ends = "-" if value["low"] is None else f"{value['low']:{form}} to {value['high']:{form}}"
        table.add_row(name, "-" if value["mean"] is None else f"{value['mean']:{form}}", ends, str(value["problems"]))

    for name in ("pass", "cons"):
        for k, value in summary[f"{name}_at_k"].items():
            add(f"{name}@{k}", value, ".1%")
    add("format", summary["format_rate"], ".1%")
    add("thinking tokens", summary["thinking_tokens"], ".1f")
    add("tokens", summary["length"], ".1f")
    total = summary["completions"]
    for name in ("truncated", "without_answer", "ungradable"):
        table.add_row(name.replace("_", " "), f"{summary[name]} of {total}", f"{summary[name] / total:.1%}", "")
    for cause, count in summary["ungradable_causes"].items():
        table.add_row(f"  {cause}", f"{count} of {total}", "", "")
    return table


def measure(options: argparse.Namespace, overrides: list[str]) -> int:
    plan = make_plan(options, overrides)
    world = init_world(plan.config.run)
    try:
        for note in plan.notes if world.is_main else ():
            print(note, file=sys.stderr)
        summary = evaluate(plan, world)
        if summary is not None and options.json:
            print(json.dumps(summary, indent=2))
        elif summary is not None:
            Console().print(table_of(summary))
            print(f"{plan.out}/{SUMMARY_FILE}; a line a problem, with its samples, in problems.jsonl")
        return 0
    except KeyboardInterrupt:
        if world.is_main:
            print(f"eval: stopped; what is done lies in {plan.out}, and the same command goes on from there", file=sys.stderr)
        return 130
    finally:
        close_world(world)


def main(arguments: Sequence[str] | None = None) -> int:
    options, overrides = parse(arguments)
    try:
        return measure(options, overrides)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"eval: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    end_process(main())
