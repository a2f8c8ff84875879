"""Checkpoint folders in Hugging Face's layout: shards and their index, tied heads, ignored tensors, files carried to the
next folder, and the memory that loading takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reason_rl.config import ModelConfig
from reason_rl.model import weights
from reason_rl.model.hf_config import config_to_json
from reason_rl.model.transformer import Transformer
from reason_rl.model.weights import file_views, load_model, read_source, save_weights
from tests.reason_rl.tiny import MOE, VOCAB_SIZE, tiny_model

ROOT = Path(__file__).resolve().parents[3]
UNTIED = replace(MOE, tie_word_embeddings=False)
INDEX = "model.safetensors.index.json"


def saved(folder: Path, config: ModelConfig = MOE, shard_bytes: int = 30_000) -> Transformer:
    model = tiny_model(config)
    save_weights(folder, model.state_dict(), config, VOCAB_SIZE, eos_id=3, shard_bytes=shard_bytes)
    return model


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- shards

def test_shards_are_no_larger_than_asked_and_the_index_names_every_tensor(tmp_path: Path):
    model = saved(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    held = {f.name: load_file(f) for f in files}
    assert index["weight_map"] == {name: file for file in sorted(held) for name in held[file]}
    assert set(index["weight_map"]) == set(file_views(model.state_dict(), MOE))
    sizes = [sum(t.numel() * 4 for t in tensors.values()) for tensors in held.values()]
    assert max(sizes) <= 30_000 and sum(sizes) == index["metadata"]["total_size"]
    assert len(files) == pytest.approx(sum(sizes) / 30_000, rel=0.3)


def test_a_tensor_larger_than_a_shard_has_one_to_itself(tmp_path: Path):
    saved(tmp_path, shard_bytes=1)
    assert all(len(load_file(f)) == 1 for f in tmp_path.glob("*.safetensors"))
    assert torch.equal(load_model(tmp_path).embedding.weight, tiny_model(MOE).embedding.weight)


def test_saved_shards_load_to_the_same_bits(tmp_path: Path):
    before, after = saved(tmp_path).state_dict(), load_model(tmp_path).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_folder_saved_again_holds_no_shard_of_before(tmp_path: Path):
    saved(tmp_path)
    saved(tmp_path, shard_bytes=1 << 30)
    assert {f.name for f in tmp_path.iterdir()} == {"model.safetensors", "config.json", "generation_config.json"}
    load_model(tmp_path)


def test_missing_shards_are_named(tmp_path: Path):
    saved(tmp_path)
    files = sorted(f.name for f in tmp_path.glob("*.safetensors"))
    for name in files[1:3]:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=rf"is incomplete: of {len(files)} shards {files[1]}, {files[2]} \(2\) missing"):
        load_model(tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path):
    saved(tmp_path)
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_named(content: str, tmp_path: Path):
    saved(tmp_path)
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=rf"{INDEX} is damaged"):
        load_model(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path):
    saved(tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"has no model\.safetensors and no model\.safetensors\.index\.json; \*\.bin is not read"):
        load_model(tmp_path)


def test_tensors_that_are_no_plain_floats_are_refused(tmp_path: Path):
    saved(tmp_path, shard_bytes=1 << 30)
    files = load_file(tmp_path / "model.safetensors")
    files["model.norm.weight"] = files["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(files, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight must be F32\|BF16\|F16\|F64, got F8_E4M3"):
        load_model(tmp_path)


# --- further tensors that a folder may hold

def test_a_stored_head_may_be_the_embedding_it_is_tied_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "CHUNK_BYTES", 1000)  # compared in several chunks, of which the last one differs
    model = saved(tmp_path)
    head = model.embedding.weight.detach().clone()
    save_file({"lm_head.weight": head}, tmp_path / "head.safetensors")
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "head.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert torch.equal(load_model(tmp_path).head_weight, head)
    for wrong in (head.index_add(0, torch.tensor([39]), torch.full((1, 48), 0.5)), head[:-1].clone(), head[:, :-1].clone()):
        save_file({"lm_head.weight": wrong}, tmp_path / "head.safetensors")
        with pytest.raises(ValueError, match=r"ties the head .*, but lm_head\.weight is not model\.embed_tokens\.weight"):
            load_model(tmp_path)


def test_a_head_that_is_missing_though_it_is_not_tied_is_named(tmp_path: Path):
    saved(tmp_path)
    change_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"missing lm_head\.weight \(1\); config\.json does not tie the head"):
        load_model(tmp_path)


def test_angles_that_old_files_store_are_no_weights(tmp_path: Path):
    model = saved(tmp_path, shard_bytes=1 << 30)
    files = load_file(tmp_path / "model.safetensors")
    save_file(files | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path).norm.weight, model.norm.weight)


def test_layers_that_predict_further_tokens_are_left_out_by_name(tmp_path: Path):
    config = replace(MOE, family="glm4_moe", router_score="sigmoid", num_shared_experts=1, partial_rotary_factor=0.5)
    saved(tmp_path, config, shard_bytes=1 << 30)
    files = load_file(tmp_path / "model.safetensors")
    save_file(files | {"model.layers.2.enorm.weight": torch.ones(48)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected model\.layers\.2\.enorm\.weight \(1\)"):
        load_model(tmp_path)
    change_config(tmp_path, num_nextn_predict_layers=1)
    with pytest.warns(UserWarning, match=r"ignoring model\.layers\.2\.enorm\.weight \(1\), of layers that predict further"):
        model = load_model(tmp_path)
    save_weights(tmp_path / "out", model.state_dict(), model.config, VOCAB_SIZE, 3, read_source(tmp_path))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    load_model(tmp_path / "out")


# --- files and keys that are copied to the next folder

def test_side_files_and_other_keys_of_config_json_go_on(tmp_path: Path):
    model = saved(tmp_path / "in")
    side = {"tokenizer_config.json": b'{"a": 1}', "special_tokens_map.json": b"{}", "chat_template.jinja": b"{{ messages }}",
            "generation_config.json": b'{"temperature": 0.6}', "tokenizer.model": b"\x00\xff"}
    for name, content in side.items():
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in" / "notes.txt").write_text("not the model's")
    change_config(tmp_path / "in", eos_token_id=[7, 3], bos_token_id=9, initializer_range=0.1, dtype="bfloat16",
                  rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    save_weights(tmp_path / "out", model.state_dict(), MOE, VOCAB_SIZE, 3, read_source(tmp_path / "in"))
    assert {name: (tmp_path / "out" / name).read_bytes() for name in side} == side
    assert not (tmp_path / "out" / "notes.txt").exists()
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["eos_token_id"] == [7, 3] and values["bos_token_id"] == 9 and values["initializer_range"] == 0.1
    assert "dtype" not in values and values["torch_dtype"] == "float32"  # the files' dtype now
    assert "rope_parameters" not in values and values["rope_theta"] == 10000.0  # in one spelling


def test_without_a_folder_before_it_the_end_token_is_written(tmp_path: Path):
    saved(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 3
    assert config_to_json(MOE, VOCAB_SIZE, 3, {"eos_token_id": None})["eos_token_id"] == 3


# --- dtypes and memory

def test_weights_held_in_bf16_give_the_bits_of_masters_that_are_rounded_at_each_use(tmp_path: Path):
    saved(tmp_path, UNTIED)
    held = load_model(tmp_path, torch.bfloat16, weights_dtype=torch.bfloat16)
    masters = load_model(tmp_path, torch.bfloat16)
    for name, parameter in held.named_parameters():
        is_matrix = parameter.dim() > 1 and not name.endswith("router")
        assert parameter.dtype == (torch.bfloat16 if is_matrix else torch.float32) and not parameter.requires_grad
        assert torch.equal(parameter, masters.get_parameter(name).to(parameter.dtype)), name
    assert {p.dtype for p in masters.parameters()} == {torch.float32} and all(p.requires_grad for p in masters.parameters())


def test_weights_that_the_compute_dtype_cannot_read_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"weights_dtype must be float32 or compute_dtype = torch\.float32, got torch\.bfloat16"):
        load_model(tmp_path, torch.float32, weights_dtype=torch.bfloat16)


def test_chunks_put_together_are_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Chunks of one matrix row, of a few, and of several tensors."""
    model = saved(tmp_path)
    for size in (1, 500, 20_000):
        monkeypatch.setattr(weights, "CHUNK_BYTES", size)
        loaded = load_model(tmp_path).state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


