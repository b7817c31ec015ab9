"""Running statistics for each domain: those of a model that was trained on that domain alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_cases import pickled, saved
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.layers import SmallBatchNorm

RENORM = {"warmup_steps": 2, "r_ramp_end": 4, "d_ramp_end": 5}
LAYERS: dict[str, Callable[[], SmallBatchNorm]] = {
    "sync": lambda: syncbn.SyncBatchNorm(3, dtype=torch.float64),
    "ghost": lambda: syncbn.GhostBatchNorm(3, 4, dtype=torch.float64, momentum=None),
    "renorm": lambda: syncbn.BatchRenorm(3, dtype=torch.float64, **RENORM),  # type: ignore[arg-type]
}
NAMES = ["clean", "noisy", "dark"]
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
every_layer = pytest.mark.parametrize("kind", LAYERS)


def model_of(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), LAYERS[kind](), nn.Tanh(), nn.Linear(3, 3), LAYERS[kind]()).double()


def batch(name: str, step: int) -> Tensor:
    """(8, 5), of another mean and size in each domain."""
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (1 + NAMES.index(name)) * x + 4 * NAMES.index(name)


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Of the default domain, or of a model without domains."""
    return {key: value.clone() for key, value in model.state_dict().items() if key.split(".")[-1] in BUFFERS}


