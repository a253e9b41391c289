"""Recipes: what to do to which tensors. Written as YAML or JSON; `presets` makes them of names and flags.

    version: 1
    seed: 0
    ignore: [lm_head, "re:.*embed"]
    shrink: {layers: 2, neurons: 0.25}        # what goes as a whole, before anything else
    rotate: true                              # then the stream is turned, so that no channel stands out
    kv_cache: fp8                             # steps for the server's cache of keys and values, by calibration
    rules:                                    # the first rule that matches a module decides
      - targets: "*.down_proj"
        quantize: {method: rtn, bits: 8, group_size: -1}
      - targets: "*"
        prune: {method: l1, sparsity: 0.5}
        quantize: {method: rtn, bits: 4, group_size: 128, symmetric: true}

A target is a module's name with wildcards (``*``, ``?``), or a regular expression after ``re:``.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

from .errors import BadRecipe, nearest

VERSION = 1
# What is left alone unless a recipe says otherwise: the head, embeddings, norms, and the small matrices that decide:
# routers and gates of experts, the decay and the rate of delta nets; and what sees and hears, which is not text.
IGNORE = (
    "re:.*lm_head$",
    "re:.*embed",
    "re:.*(wte|wpe)$",
    "re:.*norm",
    "re:.*(vision|visual|audio|multi_modal_projector)",
    r"re:.*\.(gate|router|router\.proj|shared_expert_gate|in_proj_(a|b|ba))$",
)


# Number formats → what they leave no choice of, or what is meant where nothing is said.
FORMATS: dict[str, dict[str, Any]] = {
    "int": {},
    "fp8": {"bits": 8, "group_size": -1, "symmetric": True},
    "fp8-block": {"bits": 8, "group_size": 128, "symmetric": True},
    "mxfp4": {"bits": 4, "group_size": 32, "symmetric": True},
    "nvfp4": {"bits": 4, "group_size": 16, "symmetric": True},
}
# What a server does with a layer's input → the formats of its weight that it goes with.
ACTIVATIONS = {
    "none": tuple(FORMATS),
    "int8": ("int",),
    "fp8": ("fp8", "fp8-block"),
    "fp8-static": ("fp8",),
}


@dataclass(frozen=True)
class Quantize:
    """bits: 2 to 8.  group_size: columns that share a step, -1 a row, 0 the tensor.  symmetric: no zero point.

    activations: "int8" has the server quantize the layer's input token by token (8 bits, one step a row); "fp8" so to
    floats; "fp8-static" by one step, found by calibration.  format: integers, or floats of 8 or 4 bits (see
    `formats.floats`), which `with_format` gives their bits and groups.
    observer: what the range of a group is: minmax, percentile, mse, histogram; None is the method's own.
    options: of the method alone, by name.
    """

    method: str = "rtn"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    activations: Literal["none", "int8", "fp8", "fp8-static"] = "none"
    observer: str | None = None
    format: str = "int"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_options(self.options)
        if self.format not in FORMATS:
            raise BadRecipe(f"format={self.format!r}: {nearest(str(self.format), FORMATS)}")
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise BadRecipe(f"bits={self.bits!r}: no format has that many; give 2 to 8")
        if type(self.group_size) is not int or self.group_size < -1:
            raise BadRecipe(f"group_size={self.group_size!r}: give columns per step, -1 (a row) or 0 (the tensor)")
        if type(self.symmetric) is not bool:
            raise BadRecipe(f"symmetric={self.symmetric!r}: give true or false")
        if self.activations not in ACTIVATIONS:
            raise BadRecipe(f"activations={self.activations!r}: {nearest(str(self.activations), ACTIVATIONS)}")
        if self.format not in ACTIVATIONS[self.activations]:
            formats = " or ".join(ACTIVATIONS[self.activations])
            raise BadRecipe(f"activations={self.activations} goes with format {formats}, not with {self.format}")
        if self.format != "int":
            self._check_floats()
            return
        if self.activations == "int8" and not (self.bits == 8 and self.group_size in (-1, 0) and self.symmetric):
            raise BadRecipe("activations=int8 needs weights of 8 bits, symmetric, with group_size -1 or 0")
        if self.group_size == 0 and self.activations == "none":
            raise BadRecipe("group_size=0 (one step a tensor) is only stored with activations=int8; give -1 or more")

    def _check_floats(self) -> None:
        right = FORMATS[self.format]
        for name, value in right.items():
            if getattr(self, name) != value and not (name == "group_size" and self.format == "fp8"):
                raise BadRecipe(f"{name}={getattr(self, name)!r}: format={self.format} has {value}; leave {name} out")
        if self.format == "fp8" and self.group_size > 0:
            raise BadRecipe(f"group_size={self.group_size}: fp8 has a step a row (-1) or one for the tensor (0)")

    @property
    def needs_reach(self) -> bool:
        """Is there a step that the largest number of the whole tensor decides, and not of a row or a group?"""
        return self.format == "nvfp4" or (self.format == "fp8" and self.group_size == 0)


def with_format(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `Quantize`, with the bits and groups that their format has where they say none."""
    name = settings.get("format")
    return {**(FORMATS.get(name, {}) if isinstance(name, str) else {}), **settings}


