"""The loop that every stage runs in: log, evaluate, save, resume, stop, report.

`Run` holds a run's folder and the objects that its stages share. `Run.complete` completes one stage: it
reuses the output if any run has finished a stage with the same key, else `StageRun.finish` trains it from the
newest checkpoint. Left out: the training step itself (reason_rl/stages), and how a key is computed
(recipe.py).
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TextIO

from reason_rl.data import Problems, Tokenizer
from reason_rl.model.weights import read_source
from reason_rl.parallel.world import World
from reason_rl.records import StepStats
from reason_rl.report.files import jsonl
from reason_rl.report.log import ROLLOUTS, RunLog
from reason_rl.report.page import write_report
from reason_rl.report.terminal import View
from reason_rl.rollout.metrics import is_right, rollout_rows
from reason_rl.run.folder import RunFolder
from reason_rl.run.recipe import PlannedStage
from reason_rl.run.stage_folder import FINAL, Interrupted, StageFolder, read_history, release
from reason_rl.run.summary import summarise, write_summary
from reason_rl.stages.base import StageStart
from reason_rl.trainer.checkpoint import Progress, link_folder, prune_checkpoints, read_progress, save_checkpoint

SAVE_EVERY_S = 300.0
"""A checkpoint is due at the latest after so many seconds, even if the stage's checkpoint_every is longer."""


@dataclass
class Run:
    folder: RunFolder
    recipe: list[PlannedStage]
    world: World
    tokenizer: Tokenizer
    problems: dict[str, Problems]
    """By stage name, for the stages that use problems."""
    view: View
    should_stop: Callable[[], bool]
    log: RunLog | None
    """None on all ranks but 0."""
    lock: TextIO | None = None
    """Held by rank 0 while this process works on the run."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds by part, over all sessions, reused stages included: {"pretrain_s": ..., "grpo_s": ..., "eval_s": ...}."""

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.log is not None:  # flushes to disk, after Ctrl-C too
            self.log.close()
        if self.lock is not None:
            release(self.lock)

    def complete(self, stage: PlannedStage) -> None:
        """Completes one stage: reuses the output if any run has finished a stage with the same key, else trains
        it from its newest checkpoint. If this run's folder already has the output, only adds up its seconds."""
        here = self.folder.checkpoints / stage.name
        if not self.world.gather(here.is_dir())[0]:
            output = self.folder.stage_folder(stage.name)
            with output.lock(self.world, self.view, self.should_stop):
                is_reused = output.is_finished(self.world)
                if is_reused:
                    self.view.message(f"Stage {stage.name} reused: {output.path}")
                else:
                    StageRun(self, stage, output).finish()
                    gc.collect()  # the model and its optimizer are in a cycle: free them before the next stage
                self.world.from_main(lambda: self._take(stage.name, output, is_reused))

        # Its seconds.
        for part, value in read_progress(here).seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + value

    def _take(self, name: str, output: StageFolder, is_reused: bool) -> None:
        """Links a finished output into this run's folder; hard links take no more disk."""
        assert self.log is not None
        if is_reused:
            self.log.restore(name, read_history(output.final))
            copy_folder(output.rollouts, self.folder.path / ROLLOUTS / name)
        link_folder(output.final, self.folder.checkpoints / name)

    def finish(self) -> None:
        """Links the last stage's output as `final`, and writes the summary and the report."""
        if self.log is None:
            return
        link_folder(self.folder.checkpoints / self.recipe[-1].name, self.folder.checkpoints / FINAL)
        self.log.close()
        write_summary(self.folder.path, summarise(self.folder, self.recipe, self.seconds, self.world))
        write_report(self.folder.path)

    def source_of(self, stage: PlannedStage) -> Path | None:
        """The folder with the weights that a stage starts from; None: random weights."""
        if stage.after is not None:
            return self.folder.checkpoints / stage.after.name
        return Path(stage.config.model.init_from) if stage.config.model.init_from else None


