"""Every family in a real browser gives what the Python runtime gives."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_exporters.onnx_graph import GraphBuilder
from evermind_manifests.errors import InputError
from evermind_manifests.manifest import GraphStep, ValueSpec
from evermind_manifests.package import open_package
from evermind_runtime.rows import spare_rows
from msgspec.structs import replace

from tests.families import synapse, tilelli
from tests.network.server import Server
from tests.packages import export, golden_source, lm_source, random_source
from tests.runtime import test_buffers as buffers
from tests.runtime import test_windows as windows
from tests.runtime.hand_made import manifest_of, write_package

from .browser import Browser
from .site import from_page, run, to_page

pytestmark = pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")

TOLERANCE = 1e-4
DRAWN: dict[str, Any] = {
    "temperature": 1.2,
    "seed": 9,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.02,
    "repetition_penalty": 1.3,
}


def tokitai(folder: Path) -> Path:
    return export(random_source("tokitai-moe", {"module": "moe", "size": "nano"}), folder / "p")


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "evermind-lm": lambda folder: export(golden_source("lm_small"), folder / "p"),
    "evermind-lm-pool": lambda folder: export(lm_source(), folder / "p", layout="pool"),
    "shared-expert-moe": lambda folder: export(golden_source("moe_small"), folder / "p"),
    "limbic": lambda folder: export(golden_source("limbic_small"), folder / "p"),
    "synapse-pool": lambda _: synapse.package("pool", "f16"),
    "synapse-model": lambda _: synapse.package("model", "f16"),
    "tokitai-nano": tokitai,
    "tilelli-block": lambda folder: tilelli.package(
        tilelli.golden_model(folder / "m", "tilelli_block_p5_b4_k2"), folder / "p"
    ),
    "tilelli-lm": lambda folder: tilelli.package(
        tilelli.golden_model(folder / "m", tilelli.LM), folder / "p"
    ),
    "buffers": lambda folder: buffers.write(folder / "p"),
}


def random_inputs(package: Path, tokens: int = 7) -> dict[str, np.ndarray]:
    """Inputs of the plan's shapes."""
    rng = np.random.default_rng(5)
    found = {}
    with open_package(package) as one:
        for name, spec in one.manifest.plan.inputs.items():
            shape = [tokens if isinstance(dim, str) else dim for dim in spec.shape]
            if spec.dtype == "i64":
                found[name] = rng.integers(0, spec.limit or 2, size=shape)
            else:
                found[name] = rng.normal(size=shape).astype(np.float32)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_browser_computes_what_python_computes(
    family: str, tmp_path: Path, serve: Callable[..., Server], chromium: Browser
) -> None:
    """All outputs, routes among them, of a sequence and of what follows it; and the tokens."""
    package = FAMILIES[family](tmp_path)
    first, second = random_inputs(package), random_inputs(package, 1)
    page = chromium.page(serve(package).url + "index.html", context=chromium.new_context())
    found = run(
        page,
        """
        const pack = await open();
        const state = await pack.newState();
        const parts = [];
        parts.push(all(await pack.forward(first, { state })));
        const saved = await state.save();
        parts.push(all(await pack.forward(second, { state })));
        await state.restore(saved);
        const again = all(await pack.forward(second, { state }));
        const pieces = [];
        if (pack.info.inputs[0].name === 'tokens' && 'logits' in parts[0])
          for (const options of [{}, { temperature: 0.8, seed: 7 }, drawn])
            for await (const piece of pack.generate(prompt, { maxNewTokens: 6, ...options }))
              pieces.push(piece);
        await pack.close();
        return { parts, pieces, again };
        """,
        first=to_page(first),
        second=to_page(second),
        prompt=[3, 1, 2],
        drawn={camel(name): value for name, value in DRAWN.items()},
    )
    page.close()
    assert found["again"] == found["parts"][1]
    with em.load(package) as model:
        state = model.new_state()
        for inputs, part in zip((first, second), found["parts"], strict=True):
            compare(model.forward(inputs, state=state), from_page(part))
        if found["pieces"]:
            pieces = [
                *model.generate([3, 1, 2], max_new_tokens=6),
                *model.generate([3, 1, 2], max_new_tokens=6, temperature=0.8, seed=7),
                *model.generate([3, 1, 2], max_new_tokens=6, **DRAWN),
            ]
            assert [one["token"] for one in found["pieces"]] == [one.token for one in pieces]
            assert [one["text"] for one in found["pieces"]] == [one.text for one in pieces]
            assert [one["finish"] for one in found["pieces"]] == [one.finish for one in pieces]
            check_routes(model, found["pieces"][:6])


