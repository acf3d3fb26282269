// Blobs in the Origin Private File System, through the worker's synchronous handles.

const FOLDER = "evermind-pack";

/** Keeps named blobs as files. `open` fails where the browser has no OPFS. */
export class OpfsStore {
  kind = "opfs";
  #folder;

  constructor(folder) {
    this.#folder = folder;
  }

  static async open() {
    const root = await navigator.storage.getDirectory();
    return new OpfsStore(await root.getDirectoryHandle(FOLDER, { create: true }));
  }

  /** The blob called `name`, or null. */
  async get(name) {
    try {
      const handle = await this.#folder.getFileHandle(name);
      const file = await handle.getFile();
      return new Uint8Array(await file.arrayBuffer());
    } catch (error) {
      if (error.name === "NotFoundError" || error.name === "NotReadableError") return null;
      throw error;
    }
  }

  /** Writes under a temporary name, flushes and renames: a blob is whole or not there. */
  async put(name, bytes) {
    const handle = await this.#folder.getFileHandle(`${name}.${crypto.randomUUID()}.tmp`, {
      create: true,
    });
    try {
      const access = await handle.createSyncAccessHandle();
      try {
        if (access.write(bytes, { at: 0 }) !== bytes.length)
          throw new DOMException("the disk took only part of it", "QuotaExceededError");
        access.flush();
      } finally {
        access.close();
      }
      await handle.move(name);
    } catch (error) {
      await this.#folder.removeEntry(handle.name).catch(() => {});
      throw error;
    }
  }

  async delete(name) {
    await this.#folder.removeEntry(name).catch((error) => {
      if (error.name !== "NotFoundError") throw error;
    });
  }

  /** [[name, bytes], …] of all blobs; what a killed page left behind is removed. */
  async list() {
    const found = [];
    for await (const [name, handle] of this.#folder.entries()) {
      if (handle.kind !== "file") continue;
      if (!name.endsWith(".tmp")) found.push([name, (await handle.getFile()).size]);
      // Another tab may be writing it: then it is locked, and stays.
      else await this.#folder.removeEntry(name).catch(() => {});
    }
    return found;
  }
}
