"""The contenders of `rl_step.py`, each of which trains in a process of its own.

A contender sets itself up and then trains in its own loop. Between steps the loop waits
in `Clock.next_step` until standard input asks for the next one.
"""

import argparse
import contextlib
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rollout import SHAPE, Ids, others_time, tunix_model

LEARNING_RATE = 1e-6
BETA = 0.04
STEPS = 1000  # more than are ever asked for
PREPARED = 40  # different batches; after them the first one comes again
END = SHAPE["vocab_size"]  # an id that no model samples
PACKAGES = {
    "rlt_jax": ("jax", "optax"),
    "trl": ("trl", "transformers", "torch"),
    "transformers": ("transformers", "accelerate", "torch"),
    "tunix": ("google-tunix", "jax", "optax"),
}


class Sizes(NamedTuple):
    """Of a step.

    Attributes:
      prompts: of an RL step.
      group: completions of a prompt.
      prompt: tokens.
      new: tokens of a completion, no more and no less.
      lines: of an SFT step.
      length: tokens of a line.
    """

    prompts: int
    group: int
    prompt: int
    new: int
    lines: int
    length: int


class Task(NamedTuple):
    """What a contender is given: weights, sizes, and rows that it computes at once."""

    model_dir: Path
    sizes: Sizes
    rows: int

    def prompts(self) -> np.ndarray:
        """Ids of the prompts of all steps: [PREPARED, P, T] int32."""
        shape = PREPARED, self.sizes.prompts, self.sizes.prompt
        return np.random.default_rng(0).integers(1, END, shape, np.int32)

    def lines(self) -> np.ndarray:
        """Ids to train on: [PREPARED, lines, length] int32."""
        shape = PREPARED, self.sizes.lines, self.sizes.length
        return np.random.default_rng(1).integers(1, END, shape, np.int32)


def reward(ids: Iterable[int]) -> float:
    """Share of even ids, which stands for any cheap function."""
    return float(np.mean([i % 2 == 0 for i in ids]))


class Clock:
    """Times the steps, which standard input asks for, and their phases."""

    def __init__(self, name: str) -> None:
        self._answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
        self._phases: dict[str, float] = {}
        self._within = 0.0  # time of the phases inside the one under way
        self._started: tuple[float, float] | None = None
        self._versions = {p: metadata.version(p) for p in PACKAGES[name]}

    def answer(self, figures: dict[str, Any]) -> None:
        """Writes a line of JSON."""
        print(json.dumps(figures), file=self._answers, flush=True)

    def next_step(self) -> None:
        """Answers with the figures of the step that ends, and waits for the next."""
        if self._started is None:
            self.answer({"versions": self._versions})
        else:
            seconds = time.perf_counter() - self._started[0]
            others = (others_time() - self._started[1]) / seconds
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            figures = {"seconds": seconds, "others": others, "peak_gib": peak}
            self.answer(figures | self._phases)
        if not sys.stdin.readline():
            os._exit(0)  # also out of a library's threads
        self._phases.clear()
        self._started = time.perf_counter(), others_time()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts what runs within it as that phase, less the phases inside."""
        start, outer = time.perf_counter(), self._within
        self._within = 0.0
        yield
        spent = time.perf_counter() - start
        self._phases[name] = self._phases.get(name, 0.0) + spent - self._within
        self._within = outer + spent

    def time(self, owner: Any, method: str, phase: str) -> None:
        """Makes every call of a method count as that phase."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args: Any, **named: Any) -> Any:
            with self.phase(phase):
                result = original(*args, **named)
                if "jax" in sys.modules:
                    sys.modules["jax"].block_until_ready(result)
                return result

        setattr(owner, method, timed)


