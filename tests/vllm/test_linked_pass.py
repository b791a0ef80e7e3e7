"""Linked residuals as values of an attention: against the formula in float64, whole and with heads on two workers."""

import pytest
import torch

from loraplex.residual import LinkedLayer, LinkedResidual, ResidualConfig, SteeringVector
from loraplex.residual.fingerprint import BaseFingerprint
from loraplex.residual.rows import ChainLink
from loraplex.vllm_plugin.linked_pass import LinkedChain, LinkedPass, LinkedRoute, token_index

HIDDEN, HEADS, LAYER = 16, 4, 1
BASE = BaseFingerprint(architecture="Tiny", hidden_size=HIDDEN, vocab_size=8, num_heads=(HEADS, HEADS))


def linked(rank, seed):
    draw = torch.Generator().manual_seed(seed)
    weights = LinkedLayer(
        a=torch.randn(rank, HIDDEN, generator=draw),
        b=torch.randn(rank, HIDDEN, generator=draw),
        head_logits=torch.randn(rank, HEADS, generator=draw),
    )
    return LinkedResidual(config=ResidualConfig(r=rank, alpha=2.0 * rank), layers={LAYER: weights}, base=BASE)


def vector(seed):
    values = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(vectors={LAYER: values}, base=BASE)


CHAINS = [
    [(linked(3, 0), 0.7)],
    [(linked(2, 1), 1.0), (vector(2), 0.5), (linked(5, 3), -0.5), (vector(4), 2.0)],
    [(vector(5), 1.0), (linked(4, 6), 1.5)],
    [],
]
ROWS = [(0, 4), (4, 9), (9, 11), (11, 14), (14, 16)]  # the last one goes through the first chain too
OF_ROWS = [0, 1, 2, 3, 0]


def attention():  # [tokens, heads, tokens], causal in each row
    draw = torch.Generator().manual_seed(9)
    weights = torch.zeros(ROWS[-1][1], HEADS, ROWS[-1][1], dtype=torch.float64)
    for start, stop in ROWS:
        n = stop - start
        logits = torch.randn(n, HEADS, n, generator=draw, dtype=torch.float64)
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1).unsqueeze(1)
        weights[start:stop, :, start:stop] = torch.softmax(logits.masked_fill(hidden, -torch.inf), dim=-1)
    return weights


def expected(x, weights):
    """The formula of docs/linked-adapters.md, row by row."""
    total = torch.zeros_like(x)
    for (start, stop), number in zip(ROWS, OF_ROWS, strict=True):
        own, seen = weights[start:stop, :, start:stop], torch.zeros(stop - start, HIDDEN, dtype=torch.float64)
        for residual, weight in CHAINS[number]:
            if isinstance(residual, SteeringVector):
                seen = seen + weight * residual.vectors[LAYER].double()
                continue
            layer = residual.layers[LAYER]
            u = (x[start:stop] + seen) @ layer.a.double().t()
            mix = torch.softmax(layer.head_logits.double(), dim=-1)
            v = torch.einsum("kh,ths,sk->tk", mix, own, u)
            seen = seen + weight * residual.config.scaling * v @ layer.b.double()
        total[start:stop] = seen
    return total


def made(heads):
    routes = []
    for number, chain in enumerate(CHAINS[:3]):
        links = [ChainLink(name=str(i), residual=residual, weight=weight) for i, (residual, weight) in enumerate(chain)]
        tokens = [t for row, own in zip(ROWS, OF_ROWS, strict=True) if own == number for t in range(*row)]
        routes.append(LinkedRoute(LinkedChain(links, heads), token_index(tokens)))
    return LinkedPass(routes)


@pytest.fixture
def x():
    return torch.randn(ROWS[-1][1], HIDDEN, generator=torch.Generator().manual_seed(1))


def attend(weights):
    return lambda number, u: torch.einsum("ths,sk->thk", weights, u.double())


def test_chains_of_several_rows_equal_the_formula(x):
    weights = attention()
    found = made(slice(0, HEADS)).residual(LAYER, x, attend(weights), None)
    torch.testing.assert_close(found.double(), expected(x.double(), weights), rtol=1e-5, atol=1e-5)
    wrong = attend(weights.flip(1))  # the control: heads that are mixed up
    assert (made(slice(0, HEADS)).residual(LAYER, x, wrong, None) - found).abs().max() > 0.1


def test_heads_of_two_workers_make_the_same_together(x):
    """Both workers run the same steps; each knows its own heads, and the sums come from both."""
    weights, whole = attention(), made(slice(0, HEADS))
    parts = [made(slice(0, 2)), made(slice(2, 4))]
    shared = []

    def noting(number, u):
        shared.append(u)
        return attend(weights[:, :2])(number, u)

    def both(v):
        u = shared[-1]
        (other,) = [_mixed(parts[1], len(shared) - 1, attend(weights[:, 2:])(0, u), v)]
        return v + other

    found = parts[0].residual(LAYER, x, noting, both)
    torch.testing.assert_close(found, whole.residual(LAYER, x, attend(weights), None), rtol=1e-5, atol=1e-5)


def _mixed(part, number, heard, like):
    """What the second worker adds at one step."""
    v = torch.zeros_like(like)
    for route in part._routes:
        steps = route.chain.layers[LAYER].steps
        if number < len(steps):
            step = steps[number]
            v[route.tokens, : step.rank] = (heard[route.tokens, :, : step.rank].float() * step.mix).sum(dim=1)
    return v


def test_layer_without_residuals_isnt_reached(x):
    assert made(slice(0, HEADS)).reaches(LAYER)
    assert not made(slice(0, HEADS)).reaches(LAYER - 1)
