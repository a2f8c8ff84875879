"""Measure a checkpoint: `python -m reason_rl.eval runs/program/checkpoints/final --samples 16 --k 1,4,16`.

Samples every problem --samples times, grades, and reports pass@1 (the mean over the samples), the unbiased pass@k, the majority's
cons@k, thinking tokens and what was truncated or ungradable, each mean with a 95 % interval. A checkpoint in a run's folder is
measured on that run's task and template; any other wants --task or --config. The same command again goes on where it was stopped.
Under torchrun each process takes a share of the problems. docs/evaluation.md says what each number means.

Left out: a run's own evaluations (session.py). eval_plan.py makes the options whole, evaluation.py has the arithmetic,
eval_folder.py the files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from reason_rl.answers.ground_truth import verifier_of
from reason_rl.answers.verdict import Verdict
from reason_rl.answers.votes import COMPARED, answer_of
from reason_rl.engine import Engine
from reason_rl.eval.folder import SUMMARY_FILE, EvalFolder
from reason_rl.eval.metrics import may_vote, problem_row, summarise
from reason_rl.eval.plan import DEFAULT_MAX_TOKENS, Plan, make_plan
from reason_rl.model.weights import load_model
from reason_rl.parallel.world import World, close_world, end_process, init_world
from reason_rl.records import Completion, Group, Problem
from reason_rl.reward import Grader, Pending
from reason_rl.rollout.collect import EVAL_KEY

EVAL_STEP = 3 * EVAL_KEY
"""The step in the noise key of everything sampled here: no rollout and no evaluation of a run has it."""
CHUNK = 4
"""Problems go to the engine in portions of so many times the completions it decodes together, so that memory stays bounded."""


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
        verifier = verifier_of(problem.task, self.plan.config.reward.verifier)
        sampled.answers[index] = answer_of(problem.completion_prefix + text, verifier)
        sampled.pending[index] = self.grader.submit(problem, completion)
        self.on_completion(completion)
        if len(sampled.pending) == self.plan.num_samples:
            self._compare(sampled)
            self._waiting.append(self._open.pop(problem.problem_id))
        while self._waiting and self._waiting[0].is_done:
            self._hand_over()

    def _compare(self, sampled: Sampled) -> None:
        """Ask which of the answers are the same, of the samples that may vote."""
        verifier = verifier_of(sampled.problem.task, self.plan.config.reward.verifier)
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
    with Grader(plan.config, plan.tokenizer) as grader, Progress(
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
