// The demo: opens a package, streams what it writes, and shows which experts it took.
//
// It expects the runtime at ../evermind/ and onnxruntime-web's dist/ folder at ../ort/, as
// README.md's `serve` command mounts them.

import { Heatmap } from "./heatmap.js";

const RUNTIME = new URL("../evermind/index.js", import.meta.url).href;
const ORT = new URL("../ort/", import.meta.url).href;

const $ = (id) => document.getElementById(id);
const hint = document.querySelector(".hint");
let pack = null;
let heatmap = null;
let writes = false;
let running = null;

/** Keeps the page itself for when there is no network, where the browser lets it. */
async function installShell() {
  const { serviceWorker } = navigator;
  if (!serviceWorker) return;
  const script = new URL("sw.js", import.meta.url);
  // The runtime lies beside this folder, so the worker must see the whole origin.
  await serviceWorker.register(script, { scope: "/" }).catch(() => serviceWorker.register(script));
  await serviceWorker.ready;
  if (!serviceWorker.controller)
    await Promise.race([
      new Promise((resolve) =>
        serviceWorker.addEventListener("controllerchange", resolve, { once: true }),
      ),
      new Promise((resolve) => setTimeout(resolve, 2000)),
    ]);
  const loaded = performance.getEntriesByType("resource").map(({ name }) => name);
  serviceWorker.controller?.postMessage({ keep: [location.href, ...loaded] });
}

async function open(address) {
  running?.abort();
  await pack?.close();
  pack = null;
  clear();
  $("name").textContent = "Opening…";
  $("about").textContent = address;
  const { EvermindPack } = await import(RUNTIME);
  pack = await EvermindPack.open(address, {
    ortUrl: ORT,
    device: $("device").value,
    onProgress: (event) => {
      if (event.status !== "done" && event.status !== "cached") return;
      if (event.layer === undefined) return;
      heatmap?.arrived(event.layer, event.expert);
    },
  });
  const { info } = pack;
  heatmap = new Heatmap($("heatmap"), info.layers);
  for (const { layer, experts } of info.layers)
    for (let expert = 0; expert < experts; expert++)
      if (await pack.isCached([[layer, expert]])) heatmap.arrived(layer, expert);
  const experts = info.layers.reduce((sum, one) => sum + one.experts, 0);
  $("name").textContent = info.name;
  $("about").textContent =
    `${info.family} · ${words(info.parameters.total)} parameters, ${words(info.parameters.active)} ` +
    `at work per token · ${experts} experts in ${info.layers.length} layers`;
  writes = info.outputs.some(({ name }) => name === "logits") && info.inputs[0].name === "tokens";
  const takesText = writes && info.tokenizer !== null;
  $("prompt").disabled = !takesText;
  $("prompt").placeholder = takesText
    ? "How does it begin?"
    : writes
      ? "This package has no tokenizer: it starts from nothing."
      : "This package computes arrays, not text: it gets random ones.";
  for (const label of document.querySelectorAll(".controls label")) label.hidden = !writes;
  $("go").textContent = writes ? "Generate" : "Run";
  $("go").disabled = false;
  showNetwork();
  await showFigures();
  remember(address);
}

/** Shows nothing of the package before. */
function clear() {
  $("go").disabled = true;
  $("failure").hidden = true;
  $("heatmap").replaceChildren();
  $("output").replaceChildren(hint);
  for (const id of ["speed", "used", "hits", "memory"]) $(id).textContent = "–";
  for (const id of ["fetched", "kept"]) $(id).style.width = 0;
  $("fetched-words").textContent = $("size-words").textContent = "";
}

async function generate() {
  running = new AbortController();
  $("go").textContent = "Stop";
  const output = $("output");
  output.replaceChildren();
  const prompt = $("prompt").disabled ? "" : $("prompt").value;
  if (prompt) output.append(span("given", prompt));
  let made = 0;
  const begun = performance.now();
  try {
    const options = {
      maxNewTokens: Number($("count").value),
      temperature: Number($("temperature").value),
      seed: Math.floor(Math.random() * 2 ** 32),
      signal: running.signal,
    };
    for await (const { token, text, routes } of pack.generate(prompt || [], options)) {
      if (!pack) return;
      const shown = pack.info.tokenizer === null ? `${token} ` : text;
      const follow = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
      if (shown) output.append(span("made", shown));
      if (follow) output.scrollTop = output.scrollHeight;
      heatmap.now(routes);
      made++;
      $("speed").textContent = (made / ((performance.now() - begun) / 1000)).toFixed(1);
      await showFigures();
      // The page shows a token before the next one is asked for.
      await new Promise(requestAnimationFrame);
    }
  } finally {
    running = null;
    $("go").textContent = "Generate";
    if (pack) {
      heatmap.now([]);
      await showFigures();
    }
  }
}

