"""What cannot be saved, said in words before anything is written."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from tensortrain.errors import CheckpointError
from tensortrain.system.store.recipe import dtype_names

__all__ = ["check_storable", "check_unsharded", "check_whole", "has_plain_cores"]

_GATHER = (
    "Gather it first, on every rank: state = torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True, cpu_offload=True)); then on rank 0 "
    "whole.load_state_dict(state) into a model of its own, and save_pretrained(whole, directory)."
)
_RESERVED = "__metadata__"  # safetensors keeps it for itself


def check_whole(model: nn.Module) -> None:
    """Refuse a model whose tensors are parts of others, or are computed from others before every call."""
    for name, module in model.named_modules():
        where = f"{name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
        if _is_fsdp(module):
            raise CheckpointError(f"a model must be whole to be saved: {where} is sharded. {_GATHER}")
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                raise CheckpointError(
                    f"a model must have its own weights to be saved: {where} has a pruning mask on "
                    f"{hook._tensor_name!r}, expected none. Make the zeros permanent with "
                    f"torch.nn.utils.prune.remove({_reached(name)}, {hook._tensor_name!r}), "
                    "on a copy if pruning goes on."
                )


def _reached(name: str) -> str:
    return f"model.get_submodule({name!r})" if name else "model"


def _is_fsdp(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing of theirs exists before the import
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def check_storable(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that has no numbers of its own, or of a kind that does not read back."""
    _check_name(name)
    check_unsharded(name, tensor)
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        raise CheckpointError(
            f"a model must have data to be saved: {name} has none (device {tensor.device}), expected "
            "numbers. Load or initialise the model first; bring weights back that a device map has moved away."
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        what = (
            "is quantized"
            if tensor.is_quantized
            else "is nested"
            if tensor.is_nested
            else f"has layout {tensor.layout}"
        )
        raise CheckpointError(
            f"a tensor must be strided to be saved: {name} {what}, expected torch.strided. Make it dense first."
        )
    if _is_wrapped(tensor):
        raise CheckpointError(
            f"a tensor must be torch's own to be saved: {name} is a {type(tensor).__name__}, expected torch.Tensor. "
            "Convert it to a plain tensor first."
        )
    if tensor.dtype not in dtype_names():
        raise CheckpointError(
            f"tensors must be of dtypes that safetensors knows: {name} has {tensor.dtype}, expected one of "
            f"{', '.join(dtype_names().values())}. Convert the model with model.to(dtype)."
        )


def check_unsharded(name: str, tensor: Tensor) -> None:
    """Refuse a part of a tensor that is spread over processes."""
    if _is_shard(tensor):
        raise CheckpointError(
            f"a model must be whole to be saved or loaded: {name} is sharded ({type(tensor).__name__}). {_GATHER}"
        )


def _check_name(name: str) -> None:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        name, bad = ascii(name), True
    else:
        bad = name == _RESERVED
    if bad:
        raise CheckpointError(f"a tensor must have a name that a file can hold: found {name}. Rename it in the model.")


def _is_shard(tensor: Tensor) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        return True
    return hasattr(tensor, "ds_id") or type(tensor).__name__ in ("ShardedTensor", "FlatParameter")


def _is_wrapped(tensor: Tensor) -> bool:
    """Whether the numbers lie elsewhere than in the tensor, as in those of quantization libraries."""
    dispatch: Any = type(tensor).__torch_dispatch__
    return dispatch is not torch._C._disabled_torch_dispatch_impl


def has_plain_cores(layer: nn.Module) -> bool:
    """Whether the cores of a layer are the parameters of its list, no functions of others."""
    cores: Any = layer.cores
    names = sorted(cores._parameters, key=lambda name: (len(name), name))
    plain = names == [str(k) for k in range(len(cores))] and not cores._buffers and not cores._modules
    return plain and not parametrize.is_parametrized(cores)
