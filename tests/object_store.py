"""A real S3 server on this machine (moto, a process of its own), and a second client to look in."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import boto3
import ranks

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "NO_PROXY": "127.0.0.1",
}


class Server:
    """moto's server, which may be stopped and started again; it then has forgotten everything."""

    def __init__(self) -> None:
        self.port = ranks.free_port()
        self.process = self._started()

    @property
    def environ(self) -> dict[str, str]:
        """What a client needs in its environment."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    def pause(self) -> None:
        """Answer nothing from now on, connections stay open."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After `pause`."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it; connections are refused from now on."""
        self.process.kill()
        self.process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return process
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("moto's server does not start")


@dataclass
class Bucket:
    """One bucket, looked into by boto3: another client than the one under test."""

    server: Server
    name: str
    client: Any = field(repr=False)

    @property
    def url(self) -> str:
        """The URL of a run in it."""
        return f"s3://{self.name}/runs/toy"

    def names(self) -> list[str]:
        """Paths below the run's URL, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix="runs/toy/")
        return sorted(
            each["Key"].removeprefix("runs/toy/") for page in pages for each in page.get("Contents", [])
        )

    def checkpoints(self) -> list[str]:
        """Folders under checkpoints/ that have a manifest."""
        found = [name.split("/")[1] for name in self.names() if name.endswith("/MANIFEST.json")]
        return sorted(found)

    def read(self, path: str) -> bytes:
        """The bytes of an object."""
        return bytes(self.client.get_object(Bucket=self.name, Key=f"runs/toy/{path}")["Body"].read())

    def modified(self, path: str) -> Any:
        """When an object was written, and its version tag."""
        head = self.client.head_object(Bucket=self.name, Key=f"runs/toy/{path}")
        return head["LastModified"], head["ETag"]

    def flip(self, path: str) -> None:
        """Change one bit in the middle of an object, its metadata stays: what a rotten disk would do."""
        key = f"runs/toy/{path}"
        found = self.client.get_object(Bucket=self.name, Key=key)
        data = bytearray(found["Body"].read())
        data[len(data) // 2] ^= 1
        self.client.put_object(Bucket=self.name, Key=key, Body=bytes(data), Metadata=found["Metadata"])


def bucket_of(server: Server, name: str) -> Bucket:
    """A new, empty bucket."""
    client = boto3.client(
        "s3",
        endpoint_url=server.environ["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=name)
    return Bucket(server, name, client)
