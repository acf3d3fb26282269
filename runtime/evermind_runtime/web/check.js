// Typed readings of JSON values: each returns its value or raises, naming the place.

import { ManifestError } from "./errors.js";

function refuse(place, expected, found) {
  const shown = JSON.stringify(found) ?? "nothing";
  const cut = shown.length > 80 ? `${shown.slice(0, 80)}…` : shown;
  throw new ManifestError(`manifest.json: ${place}: expected ${expected}, found ${cut}`);
}

/** A string of `least` to `most` characters. */
export function text(value, place, least = 1, most = 1024) {
  if (typeof value !== "string" || value.length < least || value.length > most)
    refuse(place, `a string of ${least} to ${most} characters`, value);
  return value;
}

/** One of the strings in `choices`. */
export function oneOf(value, place, choices) {
  if (!choices.includes(value)) refuse(place, `one of ${choices.join(", ")}`, value);
  return value;
}

/** A whole number from `least` to `most`. */
export function integer(value, place, least = 0, most = Number.MAX_SAFE_INTEGER) {
  if (!Number.isSafeInteger(value) || value < least || value > most)
    refuse(place, `a whole number from ${least} to ${most}`, value);
  return value;
}

/** A finite number. */
export function number(value, place) {
  if (typeof value !== "number" || !Number.isFinite(value)) refuse(place, "a number", value);
  return value;
}

/** A sha256 as 64 lower-case hex digits. */
export function sha256(value, place) {
  if (typeof value !== "string" || !/^[0-9a-f]{64}$/.test(value)) refuse(place, "a sha256", value);
  return value;
}

/** A JSON object. */
export function object(value, place) {
  if (value === null || typeof value !== "object" || Array.isArray(value))
    refuse(place, "an object", value);
  return value;
}

/** The entries of a JSON object as a Map, each read by `read(value, place)`. */
export function map(value, place, read) {
  const entries = Object.entries(object(value, place));
  return new Map(entries.map(([key, one]) => [key, read(one, `${place}[${JSON.stringify(key)}]`)]));
}

/** The items of a list, each read by `read(value, place)`. */
export function list(value, place, read, most = Infinity) {
  if (!Array.isArray(value) || value.length > most) refuse(place, "a list", value);
  return value.map((one, index) => read(one, `${place}[${index}]`));
}

/** A relative path whose parts are plain: it stays inside the package wherever it is resolved. */
export function path(value, place) {
  text(value, place);
  const plain = value.split("/").every((part) => part && part !== "." && part !== "..");
  if (!plain || /[\\:<>"|?*\u0000-\u001f\u007f]/.test(value))
    refuse(place, "a relative path", value);
  return value;
}
