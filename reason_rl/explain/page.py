"""The record of one step as a self-contained HTML file: no script, no request.

The functions give page.html.jinja its rows, in the order of the step: completions, blocks, rewards and advantages, packing, loss,
update. Completion 2.3 is the third of the second problem. The look is report.html's, and page.css.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from kernels.attention import BLOCK_SIZE
from reason_rl.explain.by_hand import Terms, advantage, terms_of
from reason_rl.explain.step import BlockMoment, Explanation, RecordedMicrobatch, RecordedUpdate
from reason_rl.records import Completion, Group, Score
from reason_rl.report import page as report_page
from reason_rl.report.files import atomic_write_text
from reason_rl.report.text import printable
from reason_rl.reward.grade import weights_of
from reason_rl.rl.advantages import compute_advantages
from reason_rl.rl.packing import Sample

HERE = Path(__file__).parent
TAG = re.compile(r"</?(?:think|answer)>")
FULL_SURPRISE = 4.0
"""Nats: a token of this logprob or less has the full colour."""
MAX_MOMENTS = 24
"""Moments of sampling on the page; more are thinned evenly."""
Row = dict[str, Any]


def write_page(explanation: Explanation, path: Path) -> None:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True)
    for name, spec in (("n", ".9g"), ("g", ".6g"), ("signed", "+.6g")):  # nine digits are a float32 in full
        environment.filters[name] = partial(lambda spec, value: format(value, spec), spec)
    text = environment.get_template("page.html.jinja").render(**Page(explanation).context())
    # A model's text may hold lone surrogates, which UTF-8 cannot encode.
    atomic_write_text(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))


def regions(pieces: Sequence[str], prefix: str) -> list[str]:
    """Of each token: "think", "answer", "markup" (a tag itself), or ""."""
    text, found = prefix + "".join(pieces), []
    tags = list(TAG.finditer(text))
    for start in accumulate(map(len, pieces[:-1]), initial=len(prefix)):
        before = [tag for tag in tags if tag.start() <= start]
        if not before:
            found.append("")
        elif before[-1].end() > start:
            found.append("markup")
        else:
            found.append("" if "/" in before[-1].group() else before[-1].group().strip("<>"))
    return found


def visible(piece: str) -> str:
    """A token's text with newlines shown; a token that is not a whole character yet as "…"."""
    return printable(piece).replace("\n", "↵") or "…"


def mask_of(completion: Completion) -> tuple[bool, ...]:
    """Per token: sampled by the policy, and so a target."""
    return completion.token_mask or (True,) * len(completion.token_ids)


def thinned(moments: Sequence[list[Row]]) -> list[list[Row]]:
    last = len(moments) - 1
    if last < MAX_MOMENTS:
        return list(moments)
    return [moments[round(i * last / (MAX_MOMENTS - 1))] for i in range(MAX_MOMENTS)]