@dataclass(frozen=True)
class Prune:
    """sparsity: the share that goes, in (0, 1).  pattern: "unstructured" or "N:M" (N of M kept).

    scope: weights are ranked within a "row" or within the "tensor".  budget: the share of each layer is the same, or
    found so that the mean is as asked (see `budget`).  options: of the method alone, by name.
    """

    method: str = "l1"
    sparsity: float = 0.5
    pattern: str = "unstructured"
    scope: Literal["row", "tensor"] = "row"
    budget: Literal["uniform", "outliers", "sensitivity", "global"] = "uniform"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_options(self.options)
        if not isinstance(self.sparsity, int | float) or not 0 < self.sparsity < 1:
            raise BadRecipe(f"sparsity={self.sparsity!r}: give the share of weights to remove, between 0 and 1")
        if self.scope not in ("row", "tensor"):
            raise BadRecipe(f"scope={self.scope!r}: {nearest(str(self.scope), ('row', 'tensor'))}")
        if self.budget not in BUDGETS:
            raise BadRecipe(f"budget={self.budget!r}: {nearest(str(self.budget), BUDGETS)}")
        if self.pattern == "channel":
            raise BadRecipe(
                "pattern=channel: in a recipe, whole neurons go by shrink: {neurons: 0.25}, beside the rules"
            )
        if self.pattern != "unstructured" and self.keep is None:
            raise BadRecipe(f"pattern={self.pattern!r}: give unstructured, or N:M with 0 < N < M, such as 2:4")
        if self.keep is not None and self.sparsity != Prune.sparsity and abs(self.sparsity - self.share) > 0.01:
            raise BadRecipe(f"sparsity={self.sparsity}: pattern={self.pattern} removes {self.share:.3g}; leave one out")
        if self.keep is not None and self.budget != "uniform":
            raise BadRecipe(f"budget={self.budget}: a pattern {self.pattern} leaves no choice; leave one of them out")

    @property
    def keep(self) -> tuple[int, int] | None:
        """(n, m) of an N:M pattern."""
        found = re.fullmatch(r"(\d+):(\d+)", str(self.pattern))
        if found is None or not 0 < int(found[1]) < int(found[2]):
            return None
        return int(found[1]), int(found[2])

    @property
    def share(self) -> float:
        """The share of weights that goes; an N:M pattern decides it."""
        return self.sparsity if self.keep is None else 1 - self.keep[0] / self.keep[1]


@dataclass(frozen=True)
class Transform:
    """What makes weights easier to quantize, folded into the layer before.  options: of the method alone, by name."""

    method: str = "awq"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_options(self.options)


