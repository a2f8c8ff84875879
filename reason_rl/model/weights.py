"""Reads and writes Hugging Face checkpoint folders: config.json and safetensors, in one file or in shards.

The network fuses q, k, v and the experts into larger matrices; the files store them separately. `file_views`
maps one to the other: each tensor of the files is a view into our state dict. Loading copies into the views
from memory-mapped files, in chunks of CHUNK_BYTES, so its peak memory is the weights plus one chunk. Saving
writes the views out.
Left out: tokenizer.json (reason_rl/data), optimizer state (trainer/checkpoint.py), pickled weights.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from reason_rl.config import ModelConfig
from reason_rl.model.families import DERIVED_TENSORS, FAMILIES, TENSORS
from reason_rl.model.hf_config import CONFIG_FILE, config_to_json, read_json, read_model_config
from reason_rl.model.transformer import Transformer
from reason_rl.records import ConfigError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
SIDE_FILES = (GENERATION_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
              "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model")
"""Further files of a model, copied from checkpoint to checkpoint."""
SHARD_BYTES = 5_000_000_000
CHUNK_BYTES = 64 << 20
"""Bytes read from a file before it is mapped again: pages that were read count as memory until unmapped."""
FILE_DTYPES = ("F32", "BF16", "F16", "F64")


def file_views(state: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Our state dict -> views into it, by the family's tensor names."""
    tensors = {**TENSORS, **(FAMILIES[config.family].tensors if config.family in FAMILIES else {})}
    qkv_rows = [config.num_attention_heads * config.head_dim] + [config.num_key_value_heads * config.head_dim] * 2
    views: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        # "blocks.3.mlp.router" -> layer "3", pattern "blocks.{i}.mlp.router"
        layer = name.split(".")[1] if name.startswith("blocks.") else ""
        pattern = name.replace(f"blocks.{layer}.", "blocks.{i}.", 1) if layer else name
        if pattern.endswith("expert_bias") and not config.expert_bias:
            continue

        # Split by expert, then along the first dimension: q, k, v or gate, up.
        file_names = tensors[pattern]
        for expert, matrix in enumerate(tensor.unbind(0) if "{e}" in file_names[0] else [tensor]):
            blocks = matrix.split(qkv_rows if len(file_names) == 3 else matrix.shape[0] // len(file_names))
            for file_name, block in zip(file_names, blocks, strict=True):
                views[file_name.format(i=layer, e=expert)] = block
    return views


@dataclass(frozen=True)
class Source:
    """What a saved folder takes over from the folder that the model was loaded from."""

    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Name -> content of each of SIDE_FILES that the folder has."""


def read_source(folder: Path) -> Source:
    return Source(read_json(folder / CONFIG_FILE), {name: (folder / name).read_bytes() for name in SIDE_FILES
                                                    if (folder / name).is_file()})


# --- saving

def save_weights(
    folder: Path, state: Mapping[str, torch.Tensor], config: ModelConfig, vocab_size: int, eos_id: int,
    source: Source | None = None, shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint folder. `state`: our names -> unsharded tensors (parallel.fsdp.full_state)."""
    source = source or Source()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors*"):  # an earlier checkpoint may have had more shards
        old.unlink()

    # Weights, and their index if there are several files.
    shards = list(_shards(file_views(state, config), shard_bytes))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # safetensors refuses tensors that share memory, and views into one fused matrix do: clone each.
        save_file({name: view.detach().cpu().clone() for name, view in shard.items()}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        total = sum(view.numel() * view.element_size() for shard in shards for view in shard.values())
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})

    # Configs and the files carried from the source.
    dtype = str(state["embedding.weight"].dtype).removeprefix("torch.")
    values = config_to_json(config, vocab_size, eos_id, source.config) | {"torch_dtype": dtype}
    _write_json(folder / CONFIG_FILE, values)
    _write_json(folder / GENERATION_FILE, {"_from_model_config": True, "eos_token_id": values["eos_token_id"]})
    for name, content in source.files.items():
        (folder / name).write_bytes(content)


