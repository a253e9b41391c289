"""The memory ledger of serving: weights, activations and caches are counted before they are allocated."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import BadInput, OutOfBudget, Unsupported
from ..hardware import memory_available_bytes, memory_limit_bytes
from ..kernels import KvPool, screen_bytes
from ..models import ModelConfig, Outline
from ..models.step import StepModel
from .blocks import BLOCK, blocks_for
from .messages import Load
from .scheduler import Limits

# What the two processes take beside weights and caches: measured 120 MB resident with a vocabulary of 4096; the rest
# is for the tokenizers of larger ones.
PROCESSES_BYTES = 160 << 20
SHARE_OF_MEMORY = 0.9
FLOAT = 4


def default_budget() -> int:
    """Nine tenths of what this process may have (control group, machine), and no more than is free now."""
    return min(int(SHARE_OF_MEMORY * memory_limit_bytes()), memory_available_bytes())


@dataclass(frozen=True)
class Sizes:
    """What a model takes, in bytes; of a draft beside it too.

    weights: as they lie in memory.  block: of cache, 32 positions in all layers.  state: of one sequence, recurrent.
    step: the most that a step holds beside these.
    """

    weights: int
    block: int
    state: int
    step: int

    @classmethod
    def of(cls, model: StepModel, load: Load, kv_type: str) -> Sizes:
        step = model.activation_bytes(load.max_num_batched_tokens)
        return cls(model.weights_bytes, model.block_bytes(kv_type), model.state_bytes, step)

    @classmethod
    def expected(cls, config: ModelConfig | Outline, load: Load, stored: int, kv_type: str) -> Sizes:
        """Before anything is read: no more than what `of` will say."""
        if isinstance(config, Outline):  # what else a graph takes shows when it is there
            return cls(stored, 0, 0, 0)
        layers = [(each.kv_heads, each.key_dim, each.value_dim) for each in config.kv_layers if each is not None]
        step = FLOAT * load.max_num_batched_tokens * config.hidden
        return cls(stored, KvPool.block_bytes(layers, kv_type), config.state_bytes, step)

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(
            self.weights + other.weights,
            self.block + other.block,
            self.state + other.state,
            self.step + other.step,  # each keeps what it works in for its next step
        )


@dataclass(frozen=True)
class Ledger:
    """Bytes, as they were counted; what is left of ``budget`` is for the caches."""

    budget: int
    weights: int
    activations: int

    @property
    def left(self) -> int:
        return self.budget - self.weights - self.activations - PROCESSES_BYTES

    def __str__(self) -> str:
        return (
            f"weights {_mib(self.weights)}, activations {_mib(self.activations)}, "
            f"processes {_mib(PROCESSES_BYTES)} of {_mib(self.budget)}"
        )


def check_weights(stored_bytes: int, budget: int) -> None:
    """Before loading: refuse a model whose files alone are larger than the budget."""
    if stored_bytes + PROCESSES_BYTES > budget:
        raise OutOfBudget(
            f"the weights are {_mib(stored_bytes)} and the processes take {_mib(PROCESSES_BYTES)}; "
            f"the memory budget is {_mib(budget)}"
        )


def limits(load: Load, config: ModelConfig | Outline, sizes: Sizes, budget: int) -> tuple[Limits, Ledger]:
    """What the engine may use, so that everything together stays within the budget.

    Without max_model_len in ``load`` it is the model's own, or as much of it as one sequence has memory for.
    Raises BadInput if max_model_len is more than the model has positions for, OutOfBudget if nothing useful fits.
    """
    longest = load.max_model_len or config.max_position
    if longest > config.max_position:
        raise BadInput(f"max_model_len={longest}: the model has positions for {config.max_position} tokens")
    ledger = Ledger(budget, sizes.weights, sizes.step + load.max_num_seqs * sizes.state)
    room = max(ledger.left, 0) // sizes.block if sizes.block else load.max_num_seqs * blocks_for(longest)
    if room < (blocks_for(longest) if load.max_model_len else 1):
        smaller = "a smaller --max-model-len" if load.max_model_len else "fewer --max-num-batched-tokens in a step"
        raise OutOfBudget(
            f"{ledger}: {_mib(max(ledger.left, 0))} are left for caches, and one sequence of {longest} tokens needs "
            f"{_mib(blocks_for(longest) * sizes.block)}; give a larger --memory-budget or serve with {smaller}"
        )
    longest = min(longest, room * BLOCK)
    prefix_caching = not sizes.state if load.enable_prefix_caching is None else load.enable_prefix_caching
    if prefix_caching and sizes.state:
        raise Unsupported(f"{load.folder}: prefix caching needs a model without recurrent state; leave it off")
    return (
        Limits(
            max_num_seqs=load.max_num_seqs,
            max_num_batched_tokens=load.max_num_batched_tokens,
            max_model_len=longest,
            blocks=min(room, load.max_num_seqs * blocks_for(longest)),
            prefix_caching=prefix_caching,
            policy=load.scheduling_policy,
            scored_prefill=min(Limits.scored_prefill, load.max_num_batched_tokens),
        ),
        ledger,
    )


def has_room_for_screen(load: Load, config: ModelConfig | Outline, expected: Sizes, budget: int) -> bool:
    """Does the model fit beside its head's screen, which speed alone asks for, and are sequences as long as without?"""
    if isinstance(config, Outline):
        return False
    more = Sizes(screen_bytes(config.vocab_size, config.hidden), 0, 0, 0)
    try:
        screened = limits(load, config, expected + more, budget)[0]
    except OutOfBudget:
        return False
    return screened.max_model_len == limits(load, config, expected, budget)[0].max_model_len


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
