"""`Grader`: submits a completion to the verifiers that its problem and the config ask for, and returns a
`Score`.

Third stage of a step, in the trainer's process. A kind is one verifier function with its worker processes.
`submit` takes a completion as soon as it is sampled and
returns at once; `Pending.score` waits for the verdicts and takes the weighted sum of all parts. If one
verdict is ungradable, the completion is ungraded, with the cause, and takes no part in the update. No
verifier can end the run.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reason_rl.answers.ground_truth import verifier_of
from reason_rl.answers.math import grade_math
from reason_rl.answers.verdict import Verdict
from reason_rl.answers.votes import group_answers
from reason_rl.config import Config, ConfigError, RewardConfig
from reason_rl.data.tokenizer import Tokenizer
from reason_rl.records import Completion, FinishReason, Problem, Score
from reason_rl.reward.code import code_options, grade_code
from reason_rl.reward.custom import CustomRewardError, grade_custom, load_reward
from reason_rl.reward.model import HEAD_FILE, grade_by_model, load_reward_model
from reason_rl.reward.parts import grade_text, overlong_reward
from reason_rl.reward.pool.service import Kind, VerifierService
from reason_rl.sandbox.sandbox import SandboxError, require_sandbox

TEXT_DEADLINE_S = 10.0
VOTES_DEADLINE_S = 60.0
"""For all answers to one problem, each compared with those before it."""
FACTS_OF_VERIFIER = {"countdown": ("numbers", "target"), "code": ("tests",)}
"""The facts of a problem that a verifier needs besides the answer."""
CODE_KIND_GRACE_S = 5.0
"""From a program's deadline to its worker's."""
GIB = 1 << 30


def check_rewards(config: Config, problem: Problem) -> list[str]:
    """Checks before any work that the functions, the model, the sandbox and the facts that the rewards need
    exist.

    problem: any problem of the task. Returns lines for the run to print; raises ConfigError.
    """
    # Facts and files.
    reward, verifier = config.reward, verifier_of(problem.task, config.reward.verifier)
    missing = [name for name in FACTS_OF_VERIFIER.get(verifier, ()) if problem.facts.get(name) in (None, "", [], ())]
    if missing:
        raise ConfigError(f"reward.verifier {verifier!r} needs {' and '.join(missing)} among a problem's facts, but the task "
                          f"{problem.task!r} has {sorted(problem.facts) or 'none'}")
    for name in ("config.json", HEAD_FILE) if reward.model else ():
        if not (Path(reward.model) / name).is_file():
            raise ConfigError(f"reward.model must be a reward model's folder, but there is no {name} in {reward.model!r}")

    # Functions and the sandbox.
    try:
        for key, entry_point in (("reward.custom", reward.custom), ("reward.judge", reward.judge)):
            if entry_point:
                load_reward(entry_point, key)
        return [require_sandbox(reward.code_sandbox)] if verifier == "code" else []
    except CustomRewardError as error:
        raise ConfigError(str(error)) from error
    except SandboxError as error:
        raise ConfigError(f"reward.code_sandbox = {reward.code_sandbox!r}: {error}") from error


def reward_kinds(config: RewardConfig) -> list[Kind]:
    """All kinds that the service may be asked for; a kind's workers start at its first request."""
    # Verifiers that any task may need.
    kinds = [
        Kind("text", grade_text, TEXT_DEADLINE_S, memory_bytes=GIB),
        Kind("math", grade_math, config.math_deadline_s, memory_bytes=GIB),
        Kind("votes", group_answers, VOTES_DEADLINE_S, memory_bytes=GIB),
        Kind("code", grade_code, config.code_deadline_s + CODE_KIND_GRACE_S, options=code_options(config), batch=1,
             num_workers=os.cpu_count() or 1),
    ]

    # Rewards that the config names.
    if config.custom:
        kinds.append(Kind("custom", grade_custom, config.custom_deadline_s, prepare=load_reward,
                          options={"entry_point": config.custom, "key": "reward.custom"}))
    if config.judge:
        kinds.append(Kind("judge", grade_custom, config.judge_deadline_s, prepare=load_reward,
                          options={"entry_point": config.judge, "key": "reward.judge"}, batch=1, num_workers=config.judge_workers))
    if config.model:
        kinds.append(Kind("model", grade_by_model, config.model_deadline_s, prepare=load_reward_model,
                          options={"folder": config.model}, num_workers=1))
    return kinds


