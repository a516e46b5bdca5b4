"""Starts the process that measuring ranks are forked from, ahead of what else has to be imported.

Nothing here imports torch: that process does, beside the command's own imports.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver

PRELOADED = [
    "paraplan.measure_ranks",
    "torch.distributed.fsdp",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "paraplan.measure_frozen",
]
"""What ranks need, imported once for all of them."""


def start_imports() -> None:
    """Let the process that ranks are forked from import what they need, beside the caller.

    Called early it saves the wait for it; a second call changes nothing.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
