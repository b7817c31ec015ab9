"""torch's generic tests of modules, with the inputs that torch has for its batch normalizations.

torch keeps a list of modules with their inputs (``torch.testing._internal.common_modules``) and tests each of them with
the same checks (``test/test_modules.py``, which its wheel does not have). Here the checks are written again, and run
on the CPU for the layers of this package, made by their constructors and by ``convert``, and for torch's own layers,
which shows that the checks are torch's. :data:`LEFT_OUT` names what is left out, and why.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch_suites
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import syncbn
from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm

LEFT_OUT = {
    "test_check_inplace": "it is for modules that have an option `inplace`, which no batch normalization has",
    "test_cpu_gpu_parity": "it needs a GPU: tests/gpu/test_cuda.py compares the two devices",
    "test_multiple_device_transfer": "it needs a GPU: tests/gpu/test_cuda.py moves layers between devices",
    "input not_tracking_stats": "of BatchRenorm, whose corrections need running statistics",
    "BatchRenorm after its warm-up": "r and d are constants for the gradient, which numerical derivatives cannot know, "
    "and change from call to call: tests/unit/test_renorm.py and test_layer_gradients.py",
}
GENERIC = {
    "test_check_inplace",
    "test_cpu_gpu_parity",
    "test_device_ctx_init",
    "test_errors",
    "test_factory_kwargs",
    "test_forward",
    "test_grad",
    "test_gradgrad",
    "test_if_train_and_eval_modes_differ",
    "test_memory_format",
    "test_multiple_device_transfer",
    "test_non_contiguous_tensors",
    "test_pickle",
    "test_repr",
    "test_to",
    "test_to_empty",
}
"""torch's generic tests of modules, by their names in ``test/test_modules.py``."""

TORCHS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
GHOST = {nn.BatchNorm1d: 2, nn.BatchNorm2d: 1, nn.BatchNorm3d: 1}
"""Ghost batch sizes: torch's inputs have 4 samples, and 2 where there are several values a sample."""
MADE: dict[str, Callable[..., nn.Module]] = {
    "torch": lambda torchs, *args, **kwargs: torchs(*args, **kwargs),
    "sync": lambda torchs, *args, **kwargs: SyncBatchNorm(*args, **kwargs),
    "ghost": lambda torchs, features, *args, **kwargs: GhostBatchNorm(features, GHOST[torchs], *args, **kwargs),
    "renorm": lambda torchs, *args, **kwargs: BatchRenorm(*args, **kwargs),
    "converted to sync": lambda torchs, *args, **kwargs: syncbn.convert(torchs(*args, **kwargs), "sync"),
    "converted to ghost": lambda torchs, *args, **kwargs: syncbn.convert(
        torchs(*args, **kwargs), "ghost", ghost_batch_size=GHOST[torchs]
    ),
    "converted to renorm": lambda torchs, *args, **kwargs: syncbn.convert(torchs(*args, **kwargs), "renorm"),
}

each_layer = pytest.mark.parametrize("made", MADE)
each_constructor = pytest.mark.parametrize("made", [name for name in MADE if "converted" not in name])
each_torchs = pytest.mark.parametrize("torchs", TORCHS)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def every_layer(test: Any) -> Any:
    return each_layer(each_torchs(each_mode(test)))


Make = Callable[..., nn.Module]
Check = Callable[[Make, Tensor], None]


def each_input(
    check: Check,
    made: str,
    torchs: type[nn.Module],
    training: bool,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    requires_grad: bool = False,
) -> None:
    """Call ``check`` with a function that makes the layer, in its mode, and with the layer's input."""
    for dtype in dtypes:
        torch.manual_seed(0)
        for given in torch_suites.module_inputs(torchs, dtype, training=training, requires_grad=requires_grad):
            if given.desc == "not_tracking_stats" and "renorm" in made:
                continue

            def make(given: Any = given, **factory: Any) -> nn.Module:
                constructor = given.constructor_input
                return MADE[made](torchs, *constructor.args, **constructor.kwargs, **factory).train(training)

            (x,) = given.forward_input.args
            try:
                check(make, x)
            except Exception as error:
                error.add_note(f"torch's input {given.desc!r}, {dtype}, {tuple(x.shape)}")
                raise


def check_dtypes(layer: nn.Module, dtype: torch.dtype, device: str = "cpu") -> None:
    for name, tensor in itertools.chain(layer.named_parameters(), layer.named_buffers()):
        assert tensor.device.type == device, name
        assert not tensor.is_floating_point() or tensor.dtype == dtype, name


def truth(layer: nn.Module, torchs: type[nn.Module], x: Tensor) -> Tensor:
    """What torch's own layer makes of each ghost group; the parameters are those of a new layer."""
    kept = layer.track_running_stats
    own = torchs(layer.num_features, layer.eps, affine=False, track_running_stats=kept, dtype=x.dtype)
    own.train(layer.training)
    parts = x.split(layer.ghost_batch_size) if getattr(layer, "ghost_batch_size", None) and layer.training else [x]
    return torch.cat([own(part) for part in parts])


