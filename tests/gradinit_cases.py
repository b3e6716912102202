"""Problems for the GradInit tests, and the gradinit package run on them: as a script, for it may abort at exit."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

import gradnorm_func as gn

STEPS = 20
CASES = ("mlp", "cnn", "transformer")


class Attention(nn.Module):
    """A Post-LN block whose every parameter is used by the module that owns it, which is all the package can scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = self.norm1(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


def model(case: str) -> nn.Module:
    """A small model in float64, the same at every call."""
    torch.manual_seed(7)
    layers = {
        "mlp": lambda: [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)],
        "cnn": lambda: [
            *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU()),
            *(nn.Conv2d(4, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)),
        ],
        "transformer": lambda: [nn.Linear(3, 4), Attention(4), nn.Flatten(), nn.Linear(20, 4)],
    }
    made = nn.Sequential(*layers[case]()).double().train()
    with torch.no_grad():
        for parameter in made.parameters():  # away from zeros and ones, so that nothing is trivially right
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def minibatches(case: str, count: int = STEPS, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels, the same at every call."""
    shape = {"mlp": (6,), "cnn": (1, 6, 6), "transformer": (5, 3)}[case]
    make = torch.Generator().manual_seed(11)
    return [
        (
            torch.randn(size, *shape, generator=make, dtype=torch.float64),
            torch.randint(0, 4, (size,), generator=make),
        )
        for _ in range(count)
    ]


def problem(case: str) -> tuple[dict[str, Tensor], Any]:
    """Parameters and cross-entropy of a model."""
    net = model(case)
    call = gn.functional(net, buffers=False)
    loss_fn = lambda params, batch: nn.functional.cross_entropy(call(params, batch[0]), batch[1])
    return dict(net.named_parameters()), loss_fn


def small() -> tuple[Any, tuple[Tensor, Tensor]]:
    """Two weights, a bias, and a target that no scale reaches."""
    make = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64)
    params = {"a": {"weight": draw(3, 4), "bias": draw(3)}, "b": {"weight": draw(2, 3)}}
    batch = (draw(7, 4), draw(7, 2))
    return params, batch


def small_loss(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of `small`."""
    hidden = torch.tanh(nn.functional.linear(batch[0], params["a"]["weight"], params["a"]["bias"]))
    return (nn.functional.linear(hidden, params["b"]["weight"]) - batch[1]).square().mean()


def run(
    params: Any, loss_fn: Any, batches: Any, optimizer: Any = None, **hyper: Any
) -> tuple[list[gn.GradInitState], list[gn.GradInitInfo]]:
    """The state and the Info of every step."""
    state = gn.gradinit_init_state(params, optimizer=optimizer)
    states, infos = [], []
    for batch in batches:
        state, info = gn.gradinit_step(state, params, loss_fn, batch, optimizer=optimizer, **hyper)
        states.append(state)
        infos.append(info)
    return states, infos


def first_norm(case: str, p: int) -> float:
    """The gradient norm of the first step."""
    params, loss_fn = problem(case)
    _, infos = run(params, loss_fn, minibatches(case, 3), p=p, gamma=1.0)
    return float(infos[0].grad_norm)


def package(case: str, p: int, gamma: float) -> tuple[dict[str, Tensor], list[bool]]:
    """Every scale after each of the steps, by path, and whether the step descended the norm."""
    from gradinit import GradInitWrapper

    net = model(case)
    names = [name for name, _ in net.named_parameters()]
    wrapper = GradInitWrapper(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    history: list[dict[str, float]] = []
    above: list[bool] = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for x, y in minibatches(case):
            loss = nn.functional.cross_entropy(net(x), y)
            objective = wrapper.grad_loss(loss, norm=p, gamma=gamma)
            above.append(objective is not loss)
            optimizer.zero_grad()
            objective.backward()
            optimizer.step()
            wrapper.clamp_scales()
            scales = {name.removesuffix("_gradinit_scale_factor"): s.item() for name, s in net.named_parameters()}
            history.append(scales)
    wrapper.detach()
    assert sorted(names) == sorted(history[0])
    return {name: torch.tensor([row[name] for row in history], dtype=torch.float64) for name in names}, above


if __name__ == "__main__":
    torch.set_num_threads(1)
    *runs, file = sys.argv[1:]
    triples = [run.split(":") for run in runs]
    torch.save({(case, int(p)): package(case, int(p), float(gamma)) for case, p, gamma in triples}, file)
