"""Attacks by somebody whom the auditor's policy knows, and who signs what is not theirs to sign."""

from __future__ import annotations

from typing import Any

from attack import NOBODY, Scene, attack, payload_of, signed
from later_facts import replay

from harness.audit import opening
from harness.format import layout, strict_json
from harness.provenance import later, log
from harness.provenance.keys import public_keys
from harness.provenance.policy import Identity


def _known(scene: Scene, **limits: Any) -> None:
    """The stranger becomes an identity of the policy, within ``limits``."""
    limited = Identity("mallory", tuple(public_keys(scene.stranger)), **limits)
    scene.trust(identities=(*scene.policy.identities, limited))


def _sign_head(scene: Scene) -> None:
    scene.relog(log.read_claimed(scene.root / layout.LOG).records, by=scene.stranger)


def _sign_slsa(scene: Scene) -> None:
    path = scene.checkpoint(20) / layout.SLSA_BUNDLE
    path.write_bytes(signed(strict_json.dumps(payload_of(path)), scene.stranger))


@attack("the log's head is signed by none of the accepted keys")
def somebody_of_another_run_signs_the_head(scene: Scene) -> None:
    _known(scene, runs=("another",))
    _sign_head(scene)


@attack("the log's head is signed by none of the accepted keys")
def somebody_whose_time_is_over_signs_the_head(scene: Scene) -> None:
    _known(scene, valid_until="2001-01-01T00:00:00Z")
    _sign_head(scene)


@attack(NOBODY)
def somebody_of_another_run_signs_the_slsa_statement(scene: Scene) -> None:
    _known(scene, runs=("another",))
    _sign_slsa(scene)


@attack(NOBODY)
def somebody_whose_time_is_over_signs_the_slsa_statement(scene: Scene) -> None:
    _known(scene, valid_until="2001-01-01T00:00:00Z")
    _sign_slsa(scene)


@attack(NOBODY)
def somebody_of_another_run_adds_a_verdict(scene: Scene) -> None:
    _known(scene, runs=("another",))
    statement = opening.open_checkpoint(scene.checkpoint(20), scene.policy).statement
    data = signed(later.build(later.REPLAY, replay(), statement), scene.stranger)
    (scene.checkpoint(20) / later.path_of("replay-0")).write_bytes(data)
