"""Recipes by a preset's name or a scheme's word, from a file, and from single settings on top of these."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from .errors import BadRecipe, nearest
from .recipe import IGNORE, Prune, Quantize, Recipe, Recover, Rule, Shrink, Transform, from_json, texts, with_format

Part = TypeVar("Part", Quantize, Prune, Transform)

# The field's words for bits and activations: rounded to nearest, without data.
_SCHEMES = {
    "int4": Quantize(bits=4),
    "int8": Quantize(bits=8, group_size=-1),
    "w8a8": Quantize(bits=8, group_size=-1, activations="int8"),
}
_SCHEMES |= {f"w{bits}a16": Quantize(bits=bits) for bits in (2, 3, 4, 5, 6, 7)}
_SCHEMES |= {"w4a16_asym": Quantize(bits=4, symmetric=False), "w8a16": _SCHEMES["int8"]}
_SCHEMES |= {
    "fp8": Quantize(**with_format({"format": "fp8", "group_size": 0, "activations": "fp8-static"})),
    "fp8_dynamic": Quantize(**with_format({"format": "fp8", "activations": "fp8"})),
    "fp8_block": Quantize(**with_format({"format": "fp8-block", "activations": "fp8"})),
    "mxfp4a16": Quantize(**with_format({"format": "mxfp4"})),
    "nvfp4a16": Quantize(**with_format({"format": "nvfp4"})),
}
# What is wanted of the result; docs/compress.md says when to choose which.
_GOALS = {
    "fast": Rule(("*",), Quantize("hqq", symmetric=False)),
    "balanced": Rule(("*",), Quantize("gptq", symmetric=False)),
    "best": Rule(("*",), Quantize("gptq", group_size=64, symmetric=False, options={"sweeps": 8})),
    "smallest": Rule(("*",), Quantize("gptq", bits=3, symmetric=False, options={"sweeps": 8})),
    "gpu": Rule(("*",), Quantize("gptq")),
}
# What guesses ahead of a model (`--draft`): as few bytes as still guess well, head and embedding too.
_DRAFT = Recipe((Rule(("*",), Quantize("hqq", bits=3, group_size=64, symmetric=False)),), IGNORE[3:])
# Goals that move codes too, where few bits or pruned weights leave something to gain by it.
_RECOVERED, _FEW, _CODES = ("balanced", "best", "smallest"), 3, Recover(4, 0.02, codes=True, tokens=512, distill=1)
PRESETS = (*_GOALS, *_SCHEMES, "draft", "sparse50", *(f"{name}-sparse50" for name in ("int4", "int8", "w8a8")))
# A quantizer → the method that prunes and quantizes in one as it does; what pruning is added to such a rule by.
_JOINTLY = {"gptq": "joint"}


def preset(name: str) -> Recipe:
    """The recipe of a preset or a scheme's word (``int4``, ``W4A16``); ``-sparseNN`` prunes NN % by magnitude first."""
    word = name.lower()
    if word in _GOALS:
        return Recipe((_GOALS[word],), recover=_CODES if word in _RECOVERED else None)
    if word == "draft":
        return _DRAFT
    scheme, _, percent = word.partition("sparse")
    scheme = scheme.removesuffix("-")
    known = scheme in _SCHEMES or (not scheme and percent)
    if not known or (percent and not re.fullmatch(r"[1-9]\d?", percent)) or (word.endswith("sparse")):
        raise BadRecipe(f"recipe {name!r} is neither a file nor a preset; {nearest(word, PRESETS)}")
    prune = Prune(sparsity=int(percent) / 100) if percent else None
    return Recipe((Rule(("*",), _SCHEMES.get(scheme), prune),))


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe from a file (YAML or JSON), a preset's name, plain data, or as it is."""
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return from_json(source)
    path = Path(source)
    if path.suffix not in (".yaml", ".yml", ".json") and not path.is_file():
        return preset(str(source))
    return from_json(_read_yaml(path), str(path))


