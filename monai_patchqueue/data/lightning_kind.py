# SPDX-License-Identifier: Apache-2.0
"""Where Lightning is installed, data modules are also ``LightningDataModule``."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from typing_extensions import Self

__all__ = ["LightningKind"]

_kinds: dict[tuple[type, type], type] = {}


class LightningKind:
    """Base of classes whose objects are ``LightningDataModule`` too, where Lightning is installed.

    Found out when an object is made, as importing Lightning takes a second that most users of this package have no need
    to wait for. The object's class is a subclass of both then.
    """

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """An object of the class, or of its subclass for Lightning."""
        return object.__new__(_with_lightning(cls))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __reduce__(self) -> tuple[Any, ...]:
        cls = type(self)
        declared = next((given for (given, _), kind in _kinds.items() if kind is cls), cls)
        return _made_anew, (declared,), self.__getstate__()


def _made_anew(cls: type[LightningKind]) -> LightningKind:
    return cls.__new__(cls)


def _with_lightning(cls: type) -> type:
    base = _lightning_data_module()
    if base is None or issubclass(cls, base):
        return cls
    if (cls, base) not in _kinds:
        members = {"__doc__": cls.__doc__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        _kinds[cls, base] = type(cls.__name__, (cls, base), members)
    return _kinds[cls, base]


def _lightning_data_module() -> type | None:
    """Of the package that is in use already, where both names of Lightning are installed."""
    for name in sorted(["lightning.pytorch", "pytorch_lightning"], key=lambda name: sys.modules.get(name) is None):
        try:
            base: type = import_module(name).LightningDataModule
        except ImportError:
            continue
        return base
    return None
