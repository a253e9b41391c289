"""transformers' graph in the engine: batches, chunks, preemption, seeds and ends, as for any other model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penjing.engine.engine import Engine
from penjing.engine.messages import Event, Load, Request, SamplingParams
from penjing.engine.process import load
from penjing.engine.scheduler import Limits
from penjing.errors import OutOfBudget, Unsupported
from penjing.models import load_any
from tiny_graphs import make_graph

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
PROMPTS = [np.random.default_rng(n).integers(3, 97, size).tolist() for n, size in enumerate((1, 5, 37, 12))]


def engine(model: Any, **changes: int) -> Engine:
    values = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64, "blocks": 8, "mixed_prefill": 7}
    return Engine(model, Limits(**{**values, "scored_prefill": 5, "prefix_caching": False, **changes}))


def run(one: Engine) -> dict[str, list[Event]]:
    events: dict[str, list[Event]] = {}
    while one.has_work:
        for event in one.step():
            assert event.error is None
            events.setdefault(event.request_id, []).append(event)
    return events


def tokens(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.tokens]


@pytest.mark.parametrize("family", ["opt", "bloom", "mamba", "phimoe"])
def test_a_batch_writes_what_generate_writes_of_each(family: str, tmp_path: Path) -> None:
    prompts = [prompt[:19] for prompt in PROMPTS]
    oracle = make_graph(tmp_path / "a", family)
    one = engine(load_any(tmp_path / "a"), blocks=5)  # so few that sequences are put back, and read again
    for number, prompt in enumerate(prompts):
        one.add(Request(str(number), prompt, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)))
    found = run(one)
    assert one.stats().preemptions > 0
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        more = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "do_sample": False}
        right = oracle.generate(ids, max_new_tokens=40, pad_token_id=0, **more)[0, len(prompt) :]
        assert tokens(found[str(number)]) == right.tolist()


def test_seeds_penalties_and_scores_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    oracle = make_graph(tmp_path / "a", "opt")
    model = load_any(tmp_path / "a")
    asked = [
        Request("a", PROMPTS[2], SamplingParams(max_tokens=9, seed=5, logprobs=2, prompt_logprobs=1, ignore_eos=True)),
        Request("b", PROMPTS[1], SamplingParams(max_tokens=9, seed=5, repetition_penalty=1.3, ignore_eos=True)),
        Request("c", PROMPTS[1], SamplingParams(max_tokens=9, seed=6, ignore_eos=True)),
    ]
    together = engine(model)
    for each in asked:
        together.add(each)
    found = run(together)
    for each in asked:
        alone = list(engine(model).run(each))
        assert tokens(alone) == tokens(found[each.id])
    assert len({tuple(tokens(found[each.id])) for each in asked}) == 3
    text = PROMPTS[2] + tokens(found["a"])
    with torch.no_grad():
        logs = oracle(torch.tensor([text])).logits[0].log_softmax(-1).numpy()
    right = [logs[place, token] for place, token in enumerate(text[1:])]
    scores = found["a"][0].prompt_logprobs + [each for event in found["a"] for each in event.logprobs]
    np.testing.assert_allclose([each.chosen for each in scores], right, atol=1e-4)
    assert [each.top[0][0] for each in scores] == logs[:-1].argmax(-1).tolist()


def test_who_is_aborted_leaves_no_trace(tmp_path: Path) -> None:
    make_graph(tmp_path / "a", "opt")
    model = load_any(tmp_path / "a")
    one = engine(model)
    for name in "ab":
        one.add(Request(name, PROMPTS[2], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)))
    one.step()
    one.abort("a")
    one.add(Request("c", PROMPTS[1], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)))
    found = run(one)
    for name, prompt in (("b", PROMPTS[2]), ("c", PROMPTS[1])):
        alone = engine(model).run(Request("x", prompt, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)))
        assert tokens(found[name]) == tokens(list(alone))
    assert one.stats().blocks_used == 0


def test_caches_never_take_more_than_their_blocks(tmp_path: Path) -> None:
    make_graph(tmp_path / "a", "opt")
    model = load_any(tmp_path / "a")
    one = engine(model, blocks=5)
    for number in range(12):
        prompt = PROMPTS[number % 4]
        one.add(Request(str(number), prompt, SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)))
    while one.has_work:
        assert not any(event.error for event in one.step())
        assert sum(each.nbytes() for each in model._caches.values()) <= 5 * model.block_bytes("float32")


def test_options_that_need_cache_blocks_are_refused_in_a_line(tmp_path: Path) -> None:
    make_graph(tmp_path / "a", "opt")
    for option in ({"kv_cache_dtype": "int8"}, {"speculative": "prompt"}, {"enable_prefix_caching": True}):
        with pytest.raises(Unsupported, match=rf"{next(iter(option))}=.*leave this option away"):
            load(Load(folder=str(tmp_path / "a"), **option))
    with pytest.raises(OutOfBudget):
        load(Load(folder=str(tmp_path / "a"), memory_budget=300 << 20))
    one, ready = load(Load(folder=str(tmp_path / "a"), memory_budget=700 << 20, max_num_seqs=2))
    assert (ready.kv_cache_dtype, ready.max_model_len, one.limits.prefix_caching) == ("float32", 64, False)
    assert ready.blocks * ready.block_bytes + ready.weights_bytes + one.model.activation_bytes(512) < 700 << 20


def test_damaged_weights_end_their_requests(tmp_path: Path) -> None:
    make_graph(tmp_path / "a", "opt")
    model = load_any(tmp_path / "a")
    model.graph.model.decoder.final_layer_norm.weight.data.fill_(float("nan"))
    [event] = engine(model).run(Request("a", [5], SamplingParams(max_tokens=3)))
    assert "not finite" in (event.error or "")
