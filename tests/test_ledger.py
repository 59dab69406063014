"""The nondeterminism ledger: what it finds, what it costs, and that it changes no bit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
import torch
from conftest import needs_compiler
from hypothesis import given
from hypothesis import strategies as st
from test_determinism_settings import gradient_of_indexing

from harness.determinism import codegen, graph
from harness.determinism import settings as determinism
from harness.determinism.ledger import Ledger
from harness.errors import VerificationFailed
from harness.format import ledger as document
from harness.format.ledger_merge import merge_rows, unite_files

CPU = torch.device("cpu")


def warn(census_every: int = 1, rank: int = 0) -> Ledger:
    """A ledger that looks."""
    return Ledger("warn", census_every, rank, CPU)


@pytest.fixture
def two_threads():
    """Two CPU threads, on which additions race."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def index_step(ledger: Ledger, step: int) -> None:
    """A step whose gradient is an indexing backward."""
    weight = torch.ones(6, 2, requires_grad=True)
    with ledger.observe(step):
        loss = weight[torch.tensor([0, 0, 1])].sum()
        ledger.walk(loss)
        loss.backward()


def test_an_indexing_gradient_is_documented_and_really_differs(two_threads):
    """Oracle: double execution on two threads gives other bits (several tries); the ledger has the row."""
    ledger = warn()
    with ledger.observe(1):
        gradient_of_indexing()
    (row,) = ledger.rows()
    assert (row.op, row.backend, row.device, row.dtype) == ("aten.index_put", "eager", "cpu", "float32")
    assert (row.evidence, row.count, row.first_step, row.last_step) == ("documented", 1, 1, 1)
    assert "gradient_of_indexing (backward)" in (row.call_site or "")
    assert "embedding" in (row.alternative or "")
    assert _differs(gradient_of_indexing)


def _differs(execute: Callable[[], bytes], tries: int = 300) -> bool:
    """Whether ``execute`` comes out in more than one way; on busy cores its threads may take turns."""
    first = execute()
    return any(execute() != first for _ in range(tries))


def test_a_step_is_due_first_and_then_at_multiples():
    """Oracle: the steps whose operators are counted, for a launch that begins at 7."""
    ledger = warn(census_every=5)
    for step in range(7, 22):
        index_step(ledger, step)
    (row,) = ledger.rows()
    assert (row.count, row.first_step, row.last_step) == (4, 7, 20)  # 7, 10, 15, 20
    assert ledger.coverage()["census_steps"] == 4


def test_mode_off_observes_nothing_and_says_so():
    """Oracle: no row, no coverage, and the summary reads not observed."""
    ledger = Ledger("off", 1, 0, CPU)
    index_step(ledger, 1)
    ledger.scan(1)
    assert ledger.rows() == ()
    assert ledger.coverage()["observed"] is False
    assert document.summary(ledger.to_bytes())["coverage"]["observed"] is False


def test_strict_counts_what_it_made_deterministic_as_mitigated():
    """Oracle: torch's documentation says that strict makes indexing deterministic on the CPU."""
    ledger = Ledger("strict", 1, 0, CPU)
    index_step(ledger, 1)
    assert ledger.rows() == ()
    (entry,) = document.Ledger.parse(ledger.to_bytes(), "test").mitigated
    assert (entry.op, entry.device, entry.by) == ("aten.index_put", "cpu", "determinism.mode=strict")


def test_a_step_that_is_not_due_makes_nothing():
    """Oracle: the one idle context of all steps; scripts/bench/hot_loop.py measures what it costs."""
    ledger = warn(census_every=1000)
    index_step(ledger, 1)
    assert ledger.observe(2) is ledger.observe(3)
    assert ledger.observe(1001) is not ledger.observe(2)


class Varied(torch.nn.Module):
    """Layers whose code asks torch whether a dispatch mode is on, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(32, 16)
        self.attention = torch.nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)
        self.convolution = torch.nn.Conv1d(16, 16, 3, padding=1)
        self.norms = torch.nn.ModuleList(
            [torch.nn.LayerNorm(16), torch.nn.RMSNorm(16), torch.nn.BatchNorm1d(16)]
        )
        self.recurrent = torch.nn.GRU(16, 16, batch_first=True)
        self.drop = torch.nn.Dropout(0.2)
        self.out = torch.nn.Linear(16, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, time) to (batch, time, 32)."""
        x = self.embedding(tokens)
        x = x + self.attention(self.norms[0](x), self.norms[0](x), x, need_weights=False)[0]
        x = self.drop(torch.nn.functional.gelu(self.norms[1](x)))
        x = self.norms[2](self.convolution(x.transpose(1, 2))).transpose(1, 2)
        x = x + self.recurrent(x)[0] + torch.einsum("btc,bsc->bt", x, x)[..., None] * x.cumsum(1).softmax(-1)
        x = torch.where(x > 0, x, x / (1 + x.norm(dim=-1, keepdim=True)))
        return self.out(x @ torch.eye(16))


