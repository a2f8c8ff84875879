"""The configuration of a run.

    schema.py, task.py, reward.py   its sections
    load.py                         reads TOML and the command line, writes TOML
    checks.py                       refuses a config that cannot run
    help.py                         the text of `train.py --help`
"""

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
    "Config", "ConfigError", "EngineConfig", "EvalConfig", "ModelConfig", "OptimConfig", "PretrainConfig", "RLConfig",
    "RewardConfig", "RunConfig", "StageConfig", "TaskConfig", "config_difference", "config_of_stage", "dump_config", "load_config",
    "parse_command_line", "table_of",
]
