"""config.json <-> ModelConfig, by the table of families.py.

Reading is strict: a key that could change the maths is either read, or refused by name and value. ModelConfig
fields that the family has no key for (a from-scratch model with other switches) go into a table "reason_rl"
of config.json, so that a config survives writing and reading. Left out: tensors (weights.py), tokenizers
(reason_rl/data).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from reason_rl.config import ModelConfig
from reason_rl.config.checks import check_model
from reason_rl.model.families import FAMILIES, HARMLESS, ONLY, REFUSED, Family
from reason_rl.model.rope import ORIGINAL, SCALINGS, parse_scaling
from reason_rl.records import ConfigError

CONFIG_FILE = "config.json"
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", ORIGINAL)
WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
DENSE_LAYER_KEYS = {"": (), "mlp_only_layers": ("mlp_only_layers", "decoder_sparse_step"),
                    "first_k_dense_replace": ("first_k_dense_replace",)}
"""Family.dense_key -> all keys that select dense layers."""
NOT_IN_JSON = ("init_from", "family")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON file's table; ValueError where it holds anything else."""
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is damaged: it must hold a table, got {type(values).__name__}")
    return values


def read_model_config(folder: Path) -> tuple[ModelConfig, int]:
    """config.json of a checkpoint folder -> (ModelConfig, vocab_size)."""
    if not folder.is_dir():
        raise ConfigError(f"no checkpoint folder at {folder}")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} is not a checkpoint: it has no {CONFIG_FILE}")
    return config_from_json(read_json(path))


