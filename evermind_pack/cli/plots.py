"""Plots as PNG files, drawn by matplotlib: an extra, imported when a plot is asked for."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import InputError, MissingExtraError

from .targets import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stay apart for the colour-blind (Okabe and Ito), the default policy's first.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_INK = "#333333"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches. Raises `MissingExtraError`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "drawing a plot") from None
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def check_pictures(*paths: Path | None) -> None:
    """Raise `InputError` for names that matplotlib draws no picture for, `MissingExtraError`
    without it: before anything is computed that is to be drawn."""
    for path in paths:
        if path is not None:
            kinds = new_figure(1, 1).canvas.get_supported_filetypes()
            if path.suffix[1:].lower() not in kinds:
                raise InputError(
                    f"{path}: expected the name of a picture, as {path.stem or 'plot'}.png, "
                    f"found {path.suffix or 'none'!r} as its ending"
                )


def plot_hit_rates(
    path: Path, title: str, curves: Mapping[str, Sequence[tuple[float, float]]], cycle: float
) -> None:
    """Hit rate over budget, one curve of `(share of all experts, hit rate)` per policy.

    `belady` is drawn as the bound; `cycle` is the share one token passes through.
    """
    figure = new_figure(7.2, 4.5)
    axes = figure.add_subplot()
    colours = iter(_COLOURS)
    for name, points in curves.items():
        x = [100 * share for share, _ in points]
        y = [100 * rate for _, rate in points]
        if name == "belady":
            axes.plot(x, y, color=_INK, linestyle="--", linewidth=1.5, label="belady (bound)")
        else:
            width = 2.5 if name == "decayed" else 1.5
            axes.plot(x, y, color=next(colours), marker="o", ms=4, linewidth=width, label=name)
    _mark_cycle(axes, cycle)
    axes.set(xlabel="budget, % of all experts", ylabel="hit rate, %", title=title, ylim=(0, 102))
    axes.set_xlim(0, 102)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    _write(path, figure)


def plot_speeds(
    path: Path,
    title: str,
    *,
    measured: Sequence[tuple[float, float, float, float]],
    bound: Sequence[tuple[float, float]],
    forecast: Sequence[tuple[float, float, float]],
    cycle: float,
) -> None:
    """Tokens per second over budget, by shares of all experts.

    `measured` has `(share, median, least, most)`, `bound` `(share, most possible)`, `forecast`
    `(share, with even routing, with skewed routing)`; `cycle` is the share one token passes
    through, below which recency keeps nothing.
    """
    figure = new_figure(7.2, 4.5)
    from matplotlib.ticker import LogLocator

    axes = figure.add_subplot()
    x = [100 * share for share, _, _ in forecast]
    axes.fill_between(
        x,
        [even for _, even, _ in forecast],
        [skewed for _, _, skewed in forecast],
        color=_COLOURS[4],
        alpha=0.3,
        linewidth=2,  # where both ends are one, too
        label="forecast, even to skewed routing",
    )
    points = sorted(measured)
    medians = [median for _, median, _, _ in points]
    axes.errorbar(
        [100 * share for share, *_ in points],
        medians,
        yerr=[
            [median - least for _, median, least, _ in points],
            [most - median for _, median, _, most in points],
        ],
        color=_COLOURS[0],
        marker="o",
        ms=5,
        linewidth=2.5,
        elinewidth=1,
        capsize=3,
        label="measured, median and range",
    )
    limits = sorted(bound)
    axes.plot(
        [100 * share for share, _ in limits],
        [most for _, most in limits],
        color=_INK,
        linestyle="--",
        linewidth=1.5,
        marker="_",
        label="bound: disk and memory at full rate",
    )
    _mark_cycle(axes, cycle)
    axes.set(xlabel="budget, % of all experts", ylabel="tokens/s", title=title)
    shares = [share for share, *_ in points]
    # The ends too, where their numbers do not run into others.
    ends = (forecast[0][0], 1.0)
    shares += [end for end in ends if all(not 0.8 < end / share < 1.25 for share in shares)]
    ticks = sorted({round(100 * share, 1) for share in shares})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.minorticks_off()
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Below the axes, where it hides nothing.
    figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=8)
    _write(path, figure)


def _write(path: Path, figure: Figure) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:].lower())
    write_file(path, picture.getvalue())


def _mark_cycle(axes: Axes, cycle: float) -> None:
    axes.axvline(100 * cycle, color="#999999", linestyle=":", linewidth=1)
    axes.annotate(
        " one token's cycle",
        (100 * cycle, 1),
        xycoords=("data", "axes fraction"),
        va="top",
        color="#777777",
        fontsize=8,
        xytext=(0, -4),
        textcoords="offset points",
    )


def plot_heatmap(
    path: Path, title: str, layers: Sequence[int], shares: Sequence[Sequence[float]]
) -> None:
    """Layer by expert: the share of a layer's tokens that each expert serves.

    A row for every layer; rows may differ in length, what they lack stays white.
    """
    experts = max(map(len, shares))
    grid: npt.NDArray[np.float64] = np.full((len(shares), experts), np.nan)
    for row, values in enumerate(shares):
        grid[row, : len(values)] = [100 * value for value in values]
    width = min(14.0, max(6.0, 2.0 + 0.16 * experts))
    height = min(12.0, max(2.6, 1.4 + 0.26 * len(shares)))
    figure = new_figure(width, height)
    axes = figure.add_subplot()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    # At most about 24 labels fit beside the rows.
    step = -(-len(layers) // 24)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set(xlabel="expert", ylabel="layer", title=title)
    figure.colorbar(image, ax=axes, pad=0.02, label="% of the layer's tokens")
    _write(path, figure)
