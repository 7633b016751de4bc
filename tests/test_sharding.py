"""DDP, FSDP2 and others in two and three real processes on gloo, which run this file once for all tests.

What needs no second count of ranks is checked on two alone.
"""

import copy
import gc
import json
import subprocess
import sys
import traceback
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import tethertune as tt
from tethertune import norms, rows
from tethertune.errors import ConfigurationError, NonFiniteWeightError
from tethertune.sharding import full, is_sharded, local, reduce_over_shards, shard_like

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


def inside(model, norm, at_least=2):
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
    assert sum(share > 0.99 for share in shares) >= at_least, "nothing was outside, so nothing was tested"


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
    rank = dist.get_rank()
    assert len(local(model[3].weight)) == {2: (4, 3), 3: (3, 3, 1)}[dist.get_world_size()][rank]
    assert len(local(model[5].weight)) == (1, 0, 0)[rank]


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
            copies = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
            dist.all_gather(copies, parameter.detach())
            assert all(torch.equal(bits(copies[0]), bits(other)) for other in copies[1:])
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
    from torch.distributed.tensor import Shard

    for make, options in (
        (lambda: Conv1D(8, 6), {}),
        (lambda: nn.ConvTranspose2d(4, 6, 3), {}),
        (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), {}),
        (lambda: nn.Linear(8, 6, bias=False), {"shard_placement_fn": lambda _: Shard(1)}),
    ):
        torch.manual_seed(0)
        whole = make()
        model = fully_shard(copy.deepcopy(whole), **options)
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


def weakly(tensors):
    """Storages that nobody must keep, by weak references."""
    return [weakref.ref(tensor.untyped_storage()) for tensor in tensors]


def private(constraint):
    return constraint.memory().reference


def own_bytes(model):
    return sum(local(model[i].weight).numel() * 4 for i in (0, 3))


