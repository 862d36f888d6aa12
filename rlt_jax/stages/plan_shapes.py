"""What a plan knows about a run without running it: shapes, shardings, mean lengths."""

import dataclasses
import heapq
import math
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlt_jax.data.rows import RowShape
from rlt_jax.errors import UserError
from rlt_jax.inference.head import chunk_length
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.published import published_config
from rlt_jax.models.transformer import Transformer, init_params
from rlt_jax.settings import Section, build
from rlt_jax.stages.preflight import origin_of, stages_read
from rlt_jax.training import checkpoint, sharding
from rlt_jax.types import Batch, Params, Spans

WORKDIR = "{workdir}"  # of a recipe that does not run


class Lengths(NamedTuple):
    """Lengths in tokens that times are estimated for.

    Attributes:
      prompt: mean length of a prompt.
      completion: mean length of a completion.
      p95: length that 5% of the completions exceed; 0 if all have the mean length.
    """

    prompt: float
    completion: float
    p95: float = 0

    @property
    def sequence(self) -> float:
        """Tokens of a prompt with its completion."""
        return self.prompt + self.completion

    def completions(self, count: int, limit: int) -> np.ndarray:
        """Lengths of `count` completions, at most `limit`, in a random order.

        They are quantiles of the log-normal distribution with this mean and 95th
        percentile q: ln(q / mean) = z s - s^2 / 2, where z is the percentile of the
        normal distribution and s the standard deviation of the logarithm.

        Raises:
          UserError: there is no such distribution.
        """
        normal = statistics.NormalDist()
        spread, z = 0.0, normal.inv_cdf(0.95)
        if self.p95:
            square = z**2 - 2 * math.log(self.p95 / self.completion)
            if not 0 <= square <= z**2:
                most = math.exp(z**2 / 2) * self.completion
                raise UserError(
                    f"plan.completion_p95={self.p95:g} must be between completion_tokens"
                    f"={self.completion:g} and {most:.0f}, or 0."
                )
            spread = z - math.sqrt(square)
        middle = math.log(self.completion) - spread**2 / 2
        order = np.random.default_rng(0).permutation(count)
        levels = [normal.inv_cdf((n + 0.5) / count) for n in order]
        return np.exp(middle + spread * np.array(levels)).clip(1, limit).round()


def dispatches(lengths: np.ndarray, slots: int, steps: int) -> int:
    """Dispatches of `steps` decode steps until all completions have ended.

    A slot takes the next completion when the one before has ended; as the host sees that
    one dispatch later, each keeps its slot for a dispatch more. Completions that wait for
    pages of the cache are not taken into account.
    """
    free = [0] * slots
    for length in lengths:
        heapq.heapreplace(free, free[0] + math.ceil(length / steps) + 1)
    return max(free)


class Shape(NamedTuple):
    """A model without weights: parameters are ShapeDtypeStructs on the mesh."""

    model: Transformer
    params: Params


def load_shape(section: Section, recipe: Section, mesh: Mesh) -> Shape:
    """The model of a section `model`, `policy`, `teacher` or `student`.

    Args:
      section: fields of a `ModelSource`; a path "{workdir}/name" has the shape of the
        model that the stage of that name starts from.
      recipe: all sections.
      mesh: where the parameters go.

    Raises:
      UserError: the shape is not known here, or the mesh cannot split it.
    """
    source = build(checkpoint.ModelSource, section, "model")
    origin = build(checkpoint.ModelSource, origin_of(section, recipe, WORKDIR), "model")
    if unknown := stages_read(origin.path, WORKDIR):
        raise UserError(f"plan: {origin.path}: the recipe has no stage {unknown[0]!r}.")
    numerics = {"dtype": source.dtype, "remat": source.remat}
    known = published_config(origin.path, **numerics)
    config = known or checkpoint.shape_of(dataclasses.replace(origin, **numerics))
    sharding.check_model(config, mesh)
    model = Transformer(config)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    shardings = sharding.param_shardings(model, mesh)
    dtype = jnp.dtype(source.param_dtype)
    return Shape(model, sharding.abstract(shapes, shardings, dtype))


def per_row(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array [E, ...] or [M, B, T] that `put_rows` has placed."""
    array = jax.ShapeDtypeStruct(shape, dtype)
    return sharding.abstract(array, sharding.row_shardings(array, mesh))


def packed(mesh: Mesh, num_rows: int, rows: RowShape) -> Batch:
    """Packed rows [M, B, T] without spans."""
    B, T = rows.micro_batch_size, rows.row_length
    ids = per_row(mesh, (-(-num_rows // B), B, T), jnp.int32)
    return Batch(ids, ids, ids, per_row(mesh, (), jnp.int32))


def rollout_batch(mesh: Mesh, E: int, rows: RowShape, num_students: int) -> Batch:
    """The batch of E completions, as `rows.pack` makes it, each in its own row at worst."""
    batch = packed(mesh, E, rows)
    segment = per_row(mesh, (E, rows.row_length), jnp.int32)
    spans = Spans(per_row(mesh, (E,), jnp.int32), segment)
    flags = per_row(mesh, (E,), jnp.bool_)
    student = batch._replace(
        explanation=spans, policy_explanation=spans, solution=spans, overlong=flags
    )
    return batch._replace(
        completion=spans,
        closed=flags,
        finished=flags,
        students=(student,) * num_students,
        sampler_log_probs=per_row(mesh, batch.tokens.shape, jnp.float32),
    )


def micro_batches(
    config: ModelConfig, mesh: Mesh, E: int, rows: RowShape, lengths: Lengths
) -> tuple[int, int]:
    """Lengths of the loops over micro-batches and over chunks of the head."""
    B, T = rows.micro_batch_size, rows.row_length
    in_row = max(1, int(T // lengths.sequence))
    C = chunk_length(B, T, config.vocab_size, mesh.size)
    return -(-E // (in_row * B)), math.ceil(in_row * lengths.completion / C)
