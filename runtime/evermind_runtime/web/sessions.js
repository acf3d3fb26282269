// ONNX Runtime: loading it, and making and running sessions.
//
// onnxruntime-web mounts external data in one table for the whole module, so two sessions made
// at once would read each other's weights: whoever uses this makes and runs one at a time.

import { fromTensor, toTensor } from "./arrays.js";
import { DeviceError, GraphError, InputError, UnsupportedError } from "./errors.js";

const BUILDS = {
  wasm: ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"],
  webgpu: ["ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"],
};

/** Where all graphs but the experts' run. */
export const TRUNK_DEVICE = "wasm";

/** Raised by `create` when the WebAssembly heap is full; the pager makes room and tries again. */
export class HeapFull extends Error {}

/**
 * Loads ONNX Runtime from the folder at `url`: a Map of device to module.
 *
 * The trunk's graphs always run on the CPU, in the plain build: the WebGPU build has no kernels
 * for double precision, and every step's result is needed on this side anyway. So `webgpu`
 * takes both builds, and runs the experts.
 */
export async function startOnnxRuntime(url, device, threads) {
  if (!BUILDS[device]) throw new InputError(`device: expected wasm or webgpu, found '${device}'`);
  if (!Number.isSafeInteger(threads) || threads < 1)
    throw new InputError(`threads: expected 1 or more, found ${threads}`);
  if (device === "webgpu") await checkAdapter();
  if (threads > 1 && !globalThis.crossOriginIsolated)
    throw new DeviceError(`threads: ${threads} need a page that is cross-origin isolated`, {
      hint: "Serve it with COOP and COEP (evermind-pack serve --isolate), or ask for one thread.",
    });
  const devices = new Set([TRUNK_DEVICE, device]);
  const modules = await Promise.all([...devices].map((one) => load(url, one, threads)));
  return new Map([...devices].map((one, index) => [one, modules[index]]));
}

async function load(url, device, threads) {
  const [script, wasm] = BUILDS[device].map((file) => new URL(file, url).href);
  let ort;
  try {
    ort = await import(script);
  } catch (error) {
    throw new DeviceError(`onnxruntime-web could not be loaded from ${script}: ${error.message}`, {
      hint: "Pass `ortUrl`, the address of the dist/ folder of the npm package onnxruntime-web.",
    });
  }
  ort.env.wasm.wasmPaths = { wasm };
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  return ort;
}

async function checkAdapter() {
  if (await navigator.gpu?.requestAdapter().catch(() => null)) return;
  throw new DeviceError("device: this browser gives no WebGPU adapter", {
    hint: "Use device: 'wasm', or enable WebGPU in the browser.",
  });
}

/** Makes and runs sessions, one at a time. */
export class Sessions {
  #modules;

  /** `modules` is what `startOnnxRuntime` gave. */
  constructor(modules) {
    this.#modules = modules;
  }

  /**
   * A session for `model`; `external` is {location: bytes} of what its initializers lie in.
   * `fold` is how far ONNX Runtime optimises it: what is constant it then computes once, and holds.
   */
  async create(path, model, external, { fold, device }) {
    const ort = this.#modules.get(device);
    try {
      const session = await ort.InferenceSession.create(model, {
        executionProviders: [device],
        graphOptimizationLevel: fold,
        externalData: Object.entries(external).map(([file, data]) => ({ path: file, data })),
        // Repacked weights are a second copy of them.
        extra: { session: { disable_prepacking: "1" } },
      });
      return new GraphSession(path, session, ort);
    } catch (error) {
      if (/bad_alloc|out of memory|Array buffer allocation/i.test(error.message))
        throw new HeapFull(error.message);
      throw new UnsupportedError(`${path}: ONNX Runtime cannot run this graph: ${error.message}`);
    }
  }
}

/** One graph, ready to run. */
class GraphSession {
  #path;
  #session;
  #ort;

  constructor(path, session, ort) {
    this.#path = path;
    this.#session = session;
    this.#ort = ort;
  }

  /** The last dimension of the first output, if it is a number. */
  get width() {
    return this.#session.outputMetadata[0].shape?.at(-1);
  }

  /** Map of output name to array, for [[input name, array], …]. */
  async run(inputs) {
    const feeds = {};
    for (const [name, array] of inputs) feeds[name] = toTensor(this.#ort, array);
    try {
      const found = await this.#session.run(feeds);
      return new Map(Object.entries(found).map(([name, tensor]) => [name, fromTensor(tensor)]));
    } catch (error) {
      throw new GraphError(`${this.#path}: the graph failed: ${error.message}`);
    }
  }

  /** Gives its memory back. */
  release() {
    return this.#session.release();
  }
}
