"""Problems and documents: the room where a step and a corpus begin.

    tokenizer.py   text <-> token ids, a checkpoint's or our own; side_files.py, what its folder says beside tokenizer.json
    chat.py        a checkpoint's chat template, in a sandbox
    tasks/         program, arithmetic, countdown: exercises, worked thoughts, facts
    problems.py    disjoint shares by hash; `Problem`s for RL steps and held-out evaluation
    corpus.py      documents for pretraining
"""

from __future__ import annotations

from reason_rl.data.corpus import Document, corpus_documents
from reason_rl.data.problems import check_problems, heldout_problems, rl_problems, split_of, task_of
from reason_rl.data.tasks import TASKS
from reason_rl.data.tokenizer import TextStream, Tokenizer, byte_tokenizer, char_tokenizer, tokenizer_of

__all__ = ["TASKS", "Document", "TextStream", "Tokenizer", "byte_tokenizer", "char_tokenizer", "check_problems", "corpus_documents",
           "heldout_problems", "rl_problems", "split_of", "task_of", "tokenizer_of"]
