"""The bookkeeping of stage `rl`: metrics, samples, checkpoints, held-out evaluation."""

import contextlib
import dataclasses
import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from rlt_jax import watchdog
from rlt_jax.data import rows
from rlt_jax.errors import LOG
from rlt_jax.inference import log_probs
from rlt_jax.ranges import NonNegativeInt, OneOf
from rlt_jax.records import Problem, Record
from rlt_jax.report.statistics import means_with_errors
from rlt_jax.rl import rewards, rlt_reward
from rlt_jax.rl.metrics import over_updates, reward_metrics, rollout_metrics
from rlt_jax.stages.rl_config import RLConfig
from rlt_jax.stages.setup import Run, is_due, sample_records
from rlt_jax.training import checkpoint, hosts, lora, metrics, sharding
from rlt_jax.training.state import check_updates, from_items, to_items
from rlt_jax.types import Array, Batch, Metrics, Params, Reward, Rollout, TrainState

_RESULTS = ("first", "last", "best", "kl_coef")
_HELD_OUT_KEY = 2**31 - 1  # folded into the key: no step has this number


class Weights(NamedTuple):
    """The arrays of a run, all of them in its checkpoints.

    Attributes:
      state: train state of the policy.
      reference: parameters of the reference, {} where the objective has none.
      student: the policy's copy in self-teaching, else {}.
      teacher: the policy's copy where that teaches it, else {}.
    """

    state: TrainState
    reference: Params
    student: Params
    teacher: Params


