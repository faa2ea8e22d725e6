# SPDX-License-Identifier: Apache-2.0
"""The training loader of a bundle that need not know of this package: found, built without a network, overridden."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.data import list_data_collate
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, default_collate

from ..data import PatchQueueLoader
from ..data.volumes import sample_count_holder
from ..queue.timing import pipeline_stages

__all__ = ["as_queue_loader", "build_dataloader", "find_dataloader", "overrides_for", "read_bundle"]

_USUAL_ID = "train#dataloader"
_REFERENCE = re.compile(r"@([\w.]+(?:(?:#|::)[\w.]+)*)")


def read_bundle(config_files: Sequence[str], overrides: Mapping[str, Any]) -> ConfigParser:
    """Read a bundle's config as ``monai.bundle run`` does, without building anything.

    Args:
        config_files: JSON or YAML files; later ones override earlier ones.
        overrides: values by id (``{"train#dataloader#num_workers": 4}``).

    Raises:
        FileNotFoundError: a file that is not there.
    """
    for file in config_files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no config file {file!r}.")
    parser = ConfigParser()
    parser.read_config(list(config_files))
    metadata = Path(config_files[0]).parent / "metadata.json"
    if metadata.is_file():
        parser.read_meta(str(metadata))
    parser.update(pairs=dict(overrides))
    return parser


def find_dataloader(parser: ConfigParser, dataloader_id: str | None = None) -> str:
    """The id of a config's training loader.

    It is ``dataloader_id`` where that is given; else ``train#dataloader``, what the trainer refers to as its
    ``train_data_loader``, or the only component with a target whose name ends in "Loader".

    Raises:
        ValueError: none is found, or more than one.

    Example:
        >>> find_dataloader(ConfigParser({"my_loader": {"_target_": "ThreadDataLoader", "dataset": "@d"}}))
        'my_loader'
    """
    if dataloader_id is not None:
        if dataloader_id not in parser:
            raise ValueError(f"the config has no {dataloader_id!r}.")
        return dataloader_id
    if _USUAL_ID in parser:
        return _USUAL_ID
    components = dict(_components("", parser.get()))
    for component in components.values():
        reference = _REFERENCE.fullmatch(str(component.get("train_data_loader")))
        if reference:
            return reference[1]
    found = [place for place, component in components.items() if str(component["_target_"]).endswith("Loader")]
    training = [place for place in found if "train" in place] or found
    if len(training) != 1:
        seen = f"several loaders ({', '.join(training)})" if training else "no loader"
        raise ValueError(f"the config has no {_USUAL_ID!r}, and {seen}: name one with --dataloader_id.")
    return training[0]


def build_dataloader(parser: ConfigParser, dataloader_id: str) -> DataLoader[Any]:
    """Build a loader and what it refers to, and nothing else of the bundle.

    Raises:
        TypeError: what is built is no loader over a map-style dataset.
    """
    loader = parser.get_parsed_content(dataloader_id)
    if not isinstance(loader, DataLoader):
        raise TypeError(f"{dataloader_id} is a {type(loader).__name__}; expected a DataLoader.")
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            f"{dataloader_id} reads from a {type(loader.dataset).__name__}, whose volumes cannot be asked for one by "
            "one; expected a map-style dataset."
        )
    return loader


def as_queue_loader(loader: DataLoader[Any], **changes: Any) -> PatchQueueLoader:
    """A ``PatchQueueLoader`` of the same dataset that gives the same batches, but for the mixing.

    Args:
        loader: one of ours, or any other ``DataLoader``.
        changes: arguments with other values.
    """
    in_order = isinstance(loader.sampler, (RandomSampler, SequentialSampler))
    if isinstance(loader, PatchQueueLoader):
        names = list(inspect.signature(PatchQueueLoader.__init__).parameters)[1:]
        arguments = {name: getattr(loader, name) for name in names}
        arguments |= {"batch_unit": arguments["batch_unit"] or "patch", "start_background": False, "progress": False}
        if "queue_length" in changes:
            arguments["ram_budget"] = None
        if "num_workers" in changes:
            arguments["executor"] = None
    else:
        if loader.batch_size is None:
            raise ValueError("the loader has a batch_sampler; PatchQueueLoader draws batches from its queue.")
        arguments = {
            "dataset": loader.dataset,
            "num_workers": loader.num_workers,
            "batch_size": loader.batch_size,
            "batch_unit": "volume",
            "shuffle": isinstance(loader.sampler, RandomSampler),
            "drop_last": loader.drop_last,
            "collate_fn": None if loader.collate_fn in (list_data_collate, default_collate) else loader.collate_fn,
        }
    return PatchQueueLoader(**{**arguments, "sampler": None if in_order else loader.sampler, **changes})


def overrides_for(
    parser: ConfigParser, dataloader_id: str, loader: DataLoader[Any], changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Values by id that make a bundle's loader a ``PatchQueueLoader`` with changed arguments.

    A value that the config takes from elsewhere (``"@num_workers"``) is changed there, as whoever runs the bundle
    would.

    Args:
        parser: of the config.
        dataloader_id: where the loader is in it.
        loader: as built.
        changes: arguments of ``PatchQueueLoader`` with new values.

    Raises:
        ValueError: the config makes the loader, or the number of samples, in a way that an override cannot reach.
    """
    node = parser.get(dataloader_id)
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ValueError(f"{dataloader_id} is {node!r}, not a component with a '_target_': it cannot be overridden.")
    values: dict[str, Any] = {}
    if not isinstance(loader, PatchQueueLoader):
        values[f"{dataloader_id}#_target_"] = "monai_patchqueue.PatchQueueLoader"
        values[f"{dataloader_id}#batch_unit"] = "volume"
        refused = {"prefetch_factor", "batch_sampler", "in_order"} & node.keys()
        values.update({f"{dataloader_id}#{name}": True if name == "in_order" else None for name in sorted(refused)})
        known = inspect.signature(PatchQueueLoader.__init__).parameters
        unknown = sorted(name for name in node if name not in known and not name.startswith("_"))
        if unknown:
            raise ValueError(f"{dataloader_id} has arguments that PatchQueueLoader does not: {', '.join(unknown)}.")
    for name, value in changes.items():
        place = f"{dataloader_id}#{name}"
        if name == "samples_per_volume":
            if node.get(name) is not None:
                values[_source(parser, place)] = value
            values[_samples_place(parser, loader.dataset)] = value
        elif name == "patch_transform":
            values[place] = node["item_transform"]
        elif value is None:
            values[place] = None
        else:
            values[_source(parser, place)] = value
        if name == "queue_length" and node.get("ram_budget") is not None:
            values[f"{dataloader_id}#ram_budget"] = None
    return values


