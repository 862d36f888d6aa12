"""Object stores: workdirs, data and models at gs://, s3:// and other URLs of fsspec.

A workdir at a URL has a mirror, a folder in the cache in which the run works. A push puts
what has changed there to the URL, then the list of its files, `.mirror.json`, and removes
what is not in the list any more. A store replaces an object as a whole, and only what is in
the list is ever pulled: a push that is cut off leaves a run that can go on.

Every list has a new id, and a mirror keeps the last list that it has put, with the id
before. That tells whether the store lacks something of the mirror, or has gone on from
another one; and a run notices that another has taken its place.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec

from rlt_jax import files, watchdog
from rlt_jax.errors import LOG, StorageError, UserError, as_user_error
from rlt_jax.records import Record

LIST = ".mirror.json"
WORKDIR = b"{workdir}"  # in the settings in a store, the same from every host
PUSH_SECONDS = 60.0  # between two pushes of a stage without checkpoints
# What fails is tried again after 1, 2, 4 ... seconds: TRIES times in all, but not when
# SECONDS have passed. Before that, some libraries repeat a request by themselves.
TRIES, SECONDS, FIRST_WAIT = 6, 180.0, 1.0
SILENCE = 20.0  # seconds without a byte after which a request to gs:// has failed
THREADS = 8
GO_ON = "and the same command goes on from there, on this host."
_PARTIAL = re.compile(r"\..*|.*\.partial|.*\.orbax-checkpoint-tmp.*")
_REFUSED = re.compile("(?i)forbidden|denied|permission|credentials|anonymous|NotImpl")
_mirrors: list["Mirror"] = []  # that of this run


def is_url(path: str | Path) -> bool:
    """Whether a path has a scheme; a Path keeps one of the slashes after it."""
    return bool(re.match(r"\w\w+:/", str(path)))


@functools.cache  # a run reads one version, however often it asks
def local(path: str, depth: int | None = None) -> str:
    """Where a path is on this host: what is at a URL is downloaded once to the cache.

    Args:
      path: a file, a folder or a glob pattern.
      depth: of the files in a folder; None for any.

    Raises:
      UserError: nothing is there, or it may not be read.
      StorageError: the store does not answer.
    """
    if not is_url(path):
        return path
    fs, base = _open(path)
    top = re.match(r"([^*?[]*/)?", base)[0]  # the folder of a path or a pattern

    def find() -> Record:
        if re.search(r"[*?[]", base):
            return fs.glob(base, detail=True)
        info = fs.info(base)
        is_folder = info["type"] == "directory"
        return fs.find(base, maxdepth=depth, detail=True) if is_folder else {base: info}

    with as_user_error(f"{path!r} is not in the store", FileNotFoundError):
        found = {k: x for k, x in _tried(path, find).items() if x["type"] == "file"}
        if not found:
            raise FileNotFoundError("no file there")
        folder = cache() / "objects" / path.partition(":")[0] / top.strip("/")
        folder /= _hash(repr(sorted(found.items())))  # another one for other versions
        workdir = fs.unstrip_protocol(top.rstrip("/"))  # if it is a stage
        _download(path, fs, top, [k.removeprefix(top) for k in found], folder, workdir)
    return str(folder / base.removeprefix(top))


@contextlib.contextmanager
def workdir(path: str | Path) -> Iterator[Path]:
    """The folder to work in: for a URL its mirror, which is pushed at the end, too.

    Raises:
      UserError: the URL cannot be written, or another run uses it.
      StorageError: the store does not answer.
    """
    if not is_url(path):
        yield Path(path)
        return
    mirror = Mirror(str(path))
    with files.storing(mirror.root):
        mirror.root.parent.mkdir(parents=True, exist_ok=True)
        lock = mirror.root.with_name(".lock").open("w")
    with lock:
        with as_user_error(f"{path} is in use by a run on this host", BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mirror.begin()
        _mirrors[:] = [mirror]
        try:
            yield mirror.root
        finally:
            _mirrors.clear()
            if not isinstance(sys.exception(), StorageError):
                mirror.push()


def push(every: float = 0.0) -> None:
    """Pushes the mirror, if the run has one and has not done it for `every` seconds.

    Raises:
      UserError: another run has taken over, or the URL cannot be written any more.
      StorageError: the store does not answer.
    """
    for mirror in _mirrors:
        if time.monotonic() - mirror.pushed >= every:
            mirror.push()


def cache() -> Path:
    """The folder of mirrors and downloads."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlt_jax"


