// Every error this runtime raises on purpose, by name, and its way across the worker's border.
//
// The names are those of the Python runtime where both have the error.

/** The base of all errors raised here. `hint` says what to do, where more is known than the message. */
export class EvermindError extends Error {
  constructor(message, details = {}) {
    super(details.hint ? `${message}\n${details.hint}` : message);
    this.name = new.target.name;
    Object.assign(this, details);
  }
}

/** manifest.json is not what docs/format.md describes. */
export class ManifestError extends EvermindError {}
/** The package needs something this runtime or browser does not have. */
export class UnsupportedError extends EvermindError {}
/** Bytes are not those the manifest (or `integrity`) names; `file`, `expected`, `found`. */
export class IntegrityError extends EvermindError {}
/** A file could not be fetched; `file`, `url`, and `status` where the server answered. */
export class NetworkError extends EvermindError {}
/** A caller's argument, array or state does not fit. */
export class InputError extends EvermindError {}
/** A memory or disk budget cannot hold what must be held. */
export class BudgetError extends EvermindError {}
/** ONNX Runtime failed, or a graph gave what its plan does not allow. */
export class GraphError extends EvermindError {}
/** A value became infinite or NaN that the plan wants finite. */
export class NonFiniteError extends EvermindError {}
/** The store that was asked for cannot be had. */
export class StoreError extends EvermindError {}
/** The device that was asked for cannot be had. */
export class DeviceError extends EvermindError {}
/** The pack has been closed. */
export class ClosedError extends EvermindError {}

const CLASSES = {
  EvermindError,
  ManifestError,
  UnsupportedError,
  IntegrityError,
  NetworkError,
  InputError,
  BudgetError,
  GraphError,
  NonFiniteError,
  StoreError,
  DeviceError,
  ClosedError,
};

/** An error as a plain object that can be posted. */
export function toWire(error) {
  const { name = "Error", message = String(error), stack } = error ?? {};
  return { name, message, stack, details: error instanceof EvermindError ? { ...error } : {} };
}

/** The error again, of its own class. */
export function fromWire({ name, message, stack, details }) {
  if (name === "AbortError") return new DOMException(message, name);
  const error = new (CLASSES[name] ?? EvermindError)(message);
  Object.assign(error, details, { name });
  if (stack) error.stack = stack;
  return error;
}

/** Whether `error` only says that somebody gave up waiting. */
export function isAbort(error) {
  return error?.name === "AbortError";
}
