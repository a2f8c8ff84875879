"""Measures a checkpoint: `python -m reason_rl.eval runs/program/checkpoints/final --samples 16 --k 1,4,16`.

Samples every problem --samples times, grades, and reports pass@1 (the mean over the samples), the unbiased pass@k, the majority's
cons@k, thinking tokens, and truncated and ungradable samples; each mean has a 95 % interval. A checkpoint in a run's folder is
measured on that run's task and template; any other needs --task or --config. The same command again continues an interrupted one.
Under torchrun the processes share the problems. docs/evaluation.md explains each number. Left out: a run's own evaluations.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
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
from reason_rl.model.transformer import Transformer
from reason_rl.model.weights import load_for_sampling
from reason_rl.parallel.world import World, close_world, end_process, init_world
from reason_rl.records import Completion, ConfigError, Group, Problem
from reason_rl.reward import Grader
from reason_rl.rollout.collect import EVAL_KEY, collect

EVAL_STEP = 3 * EVAL_KEY
"""The step in the noise key of every completion sampled here; no rollout and no evaluation of a run uses it."""
PORTION = 4
"""Each rank samples portions of this many times engine.max_num_seqs completions, so that memory stays bounded."""


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """-> (options, `--section.key=value` overrides)"""
    parser = argparse.ArgumentParser(
        prog="python -m reason_rl.eval", allow_abbrev=False, usage="%(prog)s CHECKPOINT [options] [--section.key=value ...]",
        description="pass@k, cons@k and lengths of a checkpoint on a task's problems. Keys of [task], [engine], the verifiers and "
                    "the device (train.py --help) can be set too.")
    parser.add_argument("checkpoint", help="a checkpoint folder, e.g. runs/program/checkpoints/final")
    parser.add_argument("--task", help="the task's name; default: the run's, or --config's")
    parser.add_argument("--config", help="a TOML file with task, template and rewards; default: the run's config.toml")
    parser.add_argument("--split", choices=("heldout", "rl", "all"), default="heldout",
                        help="which problems (default: heldout); all: only for a task from files")
    parser.add_argument("--problems", type=int, help="how many; default: all of a file's, else the config's eval.final_problems")
    parser.add_argument("--samples", type=int, default=4, help="completions of each problem (default 4)")
    parser.add_argument("--k", help="comma-separated k of pass@k and cons@k, none above --samples; default: 1 and --samples")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy (default 0.6)")
    parser.add_argument("--top-p", type=float, default=0.95, help="default 0.95")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all (default)")
    parser.add_argument("--min-p", type=float, default=0.0, help="default 0")
    parser.add_argument("--max-tokens", type=int, help="of a completion; default: the config's sampling.max_tokens, or "
                                                       f"{DEFAULT_MAX_TOKENS} without a config")
    parser.add_argument("--seed", type=int, default=0, help="draws other completions (default 0)")
    parser.add_argument("--device", help="as run.device; default: the config's")
    parser.add_argument("--dtype", help="as run.dtype; default: the config's")
    parser.add_argument("--out", help="folder of the results; default: evals/NAME in the run's folder, or in runs/")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    options, rest = parser.parse_known_args(arguments)
    for argument in rest:
        if not argument.startswith("--") or "=" not in argument or "." not in argument.partition("=")[0]:
            parser.error(f"unknown argument {argument!r}; a config key is given as --section.key=value")
    return options, rest


@dataclass
class Votes:
    """Compares the answers of each graded group in the verifiers' workers, and writes its row once the votes are counted."""

    plan: Plan
    grader: Grader
    write: Callable[[dict[str, Any]], None]
    waiting: deque[tuple[Group, list[str | None], Future[Verdict] | None]] = field(default_factory=deque)

    def add(self, group: Group) -> None:
        problem = group.problem
        verifier = verifier_of(problem.task, self.plan.config.reward.verifier)
        texts = [self.plan.tokenizer.decode_completion(completion.token_ids) for completion in group.completions]
        answers = [answer_of(problem.completion_prefix + text, verifier) for text in texts]
        votes = None
        if verifier in COMPARED:
            ballots = [answer for answer, completion in zip(answers, group.completions, strict=True)
                       if may_vote(answer, completion.finish_reason)]
            votes = self.grader.service.submit("votes", {"answers": ballots, "verifier": verifier})
        self.waiting.append((group, answers, votes))
        self.write_counted()

    def write_counted(self) -> None:
        """Writes the rows that wait for nothing more, in the order in which groups were added."""
        while self.waiting and ((votes := self.waiting[0][2]) is None or votes.done()):
            self._write_next()

    def finish(self) -> None:
        """Writes all rows, waiting for their votes."""
        while self.waiting:
            self._write_next()

    def _write_next(self) -> None:
        group, answers, future = self.waiting.popleft()
        votes = None if future is None else self.grader.service.result("votes", future)
        self.write(problem_row(group, answers, votes, self.plan.tokenizer))


