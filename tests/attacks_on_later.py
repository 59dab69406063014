"""Attacks on statements that were added later: in the folder, in the log, and by a signer who lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attack import NOBODY, Scene, attack, payload_of, signed
from later_facts import replay, svr, test_result

from harness.audit import attest
from harness.audit.folders import opening
from harness.format import strict_json
from harness.provenance import later
from harness.provenance.transparency import log


def _add(scene: Scene, step: int = 20, kind: str = later.REPLAY, facts: dict[str, Any] | None = None) -> str:
    opened = opening.open_checkpoint(scene.checkpoint(step), scene.policy)
    predicate = (
        facts if facts is not None else {"replay": replay, "svr": svr, "test-result": test_result}[kind]()
    )
    return attest.add(opened, kind, predicate, scene.signer).name


def _lie(scene: Scene, kind: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """A statement of ``kind`` with a changed predicate, signed by the right key and in no log."""
    path = scene.checkpoint(20) / later.path_of(_add_unlogged(scene, kind))
    statement = payload_of(path)
    change(statement["predicate"])
    path.write_bytes(signed(strict_json.dumps(statement), scene.signer))


def _add_unlogged(scene: Scene, kind: str) -> str:
    statement = opening.open_checkpoint(scene.checkpoint(20), scene.policy).statement
    facts = {"replay": replay, "svr": svr, "test-result": test_result}[kind]()
    data = signed(later.build(kind, facts, statement), scene.signer)
    (scene.checkpoint(20) / later.path_of(f"{kind}-0")).write_bytes(data)
    return f"{kind}-0"


@attack("its statement replay-0 is record 3 of the log, and is not here")
def a_logged_verdict_is_removed(scene: Scene) -> None:
    (scene.checkpoint(20) / later.path_of(_add(scene))).unlink()


@attack("has other bytes than record 3 of the log says")
def a_logged_verdict_is_replaced_by_its_signer(scene: Scene) -> None:
    path = scene.checkpoint(20) / later.path_of(_add(scene))
    statement = payload_of(path)
    statement["predicate"]["reason"] = "another one"
    path.write_bytes(signed(strict_json.dumps(statement), scene.signer))


@attack("its statement replay-0 is record 3 of the log, and is not here")
def a_logged_verdict_is_renamed(scene: Scene) -> None:
    path = scene.checkpoint(20) / later.path_of(_add(scene))
    path.rename(path.with_name("replay-1.sigstore.json"))


@attack("is about another checkpoint")
def a_verdict_is_moved_to_another_checkpoint(scene: Scene) -> None:
    path = scene.checkpoint(20) / later.path_of(_add(scene))
    path.rename(scene.checkpoint(30) / later.path_of("replay-0"))


@attack("is no statement of kind test-result")
def a_verdict_is_shown_as_a_test_result(scene: Scene) -> None:
    path = scene.checkpoint(20) / later.path_of(_add_unlogged(scene, later.REPLAY))
    path.rename(path.with_name("test-result-0.sigstore.json"))


@attack(NOBODY)
def a_verdict_is_signed_by_a_stranger(scene: Scene) -> None:
    path = scene.checkpoint(20) / later.path_of(_add_unlogged(scene, later.REPLAY))
    path.write_bytes(signed(strict_json.dumps(payload_of(path)), scene.stranger))


@attack("enters replay-0 for another run or too early")
def a_verdict_is_logged_before_its_checkpoint(scene: Scene) -> None:
    _add(scene, step=30)
    book = log.read(scene.root / "log", scene.policy.statement_keys)
    scene.relog([*book.records[:2], book.records[3], book.records[2]])


@attack("has a second record of the statement replay-0")
def a_verdict_is_logged_twice(scene: Scene) -> None:
    _add(scene)
    book = log.read(scene.root / "log", scene.policy.statement_keys)
    scene.relog([*book.records, book.records[3]])


@attack("which is not here")
def a_logged_verdict_is_about_an_unknown_checkpoint(scene: Scene) -> None:
    _add(scene)
    book = log.read(scene.root / "log", scene.policy.statement_keys)
    known = strict_json.loads(book.records[3], where="log")
    scene.relog([*book.records[:3], strict_json.dumps(known | {"checkpoint": "0" * 64})])


@attack("says equal, and has a difference or compared nothing")
def a_verdict_says_equal_beside_a_difference(scene: Scene) -> None:
    _lie(scene, later.REPLAY, lambda facts: facts["compared"][0].update(equal=False))


@attack("says equal, and has a difference or compared nothing")
def a_verdict_says_equal_and_has_compared_nothing(scene: Scene) -> None:
    _lie(scene, later.REPLAY, lambda facts: facts.update(compared=[]))


@attack("says within floor, and has none")
def a_verdict_is_within_a_floor_that_is_not_said(scene: Scene) -> None:
    _lie(scene, later.REPLAY, lambda facts: facts.update(verdict="within floor"))


@attack("says within floor, and is farther than its bound")
def a_verdict_is_within_a_floor_that_it_exceeds(scene: Scene) -> None:
    floor = {
        "measure": "",
        "measured": "1e-6",
        "bound": "3e-6",
        "distance": "4e-6",
        "samples": 5,
        "source": "",
    }
    _lie(scene, later.REPLAY, lambda facts: facts.update(verdict="within floor", floor=floor))


@attack("has steps that end before they begin")
def a_verdict_is_about_no_steps(scene: Scene) -> None:
    _lie(scene, later.REPLAY, lambda facts: facts.update(steps={"from": 20, "to": 20}))


@attack("verdict is none of equal, within floor, outside, inconclusive")
def a_verdict_is_none(scene: Scene) -> None:
    _lie(scene, later.REPLAY, lambda facts: facts.update(verdict="good enough"))


@attack("confidence is not a known field")
def a_verdict_has_an_unknown_field(scene: Scene) -> None:
    _lie(scene, later.REPLAY, lambda facts: facts.update(confidence="high"))


@attack("has the result PASSED and failed tests")
def an_evaluation_passed_with_failed_tests(scene: Scene) -> None:
    _lie(scene, later.TEST_RESULT, lambda facts: facts.update(failedTests=["arithmetic"]))


@attack("harness_evaluation.metrics.loss is no string")
def an_evaluation_holds_a_float(scene: Scene) -> None:
    _lie(scene, later.TEST_RESULT, lambda facts: facts["harness_evaluation"]["metrics"].update(loss=0.5))


@attack("configuration is missing")
def an_evaluation_does_not_say_how(scene: Scene) -> None:
    _lie(scene, later.TEST_RESULT, lambda facts: facts.pop("configuration"))


@attack("verifier.id is missing")
def a_verification_does_not_say_by_whom(scene: Scene) -> None:
    _lie(scene, later.SVR, lambda facts: facts["verifier"].pop("id"))


@attack("is larger than 1048576 bytes")
def a_later_statement_is_huge(scene: Scene) -> None:
    (scene.checkpoint(20) / later.path_of("replay-0")).write_bytes(b" " * (later.LIMIT + 1))


@attack("holds more than 4096 later statements")
def a_checkpoint_has_thousands_of_later_statements(scene: Scene) -> None:
    for number in range(later.MOST + 1):
        (scene.checkpoint(20) / later.path_of(f"x-{number}")).write_bytes(b"")


@attack("is not in the manifest")
def a_later_statement_is_named_like_the_first_one(scene: Scene) -> None:
    path = scene.checkpoint(20) / later.path_of(_add_unlogged(scene, later.REPLAY))
    path.rename(path.with_name("checkpoint-0.sigstore.json"))


@attack("is not in the manifest")
def a_later_statement_has_a_number_with_a_zero_before_it(scene: Scene) -> None:
    path = scene.checkpoint(20) / later.path_of(_add_unlogged(scene, later.REPLAY))
    path.rename(path.with_name("replay-00.sigstore.json"))