def test_the_suite_is_whole() -> None:
    """torch has inputs for these classes and no other batch normalization; each of its checks is here or left out."""
    assert torch_suites.batchnorm_infos() == [f"torch.nn.{torchs.__name__}" for torchs in TORCHS]
    here = {name for name, value in globals().items() if name.startswith("test_") and inspect.isfunction(value)}
    assert here & set(LEFT_OUT) == set()
    assert (here & GENERIC) | (set(LEFT_OUT) & GENERIC) == GENERIC
    for make in (SyncBatchNorm, GhostBatchNorm, BatchRenorm):
        assert "inplace" not in inspect.signature(make).parameters


@every_layer
def test_forward(made: str, torchs: type[nn.Module], training: bool) -> None:
    def check(make: Make, x: Tensor) -> None:
        layer = make().to(x.dtype)
        y = layer(x)
        torch.testing.assert_close(y, truth(layer, torchs, x))
        assert (y.dtype, y.device) == (x.dtype, x.device)
        getattr(layer, "double" if x.dtype == torch.float64 else "float")()
        layer(x)
        check_dtypes(layer, x.dtype)

    each_input(check, made, torchs, training)


@every_layer
def test_factory_kwargs(made: str, torchs: type[nn.Module], training: bool) -> None:
    def check(make: Make, x: Tensor) -> None:
        for device in ("cpu", "meta"):
            check_dtypes(make(device=device, dtype=x.dtype), x.dtype, device)

    each_input(check, made, torchs, training)


@every_layer
def test_repr(made: str, torchs: type[nn.Module], training: bool) -> None:
    def check(make: Make, x: Tensor) -> None:
        layer = make().to(x.dtype)
        assert repr(layer) == str(layer)
        assert repr(layer).startswith(f"{type(layer).__name__}({layer.num_features}, eps={layer.eps}")

    each_input(check, made, torchs, training)


