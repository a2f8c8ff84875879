"""Talk to a checkpoint: `python -m reason_rl.serve.cli runs/program/checkpoints/final "a2,b*3,c-1?"` streams thought and answer.

The thought is shown dim, the answer bold (plain text where the output is no terminal). `--samples 3` draws several,
`--temperature 0` is greedy, `--seed` picks other draws. The text goes in as it stands; `--template chat` puts around it what a run
with that task.template does.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

import torch
from rich.console import Console

from reason_rl.config import EngineConfig
from reason_rl.data import TextStream, Tokenizer, load_template
from reason_rl.engine import Engine
from reason_rl.model.weights import load_model
from reason_rl.records import Problem, SamplingParams

TAG = re.compile(r"</?(?:think|answer)>")
LONGEST_TAG = len("</answer>")
STYLES = {"<think>": "dim", "<answer>": "bold green"}
"""From an opening tag to the closing one."""
MOST_TOKENS = 4096
"""Of a completion unless asked for: the cache is allotted for all of them, and a context may have a hundred thousand."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m reason_rl.serve.cli", description="Stream a model's thought and answer.")
    parser.add_argument("checkpoint", help="a checkpoint folder, e.g. runs/program/checkpoints/final")
    parser.add_argument("prompt", nargs="?", help="the problem as text; without it, problems are read line by line")
    parser.add_argument("--samples", type=int, default=1, help="completions to draw (default 1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default 1)")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=0, help=f"0: what the context leaves, at most {MOST_TOKENS} (default)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--template", default="plain", help="plain, r1_zero, chat, few_shot, or a .toml file (default plain)")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


def printer(tokenizer: Tokenizer, console: Console, prefix: str = "") -> Callable[[int], None]:
    """-> a function that shows one token: the thought dim, the answer bold, the end token not at all. prefix is shown at once."""
    stream, style, tail = TextStream(tokenizer), "", ""

    def show(token: int) -> None:
        write(stream.flush() if token in tokenizer.stop_ids else stream.push(token))

    def write(text: str) -> None:
        nonlocal style, tail
        told = tail + text  # a tag may be several tokens
        found = [tag for tag in TAG.finditer(told) if tag.end() > len(tail)]
        style = STYLES.get(found[-1].group(), style) if found else style
        console.print(text, end="", style=style, markup=False, highlight=False, soft_wrap=True)
        console.file.flush()
        if found and found[-1].group() not in STYLES:
            style = ""
        tail = told[-LONGEST_TAG:]

    if prefix:
        write(prefix)
    return show


def answer(engine: Engine, tokenizer: Tokenizer, console: Console, options: argparse.Namespace, prompt: str, number: int) -> None:
    """Stream the samples of one prompt."""
    template = load_template(options.template)
    if not prompt:
        raise ValueError("the prompt is empty")
    text = template.fill(prompt, tokenizer)
    ids = tuple(template.encode([text], tokenizer)[0])
    room = engine.model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise ValueError(f"the prompt has {len(ids)} tokens, which leaves no room in the model's context of "
                         f"{engine.model.config.max_position_embeddings}")
    sampling = SamplingParams(options.temperature, options.top_k, options.top_p, options.min_p,
                              options.max_tokens or min(room, MOST_TOKENS), tokenizer.stop_ids)
    for sample in range(options.samples):
        show = printer(tokenizer, console, template.prefix_of(text))
        # One sample at a time, so that tokens stream; the step keeps their draws apart.
        engine.generate([Problem(number, "", text, ids, "")], 1, sampling, step=sample,
                        on_token=lambda problem, index, token, show=show: show(token))  # type: ignore[misc]
        console.print()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        tokenizer, model = Tokenizer.load(options.checkpoint), load_model(options.checkpoint).to(options.device).eval()
        engine, console = Engine(model, EngineConfig(), options.seed), Console()
        if options.prompt is not None:
            answer(engine, tokenizer, console, options, options.prompt, 0)
            return 0
        for number, line in enumerate(sys.stdin):
            try:
                answer(engine, tokenizer, console, options, line.rstrip("\n"), number)
            except ValueError as error:  # of this line; the next may do better
                print(f"generate: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print()
        return 130
    except (ValueError, RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        print(f"generate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
