"""bench/rollout.py: what it reports, and that it refuses decoders that do not agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import rollout, train_step


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_step.WORKLOADS, "W1", (2, 4, 3, 6))
    monkeypatch.setattr(rollout, "gemm_rates", lambda device: {"float32": 100.0, "bfloat16": 200.0})


def test_every_decoder_that_can_run_is_timed_on_the_same_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rollout.main(["--dtype", "float32", "--rounds", "1", "--warmup", "0", "--json", str(tmp_path / "r.json")])
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["decoders"][-1]["decoder"] == "ops" and record["dtype"] == "float32"
    for row in record["decoders"]:
        assert row["rollout_tok_s"] == pytest.approx(2 * 3 * 6 / row["rollout_s"])
        assert row["percent_of_gemm"] == pytest.approx(row["gflops"])  # of 100
    assert "rollout_tok_s" in capsys.readouterr().out


def test_decoders_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch):
    measure = rollout.measure
    if rollout.native_why_not(train_step.workload_session(train_step.workload_config("W1", "float32", "cpu"), "W1").model):
        pytest.skip("native kernels: not built here")

    def differing(session: object, decoder: str, *rest: int) -> object:
        row, groups = measure(session, decoder, *rest)  # type: ignore[arg-type]
        return row, groups[: 1 if decoder == "ops" else 2]

    monkeypatch.setattr(rollout, "measure", differing)
    with pytest.raises(SystemExit, match="drew different tokens"):
        rollout.main(["--dtype", "float32", "--rounds", "1", "--warmup", "0"])


def test_a_decoder_that_cannot_run_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rollout, "native_why_not", lambda model: "not built here")
    with pytest.raises(SystemExit, match="no native decoder here: not built here"):
        rollout.main(["--decoder", "native"])
