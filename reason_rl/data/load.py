"""Makes a config's `Problems`: read from files or generated, by task.name."""

from __future__ import annotations

from reason_rl.config import Config
from reason_rl.data.from_files import FileProblems
from reason_rl.data.generated import GeneratedProblems
from reason_rl.data.problems import Problems
from reason_rl.data.tasks import FILE_TASKS
from reason_rl.data.tokenizer import Tokenizer


def load_problems(config: Config, tokenizer: Tokenizer) -> Problems:
    """Reads and checks the task's files, if it has any. Later changes of the files have no effect."""
    make = FileProblems if config.task.name in FILE_TASKS else GeneratedProblems
    return make(config, tokenizer)
