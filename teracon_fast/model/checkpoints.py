"""Weights on disk: safetensors (ours) and .t7 (the published program's).

Every file is written whole or not at all. Nothing read from a file is executed.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teracon_fast.errors import CheckpointError
from teracon_fast.files import atomic_write
from teracon_fast.model.fast_tcn import FastTCN
from teracon_fast.ops.task_masks import MaskVariant, relation_width

FORMAT_VERSION = 1
_ACCURACY = "acc(hit@1)"  # the published key


def save_model(model: FastTCN, path: str | Path, notes: Mapping[str, Any] | None = None) -> None:
    """Write weights and constructor arguments to a .safetensors file. Needs the package safetensors.

    Args:
        model: any FastTCN; its tensors are written in their own dtypes.
        path: file name.
        notes: JSON values to keep with the weights, read back by `read_notes`.
    """
    header = {"version": FORMAT_VERSION, "model": _arguments(model), "notes": dict(notes or {})}
    write_tensors(path, _cpu_tensors(model), header)


def load_model(
    path: str | Path, device: str | torch.device = "cpu", backend: str = "auto", algorithm: str = "auto"
) -> FastTCN:
    """Rebuild the model of a file that `save_model` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, or not one of ours.
    """
    arguments = _model_header(path)["model"]
    relation = arguments.pop("relation")
    model = _build(arguments, relation, backend, algorithm)
    _fill(model, read_tensors(path), path)
    return model.to(device)


def read_notes(path: str | Path) -> dict[str, Any]:
    """The notes that `save_model` kept with the weights."""
    notes: dict[str, Any] = _model_header(path)["notes"]
    return notes


def save_t7(model: FastTCN, path: str | Path, accuracy: float = 0.0) -> None:
    """Write the published program's checkpoint: `{'net': state dict, 'acc(hit@1)': accuracy}`.

    Args:
        accuracy: hit@1 in percent, as the published program keeps it.
    """
    with atomic_write(path) as file:
        torch.save({"net": _cpu_tensors(model), _ACCURACY: float(accuracy)}, file)


def load_t7(
    path: str | Path,
    dilations: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    task_embedding_range: Sequence[float] = (0.0, 2.0),
) -> FastTCN:
    """Rebuild the model of a published checkpoint (of task 1 or of a later task). Sizes follow from the tensors.

    Args:
        path: a .t7 file.
        dilations: one per residual block, which a state dict does not contain. None: 1, 4, 1, 4, ..., the published ones.
        task_embedding_range: used to initialize the embeddings of tasks added later.

    Raises:
        CheckpointError: the file is missing, damaged, or not such a checkpoint.
    """
    content = read_pickle(path)
    state = content.get("net") if isinstance(content, dict) else None
    if not isinstance(state, dict) or "embeding.weight" not in state:
        raise CheckpointError(f"{path}: expected a dict whose 'net' is the state dict of a published NextItNet_Decoder")
    arguments, relation = _deduce(state, path)
    blocks = arguments["blocks"]
    if dilations is None:
        dilations = [1, 4] * (blocks // 2) + [1] * (blocks % 2)
    elif len(dilations) != blocks:
        raise CheckpointError(f"{path}: got {len(dilations)} dilations, expected one for each of its {blocks} blocks")
    del arguments["blocks"]
    arguments.update(dilations=list(dilations), task_embedding_range=list(task_embedding_range))
    model = _build(arguments, relation, backend)
    _fill(model, state, path)
    return model.to(device)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write contiguous tensors of the CPU and a JSON header to a .safetensors file. Needs the package safetensors."""
    content = _safetensors().torch.save(dict(tensors), {"teracon_fast": json.dumps(header)})
    with atomic_write(path) as file:
        file.write(content)