@dataclass(frozen=True)
class Pending:
    """A completion whose verdicts may be still to come."""

    service: VerifierService
    verdicts: dict[str, tuple[str, Future[Verdict]]]
    """By part: (kind, verdict). The text kind always runs, because it also grades the format (in its verdict's
    `parts`). Its verdict is listed as "accuracy" if the answer is compared as text; otherwise as "text", and
    then its value is not used."""
    num_tokens: int
    finish_reason: FinishReason
    config: Config

    @property
    def is_done(self) -> bool:
        return all(future.done() for _, future in self.verdicts.values())

    def score(self) -> Score:
        """Waits for the missing verdicts."""
        # Collect the parts, and the causes of those that are ungradable.
        parts: dict[str, float] = {}
        causes: list[str] = []
        for name, (kind, future) in self.verdicts.items():
            verdict = self.service.result(kind, future)
            if not verdict.is_graded or not math.isfinite(verdict.value):
                causes.append(f"{name} {verdict.cause or 'not_finite'}: {verdict.detail}")
            elif name != "text":
                parts[name] = verdict.value
            parts |= verdict.parts
        parts["overlong"] = overlong_reward(
            self.num_tokens, self.finish_reason, self.config.sampling.max_tokens, self.config.reward.overlong_buffer)

        # The weighted sum, in the order of the weights.
        weights = weights_of(self.config.reward)
        ordered = {name: parts[name] for name in weights if name in parts}
        if causes:
            return Score(0.0, ordered, is_graded=False, cause=causes[0][:200])
        return Score(sum(weights[name] * part for name, part in ordered.items()), ordered)


def weights_of(config: RewardConfig) -> dict[str, float]:
    return {"accuracy": config.accuracy, "format": config.format, "overlong": config.overlong, "custom": config.custom_weight,
            "judge": config.judge_weight, "model": config.model_weight}


class Grader:
    """Owns the verifier service; each process has one and closes it at the end of the run."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.service = VerifierService(reward_kinds(config.reward), config.reward.workers, config.reward.max_queued)

    def submit(self, problem: Problem, completion: Completion) -> Pending:
        """Decodes a completion and submits it; waits only while reward.max_queued requests are not yet begun.

        Verifiers read the problem's completion_prefix and the completion as one text, without the end token.
        """
        text = self.tokenizer.decode_completion(completion.token_ids)
        whole, num_tokens = problem.completion_prefix + text, len(completion.token_ids)
        verifier = verifier_of(problem.task, self.config.reward.verifier)

        # Accuracy: from the text kind, or from the kind of the verifier's name.
        request: dict[str, Any] = {"text": whole, "answer": problem.answer, "facts": dict(problem.facts),
                                   "finish_reason": completion.finish_reason, "verifier": verifier}
        is_text = verifier not in ("math", "code")
        verdicts = {"accuracy" if is_text else "text": ("text", self.service.submit("text", request))}
        if not is_text:
            verdicts["accuracy"] = verifier, self.service.submit(verifier, request)

        # The other parts, if the config has them.
        request = {"problem": problem, "text": whole, "completion": text, "num_tokens": num_tokens,
                   "max_tokens": self.config.sampling.max_tokens, "finish_reason": completion.finish_reason}
        for kind in ("custom", "judge", "model"):
            if kind in self.service.kinds:
                verdicts[kind] = kind, self.service.submit(kind, request)
        return Pending(self.service, verdicts, num_tokens, completion.finish_reason, self.config)

    def close(self) -> None:
        self.service.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
