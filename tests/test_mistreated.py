"""Every verb that reads, over a run in which one thing is not as it should be (scripts/fuzz_verbs.py: more).

Oracle of all: what tests/mistreated.py says must never happen.
"""

from __future__ import annotations

import itertools
import random

import mistreated
import pytest

from harness.provenance.signing import keys

_CHANGED = (
    "run/policy.json", "run/log/checkpoint", "run/log/timestamps", "run/metrics.jsonl", "run/events",
    "run/checkpoints/step-00000030/provenance/countersignature-0.sigstore.json", "team.yaml", "run.head",
    "run/checkpoints/step-00000020", "run/checkpoints/step-00000030/MANIFEST.json", "tsa.pem",
    "run/checkpoints/step-00000030/model.safetensors", "run/run.yaml", "exported/provenance", "run/log/tile",
)  # fmt: skip
"""What stands for the kinds of files and folders."""
_EVERY = 9
"""Each change meets one command in so many, and each stand-in one name of `_CHANGED` in three."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> mistreated.Place:
    """A run with all that there is, and its copy; each change in it is undone."""
    return mistreated.Place.made(tmp_path_factory.mktemp("mistreated"))


def test_the_place_is_good_before_anything_is_changed(place: mistreated.Place) -> None:
    """Oracle: exit codes; else the others would show nothing."""
    judged = [words for words in place.commands() if words in place.verdicts]
    assert [place.verdicts[words][0] for words in judged] == [0, 0, 0]
    chosen = [words for words in place.commands() if words[0] in ("export", "head")]
    assert [place.call(words)[0] for words in chosen] == [0, 0]


@pytest.mark.parametrize("name", mistreated.STAND_INS)
def test_what_stands_in_for_a_file_or_a_folder_breaks_no_verb(name: str, place: mistreated.Place) -> None:
    """Every kind of file under names of `_CHANGED`, each with some of the commands."""
    number = list(mistreated.STAND_INS).index(name)
    for turn, inside in enumerate(_CHANGED, start=number):
        path = place.folder / inside
        if turn % 3 or not mistreated.possible(place, path, name):
            continue
        with place.changed(path, mistreated.STAND_INS[name]):
            for words in place.commands()[turn % _EVERY :: _EVERY]:
                place.call(words, f"{inside}: {name}")


def test_damage_by_chance_breaks_no_verb(place: mistreated.Place) -> None:
    """Bytes, values in JSON, and what the run's own key signs again, each with some of the commands."""
    signer = keys.load_signer(place.folder / "me.key")
    files = [each for each in place.paths() if each.is_file()]
    chance, turns = random.Random(0), itertools.cycle(range(_EVERY))
    for _ in range(30):
        path, other = chance.choice(files), chance.choice(files).read_bytes()
        number = chance.randrange(1 << 32)
        with place.changed(path, mistreated.damaged(random.Random(number), other, signer)):
            for words in place.commands()[next(turns) :: _EVERY]:
                place.call(words, f"{path.relative_to(place.folder)}: damaged {number}")
