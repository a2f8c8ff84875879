"""The run's configuration: schema.py its sections, load.py TOML and command line, checks.py what cannot run, help.py `--help`."""

from reason_rl.config.load import (
    config_difference,
    config_of_stage,
    dump_config,
    load_config,
    parse_command_line,
    table_of,
)
from reason_rl.config.reward import RewardConfig
from reason_rl.config.schema import (
    Config,
    EngineConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RLConfig,
    RunConfig,
    StageConfig,
)
from reason_rl.config.task import TaskConfig
from reason_rl.records import ConfigError

__all__ = [
    "Config", "ConfigError", "EngineConfig", "EvalConfig", "ModelConfig", "OptimConfig", "PretrainConfig", "RLConfig", "RewardConfig", "RunConfig",
    "StageConfig", "TaskConfig", "config_difference", "config_of_stage", "dump_config", "load_config", "parse_command_line", "table_of"]
