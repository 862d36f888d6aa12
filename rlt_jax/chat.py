"""Command `chat`: tries a model from the terminal.

    rlt_jax chat --model=Qwen/Qwen2.5-0.5B-Instruct
    rlt_jax chat --workdir=runs/quickstart --model=rl

A student is asked questions. A teacher is given a question and its solution; it explains
the solution, and the RLT reward of the explanation is shown, token by token. What is typed
may also come from a pipe; a backslash at the end of a line continues it on the next. Role,
template, students, sampling and reward are those of the stage that has trained the model,
if one has, where no flag says otherwise.
"""

import functools
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
from absl import flags, logging

from rlt_jax import scoring, stores
from rlt_jax.data.examples import ROLES, Renderer
from rlt_jax.data.templates import load_template
from rlt_jax.errors import UserError, as_user_error
from rlt_jax.files import read_json
from rlt_jax.inference.engine import Engine, EngineConfig
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.models.config import DTYPES
from rlt_jax.ranges import NonNegativeInt, OneOf, check_value
from rlt_jax.records import Problem, Record
from rlt_jax.report.explanations import MAX_NATS
from rlt_jax.rl.rlt_reward import EnsembleConfig, RLTRewardConfig
from rlt_jax.settings import Section, build, check
from rlt_jax.stages import setup
from rlt_jax.training import checkpoint, hosts
from rlt_jax.training.sharding import MeshConfig, make_mesh, num_groups

FLAGS = (
    (flags.DEFINE_string, "model", None, "A folder, a Hub id, embedded; or a stage."),
    (flags.DEFINE_string, "workdir", None, "Folder or URL of the run of the stage."),
    (flags.DEFINE_enum, "role", None, ROLES, "By default the stage's, or student."),
    (flags.DEFINE_string, "template", None, "By default the stage's, or rlt."),
    (flags.DEFINE_list, "students", None, "Models that score a teacher."),
    (flags.DEFINE_float, "temperature", None, "By default the stage's, or 0.7."),
    (flags.DEFINE_integer, "max_new_tokens", None, "By default the stage's, or 1024."),
    (flags.DEFINE_integer, "seed", 0, "Of the sampling."),
    (flags.DEFINE_enum, "dtype", None, DTYPES, "By default the stage's, or float32."),
    (flags.DEFINE_boolean, "help", False, "Shows this."),
)
KEYS = "\\ at the end of a line goes on, Ctrl-C stops an answer, Ctrl-D or :quit ends."
SAMPLING = {"temperature": 0.7, "max_new_tokens": 1024}
KEPT = ("dtype", "param_dtype", "date")  # of a stage's section of the model
# Of the 256 colors of terminals, pale to deep; text on them is black.
REDS, BLUES = (224, 217, 210, 203, 196), (189, 147, 111, 69, 33)
# What the settings of a stage have to be.
OWNERS = setup.SECTIONS | dict.fromkeys(("policy", "model", "loop", "sft"), Section)


