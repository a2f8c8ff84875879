"""Resources of each Triton kernel on each architecture, compiled without a GPU.

    python -m bench.resources [op ...] [--json FILE]

Registers per thread, bytes spilled, shared memory per program, matrix instructions and asynchronous copies.
tests/kernels/test_ahead_of_time.py compares them with bench/results/triton_resources.json: write it again
after a change of a kernel.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.harness import add_json_option, write_json
from kernels.__main__ import render
from kernels.ahead_of_time import SHARED_LIMIT, compile_for, compiles_of, ops_with_triton
from kernels.checks import SHORT


def measure(ops: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{"linear_fwd bf16 sm_90": {"registers": .., ..}}"""
    return {
        f"{what.name} {SHORT[what.dtype]} sm_{capability}": asdict(compile_for(what, capability))
        for op in ops for what in compiles_of(op) for capability in SHARED_LIMIT
    }


def main(arguments: Sequence[str] | None = None) -> None:
    # Options.
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(ops_with_triton())} (default: all)")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.ops) - set(ops_with_triton()))
    if unknown:
        parser.error(f"no Triton kernel of {', '.join(unknown)}; there are {', '.join(ops_with_triton())}")

    # Compile, print and record.
    import triton

    rows = measure(options.ops or ops_with_triton())
    print(render([("kernel", *next(iter(rows.values()))), *((name, *map(str, row.values())) for name, row in rows.items())]))
    write_json({"triton": triton.__version__, "kernels": rows}, options.json)


if __name__ == "__main__":
    main()
