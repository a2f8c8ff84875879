"""Text in and out of the model: tokenizers, tasks and their problems, documents for pretraining.

    tokenizer.py   text <-> token ids; side_files.py reads the files next to tokenizer.json
    chat.py        renders a checkpoint's chat template in a sandbox
    prompts.py     templates, shipped in prompts/, that turn a problem's text into a prompt
    tasks/         generated tasks (program, countdown, your own), tasks from files (gsm8k, math, code, jsonl)
    split.py       assigns each exercise to a split by hash
    problems.py    `Problems`, the interface that a run draws problems from; load.py makes one from the config
    generated.py   problems drawn from a generated task
    from_files.py  problems read from JSONL files (rows.py), filtered and ordered by pass rate (difficulty.py)
    corpus.py      documents for pretraining
"""

from __future__ import annotations

from reason_rl.data.corpus import Document, corpus_documents
from reason_rl.data.load import load_problems
from reason_rl.data.problems import Problems, TooFewProblems, problems_digest
from reason_rl.data.prompts import load_template
from reason_rl.data.tasks import FILE_TASKS, TASKS, CorpusTask, Exercise, Task, Work, load_task
from reason_rl.data.tokenizer import TextStream, Tokenizer, byte_tokenizer, char_tokenizer, tokenizer_of

__all__ = ["FILE_TASKS", "TASKS", "CorpusTask", "Document", "Exercise", "Problems", "Task", "TextStream", "Tokenizer",
           "TooFewProblems", "Work", "byte_tokenizer", "char_tokenizer", "corpus_documents", "load_problems", "load_task",
           "load_template", "problems_digest", "tokenizer_of"]
