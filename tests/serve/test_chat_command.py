"""`penjing chat` through a pipe."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import NOVELIST, command, environment
from penjing.models.tokenizer import Tokenizer


def chat(text: str, *options: object, model: Path = NOVELIST) -> subprocess.CompletedProcess[str]:
    program = command("chat", model, "--temperature", 0, "--max-tokens", 12, *options)
    return subprocess.run(program, input=text, capture_output=True, text=True, env=environment(), timeout=60)


def test_a_base_model_goes_on_with_the_text() -> None:
    once = chat("It was a dark night\n")
    assert once.returncode == 0
    assert "no chat template" in once.stderr
    answer = once.stdout.removesuffix("\n")
    assert answer
    thrice = chat("It was a dark night\n/reset\nIt was a dark night\nand\n/exit\nnever read\n")
    assert thrice.stdout.startswith(f"{answer}\n{answer}\n")
    assert "forgotten" in thrice.stderr


def test_json_has_the_conversation() -> None:
    found = json.loads(chat("It was\nand\n", "--json", "--system", "Once.").stdout)
    assert [message["role"] for message in found["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert found["messages"][1]["content"] == "It was"


def test_the_oldest_messages_are_dropped_when_the_window_is_full() -> None:
    line = "The old man walked to the sea. " * 50
    found = json.loads(chat(f"{line}\n" * 5, "--json").stdout)
    assert 0 < len(found["messages"]) < 10
    assert found["messages"][-1]["role"] == "assistant"
    too_long = chat(f"{line * 4}\nIt was\n")
    assert "the window is 1024" in too_long.stderr
    assert too_long.stdout.endswith("\n")


def test_a_model_with_a_template_is_spoken_to_in_turns(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(NOVELIST, model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    spoken = chat("Hello\n", model=model)
    assert "chat with" in spoken.stderr
    plain = chat("user: Hello\\nassistant:\n")
    assert spoken.stdout != plain.stdout
    assert Tokenizer(model).chat_template is not None


@pytest.mark.parametrize("wrong", [("--temperature", "9"), ("--max-tokens", "0")])
def test_wrong_options(wrong: tuple[str, str]) -> None:
    program = command("chat", NOVELIST, *wrong)
    answer = subprocess.run(program, input="", capture_output=True, text=True, env=environment())
    assert answer.returncode == 2
