"""Applies a plan: an ordinary single-device training loop, computed by all ranks of a job."""

from paraplan_runtime.apply import parallelize as parallelize
from paraplan_runtime.checkpoint import Checkpointer as Checkpointer
from paraplan_runtime.construction import parameters_on_meta as parameters_on_meta
from paraplan_runtime.model import ParallelModel as ParallelModel
from paraplan_runtime.outputs import ParallelOutput as ParallelOutput