def statistics_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Of a domain, by the names that they have in a model without domains."""
    found = statistics(model)
    if name == NAMES[0]:
        return {key: value for key, value in found.items() if ".domain_" not in key}
    part = f"domain_{name}."
    return {key.replace(part, ""): value for key, value in found.items() if part in key}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def train(model: nn.Module, steps: int = 3) -> None:
    """Passes of all domains in turn."""
    for step in range(steps):
        for name in NAMES:
            with syncbn.domain(model, name):
                model(batch(name, step))


@every_layer
def test_each_domain_has_what_it_would_have_alone(kind: str) -> None:
    """Output, gradients and statistics, to the last bit: nothing of one domain enters the arithmetic of another."""
    model = syncbn.domains(model_of(kind), NAMES)
    alone = {name: model_of(kind) for name in NAMES}
    for step in range(7):  # through the ramps of renorm's limits
        for name in NAMES:
            results = []
            with syncbn.domain(model, name):
                for each in (model, alone[name]):
                    x = batch(name, step).requires_grad_()
                    y = each(x)
                    results.append((y, torch.autograd.grad(y.square().sum(), (x, *each.parameters()))))
            (y, grads), (expected, expected_grads) = results
            assert torch.equal(y, expected)
            assert all(map(torch.equal, grads, expected_grads))
    for name in NAMES:
        assert equal(statistics_of(model, name), statistics(alone[name])), name
        with syncbn.domain(model.eval(), name):
            assert torch.equal(model(batch(name, 9)), alone[name].eval()(batch(name, 9))), name
    assert torch.equal(model(batch("dark", 9)), alone["clean"](batch("dark", 9))), "outside: the default domain"


def test_nested_contexts_and_an_exception() -> None:
    model = syncbn.domains(model_of("sync"), NAMES)

    def tracked() -> list[int]:
        return [int(statistics_of(model, name)["1.num_batches_tracked"]) for name in NAMES]

    with syncbn.domain(model, "noisy"):
        with syncbn.domain(model, "dark"):
            model(batch("dark", 0))
            with syncbn.domain(model, "clean"):
                model(batch("clean", 0))
            model(batch("dark", 1))
        model(batch("noisy", 0))
        assert tracked() == [1, 1, 2]
        with pytest.raises(RuntimeError, match="expected here"), syncbn.domain(model, "dark"):
            raise RuntimeError("expected here")
        model(batch("noisy", 1))
    model(batch("clean", 1))
    assert tracked() == [2, 2, 2]
    with syncbn.domain(model[1], "dark"):  # of a part of the model
        model(batch("dark", 0))
    assert tracked() == [2, 2, 3]
    assert int(statistics_of(model, "dark")["4.num_batches_tracked"]) == 2


@every_layer
def test_state_survives(kind: str, tmp_path: Path) -> None:
    model = syncbn.domains(model_of(kind), NAMES)
    train(model)
    fresh = syncbn.domains(model_of(kind), NAMES)
    with syncbn.domain(model, "noisy"):  # the domain in use is no part of the state
        torch.save(model.state_dict(), tmp_path / "state.pt")
    with syncbn.domain(fresh, "dark"):
        fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert equal(statistics(fresh), statistics(model))
    with syncbn.domain(model, "dark"):
        copies = [copy.deepcopy(model), pickled(model), saved(model)]
    for other in copies:
        assert equal(statistics(other), statistics(model))
        assert other[1].active_domain is None
        train(other, 1)
    train(model, 1)
    assert all(equal(statistics(other), statistics(model)) for other in copies)


def test_a_checkpoint_without_domains_is_where_all_begin() -> None:
    plain = model_of("sync")
    for step in range(3):
        plain(batch("noisy", step))
    model = syncbn.domains(model_of("sync"), NAMES, affine=True)
    train(model, 1)
    model.load_state_dict(plain.state_dict())
    for name in NAMES:
        assert equal(statistics_of(model, name), statistics(plain))
    found = syncbn.domains(plain, NAMES)
    assert all(equal(statistics_of(found, name), statistics_of(model, name)) for name in NAMES)


def test_a_checkpoint_of_other_domains_is_an_error() -> None:
    model, other = (syncbn.domains(model_of("sync"), names) for names in (NAMES, ["clean", "foggy"]))
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*1\.domain_noisy\.running_mean.*Unexpected.*domain_foggy"):
        model.load_state_dict(other.state_dict())
    plain = model_of("sync")
    plain.load_state_dict(model.state_dict(), strict=False)
    assert equal(statistics(plain), statistics_of(model, "clean")), "of the default domain, under BatchNorm's keys"


def test_domains_are_added_left_out_and_made_the_default() -> None:
    model = syncbn.domains(model_of("sync"), NAMES)
    train(model)
    before = {name: statistics_of(model, name) for name in NAMES}
    objects = {key: id(value) for key, value in model.state_dict(keep_vars=True).items()}
    syncbn.domains(model, NAMES)
    assert objects == {key: id(value) for key, value in model.state_dict(keep_vars=True).items()}
    syncbn.domains(model, [*NAMES, "foggy"])
    assert equal(statistics_of(model, "foggy"), before["clean"])
    assert all(equal(statistics_of(model, name), before[name]) for name in NAMES)
    syncbn.domains(model, ["dark", "noisy", "clean"])
    found = statistics(model)
    assert equal({key: value for key, value in found.items() if ".domain_" not in key}, before["dark"])
    assert equal(statistics_of(model, "noisy"), before["noisy"])
    syncbn.domains(model, ["noisy"])
    assert equal(statistics(model), before["noisy"])
    assert vars(model[1]).keys() == vars(model_of("sync")[1]).keys(), "plain again"
    with pytest.raises(ValueError, match="the model has no domains, got 'noisy'"), syncbn.domain(model, "noisy"):
        pass


@pytest.mark.parametrize("evaluated", [False, True])
def test_own_weights_and_biases(evaluated: bool) -> None:
    """With ``affine=True`` a domain trains its own, starting from the default's."""
    model = syncbn.domains(model_of("sync"), NAMES, affine=True)
    plain = model_of("sync")
    if evaluated:
        model.eval(), plain.eval()
    with syncbn.domain(model, "noisy"):
        y, expected = model(batch("noisy", 0)), plain(batch("noisy", 0))
        assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    own = model[1].domain_noisy
    for name in ("weight", "bias"):
        assert torch.equal(getattr(own, name).grad, getattr(plain[1], name).grad)
        assert getattr(model[1], name).grad is None
    assert torch.equal(model[0].weight.grad, plain[0].weight.grad)
    with torch.no_grad():
        own.weight.fill_(2)
    syncbn.domains(model, ["noisy", "clean"], affine=True)
    assert torch.equal(model[1].weight, own.weight), "the default's is the layer's own"
    assert torch.equal(model[1].domain_clean.weight, torch.ones(3).double())
    syncbn.domains(model, ["clean", "noisy"])
    assert not list(model[1].domain_noisy.parameters())
    assert torch.equal(model[1].weight, torch.ones(3).double())


@every_layer
def test_population_statistics_of_a_domain(kind: str) -> None:
    model = syncbn.domains(model_of(kind), NAMES)
    train(model)
    before, alone = {name: statistics_of(model, name) for name in NAMES}, model_of(kind)
    for step in range(3):  # for the same number of batches
        alone(batch("noisy", step))
    batches = [batch("noisy", step) for step in range(4)]
    with syncbn.domain(model, "noisy"):
        syncbn.update_population_statistics(model, batches)
    syncbn.update_population_statistics(alone, batches)
    assert equal(statistics_of(model, "noisy"), statistics(alone))
    assert all(equal(statistics_of(model, name), before[name]) for name in ("clean", "dark"))


