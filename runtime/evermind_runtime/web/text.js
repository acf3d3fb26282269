// Text to token ids and back.

import { UnsupportedError } from "./errors.js";

/** The package's tokenizer; null if it has none. */
export function openCodec(tokenizer) {
  if (!tokenizer) return null;
  if (tokenizer.kind === "bytes") return new ByteCodec();
  return null;
}

/** Token id = byte value. */
class ByteCodec {
  /** The UTF-8 bytes of `text`. */
  encode(text) {
    return [...new TextEncoder().encode(text)];
  }

  /** A fresh incremental decoder; malformed bytes become U+FFFD. */
  stream() {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return {
      push: (token) =>
        token < 256 ? decoder.decode(Uint8Array.of(token), { stream: true }) : "",
      finish: () => decoder.decode(),
    };
  }
}