MEASURE = """
import sys
import torch
from reason_rl.model import weights

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key + ":"))

folder, weights_dtype, chunk_bytes = sys.argv[1:]
weights.CHUNK_BYTES = int(chunk_bytes) or weights.CHUNK_BYTES
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
before = memory("VmRSS")
dtype = getattr(torch, weights_dtype)
model = weights.load_model(folder, dtype, dtype)
held = sum(p.numel() * p.element_size() for p in model.parameters())
print(before, memory("VmHWM"), held, float(model.head_weight[-1, -1]), float(model.blocks[-1].mlp.down_proj[-1, 0, 0]))
"""


def write_bf16_folder(folder: Path, config: ModelConfig, vocab_size: int, shard_bytes: int) -> dict[str, torch.Tensor]:
    """Writes random bf16 shards without a model in memory: each tensor is the start of one noise block -> shapes by name."""
    with torch.device("meta"):
        views = file_views(Transformer(config, vocab_size).state_dict(), config)
    noise = torch.randn(max(view.numel() for view in views.values())).mul_(0.02).bfloat16()
    weight_map = {}
    shards = list(weights._shards({name: view.bfloat16() for name, view in views.items()}, shard_bytes))
    folder.mkdir(exist_ok=True)
    for number, shard in enumerate(shards):
        header, offset = {}, 0
        for name, view in shard.items():
            header[name] = {"dtype": "BF16", "shape": list(view.shape), "data_offsets": [offset, offset + 2 * view.numel()]}
            offset += 2 * view.numel()
        text = json.dumps(header).encode()
        with (folder / f"shard_{number}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for view in shard.values():
                file.write(noise[: view.numel()].view(torch.uint8).numpy().data)
        weight_map.update(dict.fromkeys(shard, f"shard_{number}.safetensors"))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_to_json(config, vocab_size, 1)))
    return {name: noise[: view.numel()].view(view.shape) for name, view in views.items()}