def test_torchs_update_of_a_domain() -> None:
    model, alone = syncbn.domains(model_of("sync"), NAMES), model_of("sync")
    train(model)
    before = {name: statistics_of(model, name) for name in NAMES}
    batches = [batch("noisy", step) for step in range(4)]
    with syncbn.domain(model, "noisy"):
        update_bn(batches, model)
    update_bn(batches, alone)
    assert equal(statistics_of(model, "noisy"), statistics(alone))
    assert all(equal(statistics_of(model, name), before[name]) for name in ("clean", "dark"))


def test_accumulated_passes_of_a_domain() -> None:
    model, alone = syncbn.domains(model_of("ghost"), NAMES), model_of("ghost")
    with syncbn.domain(model, "noisy"), syncbn.accumulate_statistics(model):
        model(batch("noisy", 0))
        with syncbn.domain(model, "noisy"):
            model(batch("noisy", 1))
    with syncbn.accumulate_statistics(alone):
        alone(batch("noisy", 0))
        alone(batch("noisy", 1))
    assert equal(statistics_of(model, "noisy"), statistics(alone))
    assert equal(statistics_of(model, "clean"), statistics(model_of("ghost")))
    with (
        syncbn.accumulate_statistics(model),
        pytest.raises(ValueError, match="enter the domain first"),
        syncbn.domain(model, "noisy"),
    ):
        pass


def test_folded_and_reverted() -> None:
    """A folded model is that of the domain in use; torch's layers have no domains."""
    model = syncbn.convert(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double(), "sync")
    syncbn.domains(model, NAMES)
    train(model)
    model.eval()
    for name in NAMES:
        with syncbn.domain(model, name):
            torch.testing.assert_close(syncbn.fold(model)(batch(name, 9)), model(batch(name, 9)))
    with pytest.raises(
        ValueError, match=r"'1' cannot be reverted: it has the domains 'clean', 'noisy', 'dark'; choose"
    ):
        syncbn.revert(model)
    expected = statistics_of(model, "dark")
    assert equal(statistics(syncbn.revert(syncbn.domains(model, ["dark"]))), expected)
    assert type(model[1]) is nn.BatchNorm1d


def test_a_conversion_keeps_domains() -> None:
    model = syncbn.convert(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double(), "sync")
    train(syncbn.domains(model, NAMES))
    before = statistics(model)
    syncbn.convert(model, "ghost", ghost_batch_size=4)
    assert equal(statistics(model), before)
    train(model)
    assert int(model[1].domain_dark.num_batches_tracked) == 6
    assert type(model[1]) is not nn.BatchNorm1d


def test_one_compiled_graph_serves_all_domains_but_the_default() -> None:
    names = [f"site{number}" for number in range(12)]
    plain, model = (syncbn.domains(model_of("sync"), names) for _ in range(2))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(2):
        for number, name in enumerate(names):
            x = (number + 1) * batch("noisy", step)
            with syncbn.domain(plain, name), syncbn.domain(compiled, name):
                y = compiled(x)
                torch.testing.assert_close(y, plain(x))
                y.sum().backward()
    assert counter.frame_count == 2
    for key, value in statistics(plain).items():
        torch.testing.assert_close(model.state_dict()[key], value, msg=key)


