"""The native decoder equals the op-by-op one bit for bit: tokens, logprobs, routed experts. Also routing replay."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch

from reason_rl.config import ModelConfig
from reason_rl.engine import native_decode
from reason_rl.engine.native_decode import unsupported_reason
from reason_rl.model.scoring import token_logprobs
from reason_rl.model.transformer import Transformer
from reason_rl.records import Group
from reason_rl.rl.packing import idle_microbatch
from tests.reason_rl.tiny import (
    DENSE,
    MOE,
    different_bits,
    make_engine,
    num_different,
    packed,
    problem,
    sampling,
    tiny_model,
    trainer_logprobs,
)

ODD = ModelConfig(num_hidden_layers=2, hidden_size=42, num_attention_heads=3, num_key_value_heads=1, head_dim=10,
                  num_experts=5, num_experts_per_tok=3, moe_intermediate_size=21, num_shared_experts=2,
                  router_score="sigmoid", norm_topk_prob=False, max_position_embeddings=512)
MODELS = {"moe": MOE, "dense": DENSE, "default": ModelConfig(), "odd sizes, shared experts": ODD}
DTYPES = [torch.float32, torch.bfloat16]
REASON = unsupported_reason(tiny_model())
needs_native = pytest.mark.skipif(bool(REASON), reason=f"native kernels: {REASON}")


def rollout(
    model: Transformer, decoder: str, count: int = 9, group_size: int = 3, max_tokens: int = 40, **options: object
) -> list[Group]:
    settings = {key: options.pop(key) for key in ("max_num_seqs", "num_blocks") if key in options}
    with_routed_experts = bool(options.pop("with_routed_experts", False))
    problems = [problem(i, (3, 16, 17, 40)[i % 4]) for i in range(count)]
    return make_engine(model, decoder=decoder, **settings).generate(  # type: ignore[arg-type]
        problems, group_size, sampling(max_tokens, **options), step=0, with_routed_experts=with_routed_experts)  # type: ignore[arg-type]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_both_decoders_draw_the_same_bits_and_they_are_the_trainers(name: str, dtype: torch.dtype):
    model = tiny_model(MODELS[name], dtype=dtype)
    native, ops = rollout(model, "native"), rollout(model, "ops")
    assert native == ops
    assert num_different(model, native) == 0


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.7}, {"temperature": 0.0}], ids=str)
def test_both_decoders_agree_on_every_way_of_sampling(cut: dict[str, float], dtype: torch.dtype):
    model = tiny_model(MOE, dtype=dtype)
    assert rollout(model, "native", **cut) == rollout(model, "ops", **cut)


@needs_native
@pytest.mark.parametrize("setting", [{"max_num_seqs": 4}, {"num_blocks": 14}, {"max_num_seqs": 1}], ids=str)
def test_the_native_decoder_does_not_depend_on_the_engines_settings(setting: dict[str, int]):
    model = tiny_model(MOE)
    assert rollout(model, "native", **setting) == rollout(model, "native")


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["moe", "dense"])
def test_two_threads_draw_what_one_draws(name: str, dtype: torch.dtype):
    model = tiny_model(MODELS[name], dtype=dtype)
    torch.set_num_threads(1)
    one = rollout(model, "native")
    torch.set_num_threads(2)
    assert rollout(model, "native") == one
    assert num_different(model, one) == 0


@needs_native
def test_new_weights_are_sampled_from_at_once():
    model = tiny_model(MOE)
    engine = make_engine(model)
    before = engine.generate([problem(0, 5)], 4, sampling(), step=0)
    with torch.no_grad():
        model.blocks[1].mlp.down_proj += 0.3  # type: ignore[union-attr, operator]
    after = engine.generate([problem(0, 5)], 4, sampling(), step=0)
    assert after != before and num_different(model, after) == 0


def test_an_explicit_decoder_works_or_fails_with_the_reason():
    model = tiny_model(MOE).set_batch_invariant(False)
    with pytest.raises(ValueError, match="cannot decode this model: batch_invariant is off: projections by torch's own GEMMs"):
        rollout(model, "native")
    assert rollout(model, "ops") == rollout(model, "auto")


@pytest.mark.parametrize(("changes", "reason"), [
    ({"attention_bias": "qkv"}, "attention_bias = 'qkv'"), ({"qk_norm": "full"}, "qk_norm = 'full'"),
    ({"num_dense_layers": 1, "intermediate_size": 50}, "num_dense_layers = 1"),
    ({"routed_scaling_factor": 2.0}, "routed_scaling_factor = 2.0"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_a_model_that_the_native_decoder_does_not_support_is_decoded_op_by_op(changes: dict[str, object], reason: str):
    model = tiny_model(replace(MOE, **changes))  # type: ignore[arg-type]
    assert unsupported_reason(model) == f"not for {reason}"
    with pytest.raises(ValueError, match=f"cannot decode this model: not for {reason}"):
        rollout(model, "native")
    assert rollout(model, "auto", count=2) == rollout(model, "ops", count=2)


@dataclass(frozen=True)
class NewConfig(ModelConfig):
    """ModelConfig with a switch that the native decode was never extended for."""

    new_switch: bool = False


def test_a_new_config_field_is_refused_until_the_native_decoder_lists_it(monkeypatch: pytest.MonkeyPatch):
    model = tiny_model(MOE)
    before = unsupported_reason(model)
    model.config = NewConfig(**vars(MOE))
    assert unsupported_reason(model) == "not for new_switch = False"
    monkeypatch.setattr(native_decode, "SUPPORTED", {**native_decode.SUPPORTED, "new_switch": (False,)})
    assert unsupported_reason(model) == before


def test_the_native_decoders_list_has_every_config_field_and_no_other():
    assert set(native_decode.SUPPORTED) == {field.name for field in fields(ModelConfig)}


@needs_native
def test_both_decoders_rotate_by_scaled_angles():
    model = tiny_model(replace(MOE, rope_scaling='{"rope_type": "linear", "factor": 4.0}'))
    native = rollout(model, "native")
    assert native == rollout(model, "ops") != rollout(tiny_model(MOE), "native")


def test_torchs_own_gemms_stay_close_to_the_exact_ones():
    """run.exact = "off": the bits differ, the values agree to rounding."""
    model = tiny_model(MOE, scale=2.0)
    packs = packed(rollout(model, "auto"))
    exact = trainer_logprobs(model, packs)
    loose = trainer_logprobs(model.set_batch_invariant(False), packs)
    assert float((exact - loose).abs().max()) < 1e-4


# --- routing replay


@pytest.mark.parametrize("decoder", ["ops", pytest.param("native", marks=needs_native)])
def test_recorded_experts_are_the_trainers_and_replaying_them_changes_no_bit(decoder: str):
    model = tiny_model(MOE)
    engine = make_engine(model, decoder=decoder, num_blocks=14)
    problems = [problem(i, (3, 16, 17, 40)[i % 4]) for i in range(6)]
    groups = engine.generate(problems, 3, sampling(40), step=0, with_routed_experts=True)
    assert engine.num_preemptions > 0  # keys are recomputed, expert ids are not
    for group in groups:
        expert_ids = group.prompt_routed_expert_ids
        assert expert_ids is not None and expert_ids.shape == (len(group.problem.prompt_ids), 2, 2)
        for completion in group.completions:
            if len(completion.token_ids) > 1:
                expert_ids = completion.routed_expert_ids
                assert expert_ids is not None and expert_ids.shape == (len(completion.token_ids) - 1, 2, 2)
    for pack in packed(groups, 200):
        assert pack.routed_expert_ids is not None and pack.routed_expert_ids.shape == (pack.num_tokens, 2, 2)
        fresh = token_logprobs(model, replace(pack, routed_expert_ids=None))[0]
        assert different_bits(token_logprobs(model, pack)[0].detach(), fresh.detach()) == 0


def test_replay_where_the_first_layer_is_dense_changes_no_bit():
    model = tiny_model(replace(MOE, num_hidden_layers=3, num_dense_layers=1, intermediate_size=50, routed_scaling_factor=2.5))
    for pack in packed(rollout(model, "ops", with_routed_experts=True, count=3)):
        # [T, M, k]: of the two layers with experts
        assert pack.routed_expert_ids is not None and pack.routed_expert_ids.shape == (pack.num_tokens, 2, 2)
        fresh = token_logprobs(model, replace(pack, routed_expert_ids=None))[0]
        assert different_bits(token_logprobs(model, pack)[0].detach(), fresh.detach()) == 0


def test_replay_of_eight_experts_a_token_changes_no_bit():
    """More experts than the longest sum that torch adds in order."""
    model = tiny_model(replace(MOE, num_experts=12, num_experts_per_tok=8))
    for pack in packed(rollout(model, "ops", with_routed_experts=True, count=3)):
        fresh = token_logprobs(model, replace(pack, routed_expert_ids=None))[0]
        assert different_bits(token_logprobs(model, pack)[0].detach(), fresh.detach()) == 0


def test_replay_follows_the_given_experts_and_the_router_still_learns():
    model = tiny_model(MOE)
    pack = packed(rollout(model, "ops", with_routed_experts=True))[0]
    assert pack.routed_expert_ids is not None
    other = replace(pack, routed_expert_ids=(pack.routed_expert_ids + 1) % MOE.num_experts)
    own, moved = token_logprobs(model, pack)[0], token_logprobs(model, other)[0]
    assert float((own - moved).detach().abs().max()) > 1e-3
    moved.sum().backward()
    router = model.blocks[0].mlp.router  # type: ignore[union-attr]
    assert router.grad is not None and float(router.grad.abs().max()) > 0  # type: ignore[union-attr]
    idle = idle_microbatch(pack)
    assert idle.routed_expert_ids is not None and token_logprobs(model, idle)[0].numel() == 0


def test_routed_experts_are_recorded_on_request_only():
    group = rollout(tiny_model(MOE), "auto", count=1)[0]
    assert group.prompt_routed_expert_ids is None and all(c.routed_expert_ids is None for c in group.completions)
    assert packed([group])[0].routed_expert_ids is None
