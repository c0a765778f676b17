"""The learning rate as a pure function of the step, so that a resumed run needs no state for it."""

import math

FLOOR = 0.1
"""Share of the peak rate where warm-up begins and the cosine ends."""


def rate_factor(step: int, warmup_steps: int, max_steps: int) -> float:
    """Share of the peak rate that optimizer step `step` (from 1) uses.

    Linear from 0.1 over `warmup_steps`, then a cosine back to 0.1 at the last step. A warm-up longer than the run is
    cut off with it.

    Source: the authors' set-up, Stefaniak et al., arXiv:2506.22255; docs/method.md, Schedule.
    """
    done = step - 1
    if done < warmup_steps:
        return FLOOR + (1 - FLOOR) * done / warmup_steps
    progress = (done - warmup_steps) / max(max_steps - 1 - warmup_steps, 1)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
