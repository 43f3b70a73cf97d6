"""The data-driven loop beside domino.md section 4 told again slowly, its laws one by one, and two processes."""

from __future__ import annotations

import copy
from fractions import Fraction
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import nmfx
from nmfx.demo.digits import load_digits_data
from nmfx.errors import NmfxError, SearchError
from nmfx.masking.sites import masked_sites

M, LR = 8, 0.01
TARGETS = {"params": 0.75, "macs": 0.6}
EXAMPLE = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
FAST = {"m": M, "decay": 4.0, "penalty_every": 2, "vote_every": 3}  # what takes 30,000 iterations elsewhere takes 100 here


class Net(nn.Module):
    """Rows of 1, 16, 8 (three groups) and 24 channels, and a linear of 32.

    The stem has no choice in the strict layout, few weights and a fifth of the MACs: a MAC budget goes on after every site has
    reached its ERK sparsity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(1, 16, 5, padding=2, bias=False), nn.BatchNorm2d(16)
        self.wide, self.norm2 = nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24)
        self.grouped, self.norm3 = nn.Conv2d(24, 24, 3, padding=1, groups=3, bias=False), nn.BatchNorm2d(24)
        self.point, self.head = nn.Conv2d(24, 32, 1), nn.Linear(32, 10)
        self.double()  # two tellings of one sum differ in the last bit: let no vote hang on it

    def forward(self, x):
        x = F.relu(self.norm2(self.wide(F.relu(self.norm1(self.stem(x))))))
        return self.head(F.relu(self.point(F.relu(self.norm3(self.grouped(x))))).mean((2, 3)))


def batches(seed=0, size=64):
    """The digits without end, in an order of their own for each seed."""
    x, y = load_digits_data()[:2]
    generator = torch.Generator().manual_seed(seed)
    while True:
        index = torch.randint(len(x), (size,), generator=generator)
        yield x[index].double(), y[index]


@cache
def trained_state():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in islice(batches(seed=1), 60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.state_dict()


def pretrained():
    model = Net()
    model.load_state_dict(trained_state())
    return model


def begin(target=None, *, model=None, **settings):
    """A pretrained network in search, and its optimiser."""
    model = pretrained() if model is None else model
    target = TARGETS[settings.get("budget", "params")] if target is None else target
    search = nmfx.DominoSearch(model, target, example_input=EXAMPLE, **(FAST | settings))
    return model, search, torch.optim.SGD(model.parameters(), lr=LR)


def advance(model, search, optimizer, batch):
    """One iteration of the user's loop; the events of it."""
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    events = search.step()
    optimizer.step()
    return events


def run_to_the_end(model, search, optimizer, limit=600):
    for batch in islice(batches(), limit):
        advance(model, search, optimizer, batch)
        if search.done:
            return
    raise AssertionError(f"the budget does not hold after {limit} iterations: {search.committed}")


def masks_of(model):
    """The masks as the last forward pass left them."""
    return {masked.spec.name: masked.owner.get_buffer(f"{masked.attr}_mask") for masked in masked_sites(model)}


def told(event):
    """What domino.md says about a commit: who, from which N to which, and at which iteration."""
    return event.site, event.before.density, event.after.density, event.time


# The plain restatement, from the text alone: domino.md, sections 2, 3, 4 and 6.


def groups_of(weight, m):
    """``(groups, m)``: channels-last, then flattened."""
    if weight.dim() == 4:
        weight = weight.permute(0, 2, 3, 1)
    return weight.reshape(-1, m)


def mask_of(weight, n, m):
    """1 at the `n` largest magnitudes of every group, 0 elsewhere."""
    groups = groups_of(weight.detach().abs(), m)
    mask = torch.zeros_like(groups).scatter(1, groups.topk(n, dim=1).indices, 1.0)
    if weight.dim() == 4:
        out, channels, height, width = weight.shape
        return mask.reshape(out, height, width, channels).permute(0, 3, 1, 2)
    return mask.reshape(weight.shape)


