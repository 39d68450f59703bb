"""The configuration: every key a user may write, its default and what is allowed.

Decides: which values are legal, and which defaults follow the data set (`resolve`). Never opens a file but
the YAML itself, never imports torch. The paper's values (section Experiments and its appendix) are the defaults.
"""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lemonade_hpc import explain, files

DATA_SETS = ("digits", "mnist5k", "cifar10", "cifar100", "npz", "module:function")
CHEAP_OBJECTIVES = ("params", "macs")
EXPENSIVE_OBJECTIVES = ("val_error",)
Operator = Literal["insert", "widen", "skip", "remove", "prune", "separable"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)


def _number(value: Any) -> Any:
    """Read text as a number where it is one: YAML 1.1 takes `1e-3` and `2.0e6` for text. All else stays as it is."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def _whole(value: Any) -> Any:
    """Read `5.0` and `5e3` as whole numbers. All else stays as it is."""
    number = _number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else number


Count = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Real = Annotated[float, BeforeValidator(_number)]


class ConfigError(ValueError):
    """The user's input is wrong: says the key or file, what was given, what is allowed. Exit code 2."""


class _Section(BaseModel):
    """Frozen, and strict: no unknown key, no number for a text, no text for a truth value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Data(_Section):
    """Which images, and how they are divided. The test part is never read by the search."""

    name: str = Field(description=f"one of {', '.join(DATA_SETS)}")
    root: str | None = Field(None, description="folder (cifar10, cifar100) or file (npz)")
    axes: Literal["NHWC", "NCHW"] | None = Field(
        None, description="order of the axes of your own 4-d arrays, where it cannot be told from their shape"
    )
    validation: Positive | None = Field(
        None, description="images for validation: 350 (digits), 1000 (mnist5k), 5000 (cifar), else a fifth"
    )
    test: Positive | None = Field(
        None, description="images split off for test, where no test part is given: 350, 1000, else a fifth"
    )


class Space(_Section):
    """The search space; `full` is the paper's space I: whole architectures, depth, widths, kernels and skips free."""

    kind: Literal["full"] = "full"


class Objective(_Section):
    """One objective, minimised. `max` and `min` are hard limits on a cheap objective, checked before any training."""

    name: Literal["val_error", "params", "macs"]
    max: Annotated[Real, Field(gt=0)] | None = None
    min: Annotated[Real, Field(ge=0)] | None = None

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
    children: Count = Field(
        5000, description="budget: distinct children asked after the initial networks (`search digits`: 600)"
    )
    operators: Annotated[tuple[Operator, ...], Field(strict=False)] = Field(
        OPERATORS, description="those that children may be made by"
    )
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
        if len(set(self.operators)) < len(self.operators):
            raise ValueError(f"operators: one occurs twice in {', '.join(self.operators)}")
        if self.proposals < self.accepted:
            raise ValueError(f"proposals ({self.proposals}) must be at least accepted ({self.accepted}); set both")
        return self