def write_scores(path: Path, vocabulary: int = 5) -> Path:
    """A model whose logits are products with the sums over its context of `buffers.LIMIT`."""
    table = np.random.default_rng(8).normal(size=(vocabulary, buffers.D)).astype(np.float32)
    b = GraphBuilder("scores")
    x = b.op("Gather", b.const(table, np.float32), b.input("tokens", "i64", ["T"]))
    scores = b.op("MatMul", buffers.sums(b, x), b.const(table.T, np.float32))
    b.output(scores, "logits", "f32", ["T", vocabulary])
    step = GraphStep(
        graph="graphs/scores.onnx",
        inputs={"tokens": "tokens", "context": "h", "past": "so_far"},
        outputs={"logits": "logits", "new": "h"},
    )
    plan = replace(
        buffers.plan_of_sums(),
        inputs={"tokens": ValueSpec(dtype="i64", shape=("T",), limit=vocabulary)},
        outputs={"logits": ValueSpec(dtype="f32", shape=("T", vocabulary))},
        prefill=(step,),
        decode=(step,),
    )
    return write_package(path, manifest_of(plan), {"graphs/scores.onnx": b.build()})


def test_a_text_ends_where_the_context_is_full(
    tmp_path: Path, serve: Callable[..., Server], chromium: Browser
) -> None:
    package = write_scores(tmp_path / "p")
    prompt = [at % 5 for at in range(buffers.LIMIT - 4)]
    page = chromium.page(serve(package).url + "index.html", context=chromium.new_context())
    found = run(
        page,
        """
        const pack = await open();
        const state = await pack.newState();
        const options = { state, maxNewTokens: 9, temperature: 1, seed: 3 };
        const pieces = [], refused = [];
        for await (const piece of pack.generate(prompt, options)) pieces.push(piece);
        for (const more of [[2], [], prompt])
          refused.push(await pack.generate(more, options).next().then(
            () => '', (error) => `${error.name}: ${error.message}`));
        const ended = [];
        const stops = { maxNewTokens: 4, stopTokens: [0, 1, 2, 3, 4] };
        for await (const piece of pack.generate([2], stops))
          ended.push(piece.finish);
        await pack.close();
        return { pieces, refused, ended };
        """,
        prompt=prompt,
    )
    page.close()
    with em.load(package) as model:
        state = model.new_state()
        sampled: dict[str, Any] = {"state": state, "max_new_tokens": 9, "temperature": 1, "seed": 3}
        pieces = list(model.generate(prompt, **sampled))
        assert [one["token"] for one in found["pieces"]] == [one.token for one in pieces]
        assert [one["finish"] for one in found["pieces"]] == [one.finish for one in pieces]
        assert [one.finish for one in pieces] == [None] * 4 + ["context"]
        for more, said in zip(([2], [], prompt), found["refused"], strict=True):
            with pytest.raises(InputError, match="at most 0 more tokens") as refused:
                model.generate(more, **sampled)
            assert said.partition("\n")[0] == f"InputError: {refused.value.args[0]}"
    assert found["ended"] == ["stop"]


def test_a_window_is_kept_and_little_more(
    tmp_path: Path, serve: Callable[..., Server], chromium: Browser
) -> None:
    window = 9
    package = windows.write(tmp_path / "p", window)
    page = chromium.page(serve(package).url + "index.html", context=chromium.new_context())
    ends = [*range(0, 300, 60), *range(300, 309)]
    calls = [windows.X[begin:end] for begin, end in pairwise(ends)]
    found = run(
        page,
        """
        const pack = await open();
        const state = await pack.newState();
        const [sums, rows] = [[], []];
        for (const x of calls) {
          sums.push(all(await pack.forward({ x }, { state })));
          rows.push((await state.save()).h.shape[1]);
        }
        const saved = await state.save();
        const fewer = { ...saved, n: { ...saved.n, data: new BigInt64Array([3n]) } };
        const refused = await state.restore(fewer).then(() => '', (error) => error.message);
        await pack.close();
        return { sums, rows, refused };
        """,
        calls=[to_page({"x": one})["x"] for one in calls],
    )
    page.close()
    sums = np.concatenate([from_page(one)["y"] for one in found["sums"]])
    np.testing.assert_array_equal(sums, windows.want(window)[: ends[-1]])
    assert max(found["rows"]) < window + spare_rows(window) + 60
    assert found["rows"][-1] < window + spare_rows(window)
    assert "'h': expected 3 to 3 rows of 3 tokens" in found["refused"]


def camel(name: str) -> str:
    """As JavaScript writes it."""
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def check_routes(model: em.Model, pieces: list[Any]) -> None:
    """Each piece names the experts of the token that it follows."""
    outputs = model.forward({"tokens": [3, 1, 2, *(one["token"] for one in pieces[:-1])]})
    for position, piece in enumerate(pieces, start=2):
        for route in piece["routes"]:
            if (name := f"ids.{route['layer']}") in outputs:
                assert route["experts"] == outputs[name][position].tolist()


def compare(expected: dict[str, Any], found: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if array.dtype == np.int64:
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=TOLERANCE, err_msg=name)
