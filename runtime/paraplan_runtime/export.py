"""The whole model as transformers and peft would save it, one tensor after the other.

Every function is a collective: all ranks iterate, because gathering is one; rank 0 writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paraplan.errors import InputError
from paraplan_runtime.files import write_safetensors

Tensors = Iterator[tuple[str, torch.Tensor]]


def bytes_of(size: int | str) -> int:
    """Bytes of a size as transformers writes it: ``"5GB"``, ``"200MiB"``, or a number.

    Raises:
        InputError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", str(size), re.IGNORECASE)
    if isinstance(size, int):
        return size
    if match is None:
        raise InputError(f"max_shard_size {size!r} is no size such as '5GB' or '200MiB'")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def save_whole(model: Any, tensors: Tensors, folder: Path, max_shard_size: int | str) -> None:
    """Write all tensors, and the configurations of ``model`` (this rank's stage of it)."""
    write_safetensors(folder, _as_stored(model, tensors), bytes_of(max_shard_size))
    if dist.get_rank() == 0:
        for name in ("config", "generation_config"):
            settings = getattr(model, name, None)
            if settings is not None and hasattr(settings, "save_pretrained"):
                settings.save_pretrained(folder)


def _as_stored(model: Any, tensors: Tensors) -> Tensors:
    """Under the names and in the pieces that the model's ordinary checkpoints have.

    transformers 5 merges tensors when it loads (Mixtral's experts) and takes them apart when it
    saves. Where it would have to put several together, tensors stay as the model has them, which
    loads as well.
    """
    apart = dist.get_rank() == 0 and _takes_apart(model)
    for name, tensor in tensors:
        if apart:
            from transformers.core_model_loading import revert_weight_conversion

            yield from revert_weight_conversion(model, {name: tensor}).items()
        else:
            yield name, tensor


def _takes_apart(model: Any) -> bool:
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not isinstance(model, PreTrainedModel):
        return False
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    return all(len(conversion.target_patterns) == 1 for conversion in conversions or ())


def adapter_names(model: Any, names: Mapping[str, torch.dtype]) -> list[str]:
    """Keys of the state dict that belong to peft's adapters or are trained beside them.

    Raises:
        InputError: an adapter is of a kind whose files are not simply its parameters.
    """
    for config in model.peft_config.values():
        if str(config.peft_type.value) != "LORA" or config.bias != "none":
            raise InputError(
                f"save_pretrained writes LoRA adapters without biases, not {config.peft_type.value}"
                f" with bias {getattr(config, 'bias', None)!r}",
                hint="save model.state_dict() yourself",
            )
    return [name for name in names if "lora_" in name or ".modules_to_save." in name]


def save_adapters(model: Any, tensors: Tensors, folder: Path) -> None:
    """Write adapters as peft does: they are small, rank 0 holds all of them.

    (peft's own ``get_peft_model_state_dict`` sees only this rank's stage.)
    """
    from safetensors.torch import save_file

    found = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors}
    if dist.get_rank() == 0:
        for adapter, config in model.peft_config.items():
            target = folder if adapter == "default" else folder / adapter
            target.mkdir(parents=True, exist_ok=True)
            mark = re.compile(rf"(\.modules_to_save)?\.{re.escape(adapter)}(?=\.|\Z)")
            whole = {
                mark.sub("", name): tensor for name, tensor in found.items() if mark.search(name)
            }
            save_file(whole, target / "adapter_model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(target)
    dist.barrier()