class Chat:
    """A model that answers questions; the Nth with the key fold_in(key(seed), N).

    Args:
      options: values of the flags.

    Raises:
      UserError: there is no such model, or the settings do not fit it.
    """

    def __init__(self, options: flags.FlagValues) -> None:
        path, stage = _stage(options.model, options.workdir)
        trained = stage.get("policy") or stage.get("model") or {}
        own_role = (stage.get("loop") or stage.get("sft") or {}).get("role")
        if own_role and options.role not in (None, own_role):
            raise UserError(f"--role={options.role}: {path} is a {own_role}'s stage.")
        role = options.role or own_role or "student"
        check_value(f"settings of {path}: role", Annotated[str, OneOf(ROLES)], role)
        if options.students is not None and role != "teacher":
            raise UserError(f"--students has no effect: {path} is a {role}.")
        if options.students is not None and not all(options.students or [""]):
            raise UserError("--students: name one or more models, with commas between.")
        name = "tiny" if path in checkpoint.SHIPPED else stage.get("template", "rlt")
        template = load_template(options.template or name)
        asked = {k: x for k in SAMPLING if (x := getattr(options, k)) is not None}
        self.sampling = SAMPLING | stage.get("sampling", {}) | asked
        build(SamplingConfig, self.sampling, "sampling")  # checks them before loading
        students = [{"path": name} for name in options.students or ()]
        students = students or stage.get("students", []) if role == "teacher" else []
        kept = {name: x for name, x in trained.items() if name in KEPT}
        given = dict.fromkeys(KEPT[:2], options.dtype) if options.dtype else {}
        model, *students = [one | given for one in (kept | {"path": path}, *students)]
        sections = {"model": model, "students": students}
        # The weight that a run has found for "auto" is not in its settings.
        reward = {k: v for k, v in stage.get("rlt_reward", {}).items() if v != "auto"}
        ensemble = {} if options.students else stage.get("ensemble", {})
        self.scoring = scoring.ScoringConfig(
            build(RLTRewardConfig, reward, "rlt_reward"),
            build(EnsembleConfig, ensemble, "ensemble"),
            self.sampling["temperature"],
        )
        check_value("--seed", NonNegativeInt, options.seed)
        self.key, self.mesh = jax.random.key(options.seed), make_mesh(MeshConfig())
        models = setup.open_models(sections, "model")
        self.renderer = Renderer(models[0].tokenizer, template, role)
        models = setup.load_weights(sections, "model", models, self.mesh, options.seed)
        self.loaded, self.engine = models[0], functools.cache(self._engine)
        if role == "teacher":
            if not students:
                print("The model is also the student; --students=MODEL names another.")
                models *= 2
            renderers = scoring.make_renderers(models, template)
            self.score = scoring.make_scorer(models, renderers, self.scoring, self.mesh)

    def _engine(self, length: int) -> Engine:
        """Decodes one completion of at most this length, its prompt included."""
        groups = num_groups(self.mesh)
        cache = (length + 2 * EngineConfig.page_size) * groups
        sizes = {"slots": groups, "cache_tokens": cache, "steps": 1}
        sections = {"sampling": self.sampling, "engine": sizes}
        tags = self.renderer.template.explanation_tags
        stop = tags[1:] if self.renderer.role == "teacher" else ()
        return setup.load_sampler(self.loaded, sections, self.mesh, length, stop)

    def answer(self, problem: Problem, n: int) -> str:
        """Prints the completion of question n as its tokens come; returns its text.

        Raises:
          UserError: the prompt leaves no room for a completion.
        """
        model, params, tokenizer = self.loaded
        prompt, limit = self.renderer.prompt(problem)[1].ids, model.config.max_length
        if len(prompt) >= limit:
            sizes = f"{len(prompt)} tokens, the context of the model is {limit}"
            raise UserError(f"the prompt has {sizes}: shorten it or change --template.")
        new = min(self.sampling["max_new_tokens"], limit - len(prompt))
        # A power of two, so that most questions share the programs.
        length = min(1 << (len(prompt) + new - 1).bit_length(), limit)
        (request,) = setup.requests_of(self.renderer, [problem], new, n)
        # A byte after which a character at the end may turn out to be invalid.
        byte = [i for i, piece in enumerate(tokenizer.pieces) if piece == b"\xff"][:1]
        shown, times = 0, []
        for rollout in self.engine(length).follow(params, request, self.key):
            times.append(time.monotonic())
            (tokens,), (text,) = rollout.tokens, rollout.texts
            at_worst = tokenizer.decode([*tokens, *byte])
            settled = os.path.commonprefix([text, at_worst]).rstrip("\ufffd")
            print(escaped(settled[shown:]), end="", flush=True)
            shown = len(settled)
        print(escaped(text[shown:]))
        # The first token has waited for the compiler.
        rate = (len(times) - 1) / max(times[-1] - times[0], 1e-9)
        cut_off = "" if rollout.finished[0] else ", cut off"
        print(f"[{len(tokens)} tokens, {rate:.1f} tokens/s{cut_off}]")
        return text

    def judge(self, problem: Problem, text: str) -> None:
        """Prints the reward of a teacher's completion and, in color, its tokens."""
        given = scoring.text_completion(self.renderer.template, problem, text, False)
        (record,) = self.score([given], per_token=True)
        terms, weight = record["terms"], self.scoring.rlt_reward.explanation_kl_coef
        print(
            f"reward {record['reward']:.3f}: solution score {terms['solution_score']:.3f}, "
            f"explanation KL {terms['explanation_kl']:.3f} times {weight:g}, "
            f"format {terms['format_penalty']:g}"
        )
        if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            surprise = [-x for x in record["student_log_probs_solution"]]
            kl = record["explanation_kl_tokens"]
            scale = " ".join(colored(f"{x:g}", x) for x in (-4, -1, -0.25, 0.25, 1, 4))
            print(f"nats of a token's KL; in the solution, of -log p: {scale}")
            print("".join(map(colored, record["explanation_tokens"], kl)).strip())
            print("".join(map(colored, record["solution_tokens"], surprise)))


