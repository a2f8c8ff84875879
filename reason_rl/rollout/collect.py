"""Sample and grade: problems in, graded groups out. Training and evaluation share this one path.

`collect` covers two stages of a GRPO step. The engine samples; each completion goes to the verifiers as soon as it ends, so that
grading overlaps the sampling of the others. `refill` adds DAPO's dynamic sampling.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from reason_rl.data import TooFewProblems
from reason_rl.engine import Engine
from reason_rl.parallel.world import World
from reason_rl.records import Completion, Group, Problem, SamplingParams
from reason_rl.report.clock import Clock
from reason_rl.reward import Grader, Pending
from reason_rl.rl.advantages import has_signal

EVAL_KEY = 1 << 40
"""Offset of `step` in evaluations, so that their noise differs from that of rollouts. A stage adds it once (pass@k: twice),
`python -m reason_rl.eval` three times."""


@dataclass
class _Grading:
    """The completions of one `collect` that wait for their verdicts, and the groups that are graded."""

    grader: Grader
    group_size: int
    on_group: Callable[[Group], None] | None
    on_completion: Callable[[Problem, Completion], None] | None
    pending: dict[int, dict[int, tuple[Completion, Pending]]] = field(default_factory=dict)
    """By id(problem), then by sample_index. problem_id would not do: a batch may contain a problem twice."""
    sampled: deque[Problem] = field(default_factory=deque)
    """Problems whose group is fully sampled but not yet graded, in the order in which sampling finished."""
    graded: dict[int, Group] = field(default_factory=dict)
    """By id(problem)."""

    def add(self, problem: Problem, completion: Completion) -> None:
        """Sends a completion to the verifiers, then passes on the groups that are graded by now."""
        samples = self.pending.setdefault(id(problem), {})
        samples[completion.sample_index] = completion, self.grader.submit(problem, completion)
        if len(samples) == self.group_size:
            self.sampled.append(problem)
        if self.on_completion is not None:
            self.on_completion(problem, completion)
        while self.sampled and all(one.is_done for _, one in self.pending[id(self.sampled[0])].values()):
            self._grade_next()

    def finish(self) -> None:
        """Waits for the verdicts of every group that is fully sampled."""
        while self.sampled:
            self._grade_next()

    def _grade_next(self) -> None:
        problem = self.sampled.popleft()
        samples = self.pending[id(problem)]
        completions, pending = zip(*(samples[index] for index in range(self.group_size)), strict=True)
        group = self.graded[id(problem)] = Group(problem, completions, tuple(one.score() for one in pending))
        if self.on_group is not None:
            self.on_group(group)


def collect(
    engine: Engine, grader: Grader, problems: Sequence[Problem], group_size: int, sampling: SamplingParams, *,
    world: World, step: int, policy_version: int = 0, with_routed_experts: bool = False,
    on_group: Callable[[Group], None] | None = None, on_completion: Callable[[Problem, Completion], None] | None = None,
    clock: Clock | None = None,
) -> list[Group]:
    """`group_size` graded completions of each problem; every rank gets all groups, in the problems' order.

    Each rank samples and grades its share of the problems. `step` is part of the noise key.
    on_completion: called on this rank as each completion ends.
    on_group: called on this rank as soon as a group is graded, in the order in which groups finish sampling; the group lacks
        the routed experts of its prompt. If sampling is interrupted, fully sampled groups are still graded and passed on.
    clock: "reward" counts the wait for verdicts after the last completion, "rollout" the rest.
    """
    clock = clock or Clock()
    grading = _Grading(grader, group_size, on_group, on_completion)

    # Sample. Without on_group, an interrupted call has no use for its groups, so it does not wait for their verdicts.
    try:
        with clock("rollout"):
            sampled = engine.generate(
                world.share(problems), group_size, sampling, step=step, policy_version=policy_version, on_finish=grading.add,
                with_routed_experts=with_routed_experts)
    except BaseException:
        if on_group is not None:
            grading.finish()
        raise

    # Wait for the last verdicts, then exchange groups between the ranks.
    with clock("reward"):
        grading.finish()
    graded = [group.with_scores(grading.graded[id(group.problem)].scores) for group in sampled]
    with clock("rollout"):
        return world.gather_shares(graded)


def refill(
    sampled: list[Group], max_rounds: int, *, draw: Callable[[int, int, Collection[int]], list[Problem]],
    sample: Callable[[Sequence[Problem]], list[Group]],
) -> list[Group]:
    """DAPO's dynamic sampling (arXiv:2503.14476, section 3.2): replaces groups without signal by groups of fresh problems.

    Returns a batch as large as `sampled` was, and appends every new group to `sampled`. Each round draws one problem for every
    place that is still open. After the last round, or once the task has no more problems, groups without signal fill the places.
    draw: (count, round from 1, ids of all problems so far) -> problems. sample: `collect` with its other arguments bound.
    """
    num_groups, new = len(sampled), sampled
    batch: list[Group] = []
    without_signal: list[Group] = []
    for round_number in range(1, 2 + max_rounds):
        # Keep the groups of the latest round that have signal.
        for group in new:
            (batch if has_signal(group) else without_signal).append(group)
        missing = num_groups - len(batch)
        if not missing or round_number > max_rounds:
            break

        # Draw and sample a problem for each of the others.
        try:
            problems = draw(missing, round_number, {group.problem.problem_id for group in sampled})
        except TooFewProblems:
            break
        new = sample(problems)
        sampled += new
    return batch + without_signal[: num_groups - len(batch)]