def _train_varied(ledger: Ledger) -> list[torch.Tensor]:
    torch.manual_seed(5)
    model = Varied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, 7):
        tokens = torch.randint(0, 32, (4, 12))
        with ledger.observe(step):
            loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            ledger.walk(loss)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return [*model.state_dict().values(), torch.get_rng_state()]


@pytest.mark.slow
def test_training_under_a_census_at_every_step_ends_on_the_same_bits(two_threads):
    """Oracle: the same training without a ledger; weights, running statistics and RNG state, bit for bit."""
    ledger = warn()
    watched, plain = _train_varied(ledger), _train_varied(Ledger("off", 1, 0, CPU))
    assert ledger.coverage()["census_steps"] == 6
    assert int(ledger.coverage()["census_items"]) > 300
    assert all(torch.equal(one, other) for one, other in zip(watched, plain, strict=True))


def test_a_backward_pass_outside_of_the_context_is_found_by_the_walk():
    """Oracle: the census sees the forward pass only, the graph holds the gradient."""
    ledger = warn()
    with ledger.observe(1):
        loss = torch.ones(3, requires_grad=True)[torch.tensor([0, 0])].sum()
        ledger.walk(loss)
    loss.backward()
    (row,) = ledger.rows()
    assert (row.op, row.evidence, row.call_site) == ("aten.index_put", "documented", None)


def test_a_module_whose_name_only_begins_like_torchs_is_the_user_s():
    """Oracle: the call site is the line that is executed under that name."""
    ledger = warn()
    code = compile("def pick(weight, index): return weight[index]", "torchlike.py", "exec")
    names = {"__name__": "torchlike.model"}
    exec(code, names)
    with ledger.observe(1):
        names["pick"](torch.ones(3, requires_grad=True), torch.tensor([0, 0])).sum().backward()
    assert [row.call_site for row in ledger.rows()] == ["torchlike.py:1 pick (backward)"]


class Doubled(torch.autograd.Function):
    """A user's own autograd function."""

    @staticmethod
    def forward(ctx, value):
        """Twice the value."""
        return value * 2

    @staticmethod
    def backward(ctx, gradient):
        """Its gradient."""
        return gradient * 2


def test_custom_operators_and_functions_are_never_silently_clean():
    """Oracle: both names in the document, as rows that say that nothing is known."""

    @torch.library.custom_op("harness_test::noise", mutates_args=())
    def noise(value: torch.Tensor) -> torch.Tensor:
        return value + 1

    ledger = warn()
    with ledger.observe(1):
        loss = Doubled.apply(torch.ones(2, requires_grad=True)).sum()
        ledger.walk(loss)
        noise(torch.ones(2))
    parsed = document.Ledger.parse(ledger.to_bytes(), "test")
    assert parsed.unclassified == ("harness_test.noise", "test_ledger.Doubled")
    assert {(row.op, row.evidence) for row in parsed.rows} == {
        ("harness_test.noise", "unknown"),
        ("test_ledger.Doubled", "unknown"),
    }


def test_a_custom_operator_tagged_as_nondeterministic_is_a_documented_row():
    """Oracle: torch.Tag.nondeterministic_bitwise, put on by the operator's author."""
    if not hasattr(torch.Tag, "nondeterministic_bitwise"):
        pytest.skip("this build has no such tag")
    tags = (torch.Tag.nondeterministic_bitwise,)

    @torch.library.custom_op("harness_test::racing", mutates_args=(), tags=tags)
    def racing(value: torch.Tensor) -> torch.Tensor:
        return value + 1

    ledger = warn()
    with ledger.observe(1):
        racing(torch.ones(2))
    (row,) = ledger.rows()
    assert (row.op, row.evidence) == ("harness_test.racing", "documented")


def test_counts_continue_after_a_resume_and_unite_over_ranks():
    """Oracle: sums of the parts."""
    before, resumed, other = warn(), warn(), warn(rank=1)
    index_step(before, 1)
    resumed.load(before.to_bytes())
    index_step(resumed, 9)
    index_step(other, 9)
    (row,) = resumed.rows()
    assert (row.count, row.first_step, row.last_step) == (2, 1, 9)
    merged = document.Ledger.parse(unite_files([resumed.to_bytes(), other.to_bytes()]), "test")
    assert merged.rows[0].count == 3
    assert {entry.observer: entry.ranks for entry in merged.coverage}["census"] == (0, 1)


