# SPDX-License-Identifier: Apache-2.0
"""Patch queues for MONAI: train on patches of 3D medical images without waiting for data."""

from __future__ import annotations

from .data import *
from .data import __all__ as _data
from .handlers import *
from .handlers import __all__ as _handlers
from .inference import *
from .inference import __all__ as _inference
from .io import *
from .io import __all__ as _io
from .queue import *
from .queue import __all__ as _queue
from .report import *
from .report import __all__ as _report
from .transforms import *
from .transforms import __all__ as _transforms

__all__ = [*_data, *_handlers, *_inference, *_io, *_queue, *_report, *_transforms]
__version__ = "0.1.0"
