"""The step of other methods that hold weights near pre-trained ones, beside ours: time, copies kept, what it leaves.

Each is written here anew from the mathematics of its publication, in plain PyTorch, tensor by tensor, as its authors'
code is; it is the work that a method does beside the optimiser's step on the linear maps of a network. Their learnt
quantities are as far as a step needs them. All rows (or layers) have moved outside before each call.

- Keras constraint: H. Gouk, T. M. Hospedales, M. Pontil, "Distance-Based Regularisation of Deep Networks for
  Fine-Tuning", ICLR 2021, arXiv:2002.08253; the projection of Algorithm 1 as a constraint of each variable.
- TPGM: J. Tian et al., "Trainable Projected Gradient Method for Robust Fine-tuning", CVPR 2023, arXiv:2303.10720; with
  its radii no longer trained.
- FTP: J. Tian et al., "Fast Trainable Projection for Robust Fine-tuning", NeurIPS 2023, arXiv:2310.19182.
- SPD: J. Tian, C. Huang, Z. Kira, "Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models", NeurIPS 2024,
  arXiv:2411.01713.
- l2-SP: X. Li, Y. Grandvalet, F. Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
  ICML 2018, arXiv:1802.01483; half the squared distance, in the loss.

    python benchmarks/rivals.py --model resnet101
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import common
import torch
from common import Action
from setting import Setting
from torch import Tensor, nn

import tethertune as tt
from tethertune import norms

TINY = 1e-8  # what TPGM and FTP add to a norm


@dataclass
class Layers:
    """Weights, their reference and their radii; a row is an entry of axis 0."""

    weights: Sequence[nn.Parameter]
    centres: Sequence[Tensor]
    radii: Sequence[float]

    @classmethod
    def of(cls, setting: Setting) -> "Layers":
        """Those of a setting, with the radii that all rows are outside of."""
        radii = setting.radii("mars", "outside")
        names = [layer.name for layer in setting.layers]
        assert all(layer.rows.axis == 0 and layer.rows.groups == 1 for layer in setting.layers)
        centres = [setting.reference[name].clone() for name in names]
        return cls([layer.weight for layer in setting.layers], centres, [radii[name] for name in names])


def row_norms(T: Tensor) -> Tensor:
    """The l1 norm of each row, in a shape that multiplies T."""
    return T.abs().sum(dim=tuple(range(1, T.ndim)), keepdim=True)


@torch.no_grad()
def keras_constraint(layers: Layers) -> None:
    r"""Every row to :math:`w_0 + t / \max(1, \|t\|_1 / \gamma)`, whether outside or not."""
    for weight, centre, radius in zip(layers.weights, layers.centres, layers.radii, strict=True):
        T = weight - centre
        weight.copy_(centre + T * (1 / (row_norms(T) / radius).clamp(min=1)))


@torch.no_grad()
def tpgm(layers: Layers) -> None:
    r"""Every row to :math:`w_0 + \min(1, \gamma / \|t\|_1) \, t`, with one radius a tensor."""
    for weight, centre, radius in zip(layers.weights, layers.centres, layers.radii, strict=True):
        T = weight - centre
        weight.copy_(centre + (radius / (row_norms(T) + TINY)).clamp(0, 1) * T)


@dataclass
class FTP:
    r"""As TPGM, with radii trained on the batch itself by the gradient of the loss after the step before.

    With the displacement t of the step before, the derivative of the loss along a tensor's radius is
    :math:`\sum_r \langle g_r, t_r \rangle / \|t_r\|_1`, which Adam follows; a radius is at most the largest row.
    """

    layers: Layers
    rate: float = 1e-2
    before: list[Tensor] = field(default_factory=list)
    radii: list[Tensor] = field(default_factory=list)
    moments: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    steps: int = 0

    @torch.no_grad()
    def step(self) -> None:
        """Train the radii, and project."""
        if not self.before:
            self.before = [
                weight - centre for weight, centre in zip(self.layers.weights, self.layers.centres, strict=True)
            ]
            self.radii = [torch.tensor(radius) for radius in self.layers.radii]
            self.moments = [(torch.zeros(()), torch.zeros(())) for _ in self.radii]
        self.steps += 1
        for i, (weight, centre) in enumerate(zip(self.layers.weights, self.layers.centres, strict=True)):
            T = weight - centre
            sizes = row_norms(T) + TINY
            assert weight.grad is not None
            self._train(i, (weight.grad * self.before[i] / (row_norms(self.before[i]) + TINY)).sum())
            self.radii[i].clamp_(min=TINY, max=float(sizes.max()))
            weight.copy_(centre + (self.radii[i] / sizes).clamp(0, 1) * T)
            self.before[i].copy_(T)

    def _train(self, i: int, gradient: Tensor) -> None:
        first, second = self.moments[i]
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        corrected = (second / (1 - 0.999**self.steps)).sqrt() + TINY
        self.radii[i].sub_(self.rate * first / (1 - 0.9**self.steps) / corrected)


@dataclass
class SPD:
    r"""Weight decay towards the reference, in the tensors whose gradient points away from it.

    Where :math:`-\langle g, w - w_0 \rangle < 0`, a step's result w' becomes :math:`w' - \lambda r (w' - w_0)` with
    :math:`r = (\|w' - w_0\| - \|w - w_0\|) / \|w' - w_0\|` in [0, 1]. With random gradients that is every other tensor.
    """

    layers: Layers
    decay: float = 1e-3
    start: list[Tensor] = field(default_factory=list)
    away: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def before(self) -> None:
        """Look at the gradients and distances that the optimiser's step begins with."""
        self.start, self.away = [], []
        for weight, centre in zip(self.layers.weights, self.layers.centres, strict=True):
            T = weight - centre
            assert weight.grad is not None
            self.start.append(T.norm())
            self.away.append((weight.grad * T).sum() > 0)

    @torch.no_grad()
    def after(self) -> None:
        """Decay what the step has moved."""
        columns = (self.layers.weights, self.layers.centres, self.start, self.away)
        for weight, centre, start, away in zip(*columns, strict=True):
            if away:
                T = weight - centre
                size = T.norm()
                weight.sub_(self.decay * ((size - start) / size).clamp(0, 1) * T)

    def step(self) -> None:
        """Both."""
        self.before()
        self.after()


