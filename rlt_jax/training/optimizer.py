"""AdamW with a schedule and clipping, by optax."""

import dataclasses

import optax

from rlt_jax.errors import UserError

SCHEDULES = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, max(steps, 1)),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, max(steps, 1)),
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW settings.

    Attributes:
      learning_rate: peak.
      schedule: after the warm-up, one of "constant", "cosine", "linear".
      warmup_fraction: share of all steps in which the rate rises linearly from 0.
      b1: decay of the first moment.
      b2: decay of the second moment.
      weight_decay: decoupled.
      clip_norm: largest global norm of the gradient.
    """

    learning_rate: float
    schedule: str = "constant"
    warmup_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 1e-4
    clip_norm: float = 1.0


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the step, over a run of `steps`."""
    if config.schedule not in SCHEDULES:
        raise UserError(
            f"optimizer.schedule={config.schedule!r}: one of {', '.join(SCHEDULES)}."
        )
    warmup = round(config.warmup_fraction * steps)
    after = SCHEDULES[config.schedule](config.learning_rate, steps - warmup)
    rise = optax.linear_schedule(0.0, config.learning_rate, max(warmup, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
        ),
    )
