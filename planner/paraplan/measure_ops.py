"""Measures one task on this rank's device, together with all other ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from paraplan.link_table import Shape
from paraplan.measure_calls import RecordedCall, replay
from paraplan.measure_clock import (
    CACHES,
    Call,
    Clock,
    Timing,
    cache_bytes,
    copies_beyond_cache,
    summary,
)
from paraplan.measure_host import measure_host
from paraplan.models import model_of_config
from paraplan.profile_tasks import (
    AttentionTask,
    GemmTask,
    HostTask,
    LayerTask,
    LinkTask,
    RateTask,
    Task,
)
from paraplan.trace_model import class_and_config, quiet_transformers

MOST_COPIES = 16
"""Inputs to rotate over: of calls so small that more were needed, a part stays in the cache, as it
does between the calls of a model."""

MOST_LAYER_COPIES = 3
"""A layer's own weights and activations push its input out of the cache already."""


class RandomPool:
    """Random numbers that operands are cut from; to draw them anew takes longer than to measure."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is drawn yet."""
        self._device = device
        self._values: dict[torch.dtype, torch.Tensor] = {}
        self._next = 0

    def take(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """So many, from behind the last ones taken; in all it is more than a cache holds."""
        values = self._values.get(dtype)
        if values is None or values.numel() < elements:
            whole = int(CACHES * cache_bytes(self._device)) // dtype.itemsize
            values = torch.randn(max(elements, whole), device=self._device).to(dtype)
            self._values[dtype] = values
        if self._next + elements > values.numel():
            self._next = 0
        began, self._next = self._next, self._next + elements
        return values[began : began + elements]


@dataclass(frozen=True)
class Bench:
    """What measurements need.

    Attributes:
        links: groups of ranks by shape (ranks, per node), each with this rank in it.
        layers: calls of whole layers, which are timed several times, as they were built first.
    """

    clock: Clock
    random: RandomPool
    links: dict[Shape, dist.ProcessGroup] = field(default_factory=dict)
    layers: dict[LayerTask, list[Call]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where things are computed."""
        return self.clock.device


def measure(task: Task | RecordedCall, bench: Bench) -> Timing:
    """Seconds of one call of what the task describes; a collective of all ranks."""
    if isinstance(task, RecordedCall):
        copies = copies_beyond_cache(bench.device, task.operand_bytes, MOST_COPIES)
        return bench.clock.time_alone(
            [replay(task, bench.device, bench.random.take) for _ in range(copies)]
        )
    if isinstance(task, GemmTask):
        return _gemm(task, bench)
    if isinstance(task, AttentionTask):
        return _attention(task, bench)
    if isinstance(task, LinkTask):
        return _link(task, bench)
    if isinstance(task, LayerTask):
        whole = replace(task, alone=False)
        calls = bench.layers[whole] = bench.layers.get(whole) or whole_layer(task, bench)
        return bench.clock.time_alone(calls) if task.alone else bench.clock.time(calls)
    if isinstance(task, HostTask):
        return measure_host(task, bench.clock)
    return _rate(task, bench)


def _gemm(task: GemmTask, bench: Bench) -> Timing:
    """The mean of a forward (x w^T) and its two gradients (g w, g^T x) at these sizes.

    A layer runs one of each, and which of them a shape belongs to is not known when it is asked.
    """
    if task.dtype == "float8":
        return _gemm_of_float8(task, bench)
    m, n, k = task.m, task.n, task.k
    dtype = getattr(torch, task.dtype)

    def matrix(rows: int, columns: int, turned: bool) -> torch.Tensor:
        shape = (task.batch, columns, rows) if turned else (task.batch, rows, columns)
        made = bench.random.take(task.batch * rows * columns, dtype).view(shape)
        made = made.transpose(1, 2) if turned else made
        return made[0] if task.batch == 1 else made

    product = torch.mm if task.batch == 1 else torch.bmm
    size = task.batch * (m * k + k * n + m * n) * dtype.itemsize
    copies = copies_beyond_cache(bench.device, size, MOST_COPIES)
    forms = ((False, True), (False, False), (True, False))
    operands = [
        [(matrix(m, k, left), matrix(k, n, right)) for left, right in forms] for _ in range(copies)
    ]

    def layer(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for pair in pairs:
            product(*pair)

    timing = bench.clock.time_alone([partial(layer, pairs) for pairs in operands])
    return timing._replace(seconds=timing.seconds / len(forms))


def _gemm_of_float8(task: GemmTask, bench: Bench) -> Timing:
    """The same where the kernel wants both operands' rows along the sum, as those that train do.

    Scales are of whole tensors; only the forward sums with fewer bits (torchao's defaults).
    """
    m, n, k = task.m, task.n, task.k
    scale = torch.ones((), device=bench.device)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return bench.random.take(rows * columns, torch.float8_e4m3fn).view(rows, columns)

    copies = copies_beyond_cache(bench.device, m * k + k * n + m * n, MOST_COPIES)
    forms = ((m, n, k), (m, k, n), (n, k, m))
    operands = [
        [(matrix(rows, over), matrix(columns, over).t()) for rows, columns, over in forms]
        for _ in range(copies)
    ]
    scaled: Any = torch._scaled_mm  # it carries no types

    def layer(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for index, (left, right) in enumerate(pairs):
            how = {"out_dtype": torch.bfloat16, "use_fast_accum": index == 0}
            scaled(left, right, scale, scale, **how)

    timing = bench.clock.time_alone([partial(layer, pairs) for pairs in operands])
    return timing._replace(seconds=timing.seconds / len(forms))


def _attention(task: AttentionTask, bench: Bench) -> Timing:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    batch, heads, kv_heads, queries, keys, size, value_size = task.dims
    dtype = getattr(torch, task.dtype)

    def made(length: int, count: int, width: int) -> torch.Tensor:
        values = bench.random.take(batch * length * count * width, dtype)
        return values.view(batch, length, count, width).transpose(1, 2).requires_grad_()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=task.causal, enable_gqa=kv_heads != heads
        )

    one = batch * heads * (queries + keys) * (size + value_size) * dtype.itemsize
    operands = [
        (made(queries, heads, size), made(keys, kv_heads, size), made(keys, kv_heads, value_size))
        for _ in range(copies_beyond_cache(bench.device, one, 4))
    ]
    chosen: Any = nullcontext()
    if task.implementation != "default":
        chosen = sdpa_kernel(backends[task.implementation])
    with chosen:
        if task.phase == "forward":
            return bench.clock.time_alone([partial(attend, *o) for o in operands])
        outputs = [attend(*o) for o in operands]
        gradient = torch.randn(batch, queries, heads, value_size, device=bench.device).to(dtype)
        gradient = gradient.transpose(1, 2)

        def backward(index: int) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(
                outputs[index], operands[index], gradient, retain_graph=True
            )

        return bench.clock.time_alone([backward(i) for i in range(len(outputs))])


def _link(task: LinkTask, bench: Bench) -> Timing:
    shape = (task.ranks, task.per_node)
    if shape not in bench.links:
        shape = (max(ranks for ranks, each in bench.links if each is None), None)
    group = bench.links[shape]
    elements = max(task.ranks, task.message_bytes // 4 // task.ranks * task.ranks)
    whole = torch.randn(elements, device=bench.device)
    part = torch.randn(elements // task.ranks, device=bench.device)
    if task.kind == "transfer" and bench.device.type == "cuda":
        return _there_and_back(whole, group, bench)
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: _all_gather(whole, part, group=group),
        "reduce_scatter": lambda: _reduce_scatter(part, whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(whole, whole.clone(), group=group),
        "transfer": partial(_exchange, whole, torch.empty_like(whole), group),
    }
    call = calls[task.kind]
    if bench.device.type == "cuda":
        return bench.clock.time([call], collective=True)
    return bench.clock.time_waiting(call, _work(bench))


def _work(bench: Bench) -> Call:
    """A product of some milliseconds, as a layer of a small model computes."""
    left, right = (bench.random.take(512 * 512, torch.float32).view(512, 512) for _ in range(2))
    return partial(torch.mm, left, right)


_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# torch 2.13 renamed them


def _exchange(message: torch.Tensor, other: torch.Tensor, group: dist.ProcessGroup) -> None:
    """To the next one and from the last at once, as stages in the middle of a pipeline do."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    sent = dist.isend(message, group=group, group_dst=(rank + 1) % ranks)
    received = dist.irecv(other, group=group, group_src=(rank - 1) % ranks)
    for pending in (sent, received):
        assert pending is not None  # this rank is in the group
        pending.wait()


def _there_and_back(message: torch.Tensor, group: dist.ProcessGroup, bench: Bench) -> Timing:
    """Half of there and back between the two ranks of each pair."""
    other = 1 - dist.get_rank(group)

    def there_and_back() -> None:
        if other:
            dist.send(message, group=group, group_dst=other)
            dist.recv(message, group=group, group_src=other)
        else:
            dist.recv(message, group=group, group_src=other)
            dist.send(message, group=group, group_dst=other)

    timing = bench.clock.time([there_and_back], collective=True)
    return Timing(timing.seconds / 2, timing.spread)


def whole_layer(task: LayerTask, bench: Bench) -> list[Call]:
    """Forward and backward of the first layer with what the model hands it."""
    source = model_of_config(json.loads(task.config))
    with quiet_transformers():
        cls, config = class_and_config(source)
        config.use_cache = False
        dtype = getattr(torch, task.dtype)
        with bench.device:
            model = cls._from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    base = model.base_model
    layer = (base.layers if hasattr(base, "layers") else base.h)[0]
    given: dict[str, Any] = {}

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        given.update(args=_detached(args), kwargs=_detached(kwargs))

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    shape = (task.sequences, task.sequence_length)
    ids = torch.randint(config.vocab_size, shape, device=bench.device)
    model(input_ids=ids)
    handle.remove()
    parameters = list(layer.parameters())
    size = 8 * given["args"][0].nbytes
    copies = copies_beyond_cache(bench.device, size, MOST_LAYER_COPIES)
    hidden = [torch.randn_like(given["args"][0]).requires_grad_() for _ in range(copies)]
    gradient = torch.randn_like(hidden[0])

    def step(source: torch.Tensor) -> None:
        made = layer(source, *given["args"][1:], **given["kwargs"])
        output = made[0] if isinstance(made, tuple) else made
        torch.autograd.grad(output, [source, *parameters], gradient)

    return [partial(step, one) for one in hidden]


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return type(value)(_detached(v) for v in value)
    if isinstance(value, dict):
        return {k: _detached(v) for k, v in value.items()}
    return value


def _rate(task: RateTask, bench: Bench) -> Timing:
    device, size = bench.device, task.size_bytes
    if task.what == "optimizer":
        return _optimizer(size, bench)
    if task.what in ("host_to_device", "device_to_host"):
        host = torch.empty(size // 4).pin_memory()
        far = torch.empty(size // 4, device=device)
        to, source = (far, host) if task.what == "host_to_device" else (host, far)
        return bench.clock.time([lambda: to.copy_(source, non_blocking=True)])
    small = torch.randn(size // 8, device=device)
    if task.what == "floor":
        return bench.clock.time_alone([lambda: small.add(1.0)])
    return _launch(small, bench)


def _launch(small: torch.Tensor, bench: Bench) -> Timing:
    """Host time of an eager call: from first to last of a row while the device lies behind."""
    import time

    seconds = []
    for _ in range(bench.clock.batches + 1):
        bench.clock.synchronize()
        began = time.perf_counter()
        for _ in range(100):
            small.add(1.0)
        seconds.append((time.perf_counter() - began) / 100)
    return summary(seconds[1:])


def _optimizer(size: int, bench: Bench) -> Timing:
    """AdamW over parameters of several sizes; fused on GPUs, torch's default elsewhere."""
    elements = size // 28  # gradient read; parameter and two states read and written, fp32
    shares = (0.4, 0.2, 0.2, 0.1, 0.1)  # about those of a layer's matrices
    parameters = [
        torch.nn.Parameter(torch.randn(int(share * elements), device=bench.device))
        for share in shares
    ]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    fused = True if bench.device.type == "cuda" else None
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=fused)
    return bench.clock.time([optimizer.step])
