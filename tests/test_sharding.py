"""DDP and FSDP2 in two real processes on gloo. This file is also the program that they run, once for all tests."""

import copy
import json
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tethertune as tt
from tethertune import norms, rows
from tethertune.errors import ConfigurationError
from tethertune.sharding import full, is_sharded, local, reduce_over_shards, shard_like

RANKS = 2
STEPS = 5
RADIUS, HEAD_RADIUS = 0.05, 0.2


class Conv1D(nn.Module):
    """Laid out as transformers' layer of that name: (in, out)."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, columns, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(columns, outputs))


def network(dtype=torch.float32):
    """Seven rows, which two ranks cannot halve; a convolution; and a head of one row, of which rank 1 has nothing."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 7), nn.ReLU(), nn.Linear(7, 1)
    ).to(dtype)


def fully_sharded(model):
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[1], model[3], model[5]):
        fully_shard(layer)
    return fully_shard(model)


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def train(model, constraint):
    """Steps along the same gradients, whole or sharded; of size 1: PyTorch rounds those alike in every shard."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    constraint.attach(optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        for parameter in model.parameters():
            gradient = (torch.randn(parameter.shape, generator=generator) / 20).to(parameter.dtype)
            parameter.grad = gradient
            if is_sharded(parameter):
                from torch.distributed.tensor import distribute_tensor

                parameter.grad = distribute_tensor(
                    gradient, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
        optimizer.step()


def constrained(model, norm="mars", **options):
    return tt.Constraint(model, norm=norm, radius=RADIUS, head="5", head_radius=HEAD_RADIUS, **options)


def both(norm, *, built, dtype=torch.float32, **options):
    """One network trained in this process alone, and its twin trained sharded."""
    alone = network(dtype)
    plain = constrained(alone, norm, **options)
    train(alone, plain)
    model = network(dtype)
    if built == "before":
        constraint = constrained(model, norm, **options)
        model = fully_sharded(model)
    else:
        model = fully_sharded(model)
        constraint = constrained(model, norm, **options)
    train(model, constraint)
    return alone, plain, model, constraint


def collectives(constraint):
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as counter:
        constraint.project()
    return counter.get_total_counts()


def inside(model, norm):
    """The promise, from the whole weights in float64, without the constraint's own measure."""
    start = network(next(model.parameters()).dtype)
    shares = []
    for layer, before in zip(rows.layers(model, head="5"), rows.layers(start, head="5"), strict=True):
        if layer.rows.kind == "map":
            centre = torch.zeros_like(before.weight) if layer.role == "head" else before.weight
            T = layer.rows.matrix(full(layer.weight).detach().double() - centre.detach().double())
            distance = norms.mars(T) if norm == "mars" else norms.frobenius(T)
            shares.append(float(distance) / (HEAD_RADIUS if layer.role == "head" else RADIUS))
    assert max(shares) <= 1
    assert sum(share > 0.99 for share in shares) >= 2, "nothing was outside, so nothing was tested"


def same_distances(one, other):
    assert one.keys() == other.keys()
    for name, distance in one.items():
        assert distance.value == pytest.approx(other[name].value, rel=1e-12)
        assert (distance.radius, distance.active_rows, distance.rows, distance.role) == (
            other[name].radius,
            other[name].active_rows,
            other[name].rows,
            other[name].role,
        )


# ------------------------------------------------------------------------------ what every rank checks, all together


def check_shards_are_uneven():
    model = fully_sharded(network())
    assert len(local(model[3].weight)) == (4, 3)[dist.get_rank()]
    assert len(local(model[5].weight)) == (1, 0)[dist.get_rank()]


def check_ddp_replicas_stay_equal_and_inside():
    """Also when the processes have different numbers of threads."""
    torch.set_num_threads(1 + dist.get_rank())
    for norm in ("mars", "frobenius"):
        model = nn.parallel.DistributedDataParallel(network())
        constraint = tt.Constraint(model, norm=norm, radius=RADIUS, head="5", head_radius=HEAD_RADIUS)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        constraint.attach(optimizer)
        for step in range(STEPS):
            optimizer.zero_grad()
            x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            model(x).square().sum().backward()
            optimizer.step()
        for parameter in model.parameters():
            copies = [torch.empty_like(parameter) for _ in range(RANKS)]
            dist.all_gather(copies, parameter.detach())
            assert torch.equal(bits(copies[0]), bits(copies[1]))
        assert all(d.value <= d.radius for d in constraint.distances().values())
        assert any(d.active_rows for d in constraint.distances().values())
    torch.set_num_threads(1)


def check_fsdp_mars_is_bit_for_bit_the_single_process():
    for built in ("before", "after"):
        for projection in ("radial", "euclidean"):
            for dtype in (torch.float32, torch.bfloat16):
                alone, plain, model, constraint = both("mars", built=built, projection=projection, dtype=dtype)
                for (name, one), other in zip(alone.named_parameters(), model.parameters(), strict=True):
                    assert torch.equal(bits(one.detach()), bits(full(other).detach())), (name, built, projection)
                if dtype == torch.float32:
                    inside(model, "mars")
                same_distances(plain.distances(), constraint.distances())
                assert plain.state_dict() == constraint.state_dict()


def check_fsdp_mars_needs_no_communication():
    _, _, _, constraint = both("mars", built="after")
    assert collectives(constraint) == 0


