"""`python -m kernels [--device cuda] [--dtype bfloat16]`: prints which implementation of each op runs here,
and why.

Imports every op package, which fills the registry, and prints one line per op.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Sequence

import torch

import kernels
from kernels.dispatch import table

HEADER = ("op", "available", "picked", "why")


def import_ops() -> list[str]:
    """Import every package under kernels/ and return their names."""
    names = sorted(module.name for module in pkgutil.iter_modules(kernels.__path__) if module.ispkg)
    for name in names:
        importlib.import_module(f"kernels.{name}")
    return names


def render(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as left-aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    parser.add_argument("--device", default=default, help=f"torch device to choose for (default here: {default})")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype that the model computes in")
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"--device must name a torch device such as cpu or cuda, got {options.device!r}")
    import_ops()
    print(f"kernels {kernels.__version__}, torch {torch.__version__}, device {device}, {options.dtype}")
    print(render([HEADER, *table(device, getattr(torch, options.dtype))]))


if __name__ == "__main__":
    main()