def read_tensors(path: str | Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a .safetensors file on the CPU; None: all of them.

    Raises:
        CheckpointError: the file is missing or damaged, or lacks a name.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read it as safetensors: {error}") from None


def read_header(path: str | Path, version: int) -> dict[str, Any]:
    """The header that `write_tensors` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, of another version, or not one of ours.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("teracon_fast")
        header = None if text is None else json.loads(text)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read it as safetensors: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: expected weights that teracon_fast saved; its metadata is missing")
    if header.get("version") != version:
        raise CheckpointError(f"{path}: got version {header.get('version')}, expected {version}")
    return header


def _cpu_tensors(model: FastTCN) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}


def _arguments(model: FastTCN) -> dict[str, Any]:
    return {
        "num_items": model.num_items,
        "channels": model.channels,
        "labels": model.labels,
        "dilations": list(model.dilations),
        "kernel_size": model.kernel_size,
        "task_embedding_range": list(model.task_embedding_range),
        "mask": model.mask_variant,
        "relation": model.has_relation,
    }


def _build(arguments: Mapping[str, Any], relation: bool, backend: str, algorithm: str = "auto") -> FastTCN:
    """A FastTCN of these shapes, without drawing from torch's random generator."""
    with torch.random.fork_rng(devices=[]):
        if relation and len(arguments["labels"]) == 1:
            # Only the published constructor makes relation weights for a single task.
            published = {
                "item_size": arguments["num_items"],
                "dilated_channels": arguments["channels"],
                "target_item_size": arguments["labels"],
                "dilations": arguments["dilations"],
                "kernel_size": arguments["kernel_size"],
                "task_embs": arguments["task_embedding_range"],
                "num_task": 1,
            }
            return FastTCN(published, mask=arguments["mask"], backend=backend, algorithm=algorithm)
        return FastTCN(**arguments, backend=backend, algorithm=algorithm)


def _fill(model: FastTCN, state: Mapping[str, Tensor], path: str | Path) -> None:
    dtype = state["embeding.weight"].dtype if "embeding.weight" in state else torch.float32
    if "embeding.weight" in state and len(state["embeding.weight"]) != model.num_items:
        rows = len(state["embeding.weight"])
        raise CheckpointError(f"{path}: got the weights of {rows} items, expected those of {model.num_items}")
    try:
        model.to(dtype).load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the weights do not fit the model: {error}") from None


def _deduce(state: Mapping[str, Tensor], path: str | Path) -> tuple[dict[str, Any], bool]:
    """Constructor arguments and whether there are relation weights, from the names and shapes of a state dict."""
    try:
        num_items, channels = state["embeding.weight"].shape
        blocks = 1 + max(int(found[1]) for found in map(re.compile(r"residual_blocks\.(\d+)\.").match, state) if found)
        labels: list[int] = []
        while f"task_classifier.{len(labels)}.weight" in state:
            labels.append(state[f"task_classifier.{len(labels)}.weight"].shape[0])
        kernel_size = state["residual_blocks.0.conv1.weight"].shape[-1]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: not the state dict of a published NextItNet_Decoder: {error!r}") from None
    relation = state.get("residual_blocks.0.mlp1.0.weight")
    mask: MaskVariant = "relation" if relation is not None or len(labels) == 1 else "none"
    if relation is not None and relation.shape[1] != relation_width(len(labels), "relation"):
        mask = "positive_only"
    arguments = {"num_items": num_items, "channels": channels, "labels": labels, "kernel_size": kernel_size}
    return {**arguments, "mask": mask, "blocks": blocks}, relation is not None


def _model_header(path: str | Path) -> dict[str, Any]:
    header = read_header(path, FORMAT_VERSION)
    if "model" not in header:
        raise CheckpointError(f"{path}: expected weights that save_model wrote, got those of a run")
    return header


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise CheckpointError("safetensors is not installed, expected: pip install 'teracon-fast[train]'") from None
    return safetensors


def read_pickle(path: str | Path) -> Any:
    """Tensors, numbers and strings of a file that torch.save wrote, on the CPU; nothing in it is executed.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cannot read it as a PyTorch checkpoint: {reason}") from None
