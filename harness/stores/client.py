"""An S3-compatible object store as a flat folder of bytes, over obstore (https://developmentseed.org/obstore).

- An object appears whole or not at all. Every byte travels under its sha256, which the server compares
  before it stores anything (S3 "additional checksums").
- A large object carries its sha256 as metadata, so that an interrupted upload knows what is there already.
- Failures of network and server are retried by obstore for `ObjectStore.patience` seconds, then raised as
  `EnvironmentFault`.

Where the store is and who may use it comes from the environment, as for every S3 client: AWS_ENDPOINT_URL,
AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, or the host's role.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from harness import store_url
from harness.errors import EnvironmentFault, EvidenceIncomplete, UsageError, VerificationFailed

if TYPE_CHECKING:
    from obstore import Attributes
    from obstore.store import S3Store

PIECE = 1 << 20
"""Bytes handed over at once."""
_PART = 8 << 20
"""Bytes of a part of a multipart upload, at least."""
_PARTS = 9_000
"""Parts of an upload, at most; S3 allows 10,000."""
_AT_ONCE = 8
"""Parts in flight, each a copy in memory."""
_RETRIES = 1_000
"""So many that only the time limits them."""
_RANGE = 16 << 20
"""Bytes of one request when a large object is read: a slow or broken connection costs at most that much."""
_REQUEST_SECONDS = 30
"""For one request, at most; then it counts as failed."""
_COPY_LIMIT = 5 << 30
"""Largest object that S3 copies by itself."""
_OUT_OF_RANGE = "416 Range Not Satisfiable"
"""What obstore says when an object ends before the range begins."""
_CODE = re.compile(r"<Code>([^<]*)</Code>(?:\s*<Message>([^<]*)</Message>)?")
_HOST_ROLE = "169.254.169.254"
"""Where a host in the cloud is told its role; asked when the environment has no credentials."""
_DIGEST = "sha256"
"""Name of the metadata that holds an object's sha256 in hex."""


class ObjectExistsError(UsageError):
    """There is an object of that name already, or it is not the one that was there: two jobs write here."""


