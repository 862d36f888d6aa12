"""Optimizers with a learning rate schedule and gradient clipping, from optax."""

import dataclasses
import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from rlt_jax.errors import UserError
from rlt_jax.ranges import Checked, Fraction, OneOf, Range

SCHEDULES = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, max(steps, 1)),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, max(steps, 1)),
}


# In all of them, an element's update is about as large as the learning rate.
OPTIMIZERS = {
    "adamw": lambda c, rate: optax.adamw(
        rate, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay, mu_dtype=c.state_dtype
    ),
    # arXiv 1804.04235; adafactor's own decay is not scaled by the learning rate.
    "adafactor": lambda config, rate: optax.chain(
        optax.adafactor(multiply_by_parameter_scale=False),
        optax.add_decayed_weights(-config.weight_decay),
        optax.scale_by_learning_rate(rate, flip_sign=False),
    ),
    # arXiv 2502.16982; the factor of 0.2 gives updates of the same RMS as AdamW's.
    "muon": lambda config, rate: optax.contrib.muon(
        rate,
        weight_decay=config.weight_decay,
        mu_dtype=config.state_dtype,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
    ),
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Checked):
    """Optimizer settings.

    Attributes:
      learning_rate: peak learning rate.
      schedule: schedule after the warm-up, one of "constant", "cosine", "linear".
      warmup_fraction: fraction of all steps with linear warm-up from 0.
      b1: decay rate of AdamW's first moment.
      b2: decay rate of AdamW's second moment.
      weight_decay: decoupled weight decay of kernels, embeddings, output head and
        adapters, not of norms and biases.
      clip_norm: maximum global norm of the gradient; infinity for none.
      name: "adamw"; "adafactor", with factored second moments and no first moment; or
        "muon" for projections, with AdamW for all other parameters.
      state_dtype: dtype of the first moment, None or "bfloat16"; None uses the dtype of
        the parameter.
    """

    learning_rate: Annotated[float, Range(0, 10)]
    schedule: Annotated[str, OneOf(SCHEDULES)] = "constant"
    warmup_fraction: Fraction = 0.0
    b1: Annotated[float, Range(0, 1, below=True)] = 0.9
    b2: Annotated[float, Range(0, 1, below=True)] = 0.95
    weight_decay: Annotated[float, Range(0, 100)] = 1e-4
    clip_norm: Annotated[float, Range(0, math.inf, above=True)] = 1.0
    name: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    state_dtype: Annotated[str | None, OneOf((None, "bfloat16"))] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.state_dtype and self.name == "adafactor":
            raise UserError("optimizer.state_dtype: adafactor has no first moment.")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the step, for a run of `steps` steps."""
    warmup = round(config.warmup_fraction * steps)
    after = SCHEDULES[config.schedule](config.learning_rate, steps - warmup)
    rise = optax.linear_schedule(0.0, config.learning_rate, max(warmup, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer for a run of `steps` steps."""
    optimizer = OPTIMIZERS[config.name](config, make_schedule(config, steps))
    tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        # Nothing but the decay reads the parameters. So all optimizers are masked alike,
        # and their states are what they are without a mask.
        return tx.update(grads, state, jax.tree.map_with_path(_decayed, params))

    return optax.GradientTransformation(tx.init, update)


def _decayed(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
    """The parameter; zeros for norms and biases, which do not decay."""
    name = jax.tree_util.keystr(path)
    return jnp.zeros_like(x) if name.endswith(("['scale']", "['bias']")) else x


def matrices(params: Any) -> Any:
    """Matrix axes of every parameter for muon; None for parameters that AdamW updates.

    Matrices are the kernels of projections and the adapters, stacked on L; those of
    attention have two axes for the heads. Embedding, head, biases and norms use AdamW.
    """

    def axes(path: tuple[Any, ...], x: jax.Array) -> MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "/kernel" not in name:
            return None
        if x.ndim == 3:  # [L, in, out]
            return MuonDimensionNumbers(1, 2)
        if "/out/" in name:  # [L, N, H, D]
            return MuonDimensionNumbers((1, 2), 3)
        return MuonDimensionNumbers(1, (2, 3))  # [L, D, N, H]

    return jax.tree.map_with_path(axes, params)
