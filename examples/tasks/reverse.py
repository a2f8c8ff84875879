"""A task: write a word backwards.

    .venv/bin/python train.py --name reverse --task.name=examples.tasks.reverse:Reverse --pretrain.direct_noise=0.7

direct_noise makes 70% of the corpus's answers without a thought wrong. Otherwise the base model learns from
them to reverse at once, and RL finds nothing to improve.

A generated task needs `levels` and `draw`. The other three methods write the documents that a base model is
pretrained on. To train a checkpoint (--model.init_from=FOLDER), subclass `Task` and leave them out. See
docs/tasks.md.
"""

from __future__ import annotations

import random
import string

from reason_rl.data import CorpusTask, Exercise, Work


class Reverse(CorpusTask):
    levels = range(1, 11)
    """A level is the number of letters; task.min_level and task.max_level choose among them."""

    def draw(self, rng: random.Random, level: int, operations: str) -> Exercise:
        """"crab?" -> "barc". A function of its arguments alone, so that a run can be repeated."""
        word = "".join(rng.choices(string.ascii_lowercase, k=level))
        return Exercise(prompt=f"{word}?", level=level, answer=word[::-1], key=word)

    def work(self, exercise: Exercise) -> Work:
        """The thought: one letter more in each line, as in "c,rc,arc,barc"."""
        word = exercise.answer[::-1]
        return Work(lines=tuple(word[:end][::-1] for end in range(1, len(word) + 1)), answer=exercise.answer)

    def wrong_answer(self, rng: random.Random, exercise: Exercise) -> str:
        """An answer of the corpus without a thought, as often as pretrain.direct_noise asks."""
        return exercise.answer + rng.choice(string.ascii_lowercase)

    def fact(self, rng: random.Random, operations: str) -> str:
        """A short document about one step: a letter goes to the front."""
        end, letter = (rng.choice(string.ascii_lowercase) for _ in range(2))
        return f"{end},{letter}{end}"
