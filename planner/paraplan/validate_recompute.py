"""What a measured run recomputed: the mode, and which layers kept everything nevertheless."""

from __future__ import annotations

import re

from paraplan.graph import RECOMPUTE_MODES, Recompute
from paraplan.partition import Cuts
from paraplan.validate_ops import ModelSizes
from paraplan.validate_rows import Row, Unusable

MODES: dict[str, Recompute] = {
    "": "none",
    "none": "none",
    "selective": "selective",
    "selective(op)": "selective",
    "full": "full",
    "full(remat)": "full",
}
FIRST_LAYERS = re.compile(r"full-block\((\d+) of \d+ layers\)")
EVERY_NTH = re.compile(r"selective\(layer, every (\d+)(?:st|nd|rd|th)\)")
SOME_BLOCKS = "selective(ac every k-th block)"


def modes_of(row: Row) -> tuple[Recompute, ...]:
    """The mode of the layers that recompute; any of them where nobody knows.

    Raises:
        Unusable: unknown.
    """
    text = row.text("recompute")
    recipe_elsewhere = text.startswith("see ") and row.text("quality") == "c"
    if text == "none/unknown" or recipe_elsewhere:
        return RECOMPUTE_MODES
    if text in MODES:
        return (MODES[text],)
    if FIRST_LAYERS.fullmatch(text) or EVERY_NTH.fullmatch(text) or text == SOME_BLOCKS:
        return ("full",)
    raise Unusable(f"recompute {text}")


def recomputes_all(row: Row) -> bool:
    """Whether it is known that every layer is recomputed whole."""
    return MODES.get(row.text("recompute")) == "full"


def kept_layers(row: Row, sizes: ModelSizes, cuts: Cuts) -> frozenset[int]:
    """Layers, from 0, that recompute nothing although others do.

    Args:
        cuts: where the stages begin, in blocks: the embedding, the layers, the head.

    Raises:
        Unusable: how many recomputed is not published.
    """
    text, every = row.text("recompute"), frozenset(range(sizes.layers))
    if first := FIRST_LAYERS.fullmatch(text):  # of each stage (Megatron-LM's method "block")
        starts = [max(1, start) - 1 for start in cuts[:-1]]
        again = {start + i for start in starts for i in range(int(first[1]))}
    elif every_nth := EVERY_NTH.fullmatch(text):
        again = _spread(1 / int(every_nth[1]), sizes.layers)
    elif text == SOME_BLOCKS:
        again = _spread(_recomputed_share(row), sizes.layers)
    else:
        again = set(every)
    return every - again


def _spread(share: float, layers: int) -> set[int]:
    """So many of the layers, at equal distances."""
    return {i for i in range(layers) if int((i + 1) * share) > int(i * share)}


def _recomputed_share(row: Row) -> float:
    """Share of the forward that ran twice: hardware over model FLOPs count it, of three passes.

    Raises:
        Unusable: either utilisation is not published.
    """
    hardware, model = re.search(r"hfu (\d+)", row.text("notes")), row.number("mfu")
    if not hardware or not model:
        raise Unusable("share of recomputed layers not published")
    return min(1.0, max(0.0, 3 * (int(hardware[1]) / model - 1)))
