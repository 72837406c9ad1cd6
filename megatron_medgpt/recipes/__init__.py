"""Recipes: functions that return a whole run. A variant is a difference to another recipe.

``medgpt train NAME section.field=value ...`` starts one; data folders and the tokenizer are given as overrides where
the recipe's own (``data/align``, ``data/instruct``, ``tokenizer``) are not what one has.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import RunConfig
from megatron_medgpt.recipes.cluster import CLUSTER_RECIPES
from megatron_medgpt.recipes.demo import demo, demo_quick

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "demo": demo,
    "demo-quick": demo_quick,
    **CLUSTER_RECIPES,
}


def recipe(name: str) -> RunConfig:
    """The run of a recipe.

    Raises:
        UsageError: no recipe has this name.
    """
    if name not in RECIPES:
        raise UsageError(f"no recipe named {name!r}; recipes: {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()
