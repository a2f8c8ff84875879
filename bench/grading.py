"""Gradings per second of the verifier service, with the workers' round trip, and of math-verify if installed.

    .venv/bin/python -m bench.grading [--json bench/results/grading_cpu.json]

A request is a completion of about 100 words and its right answer, in the trainer's format; workers are warm.
The result is the fastest of several rounds, because other programs on the machine only slow a round down.
math-verify runs in this process, without the service, on the same answers; answers that the two grade
differently are printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import time
from collections.abc import Callable
from typing import Any

from bench.harness import add_json_option, describe_setting, write_json
from reason_rl.answers.math import grade_math
from reason_rl.config import RewardConfig
from reason_rl.reward.grade import reward_kinds
from reason_rl.reward.pool.service import VerifierService

# (right answer, completion's answer); in each list the last pair is wrong and all others are right.
COMMON = [("18", "18"), ("1080", "1,080"), ("-7", "-7"), ("2.50", "2.5"), (r"\frac{3}{4}", r"\frac{3}{4}"), ("3/4", "0.75"),
          ("18", r"\$18"), ("5", "x = 5"), ("25", r"25\%"), ("17", "18")]
SYMBOLIC = [(r"\frac{\sqrt3}{3}", r"\frac{1}{\sqrt{3}}"), ("x^2+2x+1", "(x+1)^2"),
            (r"(-\infty, 3] \cup \{5\}", r"(-\infty,3]\cup\{5\}"),
            (r"\left(\frac{1}{2}, 3\right)", "(0.5, 3)"), (r"3 \pm \sqrt{2}", r"3-\sqrt{2}, 3+\sqrt{2}"),
            ("2x-y+3=0", "4x - 2y = -6"),
            (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"), (r"2\pi", "6.28")]
DISPUTED = [("72", "48+24"), ("1/3", "0.333333"), ("3:1", "3"), ("5", "6 = 5"), (r"5 \text{ cm}", r"5 \text{ m}"), ("4t", "4")]
"""Wrong by our rules, right for math-verify 0.9."""
THOUGHT = "<think>" + "so we take the first and the second and see that it goes on " * 8 + "</think>"


def requests(pairs: list[tuple[str, str]], count: int) -> list[dict[str, Any]]:
    texts = [{"text": f"{THOUGHT}It is $\\boxed{{{given}}}$.", "answer": answer, "facts": {}, "finish_reason": "stop",
              "verifier": "text"} for answer, given in pairs]
    return (texts * (count // len(texts) + 1))[:count]


def rate(grade: Callable[[], object], count: int, rounds: int) -> float:
    grade()
    best_s = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        grade()
        best_s = min(best_s, time.perf_counter() - start)
    return count / best_s


def our_rates(count: int, rounds: int) -> dict[str, float]:
    rates = {}
    with VerifierService(reward_kinds(RewardConfig()), num_workers=2) as service:
        for name, kind, pairs in (("common", "math", COMMON), ("symbolic", "math", SYMBOLIC), ("text and format", "text", COMMON)):
            batch = requests(pairs, count)
            rates[name] = rate(lambda kind=kind, batch=batch: service.grade(kind, batch), count, rounds)
    return rates


def peer() -> dict[str, Any] | None:
    if importlib.util.find_spec("math_verify") is None:
        return None
    from importlib.metadata import version

    from math_verify import parse, verify
    logging.disable(logging.CRITICAL)

    def theirs(answer: str, given: str) -> bool:
        return bool(verify(parse(f"${answer}$"), parse(f"\\boxed{{{given}}}")))

    rates = {name: rate(lambda pairs=pairs: [theirs(*pair) for pair in pairs], len(pairs), 20)
             for name, pairs in (("common", COMMON), ("symbolic", SYMBOLIC))}
    disputed = [{"answer": a, "given": g, "reason_rl": grade_math({"text": f"\\boxed{{{g}}}", "answer": a}).status,
                 "math-verify": "right" if theirs(a, g) else "wrong"} for a, g in DISPUTED]
    return {"version": version("math-verify"), "gradings_per_s": rates, "disputed": disputed}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.grading", description="Gradings per second of the verifier service.")
    parser.add_argument("--count", type=int, default=4000, help="requests per round")
    parser.add_argument("--rounds", type=int, default=7)
    add_json_option(parser)
    options = parser.parse_args()

    # Measure.
    record = {"bench": "grading", "gradings_per_s": our_rates(options.count, options.rounds), "workers": 2, "math-verify": peer(),
              **describe_setting()}

    # Print our rates, math-verify's, and the answers on which the two differ.
    for name, value in record["gradings_per_s"].items():
        print(f"{name:16} {value:9,.0f} gradings/s")
    if record["math-verify"]:
        for name, value in record["math-verify"]["gradings_per_s"].items():
            print(f"{name:16} {value:9,.0f} gradings/s of math-verify {record['math-verify']['version']}, in one process")
        for dispute in record["math-verify"]["disputed"]:
            print("{given:>12} for {answer:14} ours {reason_rl:6} math-verify {math-verify}".format(**dispute))
    write_json(record, options.json)


if __name__ == "__main__":
    main()
