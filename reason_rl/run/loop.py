"""A run from end to end: its parts made ready, its steps logged and saved, its summary written.

train.py holds the algorithm; this holds what surrounds it. `prepare_run` gives a `Run` that stands where the work goes on
(after the base model, or at the newest checkpoint), `Run` has one method for each thing the loop does besides learning, and
`finish_run` writes the final checkpoint, summary.json and report.html.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from kernels.native import ISA, cpu_why_not
from reason_rl.config import Config, ConfigError, ModelConfig
from reason_rl.data import Problems, Tokenizer, load_problems, tokenizer_of
from reason_rl.model.transformer import Transformer, num_active_parameters, num_parameters
from reason_rl.model.weights import Source, load_model, read_source
from reason_rl.parallel.world import World
from reason_rl.records import StepStats
from reason_rl.report.log import METRICS, RunLog, read_jsonl
from reason_rl.report.page import write_report
from reason_rl.report.terminal import View
from reason_rl.rollout.collect import Session, build_session, check_corpus, check_task
from reason_rl.rollout.metrics import is_right, rollout_rows
from reason_rl.run.folder import RunFolder, begin_run, config_table, describe_source, write_summary
from reason_rl.stages.pretrain import HISTORY_FILE, make_base, pretrain_seconds
from reason_rl.trainer.checkpoint import Progress, load_checkpoint, prune_checkpoints, save_checkpoint, step_folder

LEFT_OUT_FILE = "left_out.txt"
"""The rows of the task's files that are no part of it, and why."""
NOTABLE_GAP = 1e-3
"""Nats between sampler and trainer on policy, from which on a run says so."""


