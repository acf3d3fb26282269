"""What a page fetches, keeps, gives up and survives."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evermind_runtime as em
import pytest
from evermind_manifests.package import open_package

from tests.network.server import Handler, Server
from tests.packages import export, lm_source

from .browser import Browser, Page, PageError
from .site import missing, run

pytestmark = pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")

GENERATE = """
const tokens = async (pack, options = {}) => {
  const found = [];
  for await (const piece of pack.generate([3, 1, 2], { maxNewTokens: 12, ...options }))
    found.push(piece.token);
  return found;
};
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(lm_source(), tmp_path_factory.mktemp("web") / "files")


@pytest.fixture(scope="module")
def expected(package: Path) -> list[int]:
    with em.load(package) as model:
        return [piece.token for piece in model.generate([3, 1, 2], max_new_tokens=12)]


@pytest.fixture
def visit(chromium: Browser) -> Callable[..., Page]:
    """`visit(server)`: a page; all of one test share their storage."""
    context = chromium.new_context()

    def open_page(server: Server) -> Page:
        return chromium.page(server.url + "index.html", context=context)

    return open_page


def shards(server: Server) -> list[str]:
    return [path for path in server.requests.elements() if ".moe0" in path]


def kill(server: Server) -> None:
    """Nobody listens any more, and connections that were kept open get no answer."""

    def hang_up(handler: Handler, path: str) -> bool:
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)
        return True

    server.behaviour.hook = hang_up
    server.shutdown()
    server.server_close()


def routed(package: Path, expected: list[int]) -> set[str]:
    """The shards that the prompt and all but the last generated token need."""
    with open_package(package) as opened, em.load(package) as model:
        outputs = model.forward({"tokens": [3, 1, 2, *expected[:-1]]})
        return {
            f"package/{shard.file}"
            for shard in opened.manifest.shards
            if shard.expert in outputs[f"ids.{shard.layer}"]
        }


@pytest.mark.parametrize("store", ["opfs", "cache"])
def test_visits(
    store: str,
    package: Path,
    expected: list[int],
    serve: Callable[..., Server],
    visit: Callable[..., Page],
) -> None:
    """First: routed experts only. Second: none, and with the server gone. Damaged: again."""
    server = serve(package)
    origin = serve(package, headers={"Access-Control-Allow-Origin": "*"})
    code = (
        GENERATE
        + f"const where = {{ store: '{store}', ortUrl: '/ort/', threads: 1 }};"
        + """
        const pack = await EvermindPack.open(url, { ...where, onProgress: (e) => events.push(e) });
        const found = { tokens: await tokens(pack), offline: pack.info.offline };
        found.stats = await pack.stats();
        found.whole = await pack.isCached();
        await pack.close();
        found.corrupt = events.filter((event) => event.status === 'corrupt');
        return found;
        """
    )
    url = origin.url + "package/"
    first = run(visit(server), code, url=url)
    assert first["tokens"] == expected
    assert sorted(shards(origin)) == sorted(routed(package, expected))
    assert len(shards(origin)) < 24
    assert first["stats"]["store"] == store
    assert first["whole"] is False
    origin.forget()
    second = run(visit(server), code, url=url)
    assert second["tokens"] == expected
    assert list(origin.requests) == ["package/manifest.json"]
    kill(origin)
    third = run(visit(server), code, url=url)
    assert (third["tokens"], third["offline"]) == (expected, True)
    assert third["stats"]["bytesFetched"] == 0


@pytest.mark.parametrize("store", ["opfs", "cache"])
def test_a_shard_damaged_on_disk_is_fetched_again(
    store: str,
    package: Path,
    expected: list[int],
    serve: Callable[..., Server],
    visit: Callable[..., Page],
) -> None:
    server = serve(package)
    used = sorted(routed(package, expected))
    name = used[0].removeprefix("package/")
    with open_package(package) as opened:
        digest = opened.manifest.files[name].sha256
    found = run(
        visit(server),
        GENERATE
        + """
        const first = await open({ store });
        await tokens(first);
        await first.close();
        if (store === 'opfs') {
          const root = await navigator.storage.getDirectory();
          const folder = await root.getDirectoryHandle('evermind-pack');
          const file = await folder.getFileHandle(digest);
          const writer = await file.createWritable({ keepExistingData: true });
          await writer.write({ type: 'write', position: 1000, data: new Uint8Array([1, 2, 3]) });
          await writer.close();
        } else {
          const cache = await caches.open('evermind-pack');
          const key = '/.evermind-pack/' + digest;
          const bytes = new Uint8Array(await (await cache.match(key)).arrayBuffer());
          bytes[1000] ^= 1;
          await cache.put(key, new Response(bytes));
        }
        const pack = await open({ store });
        const found = await tokens(pack);
        const stats = await pack.stats();
        await pack.close();
        return { found, stats, corrupt: events.filter((one) => one.status === 'corrupt') };
        """,
        store=store,
        digest=digest,
    )
    assert found["found"] == expected
    assert [one["file"] for one in found["corrupt"]] == [name]
    assert found["stats"]["corrupt"] == 1
    assert server.requests[f"package/{name}"] == 2


