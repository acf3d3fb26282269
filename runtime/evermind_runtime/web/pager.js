// Which experts are in memory: a byte budget, least recently used out first.
//
// A resident expert is a session whose initializers are its shard, because onnxruntime-web
// copies every input of every call. What it holds is counted, from the moment its bytes are
// asked for; a shard's own bytes live beside it only while its session is made.

import { itemBytes, sizeOf } from "./arrays.js";
import { BudgetError } from "./errors.js";
import { expertKey } from "./manifest.js";
import { HeapFull } from "./sessions.js";

// Experts of a step that may be on their way while one runs.
const AHEAD = 4;
const DEFAULT_MOST = 1.5 * 2 ** 30;

/** Whether an expert's weights are numbers as they are computed with. */
export function plainFloats(kind) {
  return kind.tensors.every(({ dtype }) => ["f16", "bf16", "f32", "f64"].includes(dtype));
}

/** How ONNX Runtime holds an expert of `kind`: how far its graph is folded, in how many bytes. */
export function held(kind) {
  // Packed numbers would unfold to many times their size: they stay packed.
  if (!plainFloats(kind)) return { fold: "disabled", bytes: kind.bytes };
  const bytes = kind.tensors.reduce(
    (sum, { dtype, shape }) => sum + sizeOf(shape) * Math.max(4, itemBytes(dtype)),
    0,
  );
  return { fold: "basic", bytes: Math.max(bytes, kind.bytes) };
}

/** The least budget: the experts one token needs in one layer. */
export function workingSet(manifest) {
  const layers = [...manifest.layers.values()];
  return Math.max(0, ...layers.map(({ kind, topK }) => topK * held(kind).bytes));
}

/** `asked`, checked; or what is sensible on this device. Raises `BudgetError`. */
export function ramBudget(manifest, asked) {
  const least = workingSet(manifest);
  const all = [...manifest.layers.values()].reduce(
    (sum, { kind, experts }) => sum + experts * held(kind).bytes,
    0,
  );
  if (asked === undefined) {
    const share = ((globalThis.navigator?.deviceMemory ?? 4) * 2 ** 30) / 4;
    return Math.max(least, Math.min(all, DEFAULT_MOST, share));
  }
  if (!Number.isSafeInteger(asked) || asked < 0)
    throw new BudgetError(`ramBudget: expected bytes as a whole number, found ${asked}`);
  if (asked < least)
    throw new BudgetError(
      `ramBudget: ${asked} bytes cannot hold the experts of one step, which take ${least} bytes`,
      { hint: `Give at least ${least}.`, needed: least },
    );
  return asked;
}

/** Makes experts resident and gives them up again. Used by one program at a time. */
export class Pager {
  #manifest;
  #blobs;
  #sessions;
  #graphs;
  #device;
  #notify;
  #resident = new Map(); // key → entry, the least recently used first
  budget;
  bytes = 0;
  peak = 0;
  hits = 0;
  misses = 0;
  evictions = 0;

  /** `graphs` is a Map of path to the bytes of each kind's graph; `device` is where experts run. */
  constructor({ manifest, blobs, sessions, graphs, device, budget, notify }) {
    this.#manifest = manifest;
    this.#blobs = blobs;
    this.#sessions = sessions;
    this.#graphs = graphs;
    this.#device = device;
    this.#notify = notify;
    this.budget = budget;
  }

  /**
   * The sessions of `experts` of a layer, one after another; each is the caller's until it asks
   * for the next. The next few are fetched meanwhile, as far as the budget allows.
   */
  async *stream(layer, experts, signal) {
    const { kind } = this.#manifest.layers.get(layer);
    const keys = experts.map((expert) => expertKey(layer, expert));
    const later = new Set(keys);
    const given = new AbortController();
    const inner = signal ? AbortSignal.any([signal, given.signal]) : given.signal;
    const ahead = [];
    let next = 0;
    let current = null;
    try {
      while (next < keys.length || ahead.length) {
        while (next < keys.length && ahead.length < AHEAD) {
          const entry = await this.#claim(keys[next], kind, later, !ahead.length, inner);
          if (!entry) break;
          ahead.push(entry);
          next++;
        }
        current = ahead.shift();
        current.session ??= await this.#load(current, kind);
        later.delete(current.key);
        yield current.session;
        current.pins--;
        current = null;
      }
    } finally {
      given.abort();
      for (const entry of current ? [current, ...ahead] : ahead) {
        entry.pins--;
        if (!entry.session) this.#drop(entry);
      }
    }
  }

  /** A session of an expert whose weights are all 0, for a look at its graph. */
  blank(kind) {
    return this.#create(kind, new Uint8Array(kind.bytes));
  }

  /** A pinned entry for the expert, on its way if need be; null if there is no room for now. */
  async #claim(key, kind, later, must, signal) {
    let entry = this.#resident.get(key);
    if (entry) {
      this.hits++;
      this.#resident.delete(key);
    } else {
      const { bytes } = held(kind);
      if (!(await this.#makeRoom(bytes, later, must))) return null;
      this.misses++;
      entry = { key, cost: bytes, pins: 0, session: null, shard: null };
      entry.shard = this.#blobs.read(this.#manifest.shards.get(key), signal);
      entry.shard.catch(() => {});
      this.bytes += bytes;
      this.peak = Math.max(this.peak, this.bytes);
    }
    entry.pins++;
    this.#resident.set(key, entry);
    return entry;
  }

  async #load(entry, kind) {
    const shard = await entry.shard;
    entry.shard = null;
    try {
      return await this.#create(kind, shard);
    } catch (error) {
      if (!(error instanceof HeapFull)) throw error;
      await this.#shrink(this.bytes / 2, new Set());
    }
    try {
      return await this.#create(kind, shard);
    } catch (error) {
      if (!(error instanceof HeapFull)) throw error;
      throw new BudgetError(`the browser has no memory left for an expert: ${error.message}`, {
        hint: "Give a smaller ramBudget.",
      });
    }
  }

  #create(kind, shard) {
    const { graph } = kind;
    const options = { fold: held(kind).fold, device: this.#device };
    return this.#sessions.create(graph, this.#graphs.get(graph), { "expert.bin": shard }, options);
  }

  /** Evicts until `bytes` fit; what this step needs later only if it `must`. */
  async #makeRoom(bytes, later, must) {
    await this.#shrink(this.budget - bytes, later);
    if (must) await this.#shrink(this.budget - bytes, new Set());
    if (this.bytes + bytes <= this.budget) return true;
    if (must)
      throw new BudgetError(`ramBudget: ${this.budget} bytes cannot hold ${bytes} more bytes`);
    return false;
  }

  async #shrink(limit, spared) {
    for (const entry of [...this.#resident.values()]) {
      if (this.bytes <= limit) return;
      if (entry.pins || spared.has(entry.key)) continue;
      this.evictions++;
      this.#drop(entry);
      const [layer, expert] = entry.key.split("/").map(Number);
      this.#notify({ status: "evict", layer, expert });
      await entry.session.release();
    }
  }

  #drop(entry) {
    if (this.#resident.get(entry.key) !== entry) return;
    this.#resident.delete(entry.key);
    this.bytes -= entry.cost;
  }
}
