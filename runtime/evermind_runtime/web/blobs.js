// The package's bytes: from disk if they are there, else fetched; checked before anyone sees them.

import { Shared } from "./concurrency.js";
import { sha256Hex } from "./digest.js";
import { InputError, IntegrityError, NetworkError } from "./errors.js";

/** Reads whole files and shards of one package, each at most once at a time. */
export class Blobs {
  #fetcher;
  #disk;
  #always;
  #notify;
  #shared = new Shared();
  #trusted = new Set();
  /** How many reads were answered from disk, and how many found damage there. */
  diskReads = 0;
  corrupt = 0;

  constructor(fetcher, disk, verify, notify) {
    if (verify !== "first" && verify !== "always")
      throw new InputError(`verify: expected 'first' or 'always', found '${verify}'`);
    this.#fetcher = fetcher;
    this.#disk = disk;
    this.#always = verify === "always";
    this.#notify = notify;
  }

  /**
   * The bytes of `blob`: {file, bytes, sha256, offset?, whole?, layer?, expert?}. Not to be changed.
   *
   * A blob on disk that is damaged is fetched again. One that is wrong on the wire is fetched
   * once more, past all caches; then `IntegrityError`. Whoever asks for a blob that is on its
   * way waits for the same one.
   */
  read(blob, signal) {
    return this.#shared.get(blob.sha256, signal, (inner) => this.#read(blob, inner));
  }

  async #read(blob, signal) {
    const stored = await this.#stored(blob);
    if (stored) return stored;
    const fetched = await this.#fetched(blob, signal);
    await this.#disk.put(blob.sha256, fetched);
    return fetched;
  }

  async #stored(blob) {
    if (!this.#disk.has(blob.sha256)) return null;
    const bytes = await this.#disk.get(blob.sha256);
    if (!bytes) return null;
    const known = !this.#always && this.#trusted.has(blob.sha256);
    if (bytes.length === blob.bytes && (known || (await sha256Hex(bytes)) === blob.sha256)) {
      this.#trusted.add(blob.sha256);
      this.diskReads++;
      this.#notify({ status: "cached", ...about(blob) });
      return bytes;
    }
    this.corrupt++;
    this.#notify({ status: "corrupt", ...about(blob) });
    await this.#disk.delete(blob.sha256);
    return null;
  }

  async #fetched(blob, signal) {
    let loaded = 0;
    const onBytes = (count) => {
      loaded += count;
      this.#notify({ status: "progress", ...about(blob), loaded });
    };
    // What is kept on disk by its content need not lie in the browser's own cache too.
    const usual = this.#disk.kind === "none" ? "default" : "no-store";
    let found = "";
    this.#notify({ status: "initiate", ...about(blob) });
    for (const cache of [usual, "reload"]) {
      const bytes = await this.#fetcher.read(blob, { signal, cache, onBytes });
      found = await sha256Hex(bytes);
      if (found === blob.sha256) {
        this.#trusted.add(blob.sha256);
        this.#notify({ status: "done", ...about(blob), loaded: blob.bytes });
        return bytes;
      }
      loaded = 0;
    }
    throw new IntegrityError(
      `${blob.file}: sha256 mismatch\n  expected ${blob.sha256} (manifest.json)\n  found    ${found}`,
      {
        file: blob.file,
        expected: blob.sha256,
        found,
        hint: "The file was changed or damaged on its way: ask whoever serves it.",
      },
    );
  }
}

/**
 * The bytes and digest of manifest.json. With a known `integrity` and a copy on disk nothing is
 * fetched; without a network the copy of the last visit serves.
 */
export async function readManifest(fetcher, disk, file, { url, integrity, most, signal }) {
  const name = `manifest-${await sha256Hex(new TextEncoder().encode(url))}`;
  const copy = async () => {
    const bytes = disk.has(name) ? await disk.get(name) : null;
    return bytes && { bytes, digest: await sha256Hex(bytes), offline: true };
  };
  if (integrity) {
    const kept = await copy();
    if (kept?.digest === integrity) return { ...kept, name, offline: false };
  }
  let bytes;
  try {
    bytes = await fetcher.readUnknown(file, most, { signal, cache: "no-cache" });
  } catch (error) {
    // Only a network that is not there calls for the copy: what a server says is its word.
    const kept = error instanceof NetworkError && error.status === undefined ? await copy() : null;
    if (!kept || integrity) throw error;
    return { ...kept, name };
  }
  const digest = await sha256Hex(bytes);
  if (integrity && digest !== integrity)
    throw new IntegrityError(
      `${file}: sha256 mismatch\n  expected ${integrity} (integrity)\n  found    ${digest}`,
      { file, expected: integrity, found: digest },
    );
  await disk.put(name, bytes);
  return { bytes, digest, name, offline: false };
}

function about({ file, bytes, layer, expert }) {
  return { file, total: bytes, ...(layer === undefined ? {} : { layer, expert }) };
}