class Mirror:
    """A workdir at a URL, and its folder `root` in the cache."""

    def __init__(self, url: str) -> None:
        self._fs, self._base = _open(url)
        self.url, self.pushed = url, 0.0
        self.root = cache() / "workdirs" / _hash(self._base) / Path(self._base).name
        self._one_by_one = threading.Lock()
        self._list: Record = {}  # as it was last put

    def begin(self) -> None:
        """Pulls what the store has and the mirror lacks, or pushes what only that has."""
        there, is_ours = self._look()
        if not there and self._tried(self._fs.info, "run.json"):
            raise UserError(f"{self.url} has a run without {LIST}; change --workdir.")
        if self.root.exists() and not (is_ours and self._is_whole(there["files"])):
            kept = self.root.rename(f"{self.root}.{time.time():.0f}")
            reason = f"{self.url} has gone on elsewhere, or has more than {self.root}"
            LOG.warning(f"{reason}: that is now {kept}")
        if not self.root.exists():
            there = {"id": "new", "files": {}, "removed": []} | there
            LOG.info(f"{self.url}: pulls {len(there['files'])} files to {self.root}")
            pulled = self.root.with_name(f"{there['id']}.pulled")  # goes on if cut off
            with as_user_error(f"{self.url} lacks a file of {LIST}", FileNotFoundError):
                where = self.url, self._fs, f"{self._base}/"
                _download(*where, there["files"], pulled, str(self.root))
            pulled.rename(self.root)
            for old in self.root.parent.glob("*.pulled"):
                shutil.rmtree(old)
            there["files"] = self._files()
        self._list = there
        self._put(there["files"], there["removed"])  # fails now if it cannot be written
        self.push()

    def _is_whole(self, known: Record) -> bool:
        """Whether complete stages have all of their files: caches are cleaned up."""
        now = self._files()
        done = (f"{name.partition('/')[0]}/done.json" for name in known.keys() - now)
        return not any(name in now and name in known for name in done)

    def push(self) -> None:
        """Puts what has changed; see `push` of the module."""
        with self._one_by_one:
            known, now = self._list["files"], self._files()
            changed = [name for name in now if now[name] != known.get(name)]
            gone = sorted({*known, *self._list["removed"]} - now.keys())
            if changed or gone:
                self._check_owner()
                _each(lambda name: self._upload(name, now), changed)
                if not now.keys() >= {*changed}:  # a newer checkpoint is pushed next
                    return
                self._check_owner()
                self._put(now, gone)
                _each(lambda name: self._tried(self._fs.rm_file, name), gone)
                self._list["removed"] = []
            self.pushed = time.monotonic()

    def _check_owner(self) -> None:
        there, is_ours = self._look()
        if not is_ours:
            who = f"{there.get('owner')} has taken over {self.url}"
            raise UserError(f"{who}; what it lacks is kept in {self.root}.")
        self._list["id"] = there["id"]

    def _look(self) -> tuple[Record, bool]:
        """The list in the store, {} for none; and whether this mirror has put it."""
        text, here = self._tried(self._fs.cat_file, LIST), self.root / LIST
        kinds = ValueError, LookupError, TypeError, AttributeError, RecursionError
        with as_user_error(f"{here} is damaged", *kinds):
            own = files.read_json(here, {})
        if text is None:
            return {}, False
        with as_user_error(f"{self.url}/{LIST} is damaged", *kinds):
            there = json.loads(text)
            there |= {"files": {**there["files"]}, "removed": [*there["removed"]]}
            return there, there["id"] in (own.get("id"), own.get("before"))

    def _put(self, names: Record, removed: list[str]) -> None:
        """Puts the list, after the mirror's own."""
        owner = f"process {os.getpid()} on {os.uname().nodename}"
        new = {"id": os.urandom(8).hex(), "before": self._list["id"], "owner": owner}
        new |= {"files": names, "removed": removed}
        files.write_json(self.root / LIST, new)
        self._upload(LIST, {})
        self._list = new

    def _upload(self, name: str, now: Record) -> None:
        """Puts a file; `now` loses one that is not there any more."""
        file, target = self.root / name, f"{self._base}/{name}"
        try:
            if name.endswith("settings.json"):
                data = file.read_bytes().replace(_in_json(str(self.root)), WORKDIR)
                _tried(self.url, self._fs.pipe_file, target, data)
            else:
                _tried(self.url, self._fs.put_file, str(file), target)
        except FileNotFoundError as error:
            if file.exists():
                raise UserError(f"{self.url}: there is no such bucket.") from error
            del now[name]

    def _tried(self, act: Callable[[str], Any], name: str) -> Any:
        """Calls `act` with the path of an object; None where there is none."""
        with contextlib.suppress(FileNotFoundError):
            return _tried(self.url, act, f"{self._base}/{name}")

    def _files(self) -> Record:
        """Name -> size and time of change of every file that is whole."""
        found = {}
        for folder, _, names in os.walk(self.root):
            for file in (Path(folder, name) for name in names):
                name = str(file.relative_to(self.root))
                with contextlib.suppress(FileNotFoundError):
                    if not _PARTIAL.fullmatch(name):
                        found[name] = [file.stat().st_size, file.stat().st_mtime_ns]
        return found


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    options: Record = {"use_listings_cache": False}
    if re.fullmatch(r"\w+:/*", url):  # some libraries look for credentials first
        raise UserError(f"{url}: it names no bucket.")
    fix = "pip install 'rlt_jax[gcs,s3]', or check the scheme"
    with as_user_error(url, ImportError, ValueError, end=f": {fix}."):
        if url.startswith(("gs:", "gcs:")):
            import aiohttp  # comes with gcsfs

            limit = aiohttp.ClientTimeout(sock_connect=SILENCE, sock_read=SILENCE)
            options["requests_timeout"] = limit
        fs, base = fsspec.core.url_to_fs(re.sub(":/(?!/)", "://", url), **options)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # we tell
    return fs, base.rstrip("/")