def rlt_jax_model(task: Task) -> Any:
    """Tuning, optimizer, mesh, shardings and state, as the stages make them."""
    import jax

    from rlt_jax.models.convert import read_config, read_params
    from rlt_jax.models.transformer import Transformer
    from rlt_jax.training.lora import LoRAConfig, make_tuning
    from rlt_jax.training.optimizer import OptimizerConfig, make_optimizer
    from rlt_jax.training.sharding import MeshConfig, make_mesh
    from rlt_jax.training.state import new_state, state_shardings

    model = Transformer(read_config(task.model_dir))
    params = read_params(task.model_dir, model.config)
    mesh = make_mesh(MeshConfig())
    tuning, trained = make_tuning(LoRAConfig(), model, params, mesh, jax.random.key(0))
    tx = make_optimizer(OptimizerConfig(LEARNING_RATE), STEPS)
    shardings = state_shardings(model, tx, mesh)
    return tuning, tx, mesh, shardings, new_state(trained, tx, shardings)


def rlt_jax_rl(task: Task, clock: Clock) -> None:
    """The programs of stage `rl`, in its order."""
    import jax
    import jax.numpy as jnp

    from rlt_jax.data.examples import EMPTY, Example
    from rlt_jax.data.rows import RowShape, pack_examples
    from rlt_jax.inference import log_probs
    from rlt_jax.inference.engine import EngineConfig, make_engine
    from rlt_jax.inference.sampling import SamplingConfig
    from rlt_jax.rl import advantages
    from rlt_jax.rl.losses import ObjectiveConfig, policy_loss
    from rlt_jax.training import sharding
    from rlt_jax.training.learner import make_learner
    from rlt_jax.types import Request

    sizes = task.sizes
    count, length = sizes.prompts * sizes.group, sizes.prompt + sizes.new
    tuning, tx, mesh, shardings, state = rlt_jax_model(task)
    reference = jax.tree.map(jnp.copy, state.params)
    slots = EngineConfig(slots=count, steps=min(32, sizes.new), prefill_chunk=128)
    sampling = SamplingConfig(sizes.new, temperature=1.0)
    engine = make_engine(tuning.model, None, sampling, slots, mesh, length)
    programs = log_probs.compile_programs((tuning.model, 1.0), [], mesh)
    objective = ObjectiveConfig(beta=BETA)
    fill = functools.partial(advantages.fill, objective, sizes.group, sizes.new)
    fill = jax.jit(fill)
    loss_fn = policy_loss(objective, 1.0, count)
    learner = make_learner(loss_fn, tuning, tx, mesh, shardings)
    shape, sampled = RowShape(task.rows, length), np.arange(length) >= sizes.prompt
    prompts, key = task.prompts(), jax.random.key(0)
    for step in range(STEPS):
        clock.next_step()
        params = tuning.merge(state.params)
        with clock.phase("rollout"):
            group = np.repeat(prompts[step % PREPARED], sizes.group, axis=0)
            requests = [Request(p, n, sizes.new) for n, p in enumerate(group)]
            now = jax.random.fold_in(key, step)
            completions = engine.generate(params, requests, now).tokens
        with clock.phase("score"):
            examples = [
                Example(np.concatenate(pair), sampled, EMPTY, EMPTY)
                for pair in zip(group, completions, strict=True)
            ]
            finished = np.zeros(count, bool)
            batch = pack_examples(shape, examples, [], finished)
            batch = sharding.put_rows(batch._replace(finished=finished), mesh)
            batch = log_probs.fill(programs, batch, None, reference=reference)
            rewards = jnp.array([reward(ids.tolist()) for ids in completions])
            batch = jax.block_until_ready(fill(batch, rewards))
        state, metrics = learner.update(state, batch)
        check(metrics["optimizer/skipped"] == 0, "an update was skipped")
        jax.block_until_ready(state)


def rlt_jax_sft(task: Task, clock: Clock) -> None:
    """The program of stage `sft`."""
    import jax

    from rlt_jax.stages.sft import next_token_loss
    from rlt_jax.training import sharding
    from rlt_jax.training.learner import make_learner
    from rlt_jax.types import Batch

    tuning, tx, mesh, shardings, state = rlt_jax_model(task)
    learner = make_learner(next_token_loss, tuning, tx, mesh, shardings)
    lines = task.lines()
    segment_ids = np.ones_like(lines[:1])
    positions = np.cumsum(segment_ids, axis=-1, dtype=np.int32) - 1
    learned = (positions > 0).astype(np.float32)
    for step in range(STEPS):
        clock.next_step()
        tokens = lines[step % PREPARED][None]
        batch = Batch(tokens, positions, segment_ids, np.int32(1))
        batch = batch._replace(loss_weights=learned / learned.sum())
        state, metrics = learner.update(state, sharding.put_rows(batch, mesh))
        check(metrics["optimizer/skipped"] == 0, "an update was skipped")
        jax.block_until_ready(state)


