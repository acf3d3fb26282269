// SHA-256 with WebCrypto, as lower-case hex.

import { UnsupportedError, InputError } from "./errors.js";

/** The sha256 of `bytes` in hex. Raises `UnsupportedError` where WebCrypto is missing. */
export async function sha256Hex(bytes) {
  if (!globalThis.crypto?.subtle)
    throw new UnsupportedError("this page has no WebCrypto, so nothing fetched could be checked", {
      hint: "Serve the page over https, or from localhost.",
    });
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The hex digest in an `integrity` option: `sha256-<base64>` as in HTML, or 64 hex digits. */
export function parseIntegrity(text) {
  if (/^[0-9a-f]{64}$/i.test(text)) return text.toLowerCase();
  const [, encoded] = /^sha256-([A-Za-z0-9+/]{43}=)$/.exec(text) ?? [];
  if (!encoded)
    throw new InputError(`integrity: expected sha256-<base64> or 64 hex digits, found '${text}'`);
  const bytes = Array.from(atob(encoded), (character) => character.charCodeAt(0));
  return bytes.map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