def test_what_is_kept_outlives_the_browser(
    package: Path, expected: list[int], serve: Callable[..., Server]
) -> None:
    if reason := missing():
        pytest.skip(reason)
    server = serve(package)
    code = GENERATE + "const pack = await open(); return tokens(pack);"
    with Browser() as browser:
        assert run(browser.page(server.url + "index.html"), code) == expected
        server.forget()
        browser.restart()
        assert run(browser.page(server.url + "index.html"), code) == expected
    assert shards(server) == []


def test_browsers_without_stores(
    package: Path, expected: list[int], serve: Callable[..., Server], visit: Callable[..., Page]
) -> None:
    """Without OPFS the other store serves, without both none; one that was named must be had."""
    server = serve(package)
    code = (
        GENERATE
        + """
        const pack = await open();
        const made = await tokens(pack);
        const failed = events.filter((one) => one.status === 'store-failed').length;
        const { store } = await pack.stats();
        await pack.close();
        return { made, failed, store, named: await open({ store: 'opfs' }).catch((e) => e.name) };
    """
    )
    broken = "export class %s { static async open() { throw new Error('there is none'); } }"
    server.behaviour.replaced["evermind/store-opfs.js"] = (broken % "OpfsStore").encode()
    found = run(visit(server), code)
    assert found == {"made": expected, "failed": 0, "store": "cache", "named": "StoreError"}
    server.behaviour.replaced["evermind/store-cache.js"] = (broken % "CacheStore").encode()
    found = run(visit(server), code)
    assert found == {"made": expected, "failed": 1, "store": "none", "named": "StoreError"}


def test_a_shard_damaged_on_the_wire(
    package: Path, expected: list[int], serve: Callable[..., Server], visit: Callable[..., Page]
) -> None:
    """Once: fetched once more. Always: an error that names it, and the pack lives on."""
    server = serve(package)
    path = min(routed(package, expected))
    good = (package / path.removeprefix("package/")).read_bytes()
    server.behaviour.replaced[path] = good[:-1] + bytes([good[-1] ^ 1])
    page = visit(server)
    found = run(
        page,
        GENERATE
        + """
        globalThis.pack = await open();
        try { await tokens(pack); } catch (error) {
          const { name, message, file, expected, found } = error;
          return { name, message, file, expected, found };
        }
        """,
    )
    assert found["name"] == "IntegrityError"
    assert found["file"] == path.removeprefix("package/")
    assert found["file"] in found["message"]
    assert found["expected"] == hashlib.sha256(good).hexdigest()
    assert server.requests[path] == 2

    def once(handler: Handler, asked: str) -> bool:
        if asked == path and server.requests[path] > 3:
            server.behaviour.replaced.clear()
        return False

    server.behaviour.hook = once
    assert run(page, GENERATE + "return tokens(pack);") == expected
    assert server.requests[path] == 4


def test_budgets_change_no_number(
    package: Path, serve: Callable[..., Server], visit: Callable[..., Page]
) -> None:
    """One working set of memory, and a disk for a few shards: the same bits."""
    server = serve(package)
    found = run(
        visit(server),
        """
        const found = {};
        const inputs = { tokens: [5, 9, 31, 2, 77, 40, 8, 1, 90, 13] };
        const names = ['logits', 'ids.0', 'gates.2'];
        const large = await open({ store: 'none' });
        const whole = await large.forward(inputs);
        try { await open({ store: 'none', ramBudget: 1000 }); } catch (error) {
          Object.assign(found, { name: error.name, message: error.message, needed: error.needed });
        }
        const small = await open({ ramBudget: found.needed, diskBudget: 120000 });
        for (let round = 0; round < 2; round++) {
          const paged = await small.forward(inputs);
          for (const name of names)
            found[name] = paged[name].data.every((one, i) => one === whole[name].data[i]);
        }
        found.small = await small.stats();
        found.all = await large.stats();
        return found;
        """,
    )
    assert found["name"] == "BudgetError"
    assert str(found["needed"]) in found["message"]
    assert [found[name] for name in ("logits", "ids.0", "gates.2")] == [True] * 3
    small, everything = found["small"], found["all"]
    assert small["peakResidentExpertBytes"] <= small["ramBudget"] == found["needed"]
    assert small["evictions"] > 20
    assert small["diskBytes"] <= 120_000
    assert small["diskEvictions"] > 0
    assert everything["evictions"] == 0
    assert everything["store"] == "none"


