"""The configuration: every key a user may write, its default and what is allowed.

Decides: which values are legal, and which defaults follow the data set (`resolve`). Never opens a file but
the YAML itself, never imports torch. The paper's values (section Experiments and its appendix) are the defaults.
"""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

DATA_SETS = ("digits", "mnist5k", "cifar10", "cifar100", "npz", "module:function")
CHEAP_OBJECTIVES = ("params", "macs")
EXPENSIVE_OBJECTIVES = ("val_error",)
Operator = Literal["insert", "widen", "skip", "remove", "prune", "separable"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class ConfigError(ValueError):
    """The user's input is wrong: says the key or file, what was given, what is allowed. Exit code 2."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Data(_Section):
    """Which images, and how they are divided. The test part is never read by the search."""

    name: str = Field(description=f"one of {', '.join(DATA_SETS)}")
    root: str | None = Field(None, description="folder (cifar10, cifar100) or file (npz)")
    validation: Positive | None = Field(None, description="number of validation images; default follows the data set")
    test: Positive | None = Field(None, description="number of test images, where the data set has no test part")


class Space(_Section):
    """The search space; `full` is the paper's space I: whole architectures, depth, widths, kernels and skips free."""

    kind: Literal["full"] = "full"


class Objective(_Section):
    """One objective, minimised. `max` and `min` are hard limits on a cheap objective, checked before any training."""

    name: Literal["val_error", "params", "macs"]
    max: Annotated[Finite, Field(gt=0)] | None = None
    min: Annotated[Finite, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _limits_make_sense(self) -> Objective:
        if self.name in EXPENSIVE_OBJECTIVES and (self.max is not None or self.min is not None):
            raise ValueError(f"{self.name} takes no max and no min: it is known only after training")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError(f"min ({self.min:g}) is above max ({self.max:g})")
        return self


class Search(_Section):
    """Algorithm 1 of the paper and the choices it leaves open."""

    mode: Literal["steady_state", "generational"] = "steady_state"
    proposals: Positive = Field(200, description="candidates drawn per ask (the paper's n_pc)")
    accepted: Positive = Field(50, description="children per generation (the paper's n_ac)")
    children: Count = Field(5000, description="budget: distinct children asked after the initial networks")
    operators: tuple[Operator, ...] = Field(OPERATORS, description="those that children may be made by")
    max_edits: Positive = Field(3, description="operators applied per child, uniform in 1..max_edits")
    sampling: Literal["density", "uniform"] = Field(
        "density", description="both stages: inverse density, or uniform (ablation)"
    )
    child_density: Literal["proposals", "front"] = Field(
        "proposals", description="what the second density is fitted on"
    )
    count_in_flight: bool = Field(True, description="the second density also counts children in flight")
    prune_by: Literal["l1", "random"] = Field("l1", description="filters that go: lowest L1 norm, or any")
    inheritance: bool = Field(True, description="false: children start from fresh weights (ablation)")

    @model_validator(mode="after")
    def _enough(self) -> Search:
        if not self.operators:
            raise ValueError(f"operators is empty; allowed are {', '.join(OPERATORS)}")
        if self.proposals < self.accepted:
            raise ValueError(f"proposals ({self.proposals}) must be at least accepted ({self.accepted})")
        return self


class Training(_Section):
    """How a child is trained (paper, appendix on the training pipeline). None: the default follows the data set."""

    epochs: Positive | None = Field(None, description="of a child")
    initial_epochs: Positive | None = Field(None, description="of a network without a parent")
    distill_epochs: Count | None = Field(None, description="epochs of distillation after an approximate operator")
    distill_temperature: Annotated[float, Field(gt=0)] = Field(3.0, description="softens the parent's answers")
    batch_size: Positive = 64
    lr: Annotated[float, Field(gt=0)] | None = Field(None, description="initial rate of SGD; cosine to 0")
    initial_lr: Annotated[float, Field(gt=0)] | None = Field(None, description="for networks without a parent")
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    pad: Count | None = Field(None, description="random crop after padding by this many pixels")
    flip: bool | None = Field(None, description="random horizontal flip")
    cutout: Count | None = Field(None, description="side of the square that is erased, in pixels")
    mixup: Annotated[float, Field(ge=0)] | None = Field(None, description="alpha of the Beta distribution; 0: off")
    inserted_bn: Literal["measured", "unit"] = Field(
        "measured", description="statistics of an inserted BatchNorm: those of its input, or mean 0 and variance 1"
    )
    deterministic: bool | None = Field(None, description="default: true in generational mode")


class Cluster(_Section):
    """Where workers run. `local`: processes on this machine; `inline`: inside this process (tests, debugging)."""

    backend: Literal["local", "inline"] = "local"
    workers: Positive = Field(2, description="trained at the same time")
    cpus_per_worker: Positive = Field(1, description="threads of a worker; small networks do best with 1")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    idle_exit_min: Annotated[float, Field(gt=0)] = Field(10.0, description="a worker without work leaves after this")
    child_timeout_min: Annotated[float, Field(gt=0)] = Field(240.0, description="a child that takes longer fails")
    retries: Count = Field(2, description="further attempts after a worker or trainer process died")


class Storage(_Section):
    """What is kept. Weights of dominated children nobody needs are deleted unless `keep: all`."""

    keep: Literal["front", "all"] = "front"
    seal_every: Positive = Field(1000, description="finished children per sealed HDF5 file")


class Config(_Section):
    """One search. Only `data` is required."""

    seed: Count = 0
    data: Data
    space: Space = Space()
    objectives: tuple[Objective, ...] = (Objective(name="val_error"), Objective(name="params"))
    search: Search = Search()
    training: Training = Training()
    cluster: Cluster = Cluster()
    storage: Storage = Storage()

    @model_validator(mode="after")
    def _objectives_make_sense(self) -> Config:
        names = [objective.name for objective in self.objectives]
        if len(set(names)) != len(names):
            raise ValueError(f"objectives: a name occurs twice in {names}")
        for kind, allowed in (("expensive", EXPENSIVE_OBJECTIVES), ("cheap", CHEAP_OBJECTIVES)):
            if not set(names) & set(allowed):
                raise ValueError(f"objectives: no {kind} one among {names}; allowed are {', '.join(allowed)}")
        return self

    @property
    def cheap(self) -> tuple[Objective, ...]:
        """The objectives that need no training, in the order given."""
        return tuple(o for o in self.objectives if o.name in CHEAP_OBJECTIVES)


def load(source: str) -> Config:
    """Read a configuration: a YAML file's path or a shipped name (`digits`).

    Raises ConfigError naming the file, the key, what was given and what is allowed.
    """
    path = Path(source)
    if not path.exists():
        shipped = resources.files("lemonade_hpc").joinpath("configs", f"{source}.yaml")
        if not shipped.is_file():
            raise ConfigError(f"{source}: no such file, and no shipped configuration; shipped are {', '.join(shipped_names())}")
        return parse(shipped.read_text(), source)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot be read: {error}") from error
    return parse(text, source)


def shipped_names() -> list[str]:
    """The configurations that come with the package."""
    folder = resources.files("lemonade_hpc").joinpath("configs")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def parse(text: str, source: str) -> Config:
    """Check YAML text; `source` names it in errors."""
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{source}: expected keys such as 'data:', got {type(given).__name__}")
    return from_dict(given, source)


def from_dict(given: dict[str, Any], source: str) -> Config:
    """Check a mapping; `source` names it in errors."""
    try:
        return Config.model_validate(_tuples(given))
    except ValidationError as error:
        lines = [f"{source}: {_explain(item)}" for item in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def to_dict(config: Config) -> dict[str, Any]:
    """The JSON form, complete: what `run.json` stores and `from_dict` reads back."""
    return config.model_dump(mode="json")


def _tuples(value: Any) -> Any:
    """Lists to tuples and whole floats kept as they are, so that strict checking accepts YAML's lists."""
    if isinstance(value, dict):
        return {str(key): _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _explain(item: Any) -> str:
    """One pydantic error in the user's words: the key, what was given, what is allowed."""
    where = [part for part in item["loc"] if not str(part).startswith("function-")]
    key = ".".join(str(part) for part in where)
    given = item.get("input")
    if item["type"] == "extra_forbidden":
        valid = sorted(_section(where[:-1]).model_fields)
        near = difflib.get_close_matches(str(where[-1]), valid, 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return f"unknown key '{key}'.{hint} Valid keys here: {', '.join(valid)}"
    if item["type"] == "missing":
        return f"the key '{key}' is required"
    if item["type"] == "value_error":
        return f"{key}: {item['ctx']['error']}" if key else str(item["ctx"]["error"])
    return f"{key}: {item['msg']}, got {given!r}"


def _section(where: list[Any]) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for part in where:
        if isinstance(part, int):
            continue
        annotation: Any = model.model_fields[str(part)].annotation
        if part == "objectives":
            annotation = Objective
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else model
    return model


def template() -> str:
    """A commented YAML file with every key: what `init` writes. Keys that are not set take the default shown."""
    lines = ["# One search. Only `data` is required; every other line shows its default.", ""]
    for name, field in Config.model_fields.items():
        section = _section([name])
        if section is Config:
            lines.append(f"{name}: {field.default}")
        elif name == "objectives":
            lines += ["# Minimised; cheap ones (params, macs) take hard limits `max` and `min`.", "objectives:"]
            lines += ["  - {name: val_error}", "  - {name: params}    # max: 2.0e6"]
        else:
            lines += [f"# {(section.__doc__ or '').strip()}", f"{name}:"]
            lines += [_template_line(key, item) for key, item in section.model_fields.items()]
        lines.append("")
    return "\n".join(lines)


def _template_line(key: str, field: Any) -> str:
    """One key of a section; commented out where its default is found later."""
    if field.is_required():
        return f"  {key}: digits    # {field.description}"
    default = field.default
    value = yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True)
    value = value.removesuffix("\n").removesuffix("...").strip()
    note = f"    # {field.description}" if field.description else ""
    return f"  # {key}:{note}" if default is None else f"  {key}: {value}{note}"


def resolve(config: Config, shape: tuple[int, int, int]) -> Config:
    """Fill in the defaults that follow the data set's image shape (C, H, W), and the mode.

    Small images (below 16 pixels) get short trainings and no flip, cutout or mixup; larger ones the paper's values.
    """
    small = min(shape[1:]) < 16
    defaults: dict[str, Any] = {
        "epochs": 5 if small else 20,
        "initial_epochs": 20,
        "distill_epochs": 1 if small else 5,
        "lr": 0.05 if small else 0.01,
        "initial_lr": 0.1 if small else 0.05,
        "pad": 1 if small else 4,
        "flip": not small and shape[0] == 3,
        "cutout": 0 if small else 16,
        "mixup": 0.0 if small else 1.0,
        "deterministic": config.search.mode == "generational",
    }
    chosen = {key: value for key, value in defaults.items() if getattr(config.training, key) is None}
    return config.model_copy(update={"training": config.training.model_copy(update=chosen)})
