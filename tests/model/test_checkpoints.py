"""Weights and train states on disk: exact round trips, published files, damaged files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_vectors import load

from teracon_fast import FastTCN
from teracon_fast.errors import CheckpointError
from teracon_fast.model.checkpoints import load_model, load_t7, read_notes, read_pickle, save_model, save_t7

SIZES: dict[str, Any] = {"num_items": 23, "channels": 8, "dilations": (1, 4, 1), "kernel_size": 2}


def same(one: FastTCN, other: FastTCN) -> bool:
    """Whether two models are the same network with the same bits."""
    a, b = one.state_dict(), other.state_dict()
    shape = ("num_items", "channels", "labels", "dilations", "kernel_size", "mask_variant", "has_relation")
    return (
        all(getattr(one, name) == getattr(other, name) for name in shape)
        and a.keys() == b.keys()
        and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mask", ["relation", "positive_only", "none"])
@pytest.mark.parametrize("labels", [[23], [23, 5, 4]])
def test_safetensors_round_trip(tmp_path: Path, labels: list[int], mask: str, dtype: torch.dtype) -> None:
    model = FastTCN(labels=labels, mask=mask, task_embedding_range=(-1.0, 3.0), **SIZES).to(dtype)
    save_model(model, tmp_path / "m.safetensors", {"task": 2, "valid": {"hit@1": 0.5}})
    generator = torch.get_rng_state()
    loaded = load_model(tmp_path / "m.safetensors")
    assert torch.equal(generator, torch.get_rng_state()), "loading draws no random numbers"
    assert same(model, loaded) and loaded.task_embedding_range == (-1.0, 3.0)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert read_notes(tmp_path / "m.safetensors") == {"task": 2, "valid": {"hit@1": 0.5}}


def test_published_network_of_one_task_keeps_its_relation_weights(tmp_path: Path) -> None:
    para = {"item_size": 23, "dilated_channels": 8, "target_item_size": [23], "dilations": [1, 4], "kernel_size": 3}
    model = FastTCN({**para, "task_embs": [0, 2], "num_task": 1})
    assert model.has_relation
    save_model(model, tmp_path / "m.safetensors")
    save_t7(model, tmp_path / "m.t7")
    assert same(model, load_model(tmp_path / "m.safetensors")) and same(model, load_t7(tmp_path / "m.t7"))


@pytest.mark.parametrize("task", [1, 2, 3, 4])
def test_published_t7_round_trip(tmp_path: Path, task: int) -> None:
    """A file with the published program's state dict, as its torch.save writes it."""
    golden = load("train_sequence")
    state = golden.under(f"t{task}.final.")
    torch.save({"net": state, "acc(hit@1)": 12.5}, tmp_path / "theirs.t7")
    model = load_t7(tmp_path / "theirs.t7")
    assert model.labels == [40, 6, 4, 3][:task] and model.dilations == (1, 4) and model.kernel_size == 3
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    save_t7(model, tmp_path / "ours.t7", accuracy=12.5)
    written = torch.load(tmp_path / "ours.t7", weights_only=True)
    assert written.keys() == {"net", "acc(hit@1)"} and written["acc(hit@1)"] == 12.5
    assert written["net"].keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in written["net"].items())


def test_t7_dilations_and_mask_variants(tmp_path: Path) -> None:
    for mask in ("relation", "positive_only", "none"):
        model = FastTCN(labels=[23, 5, 4], mask=mask, **SIZES)
        save_t7(model, tmp_path / "m.t7")
        assert same(model, load_t7(tmp_path / "m.t7", dilations=[1, 4, 1]))
    assert load_t7(tmp_path / "m.t7").dilations == (1, 4, 1), "the published pattern by default"
    assert load_t7(tmp_path / "m.t7", dilations=[1, 2, 8]).dilations == (1, 2, 8)
    with pytest.raises(CheckpointError, match="got 2 dilations, expected one for each of its 3 blocks"):
        load_t7(tmp_path / "m.t7", dilations=[1, 2])


class Malicious:
    """Pickles to something that would run code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def test_code_in_a_file_is_refused_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"net": Malicious(), "acc(hit@1)": 0.0}, tmp_path / "bad.t7")
    for load_file in (load_t7, read_pickle):
        with pytest.raises(CheckpointError, match="bad.t7"):
            load_file(tmp_path / "bad.t7")
    assert not (tmp_path / "executed").exists()


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for reader in (load_t7, read_pickle, load_model, read_notes):
        path.unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match="file"):
            reader(path)
        for content in (b"", b"not a checkpoint", b"\x80\x02\x95"):
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match="file"):
                reader(path)
    model = FastTCN(labels=[23], **SIZES)
    save_model(model, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="file"):
        load_model(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(CheckpointError, match="expected a dict whose 'net'"):
        load_t7(path)
    torch.save({"net": {"embeding.weight": torch.zeros(2, 2)}}, path)
    with pytest.raises(CheckpointError, match="not the state dict of a published NextItNet_Decoder"):
        load_t7(path)


def test_safetensors_of_another_program_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(CheckpointError, match="expected weights that teracon_fast saved"):
        load_model(tmp_path / "x.safetensors")


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    model = FastTCN(labels=[23, 5], **SIZES)
    state = model.state_dict() | {"task_classifier.1.bias": torch.zeros(6)}
    torch.save({"net": state}, tmp_path / "m.t7")
    with pytest.raises(CheckpointError, match="task_classifier.1.bias"):
        load_t7(tmp_path / "m.t7")


def test_grown_models_are_saved_and_loaded(tmp_path: Path) -> None:
    for model in (FastTCN(labels=[23, 5], **SIZES), FastTCN(labels=[23], **SIZES)):
        grown = model.grown(40)
        save_model(grown, tmp_path / "m.safetensors")
        save_t7(grown, tmp_path / "m.t7")
        for loaded in (load_model(tmp_path / "m.safetensors"), load_t7(tmp_path / "m.t7", dilations=[1, 4, 1])):
            assert same(grown, loaded) and loaded.num_items == 40 and loaded.labels == grown.labels


def test_weights_of_other_items_than_the_header_says_are_refused(tmp_path: Path) -> None:
    model = FastTCN(labels=[23, 5], **SIZES)
    model.num_items = 24
    save_model(model, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="got the weights of 23 items, expected those of 24"):
        load_model(tmp_path / "m.safetensors")
