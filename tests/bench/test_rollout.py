"""bench/rollout.py: its report, and its refusal of decoders that do not agree."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from bench import rollout, train_step
from bench.workloads import workload_config

QUICK = ["--dtype", "float32", "--rounds", "1", "--warmup", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_step.WORKLOADS, "W1", (2, 4, 3, 6))
    monkeypatch.setattr(rollout, "gemm_gflops", lambda dtype, device: 100.0)


def test_a_decoder_is_timed_and_what_it_drew_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rollout.main([*QUICK, "--decoder", "ops", "--json", str(tmp_path / "r.json")])
    (row,) = json.loads((tmp_path / "r.json").read_text())["decoders"]
    assert row["decoder"] == "ops" and row["dtype"] == "float32" and len(row["drawn_sha256"]) == 64
    assert row["rollout_tok_s"] == pytest.approx(2 * 3 * 6 / row["rollout_s"])
    assert row["percent_of_gemm"] == pytest.approx(row["gflops"])  # of 100
    assert row["peak_mb"] >= row["startup_mb"] > 0
    assert "rollout_tok_s" in capsys.readouterr().out


def fake_rows(digests: dict[str, str]) -> object:
    def child(command: list[str]) -> dict[str, object]:
        decoder = command[command.index("--decoder") + 1]
        return {"decoders": [{"decoder": decoder, "drawn_sha256": digests[decoder]}]}
    return child


def test_each_decoder_runs_in_a_separate_process_and_they_must_agree(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rollout, "cpu_unsupported_reason", lambda device: "")
    monkeypatch.setattr(rollout, "run_child", fake_rows({"native": "a", "ops": "a"}))
    rows = rollout.measure_each(argparse.Namespace(workload="W1", dtype="float32", device="cpu", rounds=1, warmup=0))
    assert [row["decoder"] for row in rows] == ["native", "ops"]
    monkeypatch.setattr(rollout, "run_child", fake_rows({"native": "a", "ops": "b"}))
    with pytest.raises(SystemExit, match="drew different tokens"):
        rollout.main(QUICK)


def test_without_native_kernels_the_reason_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(rollout, "cpu_unsupported_reason", lambda device: "not built here")
    monkeypatch.setattr(rollout, "run_child", fake_rows({"ops": "a"}))
    rollout.main(QUICK)
    assert "native: not built here" in capsys.readouterr().out


def test_on_a_gpu_graphs_of_whole_steps_are_timed_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(rollout, "run_child", fake_rows({"ops": "a", "graphs": "a"}))
    rows = rollout.measure_each(argparse.Namespace(workload="W1", dtype="float32", device="cuda", rounds=1, warmup=0))
    assert [row["decoder"] for row in rows] == ["ops", "graphs"]
    assert workload_config("W1", "float32", "cuda", with_graphs=True).engine.cuda_graph_batch == 2 * 3
    with pytest.raises(SystemExit):
        rollout.main([*QUICK, "--decoder", "graphs"])
    assert "cannot go with --device cpu" in capsys.readouterr().err
