"""How a training engine exchanges and keeps things, as far as time and memory depend on it."""

from __future__ import annotations

from dataclasses import dataclass

REDUCE_BYTES = 4  # gradients are reduced in fp32 (FSDP2's `reduce_dtype`)


@dataclass(frozen=True, slots=True)
class Engine:
    """How the training engine exchanges; the defaults are those of this project's runtime.

    Attributes:
        reduce_bytes: of a gradient on its way (fp32: FSDP2's ``reduce_dtype``).
        overlaps_data: gathers and reductions of the data ranks run beside the computation.
        tensor_bytes: of an activation that tensor ranks add up (some add bf16 in fp32).
        hidden_tensor: share of the tensor exchanges that hides behind the products around them.
        blocking: the host waits for each kernel before it launches the next; waking up takes it
            as long as a launch.
        exchange_wait_seconds: the host waits for each step of a tensor exchange.
        gradient_bytes: of whole gradients kept through the step, for each parameter on the device
            (below ZeRO-2); None: as this project's runtime keeps them.
        standing_gradient_bytes: of those, what is there before a backward has made any: Megatron-LM
            makes the buffer of its gradients when it wraps the model, nanotron that of its fp32
            sums (4 bytes: docs/accuracy.md, "nanotron's memory").
        buffer_bytes: for the pieces on their way, beside them.
        shards_context: context ranks share what the data ranks shard.
        bucket_bytes: gradients and parameters are exchanged in pieces of that size; 0: by block.
        keeps_outputs: a pipeline stage holds its output until that micro-batch's backward, as
            torch's do (Megatron frees it once it is sent: Korthikanti et al. 2022, appendix B).
        slices_transfers: each tensor rank sends a slice of what all of them have to the next
            stage's node, whose tensor ranks gather it (Narayanan et al. 2021, section 4.1;
            DeepSpeed's pipeline does the same).
        reruns_whole: full recompute reruns a layer's last exchange too.
        copies: parameters and gradients are copied out of and into messages (`data_copies`).
    """

    reduce_bytes: int = REDUCE_BYTES
    overlaps_data: bool = True
    tensor_bytes: int = 2
    hidden_tensor: float = 0.0
    blocking: bool = False
    exchange_wait_seconds: float = 0.0
    gradient_bytes: int | None = None
    standing_gradient_bytes: int = 0
    buffer_bytes: float = 0.0
    shards_context: bool = False
    bucket_bytes: float = 0.0
    keeps_outputs: bool = True
    slices_transfers: bool = False
    reruns_whole: bool = False
    copies: bool = True


RUNTIME = Engine()
