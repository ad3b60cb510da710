"""Servers of slides on this machine: a web server with ranges of bytes, and an S3 server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import boto3
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem


class RangeHandler(SimpleHTTPRequestHandler):
    """Lists folders, and serves ranges of bytes. `failing` requests fail first, with status 503."""

    failing = 0
    served: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if type(self).failing > 0:
            type(self).failing -= 1
            self.send_error(503)
        elif wanted is None or not path.is_file():
            super().do_GET()
        else:
            start, stop = int(wanted[1]), min(int(wanted[2]) + 1, path.stat().st_size)
            self.served.append(path.name)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{path.stat().st_size}")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            with path.open("rb") as file:
                file.seek(start)
                self.wfile.write(file.read(stop - start))

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


@contextmanager
def web_server(folder: Path, *, port: int = 0) -> Iterator[str]:
    """Address of a server of a folder, within the block."""
    RangeHandler.failing, RangeHandler.served = 0, []
    server = ThreadingHTTPServer(("127.0.0.1", port), partial(RangeHandler, directory=str(folder)))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def s3_server(folder: Path, prefix: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Path of the slides of a folder on an S3 server, which s3fs finds within the block."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    variables = {"AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (variables | dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")).items():
        monkeypatch.setenv(name, value)
    bucket, _, key = prefix.partition("/")
    S3FileSystem.clear_instance_cache()  # one of an earlier server has its address
    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    for path in sorted(folder.glob("*.tif*")):
        client.upload_file(str(path), bucket, f"{key}/{path.name}")
    try:
        yield Path(f"s3://{prefix}")
    finally:
        server.stop()