def check_fsdp_frobenius_is_inside_with_one_reduction_for_all_layers():
    for built in ("before", "after"):
        for dtype in (torch.float32, torch.bfloat16):
            alone, plain, model, constraint = both("frobenius", built=built, dtype=dtype)
            if dtype == torch.float32:
                inside(model, "frobenius")
                for one, other in zip(alone.parameters(), model.parameters(), strict=True):
                    torch.testing.assert_close(one.detach(), full(other).detach(), rtol=0, atol=1e-4 * RADIUS)
            distances = constraint.distances()
            assert all(d.value <= d.radius for d in distances.values())
            measured = tt.distances(model, network(dtype), head="5")
            for name, distance in distances.items():
                assert distance.value == pytest.approx(measured[name].frobenius, rel=1e-12)
            assert plain.state_dict() == constraint.state_dict()
            assert collectives(constraint) == 1


def check_fsdp_relative_radii_are_those_of_the_whole_weights():
    for norm in ("mars", "frobenius"):
        alone = tt.Constraint(network(), norm=norm, radius=tt.Relative(0.1))
        sharded = tt.Constraint(fully_sharded(network()), norm=norm, radius=tt.Relative(0.1))
        same_distances(alone.distances(), sharded.distances())


def check_fsdp_authors_convention():
    _, _, model, constraint = both("mars", built="after", convention="authors")
    start = network()[1]
    deviation = (start.running_var.double() + 1e-6).sqrt()
    moved = (full(model[1].weight).detach().double() - start.weight.detach().double()) / deviation
    assert moved.abs().max() <= RADIUS
    assert constraint.distances()["1.weight"].value == pytest.approx(float(moved.abs().max()), rel=1e-12)


def check_fsdp_with_a_reference_in_bfloat16():
    for norm in ("mars", "frobenius"):
        for built in ("before", "after"):
            _, _, model, constraint = both(norm, built=built, reference_dtype=torch.bfloat16)
            measured = tt.distances(model, network(), head="5")
            for name, distance in constraint.distances().items():
                assert getattr(measured[name], norm) <= distance.value <= distance.radius * (1 + 1e-12)


def check_split_rows_are_refused_in_the_mars_norm_alone():
    from torch.distributed.fsdp import fully_shard

    for make in (
        lambda: Conv1D(8, 6),
        lambda: nn.ConvTranspose2d(4, 6, 3),
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    ):
        torch.manual_seed(0)
        whole = make()
        model = fully_shard(copy.deepcopy(whole))
        constraint = tt.Constraint(model, radius=0.5)
        with pytest.raises(ConfigurationError, match=r"weight is sharded as .*, which spreads its rows"):
            constraint.project()
        constraint = tt.Constraint(model, norm="frobenius", radius=0.5)
        with torch.no_grad():
            local(model.weight).add_(1.0)
        constraint.project()
        distance = norms.frobenius(full(model.weight).detach().double() - whole.weight.detach().double())
        assert 0.5 * (1 - 1e-4) < distance <= 0.5


def check_values_are_combined_in_one_call_for_all_meshes():
    from torch.distributed.tensor.debug import CommDebugMode

    model = fully_sharded(network())
    weights = [model[0].weight, torch.ones(3), model[5].weight]
    values = [torch.tensor([1.0, 2.0]) * (dist.get_rank() + 1) for _ in weights]
    with CommDebugMode() as counter:
        total = reduce_over_shards(values, weights, "sum")
    assert counter.get_total_counts() == 1
    assert [t.tolist() for t in total] == [[3, 6], values[1].tolist(), [3, 6]]
    largest = reduce_over_shards(values, weights, "max")
    assert [t.tolist() for t in largest] == [[2, 4], values[1].tolist(), [2, 4]]


def check_shard_like_takes_whole_and_sharded_tensors():
    model, other = fully_sharded(network()), fully_sharded(network())
    weight = network()[3].weight.detach()
    mine = local(model[3].weight)
    assert torch.equal(shard_like(weight, model[3].weight), mine)
    assert torch.equal(shard_like(other[3].weight, model[3].weight), mine)
    assert torch.equal(shard_like(other[3].weight, weight), weight)
    assert shard_like(network()[5].weight, model[5].weight).shape == (1 - dist.get_rank(), 7)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    faults = {}
    for name, check in CHECKS.items():
        try:
            check()
            faults[name] = ""
        except Exception:  # noqa: BLE001
            faults[name] = traceback.format_exc()
        Path(folder, f"{rank}.json").write_text(json.dumps(faults))
        dist.barrier()
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """By check, what went wrong on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-W", "ignore", __file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE, text=True) for rank in range(RANKS)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    found = [folder / f"{rank}.json" for rank in range(RANKS)]
    assert all(path.exists() for path in found), "\n".join(errors)
    return [json.loads(path.read_text()) for path in found]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name, faults):
    for rank, of_rank in enumerate(faults):
        assert of_rank.get(name, "was not reached") == "", f"rank {rank}: {of_rank.get(name, 'was not reached')}"


def test_a_tensor_that_is_not_sharded_is_itself():
    weight = torch.ones(3, 2)
    assert not is_sharded(weight)
    assert local(weight) is full(weight) is shard_like(weight, weight) is weight
    assert reduce_over_shards([weight], [weight])[0] is weight


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2])