@dataclass(frozen=True)
class Shrink:
    """What goes as a whole, before anything else is done; tensors get smaller, and config.json says so.

    layers: how many decoder layers, those that change least, or which by number.  neurons, heads, experts: shares of
    each MLP's neurons, of attention's heads with their keys and values, of a mixture's experts.  method: how they are
    chosen, l1, l2 or random without data, wanda or obs with.  multiple: neurons stay in multiples of it; None is 64,
    and the group size.
    """

    layers: int | tuple[int, ...] = 0
    neurons: float = 0
    heads: float = 0
    experts: float = 0
    method: str = "obs"
    multiple: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        numbers = self.layers if isinstance(self.layers, tuple) else (self.layers,)
        if any(type(number) is not int or number < 0 for number in numbers) or len(set(numbers)) < len(numbers):
            raise BadRecipe(f"layers={self.layers!r}: give how many layers go, or a list of their numbers from 0 on")
        for name in ("neurons", "heads", "experts"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
                raise BadRecipe(f"{name}={share!r}: give the share that goes, 0 or more and below 1")
        if self.method not in SHRINKERS:
            raise BadRecipe(f"method={self.method!r}; {nearest(str(self.method), SHRINKERS)}")
        if self.multiple is not None and (type(self.multiple) is not int or self.multiple < 1):
            raise BadRecipe(f"multiple={self.multiple!r}: give a whole number, 1 or more")
        if not self.layers and not self.narrows:
            raise BadRecipe("shrink: nothing goes; give layers, neurons, heads or experts")

    @property
    def narrows(self) -> bool:
        return bool(self.neurons or self.heads or self.experts)

    @property
    def needs_data(self) -> bool:
        """Is text needed to choose what goes?"""
        counted = isinstance(self.layers, int) and self.layers > 0
        return counted or (self.narrows and SHRINKERS[self.method])


@dataclass(frozen=True)
class Recover:
    """Each compressed block trained to give what the original gave, on calibration text; zeros stay.

    epochs: times that all text is gone through with each block; 0 trains none by itself.  rate: of the first steps, as
    a share of what is trained.  codes: codes move, which at few bits gains most, and all else that is quantized stays;
    with false, codes stay and all else moves.  tokens: that one step is taken on, in whole rows of text.  distill:
    times that all text is gone through at the end, with the whole model in memory where it fits: steps, norms and
    biases of all blocks are trained together, towards the original's probabilities of tokens; 0 leaves that out.
    """

    epochs: int = 4
    rate: float = 1e-3
    codes: bool = False
    tokens: int = 2048
    distill: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "distill"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise BadRecipe(f"{name}={getattr(self, name)!r}: give a whole number, 0 or more")
        if not self.epochs and not self.distill:
            raise BadRecipe("epochs=0: nothing is trained; give 1 or more, or distill=1")
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float) or not 0 < self.rate <= 1:
            raise BadRecipe(f"rate={self.rate!r}: give a number above 0, up to 1")
        if type(self.tokens) is not int or self.tokens < 1:
            raise BadRecipe(f"tokens={self.tokens!r}: give a whole number, 1 or more")


# How a mean sparsity is shared out among layers; see `budget`.
BUDGETS = ("uniform", "outliers", "sensitivity", "global")
# What a server keeps keys and values in, by steps that calibration finds. vLLM refuses a checkpoint's int8.
KV_CACHES = ("fp8",)
# How units are chosen → does it need data?
SHRINKERS = {"l1": False, "l2": False, "random": False, "wanda": True, "obs": True}


def _check_options(options: Any) -> None:
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise BadRecipe(f"options={options!r:.40}: give an object, such as {{damping: 0.01}}")


@dataclass(frozen=True)
class Rule:
    """What is done to the modules that one of the targets names: transform, prune, quantize, in this order."""

    targets: tuple[str, ...]
    quantize: Quantize | None = None
    prune: Prune | None = None
    transform: Transform | None = None

    def __post_init__(self) -> None:
        if self.transform is not None and self.quantize is None:
            raise BadRecipe("a transform makes weights easier to quantize: the rule has no quantize")


