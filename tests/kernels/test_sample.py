"""sample: known answers of its Philox, the drawn distribution, the kept sets by brute force, and draws that ignore the batch."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.linear_logprob import linear_logprob
from kernels.sample import OP, check_tokens, make_inputs, sample
from kernels.sample.philox import gumbel, philox, uniform
from kernels.sample.reference import truncation_mask
from kernels.triton_ops import IS_INTERPRETED
from tests.kernels.compare import NUM_ROWS, ROWS, assert_rows_keep_their_bits, same_bits
from tests.kernels.implementations import CPU, CUDA, CUDA_ONLY, each_implementation
from tests.kernels.sample_cases import KINDS, assert_drawn_alike, exact_inputs, make_logits, make_noise, reference

implementation = each_implementation(OP)

F32, BF16 = torch.float32, torch.bfloat16
MANY = 500 if IS_INTERPRETED else 40_000
"""Draws for a statistic: the interpreter takes a second for them."""

# philox4x32-10 of the Random123 distribution's kat_vectors: counter (4 words), key (2 words), result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def chi_square_bound(degrees: int) -> float:
    """Exceeded by chance once in a million: Wilson and Hilferty's approximation at 4.75 standard deviations."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 4.75 * math.sqrt(spread)) ** 3


def from_logits(logits: torch.Tensor, num_rows: int, **options: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """num_rows draws from one row of logits, each with a different key."""
    hidden = torch.ones(num_rows, 1)
    keys, positions = torch.arange(num_rows) * 7919 + (1 << 40), torch.zeros(num_rows, dtype=torch.int64)
    return sample(hidden, logits[:, None], keys, positions, **options)  # type: ignore[arg-type]


# --- noise ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, result: str):
    low, high = words(key)
    signed = (high << 32 | low) - (1 << 64 if high >> 31 else 0)  # the 64 bits as i64 holds them
    assert philox(torch.tensor([signed]), tuple(words(counter))).tolist() == [words(result)]


def test_missing_counter_words_are_zero():
    key = torch.tensor([5, 1 << 62])
    assert torch.equal(philox(key, (3, 9)), philox(key, (3, 9, 0, 0)))
    assert not torch.equal(philox(key, (3, 9)), philox(key, (9, 3)))


def test_every_bit_of_key_and_position_changes_the_noise():
    zero = torch.zeros(1, dtype=torch.int64)
    keys = torch.cat((zero, torch.tensor([1 << bit for bit in range(63)])))
    positions = torch.cat((zero, torch.tensor([1 << bit for bit in range(32)])))
    by_key, by_position = uniform(keys, torch.zeros_like(keys), 8), uniform(torch.zeros_like(positions), positions, 8)
    assert len(by_key.unique(dim=0)) == 64 and len(by_position.unique(dim=0)) == 33


def test_uniform_is_even_and_never_zero_or_one():
    draws = uniform(torch.arange(64), torch.arange(64), 1000)
    assert draws.min() > 0 and draws.max() < 1
    counts = torch.histc(draws, bins=50, min=0, max=1)
    expected = draws.numel() / 50
    assert float(((counts - expected) ** 2 / expected).sum()) < chi_square_bound(49)
    ends = torch.tensor([0, (1 << 23) - 1]).float().add(0.5) * 2.0**-23
    assert ends[0] > 0 and ends[1] < 1  # the smallest and the largest that there are


def test_a_longer_row_begins_with_the_shorter_one():
    key, position = torch.tensor([77]), torch.tensor([5])
    assert same_bits(gumbel(key, position, 101)[:, :43], gumbel(key, position, 43))


def test_gumbel_noise_has_its_mean_and_variance():
    noise = gumbel(torch.arange(100), torch.zeros(100, dtype=torch.int64), 2000).double()
    assert noise.isfinite().all()
    # 200,000 draws: the mean is off by 0.003, the variance by 0.008 (one standard deviation); five are allowed
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.015)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.04)


