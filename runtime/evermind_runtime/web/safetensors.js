// The header of resident.safetensors: which tensor lies where.

import { integer, list, object } from "./check.js";
import { ManifestError } from "./errors.js";

const DTYPES = {
  F32: "f32",
  F64: "f64",
  F16: "f16",
  BF16: "bf16",
  I64: "i64",
  I32: "i32",
  U8: "u8",
  BOOL: "bool",
};

/** Map of tensor name to {dtype, shape, begin, end}; offsets count from the file's first byte. */
export function readHeader(bytes, where) {
  const length =
    bytes.length >= 8
      ? Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true))
      : -1;
  if (length < 2 || 8 + length > bytes.length)
    throw new ManifestError(`${where}: not a safetensors file`);
  let raw;
  try {
    raw = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  } catch (error) {
    throw new ManifestError(`${where}: its header is not JSON: ${error.message}`);
  }
  const tensors = new Map();
  for (const [name, spec] of Object.entries(object(raw, where))) {
    if (name === "__metadata__") continue;
    object(spec, name);
    const shape = list(spec.shape, `${where}: ${name}`, (dim, place) => integer(dim, place), 16);
    const offsets = list(
      spec.data_offsets,
      `${where}: ${name}`,
      (one, place) => integer(one, place),
      2,
    );
    const [begin, end] = offsets.map((offset) => 8 + length + offset);
    if (!(spec.dtype in DTYPES) || !(begin <= end && end <= bytes.length))
      throw new ManifestError(`${where}: ${name}: unknown dtype, or outside the file`);
    tensors.set(name, { dtype: DTYPES[spec.dtype], shape, begin, end });
  }
  return tensors;
}
