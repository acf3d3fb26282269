// Named arrays: {dtype, shape, data}, with the dtypes of the manifest, and checks of inputs.

import { InputError } from "./errors.js";

// ONNX Runtime's name and the typed array of each dtype; bf16 never travels as a value.
const DTYPES = {
  f32: { bytes: 4, ort: "float32", array: Float32Array },
  f64: { bytes: 8, ort: "float64", array: Float64Array },
  f16: { bytes: 2, ort: "float16", array: Uint16Array },
  bf16: { bytes: 2 },
  i64: { bytes: 8, ort: "int64", array: BigInt64Array },
  i32: { bytes: 4, ort: "int32", array: Int32Array },
  u8: { bytes: 1, ort: "uint8", array: Uint8Array },
  bool: { bytes: 1, ort: "bool", array: Uint8Array },
};
export const DTYPE_NAMES = Object.keys(DTYPES);
const BY_ORT = Object.fromEntries(
  Object.entries(DTYPES).flatMap(([name, { ort }]) => (ort ? [[ort, name]] : [])),
);

/** Bytes of one number. */
export const itemBytes = (dtype) => DTYPES[dtype].bytes;

/** How many numbers a shape holds. */
export const sizeOf = (shape) => shape.reduce((product, dim) => product * dim, 1);

/** An array of `shape` filled with `value`. */
export function filled(dtype, shape, value = 0) {
  const data = new DTYPES[dtype].array(sizeOf(shape));
  if (value) data.fill(dtype === "i64" ? BigInt(Math.trunc(value)) : value);
  return { dtype, shape: [...shape], data };
}

/** An array over `bytes`, copied where they are not aligned for it. */
export function fromBytes(dtype, shape, bytes) {
  const { array, bytes: width } = DTYPES[dtype];
  const aligned = bytes.byteOffset % width === 0 ? bytes : bytes.slice();
  const data = new array(aligned.buffer, aligned.byteOffset, sizeOf(shape));
  return { dtype, shape: [...shape], data };
}

/** ONNX Runtime's tensor over the same memory. */
export const toTensor = (ort, { dtype, shape, data }) =>
  new ort.Tensor(DTYPES[dtype].ort, data, shape);

/** What a graph gave, as an array of ours. */
export function fromTensor(tensor) {
  return { dtype: BY_ORT[tensor.type], shape: [...tensor.dims], data: tensor.data };
}

/** Rows `begin` to `end` along `axis` of `array`, copied. */
export function slice({ dtype, shape, data }, axis, begin, end) {
  const outer = sizeOf(shape.slice(0, axis));
  const inner = sizeOf(shape.slice(axis + 1));
  const part = filled(dtype, [...shape.slice(0, axis), end - begin, ...shape.slice(axis + 1)]);
  const width = (end - begin) * inner;
  for (let row = 0; row < outer; row++) {
    const from = (row * shape[axis] + begin) * inner;
    part.data.set(data.subarray(from, from + width), row * width);
  }
  return part;
}

/** Arrays one after another along `axis`. */
export function concatenate(parts, axis) {
  if (parts.length === 1) return parts[0];
  const { dtype, shape } = parts[0];
  const length = parts.reduce((sum, part) => sum + part.shape[axis], 0);
  const whole = filled(dtype, [...shape.slice(0, axis), length, ...shape.slice(axis + 1)]);
  const outer = sizeOf(shape.slice(0, axis));
  const inner = sizeOf(shape.slice(axis + 1));
  let done = 0;
  for (const part of parts) {
    const width = part.shape[axis] * inner;
    for (let row = 0; row < outer; row++)
      whole.data.set(
        part.data.subarray(row * width, (row + 1) * width),
        (row * length + done) * inner,
      );
    done += part.shape[axis];
  }
  return whole;
}