def test_the_summary_of_a_statement_has_no_floats_and_the_digest_of_the_bytes():
    """Oracle: hashlib, and a JSON reader that refuses floats."""
    import hashlib

    ledger = warn()
    index_step(ledger, 1)
    data = ledger.to_bytes()
    shown = document.summary(data)
    assert shown["sha256"] == hashlib.sha256(data).hexdigest()
    assert (shown["rows"], shown["documented"], shown["observed"], shown["measured"]) == (1, 1, 0, 0)
    assert all(isinstance(value, str | int | bool) for value in shown["coverage"].values())

    def refuse(text: str) -> None:
        raise AssertionError(text)

    json.loads(data, parse_float=refuse)


texts = st.text(max_size=8)
counts = st.integers(0, 2**40)
rows = st.builds(
    document.Row, texts, st.none() | texts, texts, texts, texts, st.none() | texts,
    st.sampled_from(document.EVIDENCE), counts, counts, counts, st.none() | texts, texts,
)  # fmt: skip


@given(st.lists(rows, max_size=4))
def test_a_document_comes_back_as_it_was_written(found):
    """Oracle: equality after a round trip."""
    written = document.Ledger(mode="warn", rows=merge_rows(found))
    assert document.Ledger.parse(written.to_bytes(), "test") == written


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | texts,
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)


@given(st.data())
def test_a_document_with_a_field_of_another_kind_is_refused(data):
    """Oracle: a field replaced by a value of another type, removed, or added."""
    ledger = warn()
    index_step(ledger, 1)
    value = json.loads(ledger.to_bytes())
    target = data.draw(st.sampled_from([value, value["rows"][0], value["coverage"][0], value["catalogue"]]))
    # The fields of later versions may be absent or null.
    later = {"module", "ulp", "budget", "digests", "not_executed_twice", "nonfinite"}
    name = data.draw(st.sampled_from(sorted(target.keys() - later)))
    old = target.pop(name)
    new = data.draw(VALUES)
    if data.draw(st.booleans()):
        nullable = name in ("kernel", "call_site", "alternative") and type(new) in (str, type(None))
        if type(new) is type(old) or nullable or (new is None and name == "catalogue"):
            return
        target[name] = new
    with pytest.raises(VerificationFailed):
        document.Ledger.parse(json.dumps(value).encode(), "test")


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data):
    """Oracle: only bytes that begin as the format says can be a ledger."""
    with pytest.raises(VerificationFailed):
        document.Ledger.parse(data, "test")


TRITON = """
triton_poi_fused_index_put_1 = async_compile.triton('triton_poi_fused_index_put_1', '''
def triton_poi_fused_index_put_1(in_ptr0, out_ptr0, xnumel):
    tl.atomic_add(out_ptr0 + (tmp4), tmp8, xmask, sem='relaxed')
''', device_str='cuda')
triton_red_fused_sum_2 = async_compile.triton('triton_red_fused_sum_2', '''
@triton_heuristics.reduction(size_hints={'x': 1, 'r0_': 8192}, inductor_meta={'deterministic': False})
''', device_str='cuda')
async_compile.wait(globals())
"""


def test_generated_triton_code_is_read_for_atomics_and_tuning():
    """Oracle: the text, in the form that inductor 2.13 writes."""
    found = list(codegen.scan_source(TRITON))
    assert [(finding.op, finding.device, finding.tuned) for finding in found] == [
        ("aten.index_put", "cuda", False),
        ("inductor.triton_red_fused_sum_2", "cuda", True),
    ]
    assert not list(
        codegen.scan_source(TRITON.replace("False}", "True}").replace("tl.atomic_add", "tl.store"))
    )


def test_the_walk_names_compiled_regions_and_visits_each_node_once():
    """Oracle: a graph whose nodes can be counted by hand."""
    weight = torch.ones(2, requires_grad=True)
    shared = weight * 2
    walked = graph.walk((shared + shared).sum())
    assert walked.nodes == 4  # sum, add, mul, accumulate
    assert graph.walk(torch.ones(())).nodes == 0


