// manifest.json: what a browser uses of it, checked before it is used (docs/format.md).

import { DTYPE_NAMES, itemBytes, sizeOf } from "./arrays.js";
import { integer, list, map, number, object, oneOf, path, sha256, text } from "./check.js";
import { ManifestError, UnsupportedError } from "./errors.js";

const SCHEMA = "evermind.package/1";
export const MAX_MANIFEST_BYTES = 64 * 1024 * 1024;
const COUNT = 2 ** 31 - 1;

const name = (value, place) => text(value, place, 1, 256);
const count = (value, place) => integer(value, place, 0, COUNT);
const positive = (value, place) => integer(value, place, 1, COUNT);
const dtype = (value, place) => oneOf(value, place, DTYPE_NAMES);
const optional = (value, place, read) => (value == null ? null : read(value, place));

/** The manifest in `bytes`; raises `ManifestError`, or `UnsupportedError` for another version. */
export function parseManifest(bytes) {
  if (bytes.length > MAX_MANIFEST_BYTES)
    throw new ManifestError(`manifest.json: expected at most 64 MiB, found ${bytes.length} bytes`);
  let raw;
  try {
    raw = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (error) {
    throw new ManifestError(`manifest.json: not JSON: ${error.message}`);
  }
  object(raw, "the whole");
  if (raw.schema !== SCHEMA)
    throw new UnsupportedError(
      `manifest.json: schema: expected '${SCHEMA}', found ${JSON.stringify(raw.schema)}`,
    );
  if (list(raw.requires ?? [], "requires", name).length)
    throw new UnsupportedError(
      `manifest.json: requires: this runtime does not know ${raw.requires}`,
    );
  const manifest = {
    name: name(raw.name, "name"),
    version: name(raw.version, "version"),
    family: name(raw.family, "family"),
    config: object(raw.config, "config"),
    parameters: map(raw.parameters, "parameters", integer),
    card: raw.card == null ? {} : object(raw.card, "card"),
    files: map(raw.files, "files", readFile),
    kinds: map(raw.kinds, "kinds", readKind),
    layers: new Map(),
    shards: new Map(),
    plan: readPlan(raw.plan),
    resident: optional(raw.resident, "resident", path),
    tokenizer: optional(raw.tokenizer, "tokenizer", readTokenizer),
    generation: readGeneration(raw.generation ?? {}),
  };
  readLayers(manifest, raw.layers);
  readShards(manifest, raw.shards);
  checkFiles(manifest);
  checkPlan(manifest);
  return manifest;
}

/** A map's key for one expert. */
export const expertKey = (layer, expert) => `${layer}/${expert}`;

/** All bytes of the package but the manifest's own. */
export function packageBytes(manifest) {
  let sum = 0;
  for (const { bytes } of manifest.files.values()) sum += bytes;
  return sum;
}

function readFile(value, place) {
  object(value, place);
  return {
    bytes: integer(value.bytes, `${place}.bytes`),
    sha256: sha256(value.sha256, `${place}.sha256`),
  };
}

function readKind(value, place) {
  object(value, place);
  if (value.graph_external == null)
    throw new UnsupportedError(
      `manifest.json: ${place}: has no graph_external, which a browser runs experts with`,
      { hint: "Export the package again with a current evermind-pack." },
    );
  const bytes = integer(value.bytes, `${place}.bytes`, 1);
  return {
    graph: path(value.graph_external, `${place}.graph_external`),
    bytes,
    scope: oneOf(value.scope ?? "token", `${place}.scope`, ["token", "sequence"]),
    tensors: list(value.tensors, `${place}.tensors`, (one, at) => readTensor(one, at, bytes)),
  };
}

function readTensor(value, place, end) {
  object(value, place);
  const tensor = {
    name: name(value.name, `${place}.name`),
    dtype: dtype(value.dtype, `${place}.dtype`),
    shape: list(value.shape, `${place}.shape`, positive, 16),
    offset: integer(value.offset, `${place}.offset`),
    bytes: integer(value.bytes, `${place}.bytes`),
  };
  if (sizeOf(tensor.shape) * itemBytes(tensor.dtype) !== tensor.bytes)
    throw new ManifestError(
      `manifest.json: ${place}: its shape does not take ${tensor.bytes} bytes`,
    );
  if (tensor.offset + tensor.bytes > end)
    throw new ManifestError(`manifest.json: ${place}: ends outside its shard of ${end} bytes`);
  return tensor;
}

function readLayers(manifest, raw) {
  for (const layer of list(raw, "layers", readLayer)) {
    if (!manifest.kinds.has(layer.kindName) || manifest.layers.has(layer.layer))
      throw new ManifestError(
        `manifest.json: layers: layer ${layer.layer} stands twice, or its kind is unknown`,
      );
    if (layer.topK > layer.experts)
      throw new ManifestError(`manifest.json: layers: layer ${layer.layer} has top_k > experts`);
    layer.kind = manifest.kinds.get(layer.kindName);
    manifest.layers.set(layer.layer, layer);
  }
}

function readLayer(value, place) {
  object(value, place);
  return {
    layer: count(value.layer, `${place}.layer`),
    kindName: name(value.kind, `${place}.kind`),
    experts: positive(value.experts, `${place}.experts`),
    topK: positive(value.top_k, `${place}.top_k`),
  };
}

function readShards(manifest, raw) {
  for (const shard of list(raw, "shards", readShard)) {
    const place = `shards: layer ${shard.layer} expert ${shard.expert}`;
    const key = expertKey(shard.layer, shard.expert);
    const layer = manifest.layers.get(shard.layer);
    const file = manifest.files.get(shard.file);
    if (!layer || shard.expert >= layer.experts || manifest.shards.has(key))
      throw new ManifestError(`manifest.json: ${place}: no such expert, or it stands twice`);
    if (shard.bytes !== layer.kind.bytes)
      throw new ManifestError(
        `manifest.json: ${place}: expected ${layer.kind.bytes} bytes, found ${shard.bytes}`,
      );
    if (!file || shard.offset + shard.bytes > file.bytes)
      throw new ManifestError(`manifest.json: ${place}: lies outside ${shard.file}`);
    shard.whole = shard.offset === 0 && shard.bytes === file.bytes;
    manifest.shards.set(key, shard);
  }
  for (const { layer, experts } of manifest.layers.values())
    for (let expert = 0; expert < experts; expert++)
      if (!manifest.shards.has(expertKey(layer, expert)))
        throw new ManifestError(
          `manifest.json: shards: layer ${layer} expert ${expert} is missing`,
        );
}

function readShard(value, place) {
  object(value, place);
  return {
    layer: count(value.layer, `${place}.layer`),
    expert: count(value.expert, `${place}.expert`),
    file: path(value.file, `${place}.file`),
    offset: integer(value.offset, `${place}.offset`),
    bytes: integer(value.bytes, `${place}.bytes`, 1),
    sha256: sha256(value.sha256, `${place}.sha256`),
  };
}

function readTokenizer(value, place) {
  object(value, place);
  const kind = oneOf(value.kind, `${place}.kind`, ["bytes", "tokenizers"]);
  const file = optional(value.file, `${place}.file`, path);
  if (kind === "tokenizers" && !file)
    throw new ManifestError(`manifest.json: ${place}: names no file`);
  return { kind, file };
}

function readGeneration(value) {
  object(value, "generation");
  return {
    stopTokens: list(value.stop_tokens ?? [], "generation.stop_tokens", count),
    bosToken: optional(value.bos_token, "generation.bos_token", count),
    temperature: number(value.temperature ?? 0, "generation.temperature"),
    topK: count(value.top_k ?? 0, "generation.top_k"),
    topP: number(value.top_p ?? 1, "generation.top_p"),
    minP: number(value.min_p ?? 0, "generation.min_p"),
    repetitionPenalty: number(value.repetition_penalty ?? 1, "generation.repetition_penalty"),
    maxNewTokens: positive(value.max_new_tokens ?? 64, "generation.max_new_tokens"),
  };
}

function readPlan(value) {
  object(value, "plan");
  return {
    inputs: map(value.inputs, "plan.inputs", readValue),
    outputs: map(value.outputs, "plan.outputs", readValue),
    state: map(value.state, "plan.state", readState),
    // The decode program's fused segments would copy their experts' weights at every call; with
    // one token the prefill program computes the same from sessions that hold them.
    steps: list(value.prefill, "plan.prefill", readStep),
  };
}

const dimension = (value, place) =>
  typeof value === "string" ? name(value, place) : positive(value, place);

function readValue(value, place) {
  object(value, place);
  return {
    dtype: carried(value.dtype, place),
    shape: list(value.shape, `${place}.shape`, dimension, 16),
    default: optional(value.default, `${place}.default`, number),
    limit: optional(value.limit, `${place}.limit`, positive),
    value: optional(value.value, `${place}.value`, name),
    aliases: list(value.aliases ?? [], `${place}.aliases`, name),
    finite: optional(value.finite, `${place}.finite`, text),
  };
}

function readState(value, place) {
  object(value, place);
  const shape = list(value.shape, `${place}.shape`, dimension, 16);
  const length = optional(value.length, `${place}.length`, name);
  const axis = shape.findIndex((dim) => typeof dim === "string");
  const fixed = shape.filter((dim) => typeof dim === "number");
  if (shape.length - fixed.length > 1 || (length === null ? axis > 0 : axis < 0))
    throw new ManifestError(
      `manifest.json: ${place}.shape: only the first dimension may grow, or one of a buffer`,
    );
  const window = optional(value.window, `${place}.window`, positive);
  if (window !== null && length === null)
    throw new ManifestError(`manifest.json: ${place}.window: this state is no buffer`);
  return {
    dtype: carried(value.dtype, place),
    shape,
    axis,
    grows: axis >= 0,
    length,
    window,
    fixed,
    init: number(value.init ?? 0, `${place}.init`),
    limit: optional(value.limit, `${place}.limit`, positive),
    finite: optional(value.finite, `${place}.finite`, text),
  };
}

function carried(value, place) {
  if (dtype(value, `${place}.dtype`) === "bf16")
    throw new ManifestError(`manifest.json: ${place}.dtype: bf16 is for weights only`);
  return value;
}

function readStep(value, place) {
  object(value, place);
  const names = (one, at) => map(one ?? {}, `${place}.${at}`, name);
  if (oneOf(value.step, `${place}.step`, ["graph", "experts"]) === "graph") {
    if (value.experts != null || Object.keys(value.pools ?? {}).length)
      throw new ManifestError(`manifest.json: ${place}: experts and pools are not for prefill`);
    return {
      kind: "graph",
      graph: path(value.graph, `${place}.graph`),
      inputs: names(value.inputs, "inputs"),
      outputs: names(value.outputs, "outputs"),
      weights: names(value.weights, "weights"),
    };
  }
  return {
    kind: "experts",
    layer: count(value.layer, `${place}.layer`),
    x: name(value.x, `${place}.x`),
    ids: name(value.ids, `${place}.ids`),
    gates: name(value.gates, `${place}.gates`),
    y: name(value.y, `${place}.y`),
    skips: value.skips === true,
    inputs: names(value.inputs, "inputs"),
  };
}

function checkFiles({ files, kinds, plan, resident, tokenizer }) {
  const used = [...kinds.values(), ...plan.steps.filter((step) => step.kind === "graph")];
  const paths = used.map((one) => one.graph);
  if (resident) paths.push(resident);
  if (tokenizer?.file) paths.push(tokenizer.file);
  for (const one of files.keys()) path(one, "files");
  for (const one of paths)
    if (!files.has(one)) throw new ManifestError(`manifest.json: '${one}' is not in files`);
  if (!resident && plan.steps.some((step) => step.weights?.size))
    throw new ManifestError("manifest.json: plan.prefill: binds weights, but nothing is resident");
}

/** A value is produced once, before it is read; each layer's experts run once. */
function checkPlan({ layers, plan }) {
  const lengths = new Set([...plan.state.values()].flatMap(({ length }) => length ?? []));
  const known = new Set([...plan.inputs.keys(), ...plan.state.keys(), ...lengths]);
  const written = new Set();
  const ran = new Set();
  plan.steps.forEach((step, index) => {
    const place = `manifest.json: plan.prefill[${index}]`;
    for (const value of stepReads(step))
      if (!known.has(value)) throw new ManifestError(`${place}: nothing has produced '${value}'`);
    for (const value of stepWrites(step)) {
      if (written.has(value) || plan.inputs.has(value) || lengths.has(value))
        throw new ManifestError(`${place}: '${value}' is produced twice`);
      written.add(value);
      known.add(value);
    }
    if (step.kind !== "experts") return;
    if (!layers.has(step.layer) || ran.has(step.layer))
      throw new ManifestError(`${place}: layer ${step.layer} is unknown, or runs twice`);
    ran.add(step.layer);
    if (step.inputs.size && layers.get(step.layer).kind.scope !== "sequence")
      throw new ManifestError(`${place}: inputs are for experts that see the whole sequence`);
  });
  for (const value of plan.state.keys())
    if (!written.has(value))
      throw new ManifestError(`manifest.json: plan.state: '${value}' is never written`);
  for (const [key, spec] of plan.outputs)
    if (!known.has(spec.value ?? key))
      throw new ManifestError(`manifest.json: plan.outputs: '${key}' is never produced`);
}

/** The blackboard values a step reads. */
export function stepReads(step) {
  return step.kind === "graph"
    ? [...step.inputs.values()]
    : [step.x, step.ids, step.gates, ...step.inputs.values()];
}

/** The blackboard values a step writes. */
export function stepWrites(step) {
  return step.kind === "graph" ? [...step.outputs.values()] : [step.y];
}
