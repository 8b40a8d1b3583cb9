# SPDX-License-Identifier: Apache-2.0
"""The settings of a training run, checked before anything is compiled.

A config is an `ml_collections.ConfigDict`: `base_config` has every key with its
default, and a file in `configs/` changes some of them. `read_settings` turns a config
into records; whatever is wrong with it raises a ValueError of one sentence.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from semlic_jax.model.compression import SIZES, ModelConfig
from semlic_jax.objectives.adversary import Discriminator, Labeller
from semlic_jax.objectives.features import NETWORKS
from semlic_jax.training.stages import LabellerStage, Stage
from semlic_jax.weights import pretrained_models

LABELLER_STAGE = "labeller"
# LPIPS's names of the trunks.
LPIPS_NAMES = {"alexnet": "alex", "vgg16": "vgg", "squeezenet1_1": "squeeze"}
_DTYPES = ("float32", "bfloat16")
# Fields of Linen modules that configs do not set.
_MODULE_FIELDS = {"parent", "name", "dtype"}
# Those that may be 0, and lists that may be empty.
_MAY_BE_NONE = {
    *("blocks", "context_channels", "feature_channels"),
    *("up_widths", "mix_widths"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The photographs to train on, and how batches are made of them.

    Attributes:
        train: folders, globs of files, `tfds:...`, `synthetic:N`; see `sources`.
        batch: images per update, over all processes.
        crop: side of the crops in pixels, a multiple of 64.
        small_images: `skip` images with a side under the crop, or `reflect` to pad
            them.
        smallest_scale, largest_scale: images are scaled down by a random factor between
            these; a factor below 1 scales up.
        cache_mb: memory for decoded images, in MiB.
        threads: threads that decode and crop; 0 for one per CPU that the process
            may use, at most 16.
    """

    train: tuple[str, ...] = ("data/train",)
    batch: int = 8
    crop: int = 128
    small_images: str = "skip"
    smallest_scale: float = 1.0
    largest_scale: float = 2.0
    cache_mb: int = 2048
    threads: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """How the devices are used.

    Attributes:
        data: devices that batches are split over; 0 for all.
        model: devices that large parameters are split over.
        shard_from: number of elements from which a parameter counts as large.
    """

    data: int = 0
    model: int = 1
    shard_from: int = 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole configuration.

    Attributes:
        model: name of the codec's size, a key of `SIZES`.
        architecture: fields of its `ModelConfig` to change.
        seed: seed of the initial parameters and, together with a stage's name, of its
            batches and noise.
        dtype: type that the transforms, the trunk and the adversary compute in;
            parameters and the entropy model are always float32.
        remat: recompute residual blocks in the backward pass, which saves memory.
        features: file or folder of the trunk's weights; "" takes SEMLIC_FEATURES.
        trunk: name of the feature network; "" takes SqueezeNet 1.0 if weights are
            given, else the packaged network.
        learnt_heads: weight the trunk's channels as LPIPS does; needs
            `lpips_v0.1_*.npz` beside the trunk's weights.
        init_from: folder of a stage's checkpoints to start the codec from, a model
            file, or the name of a packaged model.
        labeller_from: folder of a stage's checkpoints to take the labeller from.
        data: the input.
        mesh: the devices.
        labeller, discriminator: the adversary's modules; a config gives their keyword
            arguments as `networks.labeller` and `networks.discriminator`.
        stages: names of stages in order; each is a key of the config.
        records: the records of these stages, in the same order.
        checkpoint_steps, log_steps, image_steps: steps between checkpoints, log rows
            and pictures; no pictures if image_steps is 0.
        keep_checkpoints: how many checkpoints of a stage are kept, the latest ones.
        tensorboard: write TensorBoard files if clu is installed.
    """

    model: str = "small"
    architecture: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    dtype: str = "float32"
    remat: bool = False
    features: str = ""
    trunk: str = ""
    learnt_heads: bool = False
    init_from: str = ""
    labeller_from: str = ""
    data: Data = Data()
    mesh: MeshSettings = MeshSettings()
    labeller: Labeller = Labeller()
    discriminator: Discriminator = Discriminator()
    stages: tuple[str, ...] = ()
    records: tuple[Stage | LabellerStage, ...] = ()
    checkpoint_steps: int = 500
    keep_checkpoints: int = 2
    log_steps: int = 50
    image_steps: int = 0
    tensorboard: bool = True

    def stage_seed(self, stage: str) -> int:
        """Seed of a stage's batches and noise; no two stages see the same crops."""
        return zlib.crc32(f"{self.seed} {stage}".encode()) // 2  # a positive int32

    @property
    def model_config(self) -> ModelConfig:
        """The codec's architecture."""
        return dataclasses.replace(SIZES[self.model], **self.architecture)


