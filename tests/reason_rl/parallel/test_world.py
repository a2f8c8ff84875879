"""Two processes under torchrun (gloo, CPU) against one: the same completions, the same losses, and checkpoints
that either can resume.

A sharded gradient is summed over ranks, one process sums over microbatches: the order differs, so losses and weights
agree to rounding. Completions sampled from the same weights are equal to the bit.
"""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from reason_rl.config import RunConfig
from reason_rl.model.transformer import Transformer
from reason_rl.model.weights import load_model
from reason_rl.parallel.fsdp import rank_share
from reason_rl.parallel.world import World, init_world
from tests.reason_rl.run.tiny_run import FAR_FROM_DEFAULT, never_stop, rows, run_apart, run_here, stage_folder
from tests.reason_rl.tiny import CPU

METRICS_OF_THE_UPDATE = ("loss", "entropy", "approx_kl", "ratio_max", "ratio_min", "ess", "grad_norm")


def test_shares_put_together_are_the_whole():
    for size in (1, 2, 3, 5):
        for count in (0, 1, 2, 7):
            items = list(range(count))
            parts = [World(rank, size, CPU, torch.float32).share(items) for rank in range(size)]

            class Told(World):
                def gather(self, value: object) -> list:
                    return parts  # noqa: B023

            assert Told(0, size, CPU, torch.float32).gather_shares(parts[0]) == items


def test_ranks_without_work_join_every_round():
    packs, idle = [f"pack {i}" for i in range(5)], "idle"
    shares = [rank_share(packs, World(rank, 3, CPU, torch.float32), idle) for rank in range(3)]  # type: ignore[type-var, arg-type]
    assert shares == [["pack 0", "pack 3"], ["pack 1", "pack 4"], ["pack 2", "idle"]]


def test_threads_are_shared_among_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch):
    from reason_rl.parallel import world as distributed

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    init_world(RunConfig(device="cpu"))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    init_world(RunConfig(device="cpu"))  # for one process alone
    for key, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    world = init_world(RunConfig(device="cpu"))
    init_world(RunConfig(device="cpu", num_threads=3))
    assert asked == [8, 5, 4, 3] and (world.rank, world.size, world.is_main) == (1, 2, False)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as monkeypatch:
        never_stop(monkeypatch)
        assert run_here(out_dir) == 0
    return out_dir


def copy_base(one: Path, out_dir: Path) -> None:
    base = stage_folder(one, "pretrain")
    shutil.copytree(base, out_dir / "stages" / base.name)


