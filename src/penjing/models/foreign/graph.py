"""A model that transformers computes, as the engine asks for it: chunks of many sequences in, drawn tokens out.

Python runs layer by layer and sequence by sequence, and every sequence has a cache of its own in transformers' layout.
The engine's cache blocks are an account of it: a sequence keeps its cache as long as the blocks that it was given are
its own, so that all of them together never take more than was set aside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ... import kernels
from ...checkpoint import Checkpoint
from ...errors import BadInput, PenjingError, Unsupported
from ...kernels import KV_TOKENS
from ..layers import Array
from ..outline import Outline
from ..step import Chunk, Logprobs, Result
from ..weights import Activations
from . import TORCH_WAITS
from .empty import quietly
from .load import load_graph
from .weights import Experts, KernelWeight

KV_TYPE = "float32"
FLOAT = 4
# torch and transformers in memory, beside what the process of the engine takes anyway: measured 345 MB.
RUNTIME_BYTES = 352 << 20
_CACHES = ("cache", "past_key_values", "cache_params", "state")  # what forwards call what they have computed
_PROBE, _HALF = 12, 7  # tokens; a convolution over positions is shorter than the half
_SAME = 0.05  # relative error of logits: rounding activations to int8 makes less, a lost state makes about 1


class Graph:
    """Weights in memory and the computation; see `StepModel` for what is not said here."""

    from_cache = False  # its packed weights are not kept in a file

    def __init__(
        self, checkpoint: Checkpoint, config: Outline, activations: Activations = "auto", length: int | None = None
    ) -> None:
        """length: of the longest sequence, the model's own by default.

        Raises Unsupported for an architecture that transformers cannot compute, or not token by token.
        """
        self._where = f"{checkpoint.path}: model_type = {config.family!r}"
        self.graph = load_graph(checkpoint, activations)
        self._argument = next((name for name in _CACHES if name in signature(self.graph.forward).parameters), "")
        self._settings = self.graph.config.get_text_config()
        longest = getattr(self._settings, "max_position_embeddings", None)  # a family's default, where nothing is said
        self.config = replace(config, max_position=longest) if isinstance(longest, int) else config
        self._length = min(length or self.config.max_position, self.config.max_position)
        self._caches: dict[int, _Cache] = {}
        self._owners: dict[int, int] = {}  # block → the slot whose cache it stands for
        self._continues = True
        with quietly():
            self._probe()

    @property
    def weights_bytes(self) -> int:
        held: dict[int, int] = {id(matrix): matrix.nbytes for weight in self._weights() for matrix in weight.matrices}
        plain: dict[int, int] = {id(each): each.nbytes for each in (*self.graph.parameters(), *self.graph.buffers())}
        return sum(held.values()) + sum(plain.values())

    @property
    def read_bytes(self) -> int:
        """Of the weights that one token of one sequence reads: all but embeddings, of which it is one row."""
        tables = [module.weight for module in self.graph.modules() if isinstance(module, nn.Embedding)]
        rows = {id(matrix): matrix for weight in tables for matrix in getattr(weight, "matrices", ())}
        read = [module.weight for module in self.graph.modules() if isinstance(module, nn.Linear)]
        products = {id(matrix) for weight in read for matrix in getattr(weight, "matrices", ())}
        unread: int = sum(matrix.nbytes for key, matrix in rows.items() if key not in products)
        return self.weights_bytes - unread

    def _weights(self) -> Iterator[KernelWeight]:
        for module in self.graph.modules():
            for value in vars(module).values():
                if isinstance(value, KernelWeight):
                    yield value
                elif isinstance(value, Experts):
                    yield from value.weights

    @property
    def has_state(self) -> bool:
        return self.state_bytes > 0

    @property
    def state_bytes(self) -> int:
        """What a sequence keeps however long it is: recurrent states, and what there is of short windows."""
        return self._state_bytes

    def block_bytes(self, kv_type: str) -> int:
        return KV_TOKENS * self._token_bytes

    def activation_bytes(self, tokens: int) -> int:
        """An estimate from above: rows of the widest layer, scores or masks, states of all tokens, and torch itself."""
        layers: int = self._settings.num_hidden_layers
        heads: int = getattr(self._settings, "num_attention_heads", 1)
        widest: int = max(weight.shape[0] for weight in self._weights() if weight.shape[0] != self.config.vocab_size)
        eager = self._settings._attn_implementation == "eager"
        scores = FLOAT * self._length * (2 * heads if eager else 1) if self._token_bytes else 0
        row: int = FLOAT * 8 * widest + scores + 3 * self._state_bytes // layers
        copied = 2 * self._length * self._token_bytes // layers  # a layer's cache is written anew for every token
        logits = 2 * FLOAT * min(tokens, 64) * self.config.vocab_size
        return RUNTIME_BYTES + tokens * row + copied + logits

    def reserve(self, blocks: int, kv_type: str = KV_TYPE, slots: int = 0) -> None:
        """Forget all caches; they take their memory as they grow. Raises BadInput for a type that is not float32."""
        if kv_type != KV_TYPE:
            raise BadInput(f"kv_type={kv_type!r}: transformers' cache is {KV_TYPE}")
        self._caches, self._owners = {}, {}

    def step(self, chunks: Sequence[Chunk]) -> list[Result]:
        """A sequence's results do not depend on what else is in the step. Raises BadInput for unknown tokens."""
        for chunk in chunks:
            if chunk.tokens.min() < 0 or chunk.tokens.max() >= self.config.vocab_size:
                raise BadInput(f"a token is outside the vocabulary of {self.config.vocab_size}")
        return [self._compute(chunk) for chunk in chunks]

    def _compute(self, chunk: Chunk) -> Result:
        self._own(chunk)
        rows = len(chunk.tokens) if chunk.score is not None else 1
        logits = self.logits(chunk.slot, chunk.tokens, chunk.start, rows)
        result = Result()
        if not np.isfinite(logits).all():
            reason = "the model's logits are not finite; its weights are damaged or out of range"
            return Result(error=reason)
        if chunk.score is not None:
            alternatives, last = chunk.score
            followers = [*chunk.tokens[1:].tolist(), *([last] if last >= 0 else [])]
            pairs = zip(logits, followers, strict=False)
            result.scores.extend(Logprobs(*kernels.log_probabilities(row, each, alternatives)) for row, each in pairs)
        if chunk.sampler is None:
            return result
        try:
            token, found = chunk.sampler.next(logits[-1], chunk.logprobs)
        except PenjingError as error:
            return Result(scores=result.scores, error=str(error))
        result.tokens.append(token)
        if found is not None:
            result.logprobs.append(Logprobs(*found))
        return result

    def _own(self, chunk: Chunk) -> None:
        """The chunk's blocks stand for its slot's cache now; who had one of them before has lost its cache."""
        if chunk.start == 0:  # another sequence, or the same one anew: what stood for the old cache stands for nothing
            self._forget(chunk.slot)
        for block in chunk.table.tolist():
            before = self._owners.get(block, chunk.slot)
            if before != chunk.slot:
                self._forget(before)
            self._owners[block] = chunk.slot

    def _forget(self, slot: int) -> None:
        self._caches.pop(slot, None)
        self._owners = {block: owner for block, owner in self._owners.items() if owner != slot}

    def logits(self, slot: int, tokens: NDArray[np.integer[Any]], start: int, rows: int) -> Array:
        """Logits (rows, vocabulary) of the last of a sequence's next tokens; ``start`` 0 begins it anew."""
        if start == 0:
            self._caches.pop(slot, None)
        elif slot not in self._caches or self._caches[slot].length != start:
            raise BadInput(f"position {start} does not follow what is in the cache of slot {slot}")
        cut = len(tokens) if start == 0 or self._continues else 1
        found: list[Array] = []
        for low in range(0, len(tokens), cut):
            piece = tokens[low : low + cut]
            wanted = min(len(piece), max(0, low + len(piece) - len(tokens) + rows))
            logits = self._forward(slot, piece, max(1, wanted))
            found += [logits] if wanted else []
        return np.concatenate(found) if len(found) > 1 else found[0]

    def _forward(self, slot: int, tokens: NDArray[np.integer[Any]], rows: int) -> Array:
        before = self._caches.get(slot)
        known = {} if before is None else {self._argument: before.held}
        with torch.inference_mode(), _threads():
            ids = torch.from_numpy(tokens.astype(np.int64))[None]
            out = self.graph(input_ids=ids, use_cache=True, logits_to_keep=rows, **known)
        if (held := getattr(out, self._argument, None)) is None:
            raise Unsupported(f"{self._where}: transformers' graph hands out no cache to go on from")
        length = len(tokens) + (before.length if before else 0)
        self._caches[slot] = _Cache(held, length)
        return np.ascontiguousarray(out.logits[0, -rows:].to(torch.float32).numpy())

    def _probe(self) -> None:
        """Learn what a sequence's cache takes, and how the graph goes on from it.

        Some recurrent graphs take one token at a time once they have begun, and compute something else, without a word,
        if they are given several.
        """
        try:
            right = self._goes_on()
        except PenjingError:
            raise
        except Exception as error:  # whatever a family's own code says
            raise Unsupported(f"{self._where}: transformers cannot compute it: {_line(error)}") from None
        if not right:
            raise Unsupported(
                f"{self._where}: transformers' graph does not compute the same token by token as it does at once,"
                " so it cannot be served"
            )
        self.reserve(0)

    def _goes_on(self) -> bool:
        size = min(_PROBE, self.config.max_position)
        tokens = np.random.default_rng(0).integers(0, self.config.vocab_size, size)
        half = min(_HALF, size - 1)
        whole = self.logits(0, tokens, 0, size)
        long = self._caches[0].nbytes()
        first = self.logits(0, tokens[:half], 0, half)
        self._token_bytes = max(0, long - self._caches[0].nbytes()) // (size - half)
        self._state_bytes = max(0, long - size * self._token_bytes)
        for continues in (True, False):
            self._continues = continues
            self.logits(0, tokens[:half], 0, 1)
            rest = self.logits(0, tokens[half:], half, size - half)
            error = np.concatenate([first, rest]) - whole
            if np.sqrt(np.square(error).mean()) <= _SAME * whole.std():
                return True
        return False


@contextmanager
def _threads() -> Iterator[None]:
    """As many for torch as for the kernels, or one if torch's would be in their way."""
    before = torch.get_num_threads()
    torch.set_num_threads(kernels.threads() if TORCH_WAITS else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class _Cache:
    """What a sequence has computed, as the graph hands it out.  length: in tokens."""

    def __init__(self, held: Any, length: int) -> None:
        self.held, self.length = held, length

    def nbytes(self) -> int:
        """Of all tensors in it, wherever they are; each counted once."""
        tensors: dict[int, int] = {}
        seen: set[int] = set()
        rest = [self.held]
        while rest:
            each = rest.pop()
            if isinstance(each, Tensor):
                storage = each.untyped_storage()  # more than the tensor, where it is a part of another
                tensors[storage.data_ptr()] = storage.nbytes()
            elif id(each) not in seen and not isinstance(each, (nn.Module, type)):
                seen.add(id(each))
                rest += each.values() if isinstance(each, dict) else each if isinstance(each, (list, tuple)) else []
                rest += vars(each).values() if hasattr(each, "__dict__") else []
        return sum(tensors.values())