def check(fine: Any, message: str) -> None:
    """Raises if a step was not what is measured."""
    if not fine:
        raise RuntimeError(message)


def torch_model(task: Task) -> Any:
    """The weights as a model of transformers, in float32."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        task.model_dir, dtype=torch.float32
    )


def torch_arguments(task: Task, rows: int) -> dict[str, Any]:
    """Arguments of all trainers of transformers and TRL for steps of so many rows."""
    return {
        "output_dir": str(task.model_dir / "trainer"),
        "per_device_train_batch_size": task.rows,
        "gradient_accumulation_steps": rows // task.rows,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def torch_callback(clock: Clock) -> Any:
    """Waits before the first step of a trainer and after every one."""
    import transformers

    class Wait(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.next_step()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.next_step()

    return Wait()


def words() -> Any:
    """A tokenizer of transformers whose words are the ids, and one that ends a text."""
    import tokenizers
    import transformers

    vocabulary = {str(i): i for i in range(END)} | {"<end>": END}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    )


def trl_rl(task: Task, clock: Clock) -> None:
    """GRPOTrainer with the generation of transformers, static batches of all rows."""
    import datasets
    import trl

    sizes = task.sizes

    def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths = {len(ids) for ids in completion_ids}
        check(lengths == {sizes.new}, f"completions have {lengths} tokens")
        return [reward(ids) for ids in completion_ids]

    texts = [" ".join(map(str, p)) for p in task.prompts().reshape(-1, sizes.prompt)]
    trainer = trl.GRPOTrainer(
        torch_model(task),
        rewards,
        trl.GRPOConfig(
            **torch_arguments(task, sizes.prompts * sizes.group),
            num_generations=sizes.group,
            max_completion_length=sizes.new,
            temperature=1.0,
            beta=BETA,
            loss_type="grpo",
            shuffle_dataset=False,
        ),
        datasets.Dataset.from_dict({"prompt": texts}),
        processing_class=words(),
        callbacks=[torch_callback(clock)],
    )
    clock.time(trainer, "_generate", "rollout")
    clock.time(trainer, "_generate_and_score_completions", "score")
    trainer.train()


def trl_sft(task: Task, clock: Clock) -> None:
    """SFTTrainer on lines of ids."""
    import datasets
    import trl

    lines = task.lines().reshape(-1, task.sizes.length)
    trainer = trl.SFTTrainer(
        torch_model(task),
        trl.SFTConfig(
            **torch_arguments(task, task.sizes.lines), max_length=task.sizes.length
        ),
        train_dataset=datasets.Dataset.from_dict({"input_ids": lines.tolist()}),
        processing_class=words(),
        callbacks=[torch_callback(clock)],
    )
    trainer.train()


def transformers_sft(task: Task, clock: Clock) -> None:
    """Trainer on lines of ids."""
    import transformers

    lines = task.lines().reshape(-1, task.sizes.length).astype(np.int64)
    trainer = transformers.Trainer(
        torch_model(task),
        transformers.TrainingArguments(**torch_arguments(task, task.sizes.lines)),
        train_dataset=[{"input_ids": x, "labels": x} for x in lines],
        callbacks=[torch_callback(clock)],
    )
    trainer.train()


class Words(Ids):
    """A tokenizer whose words are the ids."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def tunix_mesh() -> Any:
    """A mesh of one device."""
    import jax

    return jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), ("fsdp", "tp"))


