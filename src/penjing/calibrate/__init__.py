"""Calibration: what comes into each layer, seen on text that goes through the model block by block.

data      texts → rows of tokens
own       rows of tokens that the model writes itself, where there is no text
graph     transformers' model, without memory, and which of the checkpoint's tensors are which of it
block     one block with its weights
products  where the inputs of layers are seen
inputs    which layers share an input, and its statistics
folding   where a transform's scales can go, found by trial
stream    the chain of blocks, and the files between them
cache     what attention puts into its cache, and steps for it
influence which layers and units the model would miss
memory    what all that takes at most
recover   a block trained to be like the original's
distil    all blocks trained together, to be like the original
solving   a block compressed on its statistics, and judged
"""

from .data import Calibration, read_tokens
from .memory import Needs, distil_bytes, needs, needs_of_units, recovery_bytes
from .solving import compress_block
from .stream import Calibrator, OpenBlock, Tick, fingerprint, open_calibrator

__all__ = [
    "Calibration",
    "Calibrator",
    "Needs",
    "OpenBlock",
    "Tick",
    "compress_block",
    "distil_bytes",
    "fingerprint",
    "needs",
    "needs_of_units",
    "open_calibrator",
    "read_tokens",
    "recovery_bytes",
]