@dataclass
class Run:
    config: Config
    folder: RunFolder
    session: Session
    log: RunLog | None
    """Rank 0 writes; the others hold None."""
    view: View
    should_stop: Callable[[], bool]
    base: Path
    """The checkpoint folder that RL starts from."""
    source: Source
    """What that folder passes on to this run's checkpoints."""
    first_step: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock by part of the run, over all its sessions: pretrain_s (what the base took, also where it is reused), start_s,
    rl_s, eval_s."""
    step_started_s: float = field(default_factory=time.perf_counter)
    warned: set[str] = field(default_factory=set)
    """What has been said once and need not be said again."""

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.session.grader.close()
        if self.log is not None:
            self.log.close()

    @property
    def small_size(self) -> tuple[int, int]:
        return self.config.eval.problems, self.config.eval.samples

    @property
    def final_size(self) -> tuple[int, int]:
        return self.config.eval.final_problems, self.config.eval.final_samples

    @staticmethod
    def is_due(every: int, done: int) -> bool:
        return every > 0 and done % every == 0

    def log_step(self, stats: StepStats) -> None:
        """A finished RL step, counted from 1 in the logs; step 0 is the base model."""
        self._spend("rl_s")
        if self.log is None:
            return
        number, tokenizer = stats.step + 1, self.session.tokenizer
        self.log.metrics("rl", number, stats.metrics)
        self.log.timings("rl", number, stats.timings)
        self.view.update(number, stats.metrics, stats.timings)
        self._warn(stats)
        if number == 1 or self.is_due(self.config.run.rollout_every, number) or number == self.config.rl.steps:
            self.log.rollouts(number, rollout_rows(stats.groups, stats.advantages, tokenizer, number, self.config))
        if stats.groups:
            group = stats.groups[number % len(stats.groups)]
            score, completion = group.scores[0], group.completions[0]
            self.view.sample(group.problem.prompt, tokenizer.decode_completion(completion.token_ids), score.value,
                             is_right(score) is True)

    def log_evaluation(self, step: int, metrics: dict[str, object], eval_s: float) -> None:
        self._spend("eval_s")
        if self.log is None:
            return
        self.log.metrics("eval", step, metrics)
        self.log.timings("eval", step, {"eval_s": eval_s})
        self.view.update(step, metrics, {"eval_s": eval_s}, phase="eval")

    def save(self, done: int) -> None:
        """A step checkpoint: weights, optimizer and progress; all else follows from config and step."""
        self._spend("rl_s")
        progress = Progress("rl", done, self.session.policy_version, self.seconds)
        checkpoints = self.folder.checkpoints
        checkpoints.mkdir(parents=True, exist_ok=True)
        save_checkpoint(
            step_folder(checkpoints, done), self.session.model, self.session.world, tokenizer_json=self.session.tokenizer.to_json(),
            eos_id=self.session.tokenizer.eos_id, optimizer=self.session.optimizer, progress=progress, source=self.source)
        prune_checkpoints(checkpoints, self.config.run.keep_checkpoints, self.session.world)

    def _warn(self, stats: StepStats) -> None:
        """What a run should know of, once each: completions without a grade, a sampler that drifts from the trainer."""
        causes = [score.cause for group in stats.groups for score in group.scores if not score.is_graded]
        if causes:
            self._say_once("ungraded", f"Step {stats.step + 1}: {len(causes)} completions could not be graded and take no part "
                                       f"(metric 'ungraded' counts on). The first: {causes[0]}")
        gap = stats.metrics.get("max_abs_logprob_gap")
        should_be_exact = self.session.world.device.type == "cpu" and self.config.run.exact != "off"
        if gap is not None and not gap <= (0.0 if should_be_exact else NOTABLE_GAP):
            self._say_once("gap", f"Step {stats.step + 1}: sampler and trainer differ by {gap:.2g} nats on policy on this device; "
                                  "rl.old_logprobs='recompute' with loss.importance='tis' allows for it.")

    def _say_once(self, what: str, text: str) -> None:
        if what not in self.warned:
            self.warned.add(what)
            self.view.message(text)

    def _spend(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.step_started_s
        self.step_started_s = now


def prepare_run(config: Config, world: World, folder: RunFolder, view: View, should_stop: Callable[[], bool]) -> Run:
    """Check everything that can fail, then base model or checkpoint, sharded and ready to step."""
    started = time.perf_counter()
    tokenizer = tokenizer_of(config)
    given = load_model(config.model.init_from) if config.model.init_from else None
    check_corpus(config, tokenizer)
    problems = load_problems(config, tokenizer)
    for line in check_task(config if given is None else _as_given(config, given, tokenizer), tokenizer, problems):
        view.message(line)
    for line in [] if given is None else _outvoted(config, given):
        view.message(line)
    if config.engine.decoder == "native" and cpu_why_not(world.device):
        raise ConfigError(f"engine.decoder='native' cannot run here: {cpu_why_not(world.device)}")
    if folder.compute.get("problems", problems.digest) != problems.digest:
        raise ConfigError(f"{folder.path} was begun with other problems than {config.task.path} gives now: a file, the template or "
                          "the tokenizer has changed. --resume never begins afresh in a new folder")
    log = _begin(config, folder, world, problems.digest) if world.is_main else None
    if log is not None and problems.left_out:
        (folder.path / LEFT_OUT_FILE).write_text("\n".join(problems.left_out) + "\n", encoding="utf-8")
    try:
        return _prepare(config, world, folder, view, should_stop, log, tokenizer, problems, given, started)
    except BaseException:  # Ctrl-C in pretraining too: what was logged must be on disk
        if log is not None:
            log.close()
        raise


def _prepare(
    config: Config, world: World, folder: RunFolder, view: View, should_stop: Callable[[], bool], log: RunLog | None,
    tokenizer: Tokenizer, problems: Problems, given: Transformer | None, started: float,
) -> Run:
    base, seconds, base_s = Path(config.model.init_from), {"pretrain_s": 0.0}, 0.0
    if given is None:
        base_started = time.perf_counter()
        base = make_base(config, world, tokenizer, view, should_stop)
        base_s = time.perf_counter() - base_started
        seconds["pretrain_s"] = pretrain_seconds(base)
        if log is not None and folder.resume_from is None:
            for line in read_jsonl(base / HISTORY_FILE):
                log.metrics("pretrain", line["step"], line["metrics"])
                log.timings("pretrain", line["step"], line["timings"])
    policy = load_model(base) if given is None else given
    reference_state = None
    if config.loss.kl_coef > 0:
        reference_state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    progress, optimizer_state = None, None
    if folder.resume_from is not None:
        progress, optimizer_state = load_checkpoint(folder.resume_from, policy)
        view.message(f"Resuming from {folder.resume_from}")
    session = build_session(config, world, tokenizer, policy, problems, reference_state)
    run = Run(config, folder, session, log, view, should_stop, base, read_source(base), seconds=seconds)
    if progress is not None and optimizer_state is not None:
        session.optimizer.load_state_dict(optimizer_state)
        session.policy_version = progress.policy_version
        run.first_step, run.seconds = progress.step, dict(progress.seconds)
    view.message(describe_machine(session))
    begun, now = folder.compute.get("kernels"), ISA or "reference ops"
    if begun not in (None, now):
        view.message(f"This run began with {begun} and goes on with {now}: the same numbers to a rounding, other bits from here.")
    run.step_started_s = time.perf_counter()
    run.seconds["start_s"] = run.seconds.get("start_s", 0.0) + run.step_started_s - started - base_s
    return run


def describe_machine(session: Session) -> str:
    """What was chosen to run on, in a line."""
    world, model = session.world, session.weights.model
    exact = {"on": "required", "off": "off"}.get(session.config.run.exact, "wherever the ops are")
    reason = cpu_why_not(world.device)
    kernels = f" ({ISA} kernels)" if not reason else ""
    if reason and world.device.type == "cpu":
        kernels = f" (reference ops; native ones: {reason})"
    return (f"On {world.device}{kernels}, {str(world.dtype).removeprefix('torch.')}, {world.size} process(es) of "
            f"{torch.get_num_threads()} CPU thread(s); exact logprobs {exact}. "
            f"{num_parameters(model):,} parameters, {num_active_parameters(model):,} of them active for a token.")


def _begin(config: Config, folder: RunFolder, world: World, problems_digest: str) -> RunLog:
    """The log first, as it may be refused (a package that is missing); then config.toml makes the folder a run's."""
    was_there = folder.path.exists()
    try:
        log = _open_log(config, folder)
    except BaseException:
        if not was_there:
            shutil.rmtree(folder.path, ignore_errors=True)
        raise
    begin_run(folder, config, world, problems_digest)
    return log


