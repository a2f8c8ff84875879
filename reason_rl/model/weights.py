"""Weights on disk: Hugging Face folders in and out, config.json by hf_config.py and safetensors, in one file or in shards.

The network keeps q, k, v and the experts as fused matrices; the files keep them apart. `file_views` is the one place that knows
how: each tensor of the files as a view into our state. Loading copies into those views, piece by piece from mapped files, so that
beside the weights there is never more than a piece; saving writes them out.
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

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
SIDE_FILES = (GENERATION_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
              "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model")
"""What belongs to a model and is neither weights, config.json nor tokenizer.json."""
SHARD_BYTES = 5_000_000_000
PIECE_BYTES = 64 << 20
"""Bytes of a file that are read before it is mapped anew: once read, a mapping's pages count as the process's own memory."""
FILE_DTYPES = ("F32", "BF16", "F16", "F64")


def file_views(state: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Our state dict -> its parts by the family's names, sharing memory with it."""
    tensors = {**TENSORS, **(FAMILIES[config.family].tensors if config.family in FAMILIES else {})}
    qkv_rows = [config.num_attention_heads * config.head_dim] + [config.num_key_value_heads * config.head_dim] * 2
    views: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        layer = name.split(".")[1] if name.startswith("blocks.") else ""
        pattern = name.replace(f"blocks.{layer}.", "blocks.{i}.", 1) if layer else name
        if pattern.endswith("expert_bias") and not config.expert_bias:
            continue
        theirs = tensors[pattern]
        for expert, matrix in enumerate(tensor.unbind(0) if "{e}" in theirs[0] else [tensor]):
            parts = matrix.split(qkv_rows if len(theirs) == 3 else matrix.shape[0] // len(theirs))
            for file_name, part in zip(theirs, parts, strict=True):
                views[file_name.format(i=layer, e=expert)] = part
    return views


@dataclass(frozen=True)
class Source:
    """What the folder a model came from holds beside its weights, for the folders that it will be saved to."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """Its config.json."""
    files: Mapping[str, bytes] = field(default_factory=dict)


def read_source(folder: Path) -> Source:
    return Source(read_json(folder / CONFIG_FILE), {name: (folder / name).read_bytes() for name in SIDE_FILES
                                                    if (folder / name).is_file()})


# --- saving

def save_weights(
    folder: Path, state: Mapping[str, torch.Tensor], config: ModelConfig, vocab_size: int, eos_id: int,
    source: Source | None = None, shard_bytes: int = SHARD_BYTES,
) -> None:
    """`state` by our names, whole tensors (see trainer.distributed.full_state)."""
    source = source or Source()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors*"):  # another number of shards, perhaps
        old.unlink()
    shards = list(_shards(file_views(state, config), shard_bytes))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # safetensors refuses tensors that share memory (slices of fused matrices do), so each is cloned.
        save_file({name: view.detach().cpu().clone() for name, view in shard.items()}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        total = sum(view.numel() * view.element_size() for shard in shards for view in shard.values())
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    dtype = str(state["embedding.weight"].dtype).removeprefix("torch.")
    values = config_to_json(config, vocab_size, eos_id, source.config) | {"torch_dtype": dtype}
    _write_json(folder / CONFIG_FILE, values)
    _write_json(folder / GENERATION_FILE, {"_from_model_config": True, "eos_token_id": values["eos_token_id"]})
    for name, content in source.files.items():
        (folder / name).write_bytes(content)


def _shards(views: Mapping[str, torch.Tensor], shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """In the state's order, each of at most `shard_bytes`, or of one tensor that is larger."""
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
    """Fill `model` (on the CPU, not yet sharded) from the folder's safetensors, in the dtypes that the model has."""
    views = file_views(model.state_dict(), model.config)
    holders = _check_tensors(folder, views, model)
    for path in dict.fromkeys(holders.values()):
        for name, start, piece in _pieces(path, [name for name in views if holders[name] == path]):
            views[name][start : start + piece.shape[0]].copy_(piece)


def load_model(
    folder: str | Path, compute_dtype: torch.dtype = torch.float32, weights_dtype: torch.dtype = torch.float32
) -> Transformer:
    """The model of a checkpoint folder, on the CPU. weights_dtype = compute_dtype = bfloat16 holds its matrices in bfloat16, half
    the memory and the same bits, for a model that is only evaluated; to train, masters are float32."""
    folder = Path(folder)
    if weights_dtype not in (torch.float32, compute_dtype):
        raise ValueError(f"weights_dtype must be float32 or compute_dtype = {compute_dtype}, got {weights_dtype}")
    config, vocab_size = read_model_config(folder)
    model = Transformer(config, vocab_size, compute_dtype)
    if weights_dtype != torch.float32:
        model.hold_in(weights_dtype)
    load_weights(folder, model)
    return model


def _pieces(path: Path, names: list[str]) -> Iterator[tuple[str, int, torch.Tensor]]:
    """(name, first row, rows) of the file's tensors, in rows that stay mapped only until the next ones are asked for."""
    file, used = safe_open(path, framework="pt"), 0
    for name in names:
        num_rows, *rest = file.get_slice(name).get_shape()
        row_bytes = 4 * torch.Size(rest).numel()
        step = max(1, PIECE_BYTES // row_bytes)
        for start in range(0, num_rows, step):
            size = min(step, num_rows - start) * row_bytes
            if used + size > PIECE_BYTES:
                file, used = safe_open(path, framework="pt"), 0
            used += size
            yield name, start, file.get_slice(name)[start : start + step]


def _weight_files(folder: Path) -> list[Path]:
    """The folder's one file, or the shards that its index names."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not (folder / INDEX_FILE).is_file():
        pickled = "; *.bin is not read, as it may hold code: save it as safetensors" if any(folder.glob("*.bin")) else ""
        raise ValueError(f"{folder} is not a checkpoint: it has no {WEIGHTS_FILE} and no {INDEX_FILE}{pickled}")
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) and "/" not in name for name in weight_map.values()):
        raise ValueError(f"{folder / INDEX_FILE} is damaged: weight_map must hold the name of a file for each tensor")
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is incomplete: of {len(shards)} shards {_some(missing)} missing")
    return [folder / name for name in shards]


def _check_tensors(folder: Path, views: Mapping[str, torch.Tensor], model: Transformer) -> dict[str, Path]:
    """All of it before anything is copied -> the file that holds each tensor of the model."""
    holders: dict[str, Path] = {}
    wrong: list[str] = []
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    stored = file.get_slice(name)
                    holders[name] = path
                    if name in views and list(views[name].shape) != stored.get_shape():
                        wrong.append(f"{name}: expected {list(views[name].shape)}, got {stored.get_shape()}")
                    if name in views and stored.get_dtype() not in FILE_DTYPES:
                        raise ValueError(f"{path}: {name} must be {'|'.join(FILE_DTYPES)}, got {stored.get_dtype()}")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    _leave_out(folder, holders, model)
    missing, unexpected = sorted(views.keys() - holders.keys()), sorted(holders.keys() - views.keys())
    if missing or unexpected or wrong:
        parts = [f"{what} {_some(names)}" for what, names in
                 (("missing", missing), ("unexpected", unexpected), ("misshapen", sorted(wrong))) if names]
        if "lm_head.weight" in missing:
            parts.append("config.json does not tie the head to the embedding (tie_word_embeddings)")
        raise ValueError(f"the checkpoint in {folder} does not fit its config.json: {'; '.join(parts)}")
    return {name: holders[name] for name in views}


def _leave_out(folder: Path, holders: dict[str, Path], model: Transformer) -> None:
    """Take from `holders` what a folder may hold and the model has no place for."""
    for name in [name for name in holders if name.endswith(DERIVED_TENSORS)]:
        del holders[name]
    if model.head is None and "lm_head.weight" in holders:
        if "model.embed_tokens.weight" in holders:
            _check_tied(holders)
        del holders["lm_head.weight"]
    num_extra = read_json(folder / CONFIG_FILE).get("num_nextn_predict_layers") or 0
    prefixes = tuple(f"model.layers.{model.config.num_hidden_layers + i}." for i in range(num_extra))
    extra = [name for name in holders if prefixes and name.startswith(prefixes)]
    for name in extra:
        del holders[name]
    if extra:
        warnings.warn(f"{folder}: {_some(extra)} of layers that predict further tokens (num_nextn_predict_layers) are left out",
                      stacklevel=2)


def _check_tied(holders: Mapping[str, Path]) -> None:
    """A head that is stored although it is tied must be the embedding."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    head, embedding = (_pieces(holders[name], [name]) for name in names)
    if not all(a is not None and b is not None and torch.equal(a[2], b[2]) for a, b in zip_longest(head, embedding)):
        raise ValueError(f"config.json ties the head to the embedding (tie_word_embeddings), but {names[0]} is not {names[1]}")


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''} ({len(names)})"
