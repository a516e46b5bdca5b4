"""The loss of a published run: what its kernels move, and what it keeps."""

from __future__ import annotations

from paraplan.graph import Op
from paraplan.validate_ops import ModelSizes, both_ways, memory_op

LONG_ROW = 93_000
"""Elements in fp32 from which on one row for each multiprocessor exceeds the cache: 40 MB among 108
of A100, 50 MB among 132 of H100 (their datasheets)."""


def loss_ops(sizes: ModelSizes, columns: int) -> list[Op]:
    """Cross entropy over ``columns`` of the vocabulary, in fp32.

    One kernel: the logits are read, and replaced by their gradient (2, 2 + 2). Compiled: cast
    (2 + 4 bytes), largest (4), exponential and sum (4 + 4), gradient in place (4 + 4), cast back
    (4 + 2). Else, as nanotron's and Megatron-LM's sharded loss: the difference from the largest
    (4 + 4), the sum (4) and the quotient (4 + 4) are kernels of their own. torch's own, eager even
    in compiled models: cast (2 + 4) and logarithms of the softmax (4 + 4), for which long rows
    are read three times (SoftMax.cu, `cunn_SoftMaxForward`); their gradient filled (4), that of
    the softmax (4 + 4 + 4, its first operand once more for long rows) and cast back (4 + 2). A
    metric is its forward. Over whole logits Aleph Alpha's accuracy reads them once more (4).
    """
    tokens, framework = sizes.sequence_length * columns, sizes.framework
    again = 4 if columns > LONG_ROW else 0
    forward, backward = 14 + 2 * again, 22 + again
    if framework.fused_loss:
        metric = memory_op("metric", "forward", forward * tokens, 0)
        return both_ways("loss", 2 * tokens, 4 * tokens) + [metric] * framework.metrics
    if framework.whole_logits:
        forward += 4
    elif not framework.torch_loss:
        forward, backward = (18, 14) if framework.kernels == "compiled" else (38, 14)
    return both_ways("loss", forward * tokens, backward * tokens)


def loss_bytes(sizes: ModelSizes, tensor: int) -> tuple[float, float]:
    """Bytes that the loss keeps, and that it needs at most.

    One kernel replaces the logits by their gradient (2, 2 + 2); else their fp32 copy and its
    gradient are beside them (2 + 4 + 4). torch's own cross entropy keeps the logarithms of the
    softmax (4) and makes two gradients in fp32 (4 + 4); over gathered logits it keeps these, too,
    and those of the micro-batch before in a second buffer (2 + 2).
    """
    logits = sizes.sequence_length * sizes.vocab
    if sizes.framework.torch_loss:
        return 4 * logits / tensor, 12 * logits / tensor
    if sizes.framework.whole_logits:
        shard = 2 * logits // tensor if tensor > 1 else 0
        return shard + 8 * logits, shard + 16 * logits
    if sizes.framework.fused_loss:
        return 2 * logits / tensor, 4 * logits / tensor
    return 4 * logits / tensor, 10 * logits / tensor