def _open_log(config: Config, folder: RunFolder) -> RunLog:
    resume_step = int(folder.resume_from.name.split("_")[1]) if folder.resume_from else None
    return RunLog(folder.path, config.run.tensorboard, config.run.wandb_project, config_table(config), resume_step=resume_step)


def _as_given(config: Config, policy: Transformer, tokenizer: Tokenizer) -> Config:
    """The config with the shape of the model that it names in init_from: its context is what prompts must fit."""
    if tokenizer.vocab_size > policy.vocab_size:
        raise ConfigError(f"{config.model.init_from}: its tokenizer has {tokenizer.vocab_size} tokens, "
                          f"its model only {policy.vocab_size}")
    return replace(config, model=replace(policy.config, init_from=config.model.init_from))


def _outvoted(config: Config, policy: Transformer) -> list[str]:
    """A line on the [model] keys that say something else than the checkpoint, whose shape is its own."""
    pairs = {field.name: (getattr(config.model, field.name), getattr(policy.config, field.name))
             for field in fields(ModelConfig) if field.name != "init_from"}
    outvoted = [f"model.{key} = {asked!r} (it has {there!r})" for key, (asked, there) in pairs.items()
                if asked not in (there, getattr(ModelConfig(), key))]
    return [f"The model is {config.model.init_from} as it is, so these play no part: {', '.join(outvoted)}."] if outvoted else []


def finish_run(run: Run) -> None:
    """The final checkpoint, the summary, the report."""
    session, world = run.session, run.session.world
    save_checkpoint(run.folder.checkpoints / "final", session.model, world, tokenizer_json=session.tokenizer.to_json(),
                    eos_id=session.tokenizer.eos_id, source=run.source)
    if run.log is None:
        return
    run.log.close()
    write_summary(run.folder, summarise(run))
    write_report(run.folder.path)


def summarise(run: Run) -> dict[str, object]:
    """summary.json: base against final on the held-out problems, and what it took."""
    rows = read_jsonl(run.folder.path / METRICS)
    evaluations = {row["step"]: row for row in rows if row["phase"] == "eval"}
    first, last = evaluations[0], evaluations[run.config.rl.steps]
    gaps = [row["max_abs_logprob_gap"] for row in rows if row["phase"] == "rl" and row.get("max_abs_logprob_gap") is not None]
    model = run.session.weights.model
    summary: dict[str, object] = {
        "name": run.config.run.name, "task": run.config.task.name, "seed": run.config.run.seed,
        "heldout_problems": last["problems"], "heldout_samples": last["samples"],
        "base_accuracy": first["accuracy"], "final_accuracy": last["accuracy"],
        "base_mean_thinking_tokens": first["mean_thinking_tokens"], "final_mean_thinking_tokens": last["mean_thinking_tokens"],
        "base_thinks_share": first["thinks_share"], "final_thinks_share": last["thinks_share"],
        "base_mean_thinking_tokens_among_thinkers": first["mean_thinking_tokens_among_thinkers"],
        "final_mean_thinking_tokens_among_thinkers": last["mean_thinking_tokens_among_thinkers"],
        "base_format_rate": first["format_rate"], "final_format_rate": last["format_rate"],
        "base_accuracy_given_thought": first["accuracy_given_thought"], "base_accuracy_given_none": first["accuracy_given_none"],
        "final_accuracy_given_thought": last["accuracy_given_thought"], "final_accuracy_given_none": last["accuracy_given_none"],
        "base_pass_at_k": first.get("pass_at_k"), "final_pass_at_k": last.get("pass_at_k"),
        "max_abs_logprob_gap": max(gaps, default=None),
        "ungraded": int(sum(row.get("ungraded") or 0 for row in rows if row["phase"] == "rl")),
        "rl_steps": run.config.rl.steps, "wall_s": round(sum(run.seconds.values()), 2),
        "seconds": {key: round(value, 2) for key, value in run.seconds.items()},
        "parameters": num_parameters(model), "active_parameters": num_active_parameters(model),
        "device": str(run.session.world.device), "dtype": str(run.session.world.dtype).removeprefix("torch."),
        "kernels": ISA or "reference ops", "num_processes": run.session.world.size, **describe_source(),
    }
    assert all(not isinstance(value, float) or math.isfinite(value) for value in summary.values())
    return summary
