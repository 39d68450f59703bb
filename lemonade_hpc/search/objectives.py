"""The cheap objectives: functions of a graph that need no training.

Decides: what each measures. Opens no file. A new one is one entry in `CHEAP` and its name in `config.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lemonade_hpc.search.ops import Facts

Measure = Callable[[Mapping[int, Facts]], float]


def params(facts: Mapping[int, Facts]) -> float:
    """Number of trainable parameters."""
    return sum(fact.num_params for fact in facts.values())


def macs(facts: Mapping[int, Facts]) -> float:
    """Multiply-adds per image of convolutions and matrix products."""
    return sum(fact.macs for fact in facts.values())


CHEAP: dict[str, Measure] = {"params": params, "macs": macs}


def measure(names: Sequence[str], facts: Mapping[int, Facts]) -> tuple[float, ...]:
    """The named cheap objectives of a network, from `graph.infer`'s facts."""
    return tuple(CHEAP[name](facts) for name in names)