def _shards(views: Mapping[str, torch.Tensor], shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Splits `views`, in order, into shards of at most `shard_bytes`; a larger tensor has one to itself."""
    shard: dict[str, torch.Tensor] = {}
    used = 0
    for name, view in views.items():
        size = view.numel() * view.element_size()
        if shard and used + size > shard_bytes:
            yield shard
            shard, used = {}, 0
        shard[name] = view
        used += size
    yield shard


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


# --- loading

@torch.no_grad()
def load_weights(folder: Path, model: Transformer) -> None:
    """Fills `model` (on the CPU, not sharded) from the folder's safetensors, cast to the model's dtypes."""
    views = file_views(model.state_dict(), model.config)
    path_of = _check_tensors(folder, views, model)
    for path in dict.fromkeys(path_of.values()):
        for name, start, chunk in _chunks(path, [name for name in views if path_of[name] == path]):
            views[name][start : start + chunk.shape[0]].copy_(chunk)


def check_weights(folder: Path) -> None:
    """Raises for a folder whose safetensors cannot be read or are not those of its config.json. Reads no weights."""
    with torch.device("meta"):
        model = Transformer(*read_model_config(folder))
    _check_tensors(folder, file_views(model.state_dict(), model.config), model)


def load_model(
    folder: str | Path, compute_dtype: torch.dtype = torch.float32, weights_dtype: torch.dtype = torch.float32
) -> Transformer:
    """The model of a checkpoint folder, on the CPU, with float32 masters. For evaluation alone, weights_dtype
    = compute_dtype = bfloat16 stores the matrices in bfloat16: half the memory, the same bits."""
    folder = Path(folder)
    if weights_dtype not in (torch.float32, compute_dtype):
        raise ValueError(f"weights_dtype must be float32 or compute_dtype = {compute_dtype}, got {weights_dtype}")
    config, vocab_size = read_model_config(folder)
    model = Transformer(config, vocab_size, compute_dtype)
    if weights_dtype != torch.float32:
        model.hold_in(weights_dtype)
    load_weights(folder, model)
    return model


def load_for_sampling(folder: str | Path, device: torch.device, dtype: torch.dtype, batch_invariant: bool = True) -> Transformer:
    """The model of a checkpoint folder for an engine: on `device`, its matrices stored in `dtype`, without gradients."""
    model = load_model(folder, dtype, weights_dtype=dtype).to(device).requires_grad_(False)
    return model.set_batch_invariant(batch_invariant)


def _chunks(path: Path, names: list[str]) -> Iterator[tuple[str, int, torch.Tensor]]:
    """-> (name, start, tensor[start:stop]), chunk by chunk; each is valid until the next is requested."""
    file, used = safe_open(path, framework="pt"), 0
    for name in names:
        num_rows, *rest = file.get_slice(name).get_shape()
        row_bytes = 4 * torch.Size(rest).numel()  # as float32
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, num_rows, step):
            size = min(step, num_rows - start) * row_bytes
            if used + size > CHUNK_BYTES:
                file, used = safe_open(path, framework="pt"), 0
            used += size
            yield name, start, file.get_slice(name)[start : start + step]


def _weight_files(folder: Path) -> list[Path]:
    """The folder's single file, or the shards of its index."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not (folder / INDEX_FILE).is_file():
        pickled = "; *.bin is not read, as it may hold code: save it as safetensors" if any(folder.glob("*.bin")) else ""
        raise ConfigError(f"{folder} is not a checkpoint: it has no {WEIGHTS_FILE} and no {INDEX_FILE}{pickled}")
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) and "/" not in name for name in weight_map.values()):
        raise ConfigError(f"{folder / INDEX_FILE} is damaged: weight_map must map each tensor to a file name, "
                         f"got {weight_map!r:.80}")
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder} is incomplete: of {len(shards)} shards {_some(missing)} missing")
    return [folder / name for name in shards]


def _check_tensors(folder: Path, views: Mapping[str, torch.Tensor], model: Transformer) -> dict[str, Path]:
    """Compares the folder's tensors with the model's before any is copied -> tensor name -> its file."""
    path_of: dict[str, Path] = {}
    wrong: list[str] = []

    # List the tensors of every file, with wrong shapes and dtypes.
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    stored = file.get_slice(name)
                    path_of[name] = path
                    if name in views and list(views[name].shape) != stored.get_shape():
                        wrong.append(f"{name}: expected {list(views[name].shape)}, got {stored.get_shape()}")
                    if name in views and stored.get_dtype() not in FILE_DTYPES:
                        raise ConfigError(f"{path}: {name} must be {'|'.join(FILE_DTYPES)}, got {stored.get_dtype()}")
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is damaged: {error}") from error

    # All differences in one message.
    _drop_ignored(folder, path_of, model)
    missing, unexpected = sorted(views.keys() - path_of.keys()), sorted(path_of.keys() - views.keys())
    if missing or unexpected or wrong:
        problems = [f"{problem} {_some(names)}" for problem, names in
                    (("missing", missing), ("unexpected", unexpected), ("misshapen", sorted(wrong))) if names]
        if "lm_head.weight" in missing:
            problems.append("config.json does not tie the head to the embedding (tie_word_embeddings)")
        raise ConfigError(f"the checkpoint in {folder} does not fit its config.json: {'; '.join(problems)}")
    return {name: path_of[name] for name in views}


def _drop_ignored(folder: Path, path_of: dict[str, Path], model: Transformer) -> None:
    """Removes from `path_of` the tensors that a folder may hold and the model does not use."""
    for name in [name for name in path_of if name.endswith(DERIVED_TENSORS)]:
        del path_of[name]

    # A tied head that is stored again.
    if model.head is None and "lm_head.weight" in path_of:
        if "model.embed_tokens.weight" in path_of:
            _check_tied(path_of)
        del path_of["lm_head.weight"]

    # Layers for multi-token prediction, after the model's own.
    num_extra = read_json(folder / CONFIG_FILE).get("num_nextn_predict_layers") or 0
    prefixes = tuple(f"model.layers.{model.config.num_hidden_layers + i}." for i in range(num_extra))
    extra = [name for name in path_of if prefixes and name.startswith(prefixes)]
    for name in extra:
        del path_of[name]
    if extra:
        warnings.warn(f"{folder}: ignoring {_some(extra)}, of layers that predict further tokens (num_nextn_predict_layers)",
                      stacklevel=2)


def _check_tied(path_of: Mapping[str, Path]) -> None:
    """ValueError unless the stored head equals the embedding that it is tied to."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    head, embedding = (_chunks(path_of[name], [name]) for name in names)
    if not all(a is not None and b is not None and torch.equal(a[2], b[2]) for a, b in zip_longest(head, embedding)):
        raise ConfigError(f"config.json ties the head to the embedding (tie_word_embeddings), but {names[0]} is not {names[1]}")


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''} ({len(names)})"
