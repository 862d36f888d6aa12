"""Generated puzzles of the library reasoning_gym, graded by its own verifiers.

    {"task": "reasoning_gym", "dataset": "gcd", "split": "train", "size": 2000,
     "config": {"max_value": 50}}

    question: "Find the Greatest Common Divisor (GCD) of these numbers: 36, 24. ..."
    solution: "The answer is \\boxed{12}."      answer: "12"

A verifier needs more of an entry than its answer, such as the numbers of a puzzle with
many solutions. So the grader of a problem, a text as any other, has the entry as its
argument (see `rl/grading.py`), and `answer` stays what people read.

Train and test questions are disjoint, as those of `arithmetic`: a question belongs to
"test" if its checksum is 0 modulo 10.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import pickle
import random
import zlib
from concurrent.futures import ProcessPoolExecutor
from typing import Annotated, Any
from unittest import mock

from rlt_jax.data.boxes import last_box
from rlt_jax.errors import UserError
from rlt_jax.ranges import Amount, Checked, NonNegativeInt, OneOf, Split, check_value
from rlt_jax.records import Problem
from rlt_jax.settings import Section

GRADER = "rlt_jax.data.tasks.reasoning_gym:is_right?"
CHUNK = 1000  # entries of one seed; as many in a row without a new question are the end


@dataclasses.dataclass(frozen=True)
class PuzzleConfig(Checked):
    """Settings of `problems`.

    Attributes:
      dataset: name of a data set of the library.
      split: "train" or "test".
      size: number of problems; fewer are the first ones of more.
      seed: random seed.
      stream: number that gives runs with the same seed different problems.
      config: the data set's own settings, without `seed` and `size`.
      solution: text of the solution, `{answer}` stands for the answer.
    """

    dataset: str
    split: Split
    size: Amount
    seed: NonNegativeInt
    stream: NonNegativeInt = 0
    config: Section = dataclasses.field(default_factory=dict)
    solution: str = "The answer is \\boxed{{answer}}."


def problems(config: PuzzleConfig) -> list[Problem]:
    """Generates distinct problems, the same in every process.

    Raises:
      UserError: the library is missing, a wrong setting, or too few questions.
    """
    c, made, failure = config, {}, ""
    # Some data sets depend on the order of sets, which differs between processes.
    if os.environ.get("PYTHONHASHSEED") != "0":
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with pool, mock.patch.dict(os.environ, PYTHONHASHSEED="0"):
            return pool.submit(problems, c).result()
    settings = json.dumps(c.config, default=dict)
    n = last = -1
    while len(made) < c.size:
        n += 1
        if n - last > CHUNK:
            raise UserError(
                f"data.size={c.size}: {c.dataset!r} with data.config={settings} has only "
                f"{len(made)} questions with an answer for {c.split!r}.{failure}"
            )
        if n % CHUNK == 0:
            # A few data sets draw from the global generator.
            random.seed(f"{c.seed} {c.stream} {n}")
            entries = _create(c.dataset, settings, random.getrandbits(31))
        try:
            entry = entries[n % CHUNK]
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            failure = f" The last that failed: {error!r}."
            continue
        question, answer = entry["question"], entry["answer"] or ""
        is_test = zlib.crc32(question.encode()) % 10 == 0
        if is_test == (c.split == "test") and answer.strip() and question not in made:
            packed = pickle.dumps((c.dataset, settings, entry)).hex()
            solution = c.solution.replace("{answer}", answer)
            made[question] = Problem(question, solution, answer, GRADER + packed)
            last = n
    return list(made.values())


def is_right(prediction: str, answer: str, packed: str) -> bool:
    """Whether a prediction is the known answer, or the library gives it a score of 1.

    Of a prediction with a `\\boxed{}` only the last one is read.
    """
    dataset, settings, entry = pickle.loads(bytes.fromhex(packed))
    box = last_box(prediction)
    text = (prediction if box is None else box).strip()
    entries = _created(dataset, settings, seed=0)
    return text == answer.strip() or entries.score_answer(text, entry) >= 1


def _create(dataset: str, settings: str, seed: int) -> Any:
    """A data set of the library."""
    try:
        from reasoning_gym import composite, factory
    except ImportError as error:
        raise UserError(f"{error}: pip install 'rlt_jax[reasoning_gym]'.") from error
    known = Annotated[str, OneOf(sorted(factory.DATASETS))]
    check_value("data.dataset", known, dataset)
    config = json.loads(settings)
    try:
        if parts := config.get("datasets"):
            config["datasets"] = [composite.DatasetSpec(**part) for part in parts]
        return factory.create_dataset(dataset, seed=seed, size=CHUNK, **config)
    except Exception as error:
        names = [x.name for x in dataclasses.fields(factory.DATASETS[dataset][1])]
        raise UserError(
            f"data.config={settings}: {error!r}. The settings of {dataset!r} are "
            f"{', '.join(names)}; seed and size are those of the run and of data.size."
        ) from error


_created = functools.lru_cache(maxsize=4)(_create)
