"""Train Novelist: an 11-million-parameter Llama on public-domain novels, in about 75 minutes on two CPU cores.

    python examples/novelist/train.py war-and-peace.txt dracula.txt … --evaluation held-out.txt --output out/novelist

The texts are plain files of Project Gutenberg; README.md beside this file lists those that were used. The tokenizer is
trained on them first, then the model: Muon for the matrices, AdamW for embeddings and norms. Needs torch ≥ 2.9,
transformers and tokenizers. `--steps 3 --width 64 --layers 2` is a trial that takes seconds.
"""

from __future__ import annotations

import argparse
import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# What the edition adds around a text, and the typography that is made plain.
START = re.compile(r"^(\*\*\* ?START OF .*|\*END\*? ?THE SMALL PRINT.*)$", re.MULTILINE)
END = re.compile(r"^(\*\*\* ?END OF .*|End of (the )?Project Gutenberg.*)$", re.MULTILINE | re.IGNORECASE)
PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "\ufeff": "", "_": ""})


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    texts = [prepare(read(file)) for file in options.texts]
    tokenizer = train_tokenizer(texts, options.vocabulary, options.context)
    model = new_model(options)
    print(f"{model.num_parameters() / 1e6:.1f} million parameters, {len(texts)} texts", flush=True)
    train(model, encode(tokenizer, texts), options)
    if options.evaluation:
        held_out = encode(tokenizer, [prepare(read(options.evaluation))])
        print(f"loss on {options.evaluation.name}: {evaluate(model, held_out, options.sequence):.3f}")
    model.to(torch.bfloat16).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", type=Path, help="plain text files to train on")
    parser.add_argument("--output", type=Path, required=True, help="folder for model and tokenizer")
    parser.add_argument("--evaluation", type=Path, help="held-out text: its loss is printed at the end")
    parser.add_argument("--steps", type=int, default=1720)
    parser.add_argument("--batch", type=int, default=12, help="sequences a step")
    parser.add_argument("--sequence", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--context", type=int, default=1024, help="longest context the model claims")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--width", type=int, default=384, help="a multiple of 64, the size of a head")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read(file: Path) -> str:
    """A text in UTF-8, or in the Latin-1 of the older editions."""
    data = file.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def prepare(text: str) -> str:
    """The novel alone: no header and licence of the edition, one line a paragraph, plain quotes and dashes."""
    text = text.replace("\r\n", "\n")
    if start := START.search(text):
        text = text[start.end() :]
    if end := END.search(text):
        text = text[: end.start()]
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text.translate(PLAIN)))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def train_tokenizer(texts: list[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written, nothing is unknown."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=["<s>", "</s>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=context
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one row of token ids, each begun with <s> and ended with </s>."""
    each = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    start, stop = tokenizer.bos_token_id, tokenizer.eos_token_id
    return torch.tensor(list(itertools.chain.from_iterable([start, *text.ids, stop] for text in each)))


def new_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with heads of 64, three query heads to a key/value head where that divides, and tied embeddings."""
    heads = options.width // 64
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.width,
            intermediate_size=options.width * 8 // 3,
            num_hidden_layers=options.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
            head_dim=64,
            max_position_embeddings=options.context,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def train(model: LlamaForCausalLM, tokens: torch.Tensor, options: argparse.Namespace) -> None:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, options.steps)) for optimizer in optimizers
    ]
    model.train()
    start = time.monotonic()
    for step, batch in enumerate(itertools.islice(batches(tokens, options), options.steps), 1):
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 20 == 0 or step == options.steps:
            print(f"step {step}/{options.steps}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True)


def rate(step: int, steps: int) -> float:
    """Part of the learning rate at a step: 100 steps of warm-up, constant for half of the run, linear down to 2 %."""
    warm = min(1.0, (step + 1) / min(100, steps))
    past_half = max(0.0, (step - steps / 2) / (steps / 2))
    return warm * (1 - 0.98 * past_half)


def batches(tokens: torch.Tensor, options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Endless batches (batch, sequence + 1): windows of the texts in a new order, from a new offset, each epoch."""
    span = options.sequence + 1
    if len(tokens) < 2 * span:
        raise SystemExit(f"train.py: {len(tokens)} tokens are too few for sequences of {options.sequence}")
    while True:
        offset = int(torch.randint(span, ()))
        count = (len(tokens) - offset) // span
        windows = tokens[offset : offset + count * span].view(count, span)
        yield from windows[torch.randperm(count)].split(options.batch)


def loss_of(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of each token after the first, (batch, sequence + 1) → scalar."""
    with torch.autocast("cpu", torch.bfloat16, enabled=model.training):
        logits = model(windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, tokens: torch.Tensor, sequence: int) -> float:
    """Mean loss over a text in windows without overlap, in float32."""
    model.eval()
    count = len(tokens) // (sequence + 1)
    windows = tokens[: count * (sequence + 1)].view(count, sequence + 1)
    losses = [loss_of(model, batch).item() * len(batch) for batch in windows.split(4)]
    return sum(losses) / count


if __name__ == "__main__":
    main()
