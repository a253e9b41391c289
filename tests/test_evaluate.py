"""Evaluation against torch, brute force and closed forms."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import penjing
from penjing.errors import BadInput, PenjingError
from penjing.evaluate import cut, evaluate, log_softmax, read_texts
from penjing.models import streaming

NOVELIST = Path(__file__).parents[1] / "examples" / "novelist"
TEXT = (NOVELIST / "evaluation.txt").read_text()


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Novelist with noise on its weights, as another program would have changed it."""
    torch = pytest.importorskip("torch")
    model = oracle(NOVELIST)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("noisy")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((NOVELIST / name).read_bytes())
    return folder


def oracle(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids_of(text: str) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(NOVELIST / "tokenizer.json")).encode(text).ids


def by_torch(folder: Path, ids: list[int], length: int, stride: int) -> Any:
    """Log-probabilities float64 (scored, vocabulary) and targets, by the loop of Hugging Face's perplexity guide."""
    import torch

    torch.set_num_threads(1)  # beside the kernels' threads, more would only wait for each other
    model, logs, targets, scored_to = oracle(folder), [], [], 0
    for start in range(0, len(ids), stride):
        end = min(start + length, len(ids))
        new = end - scored_to
        labels = ids[start:end]
        labels = [-100] * (len(labels) - new) + labels[len(labels) - new :]
        with torch.no_grad():
            log = model(torch.tensor([ids[start:end]])).logits[0].double().log_softmax(-1).numpy()
        for position, label in enumerate(labels[1:]):
            if label != -100:
                logs.append(log[position])
                targets.append(label)
        scored_to = end
        if end == len(ids):
            break
    return np.array(logs), np.array(targets)


@pytest.mark.parametrize(("length", "stride"), [(64, 64), (64, 24), (100, 100), (50, 17)])
def test_loss_equals_the_loop_of_the_perplexity_guide(length: int, stride: int) -> None:
    text = TEXT[:500]
    logs, targets = by_torch(NOVELIST, ids_of(text), length, stride)
    result = evaluate(NOVELIST, [text], context_length=length, stride=stride)
    assert result.tokens == len(targets)
    right = -logs[np.arange(len(targets)), targets].mean()
    assert result.loss == pytest.approx(right, abs=2e-6)
    assert result.perplexity == pytest.approx(np.exp(right), rel=2e-6)
    assert (result.context_length, result.stride) == (length, stride)


def test_change_kl_and_agreement_equal_brute_force(noisy: Path) -> None:
    text = TEXT[:2800]
    (base, targets), (model, _) = (by_torch(folder, ids_of(text), 64, 64) for folder in (NOVELIST, noisy))
    result = evaluate(noisy, [text], NOVELIST, context_length=64)
    each = np.arange(len(targets))
    change = base[each, targets] - model[each, targets]
    kl = (np.exp(base) * (base - model)).sum(axis=1)
    agree = base.argmax(1) == model.argmax(1)
    assert result.base_loss == pytest.approx(-base[each, targets].mean(), abs=2e-6)
    assert result.loss_change == pytest.approx(change.mean(), abs=2e-6)
    assert result.loss_change == pytest.approx(result.loss - result.base_loss, abs=1e-9)
    assert result.kl == pytest.approx(kl.mean(), rel=1e-4)
    assert result.top1_agreement == pytest.approx(agree.mean(), abs=1.5 / len(agree))
    assert result.base_perplexity == pytest.approx(np.exp(result.base_loss))
    # The interval over windows: sums of residuals by window, and Student's 97.5 % quantile for 14 degrees of freedom.
    sums = np.bincount(np.arange(len(targets)) // 63, weights=change - change.mean())
    assert result.windows == len(sums) == 15
    reach = 2.144787 * np.sqrt(15 / 14 * (sums**2).sum()) / len(change)
    low, high = result.loss_change_ci95
    assert (low, high) == pytest.approx((change.mean() - reach, change.mean() + reach), abs=1e-5)
    assert result.kl_ci95[0] < result.kl < result.kl_ci95[1]
    assert result.loss_change > 0


def test_a_model_against_itself_changes_nothing() -> None:
    result = evaluate(NOVELIST, [TEXT[:3000]], NOVELIST, context_length=128)
    assert (result.loss_change, result.kl, result.top1_agreement) == (0, 0, 1)
    assert result.loss_change_ci95 == (0, 0)


def test_the_models_card_is_right_on_its_first_chapter() -> None:
    """The card's 3.712 is for the whole book, which takes a minute; its beginning is harder."""
    torch = pytest.importorskip("torch")
    ids = torch.tensor(ids_of(TEXT[:40000])[:5120]).reshape(-1, 512)
    with torch.no_grad():
        logits = oracle(NOVELIST)(ids).logits[:, :-1]
    right = torch.nn.functional.cross_entropy(logits.reshape(-1, 4096), ids[:, 1:].reshape(-1)).item()
    result = evaluate(NOVELIST, NOVELIST / "evaluation.txt", max_tokens=5120)
    assert (result.tokens, result.windows) == (511 * 10, 10)
    assert result.loss == pytest.approx(right, abs=1e-5)


@pytest.mark.slow
def test_the_models_card_is_right() -> None:
    assert round(evaluate(NOVELIST, NOVELIST / "evaluation.txt").loss, 3) == 3.712


def test_documents_do_not_see_each_other(tmp_path: Path) -> None:
    texts = [TEXT[:700], TEXT[2000:2900], "x", "", TEXT[5000:5300]]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text, "id": 3}) for text in texts) + "\n\n")
    together = evaluate(NOVELIST, file, context_length=90)
    alone = [evaluate(NOVELIST, [text], context_length=90) for text in texts if len(text) > 1]
    assert together.tokens == sum(each.tokens for each in alone)
    assert together.windows == sum(each.windows for each in alone)
    assert together.loss * together.tokens == pytest.approx(sum(each.loss * each.tokens for each in alone), rel=1e-6)