def to_dict(record: Any) -> dict[str, Any]:
    """A record as nested dicts, for a ConfigDict."""
    return dataclasses.asdict(record)


def base_config() -> ConfigDict:
    """A config with every key except those of stages, at its default."""
    defaults = {
        field.name: getattr(Settings(), field.name)
        for field in dataclasses.fields(Settings)
        if field.name not in ("records", "labeller", "discriminator")
    }
    defaults |= {"data": to_dict(Data()), "mesh": to_dict(MeshSettings())}
    defaults["networks"] = {
        "labeller": _module_defaults(Labeller),
        "discriminator": _module_defaults(Discriminator),
    }
    return ConfigDict(defaults)


def stage_config(name: str, **fields: Any) -> ConfigDict:
    """The config of a stage with every key; `fields` may be nested dicts."""
    cls = LabellerStage if name == LABELLER_STAGE else Stage
    record = ConfigDict(to_dict(_record(cls, {"name": name, **fields}, name)))
    del record["name"]
    return record


def read_settings(config: Any) -> Settings:
    """Checks a config and turns it into records.

    Args:
        config: a ConfigDict or nested dicts.

    Raises:
        ValueError: there is an unknown key (the message names the nearest known one), a
            value of the wrong type or out of range, or a stage without a record.
    """
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    names = tuple(config.get("stages", ()))
    known = {field.name for field in dataclasses.fields(Settings)}
    known -= {"records", "labeller", "discriminator"}
    # Every record is checked, even those of stages that are not run.
    records = {
        name: config.pop(name)
        for name in list(config)
        if name not in known | {"networks"} and isinstance(config[name], Mapping)
    }
    for name in names:
        if names.count(name) > 1:
            # Both would share a folder of checkpoints: the second would end at once.
            raise ValueError(
                f"config.stages must name each stage once, found {name!r} "
                f"{names.count(name)} times"
            )
        if name not in records:
            raise ValueError(
                f"config.stages names {name!r}, but the config has no such stage; "
                f"found {', '.join(sorted(records)) or 'none'}"
            )
    built = {}
    for name, fields in records.items():
        if "steps" not in fields and name not in names:
            _refuse_unknown([name], known | set(names) | {"networks"}, "config")
        cls = LabellerStage if name == LABELLER_STAGE else Stage
        built[name] = _record(cls, {"name": name, **fields}, f"config.{name}")
    networks = config.pop("networks", {})
    _refuse_unknown(networks, {"labeller", "discriminator"}, "config.networks")
    _refuse_unknown(config, known, "config")
    modules = {
        "labeller": _module(Labeller, networks.get("labeller", {})),
        "discriminator": _module(Discriminator, networks.get("discriminator", {})),
    }
    settings = _record(Settings, config, "config", **modules)
    settings = dataclasses.replace(
        settings, records=tuple(built[name] for name in names)
    )
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    def choose(name: str, value: str, known: Iterable[str]) -> None:
        if value not in known:
            raise ValueError(
                f"config.{name} must be one of {', '.join(sorted(known))}, "
                f"found {value!r}"
            )

    choose("model", settings.model, SIZES)
    choose("dtype", settings.dtype, _DTYPES)
    if settings.trunk:
        choose("trunk", settings.trunk, NETWORKS)
    if settings.learnt_heads:
        choose("trunk (with learnt_heads)", settings.trunk, LPIPS_NAMES)
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    _refuse_unknown(settings.architecture, fields, "config.architecture")
    _ = settings.model_config  # checks itself
    if not settings.stages:
        raise ValueError("config.stages must name at least one stage, found none")
    data = settings.data
    if data.crop < 64 or data.crop % 64:
        raise ValueError(
            f"config.data.crop must be a multiple of 64, found {data.crop}"
        )
    least = {"checkpoint_steps": 1, "log_steps": 1, "keep_checkpoints": 1}
    for name, value in (least | {"image_steps": 0, "seed": 0}).items():
        if getattr(settings, name) < value:
            raise ValueError(
                f"config.{name} must be at least {value}, found "
                f"{getattr(settings, name)}"
            )
    if settings.seed >= 2**32:  # random keys have no more bits
        raise ValueError(f"config.seed must be below 2**32, found {settings.seed}")
    for name, value in {"batch": 1, "threads": 0}.items():
        if getattr(data, name) < value:
            raise ValueError(
                f"config.data.{name} must be at least {value}, found "
                f"{getattr(data, name)}"
            )
    if not data.train:
        raise ValueError(
            "config.data.train must name at least one source of photographs, found none"
        )
    for module in (settings.labeller, settings.discriminator):
        _check_module(module)
    for name in ("init_from", "labeller_from"):
        folder = getattr(settings, name)
        model = name == "init_from" and (
            folder in pretrained_models() or epath.Path(folder or ".").is_file()
        )
        if folder and not model and not epath.Path(folder).is_dir():
            raise ValueError(f"config.{name}: the folder {folder} does not exist")
    for stage in settings.records:
        if isinstance(stage, LabellerStage):
            if data.crop % settings.labeller.stride:
                raise ValueError(
                    f"config.data.crop must be a multiple of the labeller's stride "
                    f"{settings.labeller.stride}, found {data.crop}"
                )
        elif stage.weights.adversarial:
            _check_adversary(settings, stage)