def tunix_rl(task: Task, clock: Clock) -> None:
    """GRPOLearner with the vanilla rollout."""
    import jax
    import optax
    from tunix.rl import rl_cluster
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout.base_rollout import RolloutConfig

    sizes, mesh = task.sizes, tunix_mesh()
    roles = rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT
    cluster = rl_cluster.RLCluster(
        actor=tunix_model(task.model_dir, mesh),
        reference=tunix_model(task.model_dir, mesh),
        tokenizer=Words(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(LEARNING_RATE),
                eval_every_n_steps=STEPS,
                max_steps=STEPS,
                mini_batch_size=sizes.prompts,
                train_micro_batch_size=task.rows // sizes.group,
                rollout_micro_batch_size=sizes.prompts,
                compute_logps_micro_batch_size=task.rows // sizes.group,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=sizes.new,
                max_prompt_length=sizes.prompt,
                kv_cache_size=sizes.prompt + sizes.new,
                temperature=1.0,
            ),
        ),
    )

    def rewards(completions: list[str], **_: Any) -> list[float]:
        ids = [Words().encode(text) for text in completions]
        lengths = {len(x) for x in ids}
        check(lengths == {sizes.new}, f"completions have {lengths} tokens")
        return [reward(x) for x in ids]

    objective = GRPOConfig(
        num_generations=sizes.group, beta=BETA, kl_loss_mode="low_var_kl"
    )
    learner = GRPOLearner(cluster, objective, rewards)
    clock.time(cluster, "generate", "rollout")
    clock.time(learner, "_generate_and_compute_advantage", "score")

    def batches() -> Iterator[dict[str, np.ndarray]]:
        texts = [[" ".join(map(str, p)) for p in step] for step in task.prompts()]
        for step in range(STEPS):
            jax.block_until_ready(jax.live_arrays())
            clock.next_step()
            yield {"prompts": np.array(texts[step % PREPARED])}

    learner.train(batches())


def tunix_sft(task: Task, clock: Clock) -> None:
    """PeftTrainer, which trains all parameters of a model without adapters."""
    import jax
    import optax
    from tunix.sft import peft_trainer, utils

    lines, mesh = task.lines(), tunix_mesh()
    parts = task.sizes.lines // task.rows

    def batches() -> Iterator[peft_trainer.TrainingInput]:
        for step in range(STEPS):
            jax.block_until_ready(jax.live_arrays())
            clock.next_step()
            for part in np.split(lines[step % PREPARED], parts):
                yield peft_trainer.TrainingInput(part, np.ones_like(part))

    def model_input(x: peft_trainer.TrainingInput) -> dict[str, Any]:
        mask = x.input_mask > 0
        return {
            "input_tokens": x.input_tokens,
            "input_mask": mask,
            "positions": utils.build_positions_from_mask(mask),
            "attention_mask": utils.make_causal_attn_mask(mask),
        }

    with mesh:
        trainer = peft_trainer.PeftTrainer(
            tunix_model(task.model_dir, mesh),
            optax.adamw(LEARNING_RATE),
            peft_trainer.TrainingConfig(
                eval_every_n_steps=STEPS,
                max_steps=STEPS,
                gradient_accumulation_steps=parts if parts > 1 else None,
            ),
        )
        trainer.with_gen_model_input_fn(model_input).train(batches())


CONTENDERS: dict[str, dict[str, Callable[[Task, Clock], None]]] = {
    "rl": {"rlt_jax": rlt_jax_rl, "trl": trl_rl, "tunix": tunix_rl},
    "sft": {
        "rlt_jax": rlt_jax_sft,
        "trl": trl_sft,
        "transformers": transformers_sft,
        "tunix": tunix_sft,
    },
}


def main() -> None:
    """Runs one contender; an error is its answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", required=True)
    parser.add_argument("--contender", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sizes", required=True)
    parser.add_argument("--rows", type=int, required=True)
    arguments = parser.parse_args()
    task = Task(arguments.model, Sizes(*json.loads(arguments.sizes)), arguments.rows)
    clock = Clock(arguments.contender)

    def answer(kind: type, error: BaseException, trace: Any) -> None:
        sys.__excepthook__(kind, error, trace)
        clock.answer({"error": f"{kind.__name__}: {error}"})

    sys.excepthook = answer
    CONTENDERS[arguments.workload][arguments.contender](task, clock)


if __name__ == "__main__":
    main()