def _read_yaml(path: Path) -> Any:
    """What a file of YAML says, or of JSON, which is YAML too; BadRecipe for what is neither, or says a thing twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            """As YAML's own, which takes the last of equal keys without a word."""
            seen = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise BadRecipe(f"{path}, line {line}: key {key.value!r} is there twice; leave one of them out")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise BadRecipe(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise BadRecipe(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def build(
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None, *, with_data: bool = False, **settings: Any
) -> Recipe:
    """The recipe that a preset, a file or nothing, and single settings on top of it, make together.

    settings: the fields of `Quantize`, of `Prune` (there ``method`` is called ``prune_method``, and ``options``
    ``prune_options``), of `Transform` (``transform``, ``transform_options``) and of `Shrink` (``remove_layers``,
    ``prune_neurons``, ``prune_heads``, ``prune_experts``, ``shrink_method``, ``multiple``), ``ignore``, ``seed``,
    ``recover`` and ``rotate`` (true or false), ``kv_cache``; None leaves a setting as it is. They change every rule of
    the recipe; without one they make a rule for all modules. with_data: there is text to calibrate on, so that where
    neither a recipe nor a method is named, the best that use it are meant; but what goes as a whole, and the cache, are
    then all that was asked for.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    for name in given:
        if name not in SETTINGS:
            raise BadRecipe(f"unknown setting {name!r}; {nearest(name, SETTINGS)}")
    ignore, seed, recover, rotate, kv_cache = (given.pop(name, None) for name in _OF_ALL)
    shrink = _pop_shrink(given)
    changes = {part: {of: given[name] for name, of in names.items() if name in given} for part, names in _NAMES.items()}
    if recipe is None and not given and not shrink and not rotate and not kv_cache and not with_data:
        raise BadRecipe(f"nothing to do: give a recipe ({', '.join(_GOALS)}, a file), bits or a sparsity")
    if recipe is not None:
        made = load_recipe(recipe)
    elif not given and (shrink or kv_cache or (rotate and not with_data)):
        made = Recipe((), shrink=Shrink(**shrink) if shrink else None, rotate=bool(rotate), kv_cache=kv_cache)
    else:
        made = _recipe_for(changes, with_data)
    rules = tuple(_changed(rule, changes) for rule in made.rules)
    few = any(rule.prune or (rule.quantize and rule.quantize.bits <= _FEW) for rule in rules)
    few = few and not any(rule.quantize and rule.quantize.format != "int" for rule in rules)
    if made.recover is _CODES and not few:
        made = dataclasses.replace(made, recover=None)
    return dataclasses.replace(
        made,
        rules=rules,
        ignore=made.ignore if ignore is None else texts(ignore, "ignore"),
        seed=made.seed if seed is None else seed,
        shrink=_changed_shrink(made.shrink, shrink),
        recover=Recover() if recover and made.recover is None else made.recover,
        rotate=made.rotate if rotate is None else rotate,
        kv_cache=made.kv_cache if kv_cache is None else kv_cache,
    )


Changes = Mapping[str, Mapping[str, Any]]
# A part of a rule → the settings that change it, each with the name of its field.
_NAMES = {
    "quantize": {field.name: field.name for field in fields(Quantize)},
    "prune": {
        **{"prune_method": "method", "prune_options": "options"},
        **{field.name: field.name for field in fields(Prune)[1:-1]},
    },
    "transform": {"transform": "method", "transform_options": "options"},
}
_SHRINK = {
    **{"remove_layers": "layers", "prune_neurons": "neurons", "prune_heads": "heads", "prune_experts": "experts"},
    **{"shrink_method": "method", "multiple": "multiple"},
}
_OF_ALL = ("ignore", "seed", "recover", "rotate", "kv_cache")
SETTINGS = (*(name for names in _NAMES.values() for name in names), *_OF_ALL, *_SHRINK)


def _pop_shrink(settings: dict[str, Any]) -> dict[str, Any]:
    """Take the settings of `Shrink` out of all of them; pattern=channel is a share of the neurons by another name."""
    if settings.get("pattern") == "channel":
        del settings["pattern"]
        settings.setdefault("prune_neurons", settings.pop("sparsity", Prune.sparsity))
        if "prune_method" in settings:
            settings["shrink_method"] = settings.pop("prune_method")
    return {of: settings.pop(name) for name, of in _SHRINK.items() if name in settings}


def _changed_shrink(shrink: Shrink | None, changes: Mapping[str, Any]) -> Shrink | None:
    if not changes:
        return shrink
    return Shrink(**changes) if shrink is None else dataclasses.replace(shrink, **changes)


def _recipe_for(changes: Changes, with_data: bool) -> Recipe:
    """The recipe that settings alone change: one rule for all modules, with the parts that they speak of."""
    quantize, prune, transform = (changes[part] for part in ("quantize", "prune", "transform"))
    named = "method" in quantize or "method" in prune or transform
    if not with_data or named:
        return Recipe((Rule(("*",), Quantize() if quantize or transform else None, Prune() if prune else None),))
    if prune and not quantize:
        return Recipe((Rule(("*",), prune=Prune(_pruner(prune))),), recover=_CODES)
    return preset("balanced")


def _pruner(prune: Mapping[str, Any]) -> str:
    """The method that prunes best by data, for these settings."""
    return "gradual" if prune.get("pattern", "unstructured") == "unstructured" else "sparsegpt"


def _changed(rule: Rule, changes: Changes) -> Rule:
    prune, quantize = dict(changes["prune"]), dict(changes["quantize"])
    now = quantize.get("method", rule.quantize and rule.quantize.method)
    kind = quantize.get("format", rule.quantize.format if rule.quantize else "int")
    if prune and rule.prune is None and "method" not in prune and now in _JOINTLY:
        if kind == "int":
            prune["method"] = quantize["method"] = _JOINTLY[now]
        else:  # which are rounded to after pruning, not in one with it
            prune["method"] = _pruner(prune)
    return Rule(
        rule.targets,
        _with(rule.quantize or Quantize(), quantize) if quantize else rule.quantize,
        _with(rule.prune or Prune(), prune) if prune else rule.prune,
        _with(rule.transform or Transform(), changes["transform"]) if changes["transform"] else rule.transform,
    )


def _with(part: Part, changes: Mapping[str, Any]) -> Part:
    """A part with other settings. Options are added to those there are, which go when their method does."""
    if isinstance(part, Quantize) and changes.get("format", part.format) != part.format:
        changes = with_format(changes)
    options = part.options if changes.get("method", part.method) == part.method else {}
    return dataclasses.replace(part, **{**changes, "options": {**options, **changes.get("options", {})}})
