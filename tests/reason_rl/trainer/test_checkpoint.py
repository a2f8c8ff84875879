"""Checkpoints: they load to the same bits, an existing folder is whole, and damage raises an error that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reason_rl.config import OptimConfig
from reason_rl.data import char_tokenizer
from reason_rl.model.transformer import Transformer
from reason_rl.model.weights import load_model
from reason_rl.trainer import checkpoint
from reason_rl.trainer.checkpoint import (
    Progress,
    link_folder,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
    step_folder,
)
from reason_rl.trainer.optimizer import Optimizer
from tests.reason_rl.tiny import MOE, VOCAB_SIZE, WORLD, tiny_model

PROGRESS = Progress(7, 14, {"grpo_s": 2.5})


def save(folder: Path, model: Transformer, optimizer: Optimizer | None = None) -> None:
    save_checkpoint(folder, model, WORLD, char_tokenizer(), PROGRESS, optimizer=optimizer, files={"notes.txt": "hello"})


def stepped() -> tuple[Transformer, Optimizer]:
    model = tiny_model(MOE)
    optimizer = Optimizer(model, OptimConfig(name="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step(1.0)
    return model, optimizer


def test_weights_optimizer_and_progress_come_back_to_the_bit(tmp_path: Path):
    model, optimizer = stepped()
    save(tmp_path / "step_000007", model, optimizer)
    loaded = Transformer(MOE, VOCAB_SIZE)
    progress, state = load_checkpoint(tmp_path / "step_000007", loaded)
    assert progress == PROGRESS
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    for ours, theirs in zip(optimizer.state_dict(), state, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(ours[n][k]), torch.as_tensor(theirs[n][k])) for n in ours for k in ours[n])
    assert {p.name for p in (tmp_path / "step_000007").iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "trainer.pt", "notes.txt"}
    assert load_model(tmp_path / "step_000007").config == MOE


def test_saving_again_replaces_the_folder(tmp_path: Path):
    folder = tmp_path / "final"
    save(folder, tiny_model(MOE, seed=1))
    (folder / "stray").write_text("of the old folder")
    save(folder, tiny_model(MOE, seed=2))
    assert torch.equal(load_model(folder).embedding.weight, tiny_model(MOE, seed=2).embedding.weight)
    assert not (folder / "stray").exists() and [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_write_that_breaks_off_leaves_no_folder_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(step_folder(tmp_path, 1), tiny_model(MOE))
    real = checkpoint.save_weights

    def breaks(folder: Path, *rest: object) -> None:
        real(folder, *rest)  # type: ignore[arg-type]
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_weights", breaks)
    with pytest.raises(OSError, match="no space"):
        save(step_folder(tmp_path, 2), tiny_model(MOE))
    assert newest_checkpoint(tmp_path) == step_folder(tmp_path, 1)
    prune_checkpoints(tmp_path, 1, WORLD)
    assert newest_checkpoint(tmp_path) == step_folder(tmp_path, 1)
    monkeypatch.undo()
    save(step_folder(tmp_path, 2), tiny_model(MOE))  # the rest of the broken write does not block this save
    assert newest_checkpoint(tmp_path) == step_folder(tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir()} == {"step_000001", "step_000002"}


def test_pruning_keeps_the_newest_and_removes_what_a_killed_process_left(tmp_path: Path):
    for step in (5, 10, 100, 20):
        save(step_folder(tmp_path, step), tiny_model(MOE))
    save(tmp_path / "final", tiny_model(MOE))
    (tmp_path / ".step_000030.77.partial").mkdir()
    prune_checkpoints(tmp_path, 2, WORLD)
    assert {p.name for p in tmp_path.iterdir()} == {"step_000020", "step_000100", "final"}
    assert newest_checkpoint(tmp_path / "absent") is None


def test_steps_are_ordered_by_number_and_only_step_folders_count(tmp_path: Path):
    for name in ("step_1000000", "step_999999", "step_10_backup", "step_", ".step_2000000.77.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_3000000").write_text("a file")
    assert newest_checkpoint(tmp_path) == tmp_path / "step_1000000"
    prune_checkpoints(tmp_path, 1, WORLD)
    assert not (tmp_path / "step_999999").exists() and (tmp_path / "step_10_backup").exists()


def test_a_linked_folder_shares_its_files_and_replaces_an_older_one(tmp_path: Path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    link_folder(tmp_path / "old", tmp_path / "linked")
    link_folder(tmp_path / "new", tmp_path / "linked")
    assert (tmp_path / "linked/weights").samefile(tmp_path / "new/weights") and (tmp_path / "old/weights").read_text() == "old"


def load(folder: Path) -> None:
    load_checkpoint(folder, Transformer(MOE, VOCAB_SIZE))


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt"])
def test_a_missing_file_is_named(tmp_path: Path, name: str):
    save(tmp_path / "c", *stepped())
    (tmp_path / "c" / name).unlink()
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load(tmp_path / "c")


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt"])
@pytest.mark.parametrize("damage", ["torn", "empty", "garbage"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str):
    save(tmp_path / "c", *stepped())
    path = tmp_path / "c" / name
    whole = path.read_bytes()
    path.write_bytes({"torn": whole[: len(whole) // 2], "empty": b"", "garbage": b"\x00\xff" * 500}[damage])
    with pytest.raises(ValueError, match=f"{name}.* is damaged"):
        load(tmp_path / "c")


def test_a_damaged_state_names_the_way_out(tmp_path: Path):
    save(tmp_path / "c", *stepped())
    (tmp_path / "c" / "trainer.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="delete the folder to go on from the one before it"):
        read_state(tmp_path / "c")


def test_a_state_without_progress_is_damaged_too(tmp_path: Path):
    torch.save({"optimizer": None}, tmp_path / "trainer.pt")
    with pytest.raises(ValueError, match="damaged"):
        read_state(tmp_path)


def test_a_state_with_code_in_it_is_not_run(tmp_path: Path):
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"progress": Evil(), "optimizer": None}, tmp_path / "trainer.pt")
    with pytest.raises(ValueError, match="damaged"):
        read_state(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path):
    save(tmp_path / "c", tiny_model(MOE))
    path = tmp_path / "c" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"does not fit its config\.json: missing model\.layers\.2"):
        load_model(tmp_path / "c")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_model(tmp_path / "c")
    path.unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_model(tmp_path / "c")
    with pytest.raises(ValueError, match="no checkpoint folder"):
        load_model(tmp_path / "absent")
