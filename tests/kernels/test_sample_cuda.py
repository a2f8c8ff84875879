"""sample on a GPU (csrc/sample/cuda.cu) against the reference on the CPU; with nvcc alone, its resources on each
architecture."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kernels import native
from kernels.sample import OP, make_inputs, sample
from kernels.sample.reference import sample_reference
from tests.kernels.compare import same_bits
from tests.kernels.sample_cases import KINDS, OPTIONS, Drawn, assert_drawn_alike, make_logits, make_noise, reference

ROOT = Path(__file__).resolve().parent.parent.parent
RECORD = ROOT / "bench/results/cuda_resources.json"
SHARED_LIMITS = {"80": 166_912, "90": 232_448, "100": 232_448}
CUDA = torch.device("cuda")


# --- without a GPU


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_the_kernels_spill_nothing_and_use_the_recorded_resources():
    """After a change of the kernel, replace the record by the text of the error."""
    recorded = json.loads(RECORD.read_text())
    release = re.search(r"release (\S+),", subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout)
    found: dict[str, dict[str, dict[str, int]]] = {}
    for source in sorted((ROOT / "csrc").rglob("*.cu")):
        rows = found[source.relative_to(ROOT).as_posix()] = {}
        for architecture, limit in SHARED_LIMITS.items():
            flags = ["-std=c++20", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", "-o", "/dev/null"]
            done = subprocess.run(["nvcc", *flags, str(source)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "warning" not in done.stderr, done.stderr
            spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
            assert spills and all(spill == ("0", "0", "0") for spill in spills), done.stderr
            [registers], [shared] = re.findall(r"Used (\d+) registers", done.stderr), re.findall(r"(\d+) bytes smem", done.stderr)
            assert int(shared) <= limit
            rows[f"sm_{architecture}"] = {"registers": int(registers), "shared_bytes": int(shared)}
    if not release or release[1] != recorded["nvcc"]:
        pytest.skip(f"no spills, but the record is of nvcc {recorded['nvcc']}")
    assert found == recorded["kernels"], json.dumps({"nvcc": release[1], "kernels": found}, indent=1)


def test_it_is_never_the_automatic_choice_and_gives_its_reason():
    [cuda] = [i for i in OP.implementations if i.name == "cuda"]
    assert not cuda.is_automatic
    assert cuda.refusal(torch.device("cpu"), torch.float32) == "CUDA only"
    assert cuda.refusal(CUDA, torch.float64) == "not for f64"
    with pytest.raises(ValueError, match="sample: impl='cuda' cannot run on cpu: CUDA only"):
        sample(**make_inputs(2, 4, 6, torch.float32), impl="cuda")
    if not torch.cuda.is_available():
        assert native.cuda_unsupported_reason(CUDA) == "no CUDA device"


@pytest.mark.skipif(not (native.FOLDER / "_native_cuda.so").is_file(), reason="the CUDA library was not built here")
def test_the_op_refuses_tensors_that_are_not_on_a_gpu():
    """The library loads without a driver; the op has no CPU implementation."""
    torch.ops.load_library(str(native.FOLDER / "_native_cuda.so"))
    empty = torch.empty(2)
    with pytest.raises(NotImplementedError, match="sample_cuda"):
        native.OPS.sample_cuda(empty, empty, empty, empty, torch.empty(2, 3), empty, empty, 1.0, 0, 1.0, 0.0, 0)


# --- on a GPU


@pytest.fixture
def needs_library() -> None:
    if reason := native.cuda_unsupported_reason(CUDA):
        pytest.skip(reason)


gpu = [pytest.mark.gpu, pytest.mark.usefixtures("needs_library")]


def on_gpu(logits: torch.Tensor, **options: float) -> Drawn:
    """As `reference`: one hidden state a row, the rows as weight."""
    keys, positions = make_noise(len(logits))
    inputs = (torch.eye(len(logits)), logits.T.contiguous(), keys, positions)
    token, logprob, kept = sample(*(x.cuda() for x in inputs), **options, impl="cuda")  # type: ignore[arg-type]
    return token.cpu(), logprob.cpu(), kept.cpu()


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_draws_are_the_references(self, kind: str, options: dict[str, float]):
        for num_rows, vocab in ((40, 123), (12, 1000), (1, 1), (5, 3), (4, 32_000), (2, 151_936)):
            logits = make_logits(kind, num_rows, vocab)
            assert_drawn_alike(on_gpu(logits, **options), reference(logits, **options))  # type: ignore[arg-type]

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_top_k_from_one_to_all_is_the_references(self, kind: str):
        logits = make_logits(kind, 3, 47)
        for k in range(1, 49):
            assert_drawn_alike(on_gpu(logits, top_k=k), reference(logits, top_k=k))

    @pytest.mark.parametrize("k", [1, 2, 1000, 151_935, 151_936, 151_937])
    def test_any_top_k_of_a_large_vocabulary_is_the_references(self, k: int):
        for kind in ("random", "ties"):
            logits = make_logits(kind, 3, 151_936)
            assert_drawn_alike(on_gpu(logits, top_k=k), reference(logits, top_k=k))

    def test_bf16_logits_are_summed_in_float32(self):
        inputs = make_inputs(64, 128, 1000, torch.bfloat16)
        got = sample(**{name: x.cuda() for name, x in inputs.items()}, top_p=0.9, impl="cuda")
        want = sample_reference(*inputs.values(), 1.0, 0, 0.9, 0.0)
        same = got[0].cpu() == want[0]  # two sums of 128 products in different orders: a near tie may be decided differently
        assert int(same.sum()) >= 63
        torch.testing.assert_close(got[1].cpu()[same], want[1][same], rtol=1e-5, atol=1e-5)

    def test_rows_in_several_chunks_and_two_runs_have_the_same_bits(self, monkeypatch: pytest.MonkeyPatch):
        logits = make_logits("ties", 33, 777)
        whole = on_gpu(logits, top_p=0.8)
        assert all(same_bits(a, b) for a, b in zip(whole, on_gpu(logits, top_p=0.8), strict=True))
        monkeypatch.setattr("kernels.sample.cuda.CHUNK_BYTES", 5 * 4 * 777)
        assert all(same_bits(a, b) for a, b in zip(whole, on_gpu(logits, top_p=0.8), strict=True))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_broken_logits_raise_and_name_the_row(self, bad: float):
        inputs = {name: x.cuda() for name, x in make_inputs(5, 4, 6, torch.float32).items()}
        inputs["hidden"][3, 2] = bad
        with pytest.raises(ValueError, match="the logits of row 3 hold NaN or inf"):
            sample(**inputs, impl="cuda")

    def test_no_rows_give_no_tokens(self):
        inputs = {name: x.cuda() for name, x in make_inputs(0, 8, 12, torch.float32).items()}
        assert [len(x) for x in sample(**inputs, top_k=2, impl="cuda")] == [0, 0, 0]

    def test_bad_arguments_of_the_op_are_named(self):
        good = {"token": torch.empty(2, dtype=torch.int64), "logprob": torch.empty(2), "kept_logmass": torch.empty(2),
                "is_broken": torch.empty(2, dtype=torch.bool), "logits": torch.zeros(2, 9),
                "keys": torch.zeros(2, dtype=torch.int64), "positions": torch.zeros(2, dtype=torch.int64)}
        good = {name: x.cuda() for name, x in good.items()}
        for name, bad in [("token", good["logprob"]), ("logprob", good["logprob"][:1]), ("keys", good["keys"].cpu()),
                          ("positions", good["keys"].int()), ("logits", torch.zeros(9, 2).cuda().t())]:
            with pytest.raises(RuntimeError, match=f"sample_cuda: {name} must be"):
                native.OPS.sample_cuda(*{**good, name: bad}.values(), 1.0, 0, 1.0, 0.0, 0)
        columns = 2**31 - 4097
        with pytest.raises(RuntimeError, match=f"logits have 0 rows of {columns + 1}: needs 1 to {columns} columns"):
            native.OPS.sample_cuda(*{**good, "logits": torch.zeros(0, columns + 1).cuda()}.values(), 1.0, 0, 1.0, 0.0, 0)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_tensors_of_another_gpu_are_refused(self):
        rows = torch.zeros(2, dtype=torch.int64).cuda()
        floats, is_broken, logits = torch.empty(2).cuda(), torch.empty(2, dtype=torch.bool).cuda(), torch.zeros(2, 9).cuda()
        with pytest.raises(RuntimeError, match=r"sample_cuda: keys must be .* on cuda:0, got .* on another device"):
            native.OPS.sample_cuda(rows, floats, floats, is_broken, logits, rows.to("cuda:1"), rows, 1.0, 0, 1.0, 0.0, 0)
