"""bench/harness.py: its record of the machine, its output, and its arithmetic."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import harness

GIT = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull} | {
    f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
}


def test_the_setting_names_device_versions_threads_and_dtype_and_is_json():
    torch.set_num_threads(1)
    setting = harness.describe_setting("cpu", torch.bfloat16)
    assert setting["device"] == "cpu" and setting["dtype"] == "bfloat16" and setting["threads"] == 1
    assert setting["torch"] == torch.__version__ and setting["device_name"] and setting["cores"] >= 1
    assert json.loads(json.dumps(setting)) == setting


def test_the_cpu_name_is_the_first_model_name_of_cpuinfo(tmp_path: Path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel\t\t: 85\nmodel name\t: Some CPU @ 2.0: GHz\nmodel name\t: Other\n")
    assert harness.cpu_name(cpuinfo) == "Some CPU @ 2.0: GHz"
    assert harness.cpu_name(tmp_path / "absent")  # some other word, but never empty


def test_the_commit_is_the_full_hash_and_says_when_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | GIT).stdout.strip()

    monkeypatch.delenv("REASON_RL_COMMIT", raising=False)
    assert harness.commit(tmp_path) == "unknown"
    monkeypatch.setenv("REASON_RL_COMMIT", "abc")
    assert harness.commit(tmp_path) == "abc"
    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag does not replace the hash")
    assert harness.commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert harness.commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


@pytest.mark.parametrize(("arguments", "target"), [([], None), (["--json"], "-"), (["--json", "out.json"], "out.json")])
def test_json_is_off_then_stdout_then_a_file(arguments: list[str], target: str | None):
    parser = argparse.ArgumentParser()
    harness.add_json_option(parser)
    assert parser.parse_args(arguments).json == target


def test_json_without_a_file_is_one_line_last_on_stdout(capsys: pytest.CaptureFixture[str]):
    print("a table\nof words")
    harness.write_json({"step_s": 0.5, "note": "two\nlines"}, "-")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"step_s": 0.5, "note": "two\nlines"}


def test_json_with_a_file_writes_there_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "results" / "cpu.json"
    harness.write_json({"step_s": 0.5}, str(target))
    assert json.loads(target.read_text()) == {"step_s": 0.5}
    harness.write_json({"step_s": 0.5}, None)
    assert capsys.readouterr().out == ""


def test_a_nan_is_refused_and_leaves_the_old_file(tmp_path: Path):
    target = tmp_path / "cpu.json"
    target.write_text("old")
    with pytest.raises(ValueError):
        harness.write_json({"step_s": float("nan")}, str(target))
    assert target.read_text() == "old"


def test_spread_by_hand():
    assert harness.spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    assert harness.spread([7.0]) == {"median": 7.0, "p20": 7.0, "p80": 7.0}
    with pytest.raises(ValueError, match="at least one value"):
        harness.spread([])


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_spread_agrees_with_torch_quantile(values: list[float]):
    got = harness.spread(values)
    want = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    # Same formula, possibly with its float64 operations in another order: a few units in the last place of 1e6.
    torch.testing.assert_close(torch.tensor([got["p20"], got["median"], got["p80"]], dtype=torch.float64), want,
                               rtol=1e-12, atol=1e-9)


def test_time_calls_counts_only_the_repeats_after_the_warm_up():
    calls = []
    seconds = harness.time_calls(lambda: calls.append(1), repeats=3, warmup=2)
    assert len(calls) == 5 and len(seconds) == 3 and all(s >= 0 for s in seconds)


def test_gemm_rate_is_flops_over_the_best_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(harness, "time_calls", lambda call, repeats: (call(), [0.5, 0.25, 1.0])[1])
    assert harness.gemm_gflops(torch.bfloat16, size=100) == 2 * 100**3 / 0.25 / 1e9


def test_peak_memory_is_in_bytes_and_sees_what_this_process_allocated_and_not_its_parent():
    code = ("from bench.harness import peak_rss_bytes as peak; import torch; before = peak(); "
            "x = torch.ones(64 * 2**20, dtype=torch.uint8); print(peak() - before)")
    out = subprocess.run([sys.executable, "-c", code], cwd=harness.CHECKOUT, capture_output=True, text=True, check=True)
    # 64 MiB were written, less than this parent holds. The peak at start-up may hide some; the allocator may add some.
    assert 48 * 2**20 < int(out.stdout) < 128 * 2**20