@dataclass
class Evaluation:
    """An evaluation that is ready to sample."""

    plan: Plan
    world: World
    folder: EvalFolder
    missing: list[Problem]
    """The problems without a row, the same on every rank."""
    model: Transformer | None
    """None if no problem is missing."""


def prepare(options: argparse.Namespace, overrides: Sequence[str], stack: ExitStack) -> Evaluation:
    """Raises ValueError or OSError for a command, folder or checkpoint that cannot be used. `stack` closes what was opened."""
    plan = make_plan(options, overrides)
    world = init_world(plan.config.run)
    stack.callback(close_world, world)
    folder = EvalFolder(plan.out, world, plan.setting(world), [problem.problem_id for problem in plan.problems])
    done = folder.open()
    missing = [problem for problem in plan.problems if problem.problem_id not in done]
    model = None
    if missing:
        model = load_for_sampling(plan.checkpoint, world.device, world.dtype, plan.config.run.exact != "off")
    return Evaluation(plan, world, folder, missing, model)


def sample_missing(evaluation: Evaluation, model: Transformer) -> None:
    """Samples and grades the missing problems; this rank appends the rows of its share."""
    plan, world, missing = evaluation.plan, evaluation.world, evaluation.missing
    portion = max(1, PORTION * plan.config.engine.max_num_seqs // plan.num_samples) * world.size
    engine = Engine(model, plan.config.engine, plan.seed)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Grader(plan.config, plan.tokenizer) as grader, Progress(
            *columns, console=Console(stderr=True), transient=True, disable=not world.is_main) as progress:
        num_done = len(plan.problems) - len(missing)
        bar = progress.add_task(f"completions ({num_done} of {len(plan.problems)} problems were done before)",
                                total=len(world.share(missing)) * plan.num_samples)
        votes = Votes(plan, grader, evaluation.folder.append)

        def on_completion(problem: Problem, completion: Completion) -> None:
            progress.advance(bar)
            votes.write_counted()

        try:
            for start in range(0, len(missing), portion):
                collect(engine, grader, missing[start : start + portion], plan.num_samples, plan.sampling, world=world,
                        step=EVAL_STEP, on_group=votes.add, on_completion=on_completion)
        finally:  # also after Ctrl-C: graded groups lack only their votes
            votes.finish()


def measure(evaluation: Evaluation) -> dict[str, Any] | None:
    """-> the summary, on rank 0; None on the others."""
    plan, world, folder = evaluation.plan, evaluation.world, evaluation.folder
    try:
        if evaluation.model is not None:
            sample_missing(evaluation, evaluation.model)
    finally:
        folder.close()
    world.barrier()
    if not world.is_main:
        return None
    rows = folder.merge()
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

    def add(name: str, value: Mapping[str, Any], spec: str) -> None:
        interval = "-" if value["low"] is None else f"{value['low']:{spec}} to {value['high']:{spec}}"
        table.add_row(name, "-" if value["mean"] is None else f"{value['mean']:{spec}}", interval, str(value["problems"]))

    # Estimates over problems.
    for name in ("pass", "cons"):
        for k, value in summary[f"{name}_at_k"].items():
            add(f"{name}@{k}", value, ".1%")
    add("format", summary["format_rate"], ".1%")
    add("thinking tokens", summary["thinking_tokens"], ".1f")
    add("tokens", summary["length"], ".1f")

    # Counts of samples.
    total = summary["completions"]
    for name in ("truncated", "without_answer", "ungradable"):
        table.add_row(name.replace("_", " "), f"{summary[name]} of {total}", f"{summary[name] / total:.1%}", "")
    for cause, count in summary["ungradable_causes"].items():
        table.add_row(f"  {cause}", f"{count} of {total}", "", "")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Bad input is one line on stderr before any sampling; an error after that is a bug and keeps its traceback."""
    options, overrides = parse(arguments)
    with ExitStack() as stack:
        try:
            evaluation = prepare(options, overrides, stack)
        except (ConfigError, OSError) as error:
            print(f"eval: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
        plan, is_main = evaluation.plan, evaluation.world.is_main
        for note in plan.notes if is_main else ():
            print(note, file=sys.stderr)
        try:
            summary = measure(evaluation)
        except KeyboardInterrupt:
            if is_main:
                print(f"eval: stopped; finished problems are in {plan.out}, and the same command continues from there",
                      file=sys.stderr)
            return 130
    if summary is not None and options.json:
        print(json.dumps(summary, indent=2))
    elif summary is not None:
        Console().print(table_of(summary))
        print(f"{plan.out}/{SUMMARY_FILE}; problems.jsonl has a line per problem, with its samples")
    return 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    end_process(main())
