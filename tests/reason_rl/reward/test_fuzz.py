"""A minute of `make fuzz`, and tests that the fuzzer finds planted faults."""

from __future__ import annotations

import random

import pytest

from reason_rl.reward.pool.service import Kind, VerifierService
from tests.reason_rl.reward import fuzz, verifier_kinds


@pytest.mark.long
def test_a_minute_of_nonsense_breaks_nothing() -> None:
    report = fuzz.run(seconds=60, seed=20)
    assert report.faults == []
    assert report.num_gradings > 10_000 and {"right", "wrong"} <= report.statuses.keys()


@pytest.mark.parametrize(("deed", "fault"), [("loop", "deadline: no verdict"), ("exit", "crash: the worker died"),
                                             ("raise", "raised: LookupError")])
def test_a_verifier_that_breaks_is_seen(deed: str, fault: str) -> None:
    report = fuzz.Report()
    with VerifierService([Kind("behave", verifier_kinds.behave, 0.3)], num_workers=1) as service:
        requests = [("behave", {"do": "good", "answer": "", "text": ""}),
                    ("behave", {"do": deed, "answer": "5", "text": "\\boxed{5}"})]
        fuzz.grade(service, random.Random(0), requests, report)
    assert len(report.faults) == 1 and report.faults[0].startswith(fault) and "boxed" in report.faults[0]


def test_a_verdict_that_changes_is_seen() -> None:
    report, rng = fuzz.Report(), random.Random(0)
    with VerifierService([Kind("where", verifier_kinds.where_now, 5.0)], num_workers=1) as service:
        fuzz.grade(service, rng, [("where", {"answer": "", "text": str(i)}) for i in range(100)], report)
    assert report.faults and "and then" in report.faults[0]


def test_growth_is_seen_and_a_little_of_it_allowed() -> None:
    before = {"worker 1": 100 << 20, "this process": 100 << 20, "files": 10, "threads": 5}
    assert fuzz.growth(before, before | {"worker 1": 150 << 20, "files": 12}) == []
    assert len(fuzz.growth(before, before | {"worker 1": 170 << 20, "files": 20, "threads": 9})) == 3


def test_mutations_follow_from_the_seed_and_do_change_texts() -> None:
    texts = fuzz.corpus()
    draws = [[fuzz.request(random.Random(seed), texts, True) for _ in range(3)] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    originals = {text for _, _, text in texts}
    rng = random.Random(3)
    assert sum(fuzz.request(rng, texts, True)[1]["text"] in originals for _ in range(100)) < 20
