"""What `run --introspect` shows of a model's report: tables, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from evermind_runtime import Introspection
from evermind_runtime.introspection import LayerReport

from .plots import plot_heatmap
from .targets import write_file
from .terminal import human_bytes, print_columns

_TOP = 5
_HEAD = ("expert", "tokens", "gates", "hits", "misses", "read")


def print_introspection(report: Introspection) -> None:
    """A table for every layer and router, and a line for every observation, on stdout."""
    for layer in report.layers:
        _print_layer(layer)
    for router in report.routers:
        print(f"\nrouter of layer {router.router.layer}: mean confidence {router.confidence:.3f}")
        pathways = list(router.pathways.items())[:_TOP]
        if pathways:
            print_columns(
                [("pathway", "strength"), *((name, f"{value:.4f}") for name, value in pathways)]
            )
    if report.observations:
        rows = [
            (
                name,
                "x".join(map(str, array.shape)),
                *(f"{value:.4g}" for value in (array.min(), array.mean(), array.max())),
            )
            for name, array in report.observations.items()
            if array.size
        ]
        print()
        print_columns([("observed", "shape", "least", "mean", "most"), *rows])


def write_prometheus(path: Path, report: Introspection) -> None:
    """The report as Prometheus text in a file."""
    write_file(path, report.to_prometheus().encode())


def draw_heatmap(path: Path, title: str, report: Introspection) -> None:
    """How layers' experts share their tokens, as PNG. Raises `MissingExtraError`."""
    layers, shares = report.heat()
    plot_heatmap(path, title, layers, shares)


def _print_layer(layer: LayerReport) -> None:
    names = list(dict.fromkeys(name for one in layer.experts for name in one.statistics))
    columns = [*names, "special"] if names else []
    print(
        f"\nlayer {layer.layer}: {layer.unused_share:.0%} of experts unused, "
        f"load balance {layer.load_balance:.2f}"
    )
    rows = []
    for one in layer.experts:
        cells = [
            f"{one.expert} {one.name}",
            f"{one.tokens:,}",
            f"{one.gate_mass:.1f}",
            f"{one.hits:,}",
            f"{one.misses:,}",
            human_bytes(one.bytes_read),
        ]
        if columns:
            values = [one.statistics.get(name, np.nan) for name in names]
            values.append(one.specialization if one.statistics else np.nan)
            cells += ["-" if np.isnan(value) else f"{value:.4f}" for value in values]
        rows.append(cells)
    print_columns([[*_HEAD, *columns], *rows])
    if names:
        top = layer.top_contributors[:_TOP]
        listed = ", ".join(f"{expert} ({value:.4f})" for expert, value in top)
        print(f"top contributors: {listed}")
