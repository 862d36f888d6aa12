"""Orbax checkpoints of a run, and loading of models.

A checkpoint has the train state, the other arrays of the loop, and the state of the data
iterator. The folder of a stage also has `model.json` (the model's configuration) and
`tokenizer/`, so it can be used wherever a config takes the path of a model.
"""

import contextlib
import ctypes
import dataclasses
import errno
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from rlt_jax import stores
from rlt_jax.data.tokenizer import NO_LIMIT, VARIABLES, Tokenizer, load_tokenizer
from rlt_jax.errors import LOG, UserError, as_user_error, storage_errno
from rlt_jax.files import read_json, storing, write_json, write_whole
from rlt_jax.models import convert, peft
from rlt_jax.models.config import DTYPES, REMAT_POLICIES, ModelConfig
from rlt_jax.models.transformer import Transformer, init_params
from rlt_jax.ranges import Checked, OneOf, check_ranges
from rlt_jax.records import Record
from rlt_jax.settings import build
from rlt_jax.training import checksums, hosts
from rlt_jax.training.sharding import abstract, check_model, param_shardings
from rlt_jax.types import Params

T = TypeVar("T")
Named = Mapping[str, Any]  # parts of a checkpoint by their names
LIBC = ctypes.CDLL(None)
TOKENIZER_CONFIG = "tokenizer_config.json"
_DESCRIPTIONS = ("model.json", convert.CONFIG, peft.CONFIG)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ASSETS = Path(__file__).parents[1] / "models" / "assets"
_NAMES = ("embedded", "embedded_small", "embedded_chains", "embedded_chains_large")
SHIPPED = {name: _ASSETS / name for name in _NAMES}


@dataclasses.dataclass(frozen=True)
class ModelSource(Checked):
    """Source of a model: the path of a model, or an architecture with random weights.

    Attributes:
      path: a shipped model such as "embedded" (see configs/embedded_base.py), a folder in
        Hugging Face format, the folder of a stage or of a PEFT adapter, or the id of one on
        the Hugging Face Hub, such as "Qwen/Qwen2.5-7B-Instruct".
      architecture: fields of `ModelConfig`, for random initial weights; vocab_size
        defaults to that of the tokenizer.
      tokenizer: tokenizer folder; if empty, the tokenizer of the model.
      chat_template: a file, a shipped one ("chatml", for base models), or the name of one
        of several that the tokenizer has; if empty, the tokenizer's own.
      chat_template_kwargs: its variables, such as {"enable_thinking": False}.
      date: ISO date and time for chat templates that ask for it; "" is that of the run,
        which its workdir keeps in run.json.
      dtype: dtype of the activations.
      param_dtype: dtype of the parameters in memory; "float32" keeps master weights for
        bfloat16 activations, "bfloat16" halves the memory of a frozen model.
      remat: what the backward pass recomputes, see `ModelConfig`.
    """

    path: str = ""
    architecture: Mapping[str, Any] | None = None
    tokenizer: str = ""
    chat_template: str = ""
    chat_template_kwargs: Mapping[str, Any] | None = None
    date: str = ""
    dtype: Annotated[str, OneOf(DTYPES)] = "float32"
    param_dtype: Annotated[str, OneOf(DTYPES)] = "float32"
    remat: Annotated[str, OneOf(REMAT_POLICIES)] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges("model.architecture", ModelConfig, self.architecture or {})
        if bool(self.path) == (self.architecture is not None):
            raise UserError("model: set either path or architecture.")
        if self.architecture is not None and not self.tokenizer:
            raise UserError("model: set a tokenizer for the architecture.")


class LoadedModel(NamedTuple):
    """A model with its weights, or None before they are read, and its tokenizer."""

    model: Transformer
    params: Params
    tokenizer: Tokenizer


def load(source: ModelSource, mesh: Mesh, key: jax.Array) -> LoadedModel:
    """Loads a model; its parameters are sharded over the mesh, `key` is for random ones.

    Raises:
      UserError: there is no such model, or its tokenizer has ids that it lacks.
    """
    opened = open_model(source)
    return opened._replace(params=load_params(source, opened.model, mesh, key))


def open_model(source: ModelSource) -> LoadedModel:
    """Everything of a model but its weights, which are None; see `load`."""
    if source.architecture is None:
        path, adapter = _find_base(source.path)
        config = _model_config(source, path)
        staged = (path / "model.json").is_file()
        folder, limit = path / "tokenizer" if staged else path, config.vocab_size
        if adapter and (adapter / TOKENIZER_CONFIG).is_file():
            folder = adapter
    else:
        path, folder = None, ""
        limit = source.architecture.get("vocab_size", NO_LIMIT)
    chat = source.chat_template, source.chat_template_kwargs, source.date
    tokenizer = load_tokenizer(source.tokenizer or folder, *chat, limit)
    if path is None:
        config = _model_config(source, None, tokenizer.vocab_size)
    return LoadedModel(Transformer(config), None, tokenizer)


