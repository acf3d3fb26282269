// Text to token ids and back.

import { BpeCodec } from "./bpe.js";

/**
 * The package's tokenizer, with its `encode` and `stream`; null if it has none. One that is not
 * known here fails when it is first asked: ids can be given and taken without it.
 */
export function openCodec(tokenizer, files) {
  if (!tokenizer) return null;
  if (tokenizer.kind === "bytes") return new ByteCodec();
  try {
    return new BpeCodec(files.get(tokenizer.file), tokenizer.file);
  } catch (error) {
    return new UnknownCodec(error);
  }
}

/** Takes no text and gives none. */
class UnknownCodec {
  #reason;

  constructor(reason) {
    this.#reason = reason;
  }

  encode() {
    throw this.#reason;
  }

  stream() {
    return { push: () => "", finish: () => "" };
  }
}

/** Token id = byte value. */
class ByteCodec {
  /** The UTF-8 bytes of `text`; no special token belongs to them. */
  encode(text) {
    return [...new TextEncoder().encode(text)];
  }

  /** A fresh incremental decoder; malformed bytes become U+FFFD. */
  stream() {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return {
      push: (token) => (token < 256 ? decoder.decode(Uint8Array.of(token), { stream: true }) : ""),
      finish: () => decoder.decode(),
    };
  }
}