class Layer:
    """One layer with a choice: its working and committed N, and the thresholds of its groups."""

    def __init__(self, site, weight, m):
        self.site, self.weight, self.m = site, weight, m
        self.n = self.committed = m
        self.thresholds = groups_of(weight.detach().abs(), m).sort(dim=1).values[:, : m // 2].mean(dim=1)
        self.mask = torch.ones_like(weight)

    @property
    def density(self):
        return self.committed / self.m

    def satisfied(self):
        """Share of the groups with fewer than n weights above their threshold."""
        above = groups_of(self.weight.detach().abs(), self.m) > self.thresholds[:, None]
        return (above.sum(dim=1) < self.n).double().mean().item()


class Plain:
    """The search of section 4, on a plain network of its own."""

    def __init__(
        self, model, sites, target, *, m, decay, penalty_every, vote_every, budget="params", candidates=None, keep_dense=(),
        layout="strict", eta=True, b1=None, b2=None, quorum=0.75, tolerance=0.001,
        doublings=(30_000, 40_000, 50_000, 60_000, 70_000, 80_000),
    ):  # fmt: skip
        self.model, self.sites, self.target, self.budget = model, sites, target, budget
        self.decay, self.penalty_every, self.vote_every, self.doublings = decay, penalty_every, vote_every, doublings
        self.quorum, self.tolerance, self.with_eta = quorum, tolerance, eta
        self.candidates = candidates or [n for n in (1, 2, 4, 8, 16, 32) if n <= m]
        usual = (0.5, 0.5) if budget == "params" else (0.8, 0.2)
        self.b1, self.b2 = usual[0] if b1 is None else b1, usual[1] if b2 is None else b2
        self.layers = {}
        for site in sites:
            cut = site.shape[1] if layout == "strict" else site.weights
            if cut % m == 0 and site.name not in keep_dense:
                self.layers[site.name] = Layer(site, model.get_parameter(site.name), m)
        self.t, self.done, self.events = 0, False, []
        self.erk = self.erk_sparsities()
        self.eta = self.penalty_factors()

    def erk_sparsities(self):
        """Density in proportion to sum(shape) / prod(shape); what exceeds 1 is fixed dense, the rest is scaled anew."""
        total = sum(site.weights for site in self.sites)
        ask = {name: sum(layer.site.shape) / layer.site.weights for name, layer in self.layers.items()}
        fixed = set()
        while True:
            scaled = [name for name in ask if name not in fixed]
            dense = total - sum(self.layers[name].site.weights for name in scaled)
            scale = ((1 - self.target) * total - dense) / sum(ask[name] * self.layers[name].site.weights for name in scaled)
            density = {name: 1.0 if name in fixed else scale * ask[name] for name in ask}
            if max(density.values()) <= 1:
                return {name: 1 - value for name, value in density.items()}
            fixed |= {name for name in ask if density[name] > 1}

    def penalty_factors(self):
        if not self.with_eta:
            return dict.fromkeys(self.layers, 1.0)
        c = {name: layer.site.macs * layer.density for name, layer in self.layers.items()}
        r = {name: self.erk[name] - (1 - layer.density) for name, layer in self.layers.items()}
        most, furthest = max(c.values()), max(abs(value) for value in r.values())
        if not any(value > 0.01 for value in r.values()):
            r = dict.fromkeys(r, 0.0)
        return {name: self.b1 * c[name] / most + self.b2 * r[name] / furthest for name in self.layers}

    @property
    def sparsity(self):
        def dense_cost(site):
            return site.weights if self.budget == "params" else site.macs

        kept = sum(dense_cost(s) * (self.layers[s.name].density if s.name in self.layers else 1) for s in self.sites)
        return 1 - kept / sum(dense_cost(s) for s in self.sites)

    def loss(self, x, y):
        """Every weight masked; the constant mask in the product is what the gradient meets on its way back."""
        for layer in self.layers.values():
            layer.mask = mask_of(layer.weight, layer.n, layer.m)
        masked = {name: layer.weight * layer.mask for name, layer in self.layers.items()}
        return F.cross_entropy(functional_call(self.model, masked, (x,)), y)

    def step(self):
        decay = self.decay * 2 ** sum(self.t >= at for at in self.doublings)
        if self.t % self.penalty_every == 0:
            for name, layer in self.layers.items():
                layer.weight.grad += decay * self.eta[name] * layer.weight.detach() * layer.mask
        if self.t % self.vote_every == 0:
            self.vote()
        self.t += 1

    def vote(self):
        for name, layer in self.layers.items():
            if layer.committed == min(self.candidates) or layer.satisfied() < self.quorum:
                continue
            layer.n -= 1
            if layer.n in self.candidates:
                self.events.append((name, layer.density, layer.n / layer.m, self.t))
                layer.committed = layer.n
                self.eta = self.penalty_factors()
                if self.sparsity >= self.target - self.tolerance:
                    self.done = True
                    return


# Side by side with the restatement.

CASES = {
    "params": {},
    "macs": {"budget": "macs", "decay": 2.0},  # in its last rounds no site is below its ERK sparsity: every r is 0
    "params-without-eta": {"eta": False},
    "macs-without-eta": {"budget": "macs", "eta": False},
    "doublings": {"decay": 1.0, "doublings": (20, 50, 51)},
    "factors": {"b1": 0.3, "b2": 0.9},
    "candidates": {"candidates": (1, 3, 6), "quorum": 0.6, "tolerance": 0.05},
    "kept-dense": {"keep_dense": ("head.weight",), "decay": 8.0},
    "flat": {"layout": "flat", "m": 16},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_every_step_is_the_one_domino_md_tells(settings):
    sites = nmfx.find_sites(pretrained(), EXAMPLE)
    plain = Plain(pretrained(), sites, TARGETS[settings.get("budget", "params")], **(FAST | settings))
    plain_optimizer = torch.optim.SGD(plain.model.parameters(), lr=LR)
    model, search, optimizer = begin(**settings)
    torch.testing.assert_close(search.eta, plain.eta)

    for x, y in islice(batches(), 600):
        plain_optimizer.zero_grad()
        plain.loss(x, y).backward()
        plain.step()
        plain_optimizer.step()

        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        masks = masks_of(model)
        assert masks.keys() == plain.layers.keys()
        for name, layer in plain.layers.items():
            assert torch.equal(masks[name].double(), layer.mask), f"mask of {name} at iteration {search.t}"
        seen = len(search.events)
        events = search.step()
        optimizer.step()

        assert list(events) == list(search.events[seen:])
        assert search.t == plain.t
        assert search.done == plain.done
        assert [told(event) for event in search.events] == plain.events
        assert {name: search.intermediate[name] for name in plain.layers} == {k: v.n for k, v in plain.layers.items()}
        assert {name: search.committed[name] for name in plain.layers} == {k: v.committed for k, v in plain.layers.items()}
        assert search.sparsity == pytest.approx(plain.sparsity)
        torch.testing.assert_close(search.eta, plain.eta)
        torch.testing.assert_close(model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)  # bit for bit
        if plain.done:
            break
    assert search.done
    assert len({layer.committed for layer in plain.layers.values()}) > 1 or not plain.with_eta, "a run that shows nothing"


# Resuming.


@pytest.mark.parametrize("stop", [0, 51], ids="after-{}".format)
def test_a_resumed_search_goes_on_bit_for_bit(stop, tmp_path):
    data = list(islice(batches(), 110))
    model, search, optimizer = begin()
    for batch in data[:stop]:
        advance(model, search, optimizer, batch)
    parts = dict(zip(("model", "search", "optimizer"), (model, search, optimizer), strict=True))
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "search.pt")

    torch.manual_seed(1)
    again = dict(zip(parts, begin(model=Net()), strict=True))  # other weights: the thresholds must come from the file
    state = torch.load(tmp_path / "search.pt", weights_only=True)
    for name, part in again.items():
        part.load_state_dict(state[name])
    assert_same(parts, again)
    for batch in data[stop:]:
        assert advance(*parts.values(), batch) == advance(*again.values(), batch)
        assert_same(parts, again)
    assert search.events


def assert_same(one, other):
    """Nothing differs in a single bit."""
    for key, value in one["model"].state_dict().items():
        assert torch.equal(value, other["model"].state_dict()[key]), key
    for here, there in zip(masked_sites(one["model"]), masked_sites(other["model"]), strict=True):
        assert torch.equal(here.mask, there.mask), here.spec.name
    for name in ("t", "done", "intermediate", "committed", "eta", "events", "sparsity"):
        assert getattr(one["search"], name) == getattr(other["search"], name), name


def test_a_finished_search_is_loaded_as_finished():
    model, search, optimizer = begin()
    run_to_the_end(model, search, optimizer)
    _, again, _ = begin(model=Net())
    again.load_state_dict(copy.deepcopy(search.state_dict()))
    assert again.done
    assert again.scheme == search.scheme


# Laws.


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_the_first_factors_are_macs_and_erk_over_their_maxima(budget):
    _, search, _ = begin(budget=budget)
    sites = nmfx.find_sites(pretrained(), EXAMPLE)
    erk = Plain(pretrained(), sites, TARGETS[budget], **FAST).erk
    b1, b2 = (0.5, 0.5) if budget == "params" else (0.8, 0.2)
    most = max(sites[name].macs for name in erk)
    assert search.eta == pytest.approx({n: b1 * sites[n].macs / most + b2 * erk[n] / max(erk.values()) for n in erk})


def test_without_eta_every_factor_is_one():
    model, search, optimizer = begin(eta=False)
    for batch in islice(batches(), 40):
        advance(model, search, optimizer, batch)
        assert set(search.eta.values()) == {1.0}
    assert search.events


def test_the_penalty_meets_kept_weights_of_sites_with_a_choice_only():
    model, search, optimizer = begin(decay=0.5, doublings=(4, 8))
    met = {}
    optimizer.register_step_pre_hook(
        lambda *_: met.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    )
    for t, batch in enumerate(islice(batches(), 12)):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        masks, eta = {name: mask.clone() for name, mask in masks_of(model).items()}, dict(search.eta)
        search.step()
        optimizer.step()
        decay = 0.5 * (1 + (t >= 4)) * (1 + (t >= 8)) if t % 2 == 0 else 0.0
        for name, parameter in model.named_parameters():
            penalty = decay * eta[name] * weights[name] * masks[name] if name in eta else 0.0
            torch.testing.assert_close(met[name], before[name] + penalty, rtol=1e-12, atol=0)
            assert torch.equal(parameter.grad, before[name])
            if name in masks:
                assert not met[name][~masks[name]].any()
    assert min(search.intermediate.values()) < M, "no weight was ever dropped"


@pytest.mark.parametrize("how", ["scaled", "accumulated", "two optimisers", "fused and scaled"])
def test_the_penalty_is_that_of_a_plain_step(how):
    """Under a gradient scaler (powers of two: exact), in passes, or with the weights shared out over optimisers."""
    plain, others = begin(), begin()
    kinds = {"fused and scaled": {"fused": True}}.get(how, {})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled="scaled" in how)
    parts = [list(others[0].parameters())]
    if how == "two optimisers":
        parts = [parts[0][::2], parts[0][1::2]]
    lr = plain[2].param_groups[0]["lr"]
    optimizers = [torch.optim.SGD(part, lr=lr, **kinds) for part in parts]
    passes = 2 if how == "accumulated" else 1
    for x, y in islice(batches(), 40):
        advance(*plain, (x, y))
        for optimizer in optimizers:
            optimizer.zero_grad()
        for _ in range(passes):
            scaler.scale(F.cross_entropy(others[0](x), y) / passes).backward()
        others[1].step()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for found, wanted in zip(others[0].parameters(), plain[0].parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert [str(event) for event in others[1].events] == [str(event) for event in plain[1].events]
    assert plain[1].events


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("target", [0.3, 0.617])
def test_the_scheme_is_never_above_the_budget(target, budget):
    model, search, optimizer = begin(target, budget=budget, tolerance=0.01)  # a wide tolerance stops above the limit
    run_to_the_end(model, search, optimizer)
    assert search.sparsity >= target - 0.01
    sites, scheme = nmfx.find_sites(pretrained(), EXAMPLE), search.scheme
    scheme.check(sites)

    def spent(names):
        cost = {site.name: site.weights if budget == "params" else site.macs for site in sites}
        return sum(cost[name] * Fraction(n, M) for name, n in names.items()) / sum(cost.values())

    patterns = {site.name: M for site in sites} | {name: p.n for name, p in scheme.items() if not p.is_dense}
    limit = 1 - Fraction(str(target))
    assert spent(patterns) <= limit
    for name in search.eta:  # trimmed: nothing more fits
        if patterns[name] < M:
            assert spent(patterns | {name: 2 * patterns[name]}) > limit
    committed = {site.name: search.committed.get(site.name, M) for site in sites}
    if spent(committed) <= limit:  # nothing to settle: the trim step only gives back
        assert all(patterns[name] >= n for name, n in committed.items())


def test_an_unfinished_search_has_no_scheme_and_a_finished_one_no_step():
    model, search, optimizer = begin()
    with pytest.raises(NmfxError):
        _ = search.scheme
    run_to_the_end(model, search, optimizer)
    assert search.scheme
    before = [parameter.grad.clone() for parameter in model.parameters()]
    with pytest.raises(NmfxError):
        search.step()
    assert all(torch.equal(parameter.grad, old) for parameter, old in zip(model.parameters(), before, strict=True))


def test_a_round_ends_where_the_budget_holds():
    """All sites would vote for N = 4 in the fourth round; the first two suffice, and the others are not asked."""
    sites = nmfx.find_sites(pretrained(), EXAMPLE)
    first, second, third, last = (site for site in sites if site.length % M == 0)
    target = (first.weights + second.weights) / 2 / sites.weights
    model, search, _ = begin(target, vote_every=1)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in search.eta:
            parameters[name].zero_()  # no weight is left above the threshold of its group
    x, y = next(batches())
    F.cross_entropy(model(x), y).backward()
    for n in (7, 6, 5):
        assert search.step() == ()
        assert {search.intermediate[name] for name in search.eta} == {n}
    assert [told(event) for event in search.step()][:2] == [(first.name, 1.0, 0.5, 3), (second.name, 1.0, 0.5, 3)]
    assert search.done
    order = (first.name, second.name, third.name, last.name)
    assert [search.intermediate[name] for name in order] == [4, 4, 5, 5]
    assert [search.committed[name] for name in order] == [4, 4, M, M]
    assert search.sparsity == pytest.approx(target)


def test_sites_kept_dense_never_vote():
    model, search, optimizer = begin(keep_dense=("head.*",))
    run_to_the_end(model, search, optimizer)
    for name in ("stem.weight", "head.weight"):  # one input channel, and a wish
        assert name not in search.eta
        assert name not in {event.site for event in search.events}
        assert search.intermediate.get(name, M) == search.committed.get(name, M) == M
        assert name not in search.scheme or search.scheme[name].is_dense


def test_parameters_keep_their_names_and_identity_and_detach_gives_the_classes_back():
    model = pretrained()
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    parameters = dict(model.named_parameters())
    model, search, optimizer = begin(model=model)
    for batch in islice(batches(), 10):
        advance(model, search, optimizer, batch)
    assert list(masked_sites(model))
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    search.detach()
    assert not list(masked_sites(model))
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert not [name for name, _ in model.named_buffers() if name.endswith("_mask")]
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_a_target_out_of_reach_is_refused_and_leaves_the_model_alone():
    model = pretrained()
    with pytest.raises(SearchError, match="out of reach"):
        begin(0.99, model=model)
    assert not list(masked_sites(model))


# Two processes.


def events_of(rank, disturbed):
    """What a process sees in a search of half batches; a disturbed one would agree to anything in every other round."""
    model, search, optimizer = begin(candidates=range(1, M), quorum=0.6)
    parallel = DistributedDataParallel(model)
    for t, (x, y) in enumerate(islice(batches(), 24)):
        optimizer.zero_grad()
        F.cross_entropy(parallel(x[rank::2]), y[rank::2]).backward()
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        with torch.no_grad():
            if disturbed and rank == 1 and t % 6 == 3:  # a vote, and no penalty that the disturbance would change
                for parameter in model.parameters():
                    parameter.zero_()
            search.step()
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.copy_(weight)
        optimizer.step()
    found = {"events": [told(event) for event in search.events], "weights": [p.detach() for p in model.parameters()]}
    return found | {"intermediate": dict(search.intermediate), "committed": dict(search.committed)}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save([events_of(rank, disturbed) for disturbed in (False, True)], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_in_two_processes_the_votes_of_the_first_count(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    quiet, disturbed = zip(*(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)), strict=True)
    assert quiet[0]["events"]
    for other in (quiet[1], *disturbed):
        for key in ("events", "intermediate", "committed"):
            assert other[key] == quiet[0][key]
        assert all(torch.equal(a, b) for a, b in zip(other["weights"], quiet[0]["weights"], strict=True))