class Training(_Section):
    """How a child is trained (paper, appendix on the training pipeline)."""

    # inserted_bn follows `tests/benchmarks/measured_bn.py`: on mnist5k at the paper's rate, `measured` is 0.11 +- 0.06
    # points better after 3 epochs; whole searches on digits gain the same hypervolume with either (3 seeds).
    epochs: Positive | None = Field(None, description="of a child")
    initial_epochs: Positive | None = Field(None, description="of a network without a parent")
    distill_epochs: Count | None = Field(None, description="epochs of distillation after an approximate operator")
    distill_temperature: Annotated[Real, Field(gt=0)] = Field(3.0, description="softens the parent's answers")
    batch_size: Positive = 64
    lr: Annotated[Real, Field(gt=0)] | None = Field(None, description="initial rate of SGD; cosine to 0")
    initial_lr: Annotated[Real, Field(gt=0)] | None = Field(None, description="for networks without a parent")
    momentum: Annotated[Real, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[Real, Field(ge=0)] | None = Field(None, description="of SGD, on every weight")
    pad: Count | None = Field(None, description="random crop after padding by this many pixels")
    flip: bool | None = Field(None, description="random horizontal flip; by default of colour images only")
    cutout: Count | None = Field(None, description="side of the erased square; by default at most half the image's")
    mixup: Annotated[Real, Field(ge=0)] | None = Field(None, description="alpha of the Beta distribution; 0: off")
    inserted_bn: Literal["measured", "unit"] = Field(
        "measured", description="statistics of an inserted BatchNorm: its input's, or 0 and 1"
    )
    deterministic: bool | None = Field(None, description="the same bits every time; by default in generational mode")


class Cluster(_Section):
    """Where workers run. `local`: processes on this machine; `slurm`: jobs; `inline`: inside this process (tests)."""

    backend: Literal["local", "slurm", "inline"] = "local"
    workers: Positive = Field(2, description="trained at the same time")
    cpus_per_worker: Positive = Field(1, description="threads of a worker; small networks do best with 1")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    idle_exit_min: Annotated[Real, Field(gt=0)] = Field(10.0, description="a worker without work leaves after this")
    child_timeout_min: Annotated[Real, Field(gt=0)] = Field(
        240.0, description="a child that keeps a worker longer fails"
    )
    retries: Count = Field(2, description="further attempts at a child whose trainer process died")
    max_workers: Positive | None = Field(None, description="workers started in the whole run, at most")
    max_gpu_hours: Annotated[Real, Field(gt=0)] | None = Field(
        None, description="when these are spent, children in training are ended and the search stops"
    )
    checkpoint_min: Annotated[Real, Field(ge=0)] = Field(
        10.0, description="minutes between checkpoints of a child in training; 0: only when a worker must leave"
    )
    checkpoint_epochs: Positive | None = Field(None, description="a checkpoint also after every so many epochs")
    # The rest is Slurm's.
    time_min: Annotated[int, BeforeValidator(_whole), Field(ge=2)] = Field(
        240, description="slurm: time limit of a worker; a child that would not end in time goes on in another"
    )
    gpus_per_worker: Count | None = Field(
        None, description="slurm: asked for as gres gpu:N; by default 1, or none with device: cpu"
    )
    mem_gb: Annotated[Real, Field(gt=0)] = Field(16.0, description="slurm: memory of a worker")
    partition: str | None = Field(None, description="slurm, like the next ones: as sbatch takes it")
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    wckey: str | None = None
    reservation: str | None = None
    gres: str | None = Field(None, description="slurm: instead of gpu:N, such as gpu:a100:1")
    coordinator_time_min: Annotated[int, BeforeValidator(_whole), Field(ge=5)] = Field(
        1440, description="slurm: time limit of one job of a coordinator that is submitted"
    )
    coordinator_mem_gb: Annotated[Real, Field(gt=0)] = Field(4.0, description="slurm: its memory")
    coordinator_partition: str | None = Field(
        None, description="slurm: its partition, else the site's default; it needs no GPU"
    )
    coordinator_extra: dict[str, str | int | bool] = Field({}, description="slurm: further options of its sbatch")
    skip: Annotated[tuple[Literal["cpus-per-task", "mem", "gres", "no-requeue"], ...], Field(strict=False)] = Field(
        (), description="slurm: options that the site does not take, of cpus-per-task, mem, gres, no-requeue"
    )
    setup: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="slurm: shell lines before a worker, and before a submitted coordinator"
    )
    extra: dict[str, str | int | bool] = Field({}, description="slurm: further options of sbatch")
    max_array: Positive = Field(1000, description="slurm: most tasks of one array")
    status_s: Annotated[Real, Field(gt=0)] = Field(60.0, description="slurm: time between status calls, at least")
    submit_s: Annotated[Real, Field(gt=0)] = Field(10.0, description="slurm: time between submissions, at least")
    poll_s: Annotated[Real, Field(gt=0)] | None = Field(
        None, description="time between looks at logs; local: 0.02, slurm: 1"
    )
    stale_s: Annotated[Real, Field(ge=0)] | None = Field(
        None, description="how late a node may see other nodes' files; slurm: 60, as on NFS; 0 on Lustre or GPFS"
    )

    @property
    def gpus(self) -> int:
        """GPUs that a worker is to have, where `gres` does not say it."""
        return int(self.device != "cpu") if self.gpus_per_worker is None else self.gpus_per_worker


