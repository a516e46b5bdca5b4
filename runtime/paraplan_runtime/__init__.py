"""Applies a plan: an ordinary single-device training loop, computed by all ranks of a job."""

from paraplan_runtime.apply import parallelize as parallelize
from paraplan_runtime.model import ParallelModel as ParallelModel
from paraplan_runtime.outputs import ParallelOutput as ParallelOutput
