"""The memory ledger of serving: weights, activations and caches are counted before they are allocated."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import BadInput, OutOfBudget
from ..hardware import memory_available_bytes, memory_limit_bytes
from ..models import ModelConfig
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


def activation_bytes(config: ModelConfig, tokens: int, sequences: int, scored: int) -> int:
    """The most that one step holds beside weights and caches.

    tokens: in the step.  sequences: that sample.  scored: prompt tokens with logits.
    """
    logits = (sequences + scored) * config.vocab_size
    one_row = 8 * config.vocab_size  # the sampler's copies, in float64
    return FLOAT * (tokens * config.floats_per_token + logits + one_row)


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


def limits(load: Load, config: ModelConfig, weights: int, budget: int) -> tuple[Limits, Ledger]:
    """What the engine may use, so that everything together stays within the budget.

    Without max_model_len in ``load`` it is the model's own, or as much of it as one sequence has memory for.
    Raises BadInput if max_model_len is more than the model has positions for, OutOfBudget if nothing useful fits.
    """
    longest = load.max_model_len or config.max_position
    if longest > config.max_position:
        raise BadInput(f"max_model_len={longest}: the model has positions for {config.max_position} tokens")
    scored = min(Limits.scored_prefill, load.max_num_batched_tokens)
    step = activation_bytes(config, load.max_num_batched_tokens, load.max_num_seqs, scored)
    ledger = Ledger(budget, weights, step)
    per_token = config.kv_bytes_per_token
    room = max(ledger.left, 0) // per_token
    if room < (longest if load.max_model_len else min(longest, 16)):
        raise OutOfBudget(
            f"{ledger}: {_mib(max(ledger.left, 0))} are left for caches, and one sequence of {longest} tokens needs "
            f"{_mib(longest * per_token)}; give a larger --memory-budget or a smaller --max-model-len"
        )
    longest = min(longest, room)
    caches = min(room, load.max_num_seqs * longest)
    return (
        Limits(
            max_num_seqs=load.max_num_seqs,
            max_num_batched_tokens=load.max_num_batched_tokens,
            max_model_len=longest,
            kv_bytes=caches * per_token,
            kv_bytes_per_token=per_token,
            scored_prefill=scored,
        ),
        ledger,
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
