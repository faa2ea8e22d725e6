# SPDX-License-Identifier: Apache-2.0
"""What decides the outcome of transforms, as a hash: classes, parameters and code, and the files that they read."""

from __future__ import annotations

import copyreg
import enum
import hashlib
import inspect
import os
import sys
from collections.abc import Hashable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any, Literal

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Randomizable

from ..io.zarr_arrays import metadata_above
from ..sampling import as_array

__all__ = ["CHECKS", "file_state", "fingerprint"]

Check = Literal["mtime", "content"]
CHECKS = ("mtime", "content")

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), slice, range, PurePath,
          torch.dtype, torch.device, np.dtype)  # fmt: skip


def fingerprint(*values: Any) -> str:
    """A hash of values: the same in other processes, and for other objects of the same class and attributes.

    Functions count with their code, defaults and closures, classes with the version of their package or, where it has
    none, their source. Random state does not count.

    Raises:
        TypeError: for an object that does not show what it holds.

    >>> from monai.transforms import ScaleIntensity
    >>> fingerprint(ScaleIntensity(0, 1)) == fingerprint(ScaleIntensity(0, 1)) != fingerprint(ScaleIntensity(0, 2))
    True
    """
    sha = hashlib.sha256()
    for part in _parts(values, {}, ""):
        sha.update(f"{len(part)}:".encode() + part)
    return sha.hexdigest()


def file_state(value: Any, check: Check) -> list[Any]:
    """What tells whether the files that a record names have changed: for each its size, and its time or its content.

    A folder stands for the files in it (an array in a Zarr store for the metadata of its groups too), and one half of a
    .hdr and .img pair for both. Text that is no file's name says nothing.

    Args:
        value: a record, or part of one.
        check: ``"mtime"``: the time of the last change; ``"content"``: a hash of all bytes.
    """
    if isinstance(value, Mapping):
        return [state for key in value for state in file_state(value[key], check)]
    if isinstance(value, list | tuple):
        return [state for v in value for state in file_state(v, check)]
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        return []
    path = Path(os.fspath(value)).expanduser()
    try:
        return [_state(file, check) for file in _files(path)]
    except (OSError, ValueError):  # a text that no file could be called
        return []


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in (*path.rglob("*"), *metadata_above(path)) if file.is_file())
    pairs = {".hdr": ".img", ".img": ".hdr"}
    other = path.with_suffix(pairs[path.suffix]) if path.suffix in pairs else path
    return sorted({file for file in (path, other) if file.is_file()})


def _state(file: Path, check: Check) -> tuple[str, int, int | str]:
    status = file.stat()
    if check == "mtime":
        return str(file), status.st_size, status.st_mtime_ns
    sha = hashlib.sha256()
    with open(file, "rb") as opened:
        while piece := opened.read(1 << 20):
            sha.update(piece)
    return str(file), status.st_size, sha.hexdigest()


def _parts(value: Any, above: dict[int, int], path: str) -> Iterator[bytes]:
    """What a value is made of. An object inside itself is said by how far above it is."""
    if isinstance(value, enum.Enum):
        yield f"{_name(type(value))}.{value.name}".encode()
        return
    if isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r}".encode()
        return
    if id(value) in above:
        yield f"the {len(above) - above[id(value)]}th above".encode()
        return
    above = {**above, id(value): len(above)}
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        yield from _array(value, path)
    elif isinstance(value, Mapping):
        yield f"{_name(type(value))} {len(value)}".encode()
        for key in value:
            yield from _parts(key, above, path)
            yield from _parts(value[key], above, f"{path}[{key!r}]")
    elif isinstance(value, set | frozenset):
        yield f"{_name(type(value))} {len(value)}".encode()
        yield from sorted(fingerprint(v).encode() for v in value)
    elif isinstance(value, list | tuple):
        yield f"{_name(type(value))} {len(value)}".encode()
        for i, v in enumerate(value):
            yield from _parts(v, above, f"{path}[{i}]")
    elif isinstance(value, FunctionType | CodeType | MethodType | partial | BuiltinFunctionType):
        yield from _function(value, above, path)
    elif isinstance(value, type):
        yield from _class(value)
    elif isinstance(value, ModuleType):
        yield f"module {value.__name__} {getattr(value, '__version__', '')}".encode()
    else:
        yield from _object(value, above, path)


