"""Grade nonsense for a while: random bytes and mutated real solutions, through the verifier service, as the trainer would.

    make fuzz                                      ten minutes
    python -m tests.reason_rl.reward.fuzz --seconds 60 --seed 3

Checked: every request gets a verdict, none is ungradable (no crash, no deadline, no memory limit, nothing raised), no
worker is replaced, a text graded again gets the same verdict, and neither the workers nor this process grow. A text
that fails is printed; reduce it and add it to the attack tables. With REASON_RL_DATA real texts are mutated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reason_rl.answers.verdict import Verdict
from reason_rl.config import RewardConfig
from reason_rl.reward.grade import reward_kinds
from reason_rl.reward.pool.service import VerifierService
from reason_rl.sandbox.sandbox import SandboxError, usable_mechanisms

BATCH = 256
CODE_SHARE = 0.004
"""Programs run for tens of milliseconds each, where texts take a fraction of one."""
GROWTH_BYTES = 64 << 20
WARM_UP_SHARE = 0.3
"""Caches fill up to their bounds in this share of the time, before memory is compared."""
PIECES = [
    *"{}[]()|\\^_&$%#!,;:=<>+-*/.~'\"`0123456789abcxyz \n\t\0", "\\frac", "\\sqrt", "\\boxed{", "\\left(", "\\right)", "\\text{",
    "\\\\",
    "\\begin{pmatrix}", "\\end{pmatrix}", "\\pm", "\\cup", "\\infty", "\\pi", "\\sin", "\\log_", "\\binom", "\\overline{",
    "^\\circ",
    "\\%", "\\$", "####", "<answer>", "</answer>", "<think>", "</think>", "the answer is ", "**", "9" * 50, "1e9", "10^{10^{10}}",
    "1/0",
    " or ", " and ", "x=", "\\in", "\\le", "²", "½", "−", "٣", "５", "х", "\u202e", "\u200b", "\ud800", "\U0001d7d7", "(" * 40,
    "{" * 40, "!" * 20,
]
BUILT_IN = [
    ("math", "\\frac{1}{2}", "so it is $\\boxed{\\frac{1}{2}}$."), ("math", "(-\\infty, 3] \\cup \\{5\\}",
                                                                    "\\boxed{(-\\infty, 3] \\cup \\{5\\}}"),
    ("math", "x^2 + 2x", "<answer>x(x + 2)</answer>"), ("math", "1,080", "10 + 1070\n#### 1,080"),
    ("math", "3 \\pm \\sqrt{2}", "\\boxed{3 \\pm \\sqrt 2}"),
    ("math", "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\boxed{\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}}"),
    ("countdown", "", "<think>9-7=2</think><answer>(9-7)*8</answer>"), ("text", "5", "<think>a2,b*3=6</think><answer>5</answer>"),
    ("code", "", "```python\ndef f(x):\n    return x + 1\n```"),
]
FACTS = {"countdown": {"numbers": [9, 8, 7], "target": 16}, "code": {"tests": ["assert f(1) == 2"], "setup": ""}}


@dataclass
class Report:
    num_gradings: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def corpus() -> list[tuple[str, str, str]]:
    """(verifier, right answer, completion)"""
    folder = os.environ.get("REASON_RL_DATA")
    texts = list(BUILT_IN) * 20
    if folder:
        for line in (Path(folder) / "gsm8k/test.jsonl").read_text().splitlines():
            answer = json.loads(line)["answer"]
            texts.append(("math", answer.rpartition("#### ")[2], answer))
        for line in (Path(folder) / "math/train.jsonl").read_text().splitlines():
            solution = json.loads(line)["solution"]
            if found := re.findall(r"\\boxed\{([^{}]+)\}", solution):
                texts.append(("math", found[-1], solution))
    return texts


def mutate(rng: random.Random, text: str, other: str) -> str:
    """A few edits, most of them near the end, at the answer."""
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = len(text) - min(len(text), int(rng.expovariate(1 / 20))) if rng.random() < 0.7 else rng.randint(0, len(text))
        span = rng.choice((0, 1, 3, 10))
        match rng.randrange(6):
            case 0:
                text = text[:at] + text[at + span :]
            case 1:
                text = text[:at] + rng.choice(PIECES) * rng.choice((1, 1, 2, 30)) + text[at:]
            case 2:
                text = text[:at] + text[max(0, at - span) : at] * rng.choice((1, 2, 50)) + text[at:]
            case 3:
                cut = rng.randint(0, len(other))
                text = text[:at] + other[cut : cut + rng.choice((5, 50, 500))] + text[at:]
            case 4:
                text = text[:at] + chr(rng.choice((rng.randrange(128), rng.randrange(0x3000),
                                                   rng.randrange(0x110000)))) + text[at + 1 :]
            case 5:
                characters = list(text[at : at + 20])
                rng.shuffle(characters)
                text = text[:at] + "".join(characters) + text[at + 20 :]
    return text[:20_000]


def random_text(rng: random.Random) -> str:
    data = rng.randbytes(rng.choice((0, 1, 10, 100, 1000, 10_000)))
    text = data.decode(rng.choice(("latin-1", "utf-8")), errors=rng.choice(("surrogateescape", "replace")))
    return rng.choice(("", "\\boxed{", "<answer>", "#### ")) + text + rng.choice(("", "}", "</answer>"))


def request(rng: random.Random, texts: list[tuple[str, str, str]], has_code: bool) -> tuple[str, dict[str, Any]]:
    verifier, answer, text = rng.choice(texts)
    while verifier == "code" and (not has_code or rng.random() > CODE_SHARE * len(texts) / 20):
        verifier, answer, text = rng.choice(texts)
    text = random_text(rng) if rng.random() < 0.2 else mutate(rng, text, rng.choice(texts)[2])
    kind = verifier if verifier in ("math", "code") else "text"
    return kind, {"text": text, "prompt": "How many are there?", "answer": answer, "facts": FACTS.get(verifier, {}),
                  "task": verifier,
                  "finish_reason": "stop", "verifier": verifier}


def run(seconds: float, seed: int, num_workers: int = 1) -> Report:
    rng, texts, report = random.Random(seed), corpus(), Report()
    try:
        usable_mechanisms("any")
        has_code = True
    except SandboxError as error:
        has_code = False
        print(f"programs are left out: {error}")
    config = RewardConfig(code_deadline_s=2.0, code_cpu_s=1)
    start, warm = time.monotonic(), None
    with VerifierService(reward_kinds(config), num_workers) as service:
        while (elapsed := time.monotonic() - start) < seconds and len(report.faults) < 20:
            requests = [request(rng, texts, has_code) for _ in range(BATCH)]
            grade(service, rng, requests, report)
            if warm is None and elapsed > WARM_UP_SHARE * seconds:
                warm = sizes(service)
        restarts = service.take_metrics()["worker_restarts"]
        report.faults += [f"{restarts:.0f} workers had to be replaced"] if restarts else []
        report.faults += growth(warm or sizes(service), sizes(service))
    return report


def grade(service: VerifierService, rng: random.Random, requests: list[tuple[str, dict[str, Any]]], report: Report) -> None:
    """Grades the batch, and one text in twenty again."""
    again = [one for one in requests if one[0] != "code" and rng.random() < 0.05]
    futures = [service.submit(kind, one) for kind, one in requests + again]
    verdicts = [future.result(timeout=60) for future in futures]
    report.num_gradings += len(verdicts)
    report.statuses.update(verdict.status for verdict in verdicts)
    for (_, one), verdict in zip(requests, verdicts):
        if not verdict.is_graded and verdict.cause != "tests":
            report.faults.append(f"{verdict.cause}: {verdict.detail}: {one['answer']!r} {one['text'][-300:]!r}")
    first: dict[int, Verdict] = {id(one): verdict for (_, one), verdict in zip(requests, verdicts)}
    for (_, one), verdict in zip(again, verdicts[len(requests) :]):
        if verdict != first[id(one)]:
            report.faults.append(f"{first[id(one)]} and then {verdict}: {one['answer']!r} {one['text'][-300:]!r}")


def sizes(service: VerifierService) -> dict[str, int]:
    """Resident bytes by process, and counts of other resources that may leak."""
    found = {f"worker {pid}": resident_bytes(pid) for pid in service.worker_pids()}
    return found | {"this process": resident_bytes(os.getpid()), "files": len(os.listdir("/proc/self/fd")),
                    "threads": threading.active_count()}


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(before: dict[str, int], after: dict[str, int]) -> list[str]:
    slack = {"files": 4, "threads": 2}
    return [f"{name} grew from {before[name]} to {after[name]}" for name in before
            if name in after and after[name] > before[name] + slack.get(name, GROWTH_BYTES)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reason_rl.reward.fuzz",
                                     description="Grade nonsense and see that nothing gives way.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None, help="default: another each time, printed")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    print(f"seed {seed}")
    report = run(options.seconds, seed, num_workers=2)
    print(f"{report.num_gradings} gradings in {options.seconds:.0f} s: {dict(report.statuses)}")
    for fault in report.faults:
        print(f"FAULT {fault}")
    sys.exit(1 if report.faults or not report.num_gradings else 0)


if __name__ == "__main__":
    main()
