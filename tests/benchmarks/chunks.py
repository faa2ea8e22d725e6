# SPDX-License-Identifier: Apache-2.0
"""Which library, codec and shape of chunks keeps volumes for random patches: bytes, and time to read a patch.

The fastest of several readings of each patch counts, so that other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from tqdm import tqdm

from monai_patchqueue.io import chunks

from .volumes import make_volume

HELP = "bytes and reading times of volumes in chunks, by library, codec and shape"

Read = Callable[[tuple[slice, ...]], Any]
SHAPES = [
    ((64, 64, 64), (16, 16, 32)),
    ((64, 64, 64), (16, 16, 16)),
    ((64, 64, 64), (32, 32, 32)),
    ((32, 32, 32), (16, 16, 32)),
    ((128, 128, 128), (16, 16, 32)),
]
CODECS = [("LZ4", 5), ("LZ4HC", 1), ("LZ4HC", 5), ("LZ4HC", 9), ("BLOSCLZ", 5), ("ZSTD", 1)]


class Format(NamedTuple):
    """How a volume is kept, and what writes it and gives what reads patches of it."""

    name: str
    write: Callable[[np.ndarray, Path], Read]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", type=int, nargs=3, default=(192, 192, 160), metavar="N")
    parser.add_argument("--image", type=Path, help="a real image (NIfTI), besides the synthetic ones")
    parser.add_argument("--patches", type=int, default=40)


def main(arguments: argparse.Namespace) -> int:
    image, label = make_volume(arguments.shape, 0)
    volumes = {"synthetic int16": image, "label uint8": label, "normalized float32": _normalized(image)}
    if arguments.image:
        volumes["real int16"] = np.asarray(nib.load(arguments.image).dataobj).astype(np.int16)
    print("| volume | kept as | ratio | write s | 64^3 ms | 96^3 ms |\n|---|---|---|---|---|---|")
    formats = [*_blosc2(), *_zarr()]
    with tempfile.TemporaryDirectory() as folder:
        for name, volume in tqdm(volumes.items(), leave=False):
            times = " | ".join(_times(None, volume, arguments.patches))
            print(f"| {name} | in memory, copied | 1.0 | | {times} |")
            for number, kept in enumerate(tqdm(formats, leave=False)):
                path = Path(folder, f"{name}-{number}")
                start = time.perf_counter()
                read = kept.write(np.ascontiguousarray(volume), path)
                seconds = time.perf_counter() - start
                size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
                times = " | ".join(_times(read, volume, arguments.patches))
                print(f"| {name} | {kept.name} | {volume.nbytes / size:.1f} | {seconds:.2f} | {times} |", flush=True)
    return 0


def _times(read: Read | None, volume: np.ndarray, patches: int) -> Iterator[str]:
    for size in (64, 96):
        rng = np.random.default_rng(0)
        total = 0.0
        for _ in range(patches):
            start = [int(rng.integers(0, n - size + 1)) for n in volume.shape]
            index = tuple(slice(a, a + size) for a in start)
            total += min(_time(read or (lambda i: volume[i].copy()), index) for _ in range(5))
        yield f"{1000 * total / patches:.2f}"


def _time(action: Read, index: tuple[slice, ...]) -> float:
    start = time.perf_counter()
    action(index)
    return time.perf_counter() - start


def _normalized(image: np.ndarray) -> np.ndarray:
    normalized: np.ndarray = ((image - image.mean()) / image.std()).astype(np.float32)
    return normalized


def _blosc2() -> Iterator[Format]:
    import blosc2

    def write(codec: str, level: int, shuffle: bool, chunk: Sequence[int], block: Sequence[int]) -> Any:
        def write_to(volume: np.ndarray, path: Path) -> Read:
            filters = [blosc2.Filter.SHUFFLE if shuffle and volume.itemsize > 1 else blosc2.Filter.NOFILTER]
            cparams = {"codec": blosc2.Codec[codec], "clevel": level, "filters": filters, "nthreads": 1}
            path.write_bytes(blosc2.asarray(volume, chunks=chunk, blocks=block, cparams=cparams).to_cframe())
            return _file(path, volume, mmap=True)

        return write_to

    def ours(mmap: bool) -> Any:
        def write_to(volume: np.ndarray, path: Path) -> Read:
            path.write_bytes(chunks.compress(volume, chunks.default_chunk_shape(volume.ndim)))
            return _file(path, volume, mmap)

        return write_to

    yield Format("**ours**", ours(True))
    yield Format("ours, plain reads", ours(False))
    chunk, block = SHAPES[0]
    for codec, level in CODECS:
        yield Format(f"{codec} {level}, {_text(chunk)} in {_text(block)}", write(codec, level, True, chunk, block))
    yield Format(f"LZ4HC 9 without shuffling, {_text(chunk)} in {_text(block)}", write("LZ4HC", 9, False, chunk, block))
    for chunk, block in SHAPES[1:]:
        yield Format(f"LZ4HC 9, {_text(chunk)} in {_text(block)}", write("LZ4HC", 9, True, chunk, block))


def _file(path: Path, volume: np.ndarray, mmap: bool) -> Read:
    return chunks.ChunkedFile(str(path), volume.shape, volume.dtype, mmap).__getitem__


def _zarr() -> Iterator[Format]:
    import zarr
    from zarr.codecs import BloscCodec

    def write(name: str, chunk: Sequence[int]) -> Any:
        def write_to(volume: np.ndarray, path: Path) -> Read:
            codec = BloscCodec(cname=name, clevel=9, shuffle="shuffle")
            chunks = [size or n for size, n in zip(chunk, volume.shape, strict=True)]
            options = {"dtype": volume.dtype, "chunks": chunks, "compressors": [codec]}
            array = zarr.create_array(path, shape=volume.shape, **options)
            array[:] = volume
            return zarr.open_array(path, mode="r").__getitem__

        return write_to

    for name in ("lz4hc", "zstd"):
        for chunk in ((32, 32, 32), (64, 64, 64), (1, 0, 0)):
            yield Format(f"Zarr 3, {name} 9, {'slices' if 0 in chunk else _text(chunk)}", write(name, chunk))


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
