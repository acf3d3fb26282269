// Bytes over HTTP: a whole file or one range of it, exactly as long as asked for.

import { Gate } from "./concurrency.js";
import { NetworkError, isAbort } from "./errors.js";

const PARALLEL = 4;
const ATTEMPTS = 3;
const BACKOFF_MS = 250;

/** Fetches the files of one package. */
export class Fetcher {
  #base;
  #gate = new Gate(PARALLEL);
  /** Requests made and bytes received since opening. */
  requests = 0;
  bytes = 0;

  /** `base` is the URL of the package's folder, with its last slash. */
  constructor(base) {
    this.#base = base;
  }

  /**
   * `bytes` bytes of `file` from `offset`; `whole` if that is all of it.
   *
   * `cache` is fetch's; `onBytes(n)` hears of every chunk, negative when an attempt was in vain.
   * Raises `NetworkError` when the last attempt failed.
   */
  read({ file, offset = 0, bytes, whole = true }, { signal, cache, onBytes } = {}) {
    const url = new URL(file.split("/").map(encodeURIComponent).join("/"), this.#base);
    return this.#retried(file, url, signal, onBytes, (count) =>
      readOnce(url, { file, offset, bytes, whole }, { signal, cache, count }),
    );
  }

  /** All of a small file whose length is not known, at most `most` bytes. */
  readUnknown(file, most, { signal, cache } = {}) {
    const url = new URL(file, this.#base);
    return this.#retried(file, url, signal, undefined, async (count) => {
      const response = await answered(url, file, { signal, cache });
      const parts = [];
      let length = 0;
      for await (const chunk of chunks(response)) {
        count(chunk.length);
        parts.push(chunk);
        length += chunk.length;
        if (length > most)
          throw new NetworkError(`${file}: longer than ${most} bytes`, { file, final: true });
      }
      return joined(parts, length);
    });
  }

  /** What `attempt(count)` gives, tried a few times; `count` hears of every chunk. */
  #retried(file, url, signal, onBytes, attempt) {
    return this.#gate.run(async () => {
      for (let tries = 1; ; tries++) {
        let received = 0;
        const count = (n) => {
          received += n;
          this.bytes += n;
          onBytes?.(n);
        };
        try {
          this.requests++;
          return await attempt(count);
        } catch (error) {
          onBytes?.(-received);
          if (isAbort(error) || signal?.aborted) throw signal?.reason ?? error;
          if (tries === ATTEMPTS || error.final) throw named(error, file, url);
          await pause(BACKOFF_MS * 2 ** (tries - 1), signal);
        }
      }
    }, signal);
  }
}

async function readOnce(url, { file, offset, bytes, whole }, { signal, cache, count }) {
  const headers = whole ? {} : { Range: `bytes=${offset}-${offset + bytes - 1}` };
  const response = await answered(url, file, { signal, cache, headers });
  // A server that knows no ranges sends the file from its beginning.
  let skip = whole || response.status === 206 ? 0 : offset;
  const started = /^bytes (\d+)-/.exec(response.headers.get("Content-Range") ?? "");
  if (response.status === 206 && started && Number(started[1]) !== offset)
    throw new NetworkError(`${file}: asked for bytes from ${offset}, got ${started[0]}`, { file });
  const buffer = new Uint8Array(bytes);
  let filled = 0;
  for await (const chunk of chunks(response)) {
    count(chunk.length);
    const rest = chunk.subarray(Math.min(skip, chunk.length));
    skip -= chunk.length - rest.length;
    if (rest.length > bytes - filled) {
      if (whole || response.status === 206)
        throw new NetworkError(`${file}: expected ${bytes} bytes, found more`, { file });
      buffer.set(rest.subarray(0, bytes - filled), filled);
      return buffer;
    }
    buffer.set(rest, filled);
    filled += rest.length;
  }
  if (filled !== bytes)
    throw new NetworkError(`${file}: expected ${bytes} bytes, found ${filled}`, { file });
  return buffer;
}

async function answered(url, file, options) {
  const response = await fetch(url, options);
  if (response.ok) return response;
  await response.body?.cancel();
  const status = response.status;
  throw new NetworkError(`${file}: the server answered ${status} ${response.statusText}`, {
    file,
    url: url.href,
    status,
    // Asking again helps only if the server was the one in trouble.
    final: status < 500 && status !== 408 && status !== 429,
  });
}

/** The chunks of a body; what is left of it is cancelled when the caller stops early. */
async function* chunks(response) {
  if (!response.body) return;
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function joined(parts, length) {
  const whole = new Uint8Array(length);
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

function named(error, file, url) {
  if (error instanceof NetworkError) return error;
  return new NetworkError(`${file}: could not be fetched from ${url.href}: ${error.message}`, {
    file,
    url: url.href,
  });
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), {
      once: true,
    });
  });
}