@pytest.mark.parametrize("at_backward", [None, "dark"])
@pytest.mark.parametrize("mode", ["training", "evaluation", "frozen", "nested"])
@every_layer
def test_activation_checkpointing(kind: str, mode: str, at_backward: str | None) -> None:
    """A pass of each domain, each repeated in its own, whatever domain is in use at the backward pass."""
    plain, model = (syncbn.domains(model_of(kind), NAMES, affine=True) for _ in range(2))
    for each in (plain, model):
        train(each)  # other statistics and, below, other weights in each domain
        for norm in (each[1], each[4]):
            norm.domain_noisy.weight.data.fill_(2)
        each.train(mode != "evaluation")
        if mode == "frozen":
            syncbn.freeze(each)
    options: dict[str, Any] = {"use_reentrant": False, "context_fn": syncbn.checkpoint_contexts}

    def run(each: nn.Module, x: Tensor) -> Any:
        if each is plain:
            return each(x)
        inner = (lambda x: checkpoint(each, x, **options)) if mode == "nested" else each
        return checkpoint(inner, x, **options)

    grads = []
    for each in (plain, model):
        inputs = [batch(name, 7).requires_grad_() for name in NAMES]
        total = torch.zeros(())
        for name, x in zip(NAMES, inputs, strict=True):
            with syncbn.domain(each, name):
                total = total + run(each, x).sin().sum()
        with nullcontext() if at_backward is None else syncbn.domain(each, at_backward):
            total.backward()
        grads.append([x.grad for x in inputs] + [parameter.grad for parameter in each.parameters()])
    # Layers whose statistics are kept take the operator's steps one by one: the last bits may differ.
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(statistics(model), statistics(plain), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_without_the_contexts(reentrant: bool) -> None:
    model = syncbn.domains(model_of("sync"), NAMES)
    y = checkpoint(model, batch("clean", 0).requires_grad_(), use_reentrant=reentrant)
    message = "SyncBatchNorm in domain 'clean' would be repeated in the domain of the backward pass: pass context_fn="
    with pytest.raises(RuntimeError, match=message):
        y.sum().backward()


def test_half_leaves_the_statistics_wide() -> None:
    norm = syncbn.domains(syncbn.SyncBatchNorm(3), ["clean", "noisy"], affine=True)
    norm.bfloat16()
    own = norm.domain_noisy
    assert (own.running_mean.dtype, own.running_var.dtype, own.weight.dtype) == (torch.float32,) * 2 + (torch.bfloat16,)
    for mode in (True, False):
        with syncbn.domain(norm.train(mode), "noisy"):
            assert norm(torch.randn(4, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert int(own.num_batches_tracked) == 1


def test_from_the_meta_device() -> None:
    with torch.device("meta"):
        model = syncbn.domains(nn.Sequential(nn.Linear(5, 3), syncbn.SyncBatchNorm(3)), NAMES, affine=True)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    own, new = model[1].domain_noisy, nn.BatchNorm1d(3)
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in own.state_dict().items())


@pytest.mark.parametrize("names", ["clean", [], ["a", "a"], ["a.b"], [""], [1], None], ids=repr)
def test_names_are_checked(names: Any) -> None:
    with pytest.raises(ValueError, match="expected a list of different names without dots, got"):
        syncbn.domains(model_of("sync"), names)


def test_any_name_is_free() -> None:
    """Also those of attributes that layers and modules have."""
    names = ["train", "eval", "buffers", "active", "statistics", "in_use", "running_mean", "a b", "é"]
    model = syncbn.domains(model_of("sync"), names)
    for name in names:
        with syncbn.domain(model, name):
            model(batch("clean", 0))
    tracked = [value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")]
    assert list(map(int, tracked)) == [1] * 2 * len(names)
    assert "4.domain_é.running_var" in model.state_dict()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has no layer of this package with running statistics"):
        syncbn.domains(nn.Sequential(nn.Linear(3, 3), syncbn.SyncBatchNorm(3, track_running_stats=False)), NAMES)
    with pytest.raises(ValueError, match=r"BatchNorm1d '1' is no layer of this package; call syncbn\.convert"):
        syncbn.domains(nn.Sequential(syncbn.SyncBatchNorm(3), nn.BatchNorm1d(3)), NAMES)
    model = syncbn.domains(model_of("sync"), NAMES)
    message = r"expected one of 'clean', 'noisy', 'dark', got 'Noisy' \(layer '1'\)"
    with pytest.raises(ValueError, match=message), syncbn.domain(model, "Noisy"):
        pass
    with syncbn.domain(model, "noisy"):
        with pytest.raises(ValueError, match="the model is in the domain 'noisy'; leave its context first"):
            syncbn.domains(model, ["clean"])
        with pytest.raises(ValueError, match="SyncBatchNorm in domain 'noisy'"):
            model(torch.ones(1, 5).double())


# -- split batch normalization, as in docs/recipes_statistics.md


def by_hand(x: Tensor, parts: list[nn.Module], evaluated: bool = False) -> Tensor:
    """timm's rule on (N, C): in training each part of the batch by its own layer, in evaluation all by the first."""
    rows = [x] if evaluated else list(x.chunk(len(parts)))
    out = []
    for part, layer in zip(rows, parts, strict=False):
        mean, var = (layer.running_mean, layer.running_var) if evaluated else (part.mean(0), part.var(0, correction=0))
        out.append((part - mean) / (var + layer.eps).sqrt() * layer.weight + layer.bias)
        if not evaluated:
            with torch.no_grad():
                layer.running_mean += layer.momentum * (mean - layer.running_mean)
                layer.running_var += layer.momentum * (part.var(0) - layer.running_var)
    return torch.cat(out)


def split_forward(model: nn.Module, x: Tensor, names: list[str]) -> Tensor:
    """The recipe."""
    outputs = []
    for name, part in zip(names, x.chunk(len(names)), strict=True):
        with syncbn.domain(model, name):
            outputs.append(model(part))
    return torch.cat(outputs)


def test_split_batch_norm_is_a_pass_of_each_domain() -> None:
    """Two layers, three parts with their own weights, in float64: sums of 4 values of order 10, in another order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), syncbn.SyncBatchNorm(3), nn.Tanh(), nn.Linear(3, 2), syncbn.SyncBatchNorm(2))
    model = syncbn.domains(model.double(), NAMES, affine=True)
    truth = nn.ModuleList([nn.ModuleList([nn.BatchNorm1d(c).double() for _ in NAMES]) for c in (3, 2)])
    linear = copy.deepcopy(nn.ModuleList([model[0], model[3]]))

    def expected_of(x: Tensor, evaluated: bool = False) -> Tensor:
        hidden = by_hand(linear[0](x), list(truth[0]), evaluated).tanh()
        return by_hand(linear[1](hidden), list(truth[1]), evaluated)

    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, nn.ModuleList([truth, linear]))]
    for step in range(3):
        x = torch.cat([batch(name, step)[:4] for name in NAMES])
        outputs = split_forward(model, x, NAMES), expected_of(x)
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
        for y, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            y.square().sin().sum().backward()
            optimizer.step()
    for layers, norm in ((truth[0], model[1]), (truth[1], model[4])):
        for own, other in zip((norm, norm.domain_noisy, norm.domain_dark), layers, strict=True):
            for name in ("running_mean", "running_var", "weight", "bias"):
                torch.testing.assert_close(getattr(own, name), getattr(other, name), rtol=0, atol=1e-12)
    x = batch("clean", 9)
    torch.testing.assert_close(model.eval()(x), expected_of(x, evaluated=True), rtol=0, atol=1e-12)


def test_split_batch_norm_in_one_pass_is_a_ghost_group_for_each_part() -> None:
    """With one weight for all parts. The running statistics are those of all parts, until they are recomputed."""
    torch.manual_seed(0)
    norm = syncbn.GhostBatchNorm(5, ghost_batch_size=4, dtype=torch.float64)
    shared = nn.BatchNorm1d(5).double()
    x = torch.cat([batch(name, 0)[:4] for name in NAMES]).requires_grad_()
    outputs = norm(x), by_hand(x, [shared, shared, shared])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(y.sin().sum(), x)[0] for y in outputs]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
    syncbn.update_population_statistics(norm, [x[:4]])
    torch.testing.assert_close(norm.running_mean, x[:4].mean(0))
    torch.testing.assert_close(norm.running_var, x[:4].var(0))


@pytest.mark.parametrize("affine", [False, True])
def test_domains_share_nothing_after_an_assigned_checkpoint(affine: bool) -> None:
    model = syncbn.domains(syncbn.SyncBatchNorm(3), ["a", "b"], affine=affine)
    model.load_state_dict(nn.BatchNorm1d(3).state_dict(), assign=True)
    with syncbn.domain(model, "b"):
        model(torch.randn(8, 3) + 5)
    assert model.running_mean is not None
    assert (model.running_mean.tolist(), int(model.num_batches_tracked)) == ([0, 0, 0], 0)  # type: ignore[arg-type]
    places = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert len(set(places)) == len(places)


def test_a_checkpoint_without_a_number_of_batches_loads() -> None:
    state = dict(nn.BatchNorm1d(3).state_dict())
    del state["num_batches_tracked"]
    model = syncbn.domains(syncbn.SyncBatchNorm(3), ["a", "b"])
    model.load_state_dict(state)
    assert int(model.domain_b.num_batches_tracked) == 0  # type: ignore[arg-type, union-attr]


def test_frozen_parameters_are_not_copied() -> None:
    model = syncbn.freeze(syncbn.SyncBatchNorm(3), affine=True)
    with pytest.raises(ValueError, match=r"the parameters of layer '' are frozen; call syncbn.unfreeze"):
        syncbn.domains(model, ["a", "b"], affine=True)
    syncbn.domains(model, ["a", "b"])  # which share them