# --- the distribution ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_follow_the_softmax(temperature: float):
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5, 0.3, -0.5])
    token, logprob, kept = from_logits(logits, MANY, temperature=temperature)
    probability = torch.softmax(logits.double() / temperature, dim=0)
    expected = MANY * probability
    assert float(((torch.bincount(token, minlength=7) - expected) ** 2 / expected).sum()) < chi_square_bound(6)
    torch.testing.assert_close(logprob.double(), probability.log()[token], rtol=0, atol=1e-6)  # f32 of numbers up to 4
    assert (kept == 0).all()


def test_tokens_of_one_key_follow_the_softmax_over_its_positions():
    logits = torch.tensor([0.5, 0.0, 1.0, -1.0])
    positions = torch.arange(MANY)
    token, _, _ = sample(torch.ones(MANY, 1), logits[:, None], torch.full_like(positions, 123456789), positions)
    expected = MANY * torch.softmax(logits.double(), dim=0)
    assert float(((torch.bincount(token, minlength=4) - expected) ** 2 / expected).sum()) < chi_square_bound(3)
    pairs = torch.bincount(token[:-1] * 4 + token[1:], minlength=16)  # neighbours are independent
    expected = (MANY - 1) * torch.outer(expected, expected).flatten() / MANY**2
    assert float(((pairs - expected) ** 2 / expected).sum()) < chi_square_bound(15)


TRUNCATIONS = [
    {"top_k": 3}, {"top_k": 1}, {"top_k": 100}, {"top_p": 0.8}, {"top_p": 0.01}, {"min_p": 0.2}, {"min_p": 1.0},
    {"top_k": 4, "top_p": 0.7}, {"top_k": 5, "top_p": 0.95, "min_p": 0.1}, {},
]


def kept_by_hand(probabilities: list[float], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """In descending probability, equal ones by index; all three rules read the full distribution."""
    order = sorted(range(len(probabilities)), key=lambda v: (-probabilities[v], v))
    kept = set()
    for rank, v in enumerate(order):
        mass_before = math.fsum(probabilities[w] for w in order[:rank])
        is_likely = probabilities[v] >= min_p * probabilities[order[0]]
        if rank == 0 or ((not top_k or rank < top_k) and (top_p == 1 or mass_before < top_p) and is_likely):
            kept.add(v)
    return kept


@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
def test_the_kept_sets_are_those_of_a_loop(options: dict[str, float]):
    inputs = make_inputs(60, 8, 12, F32)
    logprobs = torch.log_softmax(inputs["hidden"] @ inputs["weight"].T, dim=-1)
    logprobs[:5, 3] = logprobs[:5, 7]  # ties
    masks = truncation_mask(logprobs, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **options})  # type: ignore[arg-type]
    for row, mask in zip(logprobs.double().exp().tolist(), masks.tolist(), strict=True):
        assert {v for v, is_kept in enumerate(mask) if is_kept} == kept_by_hand(row, **options)  # type: ignore[arg-type]


def test_equal_tokens_are_cut_by_index():
    even = torch.full((1, 8), -math.log(8))
    assert truncation_mask(even, 3, 1.0, 0.0).tolist() == [[True] * 3 + [False] * 5]
    assert truncation_mask(even, 0, 0.45, 0.0).tolist() == [[True] * 4 + [False] * 4]
    assert truncation_mask(even, 0, 1.0, 1.0).all()


@pytest.mark.skipif(IS_INTERPRETED, reason="ten thousand rows of five programs; the tokens are compared with the reference's below")
@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
def test_truncated_draws_follow_the_renormalised_softmax_and_record_the_kept_mass(options: dict[str, float]):
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5, 0.3, -0.5])
    probability = torch.softmax(logits.double(), dim=0)
    kept = sorted(kept_by_hand(probability.tolist(), **options))  # type: ignore[arg-type]
    token, logprob, kept_logmass = from_logits(logits, 10_000, **options)
    mass = float(probability[kept].sum())
    counts, expected = torch.bincount(token, minlength=7)[kept], 10_000 * probability[kept] / mass
    assert int(counts.sum()) == 10_000, "a token outside of the kept set was drawn"
    if len(kept) > 1:
        assert float(((counts - expected) ** 2 / expected).sum()) < chi_square_bound(len(kept) - 1)
    torch.testing.assert_close(kept_logmass, torch.full((10_000,), math.log(mass)), rtol=0, atol=1e-6)  # f32 of numbers up to 3
    assert (len(kept) < 7) == bool((kept_logmass < 0).all()) and (kept_logmass <= 0).all()
    # logprob is the full softmax's, whatever was cut
    torch.testing.assert_close(logprob.double(), probability.log()[token], rtol=0, atol=1e-6)