def test_activations_and_logits_in_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch, noisy: Path) -> None:
    whole = evaluate(noisy, [TEXT[:2000]], NOVELIST, context_length=50, stride=20)

    module = sys.modules["penjing.evaluate"]
    monkeypatch.setattr(module, "SPILL_BYTES", 1000)
    monkeypatch.setattr(module, "LOGITS", 3 * 4096 + 5)
    monkeypatch.setattr(streaming, "BATCH_TOKENS", 70)
    pieces = evaluate(noisy, [TEXT[:2000]], NOVELIST, context_length=50, stride=20)
    for name in ("loss", "loss_change", "kl", "top1_agreement"):
        assert getattr(pieces, name) == pytest.approx(getattr(whole, name), abs=1e-6)


@pytest.mark.parametrize("size", [2, 3, 9, 10, 11, 25, 30])
@pytest.mark.parametrize("stride", [1, 3, 10])
def test_windows_score_every_token_but_the_first_once(size: int, stride: int) -> None:
    document = np.arange(size)
    windows = list(cut(document, 10, stride))
    scored = np.concatenate([window.tokens[len(window.tokens) - window.scored :] for window in windows])
    # Where windows do not overlap, the first token of each has nothing to be predicted from.
    right = [token for token in range(size) if token and (stride < 10 or token % 10)]
    assert scored.tolist() == right
    assert all(len(window.tokens) <= 10 and window.scored < len(window.tokens) for window in windows)


def test_log_softmax_of_large_logits_does_not_overflow() -> None:
    logits = np.array([[1000.0, 1001.0, 999.0], [-1e4, 0.0, -1e4]], np.float32)
    right = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(log_softmax(logits.copy()), right, atol=1e-4)


def test_progress_goes_to_the_end() -> None:
    seen: list[tuple[float, float]] = []
    evaluate(NOVELIST, [TEXT[:3000]], NOVELIST, context_length=64, progress=lambda *each: seen.append(each))
    done = [each[0] for each in seen]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(seen[-1][1])


