"""The fused log-prob against its naive twin, forward and backward, and the memory it does not
take."""

import dataclasses
import shutil

import pytest
import torch

import lad


def inputs(n, h, v, dtype, device="cpu", scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64) * h**-0.5
    return (
        hidden.to(device, dtype).requires_grad_(),
        weight.to(device, dtype).requires_grad_(),
        torch.randint(v, (n,), generator=generator).to(device),
    )


def both(function, hidden, weight, targets, temperature, entropy_weight):
    logp, entropy = function(hidden, weight, targets, temperature)
    up = torch.randn(
        len(targets), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(logp)
    (up * logp).sum().add(entropy_weight * (up.flip(0) * entropy).sum()).backward()
    out = logp.detach(), entropy.detach(), hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    return out


@pytest.mark.parametrize(
    "dtype,tolerance",
    [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)],
    ids=["fp64", "fp32", "bf16"],
)
@pytest.mark.parametrize(
    "n,h,v,chunk", [(37, 16, 101, 8), (64, 8, 33, 64), (5, 24, 257, 4096), (1, 8, 9, 1)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
def test_fused_equals_naive(n, h, v, chunk, temperature, dtype, tolerance, entropy_weight):
    hidden, weight, targets = inputs(n, h, v, dtype)
    fused = both(
        lambda *a: lad.fused_logprob(*a, chunk=chunk),
        hidden,
        weight,
        targets,
        temperature,
        entropy_weight,
    )
    exact = both(
        lad.naive_logprob,
        hidden.detach().double().requires_grad_(),
        weight.detach().double().requires_grad_(),
        targets,
        temperature,
        entropy_weight,
    )
    assert fused[0].dtype == fused[1].dtype == torch.promote_types(dtype, torch.float32)
    for got, want in zip(
        fused[:2], exact[:2], strict=False
    ):  # fp32 accumulation: the same bound for bf16 inputs
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    for got, want in zip(fused[2:], exact[2:], strict=False):
        assert (got.double() - want).norm() / want.norm() < tolerance


def test_without_entropy_gradient_or_weight_gradient():
    hidden, weight, targets = inputs(9, 8, 21, torch.float64)
    weight.requires_grad_(False)
    logp, entropy = lad.fused_logprob(hidden, weight, targets, 0.7, 4)
    logp.sum().backward()
    got, hidden.grad = hidden.grad, None
    lad.naive_logprob(hidden, weight, targets, 0.7)[0].sum().backward()
    torch.testing.assert_close(got, hidden.grad)


def test_never_holds_tokens_by_vocab():
    """The largest tensor either pass makes, outside the gradients, is chunk x V."""
    from torch.utils._python_dispatch import TorchDispatchMode

    hidden, weight, targets = inputs(512, 8, 1000, torch.float32)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(
                [largest]
                + [
                    t.numel()
                    for t in (out if isinstance(out, (tuple, list)) else [out])
                    if isinstance(t, torch.Tensor)
                ]
            )
            return out

    with Watch():
        both(lambda *a: lad.fused_logprob(*a, chunk=32), hidden, weight, targets, 1.0, 0.1)
    assert largest == 32 * 1000
    with Watch():
        both(lad.naive_logprob, hidden, weight, targets, 1.0, 0.1)
    assert largest == 512 * 1000  # the twin does: the watch works


@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float64, 1e-10), (torch.bfloat16, 2e-2)], ids=["fp64", "bf16"]
)
def test_gradient_formed_in_the_forward_equals_the_late_one(dtype, tolerance):
    """With a loss whose derivative in logp is known as soon as logp is: -exp(logp) times a
    weight."""
    hidden, weight, targets = inputs(37, 16, 101, dtype)
    up = torch.linspace(-1, 1, 37, dtype=torch.float64)

    def run(function):
        logp, entropy = function(hidden, weight, targets, 0.7)
        (-logp.exp() * up.to(logp)).sum().backward()
        out = logp.detach(), entropy, hidden.grad, weight.grad
        hidden.grad = weight.grad = None
        return out

    parts = []

    def gradient(part, logp, entropy):
        parts.append(part)
        return -logp.exp() * up.to(logp)[part]

    early = run(lambda *a: lad.fused_logprob(*a, chunk=8, gradient=gradient))
    late = run(lambda *a: lad.fused_logprob(*a, chunk=8))
    assert [p.start for p in parts] == [0, 8, 16, 24, 32]
    for got, want in zip(early[:2], late[:2], strict=False):
        assert torch.equal(got, want)
    for got, want in zip(early[2:], late[2:], strict=False):
        assert (got - want).norm() / want.norm() < tolerance