/** One forward pass of random inputs, for packages that write no text. */
async function runOnce() {
  const rows = 32;
  const inputs = {};
  for (const { name, dtype, shape, limit } of pack.info.inputs) {
    const sizes = shape.map((dim) => (typeof dim === "string" ? rows : dim));
    const length = sizes.reduce((product, dim) => product * dim, 1);
    const draw = dtype.startsWith("i")
      ? () => Math.floor(Math.random() * (limit ?? 2))
      : () => Math.random() * 2 - 1;
    inputs[name] = { data: Array.from({ length }, draw), shape: sizes };
  }
  const begun = performance.now();
  const outputs = await pack.forward(inputs);
  const lines = Object.entries(outputs).map(([name, { shape, data }]) => {
    const some = Array.from(data.slice(0, 6), (one) =>
      typeof one === "bigint" ? String(one) : one.toPrecision(4),
    );
    return `${name} [${shape.join(", ")}]\n  ${some.join("  ")} …\n\n`;
  });
  $("output").replaceChildren(...lines.map((line) => span("made", line)));
  $("speed").textContent = (rows / ((performance.now() - begun) / 1000)).toFixed(1);
  await showFigures();
}

async function showFigures() {
  const stats = await pack.stats();
  const { bytes, layers } = pack.info;
  const share = (part) => `${Math.min(100, (100 * part) / bytes).toFixed(1)}%`;
  heatmap.heat(stats.routed);
  $("fetched").style.width = share(stats.bytesFetched);
  const kept = stats.store === "none" ? 0 : heatmap.here * (layers[0]?.expertBytes ?? 0);
  $("kept").style.width = share(kept);
  $("fetched-words").textContent = `${size(stats.bytesFetched)} downloaded`;
  $("size-words").textContent =
    `now, of a package of ${size(bytes)} · ${size(kept)} of experts kept here`;
  const asked = stats.expertHits + stats.expertMisses;
  $("used").textContent = `${heatmap.used} of ${heatmap.size}`;
  $("hits").textContent = asked ? `${((100 * stats.expertHits) / asked).toFixed(0)}%` : "–";
  $("memory").textContent = size(stats.residentExpertBytes);
}

function showNetwork() {
  const offline = !navigator.onLine || pack?.info.offline;
  const badge = $("badge");
  badge.className = `badge ${offline ? "offline" : "online"}`;
  badge.textContent = offline ? "offline, running from this machine" : "online";
}

function showFailure(error) {
  if (error.name === "AbortError" || error.name === "ClosedError") return;
  $("failure").textContent = `${error.name}: ${error.message}`;
  $("failure").hidden = false;
  if (!pack) $("name").textContent = "No package";
}

function remember(address) {
  const recent = JSON.parse(localStorage.getItem("recent") ?? "[]");
  const all = [address, ...recent.filter((one) => one !== address)].slice(0, 8);
  localStorage.setItem("recent", JSON.stringify(all));
  $("recent").replaceChildren(...all.map((value) => Object.assign(new Option(), { value })));
}

const span = (className, textContent) =>
  Object.assign(document.createElement("span"), { className, textContent });

function size(bytes) {
  const units = ["B", "KB", "MB", "GB"];
  const unit = Math.min(3, Math.floor(Math.log10(Math.max(1, bytes)) / 3));
  return `${(bytes / 1000 ** unit).toFixed(unit ? 1 : 0)} ${units[unit]}`;
}

const words = (count) => Intl.NumberFormat("en", { notation: "compact" }).format(count);

$("picker").addEventListener("submit", (event) => {
  event.preventDefault();
  open(new URL($("address").value, location.href).href).catch(showFailure);
});

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  (writes ? generate() : runOnce()).catch(showFailure);
});

$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey) return;
  event.preventDefault();
  if (!running && !$("go").disabled) $("composer").requestSubmit();
});

addEventListener("online", showNetwork);
addEventListener("offline", showNetwork);

const wanted = new URL(new URLSearchParams(location.search).get("package") ?? "/", location.href)
  .href;
$("address").value = wanted;
await installShell().catch(() => {});
showNetwork();
await open(wanted).catch(showFailure);
