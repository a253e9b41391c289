"""Chat templates: the Jinja programs in which models say how a conversation is written down.

They come with the model and are not trusted: they run in Jinja's immutable sandbox, on plain data only. The
environment is that of transformers (whitespace trimmed around blocks, loop controls, the same helpers).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import BadCheckpoint, BadInput


class _Generation(jinja2.ext.Extension):
    """``{% generation %} … {% endgeneration %}`` marks what the assistant said; here, only its body."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, **style: Any) -> str:
    """As json.dumps, because Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **style)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, without the names through which a template could reach Python itself."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"a namespace has no attribute {name!r}")
        super().__setitem__(name, value)


def _dict(*pairs: Any, **values: Any) -> dict[str, Any]:
    return dict(*pairs, **values)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    environment.globals.update(dict=_dict, namespace=_Namespace)
    return environment


class ChatTemplate:
    """A compiled template; raises BadCheckpoint if it is no Jinja."""

    def __init__(self, source: str, where: str) -> None:
        self.source = source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BadCheckpoint(f"{where}: line {error.lineno} of the chat template: {error.message}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """The conversation as text. Raises BadInput with the template's own words if it refuses the messages."""
        try:
            # Through JSON, so that the template can reach no object's methods; null is "not given", as OpenAI has it.
            given = [{key: value for key, value in message.items() if value is not None} for message in messages]
            plain = json.loads(json.dumps({**variables, "messages": given}))
            return self._template.render(**{"tools": None, "documents": None, **plain})
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise BadInput(f"the model's chat template refuses these messages: {error}") from None


def read_template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """From ``chat_template.jinja``, or the ``chat_template`` of tokenizer_config.json (one text, or a named list)."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return ChatTemplate(file.read_text(encoding="utf-8"), str(file))
    source = config.get("chat_template")
    if isinstance(source, list):
        source = {each.get("name"): each.get("template") for each in source}.get("default")
    return ChatTemplate(source, f"{folder}/tokenizer_config.json") if isinstance(source, str) else None