@every_layer
def test_pickle(made: str, torchs: type[nn.Module], training: bool) -> None:
    """Of the layer, and of its state."""

    def check(make: Make, x: Tensor) -> None:
        layer = make().to(x.dtype)
        y = layer(x)
        for saved in (layer, layer.state_dict()):
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            read = torch.load(file, weights_only=saved is not layer)
            twin = read if saved is layer else make().to(x.dtype)
            if saved is not layer:
                twin.load_state_dict(read, strict=True)
            for name, tensor in layer.state_dict().items():
                assert torch.equal(twin.state_dict()[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name
            assert torch.equal(twin(x), y if training else layer(x))

    each_input(check, made, torchs, training)


def scattered(t: Tensor) -> Tensor:
    """The same values, every second of the memory's."""
    return torch.repeat_interleave(t.detach(), 2, dim=-1)[..., ::2].requires_grad_(t.requires_grad)


@every_layer
def test_non_contiguous_tensors(made: str, torchs: type[nn.Module], training: bool) -> None:
    def check(make: Make, x: Tensor) -> None:
        layer = make().to(x.dtype)
        expected = layer(x)
        dy = torch.randn_like(expected)
        leaves = [x, *layer.parameters()]
        expected_grads = torch.autograd.grad(expected, leaves, dy)
        for given, grad in itertools.product((x, scattered(x)), (dy, scattered(dy))):
            y = layer(given)
            found = torch.autograd.grad(y, [given, *layer.parameters()], grad)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(found[0], expected_grads[0], rtol=0, atol=1e-4)  # torch's own tolerance
            torch.testing.assert_close(found[1:], expected_grads[1:])

    each_input(check, made, torchs, training, requires_grad=True)


def check_gradients(made: str, torchs: type[nn.Module], training: bool, numerically: Callable[..., bool]) -> None:
    """With respect to all inputs and parameters, then to the input alone and with each parameter."""

    def check(make: Make, x: Tensor) -> None:
        layer = make().to(x.dtype)
        named = dict(layer.named_parameters())
        chosen: list[tuple[str, ...]] = [tuple(named), (), *((name,) for name in named if len(named) > 1)]
        for names in chosen:
            values = [x, *(named[name].detach().clone().requires_grad_() for name in names)]

            def function(given: Tensor, *changed: Tensor, names: tuple[str, ...] = names) -> Tensor:
                constants = {name: parameter.detach() for name, parameter in named.items()}
                buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
                state = {**constants, **buffers, **dict(zip(names, changed, strict=True))}
                y: Tensor = torch.func.functional_call(layer, state, (given,))
                return y

            assert numerically(function, values)

    each_input(check, made, torchs, training, dtypes=[torch.float64], requires_grad=True)


@each_constructor
@each_torchs
@each_mode
def test_grad(made: str, torchs: type[nn.Module], training: bool) -> None:
    check_gradients(made, torchs, training, lambda *args: gradcheck(*args, fast_mode=True))


@each_constructor
@each_torchs
@each_mode
def test_gradgrad(made: str, torchs: type[nn.Module], training: bool) -> None:
    check_gradients(made, torchs, training, lambda *args: gradgradcheck(*args, fast_mode=True))


@every_layer
def test_memory_format(made: str, torchs: type[nn.Module], training: bool) -> None:
    """Of the input and of the module. Outputs and gradients have the input's."""

    def check(make: Make, x: Tensor) -> None:
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
        formats = [torch.contiguous_format, *([] if last is None else [last])]
        layer = make().to(x.dtype)
        expected = layer(x)
        dy = torch.rand_like(expected)
        expected_grads = torch.autograd.grad(expected, [x, *layer.parameters()], dy)
        for of_input, of_module in itertools.product(formats, [torch.preserve_format, *formats]):
            given = x.detach().clone().to(memory_format=of_input).requires_grad_()
            layer.to(memory_format=of_module)
            y = layer(given)
            grads = torch.autograd.grad(y, [given, *layer.parameters()], torch.empty_like(y).copy_(dy))
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(grads, expected_grads)
            assert y.is_contiguous(memory_format=of_input)
            assert grads[0].is_contiguous(memory_format=of_input)
            assert all(grad.is_contiguous() for grad in grads[1:])

    each_input(check, made, torchs, training, requires_grad=True)


@each_layer
@each_torchs
def test_if_train_and_eval_modes_differ(made: str, torchs: type[nn.Module]) -> None:
    """The forward pass asks for the mode."""

    def check(make: Make, x: Tensor) -> None:
        layer = make().to(x.dtype)
        del layer.training
        with pytest.raises(AttributeError, match="'training'"):
            layer(x)

    each_input(check, made, torchs, training=True)


@every_layer
def test_device_ctx_init(made: str, torchs: type[nn.Module], training: bool) -> None:
    """Under ``with torch.device("meta")`` the tensors are those of the CPU without their values."""

    def check(make: Make, x: Tensor) -> None:
        expected = make()
        with torch.device("meta"):
            layer = make()
        for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
            pairs = zip(tensors(layer), tensors(expected), strict=True)
            for (name, found), (same, of_cpu) in pairs:
                assert name == same
                assert found.is_meta
                assert (found.shape, found.stride(), found.dtype) == (of_cpu.shape, of_cpu.stride(), of_cpu.dtype)
                assert found.requires_grad == of_cpu.requires_grad

    each_input(check, made, torchs, training)


@every_layer
def test_errors(made: str, torchs: type[nn.Module], training: bool) -> None:
    """torch's layers refuse an ``eps`` in the forward pass, and these where it is given."""
    for given in torch_suites.module_error_inputs(torchs, torch.float32, training=training):
        assert given.error_regex == "eps must be positive"
        constructor, (x,) = given.module_error_input.constructor_input, given.module_error_input.forward_input.args
        with pytest.raises(given.error_type, match=r"eps must be (a )?positive"):
            MADE[made](torchs, *constructor.args, **constructor.kwargs)(x)


@every_layer
@pytest.mark.parametrize("swap", [False, True], ids=["in place", "swapped"])
def test_to(made: str, torchs: type[nn.Module], training: bool, swap: bool) -> None:
    """Parameters stay the same objects, and their gradients go with them."""

    def check(make: Make, x: Tensor) -> None:
        layer = make().to(x.dtype)
        before = dict(layer.named_parameters())
        y = layer(x)
        if before:
            y.sum().backward()
            del y  # a tensor that a graph refers to cannot be swapped
        state = copy.deepcopy(layer.state_dict())
        for dtype in (torch.float64, torch.float32, torch.float64):
            layer.to(dtype)
            check_dtypes(layer, dtype)
            for name, parameter in layer.named_parameters():
                assert parameter is before[name]
                assert parameter.grad is not None
                assert parameter.grad.dtype == dtype
            for name, tensor in layer.state_dict().items():
                torch.testing.assert_close(tensor, state[name], check_dtype=False, equal_nan=True)
        layer(x.double())

    future = torch.__future__
    usual = future.get_swap_module_params_on_conversion()
    future.set_swap_module_params_on_conversion(swap)
    try:
        each_input(check, made, torchs, training)
    finally:
        future.set_swap_module_params_on_conversion(usual)


@every_layer
@pytest.mark.parametrize("swap", [False, True], ids=["in place", "swapped"])
def test_to_empty(made: str, torchs: type[nn.Module], training: bool, swap: bool) -> None:
    def check(make: Make, x: Tensor) -> None:
        with torch.device("meta"):
            layer = make()
        before = dict(layer.named_parameters())
        layer.to_empty(device="cpu")
        check_dtypes(layer.to(x.dtype), x.dtype)
        layer.reset_parameters()
        assert layer(x).shape == x.shape
        if swap:
            assert all(parameter is before[name] for name, parameter in layer.named_parameters())

    future = torch.__future__
    usual = future.get_swap_module_params_on_conversion()
    future.set_swap_module_params_on_conversion(swap)
    try:
        each_input(check, made, torchs, training)
    finally:
        future.set_swap_module_params_on_conversion(usual)