@pytest.fixture(scope="module")
def two(one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by two processes, from the base model of the single process."""
    out_dir = tmp_path_factory.mktemp("two")
    copy_base(one, out_dir)
    done = run_apart(out_dir, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return out_dir


@pytest.mark.long
def test_two_processes_sample_the_same_completions_from_the_same_weights(one: Path, two: Path):
    of_one, of_two = (rows(out_dir / "tiny" / "rollouts" / "grpo", "step_000001.jsonl") for out_dir in (one, two))
    assert of_one == of_two  # tokens, logprobs to the bit, rewards, advantages
    evaluations = [rows(out_dir / "tiny", phase="eval")[0] for out_dir in (one, two)]
    assert evaluations[0] == evaluations[1]


@pytest.mark.long
def test_two_processes_make_the_same_update_up_to_rounding(one: Path, two: Path):
    """1e-5: f32 sums of about a hundred terms in another order, then two updates; ratios are their exponentials."""
    of_one, of_two = (rows(out_dir / "tiny", stage="grpo", phase="train")[0] for out_dir in (one, two))
    assert {key: of_two[key] for key in METRICS_OF_THE_UPDATE} == pytest.approx(
        {key: of_one[key] for key in METRICS_OF_THE_UPDATE}, rel=1e-5, abs=1e-5)
    assert of_one["num_loss_tokens"] == of_two["num_loss_tokens"]
    assert {row["max_abs_logprob_gap"] for row in rows(two / "tiny", stage="grpo", phase="train")} == {0.0}


@pytest.mark.long
def test_two_processes_write_one_log(one: Path, two: Path):
    def shape(out_dir: Path) -> list[tuple[str, int]]:
        return [(row["phase"], row["step"]) for row in rows(out_dir / "tiny")]

    assert shape(one) == shape(two)
    assert sorted(p.name for p in (two / "tiny").iterdir()) == sorted(p.name for p in (one / "tiny").iterdir())


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_pretraining_by_two_processes_matches_one(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The distance of the two results against the distance that training moved the weights. 10% for Muon, which scales
    the small singular values of a gradient, which are rounding, up to the large ones; 0.1% for AdamW, where a
    gradient near 0 may change its sign.
    """
    never_stop(monkeypatch)
    more = [f"--pretrain_optim.name={optimizer}", "--pretrain_optim.microbatch_tokens=100", "--pretrain.balance_coef=0.01",
            "--rl.steps=0", "--eval.final_problems=2", "--eval.pass_at_k=0", "--pretrain.steps=10"]
    assert run_here(tmp_path / "one", *more) == 0
    done = run_apart(tmp_path / "two", *more, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [rows(tmp_path / name / "tiny", stage="pretrain")[-1]["loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    models = [load_model(tmp_path / name / "tiny" / "checkpoints" / "final") for name in ("one", "two")]
    start = Transformer(models[0].config, models[0].vocab_size).initialise(0).state_dict()
    for (name, first), second in zip(models[0].state_dict().items(), models[1].state_dict().values()):
        moved, apart = (first - start[name]).norm(), (second - first).norm()
        assert apart <= (0.1 if optimizer == "muon" else 1e-3) * moved, f"{name}: {apart} of {moved}"


@pytest.mark.long
def test_one_process_resumes_a_checkpoint_of_two_and_the_reverse(
    one: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Steps 1 to 4 by two processes and step 5 by one, and the reverse, against five steps by two and by one."""
    never_stop(monkeypatch)
    for source, processes in ((two, 1), (one, 2)):
        out_dir = tmp_path / str(processes)
        shutil.copytree(source, out_dir)
        folder = out_dir / "tiny"
        (folder / "summary.json").unlink()
        for made in (folder / "checkpoints" / "grpo", folder / "checkpoints" / "final", stage_folder(out_dir, "grpo") / "final"):
            shutil.rmtree(made)
        written = (folder / "config.toml").read_text().replace(str(source), str(out_dir))
        (folder / "config.toml").write_text(written)
        (out_dir / "tiny.toml").unlink()
        done = run_apart(out_dir, processes=processes)
        assert done.returncode == 0 and "Resuming from" in done.stdout, done.stdout + done.stderr
        # The rollouts of step 5 come from the weights of step 4, whole in the checkpoint: the same to the bit.
        again, first = (rows(f / "rollouts" / "grpo", "step_000005.jsonl") for f in (folder, source / "tiny"))
        assert again == first
        update, before = (rows(f, stage="grpo", phase="train")[-1] for f in (folder, source / "tiny"))
        assert update["loss"] == pytest.approx(before["loss"], abs=1e-5)
        weights = [load_model(f / "checkpoints" / "final").embedding.weight for f in (folder, source / "tiny")]
        torch.testing.assert_close(*weights, rtol=0, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("more", [
    ["--loss.kl_coef=0.05", "--rl.num_minibatches=16"], ["--dtype=bfloat16", "--optim.name=muon"],
    ["--rl.old_logprobs=recompute", "--loss.importance=tis", "--sampling.top_p=0.9", "--rl.prompts_per_step=1"],
    ["--reward.custom=tests.reason_rl.run.train_rewards:always_raises"], FAR_FROM_DEFAULT,
], ids=lambda more: more[0])  # fmt: skip
def test_every_way_of_training_works_with_two_processes(more: list[str], one: Path, tmp_path: Path):
    """Includes steps of one microbatch, where the second rank is idle, and steps of none."""
    copy_base(one, tmp_path)
    quick = ["--rl.steps=2", "--eval.every=0", "--eval.final_problems=2", "--eval.pass_at_k=0", "--pretrain.steps=4"]
    done = run_apart(tmp_path, *quick, *more, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row.get("max_abs_logprob_gap", 0.0) for row in rows(tmp_path / "tiny", stage="grpo", phase="train")} == {0.0}


@pytest.mark.long
def test_a_refused_config_ends_all_processes_with_the_same_line(tmp_path: Path):
    started = time.monotonic()
    done = run_apart(tmp_path, "--task.heldout_share=0", processes=2)
    assert done.returncode != 0 and time.monotonic() - started < 120
    assert done.stderr.count("heldout problems of task 'program'") == 2 and not (tmp_path / "tiny").exists()


@pytest.mark.long
def test_ctrl_c_under_torchrun_saves_and_one_process_goes_on(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copy_base(one, tmp_path)
    process = run_apart(tmp_path, "--rl.steps=400", processes=2, start=True)
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"stage": "grpo", "phase": "train"' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert "continues from here" in text, text
    steps = len(rows(tmp_path / "tiny", stage="grpo", phase="train"))
    assert (stage_folder(tmp_path, "grpo") / f"step_{steps:06d}" / "trainer.pt").exists() and steps < 400