/** The caller's arrays as the plan's inputs: named, typed, shaped and within limits. */
export function checkInputs(plan, given) {
  const names = new Map();
  for (const [name, spec] of plan.inputs)
    for (const alias of [name, ...spec.aliases]) names.set(alias, name);
  const arrays = new Map();
  for (const [key, value] of Object.entries(given)) {
    const name = names.get(key);
    if (!name)
      throw new InputError(
        `inputs: expected ${[...plan.inputs.keys()].join(", ")}, found '${key}'`,
      );
    if (arrays.has(name))
      throw new InputError(`inputs: '${name}' is given twice, once as '${key}'`);
    arrays.set(name, typed(name, plan.inputs.get(name), value));
  }
  const sizes = new Map();
  for (const [name, spec] of plan.inputs) {
    const array = arrays.get(name);
    if (!array && spec.default === null) throw new InputError(`inputs: '${name}' is missing`);
    if (array) checkShape(name, spec, array, sizes);
    if (array && spec.limit !== null) checkLimit(name, spec.limit, array);
  }
  for (const [name, spec] of plan.inputs) {
    if (arrays.has(name)) continue;
    const shape = spec.shape.map((dim) => (typeof dim === "string" ? (sizes.get(dim) ?? 1) : dim));
    arrays.set(name, filled(spec.dtype, shape, spec.default));
  }
  return arrays;
}

/** T: the length of the axis the plan calls by that name. */
export function tokensIn(plan, inputs) {
  for (const [name, spec] of plan.inputs) {
    const axis = spec.shape.indexOf("T");
    if (axis >= 0) return inputs.get(name).shape[axis];
  }
  return 1;
}

function typed(name, spec, value) {
  const { array: Type } = DTYPES[spec.dtype];
  const bare = Array.isArray(value) || ArrayBuffer.isView(value);
  const data = bare ? value : value?.data;
  if (!Array.isArray(data) && !ArrayBuffer.isView(data))
    throw new InputError(`input '${name}': expected an array, or {data, shape}`);
  const shape = bare ? [data.length] : value.shape;
  const whole = (dim) => Number.isSafeInteger(dim) && dim >= 0;
  if (!Array.isArray(shape) || !shape.every(whole) || sizeOf(shape) !== data.length)
    throw new InputError(
      `input '${name}': ${data.length} numbers do not fill the shape [${shape}]`,
    );
  if (data instanceof Type) return { dtype: spec.dtype, shape: [...shape], data };
  return { dtype: spec.dtype, shape: [...shape], data: converted(name, spec.dtype, Type, data) };
}

function converted(name, dtype, Type, data) {
  const integers = dtype === "i64" || dtype === "i32" || dtype === "u8" || dtype === "bool";
  const bad = Array.prototype.find.call(
    data,
    (one) =>
      !(typeof one === "bigint" || typeof one === "number") ||
      (integers && typeof one === "number" && !Number.isSafeInteger(one)),
  );
  if (bad !== undefined)
    throw new InputError(`input '${name}': expected numbers of ${dtype}, found ${String(bad)}`);
  return Type === BigInt64Array ? Type.from(data, BigInt) : Type.from(data, Number);
}

function checkShape(name, spec, { shape }, sizes) {
  const fits =
    shape.length === spec.shape.length &&
    spec.shape.every((dim, axis) => {
      if (typeof dim === "number") return shape[axis] === dim;
      if (!sizes.has(dim)) sizes.set(dim, shape[axis]);
      // No tokens are a sequence too; no rows of another kind are a mistake.
      return sizes.get(dim) === shape[axis] && (dim === "T" || shape[axis] > 0);
    });
  if (!fits)
    throw new InputError(`input '${name}': expected shape [${spec.shape}], found [${shape}]`);
}

function checkLimit(name, limit, { data }) {
  for (let position = 0; position < data.length; position++)
    if (data[position] < 0 || data[position] >= limit)
      throw new InputError(
        `input '${name}': expected values from 0 to ${limit - 1}, ` +
          `found ${data[position]} at position ${position}`,
      );
}