def test_kernel_names_of_the_profiler_are_matched_by_family():
    """Oracle: names as CUDA kernels of torch 2.13 bear them (facts/determinism.md section 2)."""
    from harness.determinism.kernels import known_kernel

    names = {
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>": "flash attention backward",
        "fmha_cutlassB_f16_aligned_64x64_k64_sm80(...)": "memory-efficient attention backward",
        "void at::native::indexFuncLargeIndex<float, long, unsigned int, 2>(...)": "index_add",
        "void at::native::vectorized_elementwise_kernel<4>(...)": None,
    }
    for name, family in names.items():
        known = known_kernel(name)
        assert (known.op if known else None) == family


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_kernels_are_recorded_at_the_first_due_step():
    """Oracle: scatter_add on CUDA runs a kernel that adds atomically."""
    ledger = Ledger("warn", 1, 0, torch.device("cuda"))
    with ledger.observe(1):
        index = torch.zeros(64, dtype=torch.int64, device="cuda")
        torch.zeros(4, device="cuda").scatter_add_(0, index, torch.ones(64, device="cuda"))
    assert ledger.coverage()["profiler_steps"] == 1
    assert {"documented", "observed"} == {row.evidence for row in ledger.rows()}


class Tiny(torch.nn.Module):
    """An embedding and a linear layer: compiled, the embedding's gradient adds atomically."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(64, 32)
        self.out = torch.nn.Linear(32, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, time) to (batch, time, 64)."""
        return self.out(self.embedding(tokens))


@needs_compiler
@pytest.mark.slow
def test_a_compiled_embedding_is_observed_differs_and_stays_compiled_under_the_census(two_threads):
    """Oracle: double execution; the other gradients, which do not race, keep their bits under a census.

    A census that made torch fall back to eager code would see the embedding operator, and would compile or
    run something else afterwards.
    """
    torch.manual_seed(0)
    model = Tiny()
    compiled = torch.compile(model)
    tokens = torch.randint(0, 64, (16, 256))
    targets = torch.randint(0, 64, (16 * 256,))  # equal addends would make their order immaterial
    ledger = warn()
    torch._dynamo.reset()  # what other tests have compiled makes torch generalise, and compile once more
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    modules = len(codegen.loaded_modules())  # those of other tests in this process

    def gradients(step: int, watch: Ledger) -> tuple[bytes, bytes]:
        model.zero_grad()
        with watch.observe(step):
            loss = torch.nn.functional.cross_entropy(compiled(tokens).flatten(0, 1), targets)
            watch.walk(loss)
            loss.backward()
        assert model.embedding.weight.grad is not None
        assert model.out.weight.grad is not None
        return model.embedding.weight.grad.numpy().tobytes(), model.out.weight.grad.numpy().tobytes()

    off = Ledger("off", 1, 0, CPU)
    watched_first = gradients(1, ledger)[1]  # compiled under the census
    ledger.scan(1)
    before = [gradients(step, off) for step in range(2, 12)]
    watched = [gradients(step, ledger) for step in range(12, 15)]
    after = [gradients(step, off) for step in range(15, 25)]
    ledger.scan(25)

    assert {watched_first} == {linear for _, linear in [*before, *watched, *after]}
    assert _differs(lambda: gradients(30, off)[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1

    found = [row for row in ledger.rows() if row.backend == "inductor"]
    assert [(row.op, row.device, row.dtype, row.evidence) for row in found] == [
        ("aten.embedding_dense_backward", "cpu", "float32", "observed")
    ]
    assert "embedding_dense_backward" in (found[0].kernel or "")
    assert (found[0].count, found[0].first_step, found[0].last_step) == (1, 1, 25)
    shown = ledger.coverage()
    assert shown["compiled_regions"] == 1
    assert shown["codegen_items"] == modules + 2  # forward and backward
    assert shown["unreadable_sources"] == 0


@pytest.mark.slow
def test_strict_refuses_inside_a_training_step_and_names_the_operator():
    """Oracle: a fresh process whose step uses put_, which has no deterministic form."""
    import subprocess

    code = (
        "import torch; from harness.determinism import settings\n"
        "from harness.determinism.ledger import Ledger\n"
        "settings.apply('strict'); ledger = Ledger('strict', 1, 0, torch.device('cpu'))\n"
        "try:\n"
        "    with ledger.observe(1): torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))\n"
        "except RuntimeError as error: print(settings.explain(error))\n"
        "print(ledger.coverage()['census_steps'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, steps = done.stdout.splitlines()
    assert said.startswith("`put_` does not have a deterministic implementation")
    assert steps == "1"


def test_warn_leaves_torch_s_flags_alone_while_it_looks():
    """Oracle: the settings read back inside of a due step."""
    before = determinism.read_back()
    with warn().observe(1):
        assert determinism.read_back() == before
