"""Experts on WebGPU, with the adapter in software that Chromium brings: slow, but exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import evermind_runtime as em
import numpy as np
import pytest

from tests.families import synapse, tilelli
from tests.network.server import Server
from tests.packages import export, lm_source

from .browser import Browser, PageError
from .site import from_page, missing, run

FLAGS = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if reason := missing():
        pytest.skip(reason)
    with Browser(*FLAGS) as one:
        yield one


def test_experts_on_webgpu(tmp_path: Path, serve: Callable[..., Server], browser: Browser) -> None:
    """The same routes and tokens, logits within 1e-4, under a budget; and not the CPU's bits."""
    package = export(lm_source(), tmp_path / "p")
    page = browser.page(serve(package).url + "index.html")
    found = run(
        page,
        """
        const found = {};
        for (const device of ['webgpu', 'wasm']) {
          const pack = await open({ device, ramBudget: 100000 });
          found[device] = all(await pack.forward({ tokens: [5, 9, 31] }));
          found.tokens = [];
          for await (const piece of pack.generate([3, 1, 2], { maxNewTokens: 2 }))
            found.tokens.push(piece.token);
          found[device].evictions = (await pack.stats()).evictions;
          await pack.close();
        }
        return found;
        """,
    )
    assert found["webgpu"].pop("evictions") > 0
    on_gpu, on_cpu = from_page(found["webgpu"]), found["wasm"]
    with em.load(package) as model:
        expected = model.forward({"tokens": [5, 9, 31]})
        tokens = [piece.token for piece in model.generate([3, 1, 2], max_new_tokens=2)]
    assert found["tokens"] == tokens
    for name, array in expected.items():
        if name.startswith("ids"):
            np.testing.assert_array_equal(on_gpu[name], array)
        else:
            np.testing.assert_allclose(on_gpu[name], array, rtol=1e-4, atol=1e-4, err_msg=name)
    # Another order of sums: it was not the CPU that computed.
    assert found["webgpu"]["logits"]["data"] != on_cpu["logits"]["data"]


def test_what_webgpu_cannot_do(
    tmp_path: Path, serve: Callable[..., Server], browser: Browser, chromium: Browser
) -> None:
    source = tilelli.golden_model(tmp_path / "m", tilelli.LM)
    packed = serve(tilelli.package(source, tmp_path / "p")).url + "index.html"
    with pytest.raises(PageError, match=r"UnsupportedError: .* packed experts"):
        run(browser.page(packed), "await open({ device: 'webgpu' })")
    plain = serve(synapse.package("pool", "f16")).url + "index.html"
    page = chromium.page(plain, context=chromium.new_context())
    with pytest.raises(PageError, match=r"DeviceError: .* no WebGPU adapter"):
        run(page, "await open({ device: 'webgpu' })")
