"""Train a language model to reason, by reinforcement learning with verifiable rewards (GRPO).

    torchrun train.py                                   the default run: a tiny MoE on a plain CPU
    torchrun train.py configs/countdown_cpu.toml        another preset
    torchrun train.py --rl.steps=10 --seed 1            any key of reason_rl/config.py
    torchrun --nproc-per-node 2 train.py                several processes, sharded with FSDP2

This file is the algorithm: base model, then per step
problems -> rollouts -> rewards -> advantages -> packed microbatches -> loss -> update.
"""

import math
import sys
import time

from reason_rl.config import Config, ConfigError, parse_command_line
from reason_rl.config.help import help_text
from reason_rl.parallel.world import close_world, end_process, init_world
from reason_rl.records import StepStats
from reason_rl.report.page import write_report
from reason_rl.report.terminal import make_view
from reason_rl.rl.advantages import compute_advantages
from reason_rl.rl.packing import pack
from reason_rl.rollout.collect import Session, collect_groups, evaluate
from reason_rl.rollout.metrics import rollout_metrics, update_metrics
from reason_rl.run.folder import StopSignal, as_begun, open_run
from reason_rl.run.loop import Run, finish_run, prepare_run
from reason_rl.stages.pretrain import Interrupted
from reason_rl.trainer.optimizer import lr_factor
from reason_rl.trainer.update import fill_logprobs, policy_update


def grpo_step(session: Session, step: int) -> StepStats:
    """One step of GRPO and its family: sample groups, reward them, compare within each group, update the policy."""
    config, world = session.config, session.world
    rl, temperature = config.rl, config.sampling.temperature
    start = time.perf_counter()

    batch, sampled, timings = collect_groups(session, step)
    estimate = compute_advantages(batch, rl, world.device)

    packed = time.perf_counter()
    updates = pack(batch, estimate, rl.num_minibatches, config.optim.microbatch_tokens)
    policy = session.weights.model
    if rl.old_logprobs == "recompute":
        updates = [fill_logprobs(policy, packs, world, temperature=temperature, name="old_logprobs") for packs in updates]
    if session.reference is not None:
        updates = [fill_logprobs(session.reference, packs, world, temperature=temperature, name="ref_logprobs")
                   for packs in updates]

    factor = lr_factor(config.optim, step, rl.steps)
    losses = []
    for packs in updates:
        losses.append(policy_update(
            session.model, session.optimizer, packs, world, spec=session.loss_spec, temperature=temperature, lr_factor=factor,
            max_gap=session.max_gap if not losses else math.inf))  # only the first update of a step is on policy
        session.policy_changed()

    end = time.perf_counter()
    num_tokens = sum(len(c.token_ids) for group in sampled for c in group.completions)
    num_packed = sum(microbatch.num_tokens for packs in updates for microbatch in packs)
    timings |= {"train_s": end - packed, "step_s": end - start, "train_tok_s": num_packed / (end - packed),
                "rollout_tok_s": num_tokens / timings["rollout_s"], "step_tok_s": num_tokens / (end - start)}
    metrics = rollout_metrics(sampled, session.tokenizer) | update_metrics(losses) | {
        "lr": factor * config.optim.lr, "groups_without_signal": 1 - float(estimate.has_signal.float().mean())}
    return StepStats(step, metrics, timings, tuple(batch), tuple(map(tuple, estimate.advantages.tolist())))


def train(run: Run) -> None:
    """From the base model (or where the run stopped) through the RL steps to the last evaluation and the report."""
    session, rl = run.session, run.config.rl
    if run.first_step == 0:
        run.log_evaluation(0, *evaluate(session, 0, *run.final_size, with_pass_at_k=True))
    run.view.phase("rl", rl.steps, run.first_step)
    for step in range(run.first_step, rl.steps):
        stats = grpo_step(session, step)
        run.log_step(stats)
        done = step + 1
        if done == rl.steps:
            run.log_evaluation(done, *evaluate(session, done, *run.final_size, with_pass_at_k=True))
        elif run.is_due(run.config.eval.every, done):
            run.log_evaluation(done, *evaluate(session, done, *run.small_size))
        is_stopping = any(session.world.gather(run.should_stop()))
        if run.is_due(run.config.run.checkpoint_every, done) or is_stopping:
            run.save(done)
        if is_stopping and done < rl.steps:
            raise Interrupted(f"RL stopped after {done} of {rl.steps} steps")
    finish_run(run)


def main(config: Config) -> int:
    world = init_world(config.run)
    try:
        folder = open_run(config, world)
        if folder.is_finished:
            if world.is_main:
                print(f"{folder.path} is finished: see {write_report(folder.path)}. --resume never runs it afresh in a new folder.")
            return 0
        world = as_begun(world, folder)
        with make_view(f"reason_rl · {config.run.name}", world.rank) as view:
            should_stop = StopSignal(view.message)
            try:
                with prepare_run(config, world, folder, view, should_stop) as run:
                    train(run)
            except Interrupted as stopped:
                again = "The same command" if config.run.resume == "auto" else f"train.py {folder.path}/config.toml"
                view.message(f"Saved: {stopped}. {again} goes on from here.")
                return 130
        if world.is_main:
            example = '"a2,b*3,c-1,d-8?"' if config.task.name == "program" else f"--template {config.task.template}"
            print(f"Done. The report: {folder.path}/report.html · talk to the model: "
                  f"python -m reason_rl.serve.cli {folder.path}/checkpoints/final {example}")
        return 0
    finally:
        close_world(world)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
        sys.exit(0)
    try:
        end_process(main(parse_command_line(sys.argv[1:])))
    except (ConfigError, ValueError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