def test_temperature_zero_is_greedy_with_ties_by_index_and_the_logprob_at_temperature_one():
    logits = torch.tensor([0.5, 2.0, -1.0, 2.0])
    token, logprob, kept = from_logits(logits, 50, temperature=0.0, top_k=2, top_p=0.3)
    assert (token == 1).all() and (kept == 0).all()
    torch.testing.assert_close(logprob, torch.log_softmax(logits, dim=0)[1].expand(50), rtol=0, atol=5e-7)  # 2 ulp of 1


# --- against the reference ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.0}, {"temperature": 0.5}, {"top_k": 1}, {"top_k": 7}, {"top_p": 0.83}, {"min_p": 0.03},
    {"temperature": 2.0, "top_k": 40, "top_p": 0.91, "min_p": 0.001}], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 3, 43, 64, 123, 1100])
def test_tokens_are_those_of_the_reference(vocab_size: int, options: dict[str, float], dtype: torch.dtype):
    if IS_INTERPRETED and (vocab_size != 1100 if dtype == BF16 else vocab_size in (43, 64, 123) and len(options) == 1):
        pytest.skip("as the others, for the interpreter: bf16 is upcast, and each has one tile")
    num_rows = 200 if not IS_INTERPRETED else 3 if options.keys() & {"top_k", "top_p", "min_p"} else 20
    inputs = exact_inputs(num_rows, 7, vocab_size, dtype)
    got, want = sample(**inputs, **options), sample(**inputs, **options, impl="reference")  # type: ignore[arg-type]
    assert torch.equal(got[0], want[0])
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)  # f32 sums in another order, values up to 10
    assert ((got[2] == 0) == (want[2] == 0)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_hard_cuts_are_the_references(kind: str):
    """Ties, one likely token, masses down to 0."""
    for options in ({"top_k": 5}, {"top_k": 300, "top_p": 0.9}, {"top_p": 1e-9}, {"top_p": 0.97, "min_p": 1e-6}):
        logits = make_logits(kind, 1 if IS_INTERPRETED else 20, 1300)
        keys, positions = make_noise(len(logits))
        got = sample(torch.eye(len(logits)), logits.T.contiguous(), keys, positions, **options)  # type: ignore[arg-type]
        assert_drawn_alike(got, reference(logits, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"top_k": 5000, "top_p": 0.5}], ids=str)
def test_a_vocabulary_of_151936_is_drawn_from_to_its_last_token(options: dict[str, float]):
    """Many chunks of several tiles, a last tile that is not full, and one row whose last token has nearly all the mass."""
    # In the interpreter a tile takes 40 ms, and more with noise.
    vocab_size = 40_000 if IS_INTERPRETED and not options else 151_936
    inputs = exact_inputs(1 if IS_INTERPRETED else 50, 2, vocab_size, BF16)
    inputs["weight"][-1] = torch.tensor([30.0, -30.0])
    inputs["hidden"][0] = torch.tensor([1.0, -1.0])
    got, want = sample(**inputs, **options), sample(**inputs, **options, impl="reference")  # type: ignore[arg-type]
    assert torch.equal(got[0], want[0]) and got[0][0] == vocab_size - 1
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_logits_of_ten_thousand_draw_as_their_differences_do():
    """The differences stay exact in f32 after the shift; the noise must not be rounded away."""
    near, (keys, positions) = torch.tensor([0.0, 0.5, -1.0, 2.0, 1.5]), make_noise(60)
    weight = torch.stack((near, torch.ones(5)), dim=1)
    tokens = [sample(torch.tensor([[1.0, far]]).expand(60, 2), weight, keys, positions)[0] for far in (0.0, 1e4, -1e4)]
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2]) and len(tokens[0].unique()) > 2


