// A package that is open in the worker: everything below the RPC.

import { checkInputs, concatenate, filled, fromBytes, slice, tokensIn } from "./arrays.js";
import { Blobs, readManifest } from "./blobs.js";
import { Breath, Serial } from "./concurrency.js";
import { parseIntegrity } from "./digest.js";
import { openDisk } from "./disk.js";
import { InputError, UnsupportedError } from "./errors.js";
import { Fetcher } from "./fetcher.js";
import { MAX_MANIFEST_BYTES, expertKey, packageBytes, parseManifest } from "./manifest.js";
import { Pager, plainFloats, ramBudget } from "./pager.js";
import { neededSteps, runProgram } from "./program.js";
import { readHeader } from "./safetensors.js";
import { Sessions, TRUNK_DEVICE, startOnnxRuntime } from "./sessions.js";
import { State } from "./state.js";
import { openCodec } from "./text.js";

// Tokens per run: bounds the memory of intermediate values.
const CHUNK = 512;

/** One open package. Its calls may overlap: they take turns, one program at a time. */
export class Model {
  #parts;
  #turn = new Serial();
  #tokens = 0;

  constructor(parts) {
    this.#parts = parts;
  }

  /** See index.d.ts. `notify` hears of every event. */
  static async open(options, notify, signal) {
    const { url, file } = locate(options.url);
    const disk = await openDisk(options.store ?? "auto", options.diskBudget, notify);
    const fetcher = new Fetcher(url);
    const integrity = options.integrity ? parseIntegrity(options.integrity) : null;
    const device = options.device ?? "wasm";
    const source = await readManifest(fetcher, disk, file, {
      url: new URL(file, url).href,
      integrity,
      most: MAX_MANIFEST_BYTES,
      signal,
    });
    const manifest = parseManifest(source.bytes);
    checkDevice(manifest, device);
    const budget = ramBudget(manifest, options.ramBudget);
    const blobs = new Blobs(fetcher, disk, options.verify ?? "first", notify);
    const steps = neededSteps(manifest.plan.steps, [
      ...[...manifest.plan.outputs].map(([name, { value }]) => value ?? name),
      ...manifest.plan.state.keys(),
    ]);
    const always = alwaysNeeded(manifest, steps);
    disk.keep([source.name, ...always.map((path) => manifest.files.get(path).sha256)]);
    const threads = options.threads ?? defaultThreads();
    const [modules, ...contents] = await Promise.all([
      startOnnxRuntime(options.ortUrl, device, threads),
      ...always.map((path) => blobs.read({ file: path, ...manifest.files.get(path) }, signal)),
    ]);
    signal?.throwIfAborted();
    const files = new Map(always.map((path, index) => [path, contents[index]]));
    const sessions = new Sessions(modules);
    const pager = new Pager({ manifest, blobs, sessions, graphs: files, device, budget, notify });
    const engine = {
      manifest,
      pager,
      breath: new Breath(),
      counts: new RouteCounts(manifest),
      ...(await openTrunk(manifest, steps, files, sessions, signal)),
    };
    const codec = openCodec(manifest.tokenizer, files);
    // The resident file's bytes are inside the sessions now.
    if (manifest.resident) files.delete(manifest.resident);
    const model = new Model({
      engine,
      disk,
      fetcher,
      blobs,
      codec,
      source,
      always,
      device,
      threads,
    });
    notify({ status: "ready" });
    return model;
  }

  get manifest() {
    return this.#parts.engine.manifest;
  }

  get codec() {
    return this.#parts.codec;
  }

  newState() {
    return new State(this.manifest.plan);
  }

  /** What a caller wants to know of the package before running it. */
  describe() {
    const { manifest } = this;
    const { source, device, threads } = this.#parts;
    return {
      name: manifest.name,
      version: manifest.version,
      family: manifest.family,
      digest: source.digest,
      config: manifest.config,
      parameters: Object.fromEntries(manifest.parameters),
      card: manifest.card,
      bytes: packageBytes(manifest) + source.bytes.length,
      layers: [...manifest.layers.values()].map(({ layer, experts, topK, kind }) => ({
        layer,
        experts,
        topK,
        expertBytes: kind.bytes,
      })),
      inputs: signature(manifest.plan.inputs),
      outputs: signature(manifest.plan.outputs),
      tokenizer: manifest.tokenizer?.kind ?? null,
      generation: manifest.generation,
      device,
      threads,
      offline: source.offline,
    };
  }