@dataclasses.dataclass
class Journal:
    """Metrics, samples and checkpoints of a run; `open` it around the loop.

    Attributes:
      c: settings of the loop.
      run: models, sampler and reward.
      tuning: what of the policy is trained.
      held_out: problems of the evaluations.
      prompts: iterator over indices of problems.
      key: PRNG key of the run.
      workdir: folder of the stage.
      kl_coef: weight of the explanation KL.
      weights: current weights of the run; the loop replaces them.
    """

    c: RLConfig
    run: Run
    tuning: lora.Tuning
    held_out: Sequence[Problem]
    prompts: grain.DatasetIterator
    key: Array
    workdir: Path
    kl_coef: float | str = 0.0
    weights: Weights = dataclasses.field(init=False)

    @contextlib.contextmanager
    def open(self, advantage: str) -> Iterator[None]:
        """Opens the files of a run; the latest checkpoint replaces the initial weights.

        Args:
          advantage: name of the advantage function, for metrics.
        """
        self._advantage = advantage
        self._samples = self.workdir / "samples.jsonl"
        keep = self.c.keep_checkpoints
        with checkpoint.open_manager(self.workdir, keep) as self._manager:
            self._restore()
            with metrics.MetricWriter(self.workdir, self._first) as self._writer:
                yield
            self._manager.wait_until_finished()

    def policy(self) -> Params:
        """Parameters that the policy samples with."""
        return self.tuning.merge(self.weights.state.params)

    def students(self) -> tuple[Params, ...]:
        """Parameters of the reward's students."""
        if self.c.self_teaching:
            return (self.weights.student,)
        return tuple(student.params for student in self.run.students)

    def steps(self) -> Iterator[int]:
        """The steps that are left, with a progress bar."""
        c = self.c
        for step in metrics.steps(self._first, c.steps, self.workdir, c.profile_steps):
            self._times = {"": time.monotonic()}
            yield step

    def lap(self, phase: str, *results: Any) -> None:
        """Ends a phase of the step when its results are there."""
        jax.block_until_ready(results)
        self._times[phase] = time.monotonic()
        watchdog.progress(f"{self.workdir.name}, {phase} done")

    def record(
        self,
        step: int,
        rollout: Rollout,
        batch: Batch,
        reward: Reward,
        updates: Sequence[Metrics],
    ) -> None:
        """Keeps what a step has done; evaluates and saves where that is due.

        Raises:
          Stopped: the run was asked to stop, and is saved.
          UserError: too many updates in a row were skipped.
        """
        c, done = self.c, step + 1
        numbers = reward_metrics(reward, self._advantage, c.group_size)
        numbers |= over_updates(updates) | rollout_metrics(rollout)
        if too_long := [student.overlong.sum() for student in batch.students]:
            numbers["rollout/overlong"] = jnp.stack(too_long).max()
        numbers["memory/peak_gib"] = metrics.peak_gib()
        numbers |= self._phases(rollout, len(updates))
        if is_due(done, c.evaluate_every, c.steps):
            result = self._evaluate(done)
            self._results["last"] = result
            if result["reward"] > self._results["best"]:
                self._results["best"] = result["reward"]
                if c.evaluate_every:
                    best = self.workdir / "best"
                    checkpoint.save_model(best, done, self.run.policy, self.policy())
            if c.evaluate_every:
                numbers |= {f"held_out/{name}": x for name, x in result.items()}
        check_updates(self._writer.write(step, numbers), c.max_skipped, False)
        if step % c.sample_every == 0:
            self._append(step, "train", rollout, reward, slice(0, None, c.group_size))
        stop = hosts.stopping()
        due = stop or is_due(done, c.checkpoint_every, c.steps)
        # The metrics of all steps before a checkpoint are on disk.
        if due and check_updates(self._writer.flush(), c.max_skipped, done == c.steps):
            data = {"prompts": self.prompts.get_state(), "results": self._results}
            trees = {"params": self.policy()} | self._items()
            checkpoint.save(self._manager, done, trees, data)
        if stop:
            raise hosts.Stopped

    def summary(self) -> Record:
        """Weight of the KL, the best held-out reward, and the results before and after."""
        summary = {"kl_coef": self.kl_coef, "best": self._results["best"]}
        for when in ("first", "last"):
            for name, value in self._results[when].items():
                summary[f"held_out_{name}_{when}"] = value
        return summary

    def _phases(self, rollout: Rollout, num_updates: int) -> dict[str, float]:
        sampled = sum(map(len, rollout.tokens))
        tokens = sampled + sum(len(request.prompt) for request in rollout.requests)
        counts = {"rollout": sampled, "score": tokens, "update": tokens * num_updates}
        numbers = {}
        for (_, start), (phase, end) in itertools.pairwise(self._times.items()):
            numbers |= metrics.phase_metrics(phase, counts[phase], end - start)
        return numbers | {"time/step_seconds": time.monotonic() - self._times[""]}

    def _evaluate(self, step: int) -> dict[str, float]:
        """Held-out results of the current policy; calls differ by the policy alone."""
        run, c = self.run, self.c
        policy, key = self.policy(), jax.random.fold_in(self.key, _HELD_OUT_KEY)
        rollout = run.sampler.generate(policy, run.requests(self.held_out), key)
        count = c.batch_size * c.group_size  # as in a step, so that nothing is compiled
        batch = sharding.put_rows(rows.pack(rollout, run, count), run.mesh)
        needed = policy if run.students else None
        batch = log_probs.fill(run.programs, batch, needed, self.students())
        if self.kl_coef == "auto":
            terms = jax.device_get(rewards.compute(run.reward, batch, rollout))
            names = ("solution_score", "explanation_kl")
            self.kl_coef = rlt_reward.balanced_kl_coef(*(terms[name] for name in names))
        reward = rewards.compute(run.reward, batch, rollout, self.kl_coef)
        self._append(step, "held_out", rollout, reward, slice(32))
        values = jax.device_get(reward)
        values["reward"] = values.pop("value")
        answered = all((problem.answer or "").strip() for problem in self.held_out)
        if run.role == "student" and answered:
            points = {"right": 1.0, "wrong": 0.0, "unreadable": 0.0}
            values["accuracy"] = rewards.correctness(rollout, run.template, **points)
        results = means_with_errors(values)
        text = ", ".join(f"{name} {value:.4g}" for name, value in results.items())
        LOG.info("held out, weight of the KL %.4g: %s", self.kl_coef, text)
        return results

    def _append(
        self, step: int, split: str, rollout: Rollout, reward: Reward, shown: slice
    ) -> None:
        """Appends some completions of a rollout to `samples.jsonl`."""
        where = {"step": step, "split": split}
        records = sample_records(self.run, rollout, reward, shown)
        metrics.append_jsonl(self._samples, [where | record for record in records])

    def _restore(self) -> None:
        """The latest checkpoint of the workdir; else the first held-out evaluation."""
        self._first = 0
        restored = checkpoint.restore_latest(self._manager, self._items(), self._use)
        if restored is not None:
            self._first, items = restored
            optional = (items.get(name, {}) for name in Weights._fields[1:])
            self.weights = Weights(from_items(items, self.tuning.item), *optional)
        hosts.from_first(lambda: forget_later(self.workdir, self.c, self._first))
        # Held-out records of a step belong to the checkpoint that it ends with.
        first = {"train": self._first, "held_out": self._first + (self._first > 0)}
        kinds = {"step": NonNegativeInt, "split": Annotated[str, OneOf(tuple(first))]}
        if hosts.is_first() and self._first and not self._samples.is_file():
            LOG.warning(f"{self._samples} is missing: the samples before are lost")
        metrics.keep_records(
            self._samples, lambda row: row["step"] < first[row["split"]], kinds
        )
        if restored is None:
            self.kl_coef = self.run.rlt_reward.explanation_kl_coef
            result = self._evaluate(0)
            self._results = {"first": result, "last": result, "best": result["reward"]}
            self._results["kl_coef"] = float(self.kl_coef)
        self.kl_coef = self._results["kl_coef"]

    def _use(self, data: Record) -> None:
        """Takes over what a checkpoint has beside arrays."""
        self.prompts.set_state(data["prompts"])
        self._results = {name: data["results"][name] for name in _RESULTS}

    def _items(self) -> Record:
        """The weights as items of a checkpoint."""
        copies = self.weights._asdict()
        items = to_items(copies.pop("state"), self.tuning.item)
        return items | {name: tree for name, tree in copies.items() if tree}


def forget_later(workdir: Path, c: RLConfig, first: int) -> None:
    """Drops what a run that goes on from a checkpoint may make otherwise this time.

    Args:
      workdir: folder of the stage.
      c: settings of the loop.
      first: step of the checkpoint, or 0.
    """
    best = workdir / "best"
    steps = ocp.utils.checkpoint_steps(best / "checkpoints") if best.is_dir() else []
    if any(step > first for step in steps):
        shutil.rmtree(best)
    changes = workdir / "changes.jsonl"
    changed = changes.stat().st_mtime if changes.is_file() else 0.0
    for file in Path(c.rollouts).glob("*.jsonl") if c.rollouts else ():
        # Other settings have made another policy, which others are sampled from.
        if int(file.stem) >= first and file.stat().st_mtime < changed:
            file.unlink()
