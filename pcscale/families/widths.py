"""Legal widths of a family, and the search for those that keep a wanted share of the parameters."""

import math
from collections import Counter
from collections.abc import Callable

from pcscale.common.errors import RequestError
from pcscale.config.schema import PlanConfig
from pcscale.families.axes import FFN, PROJECTED_AXES, RESIDUAL
from pcscale.families.plan import Plan
from pcscale.families.spec import Config, Family

DEFAULT_KEEP = 0.5
KERNEL_MULTIPLES = (64, 32, 16, 8, 4, 2, 1)
"""Multiples that matrix kernels are fast at, best first."""
MAX_STEP_FRACTION = 0.05
"""Largest search step, as a share of the base width: a larger one could miss the wanted size by too much."""
SIZE_TOLERANCE = 0.01
"""Deviation from the wanted size up to which widths compete by how well they meet `FFN_EXPONENT`."""
FFN_EXPONENT = 1.5
"""Power of the residual stream's kept share that gives the ffn's. For SmolLM2-135M 2.8 was best after 50 steps, with
1.6 behind it by 0.02 nats and 0.9 by 0.08 (docs/recipe.md). Llama-3.1-Minitron-4B has 1.5: Sreenivas et al.,
arXiv:2408.11796."""


def search_step(width: int, legal_multiple: int) -> int:
    """The step between widths in a search: legal, and as kernel-friendly as `MAX_STEP_FRACTION` allows."""
    steps = [math.lcm(legal_multiple, multiple) for multiple in KERNEL_MULTIPLES]
    return next((step for step in steps if step <= MAX_STEP_FRACTION * width), legal_multiple)


def make_plan(family: Family, base_config: Config, config: PlanConfig) -> Plan:
    """The plan at the widths, the size or the share that the settings name; half of the parameters by default."""
    if config.hidden_size is not None and config.intermediate_size is not None:
        return plan_widths(family, base_config, config.hidden_size, config.intermediate_size)
    if config.target_params is not None:
        return plan_parameters(family, base_config, config.target_params, f"target_params {config.target_params:g}")
    return plan_keep(family, base_config, DEFAULT_KEEP if config.keep is None else config.keep)


def plan_widths(family: Family, config: Config, hidden_size: int, intermediate_size: int) -> Plan:
    """A plan at explicit widths, which must be legal.

    Raises:
        RequestError: a width is out of range or the family's config class would refuse it; the nearest legal are named.
    """
    asked = {"hidden_size": (hidden_size, family.hidden_multiple(config)), "intermediate_size": (intermediate_size, 1)}
    for key, (width, multiple) in asked.items():
        if not 0 < width <= config[key]:
            raise RequestError(f"{key} {width} is not between 1 and the base's {config[key]}. Choose a smaller width.")
        if width % multiple:
            below = width // multiple * multiple
            nearest = [str(legal) for legal in (below, below + multiple) if 0 < legal <= config[key]]
            raise RequestError(
                f"{key} {width} is not legal: family '{family.name}' needs a multiple of num_attention_heads "
                f"= {multiple}. Nearest legal: {' and '.join(nearest)}."
            )
    if hidden_size == config["hidden_size"] and intermediate_size == config["intermediate_size"]:
        raise RequestError("hidden_size and intermediate_size are the base's own: nothing would be compressed.")
    return Plan(family, config, hidden_size, intermediate_size)


def plan_keep(family: Family, config: Config, keep: float) -> Plan:
    """The plan that keeps the share `keep` of the base's real parameters, tied embeddings counted once."""
    if not 0 < keep < 1:
        raise RequestError(f"keep {keep:g} is not a share between 0 and 1. Write 0.5 to keep half of the parameters.")
    whole = Plan.whole(family, config)
    return plan_parameters(family, config, keep * whole.base_parameters, f"keep {keep:g}")


def plan_parameters(family: Family, config: Config, target: float, wanted: str) -> Plan:
    """The legal widths closest to `target` parameters; among those within 1 % the ones that meet `FFN_EXPONENT` best.

    Args:
        wanted: the user's words for it, for errors.

    Raises:
        RequestError: no legal widths reach the target.
    """
    count = _parameter_count(family, config)
    base_hidden, base_ffn = config["hidden_size"], config["intermediate_size"]
    hidden_step = search_step(base_hidden, family.hidden_multiple(config))
    ffn_step = search_step(base_ffn, 1)
    least, most = count(hidden_step, ffn_step), count(base_hidden, base_ffn)
    if not least <= target < most:
        raise RequestError(
            f"{wanted} means {target:,.0f} parameters; legal widths of this base reach from {least:,} "
            f"({least / most:.4f} of it) to below {most:,}. Choose a value between."
        )
    candidates = []
    for hidden in range(hidden_step, base_hidden + 1, hidden_step):
        # The count is linear in the ffn width, so the best one for this hidden size follows from two counts.
        at_one, slope = count(hidden, 1), count(hidden, 2) - count(hidden, 1)
        exact = (target - at_one) / slope + 1
        ffn = min(max(round(exact / ffn_step), 1), base_ffn // ffn_step) * ffn_step
        if (hidden, ffn) == (base_hidden, base_ffn):
            continue
        miss = abs(count(hidden, ffn) - target) / target
        imbalance = abs(FFN_EXPONENT * math.log(hidden / base_hidden) - math.log(ffn / base_ffn))
        candidates.append((miss > SIZE_TOLERANCE, miss if miss > SIZE_TOLERANCE else imbalance, hidden, ffn))
    _, _, hidden, ffn = min(candidates)
    return Plan(family, config, hidden, ffn)


def _parameter_count(family: Family, config: Config) -> Callable[[int, int], int]:
    """Parameters as a function of the two widths, from one pass over the family's table."""
    plan = Plan.whole(family, config)
    rest = Counter[tuple[int, int]]()
    """The product of all other sizes, summed over weights, by the powers of hidden and ffn size in their counts."""
    for planned in plan.weights:
        axes = planned.weight.axes
        others = (plan.base_sizes[axis] for axis in axes if axis not in PROJECTED_AXES)
        rest[axes.count(RESIDUAL), axes.count(FFN)] += math.prod(others)
    return lambda hidden, ffn: sum(count * hidden**h * ffn**f for (h, f), count in rest.items())
