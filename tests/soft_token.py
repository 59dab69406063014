"""A real PKCS#11 token on this machine: SoftHSM 2 (Debian's package softhsm2), its keys made by openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

PIN = "sesame-4711"
LABEL = "the lab's; 100 %"
"""With characters that a URI has to encode."""
_PLACES = ("lib/softhsm", "lib64/pkcs11", "lib64/softhsm", "lib/pkcs11")
MODULE = next(
    (
        found
        for prefix in ("/usr", "/usr/local", "/opt/homebrew")
        for place in _PLACES
        if (found := Path(prefix, place, "libsofthsm2.so")).exists()
    ),
    None,
)
TOOL = shutil.which("softhsm2-util")
MISSING = MODULE is None or TOOL is None
REASON = "SoftHSM is not installed: apt-get install softhsm2"


class SoftToken:
    """One token with an Ed25519 and a P-256 key; it can be pulled out and put back.

    SoftHSM finds its tokens by $SOFTHSM2_CONF, which the caller sets to ``config``.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.config = root, root / "softhsm2.conf"
        self._plugged, self._pulled = root / "tokens", root / "pulled"
        self._plugged.mkdir()
        self.config.write_text(f"directories.tokendir = {self._plugged}\nlog.level = ERROR\n")
        self._tool("--init-token", "--free", "--so-pin", "0000-4711")
        self.pin = root / "pin"
        self.pin.write_text(f"{PIN}\n")
        self.pin.chmod(0o600)
        for number, (name, *kind) in enumerate(
            [("ed25519", "ed25519"), ("p256", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")], start=1
        ):
            key = self.private(name)
            subprocess.run(["openssl", "genpkey", "-out", key, "-algorithm", *kind], check=True)
            public = ["openssl", "pkey", "-in", key, "-pubout", "-out", root / f"me.{name}.pub"]
            subprocess.run(public, check=True)
            self._tool("--import", str(key), "--id", f"0{number}")
        self.file = root / "me.pkcs11"
        self.file.write_text(f"{self.uri('id=%01')}\n{self.uri('id=%02')}\n")

    def private(self, name: str) -> Path:
        """The private key that was imported into the token; only the test has it as well."""
        return self.root / f"{name}.pem"

    def uri(self, which: str, query: str | None = None) -> str:
        """The URI of the object ``which`` (attributes of a path)."""
        asked = f"module-path={MODULE}&pin-source=file:{self.pin}" if query is None else query
        return f"pkcs11:token=the%20lab's%3B%20100%20%25;{which}?{asked}"

    def pull(self) -> None:
        """Take the token out."""
        (token,) = self._plugged.iterdir()
        token.rename(self._pulled)

    def put_back(self) -> None:
        """Put it in again."""
        self._pulled.rename(self._plugged / "again")

    def _tool(self, *words: str) -> None:
        command = [str(TOOL), *words, "--label", LABEL, "--pin", PIN]
        command += ["--token", LABEL] if words[0] == "--import" else []
        environ = {"SOFTHSM2_CONF": str(self.config)}
        subprocess.run(command, check=True, capture_output=True, env=environ)