def check_a_reference_of_any_origin_is_sharded_like_the_weights():
    """Private memory is this rank's part alone; of a file it is nothing, and a step reads this rank's rows there."""
    whole = network()
    for origin in ("snapshot before", "snapshot after", "state dict", "file"):
        model = network()
        source = {"state dict": whole.state_dict(), "file": Path(sys.argv[2], "start.safetensors")}.get(origin)
        constraint = constrained(model) if origin == "snapshot before" else None
        if constraint is not None:
            kept = [constraint._reference.stored(name) for name in ("0.weight", "3.weight")]
            gone = weakly(kept)
            assert private(constraint) == sum(t.numel() * 4 for t in kept)
            del kept
            gc.collect()
            assert None not in [of() for of in gone]
        model = fully_sharded(model)
        constraint = constraint or constrained(model, reference=source)
        constraint.project()
        assert private(constraint) == (0 if origin == "file" else own_bytes(model)), origin
        for i in (0, 3):
            beside = constraint._reference.beside(constraint._balls[i // 3].layer)
            assert torch.equal(beside, local(model[i].weight.detach()))
            if origin == "file":
                stored = constraint._reference.stored(f"{i}.weight")
                before = stored.shape[0] - len(beside) if dist.get_rank() == dist.get_world_size() - 1 else None
                offset = beside.data_ptr() - stored.data_ptr()
                assert 0 <= offset < stored.numel() * 4
                assert before is None or offset == before * stored[0].numel() * 4
                assert constraint.memory().mapped == sum(model[i].weight.numel() * 4 for i in (0, 3))
        if origin == "snapshot before":
            gc.collect()
            assert [of() for of in gone] == [None, None], "the whole reference is still alive"
        assert constraint.state_dict() == constrained(whole).state_dict()


def check_mixed_precision_keeps_its_sharded_float32_masters_inside():
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for norm in ("mars", "frobenius"):
        model = network()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(model[1])  # batch norm stays in float32
        for layer in (model[0], model[3], model[5]):
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        constraint = constrained(model, norm)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        constraint.attach(optimizer)
        for step in range(STEPS):
            optimizer.zero_grad()
            x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(step))
            model(x).square().sum().backward()
            optimizer.step()
            assert local(model[3].weight).dtype == torch.float32
            inside(model, norm, at_least=0 if step == 0 else 2)


def check_resuming_on_another_number_of_ranks():
    """Begun on some of the ranks, gone on with on all of them: bit for bit what one process would have done."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    folder, few = Path(sys.argv[2]), dist.get_world_size() - 1
    alone = network()
    plain = constrained(alone)
    train(alone, plain)
    mesh = init_device_mesh("cpu", (few, 1) if few > 1 else (1, 1), mesh_dim_names=("shard", "one"))["shard"]
    if dist.get_rank() < few:
        model = network()
        for layer in (model[0], model[1], model[3], model[5]):
            fully_shard(layer, mesh=mesh)
        constraint = constrained(fully_shard(model, mesh=mesh))
        train(model, constraint)
        saved = {"model": {n: full(p).detach() for n, p in model.state_dict().items()}, "ball": constraint.state_dict()}
        if dist.get_rank() == 0:
            torch.save(saved, folder / "checkpoint.pt")
    dist.barrier()
    saved = torch.load(folder / "checkpoint.pt")
    model = network()
    model.load_state_dict(saved["model"])
    model = fully_sharded(model)
    constraint = tt.Constraint(model, radius=9.0, head="5", reference=folder / "start.safetensors")
    constraint.load_state_dict(saved["ball"])
    same_distances(plain.distances(), constraint.distances())
    train(alone, plain)
    train(model, constraint)
    for one, other in zip(alone.parameters(), model.parameters(), strict=True):
        assert torch.equal(bits(one.detach()), bits(full(other).detach()))
    inside(model, "mars")


def check_a_broken_row_hangs_nobody():
    for norm in ("mars", "frobenius"):
        model = fully_sharded(network())
        constraint = constrained(model, norm)
        if dist.get_rank() == 1:
            with torch.no_grad():
                local(model[3].weight)[1, 0] = float("nan")
        here, everywhere = r"Row 1 of 3\.weight \(of this rank's part, rank 1\)", "A row on another rank holds a NaN"
        if dist.get_rank() == 1 or norm == "frobenius":
            with pytest.raises(NonFiniteWeightError, match=here if dist.get_rank() == 1 else everywhere):
                constraint.project()
        else:
            constraint.project()
        constraint._count_broken(int(dist.get_rank() == 1), torch.device("cpu"))
        with pytest.raises(NonFiniteWeightError, match=here if dist.get_rank() == 1 else everywhere):
            constraint.distances()


def check_the_redundancy_free_optimizer():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for norm in ("mars", "frobenius"):
        model = network()
        constraint = constrained(model, norm)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.05)
        constraint.attach(optimizer)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.ones(4, 3, 2, 2)).square().sum().backward()
            optimizer.step()
            inside(model, norm)
        for parameter in model.parameters():
            copies = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
            dist.all_gather(copies, parameter.detach())
            assert all(torch.equal(bits(copies[0]), bits(other)) for other in copies[1:])


def check_an_optimizer_in_the_backward_pass_of_sharded_weights():
    model = fully_sharded(network())
    constraint = constrained(model)
    optimizers = {parameter: torch.optim.Adam([parameter], lr=0.05) for parameter in model.parameters()}
    constraint.attach(*optimizers.values())
    for parameter, optimizer in optimizers.items():
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    for step in range(STEPS):
        model(torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        inside(model, "mars")
        for parameter in model.parameters():
            parameter.grad = None


def check_tensor_parallelism_is_right_or_refused():
    """Columns of a layer over ranks, rows of the next; alone, and under FSDP2, which shards the shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        for norm in ("mars", "frobenius"):
            torch.manual_seed(0)
            whole = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7))
            model = parallelize_module(
                copy.deepcopy(whole), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()}
            )
            for layer in (model[0], model[2]):
                fully_shard(layer, mesh=mesh["data"])
            if norm == "mars":
                with pytest.raises(ConfigurationError, match=r"2\.weight is sharded as .*, which spreads its rows"):
                    tt.Constraint(model, radius=0.5, reference=whole).project()
            options = {"exclude": ["2"]} if norm == "mars" else {}
            constraint = tt.Constraint(model, norm=norm, radius=0.5, reference=whole.state_dict(), **options)
            with torch.no_grad():
                for parameter in model.parameters():
                    local(parameter).add_(1.0)
            constraint.project()
            for i in (0,) if norm == "mars" else (0, 2):
                T = full(model[i].weight).detach().double() - whole[i].weight.detach().double()
                distance = norms.mars(T) if norm == "mars" else norms.frobenius(T)
                assert 0.5 * (1 - 1e-4) < distance <= 0.5
            assert constraint.state_dict() == tt.Constraint(whole, norm=norm, radius=0.5, **options).state_dict()


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
ON_THREE = [
    "shards_are_uneven",
    "ddp_replicas_stay_equal_and_inside",
    "fsdp_mars_is_bit_for_bit_the_single_process",
    "fsdp_frobenius_is_inside_with_one_reduction_for_all_layers",
    "a_reference_of_any_origin_is_sharded_like_the_weights",
    "resuming_on_another_number_of_ranks",
]
CASES = [(2, name) for name in CHECKS] + [(3, name) for name in ON_THREE]


def run(rank, folder, ranks):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    faults = {}
    for name in CHECKS if ranks == 2 else ON_THREE:
        try:
            CHECKS[name]()
            faults[name] = ""
        except Exception:  # noqa: BLE001
            faults[name] = traceback.format_exc()
        Path(folder, f"{rank}.json").write_text(json.dumps(faults))
        dist.barrier()
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """By number of ranks, what went wrong on each rank, by check."""
    found = {}

    def on(ranks):
        if ranks not in found:
            folder = tmp_path_factory.mktemp(f"{ranks}-ranks")
            save_file(network().state_dict(), folder / "start.safetensors")
            command = [sys.executable, "-W", "ignore", __file__]
            processes = [
                subprocess.Popen([*command, str(rank), str(folder), str(ranks)], stderr=subprocess.PIPE, text=True)
                for rank in range(ranks)
            ]
            errors = [process.communicate(timeout=600)[1] for process in processes]
            files = [folder / f"{rank}.json" for rank in range(ranks)]
            assert all(path.exists() for path in files), "\n".join(errors)
            found[ranks] = [json.loads(path.read_text()) for path in files]
        return found[ranks]

    return on


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_on_ranks(ranks, name, faults):
    for rank, of_rank in enumerate(faults(ranks)):
        assert of_rank.get(name, "was not reached") == "", f"rank {rank}: {of_rank.get(name, 'was not reached')}"


def test_a_tensor_that_is_not_sharded_is_itself():
    weight = torch.ones(3, 2)
    assert not is_sharded(weight)
    assert local(weight) is full(weight) is shard_like(weight, weight) is weight
    assert reduce_over_shards([weight], [weight])[0] is weight


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