def test_the_kernels_noise_is_that_of_the_reference(implementation: str):
    if implementation != "triton":
        pytest.skip("of the Triton kernels")
    from kernels.sample.triton_noise import NOISE_ERROR
    from tests.kernels.noise_kernel import noise_kernel, words_kernel

    device = CPU if IS_INTERPRETED else CUDA
    keys, positions = (x.to(device) for x in make_noise(64))
    words = torch.empty(64, 4, dtype=torch.int64, device=device)
    words_kernel[(1,)](words, keys, positions, BLOCK=64)
    assert torch.equal(words, philox(keys, (torch.arange(64, device=device), positions)))
    step = 2**16 - 1 if IS_INTERPRETED else 255
    words = torch.cat([torch.arange(0, 2**32, step), torch.arange(2**31 - 2**15, 2**31 + 2**15), 2**32 - 1 - torch.arange(2**15)])
    words = words[: len(words) // 4096 * 4096].to(device)
    near, exact = (torch.empty(len(words), device=device) for _ in range(2))
    noise_kernel[(len(words) // 4096,)](near, exact, words, BLOCK=4096)
    want = -torch.log(-torch.log((words.double() + 0.5) * 2.0**-32))
    assert float((exact - want).abs().max()) <= 1e-6, "half a unit in the last place of 16 to 23"
    assert float((near - want).abs().max()) <= NOISE_ERROR.value


# --- bits ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("hidden_size", "vocab_size", "options", "dtype"), [
    (128, 43, {}, F32), (128, 43, {}, BF16), (16, 130, {"temperature": 0.7, "top_p": 0.9}, F32),
    (16, 9, {"temperature": 0.0}, F32), (16, 17, {"top_k": 5, "min_p": 0.05}, F32)])
def test_a_row_draws_the_same_in_any_batch(
    hidden_size: int, vocab_size: int, options: dict[str, float], dtype: torch.dtype, implementation: str
):
    if implementation == "cuda":
        pytest.skip("by torch's GEMM")
    num_rows, counts = NUM_ROWS, ROWS
    if IS_INTERPRETED:  # two tiles of rows; with a cut five programs a row
        num_rows, counts = (4, (1,)) if len(options) > 1 else (140, (129,))
    inputs = make_inputs(num_rows, hidden_size, vocab_size, dtype)

    def rows(start: int, end: int) -> tuple[torch.Tensor, ...]:
        cut = {name: inputs[name][start:end] for name in ("hidden", "keys", "positions")}
        return sample(weight=inputs["weight"], **cut, **options)  # type: ignore[arg-type]

    assert_rows_keep_their_bits(rows, num_rows, counts)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 4}], ids=str)
def test_the_logprob_has_the_bits_of_linear_logprob(options: dict[str, float], dtype: torch.dtype, implementation: str):
    if implementation == "cuda":
        pytest.skip("by torch's GEMM")
    device = CUDA if implementation in CUDA_ONLY and not IS_INTERPRETED else CPU
    for vocab_size in (43, 2500):
        inputs = make_inputs(3 if IS_INTERPRETED else 70, 32, vocab_size, dtype)
        token, logprob, _ = sample(**inputs, **options)  # type: ignore[arg-type]
        hidden, weight, token = (x.to(device) for x in (inputs["hidden"], inputs["weight"], token))
        again, _ = linear_logprob(hidden, weight, token, options.get("temperature", 1.0), implementation)
        assert same_bits(logprob, again.to(CPU))


def test_order_of_the_rows_does_not_matter():
    inputs = make_inputs(50, 16, 20, F32)
    drawn = sample(**inputs)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    shuffled = sample(inputs["hidden"][order], inputs["weight"], inputs["keys"][order], inputs["positions"][order])
    assert all(same_bits(a[order], b) for a, b in zip(drawn, shuffled, strict=True))


# --- contracts -----------------------------------------------------------------------------------------------------------

def test_no_rows_give_no_tokens():
    for options in ({}, {"top_k": 2}, {"temperature": 0.0}):
        token, logprob, kept = sample(**make_inputs(0, 8, 12, F32), **options)  # type: ignore[arg-type]
        assert token.shape == logprob.shape == kept.shape == (0,) and token.dtype == torch.int64


