"""A mixture of experts: which ones a token goes to, and what they make of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..config import Block, Experts, Mlp
from .layers import Array, Parts, gated, sigmoid, softmax


def mixture(block: Block, parts: Parts, x: Array) -> Array:
    """What the experts, and the MLP beside them, make of the block's stream x (n, hidden)."""
    assert isinstance(block.mlp, Experts)
    rule, norms = block.mlp, block.norms
    normed = parts.norm("mlp_in", norms, x)
    inputs = parts.norm("experts_in", norms, x) if "experts_in" in norms else normed
    chosen, scores = route(rule, parts, parts.norm("router", norms, x) if "router" in norms else normed)
    made = np.zeros_like(x)
    for number in np.unique(chosen):
        rows, places = np.nonzero(chosen == number)
        made[rows] += expert(rule, parts, int(number), inputs[rows]) * scores[rows, places, None]
    made = parts.norm("experts_out", norms, made)
    if not rule.shared_inner:
        return made
    beside = gated(parts, Mlp(rule.shared_inner, rule.activation), normed, "shared.")
    beside = parts.norm("shared_out", norms, beside)
    return made + (beside * sigmoid(parts.linear("shared_gate", normed)) if rule.shared_gate else beside)


def route(rule: Experts, parts: Parts, x: Array) -> tuple[NDArray[np.int64], Array]:
    """Numbers and weights (n, top_k) of the experts that each row of x goes to."""
    logits = parts.linear("router", x)
    scores = logits if rule.scoring == "chosen" else softmax(logits) if rule.scoring == "softmax" else sigmoid(logits)
    wanted = scores + parts.vectors["correction"] if rule.correction_bias else scores
    if rule.groups > 1:
        wanted = np.where(_good_groups(rule, wanted).repeat(rule.count // rule.groups, axis=1), wanted, -np.inf)
    chosen = np.argsort(-wanted, axis=1, kind="stable")[:, : rule.top_k]
    weights = np.take_along_axis(scores, chosen, axis=1)
    if rule.scoring == "chosen":
        weights = softmax(weights)
    elif rule.normalized:
        weights = weights / weights.sum(axis=1, keepdims=True)
    if "expert_scale" in parts.vectors:
        weights = weights * parts.vectors["expert_scale"][chosen]
    return chosen, weights * x.dtype.type(rule.scale)


def _good_groups(rule: Experts, wanted: Array) -> NDArray[np.bool_]:
    """Which groups of experts (n, groups) may be chosen from."""
    best = np.sort(wanted.reshape(len(wanted), rule.groups, -1), axis=2)[:, :, -2:]
    worth = best[:, :, -1] if rule.group_score == "max" else best.sum(axis=2)
    rank = np.argsort(np.argsort(-worth, axis=1, kind="stable"), axis=1)
    return rank < rule.top_groups


def expert(rule: Experts, parts: Parts, number: int, x: Array) -> Array:
    """One expert's MLP on the rows that go to it."""
    role = f"experts.{number}."
    if rule.activation != "clamped":
        return gated(parts, Mlp(rule.inner, rule.activation), x, role)
    gate = np.minimum(parts.linear(f"{role}gate", x), rule.limit)
    up = np.clip(parts.linear(f"{role}up", x), -rule.limit, rule.limit)
    return parts.linear(f"{role}down", (up + 1) * gate * sigmoid(rule.alpha * gate))
