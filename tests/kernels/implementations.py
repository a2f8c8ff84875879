"""A test file over every implementation of its op that the CPU has: `implementation = each_implementation(OP)` at the top of it.

"auto" then means the one in turn, in the dtypes it is for. impl="torch" is left out: it promises no bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.dispatch import Implementation, Op


def each_implementation(op: Op) -> Any:
    cpu = torch.device("cpu")
    able = {i.name: i for i in op.implementations if i.is_automatic and not i.refuses(cpu, torch.float32)}

    @pytest.fixture(params=list(able), autouse=True)
    def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        choose, name = Op.choose, request.param

        def choose_this(self: Op, like: torch.Tensor, impl: str = "auto") -> Implementation:
            is_meant = self is op and impl == "auto" and not able[name].refuses(like.device, like.dtype)
            return choose(self, like, name if is_meant else impl)

        monkeypatch.setattr(Op, "choose", choose_this)
        return str(name)

    return implementation
