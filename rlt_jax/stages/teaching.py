"""The teacher of a student that learns on its own attempts: models, data, programs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlt_jax import masked
from rlt_jax.data import examples, privileged, rows
from rlt_jax.data.traces import read_traces
from rlt_jax.errors import LOG, UserError
from rlt_jax.inference import given, head, log_probs, spans
from rlt_jax.inference.divergence import Models, states_beside
from rlt_jax.inference.sampler import Sampler
from rlt_jax.models.transformer import Transformer
from rlt_jax.records import Problem
from rlt_jax.rl import losses, rewards
from rlt_jax.rl.grading import check_gradable
from rlt_jax.rl.teaching import TeachingConfig, token_advantages
from rlt_jax.settings import Section, build
from rlt_jax.stages.setup import Run, check_room
from rlt_jax.training import checkpoint, offload, sharding
from rlt_jax.types import Array, Batch, Params, Reward, Rollout


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher, fixed for a run.

    Attributes:
      config: how it teaches.
      run: of the student.
      loaded: model and tokenizer; parameters are None where they are the policy's.
      renderer: of its sequences.
      seen: (problems, right attempts) -> what it is shown, see `privileged.seen_texts`.
      judge: `judge`, compiled.
      sampler: of the completions that are judged.
    """

    config: TeachingConfig
    run: Run
    loaded: checkpoint.LoadedModel
    renderer: examples.Renderer
    seen: Callable[..., list[str | None]]
    judge: Callable[[Params, Batch, Batch], tuple[dict[str, Array], Reward]]
    sampler: Sampler

    @property
    def has_copy(self) -> bool:
        """Whether a copy of the policy teaches, other than the policy as it is."""
        c = self.config
        return c.teacher is None and (c.sync_every, c.sync_alpha) != (1, 1.0)

    @property
    def needs_policy(self) -> bool:
        """Whether log-probs of the policy at the time of the rollout are needed."""
        return not self.config.over_vocabulary or bool(self.config.traces)

    @property
    def limit(self) -> int:
        """Tokens of its sequences."""
        return min(self.run.row_shape.row_length, self.loaded.model.config.max_length)

    @property
    def divergence(self) -> losses.Divergence | None:
        """The loss over the vocabulary, where there is one."""
        c, student = self.config, self.run.policy.model.config
        if not c.over_vocabulary:
            return None
        # Both have the temperature of the sampling.
        temperature = self.run.sampling.temperature or 1.0
        both = [(model, temperature) for model in (student, self.loaded.model.config)]
        return losses.Divergence(c.weight, c, Models(*both))

    def teach(
        self, params: Params, rollout: Rollout, starts: np.ndarray, batch: Batch
    ) -> tuple[Batch, Reward]:
        """The batch with what the teacher says of its tokens, and terms [E] for metrics.

        Args:
          params: the teacher's.
          rollout: E completions.
          starts: [E] flat index of the first token of each completion in the batch.
          batch: of the rollout, with the policy's log-probs if it `needs_policy`.
        """
        run, c = self.run, self.config
        if c.traces:  # nothing has sampled their tokens
            sampled = batch.sampler_log_probs
            sampled = jnp.where(sampled == 0, batch.log_probs, sampled)
            batch = batch._replace(sampler_log_probs=sampled)
        right: list[str | None] = []
        if c.sees == "attempt":
            graded = rewards.correctness(rollout, run.template, 1.0, 0.0, 0.0)
            pairs = zip(graded > 0, rollout.texts, strict=True)
            right = [text.strip() if correct else None for correct, text in pairs]
        seen = self.seen([request.problem for request in rollout.requests], right)
        renderers = self.renderer, run.renderer
        made = privileged.privileged_examples(*renderers, rollout, seen, self.limit)
        packed = rows.pack_student(run.row_shape, *made, starts)
        params = offload.fetch(params)
        fields, terms = self.judge(params, sharding.put_rows(packed, run.mesh), batch)
        if c.over_vocabulary:
            fields["teacher_kernel"] = self._kernel(params)
        return batch._replace(**fields), terms

    def _kernel(self, params: Params) -> Array:
        """A copy of the teacher's head, as the update donates that of the policy."""
        config = self.loaded.model.config
        kernel = jnp.copy(head.kernel_of(config, params))
        if self.config.prompt != "teacher":
            return kernel
        # Where the teacher would end its explanation, the thought ends.
        ids = privileged.closing_ids(self.loaded.tokenizer, self.run.template)
        ours, theirs = jnp.array(ids), jnp.array(ids[::-1])
        if config.tie_embeddings:
            return kernel.at[ours].set(kernel[theirs])
        return kernel.at[:, ours].set(kernel[:, theirs])