class Container(_Section):
    """The Apptainer image that Slurm's workers run in."""

    image: str | None = Field(
        None, description="a .sif file that all nodes see; by default the one that the coordinator is in"
    )
    binds: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="folders seen inside by the same names, as the run folder and data.root are"
    )
    nv: bool | None = Field(None, description="whether NVIDIA's driver is seen inside; by default where there is one")
    may_change: bool = Field(False, description="true: a run goes on in another image; which one is on record")

    @model_validator(mode="after")
    def _absolute(self) -> Container:
        for path in (*self.binds, *([self.image] if self.image is not None else [])):
            if not path.startswith("/"):
                raise ValueError(f"got {path}; give a path that begins with /, which all nodes see")
        return self


class Storage(_Section):
    """What is kept. Weights of dominated children nobody needs are deleted unless `keep: all`."""

    keep: Literal["front", "all"] = "front"
    seal_every: Positive = Field(1000, description="finished children per sealed HDF5 file")


class Config(_Section):
    """One search. Only `data` is required."""

    seed: Count = 0
    data: Data
    space: Space = Space()
    objectives: Annotated[tuple[Objective, ...], Field(strict=False)] = (
        Objective(name="val_error"),
        Objective(name="params"),
    )
    search: Search = Search()
    training: Training = Training()
    cluster: Cluster = Cluster()
    container: Container = Container()
    storage: Storage = Storage()

    @model_validator(mode="after")
    def _objectives_make_sense(self) -> Config:
        names = [objective.name for objective in self.objectives]
        if len(set(names)) != len(names):
            raise ValueError(f"objectives: a name occurs twice in {names}")
        if self.container.image is not None and self.cluster.backend != "slurm":
            raise ValueError(
                f"container.image is for the workers of backend slurm, not {self.cluster.backend}; to search inside an "
                f"image on one machine: apptainer exec IMAGE lemonade-hpc search ..."
            )
        for allowed in (EXPENSIVE_OBJECTIVES, CHEAP_OBJECTIVES):
            if not set(names) & set(allowed):
                raise ValueError(f"objectives: got {names}; {' or '.join(allowed)} must be among them")
        return self

    @property
    def cheap(self) -> tuple[Objective, ...]:
        """The objectives that need no training, in the order given."""
        return tuple(o for o in self.objectives if o.name in CHEAP_OBJECTIVES)


def load(source: str) -> Config:
    """Read a configuration: a YAML file's path or a shipped name (`digits`).

    A folder of a shipped name, such as the one `search digits` makes, does not hide the shipped file. Raises
    ConfigError naming the file, the key, what was given and what is allowed; OSError where the file system fails.
    """
    file: Traversable = Path(source)
    if source in shipped_names() and not file.is_file():
        file = _shipped() / f"{source}.yaml"
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        known = [*shipped_names(), *map(str, Path(source).parent.glob("*.y*ml"))]
        shipped = ", ".join(shipped_names())
        raise ConfigError(f"{source}: no such file{explain.nearest(source, known)} Shipped are: {shipped}") from None
    except IsADirectoryError:
        raise ConfigError(f"{source}: a folder; give the YAML file of the search, and the folder by --run") from None
    except OSError as error:
        if error.errno in files.STORAGE_ERRORS:
            raise
        raise ConfigError(f"{source}: cannot be read: {error.strerror}") from error
    return parse(content, source)