def test_many_rows_are_drawn_a_few_at_a_time(implementation: str, monkeypatch: pytest.MonkeyPatch):
    if implementation != "triton":
        pytest.skip("has no scratch")
    inputs = make_inputs(7, 4, 100, F32)
    for options in ({}, {"top_p": 0.9}):
        whole = sample(**inputs, **options)
        monkeypatch.setattr("kernels.sample.triton_kernel.CHUNK_BYTES", 3 * 4 * 128)  # two tiles of 64 tokens, three rows
        assert all(same_bits(a, b) for a, b in zip(whole, sample(**inputs, **options), strict=True))
        monkeypatch.undo()


def test_it_compiles_whole(implementation: str):
    if implementation == "reference":
        pytest.skip("looks at its logits")
    inputs, run = make_inputs(9, 8, 12, F32), OP.choose(torch.empty(0)).run
    compiled = torch.compile(
        lambda hidden: run(hidden, inputs["weight"], inputs["keys"], inputs["positions"], 1.0, 0, 1.0, 0.0),
        fullgraph=True, backend="aot_eager")
    assert all(same_bits(a, b) for a, b in zip(compiled(inputs["hidden"]), sample(**inputs), strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_broken_logits_raise_and_name_the_row(bad: float, temperature: float):
    inputs = make_inputs(5, 4, 6, F32)
    inputs["hidden"][3, 2] = bad
    for options in ({}, {"top_k": 3}):
        with pytest.raises(ValueError, match="the logits of row 3 hold NaN or inf"):
            check_tokens(sample(**inputs, temperature=temperature, **options)[0].tolist())  # type: ignore[arg-type]


def test_one_logit_of_minus_infinity_is_broken_too():
    inputs = make_inputs(2, 4, 6, F32)
    inputs["weight"][5] = torch.tensor([-3e38, 0.0, 0.0, 0.0])
    inputs["hidden"][:, 0] = torch.tensor([0.5, 10.0])
    for options in ({}, {"top_k": 3}):
        with pytest.raises(ValueError, match="the logits of row 1 hold NaN or inf"):
            check_tokens(sample(**inputs, **options)[0].tolist())  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 3}, {"min_p": 0.1}], ids=str)
def test_a_broken_row_breaks_no_other_where_it_is_not_waited_for(
    options: dict[str, float], implementation: str, monkeypatch: pytest.MonkeyPatch
):
    if implementation != "triton":
        pytest.skip("raises at once")
    monkeypatch.setattr("kernels.sample.triton_kernel.check_tokens", lambda tokens: None)  # as the interpreter does on the CPU
    inputs = make_inputs(5, 4, 6, F32)
    want = sample(**inputs, **options)  # type: ignore[arg-type]
    inputs["hidden"][3, 2] = math.nan
    got = sample(**inputs, **options)  # type: ignore[arg-type]
    others = torch.tensor([0, 1, 2, 4])
    assert got[0][3] == -1 and all(same_bits(a[others], b[others]) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("options", [
    {"temperature": -0.1}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5},
    {"min_p": -0.1}, {"min_p": 2.0}])
def test_impossible_options_are_refused(options: dict[str, float]):
    with pytest.raises(ValueError, match=rf"sample: needs temperature >= 0, .* got .*{next(iter(options.values()))}"):
        sample(**make_inputs(2, 4, 6, F32), **options)  # type: ignore[arg-type]


def test_wrong_arguments_raise_with_expected_and_actual():
    inputs = make_inputs(3, 4, 7, F32)
    for name, bad, message in [
        ("hidden", inputs["hidden"][0], r"hidden must be .*\[R, D\], got f32\[4\]"),
        ("weight", inputs["weight"].bfloat16(), r"weight must be f32\[V, 4\], got bf16\[7, 4\]"),
        ("keys", inputs["keys"].int(), r"keys must be i64\[3\], got i32\[3\]"),
        ("positions", inputs["positions"][:2], r"positions must be i64\[3\], got i64\[2\]"),
    ]:
        with pytest.raises(ValueError, match=f"sample: {message}"):
            sample(**{**inputs, name: bad})  # type: ignore[arg-type]
