"""Problems and documents: the room where a step and a corpus begin.

    tokenizer.py   text <-> token ids, a checkpoint's or our own; side_files.py, what its folder says beside tokenizer.json
    chat.py        a checkpoint's chat template, in a sandbox
    prompts.py     what stands around a problem: templates, in prompts/
    tasks/         program, arithmetic, countdown: exercises, worked thoughts, facts; files.py: gsm8k, math, code, jsonl
    split.py       disjoint shares by hash
    problems.py    `Problem`s for RL steps and held-out evaluation; dataset.py those that stand in files, difficulty.py by pass rate
    corpus.py      documents for pretraining
"""

from __future__ import annotations

from reason_rl.data.corpus import Document, corpus_documents
from reason_rl.data.dataset import load_dataset
from reason_rl.data.problems import (
    Problems,
    TooFewProblems,
    check_problems,
    describe_problems,
    heldout_problems,
    is_file_task,
    load_problems,
    problems_digest,
    problems_to_check,
    rl_problems,
    split_of,
    task_of,
)
from reason_rl.data.prompts import load_template
from reason_rl.data.tasks import FILE_TASKS, TASKS
from reason_rl.data.tokenizer import TextStream, Tokenizer, byte_tokenizer, char_tokenizer, tokenizer_of

__all__ = ["FILE_TASKS", "TASKS", "Document", "Problems", "TextStream", "Tokenizer", "TooFewProblems", "byte_tokenizer",
           "char_tokenizer", "check_problems", "corpus_documents", "describe_problems", "heldout_problems", "is_file_task",
           "load_dataset", "load_problems", "load_template", "problems_digest", "problems_to_check", "rl_problems", "split_of",
           "task_of", "tokenizer_of"]
