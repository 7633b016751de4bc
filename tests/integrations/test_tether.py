"""What all callbacks share, through the life of a training, on networks and optimisers as trainers hand them over."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import tethertune as tt
from tethertune import norms
from tethertune.errors import AttachError, ConfigurationError, ReferenceMismatchError
from tethertune.integrations.tether import Tether, measure_constraint, measure_penalty

torch.set_num_threads(1)

RADIUS = 0.5


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3))


def tether(kind=tt.Constraint, log="summary", **options):
    return Tether(kind, ({"radius": RADIUS} if kind is tt.Constraint else {"strength": 0.1}) | options, log)


def moved(model, by=1.0):
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)), alpha=by)
    return model


def centre(built):
    return built._reference["0.weight"]


def distances(model, start, norm, head=None):
    """Of the three linear maps, without the constraint's own measure."""
    found = {}
    for number in (0, 3, 4):
        name = f"{number}.weight"
        T = model.get_parameter(name).detach().double() - (0 if number == head else start[name].double())
        found[name] = float(getattr(norms, norm)(T.flatten(1)))
    return found


def inside(constraint):
    return all(d.value <= d.radius for d in constraint.distances().values())


def test_the_reference_is_the_model_as_it_was_first_seen_also_once_it_is_wrapped():
    model, ours = network(), tether()
    start = copy.deepcopy(model.state_dict())
    ours.take_reference(model)
    ours.take_reference(moved(model))
    wrapped = nn.Sequential(model)
    assert ours.begin(wrapped, resumed=True) is ours.built
    assert torch.equal(centre(ours.built), start["0.weight"])


@pytest.mark.parametrize("make", [nn.Identity, lambda: network().to("meta")], ids=["none yet", "meta"])
def test_weights_that_are_not_there_are_no_reference(make):
    ours, model = tether(), network()
    ours.take_reference(make())
    assert ours.built is None
    with pytest.raises(ReferenceMismatchError, match="has not seen the pre-trained ones"):
        ours.begin(model, resumed=True)
    assert torch.equal(centre(ours.begin(model, resumed=False)), model[0].weight)


def test_a_model_that_is_made_anew_is_held_around_the_old_reference_only_if_it_holds_a_checkpoint():
    first, second = network(), moved(network())
    for resumed, expected in ((True, first), (False, second)):
        ours = tether()
        ours.take_reference(first)
        old = ours.built
        assert ours.begin(second, resumed=resumed) is not old
        assert torch.equal(centre(ours.built), expected[0].weight)


@pytest.mark.filterwarnings("ignore")  # PyTorch's, of one rank and of a class that has a successor
def test_parameters_that_are_flattened_are_refused_wherever_in_the_model():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        flat = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
        with pytest.raises(AttachError, match=r"flattens the parameters, .* use FSDP2"):
            tether().begin(nn.Sequential(nn.Identity(), flat), resumed=False)
    finally:
        dist.destroy_process_group()


def test_a_reference_that_is_given_counts_whatever_the_model_holds():
    given, model = network(seed=1), moved(network())
    ours = tether(reference=given.state_dict())
    ours.take_reference(model)
    assert torch.equal(centre(ours.built), given[0].weight)
    other = tether(reference=given.state_dict())
    assert torch.equal(centre(other.begin(model, resumed=True)), given[0].weight)


@pytest.mark.parametrize("kind", [tt.Constraint, tt.Penalty])
def test_the_same_optimiser_is_attached_to_once_and_another_one_again(kind):
    model, ours = network(), tether(kind)
    ours.begin(model, resumed=False)
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    ours.attach(first)
    ours.attach(first)
    assert len(first._optimizer_step_post_hooks) == 1
    ours.attach(second)
    assert len(second._optimizer_step_post_hooks) == 1


def test_training_again_begins_inside_although_nothing_is_attached():
    model, ours = network(), tether()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ours.begin(model, resumed=False)
    for _ in range(2):
        moved(model)
        assert not inside(ours.built)
        ours.attach(optimizer)
        assert inside(ours.built)


