"""The decoder against a plain one, and what the trainer needs of it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import needs_compiler
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness.model.gpt import GPT, Shape

SMALL = Shape(vocabulary=31, context=16, layers=2, width=24, heads=4, kv_heads=2)


def make(shape: Shape = SMALL, seed: int = 0, randomise_norms: bool = True) -> GPT:
    torch.manual_seed(seed)
    model = GPT(shape)
    if randomise_norms:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.uniform_(0.5, 1.5)
    return model


def tokens(shape: Shape = SMALL, batch: int = 3) -> Tensor:
    return torch.randint(
        0, shape.vocabulary, (batch, shape.context), generator=torch.Generator().manual_seed(1)
    )


def plain(model: GPT, ids: Tensor) -> Tensor:
    """The decoder written out one sequence, head and position at a time, in fp64, with complex rotations."""
    shape = model.shape
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    rows = [_plain_sequence(shape, state, sequence) for sequence in ids]
    return torch.stack(rows)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _plain_sequence(shape: Shape, state: dict[str, Tensor], sequence: Tensor) -> Tensor:
    x = state["embedding.weight"][sequence]
    for layer in range(shape.layers):
        block = {name.removeprefix(f"blocks.{layer}."): tensor for name, tensor in state.items()}
        x = x + _plain_attention(shape, block, _norm(x, block["attention_norm"]))
        y = _norm(x, block["mlp_norm"]) @ block["mlp.up.weight"].T
        if shape.mlp == "swiglu":
            gate, up = y[:, : shape.hidden], y[:, shape.hidden :]
            y = gate * torch.sigmoid(gate) * up
        else:
            y = y.clamp(min=0) ** 2
        x = x + y @ block["mlp.down.weight"].T
    output = state["embedding.weight"] if shape.tie_embeddings else state["output.weight"]
    return _norm(x, state["norm"]) @ output.T


def _plain_attention(shape: Shape, block: dict[str, Tensor], x: Tensor) -> Tensor:
    size, heads, kv_heads = shape.head_size, shape.heads, shape.kv_heads
    projected = (x @ block["attention.qkv.weight"].T).view(len(x), heads + 2 * kv_heads, size)
    outputs = []
    for head in range(heads):
        kv = heads + head // (heads // kv_heads)
        query = _plain_rotate(shape, _norm(projected[:, head], block["attention.query_norm"]))
        key = _plain_rotate(shape, _norm(projected[:, kv], block["attention.key_norm"]))
        scores = query @ key.T / math.sqrt(size)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        outputs.append(scores.softmax(-1) @ projected[:, kv + kv_heads])
    return torch.cat(outputs, dim=-1) @ block["attention.out.weight"].T


def _plain_rotate(shape: Shape, x: Tensor) -> Tensor:
    half = shape.head_size // 2
    turn = torch.arange(len(x)).double()[:, None] * shape.rope_base ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(turn), turn)
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_a_plain_decoder(mlp: str, kv_heads: int, tied: bool) -> None:
    """Oracle: the decoder written out with loops and complex numbers, in fp64."""
    shape = dataclasses.replace(SMALL, mlp=mlp, kv_heads=kv_heads, tie_embeddings=tied)
    model = make(shape)
    torch.testing.assert_close(
        model(tokens(shape)).double(), plain(model, tokens(shape)), rtol=1e-4, atol=1e-5
    )


def test_a_token_sees_only_those_before_it() -> None:
    """Oracle: changing the last token changes no logits but the last."""
    model, ids = make(), tokens()
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % SMALL.vocabulary
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert (before[:, -1] != after[:, -1]).any()


def test_a_prefix_gives_the_same_logits() -> None:
    """Oracle: the logits of the whole sequence."""
    model, ids = make(), tokens()
    torch.testing.assert_close(model(ids[:, :5]), model(ids)[:, :5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_bit_and_uses_the_same_randomness(dropout: float) -> None:
    """Oracle: loss, gradients and RNG state of the run that keeps its activations."""
    results = []
    for enabled in (False, True):
        model = make(dataclasses.replace(SMALL, dropout=dropout))
        model.set_activation_checkpointing(enabled)
        torch.manual_seed(5)
        loss = model(tokens()).square().mean()
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters()), torch.get_rng_state()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_dropout_acts_in_training_only() -> None:
    """Oracle: two passes differ in training, agree in evaluation."""
    model = make(dataclasses.replace(SMALL, dropout=0.3))
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))


def test_every_parameter_gets_a_gradient_and_a_tied_weight_is_stored_once() -> None:
    """Oracle: DDP refuses unused parameters; safetensors refuses shared tensors."""
    model = make()
    model(tokens()).square().mean().backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters()
    )
    state = model.state_dict()
    assert set(state) == {name for name, _ in model.named_parameters()}
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in state.values())


def test_bf16_autocast_stays_near_fp32() -> None:
    """Oracle: the fp32 logits, within bf16's 8 bits; logits are bf16 and finite."""
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens())
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - model(tokens())).norm() / model(tokens()).norm() < 0.02


def test_initial_weights_are_as_documented() -> None:
    """Oracle: sample deviations within 5 standard errors; the first loss is near that of a uniform guess."""
    shape = Shape(vocabulary=257, context=64, layers=8, width=128, heads=4, kv_heads=4)
    model = make(shape, randomise_norms=False)
    expected = {"embedding.weight": 0.02, "blocks.3.attention.qkv.weight": 128**-0.5}
    expected |= {"blocks.3.attention.out.weight": 128**-0.5 / 4, "blocks.3.mlp.up.weight": 128**-0.5}
    expected |= {"blocks.3.mlp.down.weight": shape.hidden**-0.5 / 4}
    state = model.state_dict()
    for name, deviation in expected.items():
        tolerance = 5 * deviation / math.sqrt(2 * state[name].numel())
        assert abs(state[name].std().item() - deviation) < tolerance, name
    ids = tokens(shape)
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(257)) < 0.3


def test_the_same_seed_gives_the_same_weights() -> None:
    """Oracle: bits."""
    one, other = make().state_dict(), make().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_flops_count_the_matrices_and_attention() -> None:
    """Oracle: torch's own counter over forward and backward, with attention as plain matrix products."""
    shape = dataclasses.replace(SMALL, kv_heads=4, tie_embeddings=False)
    model, ids = make(shape), tokens(shape, batch=1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    assert counter.get_total_flops() == model.flops_per_token(shape.context) * shape.context


@needs_compiler
@pytest.mark.slow
def test_a_compiled_model_computes_the_same() -> None:
    """Oracle: the eager logits."""
    model = make()
    torch.testing.assert_close(torch.compile(model)(tokens()), model(tokens()), rtol=1e-4, atol=1e-5)