def shipped_names() -> list[str]:
    """List the configurations that come with the package."""
    return sorted(item.name.removesuffix(".yaml") for item in _shipped().iterdir() if item.name.endswith(".yaml"))


def _shipped() -> Traversable:
    return resources.files("lemonade_hpc") / "configs"


def parse(content: str | bytes, source: str) -> Config:
    """Check YAML text; `source` names it in errors."""
    try:
        given = yaml.safe_load(content)
        mistakes = list(explain.mistakes(yaml.compose(content, Loader=yaml.SafeLoader)))
    except Exception as error:  # PyYAML lets ValueError, KeyError and others escape, as on the date 2024-13-01
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if mistakes:
        raise ConfigError("\n".join(f"{source}: {text}" for text in mistakes))
    if not isinstance(given, dict):
        what = "it is empty" if given is None else f"got {given!r:.60}"
        raise ConfigError(f"{source}: expected keys, at least 'data: {{name: digits}}'; {what}")
    empty = {key for key, value in given.items() if value is None and key in Config.model_fields}
    return from_dict({key: value for key, value in given.items() if key not in empty}, source)


def from_dict(given: dict[str, Any], source: str) -> Config:
    """Check a mapping; `source` names it in errors."""
    try:
        return Config.model_validate(given)
    except ValidationError as error:
        lines = [f"{source}: {explain.explain(item, Config)}" for item in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def to_dict(config: Config) -> dict[str, Any]:
    """Give the JSON form, complete: what `run.json` stores and `from_dict` reads back."""
    return config.model_dump(mode="json")


def dump(config: Config) -> bytes:
    """Write it as a YAML file, which `load` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True).encode()


SMALL = 16
"""Images below this many pixels a side are small."""
BY_SIZE: dict[str, tuple[Any, Any]] = {
    "epochs": (2, 20),
    "initial_epochs": (25, 20),
    "distill_epochs": (1, 5),
    "lr": (0.1, 0.01),
    "initial_lr": (0.2, 0.05),
    "weight_decay": (0.005, 0.0005),
    "pad": (0, 4),
    "flip": (False, True),
    "cutout": (0, 16),
    "mixup": (0.0, 1.0),
}
"""Defaults of `training` on small images and on others. The latter are the paper's; the former were chosen on digits,
by `tests/end_to_end/five_seeds.py` and `tests/benchmarks/c18_search.py`."""


def resolve(config: Config, shape: tuple[int, int, int]) -> Config:
    """Fill in the defaults that follow the data set's image shape (C, H, W), the mode, and the backend."""
    small = min(shape[1:]) < SMALL
    defaults: dict[str, Any] = {key: values[0 if small else 1] for key, values in BY_SIZE.items()}
    defaults["flip"] = defaults["flip"] and shape[0] == 3
    defaults["cutout"] = min(defaults["cutout"], min(shape[1:]) // 2)
    defaults["deterministic"] = config.search.mode == "generational"
    chosen = {key: value for key, value in defaults.items() if getattr(config.training, key) is None}
    training = config.training.model_copy(update=chosen)
    for key in ("pad", "cutout"):
        if getattr(training, key) > min(shape[1:]):
            raise ConfigError(
                f"training.{key}: got {getattr(training, key)}; the images have {shape[1]} x {shape[2]} pixels, "
                f"so it must be at most {min(shape[1:])}"
            )
    slurm, stale_s = config.cluster.backend == "slurm", config.cluster.stale_s
    times = {
        "poll_s": config.cluster.poll_s or (1.0 if slurm else 0.02),
        "stale_s": 60.0 if slurm and stale_s is None else stale_s,
    }
    cluster = config.cluster.model_copy(update=times)
    return config.model_copy(update={"training": training, "cluster": cluster})