def l2_sp(layers: Layers) -> None:
    """Half the squared distance of all layers, and its gradient by autograd."""
    terms = [(w - c).square().sum() for w, c in zip(layers.weights, layers.centres, strict=True)]
    (0.5e-9 * torch.stack(terms).sum()).backward()  # type: ignore[no-untyped-call]


def outside(setting: Setting) -> float:
    """The share of rows that are outside of their ball, in float64 from the stored weights."""
    radii = setting.radii("mars", "outside")
    count = total = 0
    for layer in setting.layers:
        T = layer.rows.matrix(layer.weight.detach().double() - setting.reference[layer.name].double())
        distances = norms.row_sums(T)
        count += int((distances > radii[layer.name]).sum())
        total += len(distances)
    return count / total


def variants(setting: Setting) -> dict[str, tuple[Action, int, bool]]:
    """By name: the step, the copies of the weights that it keeps, and whether it promises the balls of the setting."""
    layers = Layers.of(setting)
    penalty = tt.Penalty(setting.model, strength=1e-9, reference=setting.reference)
    pull = partial(penalty._add_gradient, torch.optim.SGD(setting.parameters, lr=0.0))
    return {
        "tethertune MARS-PGM": (setting.constraint("mars", "outside").project, 1, True),
        "Keras constraint (Gouk et al.)": (partial(keras_constraint, layers), 1, True),
        "TPGM, radii frozen": (partial(tpgm, layers), 1, True),
        "FTP": (FTP(layers).step, 2, False),
        "tethertune l2-PGM": (setting.constraint("frobenius", "outside").project, 1, False),
        "SPD": (SPD(layers).step, 1, False),
        "tethertune l2-SP": (pull, 1, False),
        "l2-SP in the loss (Li et al.)": (partial(l2_sp, layers), 1, False),
    }


def run(setting: Setting, rounds: int, *, cpu_time: bool) -> dict[str, dict[str, Any]]:
    """Time all of them beside Adam, and look at what each leaves outside."""
    adam = torch.optim.Adam(setting.parameters, lr=0.0, fused=True)
    found = variants(setting)
    actions = {name: action for name, (action, _, _) in found.items()}
    timings = common.measure(adam.step, actions, rounds=rounds, before=setting.move, cpu_time=cpu_time)
    results = {}
    for name, (action, copies, promises) in found.items():
        setting.move()
        action()
        left = round(outside(setting), 4) if promises else None
        results[name] = {**timings[name].summary(), "copies": copies, "outside": left}
    return results


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", nargs="+", default=["resnet101"], help="timm names (default: resnet101)")
    arguments = parser.parse_args()
    common.start(arguments)
    results = {}
    for name in arguments.model:
        setting = Setting.of(common.network(name))
        results[name] = run(setting, arguments.rounds, cpu_time=common.alone(arguments))
        rows = []
        for variant, found in results[name].items():
            low, median, high = found["ratio"]
            left = "" if found["outside"] is None else f"{found['outside']:.1%}"
            cells = [f"{median:.2f}", f"{low:.2f}-{high:.2f}", f"{found['milliseconds']:.1f}"]
            rows.append([variant, *cells, str(found["copies"]), left])
        head = ["time / fused Adam step", "median", "quartiles", "ms", "copies kept", "rows left outside"]
        print(f"\n{name}, {common.millions(setting.model)}, float32, {arguments.threads} thread(s)\n")
        print("\n".join(common.table(head, rows)), flush=True)
    common.record(arguments, results)


if __name__ == "__main__":
    main()