def test_penjing_evaluate_is_the_function_whatever_was_imported() -> None:
    assert penjing.evaluate is evaluate
    first = "import penjing; penjing.evaluate; import penjing.evaluate"
    for code in (first, "from penjing.evaluate import cut; import penjing"):
        code += "; print(penjing.evaluate.__name__, 'torch' in __import__('sys').modules)"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert ran.stdout.split() == ["evaluate", "False"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there is no text"),
        (b" \n\n", "there is no text"),
        (b"caf\xe9 au lait", "byte 3 is not UTF-8"),
        (b"I", "at least 2"),
    ],
)
def test_text_that_cannot_be_measured(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        evaluate(NOVELIST, file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"), [("{", "not JSON"), ("[1]", "'text'"), ('{"txt": "a"}', "'text'"), ('{"text": 3}', "'text'")]
)
def test_bad_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(BadInput, match=f"line 3: .*{message}"):
        read_texts(file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_length": 1025}, "context_length=1025: .* 2 to 1024"),
        ({"context_length": 1}, "context_length=1"),
        ({"stride": 0}, "stride=0"),
        ({"stride": 513}, "stride=513: give 1 to context_length = 512"),
        ({"max_tokens": 1}, "max_tokens=1"),
        ({"threads": 0}, "threads=0: give 1 to 256"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        evaluate(NOVELIST, [TEXT[:2000]], **settings)


def copy(folder: Path, **changes: Any) -> Path:
    """Novelist again, with some of config.json changed."""
    folder.mkdir()
    for file in NOVELIST.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((NOVELIST / "config.json").read_text()) | changes
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_models_that_cannot_be_compared(tmp_path: Path) -> None:
    tensors = pytest.importorskip("safetensors.numpy")
    smaller = copy(tmp_path / "smaller", vocab_size=4000)
    weights = tensors.load_file(NOVELIST / "model.safetensors")
    weights["model.embed_tokens.weight"] = np.ascontiguousarray(weights["model.embed_tokens.weight"][:4000])
    (smaller / "model.safetensors").unlink()
    tensors.save_file(weights, smaller / "model.safetensors")
    with pytest.raises(BadInput, match="vocabularies of 4096 and 4000"):
        evaluate(NOVELIST, [TEXT[:2000]], smaller)
    with pytest.raises(BadInput, match="beyond the model's vocabulary of 4000"):
        evaluate(smaller, [TEXT[:20000]])

    other = copy(tmp_path / "other")
    tokenizer = json.loads((NOVELIST / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BadInput, match="as different tokens"):
        evaluate(NOVELIST, [TEXT[:2000]], other)


@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, "layers.2.input_layernorm.weight has a NaN"), (3e38, "not finite")]
)
def test_weights_that_are_not_numbers_are_no_result(value: float, said: str, tmp_path: Path) -> None:
    tensors = pytest.importorskip("safetensors.numpy")
    broken = copy(tmp_path / "broken")
    weights = tensors.load_file(NOVELIST / "model.safetensors")
    weights["model.layers.2.input_layernorm.weight"] = np.full(384, value, np.float32)
    (broken / "model.safetensors").unlink()
    tensors.save_file(weights, broken / "model.safetensors")
    for against in (None, NOVELIST):
        with pytest.raises(PenjingError, match=said):
            evaluate(broken, [TEXT[:2000]], against, context_length=64)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "penjing", *map(str, arguments)], capture_output=True, text=True)


def test_the_command(noisy: Path, tmp_path: Path) -> None:
    data = tmp_path / "held-out.txt"
    data.write_text(TEXT[:4000])
    ran = run("evaluate", noisy, "--data", data, "--against", NOVELIST, "--context-length", "100", "--json")
    assert ran.returncode == 0, ran.stderr
    printed = json.loads(ran.stdout)
    expected = evaluate(noisy, data, NOVELIST, context_length=100).to_dict()
    assert set(printed) == set(expected)
    promised = {"tokens", "loss", "perplexity", "base_loss", "base_perplexity", "loss_change", "loss_change_ci95"}
    promised |= {"kl", "top1_agreement", "context_length", "stride", "windows", "seconds", "peak_rss_bytes"}
    assert promised <= set(printed)
    assert printed["loss_change_ci95"] == pytest.approx(expected["loss_change_ci95"])
    assert len(printed["loss_change_ci95"]) == 2

    ran = run("evaluate", NOVELIST, "--data", data)
    assert ran.returncode == 0
    assert "perplexity" in ran.stdout
    ran = run("evaluate", NOVELIST, "--data", data, "--stride", "0", "--json")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "penjing: stride=0: give 1 to context_length = 512\n"


def test_one_window_gives_no_interval_and_valid_json(noisy: Path) -> None:
    result = evaluate(noisy, [TEXT[:300]], NOVELIST)
    assert result.windows == 1
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["loss_change_ci95"] is None
    assert "no interval" in str(result)


def test_memory_is_that_of_one_block(tmp_path: Path) -> None:
    """Twelve times the blocks, 190 MB more of weights: the peak stays where it is."""
    import ml_dtypes

    from penjing.checkpoint import write_safetensors

    block = {f"self_attn.{name}_proj": (512, 512) for name in "qkvo"}
    block |= {f"mlp.{name}_proj": (2048, 512) for name in ("gate", "up")} | {"mlp.down_proj": (512, 2048)}
    block |= {"input_layernorm": (512,), "post_attention_layernorm": (512,)}
    config = json.loads((NOVELIST / "config.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    peaks = []
    for layers in (2, 24):
        folder = tmp_path / str(layers)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        (folder / "tokenizer.json").write_bytes((NOVELIST / "tokenizer.json").read_bytes())
        shapes = {"model.embed_tokens.weight": (4096, 512), "model.norm.weight": (512,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in block.items()}
        values = {shape: np.full(shape, 0.01, ml_dtypes.bfloat16) for shape in set(shapes.values())}
        write_safetensors(folder / "model.safetensors", {name: values[shape] for name, shape in shapes.items()})
        ran = run("evaluate", folder, "--data", NOVELIST / "evaluation.txt", "--max-tokens", "64", "--json")
        assert ran.returncode == 0, ran.stderr
        peaks.append(json.loads(ran.stdout)["peak_rss_bytes"])
    assert peaks[1] - peaks[0] < 40e6