  /** Map of output name to array, and the routes of every chunk; moves `state` on. */
  async forward(given, { state = this.newState(), outputs, signal } = {}) {
    const { plan } = this.manifest;
    const inputs = checkInputs(plan, given);
    const wanted = outputs ?? [...plan.outputs.keys()];
    for (const name of wanted)
      if (!plan.outputs.has(name))
        throw new InputError(
          `outputs: expected some of ${[...plan.outputs.keys()].join(", ")}, found '${name}'`,
        );
    const count = tokensIn(plan, inputs);
    if (count === 0)
      return { values: new Map(wanted.map((name) => [name, untouched(plan, name, state)])), routes: [] };
    return this.#turn.run(async () => {
      const before = state.save();
      const parts = [];
      const routes = [];
      state.checkRoom(count);
      const chunk = this.#chunk(count);
      try {
        for (let begin = 0; begin < count; begin += chunk) {
          const end = Math.min(begin + chunk, count);
          const part = await this.#run(cut(plan, inputs, begin, end, count), state, wanted, signal);
          parts.push(part.values);
          routes.push(part.routes);
          this.#tokens += end - begin;
        }
      } catch (error) {
        state.restore(before);
        throw error;
      }
      return { values: new Map(wanted.map((name) => [name, join(plan, name, parts)])), routes };
    });
  }

  /** Brings experts, [[layer, expert], …], to this machine's disk. */
  async prefetch(pairs, signal) {
    const { disk, blobs } = this.#parts;
    if (disk.kind === "none")
      throw new InputError("prefetch: this pack keeps nothing on disk (store: none)");
    const shards = this.#shards(pairs).filter(({ sha256 }) => !disk.has(sha256));
    await Promise.all(shards.map((shard) => blobs.read(shard, signal)));
    await disk.save();
  }

  /** Whether these experts, or without an argument the whole package, are on disk. */
  isCached(pairs) {
    const { disk, always, source } = this.#parts;
    const shards = pairs ? this.#shards(pairs) : [...this.manifest.shards.values()];
    const names = shards.map(({ sha256 }) => sha256);
    if (!pairs)
      names.push(source.name, ...always.map((path) => this.manifest.files.get(path).sha256));
    return names.every((name) => disk.has(name));
  }

  /** Removes all of this package from disk. */
  async clearCache() {
    const { disk, source } = this.#parts;
    const files = [...this.manifest.files.values(), ...this.manifest.shards.values()];
    for (const name of new Set([source.name, ...files.map(({ sha256 }) => sha256)]))
      if (disk.has(name)) await disk.delete(name);
    await disk.save();
  }

  /** Counters since opening. */
  stats() {
    const { engine, disk, fetcher, blobs } = this.#parts;
    const { pager } = engine;
    return {
      tokens: this.#tokens,
      expertHits: pager.hits,
      expertMisses: pager.misses,
      evictions: pager.evictions,
      residentExpertBytes: pager.bytes,
      peakResidentExpertBytes: pager.peak,
      ramBudget: pager.budget,
      requests: fetcher.requests,
      bytesFetched: fetcher.bytes,
      diskReads: blobs.diskReads,
      corrupt: blobs.corrupt,
      store: disk.kind,
      diskBytes: disk.bytes,
      diskEvictions: disk.evictions,
      routed: engine.counts.report(),
    };
  }

  /** Remembers what was used last; call when a sequence ends. */
  async rest() {
    await this.#parts.disk.save();
  }

  async #run(inputs, state, wanted, signal) {
    const { outputs } = this.manifest.plan;
    const names = new Map(wanted.map((name) => [name, outputs.get(name).value ?? name]));
    const { values, routes } = await runProgram(
      this.#parts.engine,
      inputs,
      state,
      new Set(names.values()),
      signal,
    );
    return {
      values: new Map([...names].map(([name, value]) => [name, values.get(value)])),
      routes,
    };
  }

  /** An expert that sees the whole sequence, and no state, gets it in one piece. */
  #chunk(count) {
    const { plan, layers } = this.manifest;
    const whole = plan.steps.some(
      (step) =>
        step.kind === "experts" &&
        !step.inputs.size &&
        layers.get(step.layer).kind.scope !== "token",
    );
    return whole ? count : CHUNK;
  }

  #shards(pairs) {
    return pairs.map(([layer, expert]) => {
      const shard = this.manifest.shards.get(expertKey(layer, expert));
      if (!shard) throw new InputError(`there is no expert ${expert} in layer ${layer}`);
      return shard;
    });
  }
}

/** How many tokens each expert was routed to. */
class RouteCounts {
  #counts;