def measure(folder: Path, weights_dtype: str, chunk_bytes: int = 0) -> list[float]:
    """-> bytes before, bytes at the peak, bytes of the weights, the head's last value, the last expert's first."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), weights_dtype, str(chunk_bytes)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs")


@needs_proc
@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
def test_loading_takes_the_memory_of_the_weights_and_a_chunk(weights_dtype: str, tmp_path: Path):
    config = replace(MOE, num_hidden_layers=4, hidden_size=256, num_experts=16, moe_intermediate_size=512,
                     tie_word_embeddings=False, max_position_embeddings=64)
    # One file: if it were mapped whole, the peak would exceed the limit.
    wanted = write_bf16_folder(tmp_path, config, 20_000, shard_bytes=1 << 30)
    before, peak, held, head, expert = measure(tmp_path, weights_dtype, chunk_bytes=4 << 20)
    assert head == float(wanted["lm_head.weight"][-1, -1])
    assert expert == float(wanted["model.layers.3.mlp.experts.15.down_proj.weight"][0, 0])
    # 74 or 147 MB of weights; two chunks may be mapped at a time; threads and libraries need a little
    assert held < peak - before < held + (24 << 20)


@needs_proc
@pytest.mark.long
@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
def test_two_billion_parameters_load_in_less_than_a_fifth_more_than_their_weights(weights_dtype: str, tmp_path: Path):
    """Memory of the whole process, including the interpreter and torch."""
    config = ModelConfig(family="qwen3_moe", num_hidden_layers=15, hidden_size=1024, num_attention_heads=16,
                         num_key_value_heads=4, head_dim=64, num_experts=48, num_experts_per_tok=4, moe_intermediate_size=768,
                         tie_word_embeddings=False, max_position_embeddings=4096)
    try:
        wanted = write_bf16_folder(tmp_path / "model", config, 151_936, shard_bytes=1_500_000_000)
        _, peak, held, head, expert = measure(tmp_path / "model", weights_dtype)
    finally:
        for file in (tmp_path / "model").iterdir():  # 4 GB
            file.unlink()
    assert held / (4 if weights_dtype == "float32" else 2) > 2.0e9
    assert peak < 1.2 * held, f"{peak / held:.3f}"
    assert head == float(wanted["lm_head.weight"][-1, -1])
    assert expert == float(wanted["model.layers.14.mlp.experts.47.down_proj.weight"][0, 0])
    print(f"{weights_dtype}: peak {peak / 1e9:.2f} GB of {held / 1e9:.2f} GB of weights, {peak / held:.3f}")
