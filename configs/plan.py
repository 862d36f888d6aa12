"""What a recipe needs on a TPU slice, found out on a machine without one.

    python -m rlt_jax.main --config=configs/plan.py --workdir=runs/plan \\
        --config.plan.recipe=configs/rlt_7b.py --config.plan.topology=v5e:8x8

Compiles every device program of the recipe with libtpu (pip install 'rlt_jax[plan]') and
writes runs/plan/plan.json and plan.txt: for each program its memory, collectives, flops
and the time it takes at best, and hours for the recipe. Ends with status 1 where it does
not fit. A chip alone (`--config.plan.topology=v5e`) searches its smallest slice that
fits; `--config.plan.changes='("rl.loop.group_size=32",)'` changes the recipe.

Hardware: any two CPU cores, 16 GB of memory, some minutes a slice.
"""

import ml_collections

from rlt_jax.settings import section
from rlt_jax.stages.plan import PlanConfig


def get_config() -> ml_collections.ConfigDict:
    """One stage."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.stage = "plan"
    config.plan = section(PlanConfig, recipe="configs/rlt_7b.py", topology="v5p:4x4x4")
    return config
