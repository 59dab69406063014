"""The list of nondeterministic operators against the installed torch build."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch

from harness.determinism.catalogue import CURATED, DOCSTRING, STRICT, bullets, catalogue, documented
from harness.determinism.census import CONDITIONS, Census

DOC = torch.use_deterministic_algorithms.__doc__ or ""


def test_every_bullet_of_the_docstring_is_in_the_catalogue():
    """Oracle: the docstring of the installed build, its bullets counted by their first characters."""
    lists = DOC.split("normally-nondeterministic", 1)[1].split("In addition", 1)[0]
    written = re.findall(r"^\s*\* :(?:class|func):`([\w.]+)`", lists, re.MULTILINE)
    assert [bullet.target for bullet in bullets(DOC)] == written
    assert [entry.name for entry in documented()] == written
    assert len(written) >= 40


def test_the_docstring_is_read_with_and_without_its_indentation():
    """Oracle: Python 3.13 compiles the text without it, older ones with it."""
    plain = inspect.cleandoc(DOC)
    first, rest = plain.split("\n", 1)
    indented = f"{first}\n{textwrap.indent(rest, '    ')}    "
    assert indented != plain
    assert [*bullets(plain)] == [*bullets(indented)] == [*bullets(DOC)]
    assert {bullet.raises for bullet in bullets(plain)} == {True, False}


def test_every_operator_of_the_catalogue_exists_in_this_build():
    """Oracle: torch.ops, so that a renamed operator or an unknown bullet shows."""
    for entry in catalogue().entries:
        assert entry.operators
        for operator in entry.operators:
            namespace, _, name = operator.partition("::")
            assert hasattr(getattr(torch.ops, namespace), name), (entry.name, operator)


def test_every_condition_of_the_catalogue_is_known_to_the_census():
    """Oracle: the census's table."""
    assert {entry.condition for entry in catalogue().entries} <= {None, *CONDITIONS}


def test_every_row_names_its_source_and_its_evidence():
    """Oracle: documented rows come from torch's own text, curated ones are observed."""
    assert {entry.source for entry in documented()} == {DOCSTRING}
    assert {entry.evidence for entry in documented()} == {"documented"}
    assert {entry.evidence for entry in CURATED} == {"observed"}
    assert all(entry.source and entry.alternative for entry in CURATED)


def test_what_the_docstring_says_of_some_operations_is_read_right():
    """Oracle: the text, read by a person."""
    rows = {(entry.name, entry.device, entry.condition): entry for entry in documented()}
    item = rows["torch.Tensor.__getitem__", "cpu", None]
    assert item.backward
    assert item.strict == "deterministic"
    assert rows["torch.Tensor.put_", "any", "overwrites"].strict == "raises"
    assert rows["torch.Tensor.put_", "cpu", "accumulates"].strict == "deterministic"
    assert rows["torch.Tensor.put_", "cuda", "accumulates"].strict == "raises"
    assert rows["torch.Tensor.scatter_reduce", "cuda", "sums"].strict == "deterministic"
    assert rows["torch.Tensor.scatter_reduce", "cuda", "multiplies"].strict == "raises"
    assert rows["torch.nn.functional.interpolate", "cuda", None].backward
    assert rows["torch.bmm", "cuda", "sparse"].alternative == STRICT


def test_operators_that_draw_random_numbers_are_listed_by_the_build_s_own_tags():
    """Oracle: dropout and normal_ draw, addition does not."""
    seeded = catalogue().seeded
    assert {"aten::normal_", "aten::native_dropout", "aten::rand"} <= set(seeded)
    assert not {"aten::add.Tensor", "aten::mm"} & set(seeded)


def test_the_digest_is_the_digest_of_the_content():
    """Oracle: made again, it is the same; an entry less, it is another."""
    first = catalogue()
    catalogue.cache_clear()
    assert catalogue().sha256 == first.sha256
    assert len(first.sha256) == 64


def _pooled():
    return torch.nn.functional.max_pool2d(torch.rand(1, 1, 4, 4), 2, return_indices=True)


RUNS = {
    "aten.index_put": lambda: torch.ones(4, requires_grad=True)[torch.tensor([0, 0])].sum().backward(),
    "aten.index_copy": lambda: torch.zeros(3).index_copy_(0, torch.tensor([0, 0]), torch.ones(2)),
    "aten.put": lambda: torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2)),
    "aten.max_unpool2d": lambda: torch.nn.functional.max_unpool2d(*_pooled(), 2),
}


@pytest.mark.parametrize("op", RUNS)
def test_the_census_sees_a_documented_operator_on_the_cpu(op):
    """Oracle: torch's documentation lists it for CPU tensors."""
    with Census() as census:
        RUNS[op]()
    assert [(finding.op, finding.device) for finding in census.findings] == [(op, "cpu")]


def test_the_census_is_silent_about_operators_that_no_list_names_for_the_cpu():
    """Oracle: the documentation lists these for CUDA tensors only, or not at all."""
    embedding, linear = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4)
    convolution = torch.nn.Conv1d(3, 3, 1)
    with Census() as census:
        loss = convolution(linear(embedding(torch.tensor([[1, 1, 2]])))).cumsum(0).sum()
        loss = loss + torch.zeros(3).scatter_add(0, torch.tensor([0, 0]), torch.ones(2)).sum()
        loss.backward()
    assert not census.findings
    assert not census.unclassified
    assert census.operators > 10


def test_a_gradient_is_traced_to_the_forward_call_that_needs_it():
    """Oracle: the line of this file that indexes."""
    weight = torch.ones(4, requires_grad=True)
    with Census() as census:
        other = weight * 2
        first = weight[torch.tensor([0, 1])]
        (first.sum() + other.sum()).backward()
    (finding,) = census.findings
    assert re.fullmatch(
        r"test_catalogue\.py:\d+ test_a_gradient_is_traced\w* \(backward\)", finding.call_site
    )
    line = int(finding.call_site.partition(":")[2].partition(" ")[0])
    assert "first = weight" in Path(__file__).read_text().splitlines()[line - 1]
