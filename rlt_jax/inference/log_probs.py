"""Log-probabilities of packed sequences under the policy, its reference and students."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlt_jax.inference import spans
from rlt_jax.inference.divergence import DivergenceConfig, segment_divergence
from rlt_jax.inference.head import log_probs_and_entropy
from rlt_jax.models.transformer import Transformer
from rlt_jax.training import offload, sharding
from rlt_jax.types import Array, Batch, Params


class LogProbPrograms(NamedTuple):
    """Compiled programs that `fill` runs; each takes parameters and a batch.

    Attributes:
      policy: log-probs [M, B, T] of the sampled and the explanation tokens under the
        policy or its reference, at the sampling temperature.
      students: for each student log-probs [M, B, T] of its explanation and solution tokens.
      vocabulary_kl: (parameters, batches), each of a student and of the policy -> [E, S]
        for each student; () where the estimator needs no whole distributions.
    """

    policy: Callable[[Params, Batch], Array]
    students: tuple[Callable[[Params, Batch], Array], ...] = ()
    vocabulary_kl: tuple[Callable[..., Array], ...] = ()


def compile_programs(
    policy: tuple[Transformer, float],
    students: Sequence[tuple[Transformer, float]],
    mesh: Mesh,
    top_k: int | None = None,
    over_vocabulary: bool = False,
) -> LogProbPrograms:
    """Compiles the programs of models, each given with its temperature.

    Args:
      policy: transformer and sampling temperature.
      students: transformer and temperature of each student of the reward.
      mesh: where the programs run.
      top_k: of the explanation KL, see `DivergenceConfig`.
      over_vocabulary: whether the explanation KL needs whole distributions.
    """

    def per_token(model: Transformer, temperature: float) -> Callable:
        program = functools.partial(packed_log_probs, model, temperature)
        shardings = sharding.batch_sharding(mesh, 1)
        return sharding.jit(program, mesh, out_shardings=shardings)

    def divergence(student: tuple[Transformer, float]) -> Callable:
        forward = DivergenceConfig("forward", top_k=top_k)
        program = functools.partial(segment_divergence, forward, student, policy)
        return sharding.jit(program, mesh, out_shardings=sharding.replicated(mesh))

    return LogProbPrograms(
        per_token(*policy),
        tuple(per_token(*student) for student in students),
        tuple(map(divergence, students)) if over_vocabulary else (),
    )


def fill(
    programs: LogProbPrograms,
    batch: Batch,
    policy: Params | None,
    students: Sequence[Params] = (),
    reference: Params | None = None,
) -> Batch:
    """The batch with the log-probs of its models.

    Args:
      programs: of these models.
      batch: packed sequences, with a batch of each student.
      policy: parameters at the time of the rollout; None leaves its log-probs out.
      students: parameters of each student, which may be offloaded to the host.
      reference: likewise of the reference; None or {} leaves its log-probs out.
    """
    if policy is not None:
        batch = batch._replace(log_probs=programs.policy(policy, batch))
    if reference:
        log_probs = programs.policy(offload.fetch(reference), batch)
        batch = batch._replace(ref_log_probs=log_probs)
    filled = []
    for i, (params, student) in enumerate(zip(students, batch.students, strict=True)):
        params = offload.fetch(params)
        if programs.vocabulary_kl:
            divergence = programs.vocabulary_kl[i]((params, policy), (student, batch))
            student = student._replace(vocabulary_kl=divergence)
        log_probs = programs.students[i](params, student)
        filled.append(student._replace(log_probs=log_probs))
    return batch._replace(students=tuple(filled))


def packed_log_probs(
    model: Transformer, temperature: float, params: Params, batch: Batch
) -> Array:
    """Log-probs of the tokens in the spans of a batch; of all tokens without spans.

    Args:
      model: the transformer.
      temperature: logits are divided by it.
      params: its parameters.
      batch: rows [M, B, T]; micro-batches after `num_micro_batches` are not computed.

    Returns:
      [M, B, T] float32, 0 for padding, the first token of each sequence and tokens outside
      the spans.
    """
    shape = batch.tokens.shape
    others = [student.policy_explanation for student in batch.students]
    several = [batch.completion, batch.explanation, batch.solution, *others]
    has_any = any(one is not None for one in several)
    wanted = spans.on_tokens(shape, *several) if has_any else jnp.ones(shape, bool)

    def one(m: Array, log_probs: Array) -> Array:
        part = batch.micro_batch(m)
        found, _ = log_probs_and_entropy(model, params, part, temperature, wanted[m])
        return log_probs.at[m].set(found)

    zeros = jnp.zeros(shape, jnp.float32)
    return jax.lax.fori_loop(0, batch.num_micro_batches, one, zeros)
