"""Matrices and convolutions that compute on what the compressor made.

A `Matrix` is a weight (out, in) in the layout its kernel reads; ``matrix(x)`` is ``x @ W.T`` in float32, whatever the
weight is stored in. `matrix_from` picks the layout. Everything here is torch-free and runs in the native
library, on `threads()` threads; ``kernels.reference`` says in numpy what each kernel must answer.
"""

from __future__ import annotations