def _download(
    url: str, fs: Any, top: str, names: Iterable[str], folder: Path, workdir: str
) -> None:
    """Downloads the files that a folder lacks; settings name the workdir that is given."""

    def get(name: str) -> None:
        if ".." in name.split("/") or name.startswith("/"):
            raise UserError(f"{url}: {name!r} is not the name of a file in a folder.")
        if not (file := folder / name).exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f".{file.name}.{os.getpid()}")
            _tried(url, fs.get_file, f"{top}{name}", str(partial))
            if file.name == "settings.json":
                text = partial.read_bytes().replace(WORKDIR, _in_json(workdir))
                partial.write_bytes(text)
            files.sync(partial)
            partial.replace(file)
            files.sync_folder(file.parent)

    with files.storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _each(get, names)


def _tried(url: str, act: Callable[..., Any], *args: Any) -> Any:
    """Calls `act`, several times if the store fails for a reason that may pass.

    Raises:
      FileNotFoundError: there is no such object.
      UserError: the store refuses.
      StorageError: it has failed too often.
    """
    began = time.monotonic()
    for tries in range(1, TRIES + 1):
        try:
            result = act(*args)
            watchdog.progress(url)
            return result
        except FileNotFoundError:
            raise
        except Exception as error:  # every library has its own
            told = " ".join(f"{type(error).__name__} {error}".split())[:300]
            reason, seconds = f"{url}: {told}", time.monotonic() - began
            code = str(getattr(error, "code", None) or getattr(error, "status", ""))
            if _REFUSED.search(told) or re.fullmatch("4(?!08|29)..", code):
                raise UserError(f"{reason}. Check address and rights.") from error
            if tries == TRIES or seconds > SECONDS:
                kept = f"What the run has done is kept in {cache()}"
                message = f"{reason}, {tries} times in {seconds:.0f} s. {kept}"
                raise StorageError(f"{message}, {GO_ON}") from error
            LOG.warning(f"{reason}; it is tried again")
            time.sleep(FIRST_WAIT * 2 ** (tries - 1))


def _each(act: Callable[[str], Any], names: Iterable[str]) -> None:
    """Calls `act` with every name, side by side; the first error ends it."""
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(act, names))  # an error cancels the calls that have not begun


def _in_json(text: str) -> bytes:
    return json.dumps(text)[1:-1].encode()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