  constructor(manifest) {
    const layers = [...manifest.layers.values()];
    this.#counts = new Map(layers.map(({ layer, experts }) => [layer, new Array(experts).fill(0)]));
  }

  add(layer, groups) {
    for (const [expert, { rows }] of groups) this.#counts.get(layer)[expert] += rows.length;
  }

  report() {
    return [...this.#counts].map(([layer, tokens]) => ({ layer, tokens: [...tokens] }));
  }
}

/** The sessions of the graphs in `steps`, and the resident tensors they bind as inputs. */
async function openTrunk(manifest, steps, files, sessions, signal) {
  const graphs = new Map();
  const options = { fold: "all", device: TRUNK_DEVICE };
  const { resident } = manifest;
  const external = resident ? { [resident.split("/").pop()]: files.get(resident) } : {};
  const weights = new Map();
  const bound = new Set(steps.flatMap((step) => [...(step.weights?.values() ?? [])]));
  const header = bound.size ? readHeader(files.get(resident), resident) : new Map();
  for (const name of bound) {
    const spec = header.get(name);
    if (!spec || spec.dtype === "bf16")
      throw new UnsupportedError(
        `${resident}: '${name}' is missing, or bf16, which cannot be bound`,
      );
    const bytes = files.get(resident).slice(spec.begin, spec.end);
    weights.set(name, fromBytes(spec.dtype, spec.shape, bytes));
  }
  for (const { graph } of steps.filter((step) => step.kind === "graph")) {
    signal?.throwIfAborted();
    if (!graphs.has(graph))
      graphs.set(graph, await sessions.create(graph, files.get(graph), external, options));
  }
  return { graphs, weights };
}

/** The files every token needs: the graphs of `steps` and kinds, the resident part, the tokenizer. */
function alwaysNeeded({ kinds, layers, resident, tokenizer }, steps) {
  const used = new Set([...layers.values()].map(({ kind }) => kind));
  const graphs = [...kinds.values()].filter((kind) => used.has(kind)).map(({ graph }) => graph);
  const trunk = steps.filter(({ kind }) => kind === "graph").map(({ graph }) => graph);
  const rest = [resident, tokenizer?.file].filter(Boolean);
  return [...new Set([...trunk, ...graphs, ...rest])];
}

/** The package's folder and the manifest's name in it, from the address of either. */
function locate(address) {
  const url = new URL(address);
  if (url.pathname.endsWith(".zip"))
    throw new UnsupportedError("a browser opens packages that are folders, not single .zip files", {
      hint: "`evermind-pack serve FILE.zip` serves one as a folder.",
    });
  if (url.pathname.endsWith(".json")) {
    const file = url.pathname.split("/").pop();
    return { url: new URL(".", url), file: decodeURIComponent(file) };
  }
  if (!url.pathname.endsWith("/")) url.pathname += "/";
  return { url, file: "manifest.json" };
}

function checkDevice({ kinds }, device) {
  for (const [name, kind] of kinds)
    if (device !== "wasm" && !plainFloats(kind))
      throw new UnsupportedError(
        `device: ${device} has no kernels for packed experts ('${name}')`,
        {
          hint: "Use device: 'wasm', or export with --dtype f16.",
        },
      );
}

function defaultThreads() {
  const cores = navigator.hardwareConcurrency ?? 1;
  return globalThis.crossOriginIsolated ? Math.max(1, Math.min(4, cores >> 1)) : 1;
}

function signature(specs) {
  return [...specs].map(([name, { dtype, shape, limit }]) => ({ name, dtype, shape, limit }));
}

function cut(plan, inputs, begin, end, count) {
  if (end - begin === count) return inputs;
  const part = new Map(inputs);
  for (const [name, { shape }] of plan.inputs) {
    const axis = shape.indexOf("T");
    if (axis >= 0) part.set(name, slice(inputs.get(name), axis, begin, end));
  }
  return part;
}

function join(plan, name, parts) {
  const axis = plan.outputs.get(name).shape.indexOf("T");
  const arrays = parts.map((part) => part.get(name));
  return axis < 0 ? arrays.at(-1) : concatenate(arrays, axis);
}

/** An output of a call without tokens: of fixed shape in the state, it is what it still is. */
function untouched(plan, name, state) {
  const { dtype, shape, value } = plan.outputs.get(name);
  const spec = plan.state.get(value ?? name);
  if (spec && !spec.grows) return state.current.get(value ?? name);
  return filled(
    dtype,
    shape.map((dim) => (typeof dim === "string" ? 0 : dim)),
  );
}