def _check_module(module: Labeller | Discriminator) -> None:
    where = f"config.networks.{type(module).__name__.lower()}"
    for name, default in _module_defaults(type(module)).items():
        value = getattr(module, name)
        if isinstance(value, tuple):
            fits = all(isinstance(each, int) and each >= 1 for each in value)
            if not fits or not (value or name in _MAY_BE_NONE):
                raise ValueError(
                    f"{where}.{name} must hold whole numbers of at least 1, found "
                    f"{value}"
                )
        elif not isinstance(default, bool):
            least = 0 if name in _MAY_BE_NONE else 1
            if value < least:
                raise ValueError(
                    f"{where}.{name} must be at least {least}, found {value}"
                )
    if isinstance(module, Discriminator):
        down, up = len(module.widths), len(module.up_widths)
        if up > down:
            raise ValueError(
                f"{where} must have no more up_widths than widths, found {up} and "
                f"{down}"
            )


def _check_adversary(settings: Settings, stage: Stage) -> None:
    discriminator, labeller = settings.discriminator, settings.labeller
    if settings.data.crop % discriminator.multiple:
        raise ValueError(
            f"config.data.crop must be a multiple of the discriminator's "
            f"{discriminator.multiple}, found {settings.data.crop}"
        )
    if stage.adversary.split_batch and settings.data.batch < 2:
        raise ValueError(
            "split_batch needs batches of at least 2, found "
            f"config.data.batch={settings.data.batch}"
        )
    if stage.adversary.binary or stage.adversary.codes == "features":
        return
    if labeller.stride != discriminator.stride:
        raise ValueError(
            "labeller and discriminator must have the same stride, found "
            f"{labeller.stride} and {discriminator.stride}"
        )
    before = settings.stages[: settings.stages.index(stage.name)]
    if not settings.labeller_from and LABELLER_STAGE not in before:
        raise ValueError(
            f"the stage {stage.name} needs a labeller: run the stage "
            f"{LABELLER_STAGE} before it or set config.labeller_from to the folder "
            "of its checkpoints"
        )


def _module_defaults(cls: Any) -> dict[str, Any]:
    # The discriminator's number of classes follows from the number of codes.
    hidden = _MODULE_FIELDS | ({"classes"} if cls is Discriminator else set())
    return {
        field.name: field.default
        for field in dataclasses.fields(cls)
        if field.name not in hidden
    }


def _module(cls: Any, fields: Mapping[str, Any]) -> Any:
    where = f"config.networks.{cls.__name__.lower()}"
    defaults = _module_defaults(cls)
    _refuse_unknown(fields, set(defaults), where)
    return cls(
        **{
            name: _value(type(defaults[name]), value, f"{where}.{name}")
            for name, value in fields.items()
        }
    )


def _record(cls: Any, fields: Mapping[str, Any], where: str, **ready: Any) -> Any:
    """Make an instance of a dataclass from nested dicts; check their keys and types."""
    hints = typing.get_type_hints(cls)
    _refuse_unknown(fields, set(hints), where)
    values = {
        name: _value(hints[name], value, f"{where}.{name}")
        for name, value in fields.items()
    }
    try:
        return cls(**values, **ready)
    except TypeError as error:
        raise ValueError(f"{where} is incomplete: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    hint = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(hint):
        return _record(hint, value, where) if isinstance(value, Mapping) else value
    if hint is tuple or typing.get_origin(hint) is tuple:
        return _tuple(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and not isinstance(value, hint):
        raise ValueError(f"{where} must be of type {hint.__name__}, found {value!r}")
    return value


def _tuple(hint: Any, value: Any, where: str) -> tuple[Any, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, tuple | list):
        raise ValueError(f"{where} must be of type tuple, found {value!r}")
    kind = next(iter(typing.get_args(hint)), object)
    for each in values:
        if not isinstance(each, kind):
            raise ValueError(
                f"{where} must hold values of type {kind.__name__}, found {each!r}"
            )
    return tuple(values)


def _refuse_unknown(found: Iterable[str], known: set[str], where: str) -> None:
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where} has no key {key!r}{hint}")
