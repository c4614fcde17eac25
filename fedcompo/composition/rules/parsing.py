"""Reads a rule's text: ``name``, or ``name:option=value,option=value``."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from typing import Any

from fedcompo.composition.rules.dare import Dare
from fedcompo.composition.rules.fisher import Fisher
from fedcompo.composition.rules.iso_c import IsoC
from fedcompo.composition.rules.mean import Mean
from fedcompo.composition.rules.norm_preserving import NormPreserving
from fedcompo.composition.rules.regmean import RegMean
from fedcompo.composition.rules.rule import Rule
from fedcompo.composition.rules.task_arithmetic import TaskArithmetic
from fedcompo.composition.rules.ties import Ties
from fedcompo.composition.rules.tsv_m import TsvM
from fedcompo.config.setting import Scalar, check_one
from fedcompo.errors import ConfigError
from fedcompo.names import did_you_mean
from fedcompo.runtime import version

KINDS = Mean, NormPreserving, TaskArithmetic, Ties, Dare, IsoC, TsvM, Fisher, RegMean
RULES: dict[str, type[Rule]] = {rule.name: rule for rule in KINDS}
"""All rules by name."""


def parse_rule(text: str) -> Rule:
    """Make a rule of its text; an option that is not named has its default.

    Raises:
        ConfigError: If there is no such rule or option, or a value is out of range.

    Example::

        parse_rule("ties:density=0.3").text == "ties:density=0.3"
    """
    name, _, rest = (part.strip() for part in text.partition(":"))
    if name not in RULES:
        raise ConfigError(
            f"There is no rule {name!r} in fedcompo {version('fedcompo')}; it has "
            f"{', '.join(RULES)}.{did_you_mean(name, RULES)}"
        )
    known = {f.name.rstrip("_"): f for f in fields(RULES[name])}
    values: dict[str, Any] = {}
    for pair in rest.split(",") if rest else ():
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise ConfigError(f"{text!r} is no rule of the form name:option=value,option=value.")
        if key not in known:
            options = ", ".join(known) or "no option"
            raise ConfigError(f"The rule {name} has {options}, but {text!r} names {key!r}.")
        if known[key].name in values:
            raise ConfigError(f"The rule {text!r} says {key} twice.")
        try:
            values[known[key].name] = check_one(key, known, _number(value))
        except ValueError as error:
            raise ConfigError(f"The rule {text!r} cannot be used: {error}") from None
    return RULES[name](**values)


def _number(text: str) -> Scalar:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
