"""An independent referee: per-sample autodiff in float64 and dense matrices. Shares no code with the library.

It knows modules (Linear, Conv2d) only, calls the model on one sample at a time, takes output Hessians by
autodiff of a torch loss, cuts convolution patches out by hand, and inverts dense matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, reduction="sum")


def half_squared_error(f: Tensor, y: Tensor) -> Tensor:
    return (f - y).square().sum() / 2


LOSSES: dict[str, Loss] = {"classification": cross_entropy, "regression": half_squared_error}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def jacobian(model: nn.Module, x: Tensor, names: list[str] | None = None) -> Tensor:
    """``(N, C, P)``, sample by sample."""
    parameters = {n: p.detach() for n, p in model.named_parameters() if names is None or n in names}

    def one(sample: Tensor) -> Tensor:
        blocks = jacrev(lambda p: functional_call(model, p, (sample[None],))[0])(parameters)
        return torch.cat([block.reshape(len(block), -1) for block in blocks.values()], dim=1)

    return torch.stack([one(sample) for sample in x])


def jacobian_row_by_row(
    model: nn.Module,
    samples: Iterable[tuple[Any, ...] | dict[str, Any]],
    names: list[str] | None = None,
    read: Callable[[Any], Tensor] = lambda result: result,
) -> Tensor:
    """``(N, C, P)`` by one backward pass for each entry of each output, without vmap.

    Args:
        model: the model, in the mode it is wanted in.
        samples: the arguments of each call on one sample, by position or by name.
        names: the parameters; None for all.
        read: what finds the outputs, of one sample, in what the model returns.
    """
    found = []
    for sample in samples:
        parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
        chosen = [p.requires_grad_() for n, p in parameters.items() if names is None or n in names]
        args, kwargs = ((), sample) if isinstance(sample, dict) else (sample, {})
        outputs = read(functional_call(model, parameters, args, kwargs))
        assert outputs.shape[0] == 1
        rows = [
            torch.autograd.grad(f, chosen, retain_graph=True, materialize_grads=True)
            for f in outputs.flatten()
        ]
        found.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    return torch.stack(found)


def output_hessians(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """``(N, C, C)`` by autodiff of the loss."""
    with torch.no_grad():
        outputs = model(x)
    return torch.stack([hessian(lambda f, t=t: loss(f, t))(f) for f, t in zip(outputs, y, strict=True)])


def ggn(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, names: list[str] | None = None) -> Tensor:
    """The dense GGN, ``sum_n J_n^T Lambda_n J_n``."""
    J = jacobian(model, x, names)
    return torch.einsum("ncp,ncd,ndq->pq", J, output_hessians(model, x, y, loss), J)


def kfac(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """Dense KFAC-expand: ``B (x) A`` per weight (per group of a convolution), exact blocks for biases."""
    exact = ggn(model, x, y, loss)
    result = torch.zeros_like(exact)
    Lambda = output_hessians(model, x, y, loss)
    start = 0
    for name, p in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        module = model.get_submodule(owner)
        if kind == "bias":
            span = slice(start, start + p.numel())
            result[span, span] = exact[span, span]
        else:
            position = start
            for A, B in _layer_factors(model, module, x, Lambda):
                block = torch.kron(B.contiguous(), A.contiguous())
                span = slice(position, position + len(block))
                result[span, span] = block
                position += len(block)
        start += p.numel()
    return result


def _layer_factors(
    model: nn.Module, module: nn.Module, x: Tensor, Lambda: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """(A, B) of a layer that is used once, per group, from hooks that perturb its output."""
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    A: list[Tensor] = [0.0] * groups
    B: list[Tensor] = [0.0] * groups
    positions = 0
    for sample, Lambda_n in zip(x, Lambda, strict=True):
        a, g = _input_and_gradients(model, module, sample)
        if isinstance(module, nn.Conv2d):
            a, g = _patches(module, a[0]), g[:, 0].flatten(2).mT  # (S, in), (C, S, out)
        else:
            a, g = a.reshape(-1, module.in_features), g.reshape(len(g), -1, module.out_features)
        positions += len(a)
        for k, (a_k, g_k) in enumerate(zip(a.chunk(groups, -1), g.chunk(groups, -1), strict=True)):
            A[k] = A[k] + a_k.T @ a_k
            B[k] = B[k] + torch.einsum("cso,cd,dsp->op", g_k, Lambda_n, g_k).detach()
    return [(a / positions, b) for a, b in zip(A, B, strict=True)]


def _input_and_gradients(model: nn.Module, module: nn.Module, sample: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's input, and the Jacobian of the model's outputs in its output, ``(C, 1, *output)``."""
    seen: dict[str, Tensor] = {}

    def hooked(hook: Callable[..., Tensor | None]) -> Tensor:
        handle = module.register_forward_hook(hook)
        try:
            return model(sample[None])[0]
        finally:
            handle.remove()

    hooked(lambda m, a, out: seen.update(a=a[0].detach(), out=out.detach()))
    return seen["a"], jacrev(lambda shift: hooked(lambda m, a, out: out + shift))(
        torch.zeros_like(seen["out"])
    )


def _patches(conv: nn.Conv2d, image: Tensor) -> Tensor:
    """(S, C_in * kh * kw), cut out one by one."""
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        before, after = [t // 2 for t in total], [t - t // 2 for t in total]
    else:
        before = after = [0, 0] if conv.padding == "valid" else list(conv.padding)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(image[None], (before[1], after[1], before[0], after[0]), mode=mode)[0]
    (kh, kw), (dh, dw), (sh, sw) = conv.kernel_size, conv.dilation, conv.stride
    patches = []
    for i in range(0, padded.shape[1] - dh * (kh - 1), sh):
        for j in range(0, padded.shape[2] - dw * (kw - 1), sw):
            window = padded[:, i : i + dh * (kh - 1) + 1 : dh, j : j + dw * (kw - 1) + 1 : dw]
            patches.append(window.reshape(-1))
    return torch.stack(patches)


def curvature(model: nn.Module, x: Tensor, y: Tensor, likelihood: str, structure: str) -> Tensor:
    loss = LOSSES[likelihood]
    if structure == "kron":
        return kfac(model, x, y, loss)
    full = ggn(model, x, y, loss)
    return torch.diag(full.diagonal()) if structure == "diag" else full


def log_marginal_likelihood(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    likelihood: str,
    H: Tensor,
    prior_precision: Tensor,
    sigma: float = 1.0,
    temperature: float = 1.0,
    prior_mean: float = 0.0,
) -> float:
    """By the definition, with dense determinants; `prior_precision` has one entry per parameter."""
    with torch.no_grad():
        f = model(x)
    if likelihood == "classification":
        log_p = torch.distributions.Categorical(logits=f).log_prob(y).sum()
    else:
        log_p = torch.distributions.Normal(f, sigma).log_prob(y).sum()
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - prior_mean
    P0 = torch.diag(prior_precision)
    P = H / (sigma**2 * temperature) + P0
    quadratic = theta @ P0 @ theta
    return float(log_p / temperature - quadratic / 2 - (torch.slogdet(P)[1] - torch.slogdet(P0)[1]) / 2)


def covariance(model: nn.Module, x: Tensor, precision: Tensor) -> Tensor:
    """Joint output covariance ``(N C, N C)``, sample-major."""
    J = jacobian(model, x).flatten(0, 1)
    return J @ torch.linalg.inv(precision) @ J.T


def probit(mean: Tensor, variance: Tensor) -> Tensor:
    return torch.softmax(mean / torch.sqrt(1 + math.pi * variance / 8), dim=-1)
