"""csrc/sample/select.h, the GPU's selection without a sort, run by host threads, draws the reference's tokens."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.kernels.compare import same_bits
from tests.kernels.sample_cases import KINDS, OPTIONS, Drawn, assert_drawn_alike, make_logits, make_noise, reference

ROOT = Path(__file__).resolve().parent.parent.parent
COMPILER = shutil.which("c++") or ""
pytestmark = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("select") / "select_host.so"
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    source = str(ROOT / "tests/kernels/select_host.cpp")
    subprocess.run([COMPILER, *flags, f"-I{ROOT / 'csrc'}", source, "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def drawn(library: ctypes.CDLL, logits: torch.Tensor, num_threads: int = 2, temperature: float = 1.0, top_k: int = 0,
          top_p: float = 1.0, min_p: float = 0.0) -> Drawn:
    rows, vocab = logits.shape
    keys, positions = make_noise(rows)
    token, logprob, kept = torch.empty(rows, dtype=torch.int64), torch.empty(rows), torch.empty(rows)
    number, real = ctypes.c_int64, ctypes.c_double

    def at(tensor: torch.Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    library.sample_on_host(at(logits), number(rows), number(vocab), at(keys), at(positions), real(temperature), number(top_k),
                           real(top_p), real(min_p), number(num_threads), at(token), at(logprob), at(kept))
    return token, logprob, kept


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_the_references(kind: str, options: dict[str, float], library: ctypes.CDLL):
    for num_rows, vocab in ((20, 123), (6, 1000), (1, 1), (5, 3)):
        logits = make_logits(kind, num_rows, vocab)
        assert_drawn_alike(drawn(library, logits, **options), reference(logits, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_every_top_k_from_one_to_all_is_the_references(kind: str, library: ctypes.CDLL):
    logits = make_logits(kind, 3, 17)
    for k in range(1, 19):
        got = drawn(library, logits, top_k=k)
        assert_drawn_alike(got, reference(logits, top_k=k))
        assert k < 17 or (got[2] == 0).all(), "without truncation the kept mass is exactly 1"


@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_p": 0.95}, {"top_k": 5000, "top_p": 0.99, "min_p": 1e-4}], ids=str)
def test_a_large_vocabulary_draws_the_references_tokens(options: dict[str, float], library: ctypes.CDLL):
    for kind in ("random", "ties"):
        logits = make_logits(kind, 2, 151_936)
        assert_drawn_alike(drawn(library, logits, **options), reference(logits, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS[-7:], ids=str)
def test_the_number_of_threads_changes_the_log_sums_rounding_alone(options: dict[str, float], library: ctypes.CDLL):
    logits = make_logits("ties", 3, 300)
    alone = drawn(library, logits, 1, **options)  # type: ignore[arg-type]
    for num_threads in (2, 8):
        together = drawn(library, logits, num_threads, **options)  # type: ignore[arg-type]
        assert_drawn_alike(together, alone)
        assert all(same_bits(a, b) for a, b in zip(together, drawn(library, logits, num_threads, **options), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -3e38])
def test_broken_logits_are_reported_and_the_other_rows_are_drawn(bad: float, library: ctypes.CDLL):
    logits = make_logits("random", 4, 50)
    want = reference(logits)[0]
    logits[2, 7], logits[2, 8] = bad, 3e38 if bad == -3e38 else 0.0
    token = drawn(library, logits)[0]
    assert token[2] == -1 and torch.equal(token[[0, 1, 3]], want[[0, 1, 3]])
