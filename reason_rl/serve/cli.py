"""Talk to a checkpoint: `python -m reason_rl.serve.cli runs/program/checkpoints/final "a2,b*3,c-1?"` streams thought and answer.

The thought is shown dim and the answer bold (plain text if the output is not a terminal). `--samples 3` draws several completions,
`--temperature 0` is greedy, `--seed` draws others. The prompt is the text as given; `--template chat` turns it into a prompt as a
run with that task.template does. Without a prompt, problems are read from stdin, one per line.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console

from reason_rl.config import EngineConfig, RunConfig
from reason_rl.data import TextStream, Tokenizer, load_template
from reason_rl.data.prompts import PromptTemplate
from reason_rl.engine import Engine, check_fits
from reason_rl.model.weights import load_for_sampling
from reason_rl.parallel.world import init_world
from reason_rl.records import ConfigError, Problem, SamplingParams

TAG = re.compile(r"</?(?:think|answer)>")
LONGEST_TAG = len("</answer>")
STYLES = {"<think>": "dim", "<answer>": "bold green"}
"""The style of the text after an opening tag, up to the end of its closing tag."""
DEFAULT_MAX_TOKENS = 4096
"""Longest completion unless --max-tokens is given: the KV cache is allocated for it, and a context may have 100,000 tokens."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m reason_rl.serve.cli", description="Stream a model's thought and answer.")
    parser.add_argument("checkpoint", help="a checkpoint folder, e.g. runs/program/checkpoints/final")
    parser.add_argument("prompt", nargs="?", help="the problem as text; without it, problems are read line by line")
    parser.add_argument("--samples", type=int, default=1, help="completions to draw (default 1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default 1)")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="default 1")
    parser.add_argument("--min-p", type=float, default=0.0, help="default 0")
    parser.add_argument("--max-tokens", type=int, help=f"default: what the context leaves, at most {DEFAULT_MAX_TOKENS}")
    parser.add_argument("--seed", type=int, default=0, help="draws other completions (default 0)")
    parser.add_argument("--template", default="plain", help="plain, r1_zero, chat, few_shot, or a .toml file (default plain)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 or auto (default cpu)")
    return parser.parse_args(arguments)


def make_printer(tokenizer: Tokenizer, console: Console, prefix: str = "") -> Callable[[int], None]:
    """-> a function that shows one token: thoughts dim, answers bold, end tokens not at all. `prefix` is shown at once."""
    stream, style, tail = TextStream(tokenizer), "", ""

    def show(token: int) -> None:
        write(stream.flush() if token in tokenizer.stop_ids else stream.push(token))

    def write(text: str) -> None:
        nonlocal style, tail
        # A tag may be split over several tokens: search the end of the earlier text too.
        recent = tail + text
        tags = [tag for tag in TAG.finditer(recent) if tag.end() > len(tail)]
        style = STYLES.get(tags[-1].group(), style) if tags else style
        console.print(text, end="", style=style, markup=False, highlight=False, soft_wrap=True)
        console.file.flush()
        if tags and tags[-1].group() not in STYLES:
            style = ""
        tail = recent[-LONGEST_TAG:]

    if prefix:
        write(prefix)
    return show


def make_sampling(options: argparse.Namespace, tokenizer: Tokenizer) -> SamplingParams:
    """Raises ValueError for an option out of range."""
    if options.samples < 1:
        raise ConfigError(f"--samples must be at least 1, got {options.samples}")
    max_tokens = DEFAULT_MAX_TOKENS if options.max_tokens is None else options.max_tokens
    return SamplingParams(options.temperature, options.top_k, options.top_p, options.min_p, max_tokens, tokenizer.stop_ids)


def make_problem(template: PromptTemplate, tokenizer: Tokenizer, text: str, number: int) -> Problem:
    """The text as a problem without an answer. Raises ValueError if it is empty or cannot be encoded."""
    if not text:
        raise ConfigError("the prompt is empty")
    prompt = template.fill(text, tokenizer)
    (ids,) = template.encode([prompt], tokenizer)
    return Problem(number, "", prompt, tuple(ids), "", completion_prefix=template.prefix_of(prompt))


def fit(sampling: SamplingParams, problem: Problem, engine: Engine, is_default: bool) -> SamplingParams:
    """The default max_tokens shrinks to the room in the context; raises ValueError if the given one does not fit."""
    context, num_prompt = engine.model.config.max_position_embeddings, len(problem.prompt_ids)
    if num_prompt >= context:
        raise ConfigError(f"the prompt has {num_prompt} tokens and leaves no room in the model's context of {context}")
    if is_default:
        sampling = replace(sampling, max_tokens=min(context - num_prompt, sampling.max_tokens))
    check_fits([problem], sampling.max_tokens, context, engine.config.num_blocks)
    return sampling


def answer(
    engine: Engine, tokenizer: Tokenizer, console: Console, problem: Problem, sampling: SamplingParams, num_samples: int
) -> None:
    """Streams the samples one after another; `step` gives each its own noise."""
    for sample in range(num_samples):
        show = make_printer(tokenizer, console, problem.completion_prefix)
        engine.generate([problem], 1, sampling, step=sample,
                        on_token=lambda problem, index, token, show=show: show(token))  # type: ignore[misc]
        console.print()


def main(arguments: list[str] | None = None) -> int:
    """Bad input is one line on stderr; any other error is a bug and keeps its traceback."""
    options = parse(arguments)
    try:
        try:
            device = init_world(RunConfig(device=options.device, dtype="float32")).device
            tokenizer, model = Tokenizer.load(options.checkpoint), load_for_sampling(options.checkpoint, device, torch.float32)
            template, sampling = load_template(options.template), make_sampling(options, tokenizer)
        except (ConfigError, OSError) as error:
            return refuse(error)
        engine, console = Engine(model, EngineConfig(), options.seed), Console()

        # One prompt, or one per line of stdin. A line that is refused does not end the session.
        for number, line in enumerate(sys.stdin if options.prompt is None else [options.prompt]):
            try:
                problem = make_problem(template, tokenizer, line.rstrip("\n"), number)
                fitting = fit(sampling, problem, engine, is_default=options.max_tokens is None)
            except ConfigError as error:
                code = refuse(error)
                if options.prompt is not None:
                    return code
                continue
            answer(engine, tokenizer, console, problem, fitting, options.samples)
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def refuse(error: Exception) -> int:
    print(f"serve: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