def _source(parser: ConfigParser, place: str) -> str:
    """Where a value comes from, references followed."""
    while place in parser:
        reference = _REFERENCE.fullmatch(str(parser.get(place)))
        if not reference or reference[1] not in parser:
            break
        place = reference[1]
    return place.replace("::", "#")


def _samples_place(parser: ConfigParser, dataset: Any) -> str:
    holder = sample_count_holder(dataset)
    sampler = next(
        stage for stage in pipeline_stages(dataset).values() if holder in (stage, getattr(stage, "cropper", None))
    )
    name = type(sampler).__name__
    places = {
        _source(parser, f"{place}#num_samples")
        for place, component in _components("", parser.get())
        if str(component["_target_"]).rpartition(".")[2] in (name, f"{name[:-1]}D", f"{name[:-1]}Dict")
        and "num_samples" in component
    }
    if len(places) != 1:
        raise ValueError(
            f"{name}.num_samples={holder.num_samples} is to be changed, and the config has {len(places)} places for it."
        )
    return places.pop()


def _components(place: str, value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All parts of a config with a ``_target_``, by id."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield place, value
        parts = list(value.items())
    else:
        parts = list(enumerate(value)) if isinstance(value, list) else []
    for name, part in parts:
        yield from _components(f"{place}#{name}" if place else str(name), part)
