// Waiting together: one at a time, at most n at a time, and one job shared by all who want it.

/** Runs jobs one after another, in the order they were given. */
export class Serial {
  #last = Promise.resolve();

  /** The result of `job()`, started when all earlier jobs have ended. */
  run(job) {
    const result = this.#last.then(job);
    this.#last = result.catch(() => {});
    return result;
  }
}

/** Lets at most `limit` jobs run at once. */
export class Gate {
  #free;
  #waiting = [];

  constructor(limit) {
    this.#free = limit;
  }

  async run(job, signal) {
    signal?.throwIfAborted();
    if (this.#free > 0) this.#free--;
    else
      await abortable(new Promise((resolve) => this.#waiting.push(resolve)), signal, () =>
        this.#leave(),
      );
    try {
      signal?.throwIfAborted();
      return await job();
    } finally {
      this.#leave();
    }
  }

  #leave() {
    const next = this.#waiting.shift();
    if (next) next();
    else this.#free++;
  }
}

/**
 * Jobs by key, each run once for all who ask while it runs. A job is aborted when the last of
 * those who wait for it gave up.
 */
export class Shared {
  #running = new Map();

  /** The result of `job(signal)` for `key`, or of the one that runs already. */
  async get(key, signal, job) {
    signal?.throwIfAborted();
    let entry = this.#running.get(key);
    if (!entry) {
      const controller = new AbortController();
      entry = { controller, waiting: 0, result: null };
      this.#running.set(key, entry);
      const forget = () => this.#running.get(key) === entry && this.#running.delete(key);
      entry.result = job(controller.signal).finally(forget);
      entry.result.catch(() => {});
    }
    entry.waiting++;
    try {
      return await abortable(entry.result, signal);
    } finally {
      entry.waiting--;
      if (entry.waiting === 0 && signal?.aborted) {
        // Whoever comes next starts anew, and does not inherit the abort.
        if (this.#running.get(key) === entry) this.#running.delete(key);
        entry.controller.abort();
      }
    }
  }
}

/** `promise`, or a rejection as soon as `signal` fires; then `late` is called if it comes after all. */
export function abortable(promise, signal, late) {
  if (!signal) return promise;
  return new Promise((resolve, reject) => {
    const abort = () => {
      reject(signal.reason);
      if (late) promise.then(late, () => {});
    };
    if (signal.aborted) return abort();
    signal.addEventListener("abort", abort, { once: true });
    const done = (settle) => (value) => {
      signal.removeEventListener("abort", abort);
      settle(value);
    };
    promise.then(done(resolve), done(reject));
  });
}

/**
 * A turn of the event loop, if the last one is some milliseconds ago: messages (an abort among
 * them) come in between two graphs, which never yield.
 */
export class Breath {
  #last = 0;
  #channel = new MessageChannel();
  #resume = null;

  constructor() {
    this.#channel.port1.onmessage = () => this.#resume?.();
  }

  async take(signal) {
    const now = performance.now();
    if (now - this.#last > 4) {
      await new Promise((resolve) => {
        this.#resume = resolve;
        this.#channel.port2.postMessage(0);
      });
      this.#last = performance.now();
    }
    signal?.throwIfAborted();
  }
}
