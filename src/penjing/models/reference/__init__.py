"""A whole model in numpy, written to be read: what the native graph must compute, from position 0.

Clear before fast: the scores of all pairs of positions, one expert after another, one position of a recurrent state
after another, in the precision that is asked for.
"""

from .layers import Array, Parts
from .model import Reference, read_block, run_block

__all__ = ["Array", "Parts", "Reference", "read_block", "run_block"]
