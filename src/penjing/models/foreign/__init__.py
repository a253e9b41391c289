"""Families without a description: transformers' module graph, with Penjing's kernels in place of its linear layers.

The slower road, and the only part of serving that needs torch (``penjing[compress]``): it is imported for such a model
and for no other, by `models.load_any` and `models.texts`.
"""

from __future__ import annotations

import os
import sys

# torch's threads wait by spinning, which takes the cores away from the kernels that run between its operations: a
# small model decodes at a thirtieth of its speed. Only before torch is loaded can it be told not to.
TORCH_WAITS = "torch" not in sys.modules or os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