def test_flops_are_six_or_eight_nhv():
    from torch.utils.flop_counter import FlopCounterMode

    hidden, weight, targets = inputs(48, 16, 101, torch.float32)
    for gradient, times in ((None, 8), (lambda part, logp, entropy: torch.ones_like(logp), 6)):
        with FlopCounterMode(display=False) as counter:
            lad.fused_logprob(hidden, weight, targets, 1.0, 16, gradient)[0].sum().backward()
        assert counter.get_total_flops() == times * 48 * 16 * 101


def test_one_compilation_without_a_break_for_rows_of_any_length():
    """fullgraph refuses graph breaks; one graph serves chunks of many sizes, and knows V."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        examples = [node.meta["example_value"] for node in inputs]
        graphs.append([x.shape for x in examples if isinstance(x, torch.Tensor) and x.dim() == 2])
        return graph.forward

    options = dict(backend=backend, fullgraph=True)
    a = lad.compile_for_chunks(lad.logits_to_logp, **options)
    b = lad.compile_for_chunks(lad.logp_to_dlogits, **options)
    for n in (64, 64, 37, 5, 200):
        logits, targets = torch.randn(n, 33), torch.randint(33, (n,))
        logp, entropy, lse = a(logits, targets, 0.8)
        b(logits, targets, 0.8, lse, entropy, torch.ones(n), None)
    assert len(graphs) == 2
    for [(C, V)] in graphs:
        assert isinstance(C, torch.SymInt) and isinstance(V, int) and V == 33
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile on a CPU needs a C++ compiler",
)
def test_compiled_equals_eager(monkeypatch):
    for name in ("logits_to_logp", "logp_to_dlogits"):
        monkeypatch.setattr(lad, name, getattr(lad, name))  # restored afterwards
    hidden, weight, targets = inputs(37, 16, 101, torch.float32)
    eager = both(lambda *a: lad.fused_logprob(*a, chunk=8), hidden, weight, targets, 0.8, 0.2)
    before = lad.logits_to_logp
    lad.turn_on_compile(dataclasses.replace(lad.Config(), compile="on"), torch.device("cpu"), None)
    assert lad.logits_to_logp is not before
    compiled = both(lambda *a: lad.fused_logprob(*a, chunk=8), hidden, weight, targets, 0.8, 0.2)
    for got, want in zip(compiled, eager, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_compile_without_a_compiler_runs_eagerly_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(lad.shutil, "which", lambda name: None)
    before = lad.logits_to_logp
    lad.turn_on_compile(dataclasses.replace(lad.Config(), compile="on"), torch.device("cpu"), None)
    assert lad.logits_to_logp is before and "no C++ compiler" in capsys.readouterr().out


@pytest.mark.gpu
def test_fused_equals_naive_on_the_gpu():
    lad.turn_on_compile(lad.Config(), torch.device("cuda"), None)
    hidden, weight, targets = inputs(1000, 256, 5003, torch.bfloat16, "cuda")
    fused = both(lambda *a: lad.fused_logprob(*a, chunk=384), hidden, weight, targets, 0.9, 0.2)
    exact = both(
        lad.naive_logprob,
        hidden.detach().double().requires_grad_(),
        weight.detach().double().requires_grad_(),
        targets,
        0.9,
        0.2,
    )
    for got, want in zip(fused[:2], exact[:2], strict=False):
        assert (got.double() - want).abs().max() < 1e-4
    for got, want in zip(fused[2:], exact[2:], strict=False):
        assert (got.double() - want).norm() / want.norm() < 1e-2