def config_from_json(values: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """-> (ModelConfig, vocab_size). ValueError where a key is missing, unsupported or of the wrong type."""
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        reasons = "".join(f"; {key} = {values[key]!r}: {REFUSED[key]}" for key in REFUSED if _is_on(values.get(key)))
        raise ConfigError(f"config.json: model_type must be one of {', '.join(FAMILIES)}, got {name!r}{reasons}")

    # Read the family's keys, then the "reason_rl" table on top.
    try:
        _check_keys(values, FAMILIES[name])
        found = _read_fields(values, FAMILIES[name]) | _own_fields(values)
        vocab_size = values["vocab_size"]
    except KeyError as error:
        raise ConfigError(f"config.json: {error.args[0]} is missing") from error
    except (TypeError, AttributeError, ZeroDivisionError) as error:  # a string where a table or a number is expected
        raise ConfigError(f"config.json holds a value of the wrong type: {error}") from error

    # Check each value by its field's type, then the values together.
    _check_value("vocab_size", vocab_size, int, 1)
    hints = get_type_hints(ModelConfig)
    for field in fields(ModelConfig):
        assert field.default is not MISSING
        if field.name in found:
            _check_value(field.name, found[field.name], hints[field.name], field.default)
            found[field.name] = float(found[field.name]) if hints[field.name] is float else found[field.name]
    config = ModelConfig(**{**found, "family": name})
    try:
        check_model(config)
        parse_scaling(config.rope_scaling)
    except ValueError as error:
        raise ConfigError(f"config.json: {error}") from error
    return config, vocab_size


def config_to_json(config: ModelConfig, vocab_size: int, eos_id: int, carried: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All but the files' dtype. `carried`: the config.json the model was loaded from; its other keys stay."""
    if config.num_experts == 1:  # a dense model does not use these
        config = replace(config, num_experts_per_tok=1, moe_intermediate_size=ModelConfig.moe_intermediate_size)
    default = "qwen3" if config.num_experts == 1 else "qwen3_moe"
    name = default if config.family == "auto" else config.family
    family = FAMILIES[name]

    # Kept keys: not those that are written below under another spelling.
    replaced = {*ROPE_KEYS, "torch_dtype", "dtype", "reason_rl"}
    replaced |= {key for spellings in family.keys().values() for key in spellings[1:]}
    kept = {key: value for key, value in (carried or {}).items() if key not in replaced}

    # The family's keys.
    values: dict[str, Any] = {
        "hidden_act": "silu", **kept, "eos_token_id": eos_id if kept.get("eos_token_id") is None else kept["eos_token_id"],
        "architectures": [family.architecture], "model_type": name, "vocab_size": vocab_size, **family.written,
        "rope_scaling": json.loads(config.rope_scaling) if config.rope_scaling else None}
    values |= {spellings[0]: getattr(config, field) for field, spellings in family.keys().items()}
    values |= {key: getattr(config, field) == on for field, (key, _, on) in family.switches.items()}
    if family.dense_key == "mlp_only_layers":
        values |= {"mlp_only_layers": list(range(config.num_dense_layers)), "decoder_sparse_step": 1}
    elif family.dense_key:
        values[family.dense_key] = config.num_dense_layers

    # Whatever does not come back through them goes into our own table.
    read_back = asdict(config_from_json(values)[0])
    own = {key: value for key, value in asdict(config).items() if key not in NOT_IN_JSON and value != read_back[key]}
    return values | ({"reason_rl": own} if own else {})


def _is_on(value: object) -> bool:
    return value not in (None, False, 0, "", [], {})


def _check_keys(values: Mapping[str, Any], family: Family) -> None:
    """Every key is read, harmless, switched off, or refused."""
    only = {**ONLY, **family.only}
    read = {key for spellings in family.keys().values() for key in spellings} | {key for key, *_ in family.switches.values()}
    read |= {*ROPE_KEYS, *WINDOW_KEYS, *DENSE_LAYER_KEYS[family.dense_key], *family.ignored, *family.written}
    for key, value in values.items():
        if key in only and value is not None and value not in only[key]:
            raise ConfigError(f"config.json: {key} must be {' or '.join(map(repr, only[key]))}, got {value!r}")
        if key in REFUSED and _is_on(value):
            raise ConfigError(f"config.json: {key} = {value!r} is not supported: {REFUSED[key]}")
        is_known = key in read or key in only or key in HARMLESS or key.startswith("_")
        if not is_known and _is_on(value):
            raise ConfigError(f"config.json: {key} = {value!r} is not a known key of {values['model_type']}: it may change the "
                             "model's maths; remove it if it does not")
    _check_windows(values, family)


def _check_windows(values: Mapping[str, Any], family: Family) -> None:
    """Refuses sliding windows that a layer would use, if they are shorter than the context."""
    def value_of(key: str, missing: Any) -> Any:
        value = values.get(key)
        default = family.default(key)
        return value if value is not None else default if default is not None else missing

    window, layer_types = values.get("sliding_window", family.default("sliding_window")), values.get("layer_types")
    if layer_types is not None:
        is_sliding = any(layer_type != "full_attention" for layer_type in layer_types)
    else:  # transformers derives the layer types so; only some families have max_window_layers
        first = value_of("max_window_layers", 0) if "max_window_layers" in family.defaults else 0
        is_short = window is not None and window < values["max_position_embeddings"]
        is_sliding = bool(value_of("use_sliding_window", True)) and is_short and first < values["num_hidden_layers"]
    if is_sliding:
        found = {key: values[key] for key in WINDOW_KEYS if values.get(key) is not None}
        raise ConfigError(f"config.json: sliding windows are not supported, got {found}")


def _read_fields(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """ModelConfig fields from the family's keys."""
    def read(spellings: tuple[str, ...]) -> Any:
        for key in spellings:
            if values.get(key) is not None:
                return values[key]
        default = family.default(spellings[0])
        if callable(default):
            return default(values)
        if default is None:
            raise KeyError(spellings[0])
        return default

    found = {**family.fixed, "num_dense_layers": _num_dense_layers(values, family, values["num_hidden_layers"])}
    found |= {field: read(spellings) for field, spellings in family.keys().items()}
    for field, (key, off, on) in family.switches.items():
        if not isinstance(values.get(key) or False, bool):
            raise ConfigError(f"config.json: {key} must be true or false, got {values[key]!r}")
        found[field] = on if values.get(key) else off
    return found | _read_rope(values, family)


def _num_dense_layers(values: Mapping[str, Any], family: Family, num_hidden_layers: int) -> int:
    """The number of leading layers without experts; config.json has the number, or a list of layers."""
    if family.dense_key != "mlp_only_layers":
        value: int | None = values.get(family.dense_key)
        return value if value is not None else family.default(family.dense_key) or 0
    listed, sparse_step = values.get("mlp_only_layers") or [], values.get("decoder_sparse_step") or 1
    dense = [i for i in range(num_hidden_layers) if i in listed or (i + 1) % sparse_step]
    if dense != list(range(len(dense))):
        raise ConfigError(f"config.json: dense layers must be the first ones, got mlp_only_layers = {listed} and "
                         f"decoder_sparse_step = {sparse_step}, which make layers {dense} of {num_hidden_layers} dense")
    return len(dense)


def _read_rope(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """rope_theta, partial_rotary_factor, rope_scaling: one table in transformers 5, separate keys before."""
    table = values.get("rope_scaling") or values.get("rope_parameters") or {}
    table = {key: value for key, value in table.items() if value is not None}
    given = {key: value for key, value in values.items() if value is not None}

    theta = table.pop("rope_theta", given.get("rope_theta", family.default("rope_theta")))
    default = family.default("partial_rotary_factor") or 1.0
    factor = table.pop("partial_rotary_factor", given.get("partial_rotary_factor", default))
    if factor != 1 and "partial_rotary_factor" not in family.fields:
        raise ConfigError(f"config.json: partial_rotary_factor must be 1.0 in a {values['model_type']}, got {factor!r}")
    found = {"rope_theta": theta, "partial_rotary_factor": factor}

    # The scaling, if there is one.
    old_spelling = table.pop("type", "default")
    rope_type = table.pop("rope_type", old_spelling)
    if rope_type == "default":
        if table:
            raise ConfigError(f"config.json: RoPE of type 'default' has no scaling, got {table}")
        return found
    if rope_type not in SCALINGS:
        raise ConfigError(f"config.json: rope_type must be default, {' or '.join(SCALINGS)}, got {rope_type!r}")
    if ORIGINAL in SCALINGS[rope_type][0]:
        # transformers' order: the top-level key, the table's, the context.
        table[ORIGINAL] = given.get(ORIGINAL, table.get(ORIGINAL, values["max_position_embeddings"]))
    return {**found, "rope_scaling": json.dumps({"rope_type": rope_type, **table}, sort_keys=True)}


def _own_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The "reason_rl" table: ModelConfig fields that the family has no key for."""
    own = values.get("reason_rl", {})
    unknown = sorted(own.keys() - {field.name for field in fields(ModelConfig)} | own.keys() & set(NOT_IN_JSON))
    if unknown:
        raise ConfigError(f"config.json: reason_rl has unknown keys {', '.join(unknown)}")
    return dict(own)


def _check_value(name: str, value: object, hint: Any, example: object) -> None:
    """ValueError unless `value` has the field's type and is above 0, or 0 if its default `example` is."""
    if get_args(hint):
        if value not in get_args(hint):
            raise ConfigError(f"config.json: {name} must be one of {', '.join(get_args(hint))}, got {value!r}")
        return
    types = (int, float) if hint is float else (hint,)
    if not isinstance(value, types) or isinstance(value, bool) != (hint is bool):
        raise ConfigError(f"config.json: {name} must be {hint.__name__}, got {value!r}")
    if isinstance(value, int | float) and not isinstance(value, bool) and not (value > 0 or (value == 0 and example == 0)):
        raise ConfigError(f"config.json: {name} must be above 0, got {value!r}")
