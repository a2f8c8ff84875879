"""The three drawings of docs/, drawn from what the code does with small examples.

    .venv/bin/python -m docs.drawings.draw      writes docs/drawings/{step,microbatch,blocks}.svg

The numbers come from `compute_advantages`, `pack` and `Scheduler`; tests/test_docs.py holds the files to them.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch

from docs.drawings.svg import Drawing
from reason_rl.config import RLConfig
from reason_rl.engine.blocks import BlockPool
from reason_rl.engine.scheduler import Prompt, Scheduler, Sequence
from reason_rl.records import Completion, Group, Microbatch, Problem, Score
from reason_rl.rl.advantages import compute_advantages
from reason_rl.rl.packing import pack

FOLDER = Path(__file__).resolve().parent
REWARDS = ((1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 1.0, 0.0))
LENGTHS = ((5, 3, 4, 6), (4, 6, 5, 3))
COLOURS = "abcd"


def example_group(prompt: str, completions: SequenceOf[str], rewards: SequenceOf[float]) -> Group:
    """A group whose tokens are characters."""
    problem = Problem(problem_id=ord(prompt[0]), task="example", prompt=prompt, prompt_ids=tuple(map(ord, prompt)), answer="")
    return Group(problem, tuple(
        Completion(tuple(map(ord, text)), (0.0,) * len(text), (0.0,) * len(text), "stop", policy_version=0, sample_index=index)
        for index, text in enumerate(completions)), tuple(Score(reward, {"accuracy": reward}) for reward in rewards))


def step() -> Drawing:
    """One GRPO step from problems to the update, with B = 2 prompts and G = 4 completions."""
    groups = [example_group("abc"[: 2 + row], ["x" * length for length in LENGTHS[row]], REWARDS[row]) for row in (0, 1)]
    rl = RLConfig(advantage="mean", num_minibatches=1)
    advantages = compute_advantages(groups, rl, torch.device("cpu"))
    ((microbatch,),) = pack(groups, advantages, rl.num_minibatches, microbatch_tokens=64)

    drawing = Drawing("One GRPO step: problems, completions, rewards, advantages, a packed microbatch, the update", 604)

    # Problems and completions: a prompt, then a bar for each completion.
    head(drawing, 24, "1  problems", "B = 2", "the same list on every rank")
    for row in (0, 1):
        drawing.box(14, 50 + 24 * row, 12 * (2 + row), 18, COLOURS[row])
        drawing.text(60, 63 + 24 * row, "a prompt of " + ("two tokens", "three tokens")[row], "quiet")
    head(drawing, 120, "2  rollouts", "B x G = 2 x 4", "the engine samples a group per problem")
    for row in (0, 1):
        for column, length in enumerate(LENGTHS[row]):
            drawing.box(14 + 84 * column, 146 + 24 * row, 12 * length, 18, COLOURS[row])

    # Rewards and advantages, as tables.
    head(drawing, 216, "3  rewards", "f32[B, G]", "graded as each completion ends")
    head(drawing, 310, "4  advantages", "f32[B, G]", "reward minus the mean of its group")
    for row in (0, 1):
        for column in range(4):
            drawing.box(14 + 84 * column, 242 + 24 * row, 76, 18, COLOURS[row], f"{REWARDS[row][column]:g}")
            value = float(advantages.advantages[row, column])
            drawing.box(14 + 84 * column, 336 + 24 * row, 76, 18, COLOURS[row], f"{value:+g}")

    # The microbatch, to scale.
    head(drawing, 404, "5  packing", f"T = {microbatch.num_tokens}, N = {microbatch.num_loss_tokens}",
         "P: each prompt, once for its group")
    scale, first_group = 332 / microbatch.num_tokens, 2 + sum(length - 1 for length in LENGTHS[0])
    for start, length, _, prefix in microbatch.segments.tolist():
        row = int(start >= first_group)
        drawing.box(14 + scale * start, 430, scale * length - 1, 22, COLOURS[row], "" if prefix else "P")

    update(drawing)
    return drawing


def head(drawing: Drawing, y: int, name: str, shape: str, words: str) -> None:
    """The title of one stage of the step, its shape on the right, and a sentence."""
    drawing.text(14, y, name, "text title")
    drawing.text(346, y, shape, "text code", "end")
    drawing.text(14, y + 17, words, "quiet")


def update(drawing: Drawing) -> None:
    """From hidden states to the optimizer step."""
    head(drawing, 484, "6  update", "logits_index i64[N]", "the rows that predict sampled tokens")
    for index, (words, x, width) in enumerate((("hidden [T,D]", 14, 98), ("[N,D]", 136, 54), ("logprobs f32[N]", 214, 132))):
        drawing.box(x, 510, width, 22, "empty", words)
        if index:
            drawing.arrow((x - 23, 521), (x - 1, 521))
    drawing.arrow((280, 532), (280, 549))
    drawing.box(214, 550, 132, 22, "empty", "loss f32[]")
    drawing.arrow((214, 561), (191, 561))
    drawing.box(14, 550, 176, 22, "c", "backward, clip, step")
    drawing.text(14, 592, "the next step samples with the new weights", "quiet")


def example_microbatch() -> Microbatch:
    """The worked example of records.Microbatch: prompt [a b c], completions [x y w] and [z]."""
    groups = [example_group("abc", ("xyw", "z"), (1.0, 0.0))]
    advantages = compute_advantages(groups, RLConfig(advantage="mean"), torch.device("cpu"))
    ((microbatch,),) = pack(groups, advantages, 1, microbatch_tokens=64)
    return microbatch


def can_see(microbatch: Microbatch) -> list[list[bool]]:
    """[T][T]: whether a query (first index) attends to a key. A segment sees its prefix, then itself causally."""
    seen = [[False] * microbatch.num_tokens for _ in range(microbatch.num_tokens)]
    for start, length, prefix_start, prefix_length in microbatch.segments.tolist():
        for query in range(start, start + length):
            for key in (*range(prefix_start, prefix_start + prefix_length), *range(start, query + 1)):
                seen[query][key] = True
    return seen


def microbatch() -> Drawing:
    """A microbatch: tokens, segments, the attention mask, and which row predicts which target."""
    batch, drawing = example_microbatch(), Drawing("A packed microbatch: tokens, segments, mask, logits_index, targets", 462)
    tokens, cell, left = [chr(token) for token in batch.token_ids.tolist()], 40, 146
    drawing.text(14, 24, "prompt a b c, completions x y w and z", "text title")

    # A column for each packed token.
    names = ("token_ids", "position_ids", "segment")
    segment_of = [number for number, (_, length, *_) in enumerate(batch.segments.tolist()) for _ in range(length)]
    rows = (tokens, batch.position_ids.tolist(), segment_of)
    for row, (name, values) in enumerate(zip(names, rows, strict=True)):
        drawing.text(14, 54 + 28 * row, name, "text code")
        for column, value in enumerate(values):
            drawing.box(left + cell * column, 38 + 28 * row, cell - 3, 24, COLOURS[segment_of[column]], str(value))
    drawing.text(14, 140, "T = 5: the last tokens, w and z, are left out", "quiet")

    # The mask, query by key.
    drawing.text(14, 174, "the mask", "text title")
    drawing.text(14, 192, "query: row", "quiet")
    drawing.text(14, 208, "key: column", "quiet")
    for query, seen in enumerate(can_see(batch)):
        y = 162 + 25 * query
        drawing.text(left - 12, y + 16, tokens[query], "text code", "end")
        for key, is_seen in enumerate(seen):
            drawing.box(left + cell * key, y, cell - 3, 22, COLOURS[segment_of[key]] if is_seen else "off", "1" if is_seen else "")

    loss_tokens(drawing, batch, tokens)
    return drawing


def loss_tokens(drawing: Drawing, batch: Microbatch, tokens: SequenceOf[str]) -> None:
    """Each loss token is predicted by the hidden state at its logits_index."""
    cell, left = 40, 146
    drawing.text(14, 318, "the loss tokens, N = 4", "text title")
    index, targets = batch.logits_index.tolist(), [chr(target) for target in batch.target_ids.tolist()]
    lines = (("logits_index", index), ("its token", [tokens[i] for i in index]), ("target_ids", targets),
             ("sequence_index", batch.sequence_index.tolist()))
    for row, (name, values) in enumerate(lines):
        y = 330 + 26 * row
        drawing.text(14, y + 16, name, "text code")
        for column, value in enumerate(values):
            sequence = batch.sequence_index.tolist()[column]
            drawing.box(left + cell * column, y, cell - 3, 22, "cd"[sequence], str(value))
    drawing.text(14, 450, "c predicts the first token of both: x and z", "quiet")


def blocks() -> Drawing:
    """Three moments of a KV pool of 8 blocks: a shared prompt, a preemption, a return."""
    drawing = Drawing("KV blocks: three completions share a prompt, one is preempted and returns", 596)
    problem = Problem(problem_id=0, task="example", prompt="", prompt_ids=tuple(range(20)), answer="")
    pool, prompt = BlockPool(8), Prompt(problem)
    scheduler, sequences = Scheduler(pool, max_num_seqs=8), [Sequence(prompt, index, noise_key=index) for index in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)

    # All three fit: two blocks for the prompt, one for each completion.
    scheduler.admit()
    frame(drawing, 0, "1  admit", "3 completions share the prompt's 2 blocks", pool, prompt, sequences)

    # At 17 tokens each needs a second block, and the pool has two: the youngest gives way.
    for sequence in sequences:
        sequence.token_ids = list(range(17))
    scheduler.grow()
    frame(drawing, 1, "2  preempt", "all need one more block; the youngest waits", pool, prompt, sequences)

    # The first one ends; its blocks make room.
    scheduler.finish(sequences[0])
    scheduler.admit()
    frame(drawing, 2, "3  return", "s0 ends, so s2 gets blocks and a prefill", pool, prompt, sequences[1:])
    return drawing


def frame(
    drawing: Drawing, number: int, title: str, words: str, pool: BlockPool, prompt: Prompt, sequences: SequenceOf[Sequence]
) -> None:
    """The pool's blocks with their ref_count, then the block table of each sequence."""
    top, cell = 14 + 194 * number, 41
    drawing.text(14, top + 12, title, "text title")
    drawing.text(346, top + 12, "x: ref_count", "quiet", "end")
    drawing.text(14, top + 30, words, "quiet")

    # The pool.
    owner = {block: COLOURS[1 + s.sample_index] for s in sequences for block in s.blocks} | dict.fromkeys(prompt.blocks, "a")
    for block in range(pool.num_blocks):
        users = prompt.num_running if block in prompt.blocks else int(block in owner)
        left, colour = 14 + cell * block, owner.get(block, "empty" if block else "off")
        drawing.box(left, top + 42, cell - 4, 26, colour, str(block) if block else "null")
        drawing.text(left + (cell - 4) / 2, top + 84, f"x{users}" if users else "-", "quiet code", "middle")

    # The block tables.
    for row, sequence in enumerate(sequences):
        y = top + 98 + 26 * row
        drawing.text(14, y + 16, f"s{sequence.sample_index}", "text code")
        if not sequence.blocks:
            drawing.text(48, y + 16, f"waits, and keeps its {len(sequence.token_ids)} tokens", "quiet")
            continue
        for column, block in enumerate([*prompt.blocks, *sequence.blocks]):
            drawing.box(48 + cell * column, y, cell - 4, 21, owner[block], str(block))
        if not row:
            drawing.text(346, y + 16, "block tables", "quiet", "end")


DRAWINGS = {"step": step, "microbatch": microbatch, "blocks": blocks}


def main() -> None:
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw().render(), encoding="utf-8")


if __name__ == "__main__":
    main()
