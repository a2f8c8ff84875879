"""The verifier service: no request can hang, crash or flood it, or outlive it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from reason_rl.answers.verdict import RIGHT, Verdict, ungradable
from reason_rl.config import RewardConfig
from reason_rl.reward.grade import reward_kinds
from reason_rl.reward.pool import worker
from reason_rl.reward.pool.handle import Lost, WorkerProcess
from reason_rl.reward.pool.service import Kind, VerifierService
from tests.reason_rl.reward import verifier_kinds

ROOT = Path(__file__).resolve().parents[3]
ECHO = Kind("echo", verifier_kinds.echo, deadline_s=10.0)
BEHAVE = Kind("behave", verifier_kinds.behave, deadline_s=0.3, memory_bytes=1 << 30)


def is_alive(pid: int) -> bool:
    """A zombie is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(holds, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(holds())


def test_verdicts_come_back_in_the_order_of_the_requests() -> None:
    with VerifierService([ECHO], num_workers=2) as service:
        verdicts = service.grade("echo", [{"x": x} for x in range(1000)])
    assert [v.value for v in verdicts] == list(range(1000))
    assert verdicts[0].status == "wrong" and {v.status for v in verdicts[1:]} == {"right"}


def test_options_reach_the_function() -> None:
    with VerifierService([Kind("echo", verifier_kinds.echo, 10.0, options={"plus": 0.5})]) as service:
        assert service.grade("echo", [{"x": 1}])[0].value == 1.5


def test_a_worker_is_a_fresh_interpreter_without_torch_and_without_the_trainers_files() -> None:
    extra = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
    with VerifierService([Kind("where", verifier_kinds.where, 10.0)], num_workers=1) as service:
        parts = service.grade("where", [{}])[0].parts
        assert service.worker_pids() == [parts["pid"]]
    for fd in extra:
        os.close(fd)
    assert (parts["torch"], parts["main_thread"], parts["leads_group"]) == (0, 1, 1)
    assert parts["files"] <= 7  # the three standard ones, connection, progress, its mapping's copy, and the listing itself


def test_the_kinds_functions_do_without_torch_and_numpy() -> None:
    """A worker starts in a tenth of a second and takes about 20 MB; torch alone would take ten times that."""
    kinds = {kind.name: kind for kind in reward_kinds(RewardConfig(custom="bench.rewards:distinct_characters", model="a folder"))}
    light = [kind.function.__module__ for name, kind in kinds.items() if name != "model"]
    assert len(light) == 5

    def modules_of(*names: str) -> set[str]:
        program = f"import sys, {worker.__name__}, {', '.join(names)}; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
        return set(done.stdout.split())

    heavy = {"torch", "numpy", "sympy"}
    assert not heavy & modules_of(*light, "reason_rl.records")
    assert "torch" in modules_of(kinds["model"].function.__module__)


@pytest.mark.parametrize(("deed", "cause", "words"), [
    ("loop", "deadline", "no verdict within 0.3 s"), ("hang deaf", "deadline", "the worker was killed"),
    ("swallow", "deadline", "the worker was killed"), ("exit", "crash", "exit status 0"), ("kill", "crash", "signal SIGKILL"),
    ("segfault", "crash", "signal SIGSEGV"), ("sys.exit", "raised", "SystemExit: bye"), ("memory", "memory", "memory limit"),
    ("raise", "raised", "LookupError: nothing there"), ("no verdict", "raised", "returns a Verdict, got NoneType"),
    ("nan", "not_finite", "returned nan"),
])
def test_what_goes_wrong_is_ungradable_and_touches_no_other_request(deed: str, cause: str, words: str) -> None:
    with VerifierService([BEHAVE], num_workers=1) as service:
        good, bad = {"do": "good"}, {"do": deed}
        verdicts = service.grade("behave", [good, good, bad, good, good])
        metrics = service.take_metrics()
    assert [v.status for v in verdicts] == ["right", "right", "ungradable", "right", "right"]
    assert verdicts[2].cause == cause and words in verdicts[2].detail and verdicts[2].value == 0.0
    assert metrics[f"ungradable/{cause}"] == 1 and metrics["gradings"] == 5
    assert metrics["worker_restarts"] == (cause == "crash" or "killed" in words)
    assert metrics["deadlines_met"] == pytest.approx(0.8 if cause == "deadline" else 1.0)


def test_a_function_that_closes_the_trainers_connection_ends_no_more_than_its_batch() -> None:
    with VerifierService([BEHAVE], num_workers=1) as service:
        verdicts = service.grade("behave", [{"do": "good"}, {"do": "close"}, {"do": "good"}])
        assert "crash" in {v.cause for v in verdicts} <= {"", "crash"}
        assert service.grade("behave", [{"do": "good"}])[0].status == "right"


@pytest.mark.parametrize("garbage", [b"no json!!", b"[[1,2,3]]", b"{\"a\": 1}", b"[1,2,3,4]", b"[[],[],[]"])
def test_a_message_that_is_not_a_verdict_ends_the_worker(garbage: bytes) -> None:
    with VerifierService([Kind("behave", verifier_kinds.behave, 30.0)], num_workers=1) as service:
        verdicts = service.grade("behave", [{"do": "forge", "bytes": garbage}, {"do": "good"}])
    assert [v.status for v in verdicts] == ["ungradable", "right"] and verdicts[0].cause == "crash"


def test_a_request_that_cannot_be_sent_is_ungradable() -> None:
    with VerifierService([ECHO], num_workers=1) as service:
        verdicts = service.grade("echo", [{"x": 1}, {"x": lambda: 1}, {"x": threading.Lock()}, {"x": 2}])
        metrics = service.take_metrics()
    assert [v.status for v in verdicts] == ["right", "ungradable", "ungradable", "right"]
    assert "cannot be sent" in verdicts[1].detail and metrics["ungradable/raised"] == 2


def test_a_machine_without_a_free_process_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*given: object, **more: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with VerifierService([ECHO], num_workers=1) as service:
        monkeypatch.setattr(subprocess, "Popen", none_left)
        verdict = service.grade("echo", [{"x": 1}])[0]
        assert verdict.cause == "start" and "Resource temporarily unavailable" in verdict.detail
        monkeypatch.undo()
        assert service.grade("echo", [{"x": 1}])[0].status == "right"


def test_a_mistake_in_the_service_itself_leaves_no_request_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: WorkerProcess, requests: list[bytes]) -> Iterator[Verdict]:
        yield RIGHT
        raise KeyError("nobody thought of this")

    with VerifierService([ECHO], num_workers=1) as service:
        assert service.grade("echo", [{"x": 1}])[0].status == "right"
        (pid,) = service.worker_pids()
        with monkeypatch.context() as patch:
            patch.setattr(WorkerProcess, "grade", fails)
            futures = [service.submit("echo", {"x": x}) for x in range(50)]
            verdicts = [future.result(timeout=10) for future in futures]
        assert {v.cause for v in verdicts} == {"", "crash"} and "nobody thought of this" in verdicts[-1].detail + verdicts[1].detail
        assert [v.value for v in service.grade("echo", [{"x": 1}, {"x": 2}])] == [1, 2]
        assert not is_alive(pid)


