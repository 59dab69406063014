"""Whom to trust, ``--key`` and ``--policy``, and who signs, ``--signing-key``, as every verb takes them."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.errors import UsageError
from harness.format import layout
from harness.provenance.policy import reader, rules
from harness.provenance.policy.rules import Policy
from harness.provenance.signing import keys
from harness.provenance.signing.keys import Signer


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add ``--key`` and ``--policy``, one of them at most."""
    trust = parser.add_mutually_exclusive_group()
    trust.add_argument(
        "--key",
        type=Path,
        action="extend",
        nargs="+",
        default=[],
        metavar="PUB",
        help="public keys of the signer: Ed25519 for statements and log, P-256 for model.sig",
    )
    trust.add_argument("--policy", type=Path, metavar="FILE", help="who may sign what (docs/verify.md)")


def add_heads(parser: argparse.ArgumentParser, consequence: str) -> None:
    """Add ``--head``; ``consequence``: of a run that does not continue them."""
    parser.add_argument(
        "--head",
        type=Path,
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help=f"kept log heads: a run that was rolled back or rewritten since {consequence}",
    )


def add_ancestors(parser: argparse.ArgumentParser) -> None:
    """Add ``--with``."""
    parser.add_argument(
        "--with",
        dest="beside",
        type=Path,
        action="extend",
        nargs="+",
        default=[],
        metavar="RUN",
        help="run or checkpoint folders that this one, or they, began with (start.checkpoint); "
        "lineage takes exported folders too",
    )


def add_signing_key(parser: argparse._ActionsContainer) -> None:
    """Add ``--signing-key``: who signs what the verb makes."""
    parser.add_argument(
        "--signing-key",
        type=Path,
        metavar="KEY",
        help=f"private key that signs (default: ${keys.ENVIRONMENT}, else yours)",
    )


def trusted(arguments: argparse.Namespace, *, statements: bool = True) -> Policy | None:
    """The policy that the arguments mean; None when they name neither key nor policy.

    Raises `UsageError` when ``statements`` are to be read and no key for them is given.
    """
    if arguments.policy is not None:
        return reader.load(arguments.policy)
    if not arguments.key:
        return None
    return rules.from_keys([keys.load_public(path) for path in arguments.key], statements=statements)


def required(arguments: argparse.Namespace, where: str, why: str = "", *, statements: bool = True) -> Policy:
    """The policy that the arguments mean. Raises `UsageError` when they name neither key nor policy, which
    says ``why`` the verb needs one, and as `trusted`."""
    whom = trusted(arguments, statements=statements)
    if whom is None:
        remedy = "give --key NAME.ed25519.pub (and NAME.p256.pub) of its maker, or --policy FILE"
        raise UsageError(f"whom to trust is not said{why and f', and {why}'}", where=where, remedy=remedy)
    return whom


def signer_of(signing_key: Path | None, folder: Path) -> tuple[Signer, str]:
    """Who signs, and why it is that key; ``signing_key`` as typed, ``folder``: where the signature goes.

    Raises as `keys.signing_key_path` and `keys.load_signer`.
    """
    path, reason = keys.signing_key_path(signing_key, folder)
    return keys.load_signer(path), reason if signing_key is None else "--signing-key"


def require_own(arguments: argparse.Namespace, judged: Path) -> None:
    """Raise `UsageError` for a key or a policy that lies in the run or the folder that it is to judge:
    whoever made that could have put it there."""
    layout.require_outside(
        [*arguments.key, *([] if arguments.policy is None else [arguments.policy])], judged
    )