@pytest.mark.parametrize("kind", [tt.Constraint, tt.Penalty])
def test_what_a_checkpoint_says_is_compared_with_what_is_there(kind):
    def built(model, **options):
        ours = tether(kind, **options)
        ours.begin(model, resumed=False)
        return ours

    name = kind.__name__.lower()
    saved = built(network()).built.state_dict()
    built(network()).check(saved)
    built(network()).check(saved | {"settings": saved["settings"] | {"of a later version": 1}})
    with pytest.raises(ReferenceMismatchError, match=f"without this {name}, .* start a new training"):
        built(network()).check(None)
    with pytest.raises(ReferenceMismatchError, match="original pre-trained"):
        built(network(seed=1)).check(saved)
    key, value, other = ("radius", RADIUS, 0.7) if kind is tt.Constraint else ("strength", 0.1, 0.2)
    with pytest.raises(ConfigurationError, match=f"saved with {key}={value}, this {name} has {other}: resume with"):
        built(network(), **{key: other}).check(saved)


def test_a_kind_of_log_that_there_is_not_is_refused_with_the_nearest():
    with pytest.raises(ConfigurationError, match=r"log='sumary' is not known: .* Did you mean 'summary'\?"):
        tether(log="sumary")


@pytest.mark.parametrize("norm", ["mars", "frobenius"])
def test_shares_of_the_radii_by_their_definition(norm):
    model = network()
    start = copy.deepcopy(model.state_dict())
    constraint = tt.Constraint(model, norm=norm, radius={"0.*": 50.0, "3.*": 2.0, "4.*": 0.0})
    moved(model, by=0.2)
    constraint.project()
    found = distances(model, start, norm)
    shares = [found["0.weight"] / 50, found["3.weight"] / 2, 0.0]
    assert 0 < shares[0] < 0.9
    assert 0.99 < shares[1] <= 1
    summary = {"tether/largest_share": shares[1], "tether/median_share": shares[0], "tether/layers_at_radius": 1 / 3}
    by_layer = {f"distance/{name}": distance for name, distance in found.items()}
    assert measure_constraint(constraint, "summary") == pytest.approx(summary, rel=1e-9)
    assert measure_constraint(constraint, "layers") == pytest.approx(summary | by_layer, rel=1e-9)
    assert measure_constraint(constraint, "off") == {}


def test_where_all_layers_are_free_all_shares_are_0():
    free = tt.Constraint(network(), radius=math.inf)
    assert set(measure_constraint(free, "layers").values()) == {0.0}


@pytest.mark.parametrize("norm", ["mars", "frobenius"])
def test_the_price_and_the_distances_of_a_penalty_by_their_definition(norm):
    model = network()
    start = copy.deepcopy(model.state_dict())
    penalty = tt.Penalty(model, norm=norm, strength=0.3, head="4", head_strength=0.7, factor=0.5)
    moved(model)
    found = distances(model, start, norm, head=4)
    priced = [d**2 if norm == "frobenius" else d for d in found.values()]
    price = {"tether/penalty": 0.5 * (0.3 * priced[0] + 0.3 * priced[1] + 0.7 * priced[2])}
    by_layer = {f"distance/{name}": distance for name, distance in found.items()}
    assert measure_penalty(penalty, "summary") == pytest.approx(price, rel=1e-5)
    assert measure_penalty(penalty, "layers") == pytest.approx(price | by_layer, rel=1e-5)
    assert measure_penalty(penalty, "off") == {}


def test_the_distances_of_a_penalty_of_the_authors_convention_add_up_to_it():
    model = network()
    penalty = tt.Penalty(model, norm="mars", strength=1.0, convention="authors")
    moved(model)
    values = measure_penalty(penalty, "layers")
    price = values.pop("tether/penalty")
    assert sum(values.values()) == pytest.approx(price, rel=1e-5)
