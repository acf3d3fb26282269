// evermind-pack in a browser: see docs/browser.md, and index.d.ts for every option.

import { ClosedError, EvermindError, InputError, fromWire } from "./errors.js";

export * from "./errors.js";

/** A package that is open: a worker runs it, this object talks to it. */
export class EvermindPack {
  #worker;
  #calls = new Map(); // call → {resolve, reject}
  #count = 0;
  #ended = null;
  #info = null;
  #onProgress;

  /** Use `open`. */
  constructor(onProgress) {
    this.#onProgress = onProgress;
    this.#worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
    this.#worker.onmessage = ({ data }) => this.#hear(data);
    this.#worker.onerror = (event) =>
      this.#end(
        new EvermindError(`the worker failed: ${event.message ?? "it could not be loaded"}`),
      );
  }

  /** Opens the package at `url`: its folder, or its manifest.json. */
  static async open(url, { signal, onProgress, ortUrl, ...options } = {}) {
    signal?.throwIfAborted();
    const pack = new EvermindPack(onProgress);
    // Nobody else can use the pack yet, so giving up ends the whole worker at once.
    const abort = () => pack.#end(signal.reason);
    signal?.addEventListener("abort", abort, { once: true });
    try {
      const here = globalThis.document?.baseURI ?? location.href;
      const ort = new URL(ortUrl ?? new URL("../onnxruntime-web/dist/", import.meta.url), here)
        .href;
      pack.#info = await pack.#call("open", {
        options: {
          ...options,
          url: new URL(url, here).href,
          ortUrl: ort.endsWith("/") ? ort : `${ort}/`,
        },
      });
    } catch (error) {
      pack.#end(error);
      throw error;
    } finally {
      signal?.removeEventListener("abort", abort);
    }
    return pack;
  }

  /** What the package is. */
  get info() {
    return this.#info;
  }

  /** Named arrays in, named arrays out. */
  forward(inputs, { state, outputs, signal } = {}) {
    return this.#call("forward", { inputs, outputs, state: handleOf(state) }, signal);
  }

  /** Continues `prompt`, a text or token ids; one token is computed for each that is asked for. */
  async *generate(prompt, { signal, state, ...options } = {}) {
    const args = { prompt, options, state: handleOf(state) };
    const [handle, begun] = await this.#begin("generate", args, signal);
    const abort = () => this.#worker.postMessage({ abort: begun });
    signal?.addEventListener("abort", abort, { once: true });
    try {
      for (;;) {
        const piece = await this.#call("next", { handle }, signal);
        if (piece === null) return;
        yield piece;
      }
    } finally {
      signal?.removeEventListener("abort", abort);
      if (!this.#ended) await this.#call("end", { handle, begun });
    }
  }

  /** A fresh state for one sequence. */
  async newState() {
    return new PackState(await this.#call("newState"), (method, args) => this.#call(method, args));
  }

  /** Token ids of `text`; with `special`, among the tokens that begin and end a text. */
  encode(text, { special = true } = {}) {
    return this.#call("encode", { text, special });
  }

  /** Fetches experts, [[layer, expert], …], ahead of need. */
  prefetch(pairs, { signal } = {}) {
    return this.#call("prefetch", { pairs }, signal);
  }

  /** Whether these experts (without an argument: the whole package) are on this machine. */
  isCached(pairs) {
    return this.#call("isCached", { pairs });
  }

  /** Removes this package from this machine. */
  clearCache() {
    return this.#call("clearCache");
  }

  /** Counters since opening. */
  stats() {
    return this.#call("stats");
  }

  /** Gives back all memory. Calls that still wait fail with `ClosedError`. */
  async close() {
    if (this.#ended) return;
    await this.#call("close").catch(() => {});
    this.#end(new ClosedError("this pack has been closed"));
  }

  async #call(method, args = {}, signal) {
    const [value] = await this.#begin(method, args, signal);
    return value;
  }

  /** [value, number of the call]. */
  #begin(method, args, signal) {
    return new Promise((resolve, reject) => {
      if (this.#ended) return reject(this.#ended);
      if (signal?.aborted) return reject(signal.reason);
      const call = ++this.#count;
      const abort = () => {
        this.#worker.postMessage({ abort: call });
        this.#calls.delete(call);
        reject(signal.reason);
      };
      const settle = (done) => (value) => {
        signal?.removeEventListener("abort", abort);
        done(value);
      };
      signal?.addEventListener("abort", abort, { once: true });
      const answer = (value) => resolve([value, call]);
      this.#calls.set(call, { resolve: settle(answer), reject: settle(reject) });
      try {
        this.#worker.postMessage({ call, method, args });
      } catch (error) {
        this.#calls.delete(call);
        settle(reject)(new InputError(`${method}: an argument cannot be sent: ${error.message}`));
      }
    });
  }

  #hear({ call, value, error, event }) {
    if (event) return this.#onProgress?.(event);
    const waiting = this.#calls.get(call);
    this.#calls.delete(call);
    if (error) waiting?.reject(fromWire(error));
    else waiting?.resolve(value);
  }

  #end(reason) {
    if (this.#ended) return;
    this.#ended = reason;
    this.#worker.terminate();
    for (const { reject } of this.#calls.values()) reject(reason);
    this.#calls.clear();
  }
}

/** What a sequence carries from call to call; it lives in the worker. */
class PackState {
  #call;

  constructor(handle, call) {
    this.handle = handle;
    this.#call = call;
  }

  /** Copies of its arrays. */
  save() {
    return this.#call("saveState", { state: this.handle });
  }

  /** Takes over saved arrays. */
  restore(arrays) {
    return this.#call("restoreState", { state: this.handle, arrays });
  }

  /** Forgets it. */
  release() {
    return this.#call("releaseState", { state: this.handle });
  }
}

function handleOf(state) {
  if (state === undefined) return undefined;
  if (!(state instanceof PackState)) throw new InputError("state: expected one made by newState()");
  return state.handle;
}