def test_aborts(
    package: Path, expected: list[int], serve: Callable[..., Server], visit: Callable[..., Page]
) -> None:
    """While opening, while generating, or by leaving the loop; afterwards all works."""
    server = serve(package, latency=0.05)
    found = run(
        visit(server),
        GENERATE
        + """
        const found = {};
        const soon = (ms) => AbortSignal.timeout(ms);
        const name = async (job) => {
          try { await job(); return 'no'; } catch (error) { return error.name; }
        };
        found.before = await name(() => open({ signal: AbortSignal.abort() }));
        const opening = new AbortController();
        found.during = await name(() => open({
          signal: opening.signal, onProgress: () => opening.abort() }));
        const pack = await open({ ramBudget: 40000, store: 'none' });
        const made = [];
        const giveUp = new AbortController();
        found.generating = await name(async () => {
          for await (const piece of pack.generate([3, 1, 2], { signal: giveUp.signal })) {
            made.push(piece.token);
            if (made.length === 3) setTimeout(() => giveUp.abort(), 30);
          }
        });
        found.made = made;
        found.reason = await name(() => tokens(pack, { signal: soon(20), maxNewTokens: 4000 }));
        const state = await pack.newState();
        const before = await state.save();
        const cut = new AbortController();
        setTimeout(() => cut.abort(), 60);
        found.forward = await name(() =>
          pack.forward({ tokens: Array(400).fill(7) }, { state, signal: cut.signal }));
        const after = await state.save();
        found.kept = Object.keys(before).every(
          (key) => before[key].data.every((one, i) => one === after[key].data[i]));
        for await (const piece of pack.generate([3, 1, 2])) { found.first = piece.token; break; }
        found.tokens = await tokens(pack);
        const pending = tokens(pack);
        const closed = name(() => pending);
        await pack.close();
        found.closed = [await closed, await name(() => pack.stats())];
        return found;
        """,
    )
    assert found["before"] == found["during"] == "AbortError"
    assert found["generating"] == "AbortError"
    assert found["made"] == expected[: len(found["made"])]
    assert len(found["made"]) >= 3
    assert found["reason"] == "TimeoutError"
    assert found["forward"] == "AbortError"
    assert found["kept"] is True
    assert found["first"] == expected[0]
    assert found["tokens"] == expected
    assert found["closed"] == ["ClosedError", "ClosedError"]


def test_prefetch_shares_what_is_on_its_way(
    package: Path, serve: Callable[..., Server], visit: Callable[..., Page]
) -> None:
    server = serve(package, latency=0.05)
    found = run(
        visit(server),
        """
        const pack = await open();
        const giveUp = new AbortController();
        const { signal } = giveUp;
        const first = pack.prefetch([[0, 1], [0, 2]], { signal }).catch((e) => e.name);
        const second = pack.prefetch([[0, 2], [1, 3]]);
        const before = await pack.isCached([[0, 2]]);
        giveUp.abort();
        const found = { first: await first, before };
        await second;
        found.after = await pack.isCached([[0, 2], [1, 3]]);
        await pack.prefetch([[0, 2]]);
        await pack.clearCache();
        found.cleared = await pack.isCached([[0, 2]]);
        found.bytes = (await pack.stats()).diskBytes;
        found.stranger = await pack.prefetch([[0, 99]]).catch((e) => e.name);
        await pack.prefetch(Array.from({ length: 24 }, (_, i) => [i >> 3, i & 7]));
        const partly = await pack.isCached();
        await pack.close();
        const again = await open();
        found.whole = [partly, await again.isCached()];
        return found;
        """,
    )
    assert found["first"] == "AbortError"
    assert (found["before"], found["after"], found["cleared"]) == (False, True, False)
    assert found["bytes"] == 0
    assert found["stranger"] == "InputError"
    assert found["whole"] == [False, True]
    # Once before the cache was cleared, though two asked and one gave up, and once after.
    assert server.requests["package/experts/l000/e0002.moe0"] == 2