def load_params(
    source: ModelSource, model: Transformer, mesh: Mesh, key: jax.Array
) -> Params:
    """The parameters of a model that was opened; see `load`."""
    config, dtype = model.config, jnp.dtype(source.param_dtype)
    check_model(config, mesh)
    shardings = param_shardings(model, mesh)

    def init(key: jax.Array) -> Params:
        return optax.tree.cast(init_params(config, key), dtype)

    if source.architecture is not None:
        origin = "random weights"
        params = jax.jit(init, out_shardings=shardings)(key)
    else:
        path, adapter = _find_base(source.path)
        origin = adapter or path
        if (path / "settings.json").is_file() and not (path / "done.json").is_file():
            LOG.warning(
                f"model {path}: its stage has not finished; its newest checkpoint is used"
            )
        if (path / "model.json").is_file():
            shapes = abstract(jax.eval_shape(init, key), shardings)
            params = read_item(path, "params", shapes)
        else:
            params = convert.read_params(path, config, shardings, dtype, adapter)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    LOG.info(f"{origin}: {count:,} parameters, {size / 1e9:.3f} GB as {dtype}")
    return params


def shape_of(source: ModelSource) -> ModelConfig:
    """The configuration of a model, without loading its weights.

    Raises:
      UserError: there is no such model.
    """
    path = None if source.architecture is not None else _find_base(source.path)[0]
    if path is None and "vocab_size" not in source.architecture:
        return _model_config(source, path, load_tokenizer(source.tokenizer).vocab_size)
    return _model_config(source, path)


def _model_config(
    source: ModelSource, path: Path | None, vocab_size: int = 0
) -> ModelConfig:
    numerics = {"dtype": source.dtype, "remat": source.remat}
    if path is None:
        fields = {"vocab_size": vocab_size, **source.architecture, **numerics}
        return build(ModelConfig, fields, "model.architecture")
    if (file := path / "model.json").is_file():
        with as_user_error(str(file), UserError, end=""):
            return build(ModelConfig, read_json(file) | numerics, "the model")
    return convert.read_config(path, **numerics)


def find_model(name: str) -> Path:
    """The folder of a model: included in the package, on disk, or downloaded from the Hub.

    Raises:
      UserError: there is no such folder, or the download fails.
    """
    path = SHIPPED.get(name, Path(stores.local(name)))
    with as_user_error(f"model {name[:99]!r}", OSError):
        if any((path / name).is_file() for name in _DESCRIPTIONS):
            return path
    if path.exists() or not _HUB_ID.fullmatch(name):
        raise UserError(
            f"model {name!r}: there is neither a config.json (Hugging Face format) nor "
            f"a model.json (a stage) in {path}; check the path."
        )
    folder = hosts.from_first(lambda: _download(name))
    # The other processes use the cache if it is shared.
    return Path(folder if hosts.is_first() else _download(name))


def _find_base(name: str) -> tuple[Path, Path | None]:
    """The folder of a model; of an adapter that of its model, and its own."""
    path = find_model(name)
    if not (path / peft.CONFIG).is_file():
        return path, None
    base = find_model(peft.adapter_base(path))
    if not (base / convert.CONFIG).is_file():
        raise UserError(
            f"adapter {path}: its base {base} is not a model in Hugging Face format; "
            "export it first, and name the export in adapter_config.json."
        )
    return base, path


def _download(name: str) -> str:
    """Downloads a model from the Hub to the cache; returns its folder."""
    patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=patterns)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        if storage_errno(error):
            raise
        raise UserError(
            f"model {name!r}: there is no such folder, and the download from the Hugging "
            f"Face Hub failed: {str(error).strip().splitlines()[0]}"
        ) from error