def test_a_machine_without_a_free_thread_is_reported_and_the_service_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with VerifierService([ECHO], num_workers=2) as service:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", none_left)
            verdict = service.submit("echo", {"x": 1}).result(timeout=10)
            assert verdict.cause == "start" and "can't start new thread" in verdict.detail
        assert service.grade("echo", [{"x": 1}])[0].status == "right"
        with monkeypatch.context() as patch:  # one thread exists, and does the work of two
            patch.setattr(threading.Thread, "start", none_left)
            assert [v.value for v in service.grade("echo", [{"x": x} for x in range(100)])] == list(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with VerifierService([ECHO]) as service:
            service.submit("echo", {"x": 1})


def test_the_wait_for_a_silent_service_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("START_DEADLINE_S", 0.0), ("GRACE_S", 0.0), ("SLACK_S", 1.0)):
        monkeypatch.setattr(f"reason_rl.reward.pool.service.{name}", seconds)
    kind = Kind("behave", verifier_kinds.behave, deadline_s=0.5, batch=1)
    with VerifierService([kind], num_workers=1) as service:  # slow, yet alive: together the naps are longer than it would wait
        service.submit("behave", {"do": "good"}).result(timeout=60)
        assert {v.status for v in service.grade("behave", [{"do": "nap", "s": 0.3}] * 8)} == {"right"}
    monkeypatch.setattr("reason_rl.reward.pool.service._serve", lambda *given: time.sleep(3.0))
    with VerifierService([kind], num_workers=1) as service:
        (verdict,) = service.grade("behave", [{"do": "good"}])
        assert verdict.cause == "stalled" and "no verdict of the kind 'behave' in" in verdict.detail


