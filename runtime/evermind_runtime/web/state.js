// State: what a sequence carries from call to call.

import { concatenate, filled, fromBytes, sizeOf } from "./arrays.js";
import { InputError } from "./errors.js";

/** The named arrays of one sequence; those that grow begin without rows. */
export class State {
  #specs;
  #arrays = new Map();

  constructor(plan) {
    this.#specs = plan.state;
    for (const [name, spec] of this.#specs)
      this.#arrays.set(
        name,
        spec.grows
          ? filled(spec.dtype, [0, ...spec.fixed])
          : filled(spec.dtype, spec.fixed, spec.init),
      );
  }

  /** Map of name to the array that the next step reads. Never changed in place. */
  get current() {
    return this.#arrays;
  }

  /** Raises `InputError` if a growing value cannot take `rows` more. */
  checkRoom(rows) {
    for (const [name, { grows, limit }] of this.#specs) {
      const count = this.#arrays.get(name).shape[0];
      if (grows && limit !== null && count + rows > limit)
        throw new InputError(
          `state '${name}': expected at most ${limit} tokens in all, found ${count} and ${rows} more`,
          { hint: "Start a new state, with fewer of the earlier tokens." },
        );
    }
  }

  /** Takes over what a program wrote: new values, and new rows of what grows. */
  advance(written) {
    const next = new Map(this.#arrays);
    for (const [name, array] of written) {
      const spec = this.#specs.get(name);
      checkShape(name, spec, array);
      next.set(name, spec.grows ? concatenate([this.#arrays.get(name), array], 0) : array);
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
    for (const [name, spec] of this.#specs) {
      const array = arrays.get(name);
      const like = this.#arrays.get(name);
      if (array?.dtype !== spec.dtype || array.data?.constructor !== like.data.constructor)
        throw new InputError(`state: expected '${name}' of ${spec.dtype}`);
      checkShape(name, spec, array);
      if (sizeOf(array.shape) !== array.data.length)
        throw new InputError(`state '${name}': its data do not fill [${array.shape}]`);
      if (spec.grows && spec.limit !== null && array.shape[0] > spec.limit)
        throw new InputError(`state '${name}': expected at most ${spec.limit} rows`);
      const view = new Uint8Array(array.data.buffer, array.data.byteOffset, array.data.byteLength);
      next.set(name, fromBytes(spec.dtype, array.shape, view.slice()));
    }
    this.#arrays = next;
  }
}

function checkShape(name, { grows, shape, fixed }, array) {
  const found = grows ? array.shape.slice(1) : array.shape;
  if (array.shape.length !== shape.length || fixed.some((dim, axis) => found[axis] !== dim))
    throw new InputError(`state '${name}': expected shape [${shape}], found [${array.shape}]`);
}