def describe(stage_dir: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Writes model.json and the tokenizer, which `load` needs, to the folder of a stage."""
    if not hosts.is_first():
        return
    folder = stage_dir / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    convert.copy_tokenizer(tokenizer.path, folder)
    write_chat_template(folder, tokenizer)
    write_json(stage_dir / "model.json", dataclasses.asdict(model.config))


def write_chat_template(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes the chat template that is in use beside the files of a tokenizer."""
    if tokenizer.chat is not None:
        write_whole(folder / "chat_template.jinja", tokenizer.chat.source)
    if tokenizer.variables:
        file = folder / TOKENIZER_CONFIG
        write_json(file, read_json(file) | {VARIABLES: tokenizer.variables})


def read_item(path: Path, name: str, target: Any = None) -> Any:
    """A tree of the newest checkpoint in a stage's folder; by default of NumPy arrays."""
    folder = _folder(path)
    steps = hosts.from_first(
        lambda: list(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []
    )
    if not steps:
        raise UserError(f"model {path}: the stage has no checkpoint yet; run it first.")

    def restore(step: int) -> Any:
        item, wanted = folder / str(step) / name, target
        if wanted is None:  # the devices may be others than those it was saved from
            shapes = checkpointer.metadata(item).item_metadata
            wanted = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
        return checkpointer.restore(item, wanted)

    with ocp.StandardCheckpointer() as checkpointer:
        return _newest(folder, steps, restore, name)[1]


def _newest(
    folder: Path, steps: Sequence[int], restore: Callable[[int], T], item: str = ""
) -> tuple[int, T]:
    """Step and content of the newest checkpoint that can be read.

    Of the complete `steps` `restore` reads one, or, if it is not "", one `item` of it.

    Raises:
      UserError: none can be read; or, with several processes, the newest cannot though its
        checksums are right.
    """
    for step in sorted(steps, reverse=True):
        cause, is_alone = None, True
        try:
            reason = hosts.from_first(lambda n=step: checksums.damage(folder, n, item))
            if not reason:
                return step, restore(step)
        except Exception as error:  # Orbax has no class of its own for damaged files
            number = storage_errno(error)
            if number and (number != errno.EIO or step == min(steps)):
                raise
            cause, is_alone = error, jax.process_count() == 1
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        damaged = f"checkpoint {folder / str(step)} cannot be read ({reason})"
        # The other processes may have read theirs.
        if step == min(steps) or not is_alone:
            advice = "remove its folder to use an older one, if there is one"
            if cause and checksums.known(folder, step):
                advice = "it is as it was saved, so restore model.json or the settings"
            afresh = "or run the stage afresh with --only"
            raise UserError(f"{damaged}; {advice}, {afresh}.") from cause
        LOG.warning("%s; an older one is used", damaged)
    raise AssertionError


@contextlib.contextmanager
def open_manager(stage_dir: Path, keep: int) -> Iterator[checksums.Manager]:
    """Opens the checkpoint manager of a stage, which keeps the last `keep` checkpoints."""
    # On CPU the copies would be in memory beside the next step.
    is_async = jax.default_backend() != "cpu"
    with checksums.without_traces():
        with storing(stage_dir):
            manager = checksums.Manager(_folder(stage_dir), keep, is_async)
        try:
            yield manager
        except Exception as error:
            # Closing waits for all processes, which would hang if only one of them fails.
            if jax.process_count() == 1 or isinstance(error, hosts.Stopped):
                manager.close()
            raise
        manager.close()


def save(manager: checksums.Manager, step: int, trees: Named, data: Named) -> None:
    """Saves a checkpoint, asynchronously but on CPU.

    Args:
      manager: checkpoint manager of the stage.
      step: number of completed steps.
      trees: name -> tree of arrays; `load` reads "params".
      data: JSON values, such as the state of the data iterator.
    """
    free_memory()
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    args = ocp.args.Composite(**items, data=ocp.args.JsonSave(data))
    with storing(Path(manager.directory) / str(step)):
        manager.save(step, args=args)
    free_memory()


def free_memory() -> None:
    """Hands back what is free; glibc keeps what a step or the buffers of a save have freed."""
    if jax.default_backend() == "cpu" and hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def save_model(folder: Path, step: int, model: LoadedModel, params: Params) -> None:
    """Saves a model with the given parameters as a folder that `load` can read."""
    describe(folder, model.model, model.tokenizer)
    with open_manager(folder, 1) as manager:
        for later in [n for n in manager.all_steps() if n >= step]:
            manager.delete(later)  # of a run that was continued from before it
        save(manager, step, {"params": params}, {})
        manager.wait_until_finished()


def restore_latest(
    manager: ocp.CheckpointManager, trees: Named, use: Callable[[Record], None]
) -> tuple[int, Named] | None:
    """Restores the latest checkpoint of this run; None if there is none.

    Args:
      manager: checkpoint manager of the stage.
      trees: name -> tree of arrays with the shapes, dtypes and shardings to restore.
      use: takes the JSON values over; where it fails, they are damaged.

    Returns:
      The number of completed steps, and the trees.
    """
    steps = hosts.from_first(lambda: list(manager.all_steps()))
    if not steps:
        return None
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(trees))
    items = {name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
    args = ocp.args.Composite(**items, data=ocp.args.JsonRestore())

    def restore(step: int) -> Named:
        restored = manager.restore(step, args=args)
        use(restored["data"])
        return restored

    step, restored = _newest(Path(manager.directory), steps, restore)
    # The run saves the later steps again; what cannot be read now may be later.
    hosts.from_first(lambda: [_set_aside(manager, s) for s in steps if s > step])
    manager.reload()
    return step, {name: restored[name] for name in trees}


def _set_aside(manager: ocp.CheckpointManager, step: int) -> None:
    folder = Path(manager.directory) / str(step)
    kept = tempfile.mkdtemp(prefix="damaged_checkpoint_", dir=folder.parents[1])
    folder.rename(Path(kept) / folder.name)


def _folder(stage_dir: Path) -> Path:
    return (stage_dir / "checkpoints").absolute()