class StageRun:
    """The training of one stage in one run: a stage object, its steps, its log and its checkpoints."""

    def __init__(self, run: Run, planned: PlannedStage, output: StageFolder) -> None:
        # Where it starts: its newest checkpoint, and the folder of the weights before its first step.
        self.run, self.planned, self.output, self.name = run, planned, output, planned.name
        self.since_s = self.saved_s = time.perf_counter()
        self.warned: set[str] = set()
        checkpoint, folder = output.newest_checkpoint(run.world), run.source_of(planned)
        self.source = read_source(folder) if folder else None

        # Build the stage with the weights of the checkpoint, and restore the log as of that checkpoint.
        self.stage = planned.kind(StageStart(
            planned.config, run.world, run.tokenizer, run.problems.get(planned.name), planned.offset,
            folder, checkpoint))
        self.first = self.stage.policy.num_steps_done
        self.seconds = dict(read_progress(checkpoint).seconds) if checkpoint else {}
        if checkpoint is not None:
            run.view.message(f"Resuming from {checkpoint}")
        if run.log is not None:
            if checkpoint is not None:
                copy_folder(output.rollouts, self.rollouts)  # another run may have begun this stage
            run.log.restore(self.name, read_history(checkpoint) if checkpoint else {})

    @property
    def rollouts(self) -> Path:
        return self.run.folder.path / ROLLOUTS / self.name

    def finish(self) -> None:
        """Runs all remaining steps, then saves the output."""
        stage = self.stage
        self.run.view.stage(self.name, self.planned.kind.kind, stage.num_steps, self.first)
        self._spend("start_s")

        # Step, log, evaluate, save.
        try:
            if self.first == 0:
                self._evaluate(0)
            for index in range(self.first, stage.num_steps):
                stats, done = stage.step(index), index + 1
                if done % stage.log_every and done < stage.num_steps:
                    continue
                self._log_step(stats)
                self._evaluate(done)
                self._save_or_stop(done)
            self._save(self.output.final, stage.num_steps, is_final=True)
        finally:
            stage.close()

    def _log_step(self, stats: StepStats) -> None:
        """Logs count steps from 1; step 0 is the policy before the first step."""
        self._spend(f"{self.name}_s")
        log, view, number = self.run.log, self.run.view, stats.step + 1
        if log is None:
            return

        # Numbers, warnings, rollouts.
        log.metrics(self.name, "train", number, stats.metrics)
        log.timings(self.name, "train", number, stats.timings)
        view.train(number, stats.metrics, stats.timings)
        for cause, text in stats.warnings.items():
            if cause not in self.warned:  # once a run
                self.warned.add(cause)
                view.message(f"Step {number}: {text}")
        if stats.groups:
            self._show_rollouts(stats, number)

    def _show_rollouts(self, stats: StepStats, number: int) -> None:
        settings, tokenizer = self.planned.config.run, self.run.tokenizer
        assert self.run.log is not None
        if number in (1, self.stage.num_steps) or is_due(settings.rollout_every, number):
            self.run.log.rollouts(self.name, number, rollout_rows(
                stats.groups[: settings.rollout_samples], stats.advantages, tokenizer, number))
        group = stats.groups[number % len(stats.groups)]
        self.run.view.sample(group.problem.prompt, tokenizer.decode_completion(group.completions[0].token_ids),
                             group.scores[0].value, is_right(group.scores[0]) is True)

    def _evaluate(self, done: int) -> None:
        started_s = time.perf_counter()
        metrics = self.stage.evaluate(done)
        if metrics is None:
            return
        timings = {"eval_s": time.perf_counter() - started_s}
        self._spend("eval_s")
        if self.run.log is not None:
            self.run.log.metrics(self.name, "eval", done, metrics)
            self.run.log.timings(self.name, "eval", done, timings)
            self.run.view.evaluation(done, metrics, timings)

    def _save_or_stop(self, done: int) -> None:
        """Saves if a checkpoint is due on any rank: saving is a collective, so all ranks must agree. Raises
        Interrupted if any rank was asked to stop."""
        now_s, num_steps = time.perf_counter(), self.stage.num_steps
        flags = self.run.world.gather((self.run.should_stop(), now_s - self.saved_s > SAVE_EVERY_S))
        is_stopping = any(stop for stop, _ in flags)
        is_late = any(late for _, late in flags)

        # Save, stop.
        if done < num_steps and (is_stopping or is_late or is_due(self.stage.checkpoint_every, done)):
            self._save(self.output.step_folder(done), done)
            prune_checkpoints(self.output.path, self.planned.config.run.keep_checkpoints, self.run.world)
            self.saved_s = time.perf_counter()
        if is_stopping and done < num_steps:
            raise Interrupted(f"stage {self.name} stopped after {done} of {num_steps} steps")

    def _save(self, folder: Path, done: int, is_final: bool = False) -> None:
        """A collective. Saves the weights, the progress, the stage's log so far and, unless final, the optimizer's
        state. All other state follows from config and step."""
        self._spend(f"{self.name}_s")
        run, policy = self.run, self.stage.policy
        history = {name: jsonl(rows) for name, rows in run.log.history(self.name).items()} if run.log is not None else {}
        if run.log is not None:
            copy_folder(self.rollouts, self.output.rollouts)

        # The checkpoint.
        save_checkpoint(
            folder, policy.model, run.world, run.tokenizer, Progress(done, policy.version, self.seconds), files=history,
            optimizer=None if is_final else policy.optimizer, source=self.source)

    def _spend(self, part: str) -> None:
        now_s = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now_s - self.since_s
        self.since_s = now_s


def copy_folder(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)


def is_due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0
