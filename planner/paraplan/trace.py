"""Traces a model into a `ModelGraph`.

``trace_model`` builds the model without data (`trace_model`), finds its repeated layers
(`trace_layers`), runs it twice per tensor degree, at micro-batch sizes 1 and 2 (`trace_pass`,
`trace_shard`), and turns what ran into blocks, a chain and the values that cross cuts
(`trace_variant`, `trace_chain`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from paraplan.errors import InputError
from paraplan.graph import Block, ChainItem, ModelGraph, op_flops
from paraplan.models import ModelSource
from paraplan.trace_chain import chain_values, names_of_blocks, owned_modules
from paraplan.trace_layers import find_layers, structure
from paraplan.trace_model import Built, build_model
from paraplan.trace_pass import PassTrace, Subject, trace_pass
from paraplan.trace_shard import TensorSplit, sharded, tensor_split
from paraplan.trace_tensor import tensor_table
from paraplan.trace_variant import Traced, block_variant