def escaped(text: str) -> str:
    """Text with escapes for control characters, but for tabs and the ends of lines."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda x: repr(x[0])[1:-1], text)


def colored(text: str, nats: float) -> str:
    """Text on red for a positive and on blue for a negative value, by its square root."""
    text = escaped(text)
    level = round(len(REDS) * min(abs(nats) / MAX_NATS, 1) ** 0.5)
    if not level:
        return text
    color = (REDS if nats > 0 else BLUES)[level - 1]
    return re.sub("[^\n]+", f"\x1b[48;5;{color};38;5;16m\\g<0>\x1b[0m", text)


def main(arguments: Sequence[str], handlers: Mapping[int, Any] | None = None) -> None:
    """Runs the command; bad input ends in one message and exit status 1.

    Args:
      arguments: the name of the command, and its flags.
      handlers: of signals, from when the model is loaded.
    """
    logging.set_verbosity(logging.WARNING)
    try:
        hosts.guard(lambda: _run(_parse(arguments), handlers or {}))
    except KeyboardInterrupt:
        print()
        sys.exit(130)  # what shells report of SIGINT


def _parse(arguments: Sequence[str]) -> flags.FlagValues:
    """Values of the flags."""
    options = flags.FlagValues()
    for define, *flag in FLAGS:
        define(*flag, flag_values=options)
    with as_user_error("chat", flags.Error, end=""):
        more = options(arguments)[1:]
    if more or not (options.model or options.help):
        raise UserError("chat: give flags, --model=MODEL at least; see chat --help.")
    return options


def _run(options: flags.FlagValues, handlers: Mapping[int, Any]) -> None:
    chat = None if options.help else Chat(options)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if chat is None:
        return print(__doc__, options.get_help(), sep="\n")
    role, at_terminal = chat.renderer.role, sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401 (`input` edits lines with it)

        print(f"{options.model} as a {role}: {KEYS}")
    for n in itertools.count():
        question = ""
        try:
            question = _ask("question", at_terminal)
            solution = _ask("solution", at_terminal) if role == "teacher" else ""
        except EOFError:
            if question and not at_terminal:
                raise UserError(f"no solution follows {question[:60]!r}.") from None
            return print() if at_terminal else None
        problem = Problem(question, solution)
        try:
            text = chat.answer(problem, n)
            if role == "teacher":
                chat.judge(problem, text)
        except KeyboardInterrupt:
            print("\n[stopped]")
        except UserError as error:
            if not at_terminal:
                raise
            print(f"rlt_jax: {error}")


def _ask(what: str, at_terminal: bool) -> str:
    """A text that is not empty; raises EOFError at the end."""
    text = ""
    while not text:
        with as_user_error(f"the {what} is not UTF-8", UnicodeError):
            text = input(f"{what}> " if at_terminal else "")
            while text.endswith("\\"):
                text = text[:-1] + "\n" + input("... " if at_terminal else "")
            text.encode()
        text = text.strip()
        if text == ":quit":
            raise EOFError
    return text


def _stage(model: str, workdir: str | None) -> tuple[str, Record]:
    """The path of a model, and the settings of its stage; {} where it has none."""
    place = f"{workdir}/{model}" if workdir else model
    # A stage, as settings are not in its folder `best`.
    folder = Path(stores.local(place.removesuffix("/best")))
    path = folder / "best" if place.endswith("/best") else folder
    if workdir and not path.is_dir():
        stages = sorted(file.parent.name for file in Path(workdir).glob("*/model.json"))
        found = ", ".join(stages) or "no model"
        raise UserError(f"--model={model}: no such stage; {workdir} has {found}.")
    file = folder / "settings.json"
    stage = {key: x for key, x in read_json(file, {}).items() if x is not None}
    for key in OWNERS.keys() & stage.keys():
        check(OWNERS[key], stage[key], f"{file}: {key}")
    return str(path), stage
