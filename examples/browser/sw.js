// Keeps the page, the runtime and ONNX Runtime for when there is no network. The package's own
// files are not its business: the runtime keeps those, checked, in a store of its own.

const SHELL = "evermind-demo";
const KINDS = /(\/|\.(html|css|js|mjs|wasm|svg))$/;

const ours = (url) => url.origin === location.origin && KINDS.test(url.pathname);

addEventListener("install", () => skipWaiting());
addEventListener("activate", (event) => event.waitUntil(clients.claim()));

// What the page had loaded before this worker was there.
addEventListener("message", ({ data: { keep } }) => {
  for (const address of keep) if (ours(new URL(address))) load(new Request(address));
});

addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method !== "GET" || request.headers.has("Range")) return;
  if (ours(new URL(request.url))) event.respondWith(load(request));
});

/** The network's answer, and a copy of it for later; else the copy. */
async function load(request) {
  const shell = await caches.open(SHELL);
  try {
    const response = await fetch(request);
    if (response.ok) await shell.put(request.url, response.clone());
    return response;
  } catch (error) {
    const copy = await shell.match(request.url, { ignoreSearch: true });
    if (copy) return copy;
    throw error;
  }
}