@dataclass(frozen=True)
class Recipe:
    """rotate: the model is turned along other axes before the rules see it (see `rotate`).  recover: after them.

    kv_cache: what servers are to keep keys and values in, by steps that are found last of all; None is as they are.
    """

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = IGNORE
    seed: int = 0
    version: int = VERSION
    shrink: Shrink | None = None
    recover: Recover | None = None
    rotate: bool = False
    kv_cache: str | None = None

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise BadRecipe(f"version={self.version}: this Penjing reads version {VERSION}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise BadRecipe(f"seed={self.seed!r}: give a whole number, 0 or more")
        if type(self.rotate) is not bool:
            raise BadRecipe(f"rotate={self.rotate!r}: give true or false")
        if self.kv_cache is not None and self.kv_cache not in KV_CACHES:
            raise BadRecipe(f"kv_cache={self.kv_cache!r}: servers read steps of fp8 alone; give fp8, or leave it out")
        if not (self.shrink or self.rotate or self.kv_cache or any(rule.quantize or rule.prune for rule in self.rules)):
            raise BadRecipe(
                "the recipe does nothing: no rule prunes or quantizes, nothing shrinks or is rotated, the cache stays"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back to the same recipe."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return value

    def resolve(self, modules: Sequence[str]) -> dict[str, Rule]:
        """The rule of each module that one applies to; BadRecipe for a target or an ignore that matches nothing."""
        for pattern in self.ignore:
            if pattern not in IGNORE and not any(matches(pattern, module) for module in modules):
                raise BadRecipe(f"ignore {pattern!r} matches no module; {nearest(pattern, modules[:8])}")
        candidates = [name for name in modules if not any(matches(pattern, name) for pattern in self.ignore)]
        for rule in self.rules:
            for target in rule.targets:
                if not any(matches(target, module) for module in candidates):
                    raise BadRecipe(_no_match(target, modules, candidates))
        found: dict[str, Rule] = {}
        for module in candidates:
            first = next((r for r in self.rules if any(matches(target, module) for target in r.targets)), None)
            if first is not None and (first.quantize or first.prune):
                found[module] = first
        return found


def _no_match(target: str, modules: Sequence[str], candidates: Sequence[str]) -> str:
    if any(matches(target, module) for module in modules):
        return f"target {target!r} matches only modules that are ignored; take them out of ignore"
    return f"target {target!r} matches no module with a matrix; {nearest(target, candidates[:8] or modules[:8])}"


def matches(pattern: str, module: str) -> bool:
    """Does a target or an ignore name the module? ``Linear``, the field's word for all matrices, does."""
    if pattern == "Linear":
        return True
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error as error:
            raise BadRecipe(f"{pattern!r} is not a regular expression: {error}") from None
    return fnmatch.fnmatchcase(module, pattern)


Settings = TypeVar("Settings", Quantize, Prune, Transform, Shrink, Recover)


def _settings(kind: type[Settings], value: Any, where: str) -> Settings | None:
    if value is None:
        return None
    _known(value, [field.name for field in fields(kind)], where)
    try:
        return kind(**(with_format(value) if kind is Quantize else value))
    except BadRecipe as error:
        raise BadRecipe(f"{where}: {error}") from None


def _known(value: Any, names: Sequence[str], where: str) -> None:
    if not isinstance(value, Mapping):
        raise BadRecipe(f"{where}: give an object with some of {', '.join(names)}, not {value!r:.40}")
    for key in value:
        if key not in names:
            raise BadRecipe(f"{where}: unknown key {key!r}; {nearest(str(key), names)}")


def texts(value: Any, where: str) -> tuple[str, ...]:
    """A name or a list of names; BadRecipe for anything else."""
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not found or not all(isinstance(text, str) for text in found):
        raise BadRecipe(f"{where}: give a name or a list of names, not {value!r:.40}")
    return tuple(found)


def from_json(value: Any, where: str = "recipe") -> Recipe:
    """A recipe from plain data; BadRecipe names the key that is wrong, and the nearest one that is right."""
    _known(value, [field.name for field in fields(Recipe)], where)
    if "version" not in value:
        raise BadRecipe(f"{where}: version is missing; write version: {VERSION}")
    shrink = _settings(Shrink, value.get("shrink"), f"{where}: shrink")
    recover = _settings(Recover, value.get("recover"), f"{where}: recover")
    rotate, kv_cache = value.get("rotate", False), value.get("kv_cache")
    given = value.get("rules", () if shrink or rotate or kv_cache else None)
    if not isinstance(given, list | tuple):
        raise BadRecipe(f"{where}: rules is missing, or not a list")
    rules = []
    for index, rule in enumerate(given):
        here = f"{where}: rules[{index}]"
        _known(rule, [field.name for field in fields(Rule)], here)
        rules.append(
            Rule(
                targets=texts(rule.get("targets", "*"), f"{here}.targets"),
                quantize=_settings(Quantize, rule.get("quantize"), f"{here}.quantize"),
                prune=_settings(Prune, rule.get("prune"), f"{here}.prune"),
                transform=_settings(Transform, rule.get("transform"), f"{here}.transform"),
            )
        )
    ignore = texts(value["ignore"], f"{where}: ignore") if value.get("ignore") else ()
    ignored = ignore if "ignore" in value else IGNORE
    return Recipe(tuple(rules), ignored, value.get("seed", 0), value["version"], shrink, recover, rotate, kv_cache)
