"""`Grader`: a completion goes to the verifiers that its problem and the config ask for, and comes back as a `Score`.

Third stage of a step, in the trainer's process. `submit` hands a completion in as soon as it is sampled and returns at once;
`Pending.score` waits for the verdicts and joins them: the weighted sum of all parts. Where one of them is ungradable the
completion is ungraded, with the cause, and takes no part in the update; nothing that a verifier does ends the run.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from reason_rl.answers.ground_truth import verifier_of
from reason_rl.answers.verdict import Verdict
from reason_rl.config import Config, RewardConfig
from reason_rl.data.tokenizer import Tokenizer
from reason_rl.records import Completion, FinishReason, Problem, Score
from reason_rl.reward.code import code_options, require_sandbox
from reason_rl.reward.custom import load_reward
from reason_rl.reward.length import cosine_reward, overlong_reward
from reason_rl.reward.pool.service import Kind, VerifierService

TEXT_DEADLINE_S = 10.0
VOTES_DEADLINE_S = 60.0
"""For all answers to one problem, each compared with those before it."""
FACTS_OF_VERIFIER = {"countdown": ("numbers", "target"), "code": ("tests",)}
"""What a problem must bring beside its answer."""
CODE_KIND_GRACE_S = 5.0
"""From a program's own deadline to its worker's."""
GIB = 1 << 30


def check_rewards(config: Config, problem: Problem) -> list[str]:
    """What can fail, before any work: raises for a function, model, sandbox or fact of the task's (problem: one of its problems)
    that is missing; lines that a run should say."""
    reward, verifier = config.reward, verifier_of(problem.task, config.reward)
    missing = [name for name in FACTS_OF_VERIFIER.get(verifier, ()) if problem.facts.get(name) in (None, "", [], ())]
    if missing:
        raise ValueError(f"reward.verifier {verifier!r} needs {' and '.join(missing)} among a problem's facts, but the task "
                         f"{problem.task!r} has {sorted(problem.facts) or 'none'}")
    for key, entry_point in (("reward.custom", reward.custom), ("reward.judge", reward.judge)):
        if entry_point:
            load_reward(entry_point, key)
    for name in ("config.json", "reward_head.safetensors") if reward.model else ():
        if not (Path(reward.model) / name).is_file():
            raise ValueError(f"reward.model must be a reward model's folder, but there is no {name} in {reward.model!r}")
    return [require_sandbox(reward.code_sandbox)] if verifier == "code" else []


def reward_kinds(config: RewardConfig) -> list[Kind]:
    """All that the service may be asked for; a kind's workers start at its first request."""
    text = {"has_language": bool(config.language), "repetition_ngram": config.repetition_ngram if config.repetition else 0}
    kinds = [
        Kind("text", "reason_rl.answers.text:grade_text", TEXT_DEADLINE_S, memory_bytes=GIB, options=text),
        Kind("math", "reason_rl.answers.math:grade_math", config.math_deadline_s, memory_bytes=GIB),
        Kind("votes", "reason_rl.answers.votes:group_answers", VOTES_DEADLINE_S, memory_bytes=GIB),
        Kind("code", "reason_rl.reward.code:run_code", config.code_deadline_s + CODE_KIND_GRACE_S,
             options=code_options(config), batch=1, num_workers=os.cpu_count() or 1),
    ]
    custom, load = "reason_rl.reward.custom:grade_custom", "reason_rl.reward.custom:load_reward"
    if config.custom:
        kinds.append(Kind("custom", custom, config.custom_deadline_s, prepare=load,
                          options={"entry_point": config.custom, "key": "reward.custom"}))
    if config.judge:
        kinds.append(Kind("judge", custom, config.judge_deadline_s, prepare=load,
                          options={"entry_point": config.judge, "key": "reward.judge"}, batch=1, num_workers=config.judge_workers))
    if config.model:
        kinds.append(Kind("model", "reason_rl.reward.model:grade_by_model", config.model_deadline_s,
                          prepare="reason_rl.reward.model:load_reward_model", options={"folder": config.model}, num_workers=1))
    return kinds


@dataclass(frozen=True)
class Pending:
    """A completion on its way through the service."""

    service: VerifierService
    verdicts: dict[str, tuple[str, Future[Verdict]]]
    """By part, its kind and what that will say; accuracy may come from the text kind, whose verdict has the other parts of the
    text too."""
    num_tokens: int
    finish_reason: FinishReason
    config: Config

    @property
    def is_done(self) -> bool:
        return all(future.done() for _, future in self.verdicts.values())

    def score(self) -> Score:
        """Waits for what is missing."""
        parts: dict[str, float] = {}
        causes: list[str] = []
        for name, (kind, future) in self.verdicts.items():
            verdict = self.service.result(kind, future)
            if not verdict.is_graded or not math.isfinite(verdict.value):
                causes.append(f"{name} {verdict.cause or 'not_finite'}: {verdict.detail}")
            elif name != "text":
                parts[name] = verdict.value
            parts |= verdict.parts
        parts |= self._lengths(parts)
        weights = weights_of(self.config.reward)
        ordered = {name: parts[name] for name in weights if name in parts}
        if causes:
            return Score(0.0, ordered, is_graded=False, cause=causes[0][:200])
        return Score(sum(weights[name] * part for name, part in ordered.items()), ordered)

    def _lengths(self, parts: dict[str, float]) -> dict[str, float]:
        reward, longest = self.config.reward, self.config.sampling.max_tokens
        lengths = {"overlong": overlong_reward(self.num_tokens, self.finish_reason, longest, reward.overlong_buffer)}
        if reward.cosine and "accuracy" in parts:
            is_right = parts["accuracy"] >= 1.0
            lengths["cosine"] = cosine_reward(is_right, self.num_tokens, self.finish_reason, longest, reward)
        return lengths


def weights_of(config: RewardConfig) -> dict[str, float]:
    return {"accuracy": config.accuracy, "format": config.format, "overlong": config.overlong, "cosine": config.cosine,
            "language": config.language, "repetition": config.repetition, "custom": config.custom_weight,
            "judge": config.judge_weight, "model": config.model_weight}


class Grader:
    """Owns the service; one a process, closed at the run's end."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.service = VerifierService(reward_kinds(config.reward), config.reward.workers, config.reward.max_queued)

    def submit(self, problem: Problem, completion: Completion) -> Pending:
        """Decodes the completion without its end token, and hands it to the verifiers; waits only while reward.max_queued requests
        are waiting. Verifiers read the completion's prefix and text as one; a reward model reads prompt and text."""
        text = self.tokenizer.decode_completion(completion.token_ids)
        verifier = verifier_of(problem.task, self.config.reward)
        whole = problem.completion_prefix + text
        request = {"text": whole, "prompt": problem.prompt, "answer": problem.answer, "facts": dict(problem.facts),
                   "task": problem.task, "finish_reason": completion.finish_reason, "verifier": verifier}
        is_text = verifier not in ("math", "code")
        verdicts = {"accuracy" if is_text else "text": ("text", self.service.submit("text", request))}
        if not is_text:
            verdicts["accuracy"] = verifier, self.service.submit(verifier, request)
        for kind in ("custom", "judge", "model"):
            if kind in self.service.kinds:
                verdicts[kind] = kind, self.service.submit(kind, {"problem": problem, "text": text if kind == "model" else whole})
        return Pending(self.service, verdicts, len(completion.token_ids), completion.finish_reason, self.config)

    def close(self) -> None:
        self.service.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