class Page:
    def __init__(self, explanation: Explanation) -> None:
        self.stage, self.stats, self.checkpoint = explanation.stage, explanation.stats, explanation.checkpoint
        self.config, self.tokenizer = self.stage.config, self.stage.tokenizer
        self.group_numbers = {id(group.problem): number for number, group in enumerate(self.stats.groups, 1)}

    def context(self) -> Row:
        css = (report_page.HERE / "page.css").read_text(encoding="utf-8") + (HERE / "page.css").read_text(encoding="utf-8")
        return {
            "css": Markup(css), "name": str(self.checkpoint), "config": self.config, "loss": self.stage.loss,
            "block_size": BLOCK_SIZE, "temperature": self.config.sampling.temperature, "stats": self.stats,
            "groups": [self.group(number, group) for number, group in enumerate(self.stats.groups)],
            "blocks": self.blocks(), "updates": [self.update(one) for one in self.stage.updates],
        }

    # Completions, rewards, advantages.

    def group(self, number: int, group: Group) -> Row:
        """A problem and its completions with their rewards and advantages; `number` counts from 0."""
        graded = [[score.value for score in one.scores if score.is_graded] for one in self.stats.groups]
        batch = [value for values in graded for value in values]
        takes_part = compute_advantages(self.stats.groups, self.config.rl, self.stage.world.device).mask[number].tolist()
        rows = []

        # A row for each completion.
        for index, (completion, score) in enumerate(zip(group.completions, group.scores, strict=True)):
            row = {"name": f"{number + 1}.{index + 1}", "score": score, "advantage": self.stats.advantages[number][index],
                   "tokens": self.tokens(completion, group.problem.completion_prefix), "completion": completion,
                   "sum": self.reward_sum(score), "formula": "", "left_out": ""}
            if not takes_part[index]:
                row["left_out"] = self.why_left_out(score, completion, graded[number])
            else:
                row["formula"], row["by_hand"] = advantage(score.value, graded[number], batch, self.config.rl.advantage)
            rows.append(row)

        # The group's statistics.
        values = graded[number]
        return {"number": number, "problem": group.problem, "prompt": printable(group.problem.prompt), "rows": rows,
                "graded": values, "mean": statistics.fmean(values) if values else None,
                "std": statistics.stdev(values) if len(values) > 1 else None}

    def tokens(self, completion: Completion, prefix: str) -> list[Row]:
        pieces = self.tokenizer.pieces(completion.token_ids)
        return [
            {"text": visible(piece), "id": token, "logprob": logprob, "is_sampled": is_sampled,
             "region": "end" if token in self.tokenizer.stop_ids else region,
             "surprise": round(min(1.0, -logprob / FULL_SURPRISE), 3) + 0.0}
            for piece, token, logprob, region, is_sampled in zip(
                pieces, completion.token_ids, completion.logprobs, regions(pieces, prefix), mask_of(completion), strict=True)]

    def reward_sum(self, score: Score) -> str:
        weights = weights_of(self.config.reward)
        return " + ".join(f"{weights[name]:g} × {value:.6g} ({name})" for name, value in score.parts.items() if weights[name])

    def why_left_out(self, score: Score, completion: Completion, graded: Sequence[float]) -> str:
        if not score.is_graded:
            return f"not graded: {score.cause}"
        if self.config.rl.drop_truncated and completion.finish_reason == "length":
            return "cut at max_tokens (rl.drop_truncated)"
        return f"no signal: the group's rewards are all {graded[0]:.6g} (rl.drop_no_signal)"

    # KV blocks.

    def blocks(self) -> Row:
        """A row for each moment with a cell for each block ever used, and the blocks that each owner held."""
        moments = [owners for moment in self.stage.moments if (owners := self.owners(moment))]
        used = sorted({block for owners in moments for owner in owners for block in owner["blocks"]})
        rows = []
        for owners in thinned(moments):
            cells = {block: owner for owner in owners for block in owner["blocks"]}
            rows.append({"moment": owners[0]["moment"], "cells": [cells.get(block) for block in used],
                         "longest": max(owner["sampled"] for owner in owners)})

        # Prompts and their completions, in the step's order.
        held: dict[str, Row] = {}
        for owner in sorted((owner for owners in moments for owner in owners), key=lambda owner: (owner["number"], owner["index"])):
            row = held.setdefault(owner["name"], {"owner": owner, "blocks": [], "highest": 0})
            row["blocks"] += [block for block in owner["blocks"] if block not in row["blocks"]]
            row["highest"] = max(row["highest"], owner["ref_count"])
        return {"used": used, "rows": rows, "held": held, "num_moments": len(moments),
                "preemptions": self.stage.engine.num_preemptions}

    def owners(self, moment: BlockMoment) -> list[Row]:
        """Who holds blocks at a moment: prompts (index 0) and completions (index from 1) of the step's groups. Problems that
        dynamic sampling replaced are left out."""
        held = [(problem, 0, blocks, ref_count, 0) for problem, blocks, ref_count in moment.prompts]
        held += [(problem, index + 1, blocks, 1, sampled) for problem, index, blocks, sampled in moment.sequences]
        owners = []
        for problem, index, blocks, ref_count, sampled in held:
            if number := self.group_numbers.get(id(problem)):
                group = self.stats.groups[number - 1]
                owners.append({"name": f"{number}.{index}" if index else f"P{number}", "number": number, "index": index,
                               "blocks": blocks, "ref_count": ref_count, "sampled": sampled, "moment": moment,
                               "tokens": len(group.completions[index - 1].token_ids if index else problem.prompt_ids)})
        return owners

    # Packing, loss, update.

    def update(self, update: RecordedUpdate) -> Row:
        """An update's loss by the kernel and by hand, with everything below it."""
        microbatches = [self.microbatch(one) for one in update.microbatches]
        by_hand = sum(one["by_hand"] for one in microbatches)
        size = sum(abs(token["term"]) for one in microbatches for token in one["targets"])
        kernel, inputs = update.metrics["loss"], update.microbatches[0].inputs
        return {"microbatches": microbatches, "by_hand": by_hand, "kernel": kernel, "difference": kernel - by_hand,
                "relative": abs(kernel - by_hand) / size if size else 0.0, "record": update,
                "num_tokens": inputs.total_loss_tokens, "num_sequences": inputs.total_sequences,
                "clip_factor": min(1.0, (self.config.optim.clip_norm or float("inf")) / max(update.metrics["grad_norm"], 1e-12)),
                "sequences": [row for one in microbatches for row in one["sequences"]]}

    def microbatch(self, one: RecordedMicrobatch) -> Row:
        """A microbatch's segments, and its loss tokens by completion."""
        terms = terms_of(one.logprobs, one.inputs, self.stage.loss, one.entropy)
        targets = self.targets(one, terms)
        sequences = []
        for index, sample in enumerate(one.samples):
            own = [target for target in targets if target["sequence"] == index]
            sequences.append({"name": self.name_of(sample), "advantage": own[0]["advantage"], "num_tokens": len(own),
                              "sum": sum(target["term"] for target in own), "before": sum(target["logprob"] for target in own),
                              "after": sum(target["new_logprob"] for target in own), "targets": own})
        return {"segments": self.segments(one, targets), "targets": targets, "sequences": sequences, "loss": one.loss,
                "by_hand": float(terms.value.sum()), "num_tokens": one.microbatch.num_tokens}

    def targets(self, one: RecordedMicrobatch, terms: Terms) -> list[Row]:
        """The loss tokens, n = 0..N-1."""
        microbatch, inputs = one.microbatch, one.inputs
        assert microbatch.rollout_logprobs is not None
        columns = {
            "logits_index": microbatch.logits_index, "id": microbatch.target_ids, "sequence": microbatch.sequence_index,
            "rollout_logprob": microbatch.rollout_logprobs, "old_logprob": inputs.old_logprobs, "logprob": one.logprobs,
            "difference": one.logprobs - microbatch.rollout_logprobs, "new_logprob": one.new_logprobs,
            "advantage": inputs.advantages, "ratio": terms.ratio, "surrogate": terms.surrogate, "importance": terms.importance,
            "penalty": terms.penalty, "weight": terms.weight, "term": terms.value}
        values = {name: column.tolist() for name, column in columns.items()}
        rows = [{name: values[name][n] for name in values} | {"n": n, "clip": terms.clips[n]} for n in range(len(terms.clips))]

        # Each token's text, and the completion that it belongs to.
        sampled = [text for sample in one.samples for text, is_target in zip(
            self.texts(sample.completion.token_ids), mask_of(sample.completion), strict=True) if is_target]
        for row, text in zip(rows, sampled, strict=True):
            row["text"], row["name"] = text, self.name_of(one.samples[row["sequence"]])
        return rows

    def segments(self, one: RecordedMicrobatch, targets: Sequence[Row]) -> list[Row]:
        """Each segment with its tokens: index, text, position_id, and the targets that its hidden state predicts."""
        microbatch = one.microbatch
        token_ids, position_ids = microbatch.token_ids.tolist(), microbatch.position_ids.tolist()
        predicted: dict[int, list[Row]] = {}
        for target in targets:
            predicted.setdefault(target["logits_index"], []).append(target)
        rows = []
        for (name, group, mask), (start, length, *prefix) in zip(self.owners_of(one), microbatch.segments.tolist(), strict=True):
            texts = self.texts(token_ids[start : start + length])
            cells = [{"index": i, "text": text, "position": position_ids[i], "targets": predicted.get(i, [])}
                     for i, text in enumerate(texts, start)]
            rows.append({"name": name, "segment": (start, length, *prefix), "is_prompt": mask is None, "group": group + 1,
                         "mask": mask, "cells": cells})
        return rows

    def owners_of(self, one: RecordedMicrobatch) -> Iterator[tuple[str, int, tuple[bool, ...] | None]]:
        """(name, group, token mask) of each segment: a prompt before the first completion of its group. A completion of one token
        has no segment, as its last token predicts nothing."""
        last_group = -1
        for sample in one.samples:
            if sample.group_id != last_group:
                last_group = sample.group_id
                yield f"P{last_group + 1}", last_group, None
            if len(sample.completion.token_ids) > 1:
                yield self.name_of(sample), last_group, mask_of(sample.completion)

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        return [visible(piece) for piece in self.tokenizer.pieces(token_ids)]

    def name_of(self, sample: Sample) -> str:
        return f"{sample.group_id + 1}.{sample.index + 1}"