def _object(value: Any, above: dict[int, int], path: str) -> Iterator[bytes]:
    cls = type(value)
    if isinstance(value, np.random.RandomState | np.random.Generator | torch.Generator):
        return
    yield from _class(cls)  # type: ignore[arg-type]
    names = [name for base in cls.__mro__ for name in _slots(base)]
    state = {name: getattr(value, name) for name in names if hasattr(value, name)} | getattr(value, "__dict__", {})
    if isinstance(value, Randomizable):
        state.pop("R", None)
    if hasattr(value, "__dict__") or names:
        for name in sorted(state):
            yield name.encode()
            yield from _parts(state[name], above, f"{path}.{name}")
        return
    try:
        reduce = copyreg.dispatch_table.get(cls)
        reduced: Any = reduce(value) if reduce else value.__reduce_ex__(2)
    except TypeError:
        raise TypeError(
            f"{path.lstrip('.') or 'a transform'} is a {_name(cls)}, which does not show what it holds: nobody could "
            "see it change"
        ) from None
    yield from _parts(reduced if isinstance(reduced, str) else list(reduced), above, path)


def _slots(cls: type) -> list[str]:
    slots = cls.__dict__.get("__slots__", ())
    return [name for name in ([slots] if isinstance(slots, str) else slots) if name not in ("__dict__", "__weakref__")]


def _array(value: Any, path: str) -> Iterator[bytes]:
    array = np.asarray(value) if isinstance(value, np.generic) else as_array(value)
    if array.dtype.hasobject:
        yield from _parts(array.tolist(), {}, path)
    else:
        yield f"{_name(type(value))} {array.dtype} {array.shape}".encode()
        yield array.tobytes()
    if isinstance(value, MetaTensor):
        yield from _parts(value.meta, {}, f"{path}.meta")


def _function(value: Any, above: dict[int, int], path: str) -> Iterator[bytes]:
    if isinstance(value, partial):
        yield b"partial"
        yield from _parts([value.func, value.args, value.keywords], above, path)
    elif isinstance(value, MethodType):
        yield b"method"
        yield from _parts([value.__func__, value.__self__], above, path)
    elif isinstance(value, CodeType):
        yield value.co_code
        yield " ".join((*value.co_names, *value.co_freevars)).encode()
        yield from _parts(value.co_consts, above, path)
    elif isinstance(value, BuiltinFunctionType):
        yield f"{value.__module__}.{value.__qualname__}".encode()
        if not isinstance(value.__self__, ModuleType | NoneType):
            yield from _parts(value.__self__, above, path)
    else:
        yield f"{value.__module__}.{value.__qualname__} {_version(value.__module__)}".encode()
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_bound(cell)]
        code = None if _version(value.__module__) else value.__code__
        yield from _parts([code, value.__defaults__, value.__kwdefaults__, cells], above, path)


def _is_bound(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


@cache
def _class(cls: Hashable) -> tuple[bytes, ...]:
    """A class by its name and, with those that it inherits from, by its package's version or its source."""
    bases = inspect.getmro(cls)  # type: ignore[arg-type]
    return tuple(f"{_name(base)} {_version(base.__module__) or _source(base)}".encode() for base in bases)


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # defined at a prompt, or in C
        code = [value.__code__ for value in vars(cls).values() if isinstance(value, FunctionType)]
        return fingerprint(code)


@cache
def _version(module: str) -> str:
    """The version of the package that a module is of; empty where there is none, as in a project's own scripts."""
    package = module.split(".")[0]
    if package in sys.stdlib_module_names:
        return "" if package == "__main__" else "stdlib"
    return str(getattr(sys.modules.get(package), "__version__", ""))


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
