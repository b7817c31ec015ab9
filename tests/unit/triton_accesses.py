"""What the programs of a Triton kernel read and write, recorded in Triton's interpreter, and whether they may.

Every access of memory passes through three methods of the interpreter, which are replaced here. Addresses are checked
one by one against the elements of the kernel's arguments: the gaps of a tensor with strides are out of bounds too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, interpreter_builder


class Access(NamedTuple):
    """One load, store or atomic addition of one program, without the elements that are masked out."""

    kind: str
    """``"load"``, ``"store"`` or ``"add"``."""
    program: int
    barriers: int
    """Barriers that the program has passed."""
    argument: int
    """Which tensor among the launch's arguments; -1 if there is none."""
    addresses: np.ndarray[Any, np.dtype[np.int64]]


class Launch:
    """One launch of a kernel, with its accesses in order."""

    def __init__(self, kernel: str, arguments: list[torch.Tensor]) -> None:
        self.kernel = kernel
        # Two arguments may be one tensor; an expanded tensor has elements with the same address.
        self.arguments = list({(t.data_ptr(), t.shape, t.stride()): t for t in arguments}.values())
        self.elements = [np.unique(addresses(t)) for t in self.arguments]
        self.accesses: list[Access] = []
        self.problems: list[str] = []
        self._barriers: dict[int, int] = {}

    def barrier(self, program: int) -> None:
        self._barriers[program] = self._barriers.get(program, 0) + 1

    def record(self, kind: str, program: int, pointers: np.ndarray[Any, Any], itemsize: int) -> None:
        found = pointers.astype(np.int64).ravel()
        if not found.size:
            return
        argument = self._argument(found, itemsize)
        if argument < 0:
            self.problems.append(f"{self.kernel}: a {kind} of program {program} is outside its tensor")
        self.accesses.append(Access(kind, program, self._barriers.get(program, 0), argument, found))

    def _argument(self, found: np.ndarray[Any, Any], itemsize: int) -> int:
        """The argument that holds all these elements, or -1."""
        for index, (tensor, elements) in enumerate(zip(self.arguments, self.elements, strict=True)):
            if tensor.dtype.itemsize == itemsize and np.isin(found, elements).all():
                return index
        return -1

    def finish(self) -> None:
        """Look for races between programs, and between the threads of one."""
        for index in range(len(self.arguments)):
            ours = [a for a in self.accesses if a.argument == index]
            stores = [a for a in ours if a.kind == "store"]
            if len({a.kind for a in ours} & {"load", "add"}) == 2:
                self.problems.append(f"{self.kernel}: a sum is read while programs add to it")
            if not stores:
                continue
            stored = np.concatenate([a.addresses for a in stores])
            touched = np.concatenate([np.unique(_keys(a, stored, a.program)) for a in ours])
            if np.unique(touched).size > np.unique(stored).size:
                self.problems.append(f"{self.kernel}: a program stores what another one accesses")
            # One thread reads and writes a scalar, such as a counter.
            many = [a for a in ours if a.addresses.size > 1]
            written = _all([_keys(a, stored, a.program, a.barriers) for a in many if a.kind == "store"])
            others = _all([_keys(a, stored, a.program, a.barriers) for a in many if a.kind != "store"])
            if np.unique(written).size < written.size or np.intersect1d(written, others).size:
                self.problems.append(f"{self.kernel}: a thread stores what another one accesses, without a barrier")

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether it is among the arguments."""
        return (tensor.data_ptr(), tensor.stride()) in [(t.data_ptr(), t.stride()) for t in self.arguments]

    def elements_of(self, kind: str, tensor: torch.Tensor) -> int:
        """How many elements of this tensor are accessed, each as often as it is."""
        return sum(a.addresses.size for a in self._of(kind, tensor))

    def bytes_of(self, *kinds: str) -> int:
        """Bytes with accesses of these kinds, each byte once."""
        total = 0
        for index, tensor in enumerate(self.arguments):
            touched = [a.addresses for a in self.accesses if a.argument == index and a.kind in kinds]
            total += np.unique(np.concatenate(touched)).size * tensor.dtype.itemsize if touched else 0
        return total

    def _of(self, kind: str, tensor: torch.Tensor) -> list[Access]:
        pointers = [(t.data_ptr(), t.stride()) for t in self.arguments]
        index = pointers.index((tensor.data_ptr(), tensor.stride()))
        return [a for a in self.accesses if a.argument == index and a.kind == kind]


def _keys(access: Access, stored: np.ndarray[Any, Any], program: int, barriers: int = 0) -> np.ndarray[Any, Any]:
    """One number for each accessed element that is stored to, the program and its barriers."""
    offsets = access.addresses[np.isin(access.addresses, stored)] - stored.min()
    return ((offsets << 24) + (program << 8) + barriers).astype(np.int64)


def _all(arrays: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return np.concatenate([np.zeros(0, dtype=np.int64), *arrays])


def addresses(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The address of each element, in the tensor's order."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return (tensor.data_ptr() + offsets.flatten() * tensor.dtype.itemsize).numpy()


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches inside, in order. AssertionError at the end if one had an access that it should not have had."""
    launches: list[Launch] = []
    run = InterpretedFunction.run
    methods = {name: getattr(InterpreterBuilder, name) for name in ("create_masked_load", "create_masked_store")}
    methods |= {name: getattr(InterpreterBuilder, name) for name in ("create_atomic_rmw", "create_barrier")}

    def program() -> int:
        (x, y, z), (_, ny, nz) = interpreter_builder.grid_idx, interpreter_builder.grid_dim
        return int((x * ny + y) * nz + z)

    def record(kind: str, pointers: Any, mask: Any) -> None:
        bits = pointers.get_element_ty().primitive_bitwidth
        launches[-1].record(kind, program(), pointers.data[np.broadcast_to(mask.data, pointers.data.shape)], bits // 8)

    def launch(self: Any, *args: Any, **options: Any) -> Any:
        tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        launches.append(Launch(self.fn.__name__, tensors))
        result = run(self, *args, **options)
        launches[-1].finish()
        return result

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        record("load", pointers, mask)
        return methods["create_masked_load"](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        record("store", pointers, mask)
        return methods["create_masked_store"](self, pointers, value, mask, *rest)

    def add(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        record("add", pointers, mask)
        return methods["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def barrier(self: Any) -> None:
        launches[-1].barrier(program())
        methods["create_barrier"](self)

    replaced = {"create_masked_load": load, "create_masked_store": store, "create_atomic_rmw": add}
    InterpretedFunction.run = launch
    for name, method in (replaced | {"create_barrier": barrier}).items():
        setattr(InterpreterBuilder, name, method)
    try:
        yield launches
    finally:
        InterpretedFunction.run = run
        for name, method in methods.items():
            setattr(InterpreterBuilder, name, method)
    assert not (problems := [problem for each in launches for problem in each.problems]), problems
