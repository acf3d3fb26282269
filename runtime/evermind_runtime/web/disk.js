// What stays on this machine between visits: a store of blobs under a byte budget.
//
// Blobs are called by their sha256, so two packages that share a shard keep it once. The least
// recently used ones go first; those of the open package that every token needs never go.

import { BudgetError, InputError, StoreError } from "./errors.js";
import { CacheStore } from "./store-cache.js";
import { OpfsStore } from "./store-opfs.js";

const INDEX = "index.json";
const LOCK = "evermind-pack-disk";
const STORES = { opfs: OpfsStore, cache: CacheStore };

/** Opens `choice`: "opfs", "cache", "none", or "auto", the first of them that works. */
export async function openDisk(choice, budget, notify) {
  if (!["auto", "opfs", "cache", "none"].includes(choice))
    throw new InputError(`store: expected auto, opfs, cache or none, found '${choice}'`);
  if (budget !== undefined && !(Number.isSafeInteger(budget) && budget >= 0))
    throw new BudgetError(`diskBudget: expected bytes as a whole number, found ${budget}`);
  if (choice === "none") return new Disk(null, 0, notify);
  const reasons = [];
  for (const kind of choice === "auto" ? ["opfs", "cache"] : [choice]) {
    try {
      const store = await STORES[kind].open();
      if (kind === "opfs") await probe(store);
      const disk = new Disk(store, budget, notify);
      await disk.load();
      return disk;
    } catch (error) {
      reasons.push(`${kind}: ${error.message}`);
    }
  }
  if (choice !== "auto") throw new StoreError(`store: cannot be had: ${reasons.join("; ")}`);
  notify({ status: "store-failed", reason: reasons.join("; ") });
  return new Disk(null, 0, notify);
}

/** Some browsers have OPFS but lack what writing to it safely needs. */
async function probe(store) {
  await store.put("probe", new Uint8Array(1));
  await store.delete("probe");
}

/** Blobs by name, at most `budget` bytes of them (null: as many as the browser gives). */
export class Disk {
  #store;
  #budget;
  #notify;
  #used = new Map(); // name → bytes, the least recently used first
  #kept = new Set();
  bytes = 0;
  evictions = 0;

  constructor(store, budget, notify) {
    this.#store = store;
    this.#budget = budget ?? Infinity;
    this.#notify = notify;
  }

  get kind() {
    return this.#store?.kind ?? "none";
  }

  /** Takes stock of what is there, in the order it was last used in, and keeps to the budget. */
  async load() {
    const sizes = new Map(await this.#store.list());
    sizes.delete(INDEX);
    let order = [];
    try {
      order = JSON.parse(new TextDecoder().decode((await this.#store.get(INDEX)) ?? undefined));
    } catch {
      // Without an order the listing's will do.
    }
    const known = Array.isArray(order) ? order.filter((name) => sizes.has(name)) : [];
    for (const name of new Set([...known, ...sizes.keys()])) this.#note(name, sizes.get(name));
    await this.#locked(() => this.#shrink(this.#budget));
  }

  /** Never gives up `names`. */
  keep(names) {
    for (const name of names) this.#kept.add(name);
  }

  has(name) {
    return this.#used.has(name);
  }

  /** The blob called `name`, or null. */
  async get(name) {
    if (!this.#store) return null;
    let bytes = null;
    try {
      bytes = await this.#store.get(name);
    } catch (error) {
      this.#notify({ status: "store-failed", reason: `${name}: ${error.message}` });
    }
    this.#forget(name);
    if (bytes) this.#note(name, bytes.length);
    return bytes;
  }

  /** Keeps a blob if there is room; what cannot be kept is fetched again next time. */
  async put(name, bytes) {
    if (!this.#store) return;
    await this.#locked(async () => {
      await this.#shrink(this.#budget - bytes.length);
      if (this.bytes + bytes.length > this.#budget) return;
      try {
        await this.#write(name, bytes);
      } catch (error) {
        this.#notify({ status: "store-failed", reason: `${name}: ${error.message}` });
        return;
      }
      this.#forget(name);
      this.#note(name, bytes.length);
    });
  }

  async delete(name) {
    this.#forget(name);
    await this.#store?.delete(name);
  }

  /** Remembers the order of use for the next visit. */
  async save() {
    if (!this.#store) return;
    const order = new TextEncoder().encode(JSON.stringify([...this.#used.keys()]));
    await this.#store.put(INDEX, order).catch(() => {});
  }

  async #write(name, bytes) {
    try {
      await this.#store.put(name, bytes);
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
      await this.#shrink(this.bytes / 2);
      await this.#store.put(name, bytes);
    }
  }

  async #shrink(limit) {
    for (const [name] of this.#used) {
      if (this.bytes <= limit) return;
      if (this.#kept.has(name)) continue;
      this.evictions++;
      await this.delete(name);
    }
  }

  #note(name, bytes) {
    this.#used.set(name, bytes);
    this.bytes += bytes;
  }

  #forget(name) {
    this.bytes -= this.#used.get(name) ?? 0;
    this.#used.delete(name);
  }

  /** One writer at a time among all pages of this origin. */
  #locked(job) {
    return navigator.locks ? navigator.locks.request(LOCK, job) : job();
  }
}
