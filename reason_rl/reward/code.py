"""The code reward: does the program in a completion pass the problem's tests?

`grade_code` is a kind of the verifier service. It finds the program, runs it in reason_rl/sandbox and turns
the outcome into a verdict. A failure that the program causes (a hang, a crash, too much memory or output) is
wrong, with that word as its cause. Ungradable are a jail that could not be made, and tests that no program
can pass: they do not compile, leave open which names the program defines (answers/program_names.py), or pass
objects that cannot be sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reason_rl.answers.extract import extract_answer
from reason_rl.answers.program_names import program_names
from reason_rl.answers.verdict import RIGHT, Verdict, ungradable, wrong
from reason_rl.sandbox.run import Exam, run_exam
from reason_rl.sandbox.sandbox import Limits, SandboxError, known_mechanisms, usable_mechanisms

if TYPE_CHECKING:
    from reason_rl.config import RewardConfig

MAX_SOURCE_CHARACTERS = 256 << 10


def code_options(config: RewardConfig) -> dict[str, Any]:
    """The options of `grade_code`, for the service's `Kind`."""
    return {"sandbox": config.code_sandbox, "mechanisms": known_mechanisms(config.code_sandbox),
            "is_partial": config.code_partial, "deadline_s": config.code_deadline_s, "cpu_s": config.code_cpu_s,
            "memory_bytes": config.code_memory_mb << 20, "file_bytes": config.code_file_mb << 20,
            "output_bytes": config.code_output_kb << 10, "threads": config.code_threads}


def grade_code(request: Mapping[str, Any], sandbox: str = "any", mechanisms: Sequence[str] = (), is_partial: bool = False,
               **limits: Any) -> Verdict:
    """request: "text", and "facts" with "tests" (Python statements) and perhaps "setup" (Python to run before
    them) and "entry_points" (the names in them that the program defines).

    mechanisms: those that the trainer found to hold, so that a worker need not test them; (): they are tested
    here.
    """
    try:
        use = tuple(mechanisms) or usable_mechanisms(sandbox)
    except (SandboxError, OSError) as error:
        return ungradable("sandbox", f"reward.code_sandbox = {sandbox!r}: {error}")

    # The program, or why there is none to run.
    facts = request["facts"]
    if not facts.get("tests"):
        return ungradable("tests", "the problem has no tests")
    source = extract_code(request["text"])
    if source is None:
        return wrong("no_answer")
    if len(source) > MAX_SOURCE_CHARACTERS:
        return wrong("too_long", f"a program has at most {MAX_SOURCE_CHARACTERS} characters, got {len(source)}")

    # The tests, with the names that the program must define.
    setup, tests = facts.get("setup", ""), tuple(facts["tests"])
    try:
        names, modules = program_names("\n".join([setup, *tests]), facts.get("entry_points", ()))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return ungradable("tests", f"{type(error).__name__}: {error}")
    exam = Exam(tests, tuple(names), setup, tuple(modules), is_partial)
    return _verdict(source, exam, Limits(**limits), use)


def _verdict(source: str, exam: Exam, limits: Limits, mechanisms: tuple[str, ...]) -> Verdict:
    outcome = run_exam(source, exam, limits, mechanisms)
    if outcome.failure in ("sandbox", "tests"):
        return ungradable(outcome.failure, outcome.detail)
    if not outcome.failure:
        return RIGHT
    value = outcome.num_passed / len(exam.tests) if exam.is_partial else 0.0
    return Verdict("wrong", outcome.failure, value, outcome.detail)


def extract_code(text: str) -> str | None:
    """The program in a completion: the last fenced block after the thought, inside the one <answer> block if
    there is one.

    An answer block without fences is a program as a whole. None: no program, several answer blocks, or a
    fence that never closes.
    """
    # The text to search: after the thought, inside the answer block.
    answer = text.rpartition("</think>")[2]
    has_tags = "<answer>" in answer or "</answer>" in answer
    if has_tags:
        block = extract_answer(answer)
        if block is None:
            return None
        answer = block

    # The last fenced block: `lines` is None outside of a fence.
    program: str | None = None
    lines: list[str] | None = None
    for line in answer.split("\n"):
        if lines is None:
            lines = [] if line.strip().startswith("```") else None
        elif line.strip() == "```":
            program, lines = "\n".join(lines), None
        else:
            lines.append(line)
    if lines is not None:
        return None
    return answer if program is None and has_tags and answer else program