def test_pools_and_networks_that_stumble(
    expected: list[int],
    tmp_path: Path,
    serve: Callable[..., Server],
    visit: Callable[..., Page],
) -> None:
    """Ranges of a pool; the same where the server ignores ranges; and one failure each."""
    package = export(lm_source(), tmp_path / "pool", layout="pool")
    server = serve(package)
    page = visit(server)
    code = GENERATE + "return tokens(await open({ store: 'none' }));"
    assert run(page, code) == expected
    pool = "package/experts/pool-000.moe0p"
    assert all(size for _, path, size in server.log if path == pool)
    assert server.sent[pool] < (package / "experts" / "pool-000.moe0p").stat().st_size
    server.behaviour.ranges = False
    assert run(page, code) == expected
    seen: set[str] = set()

    def stumble(handler: Handler, path: str) -> bool:
        if not path.startswith("package/") or path in seen:
            return False
        seen.add(path)
        handler.answer(503, b"")
        return True

    server.behaviour.hook = stumble
    assert run(page, code) == expected
    assert pool in seen


def test_what_is_wrong_is_named(
    package: Path, serve: Callable[..., Server], visit: Callable[..., Page]
) -> None:
    server = serve(package)
    page = visit(server)
    manifest = (package / "manifest.json").read_bytes()
    digest = hashlib.sha256(manifest).hexdigest()

    def failure(code: str, **arguments: Any) -> tuple[str, str]:
        try:
            run(page, code, **arguments)
        except PageError as error:
            return error.name, str(error)
        return "", ""

    assert failure("await (await open({ integrity })).close()", integrity=digest) == ("", "")
    wrong = "sha256-" + "A" * 43 + "="
    assert failure("await open({ integrity })", integrity=wrong)[0] == "IntegrityError"
    assert failure("await open({ integrity: 'md5' })")[0] == "InputError"
    assert failure("await open({ store: 'tape' })")[0] == "InputError"
    assert failure("await open({ verify: 'never' })")[0] == "InputError"
    assert failure("await open({ device: 'npu' })")[0] == "InputError"
    assert failure("await open({ ortUrl: '/nowhere/' })")[0] == "DeviceError"
    assert failure("await open({ threads: 2 })")[0] == "DeviceError"
    assert failure("await open({ threads: 0 })")[0] == "InputError"
    assert failure("await open({ diskBudget: NaN })")[0] == "BudgetError"
    assert failure("await open({ ramBudget: -1 })")[0] == "BudgetError"
    name, message = failure("await EvermindPack.open('/nothing/', { ortUrl: '/ort/' })")
    assert name == "NetworkError"
    assert "404" in message
    assert failure("await EvermindPack.open('/a.zip', { ortUrl: '/ort/' })")[0] == (
        "UnsupportedError"
    )
    calls = {
        "forward({ tokens: [96] })": "values from 0 to 95, found 96",
        "forward({ tokens: [1.5] })": "expected numbers of i64",
        "forward({ token: [1] })": "found 'token'",
        "forward({ tokens: { data: [1, 2], shape: [2, 1] } })": "expected shape",
        "forward({ tokens: [1] }, { outputs: ['x'] })": "outputs",
        "generate('text').next()": "no tokenizer",
        "forward({ tokens: [1] }, { state: {} })": "state",
        "generate([-1]).next()": "token ids",
    }
    for call, part in calls.items():
        name, message = failure(f"globalThis.pack ??= await open(); await pack.{call};")
        assert name == "InputError", call
        assert part in message
    for before, after, error in [
        (b'"evermind.package/1"', b'"evermind.package/2"', "UnsupportedError"),
        (b'"experts/l000/e0000.moe0"', b'"../../../etc/passwd.moe0"', "ManifestError"),
        (b'"top_k":2', b'"top_k":99', "ManifestError"),
        (b'"x":"n.0"', b'"x":"nobody"', "ManifestError"),
        (b"{", b"", "ManifestError"),
    ]:
        assert before in manifest
        server.behaviour.replaced["package/manifest.json"] = manifest.replace(before, after)
        assert failure("await open({ store: 'none' })")[0] == error