class ObjectStore:
    """The objects below one prefix of a bucket; paths are relative to it."""

    def __init__(self, url: str, *, patience: int = 180) -> None:
        """``patience``: seconds for which a failing request is retried.

        Raises `UsageError` for a URL that is none, `EnvironmentFault` without obstore or without a region.
        """
        place = store_url.parse(url)
        if place is None:
            raise UsageError("is no store", where=url, remedy=f"write {store_url.FORM}")
        self.url = url.rstrip("/")
        with self._faults(""):
            self._store = _open(*place, patience)

    def objects(self, prefix: str = "") -> dict[str, int]:
        """Path → size in bytes of every object below the folder ``prefix``."""
        import obstore

        with self._faults(prefix):
            listed = obstore.list(self._store, prefix.rstrip("/") or None, chunk_size=1000)
            return {each["path"]: each["size"] for batch in listed for each in batch}

    def put(self, path: str, data: bytes) -> str:
        """Store a small object, in place of one that may be there; returns its version tag."""
        return self._put(path, data)

    def create(self, path: str, data: bytes) -> str:
        """Store a small object that must not be there yet. Raises `ObjectExistsError`."""
        return self._put(path, data, mode="create")

    def replace(self, path: str, data: bytes, tag: str) -> str:
        """Store a small object in place of the version ``tag``. Raises `ObjectExistsError` for another."""
        return self._put(path, data, mode={"e_tag": tag})

    def put_large(
        self,
        path: str,
        data: Iterable[memoryview],
        size: int,
        sha256: str,
        proceed: Callable[[], None] = lambda: None,
    ) -> None:
        """Store ``size`` bytes that come in pieces and have the hex digest ``sha256``.

        ``proceed`` is called between pieces; when it or ``data`` raises, nothing appears.
        """

        def going_on() -> Iterator[memoryview]:
            for piece in data:
                proceed()
                yield piece

        with self._faults(path):
            self._put_parts(path, going_on(), size, {_DIGEST: sha256})

    def holds(self, path: str, sha256: str) -> bool:
        """Whether `put_large` has stored bytes of that digest under ``path``."""
        import obstore

        with self._faults(path):
            try:
                found = obstore.get(self._store, path, options={"head": True})
            except FileNotFoundError:
                return False
            return found.attributes.get(_DIGEST) == sha256

    def get(self, path: str, limit: int) -> bytes:
        """A small object. Raises `EvidenceIncomplete` when it is not there, `VerificationFailed` when it has
        more than ``limit`` bytes."""
        return self.get_tagged(path, limit)[0]

    def get_tagged(self, path: str, limit: int) -> tuple[bytes, str]:
        """`get`, with the tag of the version that was read."""
        import obstore

        with self._faults(path):
            try:
                found = obstore.get(self._store, path)
            except FileNotFoundError as error:
                raise EvidenceIncomplete("is not in the store", where=self.at(path)) from error
            if found.meta["size"] > limit:
                raise VerificationFailed(f"is larger than {limit} bytes", where=self.at(path))
            return bytes(found.bytes()), str(found.meta["e_tag"])

    def tag(self, path: str) -> str | None:
        """The tag of the version that is there; None when there is none."""
        import obstore

        with self._faults(path):
            try:
                return str(obstore.head(self._store, path)["e_tag"])
            except FileNotFoundError:
                return None

    def pieces(self, path: str, size: int) -> Iterator[memoryview]:
        """The ``size`` bytes of a large object, in order. Raises `EvidenceIncomplete` when it is absent,
        `VerificationFailed` when it has become shorter."""
        import obstore
        from obstore import exceptions

        for start in range(0, size, _RANGE):
            end = min(start + _RANGE, size)
            with self._faults(path):
                try:
                    piece = memoryview(obstore.get_range(self._store, path, start=start, end=end))
                except FileNotFoundError as error:
                    raise EvidenceIncomplete("is not in the store", where=self.at(path)) from error
                except exceptions.GenericError as error:
                    if _OUT_OF_RANGE not in str(error):
                        raise
                    piece = memoryview(b"")
            if len(piece) != end - start:
                raise VerificationFailed(f"has become shorter than {size} bytes", where=self.at(path))
            yield piece

    def delete(self, paths: Iterable[str]) -> None:
        """Remove objects, one after the other."""
        import obstore

        for path in paths:
            with self._faults(path):
                obstore.delete(self._store, path)

    def move(self, source: str, target: str, size: int) -> None:
        """Copy an object of ``size`` bytes within the store, then remove it."""
        import obstore

        with self._faults(source):
            if size <= _COPY_LIMIT:
                obstore.copy(self._store, source, target)
            else:
                attributes = obstore.get(self._store, source, options={"head": True}).attributes
                self._put_parts(target, self.pieces(source, size), size, dict(attributes))
            obstore.delete(self._store, source)

    def conflict(self, path: str) -> ObjectExistsError:
        """The error for an object that another job has written."""
        return ObjectExistsError(
            "was written by somebody else meanwhile",
            where=self.at(path),
            remedy="is another job training with this checkpoint.store?",
        )

    def at(self, path: str) -> str:
        """The URL of ``path``."""
        return f"{self.url}/{path}" if path else self.url

    def _put(self, path: str, data: bytes, mode: Any = None) -> str:
        import obstore

        with self._faults(path):
            return str(obstore.put(self._store, path, data, mode=mode, use_multipart=False)["e_tag"])

    def _put_parts(self, path: str, data: Iterator[memoryview], size: int, attributes: Attributes) -> None:
        import obstore

        in_parts = size > _PART
        obstore.put(
            self._store,
            path,
            data if in_parts else b"".join(data),
            attributes=attributes,
            use_multipart=in_parts,
            chunk_size=max(_PART, -(-size // _PARTS)),
            max_concurrency=_AT_ONCE,
        )

    @contextmanager
    def _faults(self, path: str) -> Iterator[None]:
        """obstore's errors as one line of ours."""
        try:
            from obstore import exceptions
        except ImportError as error:
            raise EnvironmentFault(
                "the package obstore is not installed", where=self.url, remedy="pip install 'harness[s3]'"
            ) from error
        try:
            yield
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
            raise self.conflict(path) from error
        except FileNotFoundError as error:
            raise EnvironmentFault(
                "the store has no such bucket", where=self.url, remedy="make it, or change checkpoint.store"
            ) from error
        except (exceptions.BaseError, OSError) as error:
            raise EnvironmentFault(
                f"the store does not answer as it should: {_reason(error)}",
                where=self.at(path),
                remedy="check the network and the AWS_* variables, then run the same command again",
            ) from error


def _open(bucket: str, prefix: str | None, patience: int) -> S3Store:
    from obstore.store import S3Store

    # An endpoint without TLS has to be asked for by its scheme; the server's name must be right otherwise.
    return S3Store(
        bucket,
        prefix=prefix,
        config={"checksum_algorithm": "SHA256"},
        client_options={
            "allow_http": True,
            "timeout": timedelta(seconds=min(_REQUEST_SECONDS, patience)),
        },
        retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=patience)},
    )


def pieces_of(data: memoryview) -> Iterator[memoryview]:
    """``data`` in pieces, without a copy."""
    return (data[offset : offset + PIECE] for offset in range(0, len(data), PIECE))


def _reason(error: BaseException) -> str:
    """What the server says, or what happened on the way there, in one line."""
    text = str(error)
    if _HOST_ROLE in text:
        return "no credentials: AWS_ACCESS_KEY_ID is not set, and this host has no role"
    code = _CODE.search(text)
    if code is not None:
        return ": ".join(part for part in code.groups() if part)
    return (text.strip().splitlines() or [type(error).__name__])[0].rstrip(" :")[:300]
