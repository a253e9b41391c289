"""The native library, as native/bindings offers it.

Arrays are numpy's, or anything else on the CPU with DLPack (torch tensors); floats of 16 and 32 bits that no
computation is done on come as their bits, uint16 and uint32. Wrong shapes and types raise ValueError.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.int8]
Bits = NDArray[np.uint16] | NDArray[np.uint32]

def isa() -> str: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
def read_bandwidth(bytes: int, rounds: int) -> float: ...

class Matrix:
    rows: int
    columns: int
    nbytes: int
    layout: str
    def multiply(self, x: Floats, bias: Floats | None = None, out: Any = None) -> Floats: ...
    def decode(self, rows: NDArray[np.int64]) -> Floats: ...

class Screen(Matrix):
    def greatest(self, matrix: Matrix, x: Floats, scale: float = 1.0) -> tuple[NDArray[np.int64], int] | None: ...

def screen_of(matrix: Matrix) -> Screen: ...
def matrix_from_floats(values: Bits, bfloat16: bool, sparse: bool) -> Matrix: ...
def matrix_from_codes(
    codes: Codes, bits: int, scale: Floats, zero_point: Codes | None, activations: str, sparse: bool
) -> Matrix: ...
def matrix_from_mxfp4(blocks: NDArray[np.uint8], scale: NDArray[np.uint8]) -> Matrix: ...

STORED_LAYOUT: int

def store_matrix(matrix: Matrix, file: int) -> tuple[int, int]: ...
def load_matrices(file: int, sections: Sequence[tuple[int, int, int]]) -> list[Matrix | None]: ...
def checksum(bytes: bytes) -> int: ...

class IntegerLinear:
    nbytes: int
    def __init__(
        self,
        codes: Codes,
        scale: Floats,
        zero_point: Codes | None = None,
        bias: Floats | None = None,
        relu: bool = False,
    ) -> None: ...
    def __call__(self, x: Any, step: float | None = None, zero: int = 0, out: Any = None) -> Floats: ...
    def accumulate(self, x_codes: Codes, zero: int = 0) -> NDArray[np.int32]: ...

class IntegerConv:
    nbytes: int
    def __init__(
        self,
        codes: Codes,
        scale: Floats,
        zero_point: Codes | None = None,
        bias: Floats | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        relu: bool = False,
    ) -> None: ...
    def __call__(self, x: Any, step: float | None = None, zero: int = 0, out: Any = None) -> Floats: ...
    def accumulate(self, x_codes: Codes, zero: int = 0) -> NDArray[np.int32]: ...

class KvPool:
    blocks: int
    def __init__(self, layers: Sequence[tuple[int, int, int]], kv_type: str, blocks: int) -> None: ...
    @staticmethod
    def block_bytes(layers: Sequence[tuple[int, int, int]], kv_type: str) -> int: ...
    def attend(
        self,
        layer: int,
        chunks: Sequence[tuple[Floats, Floats | None, Floats | None, NDArray[np.int32], int]],
        window: int = 0,
        scale: float | None = None,
        softcap: float = 0,
        sinks: Floats | None = None,
    ) -> list[Floats]: ...

class Decoder:
    state_bytes: int
    def __init__(
        self,
        config: Any,
        embedding: Matrix | None = None,
        head: Any = None,
        final_norm: Any = None,
        screen: Screen | None = None,
    ) -> None: ...
    def set_per_layer(self, per_layer: Any, layers: int, table: Matrix, projection: Any, norm: Any) -> None: ...
    def add_block(
        self, block: Any, linears: dict[str, Any], norms: dict[str, Any], vectors: dict[str, Any], shared: int = -1
    ) -> None: ...
    def block_bytes(self, kv_type: str) -> int: ...
    def activation_bytes(self, rows: int) -> int: ...
    def reserve(self, blocks: int, kv_type: str, slots: int = 0) -> None: ...
    def borrow(self, other: Decoder) -> None: ...
    def step(self, chunks: Sequence[Any]) -> list[tuple[list[int], list[Any], list[Any], str | None]]: ...
    def logits(self, chunks: Sequence[Any]) -> Floats: ...
    def run(self, chunks: Sequence[Any], x: Floats, extra: Floats | None = None) -> None: ...

def norm(x: Floats, weight: Floats | None, bias: Floats | None, eps: float, kind: str) -> Floats: ...
def rotate(x: Floats, cosine: Floats, sine: Floats, interleaved: bool) -> Floats: ...
def activate(kind: str, gate: Floats, up: Floats | None, limit: float, alpha: float) -> Floats: ...
def route(
    logits: Floats, experts: Any, correction: Floats | None = None, expert_scale: Floats | None = None
) -> tuple[NDArray[np.int32], Floats]: ...
def delta(state: Floats, query: Floats, key: Floats, value: Floats, decay: float, beta: float) -> Floats: ...

class Sampler:
    """Chooses the tokens of one sequence; native/decoder/sample.h has the rules."""

    vocabulary: int
    def __init__(
        self,
        prompt: Sequence[int],
        end_tokens: Sequence[int],
        vocabulary: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Sequence[tuple[int, float]] = (),
        seed: int = 0,
        choice: int = 0,
        min_tokens: int = 0,
    ) -> None: ...
    def allow(self, masks: NDArray[np.uint32] | NDArray[np.int32]) -> None:
        """What may come next: bit i % 32 of word i / 32 for token i. (words,), or (tokens, words) for the next ones."""

    def next(
        self, logits: Floats, alternatives: int | None = None
    ) -> tuple[int, tuple[float, list[tuple[int, float]]] | None]:
        """The token, and, if wanted, its log-probability and those of the likeliest. Changes the logits."""

def log_probabilities(logits: Floats, token: int, alternatives: int) -> tuple[float, list[tuple[int, float]]]: ...
def quantize(
    weight: Bits,
    bfloat16: bool,
    bits: int,
    group: int,
    symmetric: bool,
    scale_dtype: str,
    mask: NDArray[np.uint8] | None,
    packed: bool,
) -> tuple[Any, Floats, Codes | None]: ...
def pack(codes: Codes, bits: int) -> NDArray[np.int32]: ...
def unpack(packed: NDArray[np.int32], bits: int, columns: int) -> Codes: ...
def prune(weight: Bits, bfloat16: bool, parts: int, count: int) -> None: ...
def prune_threshold(weight: Bits, bfloat16: bool, count: int) -> float: ...
def has_nonfinite(values: Bits, bfloat16: bool) -> bool: ...
def has_pairs() -> bool: ...
def add_gram(x: NDArray[np.uint16], total: Floats) -> None: ...

class PairMatrix:
    def __init__(self, values: Floats) -> None: ...
    def put(self, values: Floats, low: int, high: int) -> None: ...
    def product(self, a: Floats, low: int, high: int) -> Floats: ...

def settle(
    base: Floats,
    coupling: Floats,
    reference: Floats,
    kept: NDArray[np.uint8] | None,
    scale: Floats | None,
    inverse: Floats | None,
    low: Floats | None,
    high: Floats | None,
    group: NDArray[np.int32] | None,
) -> tuple[Any, Floats]: ...
def search_steps(
    values: Floats,
    importance: Floats,
    least_code: float,
    greatest_code: float,
    symmetric: bool,
    scale_dtype: str,
    shares: Floats,
    near: Floats,
) -> tuple[Floats, Floats]: ...
def bitmask_encode(matrix: Any, floats: bool) -> tuple[Any, NDArray[np.uint8], NDArray[np.int64]]: ...
def bitmask_decode(values: Any, bitmask: NDArray[np.uint8], columns: int) -> Any: ...