def test_a_worker_that_died_while_idle_is_no_requests_fault() -> None:
    with VerifierService([ECHO], num_workers=1) as service:
        for _ in range(5):
            assert [v.value for v in service.grade("echo", [{"x": 1}, {"x": 2}, {"x": 3}])] == [1, 2, 3]
            (pid,) = service.worker_pids()
            os.kill(pid, signal.SIGKILL)
            assert wait_until(lambda pid=pid: not is_alive(pid))
        assert service.take_metrics()["worker_restarts"] == 4


def test_requests_whose_workers_are_lost_before_they_begin_are_tried_twice_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def lost(self: WorkerProcess, requests: list[bytes]) -> Iterator[Lost]:
        tries.append(len(requests))
        yield Lost(-1, ungradable("crash", "the worker died: signal SIGKILL"))

    monkeypatch.setattr(WorkerProcess, "grade", lost)
    with VerifierService([ECHO], num_workers=1) as service:
        futures = [service.submit("echo", {"x": x}) for x in range(3)]
        assert {future.result(timeout=30).cause for future in futures} == {"crash"}
    assert sum(tries) == 6


def test_a_kinds_preparation_counts_for_no_requests_deadline() -> None:
    kind = Kind("where", verifier_kinds.where, deadline_s=0.5, prepare=time.sleep)
    with VerifierService([kind]) as service:  # sleep() without its argument
        assert service.grade("where", [{}])[0].detail.startswith("TypeError: ")
    slow = Kind("prepared", verifier_kinds.prepared, deadline_s=0.5, prepare=verifier_kinds.prepare, options={"seconds": 1.2})
    with VerifierService([slow], num_workers=1) as service:
        assert [v.value for v in service.grade("prepared", [{}, {}])] == [1, 1]


def test_a_functions_output_is_not_a_verdict() -> None:
    with VerifierService([BEHAVE], num_workers=1) as service:
        assert [v.status for v in service.grade("behave", [{"do": "print"}, {"do": "raise"}])] == ["right", "ungradable"]


def test_a_deadline_is_each_requests_own() -> None:
    """Ten naps, together far beyond it."""
    with VerifierService([BEHAVE], num_workers=1) as service:
        assert {v.status for v in service.grade("behave", [{"do": "nap", "s": 0.1}] * 10)} == {"right"}