def open_teacher(
    config: Section, run: Run, problems: Sequence[Problem], group_size: int
) -> Teacher | None:
    """The teacher of the section `teaching` of a stage, None where that is None.

    Its weights are None; see `load_weights`.

    Raises:
      UserError: settings contradict each other, or teacher, student and data do not fit.
    """
    if config["teaching"] is None:
        return None
    c = build(TeachingConfig, config["teaching"], "teaching")
    _check_settings(config, c, run)
    loaded = run.policy._replace(params=None)
    if c.teacher is not None:
        source = build(checkpoint.ModelSource, c.teacher, "teaching.teacher")
        loaded = checkpoint.open_model(source)
    if c.over_vocabulary and loaded.tokenizer.pieces != run.policy.tokenizer.pieces:
        raise UserError(
            f"teaching.kind={c.kind!r} compares whole vocabularies, but those of "
            f"{loaded.tokenizer.path} and {run.policy.tokenizer.path} differ. Use "
            "teaching.kind='advantage'."
        )
    role = "teacher" if c.prompt == "teacher" else "student"
    renderer = examples.Renderer(loaded.tokenizer, run.template, role)
    explanations, sampler = {}, run.sampler
    if c.explanations:
        traces = read_traces(c.explanations, run.template)
        explanations = {z.problem.asked: z.explanation for z in reversed([*traces])}
    if c.traces:
        traces = read_traces(c.traces, run.template)
        args = traces, problems, run.sampling.max_new_tokens
        made = given.given_completions(run.renderer, *args)
        sampler = given.GivenSampler(sampler, c.own_samples, made, run.renderer)
    args = c, group_size, loaded.model, run.sampling.temperature
    compiled = sharding.jit(functools.partial(judge, *args), run.mesh)
    seen = functools.partial(privileged.seen_texts, c.sees, run.template, explanations)
    teacher = Teacher(c, run, loaded, renderer, seen, compiled, sampler)
    if c.sees != "attempt":
        _check_prompts(teacher, problems)
    else:
        check_gradable(problems)
    return teacher


def _check_settings(config: Section, c: TeachingConfig, run: Run) -> None:
    """Raises UserError where `teaching` contradicts other sections of the stage."""
    if run.role != "student":
        raise UserError(f"teaching is for loop.role='student', not {run.role!r}.")
    if config["objective"].get("skip_equal_groups"):
        raise UserError(
            "objective.skip_equal_groups leaves out what a teacher says of groups with "
            "equal rewards, too: set it to False where there is `teaching`."
        )
    if c.sees == "other" and config["loop"]["batch_size"] < 2:
        raise UserError("teaching.sees='other' needs loop.batch_size of 2 or more.")
    if c.reward_weight and not run.reward.terms:
        raise UserError(f"teaching.reward_weight={c.reward_weight}: no reward_terms.")


def _check_prompts(teacher: Teacher, problems: Sequence[Problem]) -> None:
    """Raises UserError where a teacher is shown nothing, or too much."""
    c, run = teacher.config, teacher.run
    shown = zip(problems, teacher.seen(problems), strict=True)
    known = [p._replace(solution=text) for p, text in shown if text is not None]
    missing = f"teaching.sees={c.sees!r}: nothing to show of "
    missing += f"{len(problems) - len(known)} of {len(problems)} problems"
    if not known:
        raise UserError(f"{missing}. See other things, or name other files.")
    if len(known) < len(problems):
        LOG.warning(f"{missing}; they are not taught.")
    renderers = teacher.renderer, run.renderer
    encoded = [privileged.privileged_prompt(*renderers, one)[1] for one in known]
    prompts = [len(encoding.ids) for encoding in encoded]
    where, new = "rows.row_length or the teacher's context", run.sampling.max_new_tokens
    check_room(prompts, new, teacher.limit, "the teacher's prompt", where)


def load_weights(teacher: Teacher | None, seed: int, on_host: bool) -> Teacher | None:
    """The teacher with its weights, if it is not the policy."""
    if teacher is None or teacher.config.teacher is None:
        return teacher
    source = build(checkpoint.ModelSource, teacher.config.teacher, "teaching.teacher")
    loaded, key = teacher.loaded, jax.random.fold_in(jax.random.key(seed), 1)
    params = checkpoint.load_params(source, loaded.model, teacher.run.mesh, key)
    params = offload.keep(params, on_host, "teacher")
    return dataclasses.replace(teacher, loaded=loaded._replace(params=params))


def judge(
    config: TeachingConfig,
    group_size: int,
    model: Transformer,
    temperature: float,
    params: Params,
    teacher: Batch,
    batch: Batch,
) -> tuple[dict[str, Array], Reward]:
    """What a teacher says of attempts.

    Args:
      config: how it teaches.
      group_size: R.
      model: the teacher's.
      temperature: divides its logits.
      params: its parameters.
      teacher: its sequences.
      batch: the student's attempts.

    Returns:
      New fields of `batch`: `taught`, and the teacher's states where vocabularies are
      compared; and terms [E] for metrics.
    """
    if not config.over_vocabulary:
        found = log_probs.packed_log_probs(model, temperature, params, teacher)
        teacher = teacher._replace(log_probs=found)
        taught, terms = token_advantages(config, group_size, batch, teacher)
        return {"taught": taught}, terms
    own, told = teacher.policy_explanation, teacher.explanation
    shape = batch.tokens.shape
    states, known = states_beside((model, params), teacher, told, own, shape)
    taught = known.astype(jnp.float32)
    share = spans.gather(taught, batch.completion)
    terms = {"taught_fraction": masked.mean(share, spans.mask(batch.completion))}
    return {"taught": taught, "teacher_states": states}, terms
