// Blobs in Cache Storage, for browsers without OPFS in workers.

const CACHE = "evermind-pack";

/** Keeps named blobs as responses. `open` fails where the browser has no Cache Storage. */
export class CacheStore {
  kind = "cache";
  #cache;

  constructor(cache) {
    this.#cache = cache;
  }

  static async open() {
    return new CacheStore(await caches.open(CACHE));
  }

  #key = (name) => new URL(`/.evermind-pack/${name}`, self.location.origin).href;

  /** The blob called `name`, or null. */
  async get(name) {
    const response = await this.#cache.match(this.#key(name));
    return response ? new Uint8Array(await response.arrayBuffer()) : null;
  }

  async put(name, bytes) {
    const headers = { "Content-Length": String(bytes.length) };
    await this.#cache.put(this.#key(name), new Response(bytes, { headers }));
  }

  async delete(name) {
    await this.#cache.delete(this.#key(name));
  }

  /** [[name, bytes], …] of all blobs. */
  async list() {
    const found = [];
    for (const request of await this.#cache.keys()) {
      const response = await this.#cache.match(request);
      const name = new URL(request.url).pathname.split("/").pop();
      found.push([name, Number(response?.headers.get("Content-Length") ?? 0)]);
    }
    return found;
  }
}