def test_a_worker_that_is_ended_takes_its_children_along(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with VerifierService([BEHAVE], num_workers=1) as service:
        future = service.submit("behave", {"do": "child", "note": str(note)})
        assert wait_until(lambda: note.exists() and note.read_text())
    assert future.result(timeout=5).status == "ungradable"
    assert wait_until(lambda: not is_alive(int(note.read_text())))


def test_a_function_that_a_worker_cannot_import_is_refused_at_once() -> None:
    with pytest.raises(AttributeError, match="local object"):
        Kind("inner", lambda request: RIGHT, 1.0)


def test_a_module_that_a_worker_cannot_import_is_reported_and_not_retried_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = types.ModuleType("gone_by_then")
    exec("def f(request): pass", gone.__dict__)
    monkeypatch.setitem(sys.modules, "gone_by_then", gone)
    with VerifierService([Kind("gone", gone.f, 1.0)]) as service:
        for verdict in service.grade("gone", [{}, {}]):
            assert verdict.cause == "start" and verdict.detail == "ModuleNotFoundError: No module named 'gone_by_then'"


def test_the_queue_is_bounded_and_the_caller_waits() -> None:
    with VerifierService([Kind("behave", verifier_kinds.behave, 5.0, batch=1)], num_workers=1, max_queued=3) as service:
        start = time.monotonic()
        futures = [service.submit("behave", {"do": "nap", "s": 0.1}) for _ in range(10)]
        assert time.monotonic() - start > 0.4  # six of them had to end before the last could be submitted
        assert {f.result().status for f in futures} == {"right"}
        assert service.take_metrics()["queue_peak"] == 3


def test_workers_of_a_kind_run_in_parallel() -> None:
    with VerifierService([Kind("behave", verifier_kinds.behave, 5.0, batch=1, num_workers=4)], num_workers=1) as service:
        service.grade("behave", [{"do": "nap", "s": 0.2}] * 4)  # all four are started
        start = time.monotonic()
        service.grade("behave", [{"do": "nap", "s": 0.5}] * 4)
        assert time.monotonic() - start < 1.5  # one after the other they take 2 s
        assert len(service.worker_pids()) == 4


def test_no_process_and_no_thread_stays_behind() -> None:
    before = threading.active_count()
    service = VerifierService([ECHO, BEHAVE])
    service.grade("echo", [{"x": 1}] * 10)
    waiting = [service.submit("behave", {"do": "hang deaf"}) for _ in range(4)]
    assert wait_until(lambda: len(service.worker_pids()) >= 3)
    pids = service.worker_pids()
    service.close()
    assert not any(map(is_alive, pids)) and threading.active_count() == before
    assert {f.result(timeout=5).status for f in waiting} == {"ungradable"}
    with pytest.raises(ValueError, match="is closed"):
        service.submit("echo", {"x": 1})


def test_a_service_without_references_ends_its_workers() -> None:
    service = VerifierService([ECHO], num_workers=1)
    service.grade("echo", [{"x": 1}])
    (pid,) = service.worker_pids()
    del service
    gc.collect()
    assert wait_until(lambda: not is_alive(pid))


def test_it_works_off_the_main_thread() -> None:
    found = []

    def work() -> None:
        with VerifierService([BEHAVE], num_workers=1) as service:
            found.extend(service.grade("behave", [{"do": "good"}, {"do": "loop"}, {"do": "good"}]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=30)
    assert [v.cause for v in found] == ["", "deadline", ""]


PARENT = """
import sys, time
from reason_rl.reward.pool.service import Kind, VerifierService
from tests.reason_rl.reward import verifier_kinds
service = VerifierService([Kind("behave", verifier_kinds.behave, 60.0), Kind("idle", verifier_kinds.echo, 60.0)], num_workers=1)
service.grade("idle", [{"x": 1}])
service.grade("behave", [{"do": "good"}])
service.submit("behave", {"do": sys.argv[1]})
time.sleep(0.2)
print(*service.worker_pids(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("deed", ["loop", "hang deaf"])
def test_workers_die_with_their_parent_even_when_it_is_killed(deed: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, deed], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(is_alive, pids))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert wait_until(lambda: not any(map(is_alive, pids)))


def test_the_rate_counts_only_the_time_in_which_something_was_asked_for() -> None:
    with VerifierService([Kind("behave", verifier_kinds.behave, 5.0)], num_workers=1) as service:
        service.grade("behave", [{"do": "good"}])
        service.take_metrics()
        service.grade("behave", [{"do": "nap", "s": 0.05}] * 4)
        time.sleep(0.5)
        metrics = service.take_metrics()
        assert metrics["gradings"] == 4 and 10 < metrics["gradings_per_s"] <= 20.5
        assert service.take_metrics() == {"gradings": 0.0, "gradings_per_s": 0.0, "deadlines_met": 1.0, "worker_restarts": 0.0,
                                          "queue_peak": 0.0}


def test_wrong_names_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one of the kinds \['echo'\], got 'ecco'"), VerifierService([ECHO]) as service:
        service.submit("ecco", {})
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 4096"):
        VerifierService([ECHO], num_workers=0)
