"""A server of gs:// on loopback that can fail."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import ThreadingHTTPServer

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

LOCK = threading.Lock()  # the storage is not made for threads


class Bucket:
    """gs://bucket.

    Attributes:
      environment: variables with which gcsfs finds the server.
      fault: what is wrong with a request of a method and a path: a status to answer with,
        seconds of silence, or None.
      requests: number of requests.
    """

    def __init__(self, port: int) -> None:
        self.environment = {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        self.fault: Callable[[str, str], int | float | None] = lambda *_: None
        self.requests = 0


class Handler(RequestHandler):
    """The emulator's handler, after a fault."""

    def handle_one_request(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            super().handle_one_request()

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        bucket: Bucket = self.server.bucket
        bucket.requests += 1
        fault = bucket.fault(self.command, self.path)
        if fault is None:
            return True
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if isinstance(fault, float):
            time.sleep(fault)
        else:
            self.send_error(fault)
        return False

    def do_GET(self) -> None:
        with LOCK:
            super().do_GET()

    def do_POST(self) -> None:
        with LOCK:
            super().do_POST()

    def do_DELETE(self) -> None:
        with LOCK:
            super().do_DELETE()

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def gcs() -> Iterator[Bucket]:
    """Serves an empty gs://bucket."""
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket("bucket", storage)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, storage))
    server.bucket = Bucket(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.bucket
    finally:
        server.shutdown()
        server.server_close()
