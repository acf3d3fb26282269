// State: what a sequence carries from call to call.

import { concatenate, filled, fromBytes, sizeOf, slice } from "./arrays.js";
import { InputError } from "./errors.js";

// As rows.py has it: so many rows have left a window before they are forgotten.
const spareRows = (window) => Math.max(64, Math.floor(window / 8));

/**
 * The named arrays of one sequence; those that grow begin without rows. Graphs copy every input
 * and output here, so a buffer is kept as its filled rows, and given just the room it needs.
 */
export class State {
  #specs;
  #arrays = new Map();

  constructor(plan) {
    this.#specs = plan.state;
    for (const [name, spec] of this.#specs)
      this.#arrays.set(
        name,
        spec.grows ? empty(spec, 0) : filled(spec.dtype, spec.fixed, spec.init),
      );
  }

  /** Map of name to array, of buffers their filled rows. Never changed in place. */
  get current() {
    return this.#arrays;
  }

  /** Whether it holds what a new state does: no token has left a trace. */
  get fresh() {
    return [...this.#specs].every(([name, { dtype, fixed, init, grows }]) => {
      const { data } = this.#arrays.get(name);
      if (grows) return !data.length;
      const begun = filled(dtype, fixed, init).data;
      return data.every((one, index) => one === begun[index]);
    });
  }

  /** Map of name to what steps of `tokens` tokens read: buffers with room, and their lengths. */
  board(tokens) {
    const pairs = [...this.#arrays];
    this.#arrays = new Map(pairs.map(([n, one]) => [n, withinWindow(this.#specs.get(n), one)]));
    const board = new Map(this.#arrays);
    for (const [name, spec] of this.#specs) {
      if (spec.length === null) continue;
      const array = this.#arrays.get(name);
      board.set(name, concatenate([array, empty(spec, tokens)], spec.axis));
      board.set(spec.length, filled("i64", [1], array.shape[spec.axis]));
    }
    return board;
  }

  /** How many more tokens it can take; Infinity where nothing limits them. */
  get room() {
    const limited = [...this.#specs].filter(([, { limit }]) => limit !== null);
    return Math.min(...limited.map(([name, { limit }]) => limit - this.#held(name)));
  }

  /** The tokens that a value counts: its rows, or, where it does not grow, what it says. */
  #held(name) {
    const { shape, data } = this.#arrays.get(name);
    const { grows, axis } = this.#specs.get(name);
    return grows ? shape[axis] : Number(data[0]);
  }

  /** Raises `InputError` if a growing value cannot take `rows` more. */
  checkRoom(rows) {
    for (const [name, { limit }] of this.#specs) {
      if (limit === null) continue;
      const count = this.#held(name);
      if (count + rows > limit)
        throw new InputError(
          `state '${name}': expected at most ${limit} tokens in all, found ${count} and ${rows} more`,
          { hint: "Start a new state, with fewer of the earlier tokens." },
        );
    }
  }

  /** Takes over what a program wrote for `tokens`: new values, and new rows of what grows. */
  advance(written, tokens) {
    const next = new Map(this.#arrays);
    for (const [name, array] of written) {
      const spec = this.#specs.get(name);
      checkShape(name, spec, array);
      const before = this.#arrays.get(name);
      const rows = array.shape[spec.axis];
      if (spec.length !== null && rows !== before.shape[spec.axis] + tokens)
        throw new InputError(`state '${name}': expected a buffer as it was, found ${rows} rows`);
      const appended = spec.grows && spec.length === null;
      next.set(name, appended ? concatenate([before, array], 0) : array);
    }
    this.#arrays = next;
  }

  /** What `restore` takes back. Arrays are never changed in place, so this copies nothing. */
  save() {
    return new Map(this.#arrays);
  }

  /** Takes over saved arrays; raises `InputError` unless names, dtypes and shapes fit. */
  restore(arrays) {
    const next = new Map();
    const lengths = new Map();
    for (const [name, spec] of this.#specs) {
      const array = arrays.get(name);
      const like = this.#arrays.get(name);
      if (array?.dtype !== spec.dtype || array.data?.constructor !== like.data.constructor)
        throw new InputError(`state: expected '${name}' of ${spec.dtype}`);
      checkShape(name, spec, array);
      if (sizeOf(array.shape) !== array.data.length)
        throw new InputError(`state '${name}': its data do not fill [${array.shape}]`);
      const rows = array.shape[spec.axis];
      if (spec.grows && spec.limit !== null && rows > spec.limit)
        throw new InputError(`state '${name}': expected at most ${spec.limit} rows`);
      const other = lengths.get(spec.length) ?? rows;
      if (spec.length !== null && rows !== other)
        throw new InputError(`state '${name}': expected ${other} rows as others, found ${rows}`);
      lengths.set(spec.length, rows);
      const view = new Uint8Array(array.data.buffer, array.data.byteOffset, array.data.byteLength);
      next.set(name, fromBytes(spec.dtype, array.shape, view.slice()));
    }
    checkWindows(this.#specs, next);
    this.#arrays = next;
  }
}

/** Raises `InputError` if rows are missing that a window still needs. */
function checkWindows(specs, arrays) {
  let tokens = null;
  for (const [name, { grows, axis, limit, window }] of specs)
    if (grows && window === null) tokens = arrays.get(name).shape[axis];
    else if (!grows && limit !== null) tokens = Number(arrays.get(name).data[0]);
  for (const [name, { axis, window }] of specs) {
    if (window === null || tokens === null) continue;
    const rows = arrays.get(name).shape[axis];
    const least = Math.min(tokens, window - 1);
    if (rows < least || rows > tokens)
      throw new InputError(
        `state '${name}': expected ${least} to ${tokens} rows of ${tokens} tokens, found ${rows}`,
      );
  }
}

/** The rows of a buffer that count, once enough others have gathered before them. */
function withinWindow({ window, axis }, array) {
  const rows = array.shape[axis];
  if (window === null || rows < window + spareRows(window)) return array;
  return slice(array, axis, rows - window + 1, rows);
}

function empty({ dtype, shape }, rows) {
  return filled(
    dtype,
    shape.map((dim) => (typeof dim === "string" ? rows : dim)),
  );
}

function checkShape(name, { axis, shape, fixed }, array) {
  const found = array.shape.filter((_, index) => index !== axis);
  if (array.shape.length !== shape.length || fixed.some((dim, index) => found[index] !== dim))
    throw new InputError(`state '${name}': expected shape [${shape}], found [${array.shape}]`);
}
